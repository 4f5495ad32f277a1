"""Softmax of a value on a grid, in the integers that ship."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec
from qjax.integer_calls import SoftmaxCall
from qjax.integer_softmax import Empty
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord

SOFTMAX = LayerQuantizers(QSpec(8), None, None, QSpec(8))  # The words of a softmax.


def softmax_source(
    x: jax.Array,
    word: LayerWord,
    grid: QParams | None,
    *,
    axes: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    factor: float = 1.0,
    empty: Empty = "zero",
    site: str = "",
) -> IntegerSource:
    """Returns how integers compute ``softmax(factor * x)`` of what a mask keeps.

    Args:
      x: Values on their grid.
      word: Word of the values.
      grid: Their grid, or None.
      axes: Axes that sums go over.
      where: Truth values of what is kept, broadcasts; None for all.
      factor: Positive factor.
      empty: What a row is in which nothing is kept: "zero" or "uniform".
      site: Name of the site of the values.
    """
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    over = tuple(sorted(d % x.ndim for d in given))
    numbers = over, float(np.float32(factor)), empty, 0.0, 0.0
    call = functools.partial(SoftmaxCall, "softmax", True, *numbers)
    return IntegerSource(call, x, word, grid, site, masks(where, x.ndim))


def masks(where: jax.Array | None, rank: int) -> tuple[jax.Array, ...]:
    """Returns a mask as truth values of a rank; nothing for None."""
    if where is None:
        return ()
    found = jnp.asarray(where)
    found = found if found.dtype == jnp.bool_ else found != 0
    return (found.reshape((1,) * (rank - found.ndim) + found.shape),)
