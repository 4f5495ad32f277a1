"""C code of moves."""

from collections.abc import Sequence

from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import number, place


def _copy(
    c: CNode,
    x: CArray,
    sizes: Sequence[int],
    strides: Sequence[int],
    to: Sequence[int],
    ends: tuple[int, int] = (0, 0),
) -> None:
    """Adds a copy from places to places, both linear in the loops.

    Args:
      c: The call.
      x: What is copied.
      sizes: Sizes of the loops.
      strides: Strides of the input.
      to: Strides of the output.
      ends: First place of the input and of the output.
    """
    with c.source.loops(sizes) as names:
        value = f"{x.name}[{place(names, strides, ends[0])}]"
        c.put(f"{c.output.name}[{place(names, to, ends[1])}]", value)


def concatenate(c: CNode) -> None:
    """Adds values one behind the other."""
    axis, at = c["axis"], 0
    for x in c.inputs:
        start = at * c.output.strides[axis]
        _copy(c, x, x.shape, x.strides, c.output.strides, (0, start))
        at += x.shape[axis]


def reshape(c: CNode) -> None:
    """Adds the same elements in order."""
    _copy(c, c.x, [c.x.size], [1], [1])


def transpose(c: CNode) -> None:
    """Adds axes in another order."""
    own = [c.x.strides[d] for d in c["permutation"]]
    _copy(c, c.x, c.output.shape, own, c.output.strides)


def slices(c: CNode) -> None:
    """Adds a slice with steps."""
    start, strides = 0, []
    ends = zip(c["start"], c["stop"], c["steps"], strict=True)
    for (a, b, s), n, stride in zip(ends, c.x.shape, c.x.strides, strict=True):
        first, _, step = slice(a, b, s).indices(n)
        start += first * stride
        strides.append(step * stride)
    _copy(c, c.x, c.output.shape, strides, c.output.strides, (start, 0))


def rev(c: CNode) -> None:
    """Adds axes backwards."""
    axes = {d % len(c.x.shape) for d in c["axes"]}
    pairs = list(enumerate(zip(c.x.shape, c.x.strides, strict=True)))
    start = sum((n - 1) * s for d, (n, s) in pairs if d in axes)
    strides = [-s if d in axes else s for d, (_, s) in pairs]
    _copy(c, c.x, c.output.shape, strides, c.output.strides, (start, 0))


def pad(c: CNode) -> None:
    """Adds a value with a code around it and between; negative sizes crop."""
    with c.each() as names:
        c.put(c.output.at(names), number(c["padding_code"]))
    sizes, start, end, to = [], 0, 0, []
    axes = zip(
        c["padding"],
        c.x.shape,
        c.x.strides,
        c.output.shape,
        c.output.strides,
        strict=True,
    )
    for (low, _, inner), n, stride, whole, out in axes:
        gap = inner + 1
        first = max(-(low // gap) if low < 0 else 0, 0)
        last = min(n - 1, (whole - 1 - low) // gap)
        sizes.append(max(last - first + 1, 0))
        start += first * stride
        end += (low + first * gap) * out
        to.append(gap * out)
    if all(sizes):
        _copy(c, c.x, sizes, c.x.strides, to, (start, end))


def broadcast(c: CNode) -> None:
    """Adds a value along new axes, and along those of size 1."""
    strides = [0] * len(c.output.shape)
    for d, n, s in zip(c["dimensions"], c.x.shape, c.x.strides, strict=True):
        strides[d] = 0 if n == 1 else s
    _copy(c, c.x, c.output.shape, strides, c.output.strides)
