"""Rules that join several values on one grid: selections, concatenations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.graph.builder import compact
from qjax.graph.graph import Grid
from qjax.lowering.constants import (
    add_constant,
    anchor,
    codes_on,
    exact_grid,
    like_of,
    real_values,
    repeated,
    whole_grid,
    wider,
)
from qjax.lowering.entries import as_codes
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled, source_of, summed
from qjax.lowering.rules.functions import add_table, curve
from qjax.lowering.rules.whole import exact_codes, joined_whole, whole_numbers
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    PendingAccumulator,
    Real,
    ScaledIntegers,
    Sum,
)
from qjax.model.trace import Equation, Trace

_EXTREMA = {"max": "maximum", "min": "minimum"}


def mask(builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int) -> int:
    """Returns the truth values of a selection as codes 0 and 1."""
    if isinstance(x, Integers) and x.dtype:
        return settled(builder, e, trace, x).value
    if not isinstance(x, Curve):
        raise refuse(e, x, "condition")
    name, finish = where(e).strip("'"), lambda y: y.astype(jnp.int32)
    return add_table(builder, x, finish, name, dtype="int8")


def _select(
    builder: Builder, e: Equation, trace: Trace, which: Abstract, *cases: Abstract
) -> Abstract:
    cases = tuple(_ready(builder, c) for c in cases)
    if isinstance(which, Real):
        which = as_codes(builder, e, trace, which)
    if isinstance(which, Known):
        flat = np.unique(which.value)
        if flat.size == 1:
            return cases[int(flat[0])]
    if isinstance(which, Real) and which.input is not None and which.dtype:
        which = whole_numbers(builder, e, trace, which, e.inputs[0], "condition")
    if isinstance(which, Curve) or (isinstance(which, ScaledIntegers) and which.dtype):
        codes = [c for c in cases if not isinstance(c, Known)]
        source = _source(builder, e, which)
        same = all(_source(builder, e, c) == source for c in codes)
        if same and all(map(_is_uniform, cases)):
            if (found := curve(builder, e, trace, which, *cases)) is not None:
                return found
    cases = _in_units_of_one(builder, e, trace, cases, e.inputs[1:])
    shapes, shape = _shapes(e, trace, e.inputs[1:])
    if isinstance(which, Known):
        others = (_known_mask(builder, e, which, cases, shape),)
    else:
        others = (mask(builder, e, trace, which, e.inputs[0]),)
    joined = Joined("select", cases, shapes, shape, others, place=e.place)
    known = [c.value for c in cases if isinstance(c, Known)]
    if len(known) == len(cases) and trace.is_real(e.outputs[0]):
        return _among_known(builder, joined, known, others[0])
    return _joined_now(builder, joined)


def _among_known(
    builder: Builder, x: Joined, known: Sequence[np.ndarray], which: int
) -> Abstract:
    """Returns a choice among constants on the grid that holds all, if there is one."""
    flat = np.concatenate([np.ravel(value) for value in known])
    exact = exact_grid(flat)
    if exact is None or builder.values[which].shape != x.shape:
        return x
    scale, codes = whole_grid(*exact)
    parts = np.split(codes, np.cumsum([np.size(value) for value in known])[:-1])
    grid = Grid(float(np.float32(scale)), 0)
    inputs = [
        _added_constant(
            builder, x, np.broadcast_to(own.reshape(value.shape), shape), grid, [which]
        )
        for own, value, shape in zip(parts, known, x.shapes, strict=True)
    ]
    value = builder.add("select", (which, *inputs), path=x.place.path, grid=grid)
    kind: Any = {"dtype": "", "is_codes": True, "scale": np.asarray(scale)}
    return dataclasses.replace(builder.numbers(value, x.place), **kind)


def _ready(builder: Builder, x: Abstract) -> Abstract:
    """Puts an accumulator into the graph, and turns weights into numbers."""
    if isinstance(x, KnownCodes):
        return Known(real_values(x))
    return builder.put(x) if isinstance(x, PendingAccumulator) else x


def _is_uniform(x: Abstract) -> bool:
    """Returns whether a constant has one number or one per channel, as a table has."""
    if not isinstance(x, Known):
        return True
    return sum(n > 1 for n in compact(x.value).shape) <= 1


def _source(builder: Builder, e: Equation, x: Abstract) -> int | None:
    """Returns the value that a function starts from; None where there is none."""
    if isinstance(x, Curve):
        return x.source.value
    if isinstance(x, Sum):
        try:
            return summed(builder, e, x).value
        except ValueError:  # No grid holds it.
            return None
    return source_of(builder, x).value if isinstance(x, ScaledIntegers) else None


def _known_mask(
    builder: Builder,
    e: Equation,
    which: Known,
    cases: Sequence[Abstract],
    shape: tuple[int, ...],
) -> int:
    """Adds the mask of a selection that does not depend on an input, as codes."""
    codes = np.broadcast_to(which.value, shape).astype(np.int64)
    name = f"{where(e).strip(_QUOTE)}/mask"
    like = next(
        (v for c in cases if (v := anchor(builder, c, shape)) is not None), None
    )
    return add_constant(builder, codes, None, name=name, path=e.place.path, like=like)


_QUOTE = "'"


def _truths(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    """Returns a conjunction or a disjunction of truth values."""
    is_curve = not any(isinstance(x, Real) or not _is_uniform(x) for x in (a, b))
    if is_curve and (found := curve(builder, e, trace, a, b)) is not None:
        return found
    if trace.avals[e.outputs[0]].dtype != np.bool_:
        raise refuse(e, a if isinstance(a, Real) else b, "operand")
    parts = [
        _truth(builder, e, trace, x, v) for x, v in zip((a, b), e.inputs, strict=True)
    ]
    operation = "minimum" if e.primitive.name == "and" else "maximum"
    path = where(e).strip(_QUOTE)
    value = builder.add(operation, parts, {}, dtype="int8", path=path)
    return Integers(
        value=value, scale=np.ones(()), low=0, high=1, place=e.place, dtype="bool"
    )


def _truth(builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int) -> int:
    """Returns truth values as codes 0 and 1."""
    if isinstance(x, Known):
        codes, name = x.value.astype(np.int8), f"{where(e).strip(_QUOTE)}/mask"
        first = codes[:1] if codes.ndim and np.all(codes == codes[:1]) else codes
        return add_constant(builder, first, None, name=name, path=e.place.path)
    if isinstance(x, Real) and x.input is not None and x.dtype:
        return whole_numbers(builder, e, trace, x, v, "condition").value
    return mask(builder, e, trace, x, v)


def _concatenate(
    builder: Builder, e: Equation, trace: Trace, *parts: Abstract
) -> Abstract:
    if not trace.is_real(e.outputs[0]):
        return joined_whole(builder, e, trace, parts)
    axis = int(e.params["dimension"])
    shapes, shape = _shapes(e, trace, e.inputs)
    parts = _in_units_of_one(builder, e, trace, parts, e.inputs)
    joined = Joined(
        "concatenate",
        tuple(_ready(builder, x) for x in parts),
        shapes,
        shape,
        attributes={"axis": axis},
        place=e.place,
    )
    return _joined_now(builder, joined)


def extremum(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    """Returns the larger or the smaller of two quantized values."""
    a, b = _in_units_of_one(builder, e, trace, (a, b), e.inputs)
    shapes, shape = _shapes(e, trace, e.inputs)
    joined = Joined(_EXTREMA[e.primitive.name], (a, b), shapes, shape, place=e.place)
    return _joined_now(builder, joined)


def _in_units_of_one(
    builder: Builder,
    e: Equation,
    trace: Trace,
    parts: Sequence[Abstract],
    values: Sequence[int],
) -> tuple[Abstract, ...]:
    """Returns parts as whole numbers if all are: a simulation gives them no site."""
    if not e.is_simulated or all(isinstance(x, Known | Integers) for x in parts):
        return tuple(parts)
    found: list[Abstract] = []
    for x, v in zip(parts, values, strict=True):
        own = x if isinstance(x, Known) else exact_codes(builder, e, trace, x, v)
        is_one = isinstance(own, Integers) and own.is_codes and np.all(own.scale == 1)
        if not (isinstance(own, Known) or (is_one and trace.is_real(v))):
            return tuple(parts)
        found.append(own)
    return tuple(found)


def _shapes(
    e: Equation, trace: Trace, parts: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Returns the shapes of the parts and the shape of the result."""
    return tuple(map(trace.shape, parts)), trace.shape(e.outputs[0])


def _joined_now(builder: Builder, x: Joined) -> Abstract:
    """Joins codes that share a grid already with constants that lie on that grid."""
    first = next((p for p in x.parts if isinstance(p, Integers)), None)
    if first is None or not first.is_codes:
        return x
    if np.ndim(first.scale):
        return x
    found: list[int | np.ndarray] = []
    for part in x.parts:
        if isinstance(part, Known):
            codes = codes_on(part.value, float(first.scale), first.zero_point)
            if codes is None:
                return x
            found.append(codes)
        elif isinstance(part, Integers) and _is_on_grid_of(part, first):
            found.append(part.value)
        else:
            return x
    data = [v for v in found if isinstance(v, int)]
    types = {builder.values[v].dtype for v in data}
    grid = builder.values[data[0]].grid
    inputs = [
        v
        if isinstance(v, int)
        else _added_constant(builder, x, np.broadcast_to(v, shape), grid, data)
        for v, shape in zip(found, x.shapes, strict=True)
    ]
    _, low, high = builder.outcome(x.operation, (*x.others, *inputs), {}, x.attributes)
    options: Any = {
        "grid": grid,
        "dtype": wider(types, low, high),
        "path": x.place.path,
    }
    value = builder.add(x.operation, (*x.others, *inputs), x.attributes, **options)
    return first.elsewhere(value, low=low, high=high, place=x.place)


def _added_constant(
    builder: Builder, x: Joined, codes: np.ndarray, grid: Any, data: Sequence[int]
) -> int:
    """Adds a constant of a join to the graph."""
    codes, like = repeated(x, codes, like_of(builder, x, data, codes.shape))
    name = f"{x.place.path or x.operation}/constant"
    options: Any = {"name": name, "path": x.place.path, "like": like}
    return add_constant(builder, codes, grid, **options)


def _is_on_grid_of(x: Integers, other: Integers) -> bool:
    same = x.is_codes and not np.ndim(x.scale) and x.rescaled is None
    return bool(same and x.scale == other.scale and x.zero_point == other.zero_point)


# Primitive -> its rule.
CHOICES: Mapping[str, LoweringRule] = {
    "select_n": _select,
    "concatenate": _concatenate,
    "and": _truths,
    "or": _truths,
}
