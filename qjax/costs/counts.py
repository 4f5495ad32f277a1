"""Counts of the products of contractions and convolutions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Shape = Sequence[int]
Counts = tuple[int, int, int]  # Products, those without padding, terms of one sum.


def dot_counts(x: Shape, y: Shape, dimension_numbers: Any) -> Counts:
    """Counts the products of a contraction.

    Args:
      x: Shape of the first operand.
      y: Shape of the second.
      dimension_numbers: Contraction axes of both, then batch axes of both, as in
        `jax.lax.dot_general`.

    Returns:
      Products twice, as none is padding, and the terms of one sum.

    Example:
      >>> dot_counts((8, 16), (16, 4), (((1,), (0,)), ((), ())))
      (512, 512, 16)
    """
    (summed, of_y), (_, batch) = dimension_numbers
    terms = math.prod(x[d] for d in summed)
    free = (n for d, n in enumerate(y) if d not in (*of_y, *batch))
    count = math.prod(x) * math.prod(free)
    return count, count, terms


def conv_counts(
    x: Shape, kernel: Shape, out: Shape, params: Mapping[str, Any]
) -> Counts:
    """Counts the products of a convolution.

    Args:
      x: Shape of the input.
      kernel: Shape of the kernel.
      out: Shape of the result.
      params: ``dimensions``: the axes of batch, channel and space in the input, of
        output channel, input channel and taps in the kernel, and of batch, channel and
        space in the result. ``window_strides``, ``padding``, ``lhs_dilation`` and
        ``rhs_dilation`` as in `jax.lax.conv_general_dilated`.

    Returns:
      Products of all places of the window, those with neither padding nor the holes of
      a dilated input, and the terms of one sum.
    """
    _, (features, into, *taps), (batch, *_) = params["dimensions"]
    terms = kernel[into] * math.prod(kernel[d] for d in taps)
    uses = int(tap_counts(x, kernel, out, params).sum())
    useful = out[batch] * kernel[features] * kernel[into] * uses
    return math.prod(out) * terms, useful, terms


def tap_counts(
    x: Shape, kernel: Shape, out: Shape, params: Mapping[str, Any]
) -> np.ndarray:
    """Counts the places of an image at which each tap of a kernel meets a value.

    Args:
      x: Shape of the input.
      kernel: Shape of the kernel.
      out: Shape of the result.
      params: Same as for `conv_counts`.

    Returns:
      int64, of the rank of the kernel, with size 1 along its channels.
    """
    (_, _, *space), (_, _, *taps), (_, _, *places) = params["dimensions"]
    found = np.ones((1,) * len(kernel), np.int64)
    names = "window_strides", "padding", "lhs_dilation", "rhs_dilation"
    for k, d in enumerate(taps):
        stride, (low, _), spread, dilation = (params[name][k] for name in names)
        at = np.arange(kernel[d])[:, None] * dilation - low
        at = at + np.arange(out[places[k]]) * stride
        last = (x[space[k]] - 1) * spread
        met = ((at >= 0) & (at <= last) & (at % spread == 0)).sum(1)
        shape = [1] * len(kernel)
        shape[d] = kernel[d]
        found = found * met.reshape(shape)
    return found
