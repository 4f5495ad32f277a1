"""Regions of a model: the parts that its author put under `jax.checkpoint`.

A trace has no calls: its equations say which regions they are from. A policy is asked
about these equations. Values that it saves are those of the model, which get names;
what quantization adds is never saved.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from qjax.model.primitives import names

_MASKS = names("comparison")
_SAVED = "qjax.saved."  # Before region and value in the name of a saved value.


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a model that the backward pass computes again.

    Attributes:
      number: Tells it from other regions of the model.
      policy: Same as for `jax.checkpoint`, and so is the next.
      prevent_cse: Whether the compiler must not join the two computations.
    """

    number: int
    policy: Callable[..., Any] | None
    prevent_cse: bool


def region_of(eqn: Any, numbers: Iterator[int]) -> Region:
    """Returns the region of a call of `jax.checkpoint` in a jaxpr."""
    prevent = eqn.params["prevent_cse"]  # Of all operands, or of each.
    is_all = any(prevent) if isinstance(prevent, tuple) else bool(prevent)
    return Region(next(numbers), eqn.params["policy"], is_all)


def common_regions(equations: Iterable[Any]) -> tuple[Region, ...]:
    """Returns the regions that are around all of some equations."""
    pairs = zip(*(e.regions for e in equations), strict=False)
    same = itertools.takewhile(lambda found: len(set(found)) == 1, pairs)
    return tuple(found[0] for found in same)


@dataclasses.dataclass(frozen=True)
class Regions:
    """The regions of a model.

    Attributes:
      by_number: Number -> region.
      saved: Number -> values of the model that the policy of the region saves, each
        with what the policy said.
    """

    by_number: Mapping[int, Region]
    saved: Mapping[int, Mapping[int, Any]]

    def named(self, v: int, x: Any) -> Any:
        """Gives a value of the model the names by which regions save it."""
        for number, values in self.saved.items():
            if v in values:
                x = checkpoint_name(x, f"{_SAVED}{number}.{v}")
        return x

    def checkpoint(self, number: int, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Puts the computation of a region under `jax.checkpoint`."""
        region, prefix = self.by_number[number], f"{_SAVED}{number}."

        def policy(primitive: Any, *types: Any, **params: Any) -> Any:
            if primitive.name in _MASKS:  # Of a relu, in place of its operand.
                return _decision(region, primitive, types, params)
            if primitive.name != "name":
                return False
            if params["name"].startswith(prefix):
                return self.saved[number][int(params["name"].removeprefix(prefix))]
            is_own = not params["name"].startswith(_SAVED)
            return is_own and _decision(region, primitive, types, params)

        own = None if region.policy is None else policy
        return jax.checkpoint(fn, policy=own, prevent_cse=region.prevent_cse)


def find_regions(equations: Iterable[Any], types: Mapping[int, Any]) -> Regions:
    """Finds the regions of a trace, and asks their policies about its equations.

    Args:
      equations: Equations of the trace.
      types: Types of its values.

    Returns:
      All regions that equations are from.
    """
    found: dict[int, Region] = {}
    saved: dict[int, dict[int, Any]] = {}
    for e in equations:
        for region in e.regions:
            found[region.number] = region
            own = [types[v] for v in e.inputs]
            said = _decision(region, e.primitive, own, e.params)
            if said is not False and e.primitive.name != "name":
                saved.setdefault(region.number, {}).update(
                    dict.fromkeys(e.outputs, said)
                )
    return Regions(found, saved)


def _decision(
    region: Region, primitive: Any, types: Sequence[Any], params: Mapping[str, Any]
) -> Any:
    """Returns what a policy says of an equation; False without a policy."""
    return region.policy is not None and region.policy(primitive, *types, **params)
