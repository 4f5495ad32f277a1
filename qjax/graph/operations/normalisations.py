"""Softmaxes: what scales codes by sums over the codes themselves."""

import math

import numpy as np

from qjax.graph.operations.record import (
    AXES,
    CLIP,
    INT32,
    INTEGER,
    SHIFT,
    SIZE,
    Attribute,
    Ends,
    Operands,
    Operation,
    Shape,
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


def _softmax_interval(o: Operands) -> Ends:
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
    codes = (_coded(o, np.asarray(p, np.int64)) for p in (0, _ONE))
    return tuple(map(int, codes))  # type: ignore[return-value]


def _coded(a, p):
    """Returns the codes of probabilities."""
    steps = (p * a["multiplier"] + ((1 << a["shift"]) >> 1)) >> a["shift"]
    return np.clip(steps + a["zero_point"], a["low"], a["high"])


def _softmax(a, own, inputs):
    """Computes each row in Python's integers, which have no end."""
    x, axes, table = inputs[0], tuple(a["axes"]), own["table"]
    keep = np.ones(x.shape, bool)
    if len(inputs) > 1:
        keep = np.broadcast_to(inputs[1] != 0, x.shape)
    others = tuple(d for d in range(x.ndim) if d not in axes)
    order = others + axes
    rows = (math.prod(x.shape[d] for d in others), -1)
    if not x.size:
        return x
    shape = [x.shape[d] for d in order]
    codes, kept = (v.transpose(order).reshape(rows) for v in (x, keep))
    found = np.zeros(codes.shape, np.int64)
    for k, (row, own_kept) in enumerate(zip(codes, kept, strict=True)):
        if not own_kept.any() and a["empty"] != "zero":
            own_kept = np.ones(len(row), bool)
            row = row if a["empty"] == "all" else np.zeros_like(row)
        if own_kept.any():
            places = np.flatnonzero(own_kept)
            distance = row[places].max() - row[places]
            parts = [int(table[min(d, len(table) - 1)]) for d in distance]
            found[k, places] = _shares(parts)
    found = found.reshape(shape).transpose(np.argsort(order))
    return _coded(a, found)


def _shares(parts: list[int]) -> list[int]:
    """Returns parts of their sum, by a reciprocal of 32 bits."""
    total = sum(parts)
    length = total.bit_length()
    reciprocal = min(((1 << (32 + length)) // total + 1) // 2, (1 << 32) - 1)
    half, unit = 1 << length, 1 << (length + 1)
    return [(e * reciprocal + half) // unit for e in parts]


SOFTMAX = Operation(
    "softmax",
    "code = clip(floor(p * multiplier * 2^-shift + 1/2) + zero_point), "
    "p = round(2^30 * e / sum(e)), e = table[max(q) - q]",
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
)

NORMALISATIONS = (SOFTMAX,)
