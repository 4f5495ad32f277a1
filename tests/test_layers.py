"""The layers of qjax.linen and qjax.nnx: one computation, explicit state, lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen
import qjax.nnx
from qjax.affine import QSpec
from qjax.graph import reference
from qjax.layers.products import conv, quantized_product
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


def _specs(power_of_two, bits=8):
    return {
        "x_spec": QSpec(8, power_of_two=power_of_two),
        "kernel_spec": QSpec(
            bits, narrow_range=True, axis=-1, power_of_two=power_of_two
        ),
    }


class LinenNet(nn.Module):
    """Every window option, and what may stand between two layers."""

    power_of_two: bool

    @nn.compact
    def __call__(self, x, train=False):
        specs = _specs(self.power_of_two)
        conv = lambda *args, **kw: qjax.linen.QConv(*args, **kw, **specs)
        x = nn.relu(conv(4, (3, 3), strides=2)(x, train=train))
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        x = conv(
            8,
            (2, 3),
            padding=[(1, 0), 2],
            kernel_dilation=(2, 1),
            feature_group_count=4,
        )(x, train=train)
        x = nn.relu(x)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = jax.nn.relu6(x.reshape((x.shape[0], -1)))
        x = qjax.linen.QDense(5, use_bias=False, **specs)(x, train=train)
        return qjax.linen.QDense(3, **specs)(x, train=train)


class NnxNet(nnx.Module):
    """The NNX counterpart."""

    def __init__(self, power_of_two, rngs):
        specs = {**_specs(power_of_two), "rngs": rngs}
        self.conv1 = qjax.nnx.QConv(2, 4, (3, 3), strides=2, site="conv1", **specs)
        self.conv2 = qjax.nnx.QConv(
            4, 4, (3,), feature_group_count=4, padding="VALID", **specs
        )
        self.head = qjax.nnx.QLinear(36, 3, site="head", **specs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x.reshape((x.shape[0], -1, 4))))
        x = nnx.max_pool(x, (2,), strides=(2,), padding="SAME")
        return self.head(x.reshape((x.shape[0], -1)))


def _linen(power_of_two):
    model, x = LinenNet(power_of_two), images(40, 9, 8, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["quant"])[1])
    for part in (x[:20], x[20:]):
        variables = {**variables, **train(variables, part)}
    return lambda x: model.apply(variables, x), x


def _nnx(power_of_two):
    model = nnx.jit(lambda: NnxNet(power_of_two, nnx.Rngs(0)))()
    x, step = images(40, 9, 8, 2), nnx.jit(lambda model, x: model(x))
    model.train()
    for part in (x[:20], x[20:]):
        step(model, part)
    model.eval()
    return model, x


@pytest.mark.parametrize(
    "make, power_of_two",
    [
        (_linen, True),
        (_nnx, False),
        pytest.param(_linen, False, marks=pytest.mark.heavy),
        pytest.param(_nnx, True, marks=pytest.mark.heavy),
    ],
)
def test_a_model_of_layers_lowers_by_the_same_pass(make, power_of_two):
    fn, x = make(power_of_two)
    program = qjax.lower(fn, x[:2])
    result = qjax.verify(program, fn, x)
    assert all(row.max_difference <= 1 for row in result.sites.values()), result
    assert result.is_exact or not power_of_two, f"\n{result}"
    codes = [np.asarray(c) for c in program.quantize_inputs(x)]
    wanted = reference.run(program.graph, program.params, codes)
    np.testing.assert_array_equal(
        program.codes(*codes), wanted[program.graph.outputs[0]]
    )
    assert program.graph.values[program.graph.outputs[0]].dtype == "int32"


def test_linen_state_is_a_collection_that_moves_in_training_only():
    model, x = qjax.linen.QDense(2), images(6, 3)
    variables = model.init(jax.random.key(0), x, train=True)
    assert int(variables["quant"]["x"].step) == 0
    _, trained = model.apply(variables, x, train=True, mutable=["quant"])
    assert int(trained["quant"]["x"].step) == 1
    variables = {**variables, **trained}
    _, same = model.apply(variables, 9 * x, train=False, mutable=["quant"])
    assert jax.tree.all(jax.tree.map(np.array_equal, same, trained))


def test_nnx_state_is_a_variable_that_eval_freezes():
    model, x = qjax.nnx.QLinear(3, 2, rngs=nnx.Rngs(0)), images(6, 3)
    assert isinstance(model.x_range, qjax.nnx.QuantState)
    model(x)
    assert int(model.x_range.get_value().step) == 1
    wrapper = nnx.Sequential(model)
    wrapper.eval()
    model(9 * x)
    assert int(model.x_range.get_value().step) == 1
    assert len(jax.tree.leaves(nnx.state(wrapper, qjax.nnx.QuantState))) == 3


def test_linen_and_nnx_compute_the_same():
    x = images(6, 5, 4, 2)
    layer = qjax.nnx.QConv(2, 3, (2, 2), padding="VALID", rngs=nnx.Rngs(0))
    wanted = layer(x)
    twin = qjax.linen.QConv(3, (2, 2), padding="VALID")
    variables = twin.init(jax.random.key(0), x, train=True)
    params = {"kernel": layer.kernel.get_value(), "bias": layer.bias.get_value()}
    found, _ = twin.apply(
        {**variables, "params": params}, x, train=True, mutable=["quant"]
    )
    np.testing.assert_array_equal(found, wanted)


def test_both_train_with_optax():
    x = images(32, 4)
    target = jnp.sin(x[:, :2])
    model = qjax.nnx.QLinear(4, 2, **_specs(False, bits=4), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((m(x) - target) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(80)]
    assert values[-1] < 0.5 * values[0]


def test_uncalibrated_layers_are_loud():
    model, x = qjax.nnx.QLinear(3, 2, rngs=nnx.Rngs(0), site="head"), images(6, 3)
    model.eval()
    with pytest.raises(ValueError, match="'head/input' has no range yet"):
        model(x)
    graph, state = nnx.split(model)  # Traced, it cannot be known.
    traced = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert np.all(np.isnan(traced(state, x)))
    with pytest.raises(ValueError, match="'head/input' has no scale yet"):
        qjax.lower(model, x)


def test_windows_match_those_of_lax():
    x, kernel = images(2, 9, 7, 4), images(3, 2, 2, 6, seed=2)
    wanted = jax.lax.conv_general_dilated(
        x,
        kernel,
        (2, 1),
        [(1, 0), (2, 2)],
        rhs_dilation=(1, 3),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    found = conv((2, 1), [(1, 0), 2], (1, 3), 2)(x, kernel)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="2 spatial axes"):
        conv(1, "SAME", 1, 2)(x[0], kernel)
    with pytest.raises(ValueError, match='"SAME", "VALID" or sizes'):
        conv(1, "CIRCULAR", 1, 2)(x, kernel)


def test_the_bias_lies_on_the_grid_of_the_accumulator():
    x, kernel = images(4, 3), images(3, 2, seed=2)
    bias = jnp.float32([0.1234567, -3.7])
    params = qjax.QParams(jnp.float32(0.1), jnp.int32(5))
    y = quantized_product(
        lambda x, k: 0 * (x @ k),
        x,
        kernel,
        bias,
        x_params=params,
        x_spec=QSpec(8),
        kernel_spec=QSpec(8, narrow_range=True, axis=-1),
    )
    unit = np.float32(0.1) * np.float32(np.abs(kernel).max(0) * (np.float32(1) / 127))
    wanted = np.rint(bias * (np.float32(1) / unit)) * unit
    np.testing.assert_allclose(y[0], wanted, rtol=1e-6)
