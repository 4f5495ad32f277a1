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
from jax.typing import ArrayLike

from qjax.affine import QParams, dequantize
from qjax.quantizers.quantizeml.integers import (
    as_integers,
    check_integers,
    check_value_bits,
    fitting_bits,
    lift,
    saturated,
    to_int64,
)
from qjax.rounding import power_of_two


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
    check_integers("codes", codes)
    frac_bits = fitting_bits(frac_bits, np.shape(codes))
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
