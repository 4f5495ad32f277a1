"""Integer arithmetic: what an integer program computes, and nothing else.

No function here makes a floating-point value inside a traced program.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# half_even: one rounding of the exact product. fp32_half_even: the product is rounded
# to the 24 bits of a float32 first, which is what a float32 program computes.
RequantizeRule = Literal["half_even", "fp32_half_even"]

_MOST_SHIFT = 62


def fixed_point(ratio: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Writes real factors as ``multiplier * 2^-shift`` for `requantize`.

    Args:
      ratio: float64, any shape, of either sign, finite.

    Returns:
      ``(multiplier, shift)``, int32: ``2^30 <= |multiplier| < 2^31``, rounded half to
      even, and ``0 <= shift <= 62``. A ratio below 2^-32 takes every accumulator to 0
      and becomes ``(0, 0)``, as 0 does. Exact if the ratio has at most 31 significant
      bits.

    Raises:
      ValueError: if a ratio is not finite, or 2^31 and more.

    Example:
      >>> fixed_point(0.25)
      (array(1073741824, dtype=int32), array(32, dtype=int32))
    """
    ratio = np.asarray(ratio, np.float64)
    if not np.all(np.isfinite(ratio)) or np.any(np.abs(ratio) >= 2.0**31):
        raise ValueError(
            f"A ratio of scales must be finite and below 2^31, got {ratio}. Check the "
            "scales: one is zero, NaN, or much finer than the other."
        )
    mantissa, exponent = np.frexp(ratio)
    multiplier = np.rint(mantissa * 2.0**31).astype(np.int64)
    carried = np.abs(multiplier) == 1 << 31
    multiplier = np.where(carried, multiplier // 2, multiplier)
    shift = 31 - (exponent + carried)
    if np.any(shift < 0):
        raise ValueError(f"A ratio of scales must be below 2^31, got {ratio}.")
    vanishes = (shift > _MOST_SHIFT) | (multiplier == 0)
    multiplier = np.where(vanishes, 0, multiplier).astype(np.int32)
    return multiplier, np.where(vanishes, 0, shift).astype(np.int32)


def shift_round(value: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``value / 2^shift`` rounded half to even, in integers.

    Args:
      value: Integers, any shape.
      shift: Same type, broadcasts, between 0 and the word length less two.

    Returns:
      Integers of the type of ``value``. ``value`` must stay half a unit of the shift
      below the end of its range.
    """
    one = jnp.ones_like(shift)
    is_odd = (value >> shift) & one
    below_half = ((one << shift) >> 1) - one
    return (value + jnp.where(shift > 0, below_half + is_odd, 0 * one)) >> shift


def requantize(
    acc: jax.Array,
    multiplier: ArrayLike,
    shift: ArrayLike,
    zero_point: ArrayLike = 0,
    *,
    qmin: ArrayLike,
    qmax: ArrayLike,
    rule: RequantizeRule = "half_even",
) -> jax.Array:
    """Maps accumulators to codes.

        q = clip(round(acc * multiplier * 2^-shift) + zero_point, qmin, qmax)

    in int64, exact but for the one rounding, half to even. The rule ``fp32_half_even``
    rounds the accumulator and the product to 24 significant bits first, half to even:
    the integers that float32 arithmetic gives.

    Args:
      acc: Accumulators, int32, any shape.
      multiplier: int32, broadcasts against ``acc``, of either sign.
      shift: int32, same shape, 0 to 62.
      zero_point: int32, of the codes.
      qmin: Least code.
      qmax: Largest code.
      rule: How to round.

    Returns:
      Codes, int32, shape of ``acc``.

    Example:
      >>> requantize(jnp.int32([5, 6, 7, -6]), 2**30, 32, qmin=-128, qmax=127)
      Array([ 1,  2,  2, -2], dtype=int32)
    """
    return requantize_sum(
        [(acc, multiplier)], shift, zero_point, qmin=qmin, qmax=qmax, rule=rule
    )


def requantize_sum(
    terms: list[tuple[jax.Array, ArrayLike]],
    shift: ArrayLike,
    zero_point: ArrayLike = 0,
    *,
    qmin: ArrayLike,
    qmax: ArrayLike,
    rule: RequantizeRule = "half_even",
) -> jax.Array:
    """`requantize` of a sum of products, with one rounding at its end.

    Args:
      terms: Pairs of accumulators and multipliers, int32. The sum of their products,
        without signs, must stay at 2^62 or below.
      shift: int32, common to all.
      zero_point: int32, of the codes.
      qmin: Least code.
      qmax: Largest code.
      rule: How to round.

    Returns:
      Codes, int32, shape of the accumulators.
    """
    low, high, zero = (jnp.asarray(v, jnp.int32) for v in (qmin, qmax, zero_point))
    with jax.enable_x64(True):
        wide = [(_to_int64(acc), _to_int64(m)) for acc, m in terms]
        if rule == "fp32_half_even":
            wide = [(_round_to_float32(acc), m) for acc, m in wide]
        product = functools.reduce(jnp.add, (acc * m for acc, m in wide))
        if rule == "fp32_half_even":
            product = _round_to_float32(product)
        rounded = shift_round(product, _to_int64(shift))
        low, high, zero = (_to_int64(v) for v in (low, high, zero))
        return jnp.clip(rounded + zero, low, high).astype(jnp.int32)


def _to_int64(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x).astype(jnp.int64)


def _round_to_float32(value: jax.Array) -> jax.Array:
    """Keeps the 24 leading bits of int64 values, half to even."""
    length = 64 - jax.lax.clz(jnp.abs(value))
    dropped = jnp.maximum(length - 24, jnp.zeros_like(length))
    return shift_round(value, dropped) << dropped
