"""Reads what a normalisation of a traced model computes, as far as integers do.

    y = gain * u / sqrt(max(mean(u^2) + epsilon, floor)) + offset,  u = x - mean(x)

or without the means, over groups of any axes or parts of axes. A normalisation is a
call of `qjax.model.folding`, with any formula inside. Its equations are run on symbols:
lines ``a * x + b * mean(x)``, their squares, the moments of a group, roots of these.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax import lax

from qjax.calls import shared
from qjax.model.blocks import place_of
from qjax.model.forms import OUTSIDE, FormReader, bound, value_of
from qjax.model.integer_calls import NormCall
from qjax.model.kept import whole_of
from qjax.model.layouts import (
    MOVES,
    Digit,
    Layout,
    joined,
    meets,
    moved,
    permutation,
    source_layout,
)
from qjax.model.normalisations import NORM
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace

_SAME = names("keep") - {"sharding_constraint"}
_NEAR = 1e-6  # Of coefficients, which are float32 numbers.

Over = tuple[Digit, ...] | None


class _Line(NamedTuple):
    """``x * values + mean * (mean of their group)``, perhaps times known numbers."""

    x: float
    mean: float
    layout: Layout
    over: Over = None
    is_scaled: bool = False


class _Square(NamedTuple):
    """A product of two lines, by its coefficients."""

    xx: float
    xm: float
    mm: float
    layout: Layout
    over: Over


class _Moments(NamedTuple):
    """``max(square * mean(x^2) + mean * mean(x)^2 + plus, floor)`` of a group."""

    square: float
    mean: float
    plus: float
    floor: float
    layout: Layout
    over: Over


class _Root(NamedTuple):
    """A root of moments, or one over it, perhaps times known numbers."""

    moments: _Moments
    power: int
    layout: Layout
    is_scaled: bool = False


class _Normed(NamedTuple):
    """A line over a root, with known factors and summands."""

    line: _Line
    moments: _Moments
    layout: Layout


@dataclasses.dataclass(frozen=True)
class NormForm:
    """A normalisation that integers compute.

    Attributes:
      order: Axes of its input in the order of its result.
      axes: Axes of the result that a group goes along.
      groups: Groups that each of them is split into.
      is_centred: Whether values are about the mean of their group, else about zero.
      epsilon: Number that is added to the sums of `qjax.integer_norm`, in squares of
        the unit of the values.
      floor: Least sum, in the same unit.
      factor: Factor of all values.
      has_gain: Whether known numbers scale it by place.
      has_offset: Whether known numbers are added.
    """

    order: tuple[int, ...]
    axes: tuple[int, ...]
    groups: tuple[int, ...]
    is_centred: bool
    epsilon: float
    floor: float
    factor: float
    has_gain: bool
    has_offset: bool
    reader: "_NormReader" = dataclasses.field(compare=False, repr=False)

    def call(self, is_byte: bool) -> NormCall:
        """Returns what integers compute, for codes of 8 bits or more."""
        own = {field: getattr(self, field) for field in NormCall._fields[:-1]}
        return NormCall(**own, is_byte=is_byte)

    def others(self, call: Any, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
        """Returns gain and offset, those that it has, for the operands of the call."""
        return tuple(x for x in self.reader.affine(operands) if x is not None)


def read_norm(model: Trace, data: set[int], e: Equation) -> NormForm | None:
    """Returns the form of a normalisation; None if integers do not compute it.

    Args:
      model: Trace that holds the call.
      data: Values of the trace that depend on an input.
      e: The call.

    Raises:
      ValueError: for values about the mean of one.
    """
    is_norm = whole_of(e) == NORM and len(e.outputs) == 1
    if not is_norm or data.intersection(e.inputs[1:]):
        return None
    reader = _NormReader(model, e)
    found = reader.run(_Line(1.0, 0.0, source_layout(reader.shape)))
    if not isinstance(found, _Normed):
        return None
    line, moments = found.line, found.moments
    order = permutation(found.layout, reader.shape)
    over = None if order is None else _groups(reader.shape, order, moments.over)
    is_centred = abs(moments.mean + moments.square) <= _NEAR * moments.square
    is_line = line.mean == 0
    if is_centred:
        is_line = abs(line.mean + line.x) <= _NEAR * abs(line.x)
    fits = moments.square > 0 and (is_centred or moments.mean == 0) and is_line
    numbers = line.x, line.mean, *moments[:3]
    if over is None or not fits or moments.plus < 0 or not np.all(np.isfinite(numbers)):
        return None
    axes, groups, count = over
    if is_centred and count == 1:
        raise ValueError(
            f"The normalisation in {place_of(e)} is about the mean of one value, which "
            "leaves 0 of it. Normalise over more values, or leave it out."
        )
    # In units of the sums, which are n^2 times the variance or n times a mean square.
    unit = count**2 if is_centred else count
    factor = line.x * math.sqrt((1 if is_centred else count) / moments.square)
    least = max(moments.floor, 0.0)
    epsilon, floor = (x * unit / moments.square for x in (moments.plus, least))
    gain, offset = reader.kinds[reader.jaxpr.outvars[0]]
    assert order is not None
    return NormForm(
        order, axes, groups, is_centred, epsilon, floor, factor, gain, offset, reader
    )


def _groups(
    shape: Sequence[int], order: Sequence[int], over: Over
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Returns axes in an order, groups of each, and the numbers in one; or None."""
    if not over or len({digit.axis for digit in over}) != len(over):
        return None
    axes, groups = [], []
    for digit in over:
        if digit.axis is None or digit.stride != 1:
            return None
        axes.append(order.index(digit.axis))
        groups.append(shape[digit.axis] // digit.size)
    return tuple(axes), tuple(groups), math.prod(digit.size for digit in over)


class _NormReader(FormReader):
    """A run of a call on symbols, which follows known factors and summands too."""

    def __init__(self, model: Trace, e: Equation):
        super().__init__(model, e)
        # Value of the call -> whether it has a gain, and whether it has an offset.
        self.kinds: dict[Any, tuple[bool, bool]] = {}

    def step(self, eqn: Any, own: list[Any]) -> Any:
        found = self._step(eqn, own)
        if found is not None:
            pairs = [
                self.kinds.get(v, (False, False))
                for v, s in zip(eqn.invars, own, strict=True)
                if s is not OUTSIDE
            ]
            gain, offset = (any(flags) for flags in zip(*pairs, strict=True))
            if OUTSIDE in own and isinstance(found, _Line | _Root | _Normed):
                is_sum = eqn.primitive.name in ("add", "sub")
                gain |= not is_sum and getattr(found, "is_scaled", True)
                offset |= is_sum and isinstance(found, _Normed)
            is_negative = eqn.primitive.name == "neg"
            is_negative |= eqn.primitive.name == "sub" and own[0] is OUTSIDE
            gain |= is_negative and isinstance(found, _Root | _Normed)
            self.kinds[eqn.outvars[0]] = gain, offset
        return found

    def _step(self, eqn: Any, own: list[Any]) -> Any:
        name, x = eqn.primitive.name, own[0]
        if name in _SAME:
            return x
        if name == "convert_element_type":
            return x if eqn.outvars[0].aval.dtype == np.float32 else None
        if name in MOVES:
            layout = moved(eqn, x.layout)
            return None if layout is None else x._replace(layout=layout)
        if name == "reduce_sum":
            return _summed(x, tuple(int(d) for d in eqn.params["axes"]))
        if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
            return _product(x, x)
        if name in ("sqrt", "rsqrt"):
            return _root(x, 1 if name == "sqrt" else -1)
        if name == "integer_pow" and eqn.params["y"] == -1:
            return None if getattr(x, "is_scaled", True) else _inverse(x)
        if name == "pow" and own[1] is OUTSIDE:
            power = self.number(eqn.invars[1])
            return _root(x, int(2 * power)) if power in (0.5, -0.5) else None
        if name == "neg":
            if isinstance(x, _Root):  # No floor goes on: it would be a ceiling.
                return x._replace(is_scaled=True)
            return x if isinstance(x, _Normed) else _times(x, -1.0)
        if name in ("add", "sub"):
            return self._sum(eqn, own)
        if name == "max" and OUTSIDE in own:
            k = own.index(OUTSIDE)
            return _at_least(own[1 - k], self.number(eqn.invars[k]))
        if name in ("mul", "div"):
            return self._scaled(eqn, own)
        if name == "select_n" and own[0] is OUTSIDE:
            which = self.number(eqn.invars[0])
            found = None if which is None else own[1 + int(which)]
            return found if isinstance(found, _Moments) else None
        return None

    def _sum(self, eqn: Any, own: list[Any]) -> Any:
        sign = 1.0 if eqn.primitive.name == "add" else -1.0
        if OUTSIDE in own:
            k = own.index(OUTSIDE)
            x, number = own[1 - k], self.number(eqn.invars[k])
            if isinstance(x, _Normed):
                return self._beside(eqn, x, 1 - k)
            if number == 0 and (k == 1 or sign > 0):
                return x if isinstance(x, _Line | _Moments) else None
            is_plus = isinstance(x, _Moments) and number is not None and k == 1
            if not is_plus:
                is_plus = isinstance(x, _Moments) and number is not None and sign > 0
            if not is_plus:
                return None
            plus = sign * number  # type: ignore[operator]
            return x._replace(plus=x.plus + plus, floor=x.floor + plus)
        a, b = own
        if isinstance(a, _Line) and isinstance(b, _Line):
            return _line_sum(a, b, sign)
        if isinstance(a, _Moments) and isinstance(b, _Moments):
            same = a.layout == b.layout and a.over == b.over
            if not same or a.floor > 0 or b.floor > 0:
                return None
            return a._replace(
                square=a.square + sign * b.square,
                mean=a.mean + sign * b.mean,
                plus=a.plus + sign * b.plus,
            )
        return None

    def _scaled(self, eqn: Any, own: list[Any]) -> Any:
        """Returns a product or a quotient."""
        is_quotient = eqn.primitive.name == "div"
        a, b = own
        if OUTSIDE not in own:
            if isinstance(b, _Root) and isinstance(a, _Line):
                return _normed(a, b, 1 if is_quotient else -1)
            if isinstance(a, _Root) and isinstance(b, _Line) and not is_quotient:
                return _normed(b, a, -1)
            return None if is_quotient else _product(a, b)
        k = own.index(OUTSIDE)
        x, number = own[1 - k], self.number(eqn.invars[k])
        if is_quotient and k == 0:
            found = _inverse(x)
            return (
                found if found is None or number == 1 else self._beside(eqn, found, 1)
            )
        if isinstance(x, _Root | _Normed):
            return self._beside(eqn, x, 1 - k)
        if _is_coefficient(number):
            return _times(x, 1 / number if is_quotient else number)
        return self._beside(eqn, x, 1 - k) if isinstance(x, _Line) else None

    def _beside(self, eqn: Any, x: Any, at: int) -> Any:
        """Returns a symbol with a known value by place beside it."""
        out, own = eqn.outvars[0].aval.shape, eqn.invars[at].aval.shape
        if len(out) != len(own):
            return None
        layout = tuple(
            axis if n == m else (Digit(None, 1, m),)
            for axis, n, m in zip(x.layout, own, out, strict=True)
        )
        x = x._replace(layout=layout)
        is_scaled = isinstance(x, _Line | _Root)
        return x._replace(is_scaled=True) if is_scaled else x

    # Known factors and summands, for operands of the call.

    def affine(self, operands: Sequence[Any]) -> tuple[Any, Any]:
        """Returns gain and offset of the result, float32; None for 1 and for 0."""
        env = dict(zip(self.jaxpr.invars, operands, strict=True))
        outside = {v: x for v, x in env.items() if self.symbols.get(v) is OUTSIDE}
        gains: dict[Any, Any] = {}
        offsets: dict[Any, Any] = {}
        for eqn in self.jaxpr.eqns:
            (out, *_) = eqn.outvars
            if self.kinds.get(out, (False, False)) == (False, False):
                continue
            own = [self.symbol(v) for v in eqn.invars]
            for which, found in enumerate((gains, offsets)):
                if self.kinds[out][which]:
                    found[out] = self._followed(eqn, own, found, which, outside)
        end = self.jaxpr.outvars[0]
        return gains.get(end), offsets.get(end)

    def _followed(
        self, eqn: Any, own: list[Any], found: dict[Any, Any], which: int, outside: Any
    ) -> Any:
        """Returns the gain, or the offset, of the result of an equation."""
        name, out = eqn.primitive.name, eqn.outvars[0].aval.shape
        pairs = zip(eqn.invars, own, strict=True)
        known: list[Any] = [
            found.get(v) if s is not OUTSIDE else None for v, s in pairs
        ]
        if name in MOVES or len(own) == 1:
            (x,) = (x for x in known if x is not None) if name != "neg" else (known[0],)
            if name == "neg":
                x = jax.numpy.float32(1) if x is None else x
                return x if isinstance(own[0], _Line) else -x
            if name in MOVES:
                x = lax.broadcast_in_dim(x, eqn.invars[0].aval.shape, range(np.ndim(x)))
                return bound(eqn, [x])[0]
            return x
        if OUTSIDE not in own:  # A line over a root: their gains.
            if which:
                raise AssertionError("A line or a root has no offset.")
            a, b = known
            if name == "div":
                return _quotient(1.0 if a is None else a, b) if b is not None else a
            return a if b is None else b if a is None else _times_exactly(a, b)
        k = own.index(OUTSIDE)
        x = known[1 - k]
        other = value_of(self.jaxpr, outside, eqn.invars[k])
        other = jax.numpy.asarray(other, jax.numpy.float32)
        other = other.reshape((1,) * (len(out) - other.ndim) + other.shape)
        if name in ("add", "sub"):
            is_minuend = name == "sub" and k == 0
            if not which:
                x = jax.numpy.float32(1) if x is None else x
                return -x if is_minuend else x
            if x is None:
                return -other if name == "sub" and k == 1 else other
            if is_minuend:
                return other - x
            return x + other if name == "add" else x - other
        is_line = isinstance(own[1 - k], _Line)
        if is_line and _is_coefficient(self.number(eqn.invars[k])):
            return x  # In the coefficients of the line.
        if name == "mul":
            return other if x is None else _times_exactly(x, other)
        if k == 0:
            return other if x is None else _quotient(other, x)
        return _quotient(1.0 if x is None else x, other)


def _is_coefficient(number: float | None) -> TypeGuard[float]:
    return number is not None and number != 0 and bool(np.isfinite(number))


def _times_exactly(a: Any, b: Any) -> Any:
    """Returns a product that no compiler fuses with a sum behind it."""
    return shared(lax.mul, *jax.numpy.broadcast_arrays(a, b))


def _quotient(a: Any, b: Any) -> Any:
    """Returns a quotient that no compiler makes a product."""
    return shared(_divided, *jax.numpy.broadcast_arrays(jax.numpy.float32(a), b))


def _divided(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / lax.optimization_barrier(b)


def _same_over(a: Over, b: Over) -> bool:
    return a is None or b is None or a == b


def _summed(x: Any, axes: tuple[int, ...]) -> Any:
    """Returns the mean of lines, or the moments of squares, times their number."""
    if not isinstance(x, _Line | _Square):
        return None
    over = tuple(digit for d in axes for digit in x.layout[d])
    if not over or any(digit.axis is None for digit in over):
        return None
    over = joined(over)
    kept = tuple(axis for d, axis in enumerate(x.layout) if d not in axes)
    count = math.prod(digit.size for digit in over)
    if not _same_over(x.over, over):
        return None
    if isinstance(x, _Line):
        if not x.x or x.is_scaled:
            return None
        return _Line(0.0, count * (x.x + x.mean), kept, over)
    mean = count * (x.xm + x.mm)
    return _Moments(count * x.xx, mean, 0.0, -math.inf, kept, over)


def _product(a: Any, b: Any) -> Any:
    """Returns a product of two lines: of means alone, moments."""
    if not (isinstance(a, _Line) and isinstance(b, _Line)):
        return None
    if a.is_scaled or b.is_scaled or not _same_over(a.over, b.over):
        return None
    over = a.over or b.over
    if not a.x and not b.x:
        if a.layout != b.layout or over is None:
            return None
        return _Moments(0.0, a.mean * b.mean, 0.0, -math.inf, a.layout, over)
    layout = _together(a, b)
    if layout is None:
        return None
    mixed = a.x * b.mean + a.mean * b.x
    return _Square(a.x * b.x, mixed, a.mean * b.mean, layout, over)


def _together(a: _Line, b: _Line) -> Layout | None:
    """Returns the layout of what is computed of two lines; None if they do not meet."""
    if a.x and b.x:
        return a.layout if a.layout == b.layout else None
    values, means = (a, b) if a.x else (b, a)
    over = values.over or means.over
    fits = over is not None and meets(values.layout, means.layout, over)
    return values.layout if fits else None


def _line_sum(a: _Line, b: _Line, sign: float) -> _Line | None:
    if a.is_scaled or b.is_scaled or not _same_over(a.over, b.over):
        return None
    if a.x or b.x:
        layout = _together(a, b)
    else:
        layout = a.layout if a.layout == b.layout else None
    if layout is None:
        return None
    return _Line(a.x + sign * b.x, a.mean + sign * b.mean, layout, a.over or b.over)


def _times(x: Any, number: float) -> Any:
    """Returns a symbol times a number that is not 0."""
    if isinstance(x, _Line):
        return x._replace(x=x.x * number, mean=x.mean * number)
    if isinstance(x, _Square):
        return x._replace(xx=x.xx * number, xm=x.xm * number, mm=x.mm * number)
    if isinstance(x, _Moments):
        if number < 0 and x.floor > -math.inf:
            return None
        return x._replace(
            square=x.square * number,
            mean=x.mean * number,
            plus=x.plus * number,
            floor=x.floor * number if x.floor > -math.inf else x.floor,
        )
    return None


def _is_positive(x: _Moments) -> bool:
    """Returns whether moments are not negative by what they are."""
    return x.square >= 0 and x.square + x.mean >= -_NEAR * x.square and x.plus >= 0


def _at_least(x: Any, number: float | None) -> Any:
    """Returns moments, or a root of them, of at least a number."""
    if number is None:
        return None
    if isinstance(x, _Moments):
        if number <= 0 and _is_positive(x):
            return x
        return x._replace(floor=max(x.floor, number)) if number > 0 else None
    if isinstance(x, _Root) and x.power == 1 and not x.is_scaled:
        if number <= 0:
            return x
        floor = max(x.moments.floor, number**2)
        return x._replace(moments=x.moments._replace(floor=floor))
    return None


def _root(x: Any, power: int) -> _Root | None:
    if not isinstance(x, _Moments) or not _is_positive(x):
        return None
    return _Root(x, power, x.layout)


def _inverse(x: Any) -> _Root | None:
    return x._replace(power=-x.power) if isinstance(x, _Root) else None


def _normed(line: _Line, root: _Root, power: int) -> _Normed | None:
    """Returns a line over a root, which is one over itself if ``power`` is -1."""
    moments = root.moments
    fits = root.power == power and bool(line.x)
    if not fits or moments.over is None or not _same_over(line.over, moments.over):
        return None
    layout = root.layout
    if not meets(line.layout, layout, moments.over):
        return None
    return _Normed(line, moments, line.layout)
