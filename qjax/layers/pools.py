"""Average pools whose factor has a quantizer: pure functions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.layers.layer_quantizers import quantized_weight


def pool_factor(size: int, word: Any, dtype: Any, site: str) -> jax.Array:
    """Returns ``Q(1 / size)``, the factor of a sum over a window.

    Args:
      size: Number of values in a window.
      word: Word of the factor.
      dtype: Type of the factor.
      site: Name of the site.
    """
    one = jnp.asarray(1.0 / size, jnp.float32)
    return quantized_weight(one, word, None, site=site)[0].astype(dtype)


def average_pool(
    x: jax.Array,
    pools: tuple[Callable[..., jax.Array], Callable[..., jax.Array]],
    window: Sequence[int],
    word: Any,
    site: str,
    *,
    counts_padding: bool,
    **options: Any,
) -> jax.Array:
    """Averages windows: ``sum(x) * Q(1 / size)``.

    Where padding does not count, it is ``mean(x) * size * Q(1 / size)``, of the values
    that are there.

    Args:
      x: Values with their features along the last axis.
      pools: Flax's ``avg_pool`` and ``pool``.
      window: Size of a window along each axis.
      word: Word of the factor; None for the average as Flax computes it.
      site: Name of the site of the factor.
      counts_padding: Whether padding counts.
      **options: ``strides`` and ``padding``.

    References:
      QKeras, qpooling.py, snapshot 78ea90f.
    """
    average, pool = pools
    window = tuple(window)
    mean = lambda: average(x, window, **options, count_include_pad=counts_padding)
    if word is None:
        return mean()
    size = math.prod(window)
    factor = pool_factor(size, word, jnp.result_type(x, 1.0), site)
    if not counts_padding and options["padding"] != "VALID":
        return mean() * (size * factor)
    strides = options["strides"] or (1,) * len(window)
    sums = pool(x, 0.0, jax.lax.add, window, tuple(strides), options["padding"])
    return sums * factor


def global_average(x: jax.Array, word: Any, site: str, keepdims: bool) -> jax.Array:
    """Averages all axes between the first and the last: ``sum(x) * Q(1 / size)``.

    Args:
      x: Values, ``[batch, ..., features]``.
      word: Word of the factor; None for the mean.
      site: Name of the site of the factor.
      keepdims: Whether these axes stay, with size 1.
    """
    axes = tuple(range(1, x.ndim - 1))
    if word is None:
        return jnp.mean(x, axes, keepdims=keepdims)
    size = math.prod(x.shape[d] for d in axes)
    factor = pool_factor(size, word, jnp.result_type(x, 1.0), site)
    return jnp.sum(x, axes, keepdims=keepdims) * factor
