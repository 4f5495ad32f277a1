"""QONNX files, written here by `onnx.helper`, against ONNX's reference in float64."""

import contextlib
import os
import pathlib
import sys

import jax
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import qjax
from qjax.formats.qonnx import read_qonnx

# Writing files.

_DOMAIN = "qonnx.custom_op.general"
_CUSTOM = ("BipolarQuant", "FloatQuant", "IntQuant", "MultiThreshold", "Quant", "Trunc")


class Net:
    """A network under construction. Constants are named as they come."""

    def __init__(self, shape, opset=13):
        self.shape, self.opset = shape, opset
        self.nodes, self.constants = [], []

    def constant(self, array):
        array = np.asarray(array)
        if array.dtype.kind != "i":
            array = array.astype(np.float32)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, kind, *inputs, domain=None, **attributes):
        """Adds an operator and returns the name of its output."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        out = f"{kind.lower()}{len(self.nodes)}"
        domain = (_DOMAIN if kind in _CUSTOM else "") if domain is None else domain
        node = helper.make_node(
            kind, names, [out], name=f"n_{out}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return out

    def quant(self, x, scale, bits, zero=0.0, **attributes):
        return self.add("Quant", x, scale, zero, float(bits), **attributes)

    def batch_norm(self, x, rng, channels, scale=1.0, digits=3):
        """Normalisation by dyadic numbers; gains of both signs."""
        gain = np.ldexp(rng.choice([-3, -1, 1, 2, 3, 5], channels), -digits) * scale
        bias = np.ldexp(rng.integers(-20, 21, channels), -digits)
        mean = np.ldexp(rng.integers(-20, 21, channels), -digits)
        var = np.ones(channels)
        return self.add("BatchNormalization", x, gain, bias, mean, var, epsilon=0.0)

    def model(self, *outputs):
        real = lambda name, shape: helper.make_tensor_value_info(
            name, TensorProto.FLOAT, shape
        )
        graph = helper.make_graph(
            self.nodes,
            "net",
            [real("x", self.shape)],
            [real(name, None) for name in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(_DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets)


# The oracle: ONNX's reference in float64, the quantizers as they are defined.

_ROUND = {
    "ROUND": np.round,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda x: np.copysign(np.ceil(np.abs(x)), x),
    "DOWN": np.trunc,
    "HALF_UP": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "HALF_DOWN": lambda x: np.copysign(np.ceil(np.abs(x) - 0.5), x),
}


def _ends(bits, signed, narrow):
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


class Quant(OpRun):
    op_domain = _DOMAIN

    def _run(self, x, scale, zero, bits, signed=1, narrow=0, rounding_mode="ROUND"):
        steps = np.clip(x / scale + zero, *_ends(bits, signed, narrow))
        return ((_ROUND[rounding_mode](steps) - zero) * scale,)


class BipolarQuant(OpRun):
    op_domain = _DOMAIN

    def _run(self, x, scale):
        return (np.where(x >= 0, scale, -scale),)


class Trunc(OpRun):
    op_domain = _DOMAIN

    def _run(self, x, scale, zero, in_bits, *out, rounding_mode="FLOOR", signed=1):
        steps = np.round(x / scale + zero)
        if len(out) == 1:
            steps = _ROUND[rounding_mode](steps / 2.0 ** (in_bits - out[0]))
            return ((steps - zero) * scale,)
        factor = 2.0 ** np.round(np.log2(out[0] / scale))
        steps = np.clip(steps / factor, *_ends(out[-1], signed, 0))
        return ((_ROUND[rounding_mode](steps) - zero / factor) * out[0],)


class MultiThreshold(OpRun):
    op_domain = _DOMAIN

    def _run(self, x, thresholds, out_scale=1.0, out_bias=0.0, out_dtype=""):
        t = thresholds.reshape(*thresholds.shape, *[1] * (x.ndim - 2))
        return (out_scale * (x[:, :, None] >= t).sum(2) + out_bias,)


class BatchNormalization(OpRun):  # ONNX's own takes statistics of the batch.
    def _run(self, x, *params, epsilon, momentum, training_mode=0):
        sizes = (-1, *[1] * (x.ndim - 2))
        gain, bias, mean, var = (p.reshape(sizes) for p in params)
        return (gain * (x - mean) / np.sqrt(var + epsilon) + bias,)


_OPERATORS = [BatchNormalization, BipolarQuant, MultiThreshold, Quant, Trunc]


def oracle(model, x):
    double = onnx.ModelProto()
    double.CopyFrom(model)
    for k, t in enumerate(model.graph.initializer):
        array = numpy_helper.to_array(t)
        if array.dtype == np.float32:
            own = numpy_helper.from_array(array.astype(np.float64), t.name)
            double.graph.initializer[k].CopyFrom(own)
    session = ReferenceEvaluator(double, new_ops=_OPERATORS)
    rows = [session.run(None, {"x": np.float64(row[None])})[0] for row in x]
    return np.concatenate(rows)


def check(model, x):
    """The function and its integers are the oracle's, one by one and in batches."""
    read = read_qonnx(model.SerializeToString())
    program = qjax.lower(read, *read.inputs)
    wanted = oracle(model, x).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(read)(x), wanted)
    np.testing.assert_array_equal(program(x), wanted)
    np.testing.assert_array_equal(program(x[:1]), wanted[:1])
    assert len(np.unique(wanted)) > 1
    return program


def _dyadic(rng, shape, bits=6, most=3.0):
    """Multiples of 2^-bits, so that float32 is exact, with ties and beyond the grid."""
    return np.ldexp(
        np.round(np.ldexp(rng.uniform(-most, most, shape), bits)), -bits
    ).astype(np.float32)


# Families of networks.


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


def _residual():
    rng = np.random.default_rng(4)
    net = Net((1, 8))
    y = net.quant("x", 0.25, 5, narrow=1)
    w = net.quant(rng.normal(size=(8, 8)), 0.25, 3)
    a = net.quant(net.add("MatMul", y, w), 0.5, 5)
    y = net.add("Add", net.add("Add", a, y), np.full((1, 8), 0.125))
    y = net.quant(net.add("Mul", net.add("Relu", y), 0.5), 0.25, 4, signed=0)
    y = net.add("Sub", net.add("Mul", y, y), a)
    return net.model(net.quant(y, 0.5, 6)), _dyadic(rng, (32, 8))


_FAMILIES = {
    "bipolar mlp": _bipolar_mlp,
    "convolutions": _conv_net,
    "wide": _wide,
    "exported": _exported,
    "residual": _residual,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _FAMILIES)
def test_families_equal_the_oracle(name):
    check(*_FAMILIES[name]())


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


def test_files_of_operator_set_9_fold_their_constants():
    """Axes are attributes there: alone, the nodes would be of the newest set."""
    rng = np.random.default_rng(11)
    net = Net((1, 6), opset=9)
    w = net.quant(rng.normal(size=(4, 1, 6)), 0.25, 4)
    w = net.add("Transpose", net.add("Squeeze", w, axes=[1]), perm=[1, 0])
    y = net.add("MatMul", net.quant("x", 0.5, 4), w)
    bias = np.ldexp(np.round(np.ldexp(rng.normal(size=4), 3)), -3)
    y = net.add("Add", y, net.add("Unsqueeze", bias, axes=[0]))
    y = net.add("Clip", y, min=-2.0, max=3.0)
    check(net.model(net.quant(y, 0.25, 5)), _dyadic(rng, (16, 6)))


def test_older_operator_sets_are_refused():
    net = Net((1, 4), opset=6)
    net.quant("x", 0.5, 4)
    with pytest.raises(
        NotImplementedError, match=r"operator set 6 .*version_converter"
    ):
        read_qonnx(net.model("quant0").SerializeToString())


_MAPS = {
    "(x + 1) / 2": lambda n, x: n.add("Div", n.add("Add", x, 1.0), 2.0),
    "(x - 0.375) / 0.25": lambda n, x: n.add("Div", n.add("Sub", x, 0.375), 0.25),
    "1 - x": lambda n, x: n.add("Sub", 1.0, x),
    "x + 1/32": lambda n, x: n.add("Add", x, 1 / 32),  # Half a step.
}


@pytest.mark.parametrize("name", _MAPS)
def test_an_affine_map_of_an_input_on_a_grid(name):
    rng = np.random.default_rng(12)
    net = Net((1, 6))
    w = net.quant(rng.normal(size=(6, 4)), 0.25, 4)
    y = net.quant(net.add("MatMul", _MAPS[name](net, "x"), w), 0.5, 6)
    model, x = net.model(y), _dyadic(rng, (16, 6), bits=4)
    grid = qjax.QParams(np.float32(2**-4), np.int32(3)), qjax.QSpec(8)
    read = read_qonnx(model.SerializeToString(), input_grid=grid)
    program = qjax.lower(read, *read.inputs)
    np.testing.assert_array_equal(program(x), oracle(model, x))


def test_remedies_are_those_of_a_reader():
    """Each one is followed, until the network lowers."""
    rng = np.random.default_rng(13)
    net = Net((1, 6))
    w = net.quant(rng.normal(size=(6, 4)), 0.25, 4)
    logits = net.add("MatMul", "x", w)
    tail = net.add("Softmax", logits)
    data = net.model(tail).SerializeToString()
    read = read_qonnx(data)
    with pytest.raises(ValueError, match=r"`input_grid=\(QParams") as error:
        qjax.lower(read, *read.inputs)
    assert "fake_quant" not in str(error.value) and "Rule" not in str(error.value)
    grid = qjax.QParams(np.float32(2**-4), np.int32(3)), qjax.QSpec(8)
    read = read_qonnx(data, input_grid=grid)
    with pytest.raises((ValueError, NotImplementedError)) as error:
        qjax.lower(read, *read.inputs)
    assert "fake_quant" not in str(error.value) and "Rule" not in str(error.value)
    assert f"`outputs=({logits!r},)`" in str(error.value)
    read = read_qonnx(data, input_grid=grid, outputs=(logits,))
    x = _dyadic(rng, (8, 6), bits=4)
    found = qjax.lower(read, *read.inputs)(x)
    np.testing.assert_array_equal(found, oracle(net.model(logits), x))


def test_gradients_pass_straight_through():
    model, x = _residual()
    read = read_qonnx(model.SerializeToString())
    grad = jax.jit(jax.grad(lambda x: read(x).sum()))(x)
    assert np.all(np.isfinite(grad)) and np.any(grad != 0)


# What is refused.


def _simple(edit=lambda net: None):
    net = Net((1, 4))
    net.quant("x", 0.5, 4)
    edit(net)
    return net.model(net.nodes[-1].output[0])


_MISSING = {
    r"'n_lrn1' \(LRN\).*There is no rule": lambda n: n.add("LRN", "quant0", size=1),
    r"\(FloatQuant\).*no rule": lambda n: n.add("FloatQuant", "quant0", 1.0),
    r"\(Mine\) is of the domain 'me'": lambda n: n.add("Mine", "x", domain="me"),
    "no rounding_mode 'DICE'": lambda n: n.quant("x", 1.0, 4, rounding_mode="DICE"),
    "whole zero points, got 0.5": lambda n: n.quant("x", 1.0, 4, 0.5),
    "1 to 31 bits": lambda n: n.quant("x", 1.0, 40),
    "Pad must be": lambda n: n.add(
        "Pad", "quant0", np.int64([0, 1, 0, 1]), mode="edge"
    ),
    "constant must be the second": lambda n: n.add("MatMul", np.eye(1), "quant0"),
    "constant parameters": lambda n: n.add("Quant", "x", "quant0", 0.0, 4.0),
}


@pytest.mark.parametrize("message", _MISSING)
def test_what_is_lacking_is_named(message):
    with pytest.raises(NotImplementedError, match=message):
        read_qonnx(_simple(_MISSING[message]).SerializeToString())


_CONTRADICTIONS = {
    "reads 'nowhere'": lambda n: n.add("Relu", "nowhere"),
    "scale must be positive, got -1": lambda n: n.quant("x", -1.0, 4),
    r"\(MatMul\) must fit its inputs": lambda n: n.add("MatMul", "x", np.ones((3, 2))),
}


@pytest.mark.parametrize("message", _CONTRADICTIONS)
def test_contradictions_are_refused(message):
    with pytest.raises(ValueError, match=message):
        read_qonnx(_simple(_CONTRADICTIONS[message]).SerializeToString())


def test_files_that_are_none(tmp_path):
    data = _simple().SerializeToString()
    for other in (b"", b"not a model", data[: len(data) // 2], data[:-5]):
        with pytest.raises(ValueError, match="The QONNX file"):
            read_qonnx(other)
    (tmp_path / "m.onnx").write_bytes(data)
    read = read_qonnx(tmp_path / "m.onnx")
    assert read.input_names == ("x",) and read.output_names == ("quant0",)
    with pytest.raises(ValueError, match=r"must have shape \('batch', 4\)"):
        read(np.zeros((2, 5), np.float32))
    with pytest.raises(OSError):
        read_qonnx(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="lacks 'y'"):
        read_qonnx(data, outputs=["y"])


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'qjax\[onnx\]'"):
        read_qonnx(b"")


# Networks made with Brevitas.


def _data():
    own = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folders = [pathlib.Path(os.environ.get("QJAX_DATA") or own), own]
    with contextlib.suppress(StopIteration):
        return next(f for f in folders if (f / "qonnx").is_dir())
    pytest.skip("qonnx is not in $QJAX_DATA.")


@pytest.mark.parametrize(("name", "right"), [("TFC_1W1A", 9296), ("TFC_2W2A", 9660)])
def test_mnist_logits_are_the_published_ones(name, right):
    folder = _data()
    read = read_qonnx(folder / "qonnx" / f"{name}_clean.onnx")
    program = qjax.lower(read, *read.inputs)
    mnist = np.load(folder / "mnist.npz")
    x = np.float32(mnist["x_test"]) / np.float32(255)
    codes = program.codes(*program.quantize_inputs(x[:, None]))
    wanted = np.load(folder / "qonnx" / f"{name}_mnist_ref_logits.npz")["logits"]
    # The last line is float32 in the file: a code has one logit, the same but for that.
    np.testing.assert_allclose(program(x[:, None]), wanted, rtol=0, atol=5e-7)
    pairs = np.stack([np.ravel(codes), wanted.ravel()], 1)
    assert len(np.unique(pairs, axis=0)) == len(np.unique(codes))
    assert len(np.unique(wanted)) == len(np.unique(codes))
    labels = np.argmax(wanted, 1)
    np.testing.assert_array_equal(np.argmax(program(x[:, None]), 1), labels)
    assert np.sum(labels == mnist["y_test"]) == right
