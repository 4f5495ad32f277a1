"""Steps of products of codes with kernels and with codes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.backends.native.emission import (
    DTYPES,
    Emission,
    NotNativeError,
    broadcast_strides,
    by_channel,
    dense,
    merged,
)
from qjax.backends.native.rescales import RULES
from qjax.graph.graph import Node
from qjax.graph.operations.arithmetic import KINDS

_PRODUCT, _MATMUL, _PAIR, _MULTIPLY, _ARITHMETIC = 6, 7, 8, 9, 17
_SPACE = 3  # Spatial axes of a step.


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where the output channels of a product are among the axes of its output.

    Attributes:
      shape: Shape of the output.
      axes: Axes of the channels, neighbours or one.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def per_channel(self, array: np.ndarray) -> np.ndarray | None:
        """Returns one integer a channel, or None if others differ."""
        array = array.reshape((1,) * (len(self.shape) - array.ndim) + array.shape)
        if any(n != 1 for d, n in enumerate(array.shape) if d not in self.axes):
            return None
        sizes = [self.shape[d] for d in self.axes]
        own = array.reshape([array.shape[d] for d in self.axes])
        return np.broadcast_to(own, sizes).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _ProductWords:
    """The words of a product that say which codes meet which weights."""

    batch: int
    groups: int
    channels: int
    outputs: int
    sizes: Sequence[int]
    strides_in: Sequence[int]  # Batch, space, channel.
    padding: Sequence[int]
    input_dilation: Sequence[int]
    padding_code: int
    taps: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]
    out_sizes: Sequence[int]
    strides_out: Sequence[int]  # Batch, space, output channel.

    def words(self) -> list[int]:
        """Returns them in the order of the plan."""
        found: list[int] = []
        for field in dataclasses.fields(self):
            own = getattr(self, field.name)
            found += own if isinstance(own, list | tuple) else [own]
        return found


def dot(e: Emission, node: Node) -> None:
    """Emits the product of codes with a matrix."""
    a, kernel = node.attributes, e.param(node, "kernel")
    side = a["kernel_operand"]
    x = tuple(e.shapes[node.inputs[0]])
    summed, batch = ([*a[k][1 - side]] for k in ("contract", "batch"))
    own_summed, own_batch = ([*a[k][side]] for k in ("contract", "batch"))
    free = [d for d in range(len(x)) if d not in (*summed, *batch)]
    own_free = [d for d in range(kernel.ndim) if d not in (*own_summed, *own_batch)]
    groups = math.prod(x[d] for d in batch)
    channels = math.prod(x[d] for d in summed)
    outputs = math.prod(kernel.shape[d] for d in own_free)
    rows = math.prod(x[d] for d in free)
    matrix = kernel.transpose(*own_batch, *own_summed, *own_free)
    matrix = matrix.reshape(groups, 1, 1, 1, channels, outputs)
    shape = tuple(e.shapes[node.output])
    first, last = len(batch), len(batch) + (len(own_free) if side == 0 else len(free))
    places = range(first, last) if side == 0 else range(last, len(shape))
    out = _Output(shape, (*range(first), *places))
    if shape != _sizes_of(x, kernel, batch, free, own_free, side):
        raise NotNativeError("its bias makes the output larger")
    code = e.narrow(node.inputs[0])
    if not rows * groups * outputs * channels:
        _of_nothing(e, node)
        return
    row_strides = dense([x[d] for d in free])
    step = (outputs, 1) if side == 1 else (1, rows)  # Of a row, of a channel.
    strides = dense(x)
    axes = merged(
        (x[d], strides[d], own * step[0])
        for d, own in zip(free, row_strides, strict=True)
    )
    terms = merged((x[d], strides[d]) for d in summed) or [(1, 1)]
    if groups > 1 or len(terms) > 1 or len(axes) > 1 + _SPACE:
        # In turn rows, groups, channels.
        code = e.arranged(code, x, [*free, *batch, *summed])
        axes = [(rows, groups * channels, groups * outputs if groups > 1 else step[0])]
        terms = [(channels, 1)]
    # Rows of the last axis share a tile.
    lead, *space = axes if len(axes) > _SPACE else [(1, 1, 1), *axes]
    space = [(1, 1, 1)] * (_SPACE - len(space)) + space
    sizes, ins, outs = ([axis[k] for axis in space] for k in range(3))
    window = _ProductWords(
        lead[0],
        groups,
        channels,
        outputs,
        sizes,
        [lead[1], *ins, terms[0][1]],
        [0] * 2 * _SPACE,
        [1] * _SPACE,
        0,
        [1] * _SPACE,
        [1] * _SPACE,
        [1] * _SPACE,
        sizes,
        [lead[2], *outs, 1 if groups > 1 else step[1]],
    )
    back = None
    if groups > 1:
        # Written as rows, groups, outputs; the output has other orders of the same.
        back = (rows, groups, outputs), ((1, 0, 2) if side == 1 else (1, 2, 0))
    _product(e, node, code, matrix, window, out, back)


def _sizes_of(
    x: Sequence[int],
    kernel: np.ndarray,
    batch: Sequence[int],
    free: Sequence[int],
    own_free: Sequence[int],
    side: int,
) -> tuple[int, ...]:
    """Returns the shape of the product itself, without what a bias makes of it."""
    parts = [x[d] for d in free], [kernel.shape[d] for d in own_free]
    first, second = parts if side == 1 else parts[::-1]
    return (*(x[d] for d in batch), *first, *second)


def conv(e: Emission, node: Node) -> None:
    """Emits a convolution, of any order of its axes."""
    a, kernel = node.attributes, e.param(node, "kernel")
    (b, c, *space), (o, i, *taps), order = a["dimensions"]
    x, shape = tuple(e.shapes[node.inputs[0]]), tuple(e.shapes[node.output])
    if len(space) > _SPACE:
        raise NotNativeError(f"it has {len(space)} spatial axes, and 3 are the most")
    groups, channels = a["groups"], kernel.shape[i]
    outputs = kernel.shape[o] // groups
    if shape[order[0]] != x[b] or shape[order[1]] != kernel.shape[o]:
        raise NotNativeError("its bias makes the output larger")
    code = e.narrow(node.inputs[0])
    # Codes of no places are padded: the padding is part of the sums.
    if not x[b] * kernel.size * math.prod(shape):
        _of_nothing(e, node)
        return
    less = _SPACE - len(space)
    three = lambda own, fill: [fill] * less + [int(n) for n in own]
    matrix = kernel.transpose(*taps, i, o)
    sizes = matrix.shape[:-2]
    matrix = matrix.reshape(*(1,) * less, *sizes, channels, groups, outputs)
    matrix = np.moveaxis(matrix, -2, 0)
    ins, outs = dense(x), dense(shape)
    window = _ProductWords(
        x[b],
        groups,
        channels,
        outputs,
        three([x[d] for d in space], 1),
        [ins[b], *three([ins[d] for d in space], 1), ins[c]],
        [0] * 2 * less + [int(n) for pair in a["padding"] for n in pair],
        three(a["input_dilation"], 1),
        a["padding_code"],
        three(sizes, 1),
        three(a["strides"], 1),
        three(a["dilation"], 1),
        three([shape[d] for d in order[2:]], 1),
        [outs[order[0]], *three([outs[d] for d in order[2:]], 1), outs[order[1]]],
    )
    _product(e, node, code, matrix, window, _Output(shape, (order[1],)), None)


def _of_nothing(e: Emission, node: Node) -> None:
    """Emits sums of no terms: the bias."""
    bias, out = e.param(node, "bias").astype(np.int32), e.make(node.output)
    shape = e.shapes[node.output]
    e.copy(e.constant(bias), out, shape, broadcast_strides(bias.shape, shape))


def _product(
    e: Emission,
    node: Node,
    x: int,
    matrix: np.ndarray,
    window: _ProductWords,
    output: _Output,
    back: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> None:
    """Emits a product, with the requantization that alone reads it.

    Args:
      e: The plan.
      node: The node.
      x: Buffer of the codes.
      matrix: Kernel: groups, three axes of taps, channels, outputs.
      window: How both meet.
      output: Where the output channels are.
      back: Sizes in which the step writes, and the order of these axes in the output;
        None where it writes the output itself.
    """
    a, bias = node.attributes, e.param(node, "bias")
    dtype = "int8" if holds(matrix, "int8") else "int16"
    most = max(abs(int(matrix.min())), int(matrix.max())) << a["shift"]
    if most >= 1 << 15:
        raise NotNativeError("its shifted kernel needs more than 16 bits")
    own_bias = output.per_channel(bias)
    follower = e.followers.get(node.output) if own_bias is not None else None
    rescale = None if follower is None else _epilogue(e, follower, output)
    v = node.output
    if rescale is not None and follower is not None:
        v = follower.output
        e.fused.add(v)
    target = e.make(v)
    out = target
    if back is not None:
        out = e.buffer(e.buffers[target].dtype, e.buffers[target].elements)
    count = window.groups * window.outputs
    acc = e.value(node.output)
    flat = np.zeros(count) if own_bias is None else own_bias
    words = [x, out, a["offset"], *window.words()]
    words += [DTYPES.index(dtype), e.table(matrix, dtype), e.table(flat)]
    words += [a["shift"], acc.low, acc.high, *(rescale or [0])]
    e.step(_PRODUCT, words, [x], [out])
    if back is not None:
        sizes, order = back
        strides = dense(sizes)
        whole = [sizes[d] for d in order]
        e.copy(out, target, whole, [strides[d] for d in order])
    if own_bias is None:  # It differs among places: a sum in int32.
        _add_bias(e, node, bias)


def holds(array: np.ndarray, dtype: str) -> bool:
    """Returns whether a type holds all integers of an array."""
    info = np.iinfo(dtype)
    return not array.size or bool(info.min <= array.min() and array.max() <= info.max)


def _add_bias(e: Emission, node: Node, bias: np.ndarray) -> None:
    shape, acc = e.shapes[node.output], e.of[node.output]
    own = e.constant(bias.astype(np.int32))
    out = e.make(node.output)
    words = [KINDS.index("add"), DTYPES.index("int32"), len(shape), *shape]
    words += [acc, *dense(shape), own, *broadcast_strides(bias.shape, shape), out]
    e.step(_ARITHMETIC, words, [acc, own], [out])


def _epilogue(e: Emission, node: Node, output: _Output) -> list[int] | None:
    """Returns the words of a requantization at the end of a product, if it can be."""
    a = node.attributes
    pair = [output.per_channel(e.param(node, k)) for k in ("multiplier", "shift")]
    if a.get("is_wide") or pair[0] is None or pair[1] is None:
        return None
    words = [1, *(e.table(own) for own in pair), a["input_zero_point"]]
    return [*words, a["zero_point"], a["low"], a["high"], RULES.index(a["rule"])]


def dot_codes(e: Emission, node: Node) -> None:
    """Emits the product of two matrices of codes."""
    a = node.attributes
    sides, sizes = [], []
    for v, summed, batch in zip(node.inputs, a["contract"], a["batch"], strict=True):
        shape = e.shapes[v]
        free = [d for d in range(len(shape)) if d not in (*summed, *batch)]
        sides.append(e.arranged(e.narrow(v), shape, [*batch, *free, *summed]))
        parts = (batch, free, summed)
        sizes.append([math.prod(shape[d] for d in axes) for axes in parts])
    (batch, rows, terms), (_, columns, _) = sizes
    out = e.make(node.output)
    if not terms:
        e.fill(out, 0)
        return
    words = [*sides, out, batch, rows, terms, columns, *a["zero_points"]]
    e.step(_MATMUL, words, sides, [out])


def multiply(e: Emission, node: Node) -> None:
    """Emits the product of codes with a parameter, elementwise."""
    a, shape = node.attributes, e.shapes[node.output]
    x = e.whole(node.inputs[0], shape)
    pair = [e.param(node, role) for role in ("kernel", "bias")]
    sizes, own = by_channel(shape, *pair)
    out = e.make(node.output)
    words = [x, out, *sizes, *map(e.table, own), a["offset"], a["shift"]]
    e.step(_MULTIPLY, words, [x], [out])


def pair(e: Emission, node: Node) -> None:
    """Emits a product, a maximum or a minimum of two codes, elementwise."""
    kind = ("multiply_codes", "maximum", "minimum").index(node.operation)
    shape = e.shapes[node.output]
    x, y = (e.of[v] for v in node.inputs)
    out = e.make(node.output)
    strides = [broadcast_strides(e.shapes[v], shape) for v in node.inputs]
    axes = merged(zip(shape, *strides, dense(shape), strict=True)) or [(1, 1, 1, 1)]
    columns: list[Any] = list(zip(*axes, strict=True))
    words = [kind, x, y, out, len(axes), *columns[0], 0, *columns[1], 0, *columns[2]]
    zeros = node.attributes["zero_points"] if kind == 0 else (0, 0)
    e.step(_PAIR, [*words, *zeros], [x, y], [out])


PRODUCTS = {
    "dot": dot,
    "conv": conv,
    "dot_codes": dot_codes,
    "multiply": multiply,
    "multiply_codes": pair,
    "maximum": pair,
    "minimum": pair,
}
