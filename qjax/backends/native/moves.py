"""Steps that move integers: copies of boxes, by strides."""

import math
from collections.abc import Sequence

from qjax.backends.native.emission import (
    Emission,
    NotNativeError,
    broadcast_strides,
    dense,
)
from qjax.graph.graph import Node, holds

_TAKE = 19


def _reshape(e: Emission, node: Node) -> None:
    (v,) = node.inputs
    if e.buffers[e.of[v]].dtype == e.graph.values[node.output].dtype:
        e.of[node.output] = e.of[v]
        return
    size = math.prod(e.shapes[v])
    e.copy(e.of[v], e.make(node.output), [size], [1])


def _transpose(e: Emission, node: Node) -> None:
    x, strides = e.of[node.inputs[0]], dense(e.shapes[node.inputs[0]])
    own = [strides[d] for d in node.attributes["permutation"]]
    e.copy(x, e.make(node.output), e.shapes[node.output], own)


def _slice(e: Emission, node: Node) -> None:
    a, shape = node.attributes, e.shapes[node.inputs[0]]
    ends = zip(a["start"], a["stop"], a["steps"], shape, strict=True)
    found = [slice(*end).indices(n) for *end, n in ends]
    strides = dense(shape)
    own = [own[2] * step for own, step in zip(found, strides, strict=True)]
    first = sum(own[0] * step for own, step in zip(found, strides, strict=True))
    sizes = e.shapes[node.output]
    x = e.of[node.inputs[0]]
    e.copy(x, e.make(node.output), sizes, own, offsets=(first, 0))


def _rev(e: Emission, node: Node) -> None:
    shape, axes = e.shapes[node.output], node.attributes["axes"]
    strides = dense(shape)
    own = [-step if d in axes else step for d, step in enumerate(strides)]
    first = sum(strides[d] * (shape[d] - 1) for d in axes)
    x = e.of[node.inputs[0]]
    e.copy(x, e.make(node.output), shape, own, offsets=(first, 0))


def _broadcast(e: Emission, node: Node) -> None:
    own, shape = e.shapes[node.inputs[0]], e.shapes[node.output]
    strides = [0] * len(shape)
    steps = broadcast_strides(own, own)
    for d, step in zip(node.attributes["dimensions"], steps, strict=True):
        strides[d] = step
    e.copy(e.of[node.inputs[0]], e.make(node.output), shape, strides)


def _concatenate(e: Emission, node: Node) -> None:
    axis, shape = node.attributes["axis"], e.shapes[node.output]
    inputs = [e.of[v] for v in node.inputs]
    out, target, at = e.make(node.output), dense(shape), 0
    for v, x in zip(node.inputs, inputs, strict=True):
        own, offsets = e.shapes[v], (0, at * target[axis])
        e.copy(x, out, own, dense(own), target, offsets)
        at += own[axis]


def _pad(e: Emission, node: Node) -> None:
    a, v = node.attributes, node.inputs[0]
    out = e.make(node.output)
    shape, padding = e.shapes[node.output], a["padding"]
    fill_around(e, e.of[v], e.shapes[v], out, shape, padding, a["padding_code"])


def fill_around(
    e: Emission,
    x: int,
    sizes: Sequence[int],
    out: int,
    shape: Sequence[int],
    padding: Sequence[Sequence[int]],
    code: int,
) -> None:
    """Emits a padding: a fill, then the integers that are left of a crop.

    Args:
      e: The plan.
      x: Buffer of the integers.
      sizes: Their shape.
      out: Buffer to write.
      shape: Its shape.
      padding: Before, after and between, along each axis.
      code: Integer of the padding.
    """
    if not holds(e.buffers[out].dtype, code, code):
        raise NotNativeError(f"{e.buffers[out].dtype} does not hold its padding {code}")
    firsts, counts = [], []
    for n, size, (low, _, inner) in zip(sizes, shape, padding, strict=True):
        step = inner + 1
        first = max(-(low // step), 0)  # The first that is not cropped.
        last = min((size - 1 - low) // step, n - 1)
        firsts.append(first)
        counts.append(max(last - first + 1, 0))
    if list(counts) != list(shape):
        e.fill(out, code)
    steps, targets = dense(sizes), dense(shape)
    begins = [
        (first * step, (low + first * (inner + 1)) * target)
        for first, step, target, (low, _, inner) in zip(
            firsts, steps, targets, padding, strict=True
        )
    ]
    spread = [
        t * (inner + 1) for t, (_, _, inner) in zip(targets, padding, strict=True)
    ]
    offsets = sum(b[0] for b in begins), sum(b[1] for b in begins)
    e.copy(x, out, counts, steps, spread, offsets)


def _take(e: Emission, node: Node) -> None:
    x, places = e.of[node.inputs[0]], e.param(node, "places")
    shape = e.shapes[node.inputs[0]]
    outer = 1 if node.attributes.get("crosses_examples") else shape[0]
    out, size = e.make(node.output), math.prod(shape)
    if not size or not places.size:
        return
    words = [x, out, outer, size // outer, places.size, e.table(places.reshape(-1))]
    e.step(_TAKE, words, [x], [out])


def _constant(e: Emission, node: Node) -> None:
    value = e.param(node, "value").astype(e.graph.values[node.output].dtype)
    shape, known = e.shapes[node.output], e.constant(value)
    if tuple(shape) == value.shape:
        e.of[node.output] = known
        return
    e.copy(known, e.make(node.output), shape, broadcast_strides(value.shape, shape))


MOVES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _rev,
    "broadcast": _broadcast,
    "concatenate": _concatenate,
    "pad": _pad,
    "take": _take,
    "constant": _constant,
    "tflite_constant": _constant,
}
