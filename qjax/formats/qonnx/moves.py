"""Rules of QONNX operators that move values or choose among values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qjax.formats.qonnx.ops import QonnxOperator, QonnxRule, QonnxValue
from qjax.formats.qonnx.values import Constant, Data, moved_data, of_codes


def _arg_max(op: QonnxOperator, x: Data) -> QonnxValue:
    axis = op.attributes.get("axis", 0)
    keepdims = bool(op.attributes.get("keepdims", 1))
    if op.attributes.get("select_last_index", 0):
        raise NotImplementedError("ArgMax must find the first of equal ones.")
    return Data(jnp.argmax(x.real(), axis, keepdims=keepdims))


def _reshape(op: QonnxOperator, x: Data, shape: Constant | None = None) -> QonnxValue:
    found = op.attributes["shape"] if shape is None else shape.value.tolist()
    if op.attributes.get("allowzero", 0) and 0 in found:
        raise NotImplementedError("Reshape to a size of 0 has no rule.")
    sizes = [x.shape[d] if n == 0 else int(n) for d, n in enumerate(found)]
    if not sizes:
        raise NotImplementedError("A tensor without axes has no batch.")
    return _reshaped(x, sizes, op.batch)


def _reshaped(x: Data, sizes: list[int], batch: int) -> Data:
    """Reshapes values; the leading size of the file's batch stands for any batch."""

    def move(y: Any) -> Any:
        own = list(sizes)
        if own[0] in (batch, x.shape[0]):
            own[0] = y.shape[0]
        return y.reshape(own)

    return moved_data(x, move, is_order_kept=False)


def _flatten(op: QonnxOperator, x: Data) -> QonnxValue:
    axis = op.attributes.get("axis", 1) % len(x.shape)
    if axis != 1:
        raise NotImplementedError("Flatten must keep the batch: axis = 1.")
    return _reshaped(x, [x.shape[0], math.prod(x.shape[1:])], op.batch)


def _transpose(op: QonnxOperator, x: Data) -> QonnxValue:
    order = op.attributes.get("perm", range(len(x.shape))[::-1])
    return moved_data(x, lambda y: y.transpose(order), is_order_kept=False)


def _squeeze(op: QonnxOperator, x: Data, axes: Constant | None = None) -> QonnxValue:
    found = _axes(op, axes, len(x.shape))
    if not found:
        found = tuple(d for d, n in enumerate(x.shape) if d and n == 1)
    return moved_data(x, lambda y: y.squeeze(found), is_order_kept=False)


def _unsqueeze(op: QonnxOperator, x: Data, axes: Constant | None = None) -> QonnxValue:
    count = len(op.attributes.get("axes", ())) if axes is None else axes.value.size
    found = _axes(op, axes, len(x.shape) + count)
    sizes = list(x.shape)
    for d in sorted(found):
        sizes.insert(d, 1)
    return _reshaped(x, sizes, x.shape[0])


def _axes(op: QonnxOperator, axes: Constant | None, rank: int) -> tuple[int, ...]:
    found = op.attributes.get("axes", ()) if axes is None else axes.value.tolist()
    return tuple(int(d) % rank for d in found)


def _pad(op: QonnxOperator, x: Data, *rest: Constant | None) -> QonnxValue:
    known = [None if r is None else r.value for r in (*rest, None, None)]
    pads = op.attributes.get("pads") if known[0] is None else known[0].tolist()
    fill = op.attributes.get("value", 0.0) if known[1] is None else known[1].item()
    mode = op.attributes.get("mode", "constant")
    if mode != "constant" or fill or len(rest) > 2 or pads is None:
        raise NotImplementedError("Pad must be by a constant 0, over all axes.")
    rank = len(x.shape)
    widths = list(zip(pads[:rank], pads[rank:], strict=True))
    y = jnp.pad(x.real(), [(int(a), int(b)) for a, b in widths])
    if x.grid is None:
        return Data(y)
    ends = min(x.grid.low, 0), max(x.grid.high, 0)
    return of_codes(y, dataclasses.replace(x.grid, low=ends[0], high=ends[1]))


def _concat(op: QonnxOperator, *parts: QonnxValue) -> QonnxValue:
    axis = op.attributes["axis"]
    data = [p for p in parts if isinstance(p, Data)]
    if len(data) != len(parts):
        raise NotImplementedError("Concat of constants and values has no rule.")
    y = jnp.concatenate([p.real() for p in data], axis)
    grids = [p.grid for p in data if p.grid is not None]
    if len(grids) < len(data) or len({g.scale for g in grids}) > 1:
        return Data(y)
    low, high = min(g.low for g in grids), max(g.high for g in grids)
    return of_codes(y, dataclasses.replace(grids[0], low=low, high=high))


def _split(op: QonnxOperator, x: Data, sizes: Constant | None = None) -> QonnxValue:
    """Cuts one part out; without sizes parts are equal, perhaps less the last."""
    a, rank = op.attributes, len(x.shape)
    part, count = a["part"], a["parts"]
    axis = a.get("axis", 0)
    if not -rank <= axis < rank:
        raise ValueError(f"Split must have an axis of {rank}, got {axis}")
    axis %= rank
    if not axis:
        raise NotImplementedError("Split must keep the batch.")
    size, found = x.shape[axis], a.get("split") if sizes is None else sizes.value
    if found is None:
        each = -(-size // count)
        found = [each] * (count - 1) + [size - each * (count - 1)]
        if size % count and "num_outputs" not in a:
            raise ValueError(f"{count} equal parts are no split of {size}")
    found = [int(n) for n in found]
    if len(found) != count or sum(found) != size or min(found) < 0:
        raise ValueError(f"parts {found} are no split of {size} into {count}")
    start = sum(found[:part])
    if not found[part]:
        raise NotImplementedError("A part of size 0 has no rule.")
    cut = (slice(None),) * axis + (slice(start, start + found[part]),)
    return moved_data(x, lambda y: y[cut], is_order_kept=False)


# Operator -> its rule.
MOVES: Mapping[str, QonnxRule] = {
    "ArgMax": _arg_max,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Concat": _concat,
    "Split": _split,
}
