"""Rules of codes that are looked up: embeddings, gathers, slices, splits."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.lowering.graph import Grid
from qjax.lowering.interpret import refuse, rule, where
from qjax.lowering.rules_shapes import settled
from qjax.lowering.values import Abstract, Builder, Integers, Known, KnownCodes, Real
from qjax.trace import POINTWISE, Equation, Trace, evaluate

_NEUTRAL = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims")


@rule("gather")
def _gather(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, index: Abstract
) -> Abstract:
    if isinstance(x, KnownCodes):
        return _embed(builder, e, trace, x, index)
    if not isinstance(index, Known):
        raise NotImplementedError(
            f"There is no integer rule for `gather` from data at places that depend on "
            f"an input, met in {where(e)}.\n  equation: {e}"
        )
    return _taken(builder, e, trace, x, index.value)


@rule("dynamic_slice")
def _dynamic_slice(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *starts: Abstract
) -> Abstract:
    if not all(isinstance(s, Known) for s in starts):
        raise NotImplementedError(
            f"There is no integer rule for `dynamic_slice` at a place that depends on "
            f"an input, met in {where(e)}.\n  equation: {e}"
        )
    known = (s.value for s in starts if isinstance(s, Known))
    return _taken(builder, e, trace, x, *known)


def _taken(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *places: np.ndarray
) -> Integers:
    """Moves that are known: each example is read at the same places."""
    x = settled(builder, e, trace, x)
    if np.ndim(x.scale) or x.gain is not None:
        raise refuse(e, x, "input")
    shape, out = trace.shape(e.inputs[0]), trace.shape(e.outputs[0])
    size = math.prod(shape[1:])
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = np.asarray(evaluate(e, numbers, *places)[0])
    first = np.arange(shape[0]).reshape((-1,) + (1,) * (len(out) - 1)) * size
    if not out or out[0] != shape[0] or np.any(found - first != found[:1]):
        raise NotImplementedError(
            f"`{e.primitive.name}` in {where(e)} moves values along the leading axis, "
            f"which integer programs keep for the batch.\n  equation: {e}"
        )
    assert x.value is not None
    before = builder.values[x.value]
    value = builder.add_value(out, x.low, x.high, before.grid, dtype=before.dtype)
    path = where(e).strip("'")
    params = {"places": builder.add_param(f"{path}/places", found[0])}
    builder.add_node("take", (x.value,), value, params=params, path=path)
    return dataclasses.replace(x, value=value)


def _embed(
    builder: Builder, e: Equation, trace: Trace, w: KnownCodes, index: Abstract
) -> Integers:
    """Rows of a table of weights, chosen by an integer input."""
    dimensions, rows = e.params["dimension_numbers"], w.codes.shape[0]
    axes = tuple(range(len(trace.shape(e.outputs[0])) - w.codes.ndim + 1, 99))
    is_rows = (
        tuple(dimensions.collapsed_slice_dims) == (0,)
        and tuple(dimensions.start_index_map) == (0,)
        and tuple(dimensions.offset_dims) == axes[: w.codes.ndim - 1]
        and tuple(e.params["slice_sizes"]) == (1, *w.codes.shape[1:])
    )
    if not isinstance(index, Real) or index.input is None:
        raise refuse(e, index, "index")
    if not is_rows or np.any(w.zero_point) or not _counts_from_zero(e, trace, rows):
        raise NotImplementedError(
            f"There is no integer rule for this `gather` in {where(e)}: rows of a "
            f"symmetric table, chosen by an integer input, have one.\n  equation: {e}"
        )
    shape = trace.shape(trace.inputs[index.input])
    if index.input not in builder.inputs:
        grid = Grid(1.0, 0)
        value = builder.add_value(shape, -rows, rows - 1, grid, dtype="int32")
        builder.inputs[index.input] = value
    ids = builder.inputs[index.input]
    low, high = int(w.codes.min(initial=0)), int(w.codes.max(initial=0))
    out = builder.add_value(trace.shape(e.outputs[0]), low, high)
    kernel = w.codes.astype(builder.values[out].dtype)
    params = {"kernel": builder.add_param(w.site or "embedding", kernel)}
    builder.add_node("embed", (ids,), out, params=params, path=where(e).strip("'"))
    scale = np.asarray(w.scale, np.float64)
    if scale.ndim:  # One a column.
        if scale.shape[0] != 1:
            raise ValueError(
                f"The table {w.site!r} has a scale for each row, which depends on the "
                "input. Use one scale, or one for each column: `axis=-1`."
            )
        rank = len(trace.shape(e.outputs[0]))
        scale = scale.reshape((1,) * (rank - scale.ndim + 1) + scale.shape[1:])
    return Integers(out, scale, 0, low, high, is_codes=not scale.ndim, path=e.path)


def _counts_from_zero(e: Equation, trace: Trace, rows: int) -> bool:
    """Whether the rows are chosen as an array is indexed: from its end below zero."""
    source = {v: s for s in trace.equations for v in s.outputs}
    ids = np.arange(-rows, rows, dtype=np.int32)

    def chosen(v: int) -> np.ndarray | None:
        s = source.get(v)
        if v in trace.constants:
            return np.asarray(trace.constants[v])
        if s is None:
            return ids
        operands = [chosen(u) for u in s.inputs]
        if any(a is None for a in operands):
            return None
        if s.primitive.name in _NEUTRAL:
            return operands[0]
        if s.primitive.name not in POINTWISE:
            return None
        pairs = [np.broadcast_to(np.asarray(a).squeeze(), ids.shape) for a in operands]
        return np.asarray(evaluate(s, *map(jnp.asarray, pairs))[0])

    found = chosen(e.inputs[1])
    return found is not None and np.array_equal(
        found, np.where(ids < 0, ids + rows, ids)
    )


@rule("split")
def _split(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> tuple[Abstract, ...]:
    x = settled(builder, e, trace, x)
    axis, sizes = int(e.params["axis"]), [int(n) for n in e.params["sizes"]]
    if axis == 0 or (np.ndim(x.scale) and x.scale.shape[axis] > 1):
        raise refuse(e, x, "input")
    assert x.value is not None
    before, rank = builder.values[x.value], len(trace.shape(e.inputs[0]))
    ends = list(itertools.accumulate(sizes))
    parts = []
    for v, size, end in zip(e.outputs, sizes, ends, strict=True):
        start: list[int] = [0] * rank
        stop: list[int | None] = [None] * rank
        start[axis], stop[axis] = end - size, end
        shape = trace.shape(v)
        value = builder.add_value(shape, x.low, x.high, before.grid, dtype=before.dtype)
        path = where(e).strip("'")
        attributes: dict[str, Any] = {"start": start, "stop": stop, "steps": [1] * rank}
        builder.add_node("slice", (x.value,), value, path=path, **attributes)
        parts.append(dataclasses.replace(x, value=value))
    return tuple(parts)
