"""Collects the values, nodes and parameters of an integer graph."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Grid, Node, Value, check, storage


class GraphBuilder:
    """Collects a graph and its parameters.

    Attributes:
      values: Of the graph.
      nodes: Of the graph, in order.
      params: Name -> array.
      sites: Name of a quantization point -> its codes.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}
        self.sites: dict[str, int] = {}

    def add_value(
        self,
        shape: tuple[int, ...],
        low: int,
        high: int,
        grid: Grid | None = None,
        *,
        dtype: str | None = None,
    ) -> int:
        """Adds a value, in the smallest type that holds its bounds by default."""
        dtype = storage(low, high) if dtype is None else dtype
        self.values.append(Value(tuple(shape), dtype, int(low), int(high), grid))
        return len(self.values) - 1

    def add_node(
        self,
        operation: str,
        inputs: tuple[int, ...],
        value: int,
        *,
        params: Mapping[str, str] | None = None,
        path: str = "",
        **attributes: Any,
    ) -> int:
        """Adds an operation that computes ``value``."""
        params = {} if params is None else params
        self.nodes.append(Node(operation, inputs, value, params, attributes, path))
        return value

    def add_param(self, name: str, array: np.ndarray) -> str:
        """Adds a parameter under its name, or one like it if that is taken."""
        others = [k for k, p in self.params.items() if not _same(p, array)]
        unique = unique_name(name, others)
        self.params[unique] = array
        return unique

    def add_site(self, name: str, value: int) -> None:
        """Remembers the codes of a quantization point."""
        self.sites[unique_name(name or "qpoint", self.sites)] = value

    def graph(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Graph:
        """Returns what was built."""
        graph = Graph(
            tuple(self.values), tuple(self.nodes), inputs, outputs, dict(self.sites)
        )
        check(graph)
        return graph


def unique_name(name: str, taken: Collection[str]) -> str:
    """Returns ``name``, or ``name:1``, ``name:2``, ... if it is taken."""
    if name not in taken:
        return name
    return next(n for k in itertools.count(1) if (n := f"{name}:{k}") not in taken)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))


def compact(x: np.ndarray) -> np.ndarray:
    """Gives size 1 to every axis along which values repeat."""
    for axis in range(x.ndim):
        first = x.take([0], axis) if x.shape[axis] else x
        if x.shape[axis] > 1 and np.all(x == first):
            x = first
    return x
