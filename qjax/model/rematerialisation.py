"""Rematerialisation: a simulation keeps the calls of `jax.checkpoint` of its model.

A simulation marks what it computes with the regions of the model. A run of it is traced
as a whole, sorted by these marks, and each region is one `jax.checkpoint` again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.extend.core as jex

from qjax.model.places import Mark, mark_of
from qjax.model.regions import Regions
from qjax.model.traced_model import TracedModel

_SITES = -1  # In place of a region: sites outside of regions that one of them reads.
_MOST = 1.2  # Bytes that a region may read in place of one byte of a site.


def in_regions(run: Callable[[bool], Any], model: TracedModel, reads: Any) -> Any:
    """Runs a simulation with the regions of its model under `jax.checkpoint`.

    Args:
      run: Function of whether to mark what it computes (`qjax.model.places.Mark`).
      model: The model that ``run`` simulates.
      reads: Pytree of all else that ``run`` reads. Without a tracer nothing is
        differentiated, and ``run`` computes as it is.

    Returns:
      The result of ``run``.
    """
    leaves = jax.tree.leaves((reads, model.model.constants))
    is_traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if not model.regions.by_number or not is_traced:
        return run(False)
    closed, out = jax.make_jaxpr(lambda: run(True), return_shape=True)()
    jaxpr = closed.jaxpr
    nodes = [
        _Marked(eqn, mark_of(str(eqn.source_info.name_stack))) for eqn in jaxpr.eqns
    ]
    reads = [v for v in jaxpr.outvars if not isinstance(v, jex.Literal)]
    found = _Sorter(jaxpr, model.regions).function(0, nodes, jaxpr.constvars, reads)
    made = dict(zip(reads, found(*closed.consts), strict=True))
    is_literal = lambda v: isinstance(v, jex.Literal)
    outs = [v.val if is_literal(v) else made[v] for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(out), outs)


@dataclasses.dataclass(frozen=True)
class _Marked:
    """An equation of a run, with its mark."""

    eqn: Any
    mark: Mark

    @property
    def reads(self) -> list[Any]:
        return [v for v in self.eqn.invars if not isinstance(v, jex.Literal)]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Equations that are computed together: of one region, or of none."""

    region: int | None
    nodes: list[_Marked]
    copies: list[_Marked] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Sorter:
    """Sorts the equations of a run by region and makes functions of them."""

    jaxpr: Any
    regions: Regions

    def function(
        self,
        depth: int,
        nodes: Sequence[_Marked],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> Callable[..., list[Any]]:
        """Returns equations as a function, the regions inside under `jax.checkpoint`.

        Args:
          depth: Number of regions around all of the equations.
          nodes: The equations.
          inputs: Variables that they read.
          outputs: Variables to return.

        Returns:
          A function from the values of ``inputs`` to those of ``outputs``.
        """
        steps: list[tuple[list[Any], list[Any], Callable[..., list[Any]]]] = []
        needed = set(outputs)
        parts = _parts(depth, _alive(nodes, needed), inputs)
        for part in reversed(parts):
            outs = [v for n in part.nodes for v in n.eqn.outvars if v in needed]
            own = _alive([*part.copies, *part.nodes], outs)
            if not own:
                continue
            reads = _reads(own)
            needed.update(reads)
            if part.region is None:
                compute = self._plain(own, reads, outs)
            else:
                inner = self.function(depth + 1, own, reads, outs)
                compute = self._checkpoint(part.region, inner)
            steps.append((reads, outs, compute))

        def run(*values: Any) -> list[Any]:
            env = dict(zip(inputs, values, strict=True))
            for reads, outs, compute in reversed(steps):
                found = compute(*(env[v] for v in reads))
                env.update(zip(outs, found, strict=True))
            return [env[v] for v in outputs]

        return run

    def _checkpoint(self, number: int, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Puts a function under `jax.checkpoint`, by the policy of its region."""
        if number == _SITES:
            return jax.checkpoint(fn)
        return self.regions.checkpoint(number, fn)

    def _plain(
        self, nodes: Sequence[_Marked], reads: Sequence[Any], outs: Sequence[Any]
    ) -> Callable[..., list[Any]]:
        """Returns equations as a function."""
        info = self.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
        ends = {"constvars": [], "invars": reads, "outvars": outs, "debug_info": info}
        jaxpr = self.jaxpr.replace(eqns=[n.eqn for n in nodes], **ends)
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))


def _parts(depth: int, nodes: Sequence[_Marked], inputs: Sequence[Any]) -> list[_Part]:
    """Sorts equations into parts, each of which reads what is before it.

    A region is one part, unless what is outside of it reads and makes its values. It
    computes for itself what sites outside of regions make for it: a region of the model
    is given weights, not what they are rounded to.
    """
    outside: list[_Marked] = []
    regions: dict[int, list[_Marked]] = {}
    for n in nodes:
        inner = n.mark.regions[depth:]
        (regions.setdefault(inner[0], []) if inner else outside).append(n)
    sites = [n for n in outside if n.mark.is_site and not n.eqn.effects]
    copies = {k: _copies(sites, own) for k, own in regions.items()}
    wanted = {k: _reads([*copies[k], *own]) for k, own in regions.items()}
    copied = {id(n) for own in copies.values() for n in own}
    group = lambda n: _SITES if id(n) in copied else None
    known, parts = set(inputs), []
    while outside or regions:
        if ready := _ready(outside, known):
            parts += [_Part(k, list(own)) for k, own in groupby(ready, group)]
            outside = _without(outside, ready)
        number = next((k for k in regions if known.issuperset(wanted[k])), None)
        if number is not None:
            own = regions.pop(number)
        elif ready or not regions:
            continue
        else:
            begun = ((k, _ready(own, set(known))) for k, own in regions.items())
            number, own = next((k, found) for k, found in begun if found)
            regions[number] = _without(regions[number], own)
            wanted[number] = _reads(regions[number])
        known.update(v for n in own for v in n.eqn.outvars)
        parts.append(_Part(number, own, _copies(sites, own)))
    return parts


def _ready(nodes: Sequence[_Marked], known: set[Any]) -> list[_Marked]:
    """Returns the equations that known values suffice for; adds what they make."""
    found = []
    for n in nodes:
        if known.issuperset(n.reads):
            known.update(n.eqn.outvars)
            found.append(n)
    return found


def _without(nodes: Sequence[_Marked], others: Sequence[_Marked]) -> list[_Marked]:
    """Returns the equations that are none of others."""
    numbers = {id(n) for n in others}
    return [n for n in nodes if id(n) not in numbers]


def _copies(sites: Sequence[_Marked], nodes: Sequence[_Marked]) -> list[_Marked]:
    """Returns the equations of sites that a region computes for itself.

    It does where it reads no more for that than the value itself has.
    """
    made = {v for n in sites for v in n.eqn.outvars}
    given = _reads(nodes)
    reads, found = set(given), []
    for v in sorted((v for v in given if v in made), key=_size, reverse=True):
        more = set(_reads(_alive(sites, [v]))) - reads
        if sum(map(_size, more)) <= _MOST * _size(v):
            reads |= more
            found.append(v)
    return _alive(sites, found)


def _size(v: Any) -> int:
    """Returns the bytes of a variable; a key of random numbers counts as one."""
    return math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 1)


def _alive(nodes: Sequence[_Marked], outputs: Iterable[Any]) -> list[_Marked]:
    """Returns the equations that outputs need, or that have an effect."""
    needed, found = set(outputs), []
    for n in reversed(nodes):
        if n.eqn.effects or needed.intersection(n.eqn.outvars):
            needed.update(n.reads)
            found.append(n)
    return found[::-1]


def _reads(nodes: Sequence[_Marked]) -> list[Any]:
    """Returns the variables that equations read and do not make."""
    made = {v for n in nodes for v in n.eqn.outvars}
    return [
        v for v in dict.fromkeys(v for n in nodes for v in n.reads) if v not in made
    ]
