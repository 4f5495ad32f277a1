"""TFLite's LSTM of 8-bit codes and 16-bit cells, as a loop of the integer graph.

    gate = clip(clip(rescale((x - z_x) K + b)) + rescale((h - z_h) R)), of 2^-12
    c = clip(round(f c) + round(i g)), h = clip(rescale(o tanh(c)) + z_h)

Each rounds as TFLite's reference kernel does, so the codes are its own.

References:
  TensorFlow Lite 2.19, lite/kernels/lstm_eval.cc, `LstmStepInteger8x8_16`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.gemmlowp import logistic_table, tanh_table
from qjax.graph.graph import Graph, Grid, Node
from qjax.graph.operations.products import channel_ends
from qjax.integer_tflite import tflite_multiplier

GATES = ("input", "forget", "cell", "output")  # In TFLite's order.
LEAST_POWER, MOST_POWER = -15, -9  # Of the scale of a cell, a power of two.
_INT8, _INT16, _INT32 = (np.iinfo(t) for t in ("int8", "int16", "int32"))
_GATE = Grid(2.0**-12, 0)
_SHARE = Grid(2.0**-15, 0)


@dataclasses.dataclass(frozen=True)
class LstmCell:
    """Weights and grids of an LSTM; a tuple has an item for each of `GATES`.

    Attributes:
      kernels: Weights of the inputs, int8 ``[cells, inputs]``.
      recurrent: Weights of the state, int8 ``[cells, cells]``.
      biases: int32 ``[cells]``, in units of inputs times weights.
      kernel_scales: Scales of the weights of the inputs, float32 numbers.
      recurrent_scales: Scales of the weights of the state.
      x: Grid of the inputs, int8.
      h: Grid of the outputs, which are the state.
      cell_power: The scale of the cell is ``2^cell_power``; -15 to -9.
      cell_most: Largest code of the cell; 0 for int16's own ends.
    """

    kernels: Sequence[np.ndarray]
    recurrent: Sequence[np.ndarray]
    biases: Sequence[np.ndarray]
    kernel_scales: Sequence[float]
    recurrent_scales: Sequence[float]
    x: Grid
    h: Grid
    cell_power: int
    cell_most: int = 0

    @property
    def ends(self) -> tuple[int, int]:
        """Returns the least and the largest code of the cell."""
        if self.cell_most:
            return -self.cell_most, self.cell_most
        return int(_INT16.min), int(_INT16.max)


def add_lstm(
    builder: GraphBuilder, x: int, cell: LstmCell, path: str, start: Sequence[int] = ()
) -> tuple[int, ...]:
    """Adds an LSTM to a graph.

    Args:
      builder: Receives it.
      x: Value of the inputs, int8 ``[time, batch, inputs]``.
      cell: The LSTM.
      path: Module path of the LSTM.
      start: Values of state and cell before the first step; zeros if there are none.

    Returns:
      The values of state and cell after the last step, and of the outputs, int8
      ``[time, batch, cells]``.

    Raises:
      OverflowError: if an accumulator could leave int32.
      ValueError: if the weights do not fit each other.
    """
    batch = builder.values[x].shape[1]
    shape = batch, len(cell.biases[0])
    states = zip(
        ("hidden", "cell"),
        (cell.h, Grid(2.0**cell.cell_power, 0)),
        ("int8", "int16"),
        strict=True,
    )
    zeros = []
    for name, grid, dtype in states:
        codes = np.full(shape, grid.zero_point, dtype)
        role = {"value": builder.add_param(f"{path}/{name}", codes, grid)}
        options: Any = {"params": role, "grid": grid, "dtype": dtype, "path": path}
        zeros.append(builder.add("constant", (), **options))
    value = builder.values[x]
    body = lstm_body(builder, cell, (value.shape[1:], value.low, value.high), path)
    attributes = {"consts": 0, "carries": 2, "length": None, "is_reversed": False}
    return builder.add_loop([*(start or zeros), x], body, attributes, path=path)


def lstm_body(
    builder: GraphBuilder,
    cell: LstmCell,
    inputs: tuple[tuple[int, ...], int, int],
    path: str,
) -> Graph:
    """Builds the graph of a step: from state, cell and inputs to these and outputs.

    Args:
      builder: Receives its parameters.
      cell: The LSTM.
      inputs: Shape, least and largest code of the inputs of a step.
      path: Module path of the LSTM.

    Returns:
      The graph. Its nodes have one order for all cells.

    Raises:
      OverflowError: as `add_lstm`.
      ValueError: as `add_lstm`.
    """
    step = _Step(builder, path)
    inner, (shape, low, high) = step.inner, inputs
    cells = Grid(2.0**cell.cell_power, 0)
    state = shape[0], len(cell.biases[0])
    h = inner.add_value(state, *_INT8_ENDS, cell.h, dtype="int8")
    c = inner.add_value(state, *cell.ends, cells, dtype="int16")
    x = inner.add_value(shape, low, high, cell.x, dtype="int8")
    gates = []
    for k, name in enumerate(GATES):
        given = step.product(
            f"{name}/kernel", x, cell.kernels[k], cell.biases[k], cell.kernel_scales[k]
        )
        none = np.zeros_like(cell.biases[k])
        own = cell.recurrent[k], none, cell.recurrent_scales[k]
        kept = step.product(f"{name}/recurrent", h, *own)
        gate = step.summed((given, kept), _GATE, _INT16_ENDS)
        is_cell = name == "cell"
        table = tanh_table(3) if is_cell else logistic_table()
        gates.append(step.tabled("tanh" if is_cell else "logistic", gate, table))
    into, forget, new, out = gates
    kept = step.halved("forget", step.times(forget, c), 15, cells)
    more = step.halved("input", step.times(into, new), 30 + cell.cell_power, cells)
    c = step.summed((kept, more), cells, cell.ends)
    seen = step.tabled("tanh", c, tanh_table(15 + cell.cell_power))
    ratio = 2.0**-15 / np.float32(cell.h.scale) * 2.0**-15
    acc = step.times(out, seen)
    h = step.rescaled("hidden", acc, np.float32(ratio), cell.h, _INT8_ENDS, "int8")
    return dataclasses.replace(inner.graph((0, 1, 2), (h, c, h)), grids={})


_INT8_ENDS = int(_INT8.min), int(_INT8.max)
_INT16_ENDS = int(_INT16.min), int(_INT16.max)
# More than both ends of int16 are apart: what is beyond saturates in any sum.
_SUM_ENDS = -(1 << 16), 1 << 16


class _Step:
    """The graph of a step as it grows."""

    def __init__(self, builder: GraphBuilder, path: str) -> None:
        self.outer, self.inner, self.path = builder, GraphBuilder(), path

    def product(
        self, name: str, v: int, kernel: np.ndarray, bias: np.ndarray, scale: float
    ) -> int:
        """Adds a product with weights, in the unit of a gate."""
        own = self.inner.values[v]
        zero, wide = own.zero_point, kernel.astype(np.int64)
        ends = channel_ends(wide, (1,), (own.low - zero, own.high - zero))
        low, high = (end.reshape(-1) + bias for end in ends)
        folded = bias - zero * wide.sum(1)
        reach = max(-int(low.min()) - 1, int(high.max()), int(np.abs(folded).max()))
        if reach > _INT32.max:
            raise OverflowError(
                f"The accumulator of {self.path}/{name} could reach {reach}, beyond "
                "int32."
            )
        params = {"kernel": kernel, "bias": folded.astype(np.int32)[None]}
        attributes = {
            "contract": [[1], [1]],
            "batch": [[], []],
            "kernel_operand": 1,
            "offset": 0,
            "shift": 0,
        }
        grids = {"kernel": Grid(float(np.float32(scale)), 0)}
        acc = self.add("dot", (v,), attributes, name, params, grids=grids)
        assert own.grid is not None
        # As the kernel computes it: float64 products of float32, rounded at the end.
        ratio = np.float64(np.float32(scale)) * np.float64(np.float32(own.grid.scale))
        ends, dtype = (_INT16_ENDS, "int16") if "kernel" in name else (_SUM_ENDS, "")
        return self.rescaled(name, acc, np.float32(ratio * 2**12), _GATE, ends, dtype)

    def rescaled(
        self,
        name: str,
        acc: int,
        ratio: np.float32,
        grid: Grid,
        ends: tuple[int, int],
        dtype: str,
    ) -> int:
        """Adds a requantizer."""
        multiplier, shift = tflite_multiplier(np.float64(ratio))
        params = {"multiplier": multiplier, "shift": shift}
        attributes = {
            "input_zero_point": 0,
            "zero_point": grid.zero_point,
            "low": ends[0],
            "high": ends[1],
            "rule": "tflite_double",
        }
        own = grid, dtype or "int32"
        return self.add("requantize", (acc,), attributes, name, params, *own)

    def summed(self, terms: Sequence[int], grid: Grid, ends: tuple[int, int]) -> int:
        """Adds codes of one grid, which saturate."""
        attributes = {
            "input_zero_points": [0, 0],
            "multipliers": [1, 1],
            "shift": 0,
            "zero_point": 0,
            "low": ends[0],
            "high": ends[1],
        }
        return self.add("add", terms, attributes, grid=grid, dtype="int16")

    def tabled(self, name: str, v: int, table: np.ndarray) -> int:
        """Looks codes up, from the least that there is."""
        low, high = self.inner.values[v].low, self.inner.values[v].high
        params = {"table": table[low - _INT16.min : high - _INT16.min + 1]}
        return self.add("table", (v,), {"low": low, "axis": None}, name, params, _SHARE)

    def times(self, a: int, b: int) -> int:
        """Multiplies codes about zero."""
        return self.add("multiply_codes", (a, b), {"zero_points": [0, 0]})

    def halved(self, name: str, acc: int, power: int, grid: Grid) -> int:
        """Divides by a power of two, halves away from zero."""
        params = {"counts": np.asarray(1 << power, np.int32)}
        ends = dict(zip(("low", "high"), _INT16_ENDS, strict=True))
        return self.add("tflite_average", (acc,), ends, name, params, grid)

    def add(
        self,
        operation: str,
        inputs: Sequence[int],
        attributes: Mapping[str, Any],
        name: str = "",
        params: Mapping[str, np.ndarray] | None = None,
        grid: Grid | None = None,
        dtype: str | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> int:
        """Adds a node, its parameters to the graph around the loop as well."""
        names = {}
        for role, array in (params or {}).items():
            own = self.outer.add_param(
                f"{self.path}/{name}/{role}", np.asarray(array), (grids or {}).get(role)
            )
            names[role], self.inner.params[own] = own, np.asarray(array)
        dtype = dtype or ("int32" if grid is None else "int16")
        options: Any = {"params": names, "grid": grid, "dtype": dtype}
        return self.inner.add(operation, inputs, attributes, path=self.path, **options)


# Recognition.

_NODES = (
    *("dot requantize dot requantize add table".split() * len(GATES)),
    *("multiply_codes tflite_average".split() * 2),
    *"add table multiply_codes requantize".split(),
)


def find_lstm(
    graph: Graph, node: Node, params: Mapping[str, np.ndarray]
) -> LstmCell | None:
    """Finds the LSTM that a loop is.

    Args:
      graph: The graph around the loop.
      node: The loop.
      params: Parameters of the program.

    Returns:
      An LSTM of which `add_lstm` makes the same loop, bit for bit; None if there is
      none. What its carries start from is not looked at.
    """
    a, body = node.attributes, node.graphs["body"]
    ends = len(node.inputs), len(node.outputs), a["consts"], a["is_reversed"]
    x = graph.values[node.inputs[-1]]
    if ends != (3, 3, 0, False) or a["carries"] != 2 or len(x.shape) != 3:
        return None
    if tuple(n.operation for n in body.nodes) != _NODES:
        return None
    cell, own = _read_cell(body, params), body.values[body.inputs[2]]
    if cell is None:
        return None
    builder = GraphBuilder()
    try:
        given = own.shape, own.low, own.high
        built = lstm_body(builder, cell, given, node.path)
    except (OverflowError, ValueError):
        return None
    same = _content(built, builder.params) == _content(body, params)
    return cell if same else None


def _read_cell(body: Graph, params: Mapping[str, np.ndarray]) -> LstmCell | None:
    """Reads weights and grids from a step that has the nodes of an LSTM."""
    hidden, state, x = (body.values[v] for v in body.inputs)
    if x.grid is None or hidden.grid is None or state.grid is None:
        return None
    mantissa, exponent = np.frexp(np.asarray(state.grid.scale, np.float64))
    power = int(exponent.max()) - 1
    is_power = np.all(mantissa == 0.5) and LEAST_POWER <= power <= MOST_POWER
    if not is_power or any(np.ndim(v.grid.scale) for v in (x, hidden) if v.grid):
        return None
    own = lambda k, role: params[body.nodes[k].params[role]]
    first = range(0, 6 * len(GATES), 6)
    kernels, recurrent = [[own(k + n, "kernel") for k in first] for n in (0, 2)]
    if any(np.ndim(kernel) != 2 for kernel in (*kernels, *recurrent)):
        return None
    found = [
        _scale(own(k + n, "multiplier"), own(k + n, "shift"), grid)
        for n, grid in ((1, x.grid), (3, hidden.grid))
        for k in first
    ]
    scales = [s for s in found if s is not None]
    biases = [
        own(k, "bias").reshape(-1) + x.grid.zero_point * kernel.sum(1, dtype=np.int64)
        for k, kernel in zip(first, kernels, strict=True)
    ]
    if len(scales) != len(found) or any(np.any(abs(b) > _INT32.max) for b in biases):
        return None
    whole = [b.astype(np.int32) for b in biases]
    most = 0 if state.low == _INT16.min else state.high
    pair = scales[: len(GATES)], scales[len(GATES) :]
    grids = x.grid, hidden.grid
    return LstmCell(kernels, recurrent, whole, *pair, *grids, power, most)


def _scale(multiplier: np.ndarray, shift: np.ndarray, grid: Grid) -> float | None:
    """Finds a scale of weights whose product has a multiplier; None if there is none.

    Args:
      multiplier: The multiplier.
      shift: Its shift.
      grid: Grid of what the weights multiply.
    """
    if multiplier.size != 1 or shift.size != 1 or multiplier <= 0:
        return None
    wanted, unit = (int(multiplier), int(shift)), np.float64(np.float32(grid.scale))
    ideal = np.float32(np.ldexp(np.float64(wanted[0]), -12 - wanted[1]) / unit)
    below, above = (np.nextafter(ideal, np.float32(end)) for end in (0, np.inf))
    for near in (ideal, below, above):
        pair = tflite_multiplier(np.float64(np.float32(near * unit * 2**12)))
        if near > 0 and tuple(map(int, pair)) == wanted:
            return float(near)
    return None


def _content(body: Graph, params: Mapping[str, np.ndarray]) -> Any:
    """Returns all of a step that its integers depend on, to be compared."""
    array = lambda p: (str(p.dtype), p.shape, p.tobytes())
    return (
        [(v.shape, v.dtype, v.low, v.high, v.grid) for v in body.values],
        [
            (
                n.operation,
                n.inputs,
                n.outputs,
                {role: array(params[name]) for role, name in n.params.items()},
                dict(n.attributes),
            )
            for n in body.nodes
        ],
        (body.inputs, body.outputs),
    )
