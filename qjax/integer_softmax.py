"""Softmax of codes and its logarithm in integers: one algorithm, simulated and shipped.

    e = round(2^30 * exp(-(max - q) * scale))      a table, by the distance from the max
    p = round(2^30 * e / sum(e))                   by one reciprocal of 32 bits a row
    code = floor(p * 2^-30 / scale_out + 1/2) + zero_point

    L = round(2^26 * log(sum(e) * 2^-30))          by a series, once a row
    code = floor(((q - max) * scale - L * 2^-26) / scale_out + 1/2) + zero_point
    code = floor((max * scale + L * 2^-26) / scale_out + 1/2) + zero_point   logsumexp

The table is made of the bits of the scale, in integers: a simulation, whose scale is
traced, and a program, whose scale is known, have the same integers wherever they run.
Its entries are within 2 of ``2^30 exp``; the sum of ``p`` over n places is within n/2
of ``2^30``, if nothing is added to the sum below; ``L`` is within 1 of the logarithm of
its sum, which is off by 2n at most.

References:
  Kim et al., "I-BERT: Integer-only BERT Quantization", 2021 (arXiv:2101.01321): softmax
  of integers. Jacob and Warden, gemmlowp, fixedpoint/fixedpoint.h: exp by the bits of
  its argument. The table by distance is TensorFlow Lite's, of 256 float32 there.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.integer import clipped_codes

Empty = Literal["zero", "all", "uniform"]
Kind = Literal["softmax", "log_softmax", "logsumexp"]

FRACTION = 30  # Bits behind the point of the exponentials and of the probabilities.
_MOST_PLACES = 1 << 15  # Of which 64 bits hold the sum, and its reciprocal's remainder.
_BITS = 36  # Behind the point of an exponent of two.
_LOG2E = round(math.log2(math.e) * 2**41)
_LN2 = round(math.log(2) * 2**31)
_TERMS = 11  # Of the series of exp on [0, ln 2]: the rest is below 2^-35.
LOG = 26  # Bits behind the point of the logarithm of a sum.
POINT = 14  # Bits behind the point of codes before they are rounded.
_LN2_40 = round(math.log(2) * 2**40)
# 1 + z^2/3 + z^4/5 ... on [0, 1/3]: the rest is below 2^-35.
_ODDS = tuple(round(2**31 / k) for k in range(1, 20, 2))


def exp_table(scale: Any, xp: Any = np) -> Any:
    """Computes ``2^30 * exp(-d * scale)`` for the distances 0 to 255, in integers.

    Args:
      scale: float32, ``[]``, normal and positive; traced if ``xp`` is `jax.numpy`.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled.

    Returns:
      int64, ``[256]``, within 2 of the exact values; the first is 2^30.
    """
    bits: Any
    if xp is np:
        bits = np.float32(scale).view(np.int32).astype(np.int64)
    else:
        bits = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
        bits = bits.astype(jnp.int64)
    mantissa = (bits & 0x7FFFFF) | 0x800000
    right = 150 - _BITS - ((bits >> 23) & 0xFF)  # scale = mantissa * 2^-(right + bits)
    distance = xp.arange(256, dtype=xp.int64) * mantissa
    down = xp.clip(right, 0, 62)
    up = xp.clip(-right, 0, 20)  # More takes all but 0 beyond the end all the same.
    exponent = ((distance >> down) + _half_bit(distance, down, xp)) << up
    # In units of log2, by halves: the product has 82 bits.
    high, low = exponent >> 21, exponent & ((1 << 21) - 1)
    inside = high < 1 << 21
    high = xp.where(inside, high, 0)
    twos = (high * _LOG2E + ((low * _LOG2E) >> 21)) >> 20
    whole, rest = twos >> _BITS, (twos & ((1 << _BITS) - 1)) >> (_BITS - 31)
    y = (rest * _LN2 + (1 << 30)) >> 31
    term = xp.full_like(y, 1 << 31)
    for k in range(_TERMS, 0, -1):  # exp(-y) = 1 - y/1 (1 - y/2 (1 - y/3 ...
        term = (1 << 31) - ((y * term + (k << 30)) >> 31) // k
    down = xp.clip(whole + 1, 0, 40)
    return xp.where(inside, (term >> down) + _half_bit(term, down, xp), 0)


def _half_bit(x: Any, shift: Any, xp: Any) -> Any:
    """Returns the last bit that a shift to the right drops."""
    return xp.where(shift > 0, (x >> xp.maximum(shift - 1, 0)) & 1, 0)


def exp_tables(scale: Any, places: int, xp: Any = np) -> Any:
    """Computes exponentials by the two bytes of a distance.

        exp(-(256 * high + low) * scale) = exp(-high * 256 * scale) * exp(-low * scale)

    Args:
      scale: Same as for `exp_table`.
      places: Number of exponentials in a sum: `fraction`.
      xp: Same as for `exp_table`.

    Returns:
      int64, ``[2, 256]``, by high and by low byte, the latter with `fraction` bits.
    """
    drop = FRACTION - fraction(places)
    low = exp_table(scale, xp)
    low = (low >> drop) + _half_bit(low, xp.asarray(drop, xp.int64), xp)
    return xp.stack([exp_table(scale * np.float32(256), xp), low])


def joined_table(tables: np.ndarray, size: int) -> np.ndarray:
    """Returns the exponentials of ``size`` distances by the table of each byte."""
    high, low = np.divmod(np.arange(size), 256)
    product = tables[0][high] * tables[1][low]
    return (product + (1 << (FRACTION - 1))) >> FRACTION


def fraction(places: int) -> int:
    """Returns the bits behind the point of exponentials that 64 bits add up.

    Args:
      places: Number of exponentials in a sum.

    Returns:
      30; one less for each doubling beyond 2^15 places.
    """
    return FRACTION - max(0, (max(places, 1) - 1).bit_length() - 15)


def most_places(places: int) -> int:
    """Returns the most places of a sum with as many bits as `fraction` gives it."""
    return 1 << (15 + FRACTION - fraction(places))


def probabilities(
    codes: jax.Array,
    tables: jax.Array,
    axes: tuple[int, ...],
    keep: jax.Array | None = None,
    empty: Empty = "zero",
    plus: int = 0,
) -> jax.Array:
    """Computes the probabilities of a softmax over codes, in units of 2^-30.

    Args:
      codes: Integers of at most 32 bits, 2^16 apart at most.
      tables: int32. ``[size]``: exponentials by distance from the largest code, the
        last one for all that are farther; or ``[2, 256]``, as of `exp_tables`.
      axes: Axes that a sum goes over.
      keep: Truth values, broadcast against the codes: what takes part. None: all.
      empty: What a row is in which nothing takes part: 0 everywhere; the softmax of
        all; or all alike.
      plus: Number that is added to each sum, in the unit of the exponentials.

    Returns:
      int32, at most 2^30, shape of the codes: 0 for what takes no part.
    """
    with jax.enable_x64(True):
        parts, *_ = _exponentials(codes, tables, axes, keep, empty)
        total = jnp.maximum(_sum(parts, axes) + plus, 1)
        length = 64 - lax.clz(total)
        # round(2^(31 + length) / total), in (2^31, 2^32], by a quotient of two parts.
        one = jnp.ones_like(total)
        rest = jnp.maximum(length - FRACTION, 0)
        first = (one << (31 + length - rest)) // total
        left = (one << (31 + length - rest)) - first * total
        doubled = (first << (rest + 1)) + (left << (rest + 1)) // total
        reciprocal = jnp.minimum((doubled + 1) >> 1, 2**32 - 1)
        shift = (1 + length).astype(jnp.uint64)  # 31 + length - FRACTION.
        half = (jnp.ones_like(shift) << shift) >> 1
        # Products of numbers without sign, of 32 bits each, are one instruction.
        found = (_unsigned(parts) * _unsigned(reciprocal) + half) >> shift
        return found.astype(jnp.int32)


def _exponentials(
    codes: jax.Array,
    tables: jax.Array,
    axes: tuple[int, ...],
    keep: jax.Array | None,
    empty: Empty,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns exponentials, the largest code of each row, distances and what is kept.

    The exponential of what is not kept is 0, its distance means nothing.
    """
    if keep is not None and empty != "zero":
        whole = jnp.broadcast_to(keep, codes.shape)
        is_empty = ~jnp.any(whole, axes, keepdims=True)
        if empty == "uniform":
            codes = jnp.where(is_empty, jnp.zeros_like(codes), codes)
        keep = keep | is_empty
    least = jnp.asarray(jnp.iinfo(codes.dtype).min, codes.dtype)
    kept = codes if keep is None else jnp.where(keep, codes, least)
    top = jnp.max(kept, axes, keepdims=True, initial=least)
    distance = top.astype(jnp.int32) - codes.astype(jnp.int32)
    parts = _looked_up(tables, jnp.maximum(distance, 0))
    if keep is not None:
        parts = jnp.where(keep, parts, jnp.zeros_like(parts))
    return parts, top, distance, keep


def log_codes(
    codes: jax.Array,
    tables: jax.Array,
    axes: tuple[int, ...],
    keep: jax.Array | None,
    empty: Empty,
    *,
    is_sum: bool,
    point: int,
    factors: tuple[Any, Any, Any, Any],
    ends: tuple[Any, Any, Any],
) -> tuple[jax.Array, jax.Array]:
    """Computes logarithms of a softmax, or of the sum of exponentials, as codes.

        code = clip(floor(t * m_t * 2^-s_t - L * m_L * 2^-s_L + 1 / 2) + zero_point)

    ``t`` is a code less the largest one of its row; for a sum ``t`` is that largest
    code, and ``L`` is added. Both products are rounded to `POINT` bits first.

    Args:
      codes: As for `probabilities`; less their zero point for a sum.
      tables: As for `probabilities`.
      axes: Axes that a sum goes over.
      keep: As for `probabilities`; what takes no part has the least code.
      empty: As for `probabilities`.
      is_sum: Whether the result is one logarithm of a sum for each row, size 1 along
        the axes.
      point: Bits behind the point of the exponentials: `fraction`.
      factors: ``m_t``, ``s_t``, ``m_L``, ``s_L``, int32, ``[]``, as of
        `qjax.integer.fixed_point`; ``s_L`` more by `LOG`.
      ends: Zero point, least and largest code, int32, ``[]``.

    Returns:
      Codes, int32, and whether each is within its ends without a clip.
    """
    with jax.enable_x64(True):
        own = codes, tables, axes, keep, empty
        parts, top, distance, keep = _exponentials(*own)
        total = _sum(parts, axes)
        found = logarithm(jnp.maximum(total, 1), point)
        if is_sum:
            keep = None if keep is None else total > 0
            steps = top.astype(jnp.int64)
        else:
            steps, found = -distance.astype(jnp.int64), -found
        wide = tuple(jnp.asarray(x).astype(jnp.int64) for x in factors)
        rounded = _to_point(steps, *wide[:2]) + _to_point(found, *wide[2:])
        rounded = (rounded + (1 << (POINT - 1))) >> POINT
        result, inside = clipped_codes(rounded, *ends)
        if keep is None:
            return result, inside
        low = jnp.asarray(ends[1], jnp.int32)
        return jnp.where(keep, result, low), inside & keep


def _to_point(x: jax.Array, multiplier: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``x * multiplier * 2^-shift`` with `POINT` bits, halves up."""
    up, down = jnp.maximum(POINT - shift, 0), jnp.clip(shift - POINT, 0, 62)
    half = (jnp.ones_like(down) << down) >> 1
    found = (((x * multiplier) << up) + half) >> down
    return jnp.where(shift - POINT > 62, jnp.zeros_like(found), found)


def logarithm(total: jax.Array, point: int) -> jax.Array:
    """Computes ``2^26 * log(total * 2^-point)``, where 64 bits are enabled.

        log(a) = 2 (z + z^3/3 + z^5/5 ...),  z = (a - 1) / (a + 1),  a in [1, 2)

    Args:
      total: int64, from 1 to 2^62.
      point: Bits behind its point.

    Returns:
      int64, within 1 of the exact values.
    """
    length = 64 - lax.clz(total)
    up, down = jnp.maximum(32 - length, 0), jnp.maximum(length - 32, 0)
    a = (total << up) >> down  # In [1, 2), 31 bits behind the point.
    one = 1 << 31
    z = ((a - one) << 31) // (a + one)
    square = (z * z) >> 31
    series = jnp.full_like(z, _ODDS[-1])
    for odd in _ODDS[-2::-1]:
        series = odd + ((square * series) >> 31)
    part = ((z * series) >> 30) << 9
    whole = (length - 1 - point) * _LN2_40
    return (whole + part + (1 << (39 - LOG))) >> (40 - LOG)


def coded(
    shares: jax.Array,
    multiplier: Any,
    shift: Any,
    zero_point: Any,
    low: Any,
    high: Any,
) -> tuple[jax.Array, jax.Array]:
    """Rounds probabilities to codes, halves up.

        code = clip(floor(p * multiplier * 2^-shift + 1 / 2) + zero_point, low, high)

    Args:
      shares: Probabilities, int32, in units of 2^-30.
      multiplier: int32, ``[]``, not negative.
      shift: int32, ``[]``, 0 to 62.
      zero_point: int32, ``[]``, not above ``high``.
      low: Least code.
      high: Largest code.

    Returns:
      Codes, int32, and whether each is below the largest without a clip.
    """
    with jax.enable_x64(True):
        down = jnp.asarray(shift).astype(jnp.uint64)
        half = (jnp.ones_like(down) << down) >> 1
        steps = (_unsigned(shares) * _unsigned(jnp.asarray(multiplier)) + half) >> down
        zero, high, low = (jnp.asarray(q, jnp.int32) for q in (zero_point, high, low))
        most = (high.astype(jnp.int64) - zero.astype(jnp.int64)).astype(jnp.uint64)
        codes = jnp.minimum(steps, most).astype(jnp.uint32).astype(jnp.int32) + zero
        return jnp.maximum(codes, low), steps <= most


def _unsigned(x: jax.Array) -> jax.Array:
    return x.astype(jnp.uint32).astype(jnp.uint64)


def _sum(parts: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns sums in int64, by halves of 15 bits where int32 holds those of each."""
    if math.prod(parts.shape[d] for d in axes) > _MOST_PLACES:
        return jnp.sum(parts.astype(jnp.int64), axes, keepdims=True)
    add = lambda x: jnp.sum(x, axes, keepdims=True, dtype=jnp.int32).astype(jnp.int64)
    return (add(parts >> 15) << 15) + add(parts & ((1 << 15) - 1))


def _looked_up(tables: jax.Array, distance: jax.Array) -> jax.Array:
    """Returns exponentials by distance, int32."""
    read = lambda table, at: table.at[at].get(mode="promise_in_bounds")
    if tables.ndim == 1:
        return read(tables, jnp.minimum(distance, tables.shape[0] - 1))
    high, low = jnp.minimum(distance >> 8, 255), distance & 255
    product = _unsigned(read(tables[0], high)) * _unsigned(read(tables[1], low))
    return ((product + (1 << (FRACTION - 1))) >> FRACTION).astype(jnp.int32)
