"""`apply_integer`: the integer program's values, the simulated model's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax.model.visitors import Quantizer
from qjax.quantizers import parse
from qjax.quantizers.point import straight
from tests.models import images, linen_example

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]

POWERS = qjax.Scheme(
    qjax.QSpec(4, narrow_range=True, axis=-1, power_of_two=True),
    qjax.QSpec(8, power_of_two=True),
)
FLOATS = qjax.Scheme(qjax.QSpec(4, narrow_range=True, axis=-1), qjax.QSpec(8))


class Small(nn.Module):
    """BatchNorm, a residual sum, a function, both pools."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=not self.train)
        x = nn.relu(norm(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(nn.silu(nn.Conv(5, (2, 2))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(x, (3, 3), (1, 1), "SAME").reshape((len(x), -1))
        return nn.Dense(3)(x)


class Block(nn.Module):
    """A convolution with BatchNorm, and a product."""

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True)
        x = nn.relu(norm(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


class Moves(nn.Module):
    """Rows of a table, branches on different grids, a choice, a product of two."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6)(ids)
        y = nn.Dense(6)(x)
        both = jnp.concatenate([jnp.maximum(x, y), jnp.where(y > 0.5, y, -1.0)], -1)
        z = jnp.pad(both.transpose((0, 2, 1)), ((0, 0), (1, 0), (0, 1)))
        scores = jnp.einsum("bij,bkj->bik", z, z)
        return jnp.clip(scores.sum(1), -2.0, 2.5) - nn.Dense(13)(z).min((1,))


def quantized(model, x, scheme):
    fn, params, _ = linen_example(model, x)
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    return qmodel, params, qjax.calibrate(qmodel, params, [x])


def assert_ships(qmodel, params, qstate, x):
    """Equal to the lowered program, bit for bit."""
    ours = jax.jit(qmodel.apply_integer)(params, qstate, x)
    shipped = qjax.lower(qmodel, params, qstate, x)(x)
    np.testing.assert_array_equal(ours, shipped)


@pytest.mark.slow
@pytest.mark.kept
@pytest.mark.parametrize(
    "scheme",
    [pytest.param(POWERS, marks=pytest.mark.heavy), FLOATS],
    ids=["powers", "floats"],
)
def test_values_are_those_of_the_program(scheme):
    x = images(2, 8, 8, 3)
    assert_ships(*quantized(Small(), x, scheme), x)


@pytest.mark.parametrize(
    "scheme",
    [POWERS, pytest.param(FLOATS, marks=pytest.mark.heavy)],
    ids=["powers", "floats"],
)
def test_moves_joins_and_products(scheme):
    ids = jnp.arange(10).reshape(2, 5)
    assert_ships(*quantized(Moves(), ids, scheme), ids)


CONSTANTS = {  # Beside what a product makes.
    "token": lambda p, y: jnp.concatenate([jnp.broadcast_to(p["c"], (4, 6)), y]),
    "pad": lambda p, y: jnp.pad(y, ((0, 1), (0, 0)), constant_values=1.3),
    "choice": lambda p, y: jnp.where(y > 0.1, y, 0.5),
    "mask": lambda p, y: jnp.tril(y),
    "running sum": lambda p, y: jnp.cumsum(y, 1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_and_running_sums(name):
    fn = lambda p, x: CONSTANTS[name](p, x @ p["w"]) @ p["v"]
    shapes = {"w": (5, 6), "v": (6, 3), "c": (1, 6)}
    params = {k: images(*shape, seed=n) for n, (k, shape) in enumerate(shapes.items())}
    x = images(8, 5, seed=4)
    qmodel = qjax.quantize_model(fn, params, x, scheme=FLOATS)
    assert_ships(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)


def test_an_output_without_a_site_is_its_accumulator():
    x = images(2, 8, 8, 3)
    rules = (qjax.Rule("output:0", None),)
    scheme = qjax.Scheme(FLOATS.weights, FLOATS.activations, rules)
    assert_ships(*quantized(Block(), x, scheme), x)


@pytest.mark.parametrize("size", [1.0, 0.75], ids=["bias", "factor"])
def test_accumulators_beyond_24_bits(size):
    """Where float32 drops bits, integers do not, unless a factor rounds as it does."""
    word = dict(narrow_range=True, power_of_two=True)
    scheme = qjax.Scheme(qjax.QSpec(8, **word), qjax.QSpec(16, **word))
    params = {"kernel": images(40, 3, seed=2), "bias": images(1, 3, seed=3)}
    params["kernel"] = np.abs(params["kernel"])
    fn = lambda p, x: (x @ p["kernel"] + p["bias"]) * size
    x = np.abs(images(20000, 40)) + 1
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    assert max(v.high for v in program.graph.values) > 1 << 24
    assert_ships(qmodel, params, qstate, x)


def test_words_by_name():
    x = images(2, 8, 8, 3)
    rules = (qjax.Rule("Conv_0/output", parse("quantized_relu(4,1)")),)
    words = parse("ternary(alpha=1)"), qjax.QSpec(8, signed=False)
    assert_ships(*quantized(Block(), x, qjax.Scheme(*words, rules)), x)


@pytest.mark.kept
def test_derivatives_are_those_of_the_simulated_model():
    x = images(2, 8, 8, 3)
    qmodel, params, qstate = quantized(Small(), x, POWERS)
    weights = images(2, 3, seed=5)

    def slope(apply):
        return jax.jit(jax.grad(lambda p: (apply(p, qstate, x) * weights).sum()))

    ours, wanted = (slope(f)(params) for f in (qmodel.apply_integer, qmodel.apply))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(ours))
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_training_on_float_scales_trains_what_ships():
    x = images(2, 8, 8, 3)
    qmodel, params, qstate = quantized(Block(), x, FLOATS)
    target = jnp.eye(3)[:2]

    @jax.jit
    def step(params):
        loss = lambda p: jnp.mean(
            (jax.jit(qmodel.apply_integer)(p, qstate, x) - target) ** 2
        )
        value, slope = jax.jit(jax.value_and_grad(loss))(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, slope)

    losses = []
    for _ in range(10):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert_ships(qmodel, params, qstate, x)


def test_bits_may_be_traced():
    x = images(2, 8, 8, 3)
    qmodel, params, qstate = quantized(Block(), x, FLOATS)
    words = [qjax.QSpec(b, narrow_range=True, axis=-1) for b in (3, 8)]
    stacked = qjax.stack_schemes([qjax.Scheme(w, FLOATS.activations) for w in words])
    run = lambda s: jax.jit(qmodel.apply_integer)(params, qstate, x, scheme=s)
    for ours, word in zip(jax.jit(jax.vmap(run))(stacked), words, strict=True):
        alone, *args = quantized(Block(), x, qjax.Scheme(word, FLOATS.activations))
        np.testing.assert_array_equal(ours, qjax.lower(alone, *args, x)(x))


def test_refuses_batch_statistics():
    x = images(2, 8, 8, 3)
    fn, params, _ = linen_example(Small(), x)
    training = lambda p, x: Small(train=True).apply(p, x, mutable=["batch_stats"])[0]
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    same = qjax.quantize_model(training, params, x)
    with pytest.raises(ValueError, match="'Conv_0/output' is normalised by statistics"):
        jax.eval_shape(same.apply_integer, params, qstate, x)


@pytest.mark.parametrize("site", ["Conv_0/output", "Conv_1/kernel"])
def test_refuses_what_stays_float(site):
    x = images(2, 8, 8, 3)
    rules = (qjax.Rule(site, None),)
    scheme = qjax.Scheme(FLOATS.weights, FLOATS.activations, rules)
    qmodel, params, qstate = quantized(Small(), x, scheme)
    with pytest.raises(ValueError, match="has no integer arithmetic"):
        jax.eval_shape(qmodel.apply_integer, params, qstate, x)


def forced(qmodel, params, qstate, x):
    """`apply` whose codes at each site are those of the program: the definition."""
    shipped = qjax.lower(qmodel, params, qstate, x).site_codes(x)

    class Forced(Quantizer):
        def activation(self, site, value, unit):
            found, grid, *_ = super().activation(site, value, unit)
            if grid is None or site.name not in shipped:
                return found, grid
            codes = shipped[site.name].astype(jnp.int32)
            given = qjax.dequantize(codes, grid).astype(found.dtype)
            return straight(found, given), grid

    def run(params):
        return qmodel.simulation(params, (x,)).run(Forced(qmodel.choices, qstate))

    return run


@pytest.mark.heavy
@pytest.mark.parametrize("bits", [3, pytest.param(8, marks=pytest.mark.heavy)])
def test_derivatives_on_float_scales_are_those_at_the_codes_of_the_program(bits):
    """Accumulators that are exactly 0 before a relu are many at 3 bits."""
    x = images(4, 8, 8, 3)
    scheme = qjax.Scheme(qjax.QSpec(bits, narrow_range=True, axis=-1), qjax.QSpec(bits))
    qmodel, params, qstate = quantized(Small(), x, scheme)
    weights = images(4, 3, seed=5)
    run = forced(qmodel, params, qstate, x)
    wanted = jax.jit(jax.grad(lambda p: (run(p) * weights).sum()))(params)
    apply = qmodel.apply_integer
    ours = jax.jit(jax.grad(lambda p: (apply(p, qstate, x) * weights).sum()))(params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        ours,
        wanted,
    )


def test_an_accumulator_that_is_0_has_the_derivative_of_the_simulated_model():
    """0.1 * 3 - 0.3 * 1 is 0 in integers, and 3e-8 in float32."""
    params = {"w": np.float32([[1.0], [-1.0]])}
    fn = lambda p, x: jax.nn.relu(x @ p["w"])
    x = np.float32([[0.3, 0.3], [1.27, 0.1], [0.5, 0.5]])
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    run = forced(qmodel, params, qstate, x)
    wanted = jax.jit(jax.grad(lambda p: run(p).sum()))(params)
    loss = lambda p: jax.jit(qmodel.apply_integer)(p, qstate, x).sum()
    ours = jax.jit(jax.grad(loss))(params)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_words_of_32_bits_with_a_zero_point_are_refused():
    params = {"w": np.eye(3, dtype=np.float32)}
    x = np.ones((2, 3), np.float32)
    rules = (qjax.Rule("output:0", qjax.QSpec(32)),)
    scheme = qjax.Scheme(rules=rules)
    qmodel = qjax.quantize_model(lambda p, x: x @ p["w"], params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    with pytest.raises(ValueError, match="Use `symmetric=True` or 31 bits"):
        jax.eval_shape(qmodel.apply_integer, params, qstate, x)
