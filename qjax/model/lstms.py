"""Recognises the LSTM that a step of a loop computes, whatever equations it is of.

    i, f, o = logistic(x K + h R + b), g = tanh(x K + h R + b), each of its own weights
    c' = f c + i g, h' = o tanh(c')

Sums in any order, products of all gates at once and then split, biases anywhere among
the terms: these are one cell. All else is none.
"""

import dataclasses
from collections.abc import Collection, Iterator

import numpy as np

from qjax.model.primitives import names
from qjax.model.trace import Equation
from qjax.model.traced_model import GateForm, Loop, LstmForm, TracedModel, WeightPart

_SAME = names("keep")


def with_lstm(loop: Loop) -> Loop:
    """Returns a loop with the LSTM that it is, if any, its sites marked with tensors.

    Args:
      loop: A loop with one grid in all steps.
    """
    form = _read(loop)
    if form is None:
        return loop
    plan = loop.body.plan
    tensors = {k: form.tensors[v] for v, k in (plan.activations | plan.weights).items()}
    sites = (s._replace(lstm=tensors[k]) for k, s in enumerate(plan.sites))
    body = dataclasses.replace(
        loop.body, plan=dataclasses.replace(plan, sites=tuple(sites))
    )
    return dataclasses.replace(loop, body=body, lstm=form)


def _read(loop: Loop) -> LstmForm | None:
    """Returns the LSTM that a loop is; None if it is none."""
    parts, inputs, same = loop.parts, loop.inputs, loop.same
    data = [k for k in range(len(inputs)) if inputs[k] not in same]
    carried = [parts.consts, parts.consts + 1]
    if parts.carries != 2 or parts.is_reversed or data[:2] != carried:
        return None
    if len(data) != 3 or not parts.is_step(data[2]) or loop.body.loops:
        return None
    for cell in (0, 1):
        ends = tuple(inputs[k] for k in data)
        reader = _LstmReader(loop.body, same, ends[cell], ends[1 - cell], ends[2])
        if (gates := reader.read(cell)) is not None:
            return LstmForm(cell, data[2], gates, reader.tensors)
    return None


class _LstmReader:
    """A reading of a body, given which of its carries is the cell."""

    def __init__(
        self, body: TracedModel, same: Collection[int], c: int, h: int, x: int
    ) -> None:
        self.body, self.model, self.same = body, body.model, same
        self.c, self.h, self.x = c, h, x
        self.tensors: dict[int, str] = {}

    def read(self, cell: int) -> tuple[GateForm, ...] | None:
        outputs = [self.passed(v) for v in self.model.outputs]
        c, h = outputs[cell], outputs[1 - cell]
        real = (self.c, self.h, self.x, c, h)
        if any(self.model.avals[v].dtype != np.float32 for v in real):
            return None
        shape = self.model.shape(h)
        if len(shape) != 2 or any(v != h for v in outputs[2:]):
            return None
        if len(self.model.shape(self.x)) != 2 or self.model.shape(c) != shape:
            return None
        last = self.factors(h, "logistic", "tanh")
        if last is None or self.passed(last[1]) != c:
            return None
        terms = self.operands(c, "add", "add_any")
        pairs = [(a, b) for a, b in (terms, terms[::-1])] if terms else []
        for kept, new in pairs:
            forget = self.forgets(kept)
            made = self.factors(new, "logistic", "tanh")
            if forget is None or made is None:
                continue
            self.name("product", kept, new)
            gates = [self.gate(v) for v in (made[0], forget, made[1], last[0])]
            found = tuple(gate for gate in gates if gate is not None)
            self.name("cell", c, self.model.outputs[cell])
            self.name("state", h, self.model.outputs[1 - cell])
            return found if len(found) == 4 and self.is_whole() else None
        return None

    def is_whole(self) -> bool:
        """Returns whether each site of the body is a tensor of the LSTM."""
        sites = {*self.body.plan.activations, *self.body.plan.weights}
        return sites <= self.tensors.keys()

    def name(self, tensor: str, *values: int) -> None:
        """Names values, and those that they are as they are."""
        for v in values:
            self.tensors.update(dict.fromkeys(self.passing(v), tensor))

    # Equations.

    def source(self, v: int) -> Equation | None:
        return None if v in self.same else self.body.source.get(v)

    def passing(self, v: int) -> Iterator[int]:
        """Yields a value and those that it is as they are, the first one last."""
        yield v
        while (e := self.source(v)) is not None and self.is_same(e):
            v = e.inputs[0]
            yield v

    def passed(self, v: int) -> int:
        """Returns the value that a value is as it is."""
        return [*self.passing(v)][-1]

    def is_same(self, e: Equation) -> bool:
        """Returns whether an equation leaves its operand as it is."""
        if e.primitive.name == "convert_element_type":  # Of a weak type.
            types = (self.model.avals[v].dtype for v in (e.inputs[0], e.outputs[0]))
            return len({*types}) == 1
        return e.primitive.name in _SAME

    def operands(self, v: int, *primitives: str) -> tuple[int, int] | None:
        """Returns the operands of an equation of two values; None for others."""
        e = self.source(self.passed(v))
        if e is None or e.primitive.name not in primitives or len(e.inputs) != 2:
            return None
        a, b = e.inputs
        return a, b

    def applied(self, v: int, function: str) -> int | None:
        """Returns what a function is of; None for others."""
        e = self.source(self.passed(v))
        is_it = e is not None and e.primitive.name == function
        return e.inputs[0] if e is not None and is_it else None

    def factors(self, v: int, first: str, second: str) -> tuple[int, int] | None:
        """Returns what both functions of a product are of, in their order."""
        pair = self.operands(v, "mul")
        for a, b in (pair, pair[::-1]) if pair else ():
            own = self.applied(a, first), self.applied(b, second)
            if own[0] is not None and own[1] is not None:
                self.name("share", a, b)
                return own[0], own[1]
        return None

    def forgets(self, v: int) -> int | None:
        """Returns what the gate before the last cell is of."""
        pair = self.operands(v, "mul")
        for a, b in (pair, pair[::-1]) if pair else ():
            own = self.applied(a, "logistic")
            if own is not None and self.passed(b) == self.c:
                self.name("share", a)
                return own
        return None

    # Gates.

    def gate(self, v: int) -> GateForm | None:
        """Returns the weights of a gate."""
        leaves = [*self.terms(v, 0, self.model.shape(v)[-1])]
        known = tuple(p for p in leaves if p is not None and p.value in self.same)
        products = {
            self.passed(e.inputs[0]): self.weight(e, p)
            for p in leaves
            if p is not None and p.value not in self.same
            if (e := self.body.source.get(p.value)) is not None
        }
        if None in leaves or len(products) + len(known) != len(leaves):
            return None
        kernel, recurrent = products.get(self.x), products.get(self.h)
        if len(products) != 2 or kernel is None or recurrent is None:
            return None
        if not all(map(self.is_bias, known)):
            return None
        for piece in (kernel, recurrent):
            self.name("kernel", piece.value)
            self.tensors.update(dict.fromkeys(self.leaves(piece.value), "kernel"))
        return GateForm(kernel, recurrent, known)

    def terms(self, v: int, start: int, stop: int) -> Iterator[WeightPart | None]:
        """Yields the products and known values that a part of a sum is of."""
        if v in self.same:
            yield WeightPart(v, start, stop)
            return
        self.tensors[v] = "gate"
        e = self.source(v)
        name = "" if e is None else e.primitive.name
        if e is None:
            yield None
        elif self.is_same(e):
            yield from self.terms(e.inputs[0], start, stop)
        elif name in ("add", "add_any"):
            for own in e.inputs:
                yield from self.terms(own, start, stop)
        elif name == "dot_general":
            yield WeightPart(v, start, stop)
        elif (first := self.offset(e, v)) is not None:
            yield from self.terms(e.inputs[0], first + start, first + stop)
        else:
            yield None

    def offset(self, e: Equation, v: int) -> int | None:
        """Returns where a part begins along the last axis; None for others."""
        rank = len(self.model.shape(v))
        if e.primitive.name == "split" and e.params["axis"] == rank - 1:
            return int(sum(e.params["sizes"][: e.outputs.index(v)]))
        if e.primitive.name != "slice":
            return None
        begins, steps = e.params["start_indices"], e.params["strides"]
        is_part = self.model.shape(v)[:-1] == self.model.shape(e.inputs[0])[:-1]
        is_part &= steps is None or all(step == 1 for step in steps)
        return int(begins[-1]) if is_part else None

    def weight(self, e: Equation, p: WeightPart) -> WeightPart | None:
        """Returns the part of a weight that makes a part of a product."""
        contract, batch = e.params["dimension_numbers"]
        if e.inputs[1] not in self.same or any(map(len, batch)):
            return None
        if len(self.model.shape(e.inputs[1])) != 2 or tuple(contract[0]) != (1,):
            return None
        return WeightPart(e.inputs[1], p.start, p.stop, tuple(contract[1]) == (1,))

    def is_bias(self, p: WeightPart) -> bool:
        """Returns whether a known value is the same for all examples."""
        shape = self.model.shape(p.value)
        return int(np.prod(shape[:-1])) == 1 or self.copied(p.value) != p.value

    def copied(self, v: int) -> int:
        """Returns the value that is repeated for all examples."""
        return copied(self.body, v)

    def leaves(self, v: int) -> Iterator[int]:
        """Yields the known values of one operand that a weight is made of."""
        while v in self.body.source:
            v = self.body.source[v].inputs[0]
            yield v


def copied(body: TracedModel, v: int) -> int:
    """Returns the value that leading axes are repeated of, else the value itself.

    Args:
      body: A step of a loop.
      v: Known value.
    """
    e, shape = body.source.get(v), body.model.shape(v)
    if e is None or e.primitive.name != "broadcast_in_dim":
        return v
    own = body.model.shape(e.inputs[0])
    is_row = int(np.prod(own)) == shape[-1] and own[-1:] == shape[-1:]
    dimensions = e.params["broadcast_dimensions"]
    is_last = bool(dimensions) and dimensions[-1] == len(shape) - 1
    is_number = int(np.prod(own)) == 1
    return e.inputs[0] if (is_row and is_last) or is_number else v
