"""What is proven of an integer program: no overflow, no float, how well it agrees."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.lowering.graph import Graph, Node
from qjax.lowering.packing import nbytes

_EXACT_FLOAT32 = 1 << 24  # Integers below are exact in float32.
_MOVES = frozenset(
    "max min max_pool min_pool maximum minimum concatenate select reshape transpose "
    "slice rev pad broadcast take clip embed".split()
)


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The bound of one accumulator, from the integer weights themselves.

    Attributes:
      path: Where it is.
      low: Least sum, for each output channel where there are weights.
      high: Largest sum, same shape.
      bits: What an accumulator needs, its sign included.
      witness: Input codes that attain the bound, in the shape of the kernel of the
        worst channel; empty where all codes at one end do.
    """

    path: str
    low: np.ndarray
    high: np.ndarray
    bits: int
    witness: np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Why a site has the codes of the fake-quantized model.

    Attributes:
      is_proven: Whether they are equal whatever the input; else at most one off, given
        the same codes before it.
      reason: What proves it, or what rounds.
    """

    is_proven: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Certificates of a program. Its ``str`` is a table.

    Attributes:
      overflow: For each accumulator.
      agreement: For each quantization point.
      float_values: Types of floating-point values in ``program.codes``; empty.
      nbytes: Of the parameters, 2 and 4 bits packed.
    """

    overflow: tuple[Overflow, ...]
    agreement: Mapping[str, Agreement]
    float_values: tuple[str, ...]
    nbytes: int

    def __str__(self):
        wide = max(
            [4, *(len(o.path) for o in self.overflow), *map(len, self.agreement)]
        )
        lines = [f"{'accumulator':<{wide}} {'bits':>4} {'least':>12} {'largest':>12}"]
        lines += [
            f"{o.path:<{wide}} {o.bits:>4} {o.low.min():>12} {o.high.max():>12}"
            for o in self.overflow
        ]
        lines += ["", f"{'site':<{wide}} agreement"]
        lines += [
            f"{name:<{wide}} {'proven' if a.is_proven else 'within 1 code'}: {a.reason}"
            for name, a in self.agreement.items()
        ]
        found = ", ".join(self.float_values) or "none"
        return "\n".join([*lines, "", f"float values: {found}; {self.nbytes} bytes"])


def certify(
    graph: Graph, params: Mapping[str, Any], float_values: tuple[str, ...]
) -> Report:
    """Reads off a graph what is certain.

    Args:
      graph: Of a program.
      params: Its parameters.
      float_values: Found in its jaxpr.

    Returns:
      The certificates.
    """
    arrays = {name: np.asarray(p) for name, p in params.items()}
    makers = {node.output: node for node in graph.nodes}
    overflow = []
    for node in graph.nodes:
        if graph.values[node.output].grid is None and node.operation not in _MOVES:
            overflow.append(_overflow(graph, node, arrays))
    agreement = {
        name: _agreement(graph, makers, arrays, v) for name, v in graph.sites.items()
    }
    size = sum(map(nbytes, arrays.values()))
    return Report(tuple(overflow), agreement, float_values, size)


def _overflow(graph: Graph, node: Node, arrays: Mapping[str, np.ndarray]) -> Overflow:
    value = graph.values[node.output]
    low, high = np.array(value.low), np.array(value.high)
    witness = np.zeros(0, np.int64)
    if node.operation in ("dot", "conv"):
        low, high, witness = _of_kernel(graph, node, arrays)
    most = max(int(high.max(initial=0)), -1 - int(low.min(initial=0)))
    return Overflow(node.path, low, high, most.bit_length() + 1, witness)


def _of_kernel(
    graph: Graph, node: Node, arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ends of a sum over a kernel, by output channel, and what attains them."""
    a = node.attributes
    kernel = arrays[node.params["kernel"]].astype(np.int64)
    bias = arrays[node.params["bias"]].astype(np.int64)
    if node.operation == "conv":
        kernel = np.moveaxis(kernel, a["dimensions"][1][0], -1)
    else:
        side = a["kernel_operand"]
        summed, batch = a["contract"][side], a["batch"][side]
        free = [d for d in range(kernel.ndim) if d not in (*summed, *batch)]
        kernel = kernel.transpose(*summed, *batch, *free)
        kernel = kernel.reshape(*kernel.shape[: len(summed)], -1)
    x = graph.values[node.inputs[0]]
    least, most = x.low - a["offset"], x.high - a["offset"]
    over = tuple(range(kernel.ndim - 1))
    up, down = np.maximum(kernel, 0).sum(over), np.minimum(kernel, 0).sum(over)
    shift = a["shift"]
    bias = bias.reshape(-1) if bias.size in (1, up.size) else np.array([bias.max()])
    low = (up * least + down * most << shift) + bias
    high = (up * most + down * least << shift) + bias
    is_high = high.max(initial=0) >= -low.min(initial=0)
    channel = int(np.argmax(high) if is_high else np.argmin(low))
    ends = (x.high, x.low) if is_high else (x.low, x.high)
    witness = np.where(kernel[..., channel] > 0, *ends)
    return low, high, witness


def _agreement(
    graph: Graph,
    makers: Mapping[int, Node],
    arrays: Mapping[str, np.ndarray],
    v: int,
) -> Agreement:
    node = makers.get(v)
    if node is None:
        return Agreement(True, "quantized by the formula of the model")
    if node.operation == "table":
        count = arrays[node.params["table"]].shape[0]
        return Agreement(True, f"a table of the float function on all {count} codes")
    if node.operation == "requantize":
        return _of_requantizer(graph, node, arrays)
    if node.operation == "add":
        exact = all(_is_power_of_two(m) for m in node.attributes["multipliers"])
        if exact:
            return Agreement(True, "a sum on scales that are powers of two")
        return Agreement(False, "a sum of codes on other scales")
    if node.operation in _MOVES:
        own = [_agreement(graph, makers, arrays, i) for i in node.inputs]
        worst = next((a for a in own if not a.is_proven), None)
        return worst or Agreement(True, f"{node.operation} of codes on its grid")
    return Agreement(False, f"{node.operation}")


def _of_requantizer(
    graph: Graph, node: Node, arrays: Mapping[str, np.ndarray]
) -> Agreement:
    acc = graph.values[node.inputs[0]]
    z = node.attributes["input_zero_point"]
    if node.attributes.get("is_bias_rounded"):
        return Agreement(False, "a bias that is rounded to the unit of its accumulator")
    most = max(abs(acc.low - z), abs(acc.high - z))
    if most >= _EXACT_FLOAT32:
        return Agreement(False, f"accumulators up to {most}, beyond float32's 2^24")
    if node.attributes["rule"] == "fp32_half_even":
        return Agreement(True, "one factor, rounded as float32 rounds it")
    if np.all(_is_power_of_two(arrays[node.params["multiplier"]])):
        return Agreement(True, "a shift: scales are powers of two")
    return Agreement(False, "scales that are no powers of two: ties may fall elsewhere")


def _is_power_of_two(x: Any) -> Any:
    x = np.abs(np.asarray(x, np.int64))
    return (x & (x - 1)) == 0
