"""QKeras's kernel words, initializers, hardware tensors and `model_quantize`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax import quantizers as qz
from qjax.affine import QSpec
from qjax.layers.hardware import HardwareTensor, hardware_tensor, integers
from qjax.layers.qkeras import (
    kernel_word,
    largest_value,
    quantized_initializer,
)
from qjax.layers.qkeras_models import KerasLayer, converted_layers, qkeras_words
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


def test_a_kernel_without_alpha_finds_a_power_of_two():
    found = kernel_word("quantized_bits(4,0,0)")
    assert found.alpha == "auto_po2" and found.symmetric is True
    assert kernel_word("binary").alpha == "auto_po2"
    for text in ("quantized_bits(4,0,1,alpha=1.0)", "quantized_po2(4)"):
        assert kernel_word(text) == qz.parse(text)


@pytest.mark.parametrize(
    "text, most, widens",
    [
        ("quantized_bits(4,0,1,alpha=1.0)", 1.0, False),
        ("quantized_bits(2,2,1,alpha=1.0)", 4.0, True),
        ("ternary(alpha=0.5)", 0.5, False),
        ("binary(alpha=1.0)", 1.0, True),
        ("quantized_po2(4,2)", 2.0, False),
        ("quantized_bits(3,6,1,alpha=1.0)", 64.0, True),  # All round to 0.
    ],
)
def test_initializers_respect_the_range_of_their_quantizer(text, most, widens):
    spec, draw = qz.parse(text.replace("3,6", "3,3")), nn.initializers.normal(0.3)
    if "3,6" in text:
        spec = qz.QuantizedBits(3, 6, True, alpha=1.0, strict=False)
    assert largest_value(spec) == most
    x = np.asarray(draw(jax.random.key(0), (40, 30), jnp.float32))
    init = jax.jit(quantized_initializer(draw, spec), static_argnums=(1, 2))
    found = np.asarray(init(jax.random.key(0), (40, 30), jnp.float32))
    q = np.asarray(qz.apply(spec, x), np.float64)
    factor = most / np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    if np.any(q):
        factor = max(np.sum(q * q) / np.sum(q * x), 1)
    wanted = np.clip(x * np.sqrt(factor if widens else 1), -most, most)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    automatic = quantized_initializer(draw, "quantized_bits(2,0,1,alpha='auto')")
    np.testing.assert_array_equal(automatic(jax.random.key(0), (40, 30)), x)


def test_a_layer_starts_within_the_range_of_its_kernel():
    text = "quantized_bits(2,0,1,alpha=1.0)"
    init = quantized_initializer(nn.initializers.normal(4.0), text)
    layer = ql.QDense(5, kernel_init=init, quantizers=ql.LayerQuantizers(None, text))
    params = layer.init(jax.random.key(0), images(2, 3))["params"]
    assert np.abs(params["kernel"]).max() == 1.0
    with pytest.raises(TypeError, match=r"quantized_bits\(4,0,1,alpha=1\)"):
        quantized_initializer(nn.initializers.ones, QSpec(8))


@pytest.mark.parametrize(
    "text",
    [
        "quantized_bits(4,1,1)",
        "quantized_bits(4,0,1,alpha='auto_po2')",
        "quantized_bits(5,0,1,alpha='auto')",
        "quantized_linear(4,1)",
        "ternary(alpha='auto_po2')",
        "binary(alpha=0.5)",
        "quantized_bits(1,0,1)",
    ],
)
def test_codes_times_scale_are_the_weight(text):
    w = 2 * images(6, 5)
    found = hardware_tensor(w, text)
    np.testing.assert_array_equal(found.value, qz.apply(qz.parse(text), w))
    product = found.codes.astype(np.float32) * found.scale
    np.testing.assert_array_equal(product, found.value)
    assert found.codes.dtype == np.int32 and found.signs is None


@pytest.mark.parametrize("text", ["quantized_po2(4,2)", "quantized_po2(6)"])
def test_powers_of_two_have_exponents_and_signs(text):
    w = np.concatenate([2 * images(6, 5), np.float32([[0, 1e-9, -1e-9, 4, -1]])])
    found = hardware_tensor(w, text)
    wanted = np.asarray(qz.apply(qz.parse(text), w))
    np.testing.assert_array_equal(found.signs * np.exp2(found.exponents), wanted)
    assert set(np.unique(found.signs)) == {-1, 1} and found.codes is None


def test_a_power_of_two_that_underflows_is_zero():
    """The least one of 8 bits, 2^-128, is no float32 that arithmetic keeps."""
    found = hardware_tensor(np.float32([-1, 0, 2]), "quantized_relu_po2(8)")
    np.testing.assert_array_equal(found.signs * np.exp2(found.exponents), found.value)


def test_functions_and_floats_have_no_integers():
    w = images(3, 2)
    np.testing.assert_array_equal(hardware_tensor(w, jnp.sign).value, np.sign(w))
    assert hardware_tensor(w, None)[1:] == (None,) * 4


def test_a_model_says_the_integers_of_its_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ql.QDense(4, quantizers=ql.LayerQuantizers(output=QSpec(8)))(x)
            x = ql.QActivation("quantized_relu(4,1)")(x)
            own = ql.LayerQuantizers(None, "quantized_po2(4)", "quantized_bits(8,2,1)")
            return ql.QDense(3, quantizers=own, name="last")(x)

    x, net = images(5, 6), Net()
    variables = jax.jit(net.init)(jax.random.key(0), x)
    run = jax.jit(lambda x: net.apply(variables, x))
    with pytest.raises(ValueError, match="'QDense_0/input' has no range yet"):
        integers(run, x)
    see = jax.jit(lambda v, x: net.apply(v, x, mutable=["quant"])[1])
    variables = {**variables, **see(variables, x)}
    run = jax.jit(lambda x: net.apply(variables, x))
    found = integers(run, x)
    ends = ("input", "kernel", "bias", "output")
    names = [f"QDense_0/{n}" for n in ends] + ["QActivation_0/output"]
    assert sorted(found) == sorted([*names, "last/kernel", "last/bias"])
    kernel, bias = found["QDense_0/kernel"], found["QDense_0/bias"]
    program = qjax.lower(run, x)
    shipped = np.asarray(program.params["QDense_0/kernel"])
    np.testing.assert_array_equal(kernel.codes, shipped)
    scale = found["QDense_0/input"].scale * kernel.scale
    np.testing.assert_allclose(bias.scale, scale.reshape(-1), rtol=1e-6)
    assert float(found["QActivation_0/output"].scale) == 2.0**-3
    assert found["last/kernel"].exponents.shape == (4, 3)
    weights = variables["params"]["last"]["kernel"]
    np.testing.assert_array_equal(
        found["last/kernel"].value, qz.apply(qz.parse("quantized_po2(4)"), weights)
    )
    with pytest.raises(ValueError, match="No quantized layer ran"):
        integers(jnp.sin, x)


def test_integers_of_cells_and_of_nnx():
    x = images(2, 3, 4)
    layer = ql.QRNN(ql.QSimpleCell(5))
    variables = layer.init(jax.random.key(0), x)
    _, state = layer.apply(variables, x, mutable=["quant"])
    found = integers(layer.apply, {**variables, **state}, x)
    assert isinstance(found["cell/i/kernel"], HardwareTensor)
    model = qn.QLinear(4, 3, rngs=nnx.Rngs(0))
    model(x)
    model.eval()
    found = integers(nnx.jit(lambda m, x: m(x)), model, x)
    assert sorted(found) == ["bias", "input", "kernel"]
    assert found["kernel"].codes.shape == (4, 3)


BITS, EIGHT = {"kernel_quantizer": "quantized_bits(4,0,1)"}, "quantized_bits(8)"


def test_layers_convert_by_name_then_by_class():
    layers = [
        KerasLayer("a", "Conv2D", "relu"),
        KerasLayer("n", "BatchNormalization"),
        KerasLayer("b", "Dense", "softmax"),
        KerasLayer("s", "SeparableConv2D"),
        KerasLayer("r", "LSTM", "tanh"),
        KerasLayer("p", "GlobalAveragePooling2D"),
        KerasLayer("x", "LeakyReLU"),
    ]
    config = {
        "QConv2D": {**BITS, "bias_quantizer": "quantized_bits(8,3,1)"},
        "QDense": BITS,
        "b": {
            "kernel_quantizer": "binary",
            "activation_quantizer": "quantized_bits(8)",
        },
        "QSeparableConv2D": {
            "depthwise_quantizer": "ternary",
            "pointwise_quantizer": "quantized_po2(4)",
        },
        "QLSTM": {**BITS, "recurrent_quantizer": "binary", "state_quantizer": "binary"},
        "QActivation": {"leakyrelu": "quantized_relu(4,1,negative_slope=0.25)"},
        "QBatchNormalization": {"gamma_quantizer": "quantized_po2(5)"},
    }
    found = {x.name: x for x in converted_layers(layers, config, 3)}
    a = found["a"]
    assert a.cls == "QConv2D" and a.activation == qz.parse("quantized_relu(3)")
    assert a.quantizers[0].alpha == "auto_po2" and a.quantizers[1].alpha is None
    assert found["b"].quantizers == (kernel_word("binary"), None)
    assert found["b"].activation == qz.parse("quantized_bits(8)")
    assert found["n"].quantizers == (qz.parse("quantized_po2(5)"), *(None,) * 4)
    assert [w and w.name for w in found["s"].quantizers] == [
        *("ternary", "quantized_po2", None)
    ]
    words = found["r"].quantizers
    assert [getattr(w, "alpha", w) for w in words] == ["auto_po2"] * 2 + [None] * 2
    assert found["p"].cls == "GlobalAveragePooling2D" and not found["p"].quantizers
    assert found["x"].activation.negative_slope == 0.25
    folded = converted_layers(layers, config, 3, folds=True)
    assert [x.name for x in folded] == ["a", "b", "s", "r", "p", "x"]
    assert folded[0].cls == "QConv2DBatchnorm"


def test_a_dictionary_gives_the_words_of_a_layer():
    config = {"fc": {**BITS, "bias_quantizer": "quantized_bits(8,3,1)"}}
    words = qkeras_words(KerasLayer("fc", "Dense", "relu"), config, 4, input=QSpec(8))
    assert words.kernel == kernel_word("quantized_bits(4,0,1)")
    assert words.output == qz.parse("quantized_relu(4)") and words.input == QSpec(8)
    assert qkeras_words(KerasLayer("fc2", "Dense"), config) is None
    layer, x = ql.QDense(4, quantizers=words), images(3, 5)
    variables = layer.init(jax.random.key(0), x)
    _, state = layer.apply(variables, x, mutable=["quant"])
    found = layer.apply({**variables, **state}, x)
    np.testing.assert_array_equal(found, qz.apply(words.output, found))


@pytest.mark.parametrize(
    "config, words",
    [
        ({"a": {"kernel": "binary"}}, "a: wanted is one of kernel_quantizer"),
        ({"QDense": {"kernel_quantizer": "binry"}}, "a.kernel_quantizer: .*binary"),
        ({"QDense": "binary"}, "a: names of quantizers by key"),
    ],
)
def test_a_wrong_dictionary_names_the_layer(config, words):
    with pytest.raises(ValueError, match=words):
        converted_layers([KerasLayer("a", "Dense")], config, 8)


class FloatNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.wide = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.act = nnx.PReLU()
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.act(self.wide(x)).mean((1, 2)))


@pytest.mark.slow
@pytest.mark.kept
def test_a_dictionary_turns_a_model_and_back():
    x, model = images(4, 5, 5, 2), FloatNet(nnx.Rngs(0))
    run = nnx.jit(lambda m, x: m(x))
    run(model, x)
    kinds = {name: type(getattr(model, name)) for name in "conv norm wide head".split()}
    model.eval()
    wanted = run(model, x)
    config = {
        "QConv2D": BITS,
        "QDepthwiseConv2D": {"depthwise_quantizer": "ternary"},
        "head": {**BITS, "bias_quantizer": "quantized_bits(8,3,1)"},
        "QBatchNormalization": {"mean_quantizer": "quantized_po2(5)"},
    }
    choose = qn.qkeras_quantizers(config, input="quantized_bits(8,3,1)")
    qn.to_quantized(model, choose)
    assert type(model.wide) is qn.QConv and type(model.norm) is qn.QBatchNorm
    assert model.wide.quantizers.kernel == kernel_word("ternary")
    assert model.norm.quantizers.mean == qz.parse("quantized_po2(5)")
    assert type(model.act) is nnx.PReLU and model.norm.use_running_average
    found = integers(run, model, x)
    assert found["wide/kernel"].codes.shape == (3, 3, 1, 4)
    assert np.abs(found["wide/kernel"].codes).max() == 1
    qn.to_float(model)
    assert {n: type(getattr(model, n)) for n in kinds} == kinds
    assert model.norm.use_running_average
    np.testing.assert_array_equal(run(model, x), wanted)


def test_a_batch_norm_turns_by_words_of_its_own_alone():
    model = FloatNet(nnx.Rngs(0))
    qn.to_quantized(model)
    assert type(model.norm) is nnx.BatchNorm and type(model.act) is qn.QPReLU
    assert type(model.conv) is qn.QConv
    x = images(4, 5, 5, 2)
    model(x)
    model.eval()
    sites = qjax.verify(qjax.lower(model, x), model, x).sites
    assert "act/output" in sites
    assert all(row.max_difference <= 1 for row in sites.values())
