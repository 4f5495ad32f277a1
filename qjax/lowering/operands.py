"""Operands of rules as integers in the graph."""

from typing import Any

import numpy as np

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
    terms = [t for t, _ in x.terms]
    scale = min(float(t.scale) for t in terms)
    factors = [sign * float(t.scale) / scale for t, sign in x.terms]
    ends = [
        sorted(f * (end - t.zero_point) for end in (t.low, t.high))
        for t, f in zip(terms, factors, strict=True)
    ]
    low, high = (sum(pair[k] for pair in ends) for k in (0, 1))
    limit = builder.most(x.place.sites.output)
    is_whole = all(f == int(f) for f in factors)
    if e.is_of_quantizer and not is_whole:
        raise _refuse_sum(e, x)
    if not is_whole or not -limit - 1 <= low <= high <= limit:
        raise refuse(e, x, "input")
    key = tuple((t.value, sign) for t, sign in x.terms)
    if key not in builder.placed:
        value = _add_sum(builder, e, terms, factors, (int(low), int(high)))
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


def _refuse_sum(e: Equation, x: Sum) -> ValueError:
    """Returns the error for a quantizer of a sum that no grid holds."""
    site = x.place.sites.output
    sites = dict.fromkeys(t.place.sites.output or t.place.path for t, _ in x.terms)
    word = "QSpec(bits=8, power_of_two=True)"
    rules = ", ".join(f"Rule({name!r}, {word})" for name in filter(None, sites))
    return ValueError(
        f"The quantizer at {site or where(e)!r} is of a sum of codes on two scales, "
        f"which no grid holds, and its levels are not those of a grid alone.\n"
        f"  equation: {e}\nGive what it adds scales that are powers of two, as with "
        f"{rules or word}, or quantize the sum on a grid: "
        f"Rule({site or '...'!r}, QSpec(bits=8))."
    )


def _add_sum(
    builder: Builder,
    e: Equation,
    terms: list[Integers],
    factors: list[float],
    ends: tuple[int, int],
) -> int:
    """Adds whole multiples of codes to the graph as a sum."""
    return builder.add(
        "add",
        tuple(t.value for t in terms),
        {
            "input_zero_points": [t.zero_point for t in terms],
            "multipliers": [int(f) for f in factors],
            "shift": 0,
            "zero_point": 0,
            "low": ends[0],
            "high": ends[1],
        },
        dtype="int32",
        path=where(e).strip("'"),
    )
