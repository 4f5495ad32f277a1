"""The form of each operation of the integer graph: inputs, parameters, attributes.

One record an operation. What its numbers may be is in `qjax.graph.intervals`, what
it computes in `qjax.backends.xla.run` and `qjax.graph.reference`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

from qjax.integer import RequantizeRule


def is_integer(x: Any) -> bool:
    """Returns whether ``x`` is a Python integer, and no truth value."""
    return isinstance(x, int) and not isinstance(x, bool)


def _is_int32(x: Any) -> bool:
    return is_integer(x) and -(2**31) <= x < 2**31


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list | tuple) and all(map(holds, x))


def _tuples(size: int) -> Callable[[Any], bool]:
    """Lists of so many integers each."""
    integers = _list_of(_is_int32)
    return _list_of(lambda x: integers(x) and len(x) == size)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an attribute may be: in words, and as a test."""

    wanted: str
    holds: Callable[[Any], bool]


def _choice(*names: Any) -> Kind:
    return Kind(f"one of {', '.join(map(str, names))}", lambda x: x in names)


_INTEGER = Kind("an integer of 32 bits", _is_int32)
_WIDE = Kind("an integer of 62 bits", lambda x: is_integer(x) and abs(x) < 1 << 62)
_FLAG = Kind("true or false", lambda x: isinstance(x, bool))
_COUNT = Kind("an integer, 0 or more", lambda x: _is_int32(x) and x >= 0)
_SIZE = Kind("an integer, 1 or more", lambda x: _is_int32(x) and x >= 1)
_AXIS = Kind("an axis", _COUNT.holds)
_AXIS_OR_NONE = Kind("an axis or null", lambda x: x is None or _is_int32(x))
_SHIFT = Kind("an integer from 0 to 62", lambda x: is_integer(x) and 0 <= x <= 62)
_LEFT = Kind("an integer from 0 to 31", lambda x: is_integer(x) and 0 <= x <= 31)
_OPERAND = Kind("0 or 1", lambda x: is_integer(x) and x in (0, 1))
_INTEGERS = Kind("a list of integers", _list_of(_is_int32))
_SIZES = Kind("a list of integers, 1 or more", _list_of(_SIZE.holds))
_AXES = Kind("a list of axes", _list_of(_COUNT.holds))
_SHIFTS = Kind("a list of integers from 0 to 62", _list_of(_SHIFT.holds))
_ENDS = Kind(
    "a list of integers and nulls", _list_of(lambda x: x is None or _is_int32(x))
)
_PAIRS = Kind("a list of pairs of integers", _tuples(2))
_TRIPLES = Kind("a list of three integers each", _tuples(3))
_SPECS = Kind(
    "three lists of axes",
    lambda x: _list_of(_AXES.holds)(x) and len(x) == 3,
)
_SIDES = Kind(
    "two lists of axes of one length",
    lambda x: _list_of(_AXES.holds)(x) and len(x) == 2 and len(x[0]) == len(x[1]),
)
_RULE = _choice(*get_args(RequantizeRule))
_COMPARISON = _choice("eq", "ge", "gt", "le", "lt", "ne")


@dataclasses.dataclass(frozen=True)
class Operation:
    """The form of an operation.

    Attributes:
      inputs: How many, or the numbers there may be; None for one or more.
      attributes: Name -> kind of what must be there.
      roles: Of its parameters; each must be there.
      optional: Name -> kind of what may be there.
      each_input: Names of the lists that have an item for each input.
      each_axis: Names of the lists that have an item for each axis of the first input.
    """

    inputs: int | tuple[int, ...] | None
    attributes: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
    roles: tuple[str, ...] = ()
    optional: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
    each_input: tuple[str, ...] = ()
    each_axis: tuple[str, ...] = ()


_CLIP = {"low": _INTEGER, "high": _INTEGER}
_PRODUCT = {"offset": _INTEGER, "shift": _LEFT}
_CONTRACTION = {"contract": _SIDES, "batch": _SIDES}
_WINDOW = {
    "window": _SIZES,
    "strides": _SIZES,
    "padding": _PAIRS,
    "base_dilation": _SIZES,
    "dilation": _SIZES,
}
_REQUANTIZE = {
    "input_zero_point": _INTEGER,
    "zero_point": _INTEGER,
    "rule": _RULE,
    **_CLIP,
}
_ADD = {
    "input_zero_points": _INTEGERS,
    "multipliers": _INTEGERS,
    "shift": _SHIFT,
    "zero_point": _INTEGER,
    **_CLIP,
}
_COMPARE = {
    "kind": _COMPARISON,
    "zero_points": _INTEGERS,
    "multipliers": _INTEGERS,
    "exponents": _INTEGERS,
}
_CONV = {
    "strides": _SIZES,
    "padding": _PAIRS,
    "input_dilation": _SIZES,
    "dilation": _SIZES,
    "groups": _SIZE,
    "dimensions": _SPECS,
    "padding_code": _INTEGER,
    **_PRODUCT,
}
_TFLITE_ADD = {
    "left_shift": _LEFT,
    "zero_points": _INTEGERS,
    "multipliers": _INTEGERS,
    "shifts": _SHIFTS,
    "multiplier": _INTEGER,
    "shift": _SHIFT,
    "zero_point": _INTEGER,
    "rule": _RULE,
    **_CLIP,
}
_CUT = {"start": _ENDS, "stop": _ENDS, "steps": _ENDS}
_POOL = Operation(1, _WINDOW, each_axis=tuple(_WINDOW))
_EXTREME = Operation(1, {"axes": _AXES})
_ARG_EXTREME = Operation(1, {"axis": _AXIS})
_KERNEL = ("kernel", "bias")

OPERATIONS: Mapping[str, Operation] = {
    "dot": Operation(
        1, {"kernel_operand": _OPERAND, **_CONTRACTION, **_PRODUCT}, _KERNEL
    ),
    "conv": Operation(1, _CONV, _KERNEL),
    "multiply": Operation(1, _PRODUCT, _KERNEL),
    "dot_codes": Operation(
        2, {"zero_points": _INTEGERS, **_CONTRACTION}, each_input=("zero_points",)
    ),
    "multiply_codes": Operation(
        2, {"zero_points": _INTEGERS}, each_input=("zero_points",)
    ),
    "sum": Operation(
        1,
        {"axes": _AXES, "sizes": _INTEGERS, "bias": _WIDE},
        optional={"padding_code": _INTEGER},
    ),
    "sum_pool": Operation(
        1,
        {"bias": _WIDE, "padding_code": _INTEGER, **_WINDOW},
        each_axis=tuple(_WINDOW),
    ),
    "requantize": Operation(
        1,
        _REQUANTIZE,
        ("multiplier", "shift"),
        {"is_exact": _FLAG, "is_bias_rounded": _FLAG, "is_wide": _FLAG},
    ),
    "add": Operation(
        None,
        _ADD,
        optional={"is_exact": _FLAG},
        each_input=("input_zero_points", "multipliers"),
    ),
    "clip": Operation(1, _CLIP),
    "table": Operation(
        1, {"low": _INTEGER, "axis": _AXIS_OR_NONE}, ("table",), {"most_off": _COUNT}
    ),
    "embed": Operation(1, roles=("kernel",)),
    "take": Operation(1, roles=("places",), optional={"crosses_examples": _SIZE}),
    "constant": Operation((0, 1), roles=("value",)),
    "compare": Operation(
        2, _COMPARE, each_input=("zero_points", "multipliers", "exponents")
    ),
    "select": Operation(None),
    "maximum": Operation(2),
    "minimum": Operation(2),
    "concatenate": Operation(None, {"axis": _AXIS}),
    "argmax": _ARG_EXTREME,
    "argmin": _ARG_EXTREME,
    "max": _EXTREME,
    "min": _EXTREME,
    "max_pool": _POOL,
    "min_pool": _POOL,
    "reshape": Operation(1, {"sizes": _INTEGERS}),
    "transpose": Operation(1, {"permutation": _AXES}, each_axis=("permutation",)),
    "slice": Operation(1, _CUT, each_axis=tuple(_CUT)),
    "rev": Operation(1, {"axes": _AXES}),
    "pad": Operation(
        1, {"padding": _TRIPLES, "padding_code": _INTEGER}, each_axis=("padding",)
    ),
    "broadcast": Operation(
        1, {"sizes": _ENDS, "dimensions": _AXES}, each_axis=("dimensions",)
    ),
    "tflite_constant": Operation(0, roles=("value",)),
    "tflite_add": Operation(
        2, _TFLITE_ADD, each_input=("zero_points", "multipliers", "shifts")
    ),
    "tflite_average": Operation(1, _CLIP, ("counts",)),
    "tflite_resize": Operation(1, roles=("rows", "columns")),
    "tflite_softmax": Operation(1, _CLIP, ("exponentials",)),
    "tflite_softmax16": Operation(
        1, {"high": _INTEGER}, ("exponentials", "reciprocals")
    ),
}
