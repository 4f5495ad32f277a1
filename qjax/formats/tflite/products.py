"""Rules of the TFLite operators that multiply by weights or multiply two tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.formats.tflite.tensors import Call, TfliteRule
from qjax.graph import tflite_tables as tables
from qjax.graph.operations.products import channel_ends, product_ends
from qjax.graph.tflite_tables import Codes
from qjax.integer import RequantizeRule, fixed_point
from qjax.integer_tflite import tflite_multiplier

_INT32 = np.iinfo(np.int32)


# Rescaling.


class Rescaling(NamedTuple):
    """A factor ``multiplier * 2^-shift``, and the rounding rule of its product."""

    multiplier: Any
    shift: Any
    rule: RequantizeRule


def exact_rescaling(call: Call, ratio: Any) -> Rescaling:
    """Writes a ratio with 31 bits."""
    return Rescaling(*tflite_multiplier(ratio), call.growth.rules.integer)


def _short(ratio: Any) -> Rescaling:
    """Writes a ratio with 15 bits, for accumulators of 64 bits."""
    multiplier, shift = tflite_multiplier(ratio)
    return Rescaling(tables.reduced(multiplier), shift - 16, "tflite_single")


def float_rescaling(ratio: Any) -> Rescaling:
    """Writes a ratio in float32, as XNNPACK computes it."""
    return Rescaling(*fixed_point(ratio), "fp32_half_even")


def byte_rescaling(ratio: np.float32) -> Rescaling:
    """Writes a ratio in units of 1/256, as XNNPACK does between two grids."""
    return Rescaling(np.rint(ratio * np.float32(256)), 8, "tflite_single")


def add_requantize(
    call: Call,
    acc: int,
    rescaling: Rescaling,
    ends: tuple[int, int],
    zero_point: int = 0,
) -> None:
    """Requantizes accumulators about their zero point to the codes of the output."""
    params = {
        "multiplier": np.asarray(rescaling.multiplier, np.int32),
        "shift": np.asarray(rescaling.shift, np.int32),
    }
    call.emit(
        "requantize",
        (acc,),
        params=params,
        input_zero_point=zero_point,
        zero_point=call.y.zero_point,
        low=ends[0],
        high=ends[1],
        rule=rescaling.rule,
    )


# Products with weights.


def _conv(call: Call) -> None:
    x, w = call.tensor().shape, call.tensor(1).shape
    depthwise = call.op.name == "DEPTHWISE_CONV_2D"
    steps = strides(call)
    dilation = [int(call.option(f"dilation_{d}_factor", 1)) for d in "hw"]
    spatial = zip(x[1:3], w[1:3], steps, dilation, strict=True)
    sizes, pads = zip(*(window(call, *axis) for axis in spatial), strict=True)
    attributes = _conv_attributes(
        (3, 0, 1, 2) if depthwise else (0, 3, 1, 2),
        strides=steps,
        dilation=dilation,
        padding=list(pads),
        groups=x[3] if depthwise else x[3] // w[3],
    )
    channel = 3 if depthwise else 0
    shape = (x[0], *sizes, w[channel])
    _product(call, "conv", _kernel(call), channel, attributes, shape)


def _transpose_conv(call: Call) -> None:
    """Computes a convolution of codes spread by the stride with the flipped kernel."""
    x, w, sizes = call.tensor(2).shape, call.tensor(1).shape, call.constant(0).tolist()
    steps, pads = strides(call), []
    for size, out, taps, step in zip(x[1:3], sizes[1:3], w[1:3], steps, strict=True):
        _, (before, _) = window(call, out, taps, step)
        low = taps - 1 - before
        pads.append([low, out + taps - 2 - low - (size - 1) * step])
    attributes = _conv_attributes(
        (0, 3, 1, 2), input_dilation=steps, padding=pads, groups=1
    )
    kernel = _kernel(call)[:, ::-1, ::-1]
    shape = (x[0], *sizes[1:3], w[0])
    _product(call, "conv", kernel, 0, attributes, shape, source=2, bias=3)


def strides(call: Call) -> list[int]:
    """Returns the strides of a window: rows, columns."""
    return [int(call.option(f"stride_{d}", 1)) for d in "hw"]


def window(
    call: Call, size: int, taps: int, stride: int, dilation: int = 1
) -> tuple[int, list[int]]:
    """Returns how often a window fits along an axis, and the padding at both ends."""
    reach = (taps - 1) * dilation + 1
    if call.option("padding", "SAME", "SAME", "VALID") == "VALID":
        return (size - reach) // stride + 1, [0, 0]
    out = -(-size // stride)
    total = max((out - 1) * stride + reach - size, 0)
    return out, [total // 2, total - total // 2]  # The larger half comes last.


def _conv_attributes(kernel: Sequence[int], **attributes: Any) -> dict[str, Any]:
    defaults = {"strides": [1, 1], "input_dilation": [1, 1], "dilation": [1, 1]}
    features = [0, 3, 1, 2]
    return defaults | attributes | {"dimensions": [features, list(kernel), features]}


def _fully_connected(call: Call) -> None:
    call.option("weights_format", "DEFAULT", "DEFAULT", 0)
    kernel, shape = _kernel(call), call.tensor().shape
    if not call.option("keep_num_dims", False):
        shape = (math.prod(shape) // kernel.shape[1], kernel.shape[1])
    attributes = {
        "contract": [[len(shape) - 1], [1]],
        "batch": [[], []],
        "kernel_operand": 1,
    }
    value = call.reshaped(call.value(), shape)
    out = (*shape[:-1], kernel.shape[0])
    _product(call, "dot", kernel, 0, attributes, out, value=value)


def _kernel(call: Call) -> np.ndarray:
    """Returns weights less their zero points, int64."""
    t = call.tensor(1)
    if not t.scale:
        raise call.refuse(f"weights {t.name!r} of type {t.dtype} without a scale")
    zero_point = np.asarray(t.zero_point, np.int64)
    shape = [1] * len(t.shape)
    shape[t.axis] = -1
    return call.constant(1).astype(np.int64) - zero_point.reshape(shape)


def _product(
    call: Call,
    operation: str,
    kernel: np.ndarray,
    channel: int,
    attributes: Mapping[str, Any],
    shape: Sequence[int],
    *,
    source: int = 0,
    bias: int = 2,
    value: int | None = None,
) -> None:
    """Adds a product with weights, its bias, and the rescaling of the accumulator."""
    value = call.value(source) if value is None else value
    x, v = call.codes(source), call.known(value)
    added = np.zeros(kernel.shape[channel], np.int64)
    is_wide = x.is_wide
    if call.has(bias):
        added = call.constant(bias).astype(np.int64)
        is_wide = is_wide and call.tensor(bias).dtype == "int64"
    over = tuple(d for d in range(kernel.ndim) if d != channel)
    ends = channel_ends(kernel, over, (v.low - x.zero_point, v.high - x.zero_point))
    low, high = (end.reshape(-1) + added for end in ends)
    offset = 128 if v.dtype == "uint8" else 0
    folded = added - (x.zero_point - offset) * kernel.sum(over)
    check_overflow(call, low, high, folded)
    per_channel = lambda a: np.reshape(a, [1] * (len(shape) - 1) + [-1])
    is_byte = np.abs(kernel).max(initial=0) < 128
    if operation == "conv":
        attributes = {**attributes, "padding_code": x.zero_point}
    acc = call.add(
        operation,
        (value,),
        params={
            "kernel": kernel.astype(np.int8 if is_byte else np.int16),
            "bias": per_channel(folded.astype(np.int32)),
        },
        offset=offset,
        shift=0,
        **attributes,
    )
    scale = per_channel(np.asarray(call.tensor(1).scale, np.float32))
    add_requantize(call, acc, _of_product(call, x, scale, is_wide), call.activation())


def check_overflow(
    call: Call, low: np.ndarray, high: np.ndarray, bias: np.ndarray
) -> None:
    """Raises OverflowError if an accumulator between two ends could leave int32."""
    reach = max(-int(low.min()) - 1, int(high.max()), int(np.abs(bias).max()))
    if reach > _INT32.max:
        raise OverflowError(
            f"The accumulator of TFLite's {call.op.name} could reach {reach}, beyond "
            f"int32. Its output is {call.output().name!r}."
        )


def _of_product(call: Call, x: Codes, scale: np.ndarray, is_wide: bool) -> Rescaling:
    """Returns output codes per accumulator, in the precision of TFLite's kernels."""
    rules, y = call.growth.rules, call.y
    if rules.is_xnnpack and not x.is_wide:
        return float_rescaling(x.scale * scale / y.scale)
    ratio = np.float64(x.scale) * np.float64(scale) / np.float64(y.scale)
    if scale.size == 1:
        ratio = np.float64(x.scale * scale) / np.float64(y.scale)
    if call.op.name == "FULLY_CONNECTED" and rules.dense == "tflite_single":
        return Rescaling(*tflite_multiplier(ratio), rules.dense)
    return _short(ratio) if is_wide else exact_rescaling(call, ratio)


# Products of two tensors.


def operands(call: Call) -> list[int]:
    """Returns two inputs in the larger rank, so that axes of size 1 repeat."""
    values = [call.value(0), call.value(1)]
    shapes = [call.known(v).shape for v in values]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return [call.reshaped(v, s) for v, s in zip(values, padded, strict=True)]


def _multiply(call: Call) -> None:
    codes, values = [call.codes(0), call.codes(1)], operands(call)
    acc = _of_two(call, "multiply_codes", codes, values, 1)
    ratio = codes[0].scale * codes[1].scale / call.y.scale
    is_float = call.growth.rules.is_xnnpack and not call.y.is_wide
    rescaling = (
        float_rescaling(ratio) if is_float else exact_rescaling(call, np.float64(ratio))
    )
    add_requantize(call, acc, rescaling, call.activation())


def _batch_matmul(call: Call) -> None:
    codes, values = [call.codes(0), call.codes(1)], [call.value(0), call.value(1)]
    shapes = [call.known(v).shape for v in values]
    rank = len(shapes[0])
    if call.y.is_wide or shapes[0][:-2] != shapes[1][:-2]:
        raise call.refuse(f"shapes {shapes} of type {call.output().dtype}")
    adjoint = [bool(call.option(name, False)) for name in ("adj_x", "adj_y")]
    contract = [[rank - 2 if adjoint[0] else rank - 1], [rank - 1 - (not adjoint[1])]]
    taps = shapes[0][contract[0][0]]
    batch = [list(range(rank - 2))] * 2
    attributes = {"contract": contract, "batch": batch}
    acc = _of_two(call, "dot_codes", codes, values, taps, **attributes)
    ratio = np.float64(codes[0].scale * codes[1].scale) / np.float64(call.y.scale)
    add_requantize(call, acc, exact_rescaling(call, ratio), (call.y.low, call.y.high))


def _of_two(
    call: Call,
    operation: str,
    codes: Sequence[Codes],
    values: Sequence[int],
    taps: int,
    **attributes: Any,
) -> int:
    """Adds a product of two values about their zero points."""
    sides = [
        [end - c.zero_point for end in (call.known(v).low, call.known(v).high)]
        for c, v in zip(codes, values, strict=True)
    ]
    low, high = map(np.array, product_ends(sides, taps))
    check_overflow(call, low, high, np.zeros(1))
    zero_points = [c.zero_point for c in codes]
    return call.add(operation, values, zero_points=zero_points, **attributes)


# Operator -> its rule.
PRODUCTS: Mapping[str, TfliteRule] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _conv,
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _fully_connected,
    "MUL": _multiply,
    "BATCH_MATMUL": _batch_matmul,
}
