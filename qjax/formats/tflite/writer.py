"""The writer of TFLite files: programs in TFLite's arithmetic, bit for bit."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.formats.support import check_operations, check_whole, unsupported
from qjax.formats.tflite import chosen, rescalings, weighted
from qjax.formats.tflite.emission import WRITER, Pending, TfliteGraph
from qjax.formats.tflite.schema import serialized
from qjax.formats.tflite.written_lstm import check_loops, lstm
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, Node
from qjax.program import IntegerProgram


def write_tflite(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    exact: bool = True,
    real_ends: bool = False,
    pack_weights: bool = False,
) -> bytes:
    """Writes a program as a TFLite file whose codes are the program's, bit for bit.

    For programs whose rounding is TFLite's: those of ``qjax.lower(...,
    target=qjax.targets.tflite)`` and of `read_tflite`. Others are written where their
    requantizers are shown to give the same codes, or with ``exact=False`` at most one
    code beside them: an operator of the file is off by a code at most, given equal
    codes before it, and over a network these add up (`qjax.conform` counts them, in the
    runtime ``litert-approximate``). For exact programs both files are the same.

    In LiteRT's reference kernels no code differs; XNNPACK rounds otherwise, by a code a
    layer. tflite-micro rounds dense layers twice, where LiteRT rounds once: in it no
    code of programs for ``targets.tflite_micro`` differs. Needs the extra
    `qjax[tflite]`.

    A loop is written where it is TFLite's LSTM, code for code, as `read_tflite` gives
    it, and `lower` for ``targets.tflite``. LiteRT keeps its state between calls:
    ``reset_all_variables`` before each other sequence gives the codes of the program.
    tflite-micro rounds its gates otherwise.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      exact: Whether all codes must be the program's. Otherwise sums, products, means
        and functions may round as TFLite's kernels do.
      real_ends: Whether the file takes and gives real numbers, by QUANTIZE and
        DEQUANTIZE at its ends, in place of codes.
      pack_weights: Whether weights within 4 bits take 4 in the file.

    Returns:
      What the file holds.

    Raises:
      ImportError: if the schema of TFLite is not installed.
      ValueError: if something of the program stays in float; for an operation, a form
        of it or a rounding that TFLite's kernels do not have. Nothing is written then.
      OSError: if the file cannot be written. An old one stays as it was.

    References:
      Schema: tensorflow/lite/schema/schema.fbs, version 3.
    """
    check_whole(program)
    params = {name: np.asarray(value) for name, value in program.params.items()}
    check_loops(program.graph, params)
    check_operations(WRITER, program.graph)
    emission = _emitted(program.graph, params, exact)
    inputs, outputs = _ends(emission, program.graph, real_ends)
    packed = frozenset(filter(lambda k: _is_short(emission, k), emission.kernels))
    own = emission.tensors, emission.operators, inputs, outputs
    data = serialized(*own, packed if pack_weights else frozenset())
    if path is not None:
        write_atomically(path, data)
    return data


def _emitted(
    graph: Graph, params: Mapping[str, np.ndarray], is_exact: bool
) -> TfliteGraph:
    """Returns the TFLite graph of a program, its ends as codes."""
    emission = TfliteGraph(graph, params, is_exact=is_exact)
    for number, v in enumerate(graph.inputs):
        emission.add_value(v, f"input_{number}")
    for node in graph.nodes:
        EMITTERS[node.operation](emission, node)
    return emission


def _requantize(emission: TfliteGraph, node: Node) -> None:
    pending = emission.pending.get(node.inputs[0])
    if pending is None:
        rescalings.of_codes(emission, node)
        return
    _PENDING[pending.node.operation](emission, node, pending)


def _wait(emission: TfliteGraph, node: Node) -> None:
    """Keeps an accumulator for what rescales it."""
    emission.pending[node.output] = Pending(node)


_PENDING: Mapping[str, Callable[[TfliteGraph, Node, Pending], None]] = {
    "conv": weighted.conv,
    "dot": weighted.dense,
    "dot_codes": rescalings.of_two,
    "multiply_codes": rescalings.of_two,
    "sum": rescalings.total,
    "sum_pool": weighted.window_sum,
}
# Operation -> what writes it.
EMITTERS: Mapping[str, Callable[[TfliteGraph, Node], None]] = {
    **dict.fromkeys(_PENDING, _wait),
    **chosen.CHOSEN,
    "add": rescalings.add_once,
    "loop": lstm,
    "requantize": _requantize,
    "tflite_add": rescalings.add,
    "tflite_average": rescalings.average,
}


def _ends(
    emission: TfliteGraph, graph: Graph, real_ends: bool
) -> tuple[list[int], list[int]]:
    """Returns the tensors of inputs and outputs, each output one of its own."""
    inputs = [emission.places[v] for v in graph.inputs]
    outputs: list[int] = []
    for v in graph.outputs:
        if v not in emission.places:
            maker = next(n for n in graph.nodes if v in n.outputs)
            raise unsupported(WRITER, maker, "an accumulator as an output")
        t = emission.places[v]
        if t in (*inputs, *outputs) or emission.tensors[t].data is not None:
            t = _copied(emission, t)
        outputs.append(t)
    if not real_ends:
        return inputs, outputs
    before = [_real_input(emission, graph, v) for v in graph.inputs]
    return before, [_real_output(emission, t) for t in outputs]


def _copied(emission: TfliteGraph, t: int) -> int:
    own = emission.tensors[t]
    out = emission.add_like(t, own.shape, "output")
    sizes = emission.constant(list(own.shape))
    new = np.asarray(own.shape, np.int32)
    return emission.add("RESHAPE", (t, sizes), out, new_shape=new)


def _real_input(emission: TfliteGraph, graph: Graph, v: int) -> int:
    """Adds QUANTIZE before an input of codes."""
    t, value = emission.places[v], graph.values[v]
    if not emission.tensors[t].scale:
        return t
    is_close = value.rounding == "half_away" or not emission.is_exact
    if not is_close or value.rescaling != (1.0, 0.0):
        raise ValueError(
            f"`{WRITER}` has no form for a real input that is rounded half to even, or "
            "scaled before. Pass `real_ends=False` and give it codes "
            "(`program.quantize_inputs`), or lower for `qjax.targets.tflite`."
        )
    real = emission.add_tensor("real_input", value.shape, "float32")
    emission.add("QUANTIZE", (real,), t)
    emission.operators.insert(0, emission.operators.pop())
    return real


def _real_output(emission: TfliteGraph, t: int) -> int:
    """Adds DEQUANTIZE after an output of codes."""
    own = emission.tensors[t]
    if not own.scale:
        return t
    out = emission.add_tensor("real_output", own.shape, "float32")
    return emission.add("DEQUANTIZE", (t,), out)


def _is_short(emission: TfliteGraph, k: int) -> bool:
    data: Any = emission.tensors[k].data
    return bool(data.size and -8 <= data.min() and data.max() <= 7)
