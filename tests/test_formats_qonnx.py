"""QONNX files, written here by `onnx.helper`, against ONNX's reference in float64."""

import jax
import numpy as np
import pytest
from onnx import numpy_helper

import qjax
from qjax.formats.qonnx import read_qonnx
from tests.qonnx_cases import _ROUND, Net, _dyadic, _residual, check, oracle


def _bipolar_mlp():
    rng = np.random.default_rng(0)
    net = Net((1, 3, 4))
    y = net.add("Reshape", "x", np.int64([1, -1]))
    y = net.add("Sub", net.add("Mul", y, 2.0), [1.0])
    y = net.add("BipolarQuant", y, 1.0)
    for size in (16, 8):
        width = 12 if size == 16 else 16
        w = net.add("BipolarQuant", rng.integers(-1, 2, (width, size)), 1.0)
        y = net.batch_norm(net.add("MatMul", y, w), rng, size)
        y = net.add("BipolarQuant", y, 0.5)
    w = net.add("BipolarQuant", rng.normal(size=(8, 5)), 0.25)
    y = net.add("Add", net.add("Mul", net.add("MatMul", y, w), 0.5), [-0.375])
    x = _dyadic(rng, (64, 3, 4))
    x[:, 0] = 0.5  # The sign of 0.
    return net.model(y), x


def _conv_net():
    """2 bits, a scale for each channel, groups, pads, pools, one truncated."""
    rng = np.random.default_rng(1)
    net = Net((1, 3, 9, 8))
    narrow = {"signed": 1, "narrow": 1}
    y = net.quant("x", 0.25, 4)
    scale = np.ldexp(1.0, rng.integers(-3, 0, (6, 1, 1, 1)))
    w = net.quant(rng.normal(size=(6, 3, 3, 3)), scale, 2, **narrow)
    y = net.add("Conv", y, w, kernel_shape=[3, 3], pads=[1, 0, 2, 1], strides=[2, 1])
    y = net.add("Relu", net.batch_norm(y, rng, 6))
    y = net.quant(y, 0.5, 2, signed=0)
    y = net.add("MaxPool", y, kernel_shape=[2, 2], strides=[1, 1], pads=[0, 1, 1, 0])
    w = net.quant(rng.normal(size=(6, 1, 3, 3)), scale, 3, **narrow)
    y = net.add("Conv", y, w, rng.normal(size=6).round(1) * 0 + 0.125, group=6)
    y = net.add("Clip", y, -1.0, 1.5)
    y = net.quant(y, 0.125, 5)
    y = net.add("AveragePool", y, kernel_shape=[2, 2], strides=[2, 1])
    y = net.add("Trunc", y, 1 / 32, 0.0, 7.0, 0.125, 0.0, 4.0, rounding_mode="FLOOR")
    y = net.add("GlobalAveragePool", y)
    y = net.quant(net.add("Flatten", y), 2**-4, 6, rounding_mode="CEIL")
    w = net.quant(rng.normal(size=(4, 6)), np.full((4, 1), 0.25), 3, **narrow)
    y = net.add("Gemm", y, w, [0.5, -0.25, 0.0, 1.0], transB=1)
    return net.model(y), _dyadic(rng, (8, 3, 9, 8))


def _wide():
    """Accumulators of more than 16 bits, quantized biases, a sum of two grids."""
    rng = np.random.default_rng(2)
    net = Net((1, 4, 6), opset=9)
    y = net.quant("x", 2**-5, 8)
    w = net.quant(rng.normal(size=(5, 4, 3)), 2**-6, 8, narrow=1)
    b = net.quant(rng.normal(size=5), 2**-11, 16)
    y = net.add("Conv", y, w, b, pads=[1, 1])
    a = net.quant(net.add("Relu", net.batch_norm(y, rng, 5)), 2**-4, 8, signed=0)
    b = net.quant(y, 2**-3, 8, rounding_mode="FLOOR")
    y = net.quant(net.add("Add", a, b), 2**-3, 8)
    y = net.add("Transpose", y, perm=[0, 2, 1])
    w = net.quant(rng.normal(size=(5, 3)), 2**-6, 8)
    y = net.add("Mul", net.add("MatMul", y, w), [1.0, -0.5, 0.25])
    y = net.add("BipolarQuant", net.add("Add", y, [0.25, -0.5, 2.0]), 1.0)
    return net.model(y), _dyadic(rng, (16, 4, 6))


def _exported():
    """What exporters leave: shapes computed, weights moved and rescaled, thresholds."""
    rng = np.random.default_rng(3)
    net = Net((1, 6, 6, 2))
    y = net.add("Transpose", net.quant("x", 0.25, 4), perm=[0, 3, 1, 2])
    w = net.quant(rng.normal(size=(3, 3, 2, 4)), 0.5, 3)
    w = net.add("Transpose", net.add("Mul", w, 0.5), perm=[3, 2, 0, 1])
    y = net.add("Conv", y, w, auto_pad="SAME_UPPER", strides=[2, 2])
    steps = np.sort(rng.integers(-24, 24, (4, 3)) / 8.0)
    y = net.add("MultiThreshold", y, steps, out_scale=0.5, out_bias=-1.0)
    y = net.add("Identity", net.add("Pad", y, np.int64([0, 0, 1, 0, 0, 0, 0, 1])))
    size = net.add("Gather", net.add("Shape", y), np.int64(0), axis=0)
    size = net.add("Unsqueeze", size, np.int64([0]))
    size = net.add("Concat", size, np.int64([-1]), axis=0)
    y = net.add("Reshape", y, size)
    y = net.add("Concat", y, y, axis=1)
    half = rng.integers(-1, 2, (128, 3)).astype(np.float32)
    y = net.add("Tanh", net.add("Div", net.add("MatMul", y, half), 16.0))
    return net.model(net.quant(y, 0.25, 4, zero=3.0, signed=0)), _dyadic(
        rng, (8, 6, 6, 2)
    )


_FAMILIES = {
    "bipolar mlp": _bipolar_mlp,
    "convolutions": _conv_net,
    "wide": _wide,
    "exported": _exported,
    "residual": _residual,
}


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize("name", _FAMILIES)
def test_families_equal_the_oracle(name):
    check(*_FAMILIES[name]())


@pytest.mark.parametrize("rows", [1, 4])
def test_thresholds_of_accumulators_of_more_than_16_bits(rows):
    rng = np.random.default_rng(0)
    net = Net((1, 16))
    w = net.quant(rng.normal(size=(16, 4)), 2.0**-9, 12, narrow=1)
    y = net.add("MatMul", net.quant("x", 2.0**-8, 12), w)
    steps = np.sort(rng.integers(-(2**16), 2**16, (rows, 7)) * 2.0**-15, -1)
    y = net.add("MultiThreshold", y, steps, out_scale=0.5, out_bias=-1.0)
    x = np.float32(rng.integers(-(2**11), 2**11, (32, 16)) * 2.0**-9)
    program = check(net.model(y), x)
    assert "thresholds" in [node.operation for node in program.graph.nodes]


_PATHS = ("raw", "table", "wide")


def _before_quantizer(net, path, rng):
    """Values: an input, a sum of 16 bits, or one of more, with ties."""
    if path == "raw":
        return net.add("Sub", net.add("Mul", "x", 0.5), 0.25)
    bits, scale = (4, 0.25) if path == "table" else (12, 2**-8)
    y = net.quant("x", scale, bits)
    w = net.quant(rng.normal(size=(4, 4)), 2 ** (1.0 - bits), bits, narrow=1)
    return net.add("Add", net.add("MatMul", y, w), [0.0, 0.25, -0.5, 0.125])


def _rounded(net, y, mode, is_table):
    """Zero points are odd: they move the ties to the other codes."""
    is_symmetric = mode in ("UP", "DOWN", "HALF_UP", "HALF_DOWN")
    signed = int(is_table or not is_symmetric)
    zero = 0.0 if is_symmetric and not is_table else 1.0
    word = {"signed": signed, "narrow": 1, "rounding_mode": mode}
    return net.quant(y, 0.25, 3, zero, **word)


@pytest.mark.parametrize("path", ["table", "wide"])
def test_roundings_at_ties(path):
    rng = np.random.default_rng(5)
    net = Net((1, 4))
    y = _before_quantizer(net, path, rng)
    parts = [_rounded(net, y, mode, path == "table") for mode in _ROUND]
    model = net.model(*parts)
    read = read_qonnx(model.SerializeToString())
    x = _dyadic(rng, (64, 4), bits=3)
    for found in (jax.jit(read)(x), qjax.lower(read, *read.inputs)(x)):
        for y, name in zip(found, parts, strict=True):
            np.testing.assert_array_equal(y, oracle(net.model(name), x))


@pytest.mark.parametrize("mode", _ROUND)
def test_roundings_of_inputs(mode):
    rng = np.random.default_rng(5)
    net = Net((1, 4))
    y = _rounded(net, _before_quantizer(net, "raw", rng), mode, False)
    check(net.model(y), _dyadic(rng, (64, 4), bits=3))


def test_signed_roundings_of_inputs_without_integers():
    net = Net((1, 4))
    y = net.quant("x", 0.5, 4, rounding_mode="HALF_UP")
    read = read_qonnx(net.model(y).SerializeToString())
    x = _dyadic(np.random.default_rng(6), (64, 4), bits=2)
    np.testing.assert_array_equal(read(x), oracle(net.model(y), x))
    with pytest.raises(ValueError, match="rounds by `half_away`"):
        qjax.lower(read, *read.inputs)


@pytest.mark.parametrize("path", _PATHS)
def test_signs_of_zero(path):
    rng = np.random.default_rng(6)
    net = Net((1, 4))
    y = _before_quantizer(net, path, rng)
    y = net.add("BipolarQuant", net.add("Mul", y, [[1.0, 1.0, 1.0, 1.0]]), 0.5)
    x = _dyadic(rng, (64, 4), bits=3)
    x[::2] = 0.5 if path == "raw" else 0.0
    check(net.model(y), x)


def test_a_raw_input_just_below_a_threshold():
    net = Net((1, 3))
    y = net.add("Sub", net.add("Mul", "x", 2.0), 1.0)
    model = net.model(net.add("BipolarQuant", y, 1.0))
    x = np.float32([[0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0.75]])
    read = read_qonnx(model.SerializeToString())
    program = qjax.lower(read, *read.inputs)
    np.testing.assert_array_equal(program(x), [[1, -1, 1]])
    np.testing.assert_array_equal(read(x), [[1, -1, 1]])


def test_truncation_without_an_output_scale():
    net = Net((1, 4, 4, 4))
    y = net.quant("x", 0.25, 4, signed=0)
    y = net.add("AveragePool", y, kernel_shape=[4, 4])
    y = net.add("Mul", y, 16.0)
    y = net.add("Trunc", y, 0.25, 0.0, 8.0, 4.0, rounding_mode="FLOOR")
    check(net.model(y), _dyadic(np.random.default_rng(7), (16, 4, 4, 4)) + 1)


def _branches(net, y):
    """What may lie between a product and its quantizer."""
    one = {"kernel_shape": [2, 2], "strides": [2, 2]}
    bias, mean = np.float32([[0.5, -1, 0, 0.25], [0.5, -1, 0, 0.25]])
    gain = [-1.0, 0.5, 2.0, 0.0]
    normal = net.add("BatchNormalization", y, gain, bias, mean, np.ones(4), epsilon=0.0)
    relu, flat = net.add("Relu", normal), net.add("Flatten", normal)
    turned = net.add("Transpose", normal, perm=[0, 2, 3, 1])
    turned = net.add("Relu", net.add("Add", turned, bias))
    unsigned = {"signed": 0, "rounding_mode": "ROUND"}
    coarse = net.quant(y, 0.5, 4)
    mean = net.add("ReduceMean", net.add("Relu", coarse), axes=[2, 3], keepdims=0)
    return [
        net.quant(net.add("MaxPool", relu, **one), 0.5, 4, **unsigned),
        net.quant(net.add("MaxPool", normal, **one), 0.5, 4),
        net.quant(flat, 0.5, 4),
        net.quant(net.add("Transpose", turned, perm=[0, 3, 1, 2]), 0.5, 4),
        net.quant(net.add("Mul", net.add("Flatten", relu), 0.5), 0.5, 4),
        net.add("BipolarQuant", flat, 1.0),
        net.quant(mean, 0.125, 6),
        net.add("ArgMax", net.add("Flatten", coarse), axis=1),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 11])
def test_what_lies_between_a_product_and_its_quantizer(bits):
    rng = np.random.default_rng(12)
    net = Net((1, 3, 6, 6))
    scale = np.ldexp(1.0, rng.integers(-3, 0, (4, 1, 1, 1)))
    w = net.quant(rng.normal(size=(4, 3, 3, 3)), scale, bits - 1)
    y = net.add("Conv", net.quant("x", 0.25, bits), w, pads=[1] * 4)
    names = _branches(net, y)
    x = _dyadic(rng, (4, 3, 6, 6), bits=4)
    read = read_qonnx(net.model(*names).SerializeToString())
    found = qjax.lower(read, *read.inputs)(x)
    for y, name in zip(found, names, strict=True):
        np.testing.assert_array_equal(y, oracle(net.model(name), x))


def test_any_scales_are_off_by_a_code_at_most_at_ties():
    rng = np.random.default_rng(8)
    net = Net((1, 16))
    y = net.quant("x", 0.0123, 8)
    for bits in (4, 8):
        scale = rng.uniform(0.01, 0.02, (1, 16))
        w = net.quant(rng.normal(size=(16, 16)) / 10, scale, bits, narrow=1)
        y = net.add("MatMul", y, w)
        params = [rng.normal(size=16) for _ in range(3)]
        y = net.add("BatchNormalization", y, *params, rng.uniform(0.1, 2, 16))
        y = net.quant(net.add("Relu", y), 0.0171, 8, signed=0)
    model, x = net.model(y), rng.normal(size=(512, 16)).astype(np.float32)
    read = read_qonnx(model.SerializeToString())
    codes = qjax.lower(read, *read.inputs)(x) / np.float32(0.0171)
    off = np.abs(np.rint(codes) - np.rint(oracle(model, x) / np.float32(0.0171)))
    assert off.max() <= 1 and np.mean(off) < 1e-3


def test_one_bit_words_are_bipolar():
    rng = np.random.default_rng(9)
    net = Net((1, 6))
    y = net.quant("x", 0.5, 1)
    w = net.add("IntQuant", rng.normal(size=(6, 4)), 0.25, 0.0, 1.0)
    net.add("MatMul", y, w)
    read = read_qonnx(net.model("matmul2").SerializeToString())
    x = _dyadic(rng, (8, 6))
    w = np.float32(numpy_helper.to_array(net.constants[3]))
    wanted = np.where(x >= 0, 0.5, -0.5) @ np.where(w >= 0, 0.25, -0.25)
    np.testing.assert_array_equal(qjax.lower(read, *read.inputs)(x), wanted)


def test_softmax_stays_outside_and_inputs_get_a_grid():
    rng = np.random.default_rng(10)
    net = Net((1, 6))
    w = net.quant(rng.normal(size=(6, 4)), 0.25, 4)
    logits = net.add("MatMul", "x", w)
    data = net.model(net.add("Softmax", logits)).SerializeToString()
    x = _dyadic(rng, (8, 6), bits=4)
    with pytest.raises(ValueError, match="not quantized: it is input 0"):
        read = read_qonnx(data, outputs=[logits])
        qjax.lower(read, *read.inputs)
    grid = qjax.QParams(np.float32(2**-4), np.int32(3)), qjax.QSpec(8)
    read = read_qonnx(data, outputs=[logits], input_grid=grid)
    program = qjax.lower(read, *read.inputs)
    wanted = oracle(net.model(logits), x)
    np.testing.assert_array_equal(program(x), wanted)
    soft = read_qonnx(data)(x)
    np.testing.assert_allclose(soft, jax.nn.softmax(wanted), rtol=1e-6)
