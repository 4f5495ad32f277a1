"""Takes masks out of what is added before a softmax, as far as both are told apart.

    scores + (bias + mask)              = (scores + bias) + mask
    scores + where(kept, bias, -1e9)    = (scores + bias) + where(kept, 0, -1e9)
    scores - penalty                    = scores + (-penalty)

for what is kept, and what is not counts for nothing. A bias that is known is split by
its numbers: what is -100 or less masks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core.primitives import add_p, mul_p, neg_p

from qjax.integer_calls import LARGE
from qjax.model.blocks import constant_of
from qjax.model.masks import MaskFinder
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace

_MOVES = names("axes", "keep", "cast")
_FACTORS = {"mul", "div"}
_SUMS = {"add", "add_any", "sub"}
_PASSED = _MOVES | _SUMS | _FACTORS | names("select")


class _BiasAndMask(NamedTuple):
    """A bias and a mask, whose sum a value is; None for zero."""

    bias: int | None
    mask: int | None


class _UnsplitError(Exception):
    """An error for a value of which a mask is no summand."""


def masks_apart(model: Trace, data: set[int]) -> Trace:
    """Takes masks out of what is added before softmaxes.

    Args:
      model: Trace.
      data: Values that depend on an input.

    Returns:
      The trace; a value that masks may have other large numbers.
    """
    splitter = _Splitter(model, data)
    equations: list[Equation] = []
    for e in model.equations:
        equations += splitter.split(e)
    if len(equations) == len(model.equations):
        return model
    return dataclasses.replace(
        model,
        equations=tuple(_read(equations, model.outputs)),
        constants=splitter.constants,
        avals=splitter.avals,
    )


def _read(equations: list[Equation], outputs: Any) -> list[Equation]:
    """Returns the equations whose results are read, or have no result."""
    read, found = {*outputs}, []
    for e in reversed(equations):
        if not e.outputs or read.intersection(e.outputs):
            read.update(e.inputs)
            found.append(e)
    return found[::-1]


class _Splitter:
    """Equations in which masks are added last."""

    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data, self.finder = model, data, MaskFinder(model, data)
        self.constants, self.avals = dict(model.constants), dict(model.avals)
        self.new: list[Equation] = []

    def split(self, e: Equation) -> list[Equation]:
        """Returns what computes an equation, with masks apart."""
        name, operands = e.primitive.name, e.inputs
        if name not in _SUMS or len({*operands}) != 2:
            return [e]
        if not self.model.is_real(e.outputs[0]):
            return [e]
        kinds = [self.finder.part(v) for v in operands]
        at = (
            1
            if name == "sub"
            else next((k for k in (1, 0) if kinds[k] == "mixture"), 1)
        )
        is_mask = kinds[at] == "mixture" or (name == "sub" and kinds[at] == "mask")
        scores, kind = operands[1 - at], kinds[1 - at]
        is_sum = scores in self.data and kind not in ("mask", "mixture")
        if not is_mask or not is_sum or not self._leads(e.outputs[0]):
            return [e]
        self.new = []
        try:
            parts = self._signed(e, self._parts(operands[at]), name == "sub")
        except _UnsplitError:
            return [e]
        if parts.mask is None:
            return [e]
        shape = self.model.avals[e.outputs[0]]
        if parts.bias is not None:
            scores = self._add(e, scores, parts.bias, shape)
        last = (scores, parts.mask)
        self.new.append(dataclasses.replace(e, primitive=add_p, params={}, inputs=last))
        return self.new

    def _leads(self, v: int) -> bool:
        """Returns whether a value goes to exponentials, through sums and moves."""
        todo, seen = [v], {v}
        while todo:
            for e in self.finder.users[todo.pop()]:
                if e.primitive.name in ("exp", "exp2", "reduce_max"):
                    return True
                if e.primitive.name in _PASSED:
                    todo += [u for u in e.outputs if u not in seen]
                    seen.update(e.outputs)
        return False

    def _parts(self, v: int) -> _BiasAndMask:
        """Returns bias and mask of a value; raises _UnsplitError for others."""
        kind = self.finder.part(v)
        if kind == "mask":
            return _BiasAndMask(None, v)
        if kind != "mixture":
            return _BiasAndMask(self._counted(v), None)
        if v in self.constants:
            return self._of_constant(v)
        e = self.finder.source[v]
        name = e.primitive.name
        if name in _MOVES:
            return self._each(e, 0, self._parts(e.inputs[0]))
        if name in _FACTORS:
            return self._scaled(e)
        if name in _SUMS:
            a, b = map(self._parts, e.inputs)
            b = self._signed(e, b, name == "sub")
            both = zip(a, b, strict=True)
            return _BiasAndMask(*(self._sum(e, x, y) for x, y in both))
        if name == "select_n" and len(e.inputs) == 3:
            return self._chosen(e)
        raise _UnsplitError

    def _of_constant(self, v: int) -> _BiasAndMask:
        value = np.asarray(self.constants[v])
        masks = value.astype(np.float64) <= -LARGE
        if not np.any(masks):
            raise _UnsplitError
        zero = np.zeros((), value.dtype)
        bias, mask = np.where(masks, zero, value), np.where(masks, value, zero)
        return _BiasAndMask(self._constant(bias), self._constant(mask))

    def _scaled(self, e: Equation) -> _BiasAndMask:
        numbers = [constant_of(self.model, v, self.finder.source) for v in e.inputs]
        at = 0 if numbers[1] is not None else 1
        number = numbers[1 - at]
        if number is None or not np.all(number > 0):
            raise _UnsplitError
        if e.primitive.name == "div" and at:
            raise _UnsplitError
        return self._each(e, at, self._parts(e.inputs[at]))

    def _chosen(self, e: Equation) -> _BiasAndMask:
        """Splits a choice between a bias and what masks."""
        which, *cases = e.inputs
        parts = [self._parts(v) for v in cases]
        zero = self._zeros(e)
        whole = lambda own: tuple(zero if v is None else v for v in own)
        mask = self._made(e, (which, *whole(p.mask for p in parts)))
        known = [constant_of(self.model, v, self.finder.source) for v in cases]
        is_masked = [
            k is not None and bool(np.all(np.asarray(k, np.float64) <= -LARGE))
            for k in known
        ]
        if any(is_masked):  # What the other case is there counts for nothing.
            return _BiasAndMask(parts[is_masked.index(False)].bias, mask)
        return _BiasAndMask(self._made(e, (which, *whole(p.bias for p in parts))), mask)

    def _counted(self, v: int) -> int:
        """Returns an input as a value with a site; any other value as it is."""
        chain, u = [], v
        while (e := self.finder.source.get(u)) is not None:
            if e.primitive.name not in _MOVES:
                return v
            chain.append(e)
            u = e.inputs[0]
        if not (self.model.is_given(u) and self.model.is_real(u) and u in self.data):
            return v
        one = self._constant(np.ones((), self.avals[u].dtype))
        like = chain[-1] if chain else self.finder.users[u][0]
        new = dataclasses.replace(like, primitive=mul_p, params={}, own=None)
        u = self._made(new, (u, one), self.avals[u])
        for e in reversed(chain):
            u = self._made(e, (u,))
        return u

    def _signed(
        self, e: Equation, parts: _BiasAndMask, is_negative: bool
    ) -> _BiasAndMask:
        if not is_negative:
            return parts
        new = dataclasses.replace(e, primitive=neg_p, params={}, own=None)
        negative = lambda v: self._made(new, (v,), self.avals[v])
        return _BiasAndMask(*(None if v is None else negative(v) for v in parts))

    def _sum(self, e: Equation, a: int | None, b: int | None) -> int | None:
        if a is None or b is None:
            return b if a is None else a
        return self._add(e, a, b, self.model.avals[e.outputs[0]])

    def _add(self, e: Equation, a: int, b: int, aval: Any) -> int:
        new = dataclasses.replace(e, primitive=add_p, params={}, own=None)
        return self._made(new, (a, b), aval)

    def _each(self, e: Equation, at: int, parts: _BiasAndMask) -> _BiasAndMask:
        """Applies an equation to both parts of one operand."""
        own = lambda v: (*e.inputs[:at], v, *e.inputs[at + 1 :])
        made = (None if v is None else self._made(e, own(v)) for v in parts)
        return _BiasAndMask(*made)

    def _made(self, e: Equation, inputs: tuple[int, ...], aval: Any = None) -> int:
        """Adds an equation with other operands, and returns its result."""
        v = max(self.avals) + 1
        self.avals[v] = self.model.avals[e.outputs[0]] if aval is None else aval
        self.new.append(dataclasses.replace(e, inputs=inputs, outputs=(v,)))
        return v

    def _zeros(self, e: Equation) -> int:
        aval = self.model.avals[e.outputs[0]]
        return self._constant(np.zeros(aval.shape, aval.dtype))

    def _constant(self, value: np.ndarray) -> int:
        v = max(self.avals) + 1
        self.avals[v] = jax.core.ShapedArray(value.shape, value.dtype)
        self.constants[v] = value
        return v
