"""Steps of gathers, scatters and sorts: integers at places that integers name."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from qjax.backends.native.emission import (
    Emission,
    NotNativeError,
    dense,
    merged,
)
from qjax.graph.graph import Node, holds
from qjax.graph.sizes import Shape

_GATHER, _SCATTER, _SORT = 27, 28, 29
_SORTS = ("sort", "argsort", "descending argsort")
_SCATTERS = ("scatter", "scatter_add", "scatter_max", "scatter_min")


class _Axes(NamedTuple):
    """The axes of an operand, of places in it and of windows there.

    Attributes:
      window: Axes of what has the windows side by side, along the windows.
      single: Axes of the operand that a window lacks.
      indexed: Axes of the operand that the coordinates of a place go along.
      batch: Axes of the operand that go with axes of the places.
      of_places: The latter.
    """

    window: Sequence[int]
    single: Sequence[int]
    indexed: Sequence[int]
    batch: Sequence[int]
    of_places: Sequence[int]


def _rest(rank: int, *others: Sequence[int]) -> list[int]:
    """Returns the axes, in order, that are not among others."""
    return [d for d in range(rank) if not any(d in own for own in others)]


def _windows(
    e: Emission,
    places: int,
    operand: Shape,
    other: Shape,
    axes: _Axes,
    is_clipped: bool,
) -> list[int]:
    """Returns the words that say which windows of an operand are where.

    Args:
      e: The plan.
      places: Value of the places.
      operand: Shape of what has the windows.
      other: Shape of what has them side by side: what is gathered, or updates.
      axes: What the axes of them are.
      is_clipped: True if places beyond the ends are those at the ends.
    """
    shape, own, to = e.shapes[places], dense(operand), dense(other)
    starts = dense(shape)
    along = dict(zip(axes.of_places, axes.batch, strict=True))
    others = _rest(len(other), axes.window)
    steps = [own[along[j]] if j in along else 0 for j in range(len(shape) - 1)]
    columns = starts[:-1], steps, [to[d] for d in others]
    batch = merged(zip(shape[:-1], *columns, strict=True))
    kept = _rest(len(operand), axes.single, axes.batch)
    pairs = dict(zip(kept, sorted(axes.window), strict=True))
    window = merged((other[at], own[d], to[at]) for d, at in pairs.items())
    indexed = axes.indexed
    lasts = [operand[d] - (other[pairs[d]] if d in pairs else 1) for d in indexed]
    words = [e.of[places], is_clipped, len(batch), *_by_column(batch, 4)]
    words += [len(indexed), *(own[d] for d in indexed), *lasts]
    return [*words, len(window), *_by_column(window, 3)]


def _by_column(rows: Sequence[Sequence[int]], count: int) -> list[int]:
    return [row[k] for k in range(count) for row in rows]


def _gather(e: Emission, node: Node) -> None:
    a, (v, places) = node.attributes, node.inputs
    shape, dtype = e.shapes[node.output], e.graph.values[node.output].dtype
    if a["mode"] == "fill" and not holds(dtype, a["fill"], a["fill"]):
        raise NotNativeError(f"{dtype} does not hold its fill {a['fill']}")
    x, out = e.whole(v, e.shapes[v], dtype), e.make(node.output)
    if not math.prod(shape):
        return
    batch, own = a["operand_batching_dims"], a["start_indices_batching_dims"]
    single, indexed = a["collapsed_slice_dims"], a["start_index_map"]
    axes = _Axes(a["offset_dims"], single, indexed, batch, own)
    is_clipped = a["mode"] == "clip"
    windows = _windows(e, places, e.shapes[v], shape, axes, is_clipped)
    fill = a["fill"] if a["mode"] == "fill" else 0
    e.step(_GATHER, [x, out, fill, *windows], [x, e.of[places]], [out])


def _scatter(e: Emission, node: Node) -> None:
    a, kind = node.attributes, _SCATTERS.index(node.operation)
    places, *given, v = node.inputs
    shape, dtype = e.shapes[node.output], e.graph.values[node.output].dtype
    is_sum = node.operation == "scatter_add"
    updates = e.of[v] if is_sum else e.whole(v, e.shapes[v], dtype)
    out = e.make(node.output)
    if is_sum:
        e.fill(out, 0)
    else:
        sizes = [math.prod(shape)]
        e.copy(e.of[given[0]], out, sizes, [1])
    if not math.prod(shape) * math.prod(e.shapes[v]):
        return
    batch, own = a["operand_batching_dims"], a["scatter_indices_batching_dims"]
    single, indexed = a["inserted_window_dims"], a["scatter_dims"]
    axes = _Axes(a["update_window_dims"], single, indexed, batch, own)
    is_clipped = a["mode"] == "clip"
    windows = _windows(e, places, shape, e.shapes[v], axes, is_clipped)
    words = [kind, updates, out, a.get("input_zero_point", 0), *windows]
    e.step(_SCATTER, words, [updates, e.of[places], out], [out])


def _sort(e: Emission, node: Node) -> None:
    shape, axis = e.shapes[node.output], node.attributes["axis"]
    x, out = e.of[node.inputs[0]], e.make(node.output)
    is_descending = node.attributes.get("descending", False)
    kind = _SORTS.index("descending " * is_descending + node.operation)
    sizes = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    e.step(_SORT, [kind, x, out, *sizes], [x], [out])


GATHERS = {
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
    **dict.fromkeys(("sort", "argsort"), _sort),
}
