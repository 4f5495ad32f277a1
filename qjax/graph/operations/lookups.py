"""Lookups in parameters, constants, comparisons and selections."""

import math

import numpy as np

from qjax.graph.operations.record import (
    AXIS_OR_NONE,
    COUNT,
    FLAG,
    INT32,
    INTEGER,
    INTEGERS,
    SIZE,
    Ends,
    Operands,
    Operation,
    Shape,
    choice,
    same_interval,
)

_MOST_COMPARED = 1 << 25  # Largest code about its zero point: `align_products`.
_MOST_EXPONENT = 300  # float64 holds the products.


def _table_axis(o: Operands) -> int | None:
    axis, rank = o["axis"], len(o.x.shape)
    known = axis is None or -rank <= axis < rank
    o.check(known, f"`axis` must be one of {rank}, or counted from the last", axis)
    return axis if axis is None else axis % rank


def _table_shape(o: Operands) -> Shape:
    axis, table = _table_axis(o), o.params["table"]
    rank = 1 if axis is None else 2
    o.check(table.ndim == rank, f"the table must have {rank} axes", table.ndim)
    if axis is None:
        return o.x.shape
    rows = table.shape[1]
    fits = o.x.shape[axis] in (1, rows)
    wanted = f"the table must have a row for each of {o.x.shape[axis]} channels"
    o.check(fits, wanted, rows)
    return tuple(rows if d == axis else n for d, n in enumerate(o.x.shape))


def _table_interval(o: Operands) -> Ends:
    table, first = o.params["table"], o.x.low - o["low"]
    last = o.x.high - o["low"]
    o.check(
        0 <= first and last < len(table),
        f"the table must have a row for each code from {o.x.low} to {o.x.high}",
        f"codes from {o['low']} to {o['low'] + len(table) - 1}",
    )
    rows = table[first : last + 1]
    o.check(rows.size > 0, "the table must hold codes", "none")
    return int(rows.min()), int(rows.max())


def _table(a, own, inputs):
    places, table = inputs[0] - a["low"], own["table"]
    if a["axis"] is None:
        return table[places]
    sizes = [1] * places.ndim
    sizes[a["axis"]] = table.shape[1]
    return table[places, np.arange(table.shape[1]).reshape(sizes)]


def _thresholds_shape(o: Operands) -> Shape:
    axis, cuts, table = _table_axis(o), o.params["thresholds"], o.params["table"]
    rank = 1 if axis is None else 2
    o.check(cuts.ndim == rank, f"thresholds must have {rank} axes", cuts.ndim)
    wanted = (*cuts.shape[:-1], cuts.shape[-1] + 1)
    fits = table.shape == wanted
    o.check(fits, f"the table must have the shape {wanted}", table.shape)
    if axis is None:
        return o.x.shape
    rows = len(cuts)
    wanted_rows = f"thresholds must have a row for each of {o.x.shape[axis]} channels"
    o.check(o.x.shape[axis] in (1, rows), wanted_rows, rows)
    return tuple(rows if d == axis else n for d, n in enumerate(o.x.shape))


def _thresholds_interval(o: Operands) -> Ends:
    cuts = o.check_range("thresholds", INT32.min, INT32.max)
    table = o.params["table"]
    is_sorted = bool(np.all(cuts[..., 1:] >= cuts[..., :-1]))
    o.check(is_sorted, "thresholds must not descend", "some that do")
    # Pieces that an integer of the input lies in.
    first = np.sum(cuts <= o.x.low, -1, keepdims=True)
    last = np.sum(cuts <= o.x.high, -1, keepdims=True)
    places = np.arange(table.shape[-1])
    reached = table[(first <= places) & (places <= last)]
    return (int(reached.min()), int(reached.max())) if reached.size else (0, 0)


def _thresholds(a, own, inputs):
    x, cuts, table = inputs[0], own["thresholds"], own["table"]
    if a["axis"] is None:
        return table[np.searchsorted(cuts, x, side="right")]
    shape = list(x.shape)
    shape[a["axis"]] = len(cuts)
    rows = np.moveaxis(np.broadcast_to(x, shape), a["axis"], 0)
    found = [
        t[np.searchsorted(c, row, side="right")]
        for c, t, row in zip(cuts, table, rows, strict=True)
    ]
    whole = np.stack(found) if found else np.zeros(rows.shape, np.int64)
    return np.moveaxis(whole, 0, a["axis"])


def _embed_shape(o: Operands) -> Shape:
    kernel = o.params["kernel"]
    o.check(kernel.ndim > 0, "the table must have rows", kernel.shape)
    return (*o.x.shape, *kernel.shape[1:])


def _embed_interval(o: Operands) -> Ends:
    kernel = o.params["kernel"]
    rows = len(kernel)
    o.check(
        -rows <= o.x.low and o.x.high < rows,
        f"rows must be those of a table of {rows}",
        [o.x.low, o.x.high],
    )
    return int(kernel.min(initial=0)), int(kernel.max(initial=0))


def _take_shape(o: Operands) -> Shape:
    places = o.params["places"].shape
    if o.attributes.get("crosses_examples"):
        return places
    o.check(bool(o.x.shape), "an input with examples must have axes", o.x.shape)
    return (o.x.shape[0], *places)


def _take_interval(o: Operands) -> Ends:
    crosses = o.attributes.get("crosses_examples")
    if crosses is not None:
        size = o.x.shape[0] if o.x.shape else 0
        o.check(crosses == size, f"`crosses_examples` must be {size}", crosses)
    size = math.prod(o.x.shape if crosses else o.x.shape[1:])
    places = o.params["places"]
    o.check(size > 0 or not places.size, "places need codes to be among", o.x.shape)
    o.check_range("places", 0, max(size - 1, 0))
    return same_interval(o)


def _take(a, own, inputs):
    if a.get("crosses_examples"):
        return inputs[0].reshape(-1)[own["places"]]
    size = math.prod(inputs[0].shape[1:])
    return inputs[0].reshape(len(inputs[0]), size)[:, own["places"]]


def _constant_shape(o: Operands) -> Shape:
    shape = o.params["value"].shape
    if not o.inputs:
        return shape
    o.check(bool(shape), "a constant beside an input must have axes", shape)
    if shape[0] != 1:
        return shape
    o.check(bool(o.x.shape), "its input must have a leading size", o.x.shape)
    return (o.x.shape[0], *shape[1:])


def constant_interval(o: Operands) -> Ends:
    """Returns the ends of a parameter of role ``value``."""
    value = o.params["value"]
    return (int(value.min()), int(value.max())) if value.size else (0, 0)


def _constant(a, own, inputs):
    value = own["value"]
    if not inputs or len(value) != 1:
        return value
    return np.repeat(value, len(inputs[0]), axis=0)


_COMPARISONS = {
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "ne": np.not_equal,
}


def _equal_shapes(o: Operands, shapes: list[Shape]) -> Shape:
    o.check(len(set(shapes)) == 1, "inputs must have one shape", shapes)
    return shapes[0]


def _compare_interval(o: Operands) -> Ends:
    o.check_zero_points("zero_points", o["zero_points"])
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


def _compare(a, own, inputs):
    # Products as float32 rounds them, which float64 holds exactly.
    zipped = zip(
        inputs, a["zero_points"], a["multipliers"], a["exponents"], strict=True
    )
    products = (
        np.float32((x - z).astype(np.float64) * m).astype(np.float64) * 2.0**e
        for x, z, m, e in zipped
    )
    return _COMPARISONS[a["kind"]](*products).astype(np.int64)


def _select_shape(o: Operands) -> Shape:
    which, *cases = o.shapes
    o.check(len(cases) > 1, "two cases and more are selected from", len(cases))
    shape = _equal_shapes(o, cases)
    fits = which in ((), shape)
    o.check(fits, f"the first input must have the shape {shape}", which)
    return shape


def _select_interval(o: Operands) -> Ends:
    which, *cases = o.inputs
    o.check(
        0 <= which.low and which.high < len(cases),
        f"the first input must lie in [0, {len(cases) - 1}]",
        [which.low, which.high],
    )
    return min(x.low for x in cases), max(x.high for x in cases)


def _select(a, own, inputs):
    which, *cases = inputs
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


TABLE = Operation(
    "table",
    "code = table[q - low], of each channel its own if there is an axis",
    "table",
    _table_shape,
    _table_interval,
    _table,
    attributes={"low": INTEGER, "axis": AXIS_OR_NONE},
    roles=("table",),
    optional={"most_off": COUNT, "is_exact": FLAG},
)
THRESHOLDS = Operation(
    "thresholds",
    "code = table[number of thresholds <= q], of each channel its own if there is an "
    "axis",
    "table",
    _thresholds_shape,
    _thresholds_interval,
    _thresholds,
    attributes={"axis": AXIS_OR_NONE},
    roles=("thresholds", "table"),
    # The last one where a change between samples may be missing.
    optional={"most_off": COUNT, "is_exact": FLAG, "is_sampled": FLAG},
)
EMBED = Operation(
    "embed",
    "code = kernel[q], rows counted from the end below zero",
    "table",
    _embed_shape,
    _embed_interval,
    lambda a, own, xs: own["kernel"][xs[0]],
    roles=("kernel",),
)
TAKE = Operation(
    "take",
    "code = q[places], places counted within each example; or, if they cross it, "
    "within all of the value",
    "move",
    _take_shape,
    _take_interval,
    _take,
    roles=("places",),
    optional={"crosses_examples": SIZE},
)
CONSTANT = Operation(
    "constant",
    "code = value; a first size of 1 becomes that of the input, if any",
    "number",
    _constant_shape,
    constant_interval,
    _constant,
    inputs=(0, 1),
    roles=("value",),
)
COMPARE = Operation(
    "compare",
    "code = 1 where (a - z_0) * m_0 * 2^e_0 kind (b - z_1) * m_1 * 2^e_1, else 0; each "
    "side rounded to the 24 bits of float32",
    "number",
    lambda o: _equal_shapes(o, o.shapes),
    _compare_interval,
    _compare,
    inputs=2,
    attributes={
        "kind": choice(*sorted(_COMPARISONS)),
        "zero_points": INTEGERS,
        "multipliers": INTEGERS,
        "exponents": INTEGERS,
    },
    each_input=("zero_points", "multipliers", "exponents"),
)
SELECT = Operation(
    "select",
    "code = the case with the number that the first input has",
    "choice",
    _select_shape,
    _select_interval,
    _select,
    inputs=None,
)

LOOKUPS = (TABLE, THRESHOLDS, EMBED, TAKE, CONSTANT, COMPARE, SELECT)
