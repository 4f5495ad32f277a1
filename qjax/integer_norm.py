"""Normalisation of codes in integers: one algorithm, simulated and shipped.

    u = n * q - sum(q),  v = n * sum(q^2) - sum(q)^2   about the mean; or
    u = q,               v = sum(q^2)                  about zero
    t = u / sqrt(max(v + epsilon, floor))              by one root of 29 bits a group
    code = floor(t * multiplier + bias + 1/2) + zero_point

over groups of n codes, less their zero point. ``v`` is exact; ``epsilon`` and ``floor``
are integers behind a common point, the root is Newton's, and its relative error is
below 2^-26. Where they bound ``t``, it has more bits behind its point: 30 in all.

References:
  Kim et al., "I-BERT: Integer-only BERT Quantization", 2021 (arXiv:2101.01321): the
  root of a variance by Newton's iteration in integers. TensorFlow Lite,
  `GetInvSqrtQuantizedMultiplierExp`, kernels/internal/common.cc: that of one over it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.integer import binary_parts, clipped_codes

ROOT = 29  # Bits behind the point of a root of a number in [1/4, 1).
MOST_POINT = 30  # Most bits behind the point of a sum of squares; even.
MOST_GAIN = 0.5  # Most codes for a unit of a normalised value: its half rounds them.
_STEPS = 5  # Of Newton's iteration: the error is squared by each, from 1/8.
# A line by 1/sqrt(a) on [1/4, 1): at most .12 from it.
_LINE = round(2.2 * 2**30), round(1.3 * 2**30)


def most_places(is_byte: bool) -> int:
    """Returns the most codes in a group whose sums 64 bits hold.

    Args:
      is_byte: Whether the codes are 2^8 at most from each other, else 2^16.
    """
    return 1 << (23 if is_byte else 15)


def places(shape: Sequence[int], axes: Sequence[int], groups: Sequence[int]) -> int:
    """Returns the number of codes in a group.

    Args:
      shape: Shape of the codes.
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
    """
    return math.prod(shape[d] // g for d, g in zip(axes, groups, strict=True))


def fraction(count: int, is_centred: bool) -> int:
    """Returns the bits behind the point of a normalised value in 32 bits.

    Args:
      count: Number of codes in a group, of which none is above its root.
      is_centred: Whether values are about the mean; else none is above 1.
    """
    return 30 - (((count - 1).bit_length() + 1) // 2 if is_centred else 0)


def point(exponent: Any, count: int, is_centred: bool, is_byte: bool, xp: Any) -> Any:
    """Returns the bits behind the point of the sums of squares, an even number.

    Args:
      exponent: ``epsilon``, or what is more of it and ``floor``, is below
        ``2^exponent`` in units of the sums; integer.
      count: Number of codes in a group.
      is_centred: Whether values are about the mean.
      is_byte: Whether the codes are 2^8 at most from each other, else 2^16.
      xp: NumPy or `jax.numpy`.
    """
    bits = 2 * (8 if is_byte else 16) + (2 if is_centred else 1) * max(
        count.bit_length(), 1
    )
    return xp.maximum(xp.minimum(min(MOST_POINT, 60 - bits), 60 - exponent), -60) & ~1


def added(
    epsilon: Any, floor: Any, count: int, is_centred: bool, is_byte: bool, xp: Any = np
) -> tuple[Any, Any, Any, Any]:
    """Writes what is added to a sum of squares in integers behind a common point.

    Args:
      epsilon: float64, ``[]``, not negative, in units of the sum.
      floor: Least sum, likewise.
      count: Number of codes in a group.
      is_centred: Whether values are about the mean.
      is_byte: Whether the codes are 2^8 at most from each other, else 2^16.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled.

    Returns:
      ``epsilon`` and ``floor``, int64, and the bits behind their point, int32; and
      `more_bits` of them.
    """
    _, exponent = binary_parts(xp.maximum(epsilon, floor), xp)
    shift = point(exponent, count, is_centred, is_byte, xp)
    power = power_of_two(shift, xp)
    most = 2.0**60  # Reached only where no code counts beside it.
    held = (xp.minimum(xp.rint(x * power), most) for x in (epsilon, floor))
    epsilon, floor = (x.astype(xp.int64) for x in held)
    more = more_bits(epsilon, floor, shift, count, is_centred, is_byte, xp)
    return epsilon, floor, shift.astype(xp.int32), more.astype(xp.int32)


def power_of_two(exponent: Any, xp: Any) -> Any:
    """Returns a power of two by its bits, float64: exact, as a product with it is."""
    bits = (exponent.astype(xp.int64) + 1023) << 52
    if xp is np:
        return bits.view(np.float64)
    return lax.bitcast_convert_type(bits, jnp.float64)


def more_bits(
    epsilon: Any,
    floor: Any,
    shift: Any,
    count: int,
    is_centred: bool,
    is_byte: bool,
    xp: Any,
) -> Any:
    """Returns bits that values have beyond `fraction`, where ``epsilon`` is large.

    Args:
      epsilon: int64, ``[]``, added to a sum of squares.
      floor: int64, ``[]``, least sum.
      shift: Bits behind the point of both.
      count: Number of codes in a group.
      is_centred: Whether values are about the mean.
      is_byte: Whether the codes are 2^8 at most from each other, else 2^16.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled.

    Returns:
      int64, ``[]``, 0 or more: a value is below 2^29 with them.
    """
    least = xp.maximum(xp.maximum(epsilon, floor), 1)
    length: Any = int(least).bit_length() if xp is np else 64 - lax.clz(least)
    # No value is above 2^most, and no root below 2^((length - 1 - shift) / 2).
    most = (8 if is_byte else 16) + (count.bit_length() if is_centred else 0)
    left = 2 * (29 - fraction(count, is_centred) - most)
    more = (left + length - 1 - shift.astype(xp.int64)) >> 1
    # At the least point what is added may be more than is held.
    return xp.where((least > 1) & (shift > -60), xp.maximum(more, 0), 0)


def normalised(
    codes: jax.Array,
    axes: tuple[int, ...],
    groups: tuple[int, ...],
    epsilon: Any,
    floor: Any,
    shift: Any,
    more: Any = 0,
    *,
    is_centred: bool,
    is_byte: bool,
) -> jax.Array:
    """Computes codes about their mean over the root of their squares, by groups.

    Args:
      codes: int32, less their zero point, at most 2^8 or 2^16 from each other.
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
      epsilon: int64, ``[]``, added to a sum of squares.
      floor: int64, ``[]``, least sum.
      shift: int32, ``[]``, bits behind the point of both; even, may be negative.
      more: int32, ``[]``, bits of the result beyond `fraction`: `more_bits`.
      is_centred: Whether values are about the mean, else about zero.
      is_byte: Whether the codes are 2^8 at most from each other.

    Returns:
      int32, shape of the codes, in units of ``2^-(fraction + more)``.
    """
    shape, count = codes.shape, places(codes.shape, axes, groups)
    split: list[int] = []
    over: list[int] = []
    for d, n in enumerate(shape):
        g = groups[axes.index(d)] if d in axes else 1
        split += [g, n // g] if d in axes and g > 1 else [n]
        over += [len(split) - 1] if d in axes else []
    with jax.enable_x64(True):
        x = codes.reshape(split)
        squares = _sum_of_squares(x, tuple(over), is_byte)
        if is_centred:
            total = _sum(x, tuple(over), is_byte)
            squares = count * squares - total * total
            x = count * x - total.astype(jnp.int32)  # Wraps, and back.
        raised = jnp.maximum(shift, 0).astype(jnp.int64)
        lowered = jnp.maximum(-shift, 0).astype(jnp.int64)
        whole = jnp.maximum(((squares >> lowered) << raised) + epsilon, floor)
        root, down = reciprocal_root(jnp.maximum(whole, 1))
        half_point = jnp.asarray(shift).astype(jnp.int32) >> 1
        down = down - half_point - fraction(count, is_centred) - jnp.int32(more)
        down = jnp.clip(down, 0, 62).astype(jnp.int64)
        half = (jnp.ones_like(down) << down) >> 1
        found = (x.astype(jnp.int64) * root.astype(jnp.int64) + half) >> down
        return found.astype(jnp.int32).reshape(shape)


def _sum(x: jax.Array, axes: tuple[int, ...], is_byte: bool) -> jax.Array:
    kind = jnp.int32 if is_byte else jnp.int64
    return jnp.sum(x, axes, keepdims=True, dtype=kind).astype(jnp.int64)


def _sum_of_squares(x: jax.Array, axes: tuple[int, ...], is_byte: bool) -> jax.Array:
    count = math.prod(x.shape[d] for d in axes)
    is_small = is_byte and count < 1 << 15
    squares = (x * x) if is_byte else x.astype(jnp.int64) * x.astype(jnp.int64)
    kind = jnp.int32 if is_small else jnp.int64
    return jnp.sum(squares, axes, keepdims=True, dtype=kind).astype(jnp.int64)


def reciprocal_root(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes ``root * 2^-shift``, one over the square root of integers.

    Args:
      x: int64, from 1 to 2^62 - 1.

    Returns:
      ``(root, shift)``, int32: the root from 2^29 to 2^30, its relative error is below
      2^-26.
    """
    up = (lax.clz(x) - 2) & ~jnp.ones_like(x)  # Even: x * 2^up is in [2^60, 2^62).
    a = (x << up) >> 30  # In [1/4, 1), 32 bits behind the point.
    root = _LINE[0] - ((_LINE[1] * a) >> 32)
    for _ in range(_STEPS):
        rest = (3 << 30) - ((((root * root) >> 30) * a) >> 32)
        root = (root * rest) >> 31
    return (root >> 1).astype(jnp.int32), (ROOT + 31 - (up >> 1)).astype(jnp.int32)


def scaled(gain: Any, offset: Any, xp: Any = np) -> tuple[Any, Any, Any, Any]:
    """Writes real factors and offsets of codes as integers of 32 bits.

        gain * t + offset = (multiplier * t + bias * 2^bias_shift) * 2^-shift

    Args:
      gain: float64, codes for each unit of a normalised value, any shape.
      offset: float64, codes, any shape.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled.

    Returns:
      Multipliers and biases, int32, at most 2^30; ``shift``, int32, from 0 to 62;
      ``bias_shift``, int32, from 0 to 31. Undefined where not `is_scalable`.
    """
    of_gain, of_offset = _exponents(gain, offset, xp)
    shift = xp.clip(xp.minimum(30 - of_gain, 60 - of_offset), 0, 62)
    bias_shift = xp.clip(shift + of_offset - 30, 0, 31)
    power = lambda bits: (xp.int64(1) << bits.astype(xp.int64)).astype(xp.float64)
    multiplier = xp.rint(gain * power(shift))
    bias = xp.rint(offset * power(xp.maximum(shift - bias_shift, 0)))
    found = multiplier, bias, shift, bias_shift
    return tuple(x.astype(xp.int32) for x in found)


def is_scalable(gain: np.ndarray, offset: np.ndarray) -> bool:
    """Returns whether `scaled` writes real factors and offsets as integers."""
    is_finite = bool(np.all(np.isfinite(gain)) and np.all(np.isfinite(offset)))
    return is_finite and all(int(e) <= 30 for e in _exponents(gain, offset, np))


def _exponents(gain: Any, offset: Any, xp: Any) -> tuple[Any, Any]:
    """Returns exponents of two above all factors, and above all offsets."""
    found = (binary_parts(xp.max(xp.abs(x)), xp)[1] for x in (gain, offset))
    return tuple(found)


def coded(
    values: jax.Array,
    multiplier: Any,
    bias: Any,
    shift: Any,
    bias_shift: Any,
    zero_point: Any,
    low: Any,
    high: Any,
) -> tuple[jax.Array, jax.Array]:
    """Rounds normalised values to codes, halves up.

        acc = t * multiplier + bias * 2^bias_shift
        code = clip(floor(acc * 2^-shift + 1/2) + zero_point, low, high)

    Args:
      values: int32, at most 2^30.
      multiplier: int32, broadcasts against the values, at most 2^30.
      bias: int32, broadcasts, at most 2^30.
      shift: int32, ``[]``, 0 to 62.
      bias_shift: int32, ``[]``, 0 to 31.
      zero_point: int32, ``[]``.
      low: Least code.
      high: Largest code.

    Returns:
      Codes, int32, and whether each is within its ends without a clip.
    """
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x).astype(jnp.int64)
        down = wide(shift)
        half = (jnp.ones_like(down) << down) >> 1
        offset = (wide(bias) << wide(bias_shift)) + half
        steps = (wide(values) * wide(multiplier) + offset) >> down
        return clipped_codes(steps, zero_point, low, high)
