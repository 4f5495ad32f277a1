"""Pools for Flax Linen between quantizers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.layers.pools import average_pool, global_average
from qjax.linen.layer import QuantizedLayer


class _Pool(QuantizedLayer, kw_only=True):
    """A function of one value between its quantizers."""

    quantizers: LayerQuantizers = FLOAT

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Runs the pool; ``train`` moves ranges, None: as the attribute says."""
        self._begin()
        x = self._rounded("input", inputs, train)
        return self._rounded("output", self._pooled(x), train)

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError


class QAvgPool(_Pool):
    """A `flax.linen.avg_pool` as a layer, whose factor has the word of a kernel.

    Attributes:
      window_shape: Size of a window along each axis.
      strides: Steps between windows; None for 1.
      padding: "VALID", "SAME", or pairs of numbers.
      count_include_pad: Whether padding counts.
    """

    window_shape: Sequence[int] = (2, 2)
    strides: Sequence[int] | None = None
    padding: Any = "VALID"
    count_include_pad: bool = True

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        return average_pool(
            x,
            (nn.avg_pool, nn.pool),
            self.window_shape,
            self._words.kernel,
            self._site("kernel"),
            strides=self.strides,
            padding=self.padding,
            counts_padding=self.count_include_pad,
        )


class QMaxPool(_Pool):
    """A `flax.linen.max_pool` as a layer.

    Attributes:
      window_shape: Size of a window along each axis.
      strides: Steps between windows; None for 1.
      padding: "VALID", "SAME", or pairs of numbers.
    """

    window_shape: Sequence[int] = (2, 2)
    strides: Sequence[int] | None = None
    padding: Any = "VALID"

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        return nn.max_pool(x, tuple(self.window_shape), self.strides, self.padding)


class QGlobalAvgPool(_Pool):
    """The mean of all axes between the first and the last.

    Its factor has the word of a kernel.

    Attributes:
      keepdims: Whether these axes stay, with size 1.
    """

    keepdims: bool = False

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        word, site = self._words.kernel, self._site("kernel")
        return global_average(x, word, site, self.keepdims)


class QGlobalMaxPool(_Pool):
    """The maximum of all axes between the first and the last.

    Attributes:
      keepdims: Whether these axes stay, with size 1.
    """

    keepdims: bool = False

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        return jnp.max(x, tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)
