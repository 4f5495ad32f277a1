"""Graphs whose examples lie along the first axis and do not meet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Node
from qjax.graph.sizes import Shape

_Rule = Callable[[Node, Sequence[Shape], Mapping[str, Any]], bool]


def are_apart(
    graph: Graph, params: Mapping[str, np.ndarray], shapes: Sequence[Shape]
) -> bool:
    """Returns whether examples along the first axes of all inputs never meet.

    Then the graph on the examples of several calls, one after the other, computes what
    the calls do. It is False where the rules here do not know.

    Args:
      graph: The graph.
      params: Its parameters, NumPy arrays.
      shapes: Shapes of its values.
    """
    if not graph.inputs or len({shapes[v][:1] for v in graph.inputs}) != 1:
        return False
    if not shapes[graph.inputs[0]]:
        return False
    apart = set(graph.inputs)
    for node in graph.nodes:
        inputs = [v for v in node.inputs if v in apart]
        others = [v for v in node.inputs if v not in apart]
        if not inputs:  # Of constants.
            continue
        rank = len(shapes[node.output])
        is_known = node.operation in _BROADCASTING or not others
        if not is_known or not all(_is_spread(shapes[v], rank) for v in others):
            return False
        rule = _RULES.get(node.operation)
        ends = [shapes[v] for v in node.inputs]
        if rule is None:
            return False
        if not all(shapes[v] for v in inputs) or not rule(node, ends, params):
            return False
        apart.update(node.outputs)
    return set(graph.outputs) <= apart


def _is_spread(shape: Shape, rank: int) -> bool:
    """Returns whether a value is the same for all examples of another."""
    return len(shape) < rank or len(shape) == rank and shape[:1] in ((), (1,))


def _pointwise(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    rank = max(map(len, ends))
    if any(len(shape) != rank for shape in ends):
        return False
    for role, name in node.params.items():
        shape = np.shape(params[name])
        if role in ("table", "thresholds"):
            axis = node.attributes["axis"]
            if axis is not None and axis % rank == 0:
                return False
        elif len(shape) > rank or len(shape) == rank and shape[0] != 1:
            return False
    return True


def _dot(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    bias = np.shape(params[node.params["bias"]])
    is_same = len(bias) < len(ends[0]) or bias[:1] in ((), (1,))
    plain = a["kernel_operand"] == 1 and not a["batch"][0]
    return is_same and plain and 0 not in a["contract"][0]


def _dot_codes(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    return all(batch[:1] == [0] for batch in map(list, node.attributes["batch"]))


def _conv(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    codes, _, out = node.attributes["dimensions"]
    bias = np.shape(params[node.params["bias"]])
    is_same = len(bias) < len(ends[0]) or bias[:1] in ((), (1,))
    return is_same and codes[0] == 0 and out[0] == 0


def _over_axes(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    axes = a["axes"] if "axes" in a else [a["axis"]]
    is_plain = all(len(shape) == len(ends[0]) for shape in ends)
    own = [np.shape(params[name]) for name in node.params.values()]
    if node.operation == "norm":
        is_plain &= all(len(s) < len(ends[0]) or s[:1] in ((), (1,)) for s in own)
    return is_plain and 0 not in axes


def _window(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    names = "window", "strides", "base_dilation", "dilation"
    return all(a[name][0] == 1 for name in names) and not any(a["padding"][0])


def _reshape(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    first, *rest = node.attributes["sizes"] or [0]
    return first == -1 and int(np.prod(rest)) == int(np.prod(ends[0][1:])) > 0


def _slice(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    whole = (None, 0), (None,), (None, 1)
    names = "start", "stop", "steps"
    return all(a[k][0] in own for k, own in zip(names, whole, strict=True))


def _broadcast(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    return list(a["dimensions"][:1]) == [0] and a["sizes"][0] is None


def _gather(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    pairs = zip(
        a["operand_batching_dims"], a["start_indices_batching_dims"], strict=True
    )
    return (0, 0) in pairs and 0 not in a["offset_dims"]


def _scatter(node: Node, ends: Sequence[Shape], params: Mapping[str, Any]) -> bool:
    a = node.attributes
    pairs = zip(
        a["operand_batching_dims"], a["scatter_indices_batching_dims"], strict=True
    )
    is_open = a.get("sizes", [None])[0] is None
    return (0, 0) in pairs and 0 not in a["update_window_dims"] and is_open


_POINTWISE = (
    "add arithmetic clip compare divide maximum minimum multiply multiply_codes "
    "requantize select table thresholds tflite_add tflite_average"
)
_OVER_AXES = (
    "sum max min argmax argmin running_sum softmax log_softmax logsumexp norm rev "
    "concatenate sort argsort"
)
_OVER_LAST = "tflite_softmax tflite_softmax16 tflite_log_softmax tflite_l2_norm"
# They take an input that is the same for all examples.
_BROADCASTING = frozenset(
    "add arithmetic divide maximum minimum multiply_codes softmax log_softmax "
    "logsumexp tflite_add".split()
)
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_OVER_AXES.split(), _over_axes),
    **dict.fromkeys(("sum_pool", "max_pool", "min_pool"), _window),
    **dict.fromkeys(_OVER_LAST.split(), lambda node, ends, params: len(ends[0]) > 1),
    **dict.fromkeys("scatter scatter_add scatter_max scatter_min".split(), _scatter),
    "gather": _gather,
    "tflite_resize": lambda node, ends, params: True,
    "dot": _dot,
    "dot_codes": _dot_codes,
    "conv": _conv,
    "reshape": _reshape,
    "slice": _slice,
    "broadcast": _broadcast,
    "transpose": lambda node, ends, params: node.attributes["permutation"][0] == 0,
    "pad": lambda node, ends, params: not any(node.attributes["padding"][0]),
    "embed": lambda node, ends, params: True,
    "take": lambda node, ends, params: not node.attributes.get("crosses_examples"),
}
