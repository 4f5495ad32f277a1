"""Steps of tables, thresholds, comparisons, choices and whole numbers."""

import math

import numpy as np

from qjax.backends.native.emission import (
    DTYPES,
    Emission,
    broadcast_strides,
    dense,
    merged,
)
from qjax.graph.graph import Node
from qjax.graph.operations.arithmetic import KINDS

_TABLE, _THRESHOLDS, _SELECT, _COMPARE, _ARITHMETIC, _EMBED = 10, 11, 15, 16, 17, 18
_BOOL = 5
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _by_axis(e: Emission, node: Node) -> tuple[int, int, int]:
    """Returns the sizes before, along and after the axis of the channels of a table."""
    axis, shape = node.attributes["axis"], e.shapes[node.output]
    if axis is None:
        return 1, 1, math.prod(shape)
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _reached(e: Emission, node: Node) -> np.ndarray:
    """Returns the table of a node within its interval, which the type holds.

    What lies outside of it no code reaches.
    """
    value = e.graph.values[node.output]
    table = np.asarray(e.param(node, "table"), np.int64)
    return np.clip(table, value.low, value.high)


def _table(e: Emission, node: Node) -> None:
    table = _reached(e, node)
    x = e.whole(node.inputs[0], e.shapes[node.output])
    out = e.make(node.output)
    dtype = e.buffers[out].dtype
    words = [x, out, *_by_axis(e, node), e.table(table, dtype), DTYPES.index(dtype)]
    e.step(_TABLE, [*words, len(table), node.attributes["low"]], [x], [out])


def _thresholds(e: Emission, node: Node) -> None:
    cuts, table = e.param(node, "thresholds"), _reached(e, node)
    x = e.whole(node.inputs[0], e.shapes[node.output])
    out = e.make(node.output)
    words = [x, out, *_by_axis(e, node), e.table(cuts), e.table(table)]
    e.step(_THRESHOLDS, [*words, cuts.shape[-1]], [x], [out])


def _select(e: Emission, node: Node) -> None:
    which, *cases = node.inputs
    shape, dtype = e.shapes[node.output], e.graph.values[node.output].dtype
    x, own = e.of[which], [e.whole(v, shape, dtype) for v in cases]
    out, is_scalar = e.make(node.output), math.prod(e.shapes[which]) == 1
    words = [x, out, math.prod(shape), len(own), *own, is_scalar]
    e.step(_SELECT, words, [x, *own], [out])


def _compare(e: Emission, node: Node) -> None:
    a, (x, y) = node.attributes, (e.of[v] for v in node.inputs)
    out = e.make(node.output)
    words = [_COMPARISONS.index(a["kind"]), x, y, out]
    words += [math.prod(e.shapes[node.output]), *a["zero_points"]]
    for pair in zip(a["multipliers"], a["exponents"], strict=True):
        words += pair
    e.step(_COMPARE, words, [x, y], [out])


def _arithmetic(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    pair = [node.inputs[0], node.inputs[-1]]
    x, y = (e.of[v] for v in pair)
    out = e.make(node.output)
    dtype = _BOOL if a["dtype"] == "bool" else DTYPES.index(a["dtype"])
    strides = [broadcast_strides(e.shapes[v], shape) for v in pair]
    axes = merged(zip(shape, *strides, dense(shape), strict=True)) or [(1, 1, 1, 1)]
    sizes, first, second, _ = zip(*axes, strict=True)
    words = [KINDS.index(a["kind"]), dtype, len(sizes), *sizes, x, *first, y, *second]
    e.step(_ARITHMETIC, [*words, out], [x, y], [out])


def _embed(e: Emission, node: Node) -> None:
    kernel = e.param(node, "kernel")
    x, size = e.of[node.inputs[0]], math.prod(e.shapes[node.inputs[0]])
    out, width = e.make(node.output), math.prod(kernel.shape[1:])
    dtype = e.buffers[out].dtype
    words = [x, out, size, len(kernel), width, e.table(kernel, dtype)]
    e.step(_EMBED, [*words, DTYPES.index(dtype)], [x], [out])


LOOKUPS = {
    "table": _table,
    "thresholds": _thresholds,
    "select": _select,
    "compare": _compare,
    "arithmetic": _arithmetic,
    "embed": _embed,
}
