"""Quantizers of QuantizeML, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qjax
from qjax.affine import dequantize
from qjax.quantizers import quantizeml as qml
from tests.quantizeml_cases import (
    ENDS,
    SETTINGS,
    _zeros,
    clip,
    codes,
    compiled,
    half_up,
    ints,
    log2_up,
    number,
    positive,
    real,
    rounded,
    same,
    scale_code,
    times_power,
)

pytestmark = pytest.mark.slow  # Many compilations.


def most_frac_bits(value_bits, most):
    return value_bits if most == 0 else min(value_bits - log2_up(most), value_bits)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 31])
@pytest.mark.parametrize("axis", [-1, -2, None])
def test_weights_are_rounded_to_the_finest_grid(axis, bits, signed):
    w = np.float32(np.random.default_rng(bits).normal(size=(3, 4)))
    w[:, 1] = 0
    value_bits = bits - signed
    over = {-1: 0, -2: 1, None: None}[axis]
    most = np.abs(w).max(over)
    scale = np.maximum(most / np.float32(2.0**value_bits - 1), np.float32(1e-6))
    scale = scale[:, None] if axis == -2 else scale
    steps = np.rint(w / scale)
    wanted = np.clip(np.float64(steps), -(2**value_bits), 2**value_bits - 1)
    for f in (qml.quantize_weight, compiled(qml.quantize_weight, "signed", "axis")):
        q = f(jnp.asarray(w), bits, signed=signed, axis=axis)
        same(q.codes, wanted)
        same(q.scale, scale)
        assert q.fixed_point.frac_bits == 0
        off = np.abs(qml.to_float(q) - w)
        assert np.all(off <= scale * np.float32(0.51) + 1e-6)


@pytest.mark.parametrize("axis", [-1, -2, None])
def test_weights_on_powers_of_two(axis):
    w = np.float32([[0.3, -1.0, 0.0], [1.5, 1.0, 1e-9]])
    q = qml.quantize_weight(jnp.asarray(w), 8, axis=axis, power_of_two=True)
    ranges = {-1: [1.5, 1.0, 1e-9], -2: [[1.0], [1.5]], None: 1.5}[axis]
    frac_bits = np.vectorize(lambda r: most_frac_bits(7, r))(ranges)
    same(q.frac_bits, frac_bits)
    same(q.codes, np.clip(np.rint(w * 2.0**frac_bits), -128, 127))


@pytest.mark.parametrize("bits", [2, 8, 32])
@pytest.mark.parametrize("w", [0.0, -0.0, 1e-45, 1e-38, 1e-12, 1e30, 3.4e38])
def test_scales_of_every_weight_are_finite(w, bits):
    x = jnp.float32([[w, -w], [0.0, w]])
    for power_of_two in (False, True):
        q = qml.quantize_weight(x, bits, power_of_two=power_of_two)
        scale = np.asarray(q.params.scale)
        assert np.all(np.isfinite(scale) & (scale > 0))
        off = np.abs(np.float64(qml.to_float(q)) - np.float64(x))
        # A power of two beyond 2^127 is none of float32: there codes saturate.
        assert np.all(off <= scale) or (power_of_two and w > 2.0**127)


def test_nan_is_seen_and_gets_no_large_code():
    w = jnp.float32([[np.nan, 1.0], [0.5, 0.25]])
    q = qml.quantize_weight(w)
    same(np.isnan(qml.to_float(q)), [[True, False], [True, False]])
    same(q.codes, [[0, 7], [0, 2]])
    assert not np.any(qml.quantize_weight(w, power_of_two=True).codes[:, 0])
    acc = qml.from_codes(_zeros(2), 23, 10)
    same(jax.jit(qml.quantize_aligned_weight)(w[0], acc).codes, [0, 1016])
    with pytest.raises(ValueError, match="all saturate"):
        qml.quantize_aligned_weight(w[0], acc)
    q, zero_point = qml.quantize_input(w[0], -1.0, 1.0, signed=False)
    same(q.codes, [zero_point, 255])
    same(qml.quantize_input(w[0], -1.0, 1.0)[0].codes, [0, 127])
    same(qml.quantize_qfloat(w, 7, jnp.float32(0.5)).codes[0, 0], 0)


@given(
    st.lists(real, min_size=4, max_size=4),
    st.integers(2, 16),
    st.integers(-5, 20),
    st.lists(positive, min_size=4, max_size=4),
    st.sampled_from([None, "scalar", "channels"]),
)
@example([9.0, 0.3, -0.1, 0.0], 4, 10, [1.0] * 4, None)
@example([0.5, 1.5, 2.5, -0.5], 8, 0, [1.0] * 4, None)
@example([9.0, 0.3, -0.1, 0.0], 5, 10, [1.0, 0.5, 2.0, 0.3], "channels")
@SETTINGS
def test_biases_become_accumulators(w, bits, frac_bits, scales, kind):
    w, value_bits = np.float32(w), bits - 1
    scale = {None: 1.0, "scalar": scales[0], "channels": scales}[kind]
    scale = np.broadcast_to(np.float32(scale), 4)
    acc = qml.FixedPoint(_zeros(1, 4), 27, jnp.int32(frac_bits))
    if kind:
        given = jnp.asarray(scale if kind == "channels" else scale[0])
        acc = qml.QFloat(acc, given)
    q = compiled(qml.quantize_aligned_weight, "bits")(jnp.asarray(w), acc, bits)
    assert type(q) is type(acc)
    fixed = q.fixed_point if kind else q
    assert (fixed.value_bits, fixed.frac_bits) == (27, frac_bits)
    ranges = np.abs(w) if bits > 4 else np.full(4, np.abs(w).max())
    for code, x, most, s in zip(fixed.codes, w, ranges, scale, strict=True):
        own = min(most_frac_bits(value_bits, most / s), frac_bits)
        wanted = rounded(x / s, value_bits, own) << (frac_bits - own)
        assert int(code) == clip(wanted, 27)


@given(
    st.lists(real, min_size=6, max_size=6),
    real,
    real,
    st.integers(2, 16),
    st.booleans(),
)
@example([0.5, -0.5, 0.25, 9, -9, 0.001], -0.5, 0.5, 8, False)
@SETTINGS
def test_inputs(x, low, high, bits, signed):
    x, low, high = np.float32(x), np.float32(min(low, high)), np.float32(max(low, high))
    value_bits = bits - signed
    f = compiled(qml.quantize_input, "bits", "signed")
    q, zero_point = f(jnp.asarray(x), low, high, bits, signed=signed)
    width = max(abs(low), abs(high)) if signed else high - low
    frac_bits = most_frac_bits(value_bits, width)
    zero = 0 if signed else rounded(-low, value_bits, frac_bits)
    assert zero_point == zero
    wanted = [clip(rounded(v, value_bits, frac_bits) + zero, value_bits) for v in x]
    same(q.codes, wanted)
    assert (q if signed else q.fixed_point).frac_bits == frac_bits


def test_inputs_per_channel():
    x = np.float32(np.random.default_rng(0).uniform(-1, 1, (2, 2, 3)))
    low, high = np.float32([-1, 0, -0.3]), np.float32([1, 2, 0.1])
    for shape in ((3,), (1, 1, 3)):
        ends = (jnp.asarray(v.reshape(shape)) for v in (low, high))
        q, zero_point = qml.quantize_input(jnp.asarray(x), *ends, 8, signed=False)
        frac_bits = [most_frac_bits(8, v) for v in high - low]
        same(q.fixed_point.frac_bits, frac_bits)
        same(zero_point, [[[128, 0, 77]]])
        grid = q.params._replace(zero_point=zero_point)
        inside = (x >= low) & (x <= high - np.asarray(grid.scale))
        off = np.abs(dequantize(q.codes, grid) - x)
        assert np.all(off[inside] <= np.broadcast_to(grid.scale, x.shape)[inside])


@given(
    codes,
    st.integers(-40, 40),
    st.none() | positive,
    st.floats(0.5, 1, width=32),
    positive,
    st.integers(2, 16),
    st.integers(1, 16),
    st.integers(8, 48),
)
@example(np.int32(ENDS), 0, 1.0, 1.0, 1.0, 8, 8, 32)
@example(np.int32(ENDS), 38, 1.0, 1.0, 1.0, 8, 16, 48)
@example(np.int32([1, 3, -1, -3, 5, -5]), 0, 0.5, 1.0, 128.0, 8, 1, 32)
@SETTINGS
def test_outputs(values, frac_bits, scale, rate, most, bits, scale_bits, buffer_bits):
    x = number(values, 31, frac_bits)
    value_bits, want = bits - 1, most_frac_bits(bits - 1, most)
    f = compiled(qml.quantize_output)
    if scale is None:
        y = f(x, most, bits)
        moved = [half_up(times_power(c, want - frac_bits)) for c in ints(x)]
    else:
        options = {"scale_bits": scale_bits, "buffer_bits": buffer_bits}
        q = qml.QFloat(x, jnp.float32(scale))
        y = f(q, most, bits, **options, rescaling_rate=jnp.float32(rate))
        code, of_scale = scale_code(np.float32(scale) * np.float32(rate), scale_bits)
        product = [clip(c * code, buffer_bits) for c in ints(x)]
        move = want - frac_bits - of_scale
        moved = [half_up(times_power(p, move)) for p in product]
    same(y.codes, [clip(v, value_bits) for v in moved])
    assert (y.value_bits, y.frac_bits) == (value_bits, want)


def test_outputs_per_channel():
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**20), 2**20, (2, 2, 3))
    scale, rate = np.float32([0.3, 1e-3, 2.0]), np.float32([1.0, 0.75, 0.5])
    ranges = np.float32([1e5, 3.0, 2e6])
    x = qml.QFloat(qml.FixedPoint(jnp.int32(values), 27, jnp.int32([0, 2, 1])), scale)
    for shape in ((3,), (1, 1, 3)):
        most, factor = (jnp.asarray(v.reshape(shape)) for v in (ranges, rate))
        y = qml.quantize_output(x, most, rescaling_rate=factor)
        for c, frac_bits in enumerate((0, 2, 1)):
            want = most_frac_bits(7, ranges[c])
            code, of_scale = scale_code(scale[c] * rate[c], 8)
            move = want - frac_bits - of_scale
            moved = [
                half_up(times_power(clip(int(v) * code, 32), move))
                for v in values[..., c].ravel()
            ]
            same(y.codes[..., c].ravel(), [clip(v, 7) for v in moved])
            assert y.frac_bits[c] == want


def test_empty_arrays_stay_empty():
    x = jnp.zeros((0, 4))
    for axis in (-1, -2, None):
        q = jax.jit(lambda x, a=axis: qml.quantize_weight(x, axis=a))(x)
        assert q.codes.shape == (0, 4) and np.all(np.isfinite(q.scale))
    same(qml.quantize_weight(x, power_of_two=True).codes, x)
    fixed = qml.quantize_fixed_point(x, 15, 7)
    assert qml.add(fixed, fixed).codes.shape == (0, 4)
    assert qml.multiply(fixed, 3).codes.shape == (0, 4)
    same(qml.reduce_sum(fixed, 0).codes, np.zeros(4))
    assert qml.quantize_aligned_weight(jnp.zeros(0), _fixed(2, 0)).codes.size == 0
    for signed in (True, False):
        assert qml.quantize_input(x, 0.0, 1.0, signed=signed)[0].codes.shape == (0, 4)
    assert qml.quantize_output(fixed, 1.0).codes.shape == (0, 4)
    assert qml.to_float(fixed).shape == (0, 4)


def test_bits_may_be_traced():
    w = jnp.float32([[0.7, -0.2], [-0.15, 0.1]])
    acc = qml.from_codes(jnp.int32([[1000, -5000]]), 23, 10)
    scaled = qml.QFloat(acc, jnp.float32(0.3))
    made = [
        lambda b: qml.quantize_weight(w, b),
        lambda b: qml.quantize_weight(w, b, power_of_two=True),
        lambda b: qml.quantize_aligned_weight(w[0], scaled, b),
        lambda b: qml.quantize_input(w, -1.0, 1.0, b, signed=False)[0],
        lambda b: qml.quantize_output(scaled, 4.0, b),
        lambda b: qml.quantize_output(acc, 4.0, b),
        lambda b: qml.quantize_output(scaled, 4.0, scale_bits=b, buffer_bits=b + 8),
        lambda b: qml.quantize_fixed_point(w, b),
        lambda b: qml.rescale(acc, 3, b),
    ]
    for f in made:
        words = (2, 5, 8)
        swept = jax.jit(jax.vmap(f))(jnp.int32(words))
        for i, bits in enumerate(words):
            one, row = f(bits), jax.tree.map(lambda leaf, i=i: leaf[i], swept)
            for got, wanted in zip(*map(jax.tree.leaves, (row, one)), strict=True):
                same(got, wanted)


def _fixed(*shape, value_bits=7, frac_bits=0):
    return qml.from_codes(_zeros(*shape), value_bits, frac_bits)


def _scaled(scale=1.0):
    return qml.QFloat(_fixed(2), jnp.float32(scale))


X = jnp.ones((2, 3))


PER_CHANNEL = jnp.int32([1, 2, 3])


@pytest.mark.parametrize(
    ("f", "error", "match"),
    [
        (lambda: qml.from_codes(X, 7), TypeError, "`codes` must be an integer"),
        (lambda: qml.from_codes(True, 7), TypeError, "`codes` must be an integer"),
        (lambda: _fixed(2, value_bits=7.0), TypeError, "`value_bits` must be an int"),
        (lambda: _fixed(2, value_bits=0), ValueError, r"`value_bits` .* 1\.\.31"),
        (lambda: _fixed(2, value_bits=32), ValueError, r"`value_bits` .* 1\.\.31"),
        (lambda: _fixed(2, value_bits=PER_CHANNEL), ValueError, "must be one number"),
        (lambda: _fixed(2, frac_bits=0.5), TypeError, "`frac_bits` must be an integer"),
        (lambda: _fixed(2, frac_bits=127), ValueError, r"`frac_bits` .* -126\.\.126"),
        (
            lambda: _fixed(2, frac_bits=np.int8([-128, 0])),
            ValueError,
            r"`frac_bits` .* -126\.\.126",
        ),
        (
            lambda: _fixed(2, 4, frac_bits=PER_CHANNEL),
            ValueError,
            r"`frac_bits` must have shape \(\), .* \(2, 4\), got \(3,\)",
        ),
        (lambda: _fixed(frac_bits=PER_CHANNEL), ValueError, "must have shape"),
        (lambda: qml.quantize_fixed_point(_zeros(2), 7), TypeError, "Real values"),
        (lambda: qml.quantize_fixed_point(X, 32), ValueError, r"1\.\.31"),
        (lambda: qml.quantize_fixed_point(X, 7, 200), ValueError, r"-126\.\.126"),
        (lambda: qml.quantize_qfloat(_zeros(2), 7, 1.0), TypeError, "Real values"),
        (
            lambda: qml.quantize_qfloat(X, 7, jnp.ones(2)),
            ValueError,
            "`scale` must have shape",
        ),
        (lambda: qml.max_frac_bits(0, 1.0), ValueError, r"1\.\.31"),
        (lambda: qml.max_frac_bits(7.5, 1.0), TypeError, "`value_bits`"),
        (lambda: qml.quantize_scales(1.0, 32), ValueError, r"1\.\.31"),
        (
            lambda: qml.straight_through(X, _fixed(3)),
            ValueError,
            r"`x` must be what `q` rounds, of shape \(3,\)",
        ),
        (lambda: qml.rescale(_fixed(2), 7), ValueError, "move left by 7 bits"),
        (lambda: qml.rescale(_fixed(2), 0.5), TypeError, "`frac_bits`"),
        (lambda: qml.rescale(_fixed(2), 1, 32), ValueError, r"1\.\.31"),
        (lambda: qml.promote(_fixed(2), 6), ValueError, "`promote` makes words longer"),
        (
            lambda: qml.expand(_fixed(2, 3, frac_bits=PER_CHANNEL), 6),
            ValueError,
            "`promote` makes words longer",
        ),
        (
            lambda: qml.expand(_fixed(2, frac_bits=np.int32([0, 9])), 8),
            ValueError,
            "move left by 9 bits",
        ),
        (
            lambda: qml.align(_fixed(2), _fixed(2, frac_bits=8)),
            ValueError,
            "move left by 8 bits",
        ),
        (
            lambda: qml.add(_fixed(2), _fixed(2, frac_bits=1)),
            ValueError,
            "same `frac_bits`, got 0 and 1",
        ),
        (lambda: qml.add(_scaled(), _scaled(2.0)), ValueError, "same `scale`"),
        (lambda: qml.add(_scaled(), 1), TypeError, "A `QFloat` adds to .* got int"),
        (lambda: qml.subtract(_scaled(), _fixed(2)), TypeError, "got FixedPoint"),
        (lambda: qml.add(_fixed(2), _scaled()), TypeError, "`to_fixed_point`"),
        (lambda: qml.add(_fixed(2), 0.5), TypeError, "or an integer is wanted"),
        (lambda: qml.multiply(_fixed(2), X), TypeError, "or an integer is wanted"),
        (lambda: qml.divide(_fixed(2), 0.5), TypeError, "or an integer is wanted"),
        (lambda: qml.equal(_fixed(2), _scaled()), TypeError, "got QFloat"),
        (
            lambda: qml.matmul(_fixed(2, 3, frac_bits=PER_CHANNEL), _fixed(3, 2)),
            ValueError,
            r"left operand of `matmul` .* \(3,\) and \(\)",
        ),
        (
            lambda: qml.matmul(_scaled([1.0, 2.0]), _fixed(2, 2)),
            ValueError,
            r"left operand of `matmul` .* \(\) and \(2,\)",
        ),
        (
            lambda: qml.reduce_sum(_fixed(2, 3, frac_bits=PER_CHANNEL), (0, -1)),
            ValueError,
            "differ along axis",
        ),
        (lambda: qml.reduce_sum(_fixed(2), 1), ValueError, "`axis=1` does not exist"),
        (lambda: qml.reduce_mean(_fixed(0, 3), 0), ValueError, "is empty"),
        (lambda: qml.shift(_fixed(2), 0.5), TypeError, "`s` must be an integer"),
        (lambda: qml.right_shift(_fixed(2), 0.5), TypeError, "`s` must be an integer"),
        (lambda: qml.quantize_weight(X, 1), ValueError, r"2\.\.32 where signed=True"),
        (
            lambda: qml.quantize_weight(X, 32, signed=False),
            ValueError,
            r"1\.\.31 where signed=False",
        ),
        (lambda: qml.quantize_weight(X, 33), ValueError, r"`bits` must lie in 1\.\.32"),
        (lambda: qml.quantize_weight(X, 4.0), TypeError, "`bits` must be an integer"),
        (lambda: qml.quantize_weight(X, axis=2), ValueError, "`axis=2` does not exist"),
        (lambda: qml.quantize_weight(_zeros(2)), TypeError, "Real values"),
        (
            lambda: qml.quantize_aligned_weight(_zeros(3), _fixed(3)),
            TypeError,
            "Real values",
        ),
        (
            lambda: qml.quantize_aligned_weight(1e5 * X[0], _fixed(3), 2),
            ValueError,
            "move left by 16 bits",
        ),
        (
            lambda: qml.quantize_aligned_weight(X[0], _fixed(3), 1),
            ValueError,
            r"2\.\.32",
        ),
        (lambda: qml.quantize_input(_zeros(2), 0.0, 1.0), TypeError, "Real values"),
        (lambda: qml.quantize_input(X, 0.0, 1.0, 2.0), TypeError, "`bits`"),
        (
            lambda: qml.quantize_input(X, jnp.zeros(2), 1.0),
            ValueError,
            r"`low` must have shape \(\), \(3,\) or \(1, 3\)",
        ),
        (
            lambda: qml.quantize_input(X, 0.0, jnp.ones((2, 1))),
            ValueError,
            "`high` must have shape",
        ),
        (
            lambda: qml.quantize_output(_fixed(2, 3, value_bits=15), jnp.ones(3)),
            ValueError,
            "at least 3 axes",
        ),
        (
            lambda: qml.quantize_output(_fixed(2, 3, value_bits=15), jnp.ones(2)),
            ValueError,
            "`range_max` must have shape",
        ),
        (
            lambda: qml.quantize_output(
                _scaled(), 1.0, 4, rescaling_rate=jnp.ones((3,))
            ),
            ValueError,
            "`rescaling_rate` must have shape",
        ),
        (lambda: qml.quantize_output(_fixed(2), 1.0), ValueError, "words shorter"),
        (
            lambda: qml.quantize_output(_scaled(), 1.0, 4, buffer_bits=49),
            ValueError,
            r"`buffer_bits` must lie in 1\.\.48",
        ),
        (
            lambda: qml.quantize_output(_scaled(), 1.0, 4, scale_bits=0),
            ValueError,
            r"1\.\.31",
        ),
        (
            lambda: qml.quantize_output(_scaled(1e6), 1e-6, 4),
            ValueError,
            "all saturate",
        ),
        (
            lambda: qml.quantize_output(_fixed(2, frac_bits=-9), 1e-6, 4),
            ValueError,
            "move left by 12 bits",
        ),
    ],
)
def test_what_cannot_be_is_refused(f, error, match):
    with pytest.raises(error, match=match):
        f()


def test_the_namespace():
    assert qjax.quantizers.quantizeml is qml
    assert list(qml.__all__) == sorted(qml.__all__)
    for name in qml.__all__:
        assert getattr(qml, name).__doc__, name


def test_powers_saturate_once():
    codes = np.array([[-128, -12, -1, 0], [1, 2, 11, 127]])
    x = qml.from_codes(jnp.int32(codes), 7, jnp.int32([0, 1, -2, 3]))
    for n in range(6):
        y = x**n
        np.testing.assert_array_equal(y.codes, np.clip(codes**n, -128, 127))
        np.testing.assert_array_equal(y.frac_bits, n * np.array([0, 1, -2, 3]))
    for n in (-1, 0.5, True):
        with pytest.raises(ValueError, match="`n` must be a whole number"):
            qml.power(x, n)


def test_division_by_the_integer_0():
    x = qml.from_codes(jnp.int32([7, -7]), 7)
    with pytest.raises(ValueError, match="got the divisor 0"):
        qml.divide(x, 0)
