"""Operations that only graphs made from TFLite have, and TFLite's roundings.

Operations (``q`` codes of the input, all integers; ``rescale`` by a rule of
`qjax.integer.requantize`):

    tflite_constant  code = parameter
    tflite_add       code = clip(rescale(sum(rescale((q_i - z_i) << left_shift))) + z)
    tflite_average   code = clip(round(q / counts)), halves away from zero
    tflite_resize    code = round(rows @ q @ columns * 2^-20), halves away from zero
    tflite_softmax   code = clip(round(256 * exp / sum(exp)) + least code), the
                     quotient by three steps of Newton's method in fixed point
    tflite_softmax16 the same for codes of 16 bits, the quotient from a table

XLA's bodies compute in integers only. NumPy's are written apart from them, after the
formulas of gemmlowp.

References:
  TensorFlow Lite 2.19, lite/kernels/internal/reference; gemmlowp,
  fixedpoint/fixedpoint.h.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.integer import requantize

_INT32 = np.iinfo(np.int32)


# Rounding, in NumPy. int64 in, int64 out.


def rescale(acc: np.ndarray, multiplier: Any, shift: Any, rule: str) -> np.ndarray:
    """``acc * multiplier * 2^-shift`` by one of TFLite's two rules.

    Args:
      acc: int64 that fit int32.
      multiplier: int64 that fit int32.
      shift: int64, 0 to 62.
      rule: ``tflite_double`` or ``tflite_single``.

    Returns:
      int64.
    """
    if rule == "tflite_single":
        return (acc * multiplier + ((np.int64(1) << shift) >> 1)) >> shift
    left, right = np.maximum(31 - shift, 0), np.maximum(shift - 31, 0)
    wrapped = (acc << left).astype(np.int32).astype(np.int64)
    return divide_by_power(high_product(wrapped, multiplier), right)


def high_product(a: Any, b: Any) -> np.ndarray:
    """``a * b / 2^31``, halves up: a nudge, then towards zero. Saturates at 2^31."""
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return np.minimum(truncated(nudged, np.int64(1) << 31), _INT32.max)


def divide_by_power(x: np.ndarray, n: Any) -> np.ndarray:
    """``x / 2^n`` to nearest, halves away from zero."""
    rest = (np.int64(1) << n) - 1
    return (x >> n) + ((x & rest) > (rest >> 1) + (x < 0))


def truncated(a: np.ndarray, b: Any) -> np.ndarray:
    """The quotient towards zero, as C has it."""
    return np.sign(a) * (np.abs(a) // b)


def half_away(x: np.ndarray) -> np.ndarray:
    """C's ``round`` of floating-point numbers."""
    whole = np.trunc(x)
    return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)


# Bodies for XLA.


def _constant(node, params, inputs):
    return params[node.params["value"]]


def _add(node, params, inputs):
    a = node.attributes
    parts = zip(inputs, a["zero_points"], a["multipliers"], a["shifts"], strict=True)
    total = sum(
        _whole((x.astype(jnp.int32) - z) << a["left_shift"], m, s, a["rule"])
        for x, z, m, s in parts
    )
    ends = {"qmin": a["low"], "qmax": a["high"], "rule": a["rule"]}
    return requantize(total, a["multiplier"], a["shift"], a["zero_point"], **ends)


def _whole(acc, multiplier, shift, rule):
    ends = {"qmin": _INT32.min, "qmax": _INT32.max}
    return requantize(acc, multiplier, shift, **ends, rule=rule)


def _average(node, params, inputs):
    a, counts = node.attributes, params[node.params["counts"]]
    acc = inputs[0].astype(jnp.int32)
    shape = jnp.broadcast_shapes(acc.shape, counts.shape)
    quotient = lax.div(jnp.abs(acc) + counts // 2, jnp.broadcast_to(counts, shape))
    return jnp.clip(jnp.sign(acc) * quotient, a["low"], a["high"])


def _resize(node, params, inputs):
    with jax.enable_x64(True):
        x = inputs[0].astype(jnp.int64)
        for axis, role in ((1, "rows"), (2, "columns")):
            before, after, rest = params[node.params[role]]
            sides = [jnp.take(x, at, axis=axis, mode="clip") for at in (before, after)]
            rest = rest.astype(jnp.int64).reshape([-1] + [1] * (3 - axis))
            rest = jnp.expand_dims(rest, tuple(range(axis)))
            x = sides[0] * ((1 << 10) - rest) + sides[1] * rest
        return jnp.sign(x) * _half_up(jnp.abs(x), jnp.int64(20))


def _softmax(node, params, inputs):
    a = node.attributes
    x = inputs[0].astype(jnp.int32)
    below = jnp.max(x, axis=-1, keepdims=True) - x
    exps = jnp.take(params[node.params["exponentials"]], below, mode="clip")
    total = jnp.sum(((exps >> 11) + 1) >> 1, -1, keepdims=True, dtype=jnp.int32)
    room = lax.clz(total)
    with jax.enable_x64(True):
        wide, room = total.astype(jnp.int64), room.astype(jnp.int64)
        quotient = _reciprocal((wide << room) - (1 << 31))
        share = _half_up(quotient * exps.astype(jnp.int64), jnp.int64(31))
        code = _half_up(share, 35 - room) + a["low"]
        return jnp.clip(code, a["low"], a["high"])


def _reciprocal(x: jax.Array) -> jax.Array:
    """``1 / (1 + x)`` for x in [0, 1), both with 31 bits after the point."""
    product = lambda a, b: _half_up(a * b, jnp.int64(31))
    half = (x + (1 << 31)) >> 1  # Half the denominator.
    y = 1515870810 + product(half, jnp.int64(-1010580540))  # 48/17 - 32/17 half.
    for _ in range(3):
        step = product(y, (1 << 29) - product(half, y)) << 2
        y = y + jnp.clip(step, _INT32.min, _INT32.max)
    return jnp.minimum(y << 1, _INT32.max)


def _softmax16(node, params, inputs):
    x = inputs[0].astype(jnp.int32)
    below = jnp.max(x, axis=-1, keepdims=True) - x
    exps = jnp.take(params[node.params["exponentials"]], below, mode="clip")
    total = jnp.sum(exps, -1, keepdims=True, dtype=jnp.int32)
    room = lax.clz(total)
    with jax.enable_x64(True):
        wide, room = total.astype(jnp.int64), room.astype(jnp.int64)
        place = _half_up(wide << (room - 1), jnp.int64(14)) - (1 << 16)
        reciprocals = params[node.params["reciprocals"]]
        quotient = jnp.take(reciprocals, place, mode="clip").astype(jnp.int64)
        code = _half_up(exps.astype(jnp.int64) * quotient, 31 - room)
        return jnp.clip(code, 0, node.attributes["high"])


def _half_up(value: jax.Array, shift: jax.Array) -> jax.Array:
    return (value + ((jnp.ones_like(shift) << shift) >> 1)) >> shift


XLA_BODIES: dict[str, Callable[..., jax.Array]] = {
    "tflite_constant": _constant,
    "tflite_add": _add,
    "tflite_average": _average,
    "tflite_resize": _resize,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax16,
}


# Bodies in NumPy, on int64.

_Own = Mapping[str, np.ndarray]
_Inputs = Sequence[np.ndarray]


def _constant_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    return own["value"]


def _add_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    parts = zip(inputs, a["zero_points"], a["multipliers"], a["shifts"], strict=True)
    total = sum(
        rescale((x - z) * 2 ** a["left_shift"], np.int64(m), np.int64(s), a["rule"])
        for x, z, m, s in parts
    )
    pair = np.int64(a["multiplier"]), np.int64(a["shift"])
    code = rescale(np.asarray(total), *pair, a["rule"]) + a["zero_point"]
    return np.clip(code, a["low"], a["high"])


def _average_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    acc, half = inputs[0], own["counts"] // 2
    code = truncated(acc + np.where(acc > 0, half, -half), own["counts"])
    return np.clip(code, a["low"], a["high"])


def _resize_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    x, (y0, y1, down), (x0, x1, right) = inputs[0], own["rows"], own["columns"]
    down, right = down[:, None, None], right[:, None]
    one = 1 << 10
    corner = lambda rows, columns: x[:, rows][:, :, columns]
    total = (
        corner(y0, x0) * (one - down) * (one - right)
        + corner(y1, x0) * down * (one - right)
        + corner(y0, x1) * (one - down) * right
        + corner(y1, x1) * down * right
    )
    return truncated(total + np.where(total > 0, 1 << 19, -(1 << 19)), 1 << 20)


def _softmax_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    x = inputs[0]
    exps = own["exponentials"][x.max(-1, keepdims=True) - x]
    total = divide_by_power(exps, 12).sum(-1, keepdims=True)
    length = np.frexp(total.astype(np.float64))[1].astype(np.int64)  # In bits.
    quotient = _newton((total << (32 - length)) - (1 << 31))
    share = high_product(quotient, exps)
    code = divide_by_power(share, length + 3) + a["low"]
    return np.clip(code, a["low"], a["high"])


def _newton(x: np.ndarray) -> np.ndarray:
    """``1 / (1 + x)`` for x in [0, 1), as gemmlowp has it: 31 bits after the point."""
    total = x + _INT32.max
    half = truncated(total + np.where(total >= 0, 1, -1), 2)
    y = 1515870810 + high_product(half, -1010580540)
    for _ in range(3):
        rest = (1 << 29) - high_product(half, y)
        y = y + np.clip(high_product(y, rest) << 2, _INT32.min, _INT32.max)
    return np.clip(y << 1, _INT32.min, _INT32.max)


def _softmax16_reference(a: Mapping[str, Any], own: _Own, inputs: _Inputs):
    x = inputs[0]
    exps = own["exponentials"][x.max(-1, keepdims=True) - x]
    total = exps.sum(-1, keepdims=True)
    room = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    shifted = ((total << (room - 1)) + (1 << 13)) >> 14
    place = np.clip(shifted - ((1 << 15) + (1 << 16)), -32768, 32767)
    product = exps * own["reciprocals"][place + 32768]
    code = (product + (np.int64(1) << (30 - room))) >> (31 - room)
    return np.clip(code, 0, a["high"])


REFERENCE_BODIES: dict[str, Callable[..., np.ndarray]] = {
    "tflite_constant": _constant_reference,
    "tflite_add": _add_reference,
    "tflite_average": _average_reference,
    "tflite_resize": _resize_reference,
    "tflite_softmax": _softmax_reference,
    "tflite_softmax16": _softmax16_reference,
}
