"""Rules of the TFLite operators that compute, except products."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.tflite.products import (
    Rescaling,
    add_requantize,
    byte_rescaling,
    exact_rescaling,
    float_rescaling,
    operands,
    strides,
    window,
)
from qjax.formats.tflite.tensors import Call, TfliteRule, bounds
from qjax.graph import tflite_tables as tables
from qjax.graph.tflite_tables import Codes
from qjax.integer_tflite import tflite_multiplier

# From grid to grid.


def _quantize(call: Call) -> None:
    if call.tensor().dtype == "float32":
        raise call.refuse(
            f"the real numbers {call.tensor().name!r}",
            " Known are those of an input with one grid, and of DEQUANTIZE, perhaps "
            "moved.",
        )
    x, y = call.codes(), call.y
    if call.tensor().is_real:
        _quantize_real(call, x, y)
        return
    rescaling = exact_rescaling(call, np.float64(x.scale) / np.float64(y.scale))
    same = call.tensor().dtype == call.output().dtype
    if call.growth.rules.is_xnnpack and same and not x.is_wide:
        rescaling = byte_rescaling(x.scale / y.scale)
    add_requantize(call, call.value(), rescaling, (y.low, y.high), x.zero_point)


def _quantize_real(call: Call, x: Codes, y: Codes) -> None:
    """Quantizes real numbers of which the codes are known, on their grid or another."""
    is_same = x == y and call.tensor().dtype == call.output().dtype
    if is_same:
        call.growth.bind(call.op.outputs[0], call.value())
        return
    if call.growth.rules.is_xnnpack:
        raise call.refuse("real numbers on another grid, by XNNPACK's rule,")
    _table(call, tables.quantized_table(x, y))


def _dequantize(call: Call) -> None:
    """Passes codes on, as the program itself returns real numbers."""
    call.growth.bind(call.op.outputs[0], call.value())


def _relu(call: Call) -> None:
    x, y = call.codes(), call.y
    rescaling = exact_rescaling(call, np.float64(x.scale / y.scale))
    ends = bounds(call.op.name, y)
    add_requantize(call, call.value(), rescaling, ends, x.zero_point)


# Sums and means.


def _add(call: Call) -> None:
    a, b, y = call.codes(0), call.codes(1), call.y
    ends = call.activation()
    left = 15 if y.is_wide else 20
    twice = 2.0 * float(max(a.scale, b.scale))
    pairs = [tflite_multiplier(float(c.scale) / twice) for c in (a, b)]
    signs = (1, -1 if call.op.name == "SUB" else 1)
    multiplier, shift = tflite_multiplier(twice / (2.0**left * float(y.scale)))
    values = operands(call)
    call.emit(
        "tflite_add",
        values,
        left_shift=left,
        zero_points=[a.zero_point, b.zero_point],
        multipliers=[sign * int(m) for sign, (m, _) in zip(signs, pairs, strict=True)],
        shifts=[int(n) for _, n in pairs],
        multiplier=int(multiplier),
        shift=int(shift),
        zero_point=y.zero_point,
        low=ends[0],
        high=ends[1],
        rule=call.growth.rules.integer,
    )


def _average_pool(call: Call) -> None:
    value, (low, high) = call.value(), call.activation()
    v, (shape, attributes) = call.known(value), pool(call)
    total = call.add("sum_pool", (value,), bias=0, padding_code=0, **attributes)
    params = {"counts": _counts(attributes, v.shape, shape)}
    call.emit("tflite_average", (total,), params=params, low=low, high=high)


def pool(call: Call) -> tuple[list[int], dict[str, Any]]:
    """Returns the shape and the attributes of a pool."""
    n, *spatial, c = call.tensor().shape
    taps = [int(call.op.options[f"filter_{d}"]) for d in ("height", "width")]
    steps = strides(call)
    axes = zip(spatial, taps, steps, strict=True)
    sizes, pads = zip(*(window(call, *axis) for axis in axes), strict=True)
    return [n, *sizes, c], {
        "window": [1, *taps, 1],
        "strides": [1, *steps, 1],
        "padding": [[0, 0], *pads, [0, 0]],
        "base_dilation": [1, 1, 1, 1],
        "dilation": [1, 1, 1, 1],
    }


def _counts(
    pool: Mapping[str, Any], size: Sequence[int], out: Sequence[int]
) -> np.ndarray:
    """Counts the inputs in each window, without padding."""
    found = []
    for d in (1, 2):
        start = np.arange(out[d]) * pool["strides"][d] - pool["padding"][d][0]
        stop = np.minimum(start + pool["window"][d], size[d])
        found.append(stop - np.maximum(start, 0))
    counts = found[0][:, None] * found[1]
    return counts.reshape(1, *counts.shape, 1).astype(np.int32)


def _mean(call: Call) -> None:
    """Averages or sums codes; for SUM, as all kernels but 2.19's wrapping reference."""
    x, y, value = call.codes(), call.y, call.value()
    v, over = call.known(value), axes(call)
    sizes = [v.shape[d] for d in over]
    taps = math.prod(sizes)
    total = call.add(
        "sum",
        (value,),
        axes=over,
        sizes=sizes,
        bias=-taps * x.zero_point,
    )
    total = call.reshaped(total, reduced_shape(call, v.shape, over))
    divisor = taps if call.op.name == "MEAN" else 1
    multiplier, shift, rule = exact_rescaling(
        call, np.float64(x.scale) / np.float64(y.scale)
    )
    # The division goes into the multiplier.
    more = min(divisor.bit_length() - 1, 32, 62 - int(shift))
    rescaling = Rescaling((int(multiplier) << more) // divisor, int(shift) + more, rule)
    if call.growth.rules.is_xnnpack and not x.is_wide:
        rescaling = float_rescaling(x.scale / (y.scale * np.float32(divisor)))
    add_requantize(call, total, rescaling, (y.low, y.high))


def reduced_shape(call: Call, shape: Sequence[int], over: Sequence[int]) -> list[int]:
    """Returns the shape that a reduction leaves."""
    keeps = bool(call.option("keep_dims", False))
    return [
        1 if d in over else n for d, n in enumerate(shape) if keeps or d not in over
    ]


def axes(call: Call) -> list[int]:
    """Returns the axes that an operator reduces."""
    rank = len(call.tensor().shape)
    return sorted({call.axis(d, rank) for d in np.ravel(call.constant(1))})


def _softmax(call: Call) -> None:
    x, y = call.codes(), call.y
    is_log = call.op.name == "LOG_SOFTMAX"
    beta = 1.0 if is_log else float(call.option("beta", 1.0))
    if not is_log:
        zero_point = 0 if y.is_wide else y.low
        check_output(call, 2.0**-15 if y.is_wide else 2.0**-8, zero_point)
    else:
        _check_int8(call)
        check_output(call, *tables.FIXED_GRIDS["log-softmax", "int8"])
    _check_same_type(call)
    if call.tensor().shape[-1] > 4095:
        raise call.refuse("more than 4,095 numbers, which overflow its sum,")
    if float(x.scale) * float(np.float32(beta)) <= tables.LEAST_SOFTMAX_SCALE:
        raise call.refuse(f"the scale {x.scale}, at which its kernels end the process,")
    ends: dict[str, int] = {"low": y.low, "high": y.high}
    if y.is_wide:
        pair = tables.wide_softmax_tables(x.scale, beta)
        made = dict(zip(("exponentials", "reciprocals"), pair, strict=True))
        ends = {"high": y.high}
    else:
        made = {"exponentials": tables.exponential_table(x.scale, beta)}
    name = "tflite_softmax16" if y.is_wide else "tflite_softmax"
    if is_log:
        made["steps"], ends["zero_point"] = tables.log_step_table(x.scale), y.zero_point
        name = "tflite_log_softmax"
    params = {role: table.astype(np.int32) for role, table in made.items()}
    call.emit(name, (call.value(),), params=params, **ends)


def _l2_norm(call: Call) -> None:
    x, y = call.codes(), call.y
    _check_int8(call)
    check_output(call, *tables.FIXED_GRIDS["l2-normalisation", "int8"])
    _check_same_type(call)
    if call.activation() != (y.low, y.high):
        raise call.refuse("an activation behind it")
    own: Any = {"input_zero_points": [x.zero_point], "low": y.low, "high": y.high}
    call.emit("tflite_l2_norm", (call.value(),), **own)


def _check_int8(call: Call) -> None:
    if call.output().dtype != "int8":  # Its kernel of uint8 computes in float32.
        raise call.refuse(f"codes of {call.output().dtype}", " Known is int8.")


def _check_same_type(call: Call) -> None:
    if call.tensor().dtype != call.output().dtype:
        raise call.refuse(f"an input of type {call.tensor().dtype}")


def check_output(call: Call, scale: float, zero_point: int) -> None:
    """Raises NotImplementedError unless the output has the grid that is asked for."""
    found = float(call.y.scale), call.y.zero_point
    if found != (scale, zero_point):
        raise call.refuse(
            f"the output scale and zero point {found}",
            f" Known is {scale, zero_point}.",
        )


# Functions of codes: tables.


def _table(call: Call, table: np.ndarray, axis: int | None = None) -> None:
    """Adds a lookup table of all codes of the input's type."""
    value = call.value()
    v, least = call.known(value), call.codes().low
    table = table[v.low - least : v.high - least + 1].astype(call.output().dtype)
    call.emit("table", (value,), params={"table": table}, low=v.low, axis=axis)


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ELU": lambda x: np.where(x < 0, np.expm1(x), x),
    "EXP": np.exp,
    "GELU": tables.gelu,
    "LOGISTIC": tables.sigmoid,
    "TANH": np.tanh,
}
_WIDE_TABLES = {"LOGISTIC": tables.wide_sigmoid_table, "TANH": tables.wide_tanh_table}


def _function(call: Call) -> None:
    x, y, name = call.codes(), call.y, call.op.name
    if x.is_wide and name in _WIDE_TABLES:
        check_output(call, 2.0**-15, 0)
        _table(call, _WIDE_TABLES[name](x))
        return
    if x.is_wide and name != "EXP":
        raise call.refuse("codes of int16")
    function = _FUNCTIONS[name]
    if call.option("approximate", False):
        function = tables.gelu_tanh
    make = tables.wide_function_table if x.is_wide else tables.function_table
    _table(call, make(function, x, y))


def _leaky_relu(call: Call) -> None:
    alpha, rule = float(call.option("alpha", 0.0)), call.growth.rules.integer
    _table(call, tables.leaky_relu_table(alpha, call.codes(), call.y, rule))


def _prelu(call: Call) -> None:
    """Adds a lookup table with one column per channel."""
    rank, alpha = len(call.tensor().shape), call.constant(1)
    if alpha.size != alpha.shape[-1] or alpha.size != call.tensor().shape[-1]:
        raise call.refuse(f"slopes of shape {alpha.shape}")
    if call.codes().is_wide:
        raise call.refuse("codes of int16")
    grid = call.codes(1)
    slopes = alpha.reshape(-1).astype(np.int64) - grid.zero_point
    rule = call.growth.rules.integer
    table = tables.prelu_table(slopes, grid.scale, call.codes(), call.y, rule)
    _table(call, table, rank - 1)


def _hard_swish(call: Call) -> None:
    if call.codes().is_wide:
        raise call.refuse("codes of int16")
    _table(call, tables.hard_swish_table(call.codes(), call.y))


# Operator -> its rule.
FUNCTIONS: Mapping[str, TfliteRule] = {
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "RELU": _relu,
    "RELU6": _relu,
    "RELU_N1_TO_1": _relu,
    "ADD": _add,
    "SUB": _add,
    "AVERAGE_POOL_2D": _average_pool,
    "MEAN": _mean,
    "SUM": _mean,
    "L2_NORMALIZATION": _l2_norm,
    "LOG_SOFTMAX": _softmax,
    "SOFTMAX": _softmax,
    **dict.fromkeys(_FUNCTIONS, _function),
    "LEAKY_RELU": _leaky_relu,
    "PRELU": _prelu,
    "HARD_SWISH": _hard_swish,
}
