"""QuantizeML's numbers and quantizers against Python integers and fractions.

tests/conformance has QuantizeML's own results.
"""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qjax
from qjax.affine import dequantize
from qjax.quantizers import quantizeml as qml

pytestmark = pytest.mark.slow  # Many compilations.

SETTINGS = settings(deadline=None, max_examples=30)
LEAST, MOST = -(2**31), 2**31 - 1
ENDS = [LEAST, LEAST + 1, -1, 0, 1, MOST]
WORDS = (1, 2, 7, 8, 15, 24, 31)

codes = st.lists(st.sampled_from(ENDS) | st.integers(LEAST, MOST), min_size=6)
codes = codes.map(lambda values: np.int32(values[:6]))
word = st.sampled_from(WORDS)
point = st.integers(-40, 40)
real = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
positive = st.floats(2.0**-20, 2.0**20, width=32)


# The definitions, in exact numbers.


def clip(value, value_bits):
    return min(max(value, -(2**value_bits)), 2**value_bits - 1)


def half_up(value):
    return math.floor(value + Fraction(1, 2))


def times_power(value, exponent):
    return Fraction(value) * Fraction(2) ** int(exponent)


def log2_up(x):
    """The least integer whose power of two is not below a positive ``x``."""
    mantissa, exponent = math.frexp(x)
    return exponent - (mantissa == 0.5)


def most_frac_bits(value_bits, most):
    return value_bits if most == 0 else min(value_bits - log2_up(most), value_bits)


def rounded(x, value_bits, frac_bits):
    """Half to even, which is what ``round`` does to a fraction."""
    return clip(round(times_power(float(x), frac_bits)), value_bits)


def scale_code(scale, bits):
    frac_bits = bits - log2_up(float(scale))
    return min(round(times_power(float(scale), frac_bits)), 2**bits - 1), frac_bits


def number(values, value_bits, frac_bits=0):
    """Codes of a word, cut to it, as all of its functions leave them."""
    cut = [clip(int(v), value_bits) for v in values]
    return qml.FixedPoint(jnp.int32(cut), value_bits, jnp.int32(frac_bits))


def ints(x):
    return [int(c) for c in x.codes]


def same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@functools.cache
def compiled(f, *static):
    return jax.jit(f, static_argnames=static)


# Numbers.


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


# Derivatives.


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


# Arithmetic.


@given(codes, codes, word, word, point)
@SETTINGS
def test_sums_saturate_in_the_word_of_the_left(u, v, left, right, frac_bits):
    a, b = number(u, left, frac_bits), number(v, right, frac_bits)
    pairs = list(zip(ints(a), ints(b), strict=True))
    for f, op in ((qml.add, int.__add__), (qml.subtract, int.__sub__)):
        y = compiled(f)(a, b)
        same(y.codes, [clip(op(c, d), left) for c, d in pairs])
        assert (y.value_bits, y.frac_bits) == (left, frac_bits)


@given(codes, word, point, st.sampled_from(ENDS) | st.integers(-300, 300))
@example(np.int32([LEAST] * 6), 31, 32, 1)
@example(np.int32([MOST] * 6), 31, -31, MOST)
@example(np.int32(ENDS), 31, 40, LEAST)
@example(np.int32(ENDS), 31, 40, MOST)
@SETTINGS
def test_sums_with_a_python_integer(values, value_bits, frac_bits, n):
    a = number(values, value_bits, frac_bits)
    moved = half_up(times_power(n, frac_bits))
    same(qml.add(a, n).codes, [clip(c + moved, value_bits) for c in ints(a)])
    same(qml.subtract(a, n).codes, [clip(c - moved, value_bits) for c in ints(a)])


@given(codes, codes, word, word, point, point)
@SETTINGS
def test_products(u, v, left, right, f, g):
    a, b = number(u, left, f), number(v, right, g)
    y = compiled(qml.multiply)(a, b)
    same(y.codes, [clip(c * d, left) for c, d in zip(ints(a), ints(b), strict=True)])
    assert (y.value_bits, y.frac_bits) == (left, f + g)


@given(codes, codes, word, word, point, point)
@example(
    np.int32([7, -7, 0, 7, -7, LEAST]), np.int32([2, 2, 0, 0, 0, -1]), 31, 31, 0, 0
)
@SETTINGS
def test_quotients_are_cut_toward_zero(u, v, left, right, f, g):
    a, b = number(u, left, f), number(v, right, g)
    y = compiled(qml.divide)(a, b)

    def divide(c, d):
        whole = math.trunc(Fraction(c, d)) if d else ((c > 0) - (c < 0)) * 2**40
        return clip(whole, left)

    same(y.codes, [divide(c, d) for c, d in zip(ints(a), ints(b), strict=True)])
    assert y.frac_bits == f - g


@given(codes, word, word, st.integers(-126, 126), st.integers(-126, 126))
@example(np.int32(ENDS), 31, 31, 0, 1)
@example(np.int32(ENDS), 31, 31, 0, 31)
@example(np.int32(ENDS), 31, 31, 0, -31)
@example(np.int32(ENDS), 31, 31, 0, -32)
@example(np.int32(ENDS), 31, 31, 126, -126)
@example(np.int32(ENDS), 31, 31, -126, 126)
@example(np.int32([1, 3, -1, -3, 5, -5]), 7, 7, 1, 0)
@SETTINGS
def test_rescaling_moves_ties_up(values, before, after, f, g):
    a = number(values, before, f)
    y = compiled(qml.rescale)(a, jnp.int32(g), after)
    same(y.codes, [clip(half_up(times_power(c, g - f)), after) for c in ints(a)])
    assert (y.value_bits, y.frac_bits) == (after, g)


@given(codes, word, st.lists(st.integers(-70, 70), min_size=6, max_size=6))
@example(np.int32(ENDS), 31, [31, 32, 33, 33, 31, 32])
@SETTINGS
def test_shifts(values, value_bits, s):
    a = number(values, value_bits, 3)
    y = compiled(qml.shift)(a, jnp.int32(s))
    pairs = zip(ints(a), s, strict=True)
    same(y.codes, [clip(math.floor(times_power(c, n)), value_bits) for c, n in pairs])
    assert y.frac_bits == 3
    moved = qml.right_shift(a, jnp.int32(s))
    same(moved.codes, a.codes)
    same(moved.frac_bits, 3 + np.array(s))


@given(codes, codes, word, word, st.integers(-126, 126), st.integers(-126, 126))
@example(np.int32(ENDS), np.int32(ENDS[::-1]), 31, 31, 126, -126)
@example(np.int32([-1] * 6), np.int32([LEAST] * 6), 31, 31, -126, 126)
@example(np.int32([4] * 6), np.int32([2] * 6), 7, 7, 1, 0)
@SETTINGS
def test_comparisons_are_those_of_the_values(u, v, left, right, f, g):
    a, b = number(u, left, f), number(v, right, g)
    pairs = list(zip(ints(a), ints(b), strict=True))
    x = [(times_power(c, -f), times_power(d, -g)) for c, d in pairs]
    same(compiled(qml.equal)(a, b), [c == d for c, d in x])
    same(compiled(qml.greater)(a, b), [c > d for c, d in x])
    same(qml.greater(a, -1), [c > -1 for c, _ in x])


def test_words_that_grow_and_channels_that_align():
    a = qml.from_codes(jnp.int32([[3, -3, 100], [1, 2, -100]]), 7, jnp.int32([0, 2, 4]))
    assert qml.promote(a, 15).value_bits == 15
    same(qml.to_float(qml.promote(a, 15)), qml.to_float(a))
    y = qml.expand(a, 15)
    assert y.frac_bits == 4 and np.shape(y.frac_bits) == ()
    same(y.codes, np.asarray(a.codes) * [16, 4, 1])
    same(qml.to_float(y), qml.to_float(a))
    narrow = qml.expand(a, 7)
    same(narrow.codes, [[48, -12, 100], [16, 8, -100]])
    b = qml.from_codes(jnp.int32([[5, 5, 5]]), 7, 3)
    for x, old in zip(qml.align(qml.promote(a, 20), b), (a, b), strict=True):
        same(x.frac_bits, [3, 3, 4])
        same(qml.to_float(x), qml.to_float(old))


def test_magnitudes_and_reductions():
    values = np.int64([[[LEAST, MOST], [LEAST, -1]], [[-1, MOST], [4, 4]]])
    a = qml.FixedPoint(jnp.int32(values), 31, jnp.int32([3, 5]))
    same(qml.absolute(a).codes, np.minimum(abs(values), MOST))
    for axis, axes in ((0, (0,)), ((0, 1), (0, 1)), ([-3, -2], (0, 1)), ((), ())):
        for keepdims in (False, True):
            total = values.sum(axes, keepdims=keepdims)
            n = np.prod([values.shape[d] for d in axes], dtype=np.int64)
            y = compiled(qml.reduce_sum, "axis", "keepdims")(
                a, tuple(np.atleast_1d(axis).astype(int).tolist()), keepdims
            )
            same(y.codes, np.clip(total, LEAST, MOST))
            same(y.frac_bits, [3, 5])
            same(qml.reduce_mean(a, axis, keepdims).codes, total // n)
    whole = qml.from_codes(jnp.int32([3, -4]), 7, 2)
    assert qml.reduce_sum(whole, -1).codes == -1
    assert qml.reduce_mean(whole, -1).codes == -1


def test_products_of_matrices_saturate_after_the_sum():
    x = np.int64([[MOST, MOST, -5], [LEAST, 7, 1]])
    w = np.int64([[100, -3], [-100, 2], [1, 50]])
    a = qml.FixedPoint(jnp.int32(x), 31, jnp.int32(2))
    b = qml.FixedPoint(jnp.int32(w), 7, jnp.int32([1, 4]))
    for f in (qml.matmul, compiled(qml.matmul)):
        y = f(a, b)
        same(y.codes, np.clip(x @ w, LEAST, MOST))
        same(y.frac_bits, [3, 6])
    q = qml.matmul(qml.QFloat(a, jnp.float32(0.5)), qml.QFloat(b, jnp.float32([3, 5])))
    same(q.codes, y.codes)
    same(q.scale, [1.5, 2.5])
    assert isinstance(qml.matmul(a, qml.QFloat(b, jnp.float32(2))), qml.QFloat)


def test_arithmetic_of_scaled_numbers():
    scale = jnp.float32([0.5, 0.25])
    a = qml.QFloat(qml.from_codes(jnp.int32([[100, 3]]), 7, 1), scale)
    y = qml.add(a, a)
    same(y.codes, [[127, 6]])
    same(y.scale, scale)
    same(qml.subtract(a, a).codes, 0)
    for other, factor in ((a, scale), (a.fixed_point, 1), (3, 1)):
        y = qml.multiply(a, other)
        same(y.scale, np.asarray(scale) * factor)
    same(qml.multiply(a.fixed_point, a).scale, scale)
    same(qml.multiply(a.fixed_point, -2).codes, [[-128, -6]])


def test_operands_of_other_shapes():
    a = qml.from_codes(jnp.int32([[1, 2, 3], [4, 5, 6]]), 15, 2)
    b = qml.from_codes(jnp.int32([10, 20, 30]), 15, jnp.int32([2, 2, 2]))
    assert qml.add(a, b).frac_bits.shape == qml.add(b, a).frac_bits.shape == (3,)
    same(qml.add(a, b).codes, np.asarray(a.codes) + np.asarray(b.codes))
    same(qml.multiply(b, a).codes, np.asarray(a.codes) * np.asarray(b.codes))
    same(qml.greater(b, a), True)
    same(qml.divide(b, a).codes, [[10, 10, 10], [2, 4, 5]])


# Quantizers.


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


# What is refused.


def _zeros(*shape):
    return jnp.zeros(shape, jnp.int32)


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
