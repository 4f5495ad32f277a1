"""Reads what a normalisation of a traced model computes, as far as integers do.

    y = gain * u / sqrt(max(mean(u^2) + epsilon, floor)) + offset,  u = x - mean(x)

or without the means, over groups of any axes or parts of axes. A normalisation is a
call of `qjax.model.folding`, with any formula inside. Its equations are run on symbols:
lines ``a * x + b * mean(x)``, their squares, the moments of a group, roots of these.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qjax.calls import shared
from qjax.integer_calls import NormCall
from qjax.model.blocks import place_of
from qjax.model.forms import OUTSIDE, FormReader, bound, value_of
from qjax.model.kept import whole_of
from qjax.model.layouts import MOVES, Digit, moved, permutation, source_layout
from qjax.model.moments import (
    NEAR,
    GroupLine,
    Moments,
    Normed,
    Over,
    Root,
    at_least,
    inverse,
    is_coefficient,
    line_sum,
    normed,
    product,
    root,
    summed,
    times,
)
from qjax.model.normalisations import NORM
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace

_SAME = names("keep") - {"sharding_constraint"}


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

    @property
    def is_of_length_one(self) -> bool:
        """Returns whether all it does is to divide by the length of a vector."""
        is_plain = not (self.is_centred or self.has_gain or self.has_offset)
        return is_plain and self.factor == 1

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
    found = reader.run(GroupLine(1.0, 0.0, source_layout(reader.shape)))
    if not isinstance(found, Normed):
        return None
    line, moments = found.line, found.moments
    order = permutation(found.layout, reader.shape)
    over = None if order is None else _groups(reader.shape, order, moments.over)
    is_centred = abs(moments.mean + moments.square) <= NEAR * moments.square
    is_line = line.mean == 0
    if is_centred:
        is_line = abs(line.mean + line.x) <= NEAR * abs(line.x)
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
            if OUTSIDE in own and isinstance(found, GroupLine | Root | Normed):
                is_sum = eqn.primitive.name in ("add", "sub")
                gain |= not is_sum and getattr(found, "is_scaled", True)
                offset |= is_sum and isinstance(found, Normed)
            is_negative = eqn.primitive.name == "neg"
            is_negative |= eqn.primitive.name == "sub" and own[0] is OUTSIDE
            gain |= is_negative and isinstance(found, Root | Normed)
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
            return summed(x, tuple(int(d) for d in eqn.params["axes"]))
        if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
            return product(x, x)
        if name in ("sqrt", "rsqrt"):
            return root(x, 1 if name == "sqrt" else -1)
        if name == "integer_pow" and eqn.params["y"] == -1:
            return None if getattr(x, "is_scaled", True) else inverse(x)
        if name == "pow" and own[1] is OUTSIDE:
            power = self.number(eqn.invars[1])
            return root(x, int(2 * power)) if power in (0.5, -0.5) else None
        if name == "neg":
            if isinstance(x, Root):  # No floor goes on: it would be a ceiling.
                return x._replace(is_scaled=True)
            return x if isinstance(x, Normed) else times(x, -1.0)
        if name in ("add", "sub"):
            return self._sum(eqn, own)
        if name == "max" and OUTSIDE in own:
            k = own.index(OUTSIDE)
            return at_least(own[1 - k], self.number(eqn.invars[k]))
        if name in ("mul", "div"):
            return self._scaled(eqn, own)
        if name == "select_n" and own[0] is OUTSIDE:
            which = self.number(eqn.invars[0])
            found = None if which is None else own[1 + int(which)]
            return found if isinstance(found, Moments) else None
        return None

    def _sum(self, eqn: Any, own: list[Any]) -> Any:
        sign = 1.0 if eqn.primitive.name == "add" else -1.0
        if OUTSIDE in own:
            k = own.index(OUTSIDE)
            x, number = own[1 - k], self.number(eqn.invars[k])
            if isinstance(x, Normed):
                return self._beside(eqn, x, 1 - k)
            if number == 0 and (k == 1 or sign > 0):
                return x if isinstance(x, GroupLine | Moments) else None
            is_plus = isinstance(x, Moments) and number is not None and k == 1
            if not is_plus:
                is_plus = isinstance(x, Moments) and number is not None and sign > 0
            if not is_plus:
                return None
            plus = sign * number  # type: ignore[operator]
            return x._replace(plus=x.plus + plus, floor=x.floor + plus)
        a, b = own
        if isinstance(a, GroupLine) and isinstance(b, GroupLine):
            return line_sum(a, b, sign)
        if isinstance(a, Moments) and isinstance(b, Moments):
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
            if isinstance(b, Root) and isinstance(a, GroupLine):
                return normed(a, b, 1 if is_quotient else -1)
            if isinstance(a, Root) and isinstance(b, GroupLine) and not is_quotient:
                return normed(b, a, -1)
            return None if is_quotient else product(a, b)
        k = own.index(OUTSIDE)
        x, number = own[1 - k], self.number(eqn.invars[k])
        if is_quotient and k == 0:
            found = inverse(x)
            return (
                found if found is None or number == 1 else self._beside(eqn, found, 1)
            )
        if isinstance(x, Root | Normed):
            return self._beside(eqn, x, 1 - k)
        if is_coefficient(number):
            return times(x, 1 / number if is_quotient else number)
        return self._beside(eqn, x, 1 - k) if isinstance(x, GroupLine) else None

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
        is_scaled = isinstance(x, GroupLine | Root)
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
                return x if isinstance(own[0], GroupLine) else -x
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
        is_line = isinstance(own[1 - k], GroupLine)
        if is_line and is_coefficient(self.number(eqn.invars[k])):
            return x  # In the coefficients of the line.
        if name == "mul":
            return other if x is None else _times_exactly(x, other)
        if k == 0:
            return other if x is None else _quotient(other, x)
        return _quotient(1.0 if x is None else x, other)


def _times_exactly(a: Any, b: Any) -> Any:
    """Returns a product that no compiler fuses with a sum behind it."""
    return shared(lax.mul, *jax.numpy.broadcast_arrays(a, b))


def _quotient(a: Any, b: Any) -> Any:
    """Returns a quotient that no compiler makes a product."""
    return shared(_divided, *jax.numpy.broadcast_arrays(jax.numpy.float32(a), b))


def _divided(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / lax.optimization_barrier(b)
