"""Splits a graph into runs of nodes for native kernels and runs for XLA."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qjax.backends.native.plan import reason
from qjax.graph.graph import Graph, Node
from qjax.graph.sizes import Shape

# They compute nothing: alone among nodes of XLA they stay with them.
_MOVES = frozenset("reshape transpose slice rev broadcast constant".split())


@dataclasses.dataclass(frozen=True)
class Piece:
    """Nodes of a graph that run together.

    Attributes:
      graph: The nodes as a graph, over the numbers of values of the whole.
      reasons: For each node why XLA runs it, "" for one that native kernels run.
    """

    graph: Graph
    reasons: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """Returns whether native kernels run it."""
        return not any(self.reasons)


def partition(
    graph: Graph,
    params: Mapping[str, np.ndarray],
    shapes: Sequence[Shape],
    refusal: Callable[[np.ndarray], str],
) -> list[Piece]:
    """Splits a graph into pieces, in order, native ones as long as they can be.

    Args:
      graph: The graph.
      params: Its parameters, NumPy arrays.
      shapes: Shapes of its values.
      refusal: Returns why the library does not read the words of a plan, or "".
    """
    own = params, shapes, refusal
    reasons = [reason(graph, node, *own) for node in graph.nodes]
    runs: list[list[int]] = []
    for k, why in enumerate(reasons):
        if runs and bool(reasons[runs[-1][-1]]) == bool(why):
            runs[-1].append(k)
        else:
            runs.append([k])
    runs = _without_moves(graph, reasons, runs)
    if len(runs) == 1:
        return [Piece(dataclasses.replace(graph, sites={}), tuple(reasons))]
    return [_piece(graph, reasons, run) for run in runs]


def _without_moves(
    graph: Graph, reasons: list[str], runs: list[list[int]]
) -> list[list[int]]:
    """Joins native runs that compute nothing to those of XLA before them."""
    if len(runs) == 1:
        return runs
    found: list[list[int]] = []
    for run in runs:
        names = {graph.nodes[k].operation for k in run}
        if not reasons[run[0]] and names <= _MOVES:
            for k in run:
                reasons[k] = "it moves integers between nodes that XLA runs"
        if found and bool(reasons[found[-1][0]]) == bool(reasons[run[0]]):
            found[-1] += run
        else:
            found.append(list(run))
    return found


def _piece(graph: Graph, reasons: Sequence[str], run: Sequence[int]) -> Piece:
    nodes: list[Node] = [graph.nodes[k] for k in run]
    made = {v for node in nodes for v in node.outputs}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v not in made)
    rest = [node for k, node in enumerate(graph.nodes) if k not in set(run)]
    needed = {v for node in rest for v in node.inputs} | set(graph.outputs)
    outputs = tuple(sorted(made & needed))
    own = Graph(graph.values, tuple(nodes), tuple(read), outputs, {})
    return Piece(own, tuple(reasons[k] for k in run))
