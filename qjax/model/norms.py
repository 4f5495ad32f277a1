"""Reads what a normalisation of a traced model computes, as far as integers do.

    y = gain * u / sqrt(max(mean(u^2) + epsilon, floor)) + offset,  u = x - mean(x)

or without the means, over groups of any axes or parts of axes. A normalisation is a
call of `qjax.model.folding`, with any formula inside. Its equations are run on symbols:
lines ``a * x + b * mean(x)``, their squares, the moments of a group, roots of these.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax

from qjax.calls import shared
from qjax.model.blocks import place_of
from qjax.model.forms import OUTSIDE, FormReader, bound, value_of
from qjax.model.kept import whole_of
from qjax.model.layouts import (
    MOVES,
    Digit,
    moved,
    permutation,
    source_layout,
)
from qjax.model.moments import (
    MASK,
    NEAR,
    GroupLine,
    Kept,
    Moments,
    Normed,
    Over,
    Root,
    Square,
    Total,
    at_least,
    inverse,
    is_coefficient,
    line_sum,
    normed,
    on_layout,
    product,
    root,
    summed,
    times,
)
from qjax.model.norm_forms import NormForm
from qjax.model.norm_masks import (
    NormMask,
    case_of_kept,
    is_same,
    is_whole,
    least_count,
    read_mask,
)
from qjax.model.normalisations import NORM
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace

_SAME = names("keep") - {"sharding_constraint"}


def read_norm(model: Trace, data: set[int], e: Equation) -> NormForm | None:
    """Returns the form of a normalisation; None if integers do not compute it.

    Args:
      model: Trace that holds the call.
      data: Values of the trace that depend on an input.
      e: The call.

    Raises:
      ValueError: for values about the mean of one.
    """
    if whole_of(e) != NORM or len(e.outputs) != 1:
        return None
    reader = _NormReader(model, e, data)
    found = reader.run(GroupLine(1.0, 0.0, source_layout(reader.shape)))
    if not isinstance(found, Normed):
        return None
    line, moments = found.line, found.moments
    is_masked = moments.over is not None and MASK in moments.over
    if data.intersection(e.inputs[1:]) and not is_masked:
        return None
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
    unit = 1 if is_masked else count**2 if is_centred else count
    roots = 1 if is_masked or is_centred else count
    factor = line.x * math.sqrt(roots / moments.square)
    least = max(moments.floor, 0.0)
    epsilon, floor = (x * unit / moments.square for x in (moments.plus, least))
    gain, offset = reader.kinds[reader.jaxpr.outvars[0]]
    assert order is not None
    return NormForm(
        *(order, axes, groups, is_centred, epsilon, floor, factor, gain, offset),
        reader,
        reader.mask if is_masked else None,
        0 if reader.unbounded > 0 else 1,
    )


def _is_nan(x: Any) -> bool:
    return x is not None and bool(np.all(np.isnan(np.asarray(x, np.float64))))


def _groups(
    shape: Sequence[int], order: Sequence[int], over: Over
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Returns axes in an order, groups of each, and the numbers in one; or None."""
    over = None if over is None else tuple(d for d in over if d != MASK)
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

    def __init__(self, model: Trace, e: Equation, data: set[int]):
        super().__init__(model, e)
        self.mask: NormMask | None = None
        self.sources: set[Any] = set()  # What is kept of them.
        self.unbounded = 0  # Divisors that are 0 where nothing is kept.
        # What inputs determine, beside the source.
        self.drawn = {v for v, u in self.outer.items() if u in data}
        self.drawn.remove(self.jaxpr.invars[0])
        for eqn in self.jaxpr.eqns:
            own = (v for v in eqn.invars if not isinstance(v, jex.Literal))
            if self.drawn.intersection(own):
                self.drawn.update(eqn.outvars)
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
            is_choice = eqn.primitive.name == "select_n"
            kinds = GroupLine | Root | Normed | Kept
            if OUTSIDE in own and not is_choice and isinstance(found, kinds):
                is_sum = eqn.primitive.name in ("add", "sub")
                gain |= not is_sum and getattr(found, "is_scaled", True)
                offset |= is_sum and isinstance(found, Normed)
            is_negative = eqn.primitive.name == "neg"
            is_negative |= eqn.primitive.name == "sub" and own[0] is OUTSIDE
            gain |= is_negative and isinstance(found, Root | Normed)
            if isinstance(found, Total):  # A mask is no gain of what it sums.
                gain = False
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
            return None if layout is None else on_layout(x, layout)
        if name == "reduce_sum":
            return summed(x, tuple(int(d) for d in eqn.params["axes"]))
        if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
            return self._product(eqn, [x, x])
        if name in ("sqrt", "rsqrt"):
            return root(x, 1 if name == "sqrt" else -1)
        if name == "integer_pow" and eqn.params["y"] == -1:
            return None if getattr(x, "is_scaled", True) else inverse(x)
        if name == "pow" and own[1] is OUTSIDE:
            power = self.number(eqn.invars[1])
            if power == 2:
                return self._product(eqn, [x, x])
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
        if name == "select_n" and own[0] is OUTSIDE and len(own) == 3:
            return self._chosen(eqn, own)
        return None

    def _chosen(self, eqn: Any, own: list[Any]) -> Any:
        """Returns what is kept of values, and moments that are known to be chosen."""
        which = self.number(eqn.invars[0])
        if which is not None:
            found = own[1 + int(which)]
            return found if isinstance(found, Moments) else None
        at = 1 if own[1] is not OUTSIDE else 2
        x, fill = own[at], self.number(eqn.invars[3 - at])
        if own[3 - at] is not OUTSIDE:
            return None
        if isinstance(x, Square) or (isinstance(x, GroupLine) and x.x):
            if fill != 0 or eqn.invars[0].aval.dtype != np.bool_:
                return None
            return self._masked(eqn.invars[at], x, eqn.invars[0], at == 1)
        over = getattr(x, "over", None) or ()
        is_nan = fill is None and _is_nan(self.known_value(eqn.invars[3 - at]))
        if MASK not in over or not (is_nan or fill == 0):
            return None
        assert self.mask is not None
        own_case = case_of_kept(
            self, self.mask, eqn.invars[at], self.sources, eqn.invars[0]
        )
        if own_case != at - 1:
            return None
        self.unbounded += 1 if is_nan else -1
        return x

    def _masked(self, source: Any, x: Any, v: Any, is_inverse: bool) -> Kept | None:
        """Returns what a mask keeps of values, if it is the mask of all of them."""
        mask = read_mask(self, v, x.layout, is_inverse)
        if mask is None or not is_whole(x.layout, self.shape):
            return None
        if self.mask is not None and not is_same(self, self.mask, mask):
            return None
        self.mask = self.mask or mask
        self.sources.add(source)
        return Kept(x)

    def _counted(self, eqn: Any, x: Total, is_quotient: bool, k: int) -> Any:
        """Returns a total over the number of what is kept; None over others."""
        assert self.mask is not None
        own = eqn.invars[1 - k], self.sources, eqn.invars[k]
        least = least_count(self, self.mask, *own, is_inverse=not is_quotient)
        if least is None or (is_quotient and k == 0):
            return None
        self.unbounded += least == 0
        return x.of

    def _product(self, eqn: Any, own: list[Any]) -> Any:
        """Returns a product; all that it is kept of are sources."""
        found = product(*own)
        if isinstance(found, Kept):
            pairs = zip(eqn.invars, own, strict=False)
            self.sources.update(v for v, x in pairs if not isinstance(x, Kept))
        return found

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
            if isinstance(a, Root) or isinstance(b, Root):
                pairs = zip(eqn.invars, own, strict=True)
                a, b = (self._factor_of(v, x) for v, x in pairs)
            if isinstance(b, Root) and isinstance(a, GroupLine):
                return normed(a, b, 1 if is_quotient else -1)
            if isinstance(a, Root) and isinstance(b, GroupLine) and not is_quotient:
                return normed(b, a, -1)
            return None if is_quotient else self._product(eqn, own)
        k = own.index(OUTSIDE)
        x, number = own[1 - k], self.number(eqn.invars[k])
        if isinstance(x, Total):
            return self._counted(eqn, x, is_quotient, k)
        if isinstance(x, Square) or (isinstance(x, GroupLine) and x.x):
            is_mask = not is_quotient and number is None
            pair = eqn.invars[1 - k], x, eqn.invars[k]
            kept = self._masked(*pair, False) if is_mask else None
            if kept is not None:
                return kept._replace(is_factor=True)
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

    def _factor_of(self, v: Any, x: Any) -> Any:
        """Returns a line times a known mask as one times known numbers."""
        is_line = isinstance(x, Kept) and isinstance(x.of, GroupLine)
        is_known = is_line and x.is_factor and v not in self.drawn
        return x.of._replace(is_scaled=True) if is_known else x

    def _beside(self, eqn: Any, x: Any, at: int) -> Any:
        """Returns a symbol with a known value by place beside it."""
        other = eqn.invars[1 - at]
        if not isinstance(other, jex.Literal) and other in self.drawn:
            return None
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
