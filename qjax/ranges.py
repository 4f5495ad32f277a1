"""From the range of values to the grid that holds it."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import (
    Axis,
    QParams,
    QSpec,
    as_numbers,
    check_spec,
    code_range,
    scale_shape,
)
from qjax.rounding import ceil_power_of_two, half_even, select


def min_max_params(low: ArrayLike, high: ArrayLike, spec: QSpec) -> QParams:
    """Returns the finest grid of ``spec`` that holds ``[low, high]`` and zero.

        asymmetric:  scale = (high - low) / (qmax - qmin)
                     zero_point = min(qmin - round(low / scale), qmax)
        symmetric:   scale = max(high / qmax, low / qmin),  zero_point = 0

    after widening the range to contain 0; quotients are products with a reciprocal, as
    in `quantize`. An asymmetric scale is at least ``max(high, -low) / 2^31``, which
    counts for 32 bits alone. Zero lies on the grid, so that an end of an asymmetric
    range may saturate by half a step. With ``spec.power_of_two`` the scale is rounded
    up to the least power of two that holds the range, up to float rounding of its width
    and, for words of more than 24 bits, of the number of codes. An empty
    range (``low == high == 0``) gets scale 1; others stay within 2^-126 and 2^126.

    Args:
      low: Least value, shape of the scale wanted.
      high: Largest value, same shape.
      spec: Word length and range of the codes.

    Returns:
      `QParams`, float32 and int32, shape of ``low``. The scale is NaN if an end is.
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    qmin, qmax = code_range(spec)
    bottom, top = (q.astype(jnp.float32) for q in (qmin, qmax))
    if spec.symmetric:
        scale = _widest(high, low, top, bottom)
        fits = lambda s: (high <= top * s) & (low >= bottom * s)
    else:
        # Halved, so that the width of the full float range is finite.
        half = high * 0.5 - low * 0.5
        scale = half * (2.0 * _reciprocal(top - bottom))
        if not _has_most_bits(spec, 30):
            # Steps from zero fit int32. Wider than this are only words of 32 bits.
            scale = jnp.maximum(scale, jnp.maximum(high, -low) * 2.0**-31)
        fits = lambda s: half <= (top - bottom) * (0.5 * s)
    if spec.power_of_two:
        # The quotient may have been rounded across a power of two, either way.
        s = ceil_power_of_two(scale)
        held = jnp.where(fits(0.5 * s), 0.5 * s, jnp.where(fits(s), s, 2.0 * s))
        scale = jnp.where(jnp.isnan(scale), scale, held)
    # The reciprocal must be a normal number: the CPU takes others to zero.
    scale = lax.clamp(np.float32(2.0**-126), scale, np.float32(2.0**126))
    scale = select(low == high, np.float32(1), scale)  # Both are 0.
    if spec.symmetric:
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32))
    # Steps from qmin to zero, unsigned: up to 2^32 - 1 of them. NaN has the most.
    steps = half_even(-low * (1.0 / scale))
    if _has_most_bits(spec, 24):
        width = np.float32(int(qmax) - int(qmin))
        above = select(steps < width, steps, width).astype(jnp.int32)
        return QParams(scale, above + qmin)
    least, most = (jnp.asarray(q).astype(jnp.uint32) for q in (qmin, qmax))
    fewer = jnp.where(steps < 2.0**32, steps, 0.0).astype(jnp.uint32)
    above = jnp.where(steps < 2.0**32, jnp.minimum(fewer, most - least), most - least)
    return QParams(scale, (least + above).astype(jnp.int32))


def _widest(high: Any, low: Any, top: Any, bottom: Any) -> jax.Array:
    """Returns the least scale of a symmetric word that holds ``[low, high]``."""
    if isinstance(top, np.float32) and (bottom == -top or not bottom):
        return (jnp.maximum(high, -low) if bottom else high) * _reciprocal(top)
    return jnp.maximum(high * _reciprocal(top), low * _reciprocal(bottom))


def _has_most_bits(spec: QSpec, most: int) -> bool:
    """Returns whether the word length is known and at most ``most``."""
    return isinstance(spec.bits, numbers.Integral) and spec.bits <= most


def abs_max_params(x: ArrayLike, spec: QSpec) -> QParams:
    """Returns the finest symmetric grid of ``spec`` that holds ``x``, as for weights.

    Args:
      x: Values, shape ``[...]``.
      spec: Word length, range and axis. Taken as symmetric.

    Returns:
      `QParams`, shape ``[]``; with ``spec.axis`` that of ``x`` with size 1 elsewhere.

    Example:
      >>> x = jnp.array([[0.5, -1.0], [0.25, 2.0]])
      >>> abs_max_params(x, QSpec(bits=8, narrow_range=True, axis=-1)).scale * 127
      Array([[0.5, 2. ]], dtype=float32)
    """
    symmetric = dataclasses.replace(check_spec(spec), symmetric=True)
    return min_max_params(*reduce_range(as_numbers(x, "x"), spec.axis), symmetric)


def reduce_range(x: jax.Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value in float32, in the shape of a scale.

    An empty ``x`` has the range (0, 0).
    """
    shape = scale_shape(x.shape, axis)
    over = tuple(d for d in range(x.ndim) if not shape or shape[d] != x.shape[d])
    keep = bool(shape)
    x = x.astype(jnp.float32)
    if x.size == 0:
        zeros = jnp.zeros(shape, jnp.float32)
        return zeros, zeros
    if not shape and x.size <= _MOST_AT_ONCE:
        return _ends(x)
    return jnp.min(x, over, keepdims=keep), jnp.max(x, over, keepdims=keep)


# Most values whose two ends are one reduction. XLA:CPU makes four of them otherwise,
# which take 5 times as long for 2,048 values and 1.3 times for a million.
_MOST_AT_ONCE = 1 << 20


@jax.custom_jvp
def _ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest of all values, NaN if one is."""
    inf = np.float32(np.inf)
    take = lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1]))
    low, high = lax.reduce((x, x), (inf, -inf), take, tuple(range(x.ndim)))
    return low, high


@_ends.defjvp
def _ends_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _ends(x), tuple(jax.jvp(f, (x,), (dx,))[1] for f in (jnp.min, jnp.max))


def _reciprocal(x: Any) -> Any:
    """Returns ``1 / x``, and 0 at 0, where one side of the range has no codes."""
    if isinstance(x, np.float32):
        return np.float32(0) if x == 0 else np.float32(1) / x
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))
