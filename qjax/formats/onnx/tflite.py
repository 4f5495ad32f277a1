"""TFLite's own algorithms in ONNX, in int64."""

from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.elementwise import divided_by_power, high_product, rescaled
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.normalisations import powers, shifted_half_up, sums_of_parts

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
    g, exps = call.graph, _exponentials(call)
    last = [len(call.shape) - 1]
    total, length = sums_of_parts(call, divided_by_power(g, exps, 12), last)
    up = powers(g, g.two("Sub", g.constant(32, "int64"), length))
    quotient = _newton(g, g.add(g.two("Mul", total, up), -(1 << 31)))
    share = high_product(g, quotient, exps)
    size = shifted_half_up(g, g.one("Abs", share), g.add(length, 3))
    code = g.add(g.two("Mul", g.one("Sign", share), size), call["low"])
    return g.clip(code, call["low"], call["high"])


def _exponentials(call: OnnxCall) -> OnnxValue:
    g, x = call.graph, call.read()
    top = g.reduce("ReduceMax", x, [len(x.shape) - 1], keepdims=True)
    table = g.constant(call.params["exponentials"], "int64", "exponentials")
    return g.gather(table, g.two("Sub", top, x))


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
    g, exps = call.graph, _exponentials(call)
    total, length = sums_of_parts(call, exps, [len(call.shape) - 1])
    room = g.two("Sub", g.constant(32, "int64"), length)
    shifted = g.two("Mul", total, powers(g, g.add(room, -1)))
    shifted = g.shift_half_up(shifted, 14)
    place = g.clip(g.add(shifted, -((1 << 15) + (1 << 16))), -32768, 32767)
    table = g.constant(call.params["reciprocals"], "int64", "reciprocals")
    product = g.two("Mul", exps, g.gather(table, g.add(place, 32768)))
    down: Any = g.two("Sub", g.constant(31, "int64"), room)
    return g.clip(shifted_half_up(g, product, down), 0, call["high"])
