"""Sums of products in ONNX: MatMulInteger and ConvInteger, or MatMul of int32.

Bytes are multiplied by bytes with a sign or without one, never by the other kind: chips
without VNNI add pairs of such products in 16 bits, and saturate.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.moves import pad_or_crop, spread, windows
from qjax.formats.onnx.sizes import FreeSizeError, Sizes, times

_BYTES = ("int8", "uint8")
_CENTRES = {"int8": 0, "uint8": 128}


def _is_byte(array: np.ndarray) -> bool:
    return bool(np.all((array >= -128) & (array <= 127)))


def _fits(number: int, dtype: str) -> bool:
    info = np.iinfo(dtype)
    return bool(info.min <= number <= info.max)


def _kernel_bytes(graph: OnnxGraph, kernel: np.ndarray, dtype: str) -> OnnxValue:
    """Returns a kernel of bytes about the centre of a type."""
    return graph.constant(kernel + _CENTRES[dtype], dtype, "kernel")


def _finished(call: OnnxCall, acc: OnnxValue, bias: np.ndarray) -> OnnxValue:
    """Shifts an accumulator and adds its bias."""
    g = call.graph
    acc = g.cast(acc, call.wide)
    if call["shift"]:
        acc = g.mul(acc, _wrapped(np.int64(1) << call["shift"], call.wide))
    return g.add(acc, _wrapped(bias, call.wide))


def _wrapped(array: Any, dtype: str) -> np.ndarray:
    """Wraps int64 to a type, as its sums do."""
    return np.asarray(array, np.int64).astype(dtype)


# Contractions.


class _Sides:
    """The axes of both operands of a contraction."""

    def __init__(self, shapes: Sequence[Sizes], contract: Any, batch: Any) -> None:
        self.batch, self.contract = batch, contract
        self.free = [
            [d for d in range(len(shape)) if d not in (*summed, *own)]
            for shape, summed, own in zip(shapes, contract, batch, strict=True)
        ]

    def orders(self) -> list[list[int]]:
        """Returns the order of axes for a product of matrices."""
        left = [*self.batch[0], *self.free[0], *self.contract[0]]
        return [left, [*self.batch[1], *self.contract[1], *self.free[1]]]


def _product(
    g: OnnxGraph, pair: Sequence[OnnxValue], sides: _Sides, zeros: Sequence[int]
) -> OnnxValue:
    """Contracts two values: bytes of one kind by MatMulInteger, else by MatMul."""
    x, y = pair
    own = [x.shape[d] for d in sides.batch[0]]
    rows = [x.shape[d] for d in sides.free[0]]
    columns = [y.shape[d] for d in sides.free[1]]
    terms = times([x.shape[d] for d in sides.contract[0]])
    left, right = (
        g.transpose(v, order) for v, order in zip(pair, sides.orders(), strict=True)
    )
    left = g.reshape(left, [*own, times(rows), terms])
    right = g.reshape(right, [*own, terms, times(columns)])
    shape = (*own, times(rows), times(columns))
    if x.dtype in _BYTES:
        points = [
            g.constant(z, v.dtype) for z, v in zip(zeros, (left, right), strict=True)
        ]
        ends = (left, right, *points)
        found = g.op("MatMulInteger", *ends, dtype="int32", shape=shape)
    else:
        found = g.op("MatMul", left, right, dtype=x.dtype, shape=shape)
    return g.reshape(found, [*own, *rows, *columns])


def _is_empty(shape: Sizes) -> bool:
    return 0 in shape


def dot(call: OnnxCall) -> OnnxValue:
    """Writes a product with a kernel."""
    g, kernel, x = call.graph, call.params["kernel"], call.x
    side = call["kernel_operand"]
    if _is_empty(kernel.shape) or _is_empty(x.shape):
        zero = g.constant(np.zeros((1,) * len(call.shape)), call.wide)
        return _finished(call, g.expand(zero, call.shape), call.params["bias"])
    if x.dtype in _BYTES and _is_byte(kernel) and call.wide == "int32":
        pair = [x, _kernel_bytes(g, kernel, x.dtype)]
        zeros = [call["offset"], _CENTRES[x.dtype]]
    else:
        x = g.sub(call.read(0, call.wide), call["offset"])
        pair, zeros = [x, g.constant(kernel, call.wide, "kernel")], [0, 0]
    if side == 0:
        pair, zeros = pair[::-1], zeros[::-1]
    sides = _Sides([v.shape for v in pair], call["contract"], call["batch"])
    return _finished(call, _product(g, pair, sides, zeros), call.params["bias"])


def dot_codes(call: OnnxCall) -> OnnxValue:
    """Writes a product of two values."""
    g, zeros = call.graph, list(call["zero_points"])
    if any(_is_empty(v.shape) for v in call.inputs):
        zero = g.constant(np.zeros((1,) * len(call.shape)), call.wide)
        return g.expand(zero, call.shape)
    pair = list(call.inputs)
    is_bytes = all(v.dtype in _BYTES for v in pair) and call.wide == "int32"
    if is_bytes and pair[0].dtype != pair[1].dtype:
        k = 0 if pair[0].dtype == "int8" else 1
        pair[k] = g.cast(g.add(g.cast(pair[k], "int32"), 128), "uint8")
        zeros[k] += 128
    own = zip(zeros, pair, strict=True)
    if not is_bytes or not all(_fits(z, v.dtype) for z, v in own):
        pair = [g.sub(call.read(k, call.wide), call["zero_points"][k]) for k in (0, 1)]
        zeros = [0, 0]
    sides = _Sides([v.shape for v in pair], call["contract"], call["batch"])
    return _product(g, pair, sides, zeros)


# Convolutions.


def conv(call: OnnxCall) -> OnnxValue:
    """Writes a convolution, batch and channels first."""
    g, (lhs, rhs, out) = call.graph, call["dimensions"]
    kernel = call.params["kernel"].transpose(rhs)
    x = g.transpose(call.x, lhs)
    shape = tuple(call.shape[d] for d in out)
    own = call["padding_code"]
    pairs, steps = [tuple(p) for p in call["padding"]], call["input_dilation"]
    is_byte = x.dtype in _BYTES and _is_byte(kernel) and call.wide == "int32"
    is_byte = is_byte and _fits(own, x.dtype) and bool(pairs)
    if not is_byte:
        x = g.cast(x, call.wide)
    if any(n > 1 for n in steps):
        x = spread(g, x, [1, 1, *steps], own)
    kept = [(max(a, 0), max(b, 0)) for a, b in pairs]
    is_cropped = kept != pairs
    if is_cropped or not is_byte:
        x, kept = (
            pad_or_crop(g, x, [(0, 0), (0, 0), *pairs], own),
            [(0, 0) for _ in pairs],
        )
    if _is_empty(kernel.shape) or _is_empty(shape) or _is_empty(x.shape):
        acc = g.expand(g.constant(np.zeros((1,) * len(shape)), call.wide), shape)
        return _ended(call, acc, out, 0)
    if not is_byte:
        x = g.sub(x, call["offset"])
        return _ended(call, _by_taps(call, x, kernel, shape), out, 0)
    acc = g.op(
        "ConvInteger",
        x,
        _kernel_bytes(g, kernel, x.dtype),
        g.constant(own, x.dtype),
        g.constant(_CENTRES[x.dtype], x.dtype),
        dtype="int32",
        shape=shape,
        kernel_shape=list(kernel.shape[2:]),
        strides=list(call["strides"]),
        dilations=list(call["dilation"]),
        group=call["groups"],
        pads=[a for a, _ in kept] + [b for _, b in kept],
    )
    # The operator centres codes where padding has its code; the graph at `offset`.
    sums = kernel.reshape(len(kernel), -1).sum(1) * (own - call["offset"])
    return _ended(call, acc, out, sums)


def _ended(call: OnnxCall, acc: OnnxValue, out: Any, sums: Any) -> OnnxValue:
    """Orders axes as the output has them and adds biases."""
    acc = call.graph.transpose(acc, np.argsort(out).tolist())
    bias = call.params["bias"]
    if np.any(sums):
        sizes = [1] * len(out)
        sizes[out[1]] = len(sums)
        bias = bias + (sums << call["shift"]).reshape(sizes)
    return _finished(call, acc, bias)


def _by_taps(
    call: OnnxCall, x: OnnxValue, kernel: np.ndarray, shape: Sizes
) -> OnnxValue:
    """Computes a convolution as one product of matrices of all taps."""
    g, groups, taps = call.graph, call["groups"], kernel.shape[2:]
    into, outs = kernel.shape[1], kernel.shape[0] // groups
    places = times(shape[2:])
    parts = []
    for tap in itertools.product(*map(range, taps)):
        own: list[tuple[Any, Any, Any]] = [(None, None, None)] * 2
        for t, d, s, n in zip(
            tap, call["dilation"], call["strides"], shape[2:], strict=True
        ):
            if not isinstance(n, int):
                raise FreeSizeError("windows along an axis whose size is free")
            own.append((t * d, t * d + (n - 1) * s + 1, s))
        part = g.slice(x, own, (*x.shape[:2], *shape[2:]))
        parts.append(g.reshape(part, [x.shape[0], groups, into, places]))
    columns = g.concatenate(parts, 2)
    rows = kernel.reshape(groups, outs, into, -1).transpose(0, 1, 3, 2)
    rows = rows.reshape(1, groups, outs, -1)
    found = g.op(
        "MatMul",
        g.constant(rows, call.wide, "kernel"),
        columns,
        dtype=call.wide,
        shape=(x.shape[0], groups, outs, places),
    )
    return g.reshape(found, shape)


# Elementwise products and sums.


def multiply(call: OnnxCall) -> OnnxValue:
    """Writes an elementwise product with a kernel."""
    g = call.graph
    x = g.sub(call.read(0, call.wide), call["offset"])
    return _finished(call, g.mul(x, call.params["kernel"]), call.params["bias"])


def multiply_codes(call: OnnxCall) -> OnnxValue:
    """Writes an elementwise product of two values."""
    g = call.graph
    own = (g.sub(call.read(k, call.wide), z) for k, z in enumerate(call["zero_points"]))
    return g.two("Mul", *own)


def total(call: OnnxCall) -> OnnxValue:
    """Writes a sum over axes."""
    g = call.graph
    if any(call.x.shape[d] == 0 for d in call["axes"]):
        zero = g.constant(np.full((1,) * len(call.shape), call["bias"]), "int64")
        return g.expand(zero, call.shape)
    return g.add(g.reduce("ReduceSum", call.read(), call["axes"]), call["bias"])


def sum_pool(call: OnnxCall) -> OnnxValue:
    """Writes sums over windows."""
    x = windows(call, call.read(0, call.wide), "Add", call["padding_code"])
    return call.graph.add(call.graph.cast(x, "int64"), call["bias"])


def running_sum(call: OnnxCall) -> OnnxValue:
    """Writes sums of all up to each place."""
    g = call.graph
    x = g.sub(call.read(), call["input_zero_point"])
    axis = g.constant(call["axis"], "int64")
    own: dict[str, Any] = {"dtype": "int64", "shape": x.shape}
    found = g.op("CumSum", x, axis, reverse=int(call["reverse"]), **own)
    return g.add(found, call["bias"])
