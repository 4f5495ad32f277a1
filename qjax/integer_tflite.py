"""TFLite's ratios of scales, known or traced, for its rules of `requantize`.

What a kernel computes in float32, and what in float64, is part of the rule. Each ratio
here is of float32 scales, in float64, so that no compiler has a choice.

References:
  TensorFlow Lite 2.19, lite/kernels/kernel_util.cc and lite/kernels/*.cc.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.integer import MOST_SHIFT, binary_parts, float64_of, requantize

# What an accumulator is made of. conv and dot: codes times weights. dot_codes and
# multiply_codes: codes times codes. sum and sum_pool: sums of codes. codes: codes
# themselves, about their zero point. other: what TFLite has no operator for.
Kind = Literal[
    "conv", "dot", "dot_codes", "multiply_codes", "sum", "sum_pool", "codes", "other"
]

_INT32 = np.iinfo(np.int32)
_NARROW_LEFT, _WIDE_LEFT = 20, 15  # Bits before the point of a sum.
# -20 with 26 bits after the point: no code of a log-softmax is so far below 0.
LEAST_STEP = -20 << 26


def tflite_multiplier(ratio: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Writes real factors as TFLite does, for the two TFLite rules of `requantize`.

    Args:
      ratio: float64, any shape, not negative, finite.

    Returns:
      ``(multiplier, shift)``, int32, which stand for ``multiplier * 2^-shift``:
      ``2^30 <= multiplier < 2^31``, halves rounded up. A ratio below 2^-32 becomes
      ``(0, 31)``. TFLite's own shift is ``31 - shift``.

    Raises:
      TypeError: as `fixed_point`.
      ValueError: if a ratio is negative, not finite, or 2^31 and more.

    Example:
      >>> tflite_multiplier(0.75)
      (array(1610612736, dtype=int32), array(31, dtype=int32))

    References:
      TensorFlow Lite, `QuantizeMultiplier`, lite/kernels/internal/quantization_util.cc.
    """
    ratio = float64_of("ratio", ratio)
    if not np.all((ratio >= 0) & (ratio < 2.0**31)):
        raise ValueError(
            f"A ratio of scales must be in [0, 2^31), got {ratio}. Check the scales: "
            "one is negative, zero, NaN, or much finer than the other."
        )
    multiplier, shift = _tflite_multiplier(ratio, np)
    if np.any(shift < 0):
        raise ValueError(f"A ratio of scales must be below 2^31, got {ratio}.")
    return multiplier, shift


def traced_tflite_multiplier(ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `tflite_multiplier` of a traced ratio, where 64 bits are enabled.

    Args:
      ratio: float64, any shape. What `tflite_multiplier` refuses is undefined.

    Returns:
      ``(multiplier, shift)``, int32, bit for bit those of `tflite_multiplier`.
    """
    return _tflite_multiplier(ratio, jnp)


def _tflite_multiplier(ratio: Any, xp: Any) -> tuple[Any, Any]:
    """Computes the formula of `tflite_multiplier` in NumPy or JAX."""
    mantissa, exponent = binary_parts(ratio, xp)
    multiplier = xp.floor(mantissa * 2.0**31 + 0.5).astype(xp.int64)
    carried = multiplier == 1 << 31
    multiplier = xp.where(carried, 1 << 30, multiplier)
    shift = 31 - (exponent + carried)
    vanishes = (shift > MOST_SHIFT) | (multiplier == 0)
    multiplier = xp.where(vanishes, 0, multiplier).astype(xp.int32)
    return multiplier, xp.where(vanishes, 31, shift).astype(xp.int32)


def left_shift(is_wide: bool) -> int:
    """Returns the bits by which the terms of a sum are shifted.

    Args:
      is_wide: Whether codes have 16 bits.
    """
    return _WIDE_LEFT if is_wide else _NARROW_LEFT


def product_ratio(kind: Kind, scales: Sequence[Any], divisor: Any) -> Any:
    """Returns codes per accumulator, as TFLite's kernels compute them.

    Args:
      kind: What the accumulator is made of.
      scales: float32 scales of its operands; of products with weights those of the
        weights come first. Known, or traced where 64 bits are enabled.
      divisor: Scale of the output.

    Returns:
      float64, in the shape of the first scale. Of several channels with one scale it is
      the ratio of a file that has one scale.
    """
    wide = [_wide(s) for s in scales]
    y = _wide(divisor)
    if kind in ("conv", "dot"):
        w, x = wide
        one = _is_one(w)
        return _divided(_where(one, _narrow(w * x), w * x), y)
    if kind == "multiply_codes":
        return _narrow(_divided(_narrow(wide[0] * wide[1]), y))
    if kind == "dot_codes":
        return _divided(_narrow(wide[0] * wide[1]), y)
    return _divided(wide[0], y)


def weight_scale(scale: Any, gain: Any) -> Any:
    """Returns the scale of weights that a factor behind them has joined, float32.

    Args:
      scale: Scale of the weights, float32, in the rank of the output.
      gain: The factor, float32, broadcasts. Known, or traced.
    """
    if not isinstance(scale, jax.Array) and not isinstance(gain, jax.Array):
        return np.float32(np.float64(scale) * np.float64(gain))
    with jax.enable_x64(True):
        product = _wide(jnp.asarray(scale)) * _wide(jnp.asarray(gain))
        return _narrow(product).astype(jnp.float32)


def signed_multiplier(ratio: Any) -> tuple[Any, Any]:
    """Returns `tflite_multiplier` of a ratio of either sign, known or traced.

    A negative one stands for weights of the other sign: products are the same.
    """
    if isinstance(ratio, jax.Array):
        multiplier, shift = traced_tflite_multiplier(jnp.abs(ratio))
        return jnp.sign(ratio).astype(jnp.int32) * multiplier, shift
    found, places = tflite_multiplier(np.abs(ratio))
    return np.sign(ratio).astype(np.int32) * found, places


def mean_multiplier(ratio: Any, taps: int) -> tuple[Any, Any]:
    """Returns the multiplier of a mean, into which the division goes.

    Args:
      ratio: Scale of the codes over that of the output, float64, known or traced where
        64 bits are enabled.
      taps: Number of codes.
    """
    multiplier, shift = signed_multiplier(ratio)
    xp: Any = jnp if isinstance(ratio, jax.Array) else np
    wide = xp.asarray(multiplier).astype(xp.int64)
    own = xp.asarray(shift).astype(xp.int64)
    more = xp.minimum(min(taps.bit_length() - 1, 32), 62 - own)
    divided = (wide << more) // taps
    return divided.astype(xp.int32), (own + more).astype(xp.int32)


def sum_multipliers(a: Any, b: Any, y: Any, left: int) -> list[tuple[Any, Any]]:
    """Returns multipliers and shifts of both terms of a sum, and of the sum itself.

    Args:
      a: Scale of the first term, float32, known or traced where 64 bits are enabled.
      b: Scale of the second.
      y: Scale of the output.
      left: Bits of `left_shift`.
    """
    first, second, last = map(_wide, (a, b, y))
    xp: Any = jnp if isinstance(first, jax.Array) else np
    twice = xp.maximum(first, second) * 2.0
    pairs = (first, twice), (second, twice), (twice, last * 2.0**left)
    ratios = [_divided(*pair) for pair in pairs]
    return [signed_multiplier(ratio) for ratio in ratios]


def traced_sum(
    steps: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    signs: Sequence[float],
    grid: tuple[jax.Array, ...],
    is_wide: bool,
) -> jax.Array:
    """Computes the codes of TFLite's ADD or SUB.

    Args:
      steps: Codes of both terms less their zero points, int32.
      scales: Their scales.
      signs: 1.0 or -1.0 for each.
      grid: Scale, zero point, least and largest code of the output.
      is_wide: Whether codes have 16 bits.

    Returns:
      Codes, int32.
    """
    scale, zero_point, low, high = grid
    left = left_shift(is_wide)
    with jax.enable_x64(True):
        *pairs, last = sum_multipliers(scales[0], scales[1], scale, left)
    ends: Any = {"qmin": _INT32.min, "qmax": _INT32.max, "rule": "tflite_double"}
    terms = [
        requantize(x << left, m * jnp.int32(sign), s, **ends)
        for x, (m, s), sign in zip(steps, pairs, signs, strict=True)
    ]
    ends |= {"qmin": low, "qmax": high}
    return requantize(terms[0] + terms[1], *last, zero_point, **ends)


def average_codes(total: jax.Array, counts: jax.Array) -> jax.Array:
    """Computes TFLite's averages of whole windows of codes.

    Args:
      total: Sums of codes, zero points included, int32.
      counts: Number of codes in each window, int32, broadcasts.

    Returns:
      ``total / counts``, halves away from zero, int32.
    """
    half = counts // 2
    biased = total + jnp.where(total > 0, half, -half)
    return lax.div(biased, jnp.broadcast_to(counts, total.shape))


def traced_exponentials(scale: jax.Array, beta: float) -> jax.Array:
    """Computes `qjax.graph.tflite_tables.exponential_table` of a traced scale.

    Args:
      scale: float32, ``[]``.
      beta: Factor of the input.

    Returns:
      int32, ``[256]``.
    """
    with jax.enable_x64(True):
        scaled, inside = _scaled_places(scale, beta)
        found = jnp.where(inside, _exponential(scaled), jnp.int64(0))
        return found.astype(jnp.int32)


def traced_log_steps(scale: jax.Array) -> jax.Array:
    """Computes `qjax.graph.tflite_tables.log_step_table` of a traced scale.

    Args:
      scale: float32, ``[]``.

    Returns:
      int32, ``[256]``.
    """
    with jax.enable_x64(True):
        scaled, inside = _scaled_places(scale, 1.0)
        least = jnp.int64(LEAST_STEP)
        return jnp.where(inside, jnp.maximum(scaled, least), least).astype(jnp.int32)


def _scaled_places(scale: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    ratio = _wide(scale) * float(np.float32(beta)) * 2.0**26
    most = jnp.float64(2.0**31 - 1)
    multiplier, shift = traced_tflite_multiplier(jnp.minimum(ratio, most))
    left = (31 - shift).astype(jnp.int64)
    radius = jnp.floor(31 * 2.0**26 / 2.0 ** left.astype(jnp.float64))
    n = jnp.arange(256, dtype=jnp.int64)
    inside = n.astype(jnp.float64) <= radius
    steps = -jnp.where(inside, n, jnp.int64(0)) << jnp.maximum(left, 0)
    return _high(steps, multiplier.astype(jnp.int64)), inside


def _exponential(x: jax.Array) -> jax.Array:
    """Computes ``exp`` of numbers <= 0 with 26 fraction bits, to 31 fraction bits."""
    quarter = jnp.int64(1 << 24)
    rest = (x & (quarter - 1)) - quarter
    y = (rest << 5) + (1 << 28)
    y2 = _high(y, y)
    y3, y4 = _high(y2, y), _high(y2, y2)
    third = _high(_by_power(y4, 2) + y3, jnp.int64(715827883))
    tail = _by_power(third + y2, 1)
    eighth = jnp.int64(1895147668)
    value = eighth + _high(jnp.broadcast_to(eighth, y.shape), y + tail)
    factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
    for bit, factor in enumerate(factors, 24):
        hit = ((rest - x) >> bit) & 1 == 1
        value = jnp.where(hit, _high(value, jnp.int64(factor)), value)
    return jnp.where(x == 0, jnp.int64(_INT32.max), value)


def _high(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes gemmlowp's doubling high product of int64 that fit int32."""
    product = a * b
    one = jnp.int64(1)
    nudged = product + jnp.where(product >= 0, one << 30, one - (one << 30))
    whole = lax.div(nudged, jnp.broadcast_to(one << 31, nudged.shape))
    return jnp.minimum(whole, jnp.int64(_INT32.max))


def _by_power(x: jax.Array, n: int) -> jax.Array:
    """Computes ``x / 2^n`` to nearest, halves away from zero."""
    rest = jnp.int64((1 << n) - 1)
    half = (rest >> 1) + (x < 0).astype(jnp.int64)
    return (x >> n) + ((x & rest) > half).astype(jnp.int64)


def _wide(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return lax.optimization_barrier(x.astype(jnp.float64))
    return np.asarray(np.float32(x), np.float64)


def _narrow(x: Any) -> Any:
    """Rounds float64 to the numbers of float32."""
    if isinstance(x, jax.Array):
        return lax.reduce_precision(lax.optimization_barrier(x), 8, 23)
    return np.float64(np.float32(x))


def _divided(a: Any, b: Any) -> Any:
    if not isinstance(a, jax.Array):
        return a / b
    # A quotient by one number would become a product with its reciprocal.
    return a / lax.optimization_barrier(jnp.broadcast_to(b, a.shape))


def _is_one(w: Any) -> Any:
    """Returns whether all channels have one scale, as their file has then."""
    xp: Any = jnp if isinstance(w, jax.Array) else np
    flat = xp.reshape(w, (-1,))
    return xp.all(flat == flat[:1])


def _where(condition: Any, a: Any, b: Any) -> Any:
    xp: Any = jnp if isinstance(a, jax.Array) else np
    return xp.where(condition, a, b)
