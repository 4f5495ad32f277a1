"""The layers of qjax.linen and qjax.nnx: Flax's own on grids, explicit state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, nnx
from flax import linen as nn

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax import quantizers as qz
from qjax.affine import QSpec
from qjax.graph import reference
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


def words(power_of_two=True, bits=8, **others):
    """Words of input and kernel, and others by name."""
    kernel = QSpec(bits, narrow_range=True, axis="output", power_of_two=power_of_two)
    return LayerQuantizers(QSpec(8, power_of_two=power_of_two), kernel, **others)


QKERAS = LayerQuantizers(
    "quantized_bits(8,2,1)",
    "quantized_bits(4,0,1,alpha='auto_po2')",
    "quantized_bits(8,2,1)",
    "quantized_relu(6,2)",
)
OUTPUT = words(output=QSpec(8, power_of_two=True))

# Name -> layers of Linen and NNX, their arguments, shape of an input.
WINDOW = {"kernel_size": (3, 2), "strides": 2}
LAYERS = {
    "dense": (nn.Dense, nnx.Linear, (7, 5), {}, (4, 7)),
    "dense alone": (nn.Dense, nnx.Linear, (7, 5), {"use_bias": False}, (7,)),
    "general": (
        nn.DenseGeneral,
        nnx.LinearGeneral,
        ((3, 7), (2, 4)),
        {"axis": (-2, -1)},
        (5, 3, 7),
    ),
    "einsum": (nn.Einsum, nnx.Einsum, ("abd,dhk->abhk", (7, 2, 3)), {}, (4, 3, 7)),
    "conv": (nn.Conv, nnx.Conv, (3, 5), WINDOW, (4, 9, 8, 3)),
    "of one axis": (
        nn.Conv,
        nnx.Conv,
        (3, 5),
        {"kernel_size": 3, "padding": "CAUSAL", "kernel_dilation": 2},
        (4, 9, 3),
    ),
    "around": (
        nn.Conv,
        nnx.Conv,
        (2, 5),
        {"kernel_size": (3,), "padding": "CIRCULAR"},
        (9, 2),
    ),
    "of three axes": (
        nn.Conv,
        nnx.Conv,
        (2, 3),
        {"kernel_size": (2, 2, 2)},
        (2, 3, 4, 5, 2),
    ),
    "depthwise": (
        nn.Conv,
        nnx.Conv,
        (3, 6),
        {"kernel_size": (3, 3), "feature_group_count": 3, "padding": "VALID"},
        (4, 6, 6, 3),
    ),
    "transposed": (nn.ConvTranspose, nnx.ConvTranspose, (3, 5), WINDOW, (4, 5, 4, 3)),
    "transposed around": (
        nn.ConvTranspose,
        nnx.ConvTranspose,
        (3, 5),
        {**WINDOW, "padding": "CIRCULAR"},
        (4, 5, 4, 3),
    ),
    "transposed kernel": (
        nn.ConvTranspose,
        nnx.ConvTranspose,
        (3, 5),
        {**WINDOW, "strides": (2, 2), "transpose_kernel": True},
        (4, 5, 4, 3),
    ),
    "embedding": (nn.Embed, nnx.Embed, (9, 4), {}, None),
}
OWN = {
    "Dense": "QDense",
    "Linear": "QLinear",
    "DenseGeneral": "QDenseGeneral",
    "LinearGeneral": "QLinearGeneral",
    "Einsum": "QEinsum",
    "Conv": "QConv",
    "ConvTranspose": "QConvTranspose",
    "Embed": "QEmbed",
}


def of_linen(name, quantizers=None):
    """A layer of Linen, float or quantized, and its input."""
    cls, _, args, options, shape = LAYERS[name]
    if cls is nn.Einsum:
        options = {**options, "einsum_str": args[0], "shape": args[1]}
    elif cls is nn.Embed:
        options = {**options, "num_embeddings": args[0], "features": args[1]}
    else:
        options = {**options, "features": args[1]}
    if quantizers is not None:
        cls = getattr(ql, OWN[cls.__name__])
        options["quantizers"] = quantizers
    x = images(*shape) if shape else np.int32([[3, 0, 8], [1, 1, 7]])
    return cls(**options), x


def of_nnx(name, quantizers=None):
    _, cls, args, options, _ = LAYERS[name]
    options = {**options, "rngs": nnx.Rngs(0)}
    if cls is nnx.Einsum:
        args = (*args, args[1][1:])
    if quantizers is not None:
        cls = getattr(qn, OWN[cls.__name__])
        options["quantizers"] = quantizers
    return cls(*args, **options)


def parameters(name):
    """Parameters of a float layer, no bias 0."""
    layer, x = of_linen(name)
    params = layer.init(jax.random.key(1), x)["params"]
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape)
    return jax.tree.map(move, params)


def with_parameters(layer, params):
    for key, value in params.items():
        getattr(layer, key).set_value(value)
    return layer


def calibrated(name, quantizers):
    """A layer of Linen that has seen its input, its variables, and the input."""
    layer, x = of_linen(name, quantizers)
    made = jax.jit(layer.init)(jax.random.key(1), x)
    variables = {**made, "params": parameters(name)}
    _, state = layer.apply(variables, x, mutable=["quant"])
    return layer, {**variables, **state}, x


@pytest.mark.parametrize("name", LAYERS)
def test_without_quantizers_a_layer_is_that_of_flax_bit_for_bit(name):
    params = parameters(name)
    (layer, x), (twin, _) = of_linen(name, FLOAT), of_linen(name)
    made = layer.init(jax.random.key(1), x)
    assert jax.tree.structure(made) == jax.tree.structure({"params": params})
    wanted = twin.apply({"params": params}, x)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), wanted)
    layer, twin = of_nnx(name, FLOAT), of_nnx(name)
    names = lambda m: sorted(map(str, nnx.to_flat_state(nnx.state(m, nnx.Param)).paths))
    assert names(layer) == names(twin)
    found = with_parameters(layer, params)(x)
    np.testing.assert_array_equal(found, with_parameters(twin, params)(x))


@pytest.mark.parametrize("quantizers", [OUTPUT, QKERAS], ids=["out", "qkeras"])
@pytest.mark.parametrize("name", LAYERS)
def test_linen_and_nnx_compute_the_same(name, quantizers):
    layer, variables, x = calibrated(name, quantizers)
    other = with_parameters(of_nnx(name, quantizers), variables["params"])
    run = nnx.jit(lambda m, x: m(x))
    run(other, x)
    other.eval()
    wanted = jax.jit(layer.apply)(variables, x)
    np.testing.assert_array_equal(run(other, x), wanted)
    assert not np.array_equal(wanted, of_linen(name)[0].apply(variables, x))


@pytest.mark.kept
@pytest.mark.parametrize(
    "name, quantizers",
    [
        ("dense", QKERAS),
        ("conv", OUTPUT),
        ("general", words()),
        ("einsum", OUTPUT),
        ("transposed kernel", words()),
        ("transposed around", words()),
        ("depthwise", QKERAS),
        ("embedding", OUTPUT),
        ("of one axis", words(bits=4)),
    ],
    ids=str,
)
def test_a_layer_lowers_code_for_code(name, quantizers):
    layer, variables, x = calibrated(name, quantizers)
    run = lambda x: layer.apply(variables, x)
    program = qjax.lower(run, x)
    report = qjax.verify(program, run, x)
    assert report.is_exact, f"\n{report}"
    codes = [np.asarray(c) for c in program.quantize_inputs(x)]
    shipped = reference.run(program.graph, program.params, codes)
    (out,) = program.graph.outputs
    np.testing.assert_array_equal(program.codes(*codes), shipped[out])


def layer_input(x):
    """The input on its grid of a power of two, in NumPy."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = 2.0 ** np.ceil(np.log2((high - low) / 255))
    return np.rint(x / scale) * scale


def by_hand(params, x):
    """What a dense layer computes, in NumPy."""
    ends = [min(x.min(), 0), max(x.max(), 0)]
    scale = np.float32((ends[1] - ends[0]) / 255)
    zero = np.rint(-ends[0] / scale) - 128
    codes = np.clip(np.rint(x / scale) + zero, -128, 127) - zero
    own = np.abs(params["kernel"]).max(0) / np.float32(127)
    kernel = np.rint(params["kernel"] / own)
    bias = np.rint(params["bias"] / (scale * own))
    return (codes @ kernel + bias) * (scale * own)


def test_a_dense_layer_computes_its_formula():
    layer, variables, x = calibrated("dense", LayerQuantizers())
    params = jax.tree.map(np.asarray, variables["params"])
    np.testing.assert_allclose(layer.apply(variables, x), by_hand(params, x), atol=1e-5)


def test_a_scale_for_each_input_is_none_of_the_bias():
    """A square kernel has as many inputs as outputs: the bias stays as it is."""
    own = LayerQuantizers(kernel=QSpec(8, narrow_range=True, axis=0))
    layer, x = qn.QLinear(6, 6, quantizers=own, rngs=nnx.Rngs(0)), images(4, 6)
    layer.bias.set_value(jnp.linspace(0.1, 0.7, 6))
    found = layer(x)
    layer.bias.set_value(jnp.zeros(6))
    wanted = layer(x) + jnp.linspace(0.1, 0.7, 6)[None]
    layer.eval()
    np.testing.assert_allclose(found[0], wanted[0], atol=0.02)
    layer.bias.set_value(jnp.linspace(0.1, 0.7, 6))
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", ["output", 0])
@pytest.mark.parametrize(
    "formula, shape, bias",
    [("abd,hdk->abkh", (5, 7, 5), (5, 5)), ("abd,hkd->abhk", (2, 3, 7), (2, 3))],
)
def test_a_bias_of_an_einsum_has_the_grid_of_its_own_output(formula, shape, bias, axis):
    """The axes of the bias are in the order of the result, the kernel's in another."""
    x = images(2, 3, 7)
    kernel = QSpec(8, narrow_range=True, axis=axis, power_of_two=True)
    own = LayerQuantizers(QSpec(8, power_of_two=True), kernel)
    init = {"quantizers": own, "bias_init": nn.initializers.normal(1.0)}
    layer = ql.QEinsum(shape=shape, einsum_str=formula, **init)
    variables = layer.init(jax.random.key(0), x)
    _, state = layer.apply(variables, x, mutable=["quant"])
    run = lambda x: layer.apply({**variables, **state}, x)
    assert qjax.verify(qjax.lower(run, x), run, x).is_exact
    other = qn.QEinsum(formula, shape, bias, rngs=nnx.Rngs(0), **init)
    other = with_parameters(other, variables["params"])
    np.testing.assert_array_equal(other(x), run(x))


def test_gradients_are_straight_through():
    """Of values in range they are the float layer's at the rounded values."""
    layer, variables, x = calibrated("dense", words())
    loss = lambda p, x: jnp.sum(jnp.sin(layer.apply({**variables, "params": p}, x)))
    found = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)
    weights = {k: np.asarray(v) for k, v in variables["params"].items()}
    scale = 2.0 ** np.ceil(np.log2(np.abs(weights["kernel"]).max(0) / 127))
    kernel = np.rint(weights["kernel"] / scale) * scale
    g = np.cos(np.asarray(layer.apply(variables, x)))
    np.testing.assert_allclose(found[1], g @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0]["bias"], g.sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found[0]["kernel"], layer_input(x).T @ g, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["dense", "conv", "embedding"])
def test_layers_compose_with_jax(name):
    """`vmap` over inputs is a loop, `remat` changes nothing, bfloat16 stays it."""
    layer, variables, x = calibrated(name, OUTPUT)
    run = jax.jit(lambda v, x: layer.apply(v, x))
    stack = np.stack([x, x[::-1]])
    mapped = jax.vmap(run, (None, 0))(variables, stack)
    for own, found in zip(stack, mapped, strict=True):
        np.testing.assert_array_equal(found, run(variables, own))
    again = jax.checkpoint(lambda v: layer.apply(v, x).sum())
    plain = jax.grad(lambda p: layer.apply({**variables, "params": p}, x).sum())
    kept = jax.grad(lambda p: again({**variables, "params": p}))
    params = variables["params"]
    chex_equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(chex_equal, jax.jit(kept)(params), jax.jit(plain)(params))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    given = x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
    assert layer.apply({**variables, "params": half}, given).dtype == jnp.bfloat16


def test_layers_stack_in_scans():
    """`nn.scan` and `nnx.scan` over layers, with ranges of their own."""
    x, n = images(4, 6), 3

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(ql.QDense(6, quantizers=words())(x)), None

    axes = {"params": 0, "quant": 0}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=n)()
    variables = stack.init(jax.random.key(0), x, None)
    _, state = stack.apply(variables, x, None, mutable=["quant"])
    ranges = jax.tree.leaves(state)
    assert all(leaf.shape[0] == n for leaf in ranges)
    (found, _), h = stack.apply({**variables, **state}, x, None), x
    for k in range(n):
        own = jax.tree.map(lambda a, k=k: a[k], {**variables, **state})
        h, _ = Block().apply(own, h, None)
    np.testing.assert_allclose(found, h, rtol=1e-6)

    make = nnx.vmap(lambda key: qn.QLinear(6, 6, rngs=nnx.Rngs(key)))
    layers = make(jax.random.split(jax.random.key(0), n))
    run = nnx.scan(
        lambda m, x: nnx.relu(m(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
    )
    run(layers, x)
    assert np.unique(layers.input_range.get_value().step).tolist() == [1]
    layers.eval()
    assert run(layers, x).shape == x.shape


def test_ranges_move_where_the_collection_is_mutable_and_training_is_not_off():
    layer, x = ql.QDense(2), images(6, 3)
    variables = layer.init(jax.random.key(0), x)
    steps = lambda v: int(v["quant"]["input"].step)
    assert steps(variables) == 0
    _, seen = layer.apply(variables, x, mutable=["quant"])
    assert steps(seen) == 1
    variables = {**variables, **seen}
    _, same = layer.apply(variables, 9 * x, train=False, mutable=["quant"])
    assert jax.tree.all(jax.tree.map(np.array_equal, same, seen))
    chain = nn.Sequential([ql.QDense(4), nn.relu, ql.QDense(2)])
    variables = chain.init(jax.random.key(0), x)
    _, seen = chain.apply(variables, x, mutable=["quant"])
    assert [int(v["input"].step) for v in seen["quant"].values()] == [1, 1]
    frozen = ql.QDense(2, train=False)
    variables = frozen.init(jax.random.key(0), x)
    _, seen = frozen.apply(variables, x, train=True, mutable=["quant"])
    assert steps(seen) == 1
    variables = {**variables, **seen}
    _, same = frozen.apply(variables, 9 * x, mutable=["quant"])
    assert steps(same) == 1
    with pytest.raises(errors.ModifyScopeVariableError, match="quant"):
        frozen.apply(variables, x, train=True)


def test_nnx_ranges_are_variables_that_eval_freezes():
    model, x = qn.QLinear(3, 2, rngs=nnx.Rngs(0)), images(6, 3)
    assert isinstance(model.input_range, qn.QuantState)
    model(x)
    assert int(model.input_range.get_value().step) == 1
    wrapper = nnx.Sequential(model)
    wrapper.eval()
    model(9 * x)
    assert int(model.input_range.get_value().step) == 1
    assert len(jax.tree.leaves(nnx.state(wrapper, qn.QuantState))) == 3
    wrapper.train()
    model(x)
    assert int(model.input_range.get_value().step) == 2


def test_activations_are_layers():
    x = images(6, 3)
    layer = ql.QActivation("quantized_relu(4,1)")
    wanted = qz.apply(qz.parse("quantized_relu(4,1)"), x)
    np.testing.assert_array_equal(layer.apply({}, x), wanted)
    np.testing.assert_array_equal(qn.QActivation("quantized_relu(4,1)")(x), wanted)
    layer = ql.QActivation(QSpec(8))
    variables = layer.init(jax.random.key(0), x)
    _, state = layer.apply(variables, x, mutable=["quant"])
    other = qn.QActivation(QSpec(8))
    np.testing.assert_array_equal(layer.apply(state, x), other(x))
    assert np.max(np.abs(layer.apply(state, x) - x)) < 0.02
    np.testing.assert_array_equal(ql.QActivation(jnp.sign).apply({}, x), np.sign(x))


def test_an_output_by_channel_is_refused_with_a_remedy_that_works():
    x = images(4, 6)
    for axis in (-1, None):
        own = words(output=QSpec(8, symmetric=True, power_of_two=True, axis=axis))
        layer = ql.QDense(5, quantizers=own)
        variables = layer.init(jax.random.key(0), x)
        _, state = layer.apply(variables, x, mutable=["quant"])
        run = lambda x, s=state, v=variables, f=layer: f.apply({**v, **s}, x)
        if axis is None:
            assert qjax.verify(qjax.lower(run, x), run, x).is_exact
        else:
            with pytest.raises(ValueError, match="one scale there: a word without"):
                qjax.lower(run, x)


def test_words_that_draw_take_keys_of_their_own_stream():
    own = LayerQuantizers(None, "stochastic_ternary", None)
    layer, x = ql.QDense(64, quantizers=own), np.eye(8, dtype=np.float32)
    variables = layer.init(jax.random.key(0), x)
    draw = lambda key: layer.apply(variables, x, rngs={"quant": jax.random.key(key)})
    assert np.array_equal(draw(1), draw(1)) and not np.array_equal(draw(1), draw(2))
    assert np.array_equal(layer.apply(variables, x), layer.apply(variables, x))
    layer = qn.QLinear(8, 64, quantizers=own, rngs=nnx.Rngs(0, quant=1))
    assert not np.array_equal(layer(x), layer(x))
    own = LayerQuantizers(words().input, "stochastic_ternary", None)
    layer = qn.QLinear(8, 64, quantizers=own, rngs=nnx.Rngs(0, quant=1))
    layer(x)
    layer.eval()  # Nothing is drawn in inference.
    np.testing.assert_array_equal(layer(x), layer(x))
    assert qjax.verify(qjax.lower(layer, x), layer, x).is_exact


WRONG = {
    "no word": (lambda: LayerQuantizers(kernel=8), TypeError, r"QSpec\(bits=8\)"),
    "a class": (lambda: LayerQuantizers(input=qz.QuantizedBits), TypeError, "options"),
    "no calibrator": (lambda: LayerQuantizers(calibrator=3), TypeError, "calibrator"),
    "one that learns": (
        lambda: qn.QSimpleCell(
            4, 3, quantizers=LayerQuantizers(kernel="lsq(4)"), rngs=nnx.Rngs(0)
        )(jnp.zeros((2, 3)), images(2, 4)),
        ValueError,
        "learns arrays, and this layer has none",
    ),
    "one that learns of channels": (
        lambda: qn.QLinear(
            3,
            2,
            quantizers=LayerQuantizers("lsq(4,axis=-1)"),
            site="head",
            rngs=nnx.Rngs(0),
        ),
        ValueError,
        "'head/input'.*layer of Linen",
    ),
    "no such axis": (
        lambda: qn.QLinear(
            3,
            2,
            quantizers=words(bias=None).__class__(kernel=QSpec(8, axis=2)),
            site="head",
            rngs=nnx.Rngs(0),
        )(images(4, 3)),
        ValueError,
        "At 'head/kernel': .*axis=2",
    ),
    "no such axis of the input": (
        lambda: nn.Sequential(
            [ql.QDense(2, quantizers=LayerQuantizers(QSpec(8, axis=5)))]
        ).init(jax.random.key(0), images(4, 3)),
        ValueError,
        "At 'layers_0/input': .*axis=5",
    ),
    "another shape": (
        lambda: ql.QActivation(jnp.sum).apply({}, images(4, 3)),
        ValueError,
        "must keep the shape",
    ),
    "a bias without a scale": (
        lambda: qn.QLinear(
            3, 2, quantizers=LayerQuantizers(None, bias=QSpec(8)), rngs=nnx.Rngs(0)
        )(images(4, 3)),
        ValueError,
        "quantized_bits",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    run, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        run()


def test_the_remedies_of_errors_work():
    own = LayerQuantizers(None, bias="quantized_bits(16,6,1)")
    found = qn.QLinear(3, 2, quantizers=own, rngs=nnx.Rngs(0))(images(4, 3))
    assert np.all(np.isfinite(found))
    layer, x = nn.Dense(2), images(4, 3)
    params = layer.init(jax.random.key(0), x)
    scheme = qjax.Scheme(rules=(qjax.Rule("*", "lsq(4)"),))
    qmodel = qjax.quantize_model(layer.apply, params, x, scheme=scheme)
    assert "learned" in qjax.calibrate(qmodel, params, [x])


class LinenNet(nn.Module):
    """Every window option, and what may stand between two layers."""

    power_of_two: bool

    @nn.compact
    def __call__(self, x, train=False):
        specs = {"quantizers": words(self.power_of_two)}
        conv = lambda *args, **kw: ql.QConv(*args, **kw, **specs)
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
        x = ql.QDense(5, use_bias=False, **specs)(x, train=train)
        return ql.QDense(3, **specs)(x, train=train)


class NnxNet(nnx.Module):
    """The NNX counterpart."""

    def __init__(self, power_of_two, rngs):
        specs = {"quantizers": words(power_of_two), "rngs": rngs}
        self.conv1 = qn.QConv(2, 4, (3, 3), strides=2, site="conv1", **specs)
        self.conv2 = qn.QConv(
            4, 4, (3,), feature_group_count=4, padding="VALID", **specs
        )
        self.head = qn.QLinear(36, 3, site="head", **specs)

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


def test_both_train_with_optax():
    x = images(32, 4)
    target = jnp.sin(x[:, :2])
    model = qn.QLinear(4, 2, quantizers=words(False, 4), rngs=nnx.Rngs(0))
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
    model, x = qn.QLinear(3, 2, rngs=nnx.Rngs(0), site="head"), images(6, 3)
    model.eval()
    with pytest.raises(ValueError, match="'head/input' has no range yet"):
        model(x)
    graph, state = nnx.split(model)  # Traced, it cannot be known.
    traced = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert np.all(np.isnan(traced(state, x)))
    with pytest.raises(ValueError, match="'head/input' has no scale yet"):
        qjax.lower(model, x)


class FloatNet(nnx.Module):
    """A list, a layer with two names, a chain."""

    def __init__(self, rngs):
        window = {"kernel_size": (3, 3), "rngs": rngs}
        self.body = nnx.List([nnx.Conv(2, 4, **window), nnx.Conv(4, 4, **window)])
        self.head = self.tied = nnx.Linear(64, 3, rngs=rngs)
        self.end = nnx.Sequential(nnx.relu, nnx.Linear(3, 2, rngs=rngs))

    def __call__(self, x):
        for layer in self.body:
            x = nnx.relu(layer(x))
        return self.end(self.tied(x.reshape(x.shape[0], -1)))


@pytest.mark.kept
def test_models_turn_into_quantized_ones_and_back():
    model, x = FloatNet(nnx.Rngs(0)), images(6, 4, 4, 2)
    run = nnx.jit(lambda m, x: m(x))
    wanted, params = run(model, x), jax.tree.leaves(nnx.state(model, nnx.Param))
    assert qn.to_quantized(model, words()) is model and model.head is model.tied
    layers = (*model.body, model.head, model.end.layers[1])
    sites = [layer.site for layer in layers]
    assert sites == ["body/0", "body/1", "head", "end/layers/1"]
    run(model, x)
    model.eval()
    found = run(model, x)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    program = qjax.lower(model, x)
    report = qjax.verify(program, model, x)
    assert report.is_exact and [*report.sites] == [f"{s}/input" for s in sites]
    qn.to_float(model)
    assert {type(layer) for layer in layers} == {nnx.Conv, nnx.Linear}
    np.testing.assert_array_equal(run(model, x), wanted)
    assert not jax.tree.leaves(nnx.state(model, qn.QuantState))
    kept = jax.tree.leaves(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_what_a_folded_layer_folds_stays():
    make = lambda: nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model = nnx.Sequential(qn.QFoldedBatchNorm(make(), norm), make())
    qn.to_quantized(model)
    layer, head = model.layers
    kinds = type(layer.layer), type(layer.norm), type(head)
    assert kinds == (nnx.Linear, nnx.BatchNorm, qn.QLinear)


def test_some_layers_of_a_model_stay():
    model = FloatNet(nnx.Rngs(0))
    qn.to_quantized(model, lambda path, _: None if "body" in path else words())
    assert type(model.body[0]) is nnx.Conv and type(model.head) is qn.QLinear
    with pytest.raises(ValueError, match="has no range yet"):
        qn.to_quantized(model, words()).eval()
        model(images(6, 4, 4, 2))
    with pytest.raises(ValueError, match="no layer to quantize"):
        qn.to_quantized(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    model = FloatNet(nnx.Rngs(0))
    with pytest.raises(ValueError, match="axis"):
        qn.to_quantized(model, LayerQuantizers(input=QSpec(8, axis=3)))
    assert type(model.body[0]) is nnx.Conv and type(model.head) is nnx.Linear
    assert not jax.tree.leaves(nnx.state(model, qn.QuantState))
