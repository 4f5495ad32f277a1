"""Rules of gathers, scatters and sorts whose places are computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.graph.graph import Grid
from qjax.graph.operations.gathers import updates_at_most
from qjax.lowering.constants import add_constant, codes_on, exact_grid
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.levels import on_grid
from qjax.lowering.rules.products import AccumulatorOverflowError
from qjax.lowering.rules.whole import places_of
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    Joined,
    Known,
    KnownCodes,
    PendingAccumulator,
    Real,
    Sum,
)
from qjax.model.trace import Equation, Trace

_Mode = lax.GatherScatterMode


def gathered(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, index: Abstract
) -> Integers:
    """Returns what a gather reads at places that depend on an input."""
    places = places_of(builder, e, trace, index, e.inputs[1], "index")
    dimensions = e.params["dimension_numbers"]
    attributes: dict[str, Any] = {
        name: [int(d) for d in getattr(dimensions, name)]
        for name in (
            "offset_dims",
            "collapsed_slice_dims",
            "start_index_map",
            "operand_batching_dims",
            "start_indices_batching_dims",
        )
    }
    sizes = [int(n) for n in e.params["slice_sizes"]]
    return read_places(
        builder, e, trace, x, places, attributes, sizes, e.params["mode"]
    )


def read_places(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    places: Integers,
    attributes: dict[str, Any],
    sizes: list[int],
    mode: Any,
) -> Integers:
    """Adds a gather to the graph.

    Args:
      builder: Receives it.
      e: The equation, whose first operand is ``x``.
      trace: The program.
      x: What is read.
      places: Where.
      attributes: Axes of the gather, as in `jax.lax.GatherDimensionNumbers`.
      sizes: Sizes of a slice.
      mode: What is read beyond the ends, as in `jax.lax.GatherScatterMode`.

    Returns:
      What is read, on the grid of ``x``.

    Raises:
      ValueError: for what has no codes, or scales that differ along a chosen axis.
    """
    codes, scale = _table(builder, e, trace, x)
    shape = builder.values[codes.value].shape
    single = {*attributes["collapsed_slice_dims"], *attributes["operand_batching_dims"]}
    attributes = {
        **attributes,
        "slice_sizes": [
            None if n == size and d not in single else size
            for d, (n, size) in enumerate(zip(shape, sizes, strict=True))
        ],
        **_beyond(builder, e, trace, codes, places, attributes, sizes, mode),
    }
    own = builder.values[codes.value]
    ends = min(own.low, attributes["fill"]), max(own.high, attributes["fill"])
    dtype = own.dtype
    if attributes["mode"] == "fill":
        info = np.iinfo(own.dtype)
        if not info.min <= ends[0] <= ends[1] <= info.max:
            dtype = "int32"
    options: Any = {"grid": own.grid, "dtype": dtype, "path": where(e).strip("'")}
    value = builder.add("gather", (codes.value, places.value), attributes, **options)
    found = builder.values[value]
    return codes.elsewhere(
        value,
        low=found.low,
        high=found.high,
        scale=_moved_scale(e, codes, scale, attributes, single, len(found.shape)),
        place=e.place,
    )


def _table(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> tuple[Integers, np.ndarray]:
    """Returns what a gather reads as codes in the graph, and its scales."""
    v = e.inputs[0]
    if isinstance(x, KnownCodes):
        if np.any(x.zero_point):
            raise refuse(e, x, "table")
        name, path = x.site or "table", where(e).strip("'")
        grid = None if np.ndim(x.scale) else Grid(float(np.float32(x.scale)), 0)
        value = add_constant(builder, x.codes, grid, name=name, path=path)
        scale = np.asarray(x.scale, np.float64)
        kind: Any = {"dtype": "", "is_codes": not scale.ndim, "scale": scale}
        return dataclasses.replace(builder.numbers(value, e.place), **kind), scale
    if not trace.is_real(v):
        found = places_of(builder, e, trace, x, v, "table")
        return found, np.ones(())
    x = on_grid(builder, e, trace, x, v)
    if isinstance(x, Known | Real):
        raise refuse(e, x, "table")
    found = settled(builder, e, trace, x)
    if found.gain is not None:
        raise refuse(e, found, "table")
    return found, np.asarray(found.scale)


def _beyond(
    builder: Builder,
    e: Equation,
    trace: Trace,
    codes: Integers,
    places: Integers,
    attributes: Mapping[str, Any],
    sizes: list[int],
    mode: Any,
) -> dict[str, Any]:
    """Returns what a gather reads beyond the ends of its table.

    The model's own number, or the code of zero where that is NaN, which is noted.
    """
    shape = builder.values[codes.value].shape
    last = [shape[d] - sizes[d] for d in attributes["start_index_map"]]
    is_inside = places.low >= 0 and places.high <= min(last, default=0)
    if is_inside or mode in (_Mode.CLIP, _Mode.PROMISE_IN_BOUNDS):
        return {"mode": "clip", "fill": 0}
    if mode != _Mode.FILL_OR_DROP:
        raise NotImplementedError(
            f"There is no integer rule for the mode {mode} of `{e.primitive.name}`, "
            f'met in {where(e)}.\n  equation: {e}\nUse `mode="clip"` or `mode="fill"`.'
        )
    fill = e.params.get("fill_value")
    if not trace.is_real(e.outputs[0]):
        info = jnp.iinfo(trace.avals[e.outputs[0]].dtype)
        default = info.max if info.min == 0 else info.min
        return {"mode": "fill", "fill": int(default if fill is None else fill)}
    if fill is None or np.isnan(fill):
        builder.note(
            f"`{e.primitive.name}` in {where(e)} reads NaN beyond the "
            f"{shape[attributes['start_index_map'][0]]} places of its table in the "
            "model; the program has the code of zero there."
        )
        return {"mode": "fill", "fill": codes.zero_point, "is_nan": True}
    scale = np.unique(codes.scale)
    value = np.asarray(fill, np.float32)
    code = None
    if scale.size == 1 or fill == 0:
        code = codes_on(value, float(scale.flat[0]), codes.zero_point)
    if code is None:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} fills with {fill}, which is on no "
            f"code of its table.\n  equation: {e}\nFill with zero, or use "
            '`mode="clip"`.'
        )
    return {"mode": "fill", "fill": int(code)}


def _moved_scale(
    e: Equation,
    x: Integers,
    scale: np.ndarray,
    attributes: Mapping[str, Any],
    single: set[int],
    rank: int,
) -> np.ndarray:
    """Takes scales per channel to the axes of what is gathered."""
    if not scale.ndim:
        return scale
    window = [d for d in range(scale.ndim) if d not in single]
    moved = dict(zip(sorted(attributes["offset_dims"]), window, strict=True))
    for d, n in enumerate(scale.shape):
        is_whole = d in window and attributes["slice_sizes"][d] is None
        if n > 1 and not is_whole:
            raise ValueError(
                f"The table of `{e.primitive.name}` in {where(e)} has a scale for each "
                f"place that is chosen.\n  equation: {e}\nUse `axis=None` for it in "
                "the scheme: one scale per tensor."
            )
    return scale.transpose(window + sorted(single)).reshape(
        [scale.shape[moved[d]] if d in moved else 1 for d in range(rank)]
    )


def starts(
    builder: Builder, e: Equation, trace: Trace, operands: Any, first: int
) -> Integers:
    """Returns the starts of a slice as one vector of places."""
    path, parts = where(e).strip("'"), []
    for v, x in zip(e.inputs[first:], operands, strict=True):
        own = places_of(builder, e, trace, x, v, "start")
        parts.append(builder.add("reshape", (own.value,), {"sizes": [1]}, path=path))
    value = builder.add("concatenate", parts, {"axis": 0}, path=path)
    return builder.numbers(value, e.place)


def sliced(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *places: Abstract
) -> Integers:
    """Returns a slice that starts at a place that depends on an input."""
    index = starts(builder, e, trace, places, 1)
    axes = list(range(len(trace.shape(e.inputs[0]))))
    attributes = {
        "offset_dims": axes,
        "collapsed_slice_dims": [],
        "start_index_map": axes,
        "operand_batching_dims": [],
        "start_indices_batching_dims": [],
    }
    sizes = [int(n) for n in e.params["slice_sizes"]]
    return read_places(builder, e, trace, x, index, attributes, sizes, _Mode.CLIP)


def _scattering(e: Equation) -> dict[str, Any]:
    """Returns the axes and the mode of a scatter."""
    dimensions, mode = e.params["dimension_numbers"], e.params["mode"]
    if mode not in (_Mode.CLIP, _Mode.FILL_OR_DROP, _Mode.PROMISE_IN_BOUNDS):
        raise NotImplementedError(
            f"There is no integer rule for the mode {mode} of `{e.primitive.name}`, "
            f'met in {where(e)}.\n  equation: {e}\nUse `mode="clip"` or `mode="drop"`.'
        )
    named = {
        "update_window_dims": dimensions.update_window_dims,
        "inserted_window_dims": dimensions.inserted_window_dims,
        "scatter_dims": dimensions.scatter_dims_to_operand_dims,
        "operand_batching_dims": dimensions.operand_batching_dims,
        "scatter_indices_batching_dims": dimensions.scatter_indices_batching_dims,
    }
    found = {name: [int(d) for d in axes] for name, axes in named.items()}
    return {**found, "mode": "clip" if mode == _Mode.CLIP else "drop"}


def _scatter_add(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    index: Abstract,
    updates: Abstract,
) -> Abstract:
    """Sums codes at computed places, onto zeros or onto other codes."""
    attributes = _scattering(e)
    places = places_of(builder, e, trace, index, e.inputs[1], "index")
    codes = _updates(builder, e, trace, updates)
    shape, given = trace.shape(e.inputs[0]), trace.shape(e.inputs[2])
    taken = updates_at_most(attributes, trace.shape(e.inputs[1]))
    attributes |= {
        "sizes": _open_sizes(attributes, shape, given),
        "input_zero_point": codes.zero_point,
        "most_updates": taken,
    }
    low, high = (taken * (end - codes.zero_point) for end in (codes.low, codes.high))
    limit = builder.most(e.sites.output)
    if min(low, 0) < -limit - 1 or max(high, 0) > limit:
        raise AccumulatorOverflowError(
            f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
            f"{high if high > -low else low} when all {taken} updates meet, beyond "
            f"{limit}.\n  equation: {e}\nUse fewer bits for the updates, or more "
            "`buffer_bits`.",
            np.full((taken,), codes.high if high > -low else codes.low),
        )
    options: Any = {"dtype": "int32", "path": where(e).strip("'")}
    inputs = places.value, codes.value
    value = builder.add("scatter_add", inputs, attributes, **options)
    own = builder.values[value]
    found = Integers(
        value=value,
        scale=np.asarray(codes.scale),
        low=own.low,
        high=own.high,
        is_gain_exact=codes.rescaled is None,
        place=e.place,
        dtype=codes.dtype,
    )
    if isinstance(x, Known | KnownCodes):
        if isinstance(x, Known) and not np.any(x.value):
            return found
        raise refuse(e, x, "operand")
    x = settled(builder, e, trace, on_grid(builder, e, trace, x, e.inputs[0]))
    if not x.is_codes or np.ndim(x.scale):
        raise refuse(e, x, "operand")
    return Sum(((x, 1.0), (found, 1.0)), place=e.place)


def _updates(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Returns the updates of a sum as codes on one grid."""
    v = e.inputs[2]
    if not trace.is_real(v):
        return places_of(builder, e, trace, x, v, "updates")
    if isinstance(x, KnownCodes):
        raise refuse(e, x, "updates")
    if isinstance(x, Known):
        exact = exact_grid(np.asarray(x.value, np.float32))
        if exact is None:
            raise refuse(e, x, "updates")
        path = where(e).strip("'")
        grid = Grid(float(np.float32(exact[0])), 0)
        value = add_constant(builder, exact[1], grid, name=f"{path}/updates", path=path)
        kind: Any = {"dtype": "", "is_codes": True, "scale": np.asarray(exact[0])}
        return dataclasses.replace(builder.numbers(value, e.place), **kind)
    found = settled(builder, e, trace, on_grid(builder, e, trace, x, v))
    if np.ndim(found.scale) or found.gain is not None:
        raise refuse(e, found, "updates")
    return found


def _open_sizes(
    a: Mapping[str, Any], shape: tuple[int, ...], updates: tuple[int, ...]
) -> list[int | None]:
    """Returns the sizes of a sum; None where places or updates say them."""
    single = *a["inserted_window_dims"], *a["operand_batching_dims"]
    kept = [d for d in range(len(shape)) if d not in single]
    given = (updates[d] for d in sorted(a["update_window_dims"]))
    own = dict(zip(kept, given, strict=True))
    is_open = lambda d: d in a["operand_batching_dims"] or own.get(d) == shape[d]
    return [None if is_open(d) else int(n) for d, n in enumerate(shape)]


def _scatter(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    index: Abstract,
    updates: Abstract,
) -> Abstract:
    """Puts values at computed places, once both are on one grid."""
    places = places_of(builder, e, trace, index, e.inputs[1], "index")
    if e.primitive.name != "scatter" and not trace.is_real(e.outputs[0]):
        return _scatter_whole(builder, e, trace, x, updates, places)
    shapes = trace.shape(e.inputs[0]), trace.shape(e.inputs[2])
    return _placed(builder, e, trace, x, updates, places, _scattering(e), shapes)


def _dynamic_update_slice(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    updates: Abstract,
    *operands: Abstract,
) -> Abstract:
    """Puts values at a place, which is known or depends on an input."""
    places = starts(builder, e, trace, operands, 2)
    shapes = trace.shape(e.inputs[0]), trace.shape(e.inputs[1])
    axes = list(range(len(shapes[0])))
    attributes = {
        "update_window_dims": axes,
        "inserted_window_dims": [],
        "scatter_dims": axes,
        "operand_batching_dims": [],
        "scatter_indices_batching_dims": [],
        "mode": "clip",
    }
    return _placed(builder, e, trace, x, updates, places, attributes, shapes)


def _placed(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    updates: Abstract,
    places: Integers,
    attributes: dict[str, Any],
    shapes: tuple[tuple[int, ...], ...],
) -> Abstract:
    parts = []
    for part in (x, updates):
        if isinstance(part, PendingAccumulator):
            part = part.emitted()
        if isinstance(part, Real | KnownCodes):
            raise refuse(e, part, "operand")
        parts.append(part)
    others = (places.value,)
    shape = trace.shape(e.outputs[0])
    operation = _SCATTERS.get(e.primitive.name, "scatter")
    return Joined(
        operation, tuple(parts), shapes, shape, others, attributes, place=e.place
    )


def _scatter_whole(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    updates: Abstract,
    places: Integers,
) -> Integers:
    """Returns the extremes of whole numbers at computed places."""
    parts = [
        places_of(builder, e, trace, part, e.inputs[k], role)
        for k, part, role in ((0, x, "operand"), (2, updates, "updates"))
    ]
    inputs = [places.value, *(part.value for part in parts)]
    operation, path = _SCATTERS[e.primitive.name], where(e).strip("'")
    value = builder.add(operation, inputs, _scattering(e), path=path, dtype="int32")
    return builder.numbers(value, e.place, str(trace.avals[e.outputs[0]].dtype))


_SCATTERS = {"scatter-max": "scatter_max", "scatter-min": "scatter_min"}


# Primitive -> its rule.
GATHERS: Mapping[str, LoweringRule] = {
    "scatter-add": _scatter_add,
    "scatter": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
    "dynamic_update_slice": _dynamic_update_slice,
}
