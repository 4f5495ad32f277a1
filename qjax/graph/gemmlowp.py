"""The functions of TFLite's LSTM, of 16-bit codes: fixed point as gemmlowp has it.

References:
  gemmlowp, fixedpoint/fixedpoint.h: `logistic`, `tanh`,
  `exp_on_negative_values`, `one_over_one_plus_x_for_x_in_0_1`.
"""

import functools

import numpy as np

from qjax.graph.operations.shifts import divide_by_power, truncated
from qjax.graph.tflite_tables import short_left, short_product

CODES = 1 << 16  # Codes of int16.
_MOST = (1 << 15) - 1
_ALL = np.arange(-CODES // 2, CODES // 2)


@functools.cache
def logistic_table() -> np.ndarray:
    """Tabulates the logistic function of codes of scale 2^-12, in codes of 2^-15."""
    share = _one_over(_exponential(-np.abs(_ALL), 3))
    found = short_left(share, 1)
    found = np.where(_ALL > 0, found, _MOST - found)
    return np.where(_ALL == 0, 1 << 14, found).astype(np.int16)


@functools.cache
def tanh_table(bits: int) -> np.ndarray:
    """Tabulates the hyperbolic tangent of codes of ``2^(bits - 15)``, in 2^-15.

    Args:
      bits: Bits of a code before the point, 0 to 6.
    """
    share = _one_over(_exponential(-np.abs(_ALL), bits + 1))
    found = short_left(share - (1 << 13), 2)
    return (np.sign(_ALL) * found).astype(np.int16)


def _exponential(x: np.ndarray, bits: int) -> np.ndarray:
    """Computes ``exp`` of codes of 0 or less, ``bits`` before the point, in 2^-15."""
    quarter = 1 << (15 - bits - 2)
    rest = (x & (quarter - 1)) - quarter
    # A polynomial around -1/8, then a factor for each bit of the quarters.
    y = short_left(rest, bits) + (1 << 12)
    y2 = short_product(y, y)
    y3, y4 = short_product(y2, y), short_product(y2, y2)
    third = short_product(divide_by_power(y4, 2) + y3, _short(715827883))
    tail = divide_by_power(third + y2, 1)
    eighth = np.asarray(_short(1895147668))
    value = eighth + short_product(eighth, y + tail)
    factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
    for power, factor in enumerate(factors[: bits + 2], -2):
        hit = ((rest - x) >> (15 - bits + power)) & 1 == 1
        value = np.where(hit, short_product(value, _short(factor)), value)
    if bits > 5:
        value = np.where(x < -(32 << (15 - bits)), 0, value)
    return np.where(x == 0, _MOST, value)


def _one_over(a: np.ndarray) -> np.ndarray:
    """Computes ``1 / (1 + a)`` of codes in [0, 1] of 2^-15, in 2^-14.

    Three steps of Newton's method for the reciprocal of half of ``1 + a``.
    """
    half = truncated(a + _MOST + 1, 2)
    x = _short(1515870810) + short_product(half, _short(-1010580540))
    for _ in range(3):
        rest = (1 << 13) - short_product(half, x)
        x = x + short_left(short_product(x, rest), 2)
    return x


def _short(x: int) -> int:
    """Rounds a constant of 31 fraction bits to 15."""
    return int(divide_by_power(np.asarray(x), 16))
