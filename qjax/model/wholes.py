"""Real values that are whole numbers: casts of counts, of masks, of one-hot rows.

Their grid is known without calibration: scale 1, zero point 0. No site is needed.
"""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from qjax.model.blocks import constant_of
from qjax.model.lineage import Lineage
from qjax.model.primitives import BOUNDS, SHAPE_MOVES, names
from qjax.model.trace import Equation

_MOVES = SHAPE_MOVES | names("maximum", "minimum", "running extreme", "order")
_SUMS = {"reduce_sum": "axes", "cumsum": "axis"}
_CHOICES = BOUNDS | names("select") | {"concatenate", "pad", "split"}
_MOST = 2.0**24  # Whole numbers up to here are float32 numbers.


def whole_numbers(lineage: Lineage) -> Mapping[int, float]:
    """Finds the real values that are whole numbers by their making.

    Args:
      lineage: A traced model. An input that a cast makes real, through moves alone, has
        a site: it is none of these.

    Returns:
      Value -> a bound of its magnitude; `inf` where none is known.
    """
    most = {v: _most_of_type(lineage, v) for v in lineage.inputs}
    found: dict[int, float] = {}
    for e in lineage.model.equations:
        if lineage.data.isdisjoint(e.inputs):
            continue
        for v in e.outputs:
            if not lineage.model.is_real(v):
                bound = _most_of_integers(lineage, e, lambda u: _most(lineage, most, u))
                most[v] = min(bound, _most_of_type(lineage, v))
            elif (bound_ := _most_of_reals(lineage, e, most, found)) is not None:
                found[v] = bound_
    return found


def _most_of_type(lineage: Lineage, v: int) -> float:
    dtype = lineage.model.avals[v].dtype
    if dtype == np.bool_:
        return 1.0
    if not jnp.issubdtype(dtype, jnp.integer):
        return math.inf
    return float(max(-int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)))


def _most(lineage: Lineage, known: Mapping[int, float], v: int) -> float:
    """Returns the largest magnitude of integers, data or constants."""
    if v in lineage.data:
        return known.get(v, math.inf)
    x = constant_of(lineage.model, v, lineage.source)
    return math.inf if x is None else float(np.max(np.abs(x.astype(float)), initial=0))


def _most_of_integers(
    lineage: Lineage, e: Equation, most: Callable[[int], float]
) -> float:
    """Returns a bound of the integers that an equation makes."""
    name, shape = e.primitive.name, lineage.model.shape(e.inputs[0])
    if name in ("argmax", "argmin"):
        return float(max([shape[d] for d in e.params["axes"]]))
    if name in _SUMS:
        axes = e.params[_SUMS[name]]
        own = axes if isinstance(axes, tuple) else (axes,)
        return most(e.inputs[0]) * math.prod(shape[d] for d in own)
    if name in _MOVES:
        return most(e.inputs[0])
    if name in _CHOICES:
        return max(map(most, e.inputs[int(name == "select_n") :]))
    return math.inf


def _most_of_reals(
    lineage: Lineage,
    e: Equation,
    most: Mapping[int, float],
    found: Mapping[int, float],
) -> float | None:
    """Returns a bound of whole numbers that an equation makes real; None for others."""
    name, x = e.primitive.name, e.inputs[0]
    if name == "convert_element_type" and not lineage.model.is_real(x):
        return None if _is_input(lineage, x) else _most(lineage, most, x)
    if name in _MOVES:
        return found.get(x)
    if name not in _CHOICES:
        return None
    parts = e.inputs[1:] if name == "select_n" else e.inputs
    if not any(v in found for v in parts):
        return None
    bounds = [found.get(v) or _most_of_constant(lineage, v) for v in parts]
    known = [b for b in bounds if b is not None]
    return max(known) if len(known) == len(bounds) else None


def _is_input(lineage: Lineage, v: int) -> bool:
    """Returns whether integers are an input after moves, whose cast has a site."""
    while v in lineage.source and lineage.keeps_grid(lineage.source[v]):
        v = lineage.source[v].inputs[0]
    return v in lineage.inputs


def _most_of_constant(lineage: Lineage, v: int) -> float | None:
    """Returns the largest magnitude of a constant of whole numbers; None for others."""
    if v in lineage.data:
        return None
    x = constant_of(lineage.model, v, lineage.source)
    if x is None or not np.all(np.abs(x) <= _MOST) or np.any(x != np.rint(x)):
        return None
    return float(np.max(np.abs(x), initial=0))
