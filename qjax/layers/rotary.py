"""Rotary position embedding by a table of rotations that has a word: pure functions.

    angle[n, k] = n * max_wavelength**(-2 k / features)
    [y_k, z_k] = [[cos, -sin], [sin, cos]] [a_k, b_k]

Each pair of features is the operand of a small product with a known table, so that its
sums are integers.
"""

import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec, fake_quant
from qjax.layers.layer_quantizers import LayerQuantizers, quantized_weight
from qjax.ranges import abs_max_params
from qjax.schemes.patterns import Site
from qjax.schemes.words import at_site

ROTARY = LayerQuantizers(kernel=QSpec(8, narrow_range=True), bias=None, output=QSpec(8))


def rotations(
    positions: Any, size: int, features: int, max_wavelength: float, length: int | None
) -> jax.Array:
    """Returns the rotation of each pair of features at each position.

    Angles of known positions are computed in float64; these lower. Traced ones, which
    do not, are rows of the table of positions below ``length``, NaN for one that is
    not there.

    Args:
      positions: Integers, shape ``[size]``; None for 0 to ``size - 1``.
      size: Number of positions.
      features: Number of features, even.
      max_wavelength: Positions that the slowest pair takes for one turn, divided by
        two pi.
      length: Number of rows for positions that are traced.

    Returns:
      Matrices, shape ``[size, features / 2, 2, 2]``, float32.

    Raises:
      TypeError: for positions that are not integers.
      ValueError: for another shape, and for traced ones without a length.
    """
    positions = np.arange(size) if positions is None else positions
    if not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
        raise TypeError(
            f"Positions are integers, got {jnp.result_type(positions)}. Use "
            "`positions.astype(int)`."
        )
    if jnp.shape(positions) != (size,):
        raise ValueError(
            f"Positions have the shape {(size,)} of their axis, got "
            f"{jnp.shape(positions)}. Use `jax.vmap` for positions of each example."
        )
    if not isinstance(positions, jax.core.Tracer):
        return jnp.asarray(_table(np.asarray(positions), features, max_wavelength))
    if length is None:
        raise ValueError(
            "Positions that are traced are rows of a table. Say how many there are, "
            "`length=512`, or pass NumPy integers."
        )
    table = jnp.asarray(_table(np.arange(length), features, max_wavelength))
    is_there = (positions >= 0) & (positions < length)
    return jnp.where(is_there[:, None, None, None], table[positions], jnp.nan)


def _table(positions: np.ndarray, features: int, max_wavelength: float) -> np.ndarray:
    waves = np.float64(max_wavelength) ** (np.arange(0, features, 2) / features)
    angles = positions[:, None] / waves
    cos, sin = np.cos(angles), np.sin(angles)
    rows = np.stack([cos, -sin], -1), np.stack([sin, cos], -1)
    return np.stack(rows, -2).astype(np.float32)


def rotate(
    x: jax.Array,
    positions: Any,
    word: Any,
    *,
    site: str,
    path: str = "",
    max_wavelength: float = 10_000.0,
    is_interleaved: bool = False,
    axis: int = -2,
    length: int | None = None,
) -> jax.Array:
    """Rotates pairs of features by their positions.

    Args:
      x: Values, ``[..., positions, features]``, or with axes between the two.
      positions: Integers; None for 0, 1, ...
      word: Word of the table, whose range is from -1 to 1; None for float.
      site: Name of its site.
      path: Path of the layer, for messages.
      max_wavelength: Base of the wavelengths.
      is_interleaved: Whether a pair stands side by side; else a feature of the first
        half goes with the one at its place in the second.
      axis: Axis of the positions, counted from the end: -2, or -3 before heads.
      length: Number of rows for positions that are traced.

    Raises:
      ValueError: for an odd number of features, and another axis.

    References:
      Su et al., "RoFormer", 2021, eq. 34 (arXiv:2104.09864).
    """
    at = path or "this layer"
    if axis > -2 or x.ndim < -axis:
        raise ValueError(
            f"`axis` of {at!r} counts from the end, -2 or less, and an input of shape "
            f"{x.shape} has {x.ndim} axes; got {axis}. Use `axis=-2`."
        )
    features = x.shape[-1]
    if features % 2:
        raise ValueError(
            f"{at!r} rotates pairs of features, and {features} are odd. Rotate some of "
            f"them, `x[..., :{features - 1}]`, and put the last one behind."
        )
    size = x.shape[axis]
    table = rotations(positions, size, features, max_wavelength, length)
    pairs = (features // 2, 2) if is_interleaved else (2, features // 2)
    parts = x.reshape((*x.shape[:-1], *pairs))
    if word is None:
        pair = -1 if is_interleaved else -2
        found = _turned(parts, table.astype(x.dtype), axis, pair)
    else:
        known = _on_grid(table, word, site).astype(x.dtype)
        between = string.ascii_uppercase[: -axis - 2]
        order = "pj" if is_interleaved else "jp"
        formula = f"...n{between}{order},npij->...n{between}{order.replace('j', 'i')}"
        found = jnp.einsum(formula, parts, known)
    return found.reshape(x.shape)


def _turned(x: jax.Array, table: jax.Array, axis: int, pair: int) -> jax.Array:
    """Returns ``[a cos - b sin, b cos + a sin]`` along the axis of the pair."""
    a, b = (jax.lax.index_in_dim(x, k, pair, keepdims=False) for k in (0, 1))
    places = table.shape[0], *(1,) * (-axis - 2), table.shape[1]
    shape = (*(1,) * (a.ndim - len(places)), *places)
    cos, sin = (table[:, :, k, 0].reshape(shape) for k in (0, 1))
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], pair)


def _on_grid(table: jax.Array, word: Any, site: str) -> jax.Array:
    """Rounds a table, on the grid of a range that does not depend on its rows."""
    if not isinstance(word, QSpec):
        return quantized_weight(table, word, None, site=site)[0]
    word = at_site(word, Site(site, "weight", table.shape, axis=None))
    if word.axis is not None:
        raise ValueError(
            f"The table at {site!r} has one scale, got {word}. Use `axis=None`."
        )
    return fake_quant(table, abs_max_params(jnp.float32(1), word), word, site=site)
