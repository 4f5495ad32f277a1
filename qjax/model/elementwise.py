"""Finds the elementwise functions in a traced model, each one table once lowered.

A function is all that computes one value from one other value of its shape, number by
number: ``x * sigmoid(x)`` as well as what ``jax.nn.gelu`` inlines. Lines and bounds
alone are none: a requantizer holds those.
"""

from collections.abc import Callable, Sequence

import jax.extend.core as jex

from qjax.model.masks import mask_values
from qjax.model.primitives import AFFINE, BOUNDS, POINTWISE, names
from qjax.model.trace import CALLS, Equation, Trace, kinds_of, makers_and_readers

_NEUTRAL = names("keep", "cast", is_elementwise=True)

_AXES = names("axes") - {"transpose"}

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


class _FunctionFinder:
    """A search for functions, by the equations that make and that read each value."""

    def __init__(
        self,
        model: Trace,
        data: set[int],
        is_left_out: Callable[[Equation], bool],
        split: Sequence[str],
    ):
        self.model, self.data = model, data
        self.split = split
        self.source, self.users = makers_and_readers(model)
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
        masks = mask_values(self.model, self.data)
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
