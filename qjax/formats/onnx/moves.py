"""Moves of integers in ONNX, extremes and windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.sizes import FreeSize, FreeSizeError, Size

_PADDED = ("int8", "uint8", "int32", "int64")  # Types that Pad and Max take everywhere.


def _paddable(g: OnnxGraph, x: OnnxValue) -> OnnxValue:
    return x if x.dtype in _PADDED else g.cast(x, "int32")


def _grown(n: Size, by: int) -> Size:
    if isinstance(n, int):
        return n + by
    return FreeSize(n.symbols, n.factor, n.offset + by)


def spread(g: OnnxGraph, x: OnnxValue, steps: Sequence[int], fill: int) -> OnnxValue:
    """Spreads values ``steps`` apart, with ``fill`` between them."""
    for d, step in enumerate(steps):
        n = x.shape[d]
        if step == 1 or n == 0:
            continue
        if not isinstance(n, int):
            raise FreeSizeError("a spread axis whose size is free")
        shape = x.shape
        split = g.reshape(x, (*shape[: d + 1], 1, *shape[d + 1 :]))
        pairs = [(0, 0)] * len(split.shape)
        pairs[d + 1] = (0, step - 1)
        split = pad_or_crop(g, split, pairs, fill)
        whole = g.reshape(split, (*shape[:d], n * step, *shape[d + 1 :]))
        pairs = [(0, 0)] * len(shape)
        pairs[d] = (0, 1 - step)
        x = pad_or_crop(g, whole, pairs, fill)
    return x


def pad_or_crop(
    g: OnnxGraph, x: OnnxValue, pairs: Sequence[tuple[int, int]], fill: int
) -> OnnxValue:
    """Pads axes where sizes are positive and crops them where they are negative."""
    if any(n > 0 for pair in pairs for n in pair):
        grown = [(max(a, 0), max(b, 0)) for a, b in pairs]
        info = np.iinfo(x.dtype)
        if not info.min <= fill <= info.max:
            x = g.cast(x, "int32")
        x = _paddable(g, x)
        shape = tuple(
            _grown(n, a + b) for n, (a, b) in zip(x.shape, grown, strict=True)
        )
        pads = g.constant([a for a, _ in grown] + [b for _, b in grown], "int64")
        code = g.constant(fill, x.dtype)
        x = g.op("Pad", x, pads, code, dtype=x.dtype, shape=shape, mode="constant")
    ends, shape_ = [], []
    for n, (a, b) in zip(x.shape, pairs, strict=True):
        low, high = max(-a, 0), max(-b, 0)
        ends.append((low or None, -high if high else None, None))
        shape_.append(_grown(n, -low - high))
    return g.slice(x, ends, tuple(shape_))


def windows(call: OnnxCall, x: OnnxValue, join: str, fill: int) -> OnnxValue:
    """Joins all places of windows by an operator, one axis after the other."""
    g = call.graph
    x = spread(g, x, call["base_dilation"], fill)
    x = pad_or_crop(g, x, [tuple(pair) for pair in call["padding"]], fill)
    names = "window", "dilation", "strides"
    for axis, (w, d, s) in enumerate(zip(*(call[name] for name in names), strict=True)):
        if w == s == 1:
            continue
        n = call.shape[axis]
        if not isinstance(n, int):
            raise FreeSizeError("windows along an axis whose size is free")
        found: OnnxValue | None = None
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        for t in range(w):
            ends: list[tuple[Any, Any, Any]] = [(None, None, None)] * len(x.shape)
            ends[axis] = (t * d, t * d + max((n - 1) * s + 1, 0), s)
            part = g.slice(x, ends, shape)
            found = part if found is None else g.two(join, found, part)
        assert found is not None
        x = found
    return x


def extreme_pool(call: OnnxCall) -> OnnxValue:
    """Writes the largest or smallest of windows."""
    x = call.values[0]
    is_max = call.node.operation == "max_pool"
    fill = x.low if is_max else x.high
    return windows(call, call.moved(), "Max" if is_max else "Min", fill)


def extreme(call: OnnxCall) -> OnnxValue:
    """Writes the largest or smallest over axes."""
    kind = "ReduceMax" if call.node.operation == "max" else "ReduceMin"
    return call.graph.reduce(kind, call.moved(), call["axes"])


def arg_extreme(call: OnnxCall) -> OnnxValue:
    """Writes the place of the first extreme along an axis."""
    g, x = call.graph, call.x
    x = x if x.dtype in ("int8", "uint8", "int32") else g.cast(x, "int32")
    kind = "ArgMax" if call.node.operation == "argmax" else "ArgMin"
    own = {"axis": call["axis"], "keepdims": 0, "select_last_index": 0}
    return g.op(kind, x, dtype="int64", shape=call.shape, **own)


def of_two(call: OnnxCall) -> OnnxValue:
    """Writes the elementwise maximum or minimum."""
    kind = "Max" if call.node.operation == "maximum" else "Min"
    return call.graph.two(kind, call.moved(0), call.moved(1))


def concatenate(call: OnnxCall) -> OnnxValue:
    """Writes a join of values."""
    parts = [call.read(k, call.dtype) for k in range(len(call.inputs))]
    return call.graph.concatenate(parts, call["axis"])


def reshape(call: OnnxCall) -> OnnxValue:
    """Writes another shape."""
    return call.graph.reshape(call.x, call.shape)


def transpose(call: OnnxCall) -> OnnxValue:
    """Writes another order of axes."""
    return call.graph.transpose(call.x, call["permutation"])


def slices(call: OnnxCall) -> OnnxValue:
    """Writes slices of all axes."""
    ends = list(zip(call["start"], call["stop"], call["steps"], strict=True))
    return call.graph.slice(call.x, ends, call.shape)


def rev(call: OnnxCall) -> OnnxValue:
    """Writes axes backwards."""
    ends = [
        (None, None, -1 if d in call["axes"] else 1) for d in range(len(call.shape))
    ]
    return call.graph.slice(call.x, ends, call.shape)


def pad(call: OnnxCall) -> OnnxValue:
    """Writes padding around and between, or crops."""
    g, code = call.graph, call["padding_code"]
    steps = [inner + 1 for _, _, inner in call["padding"]]
    x = spread(g, call.moved(), steps, code)
    return pad_or_crop(g, x, [(low, high) for low, high, _ in call["padding"]], code)


def broadcast(call: OnnxCall) -> OnnxValue:
    """Writes values along axes of a larger shape."""
    shape: list[Size] = [1] * len(call["sizes"])
    for d, n in zip(call["dimensions"], call.x.shape, strict=True):
        shape[d] = n
    return call.graph.expand(call.graph.reshape(call.x, shape), call.shape)
