"""From real values to QuantizeML's numbers, and their derivative."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import grid_codes
from qjax.quantizers.point import straight
from qjax.quantizers.quantizeml.integers import (
    MOST_FRAC_BITS,
    as_integers,
    check_fits,
    check_value_bits,
    fitting_bits,
    lift,
)
from qjax.quantizers.quantizeml.numbers import FixedPoint, Number, QFloat, to_float
from qjax.rounding import (
    ceil_power_of_two,
    floor_log2,
    half_even,
    int_range,
    power_of_two,
    quotient,
)


def straight_through(x: jax.Array, q: Number) -> jax.Array:
    """Returns the values of ``q`` with the derivative of ``x``, which they round.

        y = to_float(q)
        dx = dy                                  also where a code saturates
        dscale = dy * (codes * 2^-frac_bits - x / scale)

    The straight-through estimator of QuantizeML: rounding and saturation have the
    derivative 1 everywhere, ``frac_bits`` has none, and a float scale, where it was
    found from ``x``, passes its own on.

    Args:
      x: Real values, shape of the codes.
      q: Numbers that a function of this module made of them.

    Returns:
      Values, shape and dtype of ``x``.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> f = lambda x: straight_through(x, quantize_fixed_point(x, 3, 1)).sum()
      >>> jax.value_and_grad(f)(jnp.array([0.3, 99.0]))
      (Array(4., dtype=float32), Array([1., 1.], dtype=float32))

    References:
      QuantizeML 1.2.5. The estimator is that of Bengio et al., 2013 (arXiv:1308.3432).
    """
    if jnp.shape(x) != q.codes.shape:
        raise ValueError(
            f"`x` must be what `q` rounds, of shape {q.codes.shape}, got shape "
            f"{jnp.shape(x)}."
        )
    real = x.astype(jnp.float32)
    if isinstance(q, QFloat):
        scale = lift(q.scale, x.ndim)
        off = to_float(q.fixed_point) - quotient(real, scale)
        real = real + lax.stop_gradient(off) * scale
    return straight(real, lax.stop_gradient(to_float(q))).astype(x.dtype)


def ceil_log2(x: jax.Array) -> jax.Array:
    """Returns ``ceil(log2(x))``, exactly: no logarithm is taken.

    Args:
      x: Positive float32, any shape. Below 2^-126, 0 included, it counts as 2^-126;
        above 2^127, infinity and NaN included, as 2^127.

    Returns:
      Exponents, int32, shape of ``x``.

    Example:
      >>> ceil_log2(jnp.array([0.3, 1.0, 129.0]))
      Array([-1,  0,  8], dtype=int32)
    """
    return floor_log2(ceil_power_of_two(x))


def max_frac_bits(
    value_bits: ArrayLike, ranges: ArrayLike, clamp: bool = True
) -> jax.Array:
    """Returns the most fraction bits that leave room for a range.

        frac_bits = value_bits - ceil(log2(ranges)),  at most value_bits if clamp

    Args:
      value_bits: Word length without the sign.
      ranges: Largest magnitudes, any shape.
      clamp: Whether ranges below 1 get no more bits than 1 has.

    Returns:
      Fraction bits, int32, shape of ``ranges``, in -126..126.

    Raises:
      TypeError: if ``value_bits`` is no integer.
      ValueError: for ``value_bits`` outside 1..31, as far as they are known.

    Example:
      >>> max_frac_bits(7, jnp.array([0.1, 1.0, 129.0]))
      Array([ 7,  7, -1], dtype=int32)

    References:
      QuantizeML 1.2.5, whose logarithm is float32: it rounds ranges next above a power
      of two down to it.
    """
    bits = as_integers("value_bits", check_value_bits(value_bits))
    frac_bits = bits - ceil_log2(jnp.asarray(ranges, jnp.float32))
    return jnp.minimum(frac_bits, bits if clamp else MOST_FRAC_BITS)


def quantize_fixed_point(
    x: jax.Array, value_bits: ArrayLike, frac_bits: ArrayLike | None = None
) -> FixedPoint:
    """Rounds real values to fixed-point numbers.

        codes = clip(round(x * 2^frac_bits), -2^value_bits, 2^value_bits - 1)

    with ``round`` half to even. For a derivative, `straight_through`.

    Args:
      x: Real values, shape ``[...]``. NaN becomes 0.
      value_bits: Word length without the sign, 1 to 31.
      frac_bits: Bits behind the binary point, ``[]``, or ``[c]`` for the last axis.
        None: 0 if all of ``x`` is whole, else `max_frac_bits` of its largest magnitude.

    Returns:
      `FixedPoint`.

    Raises:
      TypeError: if ``x`` is not real, or bits are no integers.
      ValueError: for bits out of range, as far as they are known, or a shape that does
        not fit.

    Example:
      >>> q = quantize_fixed_point(jnp.array([0.3, -1.25, 9.0]), 4, 2)
      >>> q.codes, to_float(q)
      (Array([ 1, -5, 15], dtype=int32), Array([ 0.25, -1.25,  3.75], dtype=float32))

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    value_bits, x = check_value_bits(value_bits), as_real(x)
    if frac_bits is None:
        is_whole = jnp.all(x == jnp.round(x))
        most = max_frac_bits(value_bits, jnp.max(jnp.abs(x), initial=0.0))
        frac_bits = jnp.where(is_whole, 0, most)
    frac_bits = fitting_bits(frac_bits, x.shape)
    ends = (jnp.asarray(end, jnp.int32) for end in int_range(value_bits + 1))
    scale = power_of_two(-lift(frac_bits, x.ndim))
    codes = grid_codes(x, scale, jnp.int32(0), *ends, rounding=half_even)
    return FixedPoint(codes, value_bits, frac_bits)


def optimal_scales(ranges: ArrayLike, value_bits: ArrayLike) -> jax.Array:
    """Returns the scale at which the largest code is the range.

        scale = ranges / (2^value_bits - 1)

    Args:
      ranges: Largest magnitudes, any shape.
      value_bits: Word length without the sign, 1 to 31.

    Returns:
      Scales, float32, shape of ``ranges``.

    References:
      QuantizeML 1.2.5, QFloat.
    """
    most = power_of_two(check_value_bits(value_bits)) - 1.0
    return quotient(jnp.asarray(ranges, jnp.float32), most)


def quantize_qfloat(
    x: jax.Array, value_bits: ArrayLike, scale: ArrayLike, frac_bits: ArrayLike = 0
) -> QFloat:
    """Rounds real values to fixed-point numbers with a float scale.

        codes = clip(round(x / scale * 2^frac_bits), -2^value_bits, 2^value_bits - 1)

    with ``round`` half to even and the quotient that of IEEE 754. For a derivative,
    `straight_through`.

    Args:
      x: Real values, shape ``[...]``. NaN becomes 0.
      value_bits: Word length without the sign, 1 to 31.
      scale: float32, positive, ``[]``, or ``[c]`` for the last axis: `optimal_scales`.
      frac_bits: Bits behind the binary point, ``[]`` or ``[c]``.

    Returns:
      `QFloat`.

    Raises:
      TypeError: if ``x`` is not real, or bits are no integers.
      ValueError: for bits out of range, as far as they are known, or a shape that does
        not fit.

    Example:
      >>> x = jnp.array([0.3, -1.25])
      >>> quantize_qfloat(x, 3, optimal_scales(1.25, 3)).codes
      Array([ 2, -7], dtype=int32)

    References:
      QuantizeML 1.2.5, QFloat.
    """
    x, scale = as_real(x), jnp.asarray(scale, jnp.float32)
    check_fits("scale", scale.shape, x.shape)
    steps = quotient(x, lift(scale, x.ndim))
    return QFloat(quantize_fixed_point(steps, value_bits, frac_bits), scale)


def quantize_scales(scale: ArrayLike, scale_bits: ArrayLike = 8) -> FixedPoint:
    """Writes float scales as integers, each with fraction bits of its own.

        frac_bits = scale_bits - ceil(log2(scale))
        codes = min(round(scale * 2^frac_bits), 2^scale_bits - 1)

    A scale within half a step below a power of two, or at it, saturates.

    Args:
      scale: Positive float32, any shape.
      scale_bits: Word length of the codes, which have no sign, 1 to 31.

    Returns:
      `FixedPoint` with ``frac_bits`` of the shape of ``scale``.

    Example:
      >>> q = quantize_scales(jnp.array([1.0, 0.3]))
      >>> q.codes, q.frac_bits
      (Array([255, 154], dtype=int32), Array([8, 9], dtype=int32))

    References:
      QuantizeML 1.2.5, QFloat.
    """
    scale = jnp.asarray(scale, jnp.float32)
    frac_bits = max_frac_bits(scale_bits, scale, clamp=False)
    return quantize_fixed_point(scale, scale_bits, frac_bits)


def as_real(x: ArrayLike) -> jax.Array:
    """Returns ``x`` as float32; raises TypeError if it is not of a float type."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Real values are quantized, got {x.dtype}. Use `from_codes` for integers "
            "that are codes, or `astype(jnp.float32)`."
        )
    return x.astype(jnp.float32)
