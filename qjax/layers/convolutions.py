"""Convolutions that Flax has not: pure functions."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def window_axes(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the size of a window along each axis; a number is one of one axis."""
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def depthwise_transpose(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] | int | None,
    *,
    padding: str,
    precision: Any = None,
) -> jax.Array:
    """Computes the transposed convolution of each channel alone.

    Values stand ``strides`` apart, zeros between them. "SAME" gives ``strides`` times
    as many places, "VALID" all that a window reaches, as `jax.lax.conv_transpose`.

    Args:
      x: Values, ``[batch, ..., channels]`` or without the batch.
      kernel: Shape ``[..., 1, channels * multiplier]``.
      strides: Steps along each axis; None for 1.
      padding: "SAME" or "VALID".
      precision: Precision of the products.

    Raises:
      ValueError: for another padding.
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(f'`padding` is "SAME" or "VALID", got {padding!r}.')
    window = kernel.shape[:-2]
    rank = len(window)
    if strides is None or isinstance(strides, int):
        strides = (1 if strides is None else strides,) * rank
    ends = [_ends(k, s, padding) for k, s in zip(window, strides, strict=True)]
    letters = "XYZ"[:rank]
    is_single = x.ndim == rank + 1
    found = lax.conv_general_dilated(
        x[None] if is_single else x,
        kernel,
        (1,) * rank,
        ends,
        lhs_dilation=tuple(strides),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )
    return found[0] if is_single else found


def _ends(k: int, s: int, padding: str) -> tuple[int, int]:
    """Returns the padding of one axis for windows of ``k`` and steps of ``s``."""
    if padding == "VALID":
        return k - 1, k - 1 + max(s - k, 0)
    before = k - 1 if s > k - 1 else -(-(k + s - 2) // 2)
    return before, k + s - 2 - before
