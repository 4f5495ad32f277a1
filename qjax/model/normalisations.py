"""Finds softmaxes and normalisations in a traced model.

They scale values by statistics of these values themselves, or are such a statistic:

    softmax:        y = exp(x - max(x)) / sum(exp(x - max(x)))
    logsumexp:      y = max(x) + log(sum(exp(x - max(x))))
    normalisation:  y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

No particular formula is looked for: any division of something made of ``x``, number
by number, by a reduction of ``x`` is one, from the value that all of it is made of. So
are products with such a reciprocal, and differences to the logarithm of a sum of
exponentials. A reduction of a weight is none, nor is one over a batch (BatchNorm in
training, `qjax.model.statistics`).
"""

import dataclasses
from collections.abc import Iterator

import jax.extend.core as jex
import numpy as np

from qjax.model.blocks import constant_of
from qjax.model.flow import Flow
from qjax.model.kept import quantizer_of
from qjax.model.masks import SOFTMAXES, find_masks
from qjax.model.primitives import AFFINE, POINTWISE, names
from qjax.model.statistics import batch_statistics
from qjax.model.trace import CALLS, Equation, kinds_of

SOFTMAX, LOG_SOFTMAX, LOG_SUM = SOFTMAXES
NORM = "norm"

_REDUCTIONS = names("sum", "maximum", "minimum", "reduction")
_SAME = names("keep", "cast") - {"sharding_constraint"}
_MOVES = names("axes") - {"broadcast_in_dim"}
_INSIDE = POINTWISE | _REDUCTIONS | _SAME | _MOVES | {"broadcast_in_dim"}
_POWERS = frozenset("exp exp2".split())
_ROOTS = frozenset("sqrt rsqrt".split())


@dataclasses.dataclass(frozen=True)
class Whole:
    """A softmax or a normalisation.

    Attributes:
      kind: softmax, log_softmax, logsumexp or norm.
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

    def reads(self) -> list[int]:
        """Returns the outside values that members read, the source first."""
        made = {v for e in self.members.values() for v in e.outputs}
        read = [v for at in sorted(self.members) for v in self.members[at].inputs]
        return [*dict.fromkeys(v for v in (self.source, *read) if v not in made)]


def said(kind: str) -> str:
    """Returns the word for the kind of a softmax or normalisation."""
    return "normalisation" if kind == NORM else kind.replace("_", "-")


class Normalisations:
    """A search for softmaxes and normalisations in the data flow of a trace."""

    def __init__(self, flow: Flow):
        self.flow, self.model, self.data = flow, flow.model, flow.data

    def found(self) -> Iterator[Whole]:
        """Yields softmaxes and normalisations in order, with no equation in common.

        Logarithms of sums of exponentials that are no part of them come last.
        """
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
        for name in ("add", "log"):  # What is less its maximum, and what is not.
            for e in self.model.equations:
                whole = self._log_sum(e) if e.primitive.name == name else None
                if whole is not None and not taken.intersection(whole.members):
                    taken.update(whole.members)
                    yield whole

    def _log_sum(self, e: Equation) -> Whole | None:
        """Returns the logarithm of a sum of exponentials that ends at an equation."""
        x, operands = self.flow.common(self.flow.operands(e)), self.flow.operands(e)
        if e.primitive.name == "log":
            sums = [s for s in self._before(e) if s.primitive.name == "reduce_sum"]
            power = self._behind(sums[0].inputs[0]) if len(sums) == 1 else None
            if power is None or power.primitive.name not in _POWERS:
                return None
            x = power.inputs[0]
        elif len(operands) != 2 or not self._is_any_log(operands, x):
            return None
        is_given = x in self.data and self.model.is_real(x)
        if not is_given or not self.model.shape(e.outputs[0]):
            return None
        members = self._between(x, e)
        return None if members is None else self._finished(LOG_SUM, x, members, e)

    def _before(self, e: Equation) -> Iterator[Equation]:
        """Yields the last sum behind an equation, if only moves are between."""
        (v,) = e.inputs
        while (own := self.flow.source.get(v)) is not None:
            if own.primitive.name not in _SAME | _MOVES | {"broadcast_in_dim", "abs"}:
                yield own
                return
            v = own.inputs[0]

    def _is_any_log(self, operands: list[int], x: int) -> bool:
        """Returns whether operands are reduced, one the log of a sum of powers."""
        if x == -1 or not all(self._is_reduced(v, x) for v in operands):
            return False
        return any(self._is_log_of_powers(v, x) for v in operands)

    def _whole(self, e: Equation) -> Whole | None:
        """Returns the softmax or normalisation that divides at an equation, if any."""
        pair = self._pair(e)
        if pair is None:
            return None
        x, (full, reduced) = self.flow.common(pair), pair
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
    ) -> Whole:
        end = e
        if kind != LOG_SUM:
            end, kind = self._with_tail(kind, e, members)
        masks: set[int] = set()
        if kind in SOFTMAXES:
            readers = {v for m in members.values() for v in m.outputs}
            masks, source = find_masks(self.model, self.data, source, readers)
            members.update((self.flow.order[v], self.flow.source[v]) for v in masks)
        if kind == NORM:
            source = self._before_groups(source, members, end)
        self._add_servants(source, members)
        return Whole(kind, source, members, end, bool(masks))

    def _before_groups(
        self, source: int, members: dict[int, Equation], end: Equation
    ) -> int:
        """Goes back before a reshape into groups whose inverse is in a norm's tail."""
        e, shape = self.flow.source.get(source), self.model.shape
        if e is None or e.primitive.name != "reshape":
            return source
        (x,), own = e.inputs, shape(end.outputs[0])
        is_undone = shape(source) != own and shape(x) == own and x in self.data
        users = (self.flow.order[u.outputs[0]] for u in self.flow.users[source])
        if (
            not is_undone
            or source in self.model.outputs
            or not members.keys() >= {*users}
        ):
            return source
        members[self.flow.order[source]] = e
        return x

    def _pair(self, e: Equation) -> tuple[int, int] | None:
        """Returns the operand that an equation scales, and the statistic."""
        operands = self.flow.operands(e)
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
        while (e := self.flow.source.get(v)) is not None:
            name, operands = e.primitive.name, self.flow.operands(e)
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
                e = self.flow.source.get(u)
                if u in known:
                    todo.pop()
                elif e is None or not self.flow.passes(u, x):
                    known[u] = False
                elif e.primitive.name in _REDUCTIONS or _contracts(e):
                    known[u] = True
                elif missing := [w for w in self.flow.operands(e) if w not in known]:
                    todo += missing
                else:
                    known[u] = all(known[w] for w in self.flow.operands(e))
            return known[v]

        return reduced(v)

    def _slice(self, v: int, x: int) -> Iterator[Equation]:
        """Yields the equations between ``x`` and a value."""
        todo, seen = [v], {v, x}
        while todo:
            u = todo.pop()
            e = self.flow.source.get(u)
            if u == x or e is None:
                continue
            yield e
            todo += [w for w in self.flow.operands(e) if w not in seen]
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
        while (e := self.flow.source.get(v)) is not None:
            operands = self.flow.operands(e)
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
        while (e := self.flow.source.get(v)) is not None:
            operands, name = self.flow.operands(e), e.primitive.name
            if name in _POWERS and is_softmax and len(operands) == 1:
                found = v = operands[0]
            elif self._is_passed(e, operands):
                v = operands[0]
            elif name == "sub" and len(operands) == 2:
                before = self.flow.parent[v]
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
            at = self.flow.order[e.outputs[0]]
            if at in found:
                continue
            if not self._is_inside(e):
                return None
            found[at] = e
            for v in e.inputs:
                if v == x or v not in self.data:
                    continue
                if not self.flow.passes(v, x):
                    if v in self.flow.side:
                        continue  # A mask that comes from elsewhere.
                    return None
                todo.append(self.flow.source[v])
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
        while (e := self.flow.only_user(last.outputs[0])) is not None:
            v, name = last.outputs[0], e.primitive.name
            passed[self.flow.order[e.outputs[0]]] = e
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

    def _is_tail(self, kind: str, e: Equation, v: int) -> bool:
        name = e.primitive.name
        others = [u for u in e.inputs if u != v]
        if not self._keeps_size(v, e.outputs[0]):
            return False
        if name == "select_n" and kind == LOG_SOFTMAX:
            fills = (constant_of(self.model, u, self.flow.source) for u in others)
            return any(x is not None and bool(np.all(x == -np.inf)) for x in fills)
        if name == "select_n":  # A norm is selected from behind its site.
            return (
                kind != NORM
                and e.inputs[0] in self.flow.side
                and all(u in self.flow.side or u not in self.data for u in others)
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
        user = self.flow.only_user(e.outputs[0])
        is_choice = user is not None and user.primitive.name == "select_n"
        return is_choice and user is not None and user.inputs[0] not in self.data

    def _add_servants(self, source: int, members: dict[int, Equation]) -> None:
        """Adds values computed of masks for the members alone."""
        for at in range(max(members), -1, -1):
            e = self.model.equations[at]
            if at in members or source in e.outputs or not self.flow.operands(e):
                continue
            users = [
                self.flow.order[u.outputs[0]]
                for v in e.outputs
                for u in self.flow.users[v]
            ]
            returned = set(self.model.outputs).intersection(e.outputs)
            if users and not returned and all(u in members for u in users):
                if self._is_inside(e):
                    members[at] = e

    def is_read_beside(self, v: int, whole: Whole) -> bool:
        """Returns whether equations beside the members read a value."""
        readers = (self.flow.order[u.outputs[0]] for u in self.flow.users[v])
        return v in self.model.outputs or any(k not in whole.members for k in readers)

    # Normalisations that lower in parts.

    def has_rules(self, whole: Whole) -> bool:
        """Returns whether all equations have integer rules with sites of their own."""
        outside = [v for v in whole.reads() if v in self.data]
        has_rules = all(self._has_rule(e, whole) for e in whole.members.values())
        return has_rules and outside == [whole.source] and not whole.is_masked

    def _has_rule(self, e: Equation, whole: Whole) -> bool:
        name, out = e.primitive.name, e.outputs[0]
        data = [v for v in dict.fromkeys(e.inputs) if v in self.data]
        if self.model.is_real(out) and self.model.avals[out].dtype != np.float32:
            return False
        if name == "div" and e.inputs[1] in self.data:
            # The powers of a softmax want more than the codes of a word.
            is_quotient = len(data) == 2 and whole.kind == NORM
            return is_quotient or (len(data) == 1 and self._size(e.inputs[0]) == 1)
        if name in AFFINE and len(data) == 1:
            return self._size(data[0]) == self._size(out)
        if name == "select_n":
            return e.inputs[0] in self.data or self._is_number(e.inputs[0])
        return name not in ("pow", "reduce_prod", "reduce_and", "reduce_or")

    def _is_number(self, v: int) -> bool:
        """Returns whether a known value is one number at every place."""
        while (e := self.flow.source.get(v)) is not None:
            if e.primitive.name not in _SAME | _MOVES | {"broadcast_in_dim"}:
                break
            v = e.inputs[0]
        return self._size(v) == 1


def _contracts(e: Equation) -> bool:
    return e.primitive.name == "dot_general"
