"""Finds the elementwise functions in a traced model: each is one table once lowered.

A function is all that computes one value from one other value of its shape, number by
number: ``x * sigmoid(x)`` as well as what ``jax.nn.gelu`` inlines. Lines and bounds
alone are none: a requantizer holds those. A softmax is found too, whole, though it is
no table.
"""

import collections
from collections.abc import Callable

import jax.extend.core as jex

from qjax.trace import AFFINE, BOUNDS, CALLS, POINTWISE, Equation, Trace, kinds_of

_NEUTRAL = frozenset("convert_element_type copy reduce_precision stop_gradient".split())

_AXES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")

NAME = "function"  # Of one that is made of several.


def find_functions(
    model: Trace, data: set[int], is_left_out: Callable[[Equation], bool]
) -> tuple[dict[int, str], frozenset[int]]:
    """Finds the elementwise functions of a model.

    Args:
      model: Trace, derivative calls kept whole.
      data: Values that depend on an input.
      is_left_out: Equations that belong to none.

    Returns:
      ``(ends, members)``: the last value of each function -> its name; all values that
      belong to one, the ends too. Values that others read as well are ends.
    """
    return _Finder(model, data, is_left_out).functions()


class _Finder:
    def __init__(
        self, model: Trace, data: set[int], is_left_out: Callable[[Equation], bool]
    ):
        self.model, self.data = model, data
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

    def functions(self) -> tuple[dict[int, str], frozenset[int]]:
        cuts: set[int] = set()
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
        for e in self.model.equations:
            if inner := self._softmax(e):
                names[e.outputs[0]] = "softmax"
                members |= inner
        for v in ends - members:
            slice_ = self._slice(v, origin, cuts)
            if any(self.kinds[u] == "bent" for u in slice_):
                names[v] = self._name(v, slice_)
                members |= slice_
        return names, frozenset(members)

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

    def _softmax(self, e: Equation) -> set[int]:
        """The values of ``exp(x - max(x)) / sum(exp(x - max(x)))``, or none."""
        if e.primitive.name != "div":
            return set()
        power, total = (self._before(v) for v in e.inputs)
        if total is None or total.primitive.name != "reduce_sum" or power is None:
            return set()
        shifted = (
            self._before(power.inputs[0]) if power.primitive.name == "exp" else None
        )
        if shifted is None or shifted.primitive.name != "sub":
            return set()
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
            return set()
        found, todo = {e.outputs[0]}, [e]
        while todo:
            for v in self._operands(todo.pop()):
                if v != shifted.inputs[0] and v not in found:
                    found.add(v)
                    todo.append(self.source[v])
        inner = found - {e.outputs[0]}
        readers = {u.outputs[0] for v in inner for u in self.users[v]}
        return found if readers <= found else set()

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
