"""Tables, choices, products of two activations, moves: against NumPy on the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.graph import reference
from tests.models import images, linen_example

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


def point(x, scale=1 / 16, bits=8, *, zero=0, signed=True, site=""):
    params = QParams(jnp.float32(scale), jnp.int32(zero))
    return fake_quant(x, params, QSpec(bits, signed), site=site)


def checked(fn, *inputs, exact=True):
    """Lowers; XLA = NumPy; equal to the float model, or off by one where asked."""
    program = qjax.lower(fn, *inputs)
    codes = jax.tree.leaves(program.quantize_inputs(*inputs))
    flat = [np.asarray(c) for c in codes]
    values = reference.run(program.graph, program.params, flat)
    ours = jax.tree.leaves(program.codes(*program.quantize_inputs(*inputs)))
    names = {v: name for name, v in program.graph.sites.items()}
    for v, q in zip(program.graph.outputs, ours, strict=True):
        np.testing.assert_array_equal(values[v], q, err_msg=names.get(v, ""))
    report = qjax.verify(program, fn, *inputs)
    rows = (*report.sites.values(), *report.outputs)
    if exact:
        assert report.is_exact, str(report)
    assert all(row.max_difference <= 1 for row in rows), str(report)
    again = qjax.lowering.Graph.from_json(program.graph.to_json())
    assert again == program.graph
    return program


X = np.linspace(-9, 9, 2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
Y = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32) * 3

FUNCTIONS = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "erf gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "swish by hand": lambda x: x * jax.nn.sigmoid(1.7 * x),
    "hard swish": jax.nn.hard_swish,
    "exp": lambda x: jnp.exp(-jnp.abs(x)),
    "log": lambda x: jnp.log(x * x + 1.0),
    "softplus": jax.nn.softplus,
    "leaky relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "elu": jax.nn.elu,
    "where": lambda x: jnp.where(x > 1.0, x, -0.5),
    "sign": jnp.sign,
    "abs": jnp.abs,
    "neg": lambda x: -x,
    "square": lambda x: x * x,
    "cube": lambda x: x**3,
    "rsqrt": lambda x: lax.rsqrt(jnp.abs(x) + 1.0),
    "relu in another unit": lambda x: jnp.tanh(jax.nn.relu(x) * 2.0),
    "floor": jnp.floor,
    "round": jnp.round,
    "clip off the grid": lambda x: jnp.clip(x, -1.03, 2.01),
    "add": lambda x: x + 0.3,
    "sub from": lambda x: 1.7 - x,
    "divide by": lambda x: 1.0 / (1.0 + x * x),
    "minus": lambda x: x * -0.7,
    "step": lambda x: (x >= 0.5).astype(jnp.float32),
    "constant": lambda x: x * 0.0 + 1.5,
    "channels": lambda x: jnp.tanh(x * jnp.array([[[0.5, 1.0, -2.0]]]) + 0.1),
}


def _before(graph, value):
    """The nodes that lead to a value."""
    values = {value}
    for node in reversed(graph.nodes):
        if node.output in values:
            values.update(node.inputs)
            yield node


def test_functions_are_tables():
    """All in one program: it is traced, lowered and compiled once."""

    def fn(x):
        x = point(x, 1 / 8, site="x")
        return {k: point(f(x), 1 / 64, site=k) for k, f in FUNCTIONS.items()}

    program = checked(fn, X)
    every = np.broadcast_to(np.arange(-128, 128)[:, None, None], (256, 1, 3))
    rows = np.float32(every / 8)
    all_wanted = jax.jit(lambda x: {k: f(x) for k, f in FUNCTIONS.items()})(rows)
    for name in FUNCTIONS:
        chain = _before(program.graph, program.graph.sites[name])
        (node,) = [n for n in chain if n.operation == "table"]
        wanted = np.clip(np.rint(np.float64(all_wanted[name]) * 64), -128, 127)
        table = np.asarray(program.params[node.params["table"]], np.int64)
        table = table if table.ndim == 2 else table[:, None]
        first = 128 + node.attributes["low"]
        off = np.abs(table - wanted[first : first + len(table), 0])
        assert np.max(off) <= 1 and np.mean(off == 0) > 0.99, name


def test_sixteen_bits_are_tabulated_and_more_are_refused():
    fn = lambda x: point(jnp.tanh(point(x, 2.0**-12, 16)), 2.0**-15, 16)
    program = checked(fn, X, exact=False)
    assert program.nbytes == 2**17
    fn = lambda x: point(jnp.tanh(point(x, 2.0**-12, 17)))
    with pytest.raises(ValueError, match="`tanh`.* is not quantized"):
        qjax.lower(fn, X)


def test_an_accumulator_is_no_input_of_a_table():
    fn = lambda x: point(jnp.tanh(point(x) @ point(jnp.eye(3))))
    with pytest.raises(ValueError, match=r"`tanh` in `.*` \(test_low.*not quant"):
        qjax.lower(fn, X)


TWO = {
    "product": lambda a, b: a * b,
    "square of a sum": lambda a, b: a + b,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "concatenate": lambda a, b: jnp.concatenate([a, b, a], axis=-1),
    "concatenate functions": lambda a, b: jnp.concatenate([jnp.tanh(a), b], axis=1),
    "larger": lambda a, b: jnp.where(a > b, a, b),
    "smaller or one": lambda a, b: jnp.where(a <= b, b, 1.0),
    "by a threshold": lambda a, b: jnp.where(a > 0.5, b, 0.25),
    "equal": lambda a, b: jnp.where(a == b, 1.0, a),
    "relu of the maximum": lambda a, b: jax.nn.relu(jnp.maximum(a, b)),
    "dot": lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
    "attention's second": lambda a, b: jnp.einsum("bij,bik->bjk", a, b) * 0.25,
    "gate": lambda a, b: a * b[:, :1, :],
    "gate by a function": lambda a, b: a * point(jax.nn.sigmoid(b), 1 / 64),
}


@pytest.mark.parametrize("zero", [0, 7])
def test_two_values(zero):
    def fn(a, b):
        a, b = point(a, 1 / 8, zero=zero, site="a"), point(b, 1 / 16, site="b")
        return {k: point(f(a, b), 1 / 4, zero=-zero, site=k) for k, f in TWO.items()}

    checked(fn, X, Y)


@pytest.mark.parametrize("name", ["maximum", "larger", "concatenate", "product"])
def test_two_values_with_other_scales(name):
    f = TWO[name]
    fn = lambda a, b: point(f(point(a, 0.071, site="a"), point(b, 0.033)), 0.05)
    checked(fn, X, Y, exact=False)


def test_values_on_one_grid_are_joined_as_they_are():
    fn = lambda a, b: jnp.concatenate([point(a, site="a"), point(b, site="b")], 1)
    program = checked(fn, X, Y)
    assert [n.operation for n in program.graph.nodes] == ["concatenate"]
    fn = lambda a, b: jnp.maximum(point(a, site="a"), point(b, site="b"))
    assert [n.operation for n in checked(fn, X, Y).graph.nodes] == ["maximum"]


MOVES = {
    "nearest": lambda x: jax.image.resize(x, (len(x), 10, 3), "nearest"),
    "odd nearest": lambda x: jax.image.resize(x, (len(x), 7, 5), "nearest"),
    "gather": lambda x: x[:, jnp.array([4, 0, -1]), :],
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "roll": lambda x: jnp.roll(x, 1, axis=2),
    "split": lambda x: jnp.split(x[..., :2], 2, axis=-1)[1],
    "dynamic slice": lambda x: lax.dynamic_slice(x, (0, 1, 1), (len(x), 3, 2)),
    "min": lambda x: jnp.min(x, axis=1),
    "min pool": lambda x: lax.reduce_window(
        x, jnp.inf, lax.min, (1, 2, 1), (1, 2, 1), "SAME"
    ),
    "flip": lambda x: x[:, ::-1],
    "tanh that moves": lambda x: jnp.tanh(x).transpose((0, 2, 1)),
    "cond on a known index": lambda x: lax.cond(True, jnp.tanh, lambda x: x, x),
    "switch": lambda x: lax.switch(1, [jnp.tanh, lambda x: x[:, :, ::-1] * 0.5], x),
    "remat": jax.checkpoint(jnp.tanh),
}


def test_moves():
    def fn(x):
        x = point(x, site="x")
        return {name: point(f(x), site=name) for name, f in MOVES.items()}

    program = checked(fn, X)
    other = np.concatenate([X, X[::-1], X])  # Another batch.
    found, wanted = (program.codes(program.quantize_inputs(x)[0]) for x in (other, X))
    for name in MOVES:
        first = np.asarray(found[name])[:2]
        np.testing.assert_array_equal(first, wanted[name], err_msg=name)


def test_an_argmax_gives_numbers():
    def fn(x):
        x = point(x, 1.0)
        return jnp.argmax(x, axis=-1), jnp.argmin(x, axis=1)

    program = qjax.lower(fn, X)
    wanted = np.clip(np.rint(X), -128, 127)
    largest, smallest = program(X)
    assert largest.dtype == jnp.int32
    np.testing.assert_array_equal(largest, wanted.argmax(-1))  # Ties: the first.
    np.testing.assert_array_equal(smallest, wanted.argmin(1))


class Embeds(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="embed")(ids)
        return nn.Dense(3, name="head")(jax.nn.gelu(nn.Dense(6, name="fc")(x)))


@pytest.mark.parametrize("axis", [None, -1])
def test_an_embedding(axis):
    ids = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)
    model = Embeds()
    params = model.init(jax.random.key(0), ids)
    table = QSpec(8, narrow_range=True, axis=axis)
    scheme = qjax.Scheme(rules=(qjax.Rule("embed/embedding", table),))
    qmodel = qjax.quantize_model(model.apply, params, ids, scheme=scheme)
    assert [s.name for s in qmodel.sites][:2] == ["embed/embedding", "embed/output"]
    assert qmodel.sites[0].op == "embedding"
    qstate = qjax.calibrate(qmodel, params, [ids])
    program = qjax.lower(qmodel, params, qstate, ids)
    report = qjax.verify(program, qmodel, params, qstate, ids)
    assert all(row.max_difference <= 1 for row in report.sites.values())
    assert report.outputs[0].share > 0.99
    with pytest.raises(ValueError, match=r"must lie in \[-11, 10\], got \[0, 11\]"):
        program.codes(np.full((1, 5), 11) * np.arange(5)[None] // 4)


class SqueezeExcite(nn.Module):
    """A gate by a mean, a transposed convolution, concatenation, every function."""

    @nn.compact
    def __call__(self, x):
        y = nn.silu(nn.Conv(4, (3, 3), name="conv")(x))
        gate = nn.silu(nn.Dense(2, name="reduce")(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Dense(4, name="expand")(gate))
        z = nn.hard_swish(nn.ConvTranspose(3, (2, 3), strides=(2, 1), name="up")(y))
        y = jnp.concatenate([z, jax.image.resize(y, z.shape[:3] + (4,), "nearest")], -1)
        y = nn.avg_pool(y, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
        return nn.Dense(3, name="head")(nn.gelu(y).reshape((len(x), -1)))


@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_gated_model_lowers(power_of_two):
    fn, params, x = linen_example(SqueezeExcite(), images(5, 5, 6, 2))
    scheme = qjax.Scheme(
        weights=QSpec(8, narrow_range=True, axis=-1, power_of_two=power_of_two),
        activations=QSpec(8, power_of_two=power_of_two),
    )
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(row.max_difference <= 1 for row in report.sites.values()), str(report)
    if power_of_two:
        assert report.is_exact, str(report)
    codes = program.quantize_inputs(x)
    values = reference.run(
        program.graph, program.params, [np.asarray(c) for c in codes]
    )
    np.testing.assert_array_equal(
        values[program.graph.outputs[0]], program.codes(*codes)
    )


def test_batched_products_with_weights():
    w = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)

    def fn(x):
        spec = QSpec(8, narrow_range=True, axis=(0, 2))
        grid = qjax.abs_max_params(w, spec)
        return point(jnp.einsum("bhi,hio->bho", point(x), fake_quant(w, grid, spec)))

    checked(fn, X, exact=False)


REFUSED = {
    "softmax": (lambda x: jax.nn.softmax(x), NotImplementedError, "The softmax in"),
    "sort": (lambda x: jnp.sort(x, axis=-1), NotImplementedError, "`sort`"),
    "scan": (
        lambda x: lax.scan(lambda c, y: (jnp.tanh(c), c), x[0], None, 300)[1],
        NotImplementedError,
        "`scan`",
    ),
    "while": (
        lambda x: lax.while_loop(lambda y: jnp.all(y < 9), lambda y: y + 1, x),
        NotImplementedError,
        "`while`",
    ),
    "atan2": (lambda x: jnp.arctan2(x, x[:, ::-1]), NotImplementedError, "two diff"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_says_so(name):
    f, error, message = REFUSED[name]
    with pytest.raises((error, ValueError), match=message):
        qjax.lower(lambda x: point(f(point(x))), X)


# Units, whole numbers, comparisons: what JAX computes, number by number.

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


def test_whole_numbers_of_two_values_are_refused():
    fn = lambda x: jnp.argmax(point(x), -1) + jnp.argmin(point(x), -1)
    with pytest.raises(ValueError, match="quantized"):
        qjax.lower(fn, Y)


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
