"""Rules of the TFLite operators that choose among codes by integers.

An index outside of its axis is an error in TFLite: one that is known is refused here,
and inputs that choose take no others.
"""

import math
from collections.abc import Mapping

import numpy as np

from qjax.formats.tflite.moves import take
from qjax.formats.tflite.tensors import Call, Tensor, TfliteRule


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
        _at_places(call, axis, batch)


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


def _at_places(call: Call, axis: int, batch: int) -> None:
    """Gathers computed codes at computed places."""
    x, at = call.value(), call.value(1)
    shape, indices = call.known(x).shape, call.known(at).shape
    _check_within(call, at, shape[axis])
    call.check_type((x,))
    own, chosen = list(range(batch)), len(indices) - batch
    rank = len(shape) - 1 + chosen
    call.emit(
        "gather",
        (x, call.reshaped(at, (*indices, 1))),
        offset_dims=[*range(batch, axis), *range(axis + chosen, rank)],
        collapsed_slice_dims=[axis],
        start_index_map=[axis],
        operand_batching_dims=own,
        start_indices_batching_dims=own,
        slice_sizes=[1 if d in (*own, axis) else None for d in range(len(shape))],
        mode="clip",
        fill=0,
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
