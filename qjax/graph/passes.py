"""Passes over the integer graph; a validator runs after each."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Graph
from qjax.graph.validation import validate


def merge_equal(graph: Graph, params: Mapping[str, Any]) -> Graph:
    """Merges equal operations on equal operands, above all requantizers.

    Codes that two readers put on one grid are requantized once.

    Args:
      graph: Any graph.
      params: Parameters of the graph.

    Returns:
      The graph; values that nobody reads any more are still in it (`drop_dead`).
    """
    number = list(range(len(graph.values)))
    known: dict[Any, tuple[int, ...]] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(number[v] for v in node.inputs)
        arrays = {k: _content(params[name]) for k, name in node.params.items()}
        attributes = json.dumps(node.attributes, sort_keys=True)
        graphs = {role: merge_equal(g, params) for role, g in node.graphs.items()}
        inner = tuple((role, g.to_json()) for role, g in sorted(graphs.items()))
        values = [graph.values[v] for v in node.outputs]
        made = values, tuple(sorted(arrays.items())), inner
        key = node.operation, inputs, attributes, repr(made)
        for v, same in zip(
            node.outputs, known.setdefault(key, node.outputs), strict=True
        ):
            number[v] = same
        nodes.append(dataclasses.replace(node, inputs=inputs, graphs=graphs))
    return dataclasses.replace(
        graph,
        nodes=tuple(nodes),
        outputs=tuple(number[v] for v in graph.outputs),
        sites={name: number[v] for name, v in graph.sites.items()},
    )


def _content(array: Any) -> tuple[Any, ...]:
    array = np.asarray(array)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return str(array.dtype), array.shape, digest


def drop_dead(graph: Graph, params: Mapping[str, Any]) -> tuple[Graph, dict[str, Any]]:
    """Drops what neither an output nor a site needs, and renumbers the rest.

    Args:
      graph: Any graph.
      params: Parameters of the graph.

    Returns:
      The graph and the parameters that are left. Inputs stay.
    """
    pruned = _pruned(graph)
    nodes = (node for _, own in pruned.walk() for node in own.nodes)
    names = {name for node in nodes for name in node.params.values()}
    left = {name: array for name, array in params.items() if name in names}
    grids = {name: grid for name, grid in graph.grids.items() if name in names}
    pruned = dataclasses.replace(pruned, grids=grids)
    validate(pruned, left)
    return pruned, left


def _pruned(graph: Graph) -> Graph:
    needed = {*graph.inputs, *graph.outputs, *graph.sites.values()}
    nodes = []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs, node.outputs)
            nodes.append(node)
    number = {v: k for k, v in enumerate(sorted(needed))}
    renumbered = tuple(
        dataclasses.replace(
            node,
            inputs=tuple(number[v] for v in node.inputs),
            output=number[node.output],
            others=tuple(number[v] for v in node.others),
            graphs={role: _pruned(inner) for role, inner in node.graphs.items()},
        )
        for node in reversed(nodes)
    )
    return Graph(
        tuple(graph.values[v] for v in sorted(needed)),
        renumbered,
        tuple(number[v] for v in graph.inputs),
        tuple(number[v] for v in graph.outputs),
        {name: number[v] for name, v in graph.sites.items()},
    )
