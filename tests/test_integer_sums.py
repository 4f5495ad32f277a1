"""Sums of several grids, traced ratios, and arguments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.integer import (
    common_fixed_point,
    fixed_point,
    requantize,
    requantize_sum,
    traced_common_fixed_point,
    traced_fixed_point,
)
from qjax.integer_tflite import tflite_multiplier
from tests.integer_cases import INT32, Fraction


class RequantizeSumTest(chex.TestCase):
    def _wanted(self, terms, shift, zero_point=0, qmin=INT32[0], qmax=INT32[1]):
        columns = zip(*(zip(a, m, strict=True) for a, m in terms), strict=True)
        totals = [sum(int(a) * int(m) for a, m in column) for column in columns]
        rounded = [
            round(Fraction(t, 2 ** int(s))) for t, s in zip(totals, shift, strict=True)
        ]
        return np.clip(np.array(rounded, object) + zero_point, qmin, qmax)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1, 2, 3)
    def test_matches_fractions(self, count):
        rng = np.random.default_rng(count)
        terms = [
            (
                np.int32(rng.integers(-(2**24), 2**24, 500)),
                np.int32(rng.integers(*INT32, 500)),
            )
            for _ in range(count)
        ]
        shift = np.int32(rng.integers(20, 60, 500))
        f = functools.partial(requantize_sum, qmin=-(2**20), qmax=2**20)
        got = self.variant(f)(terms, shift, jnp.int32(-9))
        wanted = self._wanted(terms, shift, -9, -(2**20), 2**20)
        np.testing.assert_array_equal(got, wanted)

    def test_rounds_once(self):
        # 0.25 + 0.25 and 0.75 + 0.75: each addend alone would round elsewhere.
        terms = [(jnp.array([1, 3, 5]), 2**28), (jnp.array([1, 3, 5]), 2**28)]
        got = requantize_sum(terms, 30, qmin=-8, qmax=7)
        np.testing.assert_array_equal(got, [0, 2, 2])

    def test_two_terms_up_to_the_largest_sum(self):
        # Products of 2^61 and just below: without signs they add up to 2^62.
        pairs = [(-(2**31), 2**30), (-(2**31), -(2**30)), (2**31 - 1, 2**30)]
        pairs += [(2**30, -(2**31)), (2**30 + 1, 2**31 - 2), (1, 1), (0, 5)]
        columns = np.array([(*p, *q) for p in pairs for q in pairs]).T
        a, m, b, n = np.int32(np.repeat(columns, 5, axis=1))
        shift = np.int32(np.tile([30, 31, 32, 33, 62], columns.shape[1]))
        terms = [(a, m), (b, n)]
        got = requantize_sum(terms, shift, qmin=INT32[0], qmax=INT32[1])
        np.testing.assert_array_equal(got, self._wanted(terms, shift))


def test_traced_ratios_are_the_known_ones():
    rng = np.random.default_rng(0)
    a, b, c = (np.exp(rng.normal(0, 3, 5000)).astype(np.float32) for _ in range(3))
    a[:40] = 2.0 ** np.arange(-20, 20)
    a[40], b[:41], c[:41] = 0.0, 1.0, 0.5
    divisor = np.float32(1500.7)
    wanted = fixed_point(np.float64(a) * np.float64(-b) * np.float64(c) / divisor)
    traced = jax.jit(lambda *f: traced_fixed_point(f, jnp.float32(divisor)))(a, -b, c)
    for found, own in zip(traced, wanted, strict=True):
        np.testing.assert_array_equal(found, own)
    signs = (1.0, -1.0, 1.0)
    both = jax.jit(lambda *s: traced_common_fixed_point(s, signs, jnp.float32(0.3)))
    for scales in zip(a[41:90], b[41:90], c[41:90], strict=True):
        ratios = np.float64(signs) * np.float64(scales) / np.float64(np.float32(0.3))
        for found, own in zip(both(*scales), common_fixed_point(ratios), strict=True):
            np.testing.assert_array_equal(found, own)


class ArgumentsTest(chex.TestCase):
    """What no program can mean is refused, as far as it is known."""

    ENDS = {"qmin": -128, "qmax": 127}

    @parameterized.parameters(
        (dict(acc=jnp.float32([5])), TypeError, "`acc` must be of an integer type"),
        (dict(acc=np.array([True])), TypeError, "`acc`"),
        (dict(multiplier=0.5), TypeError, "`multiplier`"),
        (dict(multiplier=2**31), ValueError, "`multiplier` must lie in"),
        (dict(multiplier=np.int64([1, -(2**31) - 1])), ValueError, "`multiplier`"),
        (dict(shift=-1), ValueError, r"`shift` must lie in 0\.\.62, got -1"),
        (dict(shift=np.array([3, 63])), ValueError, "`shift`"),
        (dict(shift=64), ValueError, "`shift`"),
        (dict(shift=1.0), TypeError, "`shift`"),
        (dict(zero_point=1.7), TypeError, "`zero_point`"),
        (dict(zero_point=2**40), ValueError, "`zero_point`"),
        (dict(qmin=5, qmax=4), ValueError, "`qmin` must not be above `qmax`"),
        (dict(qmax=127.0), TypeError, "`qmax`"),
        (dict(qmin=None), TypeError, "`qmin`"),
        (dict(rule="half_up"), ValueError, "`rule` must be one of half_even, fp32"),
    )
    def test_requantize(self, wrong, error, match):
        options = {"acc": jnp.int32([5]), "multiplier": 2**30, "shift": 32}
        options |= {"zero_point": 0, **self.ENDS, **wrong}
        with pytest.raises(error, match=match):
            requantize(**options)
        terms = [(options.pop("acc"), options.pop("multiplier"))]
        with pytest.raises(error, match=match):
            requantize_sum(terms, **options)

    def test_a_sum_of_nothing(self):
        with pytest.raises(ValueError, match="at least one pair"):
            requantize_sum([], 0, **self.ENDS)

    def test_a_tracer_is_checked_by_its_type(self):
        call = lambda acc, m, s: requantize(acc, m, s, **self.ENDS)
        with pytest.raises(TypeError, match="`multiplier`"):
            jax.jit(call)(jnp.int32([5]), jnp.float32(0.5), jnp.int32(1))
        found = jax.jit(call)(jnp.int32([5, 6, 7]), jnp.int32(1 << 30), jnp.int32(32))
        np.testing.assert_array_equal(found, [1, 2, 2])

    @parameterized.parameters(np.int8, np.uint8, np.int16, np.int64)
    def test_accumulators_of_any_integer_type(self, dtype):
        with jax.enable_x64(True):
            acc = jnp.asarray([5, 6, 7], dtype)
            found = requantize(acc, 2**30, 32, **self.ENDS)
        np.testing.assert_array_equal(found, [1, 2, 2])

    @parameterized.parameters("half", 1j, True, None, np.array([True]), np.array(["2"]))
    def test_ratios_that_are_no_numbers(self, ratio):
        for call in (fixed_point, common_fixed_point, tflite_multiplier):
            with pytest.raises(TypeError, match="must be real numbers"):
                call(ratio)

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_ratios_that_are_not_finite(self, ratio):
        for call in (fixed_point, lambda r: common_fixed_point([r, 1.0])):
            with pytest.raises(ValueError, match="must be finite"):
                call(ratio)
        with pytest.raises(ValueError, match=r"in \[0, 2\^31\)"):
            tflite_multiplier(ratio)

    def test_ratios_that_are_none_or_traced(self):
        assert fixed_point(np.zeros(0))[0].shape == (0,)
        assert tflite_multiplier([])[0].shape == (0,)
        with pytest.raises(ValueError, match="at least one ratio"):
            common_fixed_point([])
        with pytest.raises(TypeError, match="must be known"):
            jax.jit(fixed_point)(0.5)

    def test_ratios_of_any_real_type_are_the_same(self):
        for ratio in (1, np.int8(1), np.float16(1), jnp.bfloat16(1), Fraction(1)):
            assert fixed_point(ratio) == (1 << 30, 30)
