"""Steps of the operations that occur only in graphs made from TFLite."""

import math

import numpy as np

from qjax.backends.native.emission import Emission, by_channel
from qjax.backends.native.rescales import RULES
from qjax.graph.graph import Node

_ADD, _AVERAGE, _SOFTMAX, _RESIZE = 24, 25, 26, 30
_LOG_SOFTMAX, _L2_NORM, _SOFTMAX16 = 31, 32, 33


def _add(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    inputs = [e.whole(v, shape) for v in node.inputs]
    out = e.make(node.output)
    words = [*inputs, out, math.prod(shape), a["left_shift"], *a["zero_points"]]
    for pair in zip(a["multipliers"], a["shifts"], strict=True):
        words += pair
    words += [a["multiplier"], a["shift"], a["zero_point"], a["low"], a["high"]]
    e.step(_ADD, [*words, RULES.index(a["rule"])], inputs, [out])


def _average(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    x = e.whole(node.inputs[0], shape)
    sizes, (counts,) = by_channel(shape, np.asarray(e.param(node, "counts")))
    out = e.make(node.output)
    words = [x, out, *sizes, e.table(counts), a["low"], a["high"]]
    e.step(_AVERAGE, words, [x], [out])


def _of_rows(e: Emission, node: Node) -> tuple[list[int], list[int], list[int]]:
    """Returns the first words of a step along the last axis, its reads and writes."""
    shape = e.shapes[node.output]
    x, out = e.of[node.inputs[0]], e.make(node.output)
    return [x, out, math.prod(shape[:-1]), shape[-1]], [x], [out]


def _softmax(e: Emission, node: Node) -> None:
    a, table = node.attributes, e.param(node, "exponentials")
    words, *ends = _of_rows(e, node)
    words += [e.table(table), len(table)]
    if node.operation == "tflite_softmax":
        e.step(_SOFTMAX, [*words, a["low"], a["high"]], *ends)
    elif node.operation == "tflite_softmax16":
        reciprocals = e.param(node, "reciprocals")
        e.step(_SOFTMAX16, [*words, e.table(reciprocals), a["high"]], *ends)
    else:
        steps = e.param(node, "steps")[: len(table)]
        steps = np.pad(steps, (0, len(table) - len(steps)), "edge")
        words += [e.table(steps), a["zero_point"], a["low"], a["high"]]
        e.step(_LOG_SOFTMAX, words, *ends)


def _l2_norm(e: Emission, node: Node) -> None:
    a = node.attributes
    words, *ends = _of_rows(e, node)
    words += [a["input_zero_points"][0], a["low"], a["high"]]
    e.step(_L2_NORM, words, *ends)


def _resize(e: Emission, node: Node) -> None:
    (v,) = node.inputs
    n, rows, columns, channels = e.shapes[v]
    x, out = e.of[v], e.make(node.output)
    words = [x, out, n]
    for size, role in ((rows, "rows"), (columns, "columns")):
        places = e.param(node, role)
        words += [size, places.shape[1], e.table(places)]
    e.step(_RESIZE, [*words, channels], [x], [out])


TFLITE_STEPS = {
    "tflite_add": _add,
    "tflite_average": _average,
    "tflite_l2_norm": _l2_norm,
    "tflite_log_softmax": _softmax,
    "tflite_resize": _resize,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax,
}
