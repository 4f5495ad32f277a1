"""Bodies of the operations that occur only in graphs made from TFLite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
    """Computes ``1 / (1 + x)`` for x in [0, 1), both with 31 fraction bits."""
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


TFLITE: dict[str, Callable[..., jax.Array]] = {
    "tflite_constant": _constant,
    "tflite_add": _add,
    "tflite_average": _average,
    "tflite_resize": _resize,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax16,
}
