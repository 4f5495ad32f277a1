"""Sizes of a graph for inputs of other sizes than those it was lowered with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations import OPERATIONS, Operands

Shape = tuple[int, ...]


def input_shapes(graph: Graph, batch_size: int) -> list[Shape]:
    """Returns the shapes of the inputs for another number of examples.

    Args:
      graph: The graph.
      batch_size: Size of the leading axis of the first input that leaves it free, and
        of those that were traced with the same one. Others keep what they had.
    """
    values = [graph.values[v] for v in graph.inputs]

    def is_free(x: Value) -> bool:
        many = x.is_free_beyond_one and batch_size > 1
        return bool(x.shape) and x.time_axis != 0 and (many or not x.fixed_by)

    fixed = {x.shape[0] for x in values if x.shape and not is_free(x)}
    open_ = [x.shape[0] for x in values if is_free(x) and x.shape[0] not in fixed]
    return [
        (batch_size, *x.shape[1:])
        if is_free(x) and x.shape[0] in open_[:1]
        else x.shape
        for x in values
    ]


def value_shapes(
    graph: Graph, params: Mapping[str, Any], inputs: Sequence[Shape]
) -> list[Shape]:
    """Computes the shapes of all values of a graph for shapes of its inputs.

    Args:
      graph: The graph.
      params: Parameters of the graph, NumPy arrays.
      inputs: Shapes of the inputs.

    Returns:
      Shape by value; that of the graph where no node computes the value.

    Raises:
      ValueError: if an operation does not take the shapes.
    """
    shapes: list[Shape] = [v.shape for v in graph.values]
    for v, shape in zip(graph.inputs, inputs, strict=True):
        shapes[v] = tuple(shape)
    for node in graph.nodes:
        given = [shapes[v] for v in node.inputs]
        found = output_shapes(graph, node, params, given)
        for v, shape in zip(node.outputs, found, strict=True):
            shapes[v] = shape
    return shapes


def output_shapes(
    graph: Graph, node: Node, params: Mapping[str, Any], inputs: Sequence[Shape]
) -> list[Shape]:
    """Computes the shapes of the outputs of a node, as `value_shapes`."""
    if node.graphs:
        return _of_loop(node, params, inputs)
    if inputs:
        check_sizes(node, inputs[0])
    given = [
        dataclasses.replace(graph.values[v], shape=tuple(shape))
        for v, shape in zip(node.inputs, inputs, strict=True)
    ]
    own = {role: params[name] for role, name in node.params.items()}
    operands = Operands(node.attributes, given, own)
    return [tuple(OPERATIONS[node.operation].shape(operands))]


def check_sizes(node: Node, shape: Shape) -> None:
    """Checks the shape of the first input of a node that sums over axes of it.

    Raises:
      ValueError: if an axis has another size than that for which sums are known to fit.
    """
    a = node.attributes
    if node.operation == "sum":
        sizes = [shape[d] for d in a["axes"]]
        if sizes != list(a["sizes"]):
            raise ValueError(
                f"This program sums over axes {tuple(a['axes'])}, which had sizes "
                f"{a['sizes']} when it was lowered and now have {sizes}. "
                "Lower the model for this shape."
            )
    elif node.operation in ("softmax", "log_softmax", "logsumexp"):
        places = math.prod(shape[d] for d in a["axes"])
        if places > a["most_places"]:
            raise ValueError(
                f"This program has the sum of a softmax over axes {tuple(a['axes'])}, "
                f"whose table is made for at most {a['most_places']} places, and they "
                f"now have {places}. Lower the model for this shape."
            )
    elif node.operation == "masked_norm":
        pairs = zip(a["axes"], a["groups"], strict=True)
        found = math.prod(shape[d] // g for d, g in pairs)
        if found > a["most_places"]:
            raise ValueError(
                f"This program normalises over axes {tuple(a['axes'])}, where a group "
                f"had at most {a['most_places']} values when it was lowered and now "
                f"has {found}. Lower the model for this shape."
            )
    elif node.operation == "norm":
        pairs = zip(a["axes"], a["groups"], strict=True)
        found = math.prod(shape[d] // g for d, g in pairs)
        if found != a["count"]:
            raise ValueError(
                f"This program normalises over axes {tuple(a['axes'])}, where a group "
                f"had {a['count']} values when it was lowered and now has {found}. "
                "Lower the model for this shape."
            )


def _of_loop(
    node: Node, params: Mapping[str, Any], inputs: Sequence[Shape]
) -> list[Shape]:
    a, body = node.attributes, node.graphs["body"]
    shapes = value_shapes(body, params, body_shapes(node, inputs))
    made, length = [shapes[v] for v in body.outputs], loop_length(node, inputs)
    kept = [(length, *shape) for shape in made[a["carries"] :]]
    return [*made[: a["carries"]], *kept]


def body_shapes(node: Node, inputs: Sequence[Shape]) -> list[Shape]:
    """Returns the shapes of the inputs of the body of a loop."""
    first = node.attributes["consts"] + node.attributes["carries"]
    return [shape if k < first else shape[1:] for k, shape in enumerate(inputs)]


def loop_length(node: Node, inputs: Sequence[Shape]) -> int:
    """Returns the number of steps of a loop."""
    a = node.attributes
    if a["length"] is not None:
        return int(a["length"])
    return inputs[a["consts"] + a["carries"]][0]
