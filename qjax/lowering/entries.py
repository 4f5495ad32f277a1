"""Integer inputs of the program as codes."""

import dataclasses

import numpy as np

from qjax.graph.graph import Grid
from qjax.leaves import at_start
from qjax.lowering.inputs import MOST_RANGE, integer_range
from qjax.lowering.interpret import InputTwiceError, where
from qjax.lowering.rules.moves import move_again
from qjax.lowering.values import Abstract, Builder, Curve, Integers, Real
from qjax.model.trace import Equation, Trace


def raw(
    builder: Builder, e: Equation, trace: Trace, x: Real, end: int | None = None
) -> Curve | None:
    """Returns the codes of an integer input, with what was computed of them.

    Args:
      builder: Receives the input.
      e: The equation that reads it.
      trace: The program.
      x: The input, and what was done to it.
      end: The value of the trace that it is; by default what ``e`` reads first.

    Returns:
      A function of the integers; None for more than 16 bits.

    Raises:
      InputTwiceError: if the input has other codes already.
    """
    k = x.input
    assert k is not None
    v, ends = trace.inputs[k], integer_range(trace, x)
    if k not in builder.raw and (rows := _as_rows(builder, k)) is not None:
        value, *ends_ = rows
        builder.raw[k] = _codes(e, trace, v, value, *ends_)
    if k in builder.raw:
        ends = builder.raw[k].low, builder.raw[k].high
    assert ends is not None
    if ends[1] - ends[0] >= MOST_RANGE:
        return None
    if k not in builder.raw and k in builder.inputs:
        raise InputTwiceError(e, trace, x)
    if k not in builder.raw:
        value = builder.add_value(trace.shape(v), *ends, Grid(1.0, 0))
        builder.inputs[k] = value
        builder.raw[k] = _codes(e, trace, v, value, *ends)
    codes: Abstract = builder.raw[k]
    codes = move_again(builder, x, trace, codes)
    assert isinstance(codes, Integers)
    rank = len(trace.shape(e.outputs[0]))
    known = {u: np.reshape(n, (1,) * rank) for u, n in x.known.items()}
    end = e.inputs[0] if end is None else end
    return Curve(codes, {v: codes}, known, x.steps, end, place=e.place)


def _as_rows(builder: Builder, k: int) -> tuple[int, int, int] | None:
    """Returns an input that chooses rows of a table already, and its range; or None.

    It takes no other integers then.
    """
    if k not in builder.rows:
        return None
    value = builder.inputs[k]
    own = dataclasses.replace(builder.values[value], is_place=True)
    builder.values[value] = own
    return value, own.low, own.high


def _codes(
    e: Equation, trace: Trace, v: int, value: int, low: int, high: int
) -> Integers:
    """Returns integers that are their own codes."""
    return Integers(
        value=value,
        scale=np.ones(()),
        low=low,
        high=high,
        place=e.place,
        dtype=str(trace.avals[v].dtype),
    )


def as_codes(builder: Builder, e: Equation, trace: Trace, x: Real) -> Abstract:
    """Returns an integer or boolean input as codes, and any other value as it is."""
    if x.input is None or integer_range(trace, x) is None:
        return x
    found = raw(builder, e, trace, x)
    return x if found is None else found


def held(
    builder: Builder, e: Equation, trace: Trace, x: Real, ends: tuple[int, int]
) -> Curve:
    """Returns an integer input of more than 16 bits as codes between two ends.

    Args:
      builder: Receives it.
      e: The equation that reads it, whose result beyond the ends is that at the end.
      trace: The program.
      x: The input, and what was done to it: moves and casts.
      ends: Least and largest integer, at most 16 bits apart.
    """
    assert x.input is not None
    start, v = wide_input(builder, e, trace, x), trace.inputs[x.input]
    low, high = (int(np.clip(end, start.low, start.high)) for end in ends)
    bounds, path = {"low": low, "high": high}, where(e).strip("'")
    value = builder.add("clip", (start.value,), bounds, dtype="int32", path=path)
    codes = start.elsewhere(value, low=low, high=high)
    return Curve(codes, {v: codes}, {}, x.steps, e.inputs[0], place=e.place)


def wide_input(builder: Builder, e: Equation, trace: Trace, x: Real) -> Integers:
    """Returns an integer input of more than 16 bits as it is, after its moves.

    Raises:
      ValueError: for a type that int32 does not hold.
    """
    k = x.input
    assert k is not None
    v, ends = trace.inputs[k], integer_range(trace, x)
    assert ends is not None
    if not -(2**31) <= ends[0] <= ends[1] < 2**31:
        raise ValueError(
            f"{at_start(x.source)} holds {x.dtype}, and integer programs hold int32, "
            f"met in {where(e)}.\n  equation: {e}\nPass it as int32."
        )
    if k not in builder.raw:
        if k in builder.inputs:
            raise InputTwiceError(e, trace, x)
        value = builder.add_value(trace.shape(v), *ends, dtype="int32")
        builder.inputs[k] = value
        builder.raw[k] = _codes(e, trace, v, value, *ends)
    codes = move_again(builder, x, trace, builder.raw[k])
    assert isinstance(codes, Integers)
    return codes
