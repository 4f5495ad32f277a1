"""A QONNX graph of integers under construction: float32 that hold whole numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats import support
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.qonnx.staircases import Staircase
from qjax.graph.graph import Node, Value

MOST = 1 << 24  # float32 holds all integers up to it.
DOMAIN = "qonnx.custom_op.general"


@dataclasses.dataclass(frozen=True)
class QonnxTensor:
    """Integers about their zero point, in float32.

        integer = (tensor << shift) + bias

    Attributes:
      value: The tensor, its axes perhaps in another order.
      order: Axis of the tensor for each axis of the value.
      bias: Integers that are still to be added, in the rank of the value, int64.
      shift: Bits by which they are still to be shifted.
      number: Number of the accumulator in the integer graph, whose unit counts.
    """

    value: OnnxValue
    order: tuple[int, ...]
    bias: np.ndarray
    shift: int = 0
    number: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the value."""
        return tuple(int(self.value.shape[d]) for d in self.order)  # type: ignore[arg-type]


class QonnxSheet:
    """Operators on integers in float32, and the types of their tensors."""

    def __init__(self) -> None:
        self.graph = OnnxGraph()
        self.types: dict[str, str] = {}

    def tensor(
        self, value: OnnxValue, order: Sequence[int] | None = None
    ) -> QonnxTensor:
        """Returns integers without anything that is still to be added."""
        rank = len(value.shape)
        own = tuple(range(rank)) if order is None else tuple(order)
        return QonnxTensor(value, own, np.zeros((1,) * rank, np.int64))

    def numbers(self, array: np.ndarray, name: str = "c") -> OnnxValue:
        """Returns known integers, with their type."""
        found = self.graph.constant(array, "float32", name)
        if array.size:
            self.types[found.name] = type_of(int(array.min()), int(array.max()))
        return found

    def kernel(
        self, call: "QonnxCall", array: np.ndarray, axis: int, channel: int | None
    ) -> OnnxValue:
        """Returns a kernel.

        Args:
          call: The product that reads it.
          array: Its integers, as the operator takes them.
          axis: Its axis of the channels.
          channel: Axis of the channels in the output, None if it is not one.
        """
        return self.numbers(array, "kernel")

    def product(self, call: "QonnxCall") -> None:
        """Notes that a node multiplies two values."""

    def finished(self, x: QonnxTensor) -> QonnxTensor:
        """Shifts and adds what is still to be."""
        g, value = self.graph, x.value
        if x.shift:
            value = g.two("Mul", value, self.numbers(np.array(1 << x.shift)))
        if np.any(x.bias):
            value = g.two("Add", value, self.numbers(arranged(x.bias, x.order)))
        return self.tensor(value, x.order)

    def plain(self, x: QonnxTensor) -> OnnxValue:
        """Returns the tensor with its axes in order."""
        own = self.finished(x)
        return self.graph.transpose(own.value, own.order)

    def aligned(self, xs: Sequence[QonnxTensor]) -> tuple[list[OnnxValue], Any]:
        """Returns tensors of one order of axes, and the order."""
        order = xs[0].order
        if all(x.order == order for x in xs):
            return [self.finished(x).value for x in xs], order
        return [self.plain(x) for x in xs], None

    def stepped(
        self, x: QonnxTensor, steps: Staircase, axis: int | None, ends: tuple[int, int]
    ) -> QonnxTensor:
        """Adds MultiThreshold of a tensor: its ups, less its downs.

        Args:
          x: The tensor, whose bias and shift the steps hold already.
          steps: The steps.
          axis: Axis of the channels; None for one staircase.
          ends: Least and largest integer of the result.
        """
        value, order = x.value, x.order
        rank = len(value.shape)
        if axis is not None:
            at = order[axis]
            if at not in (1, rank - 1):
                value = self.graph.transpose(value, order)
                order, at = tuple(range(rank)), axis
            if at not in (1, rank - 1):
                turn = [d for d in range(rank) if d != at]
                turn.insert(min(1, rank - 1), at)
                value = self.graph.transpose(value, turn)
                order, at = tuple(np.argsort(turn).tolist()), min(1, rank - 1)
            layout = _layout(rank, at)
        else:
            layout = _layout(rank, 1)
        shape = value.shape
        if rank < 2:  # The operator counts channels along the second axis.
            value, layout = (
                self.graph.reshape(value, (1, *shape, *(1,) * (1 - rank))),
                "NC",
            )
        found = None
        if steps.up.shape[1] or not steps.down.shape[1]:
            found = self._counted(value, steps.up, steps.base, layout, ends)
        if steps.down.shape[1]:
            less = self._counted(value, steps.down, 0, layout, (0, steps.down.shape[1]))
            above = self.numbers(np.array(steps.base)) if found is None else found
            found = self.graph.two("Sub", above, less)
        assert found is not None
        return self.tensor(self.graph.reshape(found, shape), order)

    def _counted(
        self,
        x: OnnxValue,
        cuts: np.ndarray,
        base: int,
        layout: str,
        ends: tuple[int, int],
    ) -> OnnxValue:
        if not cuts.shape[1]:  # Never reached.
            cuts = np.full((1, 1), MOST)
        found = self.graph.op(
            "MultiThreshold",
            x,
            self.numbers(np.clip(cuts, -MOST, MOST), "thresholds"),
            dtype="float32",
            shape=x.shape,
            domain=DOMAIN,
            out_dtype=type_of(*ends),
            out_scale=1.0,
            out_bias=float(base),
            data_layout=layout,
        )
        self.types[found.name] = type_of(*ends)
        return found


def _layout(rank: int, axis: int) -> str:
    spatial = "DHW"[-max(rank - 2, 0) :] if 2 < rank < 6 else "H" * max(rank - 2, 0)
    spatial = {1: "W"}.get(rank - 2, spatial)
    return f"N{spatial}C" if axis == rank - 1 and rank > 2 else f"NC{spatial}"


def type_of(low: int, high: int) -> str:
    """Returns the type of integers in FINN's words: ``INT8``, ``UINT4``."""
    if low >= 0:
        return f"UINT{max(high.bit_length(), 1)}"
    bits = max((~low).bit_length(), max(high, 0).bit_length()) + 1
    return f"INT{max(bits, 2)}"


def arranged(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Returns numbers in the rank of a value as they meet its tensor."""
    return array.transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class QonnxCall:
    """One node, what it reads, and the sheet.

    Attributes:
      writer: Function that writes the format.
      node: The node.
      sheet: The sheet that grows.
      inputs: Integers about their zero points.
      values: Inputs in the integer graph.
      output: Output in the integer graph.
      shape: Its shape.
      params: Role -> integers, int64.
      is_exact: Whether float32 must hold all sums.
    """

    writer: str
    node: Node
    sheet: QonnxSheet
    inputs: Sequence[QonnxTensor]
    values: Sequence[Value]
    output: Value
    shape: tuple[int, ...]
    params: Mapping[str, np.ndarray]
    is_exact: bool = True

    def __getitem__(self, name: str) -> Any:
        return self.node.attributes[name]

    @property
    def x(self) -> QonnxTensor:
        """Returns the first input."""
        return self.inputs[0]

    @property
    def graph(self) -> OnnxGraph:
        """Returns the ONNX graph."""
        return self.sheet.graph

    def zero(self, k: int = 0) -> int:
        """Returns the zero point of an input."""
        return self.values[k].zero_point

    def ends(self, k: int = 0) -> tuple[int, int]:
        """Returns the ends of an input about its zero point."""
        x = self.values[k]
        return x.low - x.zero_point, x.high - x.zero_point

    def far(self, k: int = 0) -> int:
        """Returns the largest distance of an input from its zero point."""
        return max(map(abs, self.ends(k)))

    def refuse(self, what: str) -> ValueError:
        """Returns the error for a form that QONNX does not express."""
        return support.unsupported(self.writer, self.node, what)

    def check(self, most: int) -> None:
        """Raises ValueError for integers that float32 does not hold."""
        if self.is_exact and most >= MOST:
            raise self.refuse("integers of more than 24 bits, which float32 rounds")
