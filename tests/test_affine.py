"""Oracles: the formulas in NumPy float32 and int64, and exact ones in `fractions`."""

import dataclasses
import fractions
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.affine import (
    QParams,
    QSpec,
    dequantize,
    fake_quant,
    fake_quant_bias,
    quantize,
)
from qjax.qpoint import qpoint_p
from qjax.ranges import abs_max_params, min_max_params
from qjax.rounding import half_away

Fraction = fractions.Fraction

# bits, signed, narrow_range: plain values, whose names are the same in every process.
WORDS = [
    (bits, signed, narrow_range)
    for bits in (1, 2, 4, 8, 16, 31, 32)
    for signed in (True, False)
    for narrow_range in (True, False)
    if not (bits == 1 and narrow_range) and not (bits == 32 and not signed)
]
SPECS = [QSpec(*word) for word in WORDS]
EXTREMES = np.float32(
    [0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-30, np.nan]
)


def _code_range(spec):
    first = -(2 ** (spec.bits - 1)) if spec.signed else 0
    return first + int(spec.narrow_range), first + 2**spec.bits - 1


def _codes(x, scale, zero_point, spec):
    """The definition: products in float32, then integers that cannot overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(np.float32(x) * (np.float32(1) / np.float32(scale)))
    steps = np.where(np.isnan(steps), 0.0, np.clip(np.float64(steps), -1e15, 1e15))
    return np.clip(np.int64(steps) + np.int64(zero_point), *_code_range(spec))


def _values(codes, scale, zero_point):
    return (np.float32(codes) - np.float32(zero_point)) * np.float32(scale)


def _fake_quant(x, scale, zero_point, spec):
    value = _values(_codes(x, scale, zero_point, spec), scale, zero_point)
    return np.where(np.isnan(x), np.float32(np.nan), value)


def _points(scale, spec):
    """Ties, random values over twice the range of codes, and extremes."""
    rng = np.random.default_rng(0)
    ties = (np.arange(-300, 300) + 0.5) * scale
    spread = rng.uniform(-1, 1, 300) * 2.0**spec.bits * scale
    return np.float32([*ties, *np.float32(spread), *EXTREMES])


def _grid(scale, zero_point):
    return QParams(jnp.float32(scale), jnp.int32(zero_point))


# Jitted over every argument: one compilation serves all bits.
_jit_quantize, _jit_fake_quant = jax.jit(quantize), jax.jit(fake_quant)
_jit_dequantize, _jit_min_max = jax.jit(dequantize), jax.jit(min_max_params)


class PerTensorTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*WORDS)
    def test_quantize_matches_definition(self, *word):
        spec = QSpec(*word)
        f = self.variant(lambda x, grid: quantize(x, grid, spec))
        # Words of 32 bits with a zero point have a test of their own.
        zero_points = (0,) if spec.bits == 32 else (0, *_code_range(spec))
        for scale, zero_point in itertools.product((0.1, 0.125, 3.7), zero_points):
            x = _points(scale, spec)
            q = f(x, _grid(scale, zero_point))
            assert q.dtype == np.int32
            np.testing.assert_array_equal(q, _codes(x, scale, zero_point, spec))

    @parameterized.parameters(-(2**31), -3, 3, 2**31 - 1)
    def test_steps_of_32_bits_saturate_before_the_zero_point_joins(self, zero_point):
        x = _points(0.125, QSpec(32))
        q = _jit_quantize(x, _grid(0.125, zero_point), QSpec(32))
        wanted = _codes(x, 0.125, 0, QSpec(32)) + zero_point
        np.testing.assert_array_equal(q, np.clip(wanted, *_code_range(QSpec(32))))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*WORDS)
    def test_fake_quant_matches_definition(self, *word):
        spec = QSpec(*word)
        f = self.variant(lambda x, grid: fake_quant(x, grid, spec))
        shares = (0.0,) if spec.bits == 32 else (0.0, 0.3)
        for scale, share in itertools.product((0.1, 0.125), shares):
            zero_point = int(share * _code_range(spec)[1])
            x = _points(scale, spec)
            y = f(x, _grid(scale, zero_point))
            assert y.dtype == np.float32
            np.testing.assert_array_equal(y, _fake_quant(x, scale, zero_point, spec))

    @chex.variants(with_jit=True, without_jit=True)
    def test_dequantize_matches_definition(self):
        f = self.variant(dequantize)
        for spec, scale in itertools.product(SPECS, (0.1, 0.125)):
            low, high = _code_range(spec)
            q = np.linspace(low, high, 201).astype(np.int64).clip(low, high)
            x = f(jnp.asarray(q, jnp.int32), _grid(scale, int(0.4 * low)))
            np.testing.assert_array_equal(x, _values(q, scale, int(0.4 * low)))

    @parameterized.parameters(jnp.int8, jnp.uint8, jnp.int16, jnp.int32)
    def test_dequantize_takes_any_integer_type(self, dtype):
        x = dequantize(jnp.array([0, 1, 100], dtype), _grid(0.1, 3))
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, _values([0, 1, 100], 0.1, 3))

    @parameterized.parameters(2.0**-126, 2.0**-40, 2.0**40, 2.0**126)
    def test_extreme_scales(self, scale):
        # No subnormal values: XLA takes them to zero.
        x = np.float32([-3, -2.5, -1.5, -1, 0, 1, 1.5, 2.5, 3]) * np.float32(scale)
        got = _jit_quantize(x, _grid(scale, 0), QSpec(3))
        np.testing.assert_array_equal(got, [-3, -2, -2, -1, 0, 1, 2, 2, 3])

    @parameterized.parameters((), (0,), (0, 4), (1,), (5, 1))
    def test_shapes_are_kept(self, *shape):
        x, grid, spec = np.full(shape, 0.7, np.float32), _grid(0.5, 1), QSpec(4)
        q, y = jax.jit(lambda x: (quantize(x, grid, spec), fake_quant(x, grid, spec)))(
            x
        )
        np.testing.assert_array_equal(q, np.full(shape, 2))
        np.testing.assert_array_equal(y, np.full(shape, 0.5))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(jnp.bfloat16, jnp.float16)
    def test_half_precision_is_computed_in_float32_and_kept(self, dtype):
        x = jnp.asarray(np.arange(-200, 200) * 0.1, dtype)
        x = jnp.concatenate([x, jnp.array([jnp.inf, -jnp.inf, jnp.nan], dtype)])
        q = self.variant(lambda x: quantize(x, _grid(0.1, 3), QSpec(8)))(x)
        y = self.variant(lambda x: fake_quant(x, _grid(0.1, 3), QSpec(8)))(x)
        wide = np.asarray(x).astype(np.float32)
        np.testing.assert_array_equal(q, _codes(wide, 0.1, 3, QSpec(8)))
        wanted = _fake_quant(wide, 0.1, 3, QSpec(8)).astype(dtype)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.float32(y), wanted.astype(np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(-7, 0, 5)
    def test_nan_becomes_the_zero_point_and_stays_a_value(self, zero_point):
        x, grid = jnp.array([jnp.nan, -jnp.nan]), _grid(0.1, zero_point)
        q = self.variant(lambda x: quantize(x, grid, QSpec(4)))(x)
        y = self.variant(lambda x: fake_quant(x, grid, QSpec(4)))(x)
        np.testing.assert_array_equal(q, [zero_point] * 2)
        assert np.all(np.isnan(y))

    def test_rounding_of_the_spec_is_used(self):
        x, spec = jnp.array([0.5, 1.5, -0.5, -2.5]), QSpec(8, rounding=half_away)
        np.testing.assert_array_equal(quantize(x, _grid(1, 0), spec), [1, 2, -1, -3])
        np.testing.assert_array_equal(fake_quant(x, _grid(1, 0), spec), [1, 2, -1, -3])


class PerAxisTest(chex.TestCase):
    AXES = [0, 1, 2, -1, -3, (0, 2), (1, -1), (-1, 0, 1), ()]

    def _case(self, axis, spec, shape=(3, 4, 5)):
        rng = np.random.default_rng(1)
        axes = (axis,) if isinstance(axis, int) else axis
        kept = [np.arange(len(shape))[a] for a in axes]
        grid_shape = [n if d in kept else 1 for d, n in enumerate(shape)]
        scale = np.float32(rng.uniform(0.01, 0.2, grid_shape))
        zero_point = rng.integers(*_code_range(spec), grid_shape, endpoint=True)
        steps = rng.integers(-30, 30, shape) * np.float32(0.5)  # Half of them ties.
        return np.float32(steps * scale), scale, zero_point.astype(np.int32)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        axis=AXES, kind=[(4, True, False), (4, False, True), (8, True, True)]
    )
    def test_matches_definition(self, axis, kind):
        spec = QSpec(*kind, axis=axis)
        x, scale, zero_point = self._case(axis, spec)
        grid = QParams(jnp.asarray(scale), jnp.asarray(zero_point))
        q = self.variant(lambda x: quantize(x, grid, spec))(x)
        y = self.variant(lambda x: fake_quant(x, grid, spec))(x)
        codes = _codes(x, scale, zero_point, spec)
        np.testing.assert_array_equal(q, codes)
        np.testing.assert_array_equal(dequantize(q, grid), y)
        np.testing.assert_array_equal(y, _values(codes, scale, zero_point))

    @parameterized.parameters((1, 4), (0, 4), (3, 1), (0, 1))
    def test_one_channel_and_empty_batches(self, *shape):
        spec = QSpec(4, axis=-1)
        x, scale, zero_point = self._case(-1, spec, shape)
        grid = QParams(jnp.asarray(scale), jnp.asarray(zero_point))
        q, y = jax.jit(lambda x: (quantize(x, grid, spec), fake_quant(x, grid, spec)))(
            x
        )
        np.testing.assert_array_equal(q, _codes(x, scale, zero_point, spec))
        chex.assert_shape(y, shape)

    def test_negative_and_positive_axis_agree(self):
        x, scale, zero_point = self._case(-2, QSpec(4))
        grid = QParams(jnp.asarray(scale), jnp.asarray(zero_point))
        a, b = (quantize(x, grid, QSpec(4, axis=axis)) for axis in (-2, 1))
        np.testing.assert_array_equal(a, b)


class SameBitsTest(chex.TestCase):
    """Eager, jitted and vmapped programs agree in every bit."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        name=["quantize", "fake_quant"], axes=[(0, None), (None, 0), (0, 0)]
    )
    def test_eager_jit_and_vmap(self, name, axes):
        f = {"quantize": quantize, "fake_quant": fake_quant}[name]
        many = self.variant(jax.vmap(lambda x, grid: f(x, grid, QSpec(8)), axes))
        for scale, zero_point in itertools.product((0.1, 0.3, 0.125), (0, 3)):
            ties = _points(scale, QSpec(8))
            x = jnp.stack([ties, -ties])
            grids = _grid([scale, 0.7], [zero_point, zero_point + 1])
            first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
            got = many(
                *(
                    first(o) if a is None else o
                    for o, a in zip((x, grids), axes, strict=True)
                )
            )
            for i in range(2):
                pick = lambda tree, a, i=i: jax.tree.map(
                    lambda leaf: leaf[i * (a == 0)], tree
                )
                one = f(pick(x, axes[0]), pick(grids, axes[1]), QSpec(8))
                assert np.asarray(got[i]).tobytes() == np.asarray(one).tobytes()


_SIZE = 24
_SETTINGS = settings(deadline=None, max_examples=40)


@st.composite
def _grids(draw, most_bits=16):
    signed = draw(st.booleans())
    spec = QSpec(draw(st.integers(1, most_bits)), signed)
    scale = draw(st.floats(2.0**-20, 2.0**20, width=32))
    return _grid(scale, draw(st.integers(*_code_range(spec)))), spec


def _arrays(bound=2.0**17):
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, _SIZE, elements=elements)


@_SETTINGS
@given(_grids(), _arrays())
def test_codes_match_definition_and_stay_in_range(case, steps):
    grid, spec = case
    x = steps * np.asarray(grid.scale)
    q = _jit_quantize(x, grid, spec)
    wanted = _codes(x, np.asarray(grid.scale), np.asarray(grid.zero_point), spec)
    np.testing.assert_array_equal(q, wanted)
    low, high = _code_range(spec)
    assert low <= int(q.min()) and int(q.max()) <= high


@_SETTINGS
@given(_grids(), _arrays(2.0**127))
def test_fake_quant_is_dequantize_of_quantize(case, x):
    grid, spec = case
    one = _jit_fake_quant(x, grid, spec)
    two = _jit_dequantize(_jit_quantize(x, grid, spec), grid)
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@_SETTINGS
@given(_grids(), _arrays())
def test_fake_quant_is_idempotent(case, steps):
    grid, spec = case
    once = _jit_fake_quant(steps * np.asarray(grid.scale), grid, spec)
    np.testing.assert_array_equal(_jit_fake_quant(once, grid, spec), once)


@_SETTINGS
@given(_grids(), _arrays())
def test_fake_quant_is_monotone(case, steps):
    grid, spec = case
    x = np.sort(steps * np.asarray(grid.scale))
    assert np.all(np.diff(_jit_quantize(x, grid, spec)) >= 0)
    assert np.all(np.diff(_jit_fake_quant(x, grid, spec)) >= 0)


@_SETTINGS
@given(_grids(), _arrays())
def test_error_is_half_a_step_inside_the_grid(case, steps):
    grid, spec = case
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    low, high = ((end - zero_point) * scale for end in _code_range(spec))
    x = np.float32(np.clip(steps * scale, low, high))
    y = _jit_dequantize(_jit_quantize(x, grid, spec), grid)
    error = np.abs(np.float64(y) - np.float64(x))
    # Two float products, three roundings each at most.
    rounding = 2.0**-22 * (np.abs(np.float64(x)) + scale)
    assert np.all(error <= scale / 2 + rounding)


@_SETTINGS
@given(_grids(most_bits=6))
def test_fake_quant_has_exactly_the_values_of_its_codes(case):
    grid, spec = case
    steps = np.linspace(-130, 130, 1041, dtype=np.float32)
    values = np.unique(_jit_fake_quant(steps * np.asarray(grid.scale), grid, spec))
    assert len(values) == 2**spec.bits


class ErrorsTest(chex.TestCase):
    @parameterized.product(
        f=[quantize, fake_quant],
        case=[
            (None, (1,), ()),
            (None, (1, 3), ()),
            (-1, (), (1, 3)),
            (-1, (3,), (1, 3)),
            (0, (1, 3), (2, 1)),
            ((0, 1), (1, 3), (2, 3)),
        ],
    )
    def test_wrong_scale_shape_says_wanted_and_got(self, f, case):
        axis, got, wanted = case
        grid = QParams(jnp.ones(got), jnp.zeros(got, jnp.int32))
        with pytest.raises(ValueError) as error:
            f(jnp.zeros((2, 3)), grid, QSpec(4, axis=axis))
        message = str(error.value)
        assert (
            f"`scale` must have shape {wanted} for an input of shape (2, 3)" in message
        )
        assert f"axis={axis}, got {got}" in message
        assert "Use `axis=None`" in message

    def test_wrong_zero_point_shape_is_named(self):
        grid = QParams(jnp.float32(1), jnp.zeros((1,), jnp.int32))
        with pytest.raises(ValueError, match=r"`zero_point` must have shape \(\)"):
            quantize(jnp.zeros(3), grid, QSpec(4))

    @parameterized.product(f=[quantize, fake_quant], axis=[2, -3, (0, 5)])
    def test_an_axis_that_does_not_exist(self, f, axis):
        with pytest.raises(ValueError, match="does not exist in an input of shape"):
            f(jnp.zeros((2, 3)), _grid(1, 0), QSpec(4, axis=axis))
        with pytest.raises(ValueError, match=r"axis in -2\.\.1, or None"):
            abs_max_params(jnp.zeros((2, 3)), QSpec(4, axis=axis))

    @parameterized.parameters(32, np.int32(32), np.uint8(32))
    def test_unsigned_words_of_32_bits(self, bits):
        spec = QSpec(bits, signed=False)
        for f in (quantize, fake_quant):
            with pytest.raises(
                ValueError, match="an unsigned word has at most 31 bits"
            ):
                f(jnp.zeros(3), _grid(1, 0), spec)
        with pytest.raises(ValueError, match="an unsigned word has at most 31 bits"):
            min_max_params(0.0, 1.0, spec)

    def test_traced_unsigned_words_of_32_bits_saturate(self):
        x = np.float32([0.0, 1e30, 7.0])
        q = jax.jit(quantize)(x, _grid(1, 0), QSpec(32, signed=False))
        np.testing.assert_array_equal(q, [0, 2**31 - 1, 7])


RANGES = np.float32(
    [
        *[(-1, 1), (-1.28, 1.27), (0, 1), (-1, 0), (0.5, 2), (-3, -2), (-0.1, 1000)],
        *[(-1e6, 1e-3), (-1e-3, 1e6), (-0.3, 0.7), (-5, 5), (-1e30, 2e30), (0, 1e-20)],
        *[(0, 255), (0, 65535), (-128, 127), (-127, 127), (0, 254), (-8, 7)],
    ]
)


def _exact_scale(low, high, spec):
    """The docstring's formula in fractions. A side without codes asks for nothing."""
    qmin, qmax = _code_range(spec)
    low, high = min(Fraction(float(low)), 0), max(Fraction(float(high)), 0)
    if not spec.symmetric:
        return max((high - low) / (qmax - qmin), max(high, -low) / 2**31)
    sides = [v / q for v, q in ((low, qmin), (high, qmax)) if q]
    return max(sides)


def _exact_power_of_two(low, high, spec):
    """The smallest power of two that is not below the exact quotient."""
    quotient, exponent = _exact_scale(low, high, spec), -126
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
        wanted = _exact_scale(low, high, spec)
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
        grid = _jit_min_max(*RANGES.T, spec)
        qmin, qmax = _code_range(spec)
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
            grids = _jit_min_max(*RANGES.T, spec)
            low, high = _code_range(spec)
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
            grids = _jit_min_max(*RANGES.T, spec)
            for ends in RANGES.T:
                y = _map_fake_quant(ends, grids, spec)
                error = np.abs(np.float64(y) - ends)
                rounding = 2.0**-21 * np.abs(np.float64(RANGES)).max(1)
                assert np.all(error <= np.float64(grids.scale) / 2 + rounding)

    @parameterized.product(symmetric=[True, False], power_of_two=[True, False])
    def test_an_empty_range_has_scale_1(self, symmetric, power_of_two):
        for spec in _replace(SPECS, symmetric=symmetric, power_of_two=power_of_two):
            grid = _jit_min_max(jnp.float32(0), jnp.float32(0), spec)
            assert float(grid.scale) == 1.0
            assert int(grid.zero_point) == (0 if symmetric else _code_range(spec)[0])

    @parameterized.product(symmetric=[True, False], power_of_two=[True, False])
    def test_huge_and_tiny_ranges_are_finite(self, symmetric, power_of_two):
        ranges = np.float32([(-1, 1), (0, 1), (-1, 0)])
        ranges = np.concatenate([ranges * np.float32(size) for size in (3e38, 1e-40)])
        specs = [s for s in SPECS if s.bits > 1]
        for spec in _replace(specs, symmetric=symmetric, power_of_two=power_of_two):
            grids = _jit_min_max(*ranges.T, spec)
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


@_SETTINGS
@given(
    st.integers(1, 24),
    st.booleans(),
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    st.floats(0, 1e6, width=32, allow_subnormal=False),
)
def test_min_max_params_match_definition(bits, signed, low, width):
    spec, high = QSpec(bits, signed), float(np.float32(low) + np.float32(width))
    grid = _jit_min_max(np.float32(low), np.float32(high), spec)
    if max(-low, high) < 1e-20:
        return  # Scales of the least floats have a test of their own.
    _check_scales(grid.scale[None], [(low, high)], spec)


class PowerOfTwoScaleTest(chex.TestCase):
    """The smallest power of two whose grid holds the range, in fractions."""

    def _check(self, ranges, spec):
        ranges = np.float32(ranges)
        grid = _jit_min_max(*ranges.T, spec)
        wanted = [_exact_power_of_two(low, high, spec) for low, high in ranges]
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
            codes = _code_range(spec)[1] * (1 if symmetric else 2)
            sizes = np.ldexp(np.float32(codes), np.arange(-20, 20, 3))
            sizes = np.nextafter(sizes, np.float32(0)) if below else sizes
            self._check(np.stack([-sizes if symmetric else 0 * sizes, sizes], 1), spec)

    def test_symmetric_ranges_just_too_wide(self):
        for bits in range(2, 25):
            spec = QSpec(bits, narrow_range=True, symmetric=True, power_of_two=True)
            size = np.nextafter(np.float32(_code_range(spec)[1]), np.float32(np.inf))
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
                got = float(_jit_min_max(np.float32(0), high, spec).scale)
                wanted = _exact_power_of_two(0, high, spec)
                assert got in (wanted, wanted / 2)


@_SETTINGS
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
    grid = _jit_min_max(np.float32(low), np.float32(high), spec)
    wanted = _exact_power_of_two(low, high, spec) if a or b else 1.0
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
        top = np.abs(np.asarray(_jit_quantize(x, grid, spec))).max(0)
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
        np.testing.assert_array_equal(y, _fake_quant(bias, scale, 0, QSpec(32)))

    def test_gradient_passes_and_the_site_is_named(self):
        bias, scale = jnp.array([0.3, 1e30]), jnp.float32(0.1)
        f = lambda b: fake_quant_bias(b, scale, site="conv1/bias").sum()
        np.testing.assert_array_equal(jax.grad(f)(bias), [1.0, 0.0])
        assert "conv1/bias" in str(jax.make_jaxpr(f)(bias))


class QSpecTest(chex.TestCase):
    @parameterized.parameters(
        QSpec(),
        QSpec(4, False, False, True, True, (0, 1), half_away),
        QSpec(np.int8(4), axis=-1),
    )
    def test_bits_are_the_only_leaf(self, spec):
        leaves, treedef = jax.tree.flatten(spec)
        assert leaves == [spec.bits]
        assert jax.tree.unflatten(treedef, leaves) == spec

    def test_array_bits_are_the_only_leaf(self):
        spec = QSpec(jnp.array([2, 4]), symmetric=True)
        (leaf,) = jax.tree.leaves(spec)
        np.testing.assert_array_equal(leaf, [2, 4])
        np.testing.assert_array_equal(spec.qmin, [-2, -8])
        np.testing.assert_array_equal(spec.qmax, [1, 7])

    def test_equal_specs_have_equal_hashes(self):
        assert QSpec(4, axis=-1) == QSpec(bits=4, axis=-1)
        assert hash(QSpec(4, axis=-1)) == hash(QSpec(bits=4, axis=-1))
        others = [QSpec(5), QSpec(8, False), QSpec(8, narrow_range=True)]
        others += [QSpec(8, symmetric=True), QSpec(8, power_of_two=True)]
        others += [QSpec(8, axis=0), QSpec(8, rounding=half_away)]
        assert len({QSpec(8), *others}) == len(others) + 1

    def test_range_is_that_of_the_word(self):
        for spec in SPECS:
            assert (spec.qmin, spec.qmax) == _code_range(spec)

    def test_bits_are_validated(self):
        for bits in (0, 33, np.array([8, 40])):
            with pytest.raises(ValueError, match=r"`bits` must lie in 1\.\.32"):
                QSpec(bits)
        with pytest.raises(TypeError, match="`bits` must be an integer"):
            QSpec(8.0)
        with pytest.raises(ValueError, match="a 1-bit word a single code"):
            QSpec(1, narrow_range=True)
        with pytest.raises(ValueError, match="no code for zero"):
            QSpec(8, signed=False, narrow_range=True, symmetric=True)
        with pytest.raises(
            TypeError, match='`axis` must be an int, a tuple, "output" or None'
        ):
            QSpec(axis=[0, 1])

    def test_maps_over_bits(self):
        spec = jax.tree.map(lambda b: b + 1, QSpec(4, axis=-1))
        assert spec == QSpec(5, axis=-1)


def _point(x, scale, zero_point, bits, axis=None):
    """`fake_quant` with every operand an argument."""
    return fake_quant(x, QParams(scale, zero_point), QSpec(bits, axis=axis), site="s")


def _gradient(x, scale, zero_point, bits, axis=None):
    return jax.grad(lambda x: jnp.sum(_point(x, scale, zero_point, bits, axis)))(x)


def _operands(axis, batched, size=3):
    """Random operands of `_point`, those in ``batched`` with a leading axis."""
    rng = np.random.default_rng(5)
    shape = {None: (), -1: (1, 4), 0: (2, 1)}[axis]
    shapes = {"x": (2, 4), "scale": shape, "zero_point": shape, "bits": ()}
    shapes = {k: (size, *s) if k in batched else s for k, s in shapes.items()}
    return (
        jnp.asarray(rng.normal(size=shapes["x"]) * 3, jnp.float32),
        jnp.asarray(rng.uniform(0.1, 0.9, shapes["scale"]), jnp.float32),
        jnp.asarray(rng.integers(-2, 2, shapes["zero_point"]), jnp.int32),
        jnp.asarray(rng.integers(2, 8, shapes["bits"]), jnp.int32),
    )


NAMES = ("x", "scale", "zero_point", "bits")
BATCHED = [
    set(names) for n in range(1, 5) for names in itertools.combinations(NAMES, n)
]


class QpointTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(zero_point=[-8, -3, 0, 7], bits=[1, 2, 4])
    def test_gradient_is_one_where_the_code_does_not_saturate(self, zero_point, bits):
        x = np.float32(np.arange(-200, 200) / 8 * 0.5)
        got = self.variant(_gradient)(
            x, jnp.float32(0.5), jnp.int32(zero_point), jnp.int32(bits)
        )
        codes = np.rint(x / np.float32(0.5)) + zero_point
        low, high = _code_range(QSpec(bits))
        np.testing.assert_array_equal(got, (codes >= low) & (codes <= high))

    def test_gradient_is_one_at_both_ends_and_zero_beyond(self):
        x = jnp.array([-8.0, 7.0, -8.5, 7.49, -8.51, 7.5, 1e30, -jnp.inf, jnp.nan])
        got = _gradient(x, jnp.float32(1), jnp.int32(0), 4)
        np.testing.assert_array_equal(got, [1, 1, 1, 1, 0, 0, 0, 0, 0])

    def test_gradient_of_a_long_word_is_zero_where_the_code_saturates(self):
        for bits in (24, 26, 31, 32):
            beyond = np.float32(2.0 ** (bits - 1))  # qmax + 1
            inside = np.floor(np.nextafter(beyond, np.float32(0)))
            x = np.float32([inside, beyond, -beyond])
            got = _gradient(x, jnp.float32(1), jnp.int32(0), bits)
            np.testing.assert_array_equal(got, [1, 0, 1])

    def test_gradient_keeps_the_incoming_one_and_its_dtype(self):
        x = jnp.array([0.3, 99.0, -1.0], jnp.bfloat16)
        _, pullback = jax.vjp(lambda x: fake_quant(x, _grid(1, 0), QSpec(4)), x)
        (dx,) = pullback(jnp.array([3.0, 5.0, -7.0], jnp.bfloat16))
        assert dx.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(dx), [3.0, 0.0, -7.0])

    def test_scale_gets_no_gradient(self):
        f = lambda s: jnp.sum(
            fake_quant(jnp.ones(3), QParams(s, jnp.int32(0)), QSpec(8))
        )
        assert float(jax.grad(f)(jnp.float32(0.3))) == 0.0

    @parameterized.product(f=[_point, _gradient], axis=[None, 0], batched=BATCHED)
    def test_vmap_is_a_loop(self, f, axis, batched):
        operands = _operands(axis, batched)
        in_axes = [0 if name in batched else None for name in NAMES]
        f = jax.jit(functools.partial(f, axis=axis))
        got = jax.vmap(f, in_axes)(*operands)
        for i in range(3):
            pick = lambda o, a, i=i: o if a is None else o[i]
            one = f(*map(pick, operands, in_axes))
            np.testing.assert_array_equal(got[i], one)

    @parameterized.parameters(1, 2, -1)
    def test_vmap_over_another_axis_of_x_and_scale(self, axis):
        x, scale, zero_point, bits = _operands(-1, {"x", "scale"})
        moved = [jnp.moveaxis(o, 0, axis) for o in (x, scale)]
        f = functools.partial(_point, axis=-1)
        got = jax.vmap(f, (axis, axis, None, None))(*moved, zero_point, bits)
        for i in range(3):
            one = f(x[i], scale[i], zero_point, bits)
            np.testing.assert_array_equal(got[i], one)

    @parameterized.product(
        f=[_point, _gradient],
        axis=[None, -1],
        inner=[{"x"}, {"scale", "zero_point"}, {"bits"}],
        outer=[{"x"}, {"scale", "zero_point"}, {"bits"}],
    )
    def test_nested_vmap_is_a_nested_loop(self, f, axis, inner, outer):
        operands = list(_operands(axis, inner))
        for k, name in enumerate(NAMES):
            if name in outer:
                operands[k] = jnp.stack([operands[k], operands[k] + operands[k] // 2])
        f = jax.jit(functools.partial(f, axis=axis))
        axes = lambda names: [0 if name in names else None for name in NAMES]
        got = jax.vmap(jax.vmap(f, axes(inner)), axes(outer))(*operands)
        for i, j in np.ndindex(2, 3):
            pick = lambda o, a, k: o if a is None else o[k]
            one = map(pick, operands, axes(outer), [i] * 4)
            one = map(pick, one, axes(inner), [j] * 4)
            np.testing.assert_array_equal(got[i, j], f(*one))

    def test_vmap_of_a_scalar(self):
        x, scale = jnp.array([0.3, 5.0, -9.0]), jnp.array([0.5, 0.25, 1.0])
        f = lambda x, s: _point(x, s, jnp.int32(0), jnp.int32(4))
        np.testing.assert_array_equal(jax.vmap(f)(x, scale), [0.5, 1.75, -8.0])
        got = jax.vmap(f, (None, 0))(jnp.float32(1.3), scale)
        np.testing.assert_array_equal(got, [1.5, 1.25, 1.0])

    def test_scan_cond_and_checkpoint(self):
        x, scale, zero_point, bits = _operands(None, {"x"})
        f = lambda x: _point(x, scale, zero_point, bits)
        wanted, dx = f(x), _gradient(x, scale, zero_point, bits)
        _, scanned = jax.lax.scan(lambda c, x: (c, f(x)), 0, x)
        np.testing.assert_array_equal(scanned, wanted)
        taken = jax.jit(lambda p, x: jax.lax.cond(p, f, lambda x: x, x))
        np.testing.assert_array_equal(taken(True, x), wanted)
        np.testing.assert_array_equal(taken(False, x), x)
        np.testing.assert_array_equal(jax.checkpoint(f)(x), wanted)
        for g in (
            jax.checkpoint(f),
            lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
            lambda x: jax.lax.cond(True, f, lambda x: x, x),
        ):
            got = jax.jit(jax.grad(lambda x, g=g: jnp.sum(g(x))))(x)
            np.testing.assert_array_equal(got, dx)

    def test_exported_program_gives_the_same_values(self):
        operands = _operands(-1, set())
        f = jax.jit(functools.partial(_point, axis=-1))
        exported = jax.export.export(f)(*operands)
        np.testing.assert_array_equal(exported.call(*operands), f(*operands))

    def test_forward_mode_of_the_tag_itself(self):
        x = jnp.array([0.3, 99.0, -1.2])
        rest = jnp.float32(0.5), jnp.int32(0), jnp.int32(-8), jnp.int32(7)
        f = lambda x: qpoint_p.bind(x, *rest, site="", rounding=jnp.round)
        y, y_dot = jax.jvp(f, (x,), (jnp.array([2.0, 3.0, 4.0]),))
        np.testing.assert_array_equal(y, [0.5, 3.5, -1.0])
        np.testing.assert_array_equal(y_dot, [2.0, 0.0, 4.0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_hessian_vector_product_is_that_of_the_estimator(self):
        x = jnp.array([0.3, 99.0, -1.2, 2.0])
        v = jnp.array([1.0, 2.0, -3.0, 0.5])
        point = lambda x: _point(x, jnp.float32(0.5), jnp.int32(0), 4)
        gradient = jax.grad(lambda x: jnp.sum(point(x) ** 3))
        product = lambda x, v: jax.jvp(gradient, (x,), (v,))[1]
        inside = np.float32([1, 0, 1, 1])
        y = np.float32([0.5, 3.5, -1.0, 2.0])
        got = self.variant(product)(x, v)
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, 6 * y * inside * v, rtol=1e-6)

    def test_hessian_vector_product_of_a_quantized_layer_is_finite(self):
        kernel = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)), jnp.float32)
        x, spec = jnp.ones((2, 4)), QSpec(4, narrow_range=True, axis=-1)

        def loss(kernel):
            y = x @ fake_quant(kernel, abs_max_params(kernel, spec), spec)
            return jnp.sum(jnp.tanh(_point(y, jnp.float32(0.1), jnp.int32(0), 8)))

        product = jax.jit(lambda k, v: jax.jvp(jax.grad(loss), (k,), (v,))[1])
        got = product(kernel, jnp.ones_like(kernel))
        assert np.all(np.isfinite(got)) and np.any(got != 0)
        # Forward over reverse and reverse over reverse agree.
        twice = jax.jit(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k))))(kernel)
        np.testing.assert_allclose(got, twice, rtol=1e-5, atol=1e-6)

    def test_the_estimator_of_a_user_is_used(self):
        @functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
        def doubled(x, scale, zero_point, qmin, qmax, site, rounding):
            bind = functools.partial(qpoint_p.bind, site=site, rounding=rounding)
            return bind(x, scale, zero_point, qmin, qmax)

        def forward(*args):
            return doubled(*args), None

        def backward(site, rounding, residual, dy):
            assert site == "here"
            return 2 * dy, None, None, None, None

        doubled.defvjp(forward, backward)
        x = jnp.array([0.3, 99.0])
        f = lambda x: fake_quant(
            x, _grid(0.5, 0), QSpec(4), site="here", estimator=doubled
        )
        np.testing.assert_array_equal(f(x), [0.5, 3.5])
        np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(x), [2.0, 2.0])

    @parameterized.parameters(
        lambda f: f,
        jax.jit,
        jax.vmap,
        jax.checkpoint,
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
    )
    def test_the_site_stands_in_the_traced_program(self, transform):
        f = lambda x: fake_quant(x, _grid(0.5, 0), QSpec(4), site="conv1/output")
        text = str(jax.make_jaxpr(transform(f))(jnp.ones(3)))
        assert "qpoint" in text and "site=conv1/output" in text


# What is taken for an array, a grid, a word.

GRID = QParams(jnp.float32(0.02), jnp.int32(7))
VALUES = [[0.25, -1.0, 3.0], [0.0, 0.03, -9.0]]
CODES = np.clip(np.rint(np.float32(VALUES) * (1 / np.float32(0.02))) + 7, -128, 127)


@pytest.mark.parametrize("x", [VALUES, np.float32(VALUES), np.float64(VALUES)])
@pytest.mark.parametrize(
    "params",
    [
        QParams(0.02, 7),
        QParams(np.float32(0.02), np.int64(7)),
        QParams(np.float64(0.02), 7),
        QParams(jnp.float32(0.02), 7),
        QParams(0.02, jnp.int8(7)),
        (0.02, 7),
    ],
)
def test_numbers_arrays_and_lists_are_values_and_grids(x, params):
    q = quantize(x, params, QSpec(8))
    np.testing.assert_array_equal(q, CODES)
    assert q.dtype == np.int32
    real = dequantize(CODES.astype(int).tolist(), params)
    np.testing.assert_array_equal(real, np.float32(CODES - 7) * np.float32(0.02))
    np.testing.assert_array_equal(fake_quant(x, params, QSpec(8)), real)


def test_grids_of_numbers_where_values_are_traced():
    for params in (QParams(0.02, 7), QParams(np.float32(0.02), np.int32(7))):
        q = jax.jit(lambda x, p=params: quantize(x, p, QSpec(8)))(jnp.float32(VALUES))
        np.testing.assert_array_equal(q, CODES)
    by_scale = jax.jit(
        lambda s: quantize(VALUES, QParams([[s, s, s]], [[7, 7, 7]]), P8)
    )
    np.testing.assert_array_equal(by_scale(0.02), CODES)
    slope = jax.grad(lambda x: fake_quant(x, QParams(0.5, 0), QSpec(8)))(0.3)
    assert slope == 1.0


P8 = QSpec(8, axis=-1)


def test_whole_numbers_and_truth_values_are_rounded_as_real_ones():
    grid = QParams(0.5, 0)
    for x in ([1, 2, 3], np.uint8([1, 2, 3]), jnp.int32([1, 2, 3])):
        found = fake_quant(x, grid, QSpec(3))
        np.testing.assert_array_equal(found, np.float32([1.0, 1.5, 1.5]))
        assert found.dtype == np.float32
    np.testing.assert_array_equal(fake_quant([True, False], grid, QSpec(3)), [1, 0])
    assert fake_quant(jnp.bfloat16([1.0]), grid, QSpec(3)).dtype == jnp.bfloat16
    assert fake_quant(np.zeros((0, 3)), grid, QSpec(3)).shape == (0, 3)
    with jax.enable_x64(True):
        assert fake_quant(np.float64([1.0]), grid, QSpec(3)).dtype == np.float64
        assert dequantize(np.int64([1]), grid).dtype == np.float32


def test_grids_of_lists_are_grids_of_weights():
    spec = QSpec(8, narrow_range=True, axis=-1)
    found = abs_max_params([[1.0, -2.0], [0.5, 1.0]], spec)
    np.testing.assert_allclose(found.scale * 127, [[1, 2]], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize("a", GRID, P8), TypeError, "`x` must be an array"),
        (lambda: quantize(None, GRID, P8), TypeError, "`x` must be an array"),
        (lambda: quantize(1j, GRID, P8), TypeError, "numbers, got dtype complex64"),
        (lambda: quantize(jax.random.key(0), GRID, P8), TypeError, "got dtype key"),
        (lambda: quantize(0.5, QParams("a", 0), P8), TypeError, "`scale` must be"),
        (lambda: quantize(0.5, QParams(0.0, 0), P8), ValueError, "positive and finite"),
        (lambda: quantize(0.5, QParams(-1, 0), P8), ValueError, "positive and finite"),
        (lambda: quantize(0.5, QParams(np.nan, 0), P8), ValueError, "got nan"),
        (lambda: quantize(0.5, QParams([0.5, np.inf], 0), P8), ValueError, "finite"),
        (lambda: quantize(0.5, QParams(0.5, 7.5), P8), TypeError, "a whole number"),
        (lambda: quantize(0.5, QParams(0.5, 2**40), P8), ValueError, "must fit int32"),
        (lambda: quantize(0.5, {"scale": 1}, P8), TypeError, "`QParams.*got dict"),
        (lambda: quantize(0.5, 0.02, P8), TypeError, "`QParams.*got float"),
        (lambda: quantize(0.5, GRID, 8), TypeError, r"`QSpec\(bits=8\)`, got 8"),
        (lambda: fake_quant(0.5, GRID, None), TypeError, "`spec` must be a word"),
        (lambda: abs_max_params(0.5, 8), TypeError, "`spec` must be a word"),
        (lambda: dequantize([1.5], GRID), TypeError, "integer type, got float32"),
        (lambda: quantize([0.5], QParams([0.5], 0), QSpec(8)), ValueError, "`scale`"),
    ],
)
def test_what_is_no_array_grid_or_word_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_fields_of_a_word_are_those_of_python():
    spec = QSpec(8, np.bool_(False), axis=(np.int64(-1), np.int8(0)))
    assert spec == QSpec(8, False, axis=(-1, 0)) and hash(spec) == hash(
        QSpec(8, signed=False, axis=(-1, 0))
    )
    assert all(type(a) is int for a in spec.axis) and spec.signed is False
    for options in (
        {"axis": 1.5},
        {"axis": True},
        {"axis": "last"},
        {"axis": (0, 1.0)},
        {"signed": "no"},
        {"rounding": "half_even"},
    ):
        error = pytest.raises(
            (TypeError, ValueError), match=f"`{[*options][0]}` must be"
        )
        with error:
            QSpec(8, **options)
