"""Steps of products in 32 bits, for what the kernels of `products` do not compute."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from qjax.backends.native.emission import (
    Emission,
    NotNativeError,
    broadcast_strides,
    dense,
    merged,
)
from qjax.backends.native.moves import fill_around
from qjax.backends.native.products import PRODUCTS
from qjax.graph.graph import Node, holds

_CONTRACTION = 34
# An axis: its size, and the strides along it of both operands and of the output.
_Axis = tuple[int, int, int, int]
_Emit = Callable[[Emission, Node], None]


def _contract(
    e: Emission,
    pair: tuple[int, int],
    out: int,
    free: Sequence[_Axis],
    summed: Sequence[_Axis],
    zeros: Sequence[int] = (0, 0),
    shift: int = 0,
) -> None:
    """Emits sums of products, which are added to what the output holds."""
    own = merged(sorted(free, key=lambda axis: -axis[3])) or [(1, 1, 1, 1)]
    terms = [axis for axis in summed if axis[0] != 1]
    columns = list(zip(*own, *terms, strict=True))
    words = [*pair, out, *zeros, shift, len(own), len(terms)]
    words += [*columns[0], *columns[1], *columns[2], *columns[3][: len(own)]]
    e.step(_CONTRACTION, words, [*pair, out], [out])


def _kernel(e: Emission, node: Node) -> tuple[np.ndarray, int]:
    """Returns the kernel of a node and the buffer of its integers, int32."""
    kernel = e.param(node, "kernel")
    if not np.can_cast(kernel.dtype, np.int32):
        e.table(kernel)  # It raises if one leaves int32.
    return kernel, e.constant(kernel.astype(np.int32))


def _begin(e: Emission, node: Node, rank: int) -> tuple[int, list[int]]:
    """Emits the bias of a product; returns its buffer and its strides.

    Along an axis that the bias alone has a product is the same at all places.
    """
    bias, shape = e.param(node, "bias").astype(np.int32), e.shapes[node.output]
    if bias.ndim > rank:
        raise NotNativeError(f"its bias has {bias.ndim} axes, its product {rank}")
    out = e.make(node.output)
    e.copy(e.constant(bias), out, shape, broadcast_strides(bias.shape, shape))
    return out, dense(shape)


def _dot(e: Emission, node: Node) -> None:
    a, side = node.attributes, node.attributes["kernel_operand"]
    kernel, own = _kernel(e, node)
    v = node.inputs[0]
    shapes, buffers = [tuple(e.shapes[v]), kernel.shape], [e.of[v], own]
    zeros = [a["offset"], 0]
    if side == 0:
        shapes, buffers, zeros = shapes[::-1], buffers[::-1], zeros[::-1]
    axes = _axes(shapes, a["contract"], a["batch"])
    out, strides = _begin(e, node, len(axes[0]))
    free = _placed(axes[0], e.shapes[node.output], strides)
    pair = buffers[0], buffers[1]
    _contract(e, pair, out, free, axes[1], zeros, a["shift"])


def _dot_codes(e: Emission, node: Node) -> None:
    a, (x, y) = node.attributes, node.inputs
    out, shape = e.make(node.output), e.shapes[node.output]
    e.fill(out, 0)
    axes = _axes([e.shapes[x], e.shapes[y]], a["contract"], a["batch"])
    free = _placed(axes[0], shape, dense(shape))
    _contract(e, (e.of[x], e.of[y]), out, free, axes[1], a["zero_points"])


def _axes(
    shapes: Sequence[Sequence[int]],
    contract: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> tuple[list[tuple[int, int, int]], list[_Axis]]:
    """Returns the axes of the output, in order, and those that are summed over."""
    x, y = map(dense, shapes)
    both = [
        [(shapes[0][i], x[i], y[j]) for i, j in zip(*axes, strict=True)]
        for axes in (batch, contract)
    ]
    free = [
        (n, *((x[d], 0) if k == 0 else (0, y[d])))
        for k, shape in enumerate(shapes)
        for d, n in enumerate(shape)
        if d not in (*contract[k], *batch[k])
    ]
    return [*both[0], *free], [(*axis, 0) for axis in both[1]]


def _placed(
    axes: Sequence[tuple[int, int, int]], shape: Sequence[int], strides: Sequence[int]
) -> list[_Axis]:
    """Returns the axes of an output with its own sizes, which a bias may enlarge."""
    return [
        (whole, *((x, y) if n == whole else (0, 0)), step)
        for (n, x, y), whole, step in zip(axes, shape, strides, strict=True)
    ]


def _conv(e: Emission, node: Node) -> None:
    a, v = node.attributes, node.inputs[0]
    kernel, own = _kernel(e, node)
    (b, c, *space), (o, i, *taps), order = a["dimensions"]
    x, shape = e.of[v], list(e.shapes[v])
    padding = [[0, 0, 0] for _ in shape]
    for d, (low, high), step in zip(
        space, a["padding"], a["input_dilation"], strict=True
    ):
        padding[d] = [low, high, step - 1]
    if any(map(any, padding)):
        dtype, code = e.buffers[x].dtype, a["padding_code"]
        sizes = [
            max((n - 1) * (inner + 1) + 1, 0) + low + high
            for n, (low, high, inner) in zip(shape, padding, strict=True)
        ]
        dtype = dtype if holds(dtype, code, code) else "int32"
        whole = e.buffer(dtype, math.prod(sizes))
        fill_around(e, x, shape, whole, sizes, padding, code)
        x, shape = whole, sizes
    out, outs = _begin(e, node, len(shape))
    made = e.shapes[node.output]
    ins, weights, groups = dense(shape), dense(kernel.shape), a["groups"]
    channels, outputs = kernel.shape[i], kernel.shape[o] // groups
    seen = [
        max((shape[d] - (kernel.shape[t] - 1) * step - 1) // stride + 1, 0)
        for d, t, step, stride in zip(
            space, taps, a["dilation"], a["strides"], strict=True
        )
    ]
    steps = [ins[d] * n for d, n in zip(space, a["strides"], strict=True)]
    pairs = [
        (shape[b], ins[b], 0),
        *((n, s, 0) for n, s in zip(seen, steps, strict=True)),
    ]
    at = [order[0], *order[2:]]
    free = _placed(pairs, [made[d] for d in at], [outs[d] for d in at])
    if made[order[1]] == kernel.shape[o]:
        own_out = outs[order[1]]
        free += [
            (groups, ins[c] * channels, weights[o] * outputs, own_out * outputs),
            (outputs, 0, weights[o], own_out),
        ]
    else:  # One output, which the bias makes many.
        free.append((made[order[1]], 0, 0, outs[order[1]]))
    summed = [(channels, ins[c], weights[i], 0)]
    summed += [
        (kernel.shape[t], ins[d] * step, weights[t], 0)
        for d, t, step in zip(space, taps, a["dilation"], strict=True)
    ]
    _contract(e, (x, own), out, free, summed, (a["offset"], 0), a["shift"])


def _first_of(emit: _Emit, other: _Emit) -> _Emit:
    """Returns what emits a node by one function, or by another where it cannot."""

    def emitted(e: Emission, node: Node) -> None:
        buffers, steps, places = len(e.buffers), len(e.steps), dict(e.of)
        try:
            emit(e, node)
        except NotNativeError:
            del e.buffers[buffers:], e.steps[steps:]
            e.of = places
            other(e, node)

    return emitted


CONTRACTIONS = {
    name: _first_of(PRODUCTS[name], other)
    for name, other in {"dot": _dot, "conv": _conv, "dot_codes": _dot_codes}.items()
}
