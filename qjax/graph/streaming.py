"""The graph of one step in time, made of the graph of a whole sequence.

What loops carry becomes the state of a step, and so do the codes that a causal
convolution, a causal pool or a delay still needs. A step computes the codes that the
whole sequence has at its place in time, as no operation looks ahead: one that may is
refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.passes import drop_dead
from qjax.graph.step_numbers import State, StepNumbers
from qjax.graph.time_axes import TIME_RULES, Time, Times


class Streamed(NamedTuple):
    """A step of a program.

    Attributes:
      step: Graph from states and inputs of one step to the next states and outputs.
      params: Parameters of the step.
      start: Graph from the inputs of the program to the first states.
      start_params: Parameters of the start.
      axes: By output, its axis of time; None for what is of the last step.
      counter: State that is the number of the step, and the steps that there may be;
        None where these are any number.
    """

    step: Graph
    params: dict[str, Any]
    start: Graph
    start_params: dict[str, Any]
    axes: tuple[int | None, ...]
    counter: tuple[int, int] | None


def streamed(graph: Graph, params: Mapping[str, Any]) -> Streamed:
    """Returns the step of a graph whose inputs name an axis of time.

    Args:
      graph: Graph of a whole sequence.
      params: Its parameters.

    Returns:
      The step. Its axes of time have size 1.

    Raises:
      ValueError: for an operation that reads more than its own step, or of which that
        is not known, with its module path.
    """
    return _Streamer(graph, params).streamed()


class _Streamer(StepNumbers):
    def __init__(self, graph: Graph, params: Mapping[str, Any]):
        self.graph, self.builder = graph, GraphBuilder()
        self.builder.params = {name: np.asarray(p) for name, p in params.items()}
        self.params = self.builder.params
        self.values, self.nodes = self.builder.values, self.builder.nodes
        self.number: dict[int, int] = {}  # Value of the graph -> value of the step.
        self.times: dict[int, Time] = {}  # Values with an axis of time.
        self.states: list[State] = []
        # Values that the past of a sequence determines, with no axis of time.
        self.late: set[int] = set()
        # Values that inputs without an axis of time determine.
        self.fed = {v for v in graph.inputs if graph.values[v].time_axis is None}

    def streamed(self) -> Streamed:
        graph = self.graph
        for v in graph.inputs:
            value = graph.values[v]
            if value.time_axis is not None:
                self.times[v] = Time(value.time_axis)
            self.number[v] = self.add_value(self.step_value(v))
        for node in graph.nodes:
            self.visit(node)
        inputs = (
            *(s.value for s in self.states),
            *(self.number[v] for v in graph.inputs),
        )
        outputs = (
            *(s.end for s in self.states),
            *(self.number[v] for v in graph.outputs),
        )
        for v in graph.outputs:
            if v in self.times and self.times[v].past:
                raise ValueError(
                    "An output of the program has more or fewer steps than its input: "
                    "what is padded or cut along time must be read by a convolution, a "
                    "pool or a slice that gives each step one output."
                )
        sites = {name: self.number[v] for name, v in graph.sites.items()}
        step = Graph(tuple(self.values), tuple(self.nodes), inputs, outputs, sites)
        found = drop_dead(_plain(step), self.params)
        axes = tuple(
            self.times[v].axis if v in self.times else None for v in graph.outputs
        )
        return Streamed(*found, *self.start(), axes, self.counter)

    def start(self) -> tuple[Graph, dict[str, Any]]:
        """Returns the graph of the first states."""
        graph = self.graph
        values, nodes, outputs = list(graph.values), list(graph.nodes), []
        params = dict(self.params)
        for k, state in enumerate(self.states):
            if state.start is not None:
                outputs.append(state.start)
                continue
            assert state.fill is not None
            code, own = state.fill
            name = f"start {k}"
            like = next(
                v for v in graph.inputs if graph.values[v].time_axis is not None
            )
            if state.is_along_time and graph.values[like].time_axis:
                raise _not_first(state)
            beside = (like,) if own.shape and not state.is_along_time else ()
            shape = (1, *own.shape[1:]) if beside else own.shape
            params[name] = np.full(shape, code, own.dtype)
            values.append(dataclasses.replace(own, low=code, high=code))
            outputs.append(len(values) - 1)
            node = Node("constant", beside, outputs[-1], {"value": name}, {})
            nodes.append(node)
        whole = Graph(tuple(values), tuple(nodes), graph.inputs, tuple(outputs), {})
        return drop_dead(_plain(whole), params)

    def add_value(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def step_value(self, v: int) -> Value:
        """Returns a value of the graph as a step has it."""
        value, time = self.graph.values[v], self.times.get(v)
        if time is None:
            return value
        shape = list(value.shape)
        shape[time.axis] = 1 + max(time.past, 0)
        return dataclasses.replace(value, shape=tuple(shape))

    def visit(self, node: Node) -> None:
        if self.fed.intersection(node.inputs) and node.operation != "constant":
            self.fed.update(node.outputs)
        if node.operation == "loop" and self.visit_loop(node):
            return
        times = [self.times.get(v) for v in node.inputs]
        if not any(times) or node.operation == "constant":
            self.late.update(
                node.outputs if self.late.intersection(node.inputs) else ()
            )
            self.copy(node, node.attributes)
            return
        if self.visit_bias(node, times):
            return
        visit = self.with_past.get(node.operation)
        if visit is not None and visit(self, node, times):
            return
        pasts = {time.past for time in times if time is not None}
        is_sized = node.operation == "reshape" and pasts != {0}
        # What is known at the end of a sequence alone.
        is_ahead = any(v in self.late for v in node.inputs if v not in self.times)
        if len(pasts) > 1 or is_sized or is_ahead:
            raise self.refusal(node)
        rule = TIME_RULES.get(node.operation)
        found = None if rule is None else rule(node, times, self.graph, self.params)
        if found is None and self.visit_places(node, times):
            return
        if found is None:
            raise self.refusal(node)
        axis, attributes = found
        self.times[node.output] = Time(axis, *pasts)
        self.copy(node, attributes)

    def refusal(self, node: Node, remedy: str = "") -> ValueError:
        where = f" in {node.path!r}" if node.path else ""
        return ValueError(
            f"`{node.operation}`{where} reads more than one step in time, or it is not "
            "known that it does not: what it computes of a sequence is not what a step "
            "has at its time. "
            + (
                remedy
                or "Stream what comes before it and compute the rest of whole "
                "sequences, or call the program on these."
            )
        )

    def copy(self, node: Node, attributes: Mapping[str, Any]) -> None:
        for v in node.outputs:
            self.number[v] = self.add_value(self.step_value(v))
        inputs = tuple(self.number[v] for v in node.inputs)
        own = dataclasses.replace(
            node,
            inputs=inputs,
            output=self.number[node.output],
            others=tuple(self.number[v] for v in node.others),
            attributes=dict(attributes),
        )
        self.nodes.append(own)

    # Loops.

    def visit_loop(self, node: Node) -> bool:
        """Makes one step of a loop over time; returns whether the loop is one."""
        a = node.attributes
        consts, first = a["consts"], a["consts"] + a["carries"]
        times = [self.times.get(v) for v in node.inputs]
        if not any(times):
            return False
        self.late.update(node.outputs[: a["carries"]])
        fixed = any(times[:first]) or self.late.intersection(node.inputs[:first])
        leads = all(t == Time(0) for t in times[first:])
        if fixed or not leads or a["is_reversed"] or a["length"] is not None:
            raise self.refusal(node)
        for v in node.outputs[a["carries"] :]:
            self.times[v] = Time(0)
        inputs = [self.number[v] for v in node.inputs]
        for v in node.outputs:
            self.number[v] = self.add_value(self.step_value(v))
        if self.fed.intersection(node.inputs[consts:first]):
            raise ValueError(
                f"The loop in {node.path!r} starts from an input of the program, and a "
                "state starts from nothing. Make the first value a constant of the "
                "model, or a part of the input at each time."
            )
        for k in range(consts, first):
            v, end = node.inputs[k], node.outputs[k - consts]
            body = node.graphs["body"]
            own = body.values[body.inputs[k]]
            inputs[k] = self.add_value(own)
            self.states.append(State(inputs[k], v, None, self.number[end]))
        outputs = [self.number[v] for v in node.outputs]
        self.nodes.append(
            dataclasses.replace(
                node, inputs=tuple(inputs), output=outputs[0], others=tuple(outputs[1:])
            )
        )
        return True

    # Causal convolutions, pools and delays: what they read of the past is a state.

    def visit_pad(self, node: Node, times: Times) -> bool:
        """Replaces padding before the first step by a state; returns whether it did."""
        (time,) = times
        assert time is not None
        low, high, inner = node.attributes["padding"][time.axis]
        if not (low or high or inner):
            return False
        padding = [list(pair) for pair in node.attributes["padding"]]
        padding[time.axis] = [0, 0, 0]
        if high or inner or any(map(any, padding)):
            raise self.refusal(node)
        self.delay(node, node.inputs[0], low, node.attributes["padding_code"])
        return True

    def visit_concatenate(self, node: Node, times: Times) -> bool:
        """Replaces constants before the first step by a state; returns whether."""
        axis, (first, *rest) = node.attributes["axis"], node.inputs
        if len(rest) != 1 or times[0] is not None or times[1] is None:
            return False
        if times[1].axis != axis or first in self.late or first in self.fed:
            return False
        self.delay(node, rest[0], self.graph.values[first].shape[axis], start=first)
        return True

    def delay(
        self,
        node: Node,
        v: int,
        steps: int,
        code: int | None = None,
        start: int | None = None,
    ) -> None:
        """Adds steps before the first of a value, which may lack some at its end."""
        time = self.times[v]
        past = time.past + steps
        if steps < 0 or time.past > 0 or past < 0:
            raise self.refusal(node)
        whole = self.remembered(
            node.path, self.number[v], time.axis, steps, code, start
        )
        self.times[node.output] = Time(time.axis, past)
        self.number[node.output] = self.cut(whole, time.axis, 0, past + 1)

    def visit_slice(self, node: Node, times: Times) -> bool:
        """Takes steps of what a value has of the past; returns whether it did."""
        (time,), a = times, node.attributes
        assert time is not None
        names = "start", "stop", "steps"
        size = self.graph.values[node.inputs[0]].shape[time.axis]
        start, stop, step = slice(*(a[n][time.axis] for n in names)).indices(size)
        if (start, stop, step) == (0, size, 1):
            return False
        length = size - time.past
        past = stop - start - length
        fits = 0 <= start <= start + past <= time.past if past >= 0 else start == 0
        rest = [d for d in range(len(a["start"])) if d != time.axis]
        none = None, 0, 1  # Of other axes all is taken.
        is_whole = all(a[n][d] in none for n in names[::2] for d in rest)
        is_whole &= all(a["stop"][d] is None for d in rest)
        if step != 1 or time.past < 0 or not fits or not is_whole:
            raise self.refusal(node, _EACH if step > 1 else "")
        if past < 0 and time.past:
            raise self.refusal(node)
        self.times[node.output] = Time(time.axis, past)
        x = self.number[node.inputs[0]]
        if past >= 0:
            x = self.cut(x, time.axis, start, start + past + 1)
        self.number[node.output] = x
        return True

    def visit_conv(self, node: Node, times: Times) -> bool:
        """Convolves a step with what a state has of the steps before it."""
        (time,), a = times, node.attributes
        assert time is not None
        (_, _, *space), (_, _, *taps), out = a["dimensions"]
        if time.axis not in space:
            raise self.refusal(node)
        k = space.index(time.axis)
        kernel = np.shape(self.params[node.params["kernel"]])
        bias = np.shape(self.params[node.params["bias"]])
        reach = (kernel[taps[k]] - 1) * a["dilation"][k]
        axis = out[2 + k]
        aligned = len(bias) <= len(out) - 1 - axis or bias[axis - len(out)] == 1
        if a["strides"][k] != 1:
            raise self.refusal(node, _EACH)
        if a["input_dilation"][k] != 1 or not aligned:
            raise self.refusal(node)
        self.window(node, time, k, axis, reach, a["padding_code"])
        return True

    def visit_pool(self, node: Node, times: Times) -> bool:
        """Pools a step with what a state has of the steps before it."""
        (time,), a = times, node.attributes
        assert time is not None
        k = time.axis
        reach = (a["window"][k] - 1) * a["dilation"][k]
        if a["strides"][k] != 1:
            raise self.refusal(node, _EACH)
        if a["base_dilation"][k] != 1:
            raise self.refusal(node)
        if self.visit_extreme(node, time):
            return True
        if reach and a["window"][k] >= self.graph.values[node.inputs[0]].shape[k]:
            raise self.refusal(
                node, "It looks at all steps: a window of fewer streams, or a loop."
            )
        own = self.values[self.number[node.inputs[0]]]
        # Of an extreme no window takes the code: each holds its own step.
        code = own.low if node.operation == "max_pool" else own.high
        self.window(node, time, k, k, reach, a.get("padding_code", code))
        return True

    def window(
        self, node: Node, time: Time, k: int, axis: int, reach: int, code: int
    ) -> None:
        """Adds a node whose windows end at their own step.

        Args:
          node: Node of the whole graph, with ``padding`` along its axes.
          time: Axis of time of its input.
          k: Place of that axis in ``padding``.
          axis: Axis of time of its output.
          reach: Steps before its own that a window reads.
          code: Code of the padding.
        """
        low, high = node.attributes["padding"][k]
        if high or low < 0 or time.past < 0 or low + time.past != reach:
            raise self.refusal(node)
        x = self.number[node.inputs[0]]
        if low and time.past:
            raise self.refusal(node)
        x = self.remembered(node.path, x, time.axis, low, code)
        padding = [list(pair) for pair in node.attributes["padding"]]
        padding[k] = [0, 0]
        self.times[node.output] = Time(axis)
        self.number[node.output] = self.add_value(self.step_value(node.output))
        own = dataclasses.replace(
            node,
            inputs=(x,),
            output=self.number[node.output],
            attributes={**node.attributes, "padding": padding},
        )
        self.nodes.append(own)

    with_past = {
        "pad": visit_pad,
        "concatenate": visit_concatenate,
        "slice": visit_slice,
        "conv": visit_conv,
        "running_sum": StepNumbers.visit_running_sum,
        **dict.fromkeys(("max_pool", "min_pool", "sum_pool"), visit_pool),
    }

    def remembered(
        self,
        path: str,
        x: int,
        axis: int,
        steps: int,
        code: int | None,
        start: int | None = None,
    ) -> int:
        """Adds a state of the last steps of a value; returns both, joined.

        Args:
          path: Module path of what reads it.
          x: Value of the step.
          axis: Axis of time.
          steps: Number of steps that the state holds.
          code: Code that it is full of at the start; None with ``start``.
          start: Value of the whole graph that it starts with.
        """
        if not steps:
            return x
        own = self.values[x]
        first = None if start is None else self.graph.values[start]
        low, high = (first.low, first.high) if first is not None else (code, code)
        assert low is not None and high is not None
        low, high = min(own.low, low), max(own.high, high)
        own = dataclasses.replace(_bare(own), low=low, high=high)
        sized = lambda n: dataclasses.replace(
            own, shape=(*own.shape[:axis], n, *own.shape[axis + 1 :])
        )
        state = self.add_value(sized(steps))
        whole = self.add_value(sized(steps + 1))
        self.nodes.append(Node("concatenate", (state, x), whole, {}, {"axis": axis}))
        kept = self.cut(whole, axis, 1, steps + 1)
        fill = None if code is None else (code, sized(steps))
        self.states.append(State(state, start, fill, kept, path, axis == 0))
        return whole

    def cut(self, x: int, axis: int, start: int, stop: int) -> int:
        """Adds a slice of a value along an axis; returns it, or all of the value."""
        own = _bare(self.values[x])
        if (start, stop) == (0, own.shape[axis]):
            return x
        shape = (*own.shape[:axis], stop - start, *own.shape[axis + 1 :])
        found = self.add_value(dataclasses.replace(own, shape=shape))
        none: list[int | None] = [None] * len(shape)
        place = lambda n: [*none[:axis], n, *none[axis + 1 :]]
        ends = {"start": place(start), "stop": place(stop), "steps": none}
        self.nodes.append(Node("slice", (x,), found, {}, ends))
        return found


def _not_first(state: State) -> ValueError:
    where = f" in {state.path!r}" if state.path else ""
    return ValueError(
        f"What{where} reads the past has time ahead of the examples, and the input has "
        "the examples first: a state must have them first, too. Transpose after it, or "
        "let the input have time first."
    )


_EACH = (
    "A step has one output: compute it at stride 1, and keep every n-th step of what "
    "the program returns."
)


def _bare(value: Value) -> Value:
    """Returns a value without what only inputs have."""
    return Value(value.shape, value.dtype, value.low, value.high, value.grid)


def _plain(graph: Graph) -> Graph:
    """Returns a graph whose inputs name no axis of time."""
    values = (dataclasses.replace(v, time_axis=None) for v in graph.values)
    return dataclasses.replace(graph, values=tuple(values))
