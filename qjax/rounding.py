"""Integer ranges and rounding, the arithmetic that everything else shares."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

_ALL_ONES = 0xFFFFFFFF


def int_range(
    bits: ArrayLike, signed: bool = True, narrow_range: bool = False
) -> tuple[ArrayLike, ArrayLike]:
    """Returns the least and the largest code of a word.

        signed:    qmin = -2^(bits-1),  qmax = 2^(bits-1) - 1
        unsigned:  qmin = 0,            qmax = 2^bits - 1

    ``narrow_range`` raises ``qmin`` by one, which makes a signed range symmetric.

    Args:
      bits: Word length, sign included, 1 to 32. A Python integer, or an integer array
        of any shape, which may be traced.
      signed: Whether codes may be negative.
      narrow_range: Whether the least code is left out.

    Returns:
      ``(qmin, qmax)``: Python integers if ``bits`` is one, else arrays of the shape of
      ``bits``, int32 if ``signed`` and uint32 if not.

    Raises:
      ValueError: if ``bits`` is known and outside 1..32, or leaves a single code.
      TypeError: if ``bits`` is not of an integer type.

    Example:
      >>> int_range(8), int_range(4, signed=False), int_range(8, narrow_range=True)
      ((-128, 127), (0, 15), (-127, 127))
    """
    check_bits(bits, narrow_range)
    if isinstance(bits, numbers.Integral):
        b = int(bits)
        qmax = (1 << (b - 1)) - 1 if signed else (1 << b) - 1
        return (-qmax - 1 if signed else 0) + narrow_range, qmax
    # A right shift of all ones stays inside the word, 32 bits included.
    unused = jnp.uint32(32) - jnp.asarray(bits).astype(jnp.uint32)
    ones = jnp.uint32(_ALL_ONES) >> unused
    if not signed:
        return jnp.full_like(ones, int(narrow_range)), ones
    top = (ones >> 1).astype(jnp.int32)
    return -top - 1 + int(narrow_range), top


def check_bits(bits: ArrayLike, narrow_range: bool = False) -> None:
    """Raises if ``bits``, as far as it is known, is not a word length in 1..32."""
    dtype = getattr(bits, "dtype", np.asarray(bits).dtype if _is_known(bits) else None)
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`bits` must be an integer, got {bits!r} of type {dtype}.")
    if not _is_known(bits):
        return
    values = np.asarray(bits)
    if np.any(values < 1) or np.any(values > 32):
        raise ValueError(f"`bits` must lie in 1..32, got {bits}.")
    if narrow_range and np.any(values == 1):
        raise ValueError(
            "`narrow_range=True` leaves a 1-bit word a single code. Use at least 2 "
            "bits, or `narrow_range=False`."
        )


def _is_known(bits: object) -> bool:
    """Returns whether ``bits`` has values now, unlike tracers and tree placeholders."""
    if isinstance(bits, jax.core.Tracer):
        return False
    return isinstance(bits, numbers.Number | np.ndarray | np.generic | jax.Array)


def half_even(x: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties to the even one: qjax's rule everywhere."""
    if jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer):
        return jnp.asarray(x)
    return lax.round(jnp.asarray(x), lax.RoundingMethod.TO_NEAREST_EVEN)


def half_away(x: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties away from zero: TFLite's rule for weights."""
    whole = jnp.trunc(x)
    return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0.0)


def ceil_power_of_two(x: jax.Array) -> jax.Array:
    """Returns the least power of two that is not below ``x``.

    Reads the exponent from the bits of ``x`` (``log2`` and ``exp2`` are off by an ulp
    for some powers of two).

    Args:
      x: Positive float32, any shape.

    Returns:
      float32 of the same shape, between 2^-126 and 2^127.
    """
    word = lax.bitcast_convert_type(x, jnp.uint32)
    word = lax.clamp(np.uint32(0x00800000), word, np.uint32(0x7F000000))
    above = (word + np.uint32(0x7FFFFF)) & np.uint32(0xFF800000)  # A carry rounds up.
    return lax.bitcast_convert_type(above, jnp.float32)


def power_of_two(exponent: ArrayLike) -> jax.Array:
    """Returns ``2^exponent``, exactly, from the bits of a float.

    Args:
      exponent: Whole numbers of any real type, any shape. May be traced.

    Returns:
      float32 of the same shape; 0 below -126, where the CPU would take it to zero
      sooner or later, and 2^127 above 127.
    """
    e = jnp.clip(jnp.asarray(exponent).astype(jnp.int32), -127, 127)
    return jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def round_log2(x: jax.Array) -> jax.Array:
    """Returns ``round(log2(x))``, exactly: no logarithm is taken.

    Args:
      x: Positive float32, any shape. Below 2^-126 it counts as 2^-127.

    Returns:
      Exponents, int32, shape of ``x``.
    """
    # 0x3FB504F4 is the least float32 above sqrt(2).
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((word + (0x3F800000 + 0x800000 - 0x3FB504F4)) >> 23) - 127


def floor_log2(x: jax.Array) -> jax.Array:
    """Returns ``floor(log2(x))``, exactly; arguments as `round_log2`."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


# XLA on the CPU rewrites float formulas (JAX 0.10.2): a quotient by a scalar becomes a
# product with its reciprocal, a / (b / c) becomes a * c / b, and a * b + c is fused.
# Operands that depend on data by a comparison are out of reach of all three; on both
# operands, since either may be a constant of the program.


def quotient(a: jax.Array, b: ArrayLike) -> jax.Array:
    """Computes ``a / b`` by IEEE 754."""
    a, b = jnp.broadcast_arrays(a, jnp.asarray(b, a.dtype))
    # The sum is NaN only where the quotient is.
    return a / jnp.where(jnp.isnan(a + b), jnp.nan, b)


def product(a: jax.Array, b: ArrayLike) -> jax.Array:
    """Computes ``a * b``, rounded before any sum: never one fused operation."""
    a, b = jnp.broadcast_arrays(a, jnp.asarray(b, a.dtype))
    # The difference is NaN also for two equal infinities.
    return jnp.where(jnp.isnan(a - b), jnp.abs(a + b), a * b)


def select(mask: jax.Array, x: Any, y: Any) -> jax.Array:
    """Returns ``x`` where ``mask``, else ``y``: `jnp.where` without a call of its own.

    Args:
      mask: Truth values.
      x: Values, or a number.
      y: Values, or a number; ``x`` or ``y`` is an array.

    Returns:
      Values of the type of the arrays, in the joint shape.
    """
    dtype = jnp.result_type(*(v for v in (x, y) if hasattr(v, "dtype")))
    shape = jnp.broadcast_shapes(*map(jnp.shape, (mask, x, y)))
    x, y = (jnp.broadcast_to(jnp.asarray(v, dtype), shape) for v in (x, y))
    return lax.select(jnp.broadcast_to(mask, shape), x, y)
