"""Rules of elementwise functions and of choices: tables, values joined on a grid."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.affine import QParams, dequantize
from qjax.lowering.interpret import refuse, rule, where
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    compact,
)
from qjax.trace import POINTWISE, Equation, Trace, evaluate

_MOST_CODES = 1 << 16  # Of the value that a table is indexed by.
_MOST_ENTRIES = 1 << 22  # Of a table with a row for each channel.
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_EXTREMA = {"max": "maximum", "min": "minimum"}


def curve(
    builder: Builder, e: Equation, trace: Trace, *operands: Abstract
) -> Curve | None:
    """Goes on with a function of the codes of one value.

    Args:
      builder: Receives accumulators that become the source of a table.
      e: An elementwise equation.
      trace: Its program.
      *operands: Of the equation, at least one of them no constant.

    Returns:
      The function; None if the operands are functions of two values.

    Raises:
      ValueError: for an operand that has no codes, or more than 16 bits of them.
    """
    own = [
        None if isinstance(x, Known | KnownCodes) else _as_curve(e, v, x)
        for v, x in zip(e.inputs, operands, strict=True)
    ]
    curves = [c for c in own if c is not None]
    sources = [{s.value for s in _sources(c)} for c in curves]
    common = set.intersection(*sources)
    if not common:
        return None
    curves = [_since(c, min(v for v in common if v is not None)) for c in curves]
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
    return Curve(source, aliases, known, {**steps, end: e}, end, path=e.path)


def _sources(x: Curve) -> list[Integers]:
    """The codes that a function may start from: its own, and those before a bound."""
    if x.source.bounded is None or set(x.aliases) != {x.end}:
        return [x.source]
    return [x.source, *_sources(x.source.bounded)]


def _since(x: Curve, value: int) -> Curve:
    """The function from other codes on."""
    while x.source.value != value:
        assert x.source.bounded is not None
        x = _ending(x.source.bounded, x.end)
    return x


def _ending(x: Curve, end: int) -> Curve:
    """The function under the number that another equation reads it by."""
    if x.end == end:
        return x
    same = Equation(copy_p, {}, (x.end,), (end,), x.path)
    return dataclasses.replace(x, steps={**x.steps, end: same}, end=end)


def _as_curve(e: Equation, v: int, x: Abstract) -> Curve:
    """Codes as a function of themselves."""
    if isinstance(x, Curve):
        return _ending(x, v)
    if isinstance(x, Integers) and x.rescaled is not None:
        return _ending(x.rescaled, v)
    if isinstance(x, Integers) and x.dtype:
        x = x.emitted()
    if isinstance(x, Integers) and x.emit is None and x.value is not None:
        if x.high - x.low < _MOST_CODES and not x.is_bounded and x.gain is None:
            return Curve(x, {v: x}, {}, {}, v, path=x.path)
    raise refuse(e, x, "input")


def _per_channel(e: Equation, x: Known | KnownCodes) -> np.ndarray:
    """A known operand, with size 1 where it repeats."""
    if isinstance(x, KnownCodes):
        grid = QParams(jnp.asarray(x.scale), jnp.asarray(x.zero_point))
        value = np.asarray(dequantize(jnp.asarray(x.codes), grid))
    else:
        value = compact(np.asarray(x.value))
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
      finish: What makes integers of its values.
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
            f"The function in {x.path or 'the traced function'!r} would need a table "
            f"of shape {found.shape}. Use fewer bits for its input, or numbers that "
            "vary along one axis only."
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
    value: int,
    name: str,
) -> tuple[int, int]:
    """Puts a function into the graph; returns the least and the largest entry."""
    assert x.source.value is not None
    table, axis, off = tabulate(x, finish, builder.types)
    dtype = builder.values[value].dtype
    if not np.array_equal(table.astype(dtype), table):
        raise ValueError(
            f"The function in {x.path or 'the traced function'!r} has values of "
            f"{table.dtype} from {table.min()} to {table.max()}, which {dtype} does "
            "not hold. Use a narrower type."
        )
    builder.add_node(
        "table",
        (x.source.value,),
        value,
        params={"table": builder.add_param(f"{name}/table", table.astype(dtype))},
        path=x.path,
        low=x.source.low,
        axis=axis,
        **({"most_off": off} if off else {}),
    )
    return int(table.min()), int(table.max())


def mask(builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int) -> int:
    """The truth values of a selection as codes 0 and 1."""
    if isinstance(x, Integers) and x.value is not None:
        return x.value
    if not isinstance(x, Curve):
        raise refuse(e, x, "condition")
    value = builder.add_value(trace.shape(v), 0, 1, dtype="int8")
    add_table(builder, x, lambda y: y.astype(jnp.int32), value, where(e).strip("'"))
    return value


_ELSEWHERE = frozenset(
    "add sub mul div neg max min clamp round convert_element_type reduce_precision "
    "copy stop_gradient select_n".split()
)


@rule(*(POINTWISE - _ELSEWHERE - {*_COMPARISONS}))
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


@rule(*_COMPARISONS)
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
    value = builder.add_value(trace.shape(e.outputs[0]), 0, 1, dtype="int8")
    builder.add_node(
        "compare",
        tuple(x.value for x in pair if x.value is not None),
        value,
        path=where(e).strip("'"),
        kind=e.primitive.name,
        multipliers=[int(mantissa * 2**24) for mantissa, _ in parts],
        exponents=[int(exponent) - 24 for _, exponent in parts],
        zero_points=[x.zero_point for x in pair],
    )
    return Integers(value, np.ones(()), 0, 0, 1, path=e.path, dtype="bool")


def select(
    builder: Builder, e: Equation, trace: Trace, which: Abstract, *cases: Abstract
) -> Abstract:
    """Chooses between cases by truth values that are known, or made of codes."""
    if isinstance(which, Known):
        flat = np.unique(which.value)
        if flat.size == 1:
            return cases[int(flat[0])]
        raise refuse(e, which, "condition")
    if isinstance(which, Curve):
        codes = [c for c in cases if not isinstance(c, Known)]
        same = all(_is_source(c, which.source) for c in codes)
        if same and (found := curve(builder, e, trace, which, *cases)) is not None:
            return found
    shapes, shape = _shapes(e, trace, e.inputs[1:])
    others = (mask(builder, e, trace, which, e.inputs[0]),)
    joined = Joined("select", cases, shapes, shape, others, path=e.path)
    return _joined_now(builder, joined)


def _is_source(x: Abstract, source: Integers) -> bool:
    own = x.source if isinstance(x, Curve) else x
    return isinstance(own, Integers) and own.value == source.value


@rule("concatenate")
def _concatenate(
    builder: Builder, e: Equation, trace: Trace, *parts: Abstract
) -> Abstract:
    axis = int(e.params["dimension"])
    for x in parts:
        if isinstance(x, Known | KnownCodes):
            raise refuse(e, x, "part")
    joined = Joined(
        "concatenate",
        parts,
        *_shapes(e, trace, e.inputs),
        attributes={"axis": axis},
        path=e.path,
    )
    return _joined_now(builder, joined)


def extremum(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    """The larger or the smaller of two quantized values."""
    shapes, shape = _shapes(e, trace, e.inputs)
    joined = Joined(_EXTREMA[e.primitive.name], (a, b), shapes, shape, path=e.path)
    return _joined_now(builder, joined)


def _shapes(
    e: Equation, trace: Trace, parts: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Those of the parts, and that of the result."""
    return tuple(map(trace.shape, parts)), trace.shape(e.outputs[0])


def _joined_now(builder: Builder, x: Joined) -> Abstract:
    """Joins codes that are on one grid already."""
    first = x.parts[0]
    if not isinstance(first, Integers):
        return x
    for part in x.parts:
        same = (
            isinstance(part, Integers)
            and part.is_codes
            and not np.ndim(part.scale)
            and part.scale == first.scale
            and part.zero_point == first.zero_point
        )
        if not same:
            return x
    if any(isinstance(p, Integers) and p.rescaled is not None for p in x.parts):
        return x  # Each part has functions of its own.
    assert first.value is not None
    inputs = tuple(
        p.value for p in x.parts if isinstance(p, Integers) and p.value is not None
    )
    types = [builder.values[v].dtype for v in inputs]
    low, high = (
        f(getattr(p, k) for p in x.parts) for f, k in ((min, "low"), (max, "high"))
    )
    dtype = types[0] if len(set(types)) == 1 else None
    grid = builder.values[first.value].grid
    value = builder.add_value(x.shape, low, high, grid, dtype=dtype)
    builder.add_node(
        x.operation, (*x.others, *inputs), value, path=x.path, **x.attributes
    )
    return first.elsewhere(value, low=low, high=high, path=x.path)


@rule("argmax", "argmin")
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
    value = builder.add_value(trace.shape(e.outputs[0]), 0, size - 1, dtype="int32")
    assert x.value is not None
    builder.add_node(
        e.primitive.name, (x.value,), value, path=where(e).strip("'"), axis=int(axis)
    )
    dtype = str(trace.avals[e.outputs[0]].dtype)
    return Integers(value, np.ones(()), 0, 0, size - 1, path=e.path, dtype=dtype)
