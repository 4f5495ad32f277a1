"""Lines of values and of the mean of their group, and what squares make of them.

Symbols of a normalisation: `qjax.model.norms` runs its equations on them.
"""

import math
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from qjax.model.layouts import Digit, Layout, meets, reduced

NEAR = 1e-6  # Of coefficients, which are float32 numbers.

Over = tuple[Digit, ...] | None


class GroupLine(NamedTuple):
    """``x * values + mean * (mean of their group)``, perhaps times known numbers."""

    x: float
    mean: float
    layout: Layout
    over: Over = None
    is_scaled: bool = False


class Square(NamedTuple):
    """A product of two lines, by its coefficients."""

    xx: float
    xm: float
    mm: float
    layout: Layout
    over: Over


class Moments(NamedTuple):
    """``max(square * mean(x^2) + mean * mean(x)^2 + plus, floor)`` of a group."""

    square: float
    mean: float
    plus: float
    floor: float
    layout: Layout
    over: Over


class Root(NamedTuple):
    """A root of moments, or one over it, perhaps times known numbers."""

    moments: Moments
    power: int
    layout: Layout
    is_scaled: bool = False


class Normed(NamedTuple):
    """A line over a root, with known factors and summands."""

    line: GroupLine
    moments: Moments
    layout: Layout


class Kept(NamedTuple):
    """Values or squares where a mask keeps them, and 0 elsewhere.

    Whether a factor of 0 and 1 masks them tells ``is_factor``.
    """

    of: GroupLine | Square
    is_factor: bool = False

    @property
    def layout(self) -> Layout:
        """Returns the layout of the values."""
        return self.of.layout


class Total(NamedTuple):
    """A sum of what a mask keeps: its mean, or moments, times the number kept."""

    of: GroupLine | Moments

    @property
    def layout(self) -> Layout:
        """Returns the layout of the sums."""
        return self.of.layout


MASK = Digit(-1, 0, 1)  # Of a group whose moments are of what a mask keeps.


def is_coefficient(number: float | None) -> TypeGuard[float]:
    """Returns whether a number is known, finite and not 0: a coefficient."""
    return number is not None and number != 0 and bool(np.isfinite(number))


def same_over(a: Over, b: Over) -> bool:
    """Returns whether two symbols are of the same groups, as far as they have any."""
    return a is None or b is None or a == b


def summed(x: Any, axes: tuple[int, ...]) -> Any:
    """Returns the mean of lines, or the moments of squares, times their number."""
    is_kept = isinstance(x, Kept)
    x = x.of if is_kept else x
    if not isinstance(x, GroupLine | Square):
        return None
    found = reduced(x.layout, axes)
    if found is None:
        return None
    kept, over = found
    count = 1 if is_kept else math.prod(digit.size for digit in over)
    over = (*over, MASK) if is_kept else over
    if not same_over(x.over, over):
        return None
    if isinstance(x, GroupLine):
        if not x.x or x.is_scaled:
            return None
        line = GroupLine(0.0, count * (x.x + x.mean), kept, over)
        return Total(line) if is_kept else line
    mean = count * (x.xm + x.mm)
    moments = Moments(count * x.xx, mean, 0.0, -math.inf, kept, over)
    return Total(moments) if is_kept else moments


def product(a: Any, b: Any) -> Any:
    """Returns a product of two lines: of means alone, moments."""
    if isinstance(a, Kept) or isinstance(b, Kept):
        a, b = (x.of if isinstance(x, Kept) else x for x in (a, b))
        square = product(a, b)
        return Kept(square) if isinstance(square, Square) else None
    if not (isinstance(a, GroupLine) and isinstance(b, GroupLine)):
        return None
    if a.is_scaled or b.is_scaled or not same_over(a.over, b.over):
        return None
    over = a.over or b.over
    if not a.x and not b.x:
        if a.layout != b.layout or over is None:
            return None
        return Moments(0.0, a.mean * b.mean, 0.0, -math.inf, a.layout, over)
    layout = together(a, b)
    if layout is None:
        return None
    mixed = a.x * b.mean + a.mean * b.x
    return Square(a.x * b.x, mixed, a.mean * b.mean, layout, over)


def together(a: GroupLine, b: GroupLine) -> Layout | None:
    """Returns the layout of what is computed of two lines; None if they do not meet."""
    if a.x and b.x:
        return a.layout if a.layout == b.layout else None
    values, means = (a, b) if a.x else (b, a)
    over = values.over or means.over
    fits = over is not None and meets(values.layout, means.layout, over)
    return values.layout if fits else None


def on_layout(x: Any, layout: Layout) -> Any:
    """Returns a symbol with another layout."""
    if isinstance(x, Kept | Total):
        own: Any = x.of
        return x._replace(of=own._replace(layout=layout))
    return x._replace(layout=layout)


def line_sum(a: GroupLine, b: GroupLine, sign: float) -> GroupLine | None:
    """Returns the sum or difference of two lines; None if they do not meet."""
    if a.is_scaled or b.is_scaled or not same_over(a.over, b.over):
        return None
    if a.x or b.x:
        layout = together(a, b)
    else:
        layout = a.layout if a.layout == b.layout else None
    if layout is None:
        return None
    return GroupLine(a.x + sign * b.x, a.mean + sign * b.mean, layout, a.over or b.over)


def times(x: Any, number: float) -> Any:
    """Returns a symbol times a number that is not 0."""
    if isinstance(x, GroupLine):
        return x._replace(x=x.x * number, mean=x.mean * number)
    if isinstance(x, Square):
        return x._replace(xx=x.xx * number, xm=x.xm * number, mm=x.mm * number)
    if isinstance(x, Moments):
        if number < 0 and x.floor > -math.inf:
            return None
        return x._replace(
            square=x.square * number,
            mean=x.mean * number,
            plus=x.plus * number,
            floor=x.floor * number if x.floor > -math.inf else x.floor,
        )
    return None


def is_positive(x: Moments) -> bool:
    """Returns whether moments are not negative by what they are."""
    return x.square >= 0 and x.square + x.mean >= -NEAR * x.square and x.plus >= 0


def at_least(x: Any, number: float | None) -> Any:
    """Returns moments, or a root of them, of at least a number."""
    if number is None:
        return None
    if isinstance(x, Moments):
        if number <= 0 and is_positive(x):
            return x
        return x._replace(floor=max(x.floor, number)) if number > 0 else None
    if isinstance(x, Root) and x.power == 1 and not x.is_scaled:
        if number <= 0:
            return x
        floor = max(x.moments.floor, number**2)
        return x._replace(moments=x.moments._replace(floor=floor))
    return None


def root(x: Any, power: int) -> Root | None:
    """Returns the root of moments, one over it for power -1; None for others."""
    if not isinstance(x, Moments) or not is_positive(x):
        return None
    return Root(x, power, x.layout)


def inverse(x: Any) -> Root | None:
    """Returns one over a root; None for others."""
    return x._replace(power=-x.power) if isinstance(x, Root) else None


def normed(line: GroupLine, root: Root, power: int) -> Normed | None:
    """Returns a line over a root, which is one over itself if ``power`` is -1."""
    moments = root.moments
    fits = root.power == power and bool(line.x)
    if not fits or moments.over is None or not same_over(line.over, moments.over):
        return None
    layout = root.layout
    if not meets(line.layout, layout, moments.over):
        return None
    return Normed(line, moments, line.layout)
