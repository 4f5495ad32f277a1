"""Bodies of the operations that occur only in graphs made from TFLite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.graph.operations.fractions import (
    DENOMINATOR,
    HALF_ROOT,
    LOG2,
    NUMERATOR,
    QUARTER_ROOT,
)
from qjax.integer import requantize

_INT32 = np.iinfo(np.int32)


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
    a, exps = node.attributes, _looked_up(node, params, inputs, "exponentials")
    total = _twelve_bit_sum(exps)
    room = lax.clz(total)
    with jax.enable_x64(True):
        wide, room = total.astype(jnp.int64), room.astype(jnp.int64)
        quotient = _reciprocal((wide << room) - (1 << 31))
        share = _half_up(quotient * exps.astype(jnp.int64), jnp.int64(31))
        code = _half_up(share, 35 - room) + a["low"]
        return jnp.clip(code, a["low"], a["high"])


def _looked_up(node, params, inputs, role):
    """Returns numbers of a table, by the distance from the largest of the last axis."""
    x = inputs[0].astype(jnp.int32)
    below = jnp.max(x, axis=-1, keepdims=True) - x
    return jnp.take(params[node.params[role]], below, mode="clip")


def _twelve_bit_sum(exps: jax.Array) -> jax.Array:
    return jnp.sum(((exps >> 11) + 1) >> 1, -1, keepdims=True, dtype=jnp.int32)


def _log_softmax(node, params, inputs):
    a, exps = node.attributes, _looked_up(node, params, inputs, "exponentials")
    steps = _looked_up(node, params, inputs, "steps")
    total = _twelve_bit_sum(exps)
    with jax.enable_x64(True):
        rest = steps.astype(jnp.int64) - _logarithm(total)
        code = _half_away(rest, 22) + a["zero_point"]
        return jnp.clip(code, a["low"], a["high"])


def _logarithm(total: jax.Array) -> jax.Array:
    """Computes `qjax.graph.operations.fractions.logarithm` of int32, to int64."""
    x, own = total.astype(jnp.int64), lax.clz(total).astype(jnp.int64)
    below = _high(x, HALF_ROOT)
    other = lax.clz(below.astype(jnp.int32)).astype(jnp.int64) - 1
    a = jnp.minimum(_high(x << (own - 1), HALF_ROOT) << 1, _INT32.max)
    b = jnp.minimum(x << other, _INT32.max)
    quarter, bits = 1 << 23, 25
    power = jnp.maximum(
        ((12 - own) << bits) + quarter, ((12 - other) << bits) - quarter
    )
    rest = jnp.minimum(a, b)
    middle, q = (rest + QUARTER_ROOT + 1) >> 1, (rest - QUARTER_ROOT) * 2
    square = _high(q, q)
    above = _high(q, rest) + _high(_high(q, square), NUMERATOR)
    one, first, second = DENOMINATOR
    under = _high(middle, one + q + _high(square, second)) + _high(q, first)
    part = _high(_half_away(above, 6), _reciprocal(under))
    return (_high(power, LOG2) + part) << 1


def _l2_norm(node, params, inputs):
    a = node.attributes
    x = inputs[0].astype(jnp.int32) - a["input_zero_points"][0]
    total = jnp.sum(x * x, -1, keepdims=True, dtype=jnp.int32)
    multiplier, shift = _inverse_root(total)
    ends = {"qmin": a["low"], "qmax": a["high"], "rule": "tflite_double"}
    return requantize(x, multiplier, shift + 24, **ends)


def _inverse_root(total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `qjax.graph.operations.fractions.inverse_root` of int32."""
    is_one, x = total <= 1, jnp.maximum(total, 2)
    is_large = x >= 1 << 29
    x = jnp.where(is_large, x >> 2, x)
    pairs = (lax.clz(x) - 1) // 2 - 1
    shift = 11 + is_large.astype(jnp.int32) - pairs
    with jax.enable_x64(True):
        whole = (x.astype(jnp.int64) << (2 * pairs).astype(jnp.int64)) >> 1
        half = _half_up(whole, jnp.int64(1))  # Not negative.
        y = jnp.full(x.shape, 1 << 28, jnp.int64)
        clipped = lambda a: jnp.clip(a, _INT32.min, _INT32.max)
        for _ in range(5):
            cube = clipped(_high(_high(y, y), y) << 6)
            y = clipped((_high(y, 3 << 27) - _high(half, cube)) << 3)
        y = _high(y, HALF_ROOT) << jnp.maximum(-shift, 0).astype(jnp.int64)
        y = y.astype(jnp.int32)
    return jnp.where(is_one, _INT32.max, y), jnp.where(is_one, 0, jnp.maximum(shift, 0))


def _high(a: jax.Array, b: ArrayLike) -> jax.Array:
    """Computes ``a * b / 2^31`` of int64 that fit int32, halves up; saturates."""
    found = _half_up(a * jnp.asarray(b, jnp.int64), jnp.int64(31))
    return jnp.minimum(found, _INT32.max)


def _half_away(x: jax.Array, shift: int) -> jax.Array:
    """Computes ``x / 2^shift`` of int64, halves away from zero."""
    return jnp.sign(x) * _half_up(jnp.abs(x), jnp.int64(shift))


def _reciprocal(x: jax.Array) -> jax.Array:
    """Computes ``1 / (1 + x)`` for x in [0, 1), both with 31 fraction bits."""
    product = lambda a, b: _half_up(a * b, jnp.int64(31))
    half = (x + (1 << 31)) >> 1  # Half the denominator.
    y = 1515870810 + product(half, jnp.int64(-1010580540))  # 48/17 - 32/17 half.
    for _ in range(3):
        step = product(y, (1 << 29) - product(half, y)) << 2
        y = y + jnp.clip(step, _INT32.min, _INT32.max)
    return jnp.minimum(y << 1, _INT32.max)


def _softmax16(node, params, inputs):
    exps = _looked_up(node, params, inputs, "exponentials")
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


TFLITE: dict[str, Callable[..., jax.Array]] = {
    "tflite_constant": _constant,
    "tflite_add": _add,
    "tflite_average": _average,
    "tflite_resize": _resize,
    "tflite_l2_norm": _l2_norm,
    "tflite_log_softmax": _log_softmax,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax16,
}
