"""Batch normalisation for Flax NNX, alone and folded into the product before it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.layers.batch_norm import (
    BatchNormQuantizers,
    BatchStatistics,
    batch_norm,
    batch_norm_words,
    batch_statistics,
    by_feature,
    check_last_axis,
    moved,
)
from qjax.layers.folding import (
    Folded,
    FoldedNorm,
    Folding,
    TrainingBatch,
    check_folded,
    check_folding,
    folded,
    is_moving,
    moved_until,
    unbiased,
)
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.nnx.layer import QuantizedModule, QuantState

_WORDS = LayerQuantizers()
_FLOAT = BatchNormQuantizers()


class QBatchNorm(QuantizedModule, nnx.BatchNorm):  # type: ignore[misc]
    """A `flax.nnx.BatchNorm` on quantized values; see `BatchNormQuantizers`.

    Ranges move in training alone, where ``use_running_average`` is false. With words of
    scale, offset or statistics the features are those of the last axis.
    """

    base = nnx.BatchNorm

    def __init__(self, *args: Any, quantizers: LayerQuantizers = _FLOAT, **kwargs: Any):
        """Makes the layer.

        Args:
          *args: Arguments of `flax.nnx.BatchNorm`.
          quantizers: The quantizers.
          **kwargs: Other arguments of that layer and of `QuantizedModule`.
        """
        super().__init__(*args, quantizers=batch_norm_words(quantizers), **kwargs)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises the features of the last axis.

        Args:
          x: Values.
          use_running_average: Whether the statistics are the running averages; None:
            what the attribute says.
          mask: Which values count in the statistics of the batch.
        """
        words: Any = self.quantizers
        is_frozen = is_frozen_now(self, use_running_average)
        x, _ = self._rounded("input", x, is_frozen)
        if words.is_of_flax:
            found = nnx.BatchNorm.__call__(self, x, is_frozen, mask=mask)
        else:
            found = self._normalised(x, words, is_frozen, mask)
        return self._rounded("output", found, is_frozen)[0]

    def _normalised(
        self, x: jax.Array, words: BatchNormQuantizers, is_frozen: bool, mask: Any
    ) -> jax.Array:
        check_last_axis(self.axis, x.ndim, site_name(self.site, "scale"))
        used = BatchStatistics(self.mean[...], self.var[...])
        if not is_frozen:
            kept, used = used, statistics_of(self, x, mask)
            keep_statistics(self, moved(kept, used, self.momentum))
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        own: dict[str, Any] = {"epsilon": self.epsilon, "dtype": self.dtype}
        return batch_norm(x, used, scale, bias, words, path=self.site, **own)


def is_frozen_now(layer: Any, use_running_average: bool | None) -> bool:
    """Returns whether running averages are used: the argument, else the attribute."""
    found = use_running_average
    return bool(layer.use_running_average if found is None else found)


def keep_statistics(norm: nnx.BatchNorm, statistics: BatchStatistics) -> None:
    """Sets the running averages of a batch normalisation."""
    norm.mean.set_value(statistics.mean)
    norm.var.set_value(statistics.var)


def statistics_of(norm: nnx.BatchNorm, x: jax.Array, mask: Any) -> BatchStatistics:
    """Computes the statistics of a batch as a batch normalisation does."""
    return batch_statistics(
        x,
        mask,
        is_fast=norm.use_fast_variance,
        axis_name=norm.axis_name,
        groups=norm.axis_index_groups,
    )


class QFoldedBatchNorm(QuantizedModule):
    """A product whose kernel has the batch normalisation behind it folded in.

    The kernel that is rounded is the one that ships: ``kernel * inv``, and the bias
    ``inv * (bias - mean) + offset`` (`qjax.layers.folding.folded`). Parameters and
    statistics stay those of the two layers.

    Attributes:
      layer: The product, in float.
      norm: The batch normalisation.
      step: Number of training steps so far, with a `freeze_delay`.
    """

    def __init__(
        self,
        layer: nnx.Module,
        norm: nnx.BatchNorm,
        *,
        quantizers: LayerQuantizers = _WORDS,
        folding: Folding = "moving",
        freeze_delay: int | None = None,
        unbiased: bool = False,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          layer: The product, in float: `flax.nnx.Linear`, `Conv` (depthwise too), or
            `ConvTranspose`.
          norm: The batch normalisation of its last axis.
          quantizers: The quantizers of the folded product.
          folding: Whose statistics the kernel takes in training: "moving" or "batch".
          freeze_delay: Number of training steps in which the statistics move; None for
            all.
          unbiased: Whether running averages take the variance of the batch times
            ``n / (n - 1)``, as TensorFlow's fused batch normalisation does.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
        """
        check_folding(folding, freeze_delay)
        path = site or type(self).__name__
        products = nnx.Linear, nnx.Conv, nnx.ConvTranspose
        check_folded(path, layer, norm, products, nnx.BatchNorm)
        self.layer, self.norm = layer, norm
        self.folding, self.freeze_delay = folding, freeze_delay
        self.unbiased = unbiased
        has_steps = freeze_delay is not None
        self.step = QuantState(jnp.int32(0)) if has_steps else nnx.data(None)
        rank = layer.kernel[...].ndim  # type: ignore[attr-defined]
        rngs = nnx.Rngs() if rngs is None else rngs
        self._set(quantizers, site, (rank, rank), rngs)

    def __call__(
        self,
        inputs: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the folded product.

        Args:
          inputs: Input of the product.
          use_running_average: Whether the statistics are the running averages; None:
            what the attribute says.
          mask: Which values of the product count in its statistics.
        """
        is_frozen = is_frozen_now(self, use_running_average)
        x, grid = self._rounded("input", inputs, is_frozen)
        layer: Any = self.layer
        kept = BatchStatistics(self.norm.mean[...], self.norm.var[...])
        batch = None
        if not is_frozen:
            product = layer(x)
            step = None if self.step is None else self.step.get_value()
            moves = is_moving(step, self.freeze_delay)
            batch = TrainingBatch(statistics_of(self.norm, product, mask), moves)
            seen = batch.statistics
            if self.unbiased:
                seen = unbiased(seen, product.shape, mask)
            kept = moved_until(kept, seen, self.norm.momentum, moves)
            keep_statistics(self.norm, kept)
            if self.step is not None and step is not None:
                self.step.set_value(step + 1)
        axis = self._feature_axis()
        one = self._folded(kept, batch)
        words = self.quantizers
        how, path = self._rounding(words.kernel), site_name(self.site, "kernel")
        kernel, weights = quantized_weight(one.kernel, words.kernel, axis, how, path)
        twin: Any = object.__new__(type(layer))
        vars(twin).update(vars(layer))
        vars(twin).update(kernel=nnx.Param(kernel), bias=None, use_bias=False)
        found = twin(x)
        if one.factor is not None:
            found = found * by_feature(one.factor, found.ndim).astype(found.dtype)
        site = site_name(self.site, "bias")
        bias = quantized_bias(one.bias, words.bias, (grid, weights), site)
        return self._rounded(
            "output",
            found + by_feature(bias, found.ndim).astype(found.dtype),
            is_frozen,
        )[0]

    def folded(self) -> Folded:
        """Returns kernel and bias of inference, in float."""
        return self._folded(BatchStatistics(self.norm.mean[...], self.norm.var[...]))

    def _folded(
        self, kept: BatchStatistics, batch: TrainingBatch | None = None
    ) -> Folded:
        layer: Any = self.layer
        value = lambda v: None if v is None else v[...]
        own = value(self.norm.scale), value(self.norm.bias), self.norm.epsilon
        return folded(
            layer.kernel[...],
            value(layer.bias),
            FoldedNorm(*own),
            kept,
            batch,
            folding=self.folding,
            axis=self._feature_axis(),
        )

    def _feature_axis(self) -> int:
        return -2 if getattr(self.layer, "transpose_kernel", False) else -1
