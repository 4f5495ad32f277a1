"""Writes an integer program as QONNX: integers with MultiThreshold."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.files import end_names, model, notes_of, onnx_module
from qjax.formats.onnx.graph import OnnxOp, OnnxValue
from qjax.formats.onnx.sizes import evaluated, input_sizes, value_sizes
from qjax.formats.qonnx import real
from qjax.formats.qonnx.emitters import EMITTERS
from qjax.formats.qonnx.sheet import (
    DOMAIN,
    MOST,
    QonnxCall,
    QonnxSheet,
    QonnxTensor,
    type_of,
)
from qjax.formats.support import check_operations, check_whole, unsupported_end
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, Node, Value
from qjax.program import IntegerProgram

WRITER = "qjax.formats.qonnx.write_qonnx"
QUANT_WRITER = "qjax.formats.qonnx.write_qonnx_quant"
OPSET = 13  # That of QONNX's own tools.


def write_qonnx(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
) -> bytes:
    """Writes a program as QONNX of integers, each rounding as MultiThreshold.

    The file takes and gives the codes of `IntegerProgram.codes`, as float32 that hold
    integers, as QONNX's tools have them; the types of all tensors are annotated. Inside
    codes are about their zero points. What rounds or looks up is the number of
    thresholds below an integer accumulator, with biases in the thresholds: what goes
    down somewhere is the difference of two. Exact: all sums stay below 2^24, or the
    program is refused. Needs the extra `qjax[onnx]`.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      batch_size: Size of the leading axis, where the program leaves it free.

    Returns:
      What the file holds.

    Raises:
      ImportError: without `onnx`.
      OSError: if the file cannot be written. An old one stays as it was.
      ValueError: if something of the program stays in float; for an operation or a form
        of one that the format has not, with its module path. Nothing is written then.

    References:
      Pappalardo et al., "QONNX", 2022 (arXiv:2206.07527); FINN's MultiThreshold,
      docs/qonnx-custom-ops of github.com/fastmachinelearning/qonnx.
    """
    check_whole(program)
    onnx_module()
    graph = program.graph
    check_operations(WRITER, graph)
    arrays = {k: np.asarray(v).astype(np.int64) for k, v in program.params.items()}
    shapes = shapes_at(graph, arrays, batch_size)
    names, sheet = end_names(program), QonnxSheet()
    sheet.graph.names.update(names[1])
    for v, name in zip(graph.inputs, names[0], strict=True):
        own = graph.values[v]
        if max(abs(own.low), abs(own.high)) > MOST:
            why = "codes of more than 24 bits"
            raise unsupported_end(WRITER, graph, f"the input {name!r}", why)
        if 0 in shapes[v]:
            what = f"the input {name!r}"
            raise unsupported_end(WRITER, graph, what, "no elements")
    inputs = [
        OnnxValue(sheet.graph.unique(name), "float32", shapes[v])
        for v, name in zip(graph.inputs, names[0], strict=True)
    ]
    outputs = _emit(sheet, graph, arrays, inputs, shapes, names[1])
    notes = notes_of([*names[0], *names[1]], [*ends_of(graph)])
    found = model(
        sheet.graph,
        inputs,
        outputs,
        opset=OPSET,
        notes=notes,
        domains={DOMAIN: 1},
        types=sheet.types,
    )
    data = bytes(found.SerializeToString())
    if path is not None:
        write_atomically(path, data)
    return data


def write_qonnx_quant(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
) -> bytes:
    """Writes a program as QONNX of real values with Quant nodes, as hls4ml reads it.

    The file takes and gives the real values of the program itself. Weights, inputs and
    all that rounds are Quant nodes on their grids; a requantizer that folds a
    normalisation gives weights its scale. float32 computes between them: with
    power-of-two scales no code differs while sums stay below 2^24; with others one
    requantization may differ by a code near a tie. Lookup tables are written where they
    are, code for code, a function of ONNX. Needs the extra `qjax[onnx]`.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      batch_size: Size of the leading axis, where the program leaves it free.

    Returns:
      What the file holds.

    Raises:
      ImportError: without `onnx`.
      OSError: if the file cannot be written. An old one stays as it was.
      ValueError: as for `write_qonnx`.
    """
    check_whole(program)
    onnx_module()
    graph = program.graph
    check_operations(QUANT_WRITER, graph)
    arrays = {k: np.asarray(v).astype(np.int64) for k, v in program.params.items()}
    shapes = shapes_at(graph, arrays, batch_size)
    _check_ends(graph)
    names, sheet = end_names(program), real.RealSheet(graph, arrays)
    sheet.graph.names.update(names[1])
    env: dict[int, QonnxTensor] = {}
    inputs = []
    for v, name in zip(graph.inputs, names[0], strict=True):
        x = OnnxValue(sheet.graph.unique(name), "float32", shapes[v])
        inputs.append(x)
        own, (gain, offset) = graph.values[v], graph.values[v].rescaling
        moved = sheet.graph.add(sheet.graph.mul(x, gain), offset)
        env[v] = sheet.tensor(real.gridded(sheet.graph, moved, own))
    for node in graph.nodes:
        call = _call(QUANT_WRITER, sheet, graph, node, env, shapes, arrays)
        env[node.output] = real.EMITTERS[node.operation](call)
    outputs, renamed = [], dict[str, str]()
    for v, name in zip(graph.outputs, names[1], strict=True):
        x = sheet.plain(sheet.finished(env[v]))
        if env[v].number is not None:  # Integers, or values on the grid of a sum.
            scale = real.scale_of(graph.values[v]) / sheet.units[env[v].number or 0]
            if np.any(np.abs(scale - 1) > 2.0**-20):
                x = sheet.graph.two("Mul", x, sheet.real(scale))
        _name_output(sheet.graph.ops, x.name, name, renamed)
        outputs.append(OnnxValue(name, "float32", shapes[v]))
    found = model(sheet.graph, inputs, outputs, opset=OPSET, domains={DOMAIN: 1})
    data = bytes(found.SerializeToString())
    if path is not None:
        write_atomically(path, data)
    return data


def _name_output(
    ops: list[OnnxOp], own: str, name: str, renamed: dict[str, str]
) -> None:
    """Gives the result of an operator the name of an output.

    hls4ml knows no Identity at the end: there is one only for an input, a constant, or
    what is an output already.

    Args:
      ops: The operators, which are changed.
      own: Name of the result.
      name: Name that it gets.
      renamed: Results that are outputs -> their names; receives this one.
    """
    if own in renamed or not any(own in op.outputs for op in ops):
        ops.append(OnnxOp("Identity", (renamed.get(own, own),), (name,), {}))
        return
    renamed[own] = name
    called = lambda ends: tuple(name if end == own else end for end in ends)
    for k, op in enumerate(ops):
        ends: Any = {"inputs": called(op.inputs), "outputs": called(op.outputs)}
        ops[k] = dataclasses.replace(op, **ends)


def _check_ends(graph: Graph) -> None:
    """Raises ValueError for grids that Quant nodes of activations have not."""
    for v in graph.values:
        if v.grid is not None and v.grid.array().size > 1:
            what = "a value with a scale for each channel"
            raise unsupported_end(QUANT_WRITER, graph, what)
    for v in (graph.values[k] for k in graph.inputs):
        if v.rounding != "half_even":
            what = "an input that rounds half away"
            raise unsupported_end(QUANT_WRITER, graph, what)


def ends_of(graph: Graph) -> list[Value]:
    """Returns inputs and outputs of a graph."""
    return [graph.values[v] for v in (*graph.inputs, *graph.outputs)]


def shapes_at(
    graph: Graph, arrays: Mapping[str, np.ndarray], batch_size: int
) -> list[tuple[int, ...]]:
    """Returns the shapes of all values at a batch size."""
    sizes = input_sizes(graph)
    symbols = {
        s for own in sizes for n in own if not isinstance(n, int) for s in n.symbols
    }
    given = dict.fromkeys(symbols, batch_size)
    fixed = [tuple(evaluated(n, given) for n in own) for own in sizes]
    known = value_sizes(graph, arrays, fixed, WRITER)
    return [tuple(evaluated(n, {}) for n in own) for own in known]


def _emit(
    sheet: QonnxSheet,
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[OnnxValue],
    shapes: Sequence[tuple[int, ...]],
    names: Sequence[str],
) -> list[OnnxValue]:
    env: dict[int, QonnxTensor] = {}
    for v, x in zip(graph.inputs, inputs, strict=True):
        own = graph.values[v]
        sheet.types[x.name] = type_of(own.low, own.high)
        env[v] = _moved(sheet, sheet.tensor(x), -own.zero_point)
    for node in graph.nodes:
        call = _call(WRITER, sheet, graph, node, env, shapes, arrays)
        if 0 in call.shape:  # QONNX looks for the largest of all values.
            raise call.refuse("a value of no elements")
        made = EMITTERS[node.operation](call)
        assert made.shape == shapes[node.output], (node, made.shape)
        env[node.output] = made
    found = []
    for v, name in zip(graph.outputs, names, strict=True):
        own = graph.values[v]
        if max(abs(own.low), abs(own.high)) > MOST:
            what = f"the output {name!r}"
            raise unsupported_end(WRITER, graph, what, "more than 24 bits")
        x = sheet.plain(_moved(sheet, env[v], own.zero_point))
        sheet.graph.ops.append(OnnxOp("Identity", (x.name,), (name,), {}))
        sheet.types[name] = type_of(own.low, own.high)
        found.append(OnnxValue(name, "float32", x.shape))
    return found


def _call(
    writer: str,
    sheet: QonnxSheet,
    graph: Graph,
    node: Node,
    env: Mapping[int, QonnxTensor],
    shapes: Sequence[tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
) -> QonnxCall:
    return QonnxCall(
        writer=writer,
        node=node,
        sheet=sheet,
        inputs=[env[v] for v in node.inputs],
        values=[graph.values[v] for v in node.inputs],
        output=graph.values[node.output],
        shape=shapes[node.output],
        params={role: arrays[name] for role, name in node.params.items()},
        is_exact=writer == WRITER,
    )


def _moved(sheet: QonnxSheet, x: QonnxTensor, by: int) -> QonnxTensor:
    """Adds a number to integers."""
    return sheet.finished(dataclasses.replace(x, bias=x.bias + by))
