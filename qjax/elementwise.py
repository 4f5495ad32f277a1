"""Finds the elementwise functions in a traced model: each is one table once lowered.

A function is all that computes one value from one other value of its shape, number by
number: ``x * sigmoid(x)`` as well as what ``jax.nn.gelu`` inlines. Lines and bounds
alone are none: a requantizer holds those. A softmax is found too, whole, though it is
no table.
"""

import collections
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import numpy as np

from qjax.trace import (
    AFFINE,
    BOUNDS,
    CALLS,
    POINTWISE,
    Equation,
    Trace,
    is_key,
    kinds_of,
)

_NEUTRAL = frozenset("convert_element_type copy reduce_precision stop_gradient".split())

_AXES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")

_LARGE = 100.0  # A constant of a mask is at least so large.
_MASKING = POINTWISE | frozenset(
    (*_AXES, "iota", "transpose", "slice", "concatenate", "pad", "squeeze")
)

NAME = "function"  # Of one that is made of several.


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
      values that belong to one, the ends too; what a mask before a softmax makes, and
      what makes the mask. Values that others read as well are ends.
    """
    return _Finder(model, data, is_left_out, split).functions()


class _Finder:
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
        self.kinds = {
            e.outputs[0]: kind
            for e in model.equations
            if not is_left_out(e) and (kind := self._kind(e)) is not None
        }

    def functions(self) -> tuple[dict[int, str], frozenset[int], frozenset[int]]:
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
        masked: set[int] = set()
        for e in self.model.equations:
            if found := self._softmax(e):
                scores, inner = found
                names[e.outputs[0]] = "softmax"
                members |= inner
                masked |= self._masked(scores, inner)
        masks = masked | self._only_for(masked)
        for v in ends - members - masks:
            slice_ = self._slice(v, origin, cuts)
            if any(self.kinds[u] == "bent" for u in slice_):
                names[v] = self._name(v, slice_)
                members |= slice_
        return names, frozenset(members), frozenset(masks)

    def _waists(self) -> set[int]:
        """Values of functions to split, which all that follows is made of."""
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
        """What each value is an elementwise function of: itself, or one before it."""
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
        """Whether a value is read outside of its function."""
        outside = (u for u in self.users[v] if origin[u.outputs[0]] != origin[v])
        return v in cuts or v in self.model.outputs or any(True for _ in outside)

    def _stays(self, v: int, origin: dict[int, int]) -> bool:
        """Whether its own function goes on from a value."""
        return any(origin[u.outputs[0]] == origin[v] for u in self.users[v])

    def _slice(self, end: int, origin: dict[int, int], cuts: set[int]) -> set[int]:
        """The values between the origin and an end, the end included."""
        found, todo = {end}, [end]
        while todo:
            for v in self._operands(self.source[todo.pop()]):
                if origin[v] != v and v not in cuts and v not in found:
                    found.add(v)
                    todo.append(v)
        return found

    def _softmax(self, e: Equation) -> tuple[int, set[int]] | None:
        """``x`` and the values of ``exp(x - max(x)) / sum(exp(x - max(x)))``."""
        if e.primitive.name != "div":
            return None
        power, total = (self._before(v) for v in e.inputs)
        if total is None or total.primitive.name != "reduce_sum" or power is None:
            return None
        shifted = (
            self._before(power.inputs[0]) if power.primitive.name == "exp" else None
        )
        if shifted is None or shifted.primitive.name != "sub":
            return None
        largest = self._before(shifted.inputs[1])
        while largest is not None and largest.primitive.name == "max":
            data = self._operands(largest)
            largest = self._before(data[0]) if data else None
        is_softmax = (
            largest is not None
            and largest.primitive.name == "reduce_max"
            and largest.inputs[0] == shifted.inputs[0]
            and total.inputs[0] == power.outputs[0]
        )
        if not is_softmax:
            return None
        found, todo = {e.outputs[0]}, [e]
        while todo:
            for v in self._operands(todo.pop()):
                if v != shifted.inputs[0] and v not in found:
                    found.add(v)
                    todo.append(self.source[v])
        inner = found - {e.outputs[0]}
        readers = {u.outputs[0] for v in inner for u in self.users[v]}
        return (shifted.inputs[0], found) if readers <= found else None

    # Masks.

    def _masked(self, v: int, readers: set[int]) -> set[int]:
        """The values between the scores and a softmax, if a mask is among them."""
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
            (v,) = cases
        return found

    def _is_mask(self, v: int) -> bool:
        """Whether a value is large where it is not 0: made of inputs and a constant."""
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
        """Whether a value is an input that shape moves alone lead to."""
        while (e := self.source.get(v)) is not None:
            if e.primitive.name not in _AXES or len(self.users[v]) != 1:
                return False
            v = e.inputs[0]
        return v in self.model.inputs and len(self.users[v]) == 1

    def _only_for(self, masked: set[int]) -> set[int]:
        """What is computed for masks alone, inputs too."""
        found: set[int] = set()
        scores = {v for v in masked if v in self.source}
        for e in reversed(self.model.equations):
            if e.outputs[0] not in scores and e.outputs[0] not in found:
                continue
            for v in e.inputs:
                is_side = v in self.data and v not in masked
                if e.outputs[0] in scores:
                    is_side &= self._is_mask(v) or not self.model.is_real(v)
                users = (u.outputs[0] for u in self.users[v])
                whole = found | scores
                if is_side and all(u in whole for u in users):
                    if v not in self.model.outputs:
                        found.add(v)
        return found

    def _before(self, v: int) -> Equation | None:
        """What made a value, seen through moves and ``stop_gradient``."""
        e = self.source.get(v)
        while e is not None and e.primitive.name in (*_NEUTRAL, *_AXES):
            e = self.source.get(e.inputs[0])
        return e

    def _operands(self, e: Equation) -> list[int]:
        return [v for v in dict.fromkeys(e.inputs) if v in self.data]

    def _kind(self, e: Equation) -> str | None:
        """line, bound, bent or neutral; None if it is no function of one value."""
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
        """Whether a known operand is one number for the whole value."""
        while v in self.source and self.source[v].primitive.name in (*_AXES, *_NEUTRAL):
            v = self.source[v].inputs[0]
        shape = self.model.shape(v)
        return all(n == 1 for n in shape)

    def _name(self, end: int, values: set[int]) -> str:
        """Of what is done last, if only lines and bounds come before it."""
        others = {self.kinds[v] for v in values if v != end}
        if "bent" in others or self.kinds[end] != "bent":
            return NAME
        e = self.source[end]
        return str(e.params.get("name") or e.primitive.name)


def _real(value: object) -> np.ndarray:
    """A constant as numbers; zero for what is none, such as a random key."""
    return np.zeros(1) if is_key(value) else np.asarray(value).astype(np.float64)
