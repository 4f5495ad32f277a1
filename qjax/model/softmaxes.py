"""Reads what a softmax of a traced model computes, as far as integers compute it.

    p = exp(factor * x) / sum(exp(factor * x))        over axes, of what a mask keeps

A softmax is a call of `qjax.model.folding`, with any formula inside. Its equations are
run on symbols: what is left of the formula is a factor, axes and masks, or nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from qjax.integer_softmax import Empty
from qjax.mesh_axes import aligned
from qjax.model.kept import whole_of
from qjax.model.masks import LARGE, SOFTMAXES
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace, evaluate, is_key

_SAME = names("keep") - {"sharding_constraint"}
_MOVES = names("axes") - {"transpose"}


class _Mask(NamedTuple):
    """Truth values of a selection, or numbers to add, and how they mask."""

    variable: Any  # In the call.
    key: Any  # Equal for masks that are computed alike.
    kept: int | None  # Case of a selection that is kept; None: added.
    empty: Empty  # What a row without any kept value is.
    fill: float  # Largest finite number that it puts or adds; 0 if there is none.


class _Shift(NamedTuple):
    """The maximum that is subtracted from logits: its axes, and keys of its masks."""

    axes: frozenset[int]
    masks: frozenset[Any]


class _Logits(NamedTuple):
    factor: float
    masks: tuple[_Mask, ...] = ()
    shift: _Shift | None = None


class _Powers(NamedTuple):
    factor: float
    masks: tuple[_Mask, ...]
    shift: _Shift | None


class _Reduced(NamedTuple):
    kind: str  # max or sum.
    axes: tuple[int, ...]
    masks: tuple[_Mask, ...]
    factor: float
    shift: _Shift | None = None  # Of the powers of a sum.
    is_aligned: bool = False  # Has the rank of the logits, their axes of size 1.


class _Shares(NamedTuple):
    factor: float
    axes: tuple[int, ...]
    masks: tuple[_Mask, ...]


_OUTSIDE = "outside"  # What does not depend on the logits.


@dataclasses.dataclass(frozen=True)
class SoftmaxForm:
    """A softmax that integers compute.

    Attributes:
      axes: Axes that its sums go over.
      factor: Positive factor of its input, a float32.
      empty: What a row is in which the mask keeps nothing.
      fill: Largest finite number that a mask puts or adds; 0 if there is none.
      masks: Masks in the call.
    """

    axes: tuple[int, ...]
    factor: float
    empty: Empty
    fill: float
    masks: tuple[_Mask, ...]

    def keep(self, call: Any, operands: Sequence[Any]) -> jax.Array | None:
        """Returns what the masks keep, for the operands of the call; None for all."""
        jaxpr = call.params["jaxpr"].jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        kept = None
        for mask in self.masks:
            value = _value(jaxpr, env, mask.variable)
            if mask.kept is None:
                own = value > -LARGE / 2
            else:
                own = value if mask.kept == 1 else ~value
            kept = own if kept is None else kept & own
        return kept


def read_softmax(model: Trace, data: set[int], e: Equation) -> SoftmaxForm | None:
    """Returns the form of a softmax; None if integers do not compute it.

    Args:
      model: Trace that holds the call.
      data: Values of the trace that depend on an input.
      e: The call.
    """
    is_softmax = whole_of(e) == SOFTMAXES[0] and len(e.outputs) == 1
    if not is_softmax or data.intersection(e.inputs[1:]):
        return None
    found = _SoftmaxReader(model, e).run()
    if not isinstance(found, _Shares) or not found.factor > 0:
        return None
    empties = {mask.empty for mask in found.masks}
    if len(empties) > 1:
        return None
    fill = max((mask.fill for mask in found.masks if mask.fill), default=0.0)
    (empty,) = empties or {"zero"}
    return SoftmaxForm(found.axes, found.factor, empty, fill, found.masks)


class _SoftmaxReader:
    """A run of a call on symbols."""

    def __init__(self, model: Trace, e: Equation):
        self.model = model
        self.jaxpr = e.params["jaxpr"].jaxpr
        self.outer = dict(zip(self.jaxpr.invars, e.inputs, strict=True))
        self.shape = self.jaxpr.invars[0].aval.shape
        # Of values of the model, which are numbers, and of those in the call.
        self.makers: dict[Any, Any] = {
            v: own for own in model.equations for v in own.outputs
        }
        self.makers |= {v: eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}
        self.known: dict[Any, Any] = {}
        self.keys: dict[Any, int] = {}
        self.numbers: dict[Any, int] = {}

    def run(self) -> Any:
        """Returns the symbol of the result, None where it has none."""
        self.symbols: dict[Any, Any] = dict.fromkeys(self.jaxpr.invars, _OUTSIDE)
        self.symbols[self.jaxpr.invars[0]] = _Logits(1.0)
        is_single = all(v.aval.dtype == np.float32 for v in self.jaxpr.invars[:1])
        for eqn in self.jaxpr.eqns if is_single else ():
            own = [self._symbol(v) for v in eqn.invars]
            if all(s is _OUTSIDE for s in own):
                found: Any = _OUTSIDE
            else:
                found = self._step(eqn, own)
            self.symbols.update(dict.fromkeys(eqn.outvars, found))
        return self._symbol(self.jaxpr.outvars[0])

    def _symbol(self, v: Any) -> Any:
        return _OUTSIDE if isinstance(v, jex.Literal) else self.symbols.get(v)

    def _step(self, eqn: Any, own: list[Any]) -> Any:
        name = eqn.primitive.name
        if None in own:
            return None
        if name in _SAME:
            return own[0]
        if name == "convert_element_type":
            return own[0] if eqn.outvars[0].aval.dtype == np.float32 else None
        if name in _MOVES:
            return self._moved(eqn, own[0])
        if name in ("mul", "div"):
            return self._scaled(eqn, own)
        if name == "max" and _OUTSIDE in own:
            k = own.index(_OUTSIDE)
            is_same = isinstance(own[1 - k], _Reduced) and own[1 - k].kind == "max"
            is_least = is_same and self._number(eqn.invars[k]) == -np.inf
            return own[1 - k] if is_least else None
        if name in ("reduce_max", "reduce_sum"):
            return self._reduced(name, eqn, own[0])
        if name == "sub" and isinstance(own[0], _Logits):
            is_max = isinstance(own[1], _Reduced) and own[1].kind == "max"
            fits = is_max and own[1].is_aligned and own[1].factor == own[0].factor
            if not fits or own[0].shift is not None:
                return None
            shift = _Shift(frozenset(own[1].axes), _keys(own[1].masks))
            return own[0]._replace(shift=shift)
        if name == "exp" and isinstance(own[0], _Logits):
            return _Powers(own[0].factor, own[0].masks, own[0].shift)
        if name == "select_n" and own[0] is _OUTSIDE and len(own) == 3:
            return self._selected(eqn, own)
        if name == "add" and _OUTSIDE in own:
            return self._added(eqn, own)
        return None

    def _scaled(self, eqn: Any, own: list[Any]) -> Any:
        """Returns logits times a number, or the shares of powers."""
        if eqn.primitive.name == "div" and isinstance(own[0], _Powers):
            x, total = own
            fits = isinstance(total, _Reduced) and total.kind == "sum"
            fits = fits and total.is_aligned and total.factor == x.factor
            # One maximum for both, the same all along a sum: it cancels.
            fits = fits and total.shift == x.shift
            fits = fits and (x.shift is None or x.shift.axes.issuperset(total.axes))
            if not fits or _keys(x.masks) != _keys(total.masks):
                return None
            return _Shares(x.factor, total.axes, x.masks)
        if (
            eqn.primitive.name == "div"
            and own[1] is not _OUTSIDE
            or _OUTSIDE not in own
        ):
            return None
        k = own.index(_OUTSIDE)
        x, number = own[1 - k], self._number(eqn.invars[k])
        is_plain = isinstance(x, _Logits) and not x.masks and x.shift is None
        if not is_plain or number is None or not 0 < number < np.inf:
            return None
        a, b = np.float32(x.factor), np.float32(number)
        return _Logits(float(a * b if eqn.primitive.name == "mul" else a / b))

    def _reduced(self, name: str, eqn: Any, x: Any) -> _Reduced | None:
        axes = tuple(int(d) for d in eqn.params["axes"])
        if name == "reduce_max" and isinstance(x, _Logits) and x.shift is None:
            return _Reduced("max", axes, x.masks, x.factor)
        if name == "reduce_sum" and isinstance(x, _Powers):
            return _Reduced("sum", axes, x.masks, x.factor, x.shift)
        return None

    def _moved(self, eqn: Any, x: Any) -> Any:
        """Returns a statistic that is back in the rank of the logits."""
        if not isinstance(x, _Reduced):
            same = eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape
            return x if same and eqn.primitive.name == "reshape" else None
        kept = [d for d in range(len(self.shape)) if d not in x.axes]
        ones = tuple(1 if d in x.axes else n for d, n in enumerate(self.shape))
        out = eqn.outvars[0].aval.shape
        if x.is_aligned:
            return x if out == ones else None
        if out != ones:
            return None
        if eqn.primitive.name == "broadcast_in_dim":
            along = [int(d) for d in eqn.params["broadcast_dimensions"]]
            return x._replace(is_aligned=True) if along == kept else None
        return x._replace(is_aligned=True)  # A reshape keeps the order.

    def _selected(self, eqn: Any, own: list[Any]) -> Any:
        """Returns masked logits, powers or shares."""
        at = next((k for k in (1, 2) if own[k] is not _OUTSIDE), 0)
        if not at or own[3 - at] is not _OUTSIDE:
            return None
        x, fill = own[at], self._number(eqn.invars[3 - at])
        if eqn.invars[0].aval.dtype != np.bool_ or fill is None:
            return None
        if isinstance(x, _Logits) and x.shift is None and fill <= -LARGE:
            empty: Empty = "zero" if fill == -np.inf else "uniform"
        elif isinstance(x, _Powers) and fill == 0:
            empty = "zero"
        else:
            return None
        key = self._key(eqn.invars[0]), at
        known = next((m for m in x.masks if m.key == key), None)
        if known is not None:  # The same mask once more.
            return x
        own_fill = fill if np.isfinite(fill) else 0.0
        mask = _Mask(eqn.invars[0], key, at - 1, empty, own_fill)
        return x._replace(masks=(*x.masks, mask))

    def _added(self, eqn: Any, own: list[Any]) -> Any:
        """Returns logits to which a known mask is added."""
        k = own.index(_OUTSIDE)
        x, value = own[1 - k], self._known(eqn.invars[k])
        if not isinstance(x, _Logits) or x.shift is not None or value is None:
            return None
        value = np.asarray(value, np.float64)
        if not np.all((value == 0) | (value <= -LARGE)):
            return None
        finite = value[np.isfinite(value) & (value != 0)]
        empty: Empty = "all" if np.all(np.isfinite(value)) else "zero"
        key, fill = self._key(eqn.invars[k]), float(finite.max(initial=-np.inf))
        fill = fill if np.isfinite(fill) else 0.0
        mask = _Mask(eqn.invars[k], key, None, empty, fill)
        return x._replace(masks=(*x.masks, mask))

    # Values that do not depend on the logits.

    def _number(self, v: Any) -> float | None:
        """Returns a known value that is one number everywhere."""
        value = self._known(v)
        if value is None or not np.size(value):
            return None
        first = np.asarray(value).flat[0]
        return float(first) if np.all(np.asarray(value) == first) else None

    def _known(self, v: Any) -> Any:
        """Returns what constants of the model alone determine; None for others."""
        if isinstance(v, jex.Literal):
            return v.val
        if v not in self.known:
            self.known[v] = self._constant(v)
        return self.known[v]

    def _constant(self, v: Any) -> Any:
        if v in self.outer:
            return self._known(self.outer[v])
        if v in self.model.constants:
            return _number_array(self.model.constants[v])
        e = self.makers.get(v)
        own = [] if e is None else [self._known(u) for u in _operands(e)]
        is_made = e is not None and (bool(own) or e.primitive.name == "iota")
        if not is_made or any(x is None for x in own):
            return None
        with jax.ensure_compile_time_eval():
            found = evaluate(e, *own) if isinstance(e, Equation) else _bound(e, own)
        return _number_array(found[_results(e).index(v)])

    def _key(self, v: Any) -> int:
        """Returns a number that is the same for values that are computed alike."""
        if isinstance(v, jex.Literal):
            return self._numbered("literal", repr(v.val))
        if v in self.outer:
            return self._key(self.outer[v])
        if v not in self.keys:
            e = self.makers.get(v)
            if e is None:
                self.keys[v] = self._numbered("value", v)
            else:
                own = tuple(map(self._key, _operands(e)))
                place = _results(e).index(v)
                text = str(e.primitive), str(e.params)
                self.keys[v] = self._numbered(*text, own, place)
        return self.keys[v]

    def _numbered(self, *parts: Any) -> int:
        return self.numbers.setdefault(parts, len(self.numbers))


def _keys(masks: Sequence[_Mask]) -> frozenset[Any]:
    return frozenset(mask.key for mask in masks)


def _number_array(x: Any) -> np.ndarray | None:
    """Returns a known array of numbers; None for a traced one, or a random key."""
    return None if isinstance(x, jax.core.Tracer) or is_key(x) else np.asarray(x)


def _operands(e: Any) -> Sequence[Any]:
    """Returns the operands of an equation, of a trace or of a call."""
    return e.inputs if isinstance(e, Equation) else e.invars


def _results(e: Any) -> list[Any]:
    return list(e.outputs if isinstance(e, Equation) else e.outvars)


def _value(jaxpr: Any, env: dict[Any, Any], v: Any) -> Any:
    """Computes a value of a call from its operands."""
    if isinstance(v, jex.Literal):
        return v.val
    if v not in env:
        eqn = next(eqn for eqn in jaxpr.eqns if v in eqn.outvars)
        own = [_value(jaxpr, env, u) for u in eqn.invars]
        env.update(zip(eqn.outvars, _bound(eqn, own), strict=True))
    return env[v]


def _bound(eqn: Any, own: Sequence[Any]) -> Sequence[Any]:
    if eqn.primitive.name == "pvary":
        return own  # Operands are aligned where they meet.
    own = tuple(aligned(own)) if len(own) > 1 else own
    out = eqn.primitive.bind(*own, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else (out,)
