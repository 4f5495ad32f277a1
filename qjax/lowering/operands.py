"""Operands of rules as integers in the graph."""

import math
from typing import Any

import numpy as np

from qjax.integer import common_fixed_point
from qjax.lowering.interpret import refuse, where
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    PendingAccumulator,
    ScaledIntegers,
    Sum,
)
from qjax.model.trace import Equation, Trace


def settled(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Returns integers in the graph, with any waiting bound applied."""
    x = emitted(builder, e, x)
    if not x.is_bounded:
        return x
    scale = x.real_scale()
    ends = []
    for bound, end in zip(x.bounds, (x.low, x.high), strict=True):
        codes = bound / scale + x.zero_point if np.isfinite(bound) else np.array(end)
        code = int(codes.flat[0])
        if np.any(scale < 0) or np.any(codes != code):
            raise refuse(e, x, "input")  # The bound is no integer of this grid.
        ends.append(code)
    low, high = max(ends[0], x.low), min(ends[1], x.high)
    before = builder.values[x.value]
    options: Any = {"grid": before.grid, "dtype": before.dtype}
    options["path"] = where(e).strip("'")
    value = builder.add("clip", (x.value,), {"low": low, "high": high}, **options)
    return x.elsewhere(value, low=low, high=high, bounds=(-np.inf, np.inf))


def emitted(builder: Builder, e: Equation, x: Abstract) -> Integers:
    """Returns an operand as integers in the graph."""
    if isinstance(x, Sum):
        x = added(builder, e, x)
    if isinstance(x, PendingAccumulator):
        return x.emitted()
    if not isinstance(x, Integers):
        raise refuse(e, x, "input")
    return x


def source_of(builder: Builder, x: ScaledIntegers) -> Integers:
    """Returns the integers in the graph that a function of given ones starts from."""
    own = x if x.past is None else x.past.source
    if isinstance(own, PendingAccumulator):
        return builder.put(own)
    assert isinstance(own, Integers)
    return own


def added(builder: Builder, e: Equation, x: Sum) -> Integers:
    """Adds a sum of codes as an accumulator, where one grid holds all codes exactly."""
    found = _added_exactly(builder, x, e)
    if found is None:
        raise refuse(e, x, "input")
    return found


def summed(builder: Builder, e: Equation, x: Sum) -> Integers:
    """Adds a sum of codes as an accumulator that a function starts from.

    Its unit is that of the finest codes where it holds the others exactly, else a power
    of two of which the largest sum has about 2^21, finer than float32 rounds such sums.
    """
    found = _added_exactly(builder, x, e)
    if found is not None:
        return found
    terms = [t for t, _ in x.terms]
    if any(np.ndim(t.scale) for t in terms):
        raise refuse(e, x, "input")
    most = sum(max(abs(b) for b in _ends(t)) * float(t.scale) for t in terms)
    bits = min(_FINE_BITS, int(builder.most(x.place.sites.output)).bit_length() - 1)
    unit = 2.0 ** (math.frexp(most)[1] - bits)
    if not 2.0**-126 <= unit <= 2.0**100:
        raise refuse(e, x, "input")
    ratios = np.array([sign * float(t.scale) / unit for t, sign in x.terms])
    multipliers, shift = common_fixed_point(ratios)
    factors = [int(m) for m in multipliers]
    ends = [
        sorted(m * b for b in _ends(t)) for t, m in zip(terms, factors, strict=True)
    ]
    half = 1 << int(shift)
    low, high = (sum(pair[k] for pair in ends) for k in (0, 1))
    low, high = low // half - 1, high // half + 1
    key = tuple((t.value, sign) for t, sign in x.terms) + ("fine",)
    if key not in builder.placed:
        value = _add_sum(builder, e, terms, factors, (low, high), int(shift))
        builder.placed[key] = value, low, high
    value, *_ = builder.placed[key]
    return Integers(
        value=value,
        scale=np.asarray(unit),
        low=low,
        high=high,
        is_gain_exact=False,
        bounds=x.bounds,
        place=x.place,
    )


_FINE_BITS = 22  # Bits of a sum on several scales, the sign left out and one to spare.


def _ends(x: Integers) -> tuple[int, int]:
    return x.low - x.zero_point, x.high - x.zero_point


def _added_exactly(builder: Builder, x: Sum, e: Equation) -> Integers | None:
    """Adds a sum in the unit of its finest codes; None where that holds not all."""
    terms = [t for t, _ in x.terms]
    scale = min(float(t.scale) for t in terms)
    factors = [sign * float(t.scale) / scale for t, sign in x.terms]
    ends = [
        sorted(f * end for end in _ends(t)) for t, f in zip(terms, factors, strict=True)
    ]
    low, high = (sum(pair[k] for pair in ends) for k in (0, 1))
    limit = builder.most(x.place.sites.output)
    is_whole = all(f == int(f) for f in factors)
    if not is_whole or not -limit - 1 <= low <= high <= limit:
        return None
    key = tuple((t.value, sign) for t, sign in x.terms)
    if key not in builder.placed:
        own = [int(f) for f in factors]
        value = _add_sum(builder, e, terms, own, (int(low), int(high)), 0)
        builder.placed[key] = value, int(low), int(high)
    value, *_ = builder.placed[key]
    return Integers(
        value=value,
        scale=np.asarray(scale),
        low=int(low),
        high=int(high),
        is_gain_exact=all(t.rescaled is None for t in terms),
        bounds=x.bounds,
        place=x.place,
    )


def _add_sum(
    builder: Builder,
    e: Equation,
    terms: list[Integers],
    factors: list[int],
    ends: tuple[int, int],
    shift: int,
) -> int:
    """Adds multiples of codes to the graph as a sum."""
    return builder.add(
        "add",
        tuple(t.value for t in terms),
        {
            "input_zero_points": [t.zero_point for t in terms],
            "multipliers": factors,
            "shift": shift,
            "zero_point": 0,
            "low": ends[0],
            "high": ends[1],
        },
        dtype="int32",
        path=where(e).strip("'"),
    )
