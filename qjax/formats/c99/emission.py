"""Graphs as lines of C: their nodes in order, and loops over those inside."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qjax.formats.c99 import (
    elementwise,
    gathers,
    moves,
    normalisations,
    numbers,
    products,
    sums,
    tflite,
)
from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.scopes import Scope, length_of
from qjax.formats.c99.text import Source, c_type
from qjax.graph.graph import Node

EMITTERS: Mapping[str, Callable[[CNode], None]] = {
    "add": elementwise.add,
    "argmax": sums.arg_extreme,
    "argmin": sums.arg_extreme,
    "argsort": gathers.sort,
    "arithmetic": numbers.arithmetic,
    "broadcast": moves.broadcast,
    "clip": elementwise.clip,
    "compare": numbers.compare,
    "concatenate": moves.concatenate,
    "constant": elementwise.constant,
    "conv": products.conv,
    "divide": numbers.divide,
    "dot": products.dot,
    "dot_codes": products.dot_codes,
    "embed": elementwise.embed,
    "gather": gathers.gather,
    "log_softmax": normalisations.log_softmax,
    "logsumexp": normalisations.logsumexp,
    "masked_norm": normalisations.masked_norm,
    "max": sums.extreme,
    "max_pool": sums.extreme_pool,
    "maximum": elementwise.of_two,
    "min": sums.extreme,
    "min_pool": sums.extreme_pool,
    "minimum": elementwise.of_two,
    "multiply": products.multiply,
    "multiply_codes": products.multiply_codes,
    "norm": normalisations.norm,
    "pad": moves.pad,
    "requantize": elementwise.requantize,
    "reshape": moves.reshape,
    "rev": moves.rev,
    "running_sum": sums.running_sum,
    "scatter": gathers.scatter,
    "scatter_add": gathers.scatter_add,
    "scatter_max": gathers.scatter,
    "scatter_min": gathers.scatter,
    "select": elementwise.select,
    "slice": moves.slices,
    "softmax": normalisations.softmax,
    "sort": gathers.sort,
    "sum": sums.total,
    "sum_pool": sums.sum_pool,
    "table": elementwise.table,
    "take": elementwise.take,
    "tflite_add": tflite.add,
    "tflite_average": tflite.average,
    "tflite_constant": elementwise.constant,
    "tflite_l2_norm": tflite.l2_norm,
    "tflite_log_softmax": tflite.log_softmax,
    "tflite_resize": tflite.resize,
    "tflite_softmax": tflite.softmax,
    "tflite_softmax16": tflite.softmax16,
    "thresholds": elementwise.thresholds,
    "transpose": moves.transpose,
}
LOOP = "loop"  # Its code is that of the graph inside.


@dataclasses.dataclass(frozen=True)
class CEmission:
    """Source, parameters and memory that all graphs of a program share.

    Attributes:
      source: Where their lines go.
      params: Parameters of the program, int64.
      places: Slot -> pointer to its first element, of a type.
    """

    source: Source
    params: Mapping[str, np.ndarray]
    places: Callable[[int, str], str]

    def emit(
        self,
        scope: Scope,
        inputs: Sequence[CArray],
        carried: Sequence[CArray],
        kept: Sequence[CArray],
    ) -> None:
        """Adds a graph.

        Args:
          scope: The graph.
          inputs: Its inputs.
          carried: Where its first outputs go, which are inputs as well.
          kept: Where its other outputs go.
        """
        arrays = self.arrays(scope, inputs, kept)
        fused = {id(node) for node in scope.followers.values()}
        for node in scope.graph.nodes:
            if id(node) not in fused and node.output not in scope.views:
                self.visit(scope, node, arrays)
        outputs = scope.graph.outputs
        for k, v in enumerate(outputs[scope.carries :]):
            if scope.direct.get(v) != k:
                self.copy(kept[k], arrays[v])
        ends = [arrays[v] for v in outputs[: scope.carries]]
        for k, slot in scope.parked.items():
            parked = self.at(scope, outputs[k], slot)
            self.copy(parked, ends[k])
            ends[k] = parked
        for target, end in zip(carried, ends, strict=True):
            self.copy(target, end)

    def arrays(
        self, scope: Scope, inputs: Sequence[CArray], kept: Sequence[CArray]
    ) -> dict[int, CArray]:
        """Returns all values of a graph."""
        graph = scope.graph
        found = {}
        for v, x in zip(graph.inputs, inputs, strict=True):
            low, high = graph.values[v].low, graph.values[v].high
            found[v] = dataclasses.replace(x, low=low, high=high)
        for v, k in scope.direct.items():
            low, high = graph.values[v].low, graph.values[v].high
            found[v] = dataclasses.replace(kept[k], low=low, high=high)
        for v, slot in scope.slots.items():
            found[v] = self.at(scope, v, slot)
        for v in scope.followers:  # They have no place.
            own = graph.values[v]
            kind = c_type(own.dtype)
            found[v] = CArray("0", scope.shapes[v], kind, own.low, own.high)
        return found

    def at(self, scope: Scope, v: int, slot: int) -> CArray:
        """Returns a value that lies in a slot."""
        x = scope.graph.values[v]
        kind = c_type(x.dtype)
        return CArray(self.places(slot, kind), scope.shapes[v], kind, x.low, x.high)

    def copy(self, to: CArray, x: CArray) -> None:
        """Adds a copy of a value, if it is not there."""
        if to.name == x.name:
            return
        cast = "" if to.ctype == x.ctype else f"({to.ctype})"
        with self.source.loops([x.size]) as names:
            self.source.line(f"{to.name}[{names[0]}] = {cast}{x.name}[{names[0]}];")

    def visit(self, scope: Scope, node: Node, arrays: Mapping[int, CArray]) -> None:
        """Adds the code of a node."""
        behind = scope.followers.get(node.output)
        call = self.call(node, arrays, None if behind is None else behind)
        if not sum(arrays[v].size for v in node.outputs):
            return
        self.source.line(f"/* {node.operation}  {_comment(node.path)} */")
        with self.source.block():
            if node.operation == LOOP:
                self.loop(scope, node, arrays)
            else:
                EMITTERS[node.operation](call)

    def call(
        self, node: Node, arrays: Mapping[int, CArray], behind: Node | None
    ) -> CNode:
        """Returns a node as its emitter takes it."""
        own = {role: self.params[name] for role, name in node.params.items()}
        inputs = tuple(arrays[v] for v in node.inputs)
        follower = None if behind is None else self.call(behind, arrays, None)
        return CNode(node, inputs, arrays[node.output], own, self.source, follower)

    def loop(self, scope: Scope, node: Node, arrays: Mapping[int, CArray]) -> None:
        """Adds a loop: its carries lie where its outputs do."""
        a = node.attributes
        consts, first = a["consts"], a["consts"] + a["carries"]
        inputs = [arrays[v] for v in node.inputs]
        outputs = [arrays[v] for v in node.outputs]
        carried, kept = outputs[: a["carries"]], outputs[a["carries"] :]
        for target, start in zip(carried, inputs[consts:first], strict=True):
            self.copy(target, start)
        length = length_of(node, scope.shapes)
        if not length:
            return
        t = self.source.fresh()
        head = f"for (int {t} = 0; {t} < {length}; ++{t})"
        if a["is_reversed"]:
            head = f"for (int {t} = {length - 1}; {t} >= 0; --{t})"
        with self.source.block(head):
            rows = [_row(x, t) for x in inputs[first:]]
            given = [*inputs[:consts], *carried, *rows]
            body = scope.bodies[node.output]
            self.emit(body, given, carried, [_row(y, t) for y in kept])


def _row(x: CArray, t: str) -> CArray:
    """Returns a step of a value whose first axis counts steps."""
    size = x.size // x.shape[0] if x.shape[0] else 0
    name = f"({x.name} + {t} * {size})"
    return dataclasses.replace(x, name=name, shape=x.shape[1:])


def _comment(text: str) -> str:
    """Returns a text as a comment holds it."""
    plain = re.sub(r"[^ -~]", "_", text)  # Of another direction, gcc warns.
    return plain.replace("*/", "* /").replace("/*", "/ *")
