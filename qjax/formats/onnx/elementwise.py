"""Requantizers, tables, constants and choices in ONNX."""

from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.sizes import times
from qjax.graph.operations.arithmetic import bits_of, ends_of

_MOST = 1 << 62


def ended(call: OnnxCall, steps: OnnxValue) -> OnnxValue:
    """Adds the zero point and clips to the codes."""
    g = call.graph
    return g.clip(g.add(steps, call["zero_point"]), call["low"], call["high"])


def requantize(call: OnnxCall) -> OnnxValue:
    """Writes codes of an accumulator, by the rule of the node."""
    g, own = call.graph, call.params
    acc = g.sub(call.read(), call["input_zero_point"])
    zero, x = call["input_zero_point"], call.values[0]
    far = max(abs(x.low - zero), abs(x.high - zero))
    if far * int(np.abs(own["multiplier"]).max(initial=0)) > _MOST:
        raise call.refuse("products of more than 62 bits")
    rule = call["rule"]
    if rule == "tflite_double":
        return ended(call, rescaled(g, acc, far, own["multiplier"], own["shift"]))
    if rule == "fp32_half_even":
        acc = as_float32(g, acc)
    product = g.mul(acc, own["multiplier"])
    if rule == "fp32_half_even":
        product = as_float32(g, product)
    shifted = g.shift_half_up if rule == "tflite_single" else g.shift_round
    return ended(call, shifted(product, own["shift"]))


def as_float32(g: OnnxGraph, x: OnnxValue) -> OnnxValue:
    """Rounds int64 to their 24 leading bits, half to even, by float32 and back."""
    return g.cast(g.cast(x, "float32"), "int64")


def rescaled(
    g: OnnxGraph, acc: OnnxValue, far: int, multiplier: Any, shift: Any
) -> OnnxValue:
    """Computes ``acc * multiplier * 2^-shift``, rounded twice as TFLite does.

    Args:
      g: The graph.
      acc: int64 that fit int32.
      far: Largest distance of ``acc`` from 0.
      multiplier: Integers that fit int32.
      shift: Integers from 0 to 62.

    Returns:
      int64.
    """
    shift = np.asarray(shift, np.int64)
    left, right = np.maximum(31 - shift, 0), np.maximum(shift - 31, 0)
    acc = g.mul(acc, np.int64(1) << left)
    if far << int(left.max(initial=0)) > np.iinfo(np.int32).max:
        acc = wrapped(g, acc, "int32")
    high = high_product(g, acc, multiplier)
    return divided_by_power(g, high, right) if np.any(right) else high


def high_product(g: OnnxGraph, a: OnnxValue, b: Any) -> OnnxValue:
    """Computes ``a * b / 2^31``, halves up; saturates at 2^31."""
    product = g.mul(a, b if isinstance(b, OnnxValue) else np.asarray(b))
    return g.two("Min", g.shift_half_up(product, 31), np.iinfo(np.int32).max)


def divided_by_power(g: OnnxGraph, x: OnnxValue, shift: Any) -> OnnxValue:
    """Computes ``x / 2^shift`` to nearest, halves away from zero."""
    size = g.shift_half_up(g.one("Abs", x), shift)
    return g.two("Mul", g.one("Sign", x), size)


def add(call: OnnxCall) -> OnnxValue:
    """Writes a sum of codes on several grids."""
    g, found = call.graph, None
    for k, (z, m) in enumerate(
        zip(call["input_zero_points"], call["multipliers"], strict=True)
    ):
        part = g.mul(g.sub(call.read(k), z), m)
        found = part if found is None else g.two("Add", found, part)
    assert found is not None
    return ended(call, g.shift_round(found, call["shift"]))


def clip(call: OnnxCall) -> OnnxValue:
    """Writes codes within two ends."""
    narrow = call.x.dtype in ("int8", "uint8", "int32")
    x = call.x if narrow else call.read(0, "int32")
    return call.graph.clip(x, call["low"], call["high"])


# Lookups.


def table(call: OnnxCall) -> OnnxValue:
    """Writes a lookup table."""
    g, own, axis = call.graph, call.params["table"], call["axis"]
    places = g.sub(call.read(0, "int64"), call["low"])
    if axis is not None:
        places = g.mul(places, own.shape[1])
        places = g.add(places, _along(np.arange(own.shape[1]), axis, call.x.shape))
    return g.gather(g.constant(own.reshape(-1), call.dtype, "table"), places)


def _along(numbers: np.ndarray, axis: int, shape: Any) -> np.ndarray:
    """Returns numbers along an axis of values."""
    sizes = [1] * len(shape)
    sizes[axis] = len(numbers)
    return numbers.reshape(sizes)


def thresholds(call: OnnxCall) -> OnnxValue:
    """Writes the number of thresholds below, by bisection, and what it stands for."""
    g, cuts, own = call.graph, call.params["thresholds"], call.params["table"]
    cuts, own = np.atleast_2d(cuts), np.atleast_2d(own)
    bits = cuts.shape[1].bit_length()
    padded = np.full((len(cuts), 1 << bits), np.iinfo(np.int64).max)
    padded[:, : cuts.shape[1]] = cuts
    table_ = np.zeros((len(cuts), 1 << bits), np.int64)
    table_[:, : own.shape[1]] = own
    rows = np.zeros((1,) * len(call.x.shape), np.int64)
    if call["axis"] is not None:
        rows = _along(np.arange(len(cuts)), call["axis"], call.x.shape) << bits
    x, known = call.read(), g.constant(padded.reshape(-1), "int64", "thresholds")
    place = g.expand(g.constant(rows, "int64"), call.shape)
    for step in (1 << k for k in reversed(range(bits))):
        reached = g.two("GreaterOrEqual", x, g.gather(known, g.add(place, step - 1)))
        place = g.add(place, g.mul(g.cast(reached, "int64"), step))
    return g.gather(g.constant(table_.reshape(-1), call.dtype, "table"), place)


def embed(call: OnnxCall) -> OnnxValue:
    """Writes rows of a kernel."""
    g = call.graph
    kernel = g.constant(call.params["kernel"], call.dtype, "kernel")
    if 0 in kernel.shape:
        return g.expand(
            g.constant(np.zeros((1,) * len(call.shape)), call.dtype), call.shape
        )
    return g.gather(kernel, call.read(0, "int64"))


def take(call: OnnxCall) -> OnnxValue:
    """Writes codes at known places."""
    g, places = call.graph, call.graph.constant(call.params["places"], "int64")
    if call.get("crosses_examples"):
        return g.gather(g.reshape(call.x, [times(call.x.shape)]), places)
    first, rest = call.x.shape[0], call.x.shape[1:]
    return g.gather(g.reshape(call.x, [first, times(rest)]), places, axis=1)


def constant(call: OnnxCall) -> OnnxValue:
    """Writes numbers of the program."""
    found = call.graph.constant(call.params["value"], call.dtype, "value")
    return call.graph.expand(found, call.shape) if call.inputs else found


# Choices.


def compare(call: OnnxCall) -> OnnxValue:
    """Writes a comparison of products rounded to float32, in integers."""
    g, exponents = call.graph, call["exponents"]
    sides = []
    for k, (z, m) in enumerate(
        zip(call["zero_points"], call["multipliers"], strict=True)
    ):
        x, own = g.sub(call.read(k), z), call.values[k]
        found = g.mul(x, m)
        if max(abs(own.low - z), abs(own.high - z)) * m > 1 << 24:
            found = as_float32(g, found)
        sides.append(found)
    # The finer side in units of the other: its whole part, and whether there is more.
    finer = 0 if exponents[0] < exponents[1] else 1
    bits = min(abs(exponents[0] - exponents[1]), 62)
    if bits:
        whole = g.shift_floor(sides[finer], bits)
        same = g.two("Equal", sides[finer], g.mul(whole, 1 << bits))
        more = g.two("Sub", g.constant(1, "int64"), g.cast(same, "int64"))
        sides[finer] = g.two("Add", g.mul(whole, 2), more)
        sides[1 - finer] = g.mul(sides[1 - finer], 2)
    return compared(g, call["kind"], *sides)


_COMPARED = {
    "eq": "Equal",
    "ne": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}


def compared(g: OnnxGraph, kind: str, a: OnnxValue, b: OnnxValue) -> OnnxValue:
    """Returns 1 where a comparison holds, 0 elsewhere, int64."""
    found = g.cast(g.two(_COMPARED[kind], a, b), "int64")
    return g.two("Sub", g.constant(1, "int64"), found) if kind == "ne" else found


def select(call: OnnxCall) -> OnnxValue:
    """Writes a choice among cases."""
    g, narrow = call.graph, call.dtype in ("int8", "uint8", "int32")
    dtype = call.dtype if narrow else "int32"
    which = call.read(0, "int32")
    cases = [call.read(k, dtype) for k in range(1, len(call.inputs))]
    found = cases[-1]
    for k, case in list(enumerate(cases[:-1]))[::-1]:
        found = g.where(g.two("Equal", which, k), case, found)
    return found


# Arithmetic of whole numbers.

_PAIRS = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "max": "Max",
    "min": "Min",
    "and": "BitwiseAnd",
    "or": "BitwiseOr",
    "xor": "BitwiseXor",
}


def wrapped(g: OnnxGraph, x: OnnxValue, dtype: str) -> OnnxValue:
    """Reduces int64 to a type, as two's complement does; any but 0 is true."""
    if dtype == "bool":
        zero = g.cast(g.two("Equal", x, 0), "int64")
        return g.two("Sub", g.constant(1, "int64"), zero)
    low, high = ends_of(dtype)
    rest = g.two("Mod", g.sub(x, low), high - low + 1)  # Of the sign of its divisor.
    return g.add(rest, low)


def arithmetic(call: OnnxCall) -> OnnxValue:
    """Writes arithmetic of whole numbers in a type that wraps."""
    g, kind, dtype = call.graph, call["kind"], call["dtype"]
    x = call.read()
    if kind in _COMPARED:
        return compared(g, kind, x, call.read(1))
    if len(call.inputs) == 1:
        return wrapped(g, _of_one(g, kind, dtype, x), dtype)
    y = call.read(1)
    if kind in _PAIRS:
        found = g.two(_PAIRS[kind], x, y)
    elif kind in ("div", "rem"):
        found = _divided(g, kind, x, y)
    else:
        found = _shifted(g, kind, dtype, x, y)
    return wrapped(g, found, dtype)


def _of_one(g: OnnxGraph, kind: str, dtype: str, x: OnnxValue) -> OnnxValue:
    if kind == "not":
        from_one = g.two("Sub", g.constant(1, "int64"), x)
        return from_one if dtype == "bool" else g.one("BitwiseNot", x)
    names = {"neg": "Neg", "abs": "Abs", "sign": "Sign"}
    return x if kind == "convert" else g.one(names[kind], x)


def _divided(g: OnnxGraph, kind: str, x: OnnxValue, y: OnnxValue) -> OnnxValue:
    """Divides towards zero; by zero is -1, and leaves all."""
    is_zero = g.two("Equal", y, 0)
    by = g.where(is_zero, 1, y)
    sizes = [g.one("Abs", v) for v in (x, by)]
    if kind == "rem":
        rest = g.two("Mul", g.one("Sign", x), g.two("Mod", *sizes))
        return g.where(is_zero, x, rest)
    signs = g.two("Mul", g.one("Sign", x), g.one("Sign", by))
    return g.where(is_zero, -1, g.two("Mul", signs, g.two("Div", *sizes)))


def _shifted(
    g: OnnxGraph, kind: str, dtype: str, x: OnnxValue, y: OnnxValue
) -> OnnxValue:
    """Shifts by bits; by as many as there are, or by less than none, all go."""
    bits = bits_of(dtype)
    # Places beyond either end of the powers are one more, which stands for all.
    inside = g.two("Less", g.two("Mod", y, 1 << 33), bits)
    power = g.gather(
        g.constant([1 << k for k in range(bits)], "int64"), g.where(inside, y, 0)
    )
    if kind == "shift_left":
        return g.where(inside, g.two("Mul", x, power), 0)
    if kind == "shift_right_logical":
        unsigned = g.two("Mod", x, 1 << bits)
        return g.where(inside, g.two("Div", unsigned, power), 0)
    half = 1 << (bits - 1)  # The first bit is a sign, in unsigned types too.
    signed = g.sub(g.two("Mod", g.add(x, half), 2 * half), half)
    far = g.sub(signed, g.two("Mod", signed, power))  # Mod has the sign of the divisor.
    negative = g.two(
        "Sub", g.constant(0, "int64"), g.cast(g.two("Less", signed, 0), "int64")
    )
    return g.where(inside, g.two("Div", far, power), negative)
