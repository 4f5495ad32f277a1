"""Moves of integers, and reductions to the largest or smallest, as in `jax.lax`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.graph.operations.record import (
    AXES,
    AXIS,
    ENDS,
    INTEGER,
    INTEGERS,
    TRIPLES,
    WINDOW,
    Ends,
    Operands,
    Operation,
    Shape,
    check_axes,
    joint_interval,
    pad_or_crop,
    pool_shape,
    same_interval,
    spread,
    window_sizes,
    window_taps,
)

# Choices.


def _pair_shape(o: Operands) -> Shape:
    ranks = [len(shape) for shape in o.shapes]
    o.check(len(set(ranks)) == 1, "inputs must have as many axes", ranks)
    return np.broadcast_shapes(*o.shapes)


def _reduced_shape(o: Operands) -> Shape:
    check_axes(o, o["axes"], len(o.x.shape))
    sizes = [o.x.shape[d] for d in o["axes"]]
    o.check(all(sizes), "axes of an extreme must not be empty", sizes)
    return tuple(n for d, n in enumerate(o.x.shape) if d not in o["axes"])


def _arg_shape(o: Operands) -> Shape:
    check_axes(o, [o["axis"]], len(o.x.shape))
    size = o.x.shape[o["axis"]]
    o.check(size > 0, "the axis of an extreme must not be empty", size)
    return tuple(n for d, n in enumerate(o.x.shape) if d != o["axis"])


def _arg_interval(o: Operands) -> Ends:
    return 0, o.x.shape[o["axis"]] - 1


def _extreme_pool_interval(o: Operands) -> Ends:
    names = "strides", "padding", "base_dilation", "dilation"
    window_sizes(o, o.x.shape, o["window"], names)  # Raises for axes cropped away.
    is_seen = sees_inputs(o.x.shape, o.attributes)
    o.check(is_seen, "each window must hold an input", dict(o.attributes))
    return same_interval(o)


def sees_inputs(shape: Shape, window: Mapping[str, Any]) -> bool:
    """Returns whether each window of a pool holds an input beside padding and holes.

    Args:
      shape: Shape of the inputs.
      window: Attributes of the pool.
    """
    names = "window", "strides", "padding", "base_dilation", "dilation"
    axes = zip(shape, *(window[name] for name in names), strict=True)
    for n, w, s, (low, high), b, d in axes:
        padded = max((n - 1) * b + 1, 0) + low + high
        size = max((padded - (w - 1) * d - 1) // s + 1, 0)
        # Places of the taps among the inputs, which are b apart.
        taps = np.arange(size)[:, None] * s - low + np.arange(w) * d
        held = (taps >= 0) & (taps <= (n - 1) * b) & (taps % b == 0)
        if not held.any(1).all():
            return False
    return True


def _pool(of: Callable[..., Any], fill: int) -> Any:
    return lambda a, own, xs: of(window_taps(a, xs[0], fill), axis=0)


# Moves.


def _concatenate_shape(o: Operands) -> Shape:
    axis, shapes = o["axis"], o.shapes
    check_axes(o, [axis], min(map(len, shapes)))
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    o.check(len(rest) == 1, f"inputs must differ along axis {axis} alone", shapes)
    size = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], size, *shapes[0][axis + 1 :])


def _reshape_sizes(sizes: Any, shape: Shape) -> list[int]:
    """Returns the sizes of a reshape with the open one, -1, filled in."""
    if -1 not in sizes:
        return list(sizes)
    known = math.prod(n for n in sizes if n != -1)
    if not known:  # Nothing is left but the leading size, if it is open.
        return [shape[0] if n == -1 else n for n in sizes]
    return [math.prod(shape) // known if n == -1 else n for n in sizes]


def _reshape_shape(o: Operands) -> Shape:
    sizes = o["sizes"]
    fits = all(n >= -1 for n in sizes) and list(sizes).count(-1) < 2
    o.check(fits, "`sizes` must be 0 or more, one may be open: -1", sizes)
    is_open = -1 in sizes
    o.check(not is_open or bool(o.x.shape), "an open size needs axes", o.x.shape)
    if is_open and 0 in sizes:
        o.check(sizes[0] == -1, "beside 0 only the first may be open", sizes)
    found = _reshape_sizes(sizes, o.x.shape)
    same = math.prod(found) == math.prod(o.x.shape)
    o.check(same, f"`sizes` must be those of {o.x.shape}", sizes)
    return tuple(found)


def _transpose_shape(o: Operands) -> Shape:
    order = list(o["permutation"])
    wanted = f"`permutation` must order {len(o.x.shape)} axes"
    o.check(sorted(order) == list(range(len(o.x.shape))), wanted, order)
    return tuple(o.x.shape[d] for d in order)


def _slices(a: Any) -> tuple[slice, ...]:
    return tuple(
        slice(*end) for end in zip(a["start"], a["stop"], a["steps"], strict=True)
    )


def _slice_shape(o: Operands) -> Shape:
    o.check(0 not in o["steps"], "`steps` must not be 0", o["steps"])
    pairs = zip(_slices(o), o.x.shape, strict=True)
    return tuple(len(range(*own.indices(n))) for own, n in pairs)


def _rev_shape(o: Operands) -> Shape:
    check_axes(o, o["axes"], len(o.x.shape))
    return o.x.shape


def _pad_shape(o: Operands) -> Shape:
    found = []
    for n, (low, high, inner) in zip(o.x.shape, o["padding"], strict=True):
        o.check(inner >= 0, "interior `padding` must not be negative", inner)
        size = max((n - 1) * (inner + 1) + 1, 0) + low + high
        o.check(size >= 0, f"`padding` must leave an axis of size {n}", size)
        found.append(size)
    return tuple(found)


def _pad_interval(o: Operands) -> Ends:
    code = o["padding_code"]
    return min(o.x.low, code), max(o.x.high, code)


def _pad(a, own, inputs):
    steps = [inner + 1 for _, _, inner in a["padding"]]
    whole = spread(inputs[0], steps, a["padding_code"])
    ends = [(low, high) for low, high, _ in a["padding"]]
    return pad_or_crop(whole, ends, a["padding_code"])


def _broadcast_shape(o: Operands) -> Shape:
    sizes, dimensions = o["sizes"], o["dimensions"]
    check_axes(o, dimensions, len(sizes))
    rises = list(dimensions) == sorted(dimensions)
    o.check(rises, "`dimensions` must rise", dimensions)
    own = dict(zip(dimensions, o.x.shape, strict=True))
    is_known = all(n is not None or d in own for d, n in enumerate(sizes))
    o.check(is_known, "`sizes` of new axes must be known", sizes)
    shape = tuple(own[d] if n is None else n for d, n in enumerate(sizes))
    fits = (
        all(n in (1, shape[d]) for d, n in own.items()) and min(shape, default=0) >= 0
    )
    o.check(fits, f"`sizes` must be those of {o.x.shape}, or its must be 1", sizes)
    return shape


def _broadcast(a, own, inputs):
    shape = [1] * len(a["sizes"])
    for d, n in zip(a["dimensions"], inputs[0].shape, strict=True):
        shape[d] = n
    sizes = [shape[d] if n is None else n for d, n in enumerate(a["sizes"])]
    return np.broadcast_to(inputs[0].reshape(shape), sizes)


def _extreme(name: str, of: Callable[..., Any]) -> Operation:
    return Operation(
        name,
        f"code = {name} of q over axes",
        "choice",
        _reduced_shape,
        same_interval,
        lambda a, own, xs: of(xs[0], axis=tuple(a["axes"])),
        attributes={"axes": AXES},
    )


def _extreme_pool(name: str, of: Callable[..., Any], fill: int) -> Operation:
    return Operation(
        f"{name}_pool",
        f"code = {name} of q over a window",
        "choice",
        pool_shape,
        _extreme_pool_interval,
        _pool(of, fill),
        attributes=WINDOW,
        each_axis=tuple(WINDOW),
    )


def _arg_extreme(name: str, of: Callable[..., Any]) -> Operation:
    return Operation(
        name,
        f"number = {name} of q along an axis, the first of equal ones",
        "choice",
        _arg_shape,
        _arg_interval,
        lambda a, own, xs: of(xs[0], axis=a["axis"]),
        attributes={"axis": AXIS},
    )


def _of_pair(name: str, of: Callable[..., Any]) -> Operation:
    return Operation(
        name,
        f"code = {name} of two",
        "choice",
        _pair_shape,
        joint_interval,
        lambda a, own, xs: of(*xs),
        inputs=2,
    )


_INT64 = np.iinfo(np.int64)

MOVES = (
    _of_pair("maximum", np.maximum),
    _of_pair("minimum", np.minimum),
    _arg_extreme("argmax", np.argmax),
    _arg_extreme("argmin", np.argmin),
    _extreme("max", np.max),
    _extreme("min", np.min),
    _extreme_pool("max", np.max, _INT64.min),
    _extreme_pool("min", np.min, _INT64.max),
    Operation(
        "concatenate",
        "code = q of each input, along an axis",
        "move",
        _concatenate_shape,
        joint_interval,
        lambda a, own, xs: np.concatenate(xs, a["axis"]),
        inputs=None,
        attributes={"axis": AXIS},
    ),
    Operation(
        "reshape",
        "code = q in another shape; a size of -1 is what is left",
        "move",
        _reshape_shape,
        same_interval,
        lambda a, own, xs: xs[0].reshape(_reshape_sizes(a["sizes"], xs[0].shape)),
        attributes={"sizes": INTEGERS},
    ),
    Operation(
        "transpose",
        "code = q, axes in another order",
        "move",
        _transpose_shape,
        same_interval,
        lambda a, own, xs: xs[0].transpose(a["permutation"]),
        attributes={"permutation": AXES},
        each_axis=("permutation",),
    ),
    Operation(
        "slice",
        "code = q[start:stop:steps], null for an end that is open",
        "move",
        _slice_shape,
        same_interval,
        lambda a, own, xs: xs[0][_slices(a)],
        attributes={"start": ENDS, "stop": ENDS, "steps": ENDS},
        each_axis=("start", "stop", "steps"),
    ),
    Operation(
        "rev",
        "code = q, backwards along axes",
        "move",
        _rev_shape,
        same_interval,
        lambda a, own, xs: np.flip(xs[0], a["axes"]),
        attributes={"axes": AXES},
    ),
    Operation(
        "pad",
        "code = q, with padding_code around it and between; negative sizes crop",
        "move",
        _pad_shape,
        _pad_interval,
        _pad,
        attributes={"padding": TRIPLES, "padding_code": INTEGER},
        each_axis=("padding",),
    ),
    Operation(
        "broadcast",
        "code = q along dimensions of a larger shape; a size of null is that of q",
        "move",
        _broadcast_shape,
        same_interval,
        _broadcast,
        attributes={"sizes": ENDS, "dimensions": AXES},
        each_axis=("dimensions",),
    ),
)
