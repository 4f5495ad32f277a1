"""Arithmetic of QuantizeML's numbers, in exact integers."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qjax.quantizers import quantizeml as qml
from tests.quantizeml_cases import (
    ENDS,
    LEAST,
    MOST,
    SETTINGS,
    clip,
    codes,
    compiled,
    half_up,
    ints,
    number,
    point,
    same,
    times_power,
    word,
)

pytestmark = pytest.mark.slow  # Many compilations.


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
