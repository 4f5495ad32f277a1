"""Finds the masks before softmaxes in a traced model: they are no part of any range."""

import jax
import numpy as np

from qjax.integer_calls import LARGE
from qjax.model.kept import whole_of
from qjax.model.primitives import AFFINE, POINTWISE, names
from qjax.model.trace import Equation, Trace, is_key, makers_and_readers

_NEUTRAL = names("keep", "cast", is_elementwise=True)

_AXES = names("axes") - {"transpose"}

_MASKING = POINTWISE | names("axes", "number", "pad") | {"concatenate", "iota", "slice"}

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
    return _MaskFinder(model, data).masked(scores, readers)


def mask_values(model: Trace, data: set[int]) -> frozenset[int]:
    """Returns the masks of softmaxes and norms, and what is computed for them alone."""
    return _MaskFinder(model, data).served()


class _MaskFinder:
    """A search for masks, by the equations that make and that read each value."""

    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data = model, data
        self.source, self.users = makers_and_readers(model)

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
        todo, seen, is_large = [v], {v}, False
        while todo:
            u = todo.pop()
            e = self.source.get(u)
            if u in self.model.constants:
                value = self.model.constants[u]
                if not isinstance(value, jax.core.Tracer) and np.size(value):
                    is_large |= bool(np.max(np.abs(_real(value))) >= LARGE)
            elif e is not None:
                if u not in self.data and self.model.avals[u].dtype == bool:
                    continue  # Known truth values, however they are made: `jnp.tril`.
                if e.primitive.name not in _MASKING:
                    return False
                todo += [w for w in e.inputs if w not in seen]
                seen.update(e.inputs)
        return is_large

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


def _real(value: object) -> np.ndarray:
    """Returns a constant as float64, and zero for a random key."""
    return np.zeros(1) if is_key(value) else np.asarray(value).astype(np.float64)
