"""Requantizers of a program as the TFLite operators that compute the same codes.

An operator derives its multiplier from scales. Those of weights are found here from the
multiplier of the program, and accepted if they give it back bit for bit, or the same
code for every accumulator.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite.emission import (
    OPTION,
    REMEDY,
    WRITER,
    Pending,
    TfliteGraph,
    activation,
    is_close,
)
from qjax.formats.tflite.proofs import Pair, check_pair, is_near, is_same
from qjax.formats.tflite.written_moves import MOVES, pool_options
from qjax.graph.graph import Node
from qjax.graph.operations import OPERATIONS
from qjax.graph.tflite_tables import Codes
from qjax.integer_tflite import (
    Kind,
    left_shift,
    mean_multiplier,
    product_ratio,
    signed_multiplier,
    sum_multipliers,
)

_INT32 = np.iinfo(np.int32)
_CHOICES = ("max", "max_pool", "min")  # Moves that keep some of their integers.


# Operators with fused activations.


def finish(
    emission: TfliteGraph,
    node: Node,
    name: str,
    inputs: Sequence[int],
    shape: Sequence[int],
    *,
    moves: Callable[[int], int] = lambda t: t,
    is_fused: bool = True,
    **options: Any,
) -> None:
    """Adds an operator and what bounds and moves its codes.

    Args:
      emission: Receives them.
      node: The node that rounds; its ends bound the codes.
      name: The operator.
      inputs: Its tensors.
      shape: Shape of its output.
      moves: From its output to the tensor of the node.
      is_fused: Whether the operator has a fused activation.
      **options: Its options.
    """
    y = emission.codes(node.output, node)
    ends = node.attributes["low"], node.attributes["high"]
    found = activation(ends, y) if is_fused else None
    if is_fused:
        options["fused_activation_function"] = found or "NONE"
    value = emission.value(node.output)
    grid = (float(y.scale),), (y.zero_point,)
    out = emission.add_tensor(node.path or name.lower(), shape, value.dtype, *grid)
    t = moves(emission.add(name, inputs, out, **options))
    if found is None:
        t = emission.clipped(t, ends, y, node.path)
    emission.place(node.output, t, node.path)


def of_codes(emission: TfliteGraph, node: Node) -> None:
    """Writes a step from grid to grid: QUANTIZE, or a RELU whose ratio is float32."""
    x = node.inputs[0]
    t, own = emission.tensor(x, node), emission.codes(x, node)
    y, shape = emission.codes(node.output, node), emission.value(x).shape
    pair = signed_multiplier(product_ratio("codes", [own.scale], y.scale))
    ends = node.attributes["low"], node.attributes["high"]
    name = activation(ends, y)
    if not is_same(emission, node, pair, "tflite_double") and name not in (
        None,
        "NONE",
    ):
        ratio = np.float64(own.scale / y.scale)
        check_pair(emission, node, signed_multiplier(ratio), "tflite_double")
        out = emission.add_value(node.output, node.path)
        emission.add(str(name), (t,), out)
        return
    check_pair(emission, node, pair, "tflite_double")
    finish(emission, node, "QUANTIZE", (t,), shape, is_fused=False)


# Products with weights.


def weights(
    emission: TfliteGraph,
    node: Node,
    pending: Pending,
    kernel: np.ndarray,
    bias: np.ndarray,
    x: Codes,
    axis: int,
) -> tuple[int, int]:
    """Adds the weights and the bias of a product, on scales that give its multiplier.

    Args:
      emission: Receives them.
      node: The requantizer.
      pending: The product.
      kernel: Weights as the operator has them, int64.
      bias: One number per channel, int64, zero points not within.
      x: Codes of the input.
      axis: Axis of the channels in ``kernel``.

    Returns:
      The tensors of weights and bias.
    """
    count = kernel.shape[axis]
    kind: Kind = "dot" if pending.node.operation == "dot" else "conv"
    own = by_channel(emission, node, pending, count)
    sign = np.sign(own[0])
    shape = [1] * kernel.ndim
    shape[axis] = count
    kernel, bias = kernel * sign.reshape(shape), bias * sign
    pair = np.abs(own[0]), own[1]
    y = emission.codes(node.output, node)
    scale = _weight_scale(emission, node, kind, pair, x, y)
    ends = np.iinfo(np.int8)
    if kernel.size and not (ends.min <= kernel.min() and kernel.max() <= ends.max):
        raise unsupported(WRITER, node, "weights beyond 8 bits")
    if np.any(np.abs(bias) > _INT32.max):
        raise unsupported(WRITER, node, "a bias of more than 32 bits")
    made, zeros = pending.node, (0,) * scale.size
    name, dtype, middle = made.params["kernel"], "int8", 0
    if not x.low and not x.is_wide:  # Of uint8: weights are, too.
        dtype, middle = "uint8", 128
        if scale.size > 1:
            raise unsupported(WRITER, node, "codes of uint8 times weights by channel")
    named: Any = {"axis": axis if scale.size > 1 else 0}
    data = (kernel + middle).astype(dtype)
    grid = tuple(scale.tolist()), (middle,) * scale.size
    w = emission.add_tensor(name, kernel.shape, dtype, *grid, data=data, **named)
    emission.kernels.append(w)
    units = np.float32(scale) * x.scale
    grid = tuple(units.tolist()), zeros
    data = bias.astype(np.int32)
    b = emission.add_tensor(made.params["bias"], (count,), "int32", *grid, data=data)
    return w, b


def by_channel(
    emission: TfliteGraph, node: Node, pending: Pending, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns multiplier and shift of each channel of a product, int64.

    Args:
      emission: The graph.
      node: The requantizer.
      pending: The product, and how its accumulators move.
      count: Number of channels.

    Raises:
      ValueError: if the places of a channel have several.
    """
    params = [emission.params[node.params[k]] for k in ("multiplier", "shift")]
    is_choice = any(move.operation in _CHOICES for move in pending.moves)
    if is_choice and np.any(params[0] < 0):
        raise unsupported(WRITER, node, "a maximum times a negative number")
    if all(p.size == 1 for p in params):
        one, places = (np.full(count, int(p.reshape(-1)[0])) for p in params)
        return one, places
    at = _channels(emission, pending, count)
    found = []
    for p, dead in zip(params, (0, 31), strict=True):
        whole = np.broadcast_to(p, at.shape).astype(np.int64)
        own = np.full(count, dead, np.int64)
        own[at] = whole
        if not np.array_equal(own[at], whole):
            raise unsupported(WRITER, node, "multipliers that differ by place")
        found.append(own)
    return found[0], found[1]


def _channels(emission: TfliteGraph, pending: Pending, count: int) -> np.ndarray:
    """Returns the channel of each place of an accumulator where it is rescaled."""
    made = pending.node
    shape, a = emission.value(made.output).shape, made.attributes
    if made.operation == "conv":
        sizes = [1] * len(shape)
        sizes[a["dimensions"][2][1]] = count
    else:
        side = a["kernel_operand"]
        kernel = emission.params[made.params["kernel"]].shape
        free = [n for d, n in enumerate(kernel) if d not in a["contract"][side]]
        rest = len(shape) - len(free)
        sizes = [*free, *[1] * rest] if side == 0 else [*[1] * rest, *free]
    at = np.broadcast_to(np.arange(count).reshape(sizes), shape)
    for move in pending.moves:
        meaning = OPERATIONS[move.operation].meaning
        own = {role: emission.params[name] for role, name in move.params.items()}
        at = meaning(move.attributes, own, [at])
    return at


def _weight_scale(
    emission: TfliteGraph, node: Node, kind: Kind, pair: Pair, x: Codes, y: Codes
) -> np.ndarray:
    """Finds the scales of weights from which a kernel computes a multiplier.

    Returns:
      float32, one, or one per channel.

    Raises:
      ValueError: if there are none.
    """
    rule = "tflite_double"
    if kind == "dot" and node.attributes["rule"] != rule:
        rule = "tflite_single"  # LiteRT's, and tflite-micro has the other one.
    ratio = np.ldexp(pair[0].astype(np.float64), -pair[1].astype(np.int64))
    ideal = (ratio * np.float64(y.scale) / np.float64(x.scale)).astype(np.float32)
    live = pair[0] != 0
    is_one = live.any() and all(np.all(own == own[0]) for own in pair)
    if is_one:
        one = pair[0][:1], pair[1][:1]
        for near in _near(ideal[:1]):
            found = signed_multiplier(product_ratio(kind, [near, x.scale], y.scale))
            if is_same(emission, node, found, rule, one):
                return near
    best, done = np.where(live, ideal, np.float32(1)), ~live
    for near in _near(ideal):
        wide = np.float64(x.scale) * np.float64(near) / np.float64(y.scale)
        found = signed_multiplier(np.where(live, wide, 0))
        hits = (found[0] == pair[0]) & (found[1] == pair[1]) & ~done
        best, done = np.where(hits, near, best), done | hits
    wide = np.float64(x.scale) * np.float64(best) / np.float64(y.scale)
    found = signed_multiplier(np.where(live, wide, 0))
    if is_one and not is_same(emission, node, found, rule, pair):
        best = ideal[:1]
        found = signed_multiplier(product_ratio(kind, [best, x.scale], y.scale))
    check_pair(emission, node, found, rule, pair)
    return best


def _near(x: np.ndarray) -> list[np.ndarray]:
    """Returns numbers and their neighbours of float32, nearest first."""
    found, up, down = [x], x, x
    for _ in range(3):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, -up)
        found += [up, down]
    return [np.abs(n).astype(np.float32) for n in found]


def after(emission: TfliteGraph, pending: Pending) -> Callable[[int], int]:
    """Returns how the codes of an accumulator move before a requantizer's value."""

    def moved(t: int) -> int:
        for move in pending.moves:
            t = MOVES[move.operation](emission, move, t)
        return t

    return moved


# Other accumulators.


def of_two(emission: TfliteGraph, node: Node, pending: Pending) -> None:
    """Writes MUL or BATCH_MATMUL."""
    made = pending.node
    given = [emission.tensor(v, made) for v in made.inputs]
    codes = [emission.codes(v, made) for v in made.inputs]
    y = emission.codes(node.output, node)
    kind: Kind = "dot_codes" if made.operation == "dot_codes" else "multiply_codes"
    ratio = product_ratio(kind, [c.scale for c in codes], y.scale)
    check_pair(emission, node, signed_multiplier(ratio), "tflite_double")
    moves = after(emission, pending)
    shape = emission.value(made.output).shape
    if kind == "multiply_codes":
        finish(emission, node, "MUL", given, shape, moves=moves)
        return
    if y.is_wide:
        raise unsupported(WRITER, node, "a product of two values of 16 bits")
    flat = [_as_matrices(emission, made, side, t) for side, t in enumerate(given)]
    batch = emission.tensors[flat[0]].shape[:-2]
    rows, columns = (emission.tensors[t].shape[-2] for t in flat)
    own: dict[str, Any] = {"adj_x": False, "adj_y": True, "is_fused": False}
    own["moves"] = lambda t: moves(emission.reshaped(t, shape, node.path))
    finish(emission, node, "BATCH_MATMUL", flat, (*batch, rows, columns), **own)


def _as_matrices(emission: TfliteGraph, made: Node, side: int, t: int) -> int:
    """Returns an operand with axes of the batch, what is free and what is summed."""
    a, shape = made.attributes, emission.tensors[t].shape
    batch, summed = a["batch"][side], a["contract"][side]
    free = [d for d in range(len(shape)) if d not in (*batch, *summed)]
    t = emission.transposed(t, [*batch, *free, *summed])
    sizes = [math.prod(shape[d] for d in axes) for axes in (free, summed)]
    return emission.reshaped(t, [*(shape[d] for d in batch), *sizes])


def total(emission: TfliteGraph, node: Node, pending: Pending) -> None:
    """Writes MEAN or SUM."""
    made = pending.node
    x = made.inputs[0]
    t, own = emission.tensor(x, made), emission.codes(x, made)
    y, a = emission.codes(node.output, node), made.attributes
    taps = math.prod(a["sizes"])
    if a["bias"] != -taps * own.zero_point:
        raise unsupported(WRITER, made, "a constant that a sum adds")
    ratio = product_ratio("sum", [own.scale], y.scale)
    pairs = {
        name: mean_multiplier(ratio, n) for name, n in (("MEAN", taps), ("SUM", 1))
    }
    given = emission, node
    for accept, (name, pair) in itertools.product((is_same, is_near), pairs.items()):
        if accept(*given, pair, "tflite_double"):
            check_pair(*given, pair, "tflite_double")
            axes = emission.constant(a["axes"])
            shape = emission.value(made.output).shape
            options: Any = {"keep_dims": False, "is_fused": False}
            options["moves"] = after(emission, pending)
            finish(emission, node, name, (t, axes), shape, **options)
            return
    raise unsupported(WRITER, node, REMEDY)


def add(emission: TfliteGraph, node: Node) -> None:
    """Writes ADD or SUB of TFLite's own sums."""
    a = node.attributes
    given = [emission.tensor(v, node) for v in node.inputs]
    codes = [emission.codes(v, node) for v in node.inputs]
    y = emission.codes(node.output, node)
    first, second, last = sum_multipliers(
        codes[0].scale, codes[1].scale, y.scale, a["left_shift"]
    )
    sign = -1 if a["multipliers"][1] < 0 else 1
    own = [int(first[0]), sign * int(second[0])], [int(first[1]), int(second[1])]
    wanted = a["multipliers"], a["shifts"], a["multiplier"], a["shift"], a["rule"]
    if (*own, int(last[0]), int(last[1]), "tflite_double") != (
        list(wanted[0]),
        list(wanted[1]),
        *wanted[2:],
    ):
        raise unsupported(WRITER, node, REMEDY)
    shape = emission.value(node.output).shape
    name = "ADD" if sign > 0 else "SUB"
    finish(emission, node, name, given, shape, pot_scale_int16=False)


def add_once(emission: TfliteGraph, node: Node) -> None:
    """Writes a sum that rounds once, if TFLite's code of each pair does."""
    a = node.attributes
    codes = [emission.codes(v, node) for v in node.inputs]
    signs = [-1 if m < 0 else 1 for m in a["multipliers"]]
    is_short = len(codes) == 2 and not any(c.is_wide for c in codes)
    if not is_short or signs[0] < 0:
        raise unsupported(WRITER, node, REMEDY)
    y, left = emission.codes(node.output, node), left_shift(False)
    *pairs, last = sum_multipliers(codes[0].scale, codes[1].scale, y.scale, left)
    own = {
        "left_shift": left,
        "zero_points": a["input_zero_points"],
        "multipliers": [int(m) * n for (m, _), n in zip(pairs, signs, strict=True)],
        "shifts": [int(n) for _, n in pairs],
        "multiplier": int(last[0]),
        "shift": int(last[1]),
        "rule": "tflite_double",
        **{name: a[name] for name in ("zero_point", "low", "high")},
    }
    values = [emission.value(v) for v in node.inputs]
    first, second = (np.arange(v.low, v.high + 1, dtype=np.int64) for v in values)
    given = [first[:, None], second]
    wanted = OPERATIONS["add"].meaning(a, {}, given)
    found = OPERATIONS["tflite_add"].meaning(own, {}, given)
    if not np.array_equal(found, wanted):
        close = is_close(found, wanted)
        if emission.is_exact or not close:
            raise unsupported(WRITER, node, OPTION if close else REMEDY)
    add(emission, dataclasses.replace(node, attributes=own))


def average(emission: TfliteGraph, node: Node) -> None:
    """Writes AVERAGE_POOL_2D."""
    pending = emission.pending.get(node.inputs[0])
    if pending is None or pending.node.operation != "sum_pool" or pending.moves:
        raise unsupported(WRITER, node, "an average of no window")
    made = pending.node
    x = made.inputs[0]
    own, y = emission.codes(x, made), emission.codes(node.output, node)
    if own != y or made.attributes["bias"]:
        raise unsupported(WRITER, node, "an average on another grid than its codes")
    options = pool_options(emission, made)
    shape = emission.value(node.output).shape
    given = (emission.tensor(x, made),)
    finish(emission, node, "AVERAGE_POOL_2D", given, shape, **options)
