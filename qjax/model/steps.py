"""Loops whose steps have grids of their own: `Rule.per_step`."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.model.blocks import Plan, constant_of, data_of
from qjax.model.expansions import MOST_STEPS
from qjax.model.trace import Equation, Trace, trace
from qjax.model.traced_model import Join, Loop, TracedModel
from qjax.schemes.patterns import Site
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.tables import show

Pattern = str | Callable[[Site], bool]


def in_steps(loop: Loop, patterns: Sequence[Pattern]) -> Loop:
    """Unrolls a loop that has a site which one of some patterns matches.

    Values and weights that differ from step to step have a site in each; what is known
    and the same in all steps keeps its one.

    Args:
      loop: The loop, with one model of all steps.
      patterns: Patterns of rules, as they match the sites of the loop or of its steps.

    Returns:
      The loop, with a model for each step if a pattern matches.

    Raises:
      ValueError: for a loop of too many steps, with those of unrolled loops inside.
    """
    if not patterns or not loop.parts.length:
        return loop
    own = set(_varying(loop.body, loop.same, is_deep=False))
    is_long = loop.parts.length > MOST_STEPS
    models = tuple(_models(_shortened(loop) if is_long else loop))
    sites = [
        site
        for body in models
        for site in body.sites
        if site.whole is not None and site.whole.name in own
    ]
    matched = (p for p in patterns if any(map(Rule(p).matches, sites)))
    if (pattern := next(matched, None)) is None:
        return loop
    count = loop.parts.length * _most_inside(loop.body)
    if count > MOST_STEPS:
        inside = "" if count == loop.parts.length else ", with those inside"
        raise ValueError(
            f"The rule {show(pattern)} has `per_step=True`, and the loop {loop.name!r} "
            f"that it matches has {count} steps{inside}: at most {MOST_STEPS} are "
            "unrolled. Leave `per_step` out for one grid in all steps, or split the "
            "loop into shorter ones, of which the rule matches one."
        )
    # What is the same in all steps is visited once, before them.
    body = dataclasses.replace(loop.body, plan=models[0].plan)
    return dataclasses.replace(loop, body=body, steps=models, lstm=None)


def _shortened(loop: Loop) -> Loop:
    """Returns a loop of one step."""
    return dataclasses.replace(loop, parts=dataclasses.replace(loop.parts, length=1))


def _most_inside(body: TracedModel) -> int:
    """Returns the largest number of unrolled steps of the loops in a body."""
    counts = [
        (loop.parts.length if loop.steps else 1) * _most_inside(loop.body)
        for loop in body.loops.values()
    ]
    return max(counts, default=1)


def _models(loop: Loop) -> tuple[TracedModel, ...]:
    """Returns the model of each step, in the order of computation."""
    order = range(loop.parts.length)
    steps = [
        _names(loop, t) for t in (order[::-1] if loop.parts.is_reversed else order)
    ]
    every = {name: tuple(own[name] for own in steps) for name in steps[0]}
    count = len(loop.body.blocks)
    befores: list[dict[str, str]] = [{}, *steps[:-1]]
    pairs = enumerate(zip(steps, befores, strict=True))
    return tuple(
        _moved(loop.body, _Renaming(names, before, every, k * count))
        for k, (names, before) in pairs
    )


def _names(loop: Loop, t: int) -> dict[str, str]:
    """Maps each site of a loop that differs from step to step to that of one step."""
    taken = Counter[str]()
    found = {}
    for name in _varying(loop.body, loop.same):
        new = f"{loop.name}/step_{t}/{name.removeprefix(loop.name + '/')}"
        n, taken[new] = taken[new], taken[new] + 1
        found[name] = f"{new}:{n}" if n else new
    return found


@dataclasses.dataclass(frozen=True)
class _Renaming:
    """The names of a step, and the number of blocks before it.

    Attributes:
      names: Site of all steps -> that of this step.
      before: The same of the step before, empty for the first one.
      every: Site of all steps -> those of each step.
      blocks: Number of blocks of the steps before.
    """

    names: Mapping[str, str]
    before: Mapping[str, str]
    every: Mapping[str, tuple[str, ...]]
    blocks: int

    def site(self, old: Site, earlier: Collection[str]) -> Site:
        """Returns the site of a step; one of all steps is read by each.

        What does not come earlier in a step is from the step before.
        """
        if old.name not in self.names:
            every = (self.every.get(name, (name,)) for name in old.inputs)
            return old._replace(inputs=tuple(itertools.chain.from_iterable(every)))

        def read(name: str) -> str:
            if name not in self.names or name in earlier:
                return self.names.get(name, name)
            return self.before.get(name, "")

        return old._replace(
            name=self.names[old.name],
            layer=self.names[old.name] if old.layer == old.name else old.layer,
            inputs=tuple(filter(None, map(read, old.inputs))),
            reads=tuple(map(read, old.reads)),
            overwrites=self.names.get(old.overwrites, ""),
            whole=old,
        )


def _varying(
    body: TracedModel, same: set[int], *, is_deep: bool = True
) -> dict[str, None]:
    """Returns the names of sites whose values may differ from step to step."""
    plan, data = body.plan, data_of(body.model, body.inputs)
    fixed = {k for v, k in plan.weights.items() if v in same}
    for block in plan.blocks:
        factors = {v for e in block.affine for v in e.inputs} - data
        if block.scale_site is not None and factors <= same:
            fixed.add(block.scale_site)
    found = {s.name: None for k, s in enumerate(plan.sites) if k not in fixed}
    if not is_deep:
        return found
    source = {e.outputs[0]: e for e in body.model.equations if e.outputs}
    for v, loop in body.loops.items():
        is_same = same.issuperset(source[v].inputs[k] for k in loop.known)
        inside = loop.same if is_same else set(loop.body.model.constants)
        for own in loop.bodies:
            found |= _varying(own, inside)
    return found


def _moved(body: TracedModel, own: _Renaming) -> TracedModel:
    """Returns a body as one step: with other names of sites and numbers of blocks."""
    old = body.plan.sites
    names = [site.name for site in old]
    sites = tuple(own.site(site, names[:k]) for k, site in enumerate(old))
    loops = {}
    for v, loop in body.loops.items():
        steps = tuple(_moved(step, own) for step in loop.steps)
        inner = _moved(loop.body, own)
        loops[v] = dataclasses.replace(loop, body=inner, steps=steps)
    return dataclasses.replace(
        body,
        plan=dataclasses.replace(body.plan, sites=sites),
        numbers={v: k + own.blocks for v, k in body.numbers.items()},
        first_block=body.first_block + own.blocks,
        loops=loops,
    )


def with_ends(
    model: Trace,
    plan: Plan,
    loops: Mapping[int, Loop],
    describe: Callable[[Trace, Plan], Plan],
) -> tuple[Trace, Plan, dict[int, Loop]]:
    """Adds the sites at the ends of unrolled loops, which are outside of their steps.

    A first value that is on no grid has a site, ``scan_0/start:0``, unless it is zero;
    what steps leave on grids of their own has one where it is joined,
    ``scan_0/output:0``.

    Args:
      model: Trace with the loops.
      plan: Its plan.
      loops: First result of a loop -> the loop.
      describe: Function that completes the facts of the sites of a plan.

    Returns:
      The three, completed.
    """
    ends = _Ends(model, plan)
    found = {
        v: ends.completed(v, loop) if loop.steps else loop for v, loop in loops.items()
    }
    model = dataclasses.replace(model, avals=ends.avals)
    sites, own = tuple(ends.sites), len(plan.sites)
    plan = dataclasses.replace(plan, sites=sites, activations=ends.activations)
    described = describe(model, plan).sites
    kept = [
        site._replace(layer=old.layer, op=old.op, feeds=old.feeds or site.feeds)
        for site, old in zip(described[own:], sites[own:], strict=True)
    ]
    plan = dataclasses.replace(plan, sites=(*described[:own], *kept))
    return model, plan, found


class _Ends:
    def __init__(self, model: Trace, plan: Plan):
        self.model, self.plan = model, plan
        self.source = {v: e for e in model.equations for v in e.outputs}
        self.avals = dict(model.avals)
        self.sites = list(plan.sites)
        self.activations = dict(plan.activations)

    def completed(self, first: int, loop: Loop) -> Loop:
        """Returns a loop, by its first result, with its ends."""
        e = self.source[first]
        parts, starts, joins = loop.parts, {}, {}
        for k in range(parts.consts, parts.consts + parts.carries):
            if self._needs_site(e.inputs[k]):
                name = f"{loop.name}/start:{k - parts.consts}"
                starts[k] = self._start(e, e.inputs[k], name, loop.name)
        carries_number = any(
            self.model.is_real(v) and not self.model.shape(v)
            for v in e.outputs[: parts.carries]
        )
        for n, v in enumerate(e.outputs[parts.carries :], parts.carries):
            joins[n] = self._join(v, e)
            has_axes = len(self.model.shape(v)) > 1
            if self.model.is_real(v) and (has_axes or carries_number):
                name = f"{loop.name}/output:{n - parts.carries}"
                self._add(v, name, layer=loop.name, op="concatenate")
        return dataclasses.replace(loop, starts=starts, joins=joins)

    def _needs_site(self, v: int) -> bool:
        """Returns whether a first value is on no grid, and not zero."""
        if not self.model.is_real(v):
            return False
        known = constant_of(self.model, v, self.source)
        is_zero = known is not None and not known.any()
        return not is_zero and v not in {*self.activations, *self.plan.on_grid}

    def _add(self, v: int, name: str, **facts: Any) -> None:
        self.activations[v] = len(self.sites)
        self.sites.append(Site(name, "activation", self.avals[v].shape, **facts))

    def _fresh(self, aval: Any) -> int:
        v = max(self.avals) + 1
        self.avals[v] = aval
        return v

    def _start(self, e: Equation, v: int, name: str, layer: str) -> Equation:
        own, _ = trace(lax.optimization_barrier, self.avals[v], keep_derivatives=True)
        end = self._fresh(self.avals[v])
        self._add(end, name, layer=layer, op="scan", feeds=("scan",))
        (move,) = own.equations
        return dataclasses.replace(move, inputs=(v,), outputs=(end,), regions=e.regions)

    def _join(self, v: int, e: Equation) -> Join:
        aval = self.avals[v]
        length, *shape = aval.shape
        piece = jax.ShapeDtypeStruct(tuple(shape), aval.dtype)
        own, _ = trace(
            lambda *xs: jnp.stack(xs), *[piece] * length, keep_derivatives=True
        )
        numbers = {own.outputs[0]: v}
        for u, kind in own.avals.items():
            if u not in numbers:
                numbers[u] = self._fresh(kind)
        of = lambda values: tuple(numbers[u] for u in values)
        equations = tuple(
            dataclasses.replace(
                x, inputs=of(x.inputs), outputs=of(x.outputs), regions=e.regions
            )
            for x in own.equations
        )
        return Join(of(own.inputs), equations)


def check_steps(scheme: Scheme, traced: TracedModel) -> None:
    """Raises if a rule for a grid in each step matches no site in a loop.

    Raises:
      ValueError: naming the rule and the loops.
    """
    sites = [site for site in traced.sites if site.whole is not None]
    for rule in scheme.rules:
        if rule.per_step and not rule.optional and not any(map(rule.matches, sites)):
            loops = [*_loops_in(traced)]
            there = "The model has no loop."
            if loops:
                shown = "; ".join(_shown(loop) for loop in loops)
                there = f"The loops, with sites of theirs: {shown}."
            raise ValueError(
                f"The rule {show(rule.pattern)} has `per_step=True` and matches no "
                f"site in a loop that differs from step to step. {there} Leave "
                "`per_step` out for sites elsewhere."
            )


def _loops_in(traced: TracedModel) -> Iterator[Loop]:
    for loop in traced.loops.values():
        yield loop
        yield from _loops_in(loop.body)


def _shown(loop: Loop) -> str:
    names = [*_varying(loop.body, loop.same)]
    more = ", ..." if len(names) > _MOST_SHOWN else ""
    known = ", ".join(map(repr, names[:_MOST_SHOWN])) or "none"
    return f"{loop.name!r} of {loop.parts.length} steps ({known}{more})"


_MOST_SHOWN = 3
