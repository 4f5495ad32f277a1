"""Normalisation of codes by the moments of what a mask keeps, in integers.

    c = max(sum(m), least),  S = sum(m * q),  Q = sum(m * q^2)
    u = c * q - S,  v = c * Q - S^2  about the mean; or u = c * q, v = c * Q about zero
    t = u / sqrt(max(v + epsilon * c^2, floor * c^2))
    code = floor(t * multiplier + bias + 1/2) + zero_point

over groups of codes ``q``, less their zero point, of which a mask ``m`` of 0 and 1
keeps some. ``v`` is exact, and so is ``u``; ``epsilon`` and ``floor`` have 23 bits or
more. What the mask leaves out is normalised too, by the moments of the others: no root
bounds it, so that ``t`` has 30 bits and an exponent of its own. Where nothing is kept,
``u`` is 0, or ``q`` with a ``least`` of 1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.integer import binary_parts, clipped_codes
from qjax.integer_norm import fraction, power_of_two, reciprocal_root

_HELD = 30  # Bits of a normalised value.
_MOST_POINT = 900  # Powers of two of it are float64 numbers.


def most_places(is_byte: bool) -> int:
    """Returns the most codes in a group whose sums 64 bits hold.

    Args:
      is_byte: Whether the codes are 2^8 at most from each other, else 2^16.
    """
    return 1 << (18 if is_byte else 15)


def number_kept(
    mask: jax.Array, axes: Sequence[int], groups: Sequence[int]
) -> jax.Array:
    """Returns the number that a mask keeps in the group of each place, int32.

    Args:
      mask: Truth values.
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
    """
    split = dict(zip(axes, groups, strict=True))
    pairs = ((split.get(d, 1), n) for d, n in enumerate(mask.shape))
    sizes = [s for g, n in pairs for s in (g, n // g)]
    over = tuple(2 * d + 1 for d in split)
    found = jnp.sum(mask.reshape(sizes), over, keepdims=True, dtype=np.int32)
    return jnp.broadcast_to(found, sizes).reshape(mask.shape)


def added(epsilon: Any, floor: Any, count: int, xp: Any = np) -> tuple[Any, Any, Any]:
    """Writes what is added to a variance in integers behind a common point.

    Args:
      epsilon: float64, ``[]``, not negative, in squares of one code.
      floor: Least variance, likewise.
      count: Most codes that a mask keeps in a group.
      xp: NumPy or `jax.numpy`; the latter where 64 bits are enabled.

    Returns:
      ``epsilon`` and ``floor``, int64, whose product with ``count^2`` is below 2^61,
      and the bits behind their point, int32.
    """
    bits = 61 - 2 * count.bit_length()
    _, exponent = binary_parts(xp.maximum(epsilon, floor), xp)
    point = xp.clip(bits - exponent, -_MOST_POINT, _MOST_POINT)
    power, most = power_of_two(point, xp), 2.0**bits - 1
    held = (xp.minimum(xp.rint(x * power), most) for x in (epsilon, floor))
    epsilon, floor = (x.astype(xp.int64) for x in held)
    return epsilon, floor, point.astype(xp.int32)


def normalised(
    codes: jax.Array,
    kept: jax.Array,
    axes: tuple[int, ...],
    groups: tuple[int, ...],
    epsilon: Any,
    floor: Any,
    point: Any,
    *,
    least: int,
    is_centred: bool,
    most_places: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes codes over the root of the squares of those that are kept, by groups.

    Args:
      codes: int32, less their zero point, at most 2^16 from each other.
      kept: Truth values; broadcast to the codes.
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
      epsilon: int64, ``[]``, added to a variance.
      floor: int64, ``[]``, least variance.
      point: int32, ``[]``, bits behind the point of both.
      least: Least count of what is kept, 0 or 1.
      is_centred: Whether values are about the mean of what is kept, else about zero.
      most_places: Most codes of a group, by which values have their bits; None for
        those of this shape.

    Returns:
      ``(t, exponent)``, int32, shape of the codes: ``t * 2^exponent`` in units of
      ``2^-fraction``, the exponent 0 or more, and above 0 only with ``|t| >= 2^29``.
    """
    shape, count = codes.shape, 1
    split: list[int] = []
    over: list[int] = []
    for d, n in enumerate(shape):
        g = groups[axes.index(d)] if d in axes else 1
        split += [g, n // g] if d in axes and g > 1 else [n]
        over += [len(split) - 1] if d in axes else []
        count *= n // g if d in axes else 1
    with jax.enable_x64(True):
        x = codes.reshape(split).astype(jnp.int64)
        m = jnp.broadcast_to(kept, shape).reshape(split)
        total = lambda y: jnp.sum(jnp.where(m, y, 0), tuple(over), keepdims=True)
        number = jnp.maximum(total(jnp.ones_like(x)), least)
        squares, u = number * total(x * x), number * x
        if is_centred:
            mean = total(x)
            squares, u = squares - mean * mean, u - mean
        whole, half_point = _sum_of(
            squares, number * number, *map(jnp.asarray, (epsilon, floor, point))
        )
        root, shift = reciprocal_root(jnp.maximum(whole, 1))
        down = (
            shift.astype(jnp.int64) - half_point - fraction(most_places or count, True)
        )
        t, exponent = _held(u * root.astype(jnp.int64), down)
        return t.reshape(shape), exponent.reshape(shape)


def _sum_of(
    squares: jax.Array, ones: jax.Array, epsilon: Any, floor: Any, point: Any
) -> tuple[jax.Array, jax.Array]:
    """Adds ``epsilon * ones`` to squares, at least ``floor * ones``, in 61 bits.

    Returns:
      The sum, and half of the bits behind its point.
    """
    epsilon, floor = epsilon * ones, floor * ones
    point = point.astype(jnp.int64)
    up = jnp.minimum(lax.clz(squares), lax.clz(jnp.maximum(epsilon, floor)) + point)
    up = (up - 3) & ~jnp.ones_like(up)
    own = _shifted(squares, up)
    epsilon, floor = (_shifted(x, up - point) for x in (epsilon, floor))
    return jnp.maximum(own + epsilon, floor), up >> 1


def _shifted(x: jax.Array, up: jax.Array) -> jax.Array:
    """Shifts integers to the left, or to the right where ``up`` is negative."""
    down = jnp.clip(-up, 0, 63)
    return jnp.where(up < 0, x >> down, x << jnp.clip(up, 0, 63))


def _held(x: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``x * 2^-down`` as 30 bits and an exponent that is not negative."""
    length = 64 - lax.clz(jnp.abs(x))
    exponent = jnp.clip(length - _HELD - down, 0, 62)
    down = jnp.minimum(down + exponent, 62)
    half = jnp.where(down > 0, (jnp.ones_like(x) << jnp.maximum(down, 0)) >> 1, 0)
    found = _shifted(x + half, -down)
    most = (1 << _HELD) - 1  # Beyond it only where the exponent is at its end.
    return jnp.clip(found, -most, most).astype(jnp.int32), exponent.astype(jnp.int32)


def coded(
    values: jax.Array,
    exponent: jax.Array,
    multiplier: Any,
    bias: Any,
    shift: Any,
    bias_shift: Any,
    zero_point: Any,
    low: Any,
    high: Any,
) -> tuple[jax.Array, jax.Array]:
    """Rounds normalised values to codes, halves up.

        acc = t * multiplier + (bias * 2^bias_shift >> min(exponent, shift))
        code = clip(floor(acc * 2^-(shift - exponent) + 1/2) + zero_point, low, high)

    With an exponent above ``shift`` what has a factor is beyond all codes, and what has
    none is the offset.

    Args:
      values: int32, at most 2^30.
      exponent: int32, shape of the values, 0 or more.
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
        down = jnp.maximum(wide(shift) - wide(exponent), 0)
        half = (jnp.ones_like(down) << down) >> 1
        less = jnp.minimum(wide(exponent), wide(shift))
        offset = ((wide(bias) << wide(bias_shift)) >> less) + half
        steps = (wide(values) * wide(multiplier) + offset) >> down
        return clipped_codes(steps, zero_point, low, high)
