"""Rules of shape moves."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.graph.builder import compact
from qjax.lowering.constants import codes_on, wider
from qjax.lowering.inputs import moved, refuse_pad
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import emitted
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
from qjax.model.channels import move_scale
from qjax.model.trace import Equation, Trace, evaluate


def move(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *rest: Abstract
) -> Abstract:
    """Moves codes, and what is known of them, as the equation moves real values."""
    if e.primitive.name == "pad":
        fill = _fill(e, rest[0])
        if fill or isinstance(x, Curve | Joined) or _bounds_away(x):
            return _padded(builder, e, trace, x, fill)
    if isinstance(x, Real):
        return moved(e, x)
    if isinstance(x, Known):
        raise refuse(e, x, "operand")
    if isinstance(x, KnownCodes):
        return _move_known(e, trace, x)
    if isinstance(x, Curve):
        return _move_curve(builder, e, trace, x)
    x = emitted(builder, e, x)
    shape = builder.values[x.value].shape
    scale = _move_units(e, x.scale, shape)
    gain = None if x.gain is None else _move_units(e, x.gain, shape)
    if scale is None or (gain is None and x.gain is not None):
        raise refuse(e, x, "input")
    x = dataclasses.replace(x, gain=gain)
    assert scale is not None
    return add_move(
        builder, e, trace, x, scale, *_OPERATIONS[e.primitive.name](e, trace, x)
    )


def _fill(e: Equation, x: Abstract) -> float:
    """Returns the number that a pad puts around a value."""
    if not isinstance(x, Known) or np.any(np.isnan(x.value)):
        raise refuse(e, x, "padding value")
    return float(np.asarray(x.value).reshape(-1)[0])


def _bounds_away(x: Abstract) -> bool:
    """Returns whether a waiting activation changes zero."""
    return isinstance(x, ScaledIntegers) and not x.bounds[0] <= 0 <= x.bounds[1]


def _padded(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, fill: float
) -> Abstract:
    """Pads codes with a code; a value on no grid yet waits for one."""
    if isinstance(x, Real) and x.input is not None:
        raise refuse_pad(e, x)
    if not isinstance(x, ScaledIntegers | Curve | Sum | Joined):
        raise refuse(e, x, "input")
    config = _padding(e)
    shapes = trace.shape(e.inputs[0]), trace.shape(e.outputs[0])
    x = x.emitted() if isinstance(x, PendingAccumulator) else x
    is_ready = isinstance(x, Integers) and x.is_codes and not np.ndim(x.scale)
    if isinstance(x, Integers) and is_ready and x.rescaled is None:
        codes = codes_on(np.asarray(fill, np.float32), float(x.scale), x.zero_point)
        if codes is not None and not x.is_bounded and np.isfinite(fill):
            code, own = int(codes), builder.values[x.value]
            low, high = min(own.low, code), max(own.high, code)
            dtype = wider({own.dtype}, low, high)
            ends = {"padding": config, "padding_code": code}
            options: Any = {"grid": own.grid, "dtype": dtype}
            options["path"] = where(e).strip("'")
            value = builder.add("pad", (x.value,), ends, **options)
            return x.elsewhere(value, low=low, high=high)
    attributes = {"padding": config}
    pair = (x,), (shapes[0],), shapes[1]
    return Joined("pad", *pair, attributes=attributes, place=e.place, fill=fill)


def move_again(
    builder: Builder,
    x: Real,
    trace: Trace,
    codes: Abstract,
    *,
    keep: int = 0,
    zero: float = 0.0,
) -> Abstract:
    """Repeats on codes the moves of an input, except for the last ``keep`` moves.

    Pads put ``zero`` around them, the value of zero on the grid of the codes.
    """
    for e in x.moves[: len(x.moves) - keep]:
        fill = (Known(np.asarray(zero)),) if e.primitive.name == "pad" else ()
        codes = move(builder, e, trace, codes, *fill)
    return codes


def _move_curve(builder: Builder, e: Equation, trace: Trace, x: Curve) -> Curve:
    """Moves a function of codes, which is the same function of moved codes."""
    rank = len(trace.shape(e.outputs[0]))
    is_uniform = all(np.size(k) == 1 for k in x.known.values())
    keeps = e.params.get("broadcast_dimensions") == tuple(range(rank))  # The axes.
    units = all(np.ndim(a.scale) == 0 for a in x.aliases.values())
    if e.primitive.name == "pad" or not (is_uniform or keeps) or not units:
        raise refuse(e, x, "input")
    source = move(builder, e, trace, x.source)
    assert isinstance(source, Integers)
    return _moved_chain(x, source, e, rank, e.outputs[0])


def _move_array(
    e: Equation, x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Moves an array that broadcasts against a value of ``shape`` by a shape move."""
    moved = move_scale(e, x, shape)
    # Axes that fell together repeat what was the same along one of them.
    return moved if moved is None or moved.size <= x.size else compact(moved)


def _move_units(
    e: Equation, x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Moves units per channel by a shape move; axes that the move leaves stay."""
    if x.ndim == 0 or e.primitive.name != "pad":
        return _move_array(e, x, shape)
    config = zip(x.shape, e.params["padding_config"], strict=True)
    return x if all(n == 1 or not any(triple) for n, triple in config) else None


def add_move(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Integers,
    scale: np.ndarray,
    operation: str,
    attributes: dict[str, Any],
) -> Integers:
    """Adds a move of codes to the graph."""

    def place(source: int) -> int:
        v = builder.values[source]
        options: Any = {"grid": v.grid, "dtype": v.dtype, "path": where(e).strip("'")}
        return builder.add(operation, (source,), attributes, **options)

    rank = len(trace.shape(e.outputs[0]))
    return placed(x, place, e, rank, scale=scale)


def placed(
    x: Integers,
    place: Callable[[int], int],
    e: Equation,
    rank: int,
    end: int | None = None,
    **changes: Any,
) -> Integers:
    """Moves codes, together with the function that they are of other codes.

    Args:
      x: The codes.
      place: Puts the move of a value into the graph; monotone, if it is no move.
      e: The equation.
      rank: Rank of the output.
      end: The output; the first one by default.
      **changes: Other fields of the result.

    Returns:
      The moved codes.
    """
    value = place(x.value)
    found = x.elsewhere(value, **changes)
    if x.rescaled is None:
        return found
    chain, end = x.rescaled, e.outputs[0] if end is None else end
    start = chain.source.value
    source = chain.source.elsewhere(value if start == x.value else place(start))
    return dataclasses.replace(
        found, rescaled=_moved_chain(chain, source, e, rank, end)
    )


def _moved_chain(x: Curve, source: Integers, e: Equation, rank: int, end: int) -> Curve:
    """Moves a function of codes, which is the same function of moved codes."""
    known = {
        v: np.reshape(k, (1,) * rank) if np.size(k) == 1 else k
        for v, k in x.known.items()
    }
    aliases = {
        v: dataclasses.replace(a, value=source.value) for v, a in x.aliases.items()
    }
    same = dataclasses.replace(
        e, primitive=copy_p, params={}, inputs=(x.end,), outputs=(end,)
    )
    return Curve(source, aliases, known, {**x.steps, end: same}, end, place=e.place)


def _reshape(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    sizes = [int(n) for n in trace.shape(e.outputs[0])]
    # The leading size may differ at call time: `lower` finds out.
    own = trace.shape(e.inputs[0])
    is_empty = not math.prod(sizes[1:]) and own[:1] != tuple(sizes[:1])
    if is_empty or not own:
        return "reshape", {"sizes": sizes}  # Nothing tells the leading size.
    return "reshape", {"sizes": [-1, *sizes[1:]] if sizes else []}


def _broadcast(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    dimensions = [int(d) for d in e.params["broadcast_dimensions"]]
    sizes: list[int | None] = [int(n) for n in e.params["shape"]]
    for d, n in zip(dimensions, trace.shape(e.inputs[0]), strict=True):
        sizes[d] = None if sizes[d] == n else sizes[d]  # Open size, like the batch.
    return "broadcast", {"sizes": sizes, "dimensions": dimensions}


def _slice(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    start, stop = e.params["start_indices"], e.params["limit_indices"]
    sizes = trace.shape(e.inputs[0])
    steps = e.params["strides"] or (1,) * len(start)
    # None: the end of the axis, whose size may differ at call time.
    ends = [None if b == n else int(b) for b, n in zip(stop, sizes, strict=True)]
    return "slice", {
        "start": [int(n) for n in start],
        "stop": ends,
        "steps": [int(n) for n in steps],
    }


def _pad(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "pad", {"padding": _padding(e), "padding_code": x.zero_point}


def _padding(e: Equation) -> list[list[int]]:
    return [[int(n) for n in triple] for triple in e.params["padding_config"]]


def _transpose(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "transpose", {"permutation": [int(d) for d in e.params["permutation"]]}


def _rev(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "rev", {"axes": [int(d) for d in e.params["dimensions"]]}


_OPERATIONS = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
}


def _move_known(e: Equation, trace: Trace, x: KnownCodes) -> KnownCodes:
    """Moves a weight with its scales by a shape move."""
    scale, zero_point = (
        _move_array(e, part, x.codes.shape) for part in (x.scale, x.zero_point)
    )
    if scale is None or zero_point is None:
        raise NotImplementedError(
            f"There is no rule for `{e.primitive.name}` on the weight {x.site!r}, in "
            f"{where(e)}.\n  equation: {e}\nQuantize what it returns: call "
            "`qjax.fake_quant` after it."
        )
    if e.primitive.name == "broadcast_in_dim":  # A bias, to the shape of its sum.
        shape, dims = trace.shape(e.outputs[0]), e.params["broadcast_dimensions"]
        sizes = [1] * len(shape)
        for d, n in zip(dims, x.codes.shape, strict=True):
            sizes[d] = n
        codes = np.broadcast_to(x.codes.reshape(sizes), shape)
    else:
        moved = evaluate(e, jnp.asarray(x.codes.astype(np.int32)))[0]
        codes = np.asarray(moved).astype(np.int64)
    return KnownCodes(codes, scale, zero_point, x.site)


# Primitive -> its rule.
MOVES: Mapping[str, LoweringRule] = {
    "reshape": move,
    "transpose": move,
    "squeeze": move,
    "expand_dims": move,
    "broadcast_in_dim": move,
    "rev": move,
    "slice": move,
    "pad": move,
}
