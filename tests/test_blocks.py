"""Where the automatic path puts sites, and that their names stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qjax.affine import QParams, QSpec, fake_quant
from qjax.instrumentation import quantize_model
from qjax.lowering import lower, verify
from qjax.observation import calibrate
from tests.models import (
    NAMES,
    LinenResidual,
    NnxPreactivation,
    NnxResidual,
    example,
    images,
    linen_example,
    randomized,
)

pytestmark = pytest.mark.usefixtures("flax_promotion")


EXPECTED = {
    "nnx_residual": [
        "input:0",
        "conv1/kernel",
        "conv1/output",
        "conv2/kernel",
        "conv2/output",
        "residual_0/output",
        "avg_pool_0/output",
        "mean_0/output",
        "head/kernel",
        "output:0",
    ],
    "nnx_mobile": [
        "input:0",
        "depthwise/kernel",
        "depthwise/output",
        "pointwise/kernel",
        "pointwise/output",
        "grouped/kernel",
        "grouped/output",
        "head/kernel",
        "output:0",
    ],
    "nnx_preactivation": [
        "input:0",
        "stem/kernel",
        "stem/output",
        "bn/scale",
        "bn/output",
        "conv/kernel",
        "conv/output",
        "residual_0/output",
        "head/kernel",
        "output:0",
    ],
    "linen_residual": [
        "input:0",
        "conv1/kernel",
        "conv1/output",
        "conv2/kernel",
        "conv2/output",
        "conv2/output:1",
        "residual_0/output",
        "avg_pool_0/output",
        "head/kernel",
        "output:0",
    ],
    "linen_mlp": [
        "input:0",
        "Dense_0/kernel",
        "Dense_0/output",
        "BatchNorm_0/scale",
        "BatchNorm_0/output",
        "Dense_1/kernel",
        "Dense_1/output",
        "Dense_2/kernel",
        "output:0",
    ],
    "plain": [
        "input:0",
        "a",
        "a/output",
        "c",
        "c/output",
        "residual_0/output",
        "affine_0/scale",
        "output:0",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_sites_by_name(name):
    fn, params, x = example(name)
    qmodel = quantize_model(fn, params, x[:2])
    assert [site.name for site in qmodel.sites] == EXPECTED[name]
    for site in qmodel.sites:
        ends = ("kernel", "scale", "a", "c")
        assert site.role == ("weight" if site.name.endswith(ends) else "activation")


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("model", [NnxResidual, NnxPreactivation])
def test_nnx_names_are_the_same_in_training(model, batch):
    network = nnx.eval_shape(lambda: model(nnx.Rngs(0)))
    x = images(batch, 9, 7, 2) if model is NnxResidual else images(batch, 11, 3)
    names = []
    for mode in (network.eval, network.train):
        mode()
        graph, state = nnx.split(network)
        state = randomized(state)

        def fn(state, x, graph=graph):
            merged = nnx.merge(graph, state)
            return merged(x), nnx.state(merged, nnx.BatchStat)

        names.append([s.name for s in quantize_model(fn, state, x).sites])
    assert names[0] == names[1]


def test_linen_names_are_the_same_in_training():
    model, x = LinenResidual(), images(3, 9, 7, 2)
    variables = linen_example(model, x).params
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    infer, trained = (quantize_model(f, variables, x) for f in (model.apply, train))
    assert [s.name for s in infer.sites] == [s.name for s in trained.sites]


def test_mutated_statistics_come_out_as_they_went_in():
    """The new averages are those of the float convolution of quantized operands."""
    model, x = LinenResidual(), images(3, 9, 7, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    qmodel = quantize_model(train, variables, x)
    qstate = jax.jit(qmodel.observe)(variables, qmodel.init(variables, x), x)
    _, new = jax.jit(qmodel.apply)(variables, qstate, x)
    _, wanted = jax.jit(train)(variables, x)
    assert jax.tree.structure(new) == jax.tree.structure(wanted)
    old = variables["batch_stats"]["bn1"]["mean"]
    assert np.all(new["batch_stats"]["bn1"]["mean"] != old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)


class _SqueezeExcite(nn.Module):
    """A mean over space that gates: data, not a statistic of the batch."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        gate = nn.relu(nn.Dense(4, name="gate")(jnp.mean(y, axis=(1, 2))))
        return y * gate[:, None, None, :]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_gate_is_not_taken_for_batch_norm(batch):
    model, x = _SqueezeExcite(), images(batch, 5, 5, 2)
    params = linen_example(model, x).params
    names = [s.name for s in quantize_model(model.apply, params, x).sites]
    assert names == [
        "input:0",
        "conv/kernel",
        "conv/output",
        "mean_0/output",
        "gate/kernel",
        "gate/output",
        "output:0",
    ]


def test_a_mean_that_keeps_its_axes_is_one_block():
    fn = lambda params, x: jnp.mean(x, axis=(1, 2), keepdims=True) @ params["w"]
    x = images(6, 3, 5, 4)
    params = {"w": jnp.ones((4, 2))}
    qmodel = quantize_model(fn, params, x)
    names = [s.name for s in qmodel.sites]
    assert names == ["input:0", "mean_0/output", "w", "output:0"]
    qstate = calibrate(qmodel, params, [x])
    program = lower(qmodel, params, qstate, x[:2])
    result = verify(program, qmodel, params, qstate, x)
    assert result.sites["mean_0/output"].max_difference == 0
    assert program(x).shape == (6, 1, 1, 2)


def test_an_unbatched_mean_is_not_taken_for_a_statistic():
    params = {"k": jnp.ones((3, 3, 2, 4)), "w": jnp.ones((4, 2))}

    def fn(params, x):
        y = jax.lax.conv_general_dilated(
            x[None],
            params["k"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        return jnp.mean(y, axis=(0, 1)) @ params["w"]

    names = [s.name for s in quantize_model(fn, params, jnp.ones((5, 5, 2))).sites]
    assert names == ["input:0", "k", "k/output", "mean_0/output", "w", "output:0"]


def test_integer_inputs_have_their_site_where_they_become_real():
    fn = lambda params, x: (x.astype(jnp.float32) / 255) @ params["w"]
    qmodel = quantize_model(fn, {"w": jnp.ones((3, 2))}, jnp.ones((1, 3), jnp.uint8))
    assert [s.name for s in qmodel.sites] == ["input:0", "w", "output:0"]
    fn = lambda params, x: (x.astype(jnp.float32) * params["s"]) @ params["w"]
    params = {"s": jnp.ones((1, 3)), "w": jnp.ones((3, 2))}
    qmodel = quantize_model(fn, params, jnp.ones((1, 3), jnp.uint8))
    names = [s.name for s in qmodel.sites]
    assert names == ["input:0", "s/scale", "s/output", "w", "output:0"]


class _Named(nn.Module):
    """Layers of many kinds, some with modules of their own for what has no weights."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        with jax.named_scope("pool"):
            x = nn.max_pool(x, (2, 2), (2, 2))
        with jax.named_scope("relu"):
            x = nn.relu(x)
        y = nn.Conv(4, (3, 3), feature_group_count=4, name="dw")(x)
        y = jax.nn.silu(y)
        z = jnp.concatenate([x + y, nn.relu6(x - 1.0)], axis=-1)
        z = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")(z)
        return nn.Dense(2, name="fc")(z.mean((1, 2)))


def test_what_a_site_is():
    x = jnp.ones((1, 8, 8, 2))
    model = _Named()
    params = linen_example(model, x).params
    sites = {s.name: s for s in quantize_model(model.apply, params, x).sites}
    rows = {k: (s.layer, s.op, s.activation, s.feeds) for k, s in sites.items()}
    readers = ("depthwise_conv", "residual", "affine")
    assert rows["input:0"] == ("input:0", "input", "", ("conv",))
    assert rows["conv/kernel"] == ("conv", "conv", "", readers)
    assert rows["conv/output"] == ("relu", "conv", "relu", readers)
    assert rows["dw/output"] == ("dw", "depthwise_conv", "", ("silu",))
    assert rows["silu_0/output"] == ("silu_0", "silu", "silu", ("residual",))
    assert rows["residual_0/output"][1:] == ("residual", "", ("concatenate",))
    assert rows["affine_0/output"][1:] == ("affine", "relu6", ("concatenate",))
    assert rows["concatenate_0/output"][1:3] == ("concatenate", "relu6")
    assert rows["up/output"] == ("up", "conv_transpose", "", ("mean",))
    assert rows["mean_0/output"] == ("mean_0", "mean", "", ("dense",))
    assert rows["output:0"] == ("fc", "dense", "", ("return",))
    assert sites["dw/kernel"].inputs == ("conv/output",)
    assert sites["residual_0/output"].inputs == ("conv/output", "silu_0/output")
    assert sites["conv/kernel"].inputs == ("input:0",)


def test_a_relu_behind_a_pool_belongs_to_the_block():
    def fn(params, x):
        x = nn.max_pool(x @ params["a"], (2,), (2,))
        return jax.nn.relu(x) @ params["b"]

    rng = np.random.default_rng(3)
    params = {k: np.float32(rng.normal(size=(3, 3))) for k in "ab"}
    x = np.float32(rng.normal(size=(4, 6, 3)))
    qmodel = quantize_model(fn, params, x)
    names = [s.name for s in qmodel.sites]
    assert names == ["input:0", "a", "a/output", "b", "output:0"]
    qstate = calibrate(qmodel, params, [x])
    wanted = np.maximum((x @ params["a"]).reshape(4, 3, 2, 3).max(2), 0).max()
    np.testing.assert_allclose(qstate["a/output"].high, wanted, rtol=1e-6)
    program = lower(qmodel, params, qstate, x)
    assert verify(program, qmodel, params, qstate, x).is_exact


@pytest.mark.parametrize("function", [jax.nn.silu, jax.nn.leaky_relu, jax.nn.elu])
def test_a_jitted_function_is_one_block(function):
    fn = lambda params, x: function(x @ params["w"]) @ params["v"]
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    params = {"w": jnp.eye(3), "v": 2 * jnp.eye(3)}
    qmodel = quantize_model(fn, params, x)
    name = f"{function.__name__}_0/output"
    assert name in [s.name for s in qmodel.sites]
    qstate = calibrate(qmodel, params, [x])
    loss = lambda x: jnp.sum(qmodel.apply(params, qstate, x))
    slope = jax.jit(jax.grad(loss))(x)
    wanted = jax.jit(jax.grad(lambda x: jnp.sum(fn(params, x))))(x)
    np.testing.assert_allclose(slope, wanted, atol=0.1)


def test_a_jitted_line_or_bound_is_not():
    line = jax.jit(lambda x: jnp.clip(x * 2.0 + 1.0, 0.0, 6.0))
    fn = lambda params, x: line(x @ params["w"])
    qmodel = quantize_model(fn, {"w": jnp.eye(3)}, jnp.ones((2, 3)))
    assert [s.name for s in qmodel.sites] == ["input:0", "w", "output:0"]


@pytest.mark.parametrize(
    "function, names",
    [
        (jax.nn.gelu, ["function_0/output"]),  # Inlined: eight equations.
        (lambda y: y * jax.nn.sigmoid(y), ["function_0/output"]),
        (lambda y: y * jax.nn.relu6(y + 3) / 6, ["function_0/output"]),
        (lambda y: jnp.where(y > 0, y, 0.1 * y), ["function_0/output"]),
        (lambda y: y + jnp.tanh(y), ["function_0/output"]),
        (lambda y: jnp.tanh(y + 1.0), ["tanh_0/output"]),  # The sum is of the product.
        (lambda y: jax.nn.relu(2.0 * y + 1.0), []),
        (lambda y: y * jnp.ones((1, 3)), []),
        (
            lambda y: jnp.exp(y) * jnp.max(y),  # Of two values.
            ["exp_0/output", "mul_0/output"],
        ),
    ],
)
def test_an_elementwise_stretch_is_one_site(function, names):
    fn = lambda params, x: function(x @ params["w"]) @ params["v"]
    params = {"w": jnp.eye(3), "v": jnp.eye(3)}
    qmodel = quantize_model(fn, params, jnp.ones((2, 3)))
    around = ["input:0", "w", "w/output", "v", "output:0"]
    assert [s.name for s in qmodel.sites if s.name not in around] == names
    for site in qmodel.sites:
        if site.name in names and site.op != "mul":
            assert site.inputs == ("w/output",) and site.activation == site.op


def test_a_value_read_outside_of_its_function_has_a_site():
    def fn(params, x):
        y = x @ params["w"]
        z = jnp.tanh(y)
        return (z * z + y) @ params["v"], z @ params["v"]

    params = {"w": jnp.eye(3), "v": jnp.eye(3)}
    qmodel = quantize_model(fn, params, jnp.ones((2, 3)))
    names = [s.name for s in qmodel.sites if s.role == "activation"]
    assert names == [
        *("input:0", "w/output", "tanh_0/output", "integer_pow_0/output"),
        *("residual_0/output", "output:0", "output:1"),
    ] or names == [
        *("input:0", "w/output", "tanh_0/output", "mul_0/output"),
        *("residual_0/output", "output:0", "output:1"),
    ]


def test_dropout_in_training_adds_no_site():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))

    model, x, key = Model(), images(2, 3), jax.random.key(0)
    params = model.init(key, x, False)
    names = []
    for train in (False, True):
        fn = lambda p, x, train=train: model.apply(p, x, train, rngs={"dropout": key})
        names.append([s.name for s in quantize_model(fn, params, x).sites])
    assert names[0] == names[1]


def test_a_users_own_quantizer_keeps_its_place():
    grid = QParams(jnp.float32(0.5), jnp.int32(0))

    def fn(params, x):
        return fake_quant(x @ params["w"], grid, QSpec(4)) @ params["v"]

    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    names = [s.name for s in quantize_model(fn, params, jnp.ones((2, 3))).sites]
    assert names == ["input:0", "w", "v", "output:0"]
