"""Tables, choices, products of two activations, moves: against NumPy on the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.affine import QSpec, fake_quant
from qjax.graph import reference
from tests.function_cases import Y, checked, point
from tests.models import images, linen_example

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


X = np.linspace(-9, 9, 2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)


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
    "digamma": lambda x: lax.digamma(jnp.abs(x) + 1.0),
    "lgamma": lambda x: lax.lgamma(jnp.abs(x) + 0.5),
    "bessel": lambda x: lax.bessel_i0e(x) + lax.bessel_i1e(x),
    "channels": lambda x: jnp.tanh(x * jnp.array([[[0.5, 1.0, -2.0]]]) + 0.1),
}


def _before(graph, value):
    """The nodes that lead to a value."""
    values = {value}
    for node in reversed(graph.nodes):
        if node.output in values:
            values.update(node.inputs)
            yield node


@pytest.mark.kept
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


def test_sixteen_bits_are_tabulated_and_more_are_thresholds():
    fn = lambda x: point(jnp.tanh(point(x, 2.0**-12, 16)), 2.0**-15, 16)
    program = checked(fn, X, exact=False)
    assert program.nbytes == 2**17
    fn = lambda x: point(jnp.tanh(point(x, 2.0**-12, 17)), 2.0**-7)
    (node,) = checked(fn, X).graph.nodes
    assert node.operation == "thresholds"


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


@pytest.mark.kept
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
    fn, params, _ = linen_example(Embeds(), ids)
    table = QSpec(8, narrow_range=True, axis=axis)
    scheme = qjax.Scheme(rules=(qjax.Rule("embed/embedding", table),))
    qmodel = qjax.quantize_model(fn, params, ids, scheme=scheme)
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


@pytest.mark.parametrize(
    "power_of_two", [True, pytest.param(False, marks=pytest.mark.heavy)]
)
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
