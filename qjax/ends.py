"""The ends of a program: codes of real inputs, real values of output codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, dequantize
from qjax.graph.graph import Grid, Value
from qjax.qpoint import grid_codes, quotient_codes


def input_codes(x: Any, v: Value) -> jax.Array:
    """Computes the codes of a real input; integers without a grid are their own."""
    if jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer) and v.grid is None:
        return _clipped(jnp.asarray(x), v)
    x, grid = as_single(x), grid_of(v)
    ends = (jnp.int32(n) for n in (grid.zero_point, v.low, v.high))
    gain, offset = map(jnp.float32, v.rescaling)
    codes = quotient_codes if v.rounding == "half_away" else grid_codes
    return codes(x * gain + offset, jnp.asarray(grid.array()), *ends).astype(v.dtype)


def as_single(x: Any) -> jax.Array:
    """Converts a real input to float32; refuses complex numbers."""
    if jnp.issubdtype(jax.dtypes.result_type(x), jnp.complexfloating):
        raise TypeError(
            f"An input must be real, got {jax.dtypes.result_type(x)}: codes would lose "
            "its imaginary part. Pass its real part."
        )
    return jnp.asarray(x).astype(jnp.float32)


def real_input(q: Any, v: Value) -> np.ndarray:
    """Computes a real input that has certain codes.

    Args:
      q: Codes.
      v: Value of the input.

    Returns:
      float32, before any rescaling; integers without a grid are their own.
    """
    if v.grid is None:
        return np.asarray(q).astype(v.dtype)
    gain, offset = v.rescaling
    steps = np.asarray(q, np.int64) - v.grid.zero_point
    real = v.grid.array().astype(np.float64) * steps
    return np.asarray((real - offset) / gain, np.float32)


def real_output(q: jax.Array, v: Value) -> jax.Array:
    """Computes the real values of output codes; without a grid, the model's integers.

    Args:
      q: Codes.
      v: Value of the output.

    Returns:
      float32, or integers of the type in the model.
    """
    if v.grid is None:
        return q.astype(v.dtype_of_model) if v.dtype_of_model else q
    scale = jnp.asarray(v.grid.array())
    return dequantize(q, QParams(scale, jnp.int32(v.grid.zero_point)))


def check_range(name: str, x: Any, v: Value) -> None:
    """Raises for known codes outside of their range."""
    if isinstance(x, jax.core.Tracer) or not np.size(x):
        return
    dtype = np.dtype(getattr(x, "dtype", int))
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        if v.low <= ends.min and ends.max <= v.high:
            return  # No array of this type has others.
    low, high = int(np.min(x)), int(np.max(x))
    if low < v.low or high > v.high:
        raise ValueError(
            f"The codes of {name} must lie in [{v.low}, {v.high}], got [{low}, {high}]."
        )


def grid_of(value: Value) -> Grid:
    """Returns the grid of an input or output; whole numbers stand for themselves."""
    return Grid(1.0, 0) if value.grid is None else value.grid


def _clipped(x: jax.Array, v: Value) -> jax.Array:
    """Clips whole numbers, which are their own codes, without float32's roundings."""
    info = jnp.iinfo(x.dtype)
    ends = max(v.low, int(info.min)), min(v.high, int(info.max))
    return jnp.clip(x, *(jnp.asarray(end, x.dtype) for end in ends)).astype(v.dtype)
