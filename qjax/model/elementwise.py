"""Finds the elementwise functions in a traced model, each one table once lowered.

A function is all that computes one value from one other value of its shape, number by
number: ``x * sigmoid(x)`` as well as what ``jax.nn.gelu`` inlines. Lines and bounds
alone are none: a requantizer holds those. Masks before a softmax are found too: they
are no part of any range.
"""

import collections
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import numpy as np

from qjax.model.primitives import AFFINE, BOUNDS, POINTWISE, names
from qjax.model.trace import CALLS, Equation, Trace, is_key, kinds_of, whole_of

_NEUTRAL = names("keep", "cast", is_elementwise=True)

_AXES = names("axes") - {"transpose"}

_LARGE = 100.0  # A constant of a mask is at least so large.
_MASKING = POINTWISE | names("axes", "number", "pad") | {"slice", "concatenate"}

SOFTMAXES = ("softmax", "log_softmax")  # Kinds that may have a mask before them.
NAME = "function"  # Name of a function that is made of several.


def find_functions(
    model: Trace,
    data: set[int],
    is_left_out: Callable[[Equation], bool],
    split: Sequence[str] = (),
) -> tuple[dict[int, str], frozenset[int], frozenset[int]]:
    """Finds the elementwise functions of a model.

    Args:
      model: Trace, derivative calls kept whole.
      data: Values that depend on an input.
      is_left_out: Equations that belong to none.
      split: Names of functions that end where nothing but their value is read by what
        follows: ``tanh(x) * 5`` is two, ``x * tanh(x)`` is one.

    Returns:
      ``(ends, members, masks)``: the last value of each function -> its name; all
      values that belong to one, the ends too; what is computed for the masks of
      softmaxes alone, inputs too. Values that others read as well are ends.
    """
    return _FunctionFinder(model, data, is_left_out, split).functions()


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
    return _FunctionFinder(model, data, lambda e: False, ()).masked(scores, readers)


class _FunctionFinder:
    def __init__(
        self,
        model: Trace,
        data: set[int],
        is_left_out: Callable[[Equation], bool],
        split: Sequence[str],
    ):
        self.model, self.data = model, data
        self.split = split
        self.source = {v: e for e in model.equations for v in e.outputs}
        self.users: dict[int, list[Equation]] = collections.defaultdict(list)
        for e in model.equations:
            for v in dict.fromkeys(e.inputs):
                self.users[v].append(e)
        self.is_left_out = is_left_out
        self.kinds: dict[int, str] = {}

    def functions(self) -> tuple[dict[int, str], frozenset[int], frozenset[int]]:
        self.kinds = {
            e.outputs[0]: kind
            for e in self.model.equations
            if not self.is_left_out(e) and (kind := self._kind(e)) is not None
        }
        cuts = self._waists()
        while True:
            origin = self._origins(cuts)
            inside = {v for v, root in origin.items() if root != v}
            ends = {v for v in inside if self._leaves(v, origin, cuts)}
            also_read = {v for v in ends if self._stays(v, origin)} - cuts
            if not also_read:
                break
            cuts |= also_read
        names: dict[int, str] = {}
        members: set[int] = set()
        masks = self._masks()
        for v in ends - members - masks:
            slice_ = self._slice(v, origin, cuts)
            if any(self.kinds[u] == "bent" for u in slice_):
                names[v] = self._name(v, slice_)
                members |= slice_
        return names, frozenset(members), masks

    def _waists(self) -> set[int]:
        """Returns values of functions to split, which all that follows depends on."""
        found: set[int] = set()
        for e in self.model.equations if self.split else ():
            v, name = e.outputs[0], str(e.params.get("name") or e.primitive.name)
            if v not in self.kinds or name not in self.split:
                continue
            origin, after = self._origins(found), self._origins(found | {v})
            follows, todo = {v}, [v]
            while todo:
                for u in self.users[todo.pop()]:
                    inside = origin[u.outputs[0]] == origin[v]
                    if inside and u.outputs[0] not in follows:
                        follows.add(u.outputs[0])
                        todo.append(u.outputs[0])
            if len(follows) > 1 and all(after[u] == v for u in follows - {v}):
                found.add(v)
        return found

    def _origins(self, cuts: set[int]) -> dict[int, int]:
        """Maps each value to the value that it is an elementwise function of."""
        origin = {v: v for v in (*self.model.inputs, *self.model.constants)}
        for e in self.model.equations:
            origin.update((v, v) for v in e.outputs)
            if e.outputs[0] not in self.kinds:
                continue
            operands = self._operands(e)
            roots = {v if v in cuts else origin[v] for v in operands}
            if len(roots) != 1:
                continue
            (root,) = roots
            same = self.model.shape(root) == self.model.shape(e.outputs[0])
            if same and self.model.is_real(root):
                origin[e.outputs[0]] = root
        return origin

    def _leaves(self, v: int, origin: dict[int, int], cuts: set[int]) -> bool:
        """Returns whether a value is read outside of its function."""
        outside = (u for u in self.users[v] if origin[u.outputs[0]] != origin[v])
        return v in cuts or v in self.model.outputs or any(True for _ in outside)

    def _stays(self, v: int, origin: dict[int, int]) -> bool:
        """Returns whether the function of a value goes on from the value."""
        return any(origin[u.outputs[0]] == origin[v] for u in self.users[v])

    def _slice(self, end: int, origin: dict[int, int], cuts: set[int]) -> set[int]:
        """Returns the values between the origin and an end, the end included."""
        found, todo = {end}, [end]
        while todo:
            for v in self._operands(self.source[todo.pop()]):
                if origin[v] != v and v not in cuts and v not in found:
                    found.add(v)
                    todo.append(v)
        return found

    # Masks.

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
                cases = [u for u in e.inputs[1:] if u not in others]
            elif name in ("add", "sub") and len(others) == 1 and e.inputs[0] != v:
                cases = [u for u in e.inputs if u not in others]
            elif name in moves:
                cases = [e.inputs[0]]
            elif name in AFFINE and not (name == "div" and e.inputs[1] in self.data):
                cases = self._operands(e)  # A temperature, a bias by place.
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
        """Returns whether a value of inputs and a constant is large where not 0."""
        todo, seen, is_large = [v], {v}, False
        while todo:
            u = todo.pop()
            e = self.source.get(u)
            if u in self.model.constants:
                value = self.model.constants[u]
                if not isinstance(value, jax.core.Tracer) and np.size(value):
                    is_large |= bool(np.max(np.abs(_real(value))) >= _LARGE)
            elif e is not None:
                if e.primitive.name not in _MASKING:
                    return False
                todo += [w for w in e.inputs if w not in seen]
                seen.update(e.inputs)
        return is_large or (v in self.data and self._is_added(v))

    def _is_added(self, v: int) -> bool:
        """Returns whether shape moves alone lead from an input to a value."""
        while (e := self.source.get(v)) is not None:
            if e.primitive.name not in _AXES or len(self.users[v]) != 1:
                return False
            v = e.inputs[0]
        return v in self.model.inputs and len(self.users[v]) == 1

    def _masks(self) -> frozenset[int]:
        """Returns the masks of softmaxes, and what is computed for masks alone."""
        found: set[int] = set()

        def serves(e: Equation, v: int) -> bool:
            if whole_of(e) in SOFTMAXES:
                return v != e.inputs[0]
            return found.issuperset(e.outputs)

        values = [v for e in reversed(self.model.equations) for v in e.outputs]
        for v in (*values, *self.model.inputs):
            users = self.users[v]
            is_read = v in self.data and v not in self.model.outputs and users
            if is_read and all(serves(e, v) for e in users):
                found.add(v)
        return frozenset(found)

    def _operands(self, e: Equation) -> list[int]:
        return [v for v in dict.fromkeys(e.inputs) if v in self.data]

    def _kind(self, e: Equation) -> str | None:
        """Returns line, bound, bent or neutral; None for a function of several."""
        name, data = e.primitive.name, self._operands(e)
        others = [v for v in e.inputs if v not in data]
        if not data or len(e.outputs) != 1 or not all(map(self._is_number, others)):
            return None
        if e.primitive in CALLS:
            return self._kind_of_call(e) if len(data) == 1 else None
        if name in _NEUTRAL and len(data) == 1:
            is_same = self.model.is_real(data[0]) == self.model.is_real(e.outputs[0])
            return "neutral" if is_same else "bent"
        if len(data) == 1 and name in AFFINE:
            is_divisor = name == "div" and e.inputs[1] == data[0]
            return (
                "bent" if is_divisor or len(set(e.inputs)) < len(e.inputs) else "line"
            )
        if len(data) == 1 and name in BOUNDS:
            return "bound"
        return "bent" if name in POINTWISE else None

    def _kind_of_call(self, e: Equation) -> str | None:
        kinds: set[str] = set()
        for inner in jex.jaxprs_in_params(e.params):
            found = kinds_of(getattr(inner, "jaxpr", inner))
            if found is None:
                return None
            kinds |= found
        return next((k for k in ("bent", "line", "bound") if k in kinds), None)

    def _is_number(self, v: int) -> bool:
        """Returns whether a known operand is one number for the whole value."""
        while v in self.source and self.source[v].primitive.name in (*_AXES, *_NEUTRAL):
            v = self.source[v].inputs[0]
        shape = self.model.shape(v)
        return all(n == 1 for n in shape)

    def _name(self, end: int, values: set[int]) -> str:
        """Returns the name of the last equation if only lines and bounds precede."""
        others = {self.kinds[v] for v in values if v != end}
        if "bent" in others or self.kinds[end] != "bent":
            return NAME
        e = self.source[end]
        return str(e.params.get("name") or e.primitive.name)


def _real(value: object) -> np.ndarray:
    """Returns a constant as float64, and zero for a random key."""
    return np.zeros(1) if is_key(value) else np.asarray(value).astype(np.float64)
