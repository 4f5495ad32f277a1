"""Fixed-point functions of gemmlowp and TFLite: int64 in, int64 out.

A word ``Qn`` has n bits before its point and 31 - n behind it.

References:
  gemmlowp, fixedpoint/fixedpoint.h; TensorFlow Lite 2.19, lite/kernels/internal/
  common.h and reference/reference_ops.h.
"""

import numpy as np

from qjax.graph.operations.shifts import divide_by_power, high_product, truncated

_INT32 = np.iinfo(np.int32)
# In Q0: log(2), the roots of 1/2, and the coefficients of a quotient that is a
# logarithm around 2^-1/4.
LOG2, HALF_ROOT, QUARTER_ROOT = 1488522236, 1518500250, 1805811301
NUMERATOR = 117049297
DENOMINATOR = 1057819769, 638450708, 127690142


def saturated(x: np.ndarray) -> np.ndarray:
    """Returns integers within int32."""
    return np.clip(x, _INT32.min, _INT32.max)


def room(x: np.ndarray) -> np.ndarray:
    """Counts the zeros above positive integers of 32 bits."""
    return 32 - np.frexp(x.astype(np.float64))[1].astype(np.int64)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """Computes gemmlowp's ``1 / (1 + x)`` for x in [0, 1), all in Q0."""
    total = x + _INT32.max
    half = truncated(total + np.where(total >= 0, 1, -1), 2)
    y = 1515870810 + high_product(half, -1010580540)
    for _ in range(3):
        rest = (1 << 29) - high_product(half, y)
        y = y + saturated(high_product(y, rest) << 2)
    return saturated(y << 1)


def logarithm(x: np.ndarray) -> np.ndarray:
    """Computes TFLite's ``log(x)`` in Q5, of x >= 1 in Q12.

    The power of two is taken out twice, of x and of x times the root of 1/2; what is
    left of the better one lies near 2^-1/4, where a quotient of polynomials is the
    logarithm.
    """
    quarter, bits = 1 << 23, 25  # 1/4 in Q6, and the bits behind its point.
    own = room(x)
    a = saturated(high_product(x << (own - 1), HALF_ROOT) << 1)
    below = high_product(x, HALF_ROOT)
    other = room(below) - 1
    b = saturated(x << other)
    powers = ((12 - own) << bits) + quarter, ((12 - other) << bits) - quarter
    rest, power = np.minimum(a, b), np.maximum(*powers)
    middle = (rest + QUARTER_ROOT + 1) >> 1
    q = (rest - QUARTER_ROOT) * 2
    square = high_product(q, q)
    above = high_product(q, rest) + high_product(high_product(q, square), NUMERATOR)
    one, first, second = DENOMINATOR
    under = high_product(middle, one + q + high_product(second, square))
    share = reciprocal(under + high_product(first, q))
    part = high_product(divide_by_power(above, 6), share)
    return saturated((high_product(power, LOG2) + part) << 1)


def inverse_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes TFLite's ``1 / sqrt(x)`` of integers, by five of Newton's steps.

    Args:
      x: 0 to 2^31 - 1; 0 counts as 1.

    Returns:
      ``(multiplier, shift)``, which stand for ``multiplier * 2^-(31 + shift)``.
    """
    is_one = x <= 1
    x = np.where(is_one, 2, x)
    is_large = x >= 1 << 29
    x = np.where(is_large, x >> 2, x)
    pairs = (room(x) - 1) // 2 - 1
    shift = 11 + is_large - pairs
    whole = (x << (2 * pairs)) >> 1
    half, three_halves = divide_by_power(whole, 1), 3 << 27
    y = np.full(x.shape, 1 << 28, np.int64)  # 1 in Q3.
    for _ in range(5):
        cube = saturated(high_product(high_product(y, y), y) << 6)
        y = saturated((high_product(three_halves, y) - high_product(half, cube)) << 3)
    y = high_product(y, HALF_ROOT) << np.maximum(-shift, 0)
    shift = np.maximum(shift, 0)
    return np.where(is_one, _INT32.max, y), np.where(is_one, 0, shift)
