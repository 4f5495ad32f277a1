"""The integer graph in plain NumPy: int64, no JAX, clear before fast.

The oracle of every backend. What an operation means stands in its record:
`qjax.graph.operations`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Node
from qjax.graph.operations import OPERATIONS


def run(
    graph: Graph,
    params: Mapping[str, Any],
    inputs: Sequence[np.ndarray],
    sites: dict[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Computes all values of a graph in int64.

    Args:
      graph: Graph to compute.
      params: Parameters of the graph, by name.
      inputs: Codes.
      sites: Receives the codes of all quantization points by name; those inside of
        loops with an axis of steps before the others.

    Returns:
      Every value by number.

    Raises:
      OverflowError: if a value leaves the interval that the graph promises.
    """
    arrays = {
        name: np.asarray(p).astype(np.int64, copy=False) for name, p in params.items()
    }
    return _run(graph, arrays, inputs, {} if sites is None else sites)


def _run(
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[np.ndarray],
    sites: dict[str, np.ndarray],
) -> list[np.ndarray]:
    env = {
        v: np.asarray(x, np.int64) for v, x in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        roles = {role: arrays[name] for role, name in node.params.items()}
        given = [env[v] for v in node.inputs]
        operands: list[Any] = [node.attributes, roles, given]
        seen: list[dict[str, np.ndarray]] = []
        if node.graphs:
            own = ((role, _runner(g, arrays, seen)) for role, g in node.graphs.items())
            operands.append(dict(own))
        out = OPERATIONS[node.operation].meaning(*operands)
        if seen:
            sites.update(_of_steps(seen, node, given))
        results = out if isinstance(out, tuple) else (out,)
        for v, x in zip(node.outputs, results, strict=True):
            bound = graph.values[v]
            if x.size and (x.min() < bound.low or x.max() > bound.high):
                raise OverflowError(f"{node} leaves [{bound.low}, {bound.high}].")
            env[v] = x
    sites.update({name: env[v] for name, v in graph.sites.items()})
    return [env[v] for v in range(len(graph.values))]


def _runner(
    inner: Graph,
    arrays: Mapping[str, np.ndarray],
    seen: list[dict[str, np.ndarray]],
) -> Callable[..., list[np.ndarray]]:
    """Makes a graph a function, which adds the codes of each call to a list."""

    def outputs(*own: np.ndarray) -> list[np.ndarray]:
        seen.append({})
        found = _run(inner, arrays, own, seen[-1])
        return [found[v] for v in inner.outputs]

    return outputs


def _of_steps(
    seen: Sequence[Mapping[str, np.ndarray]], node: Node, inputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the codes of the steps of a loop, the first step first."""
    a = node.attributes
    length = a.get("length", len(seen))
    if length is None:
        length = len(inputs[a["consts"] + a["carries"]])
    order = seen[::-1] if a.get("is_reversed") else seen
    # One call has shown the shapes of a loop without steps.
    return {name: np.stack([s[name] for s in order])[:length] for name in seen[0]}
