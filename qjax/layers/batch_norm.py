"""Batch normalisation on quantized statistics: pure functions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.layers.layer_quantizers import (
    FLOAT,
    LayerQuantizers,
    LayerWord,
    Rounding,
    as_layer_word,
    quantized_weight,
    site_name,
)


class BatchStatistics(NamedTuple):
    """Mean and variance of each feature."""

    mean: jax.Array  # shape=(features,), dtype=float32.
    var: jax.Array  # shape=(features,), dtype=float32.


@dataclasses.dataclass(frozen=True)
class BatchNormQuantizers(LayerQuantizers):
    """The quantizers of a batch normalisation; by default all values are float.

    Attributes:
      input: Word of the input.
      kernel: Word of the scale, gamma.
      bias: Word of the offset, beta.
      output: Word of the output.
      mean: Word of the mean, of the batch in training, else of the running averages.
      variance: Word of the variance.
      inverse: Word of ``scale * rsqrt(variance + epsilon)``, in place of those of scale
        and variance.

    Raises:
      ValueError: for ``inverse`` beside words of scale or variance.
    """

    input: LayerWord = None
    kernel: LayerWord = None
    bias: LayerWord = None
    mean: LayerWord = dataclasses.field(default=None, kw_only=True)
    variance: LayerWord = dataclasses.field(default=None, kw_only=True)
    inverse: LayerWord = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for name in ("mean", "variance", "inverse"):
            word = as_layer_word(name, getattr(self, name))
            object.__setattr__(self, name, word)
        others = self.kernel, self.variance
        if self.inverse is not None and others != (None, None):
            raise ValueError(
                "`inverse` is the word of scale and variance together: leave `kernel` "
                f"and `variance` None, got kernel={self.kernel!r} and "
                f"variance={self.variance!r}."
            )

    def check(self, path: str) -> None:
        """Raises for a word that cannot hold the values of its site.

        Args:
          path: Path of the layer, for the message.
        """
        dataclasses.replace(FLOAT, input=self.input, output=self.output).check(path)

    @property
    def is_of_flax(self) -> bool:
        """Whether scale, offset and statistics stay as they are."""
        own = self.kernel, self.bias, self.mean, self.variance, self.inverse
        return all(word is None for word in own)


# The words of QKeras's QBatchNormalization without arguments.
QKERAS_BATCH_NORM = BatchNormQuantizers(
    kernel="quantized_relu_po2(6,2048)",
    bias="quantized_po2(5)",
    mean="quantized_po2(5)",
    variance="quantized_relu_po2(6,quadratic_approximation=True)",
)


def batch_norm_words(words: LayerQuantizers) -> BatchNormQuantizers:
    """Returns the words of a batch normalisation.

    Args:
      words: Its quantizers; of those of a product, input, output and calibrator count.
    """
    if isinstance(words, BatchNormQuantizers):
        return words
    own: Any = {"calibrator": words.calibrator, "estimator": words.estimator}
    return BatchNormQuantizers(words.input, None, None, words.output, **own)


def batch_statistics(
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_fast: bool = True,
    axis_name: str | None = None,
    groups: Any = None,
) -> BatchStatistics:
    """Computes the mean and the variance of each feature over all other axes.

        mean = E[x],  var = max(E[x^2] - mean^2, 0),  or E[(x - mean)^2]

    Args:
      x: Values, the features along the last axis.
      mask: Which of them count, of a shape that broadcasts to that of ``x``.
      is_fast: Whether the variance is that of the first formula.
      axis_name: Axis of devices over which means are taken, too.
      groups: Groups of that axis.

    Returns:
      Statistics in float32 or wider.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    where = None if mask is None else jnp.asarray(mask, bool)

    def mean_of(y: jax.Array) -> jax.Array:
        found = jnp.mean(y, axes, where=where)
        if axis_name is None:
            return found
        return lax.pmean(found, axis_name, axis_index_groups=groups)

    mean = mean_of(x)
    if is_fast:
        return BatchStatistics(mean, jnp.maximum(mean_of(x * x) - mean * mean, 0.0))
    return BatchStatistics(mean, mean_of(jnp.square(x - by_feature(mean, x.ndim))))


def moved(
    old: BatchStatistics, new: BatchStatistics, momentum: float
) -> BatchStatistics:
    """Returns running averages: ``momentum * old + (1 - momentum) * new``."""
    move = lambda a, b: momentum * a + (1 - momentum) * lax.stop_gradient(b)
    return BatchStatistics(move(old.mean, new.mean), move(old.var, new.var))


def batch_norm(
    x: jax.Array,
    statistics: BatchStatistics,
    scale: jax.Array | None,
    bias: jax.Array | None,
    words: BatchNormQuantizers,
    *,
    epsilon: float,
    dtype: Any = None,
    path: str = "",
) -> jax.Array:
    """Normalises by quantized statistics, scale and offset.

        inv = Q(Q(scale) * rsqrt(Q(var) + epsilon))
        y = x * inv + (Q(bias) - Q(mean) * inv)

    Args:
      x: Values, the features along the last axis.
      statistics: Mean and variance of the features.
      scale: Factors of the features; None for 1.
      bias: Offsets; None for 0.
      words: The quantizers.
      epsilon: Number that is added to variances.
      dtype: Type of the result; None: that of values, scale and offset.
      path: Path of the layer, for the names of its sites.

    Returns:
      Values of the shape of ``x``.

    References:
      QKeras, qnormalization.py, snapshot 78ea90f.
    """
    how = Rounding(estimator=words.estimator)

    def rounded(name: str, value: jax.Array, word: Any) -> jax.Array:
        return quantized_weight(value, word, None, how, site_name(path, name))[0]

    known = [v for v in (x, scale, bias) if v is not None]
    dtype = jnp.result_type(*known, 1.0) if dtype is None else dtype
    mean = rounded("mean", statistics.mean, words.mean)
    inverse = lax.rsqrt(rounded("var", statistics.var, words.variance) + epsilon)
    if scale is not None:
        inverse = rounded("scale", scale.astype(inverse.dtype), words.kernel) * inverse
    inverse = rounded("inverse", inverse, words.inverse)
    offset = -mean * inverse
    if bias is not None:
        offset = rounded("bias", bias.astype(mean.dtype), words.bias) + offset
    found = x * by_feature(inverse, x.ndim) + by_feature(offset, x.ndim)
    return found.astype(dtype)


def check_last_axis(axis: Any, rank: int, site: str) -> None:
    """Raises ValueError for features along another axis than the last.

    Args:
      axis: Axis of a batch normalisation with words.
      rank: Number of axes of its input.
      site: Name of the site, for the message.
    """
    if axis not in (-1, rank - 1):
        raise ValueError(
            f"{site!r}: words of a batch normalisation are of features along the last "
            f"axis, got axis={axis}. Move that axis to the end, or leave `kernel`, "
            "`bias`, `mean`, `variance` and `inverse` None."
        )


def by_feature(x: jax.Array, rank: int) -> jax.Array:
    """Gives numbers of features the rank of values with these along their last axis."""
    return x.reshape((1,) * (rank - 1) + x.shape)
