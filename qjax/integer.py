"""Integer arithmetic: the operations of an integer program, and nothing else.

No function here makes a floating-point value inside a traced program.
"""

import functools
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# half_even: one rounding of the exact product. fp32_half_even: the product is rounded
# to the 24 bits of a float32 first, which is what a float32 program computes, XNNPACK
# among them. tflite_double: TFLite's, which rounds at 2^-31 and once more after it.
# tflite_single: TFLite's when it is built to round once, halves up.
RequantizeRule = Literal[
    "half_even", "fp32_half_even", "tflite_double", "tflite_single"
]

MOST_SHIFT = 62
_INT32_MAX = np.iinfo(np.int32).max
_INT32_MIN = np.iinfo(np.int32).min


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
      TypeError: if a ratio is no real number, or traced.
      ValueError: if a ratio is not finite, or 2^31 and more.

    Example:
      >>> fixed_point(0.25)
      (array(1073741824, dtype=int32), array(32, dtype=int32))
    """
    ratio = float64_of("ratio", ratio)
    if not np.all(np.isfinite(ratio)) or np.any(np.abs(ratio) >= 2.0**31):
        raise ValueError(
            f"A ratio of scales must be finite and below 2^31, got {ratio}. Check the "
            "scales: one is zero, NaN, or much finer than the other."
        )
    multiplier, shift = _fixed_point(ratio, np)
    if np.any(shift < 0):
        raise ValueError(f"A ratio of scales must be below 2^31, got {ratio}.")
    return multiplier, shift


def float64_of(name: str, x: Any) -> np.ndarray:
    """Returns known real numbers as float64; raises TypeError for anything else."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"`{name}` must be known, got {x}: compute it outside of jit.")
    found = np.asarray(x)
    is_real = jnp.issubdtype(found.dtype, jnp.floating)
    if found.dtype == object:
        is_real = all(isinstance(v, numbers.Real) for v in found.flat)
    if not (is_real or jnp.issubdtype(found.dtype, jnp.integer)):
        raise TypeError(f"`{name}` must be real numbers, got {x!r} ({found.dtype}).")
    return found.astype(np.float64)


def traced_fixed_point(
    factors: Sequence[jax.Array], divisor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes `fixed_point` of a traced ratio, a product over a divisor, in float64.

    Args:
      factors: float32, broadcast against each other. Multiplied from left to right.
      divisor: float32, broadcasts.

    Returns:
      ``(multiplier, shift)``, int32, bit for bit those of `fixed_point`. What that
      refuses is undefined.
    """
    with jax.enable_x64(True):
        return _fixed_point(traced_ratio(factors, divisor), jnp)


def common_fixed_point(ratios: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Writes real factors as ``multipliers * 2^-shift`` for `requantize_sum`.

    Args:
      ratios: float64, ``[n]``, of either sign, finite.

    Returns:
      ``(multipliers, shift)``, int32, ``[n]`` and ``[]``. The shift is that of the
      largest factor by `fixed_point`.

    Raises:
      TypeError: as `fixed_point`.
      ValueError: as `fixed_point`, for the largest; if there are none.
    """
    ratios = float64_of("ratios", ratios)
    if not ratios.size:
        raise ValueError("`ratios` must hold at least one ratio, got none.")
    fixed_point(np.max(np.abs(ratios)))  # Raises what it raises.
    return _common_fixed_point(ratios, np)


def traced_common_fixed_point(
    scales: Sequence[jax.Array], signs: Sequence[float], divisor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes `common_fixed_point` of traced ``sign * scale / divisor``.

    Args:
      scales: float32, ``[]`` each.
      signs: 1.0 or -1.0 for each.
      divisor: float32, ``[]``.

    Returns:
      ``(multipliers, shift)``, int32, bit for bit those of `common_fixed_point`.
    """
    with jax.enable_x64(True):
        signed = jnp.stack([s * sign for s, sign in zip(scales, signs, strict=True)])
        return _common_fixed_point(traced_ratio([signed], divisor), jnp)


def traced_ratio(factors: Sequence[jax.Array], divisor: jax.Array) -> jax.Array:
    """Divides a product by a divisor in float64, in an order no compiler changes.

    Args:
      factors: Broadcast against each other. Multiplied from left to right.
      divisor: Broadcasts.

    Returns:
      float64, where 64 bits are enabled: NumPy's own product and quotient.
    """
    wide = [lax.optimization_barrier(f.astype(jnp.float64)) for f in factors]
    product = functools.reduce(lambda a, b: lax.optimization_barrier(a * b), wide)
    # A quotient by one number would become a product with its reciprocal.
    below = jnp.broadcast_to(divisor.astype(jnp.float64), product.shape)
    return product / lax.optimization_barrier(below)


def _fixed_point(ratio: Any, xp: Any) -> tuple[Any, Any]:
    """Computes the formula of `fixed_point` in NumPy or JAX."""
    mantissa, exponent = binary_parts(ratio, xp)
    multiplier = xp.rint(mantissa * 2.0**31).astype(xp.int64)
    carried = xp.abs(multiplier) == 1 << 31
    multiplier = xp.where(carried, multiplier // 2, multiplier)
    shift = 31 - xp.where(carried, exponent + 1, exponent)
    vanishes = (shift > MOST_SHIFT) | (multiplier == 0)
    multiplier = xp.where(vanishes, 0, multiplier).astype(xp.int32)
    return multiplier, xp.where(vanishes, 0, shift).astype(xp.int32)


def binary_parts(x: Any, xp: Any) -> tuple[Any, Any]:
    """Splits float64 ``x = mantissa * 2^exponent``, the mantissa in [0.5, 1) or 0.

    Args:
      x: float64, any shape.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled, by bits, as
        `jnp.frexp` is lowered where they no longer are. What is denormal has the
        exponent -1022 then.

    Returns:
      Mantissa and exponent.
    """
    if xp is np:
        return np.frexp(x)
    bits = lax.bitcast_convert_type(x, jnp.int64)
    field = jnp.int64(0x7FF) << 52
    exponent = ((bits & field) >> 52) - 1022
    half = lax.bitcast_convert_type((bits & ~field) | jnp.int64(1022) << 52, x.dtype)
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, half), jnp.where(is_zero, 0, exponent)


def _common_fixed_point(ratios: Any, xp: Any) -> tuple[Any, Any]:
    """Computes the formula of `common_fixed_point` in NumPy or JAX."""
    _, shift = _fixed_point(xp.max(xp.abs(ratios)), xp)

    def scaled(shift: Any) -> Any:
        power = xp.int64(1) << shift.astype(xp.int64)
        return xp.rint(ratios * power.astype(xp.float64))

    # Carried to 2^31 by rounding: one bit less.
    shift = xp.where(xp.max(xp.abs(scaled(shift))) > _INT32_MAX, shift - 1, shift)
    return scaled(shift).astype(xp.int32), shift.astype(xp.int32)


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


def clipped_codes(
    steps: jax.Array, zero_point: Any, low: Any, high: Any
) -> tuple[jax.Array, jax.Array]:
    """Adds a zero point to whole steps and clips them, where 64 bits are enabled.

    Args:
      steps: int64, any shape.
      zero_point: int32, ``[]``.
      low: Least code.
      high: Largest code.

    Returns:
      Codes, int32, and whether each is within its ends without a clip.
    """
    wide = lambda x: jnp.asarray(x).astype(jnp.int64)
    least, most = wide(low) - wide(zero_point), wide(high) - wide(zero_point)
    held = jnp.clip(steps, least, most).astype(jnp.int32)
    inside = (steps >= least) & (steps <= most)
    return held + jnp.asarray(zero_point, jnp.int32), inside


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

    in int64, exact but for the one rounding, half to even. The other rules are those of
    other programs:

    - ``fp32_half_even`` rounds the accumulator and the product to 24 significant bits
      first, half to even: the integers that float32 arithmetic gives. With a multiplier
      of 24 bits it is XNNPACK's.
    - ``tflite_double`` rounds twice: ``acc * multiplier * 2^-31``, halves up, within
      int32, then the rest of the shift, halves away from zero. A shift below 31 goes to
      the left first and drops the bits beyond int32.
    - ``tflite_single`` rounds once, halves up. With a multiplier of 15 bits it is what
      TFLite does to int64 accumulators.

    Args:
      acc: Accumulators, int32 (int64 where its product fits), any shape.
      multiplier: int32, broadcasts against ``acc``, of either sign.
      shift: int32, same shape, 0 to 62.
      zero_point: int32, of the codes.
      qmin: Least code.
      qmax: Largest code.
      rule: Rule of rounding.

    Returns:
      Codes, int32, shape of ``acc``.

    Raises:
      TypeError: if an argument is not of an integer type.
      ValueError: for an unknown rule; for known values that are outside of these
        ranges, or ``qmin > qmax``. Values that are traced are not looked at.

    Example:
      >>> requantize(jnp.int32([5, 6, 7, -6]), 2**30, 32, qmin=-128, qmax=127)
      Array([ 1,  2,  2, -2], dtype=int32)

    References:
      TensorFlow Lite, `MultiplyByQuantizedMultiplier`, lite/kernels/internal/common.cc;
      gemmlowp, fixedpoint/fixedpoint.h; XNNPACK, src/qs8-requantization.
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
    """Requantizes a sum of products, with one rounding at its end.

    Args:
      terms: Pairs of accumulators and multipliers, int32. The sum of their products,
        without signs, must stay at 2^62 or below.
      shift: int32, common to all.
      zero_point: int32, of the codes.
      qmin: Least code.
      qmax: Largest code.
      rule: Rule of rounding. ``tflite_double`` takes one term only.

    Returns:
      Codes, int32, shape of the accumulators.

    Raises:
      TypeError: as `requantize`.
      ValueError: as `requantize`; if the rule rounds each product, and there are
        several; if there is no term.
    """
    _check_requantizer(terms, shift, zero_point, qmin, qmax, rule)
    if rule == "tflite_double" and len(terms) > 1:
        raise ValueError(
            f"The rule 'tflite_double' rounds each product, got a sum of {len(terms)}. "
            "Requantize the terms one by one, then their sum."
        )
    low, high, zero = (jnp.asarray(v, jnp.int32) for v in (qmin, qmax, zero_point))
    with jax.enable_x64(True):
        wide = [(_to_int64(acc), _to_int64(m)) for acc, m in terms]
        if rule == "fp32_half_even":
            wide = [(round_to_float32(acc), m) for acc, m in wide]
        product = functools.reduce(jnp.add, (acc * m for acc, m in wide))
        if rule == "fp32_half_even":
            product = round_to_float32(product)
        if rule == "tflite_double":
            rounded = _round_twice(*wide[0], _to_int64(shift))
        elif rule == "tflite_single":
            rounded = _shift_half_up(product, _to_int64(shift))
        elif any(acc.dtype == jnp.int64 for acc, _ in terms):
            rounded = _shift_round_wide(product, _to_int64(shift))
        else:
            rounded = shift_round(product, _to_int64(shift))
        low, high, zero = (_to_int64(v) for v in (low, high, zero))
        return jnp.clip(rounded + zero, low, high).astype(jnp.int32)


def _check_requantizer(
    terms: Any, shift: Any, zero_point: Any, qmin: Any, qmax: Any, rule: Any
) -> None:
    """Raises for invalid arguments of `requantize_sum`."""
    known = get_args(RequantizeRule)
    if rule not in known:
        raise ValueError(f"`rule` must be one of {', '.join(known)}, got {rule!r}.")
    if not terms:
        raise ValueError("`terms` must hold at least one pair, got none.")
    for acc, multiplier in terms:
        _integer("acc", acc)
        _check_within("multiplier", multiplier, _INT32_MIN, _INT32_MAX)
    _check_within("shift", shift, 0, MOST_SHIFT)
    for name, value in (("zero_point", zero_point), ("qmin", qmin), ("qmax", qmax)):
        _check_within(name, value, _INT32_MIN, _INT32_MAX)
    if _is_known(qmin) and _is_known(qmax):
        if np.any(np.asarray(qmin) > np.asarray(qmax)):
            raise ValueError(f"`qmin` must not be above `qmax`, got {qmin} and {qmax}.")


def _check_within(name: str, x: Any, least: int, most: int) -> None:
    """Raises unless integers, as far as they are known, lie in a range."""
    _integer(name, x)
    if not _is_known(x):
        return
    values = np.asarray(x)
    if np.any((values < least) | (values > most)):
        raise ValueError(f"`{name}` must lie in {least}..{most}, got {x}.")


def _integer(name: str, x: Any) -> None:
    """Raises unless values are of an integer type."""
    if isinstance(x, int) and not isinstance(x, bool):
        return  # A Python integer beyond every type passes too.
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be of an integer type, got {x!r} ({dtype}).")


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _round_twice(acc: jax.Array, multiplier: jax.Array, shift: jax.Array) -> jax.Array:
    """Rounds as gemmlowp: a saturating doubling high product, then a rounding shift."""
    zero = jnp.zeros_like(shift)
    left = jnp.maximum(31 - shift, zero)
    wrapped = (acc << left).astype(jnp.int32).astype(jnp.int64)
    high = jnp.minimum(_shift_half_up(wrapped * multiplier, zero + 31), 2**31 - 1)
    right = jnp.maximum(shift - 31, zero)
    # Halves away from zero are halves up on either side of it.
    return jnp.sign(high) * _shift_half_up(jnp.abs(high), right)


def _shift_half_up(value: jax.Array, shift: jax.Array) -> jax.Array:
    return (value + ((jnp.ones_like(shift) << shift) >> 1)) >> shift


def _to_int64(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x).astype(jnp.int64)


def round_to_float32(value: jax.Array) -> jax.Array:
    """Returns int64 values rounded to their 24 leading bits, half to even."""
    length = 64 - jax.lax.clz(jnp.abs(value))
    dropped = jnp.maximum(length - 24, jnp.zeros_like(length))
    return _shift_round_wide(value, dropped) << dropped


def _shift_round_wide(value: jax.Array, shift: jax.Array) -> jax.Array:
    """Computes `shift_round` of values up to the end of their range."""
    one = jnp.ones_like(shift)
    whole, rest = value >> shift, value & ((one << shift) - one)
    half = (one << shift) >> 1
    is_up = (rest > half) | ((rest == half) & ((whole & one) == one))
    return whole + jnp.where((shift > 0) & is_up, one, 0 * one)


def align_products(
    a: jax.Array, b: jax.Array, multipliers: Sequence[int], exponents: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Returns integers that compare as float32 products do.

        float32(a * m_0 * 2^e_0)  and  float32(b * m_1 * 2^e_1)

    exactly, however far the exponents are apart.

    Args:
      a: int64, below 2^25 in magnitude.
      b: int64, as ``a``; broadcasts.
      multipliers: ``m_0, m_1``, below 2^24: mantissas of scales.
      exponents: ``e_0, e_1``.

    Returns:
      Two int64 arrays, each less than, equal to or greater than the other where the
      products are.
    """
    pair = [
        round_to_float32(x * jnp.int64(m))
        for x, m in zip((a, b), multipliers, strict=True)
    ]
    # The finer side in units of the other: its whole part, and whether there is more.
    finer = 0 if exponents[0] < exponents[1] else 1
    bits = jnp.int64(min(abs(exponents[0] - exponents[1]), MOST_SHIFT))
    whole = pair[finer] >> bits
    more = (pair[finer] != whole << bits).astype(jnp.int64)
    pair[finer], pair[1 - finer] = 2 * whole + more, 2 * pair[1 - finer]
    return pair[0], pair[1]
