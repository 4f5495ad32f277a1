"""Softmaxes and normalisations: what scales codes by sums over these codes."""

import math

import numpy as np

from qjax.graph.operations.norms import NORMS
from qjax.graph.operations.record import (
    AXES,
    CLIP,
    FLAG,
    INT32,
    INTEGER,
    INTEGERS,
    SHIFT,
    SIZE,
    Attribute,
    Ends,
    Operands,
    Operation,
    Shape,
    broadcast_shape,
    check_axes,
    choice,
    is_integer,
)

_ONE = 1 << 30  # Probability of one.
_MOST_DISTANCE = 1 << 16

_MULTIPLIER = Attribute(
    "an integer from 0 to 2^31 - 1", lambda x: is_integer(x) and 0 <= x <= INT32.max
)


def _softmax_shape(o: Operands) -> Shape:
    check_axes(o, o["axes"], len(o.x.shape))
    for other in o.inputs[1:]:
        fits = len(other.shape) == len(o.x.shape) and all(
            n in (1, whole) for n, whole in zip(other.shape, o.x.shape, strict=True)
        )
        o.check(fits, f"the mask must broadcast to {o.x.shape}", other.shape)
    return o.x.shape


def _sum_shape(o: Operands) -> Shape:
    shape = _softmax_shape(o)
    if o["keepdims"]:
        return tuple(1 if d in o["axes"] else n for d, n in enumerate(shape))
    return tuple(n for d, n in enumerate(shape) if d not in o["axes"])


def _check_table(o: Operands) -> np.ndarray:
    """Returns the table of exponentials; raises ValueError for one that is none."""
    table = o.check_range("table", 0, _ONE)
    size, distance = len(table), o.x.high - o.x.low
    places = math.prod(o.x.shape[d] for d in o["axes"])
    o.check(table.ndim == 1 and size > 0, "the table must have one axis", table.shape)
    is_sum = 0 < int(table[0]) and o["most_places"] * int(table[0]) <= 1 << 45
    o.check(is_sum, "sums of `most_places` must be in (0, 2^45]", int(table[0]))
    few = places <= o["most_places"]
    o.check(few, f"a row must have at most {o['most_places']} places", places)
    known = size > distance or int(table[-1]) == 0
    wanted = f"the table must have distances up to {distance}, or end at 0"
    o.check(known and distance < _MOST_DISTANCE, wanted, f"{size} distances")
    for mask in o.inputs[1:]:
        is_mask = 0 <= mask.low and mask.high <= 1
        o.check(is_mask, "the mask must be 0 or 1", [mask.low, mask.high])
    return table


def _softmax_interval(o: Operands) -> Ends:
    _check_table(o)
    codes = (_coded(o, np.asarray(p, np.int64)) for p in (0, _ONE))
    return tuple(map(int, codes))  # type: ignore[return-value]


def _coded(a, p):
    """Returns the codes of probabilities."""
    steps = (p * a["multiplier"] + ((1 << a["shift"]) >> 1)) >> a["shift"]
    return np.clip(steps + a["zero_point"], a["low"], a["high"])


def _log_interval(o: Operands) -> Ends:
    table = _check_table(o)
    o.check_zero_points("input_zero_points", o["input_zero_points"])
    one, most = int(table[0]), int(table.max())
    is_one = most == one and one * o["most_places"] == 1 << 45
    o.check(is_one, "the table must begin with its largest, 2^45 / `most_places`", most)
    log = _logarithm(o["most_places"] * one, one) + 2
    if "keepdims" in o.attributes:
        far = o.check_distance(o.x, o.x.zero_point)
        o.check(far < 1 << 17, "codes must be below 2^17 about their zero point", far)
        zero = o.x.zero_point
        pairs = (o.x.low - zero, 0), (o.x.high - zero, log)
    else:
        pairs = (o.x.low - o.x.high, -log), (0, 0)
    low, high = (int(_log_coded(o, *pair)) for pair in pairs)
    return (o["low"] if len(o.inputs) > 1 else low), high


def _logarithm(total: int, one: int) -> int:
    """Returns ``2^26 * log(total / one)``, by the series of a quotient."""
    length = total.bit_length()
    a = total << 32 - length if length < 32 else total >> length - 32
    z = ((a - (1 << 31)) << 31) // (a + (1 << 31))
    series = 0
    for k in range(19, 0, -2):
        series = ((2 << 31) + k) // (2 * k) + ((z * z >> 31) * series >> 31)
    found = (length - one.bit_length()) * _LN2 + ((z * series >> 30) << 9)
    return (found + (1 << 13)) >> 14


_LN2 = 762123384786  # In units of 2^-40.


def _log_coded(a, t, log):
    """Returns the code of a step and of what is added to it, 2^26 times a logarithm."""
    pairs = (
        (t, a["input_multiplier"], a["input_shift"]),
        ((log, a["multiplier"], a["shift"])),
    )
    total = 0
    for x, multiplier, shift in pairs:
        up, down = max(14 - shift, 0), max(shift - 14, 0)
        total += ((x * multiplier << up) + ((1 << down) >> 1)) >> down
    steps = (total + (1 << 13)) >> 14
    return max(a["low"], min(a["high"], steps + a["zero_point"]))


def _rows(a, inputs):
    """Returns codes and what a mask keeps by rows, and the axes of both in order."""
    x, axes = inputs[0], tuple(a["axes"])
    keep = np.ones(x.shape, bool)
    if len(inputs) > 1:
        keep = np.broadcast_to(inputs[1] != 0, x.shape)
    others = tuple(d for d in range(x.ndim) if d not in axes)
    rows = (math.prod(x.shape[d] for d in others), -1)
    codes, kept = (v.transpose(others + axes).reshape(rows) for v in (x, keep))
    pairs = []
    for row, own in zip(codes, kept, strict=True):
        if not own.any() and a["empty"] != "zero":
            own = np.ones(len(row), bool)
            row = row if a["empty"] == "all" else np.zeros_like(row)
        pairs.append((row, own))
    return pairs, others + axes


def _in_order(found, x, order):
    """Returns what is found by rows, its axes in the order of the codes."""
    shape = [x.shape[d] for d in order]
    return np.array(found, np.int64).reshape(shape).transpose(np.argsort(order))


def _parts(table, row):
    """Returns exponentials of codes, by the distance from their largest."""
    return [int(table[min(d, len(table) - 1)]) for d in row.max() - row]


def _softmax(a, own, inputs):
    """Computes each row in Python's integers, which have no end."""
    x = inputs[0]
    if not x.size:
        return x
    pairs, order = _rows(a, inputs)
    found = np.zeros((len(pairs), len(pairs[0][0])), np.int64)
    for k, (row, kept) in enumerate(pairs):
        if kept.any():
            parts = _parts(own["table"], row[kept])
            found[k, kept] = _shares(parts, a.get("plus", 0))
    return _coded(a, _in_order(found, x, order))


def _log_softmax(a, own, inputs):
    """Computes each row in Python's integers, which have no end."""
    x = inputs[0]
    if not x.size:
        return x
    pairs, order = _rows(a, inputs)
    found = np.full((len(pairs), len(pairs[0][0])), a["low"], np.int64)
    for k, (row, kept) in enumerate(pairs):
        if kept.any():
            log = _logarithm(sum(_parts(own["table"], row[kept])), int(own["table"][0]))
            top = int(row[kept].max())
            found[k, kept] = [_log_coded(a, int(q) - top, -log) for q in row[kept]]
    return _in_order(found, x, order)


def _logsumexp(a, own, inputs):
    """Computes each row in Python's integers, which have no end."""
    x, axes = inputs[0], a["axes"]
    kept = [1 if d in axes else n for d, n in enumerate(x.shape)]
    shape = kept if a["keepdims"] else [n for d, n in enumerate(kept) if d not in axes]
    if not x.size:
        return np.full(shape, a["low"], np.int64)
    found = []
    for row, kept in _rows(a, inputs)[0]:
        code = a["low"]
        if kept.any():
            log = _logarithm(sum(_parts(own["table"], row[kept])), int(own["table"][0]))
            top = int(row[kept].max()) - a["input_zero_points"][0]
            code = _log_coded(a, top, log)
        found.append(code)
    return np.array(found, np.int64).reshape(shape)


def _shares(parts: list[int], plus: int) -> list[int]:
    """Returns parts of their sum and more, by a reciprocal of 32 bits."""
    total = sum(parts) + plus
    length = total.bit_length()
    reciprocal = min(((1 << (32 + length)) // total + 1) // 2, (1 << 32) - 1)
    half, unit = 1 << length, 1 << (length + 1)
    return [(e * reciprocal + half) // unit for e in parts]


SOFTMAX = Operation(
    "softmax",
    "code = clip(floor(p * multiplier * 2^-shift + 1/2) + zero_point), "
    "p = round(2^30 * e / (sum(e) + plus)), e = table[max(q) - q]",
    "rescale",
    _softmax_shape,
    _softmax_interval,
    _softmax,
    inputs=(1, 2),
    attributes={
        "algorithm": choice("exp_table"),
        "axes": AXES,
        "most_places": SIZE,
        "empty": choice("zero", "all", "uniform"),
        "multiplier": _MULTIPLIER,
        "shift": SHIFT,
        "zero_point": INTEGER,
        **CLIP,
    },
    roles=("table",),
    optional={
        "plus": Attribute(
            "an integer from 0 to 2^30", lambda x: is_integer(x) and 0 <= x <= _ONE
        )
    },
)


_LOGS: dict[str, Attribute] = {
    "algorithm": choice("exp_table_and_log_series"),
    "axes": AXES,
    "most_places": SIZE,
    "empty": choice("zero", "all", "uniform"),
    "input_multiplier": _MULTIPLIER,
    "input_shift": SHIFT,
    "input_zero_points": INTEGERS,
    "multiplier": _MULTIPLIER,
    "shift": Attribute(
        "an integer from 26 to 88", lambda x: is_integer(x) and 26 <= x <= 88
    ),
    "zero_point": INTEGER,
    **CLIP,
}

LOG_SOFTMAX = Operation(
    "log_softmax",
    "code = clip(floor((q - max(q)) * input_multiplier * 2^-input_shift "
    "- L * multiplier * 2^-shift + 1/2) + zero_point), "
    "L = round(2^26 * log(sum(e) / table[0])), e = table[max(q) - q]",
    "rescale",
    _softmax_shape,
    _log_interval,
    _log_softmax,
    inputs=(1, 2),
    attributes=_LOGS,
    roles=("table",),
    each_input=("input_zero_points",),
)

LOGSUMEXP = Operation(
    "logsumexp",
    "code = clip(floor((max(q) - input_zero_point) * input_multiplier * 2^-input_shift "
    "+ L * multiplier * 2^-shift + 1/2) + zero_point), "
    "L = round(2^26 * log(sum(e) / table[0])), e = table[max(q) - q]",
    "rescale",
    _sum_shape,
    _log_interval,
    _logsumexp,
    inputs=(1, 2),
    attributes={**_LOGS, "keepdims": FLAG},
    roles=("table",),
    each_input=("input_zero_points",),
)


def _divide_interval(o: Operands) -> Ends:
    o.check_zero_points("zero_points", o["zero_points"])
    for x in o.inputs:
        far = o.check_distance(x, x.zero_point)
        o.check(far < 1 << 17, "codes must be below 2^17 about their zero point", far)
    return o["low"], o["high"]


def _divide(a, own, inputs):
    """Divides in Python's integers, which have no end."""
    x, y = (v - z for v, z in zip(inputs, a["zero_points"], strict=True))
    x, y = (v.astype(object) for v in np.broadcast_arrays(x, y))
    size = np.maximum(np.abs(y), 1)
    reciprocal = ((a["multiplier"] << 14) + size // 2) // size
    half = (1 << a["shift"]) >> 1
    steps = (x * np.where(y < 0, -reciprocal, reciprocal) + half) >> a["shift"]
    steps = np.where(y == 0, np.sign(x) << 40, steps)
    low, high = a["low"] - a["zero_point"], a["high"] - a["zero_point"]
    return np.clip(steps, low, high).astype(np.int64) + a["zero_point"]


DIVIDE = Operation(
    "divide",
    "code = clip(floor(a * round(multiplier * 2^14 / b) * 2^-shift + 1/2) + "
    "zero_point), a and b codes less their zero points; a / 0 saturates, 0 / 0 is 0",
    "rescale",
    broadcast_shape,
    _divide_interval,
    _divide,
    inputs=2,
    attributes={
        "zero_points": INTEGERS,
        "multiplier": _MULTIPLIER,
        "shift": Attribute(
            "an integer from 0 to 76", lambda x: is_integer(x) and 0 <= x <= 76
        ),
        "zero_point": INTEGER,
        **CLIP,
    },
    each_input=("zero_points",),
)

NORMALISATIONS = (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, *NORMS, DIVIDE)
