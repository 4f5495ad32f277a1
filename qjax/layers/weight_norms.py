"""Weights divided by a norm, before they are rounded: pure functions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def unit_weight(
    weight: jax.Array,
    axes: Sequence[int],
    scale: jax.Array | None,
    *,
    epsilon: float,
    dtype: Any = None,
) -> jax.Array:
    """Divides a weight by its length along all but some axes.

        w = scale * weight * rsqrt(sum(weight**2) + epsilon)

    Args:
      weight: Weight, any shape.
      axes: Axes that keep a length of their own, 0 or more each.
      scale: Factor of each, of the shape of these axes; None for 1.
      epsilon: Addend of the squared length.
      dtype: Type of the result; None: that of the operands.

    Returns:
      The weight, of the same shape.

    References:
      Salimans and Kingma, "Weight Normalization", 2016, eq. 2 (arXiv:1602.07868).
    """
    summed = tuple(k for k in range(weight.ndim) if k not in axes)
    squares = (weight * weight).sum(axis=summed, keepdims=True)
    found = weight * jax.lax.rsqrt(squares + epsilon)
    if scale is not None:
        shape = [n if k in axes else 1 for k, n in enumerate(weight.shape)]
        found = found * scale.reshape(shape)
    return found.astype(found.dtype if dtype is None else dtype)


def spectral_weight(
    weight: jax.Array, u: jax.Array, *, steps: int, epsilon: float, dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divides a weight by its largest singular value, which steps of power find.

    The matrix has the last axis of the weight as its columns:

        v = unit(u @ W.T),  u = unit(v @ W),  sigma = v @ W @ u.T,  w = W / sigma

    Args:
      weight: Weight with 2 axes or more.
      u: Vector from which the iteration starts, shape ``[1, columns]``.
      steps: Number of steps, 1 or more.
      epsilon: Addend of squared lengths.
      dtype: Type of the result; None: that of the operands.

    Returns:
      The weight, the next ``u``, and ``sigma``. No derivative goes through ``u``.

    References:
      Miyato et al., "Spectral Normalization", 2018, alg. 1 (arXiv:1802.05957).
    """
    matrix = weight.reshape((-1, weight.shape[-1]))
    unit = lambda a: a * jax.lax.rsqrt((a * a).sum(keepdims=True) + epsilon)
    for _ in range(steps):
        v = unit(jnp.matmul(u, matrix.T))
        u = unit(jnp.matmul(v, matrix))
    u, v = jax.lax.stop_gradient((u, v))
    sigma = jnp.matmul(jnp.matmul(v, matrix), u.T)[0, 0]
    found = (matrix / jnp.where(sigma != 0, sigma, 1)).reshape(weight.shape)
    return found.astype(found.dtype if dtype is None else dtype), u, sigma
