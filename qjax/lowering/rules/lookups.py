"""Rules of lookups of codes: embeddings, gathers, slices, splits."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.graph.graph import Grid, storage
from qjax.leaves import at_start
from qjax.lowering.constants import scale_grid
from qjax.lowering.evaluation import run_steps
from qjax.lowering.inputs import integer_range
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.gathers import gathered, sliced
from qjax.lowering.rules.moves import move_again, placed
from qjax.lowering.values import Abstract, Builder, Integers, Known, KnownCodes, Real
from qjax.model.trace import Equation, Trace, evaluate

_MOST_ROWS = 1 << 24  # Numbers of rows are exact in float32.


def _gather(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, index: Abstract
) -> Abstract:
    if isinstance(x, KnownCodes) and isinstance(index, Real):
        if (found := _embed(builder, e, trace, x, index)) is not None:
            return found
    if not isinstance(index, Known):
        return gathered(builder, e, trace, x, index)
    if isinstance(x, Known | KnownCodes):
        raise refuse(e, x, "table")
    return _taken(builder, e, trace, x, index.value)


def _dynamic_slice(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *starts: Abstract
) -> Abstract:
    if not all(isinstance(s, Known) for s in starts):
        return sliced(builder, e, trace, x, *starts)
    known = (s.value for s in starts if isinstance(s, Known))
    return _taken(builder, e, trace, x, *known)


def _taken(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *places: np.ndarray
) -> Integers:
    """Applies a known move, which reads each example at the same places."""
    _check_real(e, trace, x)
    x = settled(builder, e, trace, x)
    if np.ndim(x.scale) or x.gain is not None:
        raise refuse(e, x, "input")
    shape, out = trace.shape(e.inputs[0]), trace.shape(e.outputs[0])
    size = math.prod(shape[1:])
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    with np.errstate(invalid="ignore"):  # Absent places read NaN.
        found = np.asarray(evaluate(e, numbers, *places)[0])
    if found.size and not 0 <= found.min() <= found.max() < numbers.size:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} reads places that are not there, "
            f"which are NaN in the model.\n  equation: {e}"
        )
    crosses = not out or out[0] != shape[0]
    if not crosses:
        first = np.arange(shape[0]).reshape((-1,) + (1,) * (len(out) - 1)) * size
        crosses = bool(np.any(found - first != found[:1]))
    path = where(e).strip("'")
    name = builder.add_param(f"{path}/places", found if crosses else found[0])

    def place(source: int) -> int:
        v = builder.values[source]
        attributes = {"crosses_examples": shape[0]} if crosses else {}
        options: Any = {"params": {"places": name}, "path": path}
        options |= {"grid": v.grid, "dtype": v.dtype}
        return builder.add("take", (source,), attributes, **options)

    return placed(x, place, e, len(out))


def _embed(
    builder: Builder, e: Equation, trace: Trace, w: KnownCodes, index: Real
) -> Integers | None:
    """Looks rows of a table of weights up by an integer input.

    Returns:
      Codes; None where the input does not choose rows as they are counted.
    """
    dimensions, rows = e.params["dimension_numbers"], w.codes.shape[0]
    axes = tuple(range(len(trace.shape(e.outputs[0])) - w.codes.ndim + 1, 99))
    is_rows = (
        tuple(dimensions.collapsed_slice_dims) == (0,)
        and tuple(dimensions.start_index_map) == (0,)
        and tuple(dimensions.offset_dims) == axes[: w.codes.ndim - 1]
        and tuple(e.params["slice_sizes"]) == (1, *w.codes.shape[1:])
    )
    if index.input is None:
        raise refuse(e, index, "index")
    ends = _chosen_ends(e, trace, index, rows) if is_rows else None
    is_other = index.input in builder.raw and index.input not in builder.rows
    if ends is None or np.any(w.zero_point) or is_other:
        return None
    ids = _place_input(builder, e, trace, index, ends)
    low, high = int(w.codes.min(initial=0)), int(w.codes.max(initial=0))
    kernel = w.codes.astype(storage(low, high))
    grid = scale_grid(w.scale, kernel.shape)
    params = {"kernel": builder.add_param(w.site or "embedding", kernel, grid)}
    path = where(e).strip("'")
    out = builder.add("embed", (ids.value,), params=params, path=path)
    scale = np.asarray(w.scale, np.float64)
    if scale.ndim:  # One a column.
        if scale.shape[0] != 1:
            raise ValueError(
                f"The table {w.site!r} has a scale for each row, and the input chooses "
                f"rows, in {where(e)}.\n  equation: {e}\n"
                f'Use `axis="output"` for {w.site!r} in the scheme, one scale for each '
                "column, or `axis=None`: one scale per tensor."
            )
        rank = len(trace.shape(e.outputs[0]))
        scale = scale.reshape((1,) * (rank - scale.ndim + 1) + scale.shape[1:])
    return Integers(
        value=out,
        scale=scale,
        low=low,
        high=high,
        is_codes=not scale.ndim,
        place=e.place,
    )


def _chosen_ends(e: Equation, trace: Trace, index: Real, rows: int) -> "_Chosen | None":
    """Returns the integers that choose rows as `embed` counts; None if others do."""
    assert index.input is not None
    v = trace.inputs[index.input]
    dtype, ends = trace.avals[v].dtype, integer_range(trace, index)
    if ends is None or dtype == np.bool_ or rows > _MOST_ROWS:
        return None
    is_clipped = e.params["mode"] == lax.GatherScatterMode.CLIP
    is_filled = e.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP

    def rows_of(ids: np.ndarray) -> np.ndarray:
        env = {v: jnp.asarray(ids, dtype)} | dict(index.known)
        found = np.asarray(run_steps(env, index.steps)[e.inputs[1]]).astype(np.int64)
        return np.clip(found, 0, rows - 1) if is_clipped else found

    low, high = max(-rows, ends[0]), min(rows - 1, ends[1])
    ids = np.arange(low, high + 1)
    found = rows_of(ids)
    if np.array_equal(found, np.where(ids < 0, ids + rows, ids)):
        chosen = low, high
    elif np.array_equal(found, np.clip(ids, *_ends(found, rows))):
        chosen = _ends(found, rows)
    else:
        return None
    # Beyond the ends a program takes the last row there is: does the model, too?
    far = [
        s * n * rows + k for n in (1, 2, 10) for s in (-1, 1) for k in range(-3, 300)
    ]
    probes = np.clip([*ends, *far], *ends)
    held = np.clip(rows_of(np.clip(probes, *chosen)), 0, rows - 1)
    theirs = rows_of(probes)
    is_held = np.array_equal(np.clip(theirs, 0, rows - 1), held)
    is_there = bool(np.all((theirs >= 0) & (theirs < rows)))
    if is_there and not is_held:
        return None  # Other integers choose other rows.
    return _Chosen(*chosen, is_held and (is_there or not is_filled))


def _ends(found: np.ndarray, rows: int) -> tuple[int, int]:
    """Returns the first and the last chosen row among those of the table."""
    return max(0, int(found.min())), min(rows - 1, int(found.max()))


class _Chosen(NamedTuple):
    """The integers that choose rows, and whether others choose the row at the end."""

    low: int
    high: int
    is_held: bool


def _place_input(
    builder: Builder,
    e: Equation,
    trace: Trace,
    index: Real,
    chosen: _Chosen,
) -> Integers:
    """Adds the input of a program that chooses rows, moved as the model moves it."""
    k = index.input
    assert k is not None
    ends = chosen.low, chosen.high
    if k not in builder.inputs:
        shape = trace.shape(trace.inputs[k])
        value = builder.add_value(shape, *ends, Grid(1.0, 0), dtype="int32")
        builder.inputs[k] = value
        builder.rows.add(k)
        builder.values[value] = dataclasses.replace(
            builder.values[value], is_place=not chosen.is_held
        )
    value = builder.inputs[k]
    own = builder.values[value]
    same = (own.low, own.high) == ends
    is_other = own.grid != Grid(1.0, 0) or own.dtype != "int32"
    if same and not chosen.is_held:
        own = dataclasses.replace(own, is_place=True)
        builder.values[value] = own
    if is_other or not (same or own.is_place):
        raise ValueError(
            f"{at_start(trace.names[k])} of the program chooses rows in {where(e)} and "
            f"is something else as well.\n  equation: {e}\nPass it as two inputs."
        )
    if not same:  # Rows that all tables have: others are refused.
        low, high = max(own.low, ends[0]), min(own.high, ends[1])
        own = dataclasses.replace(own, low=low, high=high)
        builder.values[value] = own
    codes: Abstract = Integers(
        value=value,
        scale=np.ones(()),
        low=own.low,
        high=own.high,
        place=e.place,
        dtype="int32",
    )
    wanted = trace.shape(e.inputs[1])[:-1]
    # The last move appends the axis of places.
    ends_there = bool(index.moves) and trace.shape(index.moves[-1].inputs[0]) == wanted
    codes = move_again(builder, index, trace, codes, keep=int(ends_there))
    assert isinstance(codes, Integers)
    if builder.values[codes.value].shape != wanted:
        raise refuse(e, index, "index")
    return codes


def _check_real(e: Equation, trace: Trace, x: Abstract) -> None:
    """Raises for an integer input that has not become real yet."""
    if not isinstance(x, Real) or x.input is None:
        return
    if integer_range(trace, x) is not None:
        raise NotImplementedError(
            f"There is no integer rule for `{e.primitive.name}` of {x.source} before "
            f"its cast, met in {where(e)}.\n  equation: {e}\nMake it real first, with "
            "`.astype(jnp.float32)`: codes can be moved so."
        )


def _split(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> tuple[Abstract, ...]:
    _check_real(e, trace, x)
    x = settled(builder, e, trace, x)
    axis, sizes = int(e.params["axis"]), [int(n) for n in e.params["sizes"]]
    if np.ndim(x.scale) and x.scale.shape[axis] > 1:
        raise refuse(e, x, "input")
    rank, last = len(trace.shape(e.inputs[0])), trace.shape(e.inputs[0])[axis]
    ends = list(itertools.accumulate(sizes))
    parts = []
    for v, size, end in zip(e.outputs, sizes, ends, strict=True):
        start: list[int] = [0] * rank
        stop: list[int | None] = [None] * rank
        start[axis], stop[axis] = end - size, None if end == last else end
        part = functools.partial(
            _part, builder, e, trace.shape(v), start, stop, [1] * rank
        )
        parts.append(placed(x, part, e, rank, end=v))
    return tuple(parts)


def _part(
    builder: Builder,
    e: Equation,
    shape: tuple[int, ...],
    start: list[int],
    stop: list[int | None],
    steps: list[int],
    source: int,
) -> int:
    """Adds a slice of a value to the graph."""
    v = builder.values[source]
    ends: dict[str, Any] = {"start": start, "stop": stop, "steps": steps}
    options: Any = {"grid": v.grid, "dtype": v.dtype, "path": where(e).strip("'")}
    return builder.add("slice", (source,), ends, **options)


# Primitive -> its rule.
LOOKUPS: Mapping[str, LoweringRule] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
}
