"""Finds the masks before softmaxes in a traced model: they are no part of any range."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax.integer_calls import LARGE
from qjax.model.blocks import constant_of
from qjax.model.kept import whole_of
from qjax.model.primitives import AFFINE, POINTWISE, names
from qjax.model.trace import (
    CALLS,
    Equation,
    Trace,
    evaluate,
    is_key,
    makers_and_readers,
)

_NEUTRAL = names("keep", "cast", is_elementwise=True)

_AXES = names("axes") - {"transpose"}

_MASKING = POINTWISE | names("axes", "number", "pad") | {"concatenate", "iota", "slice"}

Part = Literal["mask", "bias", "number", "mixture", "other"]
_ORDER: tuple[Part, ...] = ("mask", "bias", "number")

_MOST_KNOWN = 1 << 22  # Numbers that a call is run for.

# Kinds that may have a mask before them.
SOFTMAXES = ("softmax", "log_softmax", "logsumexp")


def find_masks(
    model: Trace, data: set[int], scores: int, readers: set[int]
) -> tuple[set[int], int]:
    """Finds the values that masks make of the scores of a softmax.

    Args:
      model: Trace.
      data: Values that depend on an input.
      scores: Input of the softmax.
      readers: Values that are computed of the scores for the softmax alone.

    Returns:
      The values between the scores before their masks and the softmax, and these
      scores. Without a mask there are no such values.
    """
    return MaskFinder(model, data).masked(scores, readers)


def mask_values(model: Trace, data: set[int]) -> frozenset[int]:
    """Returns the masks of softmaxes and norms, and what is computed for them alone."""
    return MaskFinder(model, data).served()


class MaskFinder:
    """A search for masks, by the equations that make and that read each value."""

    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data = model, data
        self.source, self.users = makers_and_readers(model)
        self.parts: dict[int, Part] = {}

    def masked(self, v: int, readers: set[int]) -> tuple[set[int], int]:
        """Returns the values between scores and softmax, and the scores."""
        scores = v
        passed: set[int] = set()
        found: set[int] = set()
        moves = (*_NEUTRAL, *_AXES, "transpose")
        while (e := self.source.get(v)) is not None and v not in self.model.outputs:
            if not all(readers.issuperset(u.outputs) for u in self.users[v]):
                break
            name = e.primitive.name
            others = [u for u in e.inputs if self._is_mask(u)]
            if name == "select_n" and len(e.inputs) == 3:
                others = [u for u in e.inputs[1:] if self._is_large(u)]
                cases = [u for u in e.inputs[1:] if u not in others]
            elif name in ("add", "sub") and len(others) == 1 and e.inputs[0] != v:
                cases = [u for u in e.inputs if u not in others]
            elif name in moves:
                cases = [e.inputs[0]]
            elif name in AFFINE and not (name == "div" and e.inputs[1] in self.data):
                # A temperature, a bias by place.
                cases = [u for u in dict.fromkeys(e.inputs) if u in self.data]
            else:
                break
            if len(cases) != 1 or cases[0] not in self.data:
                break
            passed.add(v)
            readers = readers | passed
            if others and name in ("add", "sub", "select_n"):
                found |= passed
                scores = cases[0]
            (v,) = cases
        return found, scores

    def _is_mask(self, v: int) -> bool:
        """Returns whether a value that is added is a mask."""
        return self._is_large(v) or (v in self.data and self._is_added(v))

    def _is_large(self, v: int) -> bool:
        """Returns whether a value of inputs and a constant is large where not 0."""
        return self.part(v) in ("mask", "mixture")

    def part(self, v: int) -> Part:
        """Returns what a value is to a sum before a softmax.

        A ``mask`` is of inputs and a constant, and large where it is not 0; a
        ``number`` is a constant that is small, or what is made of such; a ``bias`` has
        other real values in it, a ``mixture`` both that and a mask.
        """
        if v not in self.parts:
            todo = [v]
            while todo:
                u = todo[-1]
                e = None if u in self.model.constants else self.source.get(u)
                own = [] if e is None or not self._follows(u, e) else e.inputs
                if missing := [w for w in own if w not in self.parts]:
                    todo += missing
                    continue
                self.parts[todo.pop()] = self._part(u, e)
        return self.parts[v]

    def _part(self, v: int, e: Equation | None) -> Part:
        if v in self.model.constants:
            value = self.model.constants[v]
            if isinstance(value, jax.core.Tracer) or not np.size(value):
                return "bias"
            return _part_of(_real(value))
        if e is None:
            return "bias" if self.model.is_real(v) else "number"
        if self._is_known_truth(v):
            return "number"
        if not self._follows(v, e):
            return self._part_of_call(v, e)
        is_choice = e.primitive.name == "select_n"
        own = {self.parts[u] for u in e.inputs[1 if is_choice else 0 :]}
        if "other" in own or (is_choice and self.parts[e.inputs[0]] == "other"):
            return "other"
        joins = is_choice or e.primitive.name in ("add", "sub", "concatenate")
        is_mixed = "mixture" in own or (joins and {"mask", "bias"} <= own)
        return (
            "mixture" if is_mixed else next((k for k in _ORDER if k in own), "number")
        )

    def _is_known_truth(self, v: int) -> bool:
        """Returns whether a value is of known truth values, as of `jnp.tril`."""
        return v not in self.data and self.model.avals[v].dtype == bool

    def _follows(self, v: int, e: Equation) -> bool:
        """Returns whether the part of a value is that of its operands."""
        return e.primitive.name in _MASKING and not self._is_known_truth(v)

    def _part_of_call(self, v: int, e: Equation) -> Part:
        """Returns the part of what a call, such as `jnp.tril`, makes of numbers."""
        is_small = math.prod(self.model.shape(v)) <= _MOST_KNOWN
        own = [self.known(u) for u in e.inputs] if e.primitive in CALLS else [None]
        if v in self.data or not is_small or any(x is None for x in own):
            return "other"
        with jax.ensure_compile_time_eval():
            found = evaluate(e, *own)[e.outputs.index(v)]
        if not jnp.issubdtype(found.dtype, jnp.number):
            return "number" if found.dtype == jnp.bool_ else "other"
        return _part_of(np.asarray(found))

    def known(self, v: int) -> Any:
        """Returns a value that is a constant, or one number; None for others."""
        found, shape = constant_of(self.model, v, self.source), self.model.shape(v)
        if found is None or found.shape == shape:
            return found if v in self.model.constants else None
        return np.full(shape, found.flat[0]) if found.size == 1 else None

    def _is_added(self, v: int) -> bool:
        """Returns whether a value is an input that is added wherever it is read."""
        while (e := self.source.get(v)) is not None:
            if e.primitive.name not in _AXES:
                return False
            v = e.inputs[0]
        return self.model.is_given(v) and self._is_only_added(v)

    def _is_only_added(self, v: int) -> bool:
        if v in self.model.outputs or not self.users[v]:
            return False
        return all(
            self._is_only_added(e.outputs[0])
            if e.primitive.name in _AXES
            else e.primitive.name == "add" and len({*e.inputs}) == 2
            for e in self.users[v]
        )

    def served(self) -> frozenset[int]:
        """Returns the masks of softmaxes, and what is computed for masks alone."""
        found: set[int] = set()

        def serves(e: Equation, v: int) -> bool:
            if whole_of(e) in (*SOFTMAXES, "norm"):
                return v != e.inputs[0]
            return found.issuperset(e.outputs)

        values = [v for e in reversed(self.model.equations) for v in e.outputs]
        for v in (*values, *self.model.inputs):
            users = self.users[v]
            is_read = v in self.data and v not in self.model.outputs and users
            if is_read and all(serves(e, v) for e in users):
                found.add(v)
        return frozenset(found)


def _part_of(x: np.ndarray) -> Part:
    """Returns what known numbers are to a sum before a softmax."""
    sizes = np.abs(x.astype(np.float64))
    if np.max(sizes) < LARGE:
        return "number"
    return "mask" if np.all((sizes == 0) | (sizes >= LARGE)) else "mixture"


def _real(value: object) -> np.ndarray:
    """Returns a constant as float64, and zero for a random key."""
    return np.zeros(1) if is_key(value) else np.asarray(value).astype(np.float64)
