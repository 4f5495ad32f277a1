"""Units, whole numbers and comparisons, number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.function_cases import Y, checked, point

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


UNITS = {
    "times": lambda x: point(x, 1.0) * 2,
    "over": lambda x: point(x, 1.0) / 255,
    "both": lambda x: (lambda v: (v, v * 0.25))(point(x, 1.0)),
    "three": lambda x: (lambda v: (v * 0.3, v, v * 3.0))(point(x, 1.0)),
    "again": lambda x: point(point(x, 1.0) / 255, 1 / 255, site="b"),
    "rounded": lambda x: jnp.round(point(x, 1.0)) * 2,
    "another unit": lambda x: point(x, 0.25) * 8.0,
    "moved": lambda x: (point(x, 1.0) * 0.5)[:, ::-1],
    "summed": lambda x: point(
        (lambda v: v * 0.5 + v)(point(x, 1.0)), 0.5, 16, site="b"
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_of_codes_stay_those_of_their_grid(name):
    fn = UNITS[name]
    x = np.arange(-64, 64, dtype=np.float32).reshape(2, 64)
    program = qjax.lower(fn, x)
    (grid,) = program.input_grids
    assert grid.scale == (0.25 if name == "another unit" else 1.0)
    found, wanted = program(x), jax.jit(fn)(x)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


WHOLE = {
    "double": lambda n: n * 2,
    "negate": lambda n: -n,
    "ten times": lambda n: n * 10,
    "add": lambda n: n + 3,
    "remainder": lambda n: n % 2,
    "narrow": lambda n: (n * 100).astype(jnp.int8),
    "zero": lambda n: n == 0,
    "wide and back": lambda n: n.astype(jnp.float32).astype(jnp.int32) * 2,
    "both": lambda n: (n, n * 2, n.astype(jnp.float32)),
    "real": lambda n: n.astype(jnp.float32) * 0.1,
    "largest": lambda n: jnp.maximum(n, 2),
    "sum": lambda n: jnp.sum(n, 1) * 2,
}


def test_arithmetic_after_whole_numbers():
    def fn(x):
        n = jnp.argmax(point(x), -1)
        return {name: f(n) for name, f in WHOLE.items()}

    program = qjax.lower(fn, Y)
    found, wanted = program(Y), jax.jit(fn)(Y)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, ours in jax.tree_util.tree_leaves_with_path(found):
        theirs = wanted[path[0].key]
        theirs = theirs[path[1].idx] if len(path) > 1 else theirs
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
        assert ours.dtype == theirs.dtype, path


SMALL = {
    "argmax": lambda q: jnp.minimum(jnp.argmax(q, -1), 1),
    "count": lambda q: jnp.minimum(
        jnp.sum((q > q[..., ::-1]).astype(jnp.int32), -1), 2
    ),
}
REAL = {
    "codes": lambda n, q: point(n, 1.0),
    "sum": lambda n, q: point(n + q[..., 0], 0.5),
    "product": lambda n, q: point(n * q[..., 0], 0.5),
    "dot": lambda n, q: point(n @ point(np.eye(5, dtype=np.float32)), 0.5),
    "mean": lambda n, q: point(n / 2, 0.5),
    "function": lambda n, q: point(jnp.tanh(n)),
    "comparison": lambda n, q: (n > q[..., 0]).astype(jnp.int32),
    "largest": lambda n, q: jnp.argmax(n, -1),
}


@pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)
def test_a_bound_of_whole_numbers_holds_once_they_are_real(small):
    def fn(x):
        n = small(point(x)).astype(jnp.float32)
        return {name: f(n, point(x)) for name, f in REAL.items()}

    found, wanted = qjax.lower(fn, Y)(Y), jax.jit(fn)(Y)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_bound_of_the_number_of_a_case_holds():
    def fn(x):
        q = point(x)
        n = jnp.minimum(jnp.argmax(q, -1), 1).astype(jnp.int32)
        return point(jax.lax.select_n(n, *jnp.moveaxis(q, -1, 0)))

    np.testing.assert_array_equal(qjax.lower(fn, Y)(Y), jax.jit(fn)(Y))


def test_whole_numbers_beyond_int32_are_refused():
    fn = lambda x: jnp.argmax(point(x), -1).astype(jnp.uint32) + np.uint32(2**31)
    with pytest.raises(ValueError, match="Use a narrower type"):
        qjax.lower(fn, Y)


def test_what_the_compiler_decides_is_not_called_proven():
    """A step at every code: a quotient may be a product with a reciprocal."""
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
    fn = lambda x: point(
        jnp.floor(point(x, 1 / 127) / (1 / 127)), 2.0**-6, 16, site="b"
    )
    claim = qjax.lower(fn, x).report().agreement["b"]
    assert claim.is_proven or (claim.most is None and "fuses" in claim.reason)
    assert not claim.is_proven or qjax.verify(qjax.lower(fn, x), fn, x).is_exact


def test_whole_numbers_of_two_values():
    fn = lambda x: jnp.argmax(point(x), -1) + jnp.argmin(point(x), -1)
    np.testing.assert_array_equal(qjax.lower(fn, Y)(Y), fn(Y))


SCALES = [(0.1, 0.3), (1.0, 0.1), (2.0**-100, 0.3), (2.0**60, 2.0**-60), (1 / 3, 1 / 7)]


KINDS = {
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("is_turned", [False, True])
def test_comparisons_are_those_of_float32_products(scales, is_turned):
    """All pairs of codes: NumPy multiplies in float32 and compares."""
    scales = scales[::-1] if is_turned else scales
    codes = np.arange(-128, 128)
    a, b = (np.float32(codes) * np.float32(scale) for scale in scales)
    left, right = (np.float32(v) for v in np.meshgrid(a, b))

    def fn(x, y):
        x, y = (
            point(v, scale, site=site)
            for v, scale, site in zip((x, y), scales, "xy", strict=True)
        )
        return [getattr(lax, kind)(x, y) for kind in KINDS]

    program = qjax.lower(fn, left, right)
    for found, compare in zip(program(left, right), KINDS.values(), strict=True):
        np.testing.assert_array_equal(found, compare(left, right))


def test_comparisons_after_another_factor_are_refused():
    fn = lambda x, y: point(x, 0.1, site="x") * 0.3 > point(y, site="y")
    with pytest.raises(ValueError, match="Quantize its operands right before it"):
        qjax.lower(fn, Y, Y)

    def other(x, y):
        x = point(point(x, 0.1, site="x") * 0.3, 0.03, site="z")
        return x > point(y, site="y")

    np.testing.assert_array_equal(qjax.lower(other, Y, Y)(Y, Y), other(Y, Y))


def test_codes_of_32_bits_far_from_their_zero_point():
    def fn(x):
        x = point(x, 2.0**-29, 32, zero=-(2**31), site="a")
        return point(x, 2.0**-4, site="b")

    program = qjax.lower(fn, np.ones((1, 3), np.float32))
    codes = np.int32([[2**31 - 1, 0, -(2**31)]])
    np.testing.assert_array_equal(program.codes(codes), [[127, 64, 0]])
    exact = (codes.astype(np.int64) + 2**31) * 2.0**-29 * 2.0**4
    wanted = np.clip(np.rint(exact), -128, 127)
    np.testing.assert_array_equal(program.codes(codes), wanted)

    def sum_of(x, y):
        x = point(x, 2.0**-29, 32, zero=-(2**31), site="a")
        return point(x + point(y, site="y"), 2.0**-4, site="b")

    with pytest.raises(ValueError, match="Use words of at most 30 bits"):
        qjax.lower(sum_of, np.ones((1, 3), np.float32), np.ones((1, 3), np.float32))


CHAINS = {
    "relu, move, function": lambda x: jnp.tanh(jax.nn.relu(x)[:, ::-1]),
    "relu, pool, function": lambda x: jax.nn.silu(jax.nn.relu(x).max(1, keepdims=True)),
    "clip, move, function": lambda x: jnp.tanh(jnp.clip(x, -1.0, 1.0).swapaxes(1, 2)),
    "relu, move, relu": lambda x: jax.nn.relu(jax.nn.relu(x)[:, ::2] - 0.5),
    "unit, move, floor": lambda x: jnp.floor((x * 3.0)[:, ::-1]),
    "unit, relu, floor": lambda x: jnp.floor(jax.nn.relu(x * 0.7)),
    "unit, split, floor": lambda x: jnp.floor(jnp.split(x * 0.7, 5, 1)[2]),
    "unit, gather, floor": lambda x: jnp.floor((x * 0.7)[:, jnp.array([1, 0])]),
    "unit, max, floor": lambda x: jnp.floor((x * 0.7).max(1)),
    "unit, join, floor": lambda x: jnp.floor(jnp.concatenate([x, x], 1) * 0.7),
    "barrier": lambda x: jnp.floor(lax.optimization_barrier(x * 0.7)),
    "stopped": lambda x: jnp.floor(lax.stop_gradient(jax.nn.relu(x))[:, ::-1] * 0.7),
}


@pytest.mark.parametrize("scale", [1.0, 1 / 127])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_bounds_moves_and_functions(name, scale):
    """Functions that jump: a merged constant would show by many codes."""
    fn = lambda x: point(CHAINS[name](point(x, scale, site="a")), 2.0**-6, 16, site="b")
    x = (np.arange(-128, 127) * scale).astype(np.float32).reshape(1, 5, 51)
    checked(fn, x)


def test_a_constant_is_not_merged_before_a_discontinuity():
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
    fn = lambda x: point(jnp.floor(point(x, 1 / 127) * 127.0), 2.0**-6, 16, site="b")
    codes = np.clip(np.rint(x * np.float32(127)), -128, 127).astype(np.float32)
    real = codes * np.float32(1 / 127) * np.float32(127)  # Rounded twice.
    wanted = np.floor(real)
    assert np.any(wanted != codes)
    np.testing.assert_array_equal(qjax.lower(fn, x)(x), wanted)


NUMBERS = {
    "mean": lambda x: point(x).mean(1) + 1.5,
    "sum": lambda x: point(x).sum(1) * 2 - 1.5,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_added_to_a_sum(name):
    fn = lambda x: point(NUMBERS[name](x), 0.5, 16, site="y")
    checked(fn, Y[..., 0], exact=name == "sum")


@pytest.mark.parametrize("by", [lambda n: 0.3, lambda n: jnp.arange(float(n))[None]])
def test_a_constant_that_is_added_to_a_sum(by):
    fn = lambda x: point(point(x).sum(1) + by(3), 0.5, site="y")
    checked(fn, Y)
