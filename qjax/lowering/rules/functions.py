"""Rules of elementwise functions and comparisons, which become lookup tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.affine import QParams, dequantize
from qjax.graph.builder import compact
from qjax.graph.graph import Grid, storage
from qjax.lowering.constants import exact_grid, real_values
from qjax.lowering.interpret import UNKNOWN, LoweringRule, refuse, where
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Known,
    KnownCodes,
    PendingAccumulator,
)
from qjax.model.primitives import POINTWISE, names
from qjax.model.trace import Equation, Trace, evaluate

_MOST_CODES = 1 << 16  # Largest range of a value that indexes a table.
_MOST_ENTRIES = 1 << 22  # Largest table with one row per channel.
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
        None if isinstance(x, Known | KnownCodes) else as_curve(e, v, x)
        for v, x in zip(e.inputs, operands, strict=True)
    ]
    curves = [c for c in own if c is not None]
    sources = [{s.value for s in _sources(c)} for c in curves]
    common = set.intersection(*sources)
    if not common:
        return None
    curves = [_since(c, min(common)) for c in curves]
    aliases: dict[int, Integers] = {}
    known = {
        v: _per_channel(e, x)
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


def as_curve(e: Equation, v: int, x: Abstract) -> Curve:
    """Returns codes as a function of themselves.

    Args:
      e: The equation that reads them.
      v: Their value in the trace.
      x: The codes, or a function.

    Raises:
      ValueError: for what has no codes, or more than 16 bits of them.
    """
    if isinstance(x, Curve):
        return _ending(x, v)
    if isinstance(x, Integers) and x.rescaled is not None:
        return _ending(x.rescaled, v)
    if isinstance(x, PendingAccumulator) and x.dtype:
        x = x.emitted()
    if isinstance(x, Integers):
        if x.high - x.low < _MOST_CODES and not x.is_bounded and x.gain is None:
            return Curve(x, {v: x}, {}, {}, v, place=x.place)
    raise refuse(e, x, "input")


def _per_channel(e: Equation, x: Known | KnownCodes) -> np.ndarray:
    """Returns a known operand with size 1 on each axis along which it repeats."""
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


def tabulate(
    x: Curve, finish: Any, types: Mapping[int, Any]
) -> tuple[np.ndarray, int | None, int]:
    """Computes a function on all codes of its source, as the float model does.

    Args:
      x: The function.
      finish: Function from real values to integers.
      types: Value of the trace -> its dtype.

    Returns:
      ``(table, axis, off)``: shape ``[codes]``, or ``[codes, channels]`` with the axis
      of the value along which the rows are chosen; and by how much an entry changes if
      the compiler does not fuse the function (``a * b + c`` into one rounding, say).
    """
    low, high = x.source.low, x.source.high
    whole = {v for v, a in x.aliases.items() if a.dtype}
    constants = (*x.known.values(), *(a.scale for a in x.aliases.values()))
    rank = max(map(np.ndim, constants))
    codes = np.arange(low, high + 1, dtype=np.int32).reshape((-1,) + (1,) * rank)
    grids = {
        v: QParams(jnp.float32(a.scale), jnp.int32(a.zero_point))
        for v, a in x.aliases.items()
    }

    def table(codes: Any, grids: Mapping[int, QParams], known: Any) -> Any:
        env = dict(known)
        for v, grid in grids.items():
            value = codes if v in whole else dequantize(codes, grid)
            env[v] = value.astype(types[v])
        return finish(run_steps(env, x.steps)[x.end])

    with jax.numpy_rank_promotion("allow"):
        found = np.asarray(jax.jit(table)(codes, grids, dict(x.known)))
        alone = np.asarray(table(jnp.asarray(codes), grids, dict(x.known)))
    off = int(np.max(np.abs(found.astype(np.int64) - alone), initial=0))
    axes = [d for d in range(1, found.ndim) if found.shape[d] > 1]
    if not axes:
        return found.reshape(-1), None, off
    if len(axes) > 1 or found.size > _MOST_ENTRIES:
        raise ValueError(
            f"The function in {x.place.path or UNKNOWN!r} would need a table of shape "
            f"{found.shape}. Use fewer bits for its input, or numbers that vary along "
            "one axis only."
        )
    return found.reshape(len(codes), -1), axes[0] - found.ndim, off


def run_steps(
    env: Mapping[int, Any], steps: Mapping[int, Equation]
) -> dict[int, jax.Array]:
    """Evaluates elementwise equations, in order, on values that broadcast.

    Args:
      env: Value of the trace -> array, for what the steps start from.
      steps: Value of the trace -> the equation that computes it.

    Returns:
      All values.
    """
    found = dict(env)
    for e in steps.values():
        args = [found[v] for v in e.inputs]
        shape = jnp.broadcast_shapes(*map(jnp.shape, args))
        args = [jnp.broadcast_to(arg, shape) for arg in args]
        found.update(zip(e.outputs, evaluate(e, *args), strict=True))
    return found


def add_table(
    builder: Builder,
    x: Curve,
    finish: Any,
    name: str,
    *,
    dtype: str,
    grid: Grid | None = None,
) -> int:
    """Adds a function of codes to the graph as a lookup table.

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
    table, axis, off = tabulate(x, finish, builder.types)
    if not np.array_equal(table.astype(dtype), table):
        raise ValueError(
            f"The function in {x.place.path or UNKNOWN!r} has values of "
            f"{table.dtype} from {table.min()} to {table.max()}, which {dtype} does "
            "not hold. Use a narrower type."
        )
    return builder.add(
        "table",
        (x.source.value,),
        {"low": x.source.low, "axis": axis, **({"most_off": off} if off else {})},
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

    found, axis, off = tabulate(x, bits, builder.types)
    exact = exact_grid(found.view(np.float32))
    if exact is None or off:
        return None
    scale, codes = exact
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
    known = isinstance(a, Known | KnownCodes) or isinstance(b, Known | KnownCodes)
    if known or isinstance(a, Curve) or isinstance(b, Curve):
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
