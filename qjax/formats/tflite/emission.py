"""The TFLite graph that grows from the nodes of an integer graph."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite.tensors import Operator, Tensor, bounds
from qjax.graph.builder import unique_name
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.tflite_tables import Codes

WRITER = "qjax.formats.tflite.write_tflite"
REMEDY = (
    "which TFLite's kernels round otherwise; `qjax.lower(..., "
    "target=qjax.targets.tflite)` gives a program in their arithmetic"
)
OPTION = (
    f"{REMEDY}, and `write_tflite(program, exact=False)` (`--to tflite-approximate`) a "
    "file whose kernels are off by one code at most"
)
ACTIVATIONS = ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")


@dataclasses.dataclass(frozen=True)
class Pending:
    """An accumulator, which an operator computes with what rescales it.

    Attributes:
      node: The node that computes it.
      moves: Nodes that move it before it is rescaled, in order.
    """

    node: Node
    moves: tuple[Node, ...] = ()


class TfliteGraph:
    """The TFLite graph as written so far.

    Args:
      graph: Graph of a program.
      params: Its parameters.
      is_exact: Whether each operator must give the codes of the program; else it may
        round otherwise, by one code.

    Attributes:
      tensors: Tensors, in order.
      operators: Operators, in order.
      places: Value of the graph -> its tensor.
      pending: Value of the graph that no tensor holds -> how it is computed.
      kernels: Tensors that hold weights, of operators that take them with 4 bits.
    """

    def __init__(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        is_exact: bool = True,
    ) -> None:
        self.graph, self.params, self.is_exact = graph, params, is_exact
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self.places: dict[int, int] = {}
        self.pending: dict[int, Pending] = {}
        self.kernels: list[int] = []
        self._names: set[str] = set()
        self._constants: dict[Any, int] = {}

    def value(self, v: int) -> Value:
        """Returns the record of a value of the graph."""
        return self.graph.values[v]

    def codes(self, v: int, node: Node) -> Codes:
        """Returns the codes of the type and the grid of a value."""
        value, grid = self.value(v), self.value(v).grid
        if grid is None or np.ndim(grid.scale):
            raise unsupported(WRITER, node, "codes without a grid of one scale")
        if value.dtype not in ("int8", "uint8", "int16"):
            raise unsupported(WRITER, node, f"codes of {value.dtype}")
        info = np.iinfo(value.dtype)
        scale = np.float32(grid.scale)
        return Codes(scale, grid.zero_point, int(info.min), int(info.max))

    def add_tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        scale: Sequence[float] = (),
        zero_point: Sequence[int] = (),
        *,
        axis: int = 0,
        data: np.ndarray | None = None,
    ) -> int:
        """Adds a tensor and returns its number."""
        unique = unique_name(name or "value", self._names)
        self._names.add(unique)
        grid = tuple(map(float, scale)), tuple(map(int, zero_point))
        own = Tensor(unique, tuple(map(int, shape)), dtype, *grid, axis, data)
        self.tensors.append(own)
        return len(self.tensors) - 1

    def add_like(self, t: int, shape: Sequence[int], name: str) -> int:
        """Adds a tensor on the grid of another one."""
        own = self.tensors[t]
        grid = own.scale, own.zero_point
        return self.add_tensor(name, shape, own.dtype, *grid)

    def add_value(self, v: int, name: str) -> int:
        """Adds the tensor of a value of the graph, and binds it."""
        value = self.value(v)
        grid: Any = ()
        if value.grid is not None:
            grid = (float(np.float32(value.grid.scale)),), (value.grid.zero_point,)
        self.places[v] = self.add_tensor(name, value.shape, value.dtype, *grid)
        return self.places[v]

    def constant(self, data: Any, dtype: str = "int32", like: int | None = None) -> int:
        """Returns a constant tensor, the same one for the same integers.

        Args:
          data: The integers.
          dtype: Their type.
          like: A tensor whose grid it has; None for numbers.
        """
        array = np.asarray(data).astype(dtype)
        grid: Any = ()
        if like is not None:
            grid = self.tensors[like].scale, self.tensors[like].zero_point
        key = array.shape, dtype, array.tobytes(), grid
        if key not in self._constants:
            shape = array.shape
            own = self.add_tensor("constant", shape, dtype, *grid, data=array)
            self._constants[key] = own
        return self._constants[key]

    def add(
        self,
        name: str,
        inputs: Sequence[int],
        output: int,
        *,
        between: Sequence[int] = (),
        **options: Any,
    ) -> int:
        """Adds an operator with one output, which it returns.

        Args:
          name: Its name in TFLite's schema.
          inputs: Its tensors.
          output: The tensor that it computes.
          between: Tensors that give grids to what it computes inside.
          **options: Its options by their names in the schema.
        """
        own = tuple(inputs), (output,), options, tuple(between)
        self.operators.append(Operator(name, *own))
        return output

    def tensor(self, v: int, node: Node) -> int:
        """Returns the tensor of a value that a node reads."""
        if v not in self.places:
            what = "an accumulator that it reads before any site rounds it"
            raise unsupported(WRITER, node, what)
        return self.places[v]

    def reshaped(self, t: int, shape: Sequence[int], name: str = "reshape") -> int:
        """Returns a tensor in another shape; its leading size may differ at call time.

        Args:
          t: The tensor.
          shape: Its sizes.
          name: Name of the result.
        """
        shape = tuple(map(int, shape))
        if self.tensors[t].shape == shape:
            return t
        out = self.add_like(t, shape, name)
        sizes = [-1, *shape[1:]] if math.prod(shape[1:]) and shape else list(shape)
        new = np.asarray(sizes, np.int32)
        return self.add("RESHAPE", (t, self.constant(new)), out, new_shape=new)

    def transposed(self, t: int, order: Sequence[int], name: str = "transpose") -> int:
        """Returns a tensor with its axes in another order."""
        if list(order) == list(range(len(order))):
            return t
        shape = [self.tensors[t].shape[d] for d in order]
        out = self.add_like(t, shape, name)
        return self.add("TRANSPOSE", (t, self.constant(list(order))), out)

    def place(self, v: int, t: int, name: str) -> None:
        """Binds a value to a tensor, in the shape and on the grid of the value."""
        value = self.value(v)
        t = self.reshaped(t, value.shape, name)
        self.places[v] = t

    def clipped(self, t: int, ends: tuple[int, int], codes: Codes, name: str) -> int:
        """Returns codes between two ends, by comparisons with constants."""
        for operation, end, whole in (
            ("MAXIMUM", ends[0], codes.low),
            ("MINIMUM", ends[1], codes.high),
        ):
            if end != whole:
                own = self.tensors[t]
                other = self.constant([end], own.dtype, like=t)
                t = self.add(operation, (t, other), self.add_like(t, own.shape, name))
        return t


def is_close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Returns whether codes are off by one at most."""
    if found.shape != wanted.shape:
        return False
    return bool(np.all(np.abs(found.astype(np.int64) - wanted) <= 1))


def activation(ends: tuple[int, int], y: Codes) -> str | None:
    """Returns the fused activation that leaves codes between two ends, if any."""
    return next((name for name in ACTIVATIONS if bounds(name, y) == ends), None)
