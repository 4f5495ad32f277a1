"""Operations of the integer graph in QONNX: products in float32, MultiThreshold."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.formats.onnx.graph import OnnxValue
from qjax.formats.qonnx import written_moves
from qjax.formats.qonnx.sheet import QonnxCall, QonnxTensor, arranged
from qjax.formats.qonnx.staircases import StepsError, jumps, monotone
from qjax.graph.operations import OPERATIONS

# Products.


def _acc(
    call: QonnxCall,
    value: OnnxValue,
    order: Any,
    sums: np.ndarray,
    kernel_sums: np.ndarray,
) -> QonnxTensor:
    """Returns an accumulator: codes are about their zero point here.

    Args:
      call: The node.
      value: Sum of products.
      order: Order of its axes.
      sums: Bound of each sum, all terms positive.
      kernel_sums: Sum of the kernel of each channel, in the rank of the output.
    """
    call.check(int(sums.max(initial=0)) * call.far())
    more = kernel_sums * (call.zero() - call["offset"])
    bias = (more << call["shift"]) + call.params["bias"]
    rank = len(call.shape)
    bias = bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
    return QonnxTensor(value, tuple(order), bias, call["shift"], call.node.output)


def conv(call: QonnxCall) -> QonnxTensor:
    """Writes a convolution, batch and channels first."""
    lhs, rhs, out = call["dimensions"]
    kernel = call.params["kernel"].transpose(rhs)
    g, order = call.graph, call.x.order
    own = call.sheet.finished(call.x)
    x = g.transpose(own.value, [order[d] for d in lhs])
    pairs, steps = call["padding"], call["input_dilation"]
    shape = tuple(call.shape[d] for d in out)
    common: dict[str, Any] = {"dtype": "float32", "shape": shape}
    common |= {"dilations": list(call["dilation"]), "group": call["groups"]}
    common["kernel_shape"] = list(kernel.shape[2:])
    if kernel.ndim < 3 or 0 in kernel.shape or 0 in shape:
        raise call.refuse("a convolution over no axes or of no places")
    if all(n == 1 for n in steps):
        if any(n < 0 for pair in pairs for n in pair):
            raise call.refuse("padding that crops")
        pads = [a for a, _ in pairs] + [b for _, b in pairs]
        weights = call.sheet.kernel(call, kernel, 0, out[1])
        own_: dict[str, Any] = {"pads": pads, "strides": list(call["strides"])}
        found = g.op("Conv", x, weights, **common, **own_)
    else:
        weights, own_ = _transposed(call, kernel)
        found = g.op("ConvTranspose", x, weights, **common, **own_)
    flat = kernel.reshape(len(kernel), -1)
    sizes = [1] * len(shape)
    sizes[out[1]] = len(kernel)
    sums = flat.sum(1).reshape(sizes)
    return _acc(call, found, np.argsort(out).tolist(), np.abs(flat).sum(1), sums)


def _transposed(
    call: QonnxCall, kernel: np.ndarray
) -> tuple[OnnxValue, dict[str, Any]]:
    """Returns kernel and attributes of ConvTranspose for a spread input."""
    before, after, more = [], [], []
    names = "padding", "input_dilation", "dilation", "strides"
    for taps, (low, high), spread, step, stride in zip(
        kernel.shape[2:], *(call[name] for name in names), strict=True
    ):
        reach = (taps - 1) * step
        extra = max(high - reach, 0)
        if low > reach or extra >= max(spread, step) or stride != 1:
            raise call.refuse("a convolution of spread values that ONNX has not")
        before.append(reach - low)
        after.append(reach - high + extra)
        more.append(extra)
    groups = call["groups"]
    own = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
    own = own.reshape(-1, *own.shape[2:])
    own = np.flip(own, tuple(range(2, own.ndim)))
    strides = list(call["input_dilation"])
    found = {"pads": before + after, "output_padding": more, "strides": strides}
    at = call["dimensions"][2][1] if groups == 1 else None
    return call.sheet.kernel(call, np.ascontiguousarray(own), 1, at), found


def dot(call: QonnxCall) -> QonnxTensor:
    """Writes a product with a kernel as one of matrices."""
    g, side = call.graph, call["kernel_operand"]
    if call["batch"][0]:
        raise call.refuse("a kernel with an axis of the batch")
    over, summed = call["contract"][1 - side], call["contract"][side]
    kernel = call.params["kernel"]
    free = [d for d in range(kernel.ndim) if d not in summed]
    rows = [d for d in range(len(call.x.shape)) if d not in over]
    flat = kernel.transpose([*summed, *free])
    outs = [kernel.shape[d] for d in free]
    flat = flat.reshape(math.prod(kernel.shape[d] for d in summed), math.prod(outs))
    if 0 in flat.shape:
        raise call.refuse("a product of no terms")
    x = call.sheet.plain(call.x)
    own = [call.x.shape[d] for d in rows]
    x = g.transpose(x, [*rows, *over])
    if len(over) != 1 or not rows:
        x = g.reshape(x, [*(own or [1]), len(flat)])
    shape = (*(own or [1]), flat.shape[1])
    channel = 0 if side == 0 else len(own)
    weights = call.sheet.kernel(call, flat, 1, channel if len(outs) == 1 else None)
    acc = g.op("MatMul", x, weights, dtype="float32", shape=shape)
    acc = g.reshape(acc, [*own, *outs])
    order = list(range(len(own) + len(outs)))
    sizes = [1] * len(own) + outs
    if side == 0:
        order = [*order[len(own) :], *order[: len(own)]]
        sizes = outs + [1] * len(own)
    sums = flat.sum(0).reshape(sizes)
    return _acc(call, acc, order, np.abs(flat).sum(0), sums)


def dot_codes(call: QonnxCall) -> QonnxTensor:
    """Writes a product of two values."""
    g, (contract, batch) = call.graph, (call["contract"], call["batch"])
    sides = []
    for k, x in enumerate(call.inputs):
        free = [d for d in range(len(x.shape)) if d not in (*contract[k], *batch[k])]
        rest = [free, contract[k]] if k == 0 else [contract[k], free]
        own = g.transpose(call.sheet.plain(x), [*batch[k], *rest[0], *rest[1]])
        sizes = [math.prod(x.shape[d] for d in axes) for axes in rest]
        shape = (*(x.shape[d] for d in batch[k]), *sizes)
        sides.append((g.reshape(own, shape), shape))
    (left, a), (right, b) = sides
    call.check(a[-1] * call.far(0) * call.far(1))
    shape = (*a[:-1], b[-1])
    acc = g.op("MatMul", left, right, dtype="float32", shape=shape)
    call.sheet.product(call)
    return call.sheet.tensor(g.reshape(acc, call.shape))


def multiply(call: QonnxCall) -> QonnxTensor:
    """Writes an elementwise product with a kernel."""
    kernel = call.params["kernel"]
    if kernel.ndim == 0:
        kernel = kernel.reshape((1,) * len(call.shape))
    own = call.sheet.finished(call.x)
    weights = call.sheet.kernel(call, arranged(kernel, own.order), 0, None)
    found = call.graph.two("Mul", own.value, weights)
    return _acc(call, found, own.order, np.abs(kernel), kernel)


def multiply_codes(call: QonnxCall) -> QonnxTensor:
    """Writes an elementwise product of two values."""
    call.check(call.far(0) * call.far(1))
    pair, order = call.sheet.aligned(call.inputs)
    call.sheet.product(call)
    return call.sheet.tensor(call.graph.two("Mul", *pair), order)


def total(call: QonnxCall) -> QonnxTensor:
    """Writes a sum over axes: over an image by a convolution with ones."""
    x, axes = call.x, sorted(call["axes"])
    count, rank = math.prod(call["sizes"]), len(call.x.shape)
    call.check(count * call.far())
    bias = np.full((1,) * len(call.shape), count * call.zero() + call["bias"])
    g = call.graph
    others = [d for d in range(rank) if d not in axes]
    if 2 < rank < 6 and axes and len(others) == 2 and 0 in others and count:
        own = call.sheet.finished(x)
        order = [own.order[d] for d in (*others, *axes)]
        image = g.transpose(own.value, order)
        channels, sizes = x.shape[others[1]], [x.shape[d] for d in axes]
        kernel = call.sheet.numbers(np.ones((channels, 1, *sizes)), "ones")
        shape = (x.shape[0], channels, *(1 for _ in sizes))
        common: dict[str, Any] = {"dtype": "float32", "shape": shape}
        acc = g.op("Conv", image, kernel, group=channels, kernel_shape=sizes, **common)
        acc = g.reshape(acc, shape[:2])
    else:
        acc = g.reduce("ReduceSum", call.sheet.plain(x), axes)
    places = tuple(range(len(call.shape)))
    return QonnxTensor(acc, places, bias, 0, call.node.output)


def _image(call: QonnxCall) -> tuple[OnnxValue, list[int]]:
    """Returns an input with the axes of its windows last, and their order."""
    rank, window = len(call.x.shape), call["window"]
    channel = rank - 1 if window[-1] == 1 else 1
    is_image = rank > 2 and window[0] == window[channel] == 1
    is_plain = all(n == 1 for n in call["base_dilation"])
    for d in (0, channel):
        is_image = is_image and call["strides"][d] == 1 and not any(call["padding"][d])
    if not (is_image and is_plain):
        raise call.refuse("a window over batch or channels, or of spread values")
    if any(n < 0 for pair in call["padding"] for n in pair):
        raise call.refuse("padding that crops")
    order = [0, channel, *(d for d in range(1, rank) if d != channel)]
    own = call.sheet.finished(call.x)
    return call.graph.transpose(own.value, [own.order[d] for d in order]), order


def _windowed(call: QonnxCall, kind: str, *more: Any, **others: Any) -> QonnxTensor:
    x, order = _image(call)
    space = order[2:]
    pairs = [call["padding"][d] for d in space]
    found = call.graph.op(
        kind,
        x,
        *more,
        dtype="float32",
        shape=tuple(call.shape[d] for d in order),
        kernel_shape=[call["window"][d] for d in space],
        strides=[call["strides"][d] for d in space],
        dilations=[call["dilation"][d] for d in space],
        pads=[a for a, _ in pairs] + [b for _, b in pairs],
        **others,
    )
    return call.sheet.tensor(found, np.argsort(order).tolist())


def sum_pool(call: QonnxCall) -> QonnxTensor:
    """Writes sums over windows as a convolution with ones."""
    count = math.prod(call["window"])
    call.check(count * call.far())
    order = _image(call)[1]
    channels = call.x.shape[order[1]]
    sizes = [call["window"][d] for d in order[2:]]
    kernel = call.sheet.numbers(np.ones((channels, 1, *sizes)), "ones")
    found = _windowed(call, "Conv", kernel, group=channels)
    bias = np.full((1,) * len(call.shape), count * call.zero() + call["bias"])
    return QonnxTensor(found.value, found.order, bias, 0, call.node.output)


def max_pool(call: QonnxCall) -> QonnxTensor:
    """Writes the largest of windows."""
    return _windowed(call, "MaxPool")


# Steps.


def _channel(call: QonnxCall, *arrays: np.ndarray) -> int | None:
    """Returns the axis along which parameters differ.

    Raises:
      ValueError: if there are several.
    """
    rank = len(call.shape)
    axes = {d + rank - a.ndim for a in arrays for d, n in enumerate(a.shape) if n > 1}
    if len(axes) > 1:
        raise call.refuse("parameters that differ along several axes")
    return next(iter(axes), None)


def _rows(array: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(array.reshape(-1, 1), (count, 1))


def _entered(call: QonnxCall, own_axis: int | None) -> tuple[QonnxTensor, int | None]:
    """Returns the input with what is still to be added where steps can hold it."""
    x = call.x
    own = [d for d, n in enumerate(x.bias.shape) if n > 1]
    if len(own) > 1 or (own and own_axis is not None and own[0] != own_axis):
        x, own = call.sheet.finished(x), []
    return x, own_axis if own_axis is not None else next(iter(own), None)


def _steps(call: QonnxCall, function: Any, axis: int | None) -> QonnxTensor:
    """Writes a monotone function of an input, ``[channels, n]`` to codes."""
    x, axis = _entered(call, axis)
    count = 1 if axis is None else call.shape[axis]
    low, high = call.ends()
    bias = _rows(x.bias, count)
    first = -((bias - low) >> x.shift)
    last = (high - bias) >> x.shift
    call.check(int(max(np.abs(first).max(initial=0), np.abs(last).max(initial=0))))
    zero = call.output.zero_point
    codes = lambda p: function((p << x.shift) + bias) - zero
    try:
        steps = monotone(codes, first, np.maximum(last, first))
    except StepsError as error:
        raise call.refuse(str(error)) from error
    own = call.output
    return call.sheet.stepped(x, steps, axis, (own.low - zero, own.high - zero))


def requantize(call: QonnxCall) -> QonnxTensor:
    """Writes a requantizer as thresholds."""
    own = call.params
    axis = _channel(call, *own.values())
    count = 1 if axis is None else call.shape[axis]
    rows = {role: _rows(array, count) for role, array in own.items()}
    zero = call.zero()
    meaning = OPERATIONS["requantize"].meaning
    a = call.node.attributes
    return _steps(call, lambda x: meaning(a, rows, [x + zero]), axis)


def add(call: QonnxCall) -> QonnxTensor:
    """Writes a sum of codes as thresholds of a sum of small multiples."""
    factor = math.gcd(*call["multipliers"]) or 1
    parts = [m // factor for m in call["multipliers"]]
    far = sum(abs(p) * call.far(k) for k, p in enumerate(parts))
    if far > 1 << 24:
        raise call.refuse(
            "scales that are no small multiples of each other; powers of two are"
        )
    values, order = call.sheet.aligned(call.inputs)
    terms = [
        v if p == 1 else call.graph.two("Mul", v, call.sheet.numbers(np.array(p)))
        for v, p in zip(values, parts, strict=True)
    ]
    found = terms[0]
    for term in terms[1:]:
        found = call.graph.two("Add", found, term)
    a = {**call.node.attributes, "input_zero_points": [0], "multipliers": [factor]}
    meaning, zero = OPERATIONS["add"].meaning, call.output.zero_point
    codes = lambda p: meaning(a, {}, [p]) - zero
    x = call.sheet.tensor(found, order)
    ends = np.full((1, 1), far)
    own = call.output
    steps = monotone(codes, -ends, ends)
    return call.sheet.stepped(x, steps, None, (own.low - zero, own.high - zero))


def _jumps(
    call: QonnxCall, places: np.ndarray, values: np.ndarray, axis: int | None
) -> QonnxTensor:
    """Writes what jumps at places of an accumulator or code, about no zero point."""
    x, at = _entered(call, axis)
    count = 1 if at is None else call.shape[at]
    places, values = (
        np.broadcast_to(own, (count, own.shape[1])) for own in (places, values)
    )
    bias = _rows(x.bias, count) + call.zero()
    high = (call.values[0].high - bias) >> x.shift
    cuts = -((bias - places) >> x.shift)
    zero, own = call.output.zero_point, call.output
    try:
        steps = jumps(cuts, values - zero, high)
    except StepsError as error:
        raise call.refuse(str(error)) from error
    call.check(int(np.abs(high).max(initial=0)))
    return call.sheet.stepped(x, steps, at, (own.low - zero, own.high - zero))


def table(call: QonnxCall) -> QonnxTensor:
    """Writes a lookup table as the steps up and down of its codes."""
    own, x, axis = call.params["table"], call.values[0], call["axis"]
    rows = own.reshape(len(own), -1).T[
        :, x.low - call["low"] : x.high - call["low"] + 1
    ]
    places = np.arange(x.low + 1, x.high + 1)[None]
    axis = axis if axis is None else axis % len(call.shape)
    return _jumps(call, np.repeat(places, len(rows), 0), rows, axis)


def thresholds(call: QonnxCall) -> QonnxTensor:
    """Writes thresholds and what lies between them."""
    cuts, own = (np.atleast_2d(call.params[k]) for k in ("thresholds", "table"))
    axis = call["axis"]
    axis = axis if axis is None else axis % len(call.shape)
    return _jumps(call, cuts, own, axis)


def clip(call: QonnxCall) -> QonnxTensor:
    """Writes codes within two ends."""
    own, zero = call.sheet.finished(call.x), call.zero()
    if zero != call.output.zero_point:
        raise call.refuse("ends on another grid")
    ends = (call.graph.constant(call[k] - zero, "float32") for k in ("low", "high"))
    common: dict[str, Any] = {"dtype": "float32", "shape": own.value.shape}
    return call.sheet.tensor(
        call.graph.op("Clip", own.value, *ends, **common), own.order
    )


EMITTERS: Mapping[str, Any] = {
    "add": add,
    "argmax": written_moves.arg_extreme,
    "argmin": written_moves.arg_extreme,
    "broadcast": written_moves.broadcast,
    "clip": clip,
    "concatenate": written_moves.concatenate,
    "constant": written_moves.constant,
    "conv": conv,
    "dot": dot,
    "dot_codes": dot_codes,
    "max": written_moves.extreme,
    "max_pool": max_pool,
    "maximum": written_moves.of_two,
    "min": written_moves.extreme,
    "minimum": written_moves.of_two,
    "multiply": multiply,
    "multiply_codes": multiply_codes,
    "pad": written_moves.pad,
    "requantize": requantize,
    "reshape": written_moves.reshape,
    "rev": written_moves.rev,
    "slice": written_moves.slices,
    "sum": total,
    "sum_pool": sum_pool,
    "table": table,
    "thresholds": thresholds,
    "transpose": written_moves.transpose,
}
