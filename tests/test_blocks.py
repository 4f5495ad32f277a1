"""Where the automatic path puts sites, and that their names stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qjax.affine import QParams, QSpec, fake_quant
from qjax.instrument import calibrate, quantize_model
from qjax.lowering import lower, verify
from tests.models import (
    NAMES,
    LinenResidual,
    NnxPreactivation,
    NnxResidual,
    examples,
    images,
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
    fn, params, x = examples()[name]
    qmodel = quantize_model(fn, params, x[:2])
    assert [site.name for site in qmodel.sites] == EXPECTED[name]
    for site in qmodel.sites:
        ends = ("kernel", "scale", "a", "c")
        assert site.role == ("weight" if site.name.endswith(ends) else "activation")


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("model", [NnxResidual, NnxPreactivation])
def test_nnx_names_are_the_same_in_training(model, batch):
    network = model(nnx.Rngs(0))
    x = images(batch, 9, 7, 2) if model is NnxResidual else images(batch, 11, 3)
    names = []
    for mode in (network.eval, network.train):
        mode()
        graph, state = nnx.split(network)

        def fn(state, x, graph=graph):
            merged = nnx.merge(graph, state)
            return merged(x), nnx.state(merged, nnx.BatchStat)

        names.append([s.name for s in quantize_model(fn, state, x).sites])
    assert names[0] == names[1]


def test_linen_names_are_the_same_in_training():
    model, x = LinenResidual(), images(3, 9, 7, 2)
    variables = model.init(jax.random.key(0), x)
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    infer, trained = (quantize_model(f, variables, x) for f in (model.apply, train))
    assert [s.name for s in infer.sites] == [s.name for s in trained.sites]


def test_mutated_statistics_come_out_as_they_went_in():
    """The new averages are those of the float convolution of quantized operands."""
    model, x = LinenResidual(), images(3, 9, 7, 2)
    variables = model.init(jax.random.key(0), x)
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    qmodel = quantize_model(train, variables, x)
    qstate = qmodel.observe(variables, qmodel.init(variables, x), x)
    _, new = qmodel.apply(variables, qstate, x)
    _, wanted = train(variables, x)
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
    params = model.init(jax.random.key(0), x)
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
    names = [s.name for s in qmodel.sites]
    assert names == ["input:0", "affine_0/scale", "affine_0/output", "w", "output:0"]


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
