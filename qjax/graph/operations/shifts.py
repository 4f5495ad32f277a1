"""Roundings of integers by shifts, in NumPy: int64 in, int64 out.

References:
  TensorFlow Lite 2.19, lite/kernels/internal; gemmlowp, fixedpoint/fixedpoint.h.
"""

from typing import Any

import numpy as np

_INT32 = np.iinfo(np.int32)


def rescale(acc: np.ndarray, multiplier: Any, shift: Any, rule: str) -> np.ndarray:
    """Computes ``acc * multiplier * 2^-shift`` by one of TFLite's two rules.

    Args:
      acc: int64 that fit int32.
      multiplier: int64 that fit int32.
      shift: int64, 0 to 62.
      rule: ``tflite_double`` or ``tflite_single``.

    Returns:
      int64.
    """
    if rule == "tflite_single":
        return (acc * multiplier + ((np.int64(1) << shift) >> 1)) >> shift
    left, right = np.maximum(31 - shift, 0), np.maximum(shift - 31, 0)
    wrapped = (acc << left).astype(np.int32).astype(np.int64)
    return divide_by_power(high_product(wrapped, multiplier), right)


def high_product(a: Any, b: Any) -> np.ndarray:
    """Computes ``a * b / 2^31``, halves up, by a nudge; saturates at 2^31."""
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return np.minimum(truncated(nudged, np.int64(1) << 31), _INT32.max)


def divide_by_power(x: np.ndarray, n: Any) -> np.ndarray:
    """Computes ``x / 2^n`` to nearest, halves away from zero."""
    rest = (np.int64(1) << n) - 1
    return (x >> n) + ((x & rest) > (rest >> 1) + (x < 0))


def truncated(a: np.ndarray, b: Any) -> np.ndarray:
    """Computes the quotient towards zero, as C does."""
    return np.sign(a) * (np.abs(a) // b)


def c_round(x: np.ndarray) -> np.ndarray:
    """Computes C's ``round`` of floating-point numbers."""
    whole = np.trunc(x)
    return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)


def round_shift(value: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Computes ``value / 2^shift`` half to even, by quotient and remainder."""
    unit = np.int64(1) << shift
    quotient, rest = value // unit, value % unit
    up = (2 * rest > unit) | ((2 * rest == unit) & (quotient % 2 == 1))
    # 2 * rest wraps only past 2^62, which shifts do not reach.
    return quotient + up
