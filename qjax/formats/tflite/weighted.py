"""Products with weights as TFLite operators: convolutions, dense layers, pools."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite.emission import WRITER, Pending, TfliteGraph
from qjax.formats.tflite.rescalings import after, finish, weights
from qjax.formats.tflite.written_moves import padding, pool_options
from qjax.graph.graph import Node
from qjax.graph.tflite_tables import Codes


def conv(emission: TfliteGraph, node: Node, pending: Pending) -> None:
    """Writes CONV_2D, DEPTHWISE_CONV_2D or TRANSPOSE_CONV."""
    made = pending.node
    a, x = made.attributes, made.inputs[0]
    own = emission.codes(x, made)
    features, kernels, outs = a["dimensions"]
    rank = len(features) - 2
    if rank not in (1, 2) or a["shift"] or a["padding_code"] != own.zero_point:
        what = f"a convolution of {rank} axes" if rank not in (1, 2) else "its padding"
        raise unsupported(WRITER, made, what)
    kernel = emission.params[made.params["kernel"]].astype(np.int64)
    kernel = kernel.transpose(kernels[0], *kernels[2:], kernels[1])  # [out, ..., in]
    bias = _bias(emission, made, kernel.sum(tuple(range(1, kernel.ndim))), own)
    t = emission.transposed(
        emission.tensor(x, made), [features[0], *features[2:], features[1]]
    )
    names = ("strides", "dilation", "input_dilation", "padding")
    steps, dilation, spread, pads = (list(a[name]) for name in names)
    if rank == 1:  # One row.
        n, size, channels = emission.tensors[t].shape
        t, kernel = emission.reshaped(t, (n, 1, size, channels)), kernel[:, None]
        steps, dilation, spread = [1, *steps], [1, *dilation], [1, *spread]
        pads = [[0, 0], *pads]
    shape = emission.value(made.output).shape
    wanted = [shape[d] for d in (outs[0], *outs[2:], outs[1])]
    whole = wanted if rank == 2 else [wanted[0], 1, *wanted[1:]]
    move = after(emission, pending)

    def moves(t: int) -> int:
        t = emission.reshaped(t, wanted)
        order = [outs[0], *outs[2:], outs[1]]
        back = [order.index(d) for d in range(len(order))]
        return move(emission.transposed(t, back))

    if spread != [1, 1]:
        own_steps = (steps, dilation, spread, pads)
        _transposed(emission, node, pending, t, kernel, bias, whole, own_steps, moves)
        return
    taps = kernel.shape[1:3]
    reach = [(n - 1) * d + 1 for n, d in zip(taps, dilation, strict=True)]
    sizes = emission.tensors[t].shape[1:3]
    kind = padding(sizes, reach, steps, [(p[0], p[1]) for p in pads])
    if kind is None:
        t, kind = _padded(emission, made, t, pads), "VALID"
    options: dict[str, Any] = {
        "padding": kind,
        "stride_h": steps[0],
        "stride_w": steps[1],
        "dilation_h_factor": dilation[0],
        "dilation_w_factor": dilation[1],
    }
    channels = emission.tensors[t].shape[3]
    is_depthwise = a["groups"] == channels and kernel.shape[3] == 1 and channels > 1
    name, axis = "CONV_2D", 0
    if is_depthwise:
        name, axis = "DEPTHWISE_CONV_2D", 3
        if own.is_wide:
            raise unsupported(WRITER, made, "a depthwise convolution of 16 bits")
        options["depth_multiplier"] = kernel.shape[0] // channels
        kernel = kernel.transpose(3, 1, 2, 0)
    w, b = weights(emission, node, pending, kernel, bias, own, axis)
    options |= {} if is_depthwise else _of_bias(own)
    finish(emission, node, name, (t, w, b), whole, moves=moves, **options)


def window_sum(emission: TfliteGraph, node: Node, pending: Pending) -> None:
    """Writes the sums of a pool as a depthwise convolution with weights of one.

    AVERAGE_POOL_2D keeps the grid of its input, and so rounds once more.
    """
    made = pending.node
    a, own = made.attributes, emission.codes(made.inputs[0], made)
    if (
        pool_options(emission, made)["padding"] == "SAME"
        and a["padding_code"] != own.zero_point
    ):
        raise unsupported(WRITER, made, "its padding")
    channels = emission.value(made.output).shape[3]
    whole = [0, 3, 1, 2]
    attributes = {
        "dimensions": [whole, [0, 1, 2, 3], whole],
        "groups": channels,
        "strides": a["strides"][1:3],
        "padding": [list(p) for p in a["padding"][1:3]],
        "padding_code": own.zero_point,
        "dilation": [1, 1],
        "input_dilation": [1, 1],
        "offset": 0,
        "shift": 0,
    }
    names = {role: f"{node.path}/{role}" for role in ("kernel", "bias")}
    ones = np.ones((channels, 1, *a["window"][1:3]), np.int8)
    arrays = {names["kernel"]: ones, names["bias"]: np.full(channels, a["bias"])}
    emission.params = {**emission.params, **arrays}
    product = dataclasses.replace(
        made, operation="conv", attributes=attributes, params=names
    )
    conv(emission, node, dataclasses.replace(pending, node=product))


def _of_bias(x: Codes) -> dict[str, Any]:
    """Returns the option by which a kernel of 16 bits takes a bias of 32."""
    return {"quantized_bias_type": "INT32"} if x.is_wide else {}


def _bias(emission: TfliteGraph, made: Node, total: np.ndarray, x: Any) -> np.ndarray:
    """Returns the bias of a product, less what the zero point of its input adds."""
    folded = emission.params[made.params["bias"]].astype(np.int64)
    if folded.size not in (1, total.size):
        raise unsupported(WRITER, made, "a bias that differs by place")
    offset = made.attributes["offset"]
    return folded.reshape(-1) + (x.zero_point - offset) * total


def _padded(emission: TfliteGraph, made: Node, t: int, pads: Sequence[Any]) -> int:
    """Pads rows and columns with the code of zero, by an operator before."""
    if min(n for pair in pads for n in pair) < 0:
        raise unsupported(WRITER, made, f"padding {pads}, which crops")
    widths = [[0, 0], *([p[0], p[1]] for p in pads), [0, 0]]
    shape = emission.tensors[t].shape
    sizes = [n + sum(p) for n, p in zip(shape, widths, strict=True)]
    out = emission.add_like(t, sizes, f"{made.path}/pad")
    return emission.add("PAD", (t, emission.constant(widths)), out)


def _transposed(
    emission: TfliteGraph,
    node: Node,
    pending: Pending,
    t: int,
    kernel: np.ndarray,
    bias: np.ndarray,
    shape: Sequence[int],
    axes: tuple[list[Any], ...],
    moves: Any,
) -> None:
    """Writes TRANSPOSE_CONV: codes spread by the stride, and the flipped kernel."""
    made, (steps, dilation, spread, pads) = pending.node, axes
    if steps != [1, 1] or dilation != [1, 1] or made.attributes["groups"] != 1:
        raise unsupported(WRITER, made, "a transposed convolution with groups or steps")
    before = [n - 1 - p[0] for n, p in zip(kernel.shape[1:3], pads, strict=True)]
    kind = None
    own = list(zip(shape[1:3], kernel.shape[1:3], spread, strict=True))
    totals = [max((-(-n // step) - 1) * step + taps - n, 0) for n, taps, step in own]
    if before == [0, 0]:
        kind = "VALID"
    if before == [total // 2 for total in totals]:
        kind = "SAME"
    if kind is None:
        what = f"a transposed convolution with padding {pads}"
        raise unsupported(WRITER, made, what)
    x = emission.codes(made.inputs[0], made)
    flipped = kernel[:, ::-1, ::-1]
    w, b = weights(emission, node, pending, flipped, bias, x, 0)
    emission.kernels.remove(w)  # The kernel takes no weights of 4 bits.
    sizes = emission.constant(list(shape))
    options: Any = {"padding": kind, "stride_h": spread[0], "stride_w": spread[1]}
    options |= _of_bias(x)
    given = (sizes, w, t, b)
    finish(emission, node, "TRANSPOSE_CONV", given, shape, moves=moves, **options)


def dense(emission: TfliteGraph, node: Node, pending: Pending) -> None:
    """Writes FULLY_CONNECTED."""
    made = pending.node
    a, x = made.attributes, made.inputs[0]
    side, own = a["kernel_operand"], emission.codes(x, made)
    if a["batch"][0] or a["shift"]:
        raise unsupported(WRITER, made, "weights that differ by example")
    kernel = emission.params[made.params["kernel"]].astype(np.int64)
    summed, of_kernel = a["contract"][1 - side], a["contract"][side]
    free = [d for d in range(kernel.ndim) if d not in of_kernel]
    sizes = [kernel.shape[d] for d in free]
    taps = math.prod(kernel.shape[d] for d in of_kernel)
    flat = kernel.transpose(*free, *of_kernel).reshape(math.prod(sizes), taps)
    bias = _bias(emission, made, flat.sum(1), own)
    t = emission.tensor(x, made)
    shape = emission.tensors[t].shape
    kept = [d for d in range(len(shape)) if d not in summed]
    t = emission.transposed(t, [*kept, *summed])
    rows = [shape[d] for d in kept]
    t = emission.reshaped(t, [*(rows or [1]), taps])
    w, b = weights(emission, node, pending, flat, bias, own, 0)
    move = after(emission, pending)

    def moves(t: int) -> int:
        t = emission.reshaped(t, [*rows, *sizes])
        if side == 0:  # The axes of the kernel come first.
            count = len(rows)
            order = [*range(count, count + len(sizes)), *range(count)]
            t = emission.transposed(t, order)
        return move(t)

    whole = [*(rows or [1]), len(flat)]
    options: Any = {"keep_num_dims": len(whole) != 2, "weights_format": 0}
    options |= _of_bias(own)
    finish(emission, node, "FULLY_CONNECTED", (t, w, b), whole, moves=moves, **options)
