"""Rules of bounds: one for all values, one a channel, or one for each place."""

import dataclasses

import numpy as np
from jax.extend.core.primitives import max_p, min_p

from qjax.graph.builder import compact
from qjax.lowering.constants import real_values
from qjax.lowering.interpret import refuse
from qjax.lowering.operands import settled
from qjax.lowering.rules.choices import extremum
from qjax.lowering.rules.functions import curve
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    ScaledIntegers,
    Sum,
)
from qjax.model.trace import Equation, Trace


def bound(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    """Bounds a value from one side, by numbers or by another value."""
    a, b = (Known(real_values(x)) if isinstance(x, KnownCodes) else x for x in (a, b))
    x, known = (b, a) if isinstance(a, Known) else (a, b)
    if isinstance(a, Curve) or isinstance(b, Curve):
        if (found := curve(builder, e, trace, a, b)) is not None:
            return found
    if not isinstance(known, Known):
        return extremum(builder, e, trace, a, b)
    if known.value.size == 0:
        raise refuse(e, known, "bound")
    end = float(known.value.flat[0])
    ends = (end, np.inf) if e.primitive.name == "max" else (-np.inf, end)
    is_function = isinstance(x, Curve) or (
        isinstance(x, ScaledIntegers) and x.is_of_codes
    )
    varies = sum(n > 1 for n in compact(np.asarray(known.value)).shape)
    if varies > 1 and not isinstance(x, Curve):
        return extremum(builder, e, trace, a, b)
    is_each = is_function and varies == 1
    if _is_off_grid(x, ends) or is_each:
        if (found := curve(builder, e, trace, a, b)) is not None:
            return found
    if np.any(known.value != end):  # Rounding keeps the order: codes are bounded.
        return extremum(builder, e, trace, a, b)
    return _within(builder, e, trace, x, ends, (a, b))


def clamp(
    builder: Builder,
    e: Equation,
    trace: Trace,
    low: Abstract,
    x: Abstract,
    high: Abstract,
) -> Abstract:
    """Bounds a value from both sides."""
    if isinstance(x, Curve):
        if (found := curve(builder, e, trace, low, x, high)) is not None:
            return found
    ends = []
    for end in (low, high):
        if not isinstance(end, Known) or end.value.size == 0:
            raise refuse(e, end, "bound")
        if np.any(end.value != end.value.flat[0]):
            return _clamped(builder, e, trace, low, x, high)
        ends.append(float(end.value.flat[0]))
    if _is_off_grid(x, (ends[0], ends[1])):
        if (found := curve(builder, e, trace, low, x, high)) is not None:
            return found
    return _within(builder, e, trace, x, (ends[0], ends[1]), (low, x, high))


def _clamped(
    builder: Builder,
    e: Equation,
    trace: Trace,
    low: Abstract,
    x: Abstract,
    high: Abstract,
) -> Abstract:
    """Bounds a value by numbers that differ by place."""
    first, second, third = e.inputs
    fresh = max(trace.avals) + 1
    avals = {**trace.avals, fresh: trace.avals[e.outputs[0]]}
    builder.types[fresh] = avals[fresh].dtype
    trace = dataclasses.replace(trace, avals=avals)
    below = dataclasses.replace(
        e, primitive=max_p, params={}, inputs=(first, second), outputs=(fresh,)
    )
    above = dataclasses.replace(e, primitive=min_p, params={}, inputs=(fresh, third))
    found = bound(builder, below, trace, low, x)
    return bound(builder, above, trace, found, high)


def _is_off_grid(x: Abstract, ends: tuple[float, float]) -> bool:
    """Returns whether a bound lies between two codes."""
    if not (isinstance(x, Integers) and x.is_codes and not np.ndim(x.scale)):
        return False
    codes = (end / float(x.scale) for end in ends if np.isfinite(end))
    return any(code != round(code) for code in codes)


def _within(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    ends: tuple[float, float],
    operands: tuple[Abstract, ...],
) -> Abstract:
    if not isinstance(x, ScaledIntegers | Sum | Joined):
        raise refuse(e, x, "operand")
    low, high = (min(max(b, ends[0]), ends[1]) for b in x.bounds)
    bounded = dataclasses.replace(x, bounds=(low, high))
    if isinstance(bounded, Integers) and bounded.is_codes:
        clipped = settled(builder, e, trace, bounded)
        if bounded.high - bounded.low < 1 << 16 and np.ndim(bounded.scale) == 0:
            before = curve(builder, e, trace, *operands)
            if isinstance(x, Integers) and x.rescaled is not None:
                return dataclasses.replace(clipped, rescaled=before)
            return dataclasses.replace(clipped, bounded=before)
        return clipped
    return bounded
