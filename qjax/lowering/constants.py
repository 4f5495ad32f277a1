"""Constants of a model as codes, on the grid of other values or on their own."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QParams, dequantize
from qjax.graph.graph import Grid, holds, storage
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    KnownCodes,
    Sum,
)
from qjax.qpoint import grid_codes

_MOST = 1 << 24  # Codes up to here are exact in float32.
_LEAST_UNIT = -126  # Exponent of the least normal float32 number.


def codes_on(value: np.ndarray, scale: float, zero_point: int) -> np.ndarray | None:
    """Returns the codes that mean exactly the given values; None if one has none.

    Args:
      value: float32.
      scale: Scale of the grid.
      zero_point: Zero point of the grid.

    Returns:
      int64 with ``float32(scale) * float32(code - zero_point) == value``.
    """
    value, unit = np.asarray(value, np.float32), np.float32(scale)
    steps = np.rint(value.astype(np.float64) / np.float64(unit))
    if not np.all(np.abs(steps) <= _MOST):  # NaN and infinity as well.
        return None
    if np.any(steps.astype(np.float32) * unit != value):
        return None
    return steps.astype(np.int64) + zero_point


def exact_grid(values: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Returns the coarsest grid that holds values exactly, and their codes.

    Args:
      values: float32.

    Returns:
      ``(scale, codes)``, zero point 0; None if codes would be none of float32.
    """
    values = np.asarray(values, np.float32)
    nonzero = np.abs(values[values != 0]).astype(np.float64)
    if not np.all(np.isfinite(values)):
        return None
    if not nonzero.size:
        return 1.0, np.zeros(values.shape, np.int64)
    mantissas, exponents = np.frexp(nonzero)
    if exponents.max() - exponents.min() > 24:
        return None
    unit = int(exponents.min()) - 24
    whole = [int(m) for m in np.ldexp(mantissas, exponents - unit)]
    common = math.gcd(*whole)
    unit += (common & -common).bit_length() - 1
    scale = math.ldexp(common // (common & -common), unit)
    is_normal = scale >= 2.0**_LEAST_UNIT and float(np.float32(scale)) == scale
    codes = codes_on(values, scale, 0) if is_normal else None
    return None if codes is None else (scale, codes)


def whole_grid(scale: float, codes: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns whole numbers in the unit of one, as a simulation knows them.

    Args:
      scale: Scale of a grid about zero.
      codes: Codes on it.

    Returns:
      Scale and codes of the same values; of other grids, and of numbers beyond 2^16,
      what was given.
    """
    if scale != round(scale) or np.max(np.abs(codes), initial=0) * scale > 1 << 16:
        return scale, codes
    return 1.0, codes * int(scale)


def add_constant(
    builder: Builder,
    codes: np.ndarray,
    grid: Grid | None,
    *,
    name: str,
    path: str,
    like: int | None = None,
    dtype: str | None = None,
) -> int:
    """Adds a constant to the graph.

    Args:
      builder: Receives it.
      codes: Integers, in the shape of the value.
      grid: Grid of the codes.
      name: Name of the parameter.
      path: Module path of the constant.
      like: A value whose leading size it has, whatever that is; None: its own.
      dtype: By default the smallest type that holds it.

    Returns:
      The number of the value.
    """
    ends = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    dtype = storage(*ends) if dtype is None else dtype
    if like is not None and codes.ndim and np.all(codes == codes[:1]):
        codes = codes[:1]  # The same for each example.
    elif like is not None and codes.ndim == 0:
        like = None
    own = None if grid is None or np.ndim(grid.scale) else grid
    params = {"value": builder.add_param(name, codes.astype(dtype), own)}
    inputs = () if like is None else (like,)
    options: Any = {"params": params, "grid": grid, "dtype": dtype, "path": path}
    return builder.add("constant", inputs, **options)


def anchor(builder: Builder, x: Abstract, shape: Sequence[int]) -> int | None:
    """Returns a graph value with the leading size of an operand that is made of it."""
    if isinstance(x, Joined):
        found = (anchor(builder, p, shape) for p in x.parts)
        return next((v for v in found if v is not None), None)
    own = (
        x.source if isinstance(x, Curve) else x.terms[0][0] if isinstance(x, Sum) else x
    )
    v = own.value if isinstance(own, Integers) else None
    if v is None or not shape:
        return None
    sizes = builder.values[v].shape
    return v if sizes and sizes[0] == shape[0] else None


def like_of(
    builder: Builder, x: Joined, data: Sequence[int], shape: Sequence[int]
) -> int | None:
    """Returns the value that sets the leading size of a constant in a join, or None.

    Args:
      builder: Has the values.
      x: The join.
      data: The parts that are no constants.
      shape: Shape of the constant.
    """
    if not shape or (x.operation == "concatenate" and x.attributes["axis"] == 0):
        return None
    return next((v for v in data if builder.values[v].shape[:1] == shape[:1]), None)


def repeated(
    x: Joined, codes: np.ndarray, like: int | None
) -> tuple[np.ndarray, int | None]:
    """Returns a constant of a join as short as its operation takes it.

    Args:
      x: The join.
      codes: The constant.
      like: The value that sets its leading size.

    Returns:
      The constant and that value; an extreme repeats what is the same for each example.
    """
    is_extreme = x.operation in ("maximum", "minimum")
    if is_extreme and codes.ndim and len(codes) and np.all(codes == codes[:1]):
        return codes[:1], None
    return codes, like


def scale_grid(scale: np.ndarray, shape: Sequence[int]) -> Grid | None:
    """Returns the grid about zero of a parameter.

    Args:
      scale: Scale, one or in the rank of the parameter.
      shape: Shape of the parameter.

    Returns:
      The grid; None where the scale does not broadcast to the parameter, or is no
      finite number of float32.
    """
    with np.errstate(over="ignore"):
        own = np.asarray(scale, np.float32)
    if own.size == 1:
        own = own.reshape(())
    fits = not own.ndim or (
        own.ndim == len(shape)
        and all(n in (1, m) for n, m in zip(own.shape, shape, strict=True))
    )
    return Grid(own.tolist(), 0) if fits and np.all(np.isfinite(own)) else None


_grid_codes = jax.jit(grid_codes)
_MOST_PADDED = 1 << 16  # Numbers from here on are compiled in their own shape.


def known_codes(x: ArrayLike, *operands: ArrayLike) -> np.ndarray:
    """Computes the codes of known values, compiled for few sizes and no shape.

    Args:
      x: Real values.
      *operands: Scale, zero point, least and largest code, which broadcast.

    Returns:
      Codes, int64, in the shape of all.
    """
    arrays = [*map(np.asarray, (x, *operands))]
    shape = np.broadcast_shapes(*(v.shape for v in arrays))
    count = math.prod(shape)
    if not 0 < count < _MOST_PADDED:
        return np.asarray(_grid_codes(*arrays), np.int64)
    more = max(64, 1 << (count - 1).bit_length()) - count
    flat = (np.broadcast_to(v, shape).reshape(-1) for v in arrays)
    codes = _grid_codes(*(np.pad(v, (0, more), "edge") for v in flat))
    return np.asarray(codes, np.int64)[:count].reshape(shape)


def real_values(x: KnownCodes) -> np.ndarray:
    """Returns the real values of a weight."""
    grid = QParams(jnp.asarray(x.scale), jnp.asarray(x.zero_point))
    return np.asarray(dequantize(jnp.asarray(x.codes.astype(np.int32)), grid))


def wider(dtypes: set[str], low: int, high: int) -> str:
    """Returns the only type if it holds the integers, else the smallest that does."""
    only = next(iter(dtypes)) if len(dtypes) == 1 else ""
    return only if only and holds(only, low, high) else storage(low, high)
