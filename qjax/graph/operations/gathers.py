"""Gathers, scatters and sorts: integers at places that other integers name.

Places are counted as in `jax.lax.gather` and `jax.lax.scatter`, whose names of axes
these records keep; the last axis of the places counts their coordinates.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.operations.record import (
    AXES,
    AXIS,
    COUNT,
    ENDS,
    FLAG,
    INTEGER,
    Ends,
    Operands,
    Operation,
    Shape,
    check_axes,
    choice,
    same_interval,
    same_shape,
)


def _check_places(o: Operands, places: Shape, axes: Sequence[int]) -> None:
    """Raises ValueError unless the last axis of places has a number for each axis."""
    found = places[-1] if places else 0
    o.check(bool(places) and found == len(axes), f"places need {len(axes)}", found)


def _window(rank: int, *others: Sequence[int]) -> list[int]:
    """Returns the axes of an operand that a window keeps, in order."""
    return [d for d in range(rank) if not any(d in own for own in others)]


# Gathers.


def _slice_sizes(a: Mapping[str, Any], shape: Shape) -> list[int]:
    """Returns the sizes of what is gathered at one place; null is a whole axis."""
    sizes = zip(a["slice_sizes"], shape, strict=True)
    return [n if size is None else size for size, n in sizes]


def _gather_shape(o: Operands) -> Shape:
    (shape, places), rank = o.shapes, len(o.x.shape)
    o.check(len(o["slice_sizes"]) == rank, f"`slice_sizes` must be {rank}", o.shapes)
    single = *o["collapsed_slice_dims"], *o["operand_batching_dims"]
    check_axes(o, single, rank)
    check_axes(o, [*o["start_index_map"], *o["operand_batching_dims"]], rank)
    _check_places(o, places, o["start_index_map"])
    batch = places[:-1]
    check_axes(o, o["start_indices_batching_dims"], len(batch))
    pairs = zip(
        o["operand_batching_dims"], o["start_indices_batching_dims"], strict=True
    )
    o.check(
        all(shape[d] == batch[j] for d, j in pairs), "batch axes must agree", o.shapes
    )
    sizes = _slice_sizes(o.attributes, shape)
    fits = all(0 <= size <= n for size, n in zip(sizes, shape, strict=True))
    o.check(fits, f"slices must fit {shape}", sizes)
    o.check(all(sizes[d] == 1 for d in single), "single axes must have size 1", sizes)
    window = [sizes[d] for d in _window(rank, single)]
    whole = len(batch) + len(window)
    check_axes(o, o["offset_dims"], whole)
    o.check(len(o["offset_dims"]) == len(window), "`offset_dims`", o["offset_dims"])
    others = _window(whole, o["offset_dims"])
    found = dict(
        zip([*sorted(o["offset_dims"]), *others], [*window, *batch], strict=True)
    )
    return tuple(found[d] for d in range(whole))


def _gather_interval(o: Operands) -> Ends:
    low, high = same_interval(o)
    if o["mode"] == "clip":
        return low, high
    return min(low, o["fill"]), max(high, o["fill"])


def _gather(a, own, inputs):
    x, places = inputs
    sizes, batch = _slice_sizes(a, x.shape), places.shape[:-1]
    single = *a["collapsed_slice_dims"], *a["operand_batching_dims"]
    window = _window(x.ndim, single)
    whole = len(batch) + len(window)
    offsets = dict(zip(window, sorted(a["offset_dims"]), strict=True))
    others = _window(whole, a["offset_dims"])
    shape = [0] * whole
    for d, n in zip(others, batch, strict=True):
        shape[d] = n
    for d, at in offsets.items():
        shape[at] = sizes[d]

    def along(axis, n):
        return np.arange(n).reshape([-1 if d == axis else 1 for d in range(whole)])

    def spread(values):  # From the axes of the places to those of the result.
        own = [1] * whole
        for d, n in zip(others, values.shape, strict=True):
            own[d] = n
        return values.reshape(own)

    index: list[Any] = [np.zeros([1] * whole, np.int64) for _ in range(x.ndim)]
    is_there = np.ones([1] * whole, bool)
    for k, d in enumerate(a["start_index_map"]):
        start, last = spread(places[..., k]), x.shape[d] - sizes[d]
        is_there = is_there & (start >= 0) & (start <= last)
        index[d] = np.clip(start, 0, last)
    for d, j in zip(
        a["operand_batching_dims"], a["start_indices_batching_dims"], strict=True
    ):
        index[d] = along(others[j], batch[j])
    for d, at in offsets.items():
        index[d] = index[d] + along(at, sizes[d])
    if not math.prod(shape):
        return np.zeros(shape, np.int64)
    if not x.size:  # No place is there.
        return np.full(shape, a["fill"], np.int64)
    found = np.broadcast_to(x[tuple(index)], shape)
    return found if a["mode"] == "clip" else np.where(is_there, found, a["fill"])


# Scatters.


def _updates_places(o: Operands, sizes: Shape, places: Shape, updates: Shape) -> None:
    """Raises ValueError unless updates fit the places and the sizes of the result."""
    rank = len(sizes)
    single = *o["inserted_window_dims"], *o["operand_batching_dims"]
    check_axes(o, single, rank)
    check_axes(o, [*o["scatter_dims"], *o["operand_batching_dims"]], rank)
    _check_places(o, places, o["scatter_dims"])
    check_axes(o, o["update_window_dims"], len(updates))
    check_axes(o, o["scatter_indices_batching_dims"], len(places) - 1)
    others = [updates[d] for d in _window(len(updates), o["update_window_dims"])]
    o.check(others == list(places[:-1]), f"updates at {places[:-1]} places", updates)
    kept = _window(rank, single)
    given = [updates[d] for d in sorted(o["update_window_dims"])]
    fits = len(given) == len(kept)
    fits = fits and all(n <= sizes[d] for n, d in zip(given, kept, strict=True))
    o.check(fits, f"windows must fit {[sizes[d] for d in kept]}", given)
    batch = zip(
        o["operand_batching_dims"], o["scatter_indices_batching_dims"], strict=True
    )
    o.check(
        all(sizes[d] == places[j] for d, j in batch), "batch axes must agree", places
    )


def sum_sizes(a: Mapping[str, Any], places: Shape, updates: Shape) -> Shape:
    """Returns the shape of a sum of updates.

    Args:
      a: Attributes; a null in ``sizes`` is the size of the places, along a batch axis,
        or that of the updates, along an axis of the window.
      places: Shape of the places.
      updates: Shape of the updates.
    """
    single = *a["inserted_window_dims"], *a["operand_batching_dims"]
    kept = _window(len(a["sizes"]), single)
    given = (updates[d] for d in sorted(a["update_window_dims"]))
    own = dict(zip(kept, given, strict=True))
    batch = a["operand_batching_dims"], a["scatter_indices_batching_dims"]
    own |= {d: places[j] for d, j in zip(*batch, strict=True)}
    return tuple(own[d] if n is None else n for d, n in enumerate(a["sizes"]))


def _scatter_add_shape(o: Operands) -> Shape:
    places, updates = o.shapes
    known = set(range(len(o["sizes"]))).difference(o["inserted_window_dims"])
    open_ = [d for d, n in enumerate(o["sizes"]) if n is None]
    o.check(known.issuperset(open_), "`sizes` must say those of single axes", open_)
    sizes = sum_sizes(o.attributes, places, updates)
    o.check(all(n >= 0 for n in sizes), "`sizes` must be 0 or more", sizes)
    _updates_places(o, sizes, places, updates)
    return sizes


def updates_at_most(a: Mapping[str, Any], places: Shape) -> int:
    """Returns the number of updates that may meet at one place of a sum."""
    batch = a["scatter_indices_batching_dims"]
    return math.prod(n for d, n in enumerate(places[:-1]) if d not in batch)


def _scatter_add_interval(o: Operands) -> Ends:
    z, updates = o["input_zero_point"], o.inputs[1]
    o.check(z == updates.zero_point, f"`input_zero_point` {updates.zero_point}", z)
    terms, found = o["most_updates"], updates_at_most(o.attributes, o.shapes[0])
    o.check(found <= terms, f"`most_updates` must be {found} or more", terms)
    return terms * min(updates.low - z, 0), terms * max(updates.high - z, 0)


def _update_index(a, sizes, places, shape):
    """Returns where each update goes, and whether its window is inside."""
    rank = len(shape)
    single = *a["inserted_window_dims"], *a["operand_batching_dims"]
    axes = _window(len(sizes), single), sorted(a["update_window_dims"])
    windows = dict(zip(*axes, strict=True))
    others = _window(rank, a["update_window_dims"])

    def along(axis):
        own = [-1 if d == axis else 1 for d in range(rank)]
        return np.arange(shape[axis]).reshape(own)

    index: list[Any] = [np.zeros([1] * rank, np.int64) for _ in sizes]
    is_there = np.ones([1] * rank, bool)
    for k, d in enumerate(a["scatter_dims"]):
        own = [1] * rank
        for axis, n in zip(others, places.shape[:-1], strict=True):
            own[axis] = n
        start = places[..., k].reshape(own)
        last = sizes[d] - (shape[windows[d]] if d in windows else 1)
        is_there = is_there & (start >= 0) & (start <= last)
        index[d] = np.clip(start, 0, max(last, 0))
    for d, j in zip(
        a["operand_batching_dims"], a["scatter_indices_batching_dims"], strict=True
    ):
        index[d] = along(others[j])
    for d, axis in windows.items():
        index[d] = index[d] + along(axis)
    is_there = np.broadcast_to(is_there | (a["mode"] == "clip"), shape)
    return [np.broadcast_to(x, shape)[is_there] for x in index], is_there


def _scatter_add(a, own, inputs):
    places, updates = inputs
    found = np.zeros(sum_sizes(a, places.shape, updates.shape), np.int64)
    if found.size and updates.size:
        index, is_there = _update_index(a, found.shape, places, updates.shape)
        np.add.at(found, tuple(index), (updates - a["input_zero_point"])[is_there])
    return found


def _scatter_shape(o: Operands) -> Shape:
    places, shape, updates = o.shapes
    _updates_places(o, shape, places, updates)
    return shape


def _scatter_interval(o: Operands) -> Ends:
    own = o.inputs[1:]
    return min(x.low for x in own), max(x.high for x in own)


def _scatter(a, own, inputs):
    places, x, updates = inputs
    found = x.copy()
    if found.size and updates.size:
        # In the order of the places, however their windows lie: the last one stays.
        window = sorted(a["update_window_dims"])
        others = _window(updates.ndim, window)
        updates = updates.transpose(others + window)
        a = {**a, "update_window_dims": list(range(len(others), updates.ndim))}
        index, is_there = _update_index(a, found.shape, places, updates.shape)
        for at in zip(*index, updates[is_there], strict=True):
            found[at[:-1]] = at[-1]
    return found


def _scatter_extreme(join):
    """Returns the meaning of a scatter that keeps the extreme at each place."""

    def meaning(a, own, inputs):
        places, x, updates = inputs
        found = x.copy()
        if found.size and updates.size:
            index, is_there = _update_index(a, found.shape, places, updates.shape)
            join.at(found, tuple(index), updates[is_there])
        return found

    return meaning


# Sorts.


def _sort_shape(o: Operands) -> Shape:
    check_axes(o, [o["axis"]], len(o.x.shape))
    return same_shape(o)


def _argsort(a, own, inputs):
    x = -inputs[0] if a["descending"] else inputs[0]
    return np.argsort(x, a["axis"], kind="stable")


_GATHERING = {
    "offset_dims": AXES,
    "collapsed_slice_dims": AXES,
    "start_index_map": AXES,
    "operand_batching_dims": AXES,
    "start_indices_batching_dims": AXES,
    "slice_sizes": ENDS,
    "mode": choice("clip", "fill"),
    "fill": INTEGER,
}
_SCATTERING = {
    "update_window_dims": AXES,
    "inserted_window_dims": AXES,
    "scatter_dims": AXES,
    "operand_batching_dims": AXES,
    "scatter_indices_batching_dims": AXES,
    "mode": choice("clip", "drop"),
}

GATHER = Operation(
    "gather",
    "code = q[places], slices at places of the second input; beyond the ends the slice "
    "at the end, or `fill`",
    "move",
    _gather_shape,
    _gather_interval,
    _gather,
    inputs=2,
    attributes=_GATHERING,
    optional={"is_nan": FLAG},  # True if the model reads NaN beyond the ends.
)
SCATTER_ADD = Operation(
    "scatter_add",
    "acc = sum(q - input_zero_point) of the second input, over what has one place, "
    "which the first input names",
    "accumulator",
    _scatter_add_shape,
    _scatter_add_interval,
    _scatter_add,
    inputs=2,
    attributes={
        **_SCATTERING,
        "sizes": ENDS,
        "input_zero_point": INTEGER,
        "most_updates": COUNT,
    },
    reach=lambda o: (o["most_updates"], 0),
)
SCATTER = Operation(
    "scatter",
    "code = the third input at places that the first one names, of several the last; "
    "the second input elsewhere",
    "choice",
    _scatter_shape,
    _scatter_interval,
    _scatter,
    inputs=3,
    attributes=_SCATTERING,
)
SCATTER_MAX, SCATTER_MIN = (
    Operation(
        name,
        f"code = the {said} of the second input and of what the third one has for a "
        "place, which the first one names",
        "choice",
        _scatter_shape,
        _scatter_interval,
        _scatter_extreme(join),
        inputs=3,
        attributes=_SCATTERING,
    )
    for name, said, join in (
        ("scatter_max", "largest", np.maximum),
        ("scatter_min", "least", np.minimum),
    )
)
SORT = Operation(
    "sort",
    "code = q in ascending order along an axis",
    "move",
    _sort_shape,
    same_interval,
    lambda a, own, xs: np.sort(xs[0], a["axis"]),
    attributes={"axis": AXIS},
)
ARGSORT = Operation(
    "argsort",
    "place = number of q along an axis in its order, equal ones in their own",
    "number",
    _sort_shape,
    lambda o: (0, max(o.x.shape[o["axis"]] - 1, 0)),
    _argsort,
    attributes={"axis": AXIS, "descending": FLAG},
)

GATHERS = (GATHER, SCATTER_ADD, SCATTER, SCATTER_MAX, SCATTER_MIN, SORT, ARGSORT)
