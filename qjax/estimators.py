"""Estimators: backward passes of `fake_quant`, whose forward pass stays the same.

With ``u = x / scale`` and ``q`` what it is rounded to, clipped to the grid:

    clipped_ste     dx = dy where no code saturates, else 0
    plain_ste       dx = dy everywhere
    soft_rounding   dx = dy * h'(u), h a staircase of hyperbolic tangents; clipped
    ewgs            dx = dy * (1 + delta * sign(dy) * (u - q)); clipped

`make_estimator` makes one of any function. Where gradients of higher order are wanted,
what these formulas say is differentiated once more, and the value itself moves by the
clipped STE.
"""

import functools
import math

import jax
import jax.numpy as jnp

from qjax.qpoint import Estimator, clipped_ste, make_estimator

__all__ = ("clipped_ste", "ewgs", "make_estimator", "plain_ste", "soft_rounding")


def plain_ste(*operands, **names):
    """Computes the straight-through estimator without a clip: ``dx = dy`` everywhere.

    Args:
      *operands: Same as for `qjax.clipped_ste`.
      **names: Same as for `qjax.clipped_ste`.

    Returns:
      Values on the grid, shape and dtype of ``x``.

    References:
      Bengio et al., 2013 (arXiv:1308.3432).
    """
    return _pass_all(*operands, **names)


_pass_all = make_estimator(lambda steps, inside: (), lambda _, dy: dy)


@functools.cache
def soft_rounding(sharpness: float = 4.0) -> Estimator:
    """Makes an estimator whose backward pass is a staircase of hyperbolic tangents.

        h(u) = m + tanh(k * (u - m)) / (2 * tanh(k / 2)),  m = floor(u) + 1 / 2
        dx = dy * h'(u) where no code saturates, else 0

    ``h`` meets the integers and has slope 1 on average; a large ``k`` is close to
    rounding, a small one to the identity.

    Args:
      sharpness: ``k``, positive.

    Returns:
      An estimator for `fake_quant` or `Scheme`.

    Raises:
      ValueError: if ``sharpness`` is not positive and finite.

    References:
      Gong et al., "Differentiable Soft Quantization", 2019, eq. 4 to 6
      (arXiv:1908.05033).
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"`sharpness` must be positive and finite, got {sharpness}.")
    slope = sharpness / (2 * math.tanh(sharpness / 2))

    def backward(residual: tuple[jax.Array, jax.Array], dy: jax.Array) -> jax.Array:
        steps, inside = residual
        middle = jax.lax.stop_gradient(jnp.floor(steps)) + 0.5
        t = jnp.tanh(sharpness * (steps - middle))
        dx = dy * (slope * (1.0 - t * t)).astype(dy.dtype)
        return jnp.where(inside, dx, jnp.zeros_like(dy))

    return make_estimator(lambda steps, inside: (_finite(steps), inside), backward)


@functools.cache
def ewgs(delta: float = 0.2) -> Estimator:
    """Makes an estimator of elementwise gradient scaling, by the error of rounding.

        dx = dy * (1 + delta * sign(dy) * (u - q)) where no code saturates, else 0

    Args:
      delta: Strength, not negative; 0 is the clipped STE.

    Returns:
      An estimator for `fake_quant` or `Scheme`.

    Raises:
      ValueError: if ``delta`` is negative or not finite.

    References:
      Lee et al., "Network Quantization with Element-wise Gradient Scaling", 2021, eq. 3
      (arXiv:2104.00903).
    """
    if not 0 <= delta < math.inf:
        raise ValueError(f"`delta` must be finite and not negative, got {delta}.")

    def backward(residual: tuple[jax.Array, jax.Array], dy: jax.Array) -> jax.Array:
        steps, inside = residual
        error = steps - jax.lax.stop_gradient(jnp.round(steps))
        scaled = dy + delta * jnp.abs(dy) * error.astype(dy.dtype)
        return jnp.where(inside, scaled, jnp.zeros_like(dy))

    return make_estimator(lambda steps, inside: (_finite(steps), inside), backward)


def _finite(steps: jax.Array) -> jax.Array:
    """Clips infinities to finite steps, so that they leave no NaN behind a mask."""
    return jnp.clip(steps, -(2.0**31), 2.0**31)
