"""Reads what a softmax of a traced model computes, as far as integers compute it.

    p = exp(factor * x) / sum(exp(factor * x))        over axes, of what a mask keeps

or its logarithm, or that of the sum, ``logsumexp``. A softmax is a call of
`qjax.model.folding`, with any formula inside. Its equations are run on symbols: what is
left of the formula is a factor, axes and masks, or nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.integer_calls import LARGE, SoftmaxCall
from qjax.integer_softmax import Empty, Kind
from qjax.model.forms import OUTSIDE, FormReader, value_of
from qjax.model.kept import whole_of
from qjax.model.layouts import (
    MOVES,
    Digit,
    Layout,
    in_source,
    is_within,
    joined,
    meets,
    moved,
    permutation,
    reduced,
    source_layout,
    transposed,
)
from qjax.model.masks import SOFTMAXES
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace
from qjax.qpoint import bind_point, known_zeros

_SAME = names("keep") - {"sharding_constraint"}
_SWALLOWS = 2.0**29  # To which float32 adds nothing below 2^5.


class _Mask(NamedTuple):
    """Truth values of a selection, or numbers to add, and how they mask."""

    variable: Any  # In the call.
    key: Any  # Equal for masks that are computed alike.
    kept: int | None  # Case of a selection that is kept; None: added.
    empty: Empty  # What a row without any kept value is.
    fill: float  # Largest finite number that it puts or adds; 0 if there is none.
    layout: Layout  # Of the values that it meets, whose source the logits are.
    is_input: bool = False  # Whether real inputs of the model are added as they are.


class _Shift(NamedTuple):
    """The maximum that is subtracted from logits: its axes, and keys of its masks."""

    over: tuple[Digit, ...]
    masks: frozenset[Any]


class _Logits(NamedTuple):
    factor: float
    layout: Layout
    masks: tuple[_Mask, ...] = ()
    shift: _Shift | None = None


class _Powers(NamedTuple):
    factor: float
    layout: Layout
    masks: tuple[_Mask, ...]
    shift: _Shift | None


class _Reduced(NamedTuple):
    kind: str  # max, is_finite of it, sum, log of it; total: the log, and the maximum.
    over: tuple[Digit, ...]
    layout: Layout
    masks: tuple[_Mask, ...]
    factor: float
    shift: _Shift | None = None  # Of the powers of a sum.
    plus: float = 0.0  # Added to a sum.


class _Shares(NamedTuple):
    factor: float
    over: tuple[Digit, ...]
    layout: Layout
    masks: tuple[_Mask, ...]
    is_log: bool = False
    plus: float = 0.0


@dataclasses.dataclass(frozen=True)
class SoftmaxForm:
    """A softmax, or its logarithm, that integers compute.

    Attributes:
      kind: softmax, log_softmax or logsumexp.
      keepdims: Whether a logsumexp has its axes, with size 1; true for others.
      order: Axes of its input in the order of its result.
      axes: Axes of the result that its sums go over.
      factor: Positive factor of its input, a float32.
      empty: What a row is in which the mask keeps nothing.
      fill: Largest finite number that a mask puts or adds; 0 if there is none.
      plus: Number that is added to the sums, whose largest term is 1; 0 to 1.
      masks: Masks in the call.
    """

    kind: Kind
    keepdims: bool
    order: tuple[int, ...]
    axes: tuple[int, ...]
    factor: float
    empty: Empty
    fill: float
    plus: float
    masks: tuple[_Mask, ...]

    def call(self, is_byte: bool) -> SoftmaxCall:
        """Returns what integers compute, for codes of 8 bits or more."""
        numbers = self.axes, self.factor, self.empty, self.fill, self.plus
        return SoftmaxCall(self.kind, self.keepdims, *numbers, is_byte)

    def masked(self) -> "SoftmaxForm":
        """Returns the same of logits that are masked before it."""
        is_open = not self.masks and self.kind != "logsumexp" or self.empty == "all"
        return dataclasses.replace(self, empty="uniform") if is_open else self

    def added(self, call: Any, operands: Sequence[Any]) -> list[jax.Array]:
        """Returns the inputs of the model that are added to its input as masks."""
        jaxpr = call.params["jaxpr"].jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        own = (mask.variable for mask in self.masks if mask.is_input)
        return [value_of(jaxpr, env, v) for v in own]

    def others(
        self, call: Any, operands: Sequence[Any], own: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns the masks, for the operands of the call.

        Each is truth values, of what is kept, or numbers to add.

        Args:
          call: The call.
          operands: Its operands.
          own: What masks leave of the first one.
        """
        values = []
        for mask, value in zip(self.masks, self._masks(call, operands), strict=True):
            if mask.is_input:  # 0 for what is kept, -1 for what is masked.
                ends = np.int32(-1), np.int32(0)
                grid = jnp.float32(LARGE), known_zeros()
                value = bind_point(value, *grid, *ends, site="mask")
            values.append(self._in_order(mask, value))
        return (*values, *self._own(own))

    def _own(self, kept: jax.Array | None) -> list[jax.Array]:
        return [] if kept is None else [transposed(kept, self.order)]

    def kept(
        self, call: Any, operands: Sequence[Any], own: jax.Array | None = None
    ) -> jax.Array | None:
        """Returns what masks leave of a logarithm, for the operands of the call.

        What they take would go into its range. None for all, and for a softmax.
        """
        if self.kind == "softmax" or not (self.masks or own is not None):
            return None
        values = zip(self.masks, self._masks(call, operands), strict=True)
        found = [self._in_order(mask, value) for mask, value in values]
        found += self._own(own)
        kept = [m if m.dtype == jnp.bool_ else m > -LARGE / 2 for m in found]
        shape = [jnp.shape(operands[0])[d] for d in self.order]
        whole = jnp.broadcast_to(functools.reduce(jnp.logical_and, kept), shape)
        rows = jnp.any(whole, self.axes, keepdims=self.keepdims)
        if self.kind == "logsumexp":
            return rows
        return whole if self.empty == "zero" else whole | ~rows

    def _masks(self, call: Any, operands: Sequence[Any]) -> list[Any]:
        jaxpr = call.params["jaxpr"].jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        values = [value_of(jaxpr, env, mask.variable) for mask in self.masks]
        pairs = zip(self.masks, values, strict=True)
        return [jnp.asarray(~x if mask.kept == 0 else x) for mask, x in pairs]

    def _in_order(self, mask: _Mask, value: jax.Array) -> jax.Array:
        """Returns a mask with its axes in the order of the result."""
        return transposed(in_source(value, mask.layout, len(self.order)), self.order)


def read_softmax(model: Trace, e: Equation) -> SoftmaxForm | None:
    """Returns the form of a softmax; None if integers do not compute it.

    Args:
      model: Trace that holds the call.
      e: The call.
    """
    if whole_of(e) not in SOFTMAXES or len(e.outputs) != 1:
        return None
    reader = _SoftmaxReader(model, e)
    found = _of_shares(reader.run(_Logits(1.0, source_layout(reader.shape))))
    is_sum = isinstance(found, _Reduced) and found.kind == "total"
    if not (is_sum or isinstance(found, _Shares)) or not found.factor > 0:
        return None
    whole = source_layout(reader.shape)
    order = permutation(whole if is_sum else found.layout, reader.shape)
    if order is None or not all(d == whole[d.axis or 0][0] for d in found.over):
        return None
    axes = tuple(sorted(order.index(d.axis) for d in found.over if d.axis is not None))
    empties = {mask.empty for mask in found.masks}
    if len(empties) > 1:
        if not _leave_all_rows(reader, found):
            return None
        empties = {"zero"}
    fill = max((mask.fill for mask in found.masks if mask.fill), default=0.0)
    (empty,) = empties or {"zero"}
    numbers = order, axes, found.factor, empty, fill, found.plus, found.masks
    if not is_sum:
        return SoftmaxForm("log_softmax" if found.is_log else "softmax", True, *numbers)
    # What masks put in an empty row is below all codes, as far as it masks.
    form = SoftmaxForm("logsumexp", True, *numbers)
    form = dataclasses.replace(form, empty="zero")
    left = tuple(axis for d, axis in enumerate(whole) if d not in axes)
    if tuple(map(joined, found.layout)) == left:
        return dataclasses.replace(form, keepdims=False)
    kept = tuple(() if d in axes else axis for d, axis in enumerate(whole))
    return form if found.layout == kept else None


def _leave_all_rows(reader: FormReader, x: _Reduced | _Shares) -> bool:
    """Returns whether masks are known, and keep something of each row."""
    rank, kept = len(reader.shape), np.ones(reader.shape, bool)
    for mask in x.masks:
        value = reader.known_value(mask.variable)
        if value is None:
            return False
        own = value > -LARGE / 2 if mask.kept is None else value == mask.kept
        with jax.ensure_compile_time_eval():
            kept = kept & np.asarray(in_source(jnp.asarray(own), mask.layout, rank))
    axes = {digit.axis for digit in x.over if digit.axis is not None}
    return bool(np.all(np.any(kept, tuple(axes))))


def _of_shares(x: Any) -> Any:
    """Returns the logarithm of a sum without a maximum as that with it."""
    is_plain = isinstance(x, _Reduced) and x.kind == "log" and x.shift is None
    return x._replace(kind="total") if is_plain else x


class _SoftmaxReader(FormReader):
    """A run of a call on symbols."""

    def step(self, eqn: Any, own: list[Any]) -> Any:
        name, own = eqn.primitive.name, list(map(_of_shares, own))
        if name in _SAME:
            return own[0]
        if name == "convert_element_type":
            return own[0] if eqn.outvars[0].aval.dtype == np.float32 else None
        if name in MOVES:
            layout = moved(eqn, own[0].layout)
            return None if layout is None else own[0]._replace(layout=layout)
        if name in ("mul", "div"):
            return self._scaled(eqn, own)
        if name in ("add", "max") and OUTSIDE in own:
            k = own.index(OUTSIDE)
            if isinstance(own[1 - k], _Reduced) and own[1 - k].kind == "sum":
                return _sum_and(name, own[1 - k], self.number(eqn.invars[k]))
        if name == "max" and OUTSIDE in own:
            k = own.index(OUTSIDE)
            is_same = isinstance(own[1 - k], _Reduced) and own[1 - k].kind == "max"
            is_least = is_same and self.number(eqn.invars[k]) == -np.inf
            return own[1 - k] if is_least else None
        if name in ("reduce_max", "reduce_sum"):
            return self._reduced(name, eqn, own[0])
        if name in ("log", "abs", "is_finite"):
            return _of_one(name, own[0])
        if name == "sub" and isinstance(own[1], _Reduced) and own[1].kind != "max":
            return _log_shares(*own)
        if name == "add" and OUTSIDE not in own:
            return _total(*own) or _total(*own[::-1])
        if name == "select_n" and OUTSIDE in own[1:] and own[0] is not OUTSIDE:
            return _checked(self.number(eqn.invars[1]), *own)
        if name == "sub" and isinstance(own[0], _Logits):
            is_max = isinstance(own[1], _Reduced) and own[1].kind == "max"
            fits = is_max and own[1].factor == own[0].factor
            fits = fits and meets(own[0].layout, own[1].layout, own[1].over)
            if not fits or own[0].shift is not None:
                return None
            shift = _Shift(own[1].over, _keys(own[1].masks))
            return own[0]._replace(shift=shift)
        if name == "exp" and isinstance(own[0], _Shares) and own[0].is_log:
            return own[0]._replace(is_log=False)
        if name in ("exp", "exp2") and isinstance(own[0], _Logits):
            base = np.float32(np.log(2) if name == "exp2" else 1)
            factor = float(np.float32(own[0].factor) * base)
            return _Powers(factor, own[0].layout, own[0].masks, own[0].shift)
        if name == "select_n" and own[0] is OUTSIDE and len(own) == 3:
            return self._selected(eqn, own)
        if name == "add" and OUTSIDE in own:
            return self._added(eqn, own)
        return None

    def _scaled(self, eqn: Any, own: list[Any]) -> Any:
        """Returns logits times a number, or the shares of powers."""
        if eqn.primitive.name == "div" and isinstance(own[0], _Powers):
            x, total = own
            fits = isinstance(total, _Reduced) and total.kind == "sum"
            fits = fits and total.factor == x.factor
            fits = fits and meets(x.layout, total.layout, total.over)
            # One maximum for both, the same all along a sum: it cancels.
            fits = fits and total.shift == x.shift
            fits = fits and (
                x.shift is None or all(is_within(d, x.shift.over) for d in total.over)
            )
            if not fits or _keys(x.masks) != _keys(total.masks):
                return None
            # Over a sum of nothing, which is 0, no other share is a number.
            empties = [{(m.key, m.empty) for m in s.masks} for s in (x, total)]
            if total.plus and empties[0] != empties[1]:
                return None
            shares = _Shares(x.factor, total.over, x.layout, x.masks)
            return shares._replace(plus=total.plus)
        if eqn.primitive.name == "div" and own[1] is not OUTSIDE or OUTSIDE not in own:
            return None
        k = own.index(OUTSIDE)
        x, number = own[1 - k], self.number(eqn.invars[k])
        is_plain = isinstance(x, _Logits) and not x.masks and x.shift is None
        if not is_plain or number is None or not 0 < number < np.inf:
            return None
        a, b = np.float32(x.factor), np.float32(number)
        is_product = eqn.primitive.name == "mul"
        return x._replace(factor=float(a * b if is_product else a / b))

    def _reduced(self, name: str, eqn: Any, x: Any) -> _Reduced | None:
        axes = tuple(int(d) for d in eqn.params["axes"])
        found = reduced(x.layout, axes) if isinstance(x, _Logits | _Powers) else None
        if found is None:
            return None
        kept, over = found
        if name == "reduce_max" and isinstance(x, _Logits) and x.shift is None:
            return _Reduced("max", over, kept, x.masks, x.factor)
        if name == "reduce_sum" and isinstance(x, _Powers):
            return _Reduced("sum", over, kept, x.masks, x.factor, x.shift)
        return None

    def _selected(self, eqn: Any, own: list[Any]) -> Any:
        """Returns masked logits, powers or shares."""
        at = next((k for k in (1, 2) if own[k] is not OUTSIDE), 0)
        if not at or own[3 - at] is not OUTSIDE:
            return None
        x, fill = own[at], self.number(eqn.invars[3 - at])
        if eqn.invars[0].aval.dtype != np.bool_ or fill is None:
            return None
        if any(digit.axis is None for axis in x.layout for digit in axis):
            return None
        if isinstance(x, _Logits) and x.shift is None and fill <= -LARGE:
            empty: Empty = "zero" if fill == -np.inf else "uniform"
        elif isinstance(x, _Shares) and x.is_log and fill == -np.inf:
            empty = "zero"
        elif isinstance(x, _Powers | _Shares) and fill == 0:
            if isinstance(x, _Shares) and x.is_log:
                return None
            empty = "zero"
        else:
            return None
        key, is_share = (self.key(eqn.invars[0]), at), isinstance(x, _Shares)
        known = next((m for m in x.masks if m.key == key), None)
        if known is not None:  # The same mask once more.
            is_zero = not isinstance(x, _Logits)
            own = known._replace(empty="zero") if is_zero else known
            return x._replace(masks=tuple(own if m is known else m for m in x.masks))
        if is_share:
            return None
        own_fill = fill if np.isfinite(fill) else 0.0
        mask = _Mask(eqn.invars[0], key, at - 1, empty, own_fill, x.layout)
        return x._replace(masks=(*x.masks, mask))

    def _added(self, eqn: Any, own: list[Any]) -> Any:
        """Returns logits to which a known mask is added."""
        k = own.index(OUTSIDE)
        x, v = own[1 - k], eqn.invars[k]
        if not isinstance(x, _Logits) or x.shift is not None:
            return None
        if any(digit.axis is None for axis in x.layout for digit in axis):
            return None
        values = [self.known_value(v)]
        if values[0] is None and self.is_input(v):
            key = self.key(v)
            mask = _Mask(v, key, None, "uniform", 0.0, x.layout, is_input=True)
            return x._replace(masks=(*x.masks, mask))
        if values[0] is None:
            values = self.of_truths(v)
        if any(value is None for value in values):
            return None
        value = np.stack([np.asarray(value, np.float64) for value in values])
        if not np.all((value == 0) | (value <= -LARGE)):
            return None
        finite = value[np.isfinite(value) & (value != 0)]
        empty: Empty = "all" if np.all(np.isfinite(value)) else "zero"
        if empty == "all" and np.any(value <= -_SWALLOWS):
            empty = "uniform"
        key, fill = self.key(eqn.invars[k]), float(finite.max(initial=-np.inf))
        fill = fill if np.isfinite(fill) else 0.0
        mask = _Mask(eqn.invars[k], key, None, empty, fill, x.layout)
        return x._replace(masks=(*x.masks, mask))


def _of_one(name: str, x: Any) -> Any:
    """Returns the logarithm of shares or of a sum, and what is checked of others."""
    if not isinstance(x, _Shares | _Reduced) or x.plus:
        return None
    if isinstance(x, _Shares):
        return None if x.is_log or name != "log" else x._replace(is_log=True)
    kinds = {"log": ("sum", "log"), "abs": ("sum", "sum"), "is_finite": ("max", name)}
    before, behind = kinds[name]
    return x._replace(kind=behind) if x.kind == before else None


def _sum_and(name: str, x: _Reduced, number: float | None) -> _Reduced | None:
    """Returns a sum plus a small number, or of at least one: its largest term is 1."""
    is_own = x.shift is not None and x.shift.over == x.over
    if not is_own or number is None or not 0 <= x.plus + number <= 1 or number < 0:
        return None
    return x if name == "max" else x._replace(plus=x.plus + number)


def _checked(number: float | None, which: Any, *cases: Any) -> Any:
    """Returns a maximum that is 0 where it is not finite: of a row without any value.

    Args:
      number: The first case, if it is a number.
      which: The choice.
      cases: Both cases.
    """
    x = cases[1]
    is_max = isinstance(x, _Reduced) and x.kind == "max" and number == 0
    return x if is_max and which == x._replace(kind="is_finite") else None


def _log_shares(x: Any, total: _Reduced) -> _Shares | None:
    """Returns logits less the logarithm of the sum of their exponentials."""
    fits = isinstance(x, _Logits) and x.factor == total.factor
    fits = fits and (
        (total.kind == "log" and x.shift == total.shift)
        or (total.kind == "total" and x.shift is None)
    )
    if not fits or not meets(x.layout, total.layout, total.over):
        return None
    shift = total.shift
    is_row = shift is None or all(is_within(d, shift.over) for d in total.over)
    if not is_row or _keys(total.masks) != _keys(x.masks):
        return None
    return _Shares(x.factor, total.over, x.layout, x.masks, is_log=True)


def _total(x: Any, top: Any) -> _Reduced | None:
    """Returns the logarithm of a sum and the maximum that its logits are less."""
    fits = isinstance(x, _Reduced) and isinstance(top, _Reduced)
    if not fits or x.kind != "log" or top.kind != "max" or x.shift is None:
        return None
    is_same = x.shift == _Shift(top.over, _keys(top.masks)) and x.over == top.over
    is_same = is_same and x.factor == top.factor and x.layout == top.layout
    return x._replace(kind="total", shift=None) if is_same else None


def _keys(masks: Sequence[_Mask]) -> frozenset[Any]:
    return frozenset(mask.key for mask in masks)
