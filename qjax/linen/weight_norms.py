"""Layers for Flax Linen whose weights are normalised before they are rounded."""

from typing import Any

import jax
from flax import linen as nn


class QWeightNorm(nn.WeightNorm):
    """A `flax.linen.WeightNorm` of a quantized layer, whose ranges move.

    The wrapped layer rounds the normalised weight. Flax's own makes each collection of
    that layer immutable, also ``quant``.
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with normalised weights, on its own arguments."""
        return nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            lambda tree: jax.tree_util.tree_map_with_path(self._l2_normalize, tree),
            init=self.is_initializing(),
        )(self.layer_instance)


class QSpectralNorm(nn.SpectralNorm):
    """A `flax.linen.SpectralNorm` of a quantized layer, whose ranges stay ranges.

    The wrapped layer rounds the normalised weight. Flax's own normalises whatever has
    two axes, also ranges by channel.
    """

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Runs the layer with normalised weights.

        Args:
          *args: Arguments of the layer.
          update_stats: Whether the vector of the iteration moves.
          **kwargs: Other arguments of the layer.
        """
        normal = lambda path, value: self._spectral_normalize(path, value, update_stats)
        return nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            lambda tree: jax.tree_util.tree_map_with_path(normal, tree),
            init=self.is_initializing(),
            mutable=True,
        )(self.layer_instance)
