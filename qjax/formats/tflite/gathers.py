"""Rules of the TFLite operators that choose among codes by integers.

An index outside of its axis is an error in TFLite: one that is known is refused here,
and inputs that choose take no others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.tflite.moves import take
from qjax.formats.tflite.tensors import Call, Tensor, TfliteRule

_MOST_CASES = 64  # Longest axis of computed codes that computed indices choose from.


def _gather(call: Call) -> None:
    """Takes slices along an axis: ``y = x[..., indices, ...]``.

    The first ``batch_dims`` axes are those of the indices too.
    """
    x, indices = call.tensor(), call.tensor(1)
    axis = call.axis(call.option("axis", 0), len(x.shape))
    batch = int(call.option("batch_dims", 0))
    batch += len(indices.shape) if batch < 0 else 0
    if not 0 <= batch <= min(axis, len(indices.shape)):
        raise ValueError(
            f"`batch_dims` must lie within the axes of the indices {indices.shape}, "
            f"before axis {axis}, got {call.option('batch_dims', 0)}"
        )
    if x.shape[:batch] != indices.shape[:batch]:
        raise ValueError(
            f"the first {batch} sizes of {x.shape} must be those of the indices "
            f"{indices.shape}"
        )
    if indices.data is not None:
        _by_known(call, axis, batch, np.asarray(indices.data))
    elif x.data is not None and not batch:
        _from_table(call, axis, x, 1)
    else:
        _among_cases(call, axis, batch)


def _by_known(call: Call, axis: int, batch: int, indices: np.ndarray) -> None:
    size = call.tensor().shape[axis]
    ends = indices.min(initial=0), indices.max(initial=0)
    if ends[0] < 0 or indices.size and ends[1] >= size:
        raise ValueError(
            f"indices must lie in [0, {size - 1}], as TFLite's kernels check, got "
            f"{ends[0]} to {ends[1]}"
        )
    if axis and not batch:
        take(call, lambda x: np.take(x, indices, axis - 1))
        return
    value = call.value()
    shape = call.known(value).shape
    places = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = _gathered(places, indices, axis, batch)
    if not shape[0]:
        raise call.refuse(f"codes of shape {shape}")
    call.move("take", (value,), params={"places": found}, crosses_examples=shape[0])


def _gathered(x: np.ndarray, at: np.ndarray, axis: int, batch: int) -> np.ndarray:
    """Gathers from an array by known indices."""
    if not batch:
        return np.take(x, at, axis)
    shape = (*x.shape[:axis], *at.shape[batch:], *x.shape[axis + 1 :])
    found = np.empty(shape, x.dtype)
    for b in np.ndindex(*x.shape[:batch]):
        found[b] = np.take(x[b], at[b], axis - batch)
    return found


def _from_table(call: Call, axis: int, x: Tensor, place: int) -> None:
    """Looks constant codes up; ``place`` is that of the indices among the inputs."""
    value, size = call.value(place), x.shape[axis]
    _check_within(call, value, size)
    rank = len(call.known(value).shape)
    data = np.asarray(x.data)
    if x.storage != call.output().storage:
        raise call.refuse("an output of another type")
    rows = np.moveaxis(data, axis, 0).astype(x.storage)
    if np.any(rows != np.moveaxis(data, axis, 0)):
        raise call.refuse("a table of int64 that leaves int32")
    params = {"kernel": rows.copy()}
    if not axis:
        call.emit("embed", (value,), params=params)
        return
    found = call.add("embed", (value,), is_output=True, params=params)
    before = range(rank, rank + axis)
    after = range(rank + axis, rank + len(x.shape) - 1)
    call.emit("transpose", (found,), permutation=[*before, *range(rank), *after])


def _among_cases(call: Call, axis: int, batch: int) -> None:
    """Selects among all slices along an axis."""
    x, at = call.value(), call.value(1)
    shape, indices = call.known(x).shape, call.known(at).shape
    size = shape[axis]
    if not 0 < size <= _MOST_CASES:
        raise call.refuse(
            f"computed indices of an axis of {size} computed codes",
            f" Known are up to {_MOST_CASES}, and any number of constant ones.",
        )
    _check_within(call, at, size)
    call.check_type((x,))
    chosen, rest = indices[batch:], shape[axis + 1 :]
    out = (*shape[:axis], *chosen, *rest)
    ones = lambda n: (1,) * n
    which = (*indices[:batch], *ones(axis - batch), *chosen, *ones(len(rest)))
    which_value = _spread(call, at, which, out)
    cases = []
    for k in range(size):
        ends: list[Any] = [[None, None]] * len(shape)
        ends[axis] = [k, k + 1]
        start, stop = (list(end) for end in zip(*ends, strict=True))
        steps = [1] * len(shape)
        options: Any = {"start": start, "stop": stop, "steps": steps}
        case = call.add("slice", (x,), like=x, **options)
        one = (*shape[:axis], *ones(len(chosen)), *rest)
        cases.append(_spread(call, case, one, out))
    if size == 1:
        cases *= 2
    call.emit("select", (which_value, *cases))


def _spread(call: Call, value: int, shape: Sequence[int], out: Sequence[int]) -> int:
    """Repeats a value, once it has the shape ``shape``, along its axes of size 1."""
    value = call.reshaped(value, shape)
    sizes: list[int | None] = [
        None if m == n else m for m, n in zip(out, shape, strict=True)
    ]
    if all(n is None for n in sizes):
        return value
    dimensions = list(range(len(sizes)))
    return call.add(
        "broadcast", (value,), like=value, sizes=sizes, dimensions=dimensions
    )


def _check_within(call: Call, value: int, size: int) -> None:
    v = call.known(value)
    if v.low < 0 or v.high >= size:
        raise call.refuse(
            f"indices from {v.low} to {v.high} of an axis of {size}",
            " Indices are known to stay within it if they are all of an input, or the "
            "places that ARG_MAX finds along such an axis, moved at most.",
        )


def _embedding_lookup(call: Call) -> None:
    x = call.tensor(1)
    if x.data is None or not x.shape or len(call.tensor().shape) != 1:
        raise call.refuse(f"ids of shape {call.tensor().shape} and rows {x.name!r}")
    if call.tensor().data is not None:
        raise call.refuse("known ids")
    _from_table(call, 0, x, 0)


def _cast(call: Call) -> None:
    """Passes integers on: int32 and int64 are one here."""
    if not (call.tensor().is_number and call.output().is_number):
        kinds = call.tensor().dtype, call.output().dtype
        raise call.refuse(f"types {kinds[0]} to {kinds[1]}")
    call.growth.bind(call.op.outputs[0], call.value())


# Operator -> its rule.
GATHERS: Mapping[str, TfliteRule] = {
    "CAST": _cast,
    "EMBEDDING_LOOKUP": _embedding_lookup,
    "GATHER": _gather,
}
