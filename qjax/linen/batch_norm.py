"""Batch normalisation for Flax Linen, alone and folded into the product before it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

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
)
from qjax.linen.layer import QuantizedLayer


class QBatchNorm(QuantizedLayer, nn.BatchNorm, kw_only=True):
    """A `flax.linen.BatchNorm` on quantized values; see `BatchNormQuantizers`.

    Ranges move in training alone, where ``use_running_average`` is false. With words of
    scale, offset or statistics the features are those of the last axis.
    """

    quantizers: LayerQuantizers = BatchNormQuantizers()

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        train: bool | None = None,
    ) -> jax.Array:
        """Normalises the features of the last axis.

        Args:
          x: Values.
          use_running_average: Whether the statistics are the running averages.
          mask: Which values count in the statistics of the batch.
          train: Whether ranges move; None: in training, as the attribute says.
        """
        is_frozen = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        words = batch_norm_words(self.quantizers)
        self._begin(words)
        train = False if is_frozen and train is None else train
        x = self._rounded("input", x, train)
        if words.is_of_flax or self.is_initializing():
            base = super(QuantizedLayer, self).__call__
            found = base(x, use_running_average, mask=mask)
        else:
            found = self._normalised(x, words, is_frozen, mask)
        return self._rounded("output", found, train)

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *args: Any, **kw: Any) -> Any:
        """Returns a parameter as it is: `batch_norm` rounds it."""
        return super(QuantizedLayer, self).param(name, init_fn, *args, **kw)

    @nn.nowrap
    def _normalised(
        self, x: jax.Array, words: BatchNormQuantizers, is_frozen: bool, mask: Any
    ) -> jax.Array:
        check_last_axis(self.axis, x.ndim, self._site("scale"))
        kept = kept_statistics(self, x.shape[-1])
        if is_frozen:
            used = kept
        else:
            used = statistics_of(self, x, mask)
            keep_statistics(self, moved(kept, used, self.momentum))
        scale: Any = self.get_variable("params", "scale")
        bias: Any = self.get_variable("params", "bias")
        own: dict[str, Any] = {"epsilon": self.epsilon, "dtype": self.dtype}
        return batch_norm(x, used, scale, bias, words, path="/".join(self.path), **own)


def kept_statistics(norm: nn.BatchNorm, features: int) -> BatchStatistics:
    """Returns the running averages of a batch normalisation.

    Args:
      norm: Batch normalisation.
      features: Number of its features.

    Raises:
      ScopeCollectionNotFound: where there are none, and none may be made.
    """
    if norm.has_variable("batch_stats", "mean"):
        own: Any = (norm.get_variable("batch_stats", k) for k in ("mean", "var"))
        return BatchStatistics(*own)
    if not norm.is_mutable_collection("batch_stats"):
        raise errors.ScopeCollectionNotFound(
            "batch_stats", "mean", "/" + "/".join(norm.path)
        )
    return BatchStatistics(jnp.zeros(features), jnp.ones(features))


def keep_statistics(norm: nn.BatchNorm, statistics: BatchStatistics) -> None:
    """Sets the running averages of a batch normalisation."""
    norm.put_variable("batch_stats", "mean", statistics.mean)
    norm.put_variable("batch_stats", "var", statistics.var)


def statistics_of(norm: nn.BatchNorm, x: jax.Array, mask: Any) -> BatchStatistics:
    """Computes the statistics of a batch as a batch normalisation does."""
    return batch_statistics(
        x,
        mask,
        is_fast=norm.use_fast_variance,
        axis_name=norm.axis_name,
        groups=norm.axis_index_groups,
    )


class QFoldedBatchNorm(QuantizedLayer):
    """A product whose kernel has the batch normalisation behind it folded in.

    The kernel that is rounded is the one that ships: ``kernel * inv``, and the bias
    ``inv * (bias - mean) + offset`` (`qjax.layers.folding.folded`). Parameters and
    statistics are those of the two layers.

    Attributes:
      layer: The product, in float: `flax.linen.Dense`, `Conv` (depthwise too), or
        `ConvTranspose`.
      norm: The batch normalisation of its last axis.
      folding: Whose statistics the kernel takes in training: "moving" or "batch".
      freeze_delay: Number of training steps in which the statistics move; None for all.
      unbiased: Whether running averages take the variance of the batch times
        ``n / (n - 1)``, as TensorFlow's fused batch normalisation does.
    """

    layer: nn.Module
    norm: nn.BatchNorm
    folding: Folding = "moving"
    freeze_delay: int | None = None
    unbiased: bool = False

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        inputs: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        train: bool | None = None,
    ) -> jax.Array:
        """Runs the folded product.

        Args:
          inputs: Input of the product.
          use_running_average: Whether the statistics are the running averages, as in
            the batch normalisation.
          mask: Which values of the product count in its statistics.
          train: Whether ranges move; None: in training, as the attribute says.
        """
        is_frozen = nn.merge_param(
            "use_running_average", self.norm.use_running_average, use_running_average
        )
        self._check()
        self._begin()
        train = False if is_frozen and train is None else train
        x = self._rounded("input", inputs, train)
        steps = None
        if self.freeze_delay is not None:
            steps = self.variable("quant", "step", lambda: jnp.int32(0))
        if self.is_initializing():
            made = self.norm(self.layer(x), use_running_average, mask=mask)
            return self._rounded("output", made, train)
        kept, batch = self._kept(), None
        if not is_frozen:
            product = self.layer(x)
            step = None if steps is None else steps.value
            moves = is_moving(step, self.freeze_delay)
            batch = TrainingBatch(statistics_of(self.norm, product, mask), moves)
            seen = batch.statistics
            if self.unbiased:
                seen = unbiased(seen, product.shape, mask)
            kept = moved_until(kept, seen, self.norm.momentum, moves)
            keep_statistics(self.norm, kept)
            if steps is not None:
                steps.value = steps.value + 1
        axis = self._feature_axis()
        one = self._folded(kept, batch)
        word, site = self._words.kernel, self._site("kernel")
        kernel, grid = quantized_weight(
            one.kernel, word, axis, self._rounding(word), site
        )
        float_layer = self.layer.clone(parent=None, name=None, use_bias=False)
        found: Any = float_layer.apply({"params": {"kernel": kernel}}, x)
        if one.factor is not None:
            found = found * by_feature(one.factor, found.ndim).astype(found.dtype)
        grids = self._grids.get("input"), grid
        bias = quantized_bias(one.bias, self._words.bias, grids, self._site("bias"))
        return self._rounded(
            "output", found + by_feature(bias, found.ndim).astype(found.dtype), train
        )

    def folded(self) -> Folded:
        """Returns kernel and bias of inference, in float."""
        return self._folded(self._kept())

    @nn.nowrap
    def _kept(self) -> BatchStatistics:
        kernel = self.layer.variables["params"]["kernel"]
        return kept_statistics(self.norm, kernel.shape[self._feature_axis()])

    @nn.nowrap
    def _folded(
        self, kept: BatchStatistics, batch: TrainingBatch | None = None
    ) -> Folded:
        params = self.layer.variables["params"]
        own: Any = [self.norm.get_variable("params", k) for k in ("scale", "bias")]
        return folded(
            params["kernel"],
            params.get("bias"),
            FoldedNorm(own[0], own[1], self.norm.epsilon),
            kept,
            batch,
            folding=self.folding,
            axis=self._feature_axis(),
        )

    @nn.nowrap
    def _feature_axis(self) -> int:
        is_turned = getattr(self.layer, "transpose_kernel", False)
        return -2 if is_turned else -1

    @nn.nowrap
    def _check(self) -> None:
        check_folding(self.folding, self.freeze_delay)
        path = "/".join(self.path) or type(self).__name__
        products = nn.Dense, nn.Conv, nn.ConvTranspose
        check_folded(path, self.layer, self.norm, products, nn.BatchNorm)
