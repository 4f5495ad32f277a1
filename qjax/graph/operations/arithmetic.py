"""Arithmetic of whole numbers, which stand for themselves, in a type that wraps."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.graph.operations.record import Ends, Operands, Operation, choice

TYPES = ("bool", "int8", "int16", "int32", "uint8", "uint16")


def bits_of(dtype: str) -> int:
    """Returns the bits of a type."""
    return 1 if dtype == "bool" else np.iinfo(dtype).bits


def ends_of(dtype: str) -> tuple[int, int]:
    """Returns the least and the largest number of a type."""
    if dtype == "bool":
        return 0, 1
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def wrapped(x: Any, dtype: str) -> np.ndarray:
    """Reduces integers to a type, as two's complement does; any but 0 is true."""
    x = np.asarray(x, np.int64)
    if dtype == "bool":
        return (x != 0).astype(np.int64)
    low, high = ends_of(dtype)
    return (x - low) % (high - low + 1) + low


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Divides towards zero; by zero is -1, as XLA has it."""
    by = np.where(y == 0, 1, y)
    found = np.abs(x) // np.abs(by) * np.sign(x) * np.sign(by)
    return np.where(y == 0, -1, found)


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns what the quotient leaves, of the sign of ``x``; by zero it is ``x``."""
    by = np.where(y == 0, 1, y)
    return np.where(y == 0, x, np.sign(x) * (np.abs(x) % np.abs(by)))


def _shifted(x: np.ndarray, y: np.ndarray, dtype: str, kind: str) -> np.ndarray:
    """Shifts by bits; by as many as there are, or by less than none, shifts all out."""
    bits = bits_of(dtype)
    inside = (y >= 0) & (y < bits)
    by = np.where(inside, y, 0)
    if kind == "shift_left":
        return np.where(inside, x << by, 0)
    if kind == "shift_right_logical":
        return np.where(inside, (x % (1 << bits)) >> by, 0)
    half = 1 << (bits - 1)  # The first bit is a sign, in unsigned types too.
    x = (x + half) % (2 * half) - half
    return np.where(inside, x >> by, np.where(x < 0, -1, 0))


_PAIRS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "rem": _remainder,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ONES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "not": np.invert,
    "convert": np.copy,
}
_SHIFTS = ("shift_left", "shift_right_arithmetic", "shift_right_logical")
KINDS = tuple(sorted((*_PAIRS, *_ONES, *_SHIFTS)))
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_CORNERS = ("add", "sub", "mul", "max", "min", "neg", "sign", "convert")


def _number(x: np.ndarray, a: Mapping[str, Any], *ys: np.ndarray) -> np.ndarray:
    """Computes the number before it wraps, int64."""
    kind, dtype = a["kind"], a["dtype"]
    if kind in _SHIFTS:
        return _shifted(x, ys[0], dtype, kind)
    if kind == "not" and dtype == "bool":
        return 1 - x
    of = _PAIRS[kind] if ys else _ONES[kind]
    return np.asarray(of(x, *ys), np.int64)


def _arithmetic(a, own, inputs):
    return wrapped(_number(*inputs[:1], a, *inputs[1:]), a["dtype"])


def _shape(o: Operands) -> tuple[int, ...]:
    wanted = 1 if o["kind"] in _ONES else 2
    o.check(len(o.inputs) == wanted, f"`{o['kind']}` takes {wanted}", len(o.inputs))
    return np.broadcast_shapes(*o.shapes)


def _interval(o: Operands) -> Ends:
    kind, (low, high) = o["kind"], ends_of(o["dtype"])
    for x in o.inputs if kind != "convert" else ():
        held = low <= x.low and x.high <= high
        o.check(held, f"inputs must be {o['dtype']}", [x.low, x.high])
    if kind in COMPARED:
        return 0, 1
    least, most = _ends(o, kind)
    return (least, most) if low <= least and most <= high else (low, high)


def _ends(o: Operands, kind: str) -> tuple[int, int]:
    """Returns ends of the number before it wraps, or those of the type."""
    x, y = o.inputs[0], o.inputs[-1]
    if kind in _CORNERS:
        corners = [np.array([v.low, v.high], np.int64) for v in o.inputs]
        numbers = _number(corners[0][:, None], o.attributes, *corners[1:])
        return int(numbers.min()), int(numbers.max())
    if kind == "abs":
        least = 0 if x.low <= 0 <= x.high else min(abs(x.low), abs(x.high))
        return least, max(abs(x.low), abs(x.high))
    is_positive = y.low > 0
    if kind == "div" and is_positive:
        most = max(abs(x.low), abs(x.high)) // y.low
        return (-most if x.low < 0 else 0), (most if x.high > 0 else 0)
    if kind == "rem" and is_positive:
        most = y.high - 1
        return (max(-most, x.low) if x.low < 0 else 0), max(0, min(most, x.high))
    if kind == "and" and max(x.low, y.low) >= 0:  # One without a sign is enough.
        highs = [v.high for v in (x, y) if v.low >= 0]
        return 0, min(highs)
    if kind in ("or", "xor") and min(x.low, y.low) >= 0:
        return 0, (1 << max(x.high, y.high).bit_length()) - 1
    is_signed = not o["dtype"].startswith("u")
    if kind == "shift_right_arithmetic" and is_signed:
        return min(x.low, 0), max(x.high, 0)
    if kind == "shift_right_logical" and x.low >= 0:
        return 0, x.high
    return ends_of(o["dtype"])


ARITHMETIC = Operation(
    "arithmetic",
    "number = kind(a, b), reduced to `dtype` as two's complement",
    "number",
    _shape,
    _interval,
    _arithmetic,
    inputs=(1, 2),
    attributes={
        "kind": choice(*KINDS),
        "dtype": choice(*TYPES),
    },
)
