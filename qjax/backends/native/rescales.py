"""Steps that take integers from grid to grid."""

import math
from typing import get_args

from qjax.backends.native.emission import Emission, by_channel
from qjax.graph.graph import Node
from qjax.integer import RequantizeRule

_REQUANTIZE, _ADD, _CLIP, _DIVIDE = 3, 4, 5, 20
RULES = ("half_even", "tflite_double", "tflite_single", "fp32_half_even")
assert set(RULES) == set(get_args(RequantizeRule))


def _requantize(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    x, acc = e.whole(node.inputs[0], shape), e.value(node.inputs[0])
    pair = [e.param(node, role) for role in ("multiplier", "shift")]
    sizes, own = by_channel(shape, *pair)
    out = e.make(node.output)
    words = [x, out, *sizes, *map(e.table, own), a["input_zero_point"]]
    words += [a["zero_point"], a["low"], a["high"], RULES.index(a["rule"])]
    words += [bool(a.get("is_wide")), acc.low, acc.high]
    e.step(_REQUANTIZE, words, [x], [out])


def _add(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    inputs = [e.whole(v, shape) for v in node.inputs]
    out = e.make(node.output)
    words = [out, math.prod(shape), len(inputs)]
    terms = zip(inputs, a["input_zero_points"], a["multipliers"], strict=True)
    words += [word for term in terms for word in term]
    words += [a["shift"], a["zero_point"], a["low"], a["high"]]
    e.step(_ADD, words, inputs, [out])


def _clip(e: Emission, node: Node) -> None:
    a, x = node.attributes, e.of[node.inputs[0]]
    out = e.make(node.output)
    size = math.prod(e.shapes[node.output])
    e.step(_CLIP, [x, out, size, a["low"], a["high"]], [x], [out])


def _divide(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    inputs = [e.whole(v, shape) for v in node.inputs]
    out = e.make(node.output)
    words = [*inputs, out, math.prod(shape), *a["zero_points"], a["multiplier"]]
    words += [a["shift"], a["zero_point"], a["low"], a["high"]]
    e.step(_DIVIDE, words, inputs, [out])


RESCALES = {
    "requantize": _requantize,
    "add": _add,
    "clip": _clip,
    "divide": _divide,
}
