"""Functions whose values lie on a grid though no quantization point says so.

Such are signs, staircases and quantizers of one's own, and lines that are clipped, as
`hard_tanh` of codes. What reads them as codes finds their grid in their values.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.graph import Grid, storage
from qjax.lowering.constants import exact_grid
from qjax.lowering.evaluation import (
    find_thresholds,
    is_exact_source,
    sampled,
    tabulate,
)
from qjax.lowering.rules.functions import add_table, as_curve
from qjax.lowering.rules.whole import exact_codes
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    ScaledIntegers,
    is_power_of_two,
)
from qjax.model.trace import Equation, Trace

_MOST_CODE = (1 << 15) - 1
_MOST_LONG = 1 << 24  # Integers that float32 holds.
_SHORT = 1 << 16  # Range of codes that index a table.
_OFF = 2.0**-23  # Rounding of float32 values, of the largest.


def on_grid(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int
) -> Abstract:
    """Returns a function as codes of a grid that holds its values, if there is one.

    Args:
      builder: Receives the table or the thresholds.
      e: The equation that reads it.
      trace: The program.
      x: Any value.
      v: Its value in the trace.

    Returns:
      Codes of at most 16 bits about zero. ``x`` itself where there is no such grid; of
      accumulators, where float32 does not hold them or scales are no powers of two, as
      a threshold could then be crossed that no site shows.
    """
    x = exact_codes(builder, e, trace, x, v)
    if not isinstance(x, Curve) or not trace.is_real(v):
        return x
    key = "levels", x.source.value, v
    if key not in builder.placed:
        value = _add(builder, x)
        if value is None:
            return x
        own = builder.values[value]
        builder.placed[key] = value, int(own.low), int(own.high)
    value, low, high = builder.placed[key]
    grid = builder.values[value].grid
    assert grid is not None
    scale = np.asarray(grid.scale)
    kind: Any = {"is_codes": True, "bounded": x, "place": x.place}
    return Integers(value=value, scale=scale, low=low, high=high, **kind)


def factor_on_grid(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int
) -> Abstract:
    """Returns `on_grid` of a factor, also of an accumulator between two bounds."""
    if isinstance(x, ScaledIntegers) and not x.is_of_codes:
        if not all(map(math.isfinite, x.bounds)):
            return x
        found = on_grid(builder, e, trace, as_curve(builder, e, v, x), v)
        return x if isinstance(found, Curve) else found
    return on_grid(builder, e, trace, x, v)


def _add(builder: Builder, x: Curve) -> int | None:
    """Adds a function on the grid of its values; returns None if there is none."""
    values = _values(builder, x)
    if values is None:
        return None
    scale = _scale(values, is_exact=not x.source.is_of_codes)
    if scale is None:
        return None

    def codes(real: jax.Array) -> jax.Array:
        return jnp.rint(real * jnp.float32(1 / scale)).astype(jnp.int32)

    if x.source.is_of_codes:
        _, _, off = tabulate(x, codes, builder.types)
    else:
        off = find_thresholds(x, codes, builder.types).off
    if off:  # How the compiler fuses it moves some.
        return None
    steps = np.rint(values.astype(np.float64) / scale)
    low, high = int(steps.min(initial=0)), int(steps.max(initial=0))
    options: Any = {"dtype": storage(low, high), "grid": Grid(scale, 0)}
    return add_table(builder, x, codes, x.place.path or "function", **options)


def _values(builder: Builder, x: Curve) -> np.ndarray | None:
    """Returns all values of a function; None if they are too many, or not certain."""
    types = builder.types
    if x.source.is_of_codes:
        if x.source.high - x.source.low >= _SHORT:
            return None
        table, _, _ = tabulate(x, _ordered, types)
        return _reals(np.unique(table))
    few = sampled(x, _ordered, types)
    is_held = x.source.high - x.source.low < _MOST_LONG and is_exact_source(x)
    if not is_held or few is None or _scale(_reals(few), is_exact=True) is None:
        return None
    try:
        found = find_thresholds(x, _ordered, types)
    except ValueError:  # It has too many values, or none somewhere.
        return None
    return _reals(np.unique(found.codes)) if found.is_certain else None


def _ordered(real: jax.Array) -> jax.Array:
    """Returns the bits of float32 as integers in the order of the numbers."""
    bits = jax.lax.bitcast_convert_type(real.astype(jnp.float32), jnp.int32)
    bits = jnp.where(real == 0, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _reals(ordered: np.ndarray) -> np.ndarray:
    bits = ordered.astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)


def _scale(values: np.ndarray, is_exact: bool) -> float | None:
    """Returns the scale of a grid about zero that holds values with 16-bit codes.

    Args:
      values: float32, finite and different.
      is_exact: Whether the grid must hold them exactly, not up to float32's rounding.
    """
    if not np.all(np.isfinite(values)):
        return None
    most = float(np.abs(values).max(initial=0))
    exact = exact_grid(values)
    if exact is not None and most <= _MOST_CODE * exact[0]:
        return exact[0]
    if is_exact or not 2.0**-100 < most < 2.0**100:
        return None
    steps = np.diff(np.unique(np.append(values.astype(np.float64), 0.0)))
    least = float(steps[steps > 4 * _OFF * most].min(initial=np.inf))
    count = round(most / least)
    if not 0 < count <= _MOST_CODE:
        return None
    scale = float(np.float32(most / count))
    off = np.abs(values - scale * np.rint(values / scale))
    return None if is_power_of_two(scale) or np.any(off > _OFF * most) else scale
