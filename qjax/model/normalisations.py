"""Finds softmaxes and normalisations in a traced model and makes each one equation.

Both scale values by statistics of these values themselves:

    softmax:        y = exp(x - max(x)) / sum(exp(x - max(x)))
    normalisation:  y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

No particular formula is looked for: any division of something made of ``x``, number
by number, by a reduction of ``x`` is one, from the value that all of it is made of. So
are products with such a reciprocal, and differences to the logarithm of a sum of
exponentials. A reduction of a weight is none, nor is one over a batch (BatchNorm in
training, `qjax.model.statistics`).
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from qjax.model.elementwise import SOFTMAXES, find_masks
from qjax.model.primitives import AFFINE, POINTWISE, names
from qjax.model.statistics import batch_statistics
from qjax.model.trace import (
    CALLS,
    WHOLE,
    Equation,
    Trace,
    evaluate,
    kinds_of,
    quantizer_of,
)

SOFTMAX, LOG_SOFTMAX = SOFTMAXES
NORM = "norm"

_REDUCTIONS = names("sum", "maximum", "minimum", "reduction")
_SAME = names("keep", "cast") - {"sharding_constraint"}
_MOVES = names("axes") - {"broadcast_in_dim"}
_INSIDE = POINTWISE | _REDUCTIONS | _SAME | _MOVES | {"broadcast_in_dim"}
_POWERS = frozenset("exp exp2".split())
_ROOTS = frozenset("sqrt rsqrt".split())


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A softmax or a normalisation.

    Attributes:
      kind: softmax, log_softmax or norm.
      source: The value that all of it is made of.
      members: Number of an equation -> the equation.
      end: The last one.
      is_masked: Whether a mask before it is a part of it.
    """

    kind: str
    source: int
    members: dict[int, Equation]
    end: Equation
    is_masked: bool


def said(kind: str) -> str:
    """Returns the word for the kind of a softmax or normalisation."""
    return "normalisation" if kind == NORM else kind.replace("_", "-")


def fold_normalisations(
    model: Trace, data: set[int], *, in_parts: bool = False
) -> Trace:
    """Makes one equation of each softmax and of each normalisation.

    Args:
      model: Trace.
      data: Values that depend on an input.
      in_parts: Whether those stay as they are whose equations all have integer rules.

    Returns:
      The trace with calls in place of their equations; `whole_of` tells the kind of
      one. The first operand of a call is what it scales, its first output the result;
      others are statistics that are read elsewhere too.
    """
    finder = _Finder(model, data)
    found = [w for w in finder.found() if not (in_parts and finder.has_rules(w))]
    return _folded(model, found, finder) if found else model


class _Finder:
    """A search that knows for each value the values that all its data pass through."""

    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data = model, data
        self.source = {v: e for e in model.equations for v in e.outputs}
        self.users: dict[int, list[Equation]] = collections.defaultdict(list)
        self.order: dict[int, int] = {}
        self.side: set[int] = {v for v in model.inputs if self._is_truth(v)}
        self.parent: dict[int, int] = {}  # Value -> last value that all its data pass.
        self.depth: dict[int, int] = {-1: 0}
        for v in model.inputs:
            if v in data:
                self._place(v, -1)
        for k, e in enumerate(model.equations):
            for v in dict.fromkeys(e.inputs):
                self.users[v].append(e)
            operands = [v for v in dict.fromkeys(e.inputs) if v in data]
            is_side = bool(operands) and self.side.issuperset(operands)
            before = self._common(self.operands(e))
            for v in e.outputs:
                self.order[v] = k
                if v in data:
                    self._place(v, before)
                    if is_side or self._is_truth(v):
                        self.side.add(v)

    def _place(self, v: int, before: int) -> None:
        self.parent[v] = before
        self.depth[v] = self.depth[before] + 1

    def _is_truth(self, v: int) -> bool:
        return self.model.avals[v].dtype == np.bool_

    def operands(self, e: Equation) -> list[int]:
        """Returns the data of an equation, without masks if there is other data."""
        found = [v for v in dict.fromkeys(e.inputs) if v in self.data]
        return [v for v in found if v not in self.side] or found

    def _common(self, values: Iterable[int]) -> int:
        """Returns the last value that all data of some values pass; -1 for none.

        A value passes through itself.
        """
        found: int | None = None
        for v in values:
            if found is None:
                found = v
            while found != v:
                if self.depth[found] >= self.depth[v]:
                    found = self.parent[found]
                else:
                    v = self.parent[v]
        return -1 if found is None else found

    def _passes(self, v: int, x: int) -> bool:
        """Returns whether all data of a value pass through ``x``."""
        while self.depth[v] > self.depth[x]:
            v = self.parent[v]
        return v == x

    # The search.

    def found(self) -> Iterator[_Whole]:
        """Yields softmaxes and normalisations in order, with no equation in common."""
        statistics = batch_statistics(self.model, self.data)
        taken: set[int] = set()
        for k, e in enumerate(self.model.equations):
            whole = None if k in taken else self._whole(e)
            if whole is None or taken.intersection(whole.members):
                continue
            made = {v for m in whole.members.values() for v in m.outputs}
            if whole.kind == NORM and made & statistics:
                continue
            taken.update(whole.members)
            yield whole

    def _whole(self, e: Equation) -> _Whole | None:
        """Returns the softmax or normalisation that divides at an equation, if any."""
        pair = self._pair(e)
        if pair is None:
            return None
        x, (full, reduced) = self._common(pair), pair
        if x == -1 or not self._scales(x, full, reduced):
            return None
        power = self._behind(full)
        is_softmax = (
            power is not None
            and power.primitive.name in _POWERS
            and self._sums_powers(reduced, x)
        )
        is_log = e.primitive.name == "sub"
        if is_log and not self._is_log_of_powers(reduced, x):
            return None
        kind = LOG_SOFTMAX if is_log else SOFTMAX if is_softmax else NORM
        for source in (self._widened(x, is_softmax), x):
            members = self._between(source, e)
            if members is not None and self._may_be_source(source, e):
                return self._finished(kind, source, members, e)
        return None

    def _finished(
        self, kind: str, source: int, members: dict[int, Equation], e: Equation
    ) -> _Whole:
        end, kind = self._with_tail(kind, e, members)
        masks: set[int] = set()
        if kind in SOFTMAXES:
            readers = {v for m in members.values() for v in m.outputs}
            masks, source = find_masks(self.model, self.data, source, readers)
            members.update((self.order[v], self.source[v]) for v in masks)
        self._add_servants(source, members)
        return _Whole(kind, source, members, end, bool(masks))

    def _pair(self, e: Equation) -> tuple[int, int] | None:
        """Returns the operand that an equation scales, and the statistic."""
        operands = self.operands(e)
        if len(operands) != 2 or len(e.inputs) != 2:
            return None
        a, b = e.inputs
        if e.primitive.name in ("div", "sub"):
            return a, b
        if e.primitive.name == "mul":
            if self._is_reciprocal(b):
                return a, b
            if self._is_reciprocal(a):
                return b, a
        return None

    def _is_reciprocal(self, v: int) -> bool:
        """Returns whether a value is one over another, times known values."""
        while (e := self.source.get(v)) is not None:
            name, operands = e.primitive.name, self.operands(e)
            if len(operands) != 1:
                return False
            is_divisor = name == "div" and e.inputs[1] == operands[0]
            if name == "rsqrt" or is_divisor:
                return True
            if name == "integer_pow":
                return bool(e.params["y"] < 0)
            if name == "pow":
                return e.inputs[0] == operands[0]
            scales = name in ("mul", "div", "neg")
            if not scales and name not in _SAME | _MOVES | {"broadcast_in_dim"}:
                return False
            (v,) = operands
        return False

    def _scales(self, x: int, full: int, reduced: int) -> bool:
        return self._is_reduced(reduced, x) and not self._is_reduced(full, x)

    def _is_reduced(self, v: int, x: int) -> bool:
        """Returns whether every path from ``x`` to a value passes a reduction."""
        known: dict[int, bool] = {x: False}

        def reduced(v: int) -> bool:
            todo = [v]
            while todo:
                u = todo[-1]
                e = self.source.get(u)
                if u in known:
                    todo.pop()
                elif e is None or not self._passes(u, x):
                    known[u] = False
                elif e.primitive.name in _REDUCTIONS or _contracts(e):
                    known[u] = True
                elif missing := [w for w in self.operands(e) if w not in known]:
                    todo += missing
                else:
                    known[u] = all(known[w] for w in self.operands(e))
            return known[v]

        return reduced(v)

    def _slice(self, v: int, x: int) -> Iterator[Equation]:
        """Yields the equations between ``x`` and a value."""
        todo, seen = [v], {v, x}
        while todo:
            u = todo.pop()
            e = self.source.get(u)
            if u == x or e is None:
                continue
            yield e
            todo += [w for w in self.operands(e) if w not in seen]
            seen.update(e.inputs)

    def _sums_powers(self, v: int, x: int) -> bool:
        """Returns whether a value is made of sums of exponentials, without roots."""
        equations = [*self._slice(v, x)]
        sums = [e for e in equations if e.primitive.name == "reduce_sum"]
        powers = [self._behind(e.inputs[0]) for e in sums]
        has_root = any(e.primitive.name in _ROOTS for e in equations)
        is_power = (p is not None and p.primitive.name in _POWERS for p in powers)
        return any(is_power) and not has_root

    def _is_log_of_powers(self, v: int, x: int) -> bool:
        names = {e.primitive.name for e in self._slice(v, x)}
        return "log" in names and self._sums_powers(v, x)

    def _behind(self, v: int) -> Equation | None:
        """Returns the equation behind a value, through moves and masks."""
        while (e := self.source.get(v)) is not None:
            operands = self.operands(e)
            if not self._is_passed(e, operands):
                return e
            (v,) = operands
        return None

    def _is_passed(self, e: Equation, operands: list[int]) -> bool:
        """Returns whether an equation moves values or masks them."""
        name = e.primitive.name
        if len(operands) != 1 or operands[0] not in e.inputs:
            return False
        masks = name == "select_n" or (name == "mul" and len({*e.inputs}) == 2)
        return name in _SAME | _MOVES | {"broadcast_in_dim"} or masks

    def _widened(self, x: int, is_softmax: bool) -> int:
        """Goes back from a value to the value before centring."""
        found = v = x
        while (e := self.source.get(v)) is not None:
            operands, name = self.operands(e), e.primitive.name
            if name in _POWERS and is_softmax and len(operands) == 1:
                found = v = operands[0]
            elif self._is_passed(e, operands):
                v = operands[0]
            elif name == "sub" and len(operands) == 2:
                before = self.parent[v]
                if before == -1 or not self._scales(before, *e.inputs):
                    break
                if self._between(before, e) is None:
                    break
                found = v = before
            else:
                break
        return found

    def _between(self, x: int, end: Equation) -> dict[int, Equation] | None:
        """Returns all equations between ``x`` and an end; None if some do not fit."""
        found: dict[int, Equation] = {}
        todo = [end]
        while todo:
            e = todo.pop()
            at = self.order[e.outputs[0]]
            if at in found:
                continue
            if not self._is_inside(e):
                return None
            found[at] = e
            for v in e.inputs:
                if v == x or v not in self.data:
                    continue
                if not self._passes(v, x):
                    if v in self.side:
                        continue  # A mask that comes from elsewhere.
                    return None
                todo.append(self.source[v])
        return found

    def _is_inside(self, e: Equation) -> bool:
        if e.primitive in CALLS:
            jaxprs = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(e.params)]
            return not quantizer_of(e) and all(kinds_of(j) is not None for j in jaxprs)
        return e.primitive.name in _INSIDE or (
            _contracts(e) and self.data.issuperset(e.inputs)
        )

    def _may_be_source(self, x: int, end: Equation) -> bool:
        has_axes = bool(self.model.shape(end.outputs[0]))
        return (
            self.model.is_real(x) and has_axes and self._keeps_size(x, end.outputs[0])
        )

    def _keeps_size(self, a: int, b: int) -> bool:
        return self._size(a) == self._size(b)

    def _size(self, v: int) -> int:
        return int(np.prod(self.model.shape(v), dtype=np.int64))

    def _with_tail(
        self, kind: str, end: Equation, members: dict[int, Equation]
    ) -> tuple[Equation, str]:
        """Extends the members by what belongs to them: scale, bias, mask, exp, log."""
        passed: dict[int, Equation] = {}
        last = end
        while (e := self._only_user(last.outputs[0])) is not None:
            v, name = last.outputs[0], e.primitive.name
            passed[self.order[e.outputs[0]]] = e
            if self._is_tail(kind, e, v):
                if name in _POWERS:
                    kind = SOFTMAX
                elif name == "log":
                    kind = LOG_SOFTMAX
                members.update(passed)
                passed, end = {}, e
            elif name not in _SAME | _MOVES:
                break
            last = e
        return end, kind

    def _only_user(self, v: int) -> Equation | None:
        users = self.users[v]
        return users[0] if len(users) == 1 and v not in self.model.outputs else None

    def _is_tail(self, kind: str, e: Equation, v: int) -> bool:
        name = e.primitive.name
        others = [u for u in e.inputs if u != v]
        if not self._keeps_size(v, e.outputs[0]):
            return False
        if name == "select_n":
            return e.inputs[0] in self.side and all(
                u in self.side or u not in self.data for u in others
            )
        if kind != NORM:
            return (kind == LOG_SOFTMAX and name in _POWERS) or (
                kind == SOFTMAX and name == "log"
            )
        is_divisor = name == "div" and e.inputs[1] == v
        known = e.inputs.count(v) == 1 and not self.data.intersection(others)
        return name in AFFINE and known and not is_divisor and not self._drops(e)

    def _drops(self, e: Equation) -> bool:
        """Returns whether an equation is the scaling of a dropout."""
        user = self._only_user(e.outputs[0])
        is_choice = user is not None and user.primitive.name == "select_n"
        return is_choice and user is not None and user.inputs[0] not in self.data

    def _add_servants(self, source: int, members: dict[int, Equation]) -> None:
        """Adds values computed of masks for the members alone."""
        for at in range(max(members), -1, -1):
            e = self.model.equations[at]
            if at in members or source in e.outputs or not self.operands(e):
                continue
            users = [self.order[u.outputs[0]] for v in e.outputs for u in self.users[v]]
            returned = set(self.model.outputs).intersection(e.outputs)
            if users and not returned and all(u in members for u in users):
                if self._is_inside(e):
                    members[at] = e

    def is_read_beside(self, v: int, whole: _Whole) -> bool:
        """Returns whether equations beside the members read a value."""
        readers = (self.order[u.outputs[0]] for u in self.users[v])
        return v in self.model.outputs or any(k not in whole.members for k in readers)

    # Normalisations that lower in parts.

    def has_rules(self, whole: _Whole) -> bool:
        """Returns whether all equations have integer rules with sites of their own."""
        outside = _outside(whole, self.data)
        has_rules = all(map(self._has_rule, whole.members.values()))
        return has_rules and outside == [whole.source] and not whole.is_masked

    def _has_rule(self, e: Equation) -> bool:
        name, out = e.primitive.name, e.outputs[0]
        data = [v for v in dict.fromkeys(e.inputs) if v in self.data]
        if self.model.is_real(out) and self.model.avals[out].dtype != np.float32:
            return False
        if name == "div" and e.inputs[1] in self.data:
            return len(data) == 1 and self._size(e.inputs[0]) == 1
        if name in AFFINE and len(data) == 1:
            return self._size(data[0]) == self._size(out)
        if name == "select_n":
            return e.inputs[0] in self.data or self._is_number(e.inputs[0])
        return name not in ("pow", "reduce_prod", "reduce_and", "reduce_or")

    def _is_number(self, v: int) -> bool:
        """Returns whether a known value is one number at every place."""
        while (e := self.source.get(v)) is not None:
            if e.primitive.name not in _SAME | _MOVES | {"broadcast_in_dim"}:
                break
            v = e.inputs[0]
        return self._size(v) == 1


def _contracts(e: Equation) -> bool:
    return e.primitive.name == "dot_general"


def _outside(whole: _Whole, known: set[int] | None = None) -> list[int]:
    """Returns outside values that members read, the source first, among ``known``."""
    made = {v for e in whole.members.values() for v in e.outputs}
    reads = [v for at in sorted(whole.members) for v in whole.members[at].inputs]
    found = dict.fromkeys(v for v in (whole.source, *reads) if v not in made)
    return [v for v in found if known is None or v in known]


# The calls.


def _folded(model: Trace, found: list[_Whole], finder: _Finder) -> Trace:
    """Returns the trace with one equation for each softmax or normalisation.

    A statistic that is read elsewhere may go into what the others wait for: they stay
    as they are then.
    """
    calls = [(whole, _call(model, whole, finder)) for whole in found]
    folded = _replaced(model, calls, finder.order)
    if not _is_ordered(folded):
        calls = [(whole, call) for whole, call in calls if len(call.outputs) == 1]
        folded = _replaced(model, calls, finder.order)
    return folded


def _replaced(
    model: Trace, calls: list[tuple[_Whole, Equation]], order: dict[int, int]
) -> Trace:
    gone = {at for whole, _ in calls for at in whole.members}
    placed: dict[int, list[Equation]] = collections.defaultdict(list)
    for _, call in calls:
        placed[max((order.get(v, -1) for v in call.inputs), default=-1)].append(call)
    equations = list(placed[-1])
    for k, e in enumerate(model.equations):
        equations += [] if k in gone else [e]
        equations += placed[k]
    return dataclasses.replace(model, equations=tuple(equations))


def _is_ordered(model: Trace) -> bool:
    """Returns whether each equation comes after the equations that it reads."""
    made = {*model.inputs, *model.constants}
    for e in model.equations:
        if not made.issuperset(e.inputs):
            return False
        made.update(e.outputs)
    return True


def _call(model: Trace, whole: _Whole, finder: _Finder) -> Equation:
    equations = [whole.members[at] for at in sorted(whole.members)]
    made = {v for e in equations for v in e.outputs}
    end = whole.end.outputs[0]
    numbers = {v: x for v, x in model.constants.items() if _is_number(x)}
    inputs = tuple(v for v in _outside(whole) if v not in numbers)
    others = {v for v in made - {end} if finder.is_read_beside(v, whole)}
    outputs = (end, *sorted(others))

    def run(*values: Any) -> list[Any]:
        env = numbers | dict(zip(inputs, values, strict=True))
        for e in equations:
            out = evaluate(e, *(env[v] for v in e.inputs))
            env.update(zip(e.outputs, out, strict=True))
        return [env[v] for v in outputs]

    run.__name__ = run.__qualname__ = WHOLE + whole.kind
    types = (model.avals[v] for v in inputs)
    (call,) = jax.make_jaxpr(jax.jit(run))(*types).jaxpr.eqns
    return Equation(call.primitive, call.params, inputs, outputs, whole.end.path)


def _is_number(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and np.ndim(x) == 0
