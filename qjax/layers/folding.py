"""Folds a batch normalisation into the product before it: pure functions.

With ``inv = scale * rsqrt(var + epsilon)`` a product and its batch normalisation are a
product with the kernel ``kernel * inv`` and the bias ``inv * (bias - mean) + offset``.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.layers.batch_norm import BatchStatistics, moved

Folding = Literal["moving", "batch"]


class Folded(NamedTuple):
    """A product into which a batch normalisation is folded."""

    kernel: jax.Array  # Shape of that of the product.
    bias: jax.Array  # shape=(features,).
    factor: jax.Array | None  # shape=(features,). Of the product; None for 1.


class FoldedNorm(NamedTuple):
    """The numbers of a batch normalisation that is folded; None for 1 and for 0."""

    scale: jax.Array | None  # shape=(features,).
    offset: jax.Array | None  # shape=(features,).
    epsilon: float


class TrainingBatch(NamedTuple):
    """The batch of a training step."""

    statistics: BatchStatistics  # Of the product.
    moves: jax.Array  # shape=(), dtype=bool. Whether statistics still move.


def check_folding(folding: Any, freeze_delay: Any) -> None:
    """Raises ValueError for options of a folded batch normalisation that are none."""
    if folding not in ("moving", "batch"):
        raise ValueError(
            'What is folded are the "moving" or the "batch" statistics, got '
            f"folding={folding!r}."
        )
    if freeze_delay is not None and freeze_delay < 0:
        raise ValueError(
            "`freeze_delay` is the number of training steps in which the statistics "
            f"move, 0 or more, or None for all, got {freeze_delay!r}."
        )


def check_folded(path: str, layer: Any, norm: Any, products: Any, norms: Any) -> None:
    """Raises for layers that do not fold.

    Args:
      path: Path of the layer that folds them, for the message.
      layer: Product.
      norm: Batch normalisation.
      products: Classes that fold.
      norms: Class of the batch normalisation.

    Raises:
      TypeError: for other classes, quantized ones too.
      ValueError: for a batch normalisation of another axis than the last.
    """
    if type(layer) not in products or type(norm) is not norms:
        names = ", ".join(cls.__name__ for cls in products)
        raise TypeError(
            f"{path!r} folds a {norms.__name__} of Flax into one of its {names}, got "
            f"{type(norm).__name__} and {type(layer).__name__}. Give it layers in "
            "float: their quantizers are those of the layer that folds."
        )
    if norm.axis != -1:
        raise ValueError(
            f"The features of {path!r} are those of the last axis, got "
            f"axis={norm.axis}: move them there, or leave the layers unfolded."
        )


def is_moving(step: jax.Array | None, freeze_delay: int | None) -> jax.Array:
    """Returns whether statistics move in a training step.

    Args:
      step: Number of training steps before it, int32; None where none is counted.
      freeze_delay: Number of training steps in which they do; None for all.
    """
    if step is None or freeze_delay is None:
        return jnp.bool_(True)
    return step < freeze_delay


def moved_until(
    old: BatchStatistics, new: BatchStatistics, momentum: float, moves: jax.Array
) -> BatchStatistics:
    """Returns running averages that have moved where ``moves`` is true."""
    found = moved(old, new, momentum)
    return BatchStatistics(
        *(jnp.where(moves, a, b) for a, b in zip(found, old, strict=True))
    )


def unbiased(
    statistics: BatchStatistics, shape: Sequence[int], mask: jax.Array | None = None
) -> BatchStatistics:
    """Returns the variance that running averages take of TensorFlow's fused one.

    Args:
      statistics: Mean and variance of a batch.
      shape: Shape of the batch, the features along its last axis.
      mask: Which of its values count; None for all.
    """
    ratio: Any
    if mask is None:
        count = math.prod(shape[:-1])
        ratio = count / max(count - 1, 1)
    else:
        kept = jnp.broadcast_to(jnp.asarray(mask, bool), shape)
        counts = jnp.sum(kept, range(len(shape) - 1))
        ratio = counts / jnp.maximum(counts - 1, 1)
    return statistics._replace(var=statistics.var * ratio)


def folded(
    kernel: jax.Array,
    bias: jax.Array | None,
    norm: FoldedNorm,
    kept: BatchStatistics,
    batch: TrainingBatch | None = None,
    *,
    folding: Folding = "moving",
    axis: int = -1,
) -> Folded:
    """Folds a batch normalisation into a product.

        batch:   kernel * inv(batch), bias of batch
        moving:  kernel * inv(kept), bias of batch, and the product times
                 ``sqrt(kept.var + epsilon) * rsqrt(batch.var + epsilon)``

    in training, while the statistics move; later, and in inference, both are those of
    the running averages.

    Args:
      kernel: Kernel of the product.
      bias: Bias of the product, shape ``[features]``; None for 0.
      norm: Scale, offset and epsilon.
      kept: Running averages, those after this step in training.
      batch: Batch of a training step; None in inference.
      folding: Whose statistics the kernel takes.
      axis: Axis of the kernel that has the features.

    Returns:
      Kernel and bias, and the factor of the product.

    References:
      Jacob et al., "Quantization and Training", 2018, section 3.2 (arXiv:1712.05877);
      Krishnamoorthi, "Quantizing deep convolutional networks", 2018, section 3.2.2
      (arXiv:1806.08342); QKeras, qconv2d_batchnorm.py, snapshot 78ea90f.
    """
    kept = BatchStatistics(*map(lax.stop_gradient, kept))
    used = kept
    if batch is not None:
        pairs = zip(batch.statistics, kept, strict=True)
        used = BatchStatistics(*(jnp.where(batch.moves, a, b) for a, b in pairs))
    of_kernel = used if folding == "batch" else kept
    inverse = _inverse(norm, of_kernel)
    shape = [1] * kernel.ndim
    shape[axis] = inverse.size
    new = (kernel * inverse.reshape(shape)).astype(kernel.dtype)
    own = -used.mean if bias is None else bias - used.mean
    offset = _inverse(norm, used) * own
    if norm.offset is not None:
        offset = offset + norm.offset
    factor = None
    if folding == "moving" and batch is not None:
        ratio = jnp.sqrt(kept.var + norm.epsilon) * lax.rsqrt(used.var + norm.epsilon)
        factor = jnp.where(batch.moves, ratio, 1.0)
    return Folded(new, offset.astype(kernel.dtype), factor)


def _inverse(norm: FoldedNorm, statistics: BatchStatistics) -> jax.Array:
    inverse = lax.rsqrt(statistics.var + norm.epsilon)
    return inverse if norm.scale is None else norm.scale * inverse
