"""Normalisations of codes by the moments of groups, of all codes or those of a mask."""

import math

import numpy as np

from qjax.graph.operations.record import (
    AXES,
    CLIP,
    COUNT,
    FLAG,
    INTEGER,
    INTEGERS,
    LEFT,
    SHIFT,
    SIZE,
    SIZES,
    WIDE,
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


def _norm_shape(o: Operands) -> Shape:
    axes, groups = o["axes"], o["groups"]
    check_axes(o, axes, len(o.x.shape))
    o.check(len(axes) == len(groups) > 0, "each axis must have its groups", groups)
    for d, g in zip(axes, groups, strict=True):
        n = o.x.shape[d]
        o.check(n % g == 0, f"axis {d} of size {n} must split into equal groups", g)
    shape = broadcast_shape(o)
    o.check(shape == o.x.shape, f"parameters must broadcast to {o.x.shape}", shape)
    return o.x.shape


def _norm_interval(o: Operands) -> Ends:
    o.check_zero_points("input_zero_points", o["input_zero_points"])
    count, steps = o["count"], o.check_distance(o.x, o.x.zero_point)
    found = math.prod(
        o.x.shape[d] // g for d, g in zip(o["axes"], o["groups"], strict=True)
    )
    o.check(found == count, f"a group must have {count} codes", found)
    wide, power = max(steps, o.x.high - o.x.low), 2 if o["is_centred"] else 1
    squares = count**power * wide**2
    known = squares << max(o["point"], 0) < 1 << 61 and squares < 1 << 62
    o.check(known, "sums of squares must fit 62 bits", squares.bit_length())
    added = 0 <= o["epsilon"] <= 1 << 60 and 0 <= o["floor"] <= 1 << 60
    o.check(added, "`epsilon` and `floor` must lie in [0, 2^60]", o["epsilon"])
    o.check(o["point"] % 2 == 0 and -60 <= o["point"] <= 30, "even point", o["point"])
    one = 1 << _fraction(count, o["is_centred"])
    most = one if not o["is_centred"] else math.isqrt(one * one * (count - 1)) + 1
    if more := o.attributes.get("more", 0):
        far = (count if o["is_centred"] else 1) * wide
        added = max(o["epsilon"], o["floor"], 1)
        bits = 2 * (_fraction(count, o["is_centred"]) + more) + o["point"]
        square = far**2 << bits if bits >= 0 else (far**2 >> -bits) + 1
        most = math.isqrt(square // added) + 1
        o.check(most < 1 << 30, "values must fit 30 bits with `more`", more)
    most += (most >> 24) + 2  # What the root may be off by.
    least = 0 if not o["is_centred"] and o.x.low >= o.x.zero_point else -most
    o.check_range("multiplier", -(1 << 30), 1 << 30)
    o.check_range("bias", -(1 << 30), 1 << 30)
    own = {role: o.params[role].astype(np.int64) for role in ("multiplier", "bias")}
    ends = [_affine(o, own, np.int64(t)) for t in (least, most)]
    return np.minimum(*ends), np.maximum(*ends)


def _fraction(count: int, is_centred: bool) -> int:
    """Returns bits behind the point of values that their group's root bounds."""
    return 30 - (((count - 1).bit_length() + 1) // 2 if is_centred else 0)


def _affine(a, own, t):
    """Returns the codes of normalised values."""
    acc = t * own["multiplier"] + (own["bias"] << a["bias_shift"])
    steps = (acc + ((1 << a["shift"]) >> 1)) >> a["shift"]
    low, high = a["low"] - a["zero_point"], a["high"] - a["zero_point"]
    return np.clip(steps, low, high) + a["zero_point"]


def _norm(a, own, inputs):
    """Computes each group in Python's integers, which have no end."""
    (x,) = inputs
    if not x.size:
        return x
    (zero,), groups = (
        a["input_zero_points"],
        dict(zip(a["axes"], a["groups"], strict=True)),
    )
    split = [s for d, n in enumerate(x.shape) for s in _split(n, groups.get(d, 1))]
    over = tuple(2 * d + 1 if d in groups else -1 for d in range(x.ndim))
    over = tuple(d for d in over if d >= 0)
    q = (x - zero).astype(object).reshape(split)
    total, squares = (v.sum(over, keepdims=True) for v in (q, q * q))
    if a["is_centred"]:
        q, squares = a["count"] * q - total, a["count"] * squares - total * total
    found = np.empty(q.shape, object)
    for place in np.ndindex(squares.shape):
        point = a["point"]
        whole = squares[place] << point if point >= 0 else squares[place] >> -point
        root, down = _reciprocal_root(max(whole + a["epsilon"], a["floor"], 1))
        down -= point // 2 + _fraction(a["count"], a["is_centred"]) + a.get("more", 0)
        down = min(max(down, 0), 62)
        at = tuple(slice(None) if d in over else k for d, k in enumerate(place))
        found[at] = (q[at] * root + ((1 << down) >> 1)) >> down
    return _affine(a, own, found.reshape(x.shape).astype(np.int64))


def _split(n: int, groups: int) -> tuple[int, int]:
    return groups, n // groups


def _reciprocal_root(x: int) -> tuple[int, int]:
    """Returns one over a root, an integer of 30 bits and a shift, by Newton's steps."""
    up = (62 - x.bit_length()) // 2 * 2
    a = (x << up) >> 30
    root = _LINE[0] - ((_LINE[1] * a) >> 32)
    for _ in range(5):
        root = (root * ((3 << 30) - (((root * root >> 30) * a) >> 32))) >> 31
    return root >> 1, 60 - up // 2


_LINE = 2362232013, 1395864371  # 2.2 and 1.3 in units of 2^-30.

NORM = Operation(
    "norm",
    "code = clip(floor((t * multiplier + bias * 2^bias_shift) * 2^-shift + 1/2) + "
    "zero_point), t = u / sqrt(max(v + epsilon, floor)), "
    "u = n * q - sum(q), v = n * sum(q^2) - sum(q)^2 or u = q, v = sum(q^2)",
    "rescale",
    _norm_shape,
    _norm_interval,
    _norm,
    attributes={
        "algorithm": choice("newton_root"),
        "axes": AXES,
        "groups": SIZES,
        "count": SIZE,
        "is_centred": FLAG,
        "epsilon": WIDE,
        "floor": WIDE,
        "point": INTEGER,
        "input_zero_points": INTEGERS,
        "shift": SHIFT,
        "bias_shift": LEFT,
        "zero_point": INTEGER,
        **CLIP,
    },
    roles=("multiplier", "bias"),
    optional={"more": COUNT},
    each_input=("input_zero_points",),
)


def _masked_shape(o: Operands) -> Shape:
    shape = _norm_shape(o)
    mask = o.inputs[1]
    o.check(0 <= mask.low and mask.high <= 1, "the mask must be 0 or 1", mask.high)
    return shape


def _masked_interval(o: Operands) -> Ends:
    o.check_zero_points("input_zero_points", o["input_zero_points"])
    pairs = zip(o["axes"], o["groups"], strict=True)
    found, most = math.prod(o.x.shape[d] // g for d, g in pairs), o["most_places"]
    o.check(found <= most, f"a group must have at most {most} codes", found)
    wide = max(o.check_distance(o.x, o.x.zero_point), o.x.high - o.x.low)
    squares = (most * wide) ** 2
    o.check(squares < 1 << 62, "sums of squares must fit 62 bits", squares)
    for name in ("epsilon", "floor"):
        added = o[name] << 2 * most.bit_length()
        o.check(0 <= added <= 1 << 61, f"`{name}` of {most} must fit 61 bits", o[name])
    o.check(-900 <= o["point"] <= 900, "`point` must lie in [-900, 900]", o["point"])
    o.check_range("multiplier", -(1 << 30), 1 << 30)
    o.check_range("bias", -(1 << 30), 1 << 30)
    return o["low"], o["high"]


def _masked_norm(a, own, inputs):
    """Computes each group in Python's integers, which have no end."""
    x, zero = inputs[0], a["input_zero_points"][0]
    if not x.size:
        return x
    groups = dict(zip(a["axes"], a["groups"], strict=True))
    split = [s for d, n in enumerate(x.shape) for s in _split(n, groups.get(d, 1))]
    over = tuple(2 * d + 1 for d in range(x.ndim) if d in groups)
    q = (x - zero).astype(object).reshape(split)
    m = np.broadcast_to(inputs[1], x.shape).astype(object).reshape(split)
    lines = (np.broadcast_to(own[r], x.shape).reshape(split) for r in _LINES)
    found, (multiplier, bias) = np.empty(q.shape, object), lines
    for place in np.ndindex(m.sum(over, keepdims=True).shape):
        at = tuple(slice(None) if d in over else k for d, k in enumerate(place))
        row, kept = q[at], m[at]
        count = max(int(kept.sum()), a["least"])
        mean = int((kept * row).sum()) if a["is_centred"] else 0
        squares = count * int((kept * row * row).sum()) - mean * mean
        root, down = _masked_root(a, squares, count)
        for k in np.ndindex(row.shape):
            t, e = _held((count * row[k] - mean) * root, down)
            offset = (int(bias[at][k]) << a["bias_shift"]) >> min(e, a["shift"])
            shift = max(a["shift"] - e, 0)
            acc = t * int(multiplier[at][k]) + offset
            found[at][k] = (acc + ((1 << shift) >> 1)) >> shift
    low, high = a["low"] - a["zero_point"], a["high"] - a["zero_point"]
    steps = np.clip(found.reshape(x.shape), low, high).astype(np.int64)
    return steps + a["zero_point"]


_LINES = "multiplier", "bias"


def _masked_root(a, squares: int, count: int) -> tuple[int, int]:
    """Returns one over the root of a variance, and bits behind the point of values."""
    added = [a[name] * count * count for name in ("epsilon", "floor")]
    free = lambda n: 64 - n.bit_length()
    up = (min(free(squares), free(max(added)) + a["point"]) - 3) // 2 * 2
    shift = lambda n, k: n << min(k, 63) if k >= 0 else n >> min(-k, 63)
    whole, floor = (shift(n, up - a["point"]) for n in added)
    root, down = _reciprocal_root(max(shift(squares, up) + whole, floor, 1))
    return root, down - up // 2 - _fraction(a["most_places"], True)


def _held(x: int, down: int) -> tuple[int, int]:
    """Returns ``x * 2^-down`` as 30 bits and an exponent that is not negative."""
    exponent = min(max(abs(x).bit_length() - 30 - down, 0), 62)
    down = min(down + exponent, 62)
    found = (x + (1 << down >> 1)) >> down if down > 0 else x << min(-down, 63)
    most = (1 << 30) - 1
    return max(-most, min(most, found)), exponent


MASKED_NORM = Operation(
    "masked_norm",
    "code = clip(floor((t * multiplier + bias * 2^bias_shift) * 2^-shift + 1/2) + "
    "zero_point), t = u / sqrt(max(v + epsilon * c^2, floor * c^2)), "
    "c = max(sum(m), least), u = c * q - sum(m * q), "
    "v = c * sum(m * q^2) - sum(m * q)^2 or u = c * q, v = c * sum(m * q^2)",
    "rescale",
    _masked_shape,
    _masked_interval,
    _masked_norm,
    inputs=2,
    attributes={
        "algorithm": choice("newton_root"),
        "axes": AXES,
        "groups": SIZES,
        "most_places": SIZE,
        "least": Attribute("0 or 1", lambda x: is_integer(x) and x in (0, 1)),
        "is_centred": FLAG,
        "epsilon": WIDE,
        "floor": WIDE,
        "point": INTEGER,
        "input_zero_points": INTEGERS,
        "shift": SHIFT,
        "bias_shift": LEFT,
        "zero_point": INTEGER,
        **CLIP,
    },
    roles=("multiplier", "bias"),
    each_input=("input_zero_points",),
)

NORMS = (NORM, MASKED_NORM)
