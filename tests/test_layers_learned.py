"""Layers whose words learn, their estimators, and their words by a scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax import quantizers as qz
from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.quantizers.learning import statistics
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")

LSQ = LayerQuantizers("lsq(8)", "lsq(4,axis='output')", output="lsq(8)")


def start(text, x, axis=None):
    """Where the learned arrays of a quantizer start."""
    spec = qz.parse(text)
    shape = (
        ()
        if axis is None
        else tuple(n if k == axis % x.ndim else 1 for k, n in enumerate(x.shape))
    )
    return spec.learning.start(spec, statistics(jnp.asarray(x), shape))["scale"]


@pytest.mark.parametrize(
    "make, kernel",
    [
        (lambda q: ql.QDense(5, quantizers=q), "kernel"),
        (lambda q: ql.QConv(5, (3,), quantizers=q), "kernel"),
    ],
    ids=["dense", "conv"],
)
def test_learned_arrays_are_parameters_that_start_from_values(make, kernel):
    x, layer = images(4, 6, 3), make(LSQ)
    variables = layer.init(jax.random.key(0), x)
    params = variables["params"]
    names = ["bias", "input_scale", "kernel", "kernel_scale", "output_scale"]
    assert sorted(params) == names and set(variables) == {"params"}
    np.testing.assert_allclose(params["input_scale"], start("lsq(8)", x), rtol=1e-6)
    wanted = start("lsq(4)", params["kernel"], -1)
    np.testing.assert_allclose(params["kernel_scale"], wanted, rtol=1e-6)
    # A checkpoint has other weights: where parameters are mutable they start anew.
    other = {**params, "kernel": 3 * params["kernel"]}
    _, moved = layer.apply({"params": other}, 2 * x, mutable=["params"])
    found = moved["params"]
    np.testing.assert_allclose(found["kernel_scale"], 3 * wanted, rtol=1e-6)
    np.testing.assert_allclose(found["input_scale"], 2 * params["input_scale"], 1e-6)
    np.testing.assert_array_equal(found["kernel"], other["kernel"])


@pytest.mark.kept
def test_a_layer_with_learned_scales_computes_its_formula_and_lowers():
    x, layer = images(8, 6), ql.QDense(5, quantizers=LSQ)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = variables["params"]
    on = lambda text, x, scale: qz.apply(qz.parse(text), x, scale)
    h = on("lsq(8)", x, params["input_scale"])
    w = on("lsq(4,axis=-1)", params["kernel"], params["kernel_scale"])
    wanted = on("lsq(8)", h @ w, params["output_scale"])
    run = jax.jit(lambda x: layer.apply(variables, x))
    np.testing.assert_allclose(run(x), wanted, rtol=1e-5, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) ** 2)))
    found = grads(params)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in jax.tree.leaves(found))
    report = qjax.verify(qjax.lower(run, x), run, x)
    assert all(row.max_difference <= 1 for row in report.sites.values())
    codes = ql.integers(run, x)["kernel"].codes
    assert codes.min() >= -8 and codes.max() <= 7


def test_learned_scales_train():
    x = images(64, 6)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = LayerQuantizers("lsq(4)", "lsq(2)")
            x = nn.relu(ql.QDense(16, quantizers=own)(x))
            return ql.QDense(2, quantizers=LayerQuantizers("pact(4)", "lsq(4)"))(x)

    net, tx = Net(), optax.adam(1e-2)
    params = net.init(jax.random.key(0), x)["params"]

    def loss(p):
        logits = net.apply({"params": p}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(p, updates), state), value

    train = jax.jit(lambda c: jax.lax.scan(step, c, None, length=150))
    (trained, _), losses = train((params, tx.init(params)))
    assert losses[-1] < 0.7 * losses[0]
    found = trained["QDense_0"]["kernel_scale"]
    assert not np.array_equal(found, params["QDense_0"]["kernel_scale"])


def test_learned_arrays_of_nnx_start_with_the_first_batch():
    x = images(8, 6)
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    kernel = np.asarray(model.layers[0].kernel[...])
    qn.to_quantized(model, LayerQuantizers("lsq(8)", "lsq(4,axis='output')"))
    layer = model.layers[0]
    run = nnx.jit(lambda m, x: m(x))
    found = run(model, x)
    np.testing.assert_allclose(layer.input_scale[...], start("lsq(8)", x), rtol=1e-6)
    wanted = start("lsq(4)", kernel, -1)
    np.testing.assert_allclose(layer.kernel_scale[...], wanted, rtol=1e-6)
    run(model, 9 * x)  # The first batch has started it.
    np.testing.assert_allclose(layer.input_scale[...], start("lsq(8)", x), rtol=1e-6)
    twin = ql.QDense(4, quantizers=layer.quantizers)
    names = ("kernel", "bias", "input_scale", "kernel_scale")
    params = {name: getattr(layer, name)[...] for name in names}
    np.testing.assert_allclose(twin.apply({"params": params}, x), found, 1e-6, 1e-6)
    model.eval()
    report = qjax.verify(qjax.lower(model, x), model, x)
    assert all(row.max_difference <= 1 for row in report.sites.values())
    qn.to_float(model)
    assert type(layer) is nnx.Linear and not hasattr(layer, "input_scale")
    assert len(jax.tree.leaves(nnx.state(model))) == 2


@pytest.mark.parametrize("room", ["linen", "nnx"])
def test_an_estimator_is_the_backward_pass_of_all_words(room):
    x = images(8, 6)
    zero = qjax.estimators.make_estimator(lambda *_: None, lambda _, dy: 0 * dy)
    own = LayerQuantizers("quantized_bits(8,2,1)", QSpec(8), None, estimator=zero)
    if room == "linen":
        layer = ql.QDense(4, quantizers=own)
        variables = layer.init(jax.random.key(0), x)
        run = lambda x: layer.apply(variables, x)
        kernel = jax.grad(lambda p: layer.apply({"params": p}, x).sum())
        assert not np.any(kernel(variables["params"])["kernel"])
    else:
        run = qn.QLinear(6, 4, quantizers=own, rngs=nnx.Rngs(0))
    assert not np.any(jax.grad(lambda x: run(x).sum())(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_a_scheme_gives_the_words_of_layers():
    scheme = qjax.Scheme(
        weights=QSpec(4, narrow_range=True, axis="output"),
        activations=QSpec(8),
        rules=(
            qjax.Rule("head/kernel", QSpec(8, narrow_range=True)),
            qjax.Rule("conv/output", "quantized_relu(4,2)"),
            qjax.Rule(qjax.Where(op="conv", role="activation"), QSpec(6)),
        ),
        calibrator=qjax.min_max(),
    )
    model = qn.to_quantized(Block(nnx.Rngs(0)), scheme)
    conv, norm, head = (m.quantizers for m in (model.conv, model.norm, model.head))
    assert conv.kernel == scheme.weights and conv.input == QSpec(6)
    assert conv.output == qz.parse("quantized_relu(4,2)")
    assert head.kernel == QSpec(8, narrow_range=True) and head.output is None
    assert norm.input == norm.output == QSpec(8) and head.bias == "accumulator"
    x = images(4, 5, 5, 2)
    model(x)
    assert type(model.conv.input_range.get_value()) is type(
        qjax.min_max().init(jnp.zeros(1), QSpec(8))
    )
    only_head = qjax.Scheme(None, None, rules=(qjax.Rule("head/*", QSpec(8)),))
    model = qn.to_quantized(Block(nnx.Rngs(0)), only_head)
    assert type(model.conv) is nnx.Conv and type(model.head) is qn.QLinear


def test_an_orbax_checkpoint_of_a_float_model_loads(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    x, twin = images(4, 6), nn.Dense(3)
    params = twin.init(jax.random.key(0), x)["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "float", params)
        checkpointer.wait_until_finished()
        layer = ql.QDense(3)
        variables = layer.init(jax.random.key(1), x)
        loaded = checkpointer.restore(tmp_path / "float", variables["params"])
    _, state = layer.apply({**variables, "params": loaded}, x, mutable=["quant"])
    found = layer.apply({"params": loaded, **state}, x)
    np.testing.assert_allclose(found, twin.apply({"params": params}, x), atol=0.05)
