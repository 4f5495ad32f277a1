"""Axes of a weight that are output channels of its layer."""

import jax.numpy as jnp

from qjax.affine import QParams
from qjax.layers.layer_quantizers import OutputAxes


def einsum_axes(formula: str) -> OutputAxes:
    """Returns the axes of the second operand of an einsum that only its result has.

    Args:
      formula: Such as ``"btd,dhk->bthk"``, in which the kernel comes second.

    Returns:
      Axes from the end, -1 the last; None where there are none, or an ellipsis.
    """
    operands, _, result = formula.replace(" ", "").partition("->")
    x, _, kernel = operands.partition(",")
    if "." in kernel:
        return None
    own = [k - len(kernel) for k, c in enumerate(kernel) if c in result and c not in x]
    return own[0] if len(own) == 1 else tuple(own) or None


def einsum_bias_grid(grid: QParams | None, formula: str) -> QParams | None:
    """Returns the grid of a kernel of an einsum with its axes as a bias has them.

    The axes of a bias are those of the kernel that the result has, in its order.

    Args:
      grid: Grid of the kernel, whose scales are those of output channels, or None.
      formula: Such as ``"btd,hkd->btkh"``.
    """
    operands, _, result = formula.replace(" ", "").partition("->")
    kernel = operands.partition(",")[2]
    if grid is None or not grid.scale.ndim or "." in kernel:
        return grid
    shown = [kernel.index(c) for c in result if c in kernel]
    summed = [k for k in range(len(kernel)) if k not in shown]
    scale = jnp.transpose(grid.scale, [*summed, *shown])
    return grid._replace(scale=scale.reshape(scale.shape[len(summed) :]))
