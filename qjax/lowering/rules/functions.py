"""Rules of elementwise functions and comparisons, which become lookup tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.graph.builder import compact
from qjax.graph.graph import Grid, storage
from qjax.lowering.constants import exact_grid, real_values, whole_grid
from qjax.lowering.evaluation import (
    Finish,
    find_thresholds,
    is_exact_source,
    tabulate,
)
from qjax.lowering.interpret import UNKNOWN, LoweringRule, refuse, where
from qjax.lowering.operands import source_of, summed
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Known,
    KnownCodes,
    ScaledIntegers,
    Sum,
)
from qjax.model.primitives import POINTWISE, names
from qjax.model.trace import Equation, Trace

_MOST_CODES = 1 << 16  # Largest range of a value that indexes a table.
_COMPARISONS = names("comparison")


def curve(
    builder: Builder, e: Equation, trace: Trace, *operands: Abstract
) -> Curve | None:
    """Extends a function of the codes of one value by an elementwise equation.

    Args:
      builder: Receives accumulators that become the source of a table.
      e: An elementwise equation.
      trace: Trace of the program.
      *operands: Operands of the equation, at least one of them no constant.

    Returns:
      The function; None if the operands are functions of two values.

    Raises:
      ValueError: for an operand that has no codes, or more than 16 bits of them.
    """
    own = [
        None if isinstance(x, Known | KnownCodes) else as_curve(builder, e, v, x)
        for v, x in zip(e.inputs, operands, strict=True)
    ]
    curves = [c for c in own if c is not None]
    if not (common := _common(curves)):
        curves = [_since_origin(builder, c) for c in curves]
        common = _common(curves)
    if not common:
        return None
    curves = [_since(c, min(common)) for c in curves]
    aliases: dict[int, Integers] = {}
    known = {
        v: per_channel(e, x)
        for v, x in zip(e.inputs, operands, strict=True)
        if isinstance(x, Known | KnownCodes)
    }
    steps: dict[int, Equation] = {}
    for c in curves:
        aliases.update(c.aliases)
        known.update(c.known)
        steps.update(c.steps)
    end = e.outputs[0]
    source = curves[0].source
    return Curve(source, aliases, known, {**steps, end: e}, end, place=e.place)


def _common(curves: Sequence[Curve]) -> set[int]:
    """Returns the values that all functions may start from."""
    return set.intersection(*({s.value for s in _sources(c)} for c in curves))


def _since_origin(builder: Builder, x: Curve) -> Curve:
    """Returns a function of a biased accumulator as one of the accumulator."""
    past = x.source.origin
    if past is None:
        return x
    source = source_of(builder, past.source)
    same = {
        v: Equation(copy_p, {}, (past.end,), (v,), x.place.path)
        for v in x.aliases
        if v != past.end
    }
    steps, known = {**past.steps, **same, **x.steps}, {**past.known, **x.known}
    return Curve(source, {past.start: source}, known, steps, x.end, place=x.place)


def _sources(x: Curve) -> list[Integers]:
    """Returns the codes that a function may start from: its own, or before a bound."""
    if x.source.bounded is None or set(x.aliases) != {x.end}:
        return [x.source]
    return [x.source, *_sources(x.source.bounded)]


def _since(x: Curve, value: int) -> Curve:
    """Returns the function as one of codes further back."""
    while x.source.value != value:
        assert x.source.bounded is not None
        x = _ending(x.source.bounded, x.end)
    return x


def _ending(x: Curve, end: int) -> Curve:
    """Returns the function with the number by which another equation reads its end."""
    if x.end == end:
        return x
    same = Equation(copy_p, {}, (x.end,), (end,), x.place.path)
    return dataclasses.replace(x, steps={**x.steps, end: same}, end=end)


def as_curve(builder: Builder, e: Equation, v: int, x: Abstract) -> Curve:
    """Returns codes, or an accumulator, as a function of themselves.

    Args:
      builder: Receives accumulators.
      e: The equation that reads them.
      v: Their value in the trace.
      x: The integers, or a function.

    Raises:
      ValueError: for what has no integers.
    """
    if isinstance(x, Curve):
        return _ending(x, v)
    if isinstance(x, Integers) and x.rescaled is not None:
        return _ending(x.rescaled, v)
    if isinstance(x, Sum):
        x = summed(builder, e, x)
    if not isinstance(x, ScaledIntegers):
        raise refuse(e, x, "input")
    source, past = source_of(builder, x), x.past
    if past is not None:
        start = {past.start: source}
        found = Curve(source, start, past.known, past.steps, past.end, place=e.place)
        return _ending(found, v)
    return Curve(source, {v: source}, {}, {}, v, place=x.place)


def per_channel(e: Equation, x: Known | KnownCodes) -> np.ndarray:
    """Returns a known operand with size 1 on each axis along which it repeats.

    Raises:
      ValueError: for one that varies along several axes.
    """
    value = compact(
        real_values(x) if isinstance(x, KnownCodes) else np.asarray(x.value)
    )
    if sum(n > 1 for n in value.shape) > 1:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} has a constant of shape {value.shape} "
            "that varies along more than one axis: a function of codes has one number, "
            f"or one for each channel.\n  equation: {e}\nQuantize its operands first, "
            "with `qjax.fake_quant`."
        )
    return value


def add_table(
    builder: Builder,
    x: Curve,
    finish: Finish,
    name: str,
    *,
    dtype: str,
    grid: Grid | None = None,
) -> int:
    """Adds a function of integers to the graph as a lookup table or as thresholds.

    Args:
      builder: Receives it.
      x: The function.
      finish: Function from real values to the integers that the table holds.
      name: Site of the values, and the name of the parameter before ``/table``.
      dtype: Type of the integers.
      grid: Grid of the integers.

    Returns:
      The number of the value.

    Raises:
      ValueError: if the type does not hold an entry.
    """
    own: Any = {"dtype": dtype, "grid": grid}
    if not (x.source.is_of_codes and _is_short(x.source)):
        return _add_thresholds(builder, x, finish, name, **own)
    return _add_whole_table(builder, x, finish, name, **own)


def _is_short(x: Integers) -> bool:
    """Returns whether integers index a table."""
    return x.high - x.low < _MOST_CODES


def _add_thresholds(
    builder: Builder,
    x: Curve,
    finish: Finish,
    name: str,
    *,
    dtype: str,
    grid: Grid | None,
) -> int:
    """Adds a function of an accumulator as thresholds, or as a table if that is small.

    A table answers within the range of the accumulator alone, and so do thresholds.
    """
    found = find_thresholds(x, finish, builder.types)
    channels = 1 if found.axis is None else len(found.cuts)
    if (x.source.high - x.source.low + 1) * channels <= found.nbytes:
        return _add_whole_table(builder, x, finish, name, dtype=dtype, grid=grid)
    _check_holds(x, found.codes, dtype)
    params = {
        "thresholds": builder.add_param(f"{name}/thresholds", found.cuts),
        "table": builder.add_param(f"{name}/table", found.codes.astype(dtype)),
    }
    attributes = {
        "axis": found.axis,
        "is_exact": is_exact_source(x),
        **({"most_off": found.off} if found.off else {}),
        **({} if found.is_certain else {"is_sampled": True}),
    }
    options: Any = {"params": params, "grid": grid, "dtype": dtype, "path": name}
    return builder.add("thresholds", (x.source.value,), attributes, **options)


def _check_holds(x: Curve, codes: np.ndarray, dtype: str) -> None:
    """Raises ValueError for integers that a type does not hold."""
    if not np.array_equal(codes.astype(dtype), codes):
        raise ValueError(
            f"The function in {x.place.path or UNKNOWN!r} has values of "
            f"{codes.dtype} from {codes.min()} to {codes.max()}, which {dtype} does "
            "not hold. Use a narrower type."
        )


def _add_whole_table(
    builder: Builder,
    x: Curve,
    finish: Finish,
    name: str,
    *,
    dtype: str,
    grid: Grid | None,
) -> int:
    """Adds a function as a table of all integers of its source."""
    table, axis, off = tabulate(x, finish, builder.types)
    _check_holds(x, table, dtype)
    attributes = {
        "low": x.source.low,
        "axis": axis,
        **({"most_off": off} if off else {}),
        **({} if x.source.is_of_codes else {"is_exact": is_exact_source(x)}),
    }
    return builder.add(
        "table",
        (x.source.value,),
        attributes,
        params={"table": builder.add_param(f"{name}/table", table.astype(dtype))},
        grid=grid,
        dtype=dtype,
        path=name,
    )


def add_exact_table(
    builder: Builder, x: Curve, shape: tuple[int, ...], name: str
) -> Integers | None:
    """Adds a function to the graph on the grid that holds its own values exactly.

    Returns:
      Codes of the function; None if no grid holds all values, as for most functions.
    """

    def bits(real: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(real.astype(jnp.float32), jnp.int32)

    if not _is_short(x.source):
        return None
    found, axis, off = tabulate(x, bits, builder.types)
    exact = exact_grid(found.view(np.float32))
    if exact is None or off:
        return None
    scale, codes = whole_grid(*exact)
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    dtype = storage(low, high)
    params = {"table": builder.add_param(f"{name}/table", codes.astype(dtype))}
    ends = {"low": x.source.low, "axis": axis}
    options: Any = {"params": params, "dtype": dtype, "path": x.place.path}
    value = builder.add("table", (x.source.value,), ends, **options)
    return Integers(
        value=value,
        scale=np.asarray(scale),
        low=low,
        high=high,
        is_codes=True,
        place=x.place,
    )


# Elementwise primitives that have rules of their own.
_ELSEWHERE = names("shift", "factor", "negate", "bound", "keep", "cast", "select")
_ELSEWHERE |= {"and", "or", "round"}


def _function(
    builder: Builder, e: Equation, trace: Trace, *operands: Abstract
) -> Abstract:
    found = curve(builder, e, trace, *operands)
    if found is None:
        raise NotImplementedError(
            f"There is no integer rule for `{e.primitive.name}` of two different "
            f"values, met in {where(e)}.\n  equation: {e}\nKeep this part of the model "
            "out of `lower`."
        )
    return found


def _compare(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    if e.inputs[0] == e.inputs[1] and isinstance(a, ScaledIntegers | Sum):
        is_true = e.primitive.name in ("eq", "ge", "le")  # No code is NaN.
        return Known(np.full(trace.shape(e.outputs[0]), is_true))
    if any(isinstance(x, Known | KnownCodes | Curve) or _sums(x) for x in (a, b)):
        return _function(builder, e, trace, a, b)
    pair = []
    for x in (a, b):
        if not isinstance(x, Integers) or not x.is_codes or np.ndim(x.scale):
            raise refuse(e, x, "operand")
        most = max(abs(n) for n in (x.low, x.high, x.zero_point))
        if x.rescaled is not None or most > 1 << 24 or most * x.scale >= 2.0**127:
            raise ValueError(
                f"`{e.primitive.name}` in {where(e)} compares products that float32 "
                f"rounds more than once.\n  equation: {e}\nQuantize its operands right "
                "before it, in words of at most 24 bits."
            )
        pair.append(x)
    parts = [np.frexp(np.float32(x.scale)) for x in pair]
    value = builder.add(
        "compare",
        [x.value for x in pair],
        {
            "kind": e.primitive.name,
            "multipliers": [int(mantissa * 2**24) for mantissa, _ in parts],
            "exponents": [int(exponent) - 24 for _, exponent in parts],
            "zero_points": [x.zero_point for x in pair],
        },
        dtype="int8",
        path=where(e).strip("'"),
    )
    return Integers(
        value=value, scale=np.ones(()), low=0, high=1, place=e.place, dtype="bool"
    )


def _sums(x: Abstract) -> bool:
    """Returns whether a value is an accumulator or a sum, whose unit holds no codes."""
    return isinstance(x, Sum) or isinstance(x, ScaledIntegers) and not x.is_of_codes


def _argmax(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    if not isinstance(x, Integers) or not x.is_codes or np.ndim(x.scale):
        raise refuse(e, x, "input")
    (axis,) = e.params["axes"]
    size = trace.shape(e.inputs[0])[axis]
    most = max(abs(n) for n in (x.low, x.high, x.zero_point))
    if most > 1 << 22:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} is of codes up to {most}, of which "
            f"float32 takes several for one.\n  equation: {e}\nQuantize its input to "
            "at most 22 bits."
        )
    options: Any = {"dtype": "int32", "path": where(e).strip("'")}
    value = builder.add(e.primitive.name, (x.value,), {"axis": int(axis)}, **options)
    return Integers(
        value=value,
        scale=np.ones(()),
        low=0,
        high=size - 1,
        place=e.place,
        dtype=str(trace.avals[e.outputs[0]].dtype),
    )


# Primitive -> its rule.
FUNCTIONS: Mapping[str, LoweringRule] = {
    **dict.fromkeys((POINTWISE - _ELSEWHERE - _COMPARISONS), _function),
    **dict.fromkeys(_COMPARISONS, _compare),
    "argmax": _argmax,
    "argmin": _argmax,
}
