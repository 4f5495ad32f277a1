"""Collects the values, nodes and parameters of an integer graph."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Grid, Node, Value, check, storage
from qjax.graph.operations import OPERATIONS, Operands


class GraphBuilder:
    """A builder that collects a graph and its parameters.

    Attributes:
      values: Values of the graph.
      nodes: Nodes of the graph, in order.
      params: Name -> array.
      grids: Name of a parameter -> its grid; None where readers have it on several.
      sites: Name of a quantization point -> its codes.
      taken: Names of quantization points in graphs around it and inside of its nodes.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}
        self.grids: dict[str, Grid | None] = {}
        self.sites: dict[str, int] = {}
        self.taken: set[str] = set()

    def add_value(
        self,
        shape: tuple[int, ...],
        low: int,
        high: int,
        grid: Grid | None = None,
        *,
        dtype: str | None = None,
    ) -> int:
        """Adds a value, by default in the smallest type that holds its bounds."""
        dtype = storage(low, high) if dtype is None else dtype
        self.values.append(Value(tuple(shape), dtype, int(low), int(high), grid))
        return len(self.values) - 1

    def outcome(
        self,
        operation: str,
        inputs: Sequence[int],
        params: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any],
        graphs: Mapping[str, Graph] | None = None,
    ) -> tuple[tuple[int, ...], int, int]:
        """Computes shape and interval that an operation would give, by its record.

        Args:
          operation: Name of the operation.
          inputs: Values.
          params: Role -> array.
          attributes: Attributes of the node.
          graphs: Graphs of the node.

        Returns:
          The shape of the output, and the least and the largest of its integers; 0 and
          0 where it has none.

        Raises:
          ValueError: if the operands do not fit each other.
        """
        record = OPERATIONS[operation]
        values = [self.values[v] for v in inputs]
        operands = Operands(attributes, values, params, graphs)
        shape, ends = record.shape(operands), record.interval(operands)
        if not all(np.size(end) for end in ends):
            return shape, 0, 0
        return shape, int(np.min(ends[0])), int(np.max(ends[1]))

    def add(
        self,
        operation: str,
        inputs: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        grid: Grid | None = None,
        dtype: str | None = None,
        path: str = "",
        graphs: Mapping[str, Graph] | None = None,
    ) -> int:
        """Adds an operation, whose output has shape and interval by its record.

        Args:
          operation: Name of the operation.
          inputs: Values.
          attributes: Attributes of the node.
          params: Role -> name of a parameter of the graph.
          grid: Grid of the output.
          dtype: Type of the output; by default the smallest type that holds it.
          path: Module path of the operation.
          graphs: Role -> graph that the operation runs, over the parameters of this.

        Returns:
          The number of the output.

        Raises:
          ValueError: if the operands do not fit each other.
        """
        attributes, params = dict(attributes or {}), dict(params or {})
        own = {role: self.params[name] for role, name in params.items()}
        found = self.outcome(operation, inputs, own, attributes, graphs)
        value = self.add_value(*found, grid, dtype=dtype)
        inner = dict(graphs or {})
        node = Node(operation, tuple(inputs), value, params, attributes, path, inner)
        self.nodes.append(node)
        return value

    def add_loop(
        self,
        inputs: Sequence[int],
        body: Graph,
        attributes: Mapping[str, Any],
        *,
        path: str = "",
    ) -> tuple[int, ...]:
        """Adds a loop, each output in type and on the grid that its step has.

        Args:
          inputs: What all steps read, what is carried, what each step has a part of.
          body: Graph of a step, over the parameters of this.
          attributes: Attributes of the node.
          path: Module path of the loop.

        Returns:
          The numbers of the outputs: what is carried, then what each step leaves.

        Raises:
          ValueError: if the body does not fit the inputs.
        """
        graphs = {"body": body}
        given = [self.values[v] for v in inputs]
        found = OPERATIONS["loop"].outputs(Operands(attributes, given, {}, graphs))
        first, carries = attributes["consts"], attributes["carries"]
        own = [*body.inputs[first : first + carries], *body.outputs[carries:]]
        outputs = tuple(
            self.add_value(
                shape, *ends, body.values[v].grid, dtype=body.values[v].dtype
            )
            for v, (shape, ends) in zip(own, found, strict=True)
        )
        options: Any = {"graphs": graphs, "others": outputs[1:]}
        self.nodes.append(
            Node(
                "loop", tuple(inputs), outputs[0], {}, dict(attributes), path, **options
            )
        )
        return outputs

    def add_param(self, name: str, array: np.ndarray, grid: Grid | None = None) -> str:
        """Adds a parameter under its name, or under a similar one if that is taken.

        Args:
          name: Name that it should have.
          array: Its integers.
          grid: Grid of the integers, whose scale broadcasts to them.

        Returns:
          The name that it has.
        """
        others = [k for k, p in self.params.items() if not _same(p, array)]
        unique = unique_name(name, others)
        is_other = unique in self.params and self.grids.get(unique) != grid
        self.grids[unique] = None if is_other else grid
        self.params[unique] = array
        return unique

    def add_site(self, name: str, value: int) -> None:
        """Records the codes of a quantization point."""
        taken = {*self.sites, *self.taken}
        self.sites[unique_name(name or "qpoint", taken)] = value

    def graph(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Graph:
        """Returns the finished graph."""
        ends, sites = (inputs, outputs), dict(self.sites)
        grids = {name: grid for name, grid in self.grids.items() if grid is not None}
        graph = Graph(tuple(self.values), tuple(self.nodes), *ends, sites, grids)
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
    """Reduces to size 1 every axis along which values repeat."""
    for axis in range(x.ndim):
        first = x.take([0], axis) if x.shape[axis] else x
        if x.shape[axis] > 1 and np.all((x == first) | ((x != x) & (first != first))):
            x = first
    return x
