"""The least and the largest result of each operation of the integer graph.

From the intervals of its inputs and from the parameters themselves, in exact integers:
what a graph says of a value must hold it. On the way each operation checks what its
numbers must be for its meaning to be that of `qjax.graph.reference`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Node, Value

Interval = tuple[int, int]
_INT32 = np.iinfo(np.int32)
_MOST_SUM = 1 << 62  # Of products without their signs: `requantize_sum`.
_MOST_COMPARED = 1 << 25  # Of codes about their zero point: `align_products`.
_MOST_EXPONENT = 300  # float64 holds the products.
_MOST_SUMMANDS = 4095  # Of a softmax: its sum has 31 bits.


class Operands:
    """A node, its inputs and its parameters.

    Args:
      node: The operation.
      inputs: What is known of its inputs.
      output: What is said of its output.
      params: Role -> array.
    """

    def __init__(
        self,
        node: Node,
        inputs: Sequence[Value],
        output: Value,
        params: Mapping[str, np.ndarray],
    ) -> None:
        self.attributes = node.attributes
        self.inputs = inputs
        self.output = output
        self.params = params

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    @property
    def x(self) -> Value:
        """The first input."""
        return self.inputs[0]

    def check(self, holds: bool, wanted: str, found: Any) -> None:
        """Raises ValueError unless something holds."""
        if not holds:
            raise ValueError(f"{wanted}, got {found}")

    def check_range(self, role: str, least: int, most: int) -> np.ndarray:
        """Returns a parameter whose integers lie in a range, int64."""
        array = self.params[role]
        ends = int(array.min(initial=least)), int(array.max(initial=least))
        self.check(
            least <= ends[0] and ends[1] <= most,
            f"the parameter of role `{role}` must lie in [{least}, {most}]",
            list(ends),
        )
        return array.astype(np.int64)


def interval(operation: str, o: Operands) -> Interval:
    """Computes the least and the largest integer that an operation can give.

    Args:
      operation: Its name.
      o: What it is applied to; types and shapes have been checked.

    Returns:
      Two integers, which bound what the operation gives.

    Raises:
      ValueError: if the numbers do not fit each other, in words.
    """
    return _RULES[operation](o)


def _of_input(o: Operands) -> Interval:
    return o.x.low, o.x.high


def _of_inputs(o: Operands) -> Interval:
    return min(x.low for x in o.inputs), max(x.high for x in o.inputs)


def zero_point(value: Value) -> int:
    """Returns the code of 0 of a value; accumulators have 0."""
    return 0 if value.grid is None else value.grid.zero_point


def _check_zero_points(o: Operands, name: str, found: Sequence[int]) -> None:
    wanted = [zero_point(x) for x in o.inputs]
    o.check(list(found) == wanted, f"`{name}` must be {wanted}, as inputs have", found)


def _check_output_zero_point(o: Operands) -> None:
    wanted = zero_point(o.output)
    found = o["zero_point"]
    o.check(found == wanted, f"`zero_point` must be {wanted}, of the output", found)


def _check_distance(o: Operands, value: Value, zero: int) -> int:
    """The largest distance of codes from their zero point, which int32 must hold."""
    ends = value.low - zero, value.high - zero
    o.check(
        _INT32.min <= ends[0] and ends[1] <= _INT32.max,
        "codes about their zero point must fit int32",
        list(ends),
    )
    return max(abs(ends[0]), abs(ends[1]))


# Products.


def _check_offset(o: Operands) -> int:
    info = np.iinfo(o.x.dtype)
    wanted = 0 if info.min < 0 else (info.max + 1) // 2
    o.check(
        o["offset"] == wanted,
        f"`offset` must be {wanted}, which centres {o.x.dtype}",
        o["offset"],
    )
    return wanted


def _ends(o: Operands, x: Interval, over: Sequence[int]) -> list[np.ndarray]:
    """The ends of the sums of a kernel times codes, over axes of the kernel."""
    kernel = o.params["kernel"]
    top = max(abs(int(kernel.min(initial=0))), int(kernel.max(initial=0)))
    reach = max(abs(end) for end in x) * top * kernel.size
    o.check(reach < _MOST_SUM, "sums must stay below 2^62", reach)
    options: Any = {"axis": tuple(over), "dtype": np.int64, "keepdims": True}
    up = np.sum(kernel, where=kernel > 0, **options)
    down = np.sum(kernel, where=kernel < 0, **options)
    return [up * x[0] + down * x[1], up * x[1] + down * x[0]]


def _with_bias(o: Operands, ends: Sequence[np.ndarray]) -> Interval:
    """Ends of sums in the rank of the output, shifted, with the bias."""
    bias = o.params["bias"].astype(np.int64)
    if not all(end.size for end in ends) or not bias.size:
        return 0, 0
    wide = [end.astype(float) * 2.0 ** o["shift"] for end in ends]
    o.check(
        max(np.abs(w).max() for w in wide) < _MOST_SUM,
        "sums must be below 2^62",
        "more",
    )
    low, high = ((end << o["shift"]) + bias for end in ends)
    return int(low.min()), int(high.max())


def _dot(o: Operands) -> Interval:
    offset, side = _check_offset(o), o["kernel_operand"]
    kernel, rank = o.params["kernel"], len(o.output.shape)
    summed, batch = o["contract"][side], o["batch"][side]
    ends = _ends(o, (o.x.low - offset, o.x.high - offset), summed)
    free = [d for d in range(kernel.ndim) if d not in (*summed, *batch)]
    others = rank - len(batch) - len(free)
    # The axes of the output: of the batch, then of the first operand, then the other's.
    middle = ([1] * others, [kernel.shape[d] for d in free])
    first, last = middle if side else middle[::-1]
    shape = [*(kernel.shape[d] for d in batch), *first, *last]
    order = (*batch, *free, *summed)
    return _with_bias(o, [end.transpose(order).reshape(shape) for end in ends])


def _conv(o: Operands) -> Interval:
    offset = _check_offset(o)
    _, (out, *_), spec = o["dimensions"]
    low, high = o.x.low, o.x.high
    wanted = zero_point(o.x)
    if any(map(any, o["padding"])) or any(n > 1 for n in o["input_dilation"]):
        found = o["padding_code"]
        o.check(found == wanted, f"`padding_code` must be {wanted}, zero", found)
        low, high = min(low, wanted), max(high, wanted)
    kernel = o.params["kernel"]
    over = [d for d in range(kernel.ndim) if d != out]
    ends = _ends(o, (low - offset, high - offset), over)
    shape = [1] * len(o.output.shape)
    shape[spec[1]] = kernel.shape[out]
    return _with_bias(o, [end.reshape(shape) for end in ends])


def _multiply(o: Operands) -> Interval:
    offset = _check_offset(o)
    kernel = o.params["kernel"].astype(np.int64)
    sides = [kernel * (end - offset) for end in (o.x.low, o.x.high)]
    return _with_bias(o, [np.minimum(*sides), np.maximum(*sides)])


def _of_two(o: Operands, taps: int) -> Interval:
    _check_zero_points(o, "zero_points", o["zero_points"])
    for x, z in zip(o.inputs, o["zero_points"], strict=True):
        _check_distance(o, x, z)
    (a, b), (x, y) = o["zero_points"], o.inputs
    corners = [p * q for p in (x.low - a, x.high - a) for q in (y.low - b, y.high - b)]
    return taps * min(corners), taps * max(corners)


def _dot_codes(o: Operands) -> Interval:
    return _of_two(o, math.prod(o.x.shape[d] for d in o["contract"][0]))


# Sums.


def _sum(o: Operands) -> Interval:
    taps = math.prod(o.x.shape[d] for d in o["axes"])
    return taps * o.x.low + o["bias"], taps * o.x.high + o["bias"]


def _sum_pool(o: Operands) -> Interval:
    low, high = o.x.low, o.x.high
    if any(map(any, o["padding"])) or any(n > 1 for n in o["base_dilation"]):
        low, high = min(low, o["padding_code"]), max(high, o["padding_code"])
    taps = math.prod(o["window"])
    return taps * low + o["bias"], taps * high + o["bias"]


# From grid to grid.


def _clipped(o: Operands) -> Interval:
    """The ends of what clips, which are those of its output."""
    wanted = [o.output.low, o.output.high]
    found = [o["low"], o["high"]]
    o.check(found == wanted, f"`low` and `high` must be {wanted}, of the output", found)
    return o["low"], o["high"]


def _requantize(o: Operands) -> Interval:
    _check_output_zero_point(o)
    _check_zero_points(o, "input_zero_point", [o["input_zero_point"]])
    o.check_range("multiplier", _INT32.min, _INT32.max)
    o.check_range("shift", 0, 62)
    if not o.attributes.get("is_wide"):
        _check_distance(o, o.x, o["input_zero_point"])
    return _clipped(o)


def _add(o: Operands) -> Interval:
    _check_output_zero_point(o)
    _check_zero_points(o, "input_zero_points", o["input_zero_points"])
    pairs = zip(o.inputs, o["input_zero_points"], strict=True)
    steps = [_check_distance(o, x, z) for x, z in pairs]
    most = sum(n * abs(m) for n, m in zip(steps, o["multipliers"], strict=True))
    o.check(most <= _MOST_SUM, "`multipliers` must give sums up to 2^62", most)
    if o.attributes.get("is_exact"):
        powers = all(m & (m - 1) == 0 for m in map(abs, o["multipliers"]))
        wanted = "`multipliers` must be powers of two where `is_exact`"
        o.check(powers, wanted, o["multipliers"])
    return _clipped(o)


def _clip(o: Operands) -> Interval:
    low, high = _clipped(o)
    return min(max(o.x.low, low), high), max(min(o.x.high, high), low)


# Lookups.


def _table(o: Operands) -> Interval:
    table, first = o.params["table"], o.x.low - o["low"]
    last = o.x.high - o["low"]
    axis, axes = o["axis"], len(o.output.shape)
    known = axis is None or -axes <= axis < axes
    o.check(known, f"`axis` must be one of {axes}, or counted from the last", axis)
    rank = 1 if axis is None else 2
    o.check(table.ndim == rank, f"the table must have {rank} axes", table.ndim)
    o.check(
        0 <= first and last < len(table),
        f"the table must have a row for each code from {o.x.low} to {o.x.high}",
        f"codes from {o['low']} to {o['low'] + len(table) - 1}",
    )
    rows = table[first : last + 1]
    o.check(rows.size > 0, "the table must hold codes", "none")
    return int(rows.min()), int(rows.max())


def _embed(o: Operands) -> Interval:
    kernel = o.params["kernel"]
    rows = len(kernel) if kernel.ndim else 0
    o.check(
        -rows <= o.x.low and o.x.high < rows,
        f"rows must be those of a table of {rows}",
        [o.x.low, o.x.high],
    )
    return int(kernel.min(initial=0)), int(kernel.max(initial=0))


def _take(o: Operands) -> Interval:
    crosses = o.attributes.get("crosses_examples")
    if crosses is not None:
        size = o.x.shape[0] if o.x.shape else 0
        o.check(crosses == size, f"`crosses_examples` must be {size}", crosses)
    size = math.prod(o.x.shape if crosses else o.x.shape[1:])
    o.check_range("places", 0, max(size - 1, 0))
    return _of_input(o)


def _compare(o: Operands) -> Interval:
    _check_zero_points(o, "zero_points", o["zero_points"])
    for x, z, m, e in zip(
        o.inputs, o["zero_points"], o["multipliers"], o["exponents"], strict=True
    ):
        o.check(0 < m < 1 << 24, "`multipliers` must lie in [1, 2^24)", m)
        o.check(
            abs(e) <= _MOST_EXPONENT, f"`exponents` within {_MOST_EXPONENT} of 0", e
        )
        most = max(abs(x.low - z), abs(x.high - z))
        o.check(most <= _MOST_COMPARED, "codes must be within 2^25 of zero", most)
    return 0, 1


def _select(o: Operands) -> Interval:
    which, *cases = o.inputs
    o.check(len(cases) > 1, "two cases and more are selected from", len(cases))
    o.check(
        0 <= which.low and which.high < len(cases),
        f"the first input must lie in [0, {len(cases) - 1}]",
        [which.low, which.high],
    )
    return min(x.low for x in cases), max(x.high for x in cases)


# Moves and extremes.


def _arg_extreme(o: Operands) -> Interval:
    size = o.x.shape[o["axis"]] if o["axis"] < len(o.x.shape) else 0
    return 0, max(size - 1, 0)


def _extreme(o: Operands) -> Interval:
    sizes = [n for d, n in enumerate(o.x.shape) if d in o["axes"]]
    o.check(all(sizes), "axes of an extreme must not be empty", sizes)
    return _of_input(o)


def _extreme_pool(o: Operands) -> Interval:
    names = ("window", "dilation", "base_dilation", "padding")
    for w, d, b, (low, high) in zip(*(o[name] for name in names), strict=True):
        reach = (w - 1) * d + 1
        is_seen = reach >= b and max(low, high) < reach - (b - 1)
        o.check(is_seen, "each window must hold an input", dict(o.attributes))
    return _of_input(o)


def _pad(o: Operands) -> Interval:
    code = o["padding_code"]
    return min(o.x.low, code), max(o.x.high, code)


def _constant(o: Operands) -> Interval:
    value = o.params["value"]
    return (int(value.min()), int(value.max())) if value.size else (0, 0)


# What graphs of TFLite have.


def _tflite_add(o: Operands) -> Interval:
    _check_output_zero_point(o)
    _check_zero_points(o, "zero_points", o["zero_points"])
    for x, z in zip(o.inputs, o["zero_points"], strict=True):
        most = _check_distance(o, x, z) << o["left_shift"]
        o.check(most <= _INT32.max, "shifted codes must fit int32", most)
    return _clipped(o)


def _average(o: Operands) -> Interval:
    counts = o.check_range("counts", 1, _INT32.max)
    most = max(abs(o.x.low), abs(o.x.high)) + int(counts.max(initial=1)) // 2
    o.check(most <= _INT32.max, "sums and half their counts must fit int32", most)
    return _clipped(o)


def _resize(o: Operands) -> Interval:
    for axis, role in ((1, "rows"), (2, "columns")):
        places, size = o.params[role].astype(np.int64), o.x.shape[axis]
        o.check(places.ndim == 2 and len(places) == 3, f"three {role}", places.shape)
        before, after, rest = places
        there = np.all((before >= 0) & (before < size) & (after >= 0) & (after < size))
        between = (rest >= 0) & (rest <= 1 << 10)
        o.check(
            bool(there and np.all(between | (before == after))),
            f"`{role}` must lie between places of an axis of size {size}",
            places.tolist(),
        )
        o.check(bool(np.all(np.abs(rest) <= 1 << 10)), "rests up to 2^10", rest)
    return _of_input(o)


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


def _softmax(o: Operands) -> Interval:
    _check_exponentials(o, _INT32.max, _INT32.max)
    return _clipped(o)


def _softmax16(o: Operands) -> Interval:
    _check_exponentials(o, 0x7FFF, 1)
    reciprocals = o.check_range("reciprocals", 0, 0x7FFF)
    wanted = "`reciprocals` must be 65536 numbers"
    o.check(reciprocals.shape == (1 << 16,), wanted, reciprocals.shape)
    o.check(o["high"] >= 0, "`high` must not be negative", o["high"])
    return 0, o["high"]


_RULES: Mapping[str, Callable[[Operands], Interval]] = {
    "dot": _dot,
    "conv": _conv,
    "multiply": _multiply,
    "dot_codes": _dot_codes,
    "multiply_codes": lambda o: _of_two(o, 1),
    "sum": _sum,
    "sum_pool": _sum_pool,
    "requantize": _requantize,
    "add": _add,
    "clip": _clip,
    "table": _table,
    "embed": _embed,
    "take": _take,
    "compare": _compare,
    "select": _select,
    "maximum": _of_inputs,
    "minimum": _of_inputs,
    "concatenate": _of_inputs,
    "argmax": _arg_extreme,
    "argmin": _arg_extreme,
    "max": _extreme,
    "min": _extreme,
    "max_pool": _extreme_pool,
    "min_pool": _extreme_pool,
    "reshape": _of_input,
    "transpose": _of_input,
    "slice": _of_input,
    "rev": _of_input,
    "pad": _pad,
    "broadcast": _of_input,
    "constant": _constant,
    "tflite_constant": _constant,
    "tflite_add": _tflite_add,
    "tflite_average": _average,
    "tflite_resize": _resize,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax16,
}
