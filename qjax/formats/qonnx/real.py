"""Operations of the integer graph on real values, with Quant nodes on their grids."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.reals import CLOSE, followers, kernel_scale, scale_of
from qjax.formats.qonnx import emitters
from qjax.formats.qonnx.sheet import (
    DOMAIN,
    QonnxCall,
    QonnxSheet,
    QonnxTensor,
    arranged,
)
from qjax.graph.graph import Graph, Value


class RealSheet(QonnxSheet):
    """Operators on real values.

    Args:
      graph: The integer graph.
      arrays: Its parameters, int64.
    """

    def __init__(self, graph: Graph, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.program, self.arrays = graph, arrays
        self.units: dict[int, np.ndarray] = {}  # Accumulator -> real value of its 1.
        self.followers = followers(graph)

    def unit(self, x: QonnxTensor, value: Value) -> np.ndarray:
        """Returns the real value of one step of an input."""
        if x.number is not None:
            return self.units[x.number]
        return scale_of(value)

    def real(self, array: Any) -> OnnxValue:
        """Returns known real numbers."""
        return self.graph.constant(array, "float32")

    def finished(self, x: QonnxTensor) -> QonnxTensor:
        """Adds what is still to be added, in real values."""
        value = x.value
        if np.any(x.bias):
            assert x.number is not None
            bias = x.bias * self.units[x.number]
            bias = self.real(arranged(bias, x.order))
            value = self.graph.two("Add", value, bias)
        made = self.tensor(value, x.order)
        return QonnxTensor(made.value, made.order, made.bias, 0, x.number)

    def kernel(
        self, call: QonnxCall, array: np.ndarray, axis: int, channel: int | None
    ) -> OnnxValue:
        """Returns a kernel on its grid: the one that the next requantizer speaks of."""
        count = array.shape[axis] if array.ndim else 1
        behind = self.followers.get(call.node.output)
        pair = (channel, count)
        own = kernel_scale(self.program, self.arrays, call.node, behind, *pair)
        rank = len(call.shape)
        sizes = [1] * rank
        if own.size > 1 and channel is not None:
            sizes[channel] = own.size
        unit = own * scale_of(call.values[0]) / 2.0 ** call["shift"]
        self.units[call.node.output] = unit.reshape(sizes)
        shape = [1] * array.ndim
        if own.size > 1:
            shape[axis] = own.size
        scale = own.reshape(shape).astype(np.float32)
        value = self.real(array * scale.astype(np.float64))
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        return quant(self.graph, value, scale, 0, (min(low, -high), high))

    def product(self, call: QonnxCall) -> None:
        """Notes the unit of a product of two values."""
        pair = (scale_of(x) for x in call.values)
        unit = np.asarray(np.prod([*pair]))
        self.units[call.node.output] = unit.reshape((1,) * len(call.shape))


def word(low: int, high: int) -> tuple[int, bool, bool, tuple[int, int]]:
    """Returns the smallest word of codes: bits, sign, narrow range, and its ends."""
    if low >= 0:
        bits = max(high.bit_length(), 1)
        return bits, False, False, (0, 2**bits - 1)
    bits = max((~low).bit_length(), max(high, 0).bit_length()) + 1
    bits = max(bits, 2)
    is_narrow = low > -(2 ** (bits - 1))
    return bits, True, is_narrow, (-(2 ** (bits - 1)) + is_narrow, 2 ** (bits - 1) - 1)


def quant(
    g: OnnxGraph, x: OnnxValue, scale: Any, zero_point: int, ends: tuple[int, int]
) -> OnnxValue:
    """Adds a Quant node whose word holds codes between two ends."""
    bits, is_signed, is_narrow, _ = word(*ends)
    params = (scale, zero_point, bits)
    return g.op(
        "Quant",
        x,
        *(g.constant(np.asarray(p), "float32") for p in params),
        dtype="float32",
        shape=x.shape,
        domain=DOMAIN,
        signed=int(is_signed),
        narrow=int(is_narrow),
        rounding_mode="ROUND",
    )


def onto_grid(call: QonnxCall, x: OnnxValue, order: Any) -> QonnxTensor:
    """Quantizes real values to the codes of an output."""
    return call.sheet.tensor(gridded(call.graph, x, call.output), order)


def gridded(g: OnnxGraph, x: OnnxValue, own: Value) -> OnnxValue:
    """Quantizes real values to the codes of a value.

    A Quant node adds its zero point before it rounds, and an odd one moves the ties:
    another without it rounds first then.
    """
    step, zero = float(scale_of(own).item()), own.zero_point
    reals = ((end - zero) * step for end in (own.low, own.high))
    if zero % 2:
        x = quant(g, x, step, 0, (own.low - zero, own.high - zero))
    if word(own.low, own.high)[3] != (own.low, own.high):
        ends = [g.constant(end, "float32") for end in reals]
        x = g.op("Clip", x, *ends, dtype="float32", shape=x.shape)
    return quant(g, x, step, zero, (own.low, own.high))


def _times(call: QonnxCall, x: QonnxTensor, gain: np.ndarray) -> OnnxValue:
    """Multiplies real values by factors, unless they are 1."""
    if np.all(np.abs(gain - 1) < CLOSE):
        return x.value
    gain = gain.reshape((1,) * (len(x.order) - gain.ndim) + gain.shape)
    own = call.graph.constant(arranged(gain, x.order), "float32")
    return call.graph.two("Mul", x.value, own)


def requantize(call: QonnxCall) -> QonnxTensor:
    """Writes a requantizer as Quant."""
    sheet = call.sheet
    assert isinstance(sheet, RealSheet)
    unit = sheet.unit(call.x, call.values[0])
    own = call.params
    ratio = own["multiplier"] * 2.0 ** -own["shift"].astype(np.float64)
    gain = ratio * scale_of(call.output) / unit
    x = sheet.finished(call.x)
    return onto_grid(call, _times(call, x, np.asarray(gain)), x.order)


def add(call: QonnxCall) -> QonnxTensor:
    """Writes a sum of real values."""
    own = scale_of(call.output) * 2.0 ** -call["shift"]
    values, order = call.sheet.aligned(call.inputs)
    found = None
    for x, v, m in zip(values, call.values, call["multipliers"], strict=True):
        gain = m * own / scale_of(v)
        kind = "Sub" if found is not None and np.all(gain < 0) else "Add"
        part = _times(call, call.sheet.tensor(x), abs(gain) if kind == "Sub" else gain)
        found = part if found is None else call.graph.two(kind, found, part)
    assert found is not None
    return onto_grid(call, found, order)


_FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Abs": np.abs,
    "Neg": np.negative,
    "Exp": np.exp,
    "Softplus": lambda x: np.log1p(np.exp(x)),
}


def table(call: QonnxCall) -> QonnxTensor:
    """Writes a lookup table that is a function of ONNX, code for code."""
    own, x, y = call.params["table"], call.values[0], call.output
    if call["axis"] is not None:
        raise call.refuse("a lookup table by channel")
    codes = np.arange(x.low, x.high + 1)
    wanted = own[x.low - call["low"] : x.high - call["low"] + 1]
    reals = (codes - x.zero_point) * scale_of(x)
    for name, function in _FUNCTIONS.items():
        with np.errstate(over="ignore"):
            steps = np.rint(function(reals) / scale_of(y)) + y.zero_point
        if np.array_equal(np.clip(steps, y.low, y.high), wanted):
            given = call.sheet.finished(call.x)
            return onto_grid(call, call.graph.one(name, given.value), given.order)
    raise call.refuse("a lookup table that is no function of ONNX")


def clip(call: QonnxCall) -> QonnxTensor:
    """Writes real values within two ends; codes may stand on another grid then."""
    own, zero = call.sheet.finished(call.x), call.zero()
    step = scale_of(call.values[0]).item()
    if zero != call.output.zero_point or call.x.number is not None:
        raise call.refuse("ends of an accumulator, or about another zero point")
    ends = ((call[k] - zero) * step for k in ("low", "high"))
    given = [call.graph.constant(end, "float32") for end in ends]
    common: dict[str, Any] = {"dtype": "float32", "shape": own.value.shape}
    value = call.graph.op("Clip", own.value, *given, **common)
    made = call.sheet.tensor(value, own.order)
    gain = scale_of(call.output) / step
    return call.sheet.tensor(_times(call, made, gain), own.order)


def constant(call: QonnxCall) -> QonnxTensor:
    """Writes numbers of the program as real values."""
    value = call.params["value"] - call.output.zero_point
    value = np.broadcast_to(value * scale_of(call.output), call.shape)
    return call.sheet.tensor(call.graph.constant(value, "float32", "value"))


def _summed(write: Callable[[QonnxCall], QonnxTensor]) -> Callable[..., QonnxTensor]:
    """Returns a sum that notes its unit, that of its input."""

    def written(call: QonnxCall) -> QonnxTensor:
        sheet = call.sheet
        assert isinstance(sheet, RealSheet)
        unit = scale_of(call.values[0]).reshape((1,) * len(call.shape))
        sheet.units[call.node.output] = unit
        return write(call)

    return written


def _numbered(write: Callable[[QonnxCall], QonnxTensor]) -> Callable[..., QonnxTensor]:
    """Returns a product of two values that is an accumulator."""
    return lambda call: dataclasses.replace(write(call), number=call.node.output)


def _moved(write: Callable[[QonnxCall], QonnxTensor]) -> Callable[..., QonnxTensor]:
    """Returns a move of codes, whose grid stays; accumulators do not move."""

    def written(call: QonnxCall) -> QonnxTensor:
        scales = {
            str(x.grid.scale if x.grid else 1.0) for x in (*call.values, call.output)
        }
        if any(x.number is not None for x in call.inputs) or len(scales) > 1:
            raise call.refuse("accumulators, or values on several grids")
        if "padding_code" in call.node.attributes:
            if call["padding_code"] != call.zero():
                raise call.refuse("padding that is not zero")
        return write(call)

    return written


_MOVES = (
    "broadcast concatenate max max_pool maximum min minimum pad reshape rev slice "
    "transpose"
).split()

EMITTERS: Mapping[str, Callable[[QonnxCall], QonnxTensor]] = {
    **{name: _moved(emitters.EMITTERS[name]) for name in _MOVES},
    "add": add,
    "argmax": emitters.EMITTERS["argmax"],
    "argmin": emitters.EMITTERS["argmin"],
    "clip": clip,
    "constant": constant,
    "conv": emitters.conv,
    "dot": emitters.dot,
    "dot_codes": _numbered(emitters.dot_codes),
    "multiply": emitters.multiply,
    "multiply_codes": _numbered(emitters.multiply_codes),
    "requantize": requantize,
    "sum": _summed(emitters.total),
    "sum_pool": _summed(emitters.sum_pool),
    "table": table,
}
