"""Finds the leading sizes of a program that may differ at call time.

A size is free if the model, traced with another one, lowers to the same operations on
the same integers. Inputs that share a leading size vary together.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.graph.graph import Graph, Node
from qjax.lowering.interpret import where
from qjax.model.trace import Equation, Trace, is_key

Lowered = tuple[Trace, Graph, Mapping[str, np.ndarray]]


def find_fixed(
    lower: Callable[[tuple[Any, ...]], Lowered], inputs: tuple[Any, ...], found: Lowered
) -> dict[int, tuple[str, bool]]:
    """Finds the inputs whose leading size is fixed.

    Args:
      lower: Maps inputs, of which only shapes are read, to what they lower to.
      inputs: Inputs for which the model was lowered.
      found: Result of that lowering.

    Returns:
      Number of the input -> the equation that fixes its leading size, in words, and
      whether it does so for a size of 1 alone.
    """
    leaves, tree = jax.tree.flatten(inputs)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), _dtype(x)) for x in leaves]
    fixed: dict[int, tuple[str, bool]] = {}
    for size in dict.fromkeys(x.shape[0] for x in shapes if x.shape):
        own = [k for k, x in enumerate(shapes) if x.shape and x.shape[0] == size]

        def reason(other: int, size: int = size, own: list[int] = own) -> str:
            """Returns why another size differs; empty if it does not."""
            if size == other:
                return ""
            resized = [
                jax.ShapeDtypeStruct((other, *x.shape[1:]), x.dtype) if k in own else x
                for k, x in enumerate(shapes)
            ]
            again = jax.tree.unflatten(tree, resized)
            return _reason(lower, again, found, (size, other))

        # Many more, odd where this one is even and the reverse; the least there is.
        is_of_one, why = False, reason(4 * size + 3 + size % 2)
        if not why and (why := reason(1)):
            is_of_one = size > 1 and not reason(2)
        if why:
            fixed.update(dict.fromkeys(own, (why, is_of_one)))
    return fixed


def _dtype(x: Any) -> Any:
    return jax.dtypes.result_type(x)


def _reason(
    lower: Callable[[tuple[Any, ...]], Lowered],
    inputs: tuple[Any, ...],
    found: Lowered,
    sizes: tuple[int, int],
) -> str:
    """Returns why a leading size is fixed; empty if it is not."""
    try:
        other = lower(inputs)
    except Exception as error:  # Whatever the model raises for another size.
        text = str(error).strip().partition("\n")[0].rstrip(".")
        return f"the model: with {sizes[1]} it raises {type(error).__name__}: {text}"
    node = _first_difference(found[1:], other[1:])
    if node is None:
        return ""
    if (e := _first_change(found[0], other[0], sizes)) is not None:
        return f"`{e.primitive.name}` in {where(e)}: {e}"
    if isinstance(node, Node):
        return f"`{node.operation}` in {node.path or 'the traced function'!r}"
    return "its outputs"


def _first_difference(a: Any, b: Any) -> Node | str | None:
    """Returns the first operation that differs with the other size."""
    (graph, params), (other, other_params) = a, b
    for node, twin in itertools.zip_longest(graph.nodes, other.nodes):
        if node is None or twin is None:
            return node or "end"
        if dataclasses.replace(node, graphs=twin.graphs) != twin:
            return node
        if set(node.graphs) != set(twin.graphs):
            return node
        for role, inner in node.graphs.items():
            pair = (inner, params), (twin.graphs[role], other_params)
            if _first_difference(*pair) is not None:
                return node
        own = (*node.outputs, *node.inputs), (*twin.outputs, *twin.inputs)
        for v, w in zip(*own, strict=True):
            x, y = graph.values[v], other.values[w]
            if dataclasses.replace(x, shape=y.shape) != y:
                return node
        for name in node.params.values():
            if not np.array_equal(params[name], other_params[name]):
                return node
    ends = graph.inputs, graph.outputs, graph.sites
    same = ends == (other.inputs, other.outputs, other.sites)
    return None if same and len(graph.values) == len(other.values) else "end"


def _first_change(a: Trace, b: Trace, sizes: tuple[int, int]) -> Equation | None:
    """Returns the first equation that differs in more than sizes for another size."""
    for e, other in zip(a.equations, b.equations, strict=False):
        if e.primitive is not other.primitive or e.inputs != other.inputs:
            return e
        for v in e.inputs:
            x, y = a.constants.get(v), b.constants.get(v)
            if x is not None and y is not None and not _equal(x, y):
                return e
        pairs = itertools.zip_longest(_numbers(e.params), _numbers(other.params))
        for m, n in pairs:
            grown = m is not None and n is not None and m * sizes[1] == n * sizes[0]
            if m != n and not grown:
                return e
    return None


def _equal(x: Any, y: Any) -> bool:
    if is_key(x):
        return True
    return np.shape(x) == np.shape(y) and np.array_equal(np.asarray(x), np.asarray(y))


def _numbers(value: Any) -> list[int]:
    """Returns the integers in the parameters of an equation."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, dict):
        return [n for v in value.values() for n in _numbers(v)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [n for v in value for n in _numbers(v)]
    return []
