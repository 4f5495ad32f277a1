"""The arithmetic of TFLite's kernels and of gemmlowp, in NumPy's int64.

`Qn` has n bits before its point and 31 - n behind it, in 32 bits.
"""

# ruff: noqa: D102, as a method is the formula of the operation of its name.

import numpy as np

from .container import need

_MOST = (1 << 31) - 1
_ROOT_HALF, _LOG_2, _FOURTH_ROOT = 1518500250, 1488522236, 1805811301  # In Q0.


def away(x, shift):
    """Returns ``x / 2^shift``, ties away from zero."""
    return np.sign(x) * ((np.abs(x) + ((np.int64(1) << shift) >> 1)) >> shift)


def high(a, b):
    """Returns ``a * b / 2^31``; what saturates is the square of the least number."""
    product, half = np.asarray(a * b), 1 << 30  # Halves go up.
    below = -((half - 1 - product) >> 31)
    return np.minimum(np.where(product < 0, below, (product + half) >> 31), _MOST)


def rescaled(x, multiplier, shift):
    """Returns ``x * multiplier / 2^shift``, rounded twice."""
    left, right = np.maximum(31 - shift, 0), np.maximum(shift - 31, 0)
    return away(high((x << left).astype("i4").astype("i8"), multiplier), right)


def _within(x):  # Of 32 bits.
    return np.clip(x, -_MOST - 1, _MOST)


def _bits(x):  # Of positive integers.
    return np.frexp(x.astype("f8"))[1].astype("i8")


def _share_of_one(x):  # 1 / (1 + x), in Q0, of x from 0 to 1.
    half = (x + _MOST + 1) // 2
    y = 1515870810 - high(half, 1010580540)  # 48 / 17 - 32 / 17 of it, in Q2.
    for _ in range(3):
        y = y + _within(high(y, (1 << 29) - high(half, y)) * 4)
    return _within(y * 2)


def _log(x):  # In Q5, of x in Q12 from 1 on.
    # Powers of two out of x, and out of x / sqrt(2): the rest is near 2^-1/4.
    whole, part = _bits(x), _bits(high(x, _ROOT_HALF))
    first = _within(high(x << (31 - whole), _ROOT_HALF) * 2)
    second = _within(x << (31 - part))
    unit, quarter = 1 << 25, 1 << 23  # In Q6.
    power = np.maximum((whole - 20) * unit + quarter, (part - 19) * unit - quarter)
    r = np.minimum(first, second)
    q = 2 * (r - _FOURTH_ROOT)
    squared = high(q, q)
    above = high(q, r) + high(high(q, squared), 117049297)
    below = high((r + _FOURTH_ROOT + 1) // 2, 1057819769 + q + high(squared, 127690142))
    share = _share_of_one(below + high(q, 638450708))
    return _within((high(power, _LOG_2) + high(away(above, 6), share)) * 2)


def _inverse_root(x):  # 1 / sqrt(x) as multiplier * 2^-(31 + shift).
    x, is_one = np.maximum(x, 2), x <= 1
    large = x >= 1 << 29
    x = np.where(large, x // 4, x)
    pairs = (31 - _bits(x)) // 2 - 1
    x = (x << (2 * pairs)) // 2
    half, y, shift = away(x, 1), np.full(x.shape, 1 << 28), 11 + large - pairs
    for _ in range(5):  # In Q3: y (3 - x y^2) / 2.
        cube = _within(high(high(y, y), y) * 64)
        y = _within((high(y, 3 << 27) - high(half, cube)) * 8)
    y = high(y, _ROOT_HALF) << np.maximum(-shift, 0)
    return np.where(is_one, _MOST, y), np.where(is_one, 0, np.maximum(shift, 0))


def _below(x):  # Steps of codes below the largest of their row.
    return x.max(-1, keepdims=True) - x


def _sum_of(exponentials):  # In Q12, of Q0.
    return away(exponentials, 12).sum(-1, keepdims=True)


class Kernels:
    """The operations that occur only in TFLite's arithmetic."""

    def tflite_softmax(self, a, p, x):
        e = p["exponentials"][_below(x)]
        total = _sum_of(e)
        bits = _bits(total)
        share = _share_of_one((total << (32 - bits)) - (1 << 31))
        return np.clip(away(high(share, e), bits + 3) + a["low"], a["low"], a["high"])

    def tflite_log_softmax(self, a, p, x):
        below = _below(x)
        rest = p["steps"][below] - _log(_sum_of(p["exponentials"][below]))
        return np.clip(away(rest, 22) + a["zero_point"], a["low"], a["high"])

    def tflite_softmax16(self, a, p, x):
        e = p["exponentials"][_below(x)]
        total = e.sum(-1, keepdims=True)
        bits = _bits(total)
        near = away(total << (31 - bits), 14) - (1 << 16)  # Of 1 to 2, in Q15.
        share = p["reciprocals"][np.minimum(near, 65535)]
        return np.clip(away(e * share, bits - 1), 0, a["high"])

    def tflite_l2_norm(self, a, p, x):
        x = x - a["input_zero_points"][0]
        multiplier, shift = _inverse_root((x * x).sum(-1, keepdims=True))
        return np.clip(rescaled(x, multiplier, shift + 24), a["low"], a["high"])

    def tflite_resize(self, a, p, x):
        for axis, role in ((1, "rows"), (2, "columns")):  # Both by 2^10: exact sums.
            first, last, rest = p[role]
            rest = rest.reshape([-1 if d == axis else 1 for d in range(4)])
            own = x.take(first, axis) * (1024 - rest) + x.take(last, axis) * rest
            x = own
        return away(x, 20)


def check_tables(node, p, x):
    """Raises unless the tables of an operation of TFLite fit its input.

    Args:
      node: The node.
      p: Its parameters.
      x: Its input value.
    """
    name, shape = node["operation"], x["shape"]
    codes, inside = (
        x["high"] - x["low"] + 1,
        lambda t, a, b: bool(np.all((a <= t) & (t <= b))),
    )
    if name == "tflite_resize":
        need(len(shape) == 4, f"an image has the shape {shape}")
        for size, role in ((shape[1], "rows"), (shape[2], "columns")):
            places = p[role]
            need(places.ndim == 2 and len(places) == 3, f"{role} are not three lists")
            first, last, rest = places
            known = inside(places[:2], 0, size - 1) and inside(rest, -1024, 1024)
            known = known and inside(rest[first != last], 0, 1024)
            need(known, f"{role} are not between places of the image")
    elif name == "tflite_l2_norm":
        zero = node["attributes"]["input_zero_points"][0]
        far = max(abs(x["low"] - zero), abs(x["high"] - zero))
        need(shape and shape[-1] * far**2 <= _MOST, "sums of squares are beyond int32")
    elif name.startswith("tflite_"):
        wide, table = name == "tflite_softmax16", p["exponentials"]
        need(table.ndim == 1 and len(table) >= codes, "exponentials lack codes")
        most = (1 << 15) - 1 if wide else _MOST
        known = inside(table, 0, most) and table[0] >= (1 if wide else _MOST)
        need(known and shape and 0 < shape[-1] < 4096, "exponentials do not fit")
        steps = p.get("steps", np.zeros(codes))
        known = steps.ndim == 1 and len(steps) >= codes
        need(known and inside(steps, -20 << 26, 0), "steps do not fit")
        shares = p.get("reciprocals", np.zeros(1 << 16))
        known = shares.shape == (1 << 16,) and inside(shares, 0, (1 << 15) - 1)
        need(known, "reciprocals do not fit")
