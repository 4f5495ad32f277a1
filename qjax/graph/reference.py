"""The integer graph in plain NumPy: int64, no JAX, clear before fast.

The oracle of every backend. What an operation means stands in its record:
`qjax.graph.operations`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph
from qjax.graph.operations import OPERATIONS


def run(
    graph: Graph, params: Mapping[str, Any], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Computes all values of a graph in int64.

    Args:
      graph: Graph to compute.
      params: Parameters of the graph, by name.
      inputs: Codes.

    Returns:
      Every value by number.

    Raises:
      OverflowError: if a value leaves the interval that the graph promises.
    """
    arrays = {name: np.asarray(p).astype(np.int64) for name, p in params.items()}
    return _run(graph, arrays, inputs)


def _run(
    graph: Graph, arrays: Mapping[str, np.ndarray], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    def runner(inner: Graph) -> Callable[..., list[np.ndarray]]:
        def outputs(*own: np.ndarray) -> list[np.ndarray]:
            found = _run(inner, arrays, own)
            return [found[v] for v in inner.outputs]

        return outputs

    env = {
        v: np.asarray(x, np.int64) for v, x in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        roles = {role: arrays[name] for role, name in node.params.items()}
        given = [env[v] for v in node.inputs]
        operands: list[Any] = [node.attributes, roles, given]
        if node.graphs:
            operands.append({role: runner(g) for role, g in node.graphs.items()})
        out = OPERATIONS[node.operation].meaning(*operands)
        results = out if isinstance(out, tuple) else (out,)
        for v, own in zip(node.outputs, results, strict=True):
            bound = graph.values[v]
            if own.size and (own.min() < bound.low or own.max() > bound.high):
                raise OverflowError(f"{node} leaves [{bound.low}, {bound.high}].")
            env[v] = own
    return [env[v] for v in range(len(graph.values))]
