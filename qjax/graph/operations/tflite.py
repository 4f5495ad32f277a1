"""Operations that occur only in graphs made from TFLite.

References:
  TensorFlow Lite 2.19, lite/kernels/internal/reference; gemmlowp,
  fixedpoint/fixedpoint.h.
"""

import numpy as np

from qjax.graph.operations.fractions import inverse_root, logarithm, reciprocal
from qjax.graph.operations.lookups import constant_interval
from qjax.graph.operations.record import (
    CLIP,
    INT32,
    INTEGER,
    INTEGERS,
    LEFT,
    SHIFT,
    SHIFTS,
    Ends,
    Operands,
    Operation,
    Shape,
    broadcast_shape,
    choice,
    clip_interval,
    same_interval,
    same_shape,
)
from qjax.graph.operations.shifts import (
    divide_by_power,
    high_product,
    rescale,
    truncated,
)
from qjax.integer_tflite import LEAST_STEP

_MOST_SUMMANDS = 4095  # Most terms of a softmax, whose sum has 31 bits.


def _add_interval(o: Operands) -> Ends:
    o.check_zero_points("zero_points", o["zero_points"])
    total = 0
    columns = zip(
        o.inputs, o["zero_points"], o["multipliers"], o["shifts"], strict=True
    )
    for x, z, multiplier, shift in columns:
        most = o.check_distance(x, z) << o["left_shift"]
        o.check(most <= INT32.max, "shifted codes must fit int32", most)
        total += (most * abs(multiplier) >> shift) + 1
    o.check(total <= INT32.max, "the sum of rescaled codes must fit int32", total)
    return clip_interval(o)


def _add(a, own, inputs):
    parts = zip(inputs, a["zero_points"], a["multipliers"], a["shifts"], strict=True)
    total = sum(
        rescale((x - z) * 2 ** a["left_shift"], np.int64(m), np.int64(s), a["rule"])
        for x, z, m, s in parts
    )
    pair = np.int64(a["multiplier"]), np.int64(a["shift"])
    code = rescale(np.asarray(total), *pair, a["rule"]) + a["zero_point"]
    return np.clip(code, a["low"], a["high"])


def _average_interval(o: Operands) -> Ends:
    counts = o.check_range("counts", 1, INT32.max)
    most = max(abs(o.x.low), abs(o.x.high)) + int(counts.max(initial=1)) // 2
    o.check(most <= INT32.max, "sums and half their counts must fit int32", most)
    return clip_interval(o)


def _average(a, own, inputs):
    acc, half = inputs[0], own["counts"] // 2
    code = truncated(acc + np.where(acc > 0, half, -half), own["counts"])
    return np.clip(code, a["low"], a["high"])


def _resize_shape(o: Operands) -> Shape:
    o.check(len(o.x.shape) == 4, "an image must have 4 axes", o.x.shape)
    for role in ("rows", "columns"):
        shape = o.params[role].shape
        o.check(len(shape) == 2 and shape[0] == 3, f"three {role}", shape)
    rows, columns = (o.params[role].shape[1] for role in ("rows", "columns"))
    return (o.x.shape[0], rows, columns, o.x.shape[3])


def _resize_interval(o: Operands) -> Ends:
    for axis, role in ((1, "rows"), (2, "columns")):
        places, size = o.params[role].astype(np.int64), o.x.shape[axis]
        before, after, rest = places
        there = np.all((before >= 0) & (before < size) & (after >= 0) & (after < size))
        between = (rest >= 0) & (rest <= 1 << 10)
        o.check(
            bool(there and np.all(between | (before == after))),
            f"`{role}` must lie between places of an axis of size {size}",
            places.tolist(),
        )
        o.check(bool(np.all(np.abs(rest) <= 1 << 10)), "rests up to 2^10", rest)
    return same_interval(o)


def _resize(a, own, inputs):
    x, (y0, y1, down), (x0, x1, right) = inputs[0], own["rows"], own["columns"]
    down, right = down[:, None, None], right[:, None]
    one = 1 << 10
    corner = lambda rows, columns: x[:, rows][:, :, columns]
    total = (
        corner(y0, x0) * (one - down) * (one - right)
        + corner(y1, x0) * down * (one - right)
        + corner(y0, x1) * (one - down) * right
        + corner(y1, x1) * down * right
    )
    return truncated(total + np.where(total > 0, 1 << 19, -(1 << 19)), 1 << 20)


def _check_exponentials(o: Operands, most: int, first: int) -> None:
    exponentials = o.check_range("exponentials", 0, most)
    codes = o.x.high - o.x.low + 1
    o.check(
        exponentials.ndim == 1 and len(exponentials) >= codes,
        f"`exponentials` must hold one for each of {codes} codes",
        exponentials.shape,
    )
    wanted = f"`exponentials` must start at {first} or above"
    o.check(bool(exponentials[0] >= first), wanted, exponentials[0])
    size = o.x.shape[-1] if o.x.shape else 0
    wanted = f"the last axis must have at most {_MOST_SUMMANDS} numbers"
    o.check(0 < size <= _MOST_SUMMANDS, wanted, size)


def _softmax_interval(o: Operands) -> Ends:
    _check_exponentials(o, INT32.max, INT32.max)
    return clip_interval(o)


def _softmax(a, own, inputs):
    x = inputs[0]
    exps = own["exponentials"][x.max(-1, keepdims=True) - x]
    total = divide_by_power(exps, 12).sum(-1, keepdims=True)
    length = np.frexp(total.astype(np.float64))[1].astype(np.int64)  # In bits.
    quotient = reciprocal((total << (32 - length)) - (1 << 31))
    share = high_product(quotient, exps)
    code = divide_by_power(share, length + 3) + a["low"]
    return np.clip(code, a["low"], a["high"])


def _log_softmax_interval(o: Operands) -> Ends:
    _check_exponentials(o, INT32.max, INT32.max)
    steps = o.check_range("steps", LEAST_STEP, 0)
    codes = o.x.high - o.x.low + 1
    o.check(
        steps.ndim == 1 and len(steps) >= codes,
        f"`steps` must hold one for each of {codes} codes",
        steps.shape,
    )
    return clip_interval(o)


def _log_softmax(a, own, inputs):
    below = inputs[0].max(-1, keepdims=True) - inputs[0]
    total = divide_by_power(own["exponentials"][below], 12).sum(-1, keepdims=True)
    rest = own["steps"][below] - logarithm(total)
    code = divide_by_power(rest, 22) + a["zero_point"]
    return np.clip(code, a["low"], a["high"])


def _l2_norm_interval(o: Operands) -> Ends:
    o.check_zero_points("input_zero_points", o["input_zero_points"])
    o.check(bool(o.x.shape), "there must be an axis to go along", o.x.shape)
    far = o.check_distance(o.x, o["input_zero_points"][0])
    most = o.x.shape[-1] * far**2
    o.check(most <= INT32.max, "sums of squares must fit int32", most)
    return clip_interval(o)


def _l2_norm(a, own, inputs):
    x = inputs[0] - a["input_zero_points"][0]
    multiplier, shift = inverse_root((x * x).sum(-1, keepdims=True))
    code = rescale(x, multiplier, shift + 24, "tflite_double")
    return np.clip(code, a["low"], a["high"])


def _softmax16_interval(o: Operands) -> Ends:
    _check_exponentials(o, 0x7FFF, 1)
    reciprocals = o.check_range("reciprocals", 0, 0x7FFF)
    wanted = "`reciprocals` must be 65536 numbers"
    o.check(reciprocals.shape == (1 << 16,), wanted, reciprocals.shape)
    o.check(o["high"] >= 0, "`high` must not be negative", o["high"])
    return 0, o["high"]


def _softmax16(a, own, inputs):
    x = inputs[0]
    exps = own["exponentials"][x.max(-1, keepdims=True) - x]
    total = exps.sum(-1, keepdims=True)
    room = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    shifted = ((total << (room - 1)) + (1 << 13)) >> 14
    place = np.clip(shifted - ((1 << 15) + (1 << 16)), -32768, 32767)
    product = exps * own["reciprocals"][place + 32768]
    code = (product + (np.int64(1) << (30 - room))) >> (31 - room)
    return np.clip(code, 0, a["high"])


TFLITE = (
    Operation(
        "tflite_constant",
        "code = value",
        "number",
        lambda o: o.params["value"].shape,
        constant_interval,
        lambda a, own, xs: own["value"],
        inputs=0,
        roles=("value",),
    ),
    Operation(
        "tflite_add",
        "code = clip(rescale(sum(rescale((q_i - z_i) << left_shift))) + zero_point)",
        "rescale",
        broadcast_shape,
        _add_interval,
        _add,
        inputs=2,
        attributes={
            "left_shift": LEFT,
            "zero_points": INTEGERS,
            "multipliers": INTEGERS,
            "shifts": SHIFTS,
            "multiplier": INTEGER,
            "shift": SHIFT,
            "zero_point": INTEGER,
            "rule": choice("tflite_double", "tflite_single"),
            **CLIP,
        },
        each_input=("zero_points", "multipliers", "shifts"),
    ),
    Operation(
        "tflite_average",
        "code = clip(round(q / counts)), halves away from zero",
        "rescale",
        broadcast_shape,
        _average_interval,
        _average,
        attributes=CLIP,
        roles=("counts",),
    ),
    Operation(
        "tflite_resize",
        "code = round(rows @ q @ columns * 2^-20), halves away from zero",
        "rescale",
        _resize_shape,
        _resize_interval,
        _resize,
        roles=("rows", "columns"),
    ),
    Operation(
        "tflite_softmax",
        "code = clip(round(256 * exp / sum(exp)) + low), the quotient by three steps "
        "of Newton's method in fixed point",
        "rescale",
        same_shape,
        _softmax_interval,
        _softmax,
        attributes=CLIP,
        roles=("exponentials",),
    ),
    Operation(
        "tflite_log_softmax",
        "code = clip(round(16 * (steps[max(q) - q] - log(sum(exp))) * 2^-26) + "
        "zero_point), the logarithm by a quotient in fixed point",
        "rescale",
        same_shape,
        _log_softmax_interval,
        _log_softmax,
        attributes={"zero_point": INTEGER, **CLIP},
        roles=("exponentials", "steps"),
    ),
    Operation(
        "tflite_l2_norm",
        "code = clip(round(128 * q / sqrt(sum(q^2)))), q about its zero point, the "
        "root by five steps of Newton's method in fixed point",
        "rescale",
        same_shape,
        _l2_norm_interval,
        _l2_norm,
        attributes={"input_zero_points": INTEGERS, **CLIP},
        each_input=("input_zero_points",),
    ),
    Operation(
        "tflite_softmax16",
        "code = round(2^15 * exp / sum(exp)) up to high, the quotient from a table",
        "rescale",
        same_shape,
        _softmax16_interval,
        _softmax16,
        attributes={"high": INTEGER},
        roles=("exponentials", "reciprocals"),
    ),
)
