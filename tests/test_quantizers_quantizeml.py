"""QuantizeML's numbers and quantizers against Python integers and fractions.

tests/conformance has QuantizeML's own results.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qjax.affine import dequantize
from qjax.quantizers import quantizeml as qml
from tests.quantizeml_cases import (
    LEAST,
    MOST,
    SETTINGS,
    WORDS,
    _zeros,
    clip,
    codes,
    compiled,
    ints,
    log2_up,
    number,
    point,
    positive,
    real,
    rounded,
    same,
    scale_code,
    word,
)

pytestmark = pytest.mark.slow  # Many compilations.


@pytest.mark.parametrize("value_bits", WORDS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64])
def test_integers_of_every_type_saturate(dtype, value_bits):
    info = np.iinfo(dtype)
    values = [int(info.min), 0, 1, 100, int(info.max)]
    q = qml.from_codes(np.array(values, dtype), value_bits)
    same(q.codes, [clip(v, value_bits) for v in values])
    assert q.codes.dtype == jnp.int32 and q.frac_bits.dtype == jnp.int32


def test_a_python_integer_is_a_code():
    assert qml.from_codes(2**40, 31).codes == MOST
    assert qml.from_codes(-(2**40), 31).codes == LEAST


@pytest.mark.parametrize("frac_bits", [-126, -100, -3, 0, 1, 31, 100, 126])
@pytest.mark.parametrize("value_bits", [1, 7, 31])
def test_ties_and_ends_at_every_binary_point(value_bits, frac_bits):
    # In half codes. No value is subnormal, or infinite but those that are meant.
    halves = np.float64([-7, -6, -5, -4, -3, -2, 0, 2, 3, 4, 5, 6, 7])
    x = np.float32(halves / 2 * 2.0**-frac_bits)
    wanted = [rounded(v, value_bits, frac_bits) for v in x]
    x = np.concatenate([x, np.float32([np.inf, -np.inf, np.nan])])
    wanted += [2**value_bits - 1, -(2**value_bits), 0]
    for f in (qml.quantize_fixed_point, compiled(qml.quantize_fixed_point)):
        q = f(jnp.asarray(x), value_bits, frac_bits)
        same(q.codes, wanted)
        same(q.params.scale, np.float32(2.0**-frac_bits))
        with np.errstate(over="ignore"):  # Codes at the end, at 2^126.
            real = np.float32(np.float64(np.float32(wanted)) * 2.0**-frac_bits)
        same(qml.to_float(q), real)
        same(qml.to_float(q), dequantize(q.codes, q.params))


def test_fraction_bits_per_channel_and_of_two_axes():
    x = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4)))
    bits = {"c": np.array([0, -1, 5, 2]), "c1": np.array([[3], [0], [7]])}
    for frac_bits in bits.values():
        q = qml.quantize_fixed_point(jnp.asarray(x), 7, jnp.int32(frac_bits))
        steps = np.rint(np.float64(x) * 2.0**frac_bits)
        same(q.codes, np.clip(steps, -128, 127))
        same(qml.to_float(q), np.float32(np.asarray(q.codes) * 2.0**-frac_bits))


@pytest.mark.parametrize(
    ("x", "frac_bits"),
    [
        ([3.0, -4.0], 0),  # Whole.
        ([1e30, 2.0], 0),
        ([0.0, -0.0], 0),
        ([], 0),
        ([0.1, 0.2], 7),  # Never more than the word has.
        ([1.5, 0.1], 6),
        ([-2.0, 0.5], 6),
        ([300.5, 0.0], -2),
    ],
)
def test_fraction_bits_that_are_found(x, frac_bits):
    q = qml.quantize_fixed_point(jnp.float32(x), 7)
    assert q.frac_bits == frac_bits
    same(q.codes, [rounded(v, 7, frac_bits) for v in x])


def test_logarithms_are_exact():
    powers = np.float32(2.0 ** np.arange(-126, 127))
    below, above = (np.nextafter(powers[1:], np.float32(v)) for v in (0, np.inf))
    x = np.concatenate([powers, below, above])
    same(qml.ceil_log2(jnp.asarray(x)), [log2_up(float(v)) for v in x])
    odd = jnp.float32([0.0, 1e-45, 2.0**-126, 2.0**127, 3e38, np.inf, np.nan])
    same(qml.ceil_log2(odd), [-126, -126, -126, 127, 127, 127, 127])


@pytest.mark.parametrize("value_bits", WORDS)
def test_fraction_bits_of_a_range_stay_within_what_a_scale_can_be(value_bits):
    ranges = np.float32([0, 1e-45, 1e-30, 0.3, 1, 1.5, 2.0**127, np.inf, np.nan])
    for clamp in (True, False):
        got = qml.max_frac_bits(value_bits, jnp.asarray(ranges), clamp)
        assert np.all((-126 <= got) & (got <= (value_bits if clamp else 126)))
        logs = np.array([log2_up(float(v)) for v in ranges[2:7]])
        same(got[2:7], np.minimum(value_bits - logs, value_bits if clamp else 126))


@given(st.lists(real, min_size=6, max_size=6), word, positive, point)
@SETTINGS
def test_a_float_scale_divides_first(x, value_bits, scale, frac_bits):
    steps = np.float32(x) / np.float32(scale)
    q = compiled(qml.quantize_qfloat)(jnp.float32(x), value_bits, scale, frac_bits)
    same(q.codes, [rounded(v, value_bits, frac_bits) for v in steps])
    value = np.float64(q.codes) * np.float64(np.float32(scale)) * 2.0**-frac_bits
    np.testing.assert_allclose(qml.to_float(q), value, rtol=3e-7)


def test_the_range_is_the_largest_code():
    x = jnp.float32([[0.3, -7.0, 1e-3], [-0.1, 2.0, 1e-3]])
    for value_bits in WORDS[1:]:
        scale = qml.optimal_scales(jnp.max(jnp.abs(x), 0), value_bits)
        most = np.float32(2.0**value_bits - 1)
        same(scale, np.float32([0.3, 7.0, 1e-3]) / most)
        q = qml.quantize_qfloat(x, value_bits, scale)
        if value_bits <= 15:
            same(jnp.max(jnp.abs(q.codes), 0), 2**value_bits - 1)
    assert np.all(qml.to_float(qml.quantize_qfloat(x, 7, jnp.zeros(3) + 1e-6)) < 1)


@given(st.lists(positive, min_size=6, max_size=6), st.integers(1, 31))
@example([1.0, 0.5, 0.9999, 255.4, 255.6, 256.0], 8)
@SETTINGS
def test_scales_become_integers(scales, bits):
    scales = np.float32(scales)
    q = compiled(qml.quantize_scales)(jnp.asarray(scales), bits)
    wanted = [scale_code(s, bits) for s in scales]
    same(q.codes, [code for code, _ in wanted])
    same(q.frac_bits, [frac_bits for _, frac_bits in wanted])


@given(codes, word, point, positive, st.integers(1, 16))
@SETTINGS
def test_a_number_times_its_scale(values, value_bits, frac_bits, scale, bits):
    a = number(values, value_bits, frac_bits)
    scale = np.float32(scale)
    y, s = compiled(qml.to_fixed_point)(qml.QFloat(a, jnp.asarray(scale)), bits)
    code, of_scale = scale_code(scale, bits)
    assert (int(s.codes), int(s.frac_bits)) == (code, of_scale)
    same(y.codes, [clip(c * code, value_bits) for c in ints(a)])
    assert (y.frac_bits, y.value_bits) == (frac_bits + of_scale, value_bits)


def test_straight_through_is_the_identity_backward():
    x = jnp.float32([0.3, -99.0, 99.0, 0.0])
    f = lambda x: qml.straight_through(x, qml.quantize_fixed_point(x, 3, 1))
    y, pull = jax.vjp(f, x)
    same(y, [0.5, -4.0, 3.5, 0.0])
    same(pull(jnp.float32([2, 3, 4, 5]))[0], [2, 3, 4, 5])


def test_the_derivative_of_a_scale():
    x = jnp.float32([[0.3, -99.0], [0.7, 0.2]])
    scale, dy = jnp.float32([0.25, 0.5]), jnp.float32([[1, 2], [3, 4]])

    def loss(x, scale):
        y = qml.straight_through(x, qml.quantize_qfloat(x, 3, scale, 1))
        return jnp.sum(y * dy)

    dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    same(dx, dy)
    steps = np.float64(x) / np.float64(scale)
    off = np.clip(np.rint(steps * 2), -8, 7) / 2 - steps
    np.testing.assert_allclose(dscale, np.sum(dy * off, 0), rtol=1e-5)


def test_the_derivative_of_a_weight_passes_through_its_largest():
    w = np.float32([[0.7, -0.2], [-0.15, 0.1], [0.31, 0.11]])
    dy = np.float32([[1, 2], [3, 4], [5, 6]])

    def loss(w):
        q = qml.quantize_weight(w, 4)
        return jnp.sum(qml.straight_through(w, q) * dy)

    steps = np.float64(w) * 7 / np.abs(np.float64(w)).max(0)
    dscale = np.sum(dy * (np.clip(np.rint(steps), -8, 7) - steps), 0)
    wanted = np.float64(dy)
    wanted[0] += dscale * np.sign(w[0]) / 7
    slope = jax.jit(jax.grad(loss))(jnp.asarray(w))
    np.testing.assert_allclose(slope, wanted, rtol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1e-40, 1e-20, 1e30, -3e38])
def test_derivatives_are_finite_wherever_weights_are(w):
    for options in ({}, {"axis": None}, {"power_of_two": True}):
        f = lambda w, o=options: qml.straight_through(w, qml.quantize_weight(w, 4, **o))
        total = lambda w, f=f: (jnp.sum(f(w)), f(w))
        slope, y = jax.jit(jax.grad(total, has_aux=True))(
            jnp.float32([[w, 0.0], [0.0, w]])
        )
        assert np.all(np.isfinite(y)) and np.all(np.isfinite(slope))


def test_derivatives_of_the_other_quantizers():
    x, acc = jnp.float32([0.5, -0.3, 9.0]), qml.from_codes(_zeros(3), 23, 10)
    scaled = qml.QFloat(acc, jnp.float32([0.5, 0.25, 1.0]))
    made = [
        lambda x: qml.quantize_aligned_weight(x, acc),
        lambda x: qml.quantize_aligned_weight(x, scaled),
        lambda x: qml.quantize_input(x, -0.5, 0.5)[0],
        lambda x: qml.quantize_input(x, -0.5, 0.5, signed=False)[0],
        lambda x: qml.quantize_output(qml.quantize_qfloat(x, 15, 0.01), 4.0),
        lambda x: qml.rescale(qml.quantize_fixed_point(x, 15, 4), 2, 7),
    ]
    for f in made:
        loss = lambda x, f=f: jnp.sum(qml.straight_through(x, f(x)) * 3)
        same(jax.jit(jax.grad(loss))(x), 3)


def test_straight_through_keeps_the_type():
    x = jnp.float16([0.3, 1.0])
    y = qml.straight_through(x, qml.quantize_fixed_point(x, 7, 1))
    assert y.dtype == jnp.float16
    same(y, [0.5, 1.0])
