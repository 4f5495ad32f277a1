"""Gathers and scatters at a place of each example, told from those at known places."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax


class _Fields(NamedTuple):
    """The names of the axes of an equation in its dimension numbers."""

    single: str  # Axes of the operand of which one place is taken.
    places: str  # Axes of the operand by the parts of the indices.
    operand_pairs: str  # Axes of the operand that it shares with the indices.
    index_pairs: str  # The same axes of the indices.


_GATHER = _Fields(
    "collapsed_slice_dims",
    "start_index_map",
    "operand_batching_dims",
    "start_indices_batching_dims",
)
_SCATTER = _Fields(
    "inserted_window_dims",
    "scatter_dims_to_operand_dims",
    "operand_batching_dims",
    "scatter_indices_batching_dims",
)


def chooses_places(eqn: Any) -> bool:
    """Returns whether an equation is a gather or scatter."""
    return _fields(eqn) is not None


def _fields(eqn: Any) -> _Fields | None:
    numbers = eqn.params.get("dimension_numbers")
    if isinstance(numbers, lax.GatherDimensionNumbers):
        return _GATHER
    return _SCATTER if isinstance(numbers, lax.ScatterDimensionNumbers) else None


def within_examples(
    eqn: Any, pieces: Sequence[np.ndarray | None]
) -> tuple[list[int], Callable[..., Any]] | None:
    """Returns ``x[arange(n), index]`` as a gather within each of ``n`` examples.

    The numbers of the examples are no constant of it then, which would fix ``n``.

    Args:
      eqn: A gather or scatter, whose indices are a concatenation along their last axis.
      pieces: Parts of the indices; None for one that depends on data.

    Returns:
      The parts that are left, and the computation of the equation from its operand,
      these and its updates; None if no part counts the examples.
    """
    fields, numbers = _fields(eqn), eqn.params["dimension_numbers"]
    assert fields is not None
    axes = getattr(numbers, fields.places)
    if not 1 < len(pieces) == len(axes):
        return None  # Parts of several indices, or known ones.
    shape = eqn.invars[0].aval.shape
    for k, (piece, axis) in enumerate(zip(pieces, axes, strict=True)):
        if piece is None or axis not in getattr(numbers, fields.single):
            continue
        along = _counted_axis(piece, shape[axis])
        if along is None or along in getattr(numbers, fields.index_pairs):
            continue
        rest = [n for n in range(len(pieces)) if n != k]
        own = _with_pair(numbers, fields, axis, along)
        return rest, _computation(eqn, own, len(rest))
    return None


def _counted_axis(piece: np.ndarray, size: int) -> int | None:
    """Returns the axis along which an array counts from 0 to its size; None if none."""
    for d, n in enumerate(piece.shape[:-1]):
        count = np.arange(n).reshape([-1] + [1] * (piece.ndim - 1 - d))
        if n == size and np.array_equal(piece, np.broadcast_to(count, piece.shape)):
            return d
    return None


def _with_pair(numbers: Any, fields: _Fields, axis: int, along: int) -> Any:
    """Returns dimension numbers with an axis that operand and indices share."""
    get = lambda name: getattr(numbers, name)
    old = zip(get(fields.operand_pairs), get(fields.index_pairs), strict=True)
    pairs = sorted([*old, (axis, along)])
    without = lambda name: {name: tuple(d for d in get(name) if d != axis)}
    return numbers._replace(
        **without(fields.single),
        **without(fields.places),
        **{fields.operand_pairs: tuple(d for d, _ in pairs)},
        **{fields.index_pairs: tuple(d for _, d in pairs)},
    )


def _computation(eqn: Any, numbers: Any, count: int) -> Callable[..., list[Any]]:
    """Returns an equation with other dimension numbers and parts of its indices."""

    def compute(x: jax.Array, *others: jax.Array) -> list[jax.Array]:
        parts, updates = others[:count], others[count:]
        index = lax.concatenate(parts, parts[0].ndim - 1)
        params = {**eqn.params, "dimension_numbers": numbers}
        return [eqn.primitive.bind(x, index, *updates, **params)]

    return compute
