"""Steps of sums and extremes over axes and windows."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from qjax.backends.native.emission import Emission, dense, merged
from qjax.backends.native.moves import fill_around
from qjax.graph.graph import Node, holds

_REDUCE, _WINDOW, _RUNNING_SUM = 12, 13, 14
KINDS = ("sum", "max", "min", "argmax", "argmin")


def _reduce(e: Emission, node: Node) -> None:
    a, (v,) = node.attributes, node.inputs
    axes = sorted(a["axes"]) if "axes" in a else [a["axis"]]
    shape, bias = e.shapes[v], wrapped(a.get("bias", 0))
    terms = math.prod(shape[d] for d in axes)
    out = e.make(node.output)
    if not terms:  # Of sums alone: extremes of nothing are refused before.
        e.fill(out, bias)
        return
    x, outer, inner = by_row(e, v, axes)
    words = [KINDS.index(node.operation), x, out, outer, terms, inner, bias]
    e.step(_REDUCE, words, [x], [out])


def wrapped(number: int) -> int:
    """Reduces an integer modulo 2^32 to int32, in which sums wrap."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def by_row(e: Emission, v: int, axes: Sequence[int]) -> tuple[int, int, int]:
    """Returns a buffer in which axes are neighbours, and the sizes before and after."""
    shape = e.shapes[v]
    seen = [d for d in range(len(shape)) if shape[d] != 1]
    own = [d for d in axes if shape[d] != 1]
    at = seen.index(own[0]) if own else 0
    if own == seen[at : at + len(own)]:
        outer = math.prod(shape[d] for d in seen[:at]) if own else math.prod(shape)
        terms = math.prod(shape[d] for d in own)
        return e.of[v], outer, math.prod(shape) // max(outer * terms, 1)
    others = [d for d in range(len(shape)) if d not in axes]
    outer = math.prod(shape[d] for d in others)
    return e.arranged(e.of[v], shape, [*others, *axes]), outer, 1


def _pool(e: Emission, node: Node) -> None:
    a, (v,) = node.attributes, node.inputs
    kind, dtype = node.operation.removesuffix("_pool"), e.graph.values[v].dtype
    shape, x = e.shapes[v], e.of[v]
    info = np.iinfo(dtype)
    code = {"max": info.min, "min": info.max}.get(kind, a.get("padding_code", 0))
    config = [
        (low, high, step - 1)
        for (low, high), step in zip(a["padding"], a["base_dilation"], strict=True)
    ]
    out = e.make(node.output)
    if any(map(any, config)):
        padded = [
            max((n - 1) * (inner + 1) + 1, 0) + low + high
            for n, (low, high, inner) in zip(shape, config, strict=True)
        ]
        dtype = dtype if holds(dtype, code, code) else "int32"
        whole = e.buffer(dtype, math.prod(padded))
        fill_around(e, x, shape, whole, padded, config, int(code))
        x, shape = whole, tuple(padded)
    strides, sizes = dense(shape), e.shapes[node.output]
    steps = [s * step for s, step in zip(a["strides"], strides, strict=True)]
    reach = [d * step for d, step in zip(a["dilation"], strides, strict=True)]
    taps = [
        sum(t * r for t, r in zip(place, reach, strict=True))
        for place in itertools.product(*map(range, a["window"]))
    ]
    axes = merged(zip(sizes, steps, dense(sizes), strict=True)) or [(1, 0, 1)]
    whole_sizes, whole_steps, _ = zip(*axes, strict=True)
    words = [KINDS.index(kind), x, out, len(axes), *whole_sizes, *whole_steps]
    words += [0, len(taps)]
    words += [*taps, wrapped(a.get("bias", 0))]
    e.step(_WINDOW, words, [x], [out])


def _running_sum(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.output]
    x, axis = e.of[node.inputs[0]], a["axis"]
    out = e.make(node.output)
    words = [x, out, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])]
    words += [a["reverse"], a["input_zero_point"], wrapped(a["bias"])]
    e.step(_RUNNING_SUM, words, [x], [out])


REDUCTIONS = {
    **dict.fromkeys(KINDS, _reduce),
    **dict.fromkeys(("sum_pool", "max_pool", "min_pool"), _pool),
    "running_sum": _running_sum,
}
