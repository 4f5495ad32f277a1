"""Moves of the integer graph in QONNX, and choices among values."""

from typing import Any

import numpy as np

from qjax.formats.qonnx.sheet import QonnxCall, QonnxTensor


def _of_one_grid(call: QonnxCall) -> None:
    zeros = {x.zero_point for x in (*call.values, call.output)}
    if len(zeros) > 1:
        raise call.refuse("values of several zero points")


def of_two(call: QonnxCall) -> QonnxTensor:
    """Writes the elementwise maximum or minimum."""
    _of_one_grid(call)
    pair, order = call.sheet.aligned(call.inputs)
    kind = "Max" if call.node.operation == "maximum" else "Min"
    return call.sheet.tensor(call.graph.two(kind, *pair), order)


def extreme(call: QonnxCall) -> QonnxTensor:
    """Writes the largest or smallest over axes."""
    _of_one_grid(call)
    kind = "ReduceMax" if call.node.operation == "max" else "ReduceMin"
    own: dict[str, Any] = {"dtype": "float32", "shape": call.shape, "keepdims": 0}
    x = call.sheet.plain(call.x)
    if not call["axes"]:
        return call.sheet.tensor(x)
    return call.sheet.tensor(call.graph.op(kind, x, axes=list(call["axes"]), **own))


def arg_extreme(call: QonnxCall) -> QonnxTensor:
    """Writes the place of the first extreme along an axis."""
    kind = "ArgMax" if call.node.operation == "argmax" else "ArgMin"
    own: dict[str, Any] = {"dtype": "int64", "shape": call.shape, "keepdims": 0}
    x = call.sheet.plain(call.x)
    found = call.graph.op(kind, x, axis=call["axis"], **own)
    return call.sheet.tensor(call.graph.cast(found, "float32"))


def concatenate(call: QonnxCall) -> QonnxTensor:
    """Writes a join of values."""
    _of_one_grid(call)
    parts, order = call.sheet.aligned(call.inputs)
    axis = call["axis"] if order is None else order[call["axis"]]
    return call.sheet.tensor(call.graph.concatenate(parts, axis), order)


def reshape(call: QonnxCall) -> QonnxTensor:
    """Writes another shape."""
    return call.sheet.tensor(call.graph.reshape(call.sheet.plain(call.x), call.shape))


def transpose(call: QonnxCall) -> QonnxTensor:
    """Orders axes; the tensor stays."""
    x, turn = call.sheet.finished(call.x), call["permutation"]
    return call.sheet.tensor(x.value, [x.order[d] for d in turn])


def slices(call: QonnxCall) -> QonnxTensor:
    """Writes slices of all axes."""
    ends = list(zip(call["start"], call["stop"], call["steps"], strict=True))
    x = call.sheet.plain(call.x)
    return call.sheet.tensor(call.graph.slice(x, ends, call.shape))


def rev(call: QonnxCall) -> QonnxTensor:
    """Writes axes backwards."""
    ends = [
        (None, None, -1 if d in call["axes"] else 1) for d in range(len(call.shape))
    ]
    x = call.sheet.plain(call.x)
    return call.sheet.tensor(call.graph.slice(x, ends, call.shape))


def pad(call: QonnxCall) -> QonnxTensor:
    """Writes padding around."""
    pairs = call["padding"]
    if any(inner or low < 0 or high < 0 for low, high, inner in pairs):
        raise call.refuse("padding that crops or spreads")
    x = call.sheet.plain(call.x)
    pads = [low for low, _, _ in pairs] + [high for _, high, _ in pairs]
    code = call.graph.constant(call["padding_code"] - call.zero(), "float32")
    own: dict[str, Any] = {"dtype": "float32", "shape": call.shape}
    places = call.graph.constant(pads, "int64")
    return call.sheet.tensor(call.graph.op("Pad", x, places, code, **own))


def broadcast(call: QonnxCall) -> QonnxTensor:
    """Writes values along axes of a larger shape."""
    shape = [1] * len(call.shape)
    for d, n in zip(call["dimensions"], call.x.shape, strict=True):
        shape[d] = n
    x = call.graph.reshape(call.sheet.plain(call.x), shape)
    return call.sheet.tensor(call.graph.expand(x, call.shape))


def constant(call: QonnxCall) -> QonnxTensor:
    """Writes numbers of the program."""
    value = call.params["value"] - call.output.zero_point
    call.check(int(np.abs(value).max(initial=0)))
    value = np.broadcast_to(value, call.shape)
    return call.sheet.tensor(call.sheet.numbers(value, "value"))
