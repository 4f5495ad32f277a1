"""Softmaxes, normalisations and quotients in ONNX, in int64.

The formulas are those of `qjax.graph.operations.normalisations`; what they shift to the
right without a sign is divided by a power of two here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.elementwise import ended
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue

_ONE = 1 << 30
_LN2 = 762123384786  # In units of 2^-40.
_LINE = 2362232013, 1395864371  # 2.2 and 1.3 in units of 2^-30.


def powers(g: OnnxGraph, exponents: OnnxValue) -> OnnxValue:
    """Returns powers of two, exponents from 0 to 62."""
    return g.gather(g.constant(1 << np.arange(63), "int64"), exponents)


def bit_length(g: OnnxGraph, x: OnnxValue, most: int = 62) -> OnnxValue:
    """Counts the bits of integers without a sign, of ``most`` bits at most."""
    column = g.reshape(x, (*x.shape, 1))
    ladder = g.constant(1 << np.arange(most), "int64")
    reached = g.cast(g.two("GreaterOrEqual", column, ladder), "int64")
    return g.reduce("ReduceSum", reached, [len(x.shape)])


def shifted_half_up(g: OnnxGraph, x: OnnxValue, shift: OnnxValue) -> OnnxValue:
    """Computes ``x / 2^shift`` of int64 within 2^62, halves up, shifts of its own."""
    unit = powers(g, shift)
    half = g.two("Div", unit, 2)
    u = g.cast(g.add(g.two("Add", x, half), 1 << 62), "uint64")
    down = g.cast(shift, "uint64")
    found = g.cast(g.two("BitShift", u, down, direction="RIGHT"), "int64")
    return g.two("Sub", found, g.two("Div", g.constant(1 << 62, "int64"), unit))


class _SoftmaxRows:
    """Exponentials of the rows of a softmax, and what of them a mask keeps."""

    def __init__(self, call: OnnxCall) -> None:
        g, axes = call.graph, call["axes"]
        x, low = call.read(), call.values[0].low
        keep = None
        self.keep: OnnxValue | None = None
        self.any: OnnxValue | None = None
        if len(call.inputs) > 1:
            keep = g.cast(call.inputs[1], "int64")
            keep = g.expand(keep, x.shape)
            self.any = g.reduce("ReduceMax", keep, axes, keepdims=True)
            if call["empty"] != "zero":
                empty = g.two("Sub", g.constant(1, "int64"), self.any)
                keep = g.two("Max", keep, empty)
                if call["empty"] == "uniform":
                    x = g.two("Mul", x, self.any)
                self.any = None
            self.keep = g.two("Greater", keep, 0)
        seen = x if self.keep is None else g.where(self.keep, x, min(low, 0))
        self.x, self.top = x, g.reduce("ReduceMax", seen, axes, keepdims=True)
        table = call.params["table"]
        distance = g.two("Max", g.two("Sub", self.top, x), 0)
        distance = g.two("Min", distance, len(table) - 1)
        parts = g.gather(g.constant(table, "int64", "table"), distance)
        self.parts = parts if self.keep is None else g.where(self.keep, parts, 0)
        total = g.reduce("ReduceSum", self.parts, axes, keepdims=True)
        self.total = g.two("Max", g.add(total, call.get("plus", 0)), 1)


def _empty(call: OnnxCall) -> OnnxValue:
    """Returns what a softmax of nothing is."""
    own = call.graph.constant(np.full((1,) * len(call.shape), call["low"]), "int64")
    return call.graph.expand(own, call.shape)


def softmax(call: OnnxCall) -> OnnxValue:
    """Writes parts of sums, by one reciprocal of 32 bits a row."""
    if 0 in call.x.shape:
        return _empty(call)
    g, rows = call.graph, _SoftmaxRows(call)
    total, length = rows.total, bit_length(g, rows.total, 47)
    rest = g.two("Max", g.two("Sub", length, 30), 0)
    one = powers(g, g.two("Sub", g.add(length, 31), rest))
    first = g.two("Div", one, total)
    left = g.two("Sub", one, g.two("Mul", first, total))
    unit = powers(g, g.add(rest, 1))
    parts = (g.two("Mul", first, unit), g.two("Div", g.two("Mul", left, unit), total))
    doubled = g.two("Add", *parts)
    reciprocal = g.two("Div", g.add(doubled, 1), 2)
    reciprocal = g.two("Min", reciprocal, (1 << 32) - 1)
    product = g.two("Add", g.two("Mul", rows.parts, reciprocal), powers(g, length))
    down = g.cast(g.add(length, 1), "uint64")
    shares = g.two("BitShift", g.cast(product, "uint64"), down, direction="RIGHT")
    steps = g.mul(g.cast(shares, "int64"), call["multiplier"])
    return ended(call, g.shift_half_up(steps, call["shift"]))


def _divided(g: OnnxGraph, x: OnnxValue, bits: int) -> OnnxValue:
    return g.two("Div", x, 1 << bits)


def _logarithm(g: OnnxGraph, total: OnnxValue, one: int) -> OnnxValue:
    """Returns ``2^26 * log(total / one)``, by the series of a quotient."""
    length = bit_length(g, total)
    up = powers(g, g.two("Max", g.two("Sub", g.constant(32, "int64"), length), 0))
    down = powers(g, g.two("Max", g.two("Sub", length, 32), 0))
    a = g.two("Div", g.two("Mul", total, up), down)
    z = g.mul(g.add(a, -(1 << 31)), 1 << 31)
    z = g.two("Div", z, g.add(a, 1 << 31))
    square = _divided(g, g.two("Mul", z, z), 31)
    series = g.constant(((2 << 31) + 19) // 38, "int64")
    for k in range(17, 0, -2):
        rest = _divided(g, g.two("Mul", square, series), 31)
        series = g.add(rest, ((2 << 31) + k) // (2 * k))
    part = g.mul(_divided(g, g.two("Mul", z, series), 30), 1 << 9)
    whole = g.mul(g.add(length, -one.bit_length()), _LN2)
    return g.shift_half_up(g.two("Add", whole, part), 14)


def _log_coded(call: OnnxCall, t: OnnxValue, log: OnnxValue) -> OnnxValue:
    g, parts = call.graph, []
    for x, m, shift in (
        (t, call["input_multiplier"], call["input_shift"]),
        (log, call["multiplier"], call["shift"]),
    ):
        up, down = max(14 - shift, 0), max(shift - 14, 0)
        found = g.mul(x, m << up)
        parts.append(g.mul(x, 0) if down > 62 else g.shift_half_up(found, down))
    return ended(call, g.shift_half_up(g.two("Add", *parts), 14))


def log_softmax(call: OnnxCall) -> OnnxValue:
    """Writes logarithms of parts of sums."""
    if 0 in call.x.shape:
        return _empty(call)
    g, rows = call.graph, _SoftmaxRows(call)
    log = _logarithm(g, rows.total, int(call.params["table"][0]))
    own = g.two("Sub", rows.x, rows.top)
    if rows.keep is not None:  # What is kept alone is below the largest.
        own = g.two("Min", own, 0)
    found = _log_coded(call, own, g.one("Neg", log))
    return found if rows.keep is None else g.where(rows.keep, found, call["low"])


def logsumexp(call: OnnxCall) -> OnnxValue:
    """Writes logarithms of sums."""
    if 0 in call.x.shape:
        return _empty(call)
    g, rows = call.graph, _SoftmaxRows(call)
    log = _logarithm(g, rows.total, int(call.params["table"][0]))
    top = g.sub(rows.top, call["input_zero_points"][0])
    found = _log_coded(call, top, log)
    if rows.any is not None:
        found = g.where(g.two("Greater", rows.any, 0), found, call["low"])
    return g.reshape(found, call.shape)


# Normalisations.


def norm(call: OnnxCall) -> OnnxValue:
    """Writes codes over the root of the sum of their squares."""
    g, x = call.graph, call.x
    if 0 in x.shape:
        return g.reshape(x, call.shape)
    groups = dict(zip(call["axes"], call["groups"], strict=True))
    split: list[Any] = []
    over: list[int] = []
    for d, n in enumerate(x.shape):
        if d in groups:
            assert isinstance(n, int)
            split += [groups[d], n // groups[d]]
            over.append(len(split) - 1)
        else:
            split.append(n)
    q = g.reshape(g.sub(call.read(), call["input_zero_points"][0]), split)
    total = g.reduce("ReduceSum", q, over, keepdims=True)
    squares = g.reduce("ReduceSum", g.two("Mul", q, q), over, keepdims=True)
    if call["is_centred"]:
        q = g.two("Sub", g.mul(q, call["count"]), total)
        squares = g.mul(squares, call["count"])
        squares = g.two("Sub", squares, g.two("Mul", total, total))
    point = call["point"]
    if point < 0:
        squares = _divided(g, squares, -point)
    whole = g.add(g.mul(squares, 1 << max(point, 0)), call["epsilon"])
    root, down = _reciprocal_root(g, g.two("Max", whole, max(call["floor"], 1)))
    down = g.add(down, -(point // 2 + _fraction(call) + call.get("more", 0)))
    down = g.two("Min", g.two("Max", down, 0), 62)
    found = shifted_half_up(g, g.two("Mul", q, root), down)
    return _affine(call, g.reshape(found, x.shape))


def _fraction(call: OnnxCall) -> int:
    bits = (call["count"] - 1).bit_length()
    return 30 - ((bits + 1) // 2 if call["is_centred"] else 0)


def _affine(call: OnnxCall, t: OnnxValue) -> OnnxValue:
    g, own = call.graph, call.params
    acc = g.mul(t, own["multiplier"])
    acc = g.add(acc, own["bias"] << call["bias_shift"])
    return ended(call, g.shift_half_up(acc, call["shift"]))


def _reciprocal_root(g: OnnxGraph, x: OnnxValue) -> tuple[OnnxValue, OnnxValue]:
    """Returns one over a root, an integer of 30 bits and a shift, by Newton's steps."""
    length = bit_length(g, x)
    half = g.two("Div", g.two("Sub", g.constant(62, "int64"), length), 2)
    up = g.mul(half, 2)
    a = _divided(g, g.two("Mul", x, powers(g, up)), 30)
    line = _divided(g, g.mul(a, _LINE[1]), 32)
    root = g.two("Sub", g.constant(_LINE[0], "int64"), line)
    for _ in range(5):
        square = _divided(g, g.two("Mul", root, root), 30)
        rest = _divided(g, g.two("Mul", square, a), 32)
        rest = g.two("Sub", g.constant(3 << 30, "int64"), rest)
        root = _divided(g, g.two("Mul", root, rest), 31)
    return _divided(g, root, 1), g.two("Sub", g.constant(60, "int64"), half)


def divide(call: OnnxCall) -> OnnxValue:
    """Writes quotients of codes, by one reciprocal for each divisor."""
    g = call.graph
    x, y = (g.sub(call.read(k), z) for k, z in enumerate(call["zero_points"]))
    size = g.two("Max", g.one("Abs", y), 1)
    above = g.add(g.two("Div", size, 2), call["multiplier"] << 14)
    reciprocal = g.two("Mul", g.one("Sign", y), g.two("Div", above, size))
    product = g.two("Mul", x, reciprocal)
    shift = call["shift"]
    steps = g.mul(product, 0) if shift > 62 else g.shift_half_up(product, shift)
    beyond = g.mul(g.one("Sign", x), 1 << 40)
    return ended(call, g.where(g.two("Equal", y, 0), beyond, steps))


# The algorithms of TFLite.


def sums_of_parts(
    call: OnnxCall, parts: OnnxValue, axes: Sequence[int]
) -> tuple[OnnxValue, OnnxValue]:
    """Returns the sums of exponentials and their bits."""
    g = call.graph
    total = g.reduce("ReduceSum", parts, axes, keepdims=True)
    return total, bit_length(g, total, 40)
