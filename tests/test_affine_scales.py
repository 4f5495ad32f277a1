"""Scales and zero points of ranges against exact ones in `fractions`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from qjax.affine import QSpec, fake_quant, fake_quant_bias
from qjax.ranges import abs_max_params, min_max_params, reduce_range
from tests.affine import (
    SETTINGS,
    SPECS,
    WORDS,
    Fraction,
    code_range,
    fake_quantized,
    jit_min_max,
    jit_quantize,
)

RANGES = np.float32(
    [
        *[(-1, 1), (-1.28, 1.27), (0, 1), (-1, 0), (0.5, 2), (-3, -2), (-0.1, 1000)],
        *[(-1e6, 1e-3), (-1e-3, 1e6), (-0.3, 0.7), (-5, 5), (-1e30, 2e30), (0, 1e-20)],
        *[(0, 255), (0, 65535), (-128, 127), (-127, 127), (0, 254), (-8, 7)],
    ]
)


def exact_scale(low, high, spec):
    """The docstring's formula in fractions. A side without codes asks for nothing."""
    qmin, qmax = code_range(spec)
    low, high = min(Fraction(float(low)), 0), max(Fraction(float(high)), 0)
    if not spec.symmetric:
        return max((high - low) / (qmax - qmin), max(high, -low) / 2**31)
    sides = [v / q for v, q in ((low, qmin), (high, qmax)) if q]
    return max(sides)


def exact_power_of_two(low, high, spec):
    """The smallest power of two that is not below the exact quotient."""
    quotient, exponent = exact_scale(low, high, spec), -126
    while Fraction(2) ** exponent < quotient and exponent < 127:
        exponent += 1
    return 2.0**exponent


def _replace(specs, **changes):
    """Those of the specs that exist with the changes: symmetric grids have a zero."""
    if changes.get("symmetric"):
        specs = [s for s in specs if s.signed or not s.narrow_range]
    return [dataclasses.replace(spec, **changes) for spec in specs]


_map_fake_quant = jax.jit(jax.vmap(fake_quant, (0, 0, None)))


def _check_scales(got, ranges, spec):
    for scale, (low, high) in zip(np.asarray(got), ranges, strict=True):
        wanted = exact_scale(low, high, spec)
        # Four float roundings.
        assert abs(Fraction(float(scale)) - wanted) <= wanted / 2**22, (low, high)


class MinMaxParamsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*WORDS)
    def test_asymmetric_scale_matches_definition(self, *word):
        spec = QSpec(*word)
        grid = self.variant(functools.partial(min_max_params, spec=spec))(*RANGES.T)
        _check_scales(grid.scale, RANGES, spec)

    @parameterized.parameters(*WORDS)
    def test_asymmetric_zero_point_matches_definition(self, *word):
        spec = QSpec(*word)
        grid = jit_min_max(*RANGES.T, spec)
        qmin, qmax = code_range(spec)
        low = np.minimum(RANGES[:, 0], np.float32(0))
        steps = np.rint(low * (np.float32(1) / np.asarray(grid.scale)))
        wanted = np.minimum(qmin - np.int64(steps), qmax)
        assert grid.zero_point.dtype == np.int32
        np.testing.assert_array_equal(grid.zero_point, wanted)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(bits=[2, 4, 8, 16, 31, 32], narrow_range=[True, False])
    def test_symmetric_matches_definition(self, bits, narrow_range):
        spec = QSpec(bits, narrow_range=narrow_range, symmetric=True)
        grid = self.variant(functools.partial(min_max_params, spec=spec))(*RANGES.T)
        _check_scales(grid.scale, RANGES, spec)
        np.testing.assert_array_equal(grid.zero_point, np.zeros(len(RANGES)))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(bits=[1, 2, 8, 31])
    def test_unsigned_symmetric_matches_definition(self, bits):
        spec = QSpec(bits, signed=False, symmetric=True)
        ranges = RANGES[RANGES[:, 0] >= 0]
        grid = self.variant(functools.partial(min_max_params, spec=spec))(*ranges.T)
        _check_scales(grid.scale, ranges, spec)
        np.testing.assert_array_equal(grid.zero_point, np.zeros(len(ranges)))

    @parameterized.product(symmetric=[True, False], power_of_two=[True, False])
    def test_zero_is_a_code(self, symmetric, power_of_two):
        for spec in _replace(SPECS, symmetric=symmetric, power_of_two=power_of_two):
            grids = jit_min_max(*RANGES.T, spec)
            low, high = code_range(spec)
            zero_point = np.int64(grids.zero_point)
            assert np.all((zero_point >= low) & (zero_point <= high))
            zeros = _map_fake_quant(jnp.zeros(len(RANGES)), grids, spec)
            np.testing.assert_array_equal(zeros, np.zeros(len(RANGES)))

    @parameterized.product(symmetric=[True, False])
    def test_ends_are_at_most_half_a_step_off(self, symmetric):
        # A symmetric grid needs codes on both sides of zero.
        two_sided = [s for s in SPECS if s.bits > 1 and s.signed]
        specs = two_sided if symmetric else [s for s in SPECS if s.bits < 32]
        for spec in _replace(specs, symmetric=symmetric):
            grids = jit_min_max(*RANGES.T, spec)
            for ends in RANGES.T:
                y = _map_fake_quant(ends, grids, spec)
                error = np.abs(np.float64(y) - ends)
                rounding = 2.0**-21 * np.abs(np.float64(RANGES)).max(1)
                assert np.all(error <= np.float64(grids.scale) / 2 + rounding)

    @parameterized.product(symmetric=[True, False], power_of_two=[True, False])
    def test_an_empty_range_has_scale_1(self, symmetric, power_of_two):
        for spec in _replace(SPECS, symmetric=symmetric, power_of_two=power_of_two):
            grid = jit_min_max(jnp.float32(0), jnp.float32(0), spec)
            assert float(grid.scale) == 1.0
            assert int(grid.zero_point) == (0 if symmetric else code_range(spec)[0])

    @parameterized.product(symmetric=[True, False], power_of_two=[True, False])
    def test_huge_and_tiny_ranges_are_finite(self, symmetric, power_of_two):
        ranges = np.float32([(-1, 1), (0, 1), (-1, 0)])
        ranges = np.concatenate([ranges * np.float32(size) for size in (3e38, 1e-40)])
        specs = [s for s in SPECS if s.bits > 1]
        for spec in _replace(specs, symmetric=symmetric, power_of_two=power_of_two):
            grids = jit_min_max(*ranges.T, spec)
            scale = np.float64(grids.scale)
            assert np.all((scale >= 2.0**-126) & (scale <= 2.0**126))

    @parameterized.parameters(True, False)
    def test_a_huge_range_of_one_bit_is_finite(self, signed):
        grid = min_max_params(-3e38, 3e38, QSpec(1, signed))
        assert 0 < float(grid.scale) < np.inf
        y = fake_quant(jnp.float32([-3e38, 0.0, 3e38]), grid, QSpec(1, signed))
        assert np.all(np.isfinite(y))

    def test_asymmetric_words_of_32_bits_reach_their_ends(self):
        for low, high in ((-1.0, 0.0), (0.0, 1.0), (-0.3, 0.7)):
            grid = min_max_params(low, high, QSpec(32))
            x = np.float32([low, 0.0, (low + high) / 2, high])
            y = fake_quant(jnp.asarray(x), grid, QSpec(32))
            np.testing.assert_allclose(y, x, atol=2.0**-23)

    def test_a_nan_range_gets_no_made_up_scale(self):
        for low, high in ((np.nan, np.nan), (-1.0, np.nan), (np.nan, 1.0)):
            assert np.isnan(min_max_params(low, high, QSpec(8)).scale)

    def test_traced_bits_give_the_same_grids(self):
        bits = np.arange(1, 33)
        f = lambda b, **kw: min_max_params(jnp.float32(-0.3), 1.7, QSpec(b, **kw))
        for kw in ({}, {"symmetric": True}, {"symmetric": True, "power_of_two": True}):
            grids = jax.jit(jax.vmap(functools.partial(f, **kw)))(bits)
            wanted = [f(int(b), **kw) for b in bits]
            for got, want in zip(grids, zip(*wanted, strict=True), strict=True):
                np.testing.assert_array_equal(got, np.stack(want))


@SETTINGS
@given(
    st.integers(1, 24),
    st.booleans(),
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    st.floats(0, 1e6, width=32, allow_subnormal=False),
)
def test_min_max_params_match_definition(bits, signed, low, width):
    spec, high = QSpec(bits, signed), float(np.float32(low) + np.float32(width))
    grid = jit_min_max(np.float32(low), np.float32(high), spec)
    if max(-low, high) < 1e-20:
        return  # Scales of the least floats have a test of their own.
    _check_scales(grid.scale[None], [(low, high)], spec)


class PowerOfTwoScaleTest(chex.TestCase):
    """The smallest power of two whose grid holds the range, in fractions."""

    def _check(self, ranges, spec):
        ranges = np.float32(ranges)
        grid = jit_min_max(*ranges.T, spec)
        wanted = [exact_power_of_two(low, high, spec) for low, high in ranges]
        np.testing.assert_array_equal(np.float64(grid.scale), wanted)

    @parameterized.product(symmetric=[True, False])
    def test_ranges(self, symmetric):
        specs = [s for s in SPECS if 1 < s.bits <= 24]
        for spec in _replace(specs, symmetric=symmetric, power_of_two=True):
            one_sided = symmetric and not spec.signed
            self._check([r for r in RANGES if not one_sided or r[0] >= 0], spec)

    @parameterized.product(symmetric=[True, False], below=[True, False])
    def test_ranges_that_just_fit(self, symmetric, below):
        for bits in range(2, 25):
            spec = QSpec(
                bits, narrow_range=True, symmetric=symmetric, power_of_two=True
            )
            codes = code_range(spec)[1] * (1 if symmetric else 2)
            sizes = np.ldexp(np.float32(codes), np.arange(-20, 20, 3))
            sizes = np.nextafter(sizes, np.float32(0)) if below else sizes
            self._check(np.stack([-sizes if symmetric else 0 * sizes, sizes], 1), spec)

    def test_symmetric_ranges_just_too_wide(self):
        for bits in range(2, 25):
            spec = QSpec(bits, narrow_range=True, symmetric=True, power_of_two=True)
            size = np.nextafter(np.float32(code_range(spec)[1]), np.float32(np.inf))
            self._check([(-size, size), (0, size), (-size, 0)], spec)

    def test_asymmetric_ranges_just_too_wide(self):
        for bits in range(1, 25):
            spec = QSpec(bits, power_of_two=True)
            size = np.nextafter(np.float32(2**bits - 1), np.float32(np.inf))
            self._check([(0, size), (-size, 0)], spec)

    @parameterized.product(symmetric=[True, False])
    def test_longer_words_are_one_power_off_at_most(self, symmetric):
        for bits in (25, 26, 31, 32):
            spec = QSpec(bits, symmetric=symmetric, power_of_two=True)
            size = np.float32(2.0 ** (bits - 1 if symmetric else bits))  # qmax + 1
            for high in (size, np.float32(0.75) * size):
                got = float(jit_min_max(np.float32(0), high, spec).scale)
                wanted = exact_power_of_two(0, high, spec)
                assert got in (wanted, wanted / 2)


@SETTINGS
@given(
    st.integers(2, 16),
    st.booleans(),
    st.integers(0, 2**20),
    st.integers(0, 2**20),
    st.integers(-30, 30),
)
def test_power_of_two_scale_is_the_smallest_that_holds(bits, symmetric, a, b, exponent):
    # Integers of 20 bits: ends and width are floats.
    low, high = -a * 2.0**exponent, b * 2.0**exponent
    spec = QSpec(bits, symmetric=symmetric, power_of_two=True)
    grid = jit_min_max(np.float32(low), np.float32(high), spec)
    wanted = exact_power_of_two(low, high, spec) if a or b else 1.0
    assert float(grid.scale) == wanted


class AbsMaxParamsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        axis=[None, 0, -1, (0, 2), (-1, -2)], narrow_range=[True, False]
    )
    def test_matches_definition(self, axis, narrow_range):
        x = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(np.float32)
        spec = QSpec(8, narrow_range=narrow_range, axis=axis)
        grid = self.variant(lambda x: abs_max_params(x, spec))(x)
        axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
        over = tuple(set(range(3)) - {a % 3 for a in axes})
        low, high = (f(x, over, keepdims=bool(axes)) for f in (np.min, np.max))
        assert grid.scale.shape == low.shape == grid.zero_point.shape
        assert grid.scale.dtype == np.float32 and grid.zero_point.dtype == np.int32
        wanted = QSpec(8, narrow_range=narrow_range, symmetric=True)
        ranges = np.stack([low.ravel(), high.ravel()], 1)
        _check_scales(grid.scale.ravel(), ranges, wanted)
        np.testing.assert_array_equal(grid.zero_point, np.zeros(low.shape))

    @parameterized.parameters(True, False)
    def test_values_are_on_the_grid_and_the_largest_is_kept(self, power_of_two):
        x = np.random.default_rng(3).normal(size=(64, 5)).astype(np.float32)
        spec = QSpec(8, narrow_range=True, power_of_two=power_of_two, axis=-1)
        grid = jax.jit(lambda x: abs_max_params(x, spec))(x)
        top = np.abs(np.asarray(jit_quantize(x, grid, spec))).max(0)
        if power_of_two:
            assert np.all(np.frexp(np.asarray(grid.scale))[0] == 0.5)
            assert np.all((top >= 63) & (top <= 127))
        else:
            np.testing.assert_array_equal(top, [127] * 5)

    def test_a_channel_of_zeros_has_scale_1(self):
        x = jnp.array([[0.0, 2.0], [0.0, -1.0]])
        grid = abs_max_params(x, QSpec(2, narrow_range=True, axis=-1))
        np.testing.assert_array_equal(grid.scale, [[1.0, 2.0]])

    def test_a_constant_tensor_is_exact(self):
        x = jnp.full((4, 3), -0.25)
        spec = QSpec(8, narrow_range=True, power_of_two=True)
        np.testing.assert_array_equal(fake_quant(x, abs_max_params(x, spec), spec), x)

    @parameterized.parameters((0,), (0, 3), (3, 0))
    def test_empty_values_have_scale_1(self, *shape):
        grid = abs_max_params(jnp.zeros(shape), QSpec(8, axis=-1))
        chex.assert_shape(grid.scale, (1,) * (len(shape) - 1) + shape[-1:])
        np.testing.assert_array_equal(grid.scale, np.ones(grid.scale.shape))
        assert float(abs_max_params(jnp.zeros(shape), QSpec(8)).scale) == 1.0


class FakeQuantBiasTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(((4,), ()), ((4,), (4,)), ((1, 4), (3, 1)), ((), ()))
    def test_matches_definition(self, bias_shape, scale_shape):
        rng = np.random.default_rng(4)
        bias = np.float32(rng.normal(size=bias_shape))
        scale = np.float32(rng.uniform(0.001, 0.1, scale_shape))
        y = self.variant(fake_quant_bias)(jnp.asarray(bias), jnp.asarray(scale))
        np.testing.assert_array_equal(y, fake_quantized(bias, scale, 0, QSpec(32)))

    def test_gradient_passes_and_the_site_is_named(self):
        bias, scale = jnp.array([0.3, 1e30]), jnp.float32(0.1)
        f = lambda b: fake_quant_bias(b, scale, site="conv1/bias").sum()
        np.testing.assert_array_equal(jax.grad(f)(bias), [1.0, 0.0])
        assert "conv1/bias" in str(jax.make_jaxpr(f)(bias))


def test_both_ends_of_a_range_are_one_reduction():
    x = np.random.default_rng(0).normal(0, 3, (5, 7)).astype(np.float32)
    both = jax.jit(functools.partial(reduce_range, axis=None))
    cases = [x, x.astype(jnp.bfloat16), x[0, 0], np.float32([np.inf, -np.inf, 0])]
    for own in [*cases, np.float32([1, np.nan, -np.inf])]:
        wide = np.asarray(own, np.float32)
        np.testing.assert_array_equal(both(own), [wide.min(), wide.max()])
    np.testing.assert_array_equal(both(x[:0]), [0, 0])
    each = np.stack([x.min(1), x.max(1)])
    np.testing.assert_array_equal(jax.vmap(both)(x), each)
    text = both.lower(x).as_text()
    assert text.count("stablehlo.reduce(") == 1
    slopes = jax.grad(lambda x: 2 * both(x)[0] + 3 * both(x)[1])(x)
    wanted = np.zeros_like(x)
    wanted.flat[[x.argmin(), x.argmax()]] = 2, 3
    np.testing.assert_array_equal(slopes, wanted)
