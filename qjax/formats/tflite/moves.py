"""Rules of the TFLite operators that take their codes from their inputs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.tflite.products import operands
from qjax.formats.tflite.rules import axes, pool, reduced_shape
from qjax.formats.tflite.tensors import Call, TfliteRule, any_batch
from qjax.graph import tflite_tables as tables


def _reshape(call: Call) -> None:
    sizes = call.constant(1) if call.has(1) else call.option("new_shape", None)
    if sizes is None:
        raise call.refuse("no shape")
    _into(call, [int(n) for n in np.ravel(sizes)])


def _squeeze(call: Call) -> None:
    shape = call.tensor().shape
    axes = [call.axis(d, len(shape)) for d in call.option("squeeze_dims", ())]
    axes = axes or [d for d, n in enumerate(shape) if n == 1]
    _into(call, [n for d, n in enumerate(shape) if d not in axes])


def _expand_dims(call: Call) -> None:
    shape = call.tensor().shape
    axis = call.axis(call.constant(1), len(shape) + 1)
    _into(call, [*shape[:axis], 1, *shape[axis:]])


def _into(call: Call, shape: Sequence[int]) -> None:
    """Reshapes codes; one size may be -1.

    A shape that the file fixes has the batch of the file as its leading size: another
    one takes its place.
    """
    value = call.value()
    own = call.known(value).shape
    file = call.growth.file[call.op.inputs[0]].shape
    is_batch = bool(len(shape)) and own[:1] != file[:1] == tuple(shape[:1])
    if is_batch and math.prod(shape) == math.prod(file):
        shape = [-1, *shape[1:]]
    whole = np.broadcast_to(0, own).reshape(shape).shape
    call.move("reshape", (value,), sizes=any_batch(whole))


def _transpose(call: Call) -> None:
    rank = len(call.tensor().shape)
    order = [call.axis(d, rank) for d in np.ravel(call.constant(1))]
    call.move("transpose", (call.value(),), permutation=order)


def _pad(call: Call) -> None:
    code = call.y.zero_point
    if call.op.name == "PADV2":
        code = int(np.ravel(call.constant(2))[0])
    padding = [[int(a), int(b), 0] for a, b in call.constant(1)]
    if min((n for pair in padding for n in pair), default=0) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    call.emit("pad", (call.value(),), padding=padding, padding_code=code)


# Largest and smallest.


def _extreme(call: Call) -> None:
    _check_same_grids(call)
    call.move(call.op.name.lower(), operands(call))


def _check_same_grids(call: Call, count: int | None = None) -> None:
    places = range(len(call.op.inputs) if count is None else count)
    if any(call.codes(place)[:2] != call.y[:2] for place in places):
        raise call.refuse("different scales")


def _max_pool(call: Call) -> None:
    value, (low, high), (_, attributes) = call.value(), call.activation(), pool(call)
    if (low, high) == (call.y.low, call.y.high):
        call.move("max_pool", (value,), **attributes)
        return
    found = call.add("max_pool", (value,), like=value, **attributes)
    call.emit("clip", (found,), low=low, high=high)


def _reduce_extreme(call: Call) -> None:
    _check_same_grids(call, 1)
    value, over = call.value(), axes(call)
    v, operation = call.known(value), call.op.name.removeprefix("REDUCE_").lower()
    found = call.add(operation, (value,), like=value, axes=over)
    after = reduced_shape(call, v.shape, over)
    call.move("reshape", (found,), sizes=any_batch(after))


def _arg_extreme(call: Call) -> None:
    """Finds the first place of the largest or least code: integers without a grid."""
    value, shape = call.value(), call.tensor().shape
    axis = call.axis(call.constant(1), len(shape))
    operation = call.op.name.lower().replace("_", "")
    found = call.add(operation, (value,), axis=axis)
    call.growth.bind(call.op.outputs[0], found)


# Joining and cutting.


def _tile(call: Call) -> None:
    multiples, value = [int(n) for n in np.ravel(call.constant(1))], call.value()
    rank = len(call.known(value).shape)
    if len(multiples) != rank or min(multiples, default=0) < 0:
        raise ValueError(f"multiples {multiples} are no {rank} numbers, 0 or more")
    if not rank:
        call.move("reshape", (value,), sizes=[])
        return
    first, *rest = multiples
    if first > 1:
        value = call.add("concatenate", (value,) * first, like=value, axis=0)
    if not first:
        ends: Any = {
            "start": [None] * rank,
            "stop": [0, *[None] * len(rest)],
        }
        ends |= {"steps": [1] * rank}
        value = call.add("slice", (value,), like=value, **ends)
    take(call, lambda x: np.tile(x, rest), value)


def _concatenate(call: Call) -> None:
    call.option("fused_activation_function", "NONE", "NONE")
    values = [_on_output_grid(call, place) for place in range(len(call.op.inputs))]
    axis = call.axis(call.option("axis", 0), len(call.known(values[0]).shape))
    _joined(call, values, axis)


def _joined(call: Call, values: Sequence[int], axis: int) -> None:
    call.move("concatenate", values, axis=axis)


def _on_output_grid(call: Call, place: int) -> int:
    """Takes an input of a concatenation to the output's grid; only uint8 may differ."""
    x, y, value = call.codes(place), call.y, call.value(place)
    if x[:2] == y[:2]:
        return value
    v = call.known(value)
    if v.dtype != "uint8":
        raise call.refuse(f"different scales of {v.dtype}")
    table = tables.requantized_table(x, y)[v.low - x.low : v.high - x.low + 1]
    params = {"table": table.astype(v.dtype)}
    ends: Any = {"low": v.low, "axis": None}
    return call.add("table", (value,), like=value, params=params, **ends)


def _pack(call: Call) -> None:
    _check_same_grids(call)
    shape = call.tensor().shape
    axis = call.axis(call.option("axis", 0), len(shape) + 1)
    part = (*shape[:axis], 1, *shape[axis:])
    places = range(len(call.op.inputs))
    _joined(call, [call.reshaped(call.value(place), part) for place in places], axis)


def _slice(call: Call) -> None:
    starts, sizes = call.constant(1).tolist(), call.constant(2).tolist()
    pairs = list(zip(starts, sizes, strict=True))
    known = (call.known(call.value()).shape, call.growth.file[call.op.inputs[0]].shape)
    for (a, n), size, file in zip(pairs, *known, strict=True):
        if not 0 <= a <= size or n < -1 or a + n > size and (a, n) != (0, file):
            raise ValueError(f"{n} from {a} on lie not within {size}")
    _cut(call, [slice(a, None if n == -1 else a + n) for a, n in pairs])


def _strided_slice(call: Call) -> None:
    for name in ("ellipsis_mask", "new_axis_mask"):
        call.option(name, 0, 0)
    call.option("offset", False, False)
    shape = call.tensor().shape
    masks = [
        int(call.option(f"{name}_mask", 0)) for name in ("begin", "end", "shrink_axis")
    ]
    cuts = [slice(None)] * len(shape)
    ends = zip(*(call.constant(place).tolist() for place in (1, 2, 3)), strict=True)
    for d, (start, stop, step) in enumerate(ends):
        no_start, no_stop, single = (mask >> d & 1 for mask in masks)
        cuts[d] = slice(None if no_start else start, None if no_stop else stop, step)
        if single:
            cuts[d] = _single(call, 0 if no_start else start, step, shape[d])
    dropped = [d for d in range(len(shape)) if masks[2] >> d & 1]
    _cut(call, cuts, dropped=dropped)


def _single(call: Call, start: int, step: int, size: int) -> slice:
    """Cuts one place out; one before the first is the first, as in TFLite."""
    if step < 1 or not start < size:
        raise call.refuse(f"a single place {start} of {size}, in steps of {step},")
    first = max(start + size if start < 0 else start, 0)
    return slice(first, first + 1)


def _split(call: Call) -> None:
    source = 1 if call.op.name == "SPLIT" else 0
    shape = call.tensor(source).shape
    is_unpack, count = call.op.name == "UNPACK", len(call.op.outputs)
    found = call.option("axis", 0) if is_unpack else call.constant(0 if source else 2)
    axis = call.axis(found, len(shape))
    given, is_open = [shape[axis] // count] * count, False
    if is_unpack:
        given = [1] * count
    if call.op.name == "SPLIT_V":
        given = [int(n) for n in np.ravel(call.constant(1))]
        is_open = given[-1:] == [-1]
    sizes = _parts(given, shape[axis], count)
    start = 0
    for place, size in enumerate(sizes):
        cuts, stop = [slice(None)] * len(shape), start + size
        is_last = is_open and place == count - 1
        cuts[axis] = slice(start, None if is_last else stop)
        start = stop
        _cut(call, cuts, source, place, [axis] if is_unpack else [])


def _parts(sizes: Sequence[int], size: int, count: int) -> list[int]:
    """Returns the sizes of the parts of an axis; one may be -1, what is left."""
    left = size - sum(n for n in sizes if n != -1)
    is_open = -1 in sizes
    fits = left >= 0 if is_open else not left
    if not fits or len(sizes) != count or sizes.count(-1) > 1 or min(sizes) < -1:
        raise ValueError(f"{list(sizes)} split no axis of size {size} into {count}")
    return [left if n == -1 else n for n in sizes]


def _cut(
    call: Call,
    cuts: Sequence[slice],
    source: int = 0,
    place: int = 0,
    dropped: Sequence[int] = (),
) -> None:
    """Cuts a part out of an input; an axis that stays whole may have any size."""
    value = call.value(source)
    v = call.known(value)
    call.check_type((value,), place)
    file = call.growth.file[call.op.inputs[source]].shape
    own = (*file[:1], *v.shape[1:])  # All of the batch that the file has is all.
    whole = [cut.indices(n) == (0, n, 1) for cut, n in zip(cuts, own, strict=True)]
    cuts = [slice(0, None, 1) if w else c for w, c in zip(whole, cuts, strict=True)]
    attributes: dict[str, Any] = {
        "start": [cut.start for cut in cuts],
        "stop": [cut.stop for cut in cuts],
        "steps": [cut.step for cut in cuts],
    }
    if not dropped:
        call.emit("slice", (value,), place=place, **attributes)
        return
    found = call.add("slice", (value,), like=value, **attributes)
    shape = call.known(found).shape
    sizes = any_batch([n for d, n in enumerate(shape) if d not in dropped])
    call.emit("reshape", (found,), place=place, sizes=sizes)


# Blocks.


def _space_to_batch(call: Call) -> None:
    value, code = call.value(), call.y.zero_point
    v, (block, padding) = call.known(value), _blocks(call)
    n, rest = len(block), v.shape[1 + len(block) :]
    config = [[0, 0, 0], *([a, b, 0] for a, b in padding), *[[0, 0, 0]] * len(rest)]
    shape = [m + a + b for m, (a, b, _) in zip(v.shape, config, strict=True)]
    pad: dict[str, Any] = {"padding": config, "padding_code": code}
    value = call.add("pad", (value,), like=value, **pad)
    pairs = [k for m, b in zip(shape[1:], block, strict=False) for k in (m // b, b)]
    value = call.reshaped(value, (shape[0], *pairs, *rest))
    tail = range(2 * n + 1, 2 * n + 1 + len(rest))
    order = [*range(2, 2 * n + 1, 2), 0, *range(1, 2 * n, 2), *tail]
    value = _transposed(call, value, order)
    inner = [m // b for m, b in zip(shape[1:], block, strict=False)]
    after = [shape[0] * math.prod(block), *inner, *rest]
    call.move("reshape", (value,), sizes=any_batch(after))


def _batch_to_space(call: Call) -> None:
    value = call.value()
    v, (block, crops) = call.known(value), _blocks(call)
    n, batch = len(block), v.shape[0] // math.prod(block)
    if v.shape[0] % math.prod(block):
        raise ValueError(f"{v.shape[0]} examples are no blocks of {block}")
    sizes = [*block, -1, *v.shape[1:]]
    shape = [*block, batch, *v.shape[1:]]
    value = call.add("reshape", (value,), like=value, sizes=sizes)
    tail = range(2 * n + 1, len(shape))
    order = [n, *(k for d in range(n) for k in (n + 1 + d, d)), *tail]
    value = _transposed(call, value, order)
    inner = [m * b for m, b in zip(v.shape[1:], block, strict=False)]
    value = call.reshaped(value, (batch, *inner, *v.shape[1 + n :]))
    kept = [[a, m - b] for m, (a, b) in zip(inner, crops, strict=True)]
    ends_ = [[0, None], *kept, *[[0, None]] * len(tail)]
    start, stop = (list(part) for part in zip(*ends_, strict=True))
    steps = [1] * len(start)
    call.move("slice", (value,), start=start, stop=stop, steps=steps)


def _blocks(call: Call) -> tuple[list[int], list[list[int]]]:
    """Returns the sizes of a block, and the paddings or crops of its axes."""
    return call.constant(1).tolist(), call.constant(2).tolist()


def _transposed(call: Call, value: int, order: list[int]) -> int:
    return call.add("transpose", (value,), like=value, permutation=order)


# Places within each example.


def take(
    call: Call, move: Callable[[np.ndarray], np.ndarray], value: int | None = None
) -> None:
    """Moves the codes of each example as ``move`` moves their places.

    Args:
      call: The operator.
      move: Maps the places of an example, of its shape, to the places to take.
      value: What to take from; None for the first input.
    """
    value = call.value() if value is None else value
    shape = call.known(value).shape[1:]
    places = move(np.arange(math.prod(shape), dtype=np.int32).reshape(shape))
    call.move("take", (value,), params={"places": places.copy()})


def _mirror_pad(call: Call) -> None:
    mode = call.option("mode", "REFLECT", "REFLECT", "SYMMETRIC").lower()
    first, *padding = call.constant(1).tolist()
    if any(first):
        raise call.refuse("padding of the leading axis")
    most = [n - (mode == "reflect") for n in call.tensor().shape[1:]]
    pairs = zip(padding, most, strict=True)
    if any(min(pair) < 0 or max(pair) > n for pair, n in pairs):
        raise ValueError(f"padding must lie in 0 to {most}, got {padding}")
    take(call, lambda x: np.pad(x, padding, mode))


def _space_to_depth(call: Call) -> None:
    (_, h, w, c), b = call.tensor().shape, int(call.option("block_size", 1))

    def move(x: np.ndarray) -> np.ndarray:
        x = x.reshape(h // b, b, w // b, b, c).transpose(0, 2, 1, 3, 4)
        return x.reshape(h // b, w // b, b * b * c)

    take(call, move)


def _depth_to_space(call: Call) -> None:
    (_, h, w, c), b = call.tensor().shape, int(call.option("block_size", 1))

    def move(x: np.ndarray) -> np.ndarray:
        x = x.reshape(h, w, b, b, c // b**2).transpose(0, 2, 1, 3, 4)
        return x.reshape(h * b, w * b, c // b**2)

    take(call, move)


def _resize_nearest(call: Call) -> None:
    rows, columns = (tables.nearest_places(*s, **_aligned(call)) for s in _sizes(call))
    take(call, lambda x: x[rows][:, columns])


def _resize_bilinear(call: Call) -> None:
    make: Callable[..., Any] = tables.bilinear_places
    if call.tensor().dtype == "uint8":
        make = tables.exact_bilinear_places
    rows, columns = (make(*sizes, **_aligned(call)) for sizes in _sizes(call))
    if rows is None or columns is None:
        raise call.refuse("places of uint8 that float32 arithmetic rounds")
    params = {"rows": np.int32(rows), "columns": np.int32(columns)}
    call.move("tflite_resize", (call.value(),), params=params)


def _aligned(call: Call) -> dict[str, bool]:
    names = ("align_corners", "half_pixel_centers")
    return {name: bool(call.option(name, False)) for name in names}


def _sizes(call: Call) -> list[tuple[int, int]]:
    """Returns rows and columns, before and after a resize."""
    return list(zip(call.tensor().shape[1:3], call.constant(1).tolist(), strict=True))


# Shapes that operators compute.


def fold(call: Call) -> None:
    """Computes integers that are no codes, such as a shape, if they are known.

    Whoever needs what is not known says so.
    """
    inputs = [call.tensor(place) for place in range(len(call.op.inputs))]
    if call.op.name == "SHAPE":
        found = np.array(inputs[0].shape, call.output().dtype)
    elif call.op.name in _FOLDS and all(t.data is not None for t in inputs):
        found = _FOLDS[call.op.name](call, *(np.asarray(t.data) for t in inputs))
    else:
        call.growth.unknown |= dict.fromkeys(call.op.outputs, call.op.name)
        return
    k = call.op.outputs[0]
    tensors = call.growth.tensors
    tensors[k] = dataclasses.replace(tensors[k], shape=found.shape, data=found)


def _fold_gather(call: Call, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    call.option("batch_dims", 0, 0)
    axis = call.axis(call.option("axis", 0), x.ndim)
    if np.any((places < 0) | (places >= x.shape[axis])):
        raise ValueError(f"indices {places.tolist()} leave an axis of {x.shape[axis]}")
    return np.take(x, places, axis)


def _fold_slice(call: Call, x: np.ndarray, *ends: np.ndarray) -> np.ndarray:
    if x.ndim != 1:
        raise call.refuse(f"known integers of shape {x.shape}")
    start, stop, step = (int(np.ravel(end)[0]) for end in ends)
    no_start, no_stop, single = (
        int(call.option(f"{name}_mask", 0)) for name in ("begin", "end", "shrink_axis")
    )
    if single:
        return x[0 if no_start else start]
    return x[None if no_start else start : None if no_stop else stop : step]


_FOLDS: dict[str, Callable[..., np.ndarray]] = {
    "ADD": lambda call, a, b: a + b,
    "CAST": lambda call, x: x.astype(call.output().dtype),
    "CONCATENATION": lambda call, *xs: np.concatenate(
        xs, call.axis(call.option("axis", 0), xs[0].ndim)
    ),
    "GATHER": _fold_gather,
    "MUL": lambda call, a, b: a * b,
    "PACK": lambda call, *xs: np.stack(
        xs, call.axis(call.option("axis", 0), xs[0].ndim + 1)
    ),
    "REDUCE_PROD": lambda call, x, axes: np.prod(x, dtype=x.dtype),
    "RESHAPE": lambda call, x, shape: x.reshape(shape),
    "SQUEEZE": lambda call, x: np.squeeze(x),
    "STRIDED_SLICE": _fold_slice,
    "SUB": lambda call, a, b: a - b,
}


# Operator -> its rule.
MOVES: Mapping[str, TfliteRule] = {
    "RESHAPE": _reshape,
    "SQUEEZE": _squeeze,
    "EXPAND_DIMS": _expand_dims,
    "TRANSPOSE": _transpose,
    "PAD": _pad,
    "PADV2": _pad,
    "MAXIMUM": _extreme,
    "MINIMUM": _extreme,
    "MAX_POOL_2D": _max_pool,
    "REDUCE_MAX": _reduce_extreme,
    "REDUCE_MIN": _reduce_extreme,
    "ARG_MAX": _arg_extreme,
    "ARG_MIN": _arg_extreme,
    "TILE": _tile,
    "CONCATENATION": _concatenate,
    "PACK": _pack,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "SPLIT": _split,
    "SPLIT_V": _split,
    "UNPACK": _split,
    "SPACE_TO_BATCH_ND": _space_to_batch,
    "BATCH_TO_SPACE_ND": _batch_to_space,
    "MIRROR_PAD": _mirror_pad,
    "SPACE_TO_DEPTH": _space_to_depth,
    "DEPTH_TO_SPACE": _depth_to_space,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest,
    "RESIZE_BILINEAR": _resize_bilinear,
}
