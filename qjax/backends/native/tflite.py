"""Steps of the operations that occur only in graphs made from TFLite."""

import math

import numpy as np

from qjax.backends.native.emission import Emission, by_channel
from qjax.backends.native.rescales import RULES
from qjax.graph.graph import Node

_ADD, _AVERAGE, _SOFTMAX = 24, 25, 26


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


def _softmax(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    x, table = e.of[node.inputs[0]], e.param(node, "exponentials")
    out = e.make(node.output)
    words = [x, out, math.prod(shape[:-1]), shape[-1], e.table(table), len(table)]
    e.step(_SOFTMAX, [*words, a["low"], a["high"]], [x], [out])


TFLITE_STEPS = {
    "tflite_add": _add,
    "tflite_average": _average,
    "tflite_softmax": _softmax,
}
