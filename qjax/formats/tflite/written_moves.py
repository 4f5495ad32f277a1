"""Moves of a program as TFLite operators."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qjax.formats.support import unsupported
from qjax.formats.tflite.emission import WRITER, TfliteGraph
from qjax.graph.graph import Node


def _reshape(emission: TfliteGraph, node: Node, t: int) -> int:
    return emission.reshaped(t, emission.value(node.output).shape, node.path)


def _transpose(emission: TfliteGraph, node: Node, t: int) -> int:
    return emission.transposed(t, node.attributes["permutation"], node.path)


def _slice(emission: TfliteGraph, node: Node, t: int) -> int:
    a, shape = node.attributes, emission.tensors[t].shape
    return _strided(emission, node, t, a["start"], a["stop"], a["steps"], shape)


def _rev(emission: TfliteGraph, node: Node, t: int) -> int:
    shape = emission.tensors[t].shape
    steps = [-1 if d in node.attributes["axes"] else 1 for d in range(len(shape))]
    none = [None] * len(shape)
    return _strided(emission, node, t, none, none, steps, shape)


def _strided(
    emission: TfliteGraph,
    node: Node,
    t: int,
    start: Any,
    stop: Any,
    steps: Any,
    shape: Any,
) -> int:
    """Cuts a part out; ends that are open stay so, as masks."""
    if len(shape) > 5:
        raise unsupported(WRITER, node, f"a slice of {len(shape)} axes")
    masks = [sum((end is None) << d for d, end in enumerate(e)) for e in (start, stop)]
    ends = [[0 if n is None else n for n in e] for e in (start, stop)]
    strides = [1 if n is None else n for n in steps]
    given = (t, *map(emission.constant, (*ends, strides)))
    out = emission.add_like(t, emission.value(node.output).shape, node.path)
    options: Any = {"begin_mask": masks[0], "end_mask": masks[1]}
    zeros: Any = dict.fromkeys(
        ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask"), 0
    )
    return emission.add("STRIDED_SLICE", given, out, **options, **zeros)


def padded(emission: TfliteGraph, node: Node, t: int) -> int:
    """Pads codes with a code that the node names."""
    a, shape = node.attributes, emission.value(node.output).shape
    widths = [list(p[:2]) for p in a["padding"]]
    if any(p[2] for p in a["padding"]) or min(map(min, widths), default=0) < 0:
        raise unsupported(WRITER, node, f"padding {a['padding']}")
    out = emission.add_like(t, shape, node.path)
    own = emission.tensors[t]
    given = [t, emission.constant(widths)]
    if own.zero_point == (a["padding_code"],):
        return emission.add("PAD", given, out)
    like = t if own.scale else None
    given.append(emission.constant([a["padding_code"]], own.dtype, like=like))
    return emission.add("PADV2", given, out)


def _broadcast(emission: TfliteGraph, node: Node, t: int) -> int:
    """Repeats codes along axes of size 1."""
    a, shape = node.attributes, emission.value(node.output).shape
    own = emission.tensors[t].shape
    sizes = [1] * len(shape)
    for d, n in zip(a["dimensions"], own, strict=True):
        sizes[d] = n
    t = emission.reshaped(t, sizes)
    times = [n // m if m else 1 for n, m in zip(shape, sizes, strict=True)]
    if all(n == 1 for n in times):
        return t
    out = emission.add_like(t, shape, node.path)
    return emission.add("TILE", (t, emission.constant(times)), out)


def _take(emission: TfliteGraph, node: Node, t: int) -> int:
    """Gathers by known places within each example."""
    places = emission.params[node.params["places"]]
    shape = emission.tensors[t].shape
    if "crosses_examples" in node.attributes:
        flat = emission.reshaped(t, (math.prod(shape),))
        out = emission.add_like(t, places.shape, node.path)
        return emission.add("GATHER", (flat, emission.constant(places)), out, axis=0)
    flat = emission.reshaped(t, (shape[0], math.prod(shape[1:])))
    out = emission.add_like(t, (shape[0], *places.shape), node.path)
    return emission.add("GATHER", (flat, emission.constant(places)), out, axis=1)


def _over_axes(emission: TfliteGraph, node: Node, t: int) -> int:
    axes = emission.constant(node.attributes["axes"])
    out = emission.add_like(t, emission.value(node.output).shape, node.path)
    name = f"REDUCE_{node.operation.upper()}"
    return emission.add(name, (t, axes), out, keep_dims=False)


def _max_pool(emission: TfliteGraph, node: Node, t: int) -> int:
    options = pool_options(emission, node)
    options["fused_activation_function"] = "NONE"
    out = emission.add_like(t, emission.value(node.output).shape, node.path)
    return emission.add("MAX_POOL_2D", (t,), out, **options)


def pool_options(emission: TfliteGraph, node: Node) -> dict[str, Any]:
    """Returns the options of a pool; raises unless it is over rows and columns."""
    a, shape = node.attributes, emission.value(node.inputs[0]).shape
    ones = all(n == 1 for name in ("base_dilation", "dilation") for n in a[name])
    is_image = len(shape) == 4 and [a["window"][d] for d in (0, 3)] == [1, 1]
    if not ones or not is_image or [a["strides"][d] for d in (0, 3)] != [1, 1]:
        raise unsupported(WRITER, node, "a window that is not over rows and columns")
    spatial = (1, 2)
    pads = [tuple(a["padding"][d]) for d in spatial]
    taps = [a["window"][d] for d in spatial]
    steps = [a["strides"][d] for d in spatial]
    kind = padding([shape[d] for d in spatial], taps, steps, pads)
    if kind is None or any(map(any, (a["padding"][d] for d in (0, 3)))):
        raise unsupported(WRITER, node, f"a pool with padding {a['padding']}")
    return {
        "padding": kind,
        "stride_h": steps[0],
        "stride_w": steps[1],
        "filter_height": taps[0],
        "filter_width": taps[1],
    }


def padding(
    sizes: Sequence[int],
    reach: Sequence[int],
    steps: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> str | None:
    """Returns TFLite's name for the padding of a window; None if it has none.

    Args:
      sizes: Sizes of the input.
      reach: Places from the first to the last of a window.
      steps: Strides.
      pads: Padding before and after each axis.
    """
    same = []
    for n, taps, step in zip(sizes, reach, steps, strict=True):
        total = max((-(-n // step) - 1) * step + taps - n, 0)
        same.append((total // 2, total - total // 2))
    if all(pad == (0, 0) for pad in pads):
        return "VALID"
    return "SAME" if list(map(tuple, pads)) == same else None


# Operation -> what writes it: from the tensor of its input to that of its output.
MOVES: Mapping[str, Callable[[TfliteGraph, Node, int], int]] = {
    "broadcast": _broadcast,
    "max": _over_axes,
    "max_pool": _max_pool,
    "min": _over_axes,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "take": _take,
    "transpose": _transpose,
}
