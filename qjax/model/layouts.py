"""Follows the axes of one array through reshapes, broadcasts and transposes.

An axis of a value is made of digits of places in the source:

    digit = (axis, stride, size)        place // stride % size, of a place on the axis

so that a reshape splits and joins digits. A digit of no axis is a broadcast.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.model.primitives import names

MOVES = names("axes")


class Digit(NamedTuple):
    """A part of the places on an axis of the source; broadcast if it is of none."""

    axis: int | None
    stride: int
    size: int


Layout = tuple[tuple[Digit, ...], ...]


def source_layout(shape: Sequence[int]) -> Layout:
    """Returns the layout of the source itself."""
    return tuple((Digit(d, 1, n),) for d, n in enumerate(shape))


def sizes(layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a value."""
    return tuple(math.prod(digit.size for digit in axis) for axis in layout)


def moved(eqn: Any, layout: Layout) -> Layout | None:
    """Returns the layout behind a move of `MOVES`; None if its digits do not divide."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(layout[d] for d in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        along = {d: k for k, d in enumerate(eqn.params["broadcast_dimensions"])}
        own = sizes(layout)
        return tuple(
            layout[along[d]] if d in along and own[along[d]] == n else _spread(n)
            for d, n in enumerate(out)
        )
    return _reshaped([digit for axis in layout for digit in axis], out)


def _spread(n: int) -> tuple[Digit, ...]:
    return () if n == 1 else (Digit(None, 1, n),)


def _reshaped(digits: list[Digit], shape: Sequence[int]) -> Layout | None:
    """Shares digits out to axes in order; one of size 1 goes to such an axis."""
    left, found = digits[::-1], []
    for n in shape:
        own: list[Digit] = []
        size = 1
        if n == 1 and left and left[-1].size == 1:
            own.append(left.pop())
        while size < n:
            if not left:
                return None
            digit = left.pop()
            need = n // size
            if digit.size > need:
                if n % size or digit.size % need:
                    return None
                inner = digit.size // need
                left.append(Digit(digit.axis, digit.stride, inner))
                digit = Digit(digit.axis, digit.stride * inner, need)
            elif need % digit.size:
                return None
            own.append(digit)
            size *= digit.size
        if size != n:
            return None
        found.append(tuple(own))
    return tuple(found) if all(digit.size == 1 for digit in left) else None


def joined(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """Joins digits of the source that follow each other, in the order of its axes."""
    found: list[Digit] = []
    for digit in sorted(digits, key=lambda d: (d.axis or 0, -d.stride)):
        last = found[-1] if found else None
        is_next = last is not None and last.axis == digit.axis
        if last is not None and is_next and last.stride == digit.stride * digit.size:
            found[-1] = Digit(last.axis, digit.stride, last.size * digit.size)
        else:
            found.append(digit)
    return tuple(found)


def permutation(layout: Layout, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Returns the axes of the source in the order of a value's; None if it has others.

    Args:
      layout: Layout of the value.
      shape: Shape of the source.
    """
    found: list[int | None] = []
    for axis in layout:
        own = joined([digit for digit in axis if digit.size > 1] or axis)
        is_one = len(own) == 1 and own[0].axis is not None
        whole = is_one and own[0] == Digit(own[0].axis, 1, shape[own[0].axis or 0])
        if own and not whole:
            return None
        found.append(own[0].axis if own else None)
    left = [d for d in range(len(shape)) if d not in found]
    if len(found) != len(shape) or any(shape[d] > 1 for d in left):
        return None
    order = [left.pop(0) if d is None else d for d in found if d is not None or left]
    return tuple(order) if len({*order}) == len(shape) else None


def transposed(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Returns an array with its axes in an order; itself where that is its own."""
    return x if tuple(order) == tuple(range(x.ndim)) else lax.transpose(x, order)


def in_source(x: jax.Array, layout: Layout, rank: int) -> jax.Array:
    """Returns an array that meets a value with the axes of the source of the value.

    Args:
      x: Array, whose shape broadcasts to that of the value.
      layout: Layout of the value, without a broadcast digit.
      rank: Rank of the source.
    """
    x = x.reshape((1,) * (len(layout) - x.ndim) + x.shape)
    own = zip(x.shape, layout, strict=True)
    varied = {digit.axis for n, axis in own if n > 1 for digit in axis}
    spread = lambda digit: digit.size if digit.axis in varied else 1
    digits = [digit for axis in layout for digit in axis]
    x = jnp.broadcast_to(x, [math.prod(map(spread, axis)) for axis in layout])
    turn = sorted(
        range(len(digits)), key=lambda k: (digits[k].axis or 0, -digits[k].stride)
    )
    x = transposed(x.reshape([spread(digit) for digit in digits]), turn)
    shape = [1] * rank
    for digit in digits:
        shape[digit.axis or 0] *= spread(digit)
    return x.reshape(shape)


def meets(values: Layout, statistics: Layout, over: Sequence[Digit]) -> bool:
    """Returns whether each value meets the statistic of its own group.

    Args:
      values: Layout of the values, or of other statistics of the same groups.
      statistics: Layout of the statistics, of as many axes.
      over: Digits that a group goes along, `joined`.
    """
    if len(values) != len(statistics):
        return False
    return all(_axis_meets(a, b, over) for a, b in zip(values, statistics, strict=True))


def _axis_meets(
    values: tuple[Digit, ...], statistics: tuple[Digit, ...], over: Sequence[Digit]
) -> bool:
    a = [digit for digit in values if digit.size > 1][::-1]
    b = [digit for digit in statistics if digit.size > 1][::-1]
    while a:
        own = a.pop()
        other = b.pop() if b else Digit(None, 1, own.size)
        size = math.gcd(own.size, other.size)
        if size != min(own.size, other.size):
            return False
        for stack, digit in ((a, own), (b, other)):
            if digit.size > size:  # The first digits are compared, the last ones left.
                stack.append(Digit(digit.axis, digit.stride, digit.size // size))
        own, other = (
            Digit(digit.axis, digit.stride * (digit.size // size), size)
            for digit in (own, other)
        )
        if other.axis is None:
            if own.axis is not None and not is_within(own, over):
                return False
        elif own != other:
            return False
    return not b or all(digit.axis is None for digit in b)


def reduced(
    layout: Layout, axes: Sequence[int]
) -> tuple[Layout, tuple[Digit, ...]] | None:
    """Returns the layout behind a reduction, and the digits that it goes over, joined.

    None if it goes over what is broadcast, or over no digit.
    """
    over = tuple(digit for d in axes for digit in layout[d])
    if not over or any(digit.axis is None for digit in over):
        return None
    kept = tuple(axis for d, axis in enumerate(layout) if d not in axes)
    return kept, joined(over)


def is_within(digit: Digit, over: Sequence[Digit]) -> bool:
    """Returns whether a group goes along all places of a digit."""
    return any(
        own.axis == digit.axis
        and own.stride <= digit.stride
        and digit.stride * digit.size <= own.stride * own.size
        for own in over
    )
