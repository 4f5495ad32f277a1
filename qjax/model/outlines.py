"""The work of each layer of a traced model: `qjax.costs` gives it bits and prices."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.costs.counts import conv_counts, dot_counts
from qjax.costs.layers import FLOAT_BITS, Operand, Work, counted_once
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
    rest = [s for s in traced.sites if s.role == "weight" and s.name not in used]
    float_bits = 16 if traced.model.half else FLOAT_BITS
    return tuple(
        dataclasses.replace(work, float_bits=float_bits)
        for work in counted_once([*found, *map(_of_weight, rest)])
    )


def _of_weight(site: Site) -> Work:
    work = Work(site.name, site.layer, "parameter")
    return dataclasses.replace(work, **_weight_fields(site))


def _weight_fields(site: Site) -> dict[str, Any]:
    size = math.prod(site.shape)
    return {"weight": site.name, "weight_shape": site.shape, "weights": size}


class _Outline:
    """The blocks of one trace: of a model, or of a step of a loop of it.

    Args:
      traced: The trace, with its plan.
      steps: Times that it runs.
      outside: Input of the trace -> names of the sites that its values come from.
      stacked: Results of the trace of which those of all steps stay.
    """

    def __init__(
        self,
        traced: TracedModel,
        steps: int = 1,
        outside: Mapping[int, Names] | None = None,
        stacked: Sequence[int] = (),
    ) -> None:
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
            reads = _union(self.sources(v) for v in e.inputs if v in self.data)
            for body in self.bodies(e) if is_loop else ():
                for work in body.works():
                    yield dataclasses.replace(work, reads=_union([work.reads, reads]))
                    reads = ()
            own = [blocks[v] for v in e.outputs if v in blocks]
            yield from map(self._of_block, own)
            if own or is_loop:
                continue
            if self.data.intersection(e.inputs) and _multiplies(e):
                yield Work(f"%{e.outputs[0]}", e.path, "unknown", refusal=_refusal(e))

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
            **self._bias_of(block),
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
        return {} if at is None else _weight_fields(self.plan.sites[at])

    def _bias_of(self, block: Block) -> dict[str, Any]:
        first = block.affine[:1] if block.kind == "product" else []
        made_of = (u for e in first for v in e.inputs for u in self._back(v))
        site = next(
            (self.plan.biases[u] for u in made_of if u in self.plan.biases), None
        )
        if site is None:
            return {}
        return {"bias": site.name, "biases": math.prod(site.shape)}

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
            given = {}
            for k, v in enumerate(loop.inputs):
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
            found.append(_Outline(traced, steps, given, stacked))
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
