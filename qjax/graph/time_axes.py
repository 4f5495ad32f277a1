"""Axes of time: where they are behind an operation that looks at one step alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.graph.graph import Graph, Node


class Time(NamedTuple):
    """The axis of time of a value in a step."""

    axis: int
    # Steps before this one that the value still has; below 0, last steps that it lacks,
    # which a step has and nothing may read yet.
    past: int = 0


# Rules: the axis of time of the output and the attributes of a step; None to refuse.

Times = Sequence[Time | None]  # Of the inputs of a node.
Params = Mapping[str, Any]
_Found = tuple[int, Mapping[str, Any]] | None
_Rule = Callable[[Node, Times, Graph, Params], _Found]


def _elementwise(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis that all inputs share, if nothing else has one size along it."""
    shapes = [graph.values[v].shape for v in node.inputs]
    rank = len(graph.values[node.output].shape)
    (axis, *others) = {t.axis for t in times if t is not None}
    if others or any(len(shape) != rank for shape in shapes):
        return None
    pairs = zip(shapes, times, strict=True)
    if any(t is None and shape[axis] != 1 for shape, t in pairs):
        return None
    for role, name in node.params.items():
        shape = np.shape(params[name])
        if role in ("table", "thresholds"):
            own = node.attributes["axis"]
            if own is not None and own % rank == axis:
                return None
        elif len(shape) >= rank - axis and shape[axis - rank] != 1:
            return None
    return axis, node.attributes


def _over_axes(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis behind a reduction over other axes."""
    a, (time, *_) = node.attributes, times
    axes = a["axes"] if "axes" in a else [a["axis"]]
    if time is None or time.axis in axes or len([t for t in times if t]) > 1:
        return None
    return time.axis - sum(d < time.axis for d in axes), a


def _kept(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis of an operation over other axes that keeps them."""
    a, (time, *_) = node.attributes, times
    axes = a.get("axes", [a.get("axis")])
    is_split = any(n != 1 for n in a.get("groups", ()))
    if time is None or time.axis in axes or len(times) > 1 or is_split:
        return None
    lines = (
        node.params[role] for role in ("multiplier", "bias") if role in node.params
    )
    if any(_size(graph, params, name, time.axis, node) != 1 for name in lines):
        return None
    return time.axis, a


def _size(graph: Graph, params: Params, name: str, axis: int, node: Node) -> int:
    """Returns the size of a parameter along an axis of the output."""
    shape, rank = np.shape(params[name]), len(graph.values[node.output].shape)
    return shape[axis - rank] if len(shape) >= rank - axis else 1


def _transpose(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,) = times
    assert time is not None
    return list(node.attributes["permutation"]).index(time.axis), node.attributes


def _concatenate(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    axes = {None if t is None else t.axis for t in times}
    (axis, *others) = axes
    if others or axis is None or axis == node.attributes["axis"]:
        return None
    return axis, node.attributes


def _slice(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,), a = times, node.attributes
    assert time is not None
    own = slice(*(a[name][time.axis] for name in ("start", "stop", "steps")))
    length = graph.values[node.inputs[0]].shape[time.axis]
    if own.indices(length) != (0, length, 1):
        return None
    whole = {name: list(a[name]) for name in ("start", "stop", "steps")}
    for name in whole:
        whole[name][time.axis] = None
    return time.axis, {**a, **whole}


def _rev(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,), a = times, node.attributes
    assert time is not None
    return None if time.axis in a["axes"] else (time.axis, a)


def _pad(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,), a = times, node.attributes
    assert time is not None
    return None if any(a["padding"][time.axis]) else (time.axis, a)


def _reshape(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis behind a reshape that leaves it whole."""
    (time,), a = times, node.attributes
    assert time is not None
    before = graph.values[node.inputs[0]].shape
    after = graph.values[node.output].shape
    length, ahead = before[time.axis], int(np.prod(before[: time.axis]))
    rest = before[time.axis + 1 :]
    for axis, n in enumerate(after):
        same = int(np.prod(after[:axis])) == ahead and n == length
        if same and int(np.prod(after[axis + 1 :])) == int(np.prod(rest)):
            sizes = list(a["sizes"])
            if sizes[axis] == -1:
                return None
            sizes[axis] = 1
            return axis, {**a, "sizes": sizes}
    return None


def _broadcast(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,), a = times, node.attributes
    assert time is not None
    axis = a["dimensions"][time.axis]
    sizes = list(a["sizes"])
    length = graph.values[node.inputs[0]].shape[time.axis]
    if sizes[axis] not in (None, length):
        return None
    sizes[axis] = None
    return axis, {**a, "sizes": sizes}


def _dot(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis behind a product that sums over other axes."""
    a = node.attributes
    sides: list[Time | None] = list(times)
    ranks = [len(graph.values[v].shape) for v in node.inputs]
    if node.operation == "dot":
        operand = a["kernel_operand"]
        sides.insert(operand, None)
        ranks.insert(operand, np.ndim(params[node.params["kernel"]]))
    found: set[int] = set()
    pairs = zip(ranks, a["contract"], a["batch"], strict=True)
    frees = [
        [d for d in range(rank) if d not in (*summed, *batch)]
        for rank, summed, batch in pairs
    ]
    count = len(a["batch"][0])
    for k, (time, free) in enumerate(zip(sides, frees, strict=True)):
        if time is None:
            continue
        if time.axis in a["contract"][k]:
            return None
        if time.axis in a["batch"][k]:
            found.add(list(a["batch"][k]).index(time.axis))
        else:
            found.add(count + k * len(frees[0]) + free.index(time.axis))
    if len(found) != 1:
        return None
    both = [time is not None for time in sides]
    (axis,) = found
    if axis < count and not all(both):
        return None
    if (
        "bias" in node.params
        and _size(graph, params, node.params["bias"], axis, node) != 1
    ):
        return None
    return axis, a


def _embed(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    (time,) = times
    assert time is not None
    return time.axis, node.attributes


def _gather(node: Node, times: Times, graph: Graph, params: Params) -> _Found:
    """Returns the axis of places in a table, each step of which reads its own."""
    a, (table, places) = node.attributes, times
    if places is None:
        return None
    batch = list(a["start_indices_batching_dims"])
    own = batch.index(places.axis) if places.axis in batch else None
    along = None if own is None else a["operand_batching_dims"][own]
    if (table is None) != (along is None) or (table and table.axis != along):
        return None
    rank = len(graph.values[node.output].shape)
    others = [d for d in range(rank) if d not in a["offset_dims"]]
    return others[places.axis], a


TIME_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        (
            "requantize table thresholds clip add multiply multiply_codes compare "
            "select maximum minimum arithmetic divide"
        ).split(),
        _elementwise,
    ),
    **dict.fromkeys("sum max min argmax argmin".split(), _over_axes),
    **dict.fromkeys("softmax log_softmax norm sort argsort running_sum".split(), _kept),
    "logsumexp": lambda node, *rest: (
        _kept if node.attributes["keepdims"] else _over_axes
    )(node, *rest),
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "rev": _rev,
    "reshape": _reshape,
    "broadcast": _broadcast,
    "dot": _dot,
    "dot_codes": _dot,
    "embed": _embed,
    "gather": _gather,
    "pad": _pad,
}


def is_elementwise(node: Node) -> bool:
    """Returns whether each number of an output has the place of those it is made of."""
    return TIME_RULES.get(node.operation) is _elementwise
