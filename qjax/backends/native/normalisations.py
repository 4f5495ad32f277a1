"""Steps of softmaxes and normalisations: integers by sums over them, row by row."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qjax.backends.native.emission import Emission, broadcast_strides
from qjax.graph.graph import Node

_SOFTMAX, _NORM, _MASKED_NORM = 21, 22, 35
_KINDS = ("softmax", "log_softmax", "logsumexp")
_EMPTY = ("zero", "all", "uniform")


def _softmax(e: Emission, node: Node) -> None:
    a, v = node.attributes, node.inputs[0]
    shape, axes = e.shapes[v], list(a["axes"])
    others = [d for d in range(len(shape)) if d not in axes]
    order, terms = [*others, *axes], math.prod(shape[d] for d in axes)
    x = e.arranged(e.of[v], shape, order)
    mask, mask_rows = -1, 1
    if len(node.inputs) > 1:
        kept = node.inputs[1]
        mask, mask_rows = _mask(
            e, e.of[kept], e.shapes[kept], shape, order, len(others)
        )
    is_sum = node.operation == "logsumexp"
    out = e.make(node.output)
    if not terms:
        e.fill(out, a["low"])
        return
    rows = out if is_sum else _row_buffer(e, out, shape, order)
    table = e.param(node, "table")
    words = [_KINDS.index(node.operation), x, mask, mask_rows, rows]
    words += [math.prod(shape[d] for d in others), terms, e.table(table), len(table)]
    words += [a["most_places"], _EMPTY.index(a["empty"]), a.get("plus", 0)]
    words += [*a.get("input_zero_points", [0])[:1], a.get("input_multiplier", 0)]
    words += [a.get("input_shift", 0), a["multiplier"], a["shift"], a["zero_point"]]
    reads = [x] if mask < 0 else [x, mask]
    e.step(_SOFTMAX, [*words, a["low"], a["high"]], reads, [rows])
    if rows != out:
        e.put_back(rows, out, shape, order)


def _mask(
    e: Emission,
    x: int,
    own: Sequence[int],
    shape: Sequence[int],
    order: list[int],
    count: int,
) -> tuple[int, int]:
    """Returns a buffer of a mask by rows, and after how many it comes again.

    Args:
      e: The plan.
      x: Buffer of the mask.
      own: Its shape.
      shape: Shape that it broadcasts to.
      order: Axes of this shape, those of the rows first.
      count: Number of axes of the rows.
    """
    first = next((k for k, d in enumerate(order) if own[d] != 1), count)
    target = list(shape)
    for d in order[: min(first, count)]:
        target[d] = 1
    rows = math.prod(target[d] for d in order[:count])
    if list(own) != target:
        whole = e.buffer(e.buffers[x].dtype, math.prod(target))
        e.copy(x, whole, target, broadcast_strides(own, target))
        x = whole
    return e.arranged(x, target, order), max(rows, 1)


def _row_buffer(e: Emission, out: int, shape: tuple[int, ...], order: list[int]) -> int:
    """Returns the buffer that rows are written to: the output, if they lie in it."""
    kept = [d for d in order if shape[d] != 1]
    if kept == sorted(kept):
        return out
    return e.buffer(e.buffers[out].dtype, e.buffers[out].elements)


def _norm(e: Emission, node: Node) -> None:
    a = node.attributes
    known = [a["is_centred"], a["count"], a["epsilon"], a["floor"], a["point"]]
    _normalised(e, node, _NORM, [*known, a.get("more", 0)])


def _masked_norm(e: Emission, node: Node) -> None:
    a = node.attributes
    known = [a["is_centred"], a["most_places"], a["least"], a["epsilon"], a["floor"]]
    _normalised(e, node, _MASKED_NORM, [*known, a["point"]])


def _normalised(e: Emission, node: Node, kind: int, known: list[int]) -> None:
    """Emits a normalisation of groups, each of them a row; `known` tells its root."""
    a, v = node.attributes, node.inputs[0]
    shape = e.shapes[v]
    if not math.prod(shape):
        e.make(node.output)
        return
    groups = dict(zip(a["axes"], a["groups"], strict=True))
    split = _parts(shape, shape, groups)
    over = [2 * d + 1 for d in range(len(shape)) if d in groups]
    others = [d for d in range(len(split)) if d not in over]
    order = [*others, *over]
    reads = [e.arranged(e.of[v], split, order)]
    head = [*reads]
    if len(node.inputs) > 1:
        kept = node.inputs[1]
        own = _parts(e.shapes[kept], shape, groups)
        mask, rows = _mask(e, e.of[kept], own, split, order, len(others))
        reads.append(mask)
        head += [mask, rows]
    lines = []
    for role in ("multiplier", "bias"):
        array = e.param(node, role)
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        lines.append(_rows_of(array, shape, split, order, len(others)))
    period = math.lcm(*(len(array) for array in lines))
    tables = [np.tile(array, (period // len(array), 1)) for array in lines]
    out = e.make(node.output)
    rows = _row_buffer(e, out, tuple(split), order)
    outer, terms = (math.prod(split[d] for d in axes) for axes in (others, over))
    words = [*head, rows, outer, terms, period, *map(e.table, tables), *known]
    words += [a["input_zero_points"][0], a["shift"], a["bias_shift"]]
    e.step(kind, [*words, a["zero_point"], a["low"], a["high"]], reads, [rows])
    if rows != out:
        e.put_back(rows, out, split, order)


def _parts(
    own: Sequence[int], shape: Sequence[int], groups: Mapping[int, int]
) -> list[int]:
    """Splits the axes of what broadcasts to a shape into groups and their places.

    An axis without groups is whole in the first of its two places.
    """
    found = []
    for d, n in enumerate([1] * (len(shape) - len(own)) + list(own)):
        g = groups.get(d, n)
        found += [g, n // g] if n == shape[d] else [1, 1]
    return found


def _rows_of(
    array: np.ndarray,
    shape: tuple[int, ...],
    split: list[int],
    order: list[int],
    count: int,
) -> np.ndarray:
    """Returns a parameter as rows, as many as it takes until they come again."""
    varies = [n != 1 for n in array.shape]
    whole = np.broadcast_to(
        array,
        [n if own else 1 for n, own in zip(shape, varies, strict=True)],
    )
    parts = []
    for d, own in enumerate(varies):
        parts += [split[2 * d], split[2 * d + 1]] if own else [1, 1]
    whole = whole.reshape(parts).transpose(order)
    lead = whole.shape[:count]
    sizes = [split[d] for d in order]
    first = next((k for k, n in enumerate(lead) if n != 1), count)
    target = [1] * first + sizes[first:]
    rows = np.broadcast_to(whole, target)
    return rows.reshape(math.prod(target[:count]), -1)


NORMALISATIONS = {
    **dict.fromkeys(_KINDS, _softmax),
    "norm": _norm,
    "masked_norm": _masked_norm,
}
