"""Loops of a program as TFLite's LSTM, where they are one bit for bit."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite.emission import WRITER, TfliteGraph
from qjax.graph.graph import Graph, Node
from qjax.graph.tflite_lstm import GATES, LstmCell, find_lstm


def check_loops(graph: Graph, params: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for loops that TFLite has no operator for."""
    for node in graph.nodes:
        if node.operation == "loop":
            _cell(graph, node, params)


def _cell(graph: Graph, node: Node, params: Mapping[str, np.ndarray]) -> LstmCell:
    cell = find_lstm(graph, node, params)
    if cell is None:
        what = "a loop that is not the LSTM of TFLite's kernel, code for code"
        raise unsupported(WRITER, node, what)
    return cell


def lstm(emission: TfliteGraph, node: Node) -> None:
    """Writes UNIDIRECTIONAL_SEQUENCE_LSTM, whose state starts from zeros."""
    cell = _cell(emission.graph, node, emission.params)
    last, state, outputs = node.outputs
    time = emission.value(outputs).shape[0]
    if _is_read(emission, state):
        raise unsupported(WRITER, node, "the cell of an LSTM behind its last step")
    if not time:
        raise unsupported(WRITER, node, "an LSTM of no steps")
    t = emission.tensor(node.inputs[2], node)
    states = [_state(emission, node, v) for v in node.inputs[:2]]
    inputs = [t, *_weights(emission, node, cell), *states, *[-1] * 4]
    between = [
        emission.add_tensor(f"{node.path}/{name}", (0,), "int16", (2.0**-12,), (0,))
        for name in GATES
    ]
    y = emission.add_value(outputs, node.path)
    between.append(emission.add_like(y, (0,), f"{node.path}/hidden"))
    emission.add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        inputs,
        y,
        between=between,
        fused_activation_function="TANH",
        cell_clip=cell.cell_most * 2.0**cell.cell_power,
        proj_clip=0.0,
        time_major=True,
        asymmetric_quantize_inputs=False,
    )
    if _is_read(emission, last):
        place = emission.constant(np.int32(time - 1))
        out = emission.add_like(y, emission.value(last).shape, f"{node.path}/last")
        emission.places[last] = emission.add("GATHER", (y, place), out, axis=0)


def _is_read(emission: TfliteGraph, v: int) -> bool:
    graph = emission.graph
    return v in graph.outputs or any(v in n.inputs for n in graph.nodes)


def _state(emission: TfliteGraph, node: Node, v: int) -> int:
    """Adds a tensor that is zero before the first call, as the value must be."""
    value, data = emission.value(v), emission.tensors[emission.tensor(v, node)].data
    if data is None or np.any(data != value.zero_point):
        raise unsupported(WRITER, node, "an LSTM that starts from another state than 0")
    t = emission.add_like(emission.places[v], value.shape, f"{node.path}/state")
    own = dataclasses.replace(emission.tensors[t], is_variable=True)
    emission.tensors[t] = own
    return t


def _weights(emission: TfliteGraph, node: Node, cell: LstmCell) -> list[int]:
    """Adds weights and biases, and returns the inputs of the operator up to them."""
    found = []
    for kind, kernels, scales in (
        ("kernel", cell.kernels, cell.kernel_scales),
        ("recurrent", cell.recurrent, cell.recurrent_scales),
    ):
        for name, kernel, scale in zip(GATES, kernels, scales, strict=True):
            own = f"{node.path}/{name}/{kind}"
            t = emission.add_tensor(
                own, kernel.shape, "int8", (scale,), (0,), data=kernel
            )
            found.append(t)
    found += [-1] * 3  # Peepholes.
    unit = np.float32(cell.x.scale)
    for name, bias, scale in zip(GATES, cell.biases, cell.kernel_scales, strict=True):
        grid = (float(np.float32(scale) * unit),), (0,)
        own = f"{node.path}/{name}/bias"
        found.append(emission.add_tensor(own, bias.shape, "int32", *grid, data=bias))
    return [*found, -1, -1]  # A projection.
