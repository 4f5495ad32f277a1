"""TFLite's own algorithms in ONNX, in int64."""

from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.elementwise import divided_by_power, high_product, rescaled
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.normalisations import (
    bit_length,
    powers,
    shifted_half_up,
    sums_of_parts,
)
from qjax.graph.operations.fractions import (
    DENOMINATOR,
    HALF_ROOT,
    LOG2,
    NUMERATOR,
    QUARTER_ROOT,
)

_INT32 = np.iinfo(np.int32)


def _rescale(
    call: OnnxCall, acc: OnnxValue, far: int, m: int, shift: int
) -> tuple[OnnxValue, int]:
    """Returns a rescaled value and how far from 0 it is at most."""
    g = call.graph
    most = (far * abs(m) >> shift) + 1
    if call["rule"] == "tflite_single":
        return g.shift_half_up(g.mul(acc, m), shift), most
    return rescaled(g, acc, far, m, shift), most


def add(call: OnnxCall) -> OnnxValue:
    """Writes a sum whose terms are rescaled before."""
    g, found, far = call.graph, None, 0
    for k, (z, m, s) in enumerate(
        zip(call["zero_points"], call["multipliers"], call["shifts"], strict=True)
    ):
        v, left = call.values[k], 1 << call["left_shift"]
        x = g.mul(g.sub(call.read(k), z), left)
        own = max(abs(v.low - z), abs(v.high - z)) * left
        part, most = _rescale(call, x, own, m, s)
        far += most
        found = part if found is None else g.two("Add", found, part)
    assert found is not None
    code, _ = _rescale(call, found, far, call["multiplier"], call["shift"])
    return g.clip(g.add(code, call["zero_point"]), call["low"], call["high"])


def average(call: OnnxCall) -> OnnxValue:
    """Writes quotients of sums by counts, halves away from zero."""
    g, counts = call.graph, call.params["counts"]
    acc = call.read()
    size = g.add(g.one("Abs", acc), counts // 2)
    found = g.two("Mul", g.one("Sign", acc), g.two("Div", size, counts))
    return g.clip(found, call["low"], call["high"])


def resize(call: OnnxCall) -> OnnxValue:
    """Writes images between the places of others, by their rests of 10 bits."""
    g, x, total = call.graph, call.read(), None
    rows, columns = call.params["rows"], call.params["columns"]
    one = 1 << 10
    for j in (0, 1):
        down = rows[2] if j else one - rows[2]
        part = g.gather(x, g.constant(rows[j], "int64"), axis=1)
        for k in (0, 1):
            right = columns[2] if k else one - columns[2]
            corner = g.gather(part, g.constant(columns[k], "int64"), axis=2)
            weights = (down[:, None] * right)[None, :, :, None]
            corner = g.mul(corner, weights)
            total = corner if total is None else g.two("Add", total, corner)
    assert total is not None
    return divided_by_power(g, total, 20)


def softmax(call: OnnxCall) -> OnnxValue:
    """Writes the softmax of 8 bits: a quotient by three of Newton's steps."""
    g, exps = call.graph, _looked_up(call, "exponentials")
    last = [len(call.shape) - 1]
    total, length = sums_of_parts(call, divided_by_power(g, exps, 12), last)
    up = powers(g, g.two("Sub", g.constant(32, "int64"), length))
    quotient = _newton(g, g.add(g.two("Mul", total, up), -(1 << 31)))
    share = high_product(g, quotient, exps)
    size = shifted_half_up(g, g.one("Abs", share), g.add(length, 3))
    code = g.add(g.two("Mul", g.one("Sign", share), size), call["low"])
    return g.clip(code, call["low"], call["high"])


def _looked_up(call: OnnxCall, role: str) -> OnnxValue:
    """Returns numbers of a table, by the distance from the largest of the last axis."""
    g, x = call.graph, call.read()
    top = g.reduce("ReduceMax", x, [len(x.shape) - 1], keepdims=True)
    table = g.constant(call.params[role], "int64", role)
    return g.gather(table, g.two("Sub", top, x))


def log_softmax(call: OnnxCall) -> OnnxValue:
    """Writes the log-softmax of 8 bits: a logarithm by a quotient."""
    g, last = call.graph, [len(call.shape) - 1]
    exps = divided_by_power(g, _looked_up(call, "exponentials"), 12)
    total, length = sums_of_parts(call, exps, last)
    log = _logarithm(g, total, g.two("Sub", g.constant(32, "int64"), length))
    rest = g.two("Sub", _looked_up(call, "steps"), log)
    code = g.add(divided_by_power(g, rest, 22), call["zero_point"])
    return g.clip(code, call["low"], call["high"])


def _logarithm(g: OnnxGraph, x: OnnxValue, own: OnnxValue) -> OnnxValue:
    """Computes ``log(x)`` as `qjax.graph.operations.fractions` does.

    Args:
      g: Receives it.
      x: Sums.
      own: Zeros above them in 32 bits.
    """
    below, quarter = high_product(g, x, HALF_ROOT), 1 << 23
    other = g.two("Sub", g.constant(31, "int64"), bit_length(g, below, 31))
    up = powers(g, g.add(own, -1))
    first = g.mul(high_product(g, g.two("Mul", x, up), HALF_ROOT), 2)
    second = g.two("Mul", x, powers(g, other))
    rest = g.two("Min", g.two("Min", first, second), _INT32.max)
    power = [
        g.add(g.mul(n, -(1 << 25)), (12 << 25) + more)
        for n, more in ((own, quarter), (other, -quarter))
    ]
    middle = g.two("Div", g.add(rest, QUARTER_ROOT + 1), 2)
    q = g.mul(g.add(rest, -QUARTER_ROOT), 2)
    square = high_product(g, q, q)
    cube = high_product(g, high_product(g, q, square), NUMERATOR)
    above = g.two("Add", high_product(g, q, rest), cube)
    one, of_q, of_square = DENOMINATOR
    line = g.two("Add", g.add(q, one), high_product(g, square, of_square))
    under = g.two("Add", high_product(g, middle, line), high_product(g, q, of_q))
    part = high_product(g, divided_by_power(g, above, 6), _newton(g, under))
    whole = high_product(g, g.two("Max", *power), LOG2)
    return g.mul(g.two("Add", whole, part), 2)


def l2_norm(call: OnnxCall) -> OnnxValue:
    """Writes codes over the root of their squares: five of Newton's steps."""
    g, last = call.graph, [len(call.shape) - 1]
    x = g.sub(call.read(), call["input_zero_points"][0])
    total = g.reduce("ReduceSum", g.two("Mul", x, x), last, keepdims=True)
    root, shift = _inverse_root(g, total)
    # Of 24 and more bits: to the left by 7 at most, the rest to the right.
    left = powers(g, g.two("Max", g.two("Sub", g.constant(7, "int64"), shift), 0))
    right = g.two("Max", g.add(shift, -7), 0)
    high = high_product(g, g.two("Mul", x, left), root)
    size = shifted_half_up(g, g.one("Abs", high), right)
    code = g.two("Mul", g.one("Sign", high), size)
    return g.clip(code, call["low"], call["high"])


def _inverse_root(g: OnnxGraph, x: OnnxValue) -> tuple[OnnxValue, OnnxValue]:
    """Computes ``1 / sqrt(x)`` as `qjax.graph.operations.fractions` does."""
    is_one = g.two("Less", x, 2)
    x = g.two("Max", x, 2)
    is_large = g.two("GreaterOrEqual", x, 1 << 29)
    x = g.where(is_large, g.two("Div", x, 4), x)
    room = g.two("Sub", g.constant(31, "int64"), bit_length(g, x, 31))
    pairs = g.add(g.two("Div", room, 2), -1)
    shift = g.two("Sub", g.add(g.cast(is_large, "int64"), 11), pairs)
    whole = g.two("Div", g.two("Mul", x, powers(g, g.mul(pairs, 2))), 2)
    half = g.two("Div", g.add(whole, 1), 2)
    y = g.add(g.mul(whole, 0), 1 << 28)
    ends = _INT32.min, _INT32.max
    for _ in range(5):
        cube = high_product(g, high_product(g, y, y), y)
        cube = g.clip(g.mul(cube, 64), *ends)
        line = high_product(g, y, 3 << 27)
        y = g.mul(g.two("Sub", line, high_product(g, half, cube)), 8)
        y = g.clip(y, *ends)
    up = powers(g, g.two("Max", g.one("Neg", shift), 0))
    root = g.two("Mul", high_product(g, y, HALF_ROOT), up)
    shift = g.two("Max", shift, 0)
    return g.where(is_one, _INT32.max, root), g.where(is_one, 0, shift)


def _newton(g: OnnxGraph, x: OnnxValue) -> OnnxValue:
    """Computes gemmlowp's ``1 / (1 + x)`` for x in [0, 1), with 31 fraction bits."""
    half = g.two("Div", g.add(x, 1 << 31), 2)
    y = g.add(high_product(g, half, -1010580540), 1515870810)
    for _ in range(3):
        rest = high_product(g, half, y)
        rest = g.two("Sub", g.constant(1 << 29, "int64"), rest)
        step = g.mul(high_product(g, y, rest), 4)
        y = g.two("Add", y, g.clip(step, _INT32.min, _INT32.max))
    return g.clip(g.mul(y, 2), _INT32.min, _INT32.max)


def softmax16(call: OnnxCall) -> OnnxValue:
    """Writes the softmax of 16 bits: a quotient from a table."""
    g, exps = call.graph, _looked_up(call, "exponentials")
    total, length = sums_of_parts(call, exps, [len(call.shape) - 1])
    room = g.two("Sub", g.constant(32, "int64"), length)
    shifted = g.two("Mul", total, powers(g, g.add(room, -1)))
    shifted = g.shift_half_up(shifted, 14)
    place = g.clip(g.add(shifted, -((1 << 15) + (1 << 16))), -32768, 32767)
    table = g.constant(call.params["reciprocals"], "int64", "reciprocals")
    product = g.two("Mul", exps, g.gather(table, g.add(place, 32768)))
    down: Any = g.two("Sub", g.constant(31, "int64"), room)
    return g.clip(shifted_half_up(g, product, down), 0, call["high"])
