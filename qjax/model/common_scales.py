"""Values with a scale per channel: one grid for all channels, and a ratio of each.

    real = code * scale[c] = (code * common) * ratio[c],    common = max(scale)

A product with a weight takes ``ratio`` into the weight before that is rounded, and
reads ``code * common``, which has one scale. Shape moves and maxima carry both parts.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.model.primitives import names
from qjax.model.trace import Equation
from qjax.rounding import power_of_two

# Exponents between the coarsest and the finest scale of a value.
_MOST_EXPONENTS = 14

_SAME = names("keep", "cast") | {"custom_jvp_call", "max"}  # A relu is one of these.


class Channels(NamedTuple):
    """A value as ``value * ratio[channel]``."""

    value: jax.Array  # Codes times ``common``.
    common: jax.Array  # float32, [].
    ratio: jax.Array  # float32, [channels].
    channel: (
        np.ndarray
    )  # Rank of the value, size 1 where nothing changes: which channel.
    qmin: Any  # Least code.
    qmax: Any


class CodeEnds(NamedTuple):
    """The codes of values on a symmetric grid with one power of two as a scale."""

    qmin: Any
    qmax: Any


def channels_of(x: jax.Array, scale: jax.Array, word: CodeEnds) -> Channels:
    """Splits a value on a grid with a scale per channel.

    Args:
      x: On the grid.
      scale: The rank of ``x``, size 1 everywhere but at the channels.
      word: Ends of its codes.

    Returns:
      The parts of the value.
    """
    common = jnp.max(scale)
    ratio = scale * (1.0 / common)
    whole = x * (1.0 / ratio).astype(x.dtype)
    index = np.arange(scale.size).reshape(scale.shape)
    return Channels(whole, common, ratio.reshape(-1), index, *word)


def held_scale(scale: jax.Array, bits: ArrayLike) -> jax.Array:
    """Raises scales that are too fine beside the coarsest scale.

    Codes of ``bits`` as steps of the finest scale fit int32 then.
    """
    exponents = jnp.clip(30 - jnp.asarray(bits), 0, _MOST_EXPONENTS)
    return jnp.maximum(scale, jnp.max(scale) * power_of_two(-exponents))


def aligned_ends(scale: jax.Array, word: CodeEnds) -> tuple[jax.Array, CodeEnds]:
    """Returns the finest of power-of-two scales, and the ends of codes in its steps."""
    finest = jnp.min(scale)
    times = jnp.max(scale) * (1.0 / finest)
    ends = (jnp.asarray(q).astype(jnp.float32) * times for q in word)
    return finest, CodeEnds(*(q.astype(jnp.int32) for q in ends))


def join_ends(
    scales: Sequence[jax.Array], words: Sequence[CodeEnds]
) -> tuple[jax.Array, CodeEnds]:
    """Returns the finest scale of several values, and the joint ends of their codes."""
    finest = functools.reduce(jnp.minimum, scales)
    ends = [
        [jnp.asarray(q).astype(jnp.float32) * (s * (1.0 / finest)) for q in word]
        for s, word in zip(scales, words, strict=True)
    ]
    low = functools.reduce(jnp.minimum, (q[0] for q in ends))
    high = functools.reduce(jnp.maximum, (q[1] for q in ends))
    return finest, CodeEnds(low.astype(jnp.int32), high.astype(jnp.int32))


def move_index(
    e: Equation, index: np.ndarray, shape: Sequence[int]
) -> list[np.ndarray] | None:
    """Follows channels through an equation that only moves values.

    Args:
      e: Equation with one operand of data, the first.
      index: Index of its operand, as in `Channels`.
      shape: Shape of its operand.

    Returns:
      The index of each output; None where an output mixes channels or is none of them.
    """
    name, p = e.primitive.name, e.params
    own = [d for d, n in enumerate(index.shape) if n > 1]
    if name in _SAME:
        return [index]
    if name == "transpose":
        return [index.transpose(p["permutation"])]
    if name == "squeeze":
        return [index.squeeze(tuple(p["dimensions"]))]
    if name == "rev":
        return [np.flip(index, tuple(d for d in p["dimensions"] if d in own))]
    if name == "broadcast_in_dim":
        sizes = [1] * len(p["shape"])
        for d, out in enumerate(p["broadcast_dimensions"]):
            sizes[out] = index.shape[d]
        return [index.reshape(sizes)]
    if name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        ends = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
        whole = [slice(*k) if d in own else slice(None) for d, k in enumerate(ends)]
        return [index[tuple(whole)]]
    if name == "reshape":
        return None if p["dimensions"] is not None else _reshaped(index, shape, p)
    if name in ("reduce_max", "reduce_min"):
        mixes = set(own).intersection(p["axes"])
        return None if mixes else [index.squeeze(tuple(p["axes"]))]
    if name in ("reduce_window_max", "reduce_window_min"):
        alike = ("window_dimensions", "window_strides", "base_dilation")
        moves = any(p[key][d] != 1 for key in alike for d in own)
        return None if moves or any(any(p["padding"][d]) for d in own) else [index]
    if name == "pad":
        return None if any(any(p["padding_config"][d]) for d in own) else [index]
    if name == "split":
        if p["axis"] not in own:
            return [index] * len(e.outputs)
        return np.split(index, np.cumsum(p["sizes"])[:-1], p["axis"])
    return None


def _reshaped(
    index: np.ndarray, shape: Sequence[int], p: dict[str, Any]
) -> list[np.ndarray] | None:
    """Reshapes an index of channels where the axes before the channels stay."""
    sizes = tuple(p["new_sizes"])
    first = next((d for d, n in enumerate(index.shape) if n > 1), len(shape))
    k = 0
    while k < min(first, len(sizes)) and shape[k] == sizes[k]:
        k += 1
    whole = np.broadcast_to(index.reshape(index.shape[k:]), shape[k:])
    if 0 in whole.shape:
        return None
    found = whole.reshape(sizes[k:])
    for axis in range(found.ndim):
        once = found.take([0], axis)
        found = once if np.all(found == once) else found
    return [found.reshape((1,) * k + found.shape)]


def kernel_index(
    e: Equation, operand: int, index: np.ndarray, kernel: Sequence[int]
) -> np.ndarray | None:
    """Returns the input channel that multiplies each entry of a kernel.

    Args:
      e: A ``dot_general`` or a ``conv_general_dilated``.
      operand: Number of the operand that is the kernel.
      index: Index of the other operand, as in `Channels`.
      kernel: Shape of the kernel.

    Returns:
      An index that broadcasts against the kernel; None if channels are not summed over.
    """
    own = [d for d, n in enumerate(index.shape) if n > 1]
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name == "dot_general":
        contract, batch = dimensions
        theirs = (*contract[1 - operand], *batch[1 - operand])
        ours = (*contract[operand], *batch[operand])
        if not set(own) <= set(theirs):
            return None
        free = [d for d in range(index.ndim) if d not in theirs]
        found = index.transpose(*theirs, *free).reshape(
            [index.shape[d] for d in theirs]
        )
        found = found.transpose(np.argsort(ours))
        return found.reshape(
            [_at(d, found.shape, sorted(ours)) for d in range(len(kernel))]
        )
    channel = dimensions.lhs_spec[1]
    if operand != 1 or e.params["batch_group_count"] != 1 or not set(own) <= {channel}:
        return None
    out, taken = dimensions.rhs_spec[:2]
    groups, each = e.params["feature_group_count"], kernel[taken]
    flat = np.broadcast_to(index.reshape(-1), (groups * each,)).reshape(groups, each)
    table = np.repeat(flat, kernel[out] // groups, 0) if groups > 1 else flat
    sizes = [1] * len(kernel)
    sizes[out], sizes[taken] = table.shape
    return (table if out < taken else table.T).reshape(sizes)


def _at(d: int, sizes: Sequence[int], axes: Sequence[int]) -> int:
    return sizes[axes.index(d)] if d in axes else 1
