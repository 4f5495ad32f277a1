"""Operations that take integers from grid to grid, with rounding."""

import numpy as np

from qjax.graph.operations.record import (
    CLIP,
    FLAG,
    INT32,
    INTEGER,
    INTEGERS,
    RULE,
    SHIFT,
    Ends,
    Operands,
    Operation,
    broadcast_shape,
    clip_interval,
    same_shape,
)
from qjax.graph.operations.shifts import rescale, round_shift

_MOST_SUM = 1 << 62  # Largest sum of products without signs: `requantize_sum`.


def _requantize_interval(o: Operands) -> Ends:
    o.check_zero_points("input_zero_point", [o["input_zero_point"]])
    o.check_range("multiplier", INT32.min, INT32.max)
    o.check_range("shift", 0, 62)
    if not o.attributes.get("is_wide"):
        o.check_distance(o.x, o["input_zero_point"])
    return clip_interval(o)


def _to_float32_and_back(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.int64)


def _requantize(a, own, inputs):
    acc = inputs[0] - a["input_zero_point"]
    if a["rule"] == "fp32_half_even":
        acc = _to_float32_and_back(acc)
    product = acc * own["multiplier"]
    if a["rule"] == "fp32_half_even":
        product = _to_float32_and_back(product)
    if a["rule"].startswith("tflite_"):
        code = rescale(acc, own["multiplier"], own["shift"], a["rule"])
    else:
        code = round_shift(product, own["shift"])
    return np.clip(code + a["zero_point"], a["low"], a["high"])


def _add_interval(o: Operands) -> Ends:
    o.check_zero_points("input_zero_points", o["input_zero_points"])
    pairs = zip(o.inputs, o["input_zero_points"], strict=True)
    steps = [o.check_distance(x, z) for x, z in pairs]
    most = sum(n * abs(m) for n, m in zip(steps, o["multipliers"], strict=True))
    o.check(most <= _MOST_SUM, "`multipliers` must give sums up to 2^62", most)
    if o.attributes.get("is_exact"):
        powers = all(m & (m - 1) == 0 for m in map(abs, o["multipliers"]))
        wanted = "`multipliers` must be powers of two where `is_exact`"
        o.check(powers, wanted, o["multipliers"])
    return clip_interval(o)


def _add(a, own, inputs):
    terms = zip(inputs, a["input_zero_points"], a["multipliers"], strict=True)
    total = sum((q - z) * np.int64(m) for q, z, m in terms)
    code = round_shift(total, np.asarray(a["shift"])) + a["zero_point"]
    return np.clip(code, a["low"], a["high"])


def _clip_ends(o: Operands) -> Ends:
    low, high = clip_interval(o)
    o.check(low <= high, "`low` must not be above `high`", [low, high])
    return min(max(o.x.low, low), high), max(min(o.x.high, high), low)


REQUANTIZE = Operation(
    "requantize",
    "code = clip(round((q - input_zero_point) * multiplier * 2^-shift) + zero_point)",
    "rescale",
    broadcast_shape,
    _requantize_interval,
    _requantize,
    attributes={
        "input_zero_point": INTEGER,
        "zero_point": INTEGER,
        "rule": RULE,
        **CLIP,
    },
    roles=("multiplier", "shift"),
    optional={"is_exact": FLAG, "is_bias_rounded": FLAG, "is_wide": FLAG},
)
ADD = Operation(
    "add",
    "code = clip(round(sum((q_i - z_i) * m_i) * 2^-shift) + zero_point)",
    "rescale",
    broadcast_shape,
    _add_interval,
    _add,
    inputs=None,
    attributes={
        "input_zero_points": INTEGERS,
        "multipliers": INTEGERS,
        "shift": SHIFT,
        "zero_point": INTEGER,
        **CLIP,
    },
    optional={"is_exact": FLAG},
    each_input=("input_zero_points", "multipliers"),
)
CLIP_OPERATION = Operation(
    "clip",
    "code = clip(q, low, high)",
    "choice",
    same_shape,
    _clip_ends,
    lambda a, own, xs: np.clip(xs[0], a["low"], a["high"]),
    attributes=CLIP,
)

RESCALES = (REQUANTIZE, ADD, CLIP_OPERATION)
