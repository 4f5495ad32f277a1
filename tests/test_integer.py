"""Oracles: Python integers of any length, `fractions`, and float32 products."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qjax.integer import (
    fixed_point,
    requantize,
    shift_round,
)
from tests.integer_cases import INT32, Fraction

_SETTINGS = settings(deadline=None, max_examples=60)


_POWERS = np.array([2**s for s in range(63)], object)


def _divide_half_even(product, shift):
    """``product / 2^shift`` in Python integers: floor, then look at the rest."""
    unit = _POWERS[np.asarray(shift)]
    floor, twice = product // unit, 2 * (product % unit)
    return floor + ((twice > unit) | ((twice == unit) & (floor % 2 == 1)))


def _requantize(acc, multiplier, shift, zero_point=0, qmin=INT32[0], qmax=INT32[1]):
    """The definition, on arrays of Python integers."""
    product = np.asarray(acc).astype(object) * np.asarray(multiplier).astype(object)
    return np.clip(_divide_half_even(product, shift) + zero_point, qmin, qmax)


def _random_int32(rng, size):
    """Half uniform over all of int32, half uniform in magnitude; and the extremes."""
    wide = rng.integers(*INT32, size, endpoint=True)
    x = np.where(rng.random(size) < 0.5, wide, wide >> rng.integers(0, 31, size))
    x[: size // 100] = rng.choice([*INT32, INT32[0] + 1, -1, 0, 1], size // 100)
    return np.int32(rng.permutation(x))


class FixedPointTest(chex.TestCase):
    def _check(self, ratio):
        """Against the exact value of the float64, rounded by Python, half to even."""
        multiplier, shift = fixed_point(ratio)
        exact, s = abs(Fraction(ratio)), 0
        if exact < Fraction(1, 2**33):
            assert (multiplier, shift) == (0, 0)
            return
        while exact * 2**s < 2**30:
            s += 1
        wanted = round(exact * 2**s)
        if wanted == 2**31:
            wanted, s = 2**30, s - 1
        if s > 62:
            wanted = s = 0
        sign = -1 if ratio < 0 else 1
        assert (int(multiplier), int(shift)) == (sign * wanted, s)

    def test_random_ratios(self):
        rng = np.random.default_rng(0)
        for size, sign in zip(
            2.0 ** rng.uniform(-34, 30, 500), rng.choice([-1, 1], 500), strict=True
        ):
            self._check(float(sign * size))

    def test_is_exact_up_to_31_bits(self):
        rng = np.random.default_rng(1)
        digits = rng.integers(1, 2**31, 200)
        for ratio in np.ldexp(digits.astype(np.float64), rng.integers(-32, 0, 200)):
            multiplier, shift = fixed_point(ratio)
            assert 2**30 <= multiplier < 2**31 and 0 <= shift <= 62
            assert Fraction(int(multiplier), 2 ** int(shift)) == Fraction(ratio)

    @parameterized.parameters(0, 1, 20, 30)
    def test_ties_round_to_even(self, exponent):
        for k in (2**30, 2**30 + 1, 2**30 + 12345, 2**31 - 2):
            multiplier, shift = fixed_point((k + 0.5) / 2.0 ** (30 + exponent))
            assert int(multiplier) == k + k % 2
            assert int(shift) == 30 + exponent

    @parameterized.parameters(1, -1)
    def test_a_carry_halves_the_multiplier(self, sign):
        for exponent in (0, -7, 20, -31):
            ratio = sign * float(np.nextafter(2.0**exponent, 0))
            multiplier, shift = fixed_point(ratio)
            assert int(multiplier) == sign * 2**30 and int(shift) == 30 - exponent
            self._check(ratio)

    def test_a_carry_at_the_upper_end_keeps_the_contract(self):
        for ratio in (2.0**31 - 0.5, float(np.nextafter(2.0**31, 0))):
            try:
                multiplier, shift = fixed_point(ratio)
            except ValueError:
                continue  # It rounds to 2^31, which raises.
            assert 2**30 <= multiplier < 2**31 and 0 <= shift <= 62

    def test_zero_and_what_vanishes(self):
        below = float(np.nextafter(2.0**-33, 0))
        for ratio in (0.0, -0.0, 1e-30, -1e-30, 5e-324, below, -below):
            assert fixed_point(ratio) == (0, 0)

    def test_the_least_ratio_that_is_kept(self):
        assert fixed_point(2.0**-32) == (2**30, 62)
        assert fixed_point(-(2.0**-32)) == (-(2**30), 62)
        assert fixed_point(2.0**-32 - 2.0**-60) == (0, 0)

    def test_what_vanishes_takes_every_accumulator_to_zero(self):
        largest = Fraction(float(np.nextafter(2.0**-32, 0)))
        for acc in INT32:
            assert round(acc * largest) == 0

    @parameterized.parameters(np.inf, -np.inf, np.nan, 2.0**31, -(2.0**31), 1e300)
    def test_what_has_no_fixed_point_raises(self, ratio):
        for bad in (ratio, [0.5, ratio]):
            with pytest.raises(ValueError, match=r"must be finite and below 2\^31"):
                fixed_point(bad)

    def test_shape_and_dtypes(self):
        ratio = np.array([[0.5, 0.0, -0.3]])
        for part in fixed_point(ratio):
            assert part.shape == (1, 3) and part.dtype == np.int32
        many, one = fixed_point(ratio), [fixed_point(r) for r in ratio[0]]
        np.testing.assert_array_equal(np.squeeze(many, 1).T, one)

    def test_powers_of_two(self):
        for exponent in range(-32, 31):
            assert fixed_point(2.0**exponent) == (2**30, 30 - exponent)


@_SETTINGS
@given(st.floats(-(2.0**31) + 1, 2.0**31 - 1))
@example(1.0 - 2.0**-33)
@example(2.0**-32)
def test_fixed_point_matches_definition(ratio):
    FixedPointTest()._check(ratio)


class ShiftRoundTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*range(31))
    def test_matches_fractions(self, shift):
        room = 2**31 - 1 - (2**shift >> 1)
        rng = np.random.default_rng(shift)
        ties = (2 * rng.integers(-40, 40, 50) + 1) * (2**shift // 2)
        values = [*ties, *(ties - 1), *(ties + 1), 0, room, room - 1, *INT32[:1]]
        values += [*rng.integers(-room, room, 50), *range(-5, 6)]
        values = np.int32([v for v in values if INT32[0] <= v <= room])
        wanted = [round(Fraction(int(v), 2**shift)) for v in values]
        got = self.variant(shift_round)(values, jnp.int32(shift))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)

    def test_shift_0_keeps_every_value(self):
        values = np.int32([*INT32, -3, -2, -1, 0, 1, 2, 3])
        np.testing.assert_array_equal(shift_round(values, jnp.int32(0)), values)

    def test_all_ties_of_small_shifts(self):
        values, shift = np.int32(np.arange(-4096, 4096)), np.int32(np.arange(12))
        got = jax.jit(shift_round)(values[:, None], shift[None])
        wanted = _divide_half_even(values.astype(object)[:, None], shift[None])
        np.testing.assert_array_equal(got, wanted)

    def test_int64(self):
        with jax.enable_x64(True):
            values = np.int64([2**61, -(2**61), 3 * 2**60, 2**61 + 1, -(2**62), 5])
            for shift in (0, 1, 40, 60, 61, 62):
                wanted = [round(Fraction(int(v), 2**shift)) for v in values]
                got = jax.jit(shift_round)(values, jnp.int64(shift))
                assert got.dtype == np.int64
                np.testing.assert_array_equal(got, wanted)


class RequantizeTest(chex.TestCase):
    full = staticmethod(functools.partial(requantize, qmin=INT32[0], qmax=INT32[1]))

    def test_a_million_random_triples(self):
        rng = np.random.default_rng(0)
        acc, multiplier = _random_int32(rng, 10**6), _random_int32(rng, 10**6)
        shift = np.int32(rng.integers(0, 63, 10**6))
        got = jax.jit(self.full)(acc, multiplier, shift)
        assert got.dtype == np.int32
        wanted = _requantize(acc, multiplier, shift).astype(np.int64)
        np.testing.assert_array_equal(got, wanted)
        # Not all of them saturate or vanish.
        inside = (wanted > INT32[0]) & (wanted < INT32[1]) & (np.abs(wanted) > 1)
        assert inside.mean() > 0.3

    @chex.variants(with_jit=True, without_jit=True)
    def test_all_corners(self):
        ends = np.int32([*INT32, INT32[0] + 1, -(2**30), 2**30, -3, -1, 0, 1, 3])
        shifts = np.int32([0, 1, 2, 29, 30, 31, 32, 60, 61, 62])
        triples = np.array(list(itertools.product(ends, ends, shifts))).T
        got = self.variant(self.full)(*triples.astype(np.int32))
        np.testing.assert_array_equal(got, _requantize(*triples))

    def test_ties_of_every_shift(self):
        rng = np.random.default_rng(1)
        acc, multiplier, shift = [], [], []
        for s in range(1, 63):
            # acc * multiplier = odd * 2^(s - 1), the power split between the two.
            for in_acc in range(max(0, s - 31), min(30, s - 1) + 1):
                in_multiplier = s - 1 - in_acc
                odd = (
                    2
                    * rng.integers(
                        0, [[2 ** (30 - in_acc)], [2 ** (30 - in_multiplier)]], (2, 12)
                    )
                    + 1
                )
                sign = rng.choice([-1, 1], (2, 12))
                a, m = sign * odd * np.array([[2**in_acc], [2**in_multiplier]])
                acc += [*a]
                multiplier += [*m]
                shift += [s] * 12
        product = np.array(acc, object) * np.array(multiplier, object)
        unit = _POWERS[np.array(shift)]
        assert np.all(2 * (product % unit) == unit)
        operands = [np.int32(v) for v in (acc, multiplier, shift)]
        got = np.int64(jax.jit(self.full)(*operands))
        np.testing.assert_array_equal(got, _requantize(*operands))
        assert np.all(got[np.abs(got) < 2**31 - 1] % 2 == 0)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((-128, 127), (0, 255), (-8, 7), (-1, 0), (0, 2**31 - 1))
    def test_zero_points_and_clipping(self, qmin, qmax):
        rng = np.random.default_rng(2)
        acc = np.int32(rng.integers(-(2**20), 2**20, (50, 4)))
        multiplier = np.int32(rng.integers(2**30, 2**31, (1, 4)))
        shift = np.int32([[38, 41, 44, 47]])
        zero_point = np.int32([[0, 5, -7, 100]])
        got = self.variant(functools.partial(requantize, qmin=qmin, qmax=qmax))(
            acc, multiplier, shift, zero_point
        )
        wanted = _requantize(acc, multiplier, shift, zero_point, qmin, qmax)
        np.testing.assert_array_equal(got, wanted)
        assert {qmin, qmax} <= set(np.unique(got)) or qmax > 2**20

    @parameterized.parameters(*INT32)
    def test_the_zero_point_joins_without_wrapping(self, zero_point):
        acc = np.int32([*INT32, 0, 1])
        got = self.full(acc, 2**30, 30, zero_point)
        np.testing.assert_array_equal(got, _requantize(acc, 2**30, 30, zero_point))

    def test_is_the_exact_ratio_of_fixed_point(self):
        rng = np.random.default_rng(3)
        acc = rng.integers(*INT32, 1000, endpoint=True).astype(np.int32)
        for ratio in (2.0**-20, 3 * 2.0**-24, 0.75, -(2.0**-9), 0.0):
            got = self.full(acc, *fixed_point(ratio))
            wanted = [round(int(a) * Fraction(ratio)) for a in acc]
            np.testing.assert_array_equal(got, np.clip(wanted, *INT32))

    @parameterized.parameters(
        ((0, None, None),), ((None, 0, None),), ((None, None, 0),), ((0, 0, 0),)
    )
    def test_vmap_is_a_loop(self, axes):
        rng = np.random.default_rng(4)
        size = lambda a: () if a is None else (5,)
        acc = jnp.asarray(rng.integers(*INT32, (*size(axes[0]), 7)), jnp.int32)
        rest = (
            jnp.asarray(rng.integers(2**30, 2**31, size(axes[1])), jnp.int32),
            jnp.asarray(rng.integers(30, 62, size(axes[2])), jnp.int32),
        )
        for f in (self.full, jax.jit(self.full)):
            got = jax.vmap(f, axes)(acc, *rest)
            for i in range(5):
                pick = lambda v, a, i=i: v if a is None else v[i]
                wanted = _requantize(*map(pick, (acc, *rest), axes))
                np.testing.assert_array_equal(got[i], wanted)

    def test_in_a_scan_and_a_cond_of_a_32_bit_program(self):
        acc = jnp.arange(-6, 6)
        f = lambda a: self.full(a, 2**30, 31)
        wanted = _requantize(np.arange(-6, 6), 2**30, 31)
        _, got = jax.lax.scan(lambda c, a: (c, f(a)), 0, acc)
        np.testing.assert_array_equal(got, wanted)
        got = jax.jit(lambda p, a: jax.lax.cond(p, f, lambda a: a, a))(True, acc)
        np.testing.assert_array_equal(got, wanted)

    def test_empty_accumulators(self):
        assert self.full(jnp.zeros((0, 3), jnp.int32), 2**30, 31).shape == (0, 3)


def _float_values(jaxpr):
    """All values of a jaxpr and of those inside it that are not integers."""
    found = []
    for eqn in jaxpr.eqns:
        avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        found += [a for a in avals if not jnp.issubdtype(a.dtype, jnp.integer)]
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(param, "jaxpr", param)
            found += _float_values(inner) if hasattr(inner, "eqns") else []
    return [a for a in found if a.dtype != bool]


@pytest.mark.parametrize("rule", ["half_even", "fp32_half_even"])
def test_no_float_in_the_traced_program(rule):
    f = functools.partial(requantize, qmin=-128, qmax=127, rule=rule)
    acc, rows = jnp.zeros((2, 3), jnp.int32), jnp.full((2, 1), 2**30)
    for g, args in (
        (f, (acc, 2**30, 40, 3)),
        (jax.jit(f), (acc, rows, 40 * jnp.ones_like(rows), 3)),
        (jax.vmap(f, (0, None, None)), (acc, 2**30, 40)),
    ):
        assert _float_values(jax.make_jaxpr(g)(*args).jaxpr) == []
    # The walk does find floats, also those of inner programs.
    assert _float_values(jax.make_jaxpr(jax.jit(jnp.sin))(1.0).jaxpr) != []


_codes = st.integers(*INT32) | st.sampled_from([*INT32, INT32[0] + 1, -1, 0, 1])


_jit_requantize = jax.jit(requantize)


@_SETTINGS
@given(_codes, _codes, st.integers(0, 62), _codes, _codes, _codes)
def test_requantize_matches_definition(acc, multiplier, shift, zero_point, a, b):
    operands = [jnp.int32(v) for v in (acc, multiplier, shift, zero_point)]
    qmin, qmax = min(a, b), max(a, b)
    got = _jit_requantize(*operands, qmin=jnp.int32(qmin), qmax=jnp.int32(qmax))
    wanted = round(Fraction(acc * multiplier, 2**shift)) + zero_point
    assert int(got) == min(max(wanted, qmin), qmax)


class Float32RuleTest(chex.TestCase):
    """``fp32_half_even`` gives the integers of a float32 program."""

    full = staticmethod(
        functools.partial(
            requantize, qmin=INT32[0], qmax=INT32[1], rule="fp32_half_even"
        )
    )

    @parameterized.parameters(24, 31)
    def test_equals_the_rounded_float32_product(self, acc_bits):
        rng = np.random.default_rng(5)
        size = 100_000
        acc = rng.integers(-(2**acc_bits) + 1, 2**acc_bits, size)
        acc >>= rng.integers(0, 12, size)
        ratio = np.float32(2.0 ** rng.uniform(-24, 4, size) * rng.choice([-1, 1], size))
        product = np.float32(acc) * ratio
        fits = np.abs(product) < 2.0**31
        acc, ratio, product = np.int32(acc[fits]), ratio[fits], product[fits]
        multiplier, shift = fixed_point(ratio)
        got = jax.jit(self.full)(acc, multiplier, shift)
        np.testing.assert_array_equal(got, np.int64(np.rint(product)))
        # It is a rule of its own: half to even once gives other integers.
        once = np.int64(_requantize(acc, multiplier, shift))
        assert np.any(once != np.int64(np.rint(product)))

    @parameterized.parameters(0.5, 0.25, 0.75, -0.5, 1.0)
    def test_ties_of_the_product(self, ratio):
        acc = np.int32([*range(-40, 40), 2**24 - 1, -(2**24) + 1])
        got = self.full(acc, *fixed_point(ratio))
        np.testing.assert_array_equal(got, np.rint(np.float32(acc) * np.float32(ratio)))

    def test_clips_and_adds_the_zero_point(self):
        acc = np.int32([-1000, -3, 0, 3, 1000])
        got = requantize(acc, 2**30, 31, 5, qmin=-128, qmax=127, rule="fp32_half_even")
        np.testing.assert_array_equal(got, [-128, 3, 5, 7, 127])
