"""Writes an integer program as ONNX, in integers alone."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx import (
    elementwise,
    gathers,
    loops,
    moves,
    normalisations,
    products,
    tflite,
)
from qjax.formats.onnx.calls import WRITER, OnnxCall
from qjax.formats.onnx.files import end_names, model, notes_of, onnx_module
from qjax.formats.onnx.graph import OnnxGraph, OnnxOp, OnnxValue
from qjax.formats.onnx.sizes import (
    FreeSize,
    FreeSizeError,
    Sizes,
    input_sizes,
    value_sizes,
)
from qjax.formats.support import check_operations, check_whole
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph
from qjax.program import IntegerProgram

_OLDEST, _NEWEST = 18, 25  # Operator sets with BitwiseAnd, and with nothing else.

EMITTERS: Mapping[str, Callable[[OnnxCall], Any]] = {
    "add": elementwise.add,
    "argmax": moves.arg_extreme,
    "argmin": moves.arg_extreme,
    "argsort": gathers.argsort,
    "arithmetic": elementwise.arithmetic,
    "broadcast": moves.broadcast,
    "clip": elementwise.clip,
    "compare": elementwise.compare,
    "concatenate": moves.concatenate,
    "constant": elementwise.constant,
    "conv": products.conv,
    "divide": normalisations.divide,
    "dot": products.dot,
    "dot_codes": products.dot_codes,
    "embed": elementwise.embed,
    "gather": gathers.gather,
    "log_softmax": normalisations.log_softmax,
    "logsumexp": normalisations.logsumexp,
    "loop": loops.loop,
    "max": moves.extreme,
    "max_pool": moves.extreme_pool,
    "maximum": moves.of_two,
    "min": moves.extreme,
    "min_pool": moves.extreme_pool,
    "minimum": moves.of_two,
    "multiply": products.multiply,
    "multiply_codes": products.multiply_codes,
    "norm": normalisations.norm,
    "pad": moves.pad,
    "requantize": elementwise.requantize,
    "reshape": moves.reshape,
    "rev": moves.rev,
    "running_sum": products.running_sum,
    "scatter": gathers.scatter,
    "scatter_add": gathers.scatter_add,
    "scatter_max": gathers.scatter,
    "scatter_min": gathers.scatter,
    "select": elementwise.select,
    "slice": moves.slices,
    "softmax": normalisations.softmax,
    "sort": gathers.sort,
    "sum": products.total,
    "sum_pool": products.sum_pool,
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


def write_onnx(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = 18,
) -> bytes:
    """Writes the codes of a program as ONNX, bit for bit, in standard operators.

    The file takes and gives what `IntegerProgram.codes` does, flat: integers of the
    types of inputs and outputs, ``input_0``, ``output_0`` by their names in the model.
    A leading size that nothing fixes is free in it, too. The grids are in its metadata,
    as JSON by ``qjax.NAME``. Kernels are bytes, products ConvInteger and MatMulInteger
    of two operands with a sign or of two without, which no chip saturates; codes of 16
    bits are multiplied as int32, by MatMul. All else is arithmetic in int64. float32
    occurs as a rounding to 24 bits alone, by Cast and back, in comparisons of codes on
    two grids and in XNNPACK's rule.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      opset: Operator set of ONNX, 18 to 25.

    Returns:
      What the file holds.

    Raises:
      ImportError: without `onnx`: the extra ``qjax[onnx]``.
      OSError: if the file cannot be written. An old one stays as it was.
      ValueError: if something of the program stays in float; for an operation or a form
        of one that ONNX has not, with its module path; for another operator set.
        Nothing is written then.

    References:
      ONNX, https://onnx.ai/onnx/operators; ONNX Runtime 1.32, mlas/lib/qgemm.cpp, for
      the products that saturate.
    """
    check_whole(program)
    onnx_module()
    check_opset(opset)
    graph = program.graph
    check_operations(WRITER, graph)
    arrays = {k: np.asarray(v).astype(np.int64) for k, v in program.params.items()}
    own = OnnxGraph()
    names = end_names(program)
    inputs = entered(own, graph, names[0])
    sizes = value_sizes(graph, arrays, [x.shape for x in inputs], WRITER)
    own.names.update(names[1])
    found = emit(own, graph, arrays, inputs, sizes)
    outputs = ended(own, found, names[1])
    notes = notes_of([*names[0], *names[1]], [*_ends(program)])
    data = model(own, inputs, outputs, opset=opset, notes=notes).SerializeToString()
    if path is not None:
        write_atomically(path, data)
    return data


def check_opset(opset: int) -> None:
    """Raises ValueError for an operator set that the writers do not speak."""
    if not _OLDEST <= opset <= _NEWEST:
        raise ValueError(f"`opset` must be from {_OLDEST} to {_NEWEST}, got {opset}.")


def _ends(program: IntegerProgram) -> list[Any]:
    graph = program.graph
    return [graph.values[v] for v in (*graph.inputs, *graph.outputs)]


def entered(own: OnnxGraph, graph: Graph, names: Sequence[str]) -> list[OnnxValue]:
    """Returns the inputs of a graph by names; free sizes are read from their shapes."""
    found = []
    for v, name, shape in zip(graph.inputs, names, input_sizes(graph), strict=True):
        x = OnnxValue(own.unique(name), graph.values[v].dtype, shape)
        for n in shape:
            if isinstance(n, FreeSize) and n.symbols[0] not in own.symbols:
                size = own.op("Shape", x, dtype="int64", shape=(1,), start=0, end=1)
                own.symbols[n.symbols[0]] = size
        found.append(x)
    return found


def ended(
    own: OnnxGraph, found: Sequence[OnnxValue], names: Sequence[str]
) -> list[OnnxValue]:
    """Gives outputs their names; one that is read twice has two."""
    outputs = []
    for x, name in zip(found, names, strict=True):
        own.ops.append(OnnxOp("Identity", (x.name,), (name,), {}))
        outputs.append(OnnxValue(name, x.dtype, x.shape))
    return outputs


def emit(
    own: OnnxGraph,
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[OnnxValue],
    sizes: Sequence[Sizes],
) -> list[OnnxValue]:
    """Adds the operators of a graph and returns its outputs, in their types."""
    env = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        call = OnnxCall(
            node=node,
            graph=own,
            inputs=[env[v] for v in node.inputs],
            values=[graph.values[v] for v in node.inputs],
            outputs=[graph.values[v] for v in node.outputs],
            shapes=[sizes[v] for v in node.outputs],
            params={role: arrays[name] for role, name in node.params.items()},
            arrays=arrays,
            run=emit,
        )
        try:
            made = EMITTERS[node.operation](call)
        except FreeSizeError as error:
            raise call.refuse(str(error)) from error
        made = made if isinstance(made, tuple) else (made,)
        for v, x, value in zip(node.outputs, made, call.outputs, strict=True):
            assert x.shape == sizes[v], (node, x, sizes[v])
            env[v] = own.cast(x, value.dtype)
    return [env[v] for v in graph.outputs]
