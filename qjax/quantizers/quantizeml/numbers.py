"""QuantizeML's numbers: integer codes and the place of their binary point.

    FixedPoint:  x = codes * 2^-frac_bits
    QFloat:      x = codes * 2^-frac_bits * scale

with codes in ``[-2^value_bits, 2^value_bits - 1]``: ``value_bits`` leaves the sign out.
All arithmetic is in exact integers, int64 where int32 is too short, and saturates at
its end. What is known of bits is checked; what is traced is not.
"""

import dataclasses
from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import QParams, dequantize
from qjax.qpoint import grid_codes
from qjax.quantizers.point import straight
from qjax.quantizers.spec import is_known
from qjax.rounding import (
    ceil_power_of_two,
    floor_log2,
    half_even,
    int_range,
    power_of_two,
    quotient,
)

_MOST_FRAC_BITS = 126  # The scale is a normal float32.


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint:
    """Numbers ``codes * 2^-frac_bits``: a pytree, all of its fields leaves.

    Attributes:
      codes: Integers, int32, shape ``[...]``.
      value_bits: Word length without the sign, 1 to 31, shape ``[]``.
      frac_bits: Bits behind the binary point, -126 to 126: ``[]``, ``[c]`` for the last
        axis of ``codes``, or what broadcasts against its last axes.
    """

    codes: jax.Array
    value_bits: ArrayLike
    frac_bits: ArrayLike

    @property
    def params(self) -> QParams:
        """Returns the grid for `dequantize`: scale ``2^-frac_bits``, zero point 0."""
        frac_bits = as_integers("frac_bits", self.frac_bits)
        scale = power_of_two(-lift(frac_bits, self.codes.ndim))
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32))

    def __pow__(self, n: int) -> "FixedPoint":
        """Returns `power` of the numbers."""
        return power(self, n)


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QFloat:
    """Numbers ``codes * 2^-frac_bits * scale``: a pytree.

    Attributes:
      fixed_point: Codes and their bits.
      scale: float32, shaped as ``frac_bits`` may be.
    """

    fixed_point: FixedPoint
    scale: jax.Array

    @property
    def codes(self) -> jax.Array:
        """Returns the codes of the fixed point."""
        return self.fixed_point.codes

    @property
    def params(self) -> QParams:
        """Returns the grid: scale ``scale * 2^-frac_bits``, zero point 0."""
        rank = self.codes.ndim
        scale = lift(self.scale, rank) * lift(self.fixed_point.params.scale, rank)
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32))


Number = FixedPoint | QFloat


def from_codes(
    codes: ArrayLike, value_bits: ArrayLike, frac_bits: ArrayLike = 0
) -> FixedPoint:
    """Makes fixed-point numbers of integers with saturation.

    Args:
      codes: Integers, shape ``[...]``.
      value_bits: Word length without the sign, 1 to 31.
      frac_bits: Bits behind the binary point, ``[]`` or ``[c]``.

    Returns:
      `FixedPoint`.

    Raises:
      TypeError: if one of them is not of an integer type.
      ValueError: for bits out of range, as far as they are known, or a shape that does
        not fit.

    Example:
      >>> from_codes(jnp.int32([3, 300, -300]), 7).codes
      Array([   3,  127, -128], dtype=int32)
    """
    _check_integers("codes", codes)
    frac_bits = _fitting_bits(frac_bits, np.shape(codes))
    return make_number(lambda x: x, value_bits, frac_bits, codes)


def power(x: FixedPoint, n: int) -> FixedPoint:
    """Raises numbers to a whole power: ``clip(codes^n)``, ``n * frac_bits``.

    Args:
      x: Numbers.
      n: Whole, 0 or more.

    Returns:
      `FixedPoint` of the ``value_bits`` of ``x``.

    Raises:
      ValueError: for another ``n``.

    Example:
      >>> y = from_codes(jnp.int32([3, -5, 100]), 7, frac_bits=1) ** 2
      >>> y.codes, y.frac_bits
      (Array([  9,  25, 127], dtype=int32), Array(2, dtype=int32))
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"`n` must be a whole number, 0 or more, got {n!r}.")

    def raised(codes: jax.Array) -> jax.Array:
        found = jnp.ones_like(codes)
        for _ in range(n):  # Numbers beyond 2^31 saturate all the same.
            found = jnp.clip(found * codes, -(1 << 31), 1 << 31)
        return found

    frac_bits = n * as_integers("frac_bits", x.frac_bits)
    return make_number(raised, x.value_bits, frac_bits, x.codes)


def to_float(x: Number) -> jax.Array:
    """Returns the values: ``dequantize(x.codes, x.params)``.

    Args:
      x: Numbers. The scale alone carries a derivative: see `straight_through`.

    Returns:
      Values, float32, shape of the codes. Exact without a scale, for codes below 2^24.
    """
    return dequantize(x.codes, x.params)


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


# From real values.


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
    return jnp.minimum(frac_bits, bits if clamp else _MOST_FRAC_BITS)


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
    frac_bits = _fitting_bits(frac_bits, x.shape)
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
    _check_fits("scale", scale.shape, x.shape)
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


# Helpers of the other modules.


def check_value_bits(value_bits: ArrayLike) -> ArrayLike:
    """Raises if a word length, as far as it is known, is not in 1..31."""
    _check_integers("value_bits", value_bits)
    if np.ndim(value_bits) != 0:
        raise ValueError(f"`value_bits` must be one number, got {value_bits}.")
    if is_known(value_bits) and not 1 <= np.asarray(value_bits) <= 31:
        raise ValueError(
            f"`value_bits` must lie in 1..31 (the sign is not counted), got "
            f"{value_bits}."
        )
    return value_bits


def check_shift(shift: ArrayLike, value_bits: ArrayLike) -> None:
    """Raises if a left shift, as far as it is known, moves every code out."""
    if is_known(shift, value_bits) and np.any(np.greater_equal(shift, value_bits)):
        raise ValueError(
            f"Codes would move left by {np.max(np.asarray(shift))} bits in a word of "
            f"value_bits={value_bits}: all saturate. Use more `value_bits`, or fewer "
            "`frac_bits`."
        )


def as_real(x: ArrayLike) -> jax.Array:
    """Returns ``x`` as float32; raises TypeError if it is not of a float type."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Real values are quantized, got {x.dtype}. Use `from_codes` for integers "
            "that are codes, or `astype(jnp.float32)`."
        )
    return x.astype(jnp.float32)


def as_integers(name: str, value: ArrayLike) -> jax.Array:
    """Returns integers as int32; raises TypeError if they are of another type."""
    _check_integers(name, value)
    return jnp.asarray(value).astype(jnp.int32)


def _check_integers(name: str, value: ArrayLike) -> None:
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {dtype}.")


def lift(value: ArrayLike, rank: int) -> jax.Array:
    """Extends an array of the last axes to the rank of another array."""
    value = jnp.asarray(value)
    if value.ndim == 0:
        return value
    return value.reshape((1,) * (rank - value.ndim) + value.shape)


def lifted(*values: ArrayLike) -> list[jax.Array]:
    """Extends all arrays but scalars to the largest rank among them."""
    rank = max(np.ndim(v) for v in values)
    return [lift(v, rank) for v in values]


def to_int64(value: ArrayLike) -> jax.Array:
    """Widens integers to int64, inside ``jax.enable_x64``."""
    return jnp.asarray(value).astype(jnp.int64)


def saturated(wide: jax.Array, value_bits: jax.Array) -> jax.Array:
    """Clips int64 values to ``[-2^value_bits, 2^value_bits - 1]``."""
    limit = jnp.ones_like(value_bits) << value_bits
    return jnp.clip(wide, -limit, limit - 1)


def shifted(wide: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``floor(wide * 2^shift)``, int64: right for what saturates at 2^31."""
    # Numbers that move left saturate at 2^31 all the same.
    left = jnp.clip(wide, -(1 << 31), (1 << 31) - 1) << jnp.clip(shift, 0, 32)
    return jnp.where(shift > 0, left, wide >> jnp.clip(-shift, 0, 63))


def shifted_half_up(wide: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``floor(wide * 2^shift + 1/2)``, int64: right for what saturates."""
    next_bit = shifted(wide, shift + 1) & 1
    return shifted(wide, shift) + next_bit


def make_number(
    f: Callable[..., jax.Array],
    value_bits: ArrayLike,
    frac_bits: ArrayLike,
    *operands: ArrayLike,
) -> FixedPoint:
    """Makes saturated numbers from the result of ``f`` on int64 operands."""
    bits = as_integers("value_bits", check_value_bits(value_bits))
    with jax.enable_x64(True):
        wide = f(*(to_int64(v) for v in operands))
        codes = saturated(wide, to_int64(bits)).astype(jnp.int32)
    return FixedPoint(codes, value_bits, jnp.asarray(frac_bits))


def _fitting_bits(frac_bits: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    bits = as_integers("frac_bits", frac_bits)
    _check_fits("frac_bits", bits.shape, shape)
    known = np.asarray(frac_bits, np.int64) if is_known(frac_bits) else 0
    if np.any(np.abs(known) > _MOST_FRAC_BITS):
        raise ValueError(f"`frac_bits` must lie in -126..126, got {frac_bits}.")
    return bits


def _check_fits(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    last = shape[len(shape) - len(got) :]
    if len(got) > len(shape) or any(
        n not in (1, m) for n, m in zip(got, last, strict=True)
    ):
        raise ValueError(
            f"`{name}` must have shape (), or broadcast against the last axes of "
            f"{shape}, got {got}."
        )
