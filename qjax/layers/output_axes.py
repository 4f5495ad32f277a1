"""Axes of a weight that are output channels of its layer."""

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
