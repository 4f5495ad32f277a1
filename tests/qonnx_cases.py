"""What several tests of one subject share."""

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import qjax
from qjax.formats.qonnx import read_qonnx

_DOMAIN = "qonnx.custom_op.general"


_CUSTOM = ("BipolarQuant", "FloatQuant", "IntQuant", "MultiThreshold", "Quant", "Trunc")


class Net:
    """A network under construction. Constants are named as they come."""

    def __init__(self, shape, opset=13):
        self.shape, self.opset = shape, opset
        self.nodes, self.constants = [], []

    def constant(self, array):
        array = np.asarray(array)
        if array.dtype.kind not in "ib":
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
