"""TFLite's tensors and operators, and the integer graph that grows from them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.graph import Grid, Value
from qjax.graph.tflite_tables import Codes
from qjax.integer import RequantizeRule


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a TFLite graph.

    Attributes:
      name: Name of the tensor; need not be unique.
      shape: Shape of the tensor, as in the file.
      dtype: NumPy's name of its type.
      scale: Units per code, one or one per channel; none if it is not quantized.
      zero_point: The code of zero, one for each scale.
      axis: The axis of the channels.
      data: Value of the tensor, if it is a constant.
      is_real: Whether the file holds real numbers there, and the type, the scale and
        the zero point are those of their codes: between ``QUANTIZE`` or ``DEQUANTIZE``
        and an end of the graph.
      is_variable: Whether it is a state, which an operator reads and writes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    axis: int = 0
    data: np.ndarray | None = None
    is_real: bool = False
    is_variable: bool = False

    @property
    def is_number(self) -> bool:
        """Returns whether the tensor holds integers that are no codes: indices, say."""
        return not self.scale and self.dtype in ("int32", "int64")

    @property
    def storage(self) -> str:
        """Returns the type of the tensor's integers in the integer graph."""
        return "int32" if self.is_number else self.dtype

    def codes(self) -> Codes:
        """Returns the codes of the tensor's grid; numbers are codes of themselves.

        Raises:
          NotImplementedError: unless it has one scale, and a type of codes.
        """
        if self.is_number:
            return Codes(np.float32(1), 0, -(2**31), 2**31 - 1)
        if len(self.scale) != 1 or self.dtype not in ("int8", "uint8", "int16"):
            raise NotImplementedError(
                f"The tensor {self.name!r} must be int8, uint8, int16 with one scale, "
                f"got {self.dtype} with {len(self.scale)}. Only the integer part of a "
                "graph can be built."
            )
        info = np.iinfo(self.dtype)
        scale, zero_point = np.float32(self.scale[0]), int(self.zero_point[0])
        return Codes(scale, zero_point, int(info.min), int(info.max))

    def grid(self) -> Grid | None:
        """Returns the grid of the tensor in the form of the integer graph, if any."""
        if self.is_number:
            return None
        codes = self.codes()
        return Grid(float(codes.scale), codes.zero_point)

    @property
    def short_name(self) -> str:
        """Returns the first of the names of a fused tensor."""
        return self.name.partition(";")[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """An operator of a TFLite graph.

    Attributes:
      name: Name in TFLite's schema: ``CONV_2D``.
      inputs: Numbers of tensors; -1 for one that is left out.
      outputs: Numbers of tensors.
      options: Options by their names in the schema: ``stride_w``. Enumerations by name.
      intermediates: Numbers of tensors that give grids to what is computed inside.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    intermediates: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules by which accumulators are rescaled.

    Attributes:
      integer: Rule where TFLite computes in integers, but for dense layers.
      dense: In dense layers.
      is_xnnpack: Whether products have XNNPACK's float32 instead.
    """

    integer: RequantizeRule
    dense: RequantizeRule
    is_xnnpack: bool


class Growth:
    """The integer graph as built so far.

    Attributes:
      tensors: Tensors of TFLite's graph, with the shapes that they turn out to have,
        and the integers that shapes are computed from.
      file: The same with the inputs of the file's sizes.
      rules: Rules of rescaling.
      builder: Builder of the integer graph.
      inputs: Tensor that is an input -> value of its codes.
      values: Tensor -> value.
      unknown: Tensor of integers that no rule computes -> the operator that would.
      states: Tensors that are the state of an operator.
      carried: State -> its value before a call of many; none for the one after a
        reset.
      kept: State -> its value after the call.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        rules: Rules,
        shapes: Mapping[int, tuple[int, ...]],
        file: Sequence[Tensor] | None = None,
    ) -> None:
        self.tensors = [
            dataclasses.replace(t, shape=shapes.get(k, t.shape))
            for k, t in enumerate(tensors)
        ]
        self.file = self.tensors if file is None else file
        self.rules = rules
        self.builder = GraphBuilder()
        self.inputs: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self.unknown: dict[int, str] = {}
        self.states: set[int] = set()
        self.carried: dict[int, int] = {}
        self.kept: dict[int, int] = {}

    def add_input(self, k: int, ends: tuple[int, int] | None = None) -> None:
        """Adds tensor ``k`` as an input, of codes or of numbers within ``ends``."""
        t = self.tensors[k]
        low, high = ends or t.codes()[2:]
        value = self.builder.add_value(t.shape, low, high, t.grid(), dtype=t.storage)
        own = self.builder.values[value]
        if t.is_real and not self.rules.is_xnnpack:
            own = dataclasses.replace(own, rounding="half_away")
        self.builder.values[value] = dataclasses.replace(own, is_place=t.is_number)
        self.inputs[k] = value
        self.bind(k, value)

    def add_state(self, k: int) -> None:
        """Adds a state before the call as an input of the graph."""
        t = self.tensors[k]
        low, high = t.codes()[2:]
        value = self.builder.add_value(t.shape, low, high, t.grid(), dtype=t.storage)
        self.carried[k] = value

    def bind(self, k: int, value: int) -> None:
        """Binds a tensor to a value of the graph."""
        shape = self.builder.values[value].shape
        self.tensors[k] = dataclasses.replace(self.tensors[k], shape=shape)
        self.values[k] = value
        if not self.tensors[k].is_real:
            self.builder.add_site(self.tensors[k].name, value)

    def is_computed(self, k: int) -> bool:
        """Returns whether a tensor is an input or depends on one."""
        return k in self.values and self.tensors[k].data is None

    def value(self, k: int) -> int:
        """Returns the value of a tensor; a constant is added to the graph."""
        if k not in self.values:
            t = self.tensors[k]
            if k in self.unknown:
                raise NotImplementedError(
                    f"TFLite's {self.unknown[k]} computes the integers {t.name!r} at "
                    "run time, which has no rule. Only codes and their places can be "
                    "computed."
                )
            grid = t.grid()
            if t.data is None:
                raise ValueError(
                    f"The tensor {t.name!r} is used before it is computed."
                )
            data = np.asarray(t.data, t.storage)
            if np.any(data != t.data):
                raise NotImplementedError(
                    f"The constant {t.name!r} of type {t.dtype} must fit int32, got "
                    f"{t.data.min()} to {t.data.max()}."
                )
            name = self.builder.add_param(t.short_name, data)
            options: Any = {"params": {"value": name}, "grid": grid, "dtype": t.storage}
            self.values[k] = self.builder.add("tflite_constant", (), **options)
        return self.values[k]


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator, about to be added to the graph."""

    op: Operator
    growth: Growth

    # Reading.

    def tensor(self, place: int = 0) -> Tensor:
        """Returns a tensor of the inputs."""
        return self.growth.tensors[self.op.inputs[place]]

    def output(self, place: int = 0) -> Tensor:
        """Returns the tensor of the output."""
        return self.growth.tensors[self.op.outputs[place]]

    def codes(self, place: int = 0) -> Codes:
        """Returns the codes of the grid of an input."""
        return self.tensor(place).codes()

    @functools.cached_property
    def y(self) -> Codes:
        """Returns the codes of the grid of the output."""
        return self.output().codes()

    def has(self, place: int) -> bool:
        """Returns whether there is such an input."""
        return place < len(self.op.inputs) and self.op.inputs[place] >= 0

    def value(self, place: int = 0) -> int:
        """Returns the number of an input in the graph."""
        return self.growth.value(self.op.inputs[place])

    def known(self, value: int) -> Value:
        """Returns the record of a value in the graph."""
        return self.growth.builder.values[value]

    def constant(self, place: int) -> np.ndarray:
        """Returns an input that must not depend on other tensors."""
        t = self.tensor(place)
        if t.data is None:
            raise self.refuse(f"input {place}, {t.name!r}, computed at run time")
        return np.asarray(t.data)

    def axis(self, found: Any, rank: int) -> int:
        """Returns an axis of ``rank`` axes; raises ValueError if it is none of them.

        Args:
          found: A number, or an array of one; below zero it counts from the last.
          rank: Number of the axes.
        """
        axis = int(np.ravel(found)[0])
        if np.size(found) != 1 or not -rank <= axis < rank:
            raise ValueError(
                f"TFLite's {self.op.name} must have an axis within [{-rank}, "
                f"{rank - 1}], got {np.ravel(found).tolist()}."
            )
        return axis % rank

    def option(self, name: str, default: Any, *supported: Any) -> Any:
        """Returns an option; raises unless it is one of those that have a rule."""
        found = self.op.options.get(name, default)
        if supported and found not in supported:
            known = ", ".join(map(repr, supported))
            raise self.refuse(f"{name}={found!r}", f" Known are {known}.")
        return found

    def refuse(self, what: str, hint: str = "") -> NotImplementedError:
        """Returns the error for a case without a rule."""
        return NotImplementedError(
            f"TFLite's {self.op.name} with {what} has no rule.{hint} Its output is "
            f"{self.output().name!r}."
        )

    def activation(self) -> tuple[int, int]:
        """Returns the ends of the codes that the fused activation leaves."""
        name = "fused_activation_function"
        return bounds(self.option(name, "NONE", *_REAL_BOUNDS), self.y)

    def state(self, place: int) -> Tensor:
        """Returns the tensor of a state, which no other operator may read or write."""
        k, t, growth = self.op.inputs[place], self.tensor(place), self.growth
        is_taken = k in growth.states or growth.is_computed(k)
        if not t.is_variable or t.data is not None or is_taken:
            raise self.refuse(f"a state {t.name!r} that is not its own")
        growth.states.add(k)
        return t

    # Adding.

    def add(
        self,
        operation: str,
        inputs: Sequence[int],
        *,
        like: int | None = None,
        is_output: bool = False,
        params: Mapping[str, np.ndarray] | None = None,
        **attributes: Any,
    ) -> int:
        """Adds a node and returns its value.

        Args:
          operation: Operation of the graph.
          inputs: Values.
          like: A value with the same grid and type; an int32 accumulator if None.
          is_output: Whether grid and type are those of the output.
          params: Role -> array.
          **attributes: Attributes of the node.
        """
        grid, dtype = None, "int32"
        if like is not None:
            grid, dtype = self.known(like).grid, self.known(like).dtype
        if is_output:
            grid, dtype = self.output().grid(), self.output().storage
        return self._node(operation, inputs, params, attributes, grid, dtype)

    def emit(
        self,
        operation: str,
        inputs: Sequence[int],
        *,
        place: int = 0,
        params: Mapping[str, np.ndarray] | None = None,
        **attributes: Any,
    ) -> None:
        """Adds the node that computes an output."""
        t = self.output(place)
        own = attributes, t.grid(), t.storage
        value = self._node(operation, inputs, params, *own)
        self.growth.bind(self.op.outputs[place], value)

    def move(self, operation: str, inputs: Sequence[int], **options: Any) -> None:
        """Adds the node of an operator that takes its codes from its inputs."""
        self.check_type(inputs, options.get("place", 0))
        self.emit(operation, inputs, **options)

    def check_type(self, inputs: Sequence[int], place: int = 0) -> None:
        """Raises NotImplementedError unless an output has the type of its inputs."""
        if any(self.known(v).dtype != self.output(place).storage for v in inputs):
            raise self.refuse("an output of another type")

    def reshaped(self, value: int, shape: Sequence[int]) -> int:
        """Returns a value in another shape."""
        v = self.known(value)
        shape = tuple(map(int, shape))
        if v.shape == shape:
            return value
        like = None if v.grid is None else value
        sizes = any_batch(shape) if v.shape else list(shape)
        return self.add("reshape", (value,), like=like, sizes=sizes)

    def _node(
        self,
        operation: str,
        inputs: Sequence[int],
        params: Mapping[str, np.ndarray] | None,
        attributes: Mapping[str, Any],
        grid: Grid | None,
        dtype: str,
    ) -> int:
        builder, path = self.growth.builder, self.output().short_name
        names = {
            role: builder.add_param(f"{path}/{role}", array)
            for role, array in (params or {}).items()
        }
        options: Any = {"params": names, "grid": grid, "dtype": dtype, "path": path}
        return builder.add(operation, inputs, attributes, **options)


_REAL_BOUNDS = {
    "NONE": (-math.inf, math.inf),
    "RELU": (0.0, math.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}


def bounds(activation: str, y: Codes) -> tuple[int, int]:
    """Returns the ends of the codes that an activation leaves."""
    low, high = _REAL_BOUNDS[activation]
    least = y.low if low == -math.inf else max(y.low, _code(low, y))
    return least, y.high if high == math.inf else min(y.high, _code(high, y))


def _code(real: float, y: Codes) -> int:
    quotient = float(np.float32(real) / y.scale)
    return y.zero_point + int(math.copysign(math.floor(abs(quotient) + 0.5), quotient))


def any_batch(shape: Sequence[int]) -> list[int]:
    """Returns a shape for `reshape` whose leading axis may have any size."""
    return [-1, *map(int, shape[1:])] if shape else []


TfliteRule = Callable[[Call], None]
