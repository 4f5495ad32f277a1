"""Arithmetic on the numbers of `qjax.quantizers.quantizeml.numbers`, in exact integers.

Sums and products saturate once, at their end, in the word of the left operand.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.quantizers.quantizeml.integers import (
    as_integers,
    check_shift,
    check_value_bits,
    lifted,
    shifted,
    shifted_half_up,
    to_int64,
)
from qjax.quantizers.quantizeml.numbers import (
    FixedPoint,
    Number,
    QFloat,
    from_codes,
    make_number,
)
from qjax.quantizers.quantizeml.reals import quantize_scales
from qjax.quantizers.spec import is_known
from qjax.rounding import product

SameKind = TypeVar("SameKind", FixedPoint, QFloat)


def to_fixed_point(
    x: QFloat, scale_bits: ArrayLike = 8
) -> tuple[FixedPoint, FixedPoint]:
    """Multiplies codes by their scale, written as an integer.

    Args:
      x: Numbers. The product keeps their ``value_bits`` and saturates: `promote`
        ``x.fixed_point`` first.
      scale_bits: Word length of the scale, as `quantize_scales`.

    Returns:
      ``(product, scales)``, fixed-point numbers both.

    Example:
      >>> x = QFloat(from_codes(jnp.int32([3, -7]), 15), jnp.float32(0.3))
      >>> y, scale = to_fixed_point(x)
      >>> y.codes, scale.codes, int(scale.frac_bits)
      (Array([  462, -1078], dtype=int32), Array(154, dtype=int32), 9)

    References:
      QuantizeML 1.2.5, QFloat.
    """
    scale = quantize_scales(x.scale, scale_bits)
    return multiply(x.fixed_point, scale), scale


def rescale(
    x: FixedPoint, frac_bits: ArrayLike, value_bits: ArrayLike | None = None
) -> FixedPoint:
    """Moves the binary point.

        codes = clip(floor(x.codes * 2^(frac_bits - x.frac_bits) + 1/2))

    Ties go up: not half to even.

    Args:
      x: Numbers.
      frac_bits: The new ones, ``[]`` or ``[c]``.
      value_bits: The new ones; None keeps those of ``x``.

    Returns:
      `FixedPoint`.

    Raises:
      ValueError: if codes would move left by ``value_bits`` or more, where all but 0
        saturate, as far as it is known.

    Example:
      >>> rescale(from_codes(jnp.int32([3, -3, 100]), 7, frac_bits=1), 0).codes
      Array([ 2, -1, 50], dtype=int32)

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    value_bits = check_value_bits(x.value_bits if value_bits is None else value_bits)
    frac_bits = as_integers("frac_bits", frac_bits)
    left = jnp.subtract(*lifted(frac_bits, *_frac_bits(x)))
    check_shift(left, value_bits)
    moved = lifted(x.codes, left)
    return make_number(shifted_half_up, value_bits, frac_bits, *moved)


def promote(x: FixedPoint, value_bits: ArrayLike) -> FixedPoint:
    """Extends the word of numbers, whose values stay.

    Args:
      x: Numbers.
      value_bits: The new ones.

    Returns:
      `FixedPoint`.

    Raises:
      ValueError: if the word would be shorter, as far as it is known.
    """
    value_bits = check_value_bits(value_bits)
    if is_known(value_bits, x.value_bits) and np.less(value_bits, x.value_bits):
        raise ValueError(
            f"`promote` makes words longer, got value_bits={value_bits} for numbers of "
            f"{x.value_bits}. Use `rescale` or a quantizer to drop bits."
        )
    return dataclasses.replace(x, value_bits=value_bits)


def expand(x: FixedPoint, value_bits: ArrayLike) -> FixedPoint:
    """Rewrites all channels with the largest ``frac_bits`` among them.

    Args:
      x: Numbers.
      value_bits: The new ones, at least those of ``x``. Codes beyond them saturate.

    Returns:
      `FixedPoint` with ``frac_bits`` of shape ``[]``. Each channel has moved left by
      its ``y.frac_bits - x.frac_bits``.

    Raises:
      ValueError: as `promote` and `rescale`.

    Example:
      >>> x = from_codes(jnp.int32([[3, 3]]), 7, frac_bits=jnp.int32([0, 2]))
      >>> expand(x, 15).codes
      Array([[12,  3]], dtype=int32)

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    (frac_bits,) = _frac_bits(x)
    return rescale(promote(x, value_bits), jnp.max(frac_bits))


def align(a: FixedPoint, b: FixedPoint) -> tuple[FixedPoint, FixedPoint]:
    """Rewrites two numbers with the larger ``frac_bits`` of the two.

    Args:
      a: Numbers. They keep their ``value_bits`` and saturate: `promote` them first.
      b: Numbers, like ``a``.

    Returns:
      Both, channel by channel at the same ``frac_bits``.

    Raises:
      ValueError: as `rescale`.

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    most = jnp.maximum(*_frac_bits(a, b))
    return rescale(a, most), rescale(b, most)


def shift(x: FixedPoint, s: ArrayLike) -> FixedPoint:
    """Multiplies codes, and so values, by ``2^s``: floored, saturated.

    With ``s >= 0`` it is QuantizeML's ``<<``.

    Args:
      x: Numbers.
      s: Integers of either sign, ``[]``, or ``[c]`` for the last axis.

    Returns:
      `FixedPoint` with the ``frac_bits`` of ``x``.

    Example:
      >>> shift(from_codes(jnp.int32([3, -3, 100]), 7), jnp.int32([1, -1, 1])).codes
      Array([  6,  -2, 127], dtype=int32)

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    moved = lifted(x.codes, as_integers("s", s))
    return make_number(shifted, x.value_bits, x.frac_bits, *moved)


def right_shift(x: FixedPoint, s: ArrayLike) -> FixedPoint:
    """Divides values by ``2^s``, exactly: ``frac_bits + s``. QuantizeML's ``>>``.

    Args:
      x: Numbers.
      s: Integers, ``[]`` or ``[c]``.

    Returns:
      `FixedPoint` with the codes of ``x``.
    """
    frac_bits = jnp.add(*lifted(*_frac_bits(x), as_integers("s", s)))
    return dataclasses.replace(x, frac_bits=frac_bits)


# Arithmetic. The result has the word of the left operand.


def add(a: SameKind, b: SameKind | int) -> SameKind:
    """Adds numbers at the same ``frac_bits`` (and scale): ``clip(a.codes + b.codes)``.

    Args:
      a: Numbers.
      b: Numbers; shapes broadcast. To fixed-point numbers also a Python integer, which
        is taken to their ``frac_bits``.

    Returns:
      Numbers of the kind and the ``value_bits`` of ``a``.

    Raises:
      ValueError: if bits or scales differ, as far as they are known.
      TypeError: for an integer and a scale, or a `FixedPoint` and a `QFloat`.

    Example:
      >>> a = from_codes(jnp.int32([3, 100]), 7, frac_bits=2)
      >>> add(a, a).codes, add(a, 1).codes
      (Array([  6, 127], dtype=int32), Array([  7, 104], dtype=int32))

    References:
      QuantizeML 1.2.5.
    """
    return _sum(a, b, jnp.add)


def subtract(a: SameKind, b: SameKind | int) -> SameKind:
    """Subtracts numbers: ``clip(a.codes - b.codes)``, otherwise like `add`."""
    return _sum(a, b, jnp.subtract)


@overload
def multiply(a: FixedPoint, b: FixedPoint | int) -> FixedPoint: ...
@overload
def multiply(a: Number, b: Number | int) -> Number: ...
def multiply(a: Number, b: Number | int) -> Number:
    """Multiplies numbers: their codes, the sum of ``frac_bits``, the product of scales.

    Args:
      a: Numbers.
      b: Numbers or a Python integer; shapes broadcast.

    Returns:
      Numbers of the ``value_bits`` of ``a``; `FixedPoint` if both are.

    Example:
      >>> a = from_codes(jnp.int32([3, 100]), 7, frac_bits=2)
      >>> y = multiply(a, a)
      >>> y.codes, y.frac_bits
      (Array([  9, 127], dtype=int32), Array(4, dtype=int32))

    References:
      QuantizeML 1.2.5.
    """
    return _product(a, b, lambda x, y: jnp.multiply(*lifted(x, y)))


@overload
def matmul(a: FixedPoint, b: FixedPoint) -> FixedPoint: ...
@overload
def matmul(a: Number, b: Number) -> Number: ...
def matmul(a: Number, b: Number) -> Number:
    """Multiplies matrices: ``clip(a.codes @ b.codes)``, otherwise like `multiply`.

    Args:
      a: Numbers with one ``frac_bits`` and scale, shape ``[..., k]``.
      b: Numbers, shape ``[..., k, c]``, with bits and scale ``[]`` or ``[c]``.

    Returns:
      Numbers of the ``value_bits`` of ``a``. They saturate after the sum, which must
      stay below 2^63.

    Raises:
      ValueError: if ``a`` has bits or scales per channel.

    Example:
      >>> a = from_codes(jnp.int32([[3, 100]]), 15, frac_bits=2)
      >>> w = from_codes(jnp.int32([[1], [2]]), 3, frac_bits=jnp.int32([1]))
      >>> y = matmul(a, w)
      >>> y.codes, y.frac_bits
      (Array([[203]], dtype=int32), Array([3], dtype=int32))

    References:
      QuantizeML 1.2.5.
    """
    fixed, scale = parts(a)
    if np.ndim(fixed.frac_bits) or np.ndim(scale):
        raise ValueError(
            "The left operand of `matmul` must have one `frac_bits` and one `scale`, "
            f"got shapes {np.shape(fixed.frac_bits)} and {np.shape(scale)}. Use "
            "`expand`, or quantize it per tensor."
        )
    return _product(a, b, jnp.matmul)


def divide(a: FixedPoint, b: FixedPoint | int) -> FixedPoint:
    """Divides codes, truncating toward zero: ``clip(trunc(a.codes / b.codes))``.

    Args:
      a: Numbers.
      b: Numbers or a Python integer; shapes broadcast. Division by codes that are 0
        saturates; 0 / 0 is 0.

    Returns:
      `FixedPoint` with ``a.frac_bits - b.frac_bits`` and the ``value_bits`` of ``a``.

    Raises:
      ValueError: if ``b`` is the integer 0.

    Example:
      >>> divide(from_codes(jnp.int32([7, -7]), 7, frac_bits=2), 2).codes
      Array([ 3, -3], dtype=int32)

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    if isinstance(b, int) and b == 0:
        raise ValueError("`divide` got the divisor 0. Use an integer that is not 0.")
    b = _as_number(b)
    frac_bits = jnp.subtract(*_frac_bits(a, b))
    return make_number(_truncated, a.value_bits, frac_bits, *lifted(a.codes, b.codes))


def absolute(x: FixedPoint) -> FixedPoint:
    """Returns magnitudes; the magnitude of the least code saturates.

    Args:
      x: Numbers.

    Returns:
      `FixedPoint`.
    """
    return make_number(jnp.abs, x.value_bits, x.frac_bits, x.codes)


def reduce_sum(
    x: FixedPoint, axis: int | Sequence[int], keepdims: bool = False
) -> FixedPoint:
    """Sums along axes; saturates after the sum.

    Args:
      x: Numbers.
      axis: One or more; not the last one if that has ``frac_bits`` of its own.
      keepdims: Whether the axes stay, with size 1.

    Returns:
      `FixedPoint`.

    Raises:
      ValueError: if ``frac_bits`` differ along an axis: `expand` first.

    References:
      QuantizeML 1.2.5, FixedPoint.
    """
    axes = _free_axes(x, axis)
    total = functools.partial(jnp.sum, axis=axes, keepdims=keepdims)
    return make_number(total, x.value_bits, x.frac_bits, x.codes)


def reduce_mean(
    x: FixedPoint, axis: int | Sequence[int], keepdims: bool = False
) -> FixedPoint:
    """Averages along axes: ``floor(sum(codes) / n)``, otherwise like `reduce_sum`.

    Raises:
      ValueError: as `reduce_sum`, or if there is nothing to average.

    Example:
      >>> reduce_mean(from_codes(jnp.int32([3, -4]), 7), 0).codes
      Array(-1, dtype=int32)
    """
    axes = _free_axes(x, axis)
    n = int(np.prod([x.codes.shape[a] for a in axes], dtype=np.int64))
    if n == 0:
        raise ValueError(f"A mean along axis={axis} of shape {x.codes.shape} is empty.")
    mean = lambda codes: jnp.sum(codes, axes, keepdims=keepdims) // n
    return make_number(mean, x.value_bits, x.frac_bits, x.codes)


def equal(a: FixedPoint, b: FixedPoint | int) -> jax.Array:
    """Returns whether values are equal, exactly, at any ``frac_bits``: bool."""
    return _compare(a, b, jnp.equal)


def greater(a: FixedPoint, b: FixedPoint | int) -> jax.Array:
    """Returns whether values of ``a`` are greater, exactly, at any ``frac_bits``."""
    return _compare(a, b, jnp.greater)


def _frac_bits(*xs: FixedPoint) -> list[jax.Array]:
    return lifted(*(as_integers("frac_bits", x.frac_bits) for x in xs))


def _as_number(x: Number | int) -> FixedPoint:
    if isinstance(x, numbers.Integral):
        return from_codes(int(x), 31)
    if not isinstance(x, FixedPoint):
        raise TypeError(
            f"A `FixedPoint` or an integer is wanted here, got {type(x).__name__}. Use "
            "`quantize_fixed_point`, or `to_fixed_point` for a `QFloat`."
        )
    return x


def _sum(a: SameKind, b: SameKind | int, f: Callable[..., jax.Array]) -> SameKind:
    if isinstance(a, QFloat):
        if not isinstance(b, QFloat):
            raise TypeError(
                "A `QFloat` adds to one of the same scale, got "
                f"{type(b).__name__}. Quantize it with `quantize_qfloat` or "
                "`quantize_aligned_weight`."
            )
        _check_equal("scale", a.scale, b.scale)
        return QFloat(_sum(a.fixed_point, b.fixed_point, f), a.scale)
    if isinstance(b, numbers.Integral):
        (bits,) = _frac_bits(a)
        # Numbers beyond 2^33 saturate whatever is added to them.
        moved = lambda y, s: jnp.clip(shifted_half_up(y, s), -(1 << 33), 1 << 33)
        take = lambda x, y, s: f(x, moved(y, s))
        return make_number(take, a.value_bits, bits, *lifted(a.codes, int(b), bits))
    b = _as_number(b)
    bits = jnp.maximum(*_frac_bits(a, b))
    _check_equal("frac_bits", a.frac_bits, b.frac_bits)
    return make_number(f, a.value_bits, bits, *lifted(a.codes, b.codes))


def _product(a: Number, b: Number | int, f: Callable[..., jax.Array]) -> Number:
    (x, s), (y, t) = parts(a), parts(b)
    bits = jnp.add(*_frac_bits(x, y))
    fixed = make_number(f, x.value_bits, bits, x.codes, y.codes)
    if isinstance(a, QFloat) or isinstance(b, QFloat):
        return QFloat(fixed, product(*lifted(s, t)))
    return fixed


def parts(x: Number | int) -> tuple[FixedPoint, jax.Array]:
    """Returns codes with their bits, and the scale, which is 1 by default."""
    if isinstance(x, QFloat):
        return x.fixed_point, x.scale
    return _as_number(x), jnp.float32(1)


def _truncated(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = jnp.broadcast_arrays(a, b)
    whole = lax.div(a, jnp.where(b == 0, 1, b))
    return jnp.where(b == 0, jnp.sign(a) << 32, whole)


def _compare(
    a: FixedPoint, b: FixedPoint | int, f: Callable[..., jax.Array]
) -> jax.Array:
    b = _as_number(b)
    more = jnp.subtract(*_frac_bits(a, b))
    operands = lifted(a.codes, b.codes, more)
    with jax.enable_x64(True):
        x, y, more = (to_int64(v) for v in operands)
        # A step of 2^32 is beyond every code.
        return f(x << jnp.clip(-more, 0, 32), y << jnp.clip(more, 0, 32))


def _check_equal(name: str, a: ArrayLike, b: ArrayLike) -> None:
    if is_known(a, b) and np.any(np.asarray(a) != np.asarray(b)):
        raise ValueError(
            f"Both operands must have the same `{name}`, got {a} and {b}. Use `align` "
            "(`frac_bits`), or quantize the right one at the scale of the left."
        )


def _free_axes(x: FixedPoint, axis: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the axes counted from 0; raises where ``frac_bits`` differ along them."""
    rank, bits = x.codes.ndim, np.ndim(x.frac_bits)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(f"`axis={axis}` does not exist in shape {x.codes.shape}.")
    axes = tuple(a % rank for a in axes)
    if any(a >= rank - bits for a in axes):
        raise ValueError(
            f"`frac_bits` of shape {np.shape(x.frac_bits)} differ along axis={axis}. "
            "Use `expand` first."
        )
    return axes
