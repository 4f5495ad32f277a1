"""Loops of a model: the parts of `jax.lax.scan`, and the ends of its body."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.extend.core import primitives as p

from qjax.model.expansions import scan_counts
from qjax.model.trace import Equation, has_qpoint


@dataclasses.dataclass(frozen=True)
class ScanParts:
    """The operands and results of a scan, by what becomes of them.

    Attributes:
      consts: Number of operands that are the same in all steps. They come first.
      carries: Number of operands, and of results, that go from step to step.
      length: Number of steps.
      is_reversed: Whether the last step comes first.
      unroll: Number of steps in one round of the compiled loop.
      body: Closed jaxpr of a step.
    """

    consts: int
    carries: int
    length: int
    is_reversed: bool
    unroll: int
    body: Any

    def is_carry(self, k: int) -> bool:
        """Returns whether an operand is carried."""
        return self.consts <= k < self.consts + self.carries

    def is_step(self, k: int) -> bool:
        """Returns whether an operand has a part for each step."""
        return k >= self.consts + self.carries


def scan_parts(e: Any) -> ScanParts:
    """Returns the parts of an equation that is a scan."""
    params = e.params
    consts, carries = scan_counts(params)
    is_reversed, unroll = params["reverse"], params["unroll"]
    body = params["jaxpr"]
    return ScanParts(consts, carries, params["length"], is_reversed, unroll, body)


def is_loop(e: Equation) -> bool:
    """Returns whether an equation is a scan."""
    return e.primitive is p.scan_p


def body_of(
    parts: ScanParts, is_known: Sequence[bool]
) -> Callable[[list[Any], list[Any]], list[Any]]:
    """Makes a step a function of known values and of data.

    Carried results that are an operand as it is, a constant, or another carried result
    become values of their own: each has a site.

    Args:
      parts: Parts of the scan.
      is_known: By operand, whether it depends on no input.
    """
    jaxpr, run = parts.body.jaxpr, jex.jaxpr_as_fun(parts.body)
    own = {*jaxpr.invars, *jaxpr.constvars}
    carried = jaxpr.outvars[: parts.carries]
    is_copied = [
        isinstance(v, jex.Literal) or v in own or any(v is u for u in carried[:k])
        for k, v in enumerate(carried)
    ]

    def body(known: list[Any], data: list[Any]) -> list[Any]:
        sides = iter(known), iter(data)
        found = list(run(*(next(sides[0 if k else 1]) for k in is_known)))
        for k in range(parts.carries):
            if is_copied[k] and jax.numpy.issubdtype(found[k].dtype, jax.numpy.inexact):
                found[k] = lax.optimization_barrier(found[k])
        return found

    return body


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The surroundings of a body, from which its sites have their names.

    Attributes:
      carried: Values of its inputs that come from the last step, in the order of its
        outputs that go on to the next; these come first.
      name: Name of the loop, with those around it.
      taken: How often each name of a site is taken.
      first_block: Number of its first block.
    """

    carried: tuple[int, ...]
    name: str
    taken: Counter[str]
    first_block: int


def has_point(e: Equation) -> bool:
    """Returns whether an equation is a scan whose steps put values on grids."""
    return is_loop(e) and has_qpoint(e)
