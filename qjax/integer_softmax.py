"""Softmax of codes in integers: one algorithm, simulated and shipped.

    e = round(2^30 * exp(-(max - q) * scale))      a table, by the distance from the max
    p = round(2^30 * e / sum(e))                   by one reciprocal of 32 bits a row
    code = round(p * 2^-30 / scale_out) + zero_point

The table is made of the bits of the scale, in integers: a simulation, whose scale is
traced, and a program, whose scale is known, have the same integers wherever they run.
Its entries are within 2 of ``2^30 exp``; the sum of ``p`` over n places is within n/2
of ``2^30``.

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

Empty = Literal["zero", "all", "uniform"]

FRACTION = 30  # Bits behind the point of the exponentials and of the probabilities.
_MOST_PLACES = 1 << 15  # Of which 64 bits hold the sum, and its reciprocal's remainder.
_BITS = 36  # Behind the point of an exponent of two.
_LOG2E = round(math.log2(math.e) * 2**41)
_LN2 = round(math.log(2) * 2**31)
_TERMS = 11  # Of the series of exp on [0, ln 2]: the rest is below 2^-35.


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


def probabilities(
    codes: jax.Array,
    tables: jax.Array,
    axes: tuple[int, ...],
    keep: jax.Array | None = None,
    empty: Empty = "zero",
) -> jax.Array:
    """Computes the probabilities of a softmax over codes, in units of 2^-30.

    Args:
      codes: int32, 2^16 apart at most.
      tables: int32. ``[size]``: exponentials by distance from the largest code, the
        last one for all that are farther; or ``[2, 256]``, as of `exp_tables`.
      axes: Axes that a sum goes over.
      keep: Truth values, broadcast against the codes: what takes part. None: all.
      empty: What a row is in which nothing takes part: 0 everywhere; the softmax of
        all; or all alike.

    Returns:
      int32, 0 to 2^30, shape of the codes: 0 for what takes no part.
    """
    with jax.enable_x64(True):
        wide = codes.astype(jnp.int32)
        if keep is not None and empty != "zero":
            is_empty = ~jnp.any(
                jnp.broadcast_to(keep, codes.shape), axes, keepdims=True
            )
            wide = jnp.where(is_empty & (empty == "uniform"), 0, wide)
            keep = keep | is_empty
        kept = wide if keep is None else jnp.where(keep, wide, _LEAST)
        distance = jnp.max(kept, axes, keepdims=True, initial=_LEAST) - wide
        parts = _looked_up(tables, jnp.maximum(distance, 0))
        if keep is not None:
            parts = jnp.where(keep, parts, jnp.zeros_like(parts))
        total = jnp.maximum(jnp.sum(parts, axes, keepdims=True), 1)
        length = 64 - lax.clz(total)
        # round(2^(31 + length) / total), in (2^31, 2^32], by a quotient of two parts.
        one = jnp.ones_like(total)
        rest = jnp.maximum(length - FRACTION, 0)
        first = (one << (31 + length - rest)) // total
        left = (one << (31 + length - rest)) - first * total
        doubled = (first << (rest + 1)) + (left << (rest + 1)) // total
        shift = 31 + length - FRACTION
        found = (parts * ((doubled + 1) >> 1) + ((one << shift) >> 1)) >> shift
        return found.astype(jnp.int32)


def _looked_up(tables: jax.Array, distance: jax.Array) -> jax.Array:
    """Returns exponentials by distance, int64."""
    read = lambda table, at: (
        table.at[at].get(mode="promise_in_bounds").astype(jnp.int64)
    )
    if tables.ndim == 1:
        return read(tables, jnp.minimum(distance, tables.shape[0] - 1))
    high = jnp.minimum(distance >> 8, 255)
    product = read(tables[0], high) * read(tables[1], distance & 255)
    return (product + (1 << (FRACTION - 1))) >> FRACTION


_LEAST = np.int32(-(2**31) + 2**17)  # Below all codes; differences stay in int32.
