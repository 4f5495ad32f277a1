"""Accumulators: sums of products of codes, in int32."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.operations.record import (
    AXES,
    AXIS,
    AXIS_LISTS,
    FLAG,
    INTEGER,
    INTEGERS,
    LEFT,
    OPERAND,
    PAIRS,
    SIDES,
    SIZE,
    SIZES,
    WIDE,
    WINDOW,
    Ends,
    Operands,
    Operation,
    Shape,
    broadcast_shape,
    check_axes,
    pad_or_crop,
    pool_shape,
    same_shape,
    spread,
    window_sizes,
    window_taps,
)

_MOST_SUM = 1 << 62


def by_channel(
    operation: str, attributes: Mapping[str, Any], kernel: np.ndarray
) -> np.ndarray:
    """Puts the contraction axes of a kernel first, channels last.

    Args:
      operation: ``dot`` or ``conv``.
      attributes: Attributes of the node.
      kernel: Parameter of the node.

    Returns:
      int64, ``[..., channels]``.
    """
    kernel = kernel.astype(np.int64)
    if operation == "conv":
        return np.moveaxis(kernel, attributes["dimensions"][1][0], -1)
    side = attributes["kernel_operand"]
    summed, batch = attributes["contract"][side], attributes["batch"][side]
    free = [d for d in range(kernel.ndim) if d not in (*summed, *batch)]
    kernel = kernel.transpose(*summed, *batch, *free)
    return kernel.reshape(*kernel.shape[: len(summed)], -1)


def channel_ends(kernel: np.ndarray, over: Sequence[int], codes: Ends) -> Ends:
    """Returns the least and the largest accumulator of each channel, any padding.

        low = sum(max(kernel, 0)) * least + sum(min(kernel, 0)) * most
        high = sum(max(kernel, 0)) * most + sum(min(kernel, 0)) * least

    Padding has the code of zero, so ``least <= 0 <= most``.

    Args:
      kernel: int64.
      over: Axes that are summed over.
      codes: Least and largest code of the input, less its zero point.

    Returns:
      int64, in the rank of the kernel, with size 1 along ``over``.
    """
    axes = tuple(over)
    up = np.maximum(kernel, 0).sum(axes, keepdims=True)
    down = np.minimum(kernel, 0).sum(axes, keepdims=True)
    least, most = min(codes[0], 0), max(codes[1], 0)
    return up * least + down * most, up * most + down * least


def product_ends(pair: Sequence[Sequence[int]], terms: int) -> tuple[int, int]:
    """Returns the ends of a sum of products of two values.

    Args:
      pair: For each value its least and its largest code, less its zero point.
      terms: Number of products.
    """
    corners = [p * q for p in pair[0] for q in pair[1]]
    return terms * min(corners), terms * max(corners)


# Extremes: what is linear in codes has them where each code is at one of its ends.


def _check_offset(o: Operands) -> int:
    info = np.iinfo(o.x.dtype)
    wanted = 0 if info.min < 0 else (info.max + 1) // 2
    found = o["offset"]
    o.check(
        found == wanted, f"`offset` must be {wanted}, which centres {o.x.dtype}", found
    )
    return wanted


def _extremes(o: Operands, operation: Operation, shape: Shape, codes: Ends) -> Ends:
    """Computes the ends of an accumulator by the meaning of its operation.

    Codes at their least where the kernel is positive and at their largest where it is
    not give the least sum of a channel; the other way round, the largest.

    Args:
      o: The operands.
      operation: Linear in its codes.
      shape: Shape of the fewest codes that each channel sees once.
      codes: Their ends.
    """
    offset, kernel = _check_offset(o), o.params["kernel"]
    bias = o.params["bias"].astype(np.int64)
    top = max(abs(int(kernel.min(initial=0))), int(kernel.max(initial=0)))
    most = max(abs(end - offset) for end in codes) * top * max(kernel.size, 1)
    most = (most << o["shift"]) + int(np.abs(bias).max(initial=0))
    o.check(most < _MOST_SUM, "sums must stay below 2^62", most)
    sides = np.maximum(kernel, 0), np.minimum(kernel, 0)
    up, down = (side.astype(np.int64) for side in sides)

    def total(positive: int, negative: int) -> np.ndarray:
        parts = []
        for code, side in ((positive, up), (negative, down)):
            own = {"kernel": side, "bias": np.zeros((), np.int64)}
            full = np.broadcast_to(np.int64(code), shape)
            parts.append(operation.meaning(o.attributes, own, [full]))
        return parts[0] + parts[1] + bias

    return total(*codes), total(*codes[::-1])


# Contractions.


def _contraction(
    o: Operands, pair: Sequence[Shape], contract: Any, batch: Any
) -> Shape:
    """Returns batch axes, then the free axes of the first and of the second operand."""
    free: list[int] = []
    for shape, summed, own in zip(pair, contract, batch, strict=True):
        check_axes(o, (*summed, *own), len(shape))
        free += [n for d, n in enumerate(shape) if d not in (*summed, *own)]
    sides = [
        [shape[d] for d in (*own, *summed)]
        for shape, summed, own in zip(pair, contract, batch, strict=True)
    ]
    same = sides[0] == sides[1]
    o.check(same, "axes that are contracted must have the sizes", sides)
    return (*(pair[0][d] for d in batch[0]), *free)


def _dot_general(x: Any, y: Any, contract: Any, batch: Any) -> np.ndarray:
    names = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    left, right = ([""] * v.ndim for v in (x, y))
    for pair in (batch, contract):
        for i, j in zip(*pair, strict=True):
            left[i] = right[j] = next(names)
    free = []
    for axes in (left, right):
        for d, name in enumerate(axes):
            if not name:
                axes[d] = next(names)
                free.append(axes[d])
    out = [left[i] for i in batch[0]] + free
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", x, y)


def _dot_shape(o: Operands) -> Shape:
    pair = [o.x.shape, o.params["kernel"].shape]
    pair = pair[::-1] if o["kernel_operand"] == 0 else pair
    shape = _contraction(o, pair, o["contract"], o["batch"])
    return np.broadcast_shapes(shape, o.params["bias"].shape)


def _dot_interval(o: Operands) -> Ends:
    side, kernel = o["kernel_operand"], o.params["kernel"]
    shape = [1] * len(o.x.shape)
    for axes in (o["contract"], o["batch"]):
        for d, own in zip(axes[1 - side], axes[side], strict=True):
            shape[d] = kernel.shape[own]
    return _extremes(o, DOT, tuple(shape), (o.x.low, o.x.high))


def _dot(a, own, inputs):
    pair = (inputs[0] - a["offset"], own["kernel"])
    pair = pair[::-1] if a["kernel_operand"] == 0 else pair
    product = _dot_general(*pair, a["contract"], a["batch"])
    return product * 2 ** a["shift"] + own["bias"]


def _dot_codes_shape(o: Operands) -> Shape:
    return _contraction(o, o.shapes, o["contract"], o["batch"])


def _dot_codes(a, own, inputs):
    x, y = (x - z for x, z in zip(inputs, a["zero_points"], strict=True))
    return _dot_general(x, y, a["contract"], a["batch"])


def _of_two(o: Operands, terms: int) -> Ends:
    o.check_zero_points("zero_points", o["zero_points"])
    for x, z in zip(o.inputs, o["zero_points"], strict=True):
        o.check_distance(x, z)
    (a, b), (x, y) = o["zero_points"], o.inputs
    return product_ends([(x.low - a, x.high - a), (y.low - b, y.high - b)], terms)


def _dot_codes_interval(o: Operands) -> Ends:
    return _of_two(o, math.prod(o.x.shape[d] for d in o["contract"][0]))


# Convolutions.


def _conv_shape(o: Operands) -> Shape:
    kernel, rank = o.params["kernel"].shape, len(o.x.shape)
    for axes, there in zip(o["dimensions"], (rank, len(kernel), rank), strict=True):
        fits = sorted(axes) == list(range(there))
        o.check(fits, f"`dimensions` must order {there} axes each", o["dimensions"])
    o.check(len(kernel) == rank, f"the kernel must have {rank} axes", len(kernel))
    for name in ("strides", "padding", "input_dilation", "dilation"):
        fits = len(o[name]) == rank - 2
        o.check(fits, f"`{name}` must hold one for each of {rank - 2} axes", o[name])
    (b, c, *space), (out, into, *taps), order = o["dimensions"]
    groups, outs = o["groups"], kernel[out]
    fits = kernel[into] * groups == o.x.shape[c] and outs % groups == 0
    wanted = f"{groups} groups of the channels must fit the kernel"
    o.check(fits, wanted, [o.x.shape[c], [kernel[into], outs]])
    names = "strides", "padding", "input_dilation", "dilation"
    sizes, window = [o.x.shape[d] for d in space], [kernel[d] for d in taps]
    found = [o.x.shape[b], outs, *window_sizes(o, sizes, window, names)]
    shape = tuple(found[order.index(d)] for d in range(rank))
    return np.broadcast_shapes(shape, o.params["bias"].shape)


def _conv_interval(o: Operands) -> Ends:
    (b, c, *space), (out, into, *taps), _ = o["dimensions"]
    low, high, wanted = o.x.low, o.x.high, o.x.zero_point
    if any(map(any, o["padding"])) or any(n > 1 for n in o["input_dilation"]):
        found = o["padding_code"]
        o.check(found == wanted, f"`padding_code` must be {wanted}, zero", found)
        low, high = min(low, wanted), max(high, wanted)
    kernel = o.params["kernel"].shape
    shape = [1] * len(o.x.shape)
    shape[c] = kernel[into] * o["groups"]
    for d, tap, step in zip(space, taps, o["dilation"], strict=True):
        shape[d] = max((kernel[tap] - 1) * step + 1, 0)
    plain = {"padding": [[0, 0]] * len(taps), "input_dilation": [1] * len(taps)}
    alone = Operands({**o.attributes, **plain}, o.inputs, o.params)
    return _extremes(alone, CONV, tuple(shape), (low, high))


def _conv(a, own, inputs):
    lhs, rhs, out_spec = a["dimensions"]
    x = np.transpose(inputs[0], lhs)  # Batch, channels, spatial.
    k = np.transpose(own["kernel"], rhs)  # Out, in, spatial.
    pad = [(0, 0), (0, 0), *map(tuple, a["padding"])]
    x = spread(x, (1, 1, *a["input_dilation"]), a["padding_code"])
    x = pad_or_crop(x, pad, a["padding_code"]) - a["offset"]
    groups, outs = a["groups"], k.shape[0] // a["groups"]
    sizes = [
        max((n - (m - 1) * d - 1) // s + 1, 0)
        for n, m, d, s in zip(
            x.shape[2:], k.shape[2:], a["dilation"], a["strides"], strict=True
        )
    ]
    acc = np.zeros((x.shape[0], k.shape[0], *sizes), np.int64)
    for flat, tap in enumerate(np.ndindex(*k.shape[2:])):
        spatial: list[Any] = [
            slice(t * d, t * d + max((n - 1) * s + 1, 0), s)
            for t, d, n, s in zip(tap, a["dilation"], sizes, a["strides"], strict=True)
        ]
        seen = x[(slice(None), slice(None), *spatial)]
        seen = seen.reshape(len(x), groups, k.shape[1], *sizes)
        weights = k.reshape(groups, outs, k.shape[1], -1)[..., flat]
        part = np.einsum("ngc...,goc->ngo...", seen, weights)
        acc += part.reshape(acc.shape)
    acc = np.transpose(acc, np.argsort(out_spec))
    return acc * 2 ** a["shift"] + own["bias"]


# Elementwise products.


def _multiply_interval(o: Operands) -> Ends:
    shape = (1,) * len(o.x.shape)
    return _extremes(o, MULTIPLY, shape, (o.x.low, o.x.high))


def _multiply(a, own, inputs):
    product = (inputs[0] - a["offset"]) * own["kernel"]
    return product * 2 ** a["shift"] + own["bias"]


# Sums.


def _sum_shape(o: Operands) -> Shape:
    check_axes(o, o["axes"], len(o.x.shape))
    sizes = [o.x.shape[d] for d in o["axes"]]
    o.check(sizes == list(o["sizes"]), f"`sizes` must be {sizes}", o["sizes"])
    return tuple(n for d, n in enumerate(o.x.shape) if d not in o["axes"])


def _sum_interval(o: Operands) -> Ends:
    terms = math.prod(o.x.shape[d] for d in o["axes"])
    return terms * o.x.low + o["bias"], terms * o.x.high + o["bias"]


def _sum_pool_interval(o: Operands) -> Ends:
    low, high = o.x.low, o.x.high
    if any(map(any, o["padding"])) or any(n > 1 for n in o["base_dilation"]):
        low, high = min(low, o["padding_code"]), max(high, o["padding_code"])
    terms = math.prod(o["window"])
    return terms * low + o["bias"], terms * high + o["bias"]


def _running_sum_interval(o: Operands) -> Ends:
    """Returns the ends of sums of 1 to n terms, of which either may be the extreme."""
    terms, bias = o.x.shape[o["axis"]], o["bias"]
    low, high = (end - o["input_zero_point"] for end in (o.x.low, o.x.high))
    return min(low, terms * low) + bias, max(high, terms * high) + bias


def _running_sum(a: Mapping[str, Any], own: Any, xs: Sequence[np.ndarray]) -> Any:
    turn = slice(None, None, -1 if a["reverse"] else 1)
    x = np.moveaxis(xs[0] - a["input_zero_point"], a["axis"], 0)
    return np.moveaxis(x[turn].cumsum(0)[turn], 0, a["axis"]) + a["bias"]


def _reach_of_product(o: Operands, operation: str) -> tuple[int, int]:
    kernel, zero = o.params["kernel"], o.x.zero_point
    if not kernel.size:
        return 0, 0
    kernel = by_channel(operation, o.attributes, kernel)
    step = max(abs(o.x.low - zero), abs(o.x.high - zero))
    sums = np.abs(kernel).sum(tuple(range(kernel.ndim - 1)))
    return kernel.size // max(kernel.shape[-1], 1), step * int(sums.max(initial=0))


_PRODUCT = {"offset": INTEGER, "shift": LEFT}
_CONTRACTION = {"contract": SIDES, "batch": SIDES}
_ROLES = ("kernel", "bias")

DOT = Operation(
    "dot",
    "acc = (sum((q - offset) * kernel) << shift) + bias",
    "accumulator",
    _dot_shape,
    _dot_interval,
    _dot,
    attributes={"kernel_operand": OPERAND, **_CONTRACTION, **_PRODUCT},
    roles=_ROLES,
    reach=lambda o: _reach_of_product(o, "dot"),
)
CONV = Operation(
    "conv",
    "acc = (sum((q - offset) * kernel) << shift) + bias, padding with padding_code",
    "accumulator",
    _conv_shape,
    _conv_interval,
    _conv,
    attributes={
        "strides": SIZES,
        "padding": PAIRS,
        "input_dilation": SIZES,
        "dilation": SIZES,
        "groups": SIZE,
        "dimensions": AXIS_LISTS,
        "padding_code": INTEGER,
        **_PRODUCT,
    },
    roles=_ROLES,
    reach=lambda o: _reach_of_product(o, "conv"),
)
MULTIPLY = Operation(
    "multiply",
    "acc = ((q - offset) * kernel << shift) + bias",
    "accumulator",
    broadcast_shape,
    _multiply_interval,
    _multiply,
    attributes=_PRODUCT,
    roles=_ROLES,
)
DOT_CODES = Operation(
    "dot_codes",
    "acc = sum((a - zero_points[0]) * (b - zero_points[1]))",
    "accumulator",
    _dot_codes_shape,
    _dot_codes_interval,
    _dot_codes,
    inputs=2,
    attributes={"zero_points": INTEGERS, **_CONTRACTION},
    each_input=("zero_points",),
    reach=lambda o: (math.prod(o.x.shape[d] for d in o["contract"][0]), 0),
)
MULTIPLY_CODES = Operation(
    "multiply_codes",
    "acc = (a - zero_points[0]) * (b - zero_points[1])",
    "accumulator",
    broadcast_shape,
    lambda o: _of_two(o, 1),
    lambda a, own, xs: (xs[0] - a["zero_points"][0]) * (xs[1] - a["zero_points"][1]),
    inputs=2,
    attributes={"zero_points": INTEGERS},
    each_input=("zero_points",),
)
SUM = Operation(
    "sum",
    "acc = sum(q) + bias",
    "accumulator",
    _sum_shape,
    _sum_interval,
    lambda a, own, xs: xs[0].sum(tuple(a["axes"])) + a["bias"],
    attributes={"axes": AXES, "sizes": INTEGERS, "bias": WIDE},
    optional={"padding_code": INTEGER},
    reach=lambda o: (math.prod(o["sizes"]), 0),
)
RUNNING_SUM = Operation(
    "running_sum",
    "acc = sum(q - input_zero_point) + bias, of all up to each place of an axis",
    "accumulator",
    same_shape,
    _running_sum_interval,
    _running_sum,
    attributes={
        "axis": AXIS,
        "reverse": FLAG,
        "input_zero_point": INTEGER,
        "bias": WIDE,
    },
    reach=lambda o: (o.x.shape[o["axis"]], 0),
)
SUM_POOL = Operation(
    "sum_pool",
    "acc = sum(q) + bias over a window, padding with padding_code",
    "accumulator",
    pool_shape,
    _sum_pool_interval,
    lambda a, own, xs: sum(window_taps(a, xs[0], a["padding_code"])) + a["bias"],
    attributes={"bias": WIDE, "padding_code": INTEGER, **WINDOW},
    each_axis=tuple(WINDOW),
    reach=lambda o: (math.prod(o["window"]), 0),
)

PRODUCTS = (
    DOT,
    CONV,
    MULTIPLY,
    DOT_CODES,
    MULTIPLY_CODES,
    SUM,
    SUM_POOL,
    RUNNING_SUM,
)
