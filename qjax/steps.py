"""Steps of a program that runs along time: in JAX, and from NumPy to NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.array_ends import CodeRunner, InputEnd, RealRunner, ready
from qjax.backends.native.library import thread_count
from qjax.backends.xla import run as xla
from qjax.compiled_program import check_size, make_runner
from qjax.ends import check_range
from qjax.execution import Backend, Execution, Kind
from qjax.graph.graph import Graph, Value
from qjax.graph.sizes import Shape
from qjax.graph.streaming import streamed
from qjax.leaves import at_start
from qjax.tables import show_types


class StepExecution(Execution):
    """The functions of a step, jitted: states and inputs to states and outputs.

    States are codes. Inputs and outputs have no axis of time where they are real.

    Args:
      graph: Graph of a whole sequence.
      params: Its parameters.
      names: Names of its inputs.

    Raises:
      ValueError: if no input names an axis of time; as `streamed`.
    """

    def __init__(
        self, graph: Graph, params: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        self.names, self.ends = names, [graph.values[v] for v in graph.inputs]
        if all(v.time_axis is None for v in self.ends):
            raise ValueError(
                "This program has no steps: lower the model with `streaming={0: 1}`, "
                "the axis of time by the number of an input."
            )
        own = streamed(graph, params)
        super().__init__(own.step, own.params)
        self.outputs = list(
            zip([graph.values[v] for v in graph.outputs], own.axes, strict=True)
        )
        self.start, self.start_params = own.start, own.start_params
        self.counter = own.counter
        self.states = self.inputs[: len(own.start.outputs)]

    def step(
        self, state: list[Any], inputs: list[Any], backend: Backend | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Computes the next state and the outputs, as `IntegerProgram.step`."""
        types = [jax.typeof(jnp.asarray(x)) for x in state]
        self._check_state(types)
        check_number(state, self.counter)
        for name, x, v in zip(self.names, inputs, self.ends, strict=True):
            shape, own = _without(v.shape, v.time_axis), np.shape(x)
            if len(own) != len(shape) or own[1:] != shape[1:]:
                raise ValueError(
                    f"{at_start(name)} of a step must have shape "
                    f"{('batch', *shape[1:])}, got {own}."
                )
            if v.is_place:
                check_range(name, x, v)
        found = self.run("real", [*state, *inputs], backend)
        outputs = found[len(state) :]
        if self.counter is not None:
            k, steps = self.counter
            if isinstance(state[k], jax.core.Tracer):
                outputs = [_unless(state[k] >= steps, y) for y in outputs]
        return found[: len(state)], outputs

    def _check_state(self, types: Sequence[Any]) -> None:
        found = [(x.ndim, x.shape[1:], str(x.dtype)) for x in types]
        if found != [(len(v.shape), v.shape[1:], v.dtype) for v in self.states]:
            raise ValueError(
                f"`state` must hold {show_types(self.states)}, the examples aside, got "
                f"{show_types(types)}. "
                "Start from `initial_state` of this program."
            )

    def initial_state(self, batch_size: int | None) -> tuple[jax.Array, ...]:
        """Returns the state before the first step: `IntegerProgram.initial_state`."""
        zeros = [
            jnp.full(shape, min(max(v.zero_point, v.low), v.high), v.dtype)
            for shape, v in zip(
                self.sequence_shapes(batch_size), self.ends, strict=True
            )
        ]
        values = xla.run(self.start, self.start_params, zeros)
        return tuple(
            values[v].astype(state.dtype)
            for v, state in zip(self.start.outputs, self.states, strict=True)
        )

    def sequence_shapes(self, batch_size: int | None) -> list[Shape]:
        """Returns the shapes of inputs of whole sequences for a number of examples."""
        shapes = []
        for name, v in zip(self.names, self.ends, strict=True):
            shape = list(v.shape)
            if batch_size is not None and shape and v.time_axis != 0:
                if v.fixed_by and batch_size != shape[0]:
                    raise ValueError(
                        f"{at_start(name)} of the program has {shape[0]} examples, "
                        f"fixed by {v.fixed_by}, got {batch_size}. Lower the model for "
                        "this number."
                    )
                shape[0] = batch_size
            shapes.append(tuple(shape))
        return shapes

    def code_shapes(self, kind: Kind, inputs: Sequence[Any]) -> list[Shape]:
        """Returns the shapes of the codes of inputs: those with an axis of time."""
        shapes = [np.shape(x) for x in inputs]
        if kind == "codes":
            return shapes
        count = len(self.states)
        pairs = zip(shapes[count:], self.ends, strict=True)
        return [*shapes[:count], *(_with(s, v.time_axis) for s, v in pairs)]

    @property
    def real_inputs(self) -> list[Value | None]:
        """Returns the values of real inputs; states are codes."""
        return [*[None] * len(self.states), *self.ends]

    @property
    def real_outputs(self) -> list[Value | None]:
        """Returns the values of real outputs; states are codes."""
        return [*[None] * len(self.states), *(v for v, _ in self.outputs)]

    def arranged(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns states, and inputs with an axis of one step."""
        count = len(self.states)
        pairs = zip(inputs[count:], self.ends, strict=True)
        shaped = (jnp.reshape(x, _with(jnp.shape(x), v.time_axis)) for x, v in pairs)
        return [*inputs[:count], *shaped]

    def put_back(self, outputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns states, and outputs without an axis of one step."""
        count, found = len(self.states), list(outputs)
        for k, (_, axis) in enumerate(self.outputs, count):
            found[k] = found[k].reshape(_without(found[k].shape, axis))
        return found


class CompiledStep:
    """A step of a program for one number of examples; threads may call it at once.

    Attributes:
      backend: As in `CompiledProgram`.
    """

    def __init__(
        self,
        runner: CodeRunner,
        states: Sequence[np.ndarray],
        ends: Sequence[tuple[int, int]],
        inputs: Sequence[InputEnd],
        outputs: Sequence[tuple[Value, Shape]],
        trees: tuple[Any, Any],
        counter: tuple[int, int] | None,
    ) -> None:
        self._counter = counter
        self.backend = runner.backend
        self._start, self._types = states, [(x.shape, x.dtype) for x in states]
        limits = [(np.iinfo(x.dtype) if x.dtype != bool else None) for x in states]
        # Codes that a type cannot hold need no look.
        self._ends = [
            (k, low, high)
            for k, ((low, high), own) in enumerate(zip(ends, limits, strict=True))
            if own is not None and (low > own.min or high < own.max)
        ]
        self._input_tree, self._output_tree = trees
        self._run = RealRunner(runner, len(states), inputs, outputs)

    def initial_state(self) -> tuple[np.ndarray, ...]:
        """Returns the state before the first step: codes, new arrays."""
        return tuple(x.copy() for x in self._start)

    def __call__(
        self, state: Sequence[Any], *inputs: Any
    ) -> tuple[tuple[np.ndarray, ...], Any]:
        """Computes the next state and the outputs, the numbers of `step`.

        Args:
          state: State of `initial_state` or of the last step; it is left as it is.
          *inputs: Inputs of the model at one time, as `IntegerProgram.step` takes them,
            for this number of examples.

        Raises:
          ValueError: if the state or the inputs have other types, shapes or another
            structure, or the state codes that no step leaves; for a step after the last
            of a position table. The state stays as it is.
        """
        flat, tree = jax.tree.flatten(inputs)
        if tree != self._input_tree:
            raise ValueError(
                f"The program takes inputs nested as {self._input_tree}, got {tree}."
            )
        states, outputs = self._run(self._states(state), flat)
        return tuple(states), jax.tree.unflatten(self._output_tree, outputs)

    def _states(self, state: Sequence[Any]) -> list[np.ndarray]:
        found = [x if type(x) is np.ndarray else np.asarray(x) for x in state]
        types = [(x.shape, x.dtype) for x in found]
        if types != self._types:
            raise ValueError(
                f"`state` must hold {show_types(self._start)}, got "
                f"{show_types(found)}. Start from `initial_state`."
            )
        check_number(found, self._counter)
        for k, low, high in self._ends:
            x = found[k]
            above = (x - x.dtype.type(low)).view(f"u{x.itemsize}")  # Wraps below.
            if x.size and above.max() > high - low:
                raise ValueError(
                    f"`state[{k}]` must hold codes in [{low}, {high}], got codes from "
                    f"{x.min()} to {x.max()}: it is of another program, or altered. "
                    "Start from `initial_state`."
                )
        return list(map(ready, found))


def compiled_step(
    steps: StepExecution,
    trees: tuple[Any, Any],
    batch_size: int | None,
    threads: int | None,
    backend: Backend | None,
) -> CompiledStep:
    """Compiles a step, as `IntegerProgram.compile_step`."""
    count = thread_count(threads)
    if batch_size is not None:
        check_size(batch_size)
    shapes = steps.sequence_shapes(batch_size)
    inputs = []
    for name, v, shape in zip(steps.names, steps.ends, shapes, strict=True):
        real = _without(shape, v.time_axis)
        inputs.append(InputEnd(name, v, _with(real, v.time_axis), real))
    sizes = {end.real_shape[:1] for end in inputs}
    if batch_size is not None and (batch_size,) not in sizes:
        raise ValueError(
            f"`batch_size` must be one that this program takes, got {batch_size}: the "
            f"inputs of a step have shapes {[end.real_shape for end in inputs]}. Lower "
            "the model for this size."
        )
    states = [np.asarray(x) for x in steps.initial_state(batch_size)]
    given = [*(x.shape for x in states), *(end.shape for end in inputs)]
    runner = make_runner(steps, given, count, backend)
    pairs = zip(steps.outputs, runner.shapes[len(states) :], strict=True)
    outputs = [(v, _without(shape, axis)) for (v, axis), shape in pairs]
    ends = [(v.low, v.high) for v in steps.states]
    return CompiledStep(runner, states, ends, inputs, outputs, trees, steps.counter)


def check_number(state: Sequence[Any], counter: tuple[int, int] | None) -> None:
    """Raises for a known state after the last step that there may be, or of none.

    Args:
      state: Codes of the state.
      counter: Which of them is the number of the step, and how many steps there may be.
    """
    if counter is None or isinstance(state[counter[0]], jax.core.Tracer):
        return
    k, steps = counter
    number = int(state[k])
    if not 0 <= number <= steps:
        raise ValueError(
            f"`state[{k}]` must be the number of a step, from 0 to {steps}, got "
            f"{number}: it is of another program, or altered. Start from "
            "`initial_state`."
        )
    if number == steps:
        raise ValueError(
            f"The sequence is longer than the {steps} steps that the program was "
            "lowered for: its position tables have so many rows, and its sums of all "
            "steps until now have bounds for so many terms. Lower the model for the "
            "longest sequence, or start another from `initial_state`."
        )


def _unless(is_late: jax.Array, y: jax.Array) -> jax.Array:
    """Returns an output, and what shows that it is none after the last step."""
    if y.dtype == bool:
        return y
    is_float = jnp.issubdtype(y.dtype, jnp.floating)
    none = jnp.nan if is_float else jnp.iinfo(y.dtype).min
    return jnp.where(is_late, jnp.asarray(none, y.dtype), y)


def _with(shape: Shape, axis: int | None) -> Shape:
    """Returns a shape with an axis of one step."""
    return shape if axis is None else (*shape[:axis], 1, *shape[axis:])


def _without(shape: Shape, axis: int | None) -> Shape:
    """Returns a shape without an axis of time."""
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
