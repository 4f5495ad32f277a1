"""The integer graph of a lowered model. Backends read it and nothing else.

The meaning of each operation stands in its record: `qjax.graph.operations`.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax.tables import show_types


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of integers on the real line: ``real = scale * (code - zero_point)``."""

    scale: Any  # A float, or nested lists in the rank of the value. float32 numbers.
    zero_point: int

    def array(self) -> np.ndarray:
        """Returns the scale as float32."""
        return np.asarray(self.scale, np.float32)


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the graph: integers of one type within ``[low, high]``."""

    shape: tuple[int, ...]  # Traced shape.
    dtype: str
    low: int
    high: int
    grid: Grid | None = None
    # Rescaling of an input: real = gain * input + offset.
    rescaling: tuple[float, float] = (1.0, 0.0)
    is_rescaling_exact: bool = True  # True if the input rounds as in the model.
    # The equation that fixes the leading size of an input. Empty: it may differ at
    # call time, if it stays that of all inputs that were traced with the same one.
    fixed_by: str = ""
    is_free_beyond_one: bool = False  # True if `fixed_by` speaks of a size of 1 alone.
    is_place: bool = False  # True for an input that chooses rows and takes no others.
    time_axis: int | None = None  # Axis of an input along which the graph streams.
    dtype_of_model: str = ""  # Type in the model of an output of integers.
    # Rounding of a real input: "half_even" of its product with the reciprocal of the
    # scale, or "half_away" of its float32 quotient by the scale, as TFLite has it.
    rounding: str = "half_even"

    @property
    def zero_point(self) -> int:
        """Returns the code of 0; accumulators have 0."""
        return 0 if self.grid is None else self.grid.zero_point


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation of the graph, applied to values."""

    operation: str
    inputs: tuple[int, ...]
    output: int
    params: Mapping[str, str]  # Role -> name in the parameters of the program.
    attributes: Mapping[str, Any]  # JSON: numbers, strings, lists.
    path: str = ""
    # Role -> graph that the operation runs, over the same parameters.
    graphs: Mapping[str, "Graph"] = dataclasses.field(default_factory=dict)
    others: tuple[int, ...] = ()  # Outputs after the first.

    @property
    def outputs(self) -> tuple[int, ...]:
        """Returns the values that it computes."""
        return (self.output, *self.others)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph of nodes in order, over numbered values."""

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sites: Mapping[str, int]  # Name of a quantization point -> its codes.
    # Name of a parameter -> its grid, of weights and biases that have one; of a whole
    # program, for those in graphs inside of its nodes as well. The arithmetic reads
    # none: what leaves the package with real values does.
    grids: Mapping[str, Grid] = dataclasses.field(default_factory=dict)

    def walk(self, place: str = "") -> Iterator[tuple[str, "Graph"]]:
        """Yields this graph and all graphs inside of its nodes, each with its place.

        Args:
          place: Place of this graph, empty for a whole program.

        Yields:
          The place, such as ``"the body of %3 = loop"``, and the graph.
        """
        yield place, self
        for n in self.nodes:
            for role, graph in n.graphs.items():
                yield from graph.walk(self.place_of(n, role, place))

    def place_of(self, node: Node, role: str, place: str) -> str:
        """Returns the place of a graph inside of a node, in a graph at a place."""
        inside = f" in {place}" if place else ""
        return f"the {role} of %{node.output} = {node.operation}{inside}"

    def __str__(self):
        lines = [f"inputs: {', '.join(self._show(v) for v in self.inputs)}"]
        for n in self.nodes:
            args = ", ".join([*(f"%{v}" for v in n.inputs), *n.params.values()])
            where = f"  # {n.path}" if n.path else ""
            made = ", ".join(map(self._show, n.outputs))
            lines.append(f"{made} = {n.operation}({args}){where}")
            for role, graph in n.graphs.items():
                lines += [f"  {role}:", textwrap.indent(str(graph), " " * 4)]
        return "\n".join(
            [*lines, f"outputs: {', '.join(map(self._show, self.outputs))}"]
        )

    def __repr__(self) -> str:
        ends = [[self.values[v] for v in vs] for vs in (self.inputs, self.outputs)]
        inputs, outputs = map(show_types, ends)
        return (
            f"Graph({len(self.nodes)} operations, inputs={inputs}, outputs={outputs}; "
            "print it to see them)"
        )

    def _show(self, v: int) -> str:
        value = self.values[v]
        return f"%{v}:{value.dtype}[{','.join(map(str, value.shape))}]"

    def to_json(self) -> str:
        """Returns the graph as JSON, the same text for the same graph."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Graph":
        """Reads a graph from `to_json` text, which `qjax.graph.validation` then checks.

        Raises:
          ValueError: if the text is no graph.
        """
        return Graph.from_data(read_json(text))

    @staticmethod
    def from_data(data: Any) -> "Graph":
        """Reads a graph from the data of `to_json`, as `from_json`.

        Raises:
          ValueError: if they are no graph.
        """
        try:
            graph = _graph(data)
            check(graph)
            return graph
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"This is not an integer graph: {error}.") from error


def read_json(text: str) -> Any:
    """Reads JSON in which each key stands once and each number is finite.

    Raises:
      ValueError: if the text is anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"This is no JSON: {error}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key of {[key for key, _ in pairs]} stands twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def check(graph: Graph) -> None:
    """Raises ValueError unless each value is defined before use and well typed."""
    for _, own in graph.walk():
        check_order(own)


def check_order(graph: Graph) -> None:
    """Raises ValueError as `check`, without the graphs inside of nodes."""
    defined = set(graph.inputs)
    for n in graph.nodes:
        is_new = defined.isdisjoint(n.outputs) and len(set(n.outputs)) == len(n.outputs)
        if not defined.issuperset(n.inputs) or not is_new:
            raise ValueError(f"The graph is out of order at {n}.")
        defined.update(n.outputs)
    used = {*graph.outputs, *graph.sites.values()}
    if not used <= defined or max(defined, default=-1) >= len(graph.values):
        raise ValueError("The graph returns or names values that it does not compute.")
    for v in graph.values:
        if not np.issubdtype(np.dtype(v.dtype), np.integer):
            raise ValueError(f"The graph holds a value of type {v.dtype}.")


def storage(low: int, high: int) -> str:
    """Returns the smallest type for codes in ``[low, high]``."""
    for dtype in ("int8", "uint8", "int16", "uint16", "int32"):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"Codes in [{low}, {high}] do not fit int32.")


def holds(dtype: str, low: int, high: int) -> bool:
    """Returns whether a type holds integers."""
    info = np.iinfo(dtype)
    return bool(info.min <= low and high <= info.max)


def _check_keys(data: Any, kind: type) -> None:
    """Raises ValueError unless the keys are exactly the fields of a class."""
    wanted = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(data, dict) or set(data) != wanted:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(
            f"a {kind.__name__.lower()} must have {sorted(wanted)}, got {found!r}"
        )


def usual_fields(kind: type) -> dict[str, Any]:
    """Returns the fields of a class that data may leave out, with their values."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _tuple(data: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(data[key], list | tuple):
        raise ValueError(f"{key} must be a list, got {data[key]!r}")
    return tuple(data[key])


def _value(data: Any) -> Value:
    if isinstance(data, dict):
        data = {**usual_fields(Value), **data}
    _check_keys(data, Value)
    grid = data["grid"]
    if grid is not None:
        _check_keys(grid, Grid)
        grid = Grid(**grid)
    tuples = {k: _tuple(data, k) for k in ("shape", "rescaling")}
    return Value(**(data | tuples | {"grid": grid}))


def _node(data: Any) -> Node:
    if isinstance(data, dict):
        data = {**usual_fields(Node), **data}
    _check_keys(data, Node)
    graphs = {role: _graph(graph) for role, graph in data["graphs"].items()}
    ends = {k: _tuple(data, k) for k in ("inputs", "others")}
    return Node(**{**data, **ends, "graphs": graphs})


def _graph(data: Any) -> Graph:
    if isinstance(data, dict):
        data = {"grids": {}, **data}  # Older files have none.
    _check_keys(data, Graph)
    if not isinstance(data["sites"], dict):
        raise ValueError(f"sites must have names, got {data['sites']!r}")
    values = tuple(_value(v) for v in data["values"])
    nodes = tuple(_node(n) for n in data["nodes"])
    ends = _tuple(data, "inputs"), _tuple(data, "outputs")
    return Graph(values, nodes, *ends, dict(data["sites"]), _grids(data["grids"]))


def _grids(data: Any) -> dict[str, Grid]:
    for grid in data.values():
        _check_keys(grid, Grid)
    return {name: Grid(**grid) for name, grid in data.items()}
