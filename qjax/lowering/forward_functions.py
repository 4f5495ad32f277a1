"""Functions of codes as TFLite's kernels compute them, of scales that are traced."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.graph.tflite_tables import sigmoid_steps, softmax_exponentials
from qjax.integer import requantize
from qjax.integer_tflite import traced_tflite_multiplier
from qjax.lowering.accumulators import TargetGrid


# Functions that TFLite has as operators, of 8-bit codes, by primitive.
def _logistic(x: jax.Array) -> jax.Array:
    one = jnp.ones_like(x)
    return _narrow(one / _narrow(one + _narrow(jnp.exp(-x))))


FUNCTIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "exp": jnp.exp,
    "logistic": _logistic,
    "tanh": jnp.tanh,
}


def function_codes(
    name: str, steps: jax.Array, scale: jax.Array, grid: TargetGrid
) -> jax.Array:
    """Computes a function of codes as `qjax.graph.tflite_tables.function_table` does.

    Args:
      name: Primitive of the function.
      steps: Codes less their zero point, int32.
      scale: Their scale.
      grid: Grid of the result.

    Returns:
      Codes, int32.
    """
    with jax.enable_x64(True):
        real = _narrow(_wide(scale) * _wide(steps))
        one = jnp.ones((), jnp.float64)
        inverse = _narrow(one / _wide(grid.scale))
        found = _narrow(FUNCTIONS[name](real))
        most = jnp.float64(2.0**24)
        scaled = jnp.clip(_narrow(found * inverse), -most, most)
        code = _c_round(scaled) + _wide(grid.zero_point)
        return jnp.clip(code, _wide(grid.qmin), _wide(grid.qmax)).astype(jnp.int32)


def _narrow(x: jax.Array) -> jax.Array:
    """Rounds float64 to the numbers of float32."""
    return lax.reduce_precision(lax.optimization_barrier(x), 8, 23)


# Of 16 bits.


def wide_function_codes(
    name: str, steps: jax.Array, scale: jax.Array, grid: TargetGrid
) -> jax.Array:
    """Computes a function of 16-bit codes as `qjax.graph.tflite_tables` tabulates it.

    Args:
      name: Primitive of the function.
      steps: Codes, int32, whose zero point is 0.
      scale: Their scale.
      grid: Grid of the result.

    Returns:
      Codes, int32.
    """
    with jax.enable_x64(True):
        codes = steps.astype(jnp.int64)
        if name == "exp":
            found = _wide_exponential(codes, _wide(scale), grid)
        else:
            found = _WIDE[name](codes, _wide(scale))
        return found.astype(jnp.int32)


def _wide_logistic(codes: jax.Array, scale: jax.Array) -> jax.Array:
    scaled = _sigmoid_places(codes, scale, (0,))
    value = _interpolated_sigmoid(jnp.abs(scaled), 9, 0x7FFF << 10)
    below = (1 << 25) - value + (1 << 9) - 1
    return jnp.where(scaled >= 0, value + (1 << 9), below) >> 10


def _wide_tanh(codes: jax.Array, scale: jax.Array) -> jax.Array:
    scaled = _sigmoid_places(codes, scale, (0, 1))
    value = _interpolated_sigmoid(jnp.abs(scaled), 8, 0xFFFF << 8)
    half = 1 << 23
    above = value - half + (1 << 7)
    return jnp.where(scaled >= 0, above, -value + half + (1 << 7) - 1) >> 8


_WIDE = {"logistic": _wide_logistic, "tanh": _wide_tanh}


def _sigmoid_places(
    codes: jax.Array, scale: jax.Array, exact: tuple[int, ...]
) -> jax.Array:
    """Returns codes in units of 2^-12 / 3, exact if their shift is in ``exact``."""
    first = scale * (4096.0 * 3.0)
    doubled = first * jnp.asarray(2.0 ** np.arange(31))
    shift = jnp.sum(doubled <= 32767 / 2).astype(jnp.int64)
    multiplier = (first * 2.0 ** shift.astype(jnp.float64)).astype(jnp.int64)
    half = (jnp.int64(1) << shift) >> 1
    found = (codes * multiplier + half) >> shift
    for up in exact:
        ends = (2.0 ** (up - 12 + sign * 1e-3) for sign in (-1, 1))
        low, high = ends
        is_exact = (scale > low) & (scale < high)
        found = jnp.where(is_exact, codes * (3 << up), found)
    return found


def _interpolated_sigmoid(scaled: jax.Array, bits: int, most: int) -> jax.Array:
    steps = jnp.asarray(sigmoid_steps(), jnp.int64)
    place = scaled >> bits
    at = jnp.minimum(place, 254)
    rest = scaled & ((1 << bits) - 1)
    value = (steps[at] << bits) + rest * (steps[at + 1] - steps[at])
    return jnp.where(place >= 255, jnp.int64(most), value)


def _wide_exponential(
    codes: jax.Array, scale: jax.Array, grid: TargetGrid
) -> jax.Array:
    """Interpolates ``exp`` between 513 anchors, made by float32 arithmetic."""
    unit, low, high = (_wide(x) for x in (grid.scale, grid.qmin, grid.qmax))
    size = _narrow(_narrow(unit * high) - _narrow(unit * low))
    inverse = _narrow(jnp.full_like(size, 65536.0) / size)
    first, last = (_narrow(scale * end) for end in (-32768.0, 32767.0))
    step = _narrow(last - first) / 512
    at = _narrow(first + _narrow(jnp.arange(513, dtype=jnp.float64) * step))
    middle = _narrow(at[:-1] + step / 2)
    value = lambda x: _narrow(_narrow(jnp.exp(x)) * inverse)
    own, after, end = _c_round(value(at[:-1])), value(at[1:]), _c_round(value(last))
    line = _c_round(_narrow(after + own) / 2)
    bias = _c_round(_narrow(line - _c_round(value(middle))) / 2)
    anchors = jnp.append(_narrow(own - bias), end)
    anchors = jnp.clip(anchors, low, high).astype(jnp.int64)
    place, rest = 256 + (codes >> 7), codes & 0x7F
    slope = anchors[place + 1] - anchors[place]
    return anchors[place] + ((slope * rest + 64) >> 7)


def traced_wide_exponentials(scale: jax.Array, beta: float) -> jax.Array:
    """Computes the exponentials of `wide_softmax_tables` of a traced scale.

    Args:
      scale: float32, ``[]``.
      beta: Factor of the input.

    Returns:
      int32, ``[65536]``.
    """
    with jax.enable_x64(True):
        ratio = _narrow(_wide(scale) * float(np.float32(beta)))
        # A quotient by one number would become a product with its reciprocal.
        tens = lax.optimization_barrier(jnp.asarray([10 / 65535]))
        multiplier, shift = traced_tflite_multiplier((ratio[None] / tens)[0])
    far = -jnp.arange(1 << 16, dtype=jnp.int32)
    ends: Any = {"qmin": -(1 << 31) + 1, "qmax": (1 << 31) - 1}
    scaled = requantize(far, multiplier, shift, **ends, rule="tflite_double")
    place = jnp.clip(scaled + 32767, -32768, 32767)
    return jnp.asarray(softmax_exponentials(), jnp.int32)[place + 32768]


def _wide(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x.astype(jnp.float64))


def _c_round(x: jax.Array) -> jax.Array:
    """Rounds float64 to whole numbers, halves away from zero."""
    return jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)
