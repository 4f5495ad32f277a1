"""The work of each layer of a traced model: `qjax.costs` gives it bits and prices."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.costs.counts import conv_counts, dot_counts
from qjax.costs.layers import FLOAT_BITS, Operand, Work, counted_once, read_in_loop
from qjax.model.blocks import Block, data_of, place_of
from qjax.model.sites import op_of
from qjax.model.trace import Equation
from qjax.model.traced_model import Loop, TracedModel
from qjax.schemes.patterns import Site

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
Names = tuple[str, ...]


def outline(traced: TracedModel) -> tuple[Work, ...]:
    """Returns the work of the layers of a model, of its loops as well.

    Args:
      traced: The model.

    Returns:
      What goes in, each block in the order of computation, then weights that no block
      multiplies by. Counts are those of the traced inputs; of what a loop computes,
      those of all steps. A product whose bits no scheme decides has a refusal.
    """
    found = [*_Outline(traced).works()]
    used = {work.weight for work in found}
    stacks = _Outline(traced).stacks()
    rest = [s for s in traced.sites if s.role == "weight" and s.name not in used]
    float_bits = 16 if traced.model.half else FLOAT_BITS
    return tuple(
        dataclasses.replace(work, float_bits=float_bits)
        for work in counted_once(
            [*found, *(_of_weight(s, stacks.get(s.name, 1)) for s in rest)]
        )
    )


def _of_weight(site: Site, stack: int) -> Work:
    work = Work(site.name, site.layer, "parameter")
    return dataclasses.replace(work, **_weight_fields(site, stack))


def _weight_fields(site: Site, stack: int) -> dict[str, Any]:
    size = math.prod(site.shape) * stack
    own = {"weight": site.name, "weight_shape": site.shape}
    return {**own, "stack": stack, "weights": size}


class _Outline:
    """The blocks of one trace: of a model, or of a step of a loop of it.

    Args:
      traced: The trace, with its plan.
      steps: Times that it runs.
      outside: Input of the trace -> names of the sites that its values come from.
      stacked: Results of the trace of which those of all steps stay.
      parts: Input of the trace -> its parts, one for each step that has its own.
    """

    def __init__(
        self,
        traced: TracedModel,
        steps: int = 1,
        outside: Mapping[int, Names] | None = None,
        stacked: Sequence[int] = (),
        parts: Mapping[int, int] | None = None,
    ) -> None:
        self.parts = parts or {}
        self.traced, self.model, self.plan = traced, traced.model, traced.plan
        self.steps, self.outside, self.stacked = steps, outside or {}, set(stacked)
        self.data = data_of(traced.model, traced.inputs)
        self._known: dict[int, Names] = {}

    def works(self) -> Iterator[Work]:
        """Yields the work of inputs, blocks and loops, in the order of computation."""
        blocks = {b.root.outputs[0]: b for b in (*self.plan.blocks, *self.plan.inner)}
        ends = {b.value for b in self.plan.blocks}
        for v, k in self.plan.activations.items():
            if v not in ends:
                yield self._of_input(self.plan.sites[k], v)
        for e in self.model.equations:
            is_loop = bool(e.outputs) and e.outputs[0] in self.traced.loops
            yield from self._in_loop(e) if is_loop else ()
            own = [blocks[v] for v in e.outputs if v in blocks]
            yield from map(self._of_block, own)
            if own or is_loop:
                continue
            if self.data.intersection(e.inputs) and _multiplies(e):
                yield Work(f"%{e.outputs[0]}", e.path, "unknown", refusal=_refusal(e))

    def _in_loop(self, e: Equation) -> list[Work]:
        """Returns the work of the layers of a loop."""
        read = [self.sources(v) if v in self.data else () for v in e.inputs]
        carries = self._loop(e).parts.is_carry
        lasting = (names for k, names in enumerate(read) if not carries(k))
        works = [work for body in self.bodies(e) for work in body.works()]
        return read_in_loop(works, _union(read), _union(lasting))

    def _of_input(self, site: Site, v: int) -> Work:
        given = () if site.op == "input" else (self._operand(v),)
        work = Work(site.name, site.layer, site.op or "input", inputs=given)
        return self._with_result(work, site, v)

    def _with_result(self, work: Work, site: Site | None, v: int) -> Work:
        shape = self.model.shape(v)
        copies = self.steps if v in self.stacked else 1
        return dataclasses.replace(
            work,
            output_shape=shape,
            kept=math.prod(shape) * copies,
            steps=self.steps,
            is_returned=site is not None and "return" in site.feeds,
        )

    def _of_block(self, block: Block) -> Work:
        at = self.plan.activations.get(block.value)
        site = None if at is None else self.plan.sites[at]
        name = f"{block.name}/accumulator" if site is None else site.name
        path = block.name if site is None else site.layer
        kind = op_of(self.model, block) if site is None else site.op
        products, useful, terms = self._count(block)
        inputs = tuple(map(self._operand, self._data(block)))
        work = Work(
            name=name,
            path=path,
            kind=kind,
            products=products * self.steps,
            useful_products=useful * self.steps,
            terms=terms,
            inputs=inputs,
            places=self._places(block),
            refusal=self._refusal(block, products, inputs),
            **self._weight_of(block),
            **self._bias_of(block, name),
        )
        return self._with_result(work, site, block.value)

    def _count(self, block: Block) -> tuple[int, int, int]:
        """Returns products, those without padding, and the terms of one sum.

        A function of one value is looked up in a table: it has no products.
        """
        e, shape = block.root, self.model.shape
        name, shapes = e.primitive.name, [shape(v) for v in e.inputs]
        if name == "dot_general":
            return dot_counts(shapes[0], shapes[1], e.params["dimension_numbers"])
        if name == "conv_general_dilated":
            numbers = e.params["dimension_numbers"]
            names = "window_strides", "padding", "lhs_dilation", "rhs_dilation"
            own = {name: e.params[name] for name in names} | {"dimensions": numbers}
            return conv_counts(shapes[0], shapes[1], shape(e.outputs[0]), own)
        pair = [v for v in e.inputs if v in self.data]
        is_product = name == "mul" and len(pair) == 2 and not block.is_function
        if is_product or block.kind == "affine":
            size = math.prod(shape(block.value))
            return size, size, 1
        return 0, 0, 0

    def _places(self, block: Block) -> int:
        """Returns the places at which a product of data is summed; 0 for others."""
        e = block.root
        numbers: Any = e.params.get("dimension_numbers")
        k = next((k for k, v in enumerate(e.inputs) if v in self.data), 0)
        if e.primitive.name == "conv_general_dilated":
            lhs, rhs = numbers.lhs_spec[0], numbers.rhs_spec[0]
            return self.model.shape(e.inputs[k])[rhs if k else lhs]
        if e.primitive.name != "dot_general":
            return 0
        x, summed = self.model.shape(e.inputs[k]), numbers[0][k]
        return math.prod(n for d, n in enumerate(x) if d not in summed)

    def _refusal(self, block: Block, products: int, inputs: Sequence[Operand]) -> str:
        """Returns why the bits of a product are not known; empty if they are."""
        real = [v for v in self._data(block) if self.model.is_real(v)]
        is_whole = len(inputs) + bool(self._weight_of(block)) > 1
        if not products or (is_whole and all(map(self.sources, real))):
            return ""
        return _refusal(block.root)

    def _weight_of(self, block: Block) -> dict[str, Any]:
        at = block.scale_site
        at = at if block.weight is None else self.plan.weights[block.weight]
        if at is None:
            return {}
        known = [v for v, k in self.plan.weights.items() if k == at]
        known += [v for e in block.affine if block.weight is None for v in e.inputs]
        return _weight_fields(self.plan.sites[at], max(map(self._stack, known)))

    def stacks(self) -> dict[str, int]:
        """Returns the parts of each weight of the trace, by the name of its site."""
        found: dict[str, int] = {}
        for v, at in self.plan.weights.items():
            name = self.plan.sites[at].name
            found[name] = max(found.get(name, 1), self._stack(v))
        for e in self.traced.loops:
            for body in self.bodies(self.traced.source[e]):
                found = body.stacks() | found
        return found

    def _stack(self, value: int) -> int:
        """Returns the parts of what is known, one for each step that has its own."""
        found, todo, seen = 1, [value], set[int]()
        while todo:
            v = todo.pop()
            if v not in seen and v not in self.data:
                found = max(found, self.parts.get(v, 1))
                todo += self.traced.source[v].inputs if v in self.traced.source else ()
            seen.add(v)
        return found

    def _bias_of(self, block: Block, name: str) -> dict[str, Any]:
        """Returns the bias: a parameter's, or what a fold of constants leaves."""
        first = block.affine[:1] if block.kind == "product" else []
        made_of = (u for e in first for v in e.inputs for u in self._back(v))
        leaf = next((u for u in made_of if u in self.plan.biases), None)
        site = None if leaf is None else self.plan.biases[leaf]
        weight = () if block.weight is None else (block.weight,)
        known = [v for e in block.affine for v in e.inputs if v not in self.data]
        is_shifted = any(
            e.primitive.name in ("add", "sub") and not self.data.issuperset(e.inputs)
            for e in block.affine
        )
        has_scale = bool(weight) or block.scale_site is not None
        if site is None and not (is_shifted and has_scale):
            return {}
        least = () if site is None else site.shape
        size = max(math.prod(least), self._bias_size(block, known))
        stack = max(map(self._stack, (*weight, *known)), default=1)
        bias = f"{name}/bias" if site is None else site.name
        return {"bias": bias, "biases": size * stack}

    def _bias_size(self, block: Block, known: Sequence[int]) -> int:
        """Returns the numbers of a bias: one for each channel that constants tell."""
        shapes = [self.model.shape(v) for v in known]
        channels = self._channels(block)
        if not block.moves:
            shapes.append(channels)
        try:
            size = math.prod(np.broadcast_shapes(*shapes))
        except ValueError:  # Moves lie between them.
            size = max(map(math.prod, shapes))
        return max(size, math.prod(channels))

    def _channels(self, block: Block) -> tuple[int, ...]:
        """Returns the shape of a product with size 1 but along axes of its weight."""
        if block.weight is None:
            return ()
        e, k = block.root, block.weight_operand
        out, numbers = self.model.shape(e.outputs[0]), e.params["dimension_numbers"]
        if e.primitive.name == "conv_general_dilated":
            own = {numbers.out_spec[1]}
        else:
            summed, batch = numbers[0][k], numbers[1][k]
            free = len(self.model.shape(e.inputs[k])) - len(summed) - len(batch)
            start = len(out) - free if k else len(batch)
            own = {*range(len(batch)), *range(start, start + free)}
        return tuple(n if d in own else 1 for d, n in enumerate(out))

    def _back(self, v: int) -> Iterator[int]:
        """Yields a value and those that it is made of, along first operands."""
        yield v
        while v in self.traced.source and (inputs := self.traced.source[v].inputs):
            v = inputs[0]
            yield v

    def _data(self, block: Block) -> list[int]:
        """Returns the operands of a block that depend on data."""
        found = [v for v in block.root.inputs if v in self.data]
        return list(dict.fromkeys(found)) if block.is_function else found

    def _operand(self, v: int) -> Operand:
        bits = np.dtype(self.model.avals[v].dtype).itemsize * 8
        shape, names = self.model.shape(v), self.sources(v)
        is_given = any(name.startswith("input:") for name in names)
        return Operand(shape, names, bits, math.prod(shape) * self.steps, is_given)

    def sources(self, value: int) -> Names:
        """Returns the names of the nearest sites that a value is made of."""
        known, todo = self._known, [value]
        while todo:
            v = todo[-1]
            e = self.traced.source.get(v)
            needed: Sequence[int] = ()
            if v in self.plan.activations:
                known[v] = (self.plan.sites[self.plan.activations[v]].name,)
            elif e is None or v not in self.data:
                known[v] = self.outside.get(v, ())
            elif e.outputs[0] in self.traced.loops:
                k = e.outputs.index(v)
                bodies = self.bodies(e)
                own = bodies[-1:] if k < self._loop(e).parts.carries else bodies
                known[v] = _union(b.sources(b.model.outputs[k]) for b in own)
            elif missing := [u for u in e.inputs if u in self.data and u not in known]:
                needed = missing
            else:
                known[v] = _union(known[u] for u in e.inputs if u in self.data)
            if not needed:
                todo.pop()
            todo += needed
        return known[value]

    def _loop(self, e: Equation) -> Loop:
        return self.traced.loops[e.outputs[0]]

    def bodies(self, e: Equation) -> "list[_Outline]":
        """Returns the steps of a loop that have sites of their own, or the one of all.

        Each has what goes on to it from the step before.
        """
        loop, found = self._loop(e), list[_Outline]()
        parts = loop.parts
        steps = self.steps if loop.steps else self.steps * parts.length
        for traced in loop.bodies:
            given, own_parts = {}, {}
            for k, v in enumerate(loop.inputs):
                copies = parts.length if parts.is_step(k) and not loop.steps else 1
                own_parts[v] = self._stack(e.inputs[k]) * copies
                names = self.sources(e.inputs[k]) if e.inputs[k] in self.data else ()
                if parts.is_carry(k):
                    end = traced.model.outputs[k - parts.consts]
                    last = found[-1].sources(end) if found else ()
                    own = None if loop.steps else traced.plan.activations.get(end)
                    # What goes in is rounded to the grid of what is carried.
                    same = () if own is None else (traced.plan.sites[own].name,)
                    names = last or same or names
                given[v] = names
            stacked = traced.model.outputs[parts.carries :]
            found.append(_Outline(traced, steps, given, stacked, own_parts))
        return found


def _refusal(e: Equation) -> str:
    return (
        f"The equation {e} in {place_of(e)} multiplies what has no site, so that its "
        "bits are not known: it has a quantizer of its own, or is part of something "
        "that the plan of sites does not look into. Lower the function, and take "
        "`program.layers()`."
    )


def _union(names: Any) -> Names:
    return tuple(dict.fromkeys(name for some in names for name in some))


def _multiplies(e: Equation) -> bool:
    """Returns whether an equation, or what is inside of it, is a product."""
    return e.primitive.name in _PRODUCTS or any(map(_has_products, e.params.values()))


def _has_products(param: Any) -> bool:
    if isinstance(param, tuple | list):
        return any(map(_has_products, param))
    jaxpr = getattr(param, "jaxpr", param)
    own = getattr(jaxpr, "eqns", ())
    return any(
        e.primitive.name in _PRODUCTS or any(map(_has_products, e.params.values()))
        for e in own
    )
