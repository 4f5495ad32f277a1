"""Codes and values of grids against their formulas; what is no array, grid or word."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.affine import (
    QParams,
    QSpec,
    dequantize,
    fake_quant,
    quantize,
)
from qjax.ranges import abs_max_params, min_max_params
from qjax.rounding import half_away
from tests.affine import (
    SETTINGS,
    SPECS,
    WORDS,
    code_range,
    codes_of,
    fake_quantized,
    grid_of,
    jit_dequantize,
    jit_fake_quant,
    jit_quantize,
    points_of,
    values_of,
)


class PerTensorTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*WORDS)
    def test_quantize_matches_definition(self, *word):
        spec = QSpec(*word)
        f = self.variant(lambda x, grid: quantize(x, grid, spec))
        # Words of 32 bits with a zero point have a test of their own.
        zero_points = (0,) if spec.bits == 32 else (0, *code_range(spec))
        for scale, zero_point in itertools.product((0.1, 0.125, 3.7), zero_points):
            x = points_of(scale, spec)
            q = f(x, grid_of(scale, zero_point))
            assert q.dtype == np.int32
            np.testing.assert_array_equal(q, codes_of(x, scale, zero_point, spec))

    @parameterized.parameters(-(2**31), -3, 3, 2**31 - 1)
    def test_steps_of_32_bits_saturate_before_the_zero_point_joins(self, zero_point):
        x = points_of(0.125, QSpec(32))
        q = jit_quantize(x, grid_of(0.125, zero_point), QSpec(32))
        wanted = codes_of(x, 0.125, 0, QSpec(32)) + zero_point
        np.testing.assert_array_equal(q, np.clip(wanted, *code_range(QSpec(32))))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*WORDS)
    def test_fake_quant_matches_definition(self, *word):
        spec = QSpec(*word)
        f = self.variant(lambda x, grid: fake_quant(x, grid, spec))
        shares = (0.0,) if spec.bits == 32 else (0.0, 0.3)
        for scale, share in itertools.product((0.1, 0.125), shares):
            zero_point = int(share * code_range(spec)[1])
            x = points_of(scale, spec)
            y = f(x, grid_of(scale, zero_point))
            assert y.dtype == np.float32
            np.testing.assert_array_equal(y, fake_quantized(x, scale, zero_point, spec))

    @chex.variants(with_jit=True, without_jit=True)
    def test_dequantize_matches_definition(self):
        f = self.variant(dequantize)
        for spec, scale in itertools.product(SPECS, (0.1, 0.125)):
            low, high = code_range(spec)
            q = np.linspace(low, high, 201).astype(np.int64).clip(low, high)
            x = f(jnp.asarray(q, jnp.int32), grid_of(scale, int(0.4 * low)))
            np.testing.assert_array_equal(x, values_of(q, scale, int(0.4 * low)))

    @parameterized.parameters(jnp.int8, jnp.uint8, jnp.int16, jnp.int32)
    def test_dequantize_takes_any_integer_type(self, dtype):
        x = dequantize(jnp.array([0, 1, 100], dtype), grid_of(0.1, 3))
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, values_of([0, 1, 100], 0.1, 3))

    @parameterized.parameters(2.0**-126, 2.0**-40, 2.0**40, 2.0**126)
    def test_extreme_scales(self, scale):
        # No subnormal values: XLA takes them to zero.
        x = np.float32([-3, -2.5, -1.5, -1, 0, 1, 1.5, 2.5, 3]) * np.float32(scale)
        got = jit_quantize(x, grid_of(scale, 0), QSpec(3))
        np.testing.assert_array_equal(got, [-3, -2, -2, -1, 0, 1, 2, 2, 3])

    @parameterized.parameters((), (0,), (0, 4), (1,), (5, 1))
    def test_shapes_are_kept(self, *shape):
        x, grid, spec = np.full(shape, 0.7, np.float32), grid_of(0.5, 1), QSpec(4)
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
        q = self.variant(lambda x: quantize(x, grid_of(0.1, 3), QSpec(8)))(x)
        y = self.variant(lambda x: fake_quant(x, grid_of(0.1, 3), QSpec(8)))(x)
        wide = np.asarray(x).astype(np.float32)
        np.testing.assert_array_equal(q, codes_of(wide, 0.1, 3, QSpec(8)))
        wanted = fake_quantized(wide, 0.1, 3, QSpec(8)).astype(dtype)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.float32(y), wanted.astype(np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(-7, 0, 5)
    def test_nan_becomes_the_zero_point_and_stays_a_value(self, zero_point):
        x, grid = jnp.array([jnp.nan, -jnp.nan]), grid_of(0.1, zero_point)
        q = self.variant(lambda x: quantize(x, grid, QSpec(4)))(x)
        y = self.variant(lambda x: fake_quant(x, grid, QSpec(4)))(x)
        np.testing.assert_array_equal(q, [zero_point] * 2)
        assert np.all(np.isnan(y))

    def test_rounding_of_the_spec_is_used(self):
        x, spec = jnp.array([0.5, 1.5, -0.5, -2.5]), QSpec(8, rounding=half_away)
        np.testing.assert_array_equal(quantize(x, grid_of(1, 0), spec), [1, 2, -1, -3])
        np.testing.assert_array_equal(
            fake_quant(x, grid_of(1, 0), spec), [1, 2, -1, -3]
        )


class PerAxisTest(chex.TestCase):
    AXES = [0, 1, 2, -1, -3, (0, 2), (1, -1), (-1, 0, 1), ()]

    def _case(self, axis, spec, shape=(3, 4, 5)):
        rng = np.random.default_rng(1)
        axes = (axis,) if isinstance(axis, int) else axis
        kept = [np.arange(len(shape))[a] for a in axes]
        grid_shape = [n if d in kept else 1 for d, n in enumerate(shape)]
        scale = np.float32(rng.uniform(0.01, 0.2, grid_shape))
        zero_point = rng.integers(*code_range(spec), grid_shape, endpoint=True)
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
        codes = codes_of(x, scale, zero_point, spec)
        np.testing.assert_array_equal(q, codes)
        np.testing.assert_array_equal(dequantize(q, grid), y)
        np.testing.assert_array_equal(y, values_of(codes, scale, zero_point))

    @parameterized.parameters((1, 4), (0, 4), (3, 1), (0, 1))
    def test_one_channel_and_empty_batches(self, *shape):
        spec = QSpec(4, axis=-1)
        x, scale, zero_point = self._case(-1, spec, shape)
        grid = QParams(jnp.asarray(scale), jnp.asarray(zero_point))
        q, y = jax.jit(lambda x: (quantize(x, grid, spec), fake_quant(x, grid, spec)))(
            x
        )
        np.testing.assert_array_equal(q, codes_of(x, scale, zero_point, spec))
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
            ties = points_of(scale, QSpec(8))
            x = jnp.stack([ties, -ties])
            grids = grid_of([scale, 0.7], [zero_point, zero_point + 1])
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


SIZE = 24


@st.composite
def _grids(draw, most_bits=16):
    signed = draw(st.booleans())
    spec = QSpec(draw(st.integers(1, most_bits)), signed)
    scale = draw(st.floats(2.0**-20, 2.0**20, width=32))
    return grid_of(scale, draw(st.integers(*code_range(spec)))), spec


def _arrays(bound=2.0**17):
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, SIZE, elements=elements)


@SETTINGS
@given(_grids(), _arrays())
def test_codes_match_definition_and_stay_in_range(case, steps):
    grid, spec = case
    x = steps * np.asarray(grid.scale)
    q = jit_quantize(x, grid, spec)
    wanted = codes_of(x, np.asarray(grid.scale), np.asarray(grid.zero_point), spec)
    np.testing.assert_array_equal(q, wanted)
    low, high = code_range(spec)
    assert low <= int(q.min()) and int(q.max()) <= high


@SETTINGS
@given(_grids(), _arrays(2.0**127))
def test_fake_quant_is_dequantize_of_quantize(case, x):
    grid, spec = case
    one = jit_fake_quant(x, grid, spec)
    two = jit_dequantize(jit_quantize(x, grid, spec), grid)
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@SETTINGS
@given(_grids(), _arrays())
def test_fake_quant_is_idempotent(case, steps):
    grid, spec = case
    once = jit_fake_quant(steps * np.asarray(grid.scale), grid, spec)
    np.testing.assert_array_equal(jit_fake_quant(once, grid, spec), once)


@SETTINGS
@given(_grids(), _arrays())
def test_fake_quant_is_monotone(case, steps):
    grid, spec = case
    x = np.sort(steps * np.asarray(grid.scale))
    assert np.all(np.diff(jit_quantize(x, grid, spec)) >= 0)
    assert np.all(np.diff(jit_fake_quant(x, grid, spec)) >= 0)


@SETTINGS
@given(_grids(), _arrays())
def test_error_is_half_a_step_inside_the_grid(case, steps):
    grid, spec = case
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    low, high = ((end - zero_point) * scale for end in code_range(spec))
    x = np.float32(np.clip(steps * scale, low, high))
    y = jit_dequantize(jit_quantize(x, grid, spec), grid)
    error = np.abs(np.float64(y) - np.float64(x))
    # Two float products, three roundings each at most.
    rounding = 2.0**-22 * (np.abs(np.float64(x)) + scale)
    assert np.all(error <= scale / 2 + rounding)


@SETTINGS
@given(_grids(most_bits=6))
def test_fake_quant_has_exactly_the_values_of_its_codes(case):
    grid, spec = case
    steps = np.linspace(-130, 130, 1041, dtype=np.float32)
    values = np.unique(jit_fake_quant(steps * np.asarray(grid.scale), grid, spec))
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
            f(jnp.zeros((2, 3)), grid_of(1, 0), QSpec(4, axis=axis))
        with pytest.raises(ValueError, match=r"axis in -2\.\.1, or None"):
            abs_max_params(jnp.zeros((2, 3)), QSpec(4, axis=axis))

    @parameterized.parameters(32, np.int32(32), np.uint8(32))
    def test_unsigned_words_of_32_bits(self, bits):
        spec = QSpec(bits, signed=False)
        for f in (quantize, fake_quant):
            with pytest.raises(
                ValueError, match="an unsigned word has at most 31 bits"
            ):
                f(jnp.zeros(3), grid_of(1, 0), spec)
        with pytest.raises(ValueError, match="an unsigned word has at most 31 bits"):
            min_max_params(0.0, 1.0, spec)

    def test_traced_unsigned_words_of_32_bits_saturate(self):
        x = np.float32([0.0, 1e30, 7.0])
        q = jax.jit(quantize)(x, grid_of(1, 0), QSpec(32, signed=False))
        np.testing.assert_array_equal(q, [0, 2**31 - 1, 7])


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
