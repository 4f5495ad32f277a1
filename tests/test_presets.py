"""Schemes by name: what they give each site of a model, and that they lower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import presets
from qjax.affine import QSpec
from qjax.quantizers import QuantizedBits, QuantizedRelu, parse
from qjax.quantizers.two_levels import Binary
from tests.models import images, linen_example

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


class Net(nn.Module):
    """Convolutions of both kinds, a sum, a function, a concatenation, a mean."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        y = nn.relu6(nn.Conv(4, (3, 3), feature_group_count=4, name="dw")(x))
        x = nn.relu(x + nn.Conv(4, (1, 1), name="pw")(y))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    return linen_example(Net(), images(17, 6, 5, 2))


def words(model, scheme):
    qmodel = qjax.quantize_model(model.fn, model.params, model.x, scheme=scheme)
    return {site.name: qmodel.scheme.spec(site) for site in qmodel.sites}


WEIGHT, OUTPUT = QSpec(8, narrow_range=True, axis=-1), QSpec(8)


QML_OUT = QSpec(8, symmetric=True, power_of_two=True, axis=-1)


QML_IN = QSpec(8, signed=False, power_of_two=True)


@pytest.mark.parametrize(
    "scheme, kernels, values",
    [
        (presets.tflite_int8(), [WEIGHT] * 4, [OUTPUT] * 7),
        (
            presets.tflite_int16x8(),
            [WEIGHT] * 4,
            [QSpec(16, symmetric=True, narrow_range=True)] * 7,
        ),
        (
            presets.tfmot_int8(),
            [*[WEIGHT] * 3, QSpec(8, narrow_range=True)],
            [OUTPUT] * 7,
        ),
        (presets.w4a8(), [QSpec(4, narrow_range=True, axis=-1)] * 4, [OUTPUT] * 7),
        (
            presets.binary(activation_bits=4),
            [WEIGHT, *[Binary(alpha="auto")] * 2, WEIGHT],
            [QSpec(4)] * 7,
        ),
    ],
)
def test_words_of_a_model(net, scheme, kernels, values):
    found = words(net, scheme)
    is_kernel = lambda name: name.endswith("kernel")
    assert [v for k, v in found.items() if is_kernel(k)] == kernels
    assert [v for k, v in found.items() if not is_kernel(k)] == values


def test_words_of_quantizeml(net):
    found = words(net, presets.quantizeml())
    assert found["input:0"] == QML_IN
    assert found["stem/kernel"] == found["head/kernel"] == WEIGHT
    assert found["stem/output"] == found["dw/output"] == QML_OUT
    assert found["residual_0/output"] is None  # A mean reads it.
    assert found["output:0"] is None
    params = dict(input_weight_bits=6, weight_bits=4, activation_bits=5, output_bits=7)
    more = dict(per_tensor_activations=True, input_dtype="int8", last_output_bits=9)
    found = words(net, presets.quantizeml(**params, **more))
    by_name = {k: (w.bits, w.signed, w.axis) for k, w in found.items() if w}
    assert by_name == {
        "input:0": (8, True, None),
        "stem/kernel": (6, True, -1),
        "stem/output": (5, False, None),
        "dw/kernel": (4, True, -1),
        "dw/output": (5, False, None),
        "pw/kernel": (4, True, -1),
        "pw/output": (7, True, None),
        "mean_0/output": (5, True, None),  # Of a relu.
        "head/kernel": (4, True, -1),
        "output:0": (9, True, None),
    }


@pytest.mark.parametrize(
    "scheme",
    [
        presets.tflite_int8(),
        pytest.param(presets.w4a8(), marks=pytest.mark.heavy),
        presets.quantizeml(per_tensor_activations=True, weight_bits=4),
        presets.qkeras(
            {
                "*stem": {
                    "kernel_quantizer": "quantized_bits(4,0,1)",
                    "activation": "quantized_relu(6,2)",
                },
                "*dw": {"depthwise_quantizer": "quantized_bits(5,1,alpha='auto_po2')"},
                "*pw": {"kernel_quantizer": "ternary(alpha='auto')"},
            },
            base=presets.tflite_int8(),
        ),
    ],
    ids=["tflite", "w4a8", "quantizeml", "qkeras"],
)
def test_they_lower_and_agree(net, scheme):
    fn, params, x = net
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in report.sites.values())
    assert all(row.share >= 0.99 for row in report.outputs)
    error = np.abs(np.asarray(program(x)) - np.asarray(fn(params, x)))
    if scheme == presets.tflite_int8():
        assert np.max(error) < 0.05 * np.ptp(fn(params, x))


def test_sixteen_bits_lower_where_int32_holds_them():
    """9 products of 8 by 16 bits fit; 36 of the largest do not, and that is said."""
    fn = lambda params, x: x @ params["w"]
    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.normal(size=(9, 3)))}
    x = np.float32(rng.normal(size=(5, 9)))
    scheme = presets.tflite_int16x8()
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    codes = program.codes(*program.quantize_inputs(x))
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in report.sites.values())
    assert np.asarray(codes).dtype == np.int16


def test_qkeras_names_quantizers_by_layer(net):
    layers = {
        "*stem": {
            "kernel_quantizer": "quantized_bits(4,0,1)",
            "activation": "quantized_relu(4)",
        },
        "*head": {"kernel_quantizer": None},
    }
    found = words(net, presets.qkeras(layers))
    assert found["stem/kernel"] == parse("quantized_bits(4,0,1)")
    assert found["stem/kernel"] == QuantizedBits(4, 0, True)
    assert found["stem/output"] == QuantizedRelu(4)
    assert {k for k, w in found.items() if w is not None} == {
        "stem/kernel",
        "stem/output",
    }
    both = words(net, presets.qkeras(layers, base=presets.w4a8()))
    assert both["dw/kernel"].bits == 4 and both["head/kernel"] is None
    with pytest.raises(ValueError, match="stem.gamma_quantizer: wanted is one of"):
        presets.qkeras({"stem": {"gamma_quantizer": "quantized_bits(8)"}})
    with pytest.raises(ValueError, match="stem: names of quantizers by key"):
        presets.qkeras({"stem": "quantized_bits(8)"})
    with pytest.raises(ValueError, match="stem.kernel_quantizer: .*quantized_bit"):
        presets.qkeras({"stem": {"kernel_quantizer": "quantized_bit(8)"}})
    one = {"stim": {"kernel_quantizer": "quantized_bits(8)"}}
    with pytest.raises(ValueError, match="'stim' matches no layer. The closest is"):
        words(net, presets.qkeras(one))


def _bits_in_numpy(x, bits, integer):
    """QKeras's ``quantized_bits(bits, integer, 1)``."""
    n = 2.0 ** (bits - 1)
    return 2.0**integer * np.clip(np.rint(x * n / 2.0**integer), 1 - n, n - 1) / n


def _two_products():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("f")
    params = {
        "a": {"kernel": draw(4, 6), "bias": draw(6)},
        "b": {"kernel": draw(6, 3), "bias": draw(3)},
    }

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
        return h @ p["b"]["kernel"] + p["b"]["bias"][None]

    return fn, params, draw(9, 4)


@pytest.mark.slow
@pytest.mark.kept
def test_biases_are_those_of_qkeras():
    fn, params, x = _two_products()
    kernel = {"kernel_quantizer": "quantized_bits(4,1,1,alpha=1)"}
    a = {"bias_quantizer": "quantized_bits(6,1,1)", "activation": "quantized_relu(4,2)"}
    b = {"bias_quantizer": "quantized_po2(4)", "activation": "linear"}
    first = {"activation": "quantized_bits(8,2,1)"}
    layers = {"input:0": first, "a": {**kernel, **a}, "b": {**kernel, **b}}
    scheme = presets.qkeras(layers)
    assert qjax.Scheme.from_json(scheme.to_json()) == scheme
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    own, end = params["a"], params["b"]
    h = _bits_in_numpy(x, 8, 2) @ _bits_in_numpy(own["kernel"], 4, 1)
    h = np.maximum(h + _bits_in_numpy(own["bias"], 6, 1), 0)
    h = 4 * np.clip(np.rint(h * 4) / 16, 0, 15 / 16)
    exponent = np.clip(np.rint(np.log2(np.abs(end["bias"]))), -4, 3)
    bias = np.sign(end["bias"]) * 2.0**exponent
    wanted = h @ _bits_in_numpy(end["kernel"], 4, 1) + bias
    np.testing.assert_array_equal(jax.jit(qmodel.apply)(params, qstate, x), wanted)
    program = qjax.lower(qmodel, params, qstate, x)
    np.testing.assert_array_equal(program(x), wanted)
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact
    with pytest.raises(ValueError, match="bias of 'a' .* Use `apply`"):
        jax.eval_shape(qmodel.apply_integer, params, qstate, x)
    loss = lambda p: qmodel.apply(p, qstate, x).sum()
    grads = jax.jit(jax.grad(loss))(params)
    np.testing.assert_array_equal(grads["b"]["bias"], np.full(3, 9.0))


def test_biases_of_fewer_bits_on_steps_of_their_accumulator():
    fn, params, x = _two_products()
    config = {
        "a": {"bias_quantizer": {"bitwidth": 8}},
        "b": {"bias_quantizer": {"bitwidth": 4}},
    }
    qparams = qjax.QuantizationParams()
    qmodel = qjax.quantize_model(fn, params, x, qparams=qparams, q_config=config)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact
    y = program(x)
    np.testing.assert_array_equal(jax.jit(qmodel.apply_integer)(params, qstate, x), y)
    grids = qjax.scales(qmodel, params, qstate)
    unit = np.ravel(grids["input:0"].scale * grids["a/kernel"].scale)
    zero = int(grids["input:0"].zero_point) - 128  # Codes are stored as int8.
    kernel = np.int64(program.params["a/kernel"])
    codes = np.ravel(program.params["a/bias"]) + zero * kernel.sum(0)
    # At most 7 bits and the sign, then zeros.
    steps = 2.0 ** np.maximum(
        np.ceil(np.log2(np.abs(params["a"]["bias"]) / unit)) - 7, 0
    )
    wanted = np.clip(np.rint(params["a"]["bias"] / unit / steps), -128, 127) * steps
    np.testing.assert_array_equal(codes, wanted)


def test_the_weights_of_a_separable_convolution():
    def fn(p, x):
        own, spec = p["sep"], ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            x,
            own["depthwise_kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=spec,
            feature_group_count=3,
        )
        h = jax.lax.conv_general_dilated(
            h, own["pointwise_kernel"], (1, 1), "SAME", dimension_numbers=spec
        )
        return h + own["bias"][None, None, None]

    params = {
        "sep": {
            "depthwise_kernel": jnp.ones((3, 3, 1, 3)),
            "pointwise_kernel": jnp.ones((1, 1, 3, 4)),
            "bias": jnp.ones(4),
        }
    }
    x = jnp.ones((2, 4, 4, 3))
    config = {
        "sep": {
            "dw_weight_quantizer": {"bitwidth": 6},
            "pw_weight_quantizer": {"bitwidth": 3},
            "bias_quantizer": {"bitwidth": 5},
        }
    }
    qmodel = qjax.quantize_model(fn, params, x, q_config=config)
    bits = {
        s.name: qmodel.scheme.spec(s).bits for s in qmodel.sites if "kern" in s.name
    }
    assert bits == {"sep/depthwise_kernel": 6, "sep/pointwise_kernel": 3}
    assert qmodel.scheme.bias_spec(qmodel.biases[0]).bits == 5
    names = {
        "depthwise_quantizer": "quantized_bits(4,0,1)",
        "pointwise_quantizer": "quantized_bits(3,0,1)",
        "bias_quantizer": "quantized_bits(3)",
    }
    scheme = presets.qkeras({"sep": names})
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    bits = {
        s.name: qmodel.scheme.spec(s).bits for s in qmodel.sites if "kern" in s.name
    }
    assert bits == {"sep/depthwise_kernel": 4, "sep/pointwise_kernel": 3}
    assert qmodel.scheme.bias_spec(qmodel.biases[0]) == QuantizedBits(3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weight_bits=1), "`weight_bits` must be a whole number from 2 to 16"),
        (dict(activation_bits=0), "`activation_bits` .* from 1 to 16, got 0"),
        (dict(buffer_bits=33), "`buffer_bits` .* from 2 to 32"),
        (dict(output_bits=8.5), "`output_bits` .* got 8.5"),
        (dict(input_dtype="float32"), "`input_dtype` must be an integer type"),
        (dict(weigth_bits=4), "no 'weigth_bits'. The closest is 'weight_bits'"),
    ],
)
def test_impossible_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        presets.quantizeml(**options)


def test_functions_have_tflites_fixed_grids():
    fn = lambda params, x: jax.nn.sigmoid(x @ params["w"]) @ params["v"]
    params = {"w": jnp.eye(3), "v": jnp.eye(3)}
    x = np.linspace(-4, 4, 6, dtype=np.float32).reshape(2, 3)
    qmodel = qjax.quantize_model(fn, params, x, scheme=presets.tflite_int8())
    qstate = qjax.calibrate(qmodel, params, [x])
    name = next(s.name for s in qmodel.sites if s.op in ("logistic", "sigmoid"))
    row = qjax.scales(qmodel, params, qstate)[name]
    assert row.scale == 1 / 256 and row.zero_point == -128


def test_tfmot_is_good_after_calibration_alone_and_moves_from_there():
    """Ranges of the data, which training's moving averages then go on from."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: np.float32(rng.normal(size=shape))
    params, x = {"a": draw(8, 16) / 3, "b": draw(16, 4) / 4}, draw(40, 8)
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    qmodel = qjax.quantize_model(fn, params, x, scheme=presets.tfmot_int8())
    qstate = qjax.calibrate(qmodel, params, [x[:7], x[7:]])
    exact = np.asarray(fn(params, x))
    state = qstate["output:0"]
    np.testing.assert_allclose(
        [state.low, state.high], [exact.min(), exact.max()], 1e-5
    )
    off = np.asarray(jax.jit(qmodel.apply)(params, qstate, x)) - exact
    assert 10 * np.log10(np.sum(exact**2) / np.sum(off**2)) > 32  # [-6, 6]: 24.
    y, moved = jax.jit(qmodel.apply_and_update)(params, qstate, 3 * x)
    most = np.float32(state.high)
    share = np.float32(1 - 0.999)
    grown = most - (most - max(np.max(y), 0)) * share  # What is seen is not clipped:
    assert most < moved["output:0"].high and abs(moved["output:0"].high - grown) < 0.01
