"""Graphs as C runs them: sizes of all values, and where in memory each of them lies."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qjax.graph.arena import Lifetime
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations import OPERATIONS, Operands

_ACCUMULATORS = frozenset(
    "conv dot dot_codes multiply multiply_codes sum sum_pool".split()
)
# Each integer of the output is computed of those at its place alone.
_POINTWISE = frozenset(
    "add arithmetic clip compare divide maximum minimum multiply multiply_codes "
    "requantize select table tflite_add tflite_average thresholds".split()
)


class Slot(NamedTuple):
    """Memory that values share, one after the other.

    Attributes:
      bits: Width of its elements: 8, 16 or 32.
      life: How many elements it has, and when they are there.
    """

    bits: int
    life: Lifetime


@dataclasses.dataclass
class Scope:
    """A graph that C runs: a whole program, a step of one, or the body of a loop.

    Attributes:
      graph: The graph.
      shapes: Shape of each of its values.
      carries: How many of its outputs, the first ones, are inputs of the next run.
      first: Number of the first input that is carried.
      followers: Accumulator -> the requantization that alone reads it.
      bodies: Output of a loop -> the graph that it runs at each step.
      slots: Value -> its slot; inputs and what is written to outputs have none.
      direct: Value -> number of the output to which its node writes it.
      parked: Number of a carry -> its slot, where its next value is another's last.
      views: Values that lie where their input does.
    """

    graph: Graph
    shapes: list[tuple[int, ...]]
    carries: int = 0
    first: int = 0
    followers: dict[int, Node] = dataclasses.field(default_factory=dict)
    bodies: dict[int, "Scope"] = dataclasses.field(default_factory=dict)
    slots: dict[int, int] = dataclasses.field(default_factory=dict)
    direct: dict[int, int] = dataclasses.field(default_factory=dict)
    parked: dict[int, int] = dataclasses.field(default_factory=dict)
    views: set[int] = dataclasses.field(default_factory=set)


def make_scope(
    graph: Graph,
    params: Mapping[str, np.ndarray],
    inputs: Sequence[tuple[int, ...]],
    *,
    carries: int = 0,
    first: int = 0,
) -> Scope:
    """Returns a graph with the shapes of its values and all graphs inside.

    Args:
      graph: The graph.
      params: Parameters of the program.
      inputs: Shapes of the inputs.
      carries: Number of outputs that are inputs of the next run.
      first: Number of the first input that is carried.
    """
    shapes: list[tuple[int, ...]] = [v.shape for v in graph.values]
    for v, shape in zip(graph.inputs, inputs, strict=True):
        shapes[v] = tuple(shape)
    scope = Scope(graph, shapes, carries, first)
    for node in graph.nodes:
        if node.operation == "loop":
            _add_body(scope, node, params)
            continue
        given = [_sized(graph.values[v], shapes[v]) for v in node.inputs]
        own = {role: params[name] for role, name in node.params.items()}
        operands = Operands(node.attributes, given, own)
        shapes[node.output] = tuple(OPERATIONS[node.operation].shape(operands))
    scope.followers = _followers(graph, shapes)
    return scope


def _sized(value: Value, shape: tuple[int, ...]) -> Value:
    return dataclasses.replace(value, shape=shape)


def length_of(node: Node, shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the number of steps of a loop."""
    a = node.attributes
    if a["length"] is not None:
        return int(a["length"])
    return shapes[node.inputs[a["consts"] + a["carries"]]][0]


def _add_body(scope: Scope, node: Node, params: Mapping[str, np.ndarray]) -> None:
    """Adds the body of a loop and the shapes of what the loop computes."""
    a, shapes = node.attributes, scope.shapes
    first = a["consts"] + a["carries"]
    given = [
        shapes[v] if k < first else shapes[v][1:] for k, v in enumerate(node.inputs)
    ]
    own = {"carries": a["carries"], "first": a["consts"]}
    body = make_scope(node.graphs["body"], params, given, **own)
    scope.bodies[node.output] = body
    made = [body.shapes[v] for v in body.graph.outputs]
    length = length_of(node, shapes)
    for k, (v, shape) in enumerate(zip(node.outputs, made, strict=True)):
        shapes[v] = shape if k < a["carries"] else (length, *shape)


def _followers(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> dict[int, Node]:
    """Returns accumulators that one requantization alone reads, each with it."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for v in node.inputs:
            readers.setdefault(v, []).append(node)
    found = {}
    for node in graph.nodes:
        v, own = node.output, readers.get(node.output, [])
        if node.operation not in _ACCUMULATORS or len(own) != 1 or v in graph.outputs:
            continue
        is_rescale = own[0].operation == "requantize"
        if is_rescale and shapes[own[0].output] == shapes[v]:
            found[v] = own[0]
    return found


# Memory.


def bits_of(value: Value) -> int:
    """Returns the width of the memory of an integer."""
    return max(8, np.dtype(value.dtype).itemsize * 8)


def assign_slots(scope: Scope, slots: list[Slot]) -> None:
    """Gives a slot to each value that needs memory, also inside of loops.

    Args:
      scope: A whole program, or a step of one.
      slots: Receives the slots.
    """
    _Assigner(scope, slots, itertools.count()).assign()


class _Assigner:
    """Slots of one graph, at times that all graphs share."""

    def __init__(self, scope: Scope, slots: list[Slot], clock: Iterator[int]):
        self.scope, self.slots, self.clock = scope, slots, clock
        self.graph = scope.graph
        self.fused = {node.output for node in scope.followers.values()}
        self.times: list[int] = []
        self.last: dict[int, int] = {}

    def assign(self) -> None:
        scope, graph = self.scope, self.graph
        computed = {v for node in graph.nodes for v in node.outputs}
        for k, v in enumerate(graph.outputs[scope.carries :]):
            if v in computed:
                scope.direct.setdefault(v, k)
        for node in graph.nodes:
            end, ends = next(self.clock), node.inputs
            self.times.append(end)
            if node.output in scope.bodies:
                _Assigner(scope.bodies[node.output], self.slots, self.clock).assign()
                end = next(self.clock)
                ends = (*node.inputs, *node.outputs)  # There while the body runs.
            self.last.update(dict.fromkeys(ends, end))
        final = next(self.clock)
        self.last.update(dict.fromkeys(graph.outputs, final))
        begun: dict[int, int] = {}
        for node, time in zip(graph.nodes, self.times, strict=True):
            time = begun.get(node.output, time)
            follower = scope.followers.get(node.output)
            if follower is not None:
                begun[follower.output] = time
                self.visit(node, follower.output, time)
            elif node.output not in self.fused:
                for v in node.outputs:
                    self.visit(node, v, time)
        self.park(final)

    def visit(self, node: Node, v: int, time: int) -> None:
        """Gives a slot to a value that a node computes at a time."""
        scope = self.scope
        if v in scope.direct:
            return
        end = self.last.get(v, time)
        shared = self.shared(node, v, time)
        if shared is not None:
            scope.slots[v] = shared
            own = self.slots[shared]
            life = own.life._replace(last=max(own.life.last, end))
            self.slots[shared] = own._replace(life=life)
            return
        scope.slots[v] = self.add(v, time, end)

    def add(self, v: int, first: int, last: int) -> int:
        size = int(np.prod(self.scope.shapes[v], dtype=np.int64))
        bits = bits_of(self.graph.values[v])
        self.slots.append(Slot(bits, Lifetime(size, first, last)))
        return len(self.slots) - 1

    def shared(self, node: Node, v: int, time: int) -> int | None:
        """Returns the slot of an input in which a value may lie."""
        scope, values = self.scope, self.graph.values
        if node.operation == "reshape":
            x = node.inputs[0]
            if x in scope.slots and values[x].dtype == values[v].dtype:
                scope.views.add(v)
                return scope.slots[x]
        if node.operation not in _POINTWISE:
            return None
        for x in node.inputs:
            slot = scope.slots.get(x)
            same = [u for u in node.inputs if scope.slots.get(u) == slot]
            if (
                slot is not None
                and self.slots[slot].life.last == time
                and self.slots[slot].bits == bits_of(values[v])
                and all(scope.shapes[u] == scope.shapes[v] for u in same)
            ):
                return slot
        return None

    def park(self, final: int) -> None:
        """Gives slots to the next values that are another carry now."""
        scope, graph = self.scope, self.graph
        last = graph.inputs[scope.first : scope.first + scope.carries]
        for k, v in enumerate(graph.outputs[: scope.carries]):
            if v in last and v != last[k]:
                scope.parked[k] = self.add(v, final, final)
