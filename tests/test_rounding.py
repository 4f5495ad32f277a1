"""Oracles: Python integers, `fractions`, and `math.frexp`."""

import fractions
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.rounding import (
    ceil_power_of_two,
    floor_log2,
    half_away,
    half_even,
    int_range,
    power_of_two,
    product,
    quotient,
    round_log2,
)


def _code_range(bits, signed, narrow_range):
    """The definition: how many codes there are, and where the first one lies."""
    first = -(2 ** (bits - 1)) if signed else 0
    return first + int(narrow_range), first + 2**bits - 1


def _smallest_power_of_two(x):
    mantissa, exponent = math.frexp(x)
    exponent -= mantissa == 0.5
    return math.ldexp(1.0, min(max(exponent, -126), 127))


class IntRangeTest(chex.TestCase):
    @parameterized.product(signed=[True, False], narrow_range=[True, False])
    def test_python_bits_give_python_integers(self, signed, narrow_range):
        for bits in range(1 + narrow_range, 33):
            got = int_range(bits, signed, narrow_range)
            assert got == _code_range(bits, signed, narrow_range)
            assert {type(end) for end in got} == {int}

    @parameterized.parameters(np.int8(5), np.uint32(5), np.int64(5))
    def test_other_integer_scalars_give_python_integers(self, bits):
        got = int_range(bits)
        assert got == _code_range(int(bits), True, False)
        assert {type(end) for end in got} == {int}

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        signed=[True, False],
        narrow_range=[True, False],
        dtype=[np.int8, np.uint8, np.int32, np.uint32],
        batched=[True, False],
    )
    def test_array_bits_give_arrays(self, signed, narrow_range, dtype, batched):
        bits = np.arange(1 + narrow_range, 33)
        f = lambda b: int_range(b, signed, narrow_range)
        got = self.variant(jax.vmap(f) if batched else f)(jnp.asarray(bits, dtype))
        wanted = [_code_range(int(b), signed, narrow_range) for b in bits]
        for end, want in zip(got, np.transpose(wanted), strict=True):
            assert end.dtype == (np.int32 if signed else np.uint32)
            np.testing.assert_array_equal(np.int64(end), want)

    @chex.variants(with_jit=True, without_jit=True)
    def test_keeps_the_shape_of_bits(self):
        bits = jnp.full((2, 1, 3), 7)
        chex.assert_shape(self.variant(int_range)(bits), (2, 1, 3))
        chex.assert_shape(self.variant(int_range)(jnp.int32(7)), ())


@pytest.mark.parametrize("narrow_range", [True, False])
@pytest.mark.parametrize(
    "bits", [0, -1, 33, 64, np.int32(33), np.array([8, 33]), np.array([[0], [8]])]
)
def test_bits_outside_the_word_raise(bits, narrow_range):
    with pytest.raises(ValueError, match=r"`bits` must lie in 1\.\.32, got "):
        int_range(bits, narrow_range=narrow_range)
    with pytest.raises(ValueError, match=r"`bits` must lie in 1\.\.32, got "):
        int_range(jnp.asarray(bits), narrow_range=narrow_range)


@pytest.mark.parametrize("bits", [8.0, np.float32(8), np.array([4.0, 8.0]), True])
def test_bits_of_no_integer_type_raise(bits):
    for b in (bits, jnp.asarray(bits)):
        with pytest.raises(TypeError, match="`bits` must be an integer, got "):
            int_range(b)
    with pytest.raises(TypeError, match="`bits` must be an integer, got "):
        jax.jit(int_range)(bits)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, np.int8(1), np.array([8, 1])])
def test_a_single_code_raises(bits, signed):
    for b in (bits, jnp.asarray(bits)):
        with pytest.raises(ValueError, match="a 1-bit word a single code"):
            int_range(b, signed, narrow_range=True)


class RoundingTest(chex.TestCase):
    TIES = np.float32([*(np.arange(-40, 40) + 0.5), 2**22 + 0.5, -(2**23) + 0.5])
    POINTS = np.float32(
        [*TIES, *np.nextafter(TIES, np.float32(0)), *range(-5, 6), 2.0**24, -3e9, 0.25]
    )

    @chex.variants(with_jit=True, without_jit=True)
    def test_half_even_takes_ties_to_the_even_integer(self):
        # `round` of a fraction is exact, and half to even.
        wanted = [round(fractions.Fraction(float(x))) for x in self.POINTS]
        got = self.variant(half_even)(self.POINTS)
        np.testing.assert_array_equal(np.int64(got), wanted)

    @chex.variants(with_jit=True, without_jit=True)
    def test_half_away_takes_ties_away_from_zero(self):
        half = fractions.Fraction(1, 2)
        wanted = [
            math.copysign(math.floor(abs(fractions.Fraction(float(x))) + half), x)
            for x in self.POINTS
        ]
        got = self.variant(half_away)(self.POINTS)
        np.testing.assert_array_equal(got, np.float32(wanted))

    @chex.variants(with_jit=True, without_jit=True)
    def test_infinities_and_nan_stay(self):
        x = np.float32([np.inf, -np.inf, np.nan])
        for rounding in (half_even, half_away):
            np.testing.assert_array_equal(self.variant(rounding)(x), x)


class CeilPowerOfTwoTest(chex.TestCase):
    POWERS = np.ldexp(np.float32(1), np.arange(-126, 128))

    @chex.variants(with_jit=True, without_jit=True)
    def test_keeps_every_power_of_two(self):
        got = self.variant(ceil_power_of_two)(self.POWERS)
        np.testing.assert_array_equal(got, self.POWERS)
        assert got.dtype == np.float32

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.0, np.inf)
    def test_neighbours_of_powers_of_two(self, towards):
        x = np.nextafter(self.POWERS, np.float32(towards))
        wanted = [_smallest_power_of_two(float(v)) for v in x]
        got = self.variant(ceil_power_of_two)(x)
        np.testing.assert_array_equal(np.float64(got), wanted)

    @chex.variants(with_jit=True, without_jit=True)
    def test_stays_between_the_least_and_the_largest_power(self):
        x = np.float32([1e-45, 1e-40, 3e38, np.finfo(np.float32).max])
        got = self.variant(ceil_power_of_two)(x)
        np.testing.assert_array_equal(got, [2.0**-126] * 2 + [2.0**127] * 2)


@settings(deadline=None, max_examples=50)
@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_ceil_power_of_two_is_the_least_that_is_not_below(x):
    got = float(ceil_power_of_two(jnp.float32(x)))
    assert got == _smallest_power_of_two(x)
    assert got / 2 < x <= got


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap])
def test_power_of_two_is_exact_from_zero_to_the_largest(wrap):
    exponents = np.arange(-130, 140)
    wanted = [0.0 if e < -126 else 2.0 ** min(e, 127) for e in exponents]
    got = wrap(power_of_two)(exponents)
    np.testing.assert_array_equal(np.float64(got), wanted)
    np.testing.assert_array_equal(wrap(power_of_two)(exponents.astype(np.float32)), got)


def _rounded_log2(x):
    """Compares squares: ``x > 2^(e + 1/2)`` without a logarithm; there are no ties."""
    e = math.frexp(x)[1] - 1
    return e + (fractions.Fraction(x) ** 2 > fractions.Fraction(2) ** (2 * e + 1))


@settings(deadline=None, max_examples=200)
@given(st.floats(2.0**-126, np.finfo(np.float32).max.item(), width=32))
def test_logarithms_of_floats_are_rounded_exactly(x):
    assert int(round_log2(jnp.float32(x))) == _rounded_log2(x)
    assert int(floor_log2(jnp.float32(x))) == math.frexp(x)[1] - 1


def test_logarithms_next_to_the_root_of_two():
    root = np.float32(np.sqrt(2))
    for x in (
        np.nextafter(root, np.float32(0)),
        root,
        np.nextafter(root, np.float32(2)),
    ):
        for e in (-100, 0, 100):
            scaled = float(x) * 2.0**e
            assert int(round_log2(jnp.float32(scaled))) == _rounded_log2(scaled)


@pytest.mark.parametrize("has_nan", [False, True])
@pytest.mark.parametrize("known", ["neither", "first", "second", "both"])
def test_quotients_and_products_are_rounded_once_each(known, has_nan):
    """Scalars in a batch, operands that the compiler knows; no result is subnormal."""
    rng = np.random.default_rng(3)
    a = np.float32(rng.normal(size=500) * 10.0 ** rng.integers(-9, 9, 500))
    a[:5] = 0, np.inf, -np.inf, 3e38, -0.0
    b = np.float32([3, 7, 127, 1e-3, 255, -np.inf, np.inf, 0, -2.5, 3e18])
    if has_nan:
        a[5] = b[4] = np.nan
    with np.errstate(all="ignore"):
        wanted = a / b[:, None], a * b[:, None], np.float32(1) - a * b[:, None]

    @jax.vmap
    def rows(a, b):
        return quotient(a, b), product(a, b), 1.0 - product(a, b)

    @jax.jit
    def f(a, b):
        a = all_a if a is None else a
        b = all_b if b is None else b
        return rows(jnp.broadcast_to(a, (b.size, a.size)), b)

    all_a, all_b = jnp.asarray(a), jnp.asarray(b)
    given = {"neither": (a, b), "first": (None, b), "second": (a, None)}
    got = f(*given.get(known, (None, None)))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
