"""Codes, known values and nodes of calls in integers, which their rules share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Grid, storage
from qjax.integer_calls import integer_of, rank_of
from qjax.lowering.interpret import refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.whole import exact_codes
from qjax.lowering.site_grids import SiteGrid
from qjax.lowering.values import Abstract, Builder, Integers, Known, KnownCodes
from qjax.model.trace import Equation, Trace


def check_rank(e: Equation, trace: Trace) -> None:
    """Raises for a call inside of `jax.vmap`, whose axes are others."""
    rank, found = rank_of(e), len(trace.shape(e.inputs[0]))
    if rank != found:
        raise NotImplementedError(
            f"The {integer_of(e).partition('.')[0]} in {where(e)} is of values of "
            f"{rank} axes, and `jax.vmap` gives them {found}.\n  equation: {e}\nCall "
            "the layer on the whole batch, without `jax.vmap`: its axes may count from "
            "the last."
        )


def codes_of(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, unit: Any, place: int = 0
) -> Integers:
    """Returns the codes that a call reads, on the grid that it knows of."""
    x = exact_codes(builder, e, trace, x, e.inputs[place])
    x = settled(builder, e, trace, x)
    is_plain = x.is_codes and not np.ndim(x.scale) and x.gain is None
    if not is_plain or np.float32(x.scale) != unit:
        raise refuse(e, x, "input")  # What a rescaling rounds is no half step.
    return x


def site_grid_of(e: Equation, grid: tuple[Any, Any, Any, Any]) -> SiteGrid:
    """Returns the grid of the site of a call, as numbers.

    Args:
      e: The call.
      grid: Scale, zero point, least and largest code.
    """
    scale, zero_point, qmin, qmax = grid
    site = e.sites.output or where(e).strip("'")
    return SiteGrid(float(scale), int(zero_point), int(qmin), int(qmax), site)


def added(
    builder: Builder,
    e: Equation,
    operation: str,
    inputs: Sequence[int],
    attributes: Mapping[str, Any],
    params: Mapping[str, str],
    grid: tuple[Any, Any, Any, Any],
) -> tuple[Integers, ...]:
    """Returns the codes of a node on the grid of its site."""
    scale, zero_point, qmin, qmax = grid
    value = builder.add(
        operation,
        inputs,
        attributes,
        params=params,
        grid=Grid(float(scale), int(zero_point)),
        dtype=storage(int(qmin), int(qmax)),
        path=e.sites.output or where(e).strip("'"),
    )
    found = Integers(
        value=value,
        scale=np.asarray(np.float64(np.float32(scale))),
        zero_point=int(zero_point),
        low=builder.values[value].low,
        high=builder.values[value].high,
        is_codes=True,
        place=e.place,
    )
    return found, found  # The second, what does not saturate, is not read.


def narrowed(x: np.ndarray, rank: int) -> np.ndarray:
    """Gives a constant a rank, and size 1 to axes along which it does not vary."""
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    for d in range(rank):
        first = x.take([0], d) if x.shape[d] else x
        x = first if np.all(x == first) else x
    return x


def known_of(e: Equation, x: Abstract) -> Any:
    """Returns a known operand of a call; raises ValueError for one of an input."""
    if isinstance(x, KnownCodes):  # Gain or offset of a layer, on a grid.
        scale = np.asarray(x.scale, np.float32)
        return (x.codes - x.zero_point).astype(np.float32) * scale
    if not isinstance(x, Known):
        raise ValueError(
            f"The {integer_of(e).partition('.')[0]} in {where(e)} has a grid or a mask "
            f"that depends on an input.\n  equation: {e}\nPass the mask as a constant."
        )
    return np.asarray(x.value)
