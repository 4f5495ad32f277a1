"""The number of a step: rows of tables at it, and sums of all steps until it."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.time_axes import TIME_RULES, Time, Times, is_elementwise

_SUM = {"kind": "add", "dtype": "int32"}
_INT32 = np.iinfo(np.int32)


class State(NamedTuple):
    """A state of a step."""

    value: int  # Number of its input in the step.
    start: int | None  # Value of the whole graph that it starts with.
    fill: tuple[int, Value] | None  # Code that it is full of at the start, else.
    end: int  # Number of its next value in the step.
    path: str = ""  # Module path of what reads it.
    is_along_time: bool = False  # True if its first axis is that of time.


class StepNumbers:
    """The part of a streamer that knows the number of a step, from 0 on.

    It is a state, there only if something reads it. What it chooses from is as long as
    the sequence that was lowered, and so are the sums whose bounds are known.
    """

    graph: Graph
    builder: GraphBuilder  # Of the step.
    number: dict[int, int]  # Value of the graph -> value of the step.
    times: dict[int, Time]  # Values with an axis of time.
    states: list[State]
    late: set[int]
    fed: set[int]
    here: int | None = None  # Value that is the number of the step.
    # State that is it, and the steps that there may be.
    counter: tuple[int, int] | None = None

    def refusal(self, node: Node, remedy: str = "") -> ValueError:
        """Returns the error for a node that no step computes."""
        raise NotImplementedError

    def length(self, node: Node) -> int:
        """Returns the steps of the whole sequence."""
        values = [self.graph.values[v] for v in self.graph.inputs]
        sizes = {x.shape[x.time_axis] for x in values if x.time_axis is not None}
        if len(sizes) != 1 or not min(sizes):
            raise self.refusal(node)
        return sizes.pop()

    def step_number(self, node: Node) -> int:
        """Returns the value that is the number of the step."""
        if self.here is None:
            steps = self.length(node)
            own = Value((), "int32", 0, steps)
            self.builder.values.append(own)
            n = len(self.builder.values) - 1
            last, one = self._known("step/last", steps - 1), self._known("step/one", 1)
            # The end of the sequence is a state, and after it nothing is read beyond.
            least = {"kind": "min", "dtype": "int32"}
            self.here = self.builder.add("arithmetic", (n, last), least, dtype="int32")
            ends = self.here, one
            after = self.builder.add("arithmetic", ends, _SUM, dtype="int32")
            self.counter = len(self.states), steps
            self.states.append(State(n, None, (0, own), after))
        return self.here

    def _known(self, name: str, value: int, rank: int = 0) -> int:
        """Returns a number as a value."""
        array = np.full((1,) * rank, value, np.int32)
        own = self.builder.add_param(name, array)
        options: Any = {"params": {"value": own}, "dtype": "int32"}
        return self.builder.add("constant", (), **options)

    def visit_bias(self, node: Node, times: Times) -> bool:
        """Adds the row of a bias at this step; returns whether there is one."""
        # Others, as norms, rescale and clip after their bias.
        is_product = node.operation in ("dot", "conv", "multiply")
        name = node.params.get("bias", "") if is_product else ""
        shape = np.shape(self.builder.params[name]) if name else ()
        if len([t for t in times if t]) != 1 or max(shape, default=1) == 1:
            return False
        rank = len(self.graph.values[node.output].shape)
        none = np.zeros((1,) * len(shape), self.builder.params[name].dtype)
        zeros = self.builder.add_param(f"{name}/none", none)
        plain = dataclasses.replace(node, params={**node.params, "bias": zeros})
        axis = self._axis_behind(plain, times)
        own = -1 if axis is None else axis - rank + len(shape)
        if axis is None or own < 0 or shape[own] == 1:
            return False
        if shape[own] != self.length(node):
            raise self.refusal(node)
        self.visit(plain)
        acc, made = self.number[node.output], self.builder.nodes[-1]
        arrays = {k: self.builder.params[n] for k, n in made.params.items()}
        found = self.builder.outcome(
            made.operation, made.inputs, arrays, made.attributes
        )
        if found[1] < _INT32.min or found[2] > _INT32.max:
            raise self.refusal(node)
        before = self.builder.values[acc]
        self.builder.values[acc] = Value(found[0], "int32", *found[1:])
        row = self._row(node, name, own, (1,) * (rank - len(shape)))
        self.number[node.output] = self._sum(node, acc, row, before)
        return True

    def _axis_behind(self, plain: Node, times: Times) -> int | None:
        """Returns the axis of time of an output, or None for a node without one."""
        a = plain.attributes
        time = next(t for t in times if t is not None)
        if plain.operation == "conv":
            (_, _, *space), _, out = a["dimensions"]
            return out[2 + space.index(time.axis)] if time.axis in space else None
        rule = TIME_RULES.get(plain.operation)
        found = (
            None
            if rule is None or time.past
            else rule(plain, times, self.graph, self.builder.params)
        )
        return None if found is None else found[0]

    def visit(self, node: Node) -> None:
        """Adds what a node is in a step."""
        raise NotImplementedError

    def _row(self, node: Node, name: str, axis: int, ones: tuple[int, ...]) -> int:
        """Returns the row of a parameter at this step, as a value."""
        table = np.asarray(self.builder.params[name])
        shape = (*ones, *table.shape[:axis], 1, *table.shape[axis + 1 :])
        rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], *shape)
        own = self.builder.add_param(f"{name}/rows", rows)
        n = self.step_number(node)
        return self.builder.add("embed", (n,), params={"kernel": own}, path=node.path)

    def _sum(self, node: Node, x: int, y: int, like: Value) -> int:
        """Returns the sum of two integers, with the grid of a value."""
        found = self.builder.add(
            "arithmetic", (x, y), _SUM, dtype="int32", grid=like.grid, path=node.path
        )
        return found

    def visit_places(self, node: Node, times: Times) -> bool:
        """Takes this step of what an elementwise node computes at all places.

        A rescaling has no operand but its parameters: it computes for all of them.
        Returns whether the node is one.
        """
        axes = {t for t in times if t is not None}
        values = [self.graph.values[v] for v in node.inputs]
        whole = self.graph.values[node.output]
        known = [v for v, t in zip(node.inputs, times, strict=True) if t is None]
        is_known = not {*known} & (self.late | self.fed)
        same_rank = all(len(v.shape) == len(whole.shape) for v in values)
        if not is_elementwise(node) or len(axes) != 1 or not same_rank or not is_known:
            return False
        (time,) = axes
        length = self.length(node)
        if time.past or whole.shape[time.axis] != length:
            return False
        rank = len(whole.shape)
        sizes = [length if d == time.axis else None for d in range(rank)]
        spread = {"sizes": sizes, "dimensions": list(range(rank))}
        inputs = [
            self.number[v]
            if t is None
            else self.builder.add("broadcast", (self.number[v],), spread)
            for v, t in zip(node.inputs, times, strict=True)
        ]
        for v, n in zip(node.inputs, inputs, strict=True):
            grid = self.graph.values[v].grid
            self.builder.values[n] = dataclasses.replace(
                self.builder.values[n], grid=grid
            )
        self.builder.values.append(whole)
        found = len(self.builder.values) - 1
        own = dataclasses.replace(node, inputs=tuple(inputs), output=found)
        self.builder.nodes.append(own)
        self.times[node.output] = time
        self.number[node.output] = self._here(node, found, time.axis)
        return True

    def _here(self, node: Node, x: int, axis: int) -> int:
        """Returns this step of a value that has all of them along an axis."""
        value = self.builder.values[x]
        rank = len(value.shape)
        place = self.builder.add("reshape", (self.step_number(node),), {"sizes": [1]})
        attributes = {
            "offset_dims": list(range(rank)),
            "collapsed_slice_dims": [],
            "start_index_map": [axis],
            "operand_batching_dims": [],
            "start_indices_batching_dims": [],
            "slice_sizes": [1 if d == axis else None for d in range(rank)],
            "mode": "clip",
            "fill": 0,
        }
        options: Any = {"grid": value.grid, "dtype": value.dtype, "path": node.path}
        return self.builder.add("gather", (x, place), attributes, **options)

    def visit_running_sum(self, node: Node, times: Times) -> bool:
        """Adds a step to the sum of those before it; returns whether it did."""
        (time,), a = times, node.attributes
        assert time is not None
        if time.axis != a["axis"]:
            return False
        if a["reverse"] or time.past:
            raise self.refusal(node)
        x = self.number[node.inputs[0]]
        each = self.builder.add("running_sum", (x,), {**a, "bias": 0}, path=node.path)
        own, terms = self.builder.values[each], self.length(node) - 1
        self.step_number(node)  # Its end is that of the bounds.
        low, high = min(0, terms * own.low), max(0, terms * own.high)
        before = self.builder.add_value(own.shape, low, high, dtype="int32")
        like = self.graph.values[node.output]
        total = self._sum(node, before, each, like)
        fill = 0, self.builder.values[before]
        is_first = time.axis == 0
        self.states.append(State(before, None, fill, total, node.path, is_first))
        if a["bias"]:
            known = self._known("sum/bias", a["bias"], len(own.shape))
            total = self._sum(node, total, known, like)
        self.times[node.output] = Time(time.axis)
        self.number[node.output] = total
        return True

    def visit_extreme(self, node: Node, time: Time) -> bool:
        """Computes the extreme of all steps so far; returns whether a pool is one."""
        a, k = node.attributes, time.axis
        size = self.graph.values[node.inputs[0]].shape[k]
        wholes = [[size - 1, 0] if d == k else [0, 0] for d in range(len(a["window"]))]
        own = [size if d == k else 1 for d in range(len(a["window"]))]
        is_one = list(a["window"]) == own and [*map(list, a["padding"])] == wholes
        steps = a["strides"], a["dilation"], a["base_dilation"]
        is_one &= all(math.prod(own) == 1 for own in steps)
        if not is_one or node.operation == "sum_pool" or time.past:
            return False
        x = self.number[node.inputs[0]]
        value = dataclasses.replace(self.builder.values[x], time_axis=None)
        self.builder.values.append(value)
        before = len(self.builder.values) - 1
        operation = "maximum" if node.operation == "max_pool" else "minimum"
        code = value.low if operation == "maximum" else value.high
        options: Any = {"grid": value.grid, "dtype": value.dtype, "path": node.path}
        found = self.builder.add(operation, (before, x), **options)
        own_state = State(before, None, (code, value), found, node.path, k == 0)
        self.states.append(own_state)
        self.times[node.output] = time
        self.number[node.output] = found
        return True
