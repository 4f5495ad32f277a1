"""Gathers, scatters and sorts in ONNX, by places in flat values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue, joint_shape
from qjax.formats.onnx.sizes import FreeSizeError, Size, Sizes, times


def _along(g: OnnxGraph, n: Size, axis: int, rank: int) -> OnnxValue:
    """Counts along an axis."""
    sizes: list[Size] = [1] * rank
    sizes[axis] = n
    if isinstance(n, int):
        shape = [n if d == axis else 1 for d in range(rank)]
        return g.constant(np.arange(n).reshape(shape), "int64")
    ends = (
        g.constant(0, "int64"),
        g.op("Squeeze", g.sizes([n]), dtype="int64", shape=()),
        g.constant(1, "int64"),
    )
    return g.reshape(g.op("Range", *ends, dtype="int64", shape=(n,)), sizes)


def _window(rank: int, *others: Sequence[int]) -> list[int]:
    return [d for d in range(rank) if not any(d in own for own in others)]


def _coordinate(
    g: OnnxGraph, places: OnnxValue, k: int, axes: Sequence[int], rank: int
) -> OnnxValue:
    """Returns one coordinate of places, along some axes of a result."""
    last = len(places.shape) - 1
    found = g.gather(places, g.constant(k, "int64"), axis=last)
    sizes: list[Size] = [1] * rank
    for d, n in zip(axes, found.shape, strict=True):
        sizes[d] = n
    return g.reshape(found, sizes)


def _room(g: OnnxGraph, n: Size, size: Size) -> Any:
    """Returns the last start of a window of a size along an axis."""
    if n == size:
        return 0
    if isinstance(n, int) and isinstance(size, int):
        return max(n - size, 0)
    if not isinstance(size, int):
        raise FreeSizeError("windows of a size that is free")
    return g.two("Max", g.add(g.sizes([n]), -size), 0)


class _Places:
    """Places in a flat value, and whether the windows at them are inside of it."""

    def __init__(self, g: OnnxGraph, shape: Sizes) -> None:
        self.g, self.shape = g, shape
        self.strides = [times(shape[d + 1 :]) for d in range(len(shape))]
        self.flat: OnnxValue | None = None
        self.inside: OnnxValue | None = None

    def start(self, d: int, start: OnnxValue, size: Size) -> None:
        """Adds the start of windows of a size along an axis, held inside."""
        g, n = self.g, self.shape[d]
        held = g.two("Min", g.two("Max", start, 0), _room(g, n, size))
        own = g.two("Equal", start, held)
        if isinstance(n, int) and isinstance(size, int) and n < size:
            own = g.two("Less", start, start)
        if self.inside is not None:
            joined = joint_shape(self.inside.shape, own.shape)
            own = g.op("And", self.inside, own, dtype="bool", shape=joined)
        self.inside = own
        self.along(d, held)

    def along(self, d: int, number: OnnxValue) -> None:
        """Adds numbers along an axis."""
        stride = self.strides[d]
        by = stride if isinstance(stride, int) else self.g.sizes([stride])
        part = self.g.mul(number, by)
        self.flat = part if self.flat is None else self.g.two("Add", self.flat, part)


def gather(call: OnnxCall) -> OnnxValue:
    """Writes slices at places, or a number where they are beyond the ends."""
    g, x, whole = call.graph, call.x, len(call.shape)
    places = call.read(1)
    sizes = [
        n if size is None else size
        for size, n in zip(call["slice_sizes"], x.shape, strict=True)
    ]
    single = *call["collapsed_slice_dims"], *call["operand_batching_dims"]
    window = _window(len(x.shape), single)
    offsets = dict(zip(window, sorted(call["offset_dims"]), strict=True))
    others = _window(whole, call["offset_dims"])
    if 0 in call.shape or 0 in x.shape:
        fill = 0 if call["mode"] == "clip" else call["fill"]
        return g.expand(g.constant(np.full((1,) * whole, fill), call.dtype), call.shape)
    own = _Places(g, x.shape)
    for k, d in enumerate(call["start_index_map"]):
        own.start(d, _coordinate(g, places, k, others, whole), sizes[d])
    batch = call["operand_batching_dims"], call["start_indices_batching_dims"]
    for d, j in zip(*batch, strict=True):
        own.along(d, _along(g, places.shape[j], others[j], whole))
    for d, at in offsets.items():
        if sizes[d] != 1:
            own.along(d, _along(g, sizes[d], at, whole))
    flat = own.flat or g.constant(np.zeros((1,) * whole), "int64")
    flat = g.expand(flat, call.shape)
    found = g.gather(g.reshape(x, [times(x.shape)]), flat)
    if call["mode"] == "clip" or own.inside is None:
        return found
    dtype = call.dtype if call.dtype in ("int8", "uint8", "int32") else "int32"
    return g.where(own.inside, g.cast(found, dtype), call["fill"])


# Scatters.


def scatter(call: OnnxCall) -> OnnxValue:
    """Writes updates at places, of several the last, or their extreme."""
    g, name = call.graph, call.node.operation
    x, updates = call.read(1), call.read(2)
    if 0 in x.shape or 0 in updates.shape:
        return x
    size = times(x.shape)
    flat, last = _update_places(call, x.shape, updates.shape, size)
    own = g.reshape(x, [size])
    rows = g.reshape(updates, [times(updates.shape)])
    if name != "scatter":
        return _joined(g, own, rows, flat, name[-3:], x.shape)
    # In the order of the places, however their windows lie.
    window = sorted(call["update_window_dims"])
    order = [*_window(len(updates.shape), window), *window]
    flat, rows = (
        g.reshape(g.transpose(g.reshape(v, updates.shape), order), [last])
        for v in (flat, updates)
    )
    # The number of the last update at each place, counted from 1; then what it brings.
    numbers = g.add(_along(g, last, 0, 1), 1)
    zeros = g.mul(own, 0)
    which = _joined(g, zeros, numbers, flat, "max", own.shape)
    brought = g.gather(rows, g.two("Max", g.add(which, -1), 0))
    return g.reshape(g.where(g.two("Greater", which, 0), brought, own), x.shape)


def _joined(
    g: OnnxGraph,
    flat: OnnxValue,
    updates: OnnxValue,
    places: OnnxValue,
    how: str,
    shape: Sizes,
) -> OnnxValue:
    """Joins updates at places of a flat value; those beyond its end are dropped."""
    more = g.concatenate([flat, g.constant([0], "int64")], 0)
    own: dict[str, Any] = {
        "dtype": "int64",
        "shape": more.shape,
        "axis": 0,
        "reduction": how,
    }
    found = g.op("ScatterElements", more, places, updates, **own)
    return g.reshape(g.slice(found, [(None, -1, None)], flat.shape), shape)


def _update_places(
    call: OnnxCall, sizes: Sizes, shape: Sizes, beyond: Size
) -> tuple[OnnxValue, Size]:
    """Returns flat places of all updates, and their number; dropped ones are beyond."""
    g, rank, places = call.graph, len(shape), call.read(0)
    single = *call["inserted_window_dims"], *call["operand_batching_dims"]
    axes = _window(len(sizes), single), sorted(call["update_window_dims"])
    windows = dict(zip(*axes, strict=True))
    others = _window(rank, call["update_window_dims"])
    own = _Places(g, sizes)
    for k, d in enumerate(call["scatter_dims"]):
        size = shape[windows[d]] if d in windows else 1
        own.start(d, _coordinate(g, places, k, others, rank), size)
    batch = call["operand_batching_dims"], call["scatter_indices_batching_dims"]
    for d, j in zip(*batch, strict=True):
        own.along(d, _along(g, shape[others[j]], others[j], rank))
    for d, axis in windows.items():
        own.along(d, _along(g, shape[axis], axis, rank))
    flat = own.flat or g.constant(np.zeros((1,) * rank), "int64")
    if call["mode"] != "clip" and own.inside is not None:
        last = g.op("Squeeze", g.sizes([beyond]), dtype="int64", shape=())
        flat = g.where(own.inside, flat, last)
    number = times(shape)
    return g.reshape(g.expand(flat, shape), [number]), number


def scatter_add(call: OnnxCall) -> OnnxValue:
    """Writes sums of updates at places."""
    g, size = call.graph, times(call.shape)
    updates = g.sub(call.read(1), call["input_zero_point"])
    zeros = g.expand(g.constant([0], "int64"), (size,))
    if 0 in call.shape or 0 in updates.shape:
        return g.reshape(zeros, call.shape)
    flat, number = _update_places(call, call.shape, updates.shape, size)
    rows = g.reshape(updates, [number])
    return _joined(g, zeros, rows, flat, "add", call.shape)


# Sorts.


def sort(call: OnnxCall) -> OnnxValue:
    """Writes codes in their order."""
    return _sorted(call, is_descending=False)[0]


def argsort(call: OnnxCall) -> OnnxValue:
    """Writes the places of codes in their order, equal ones in their own."""
    return _sorted(call, is_descending=call["descending"])[1]


def _sorted(call: OnnxCall, is_descending: bool) -> tuple[OnnxValue, OnnxValue]:
    g, x, axis = call.graph, call.read(), call["axis"]
    if 0 in x.shape:
        return x, x
    own = {"axis": axis, "largest": int(is_descending), "sorted": 1}
    return g.ordered(x, x.shape[axis], **own)
