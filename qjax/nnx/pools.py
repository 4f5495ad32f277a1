"""Pools for Flax NNX between quantizers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers, site_name
from qjax.layers.pools import average_pool, global_average
from qjax.nnx.layer import QuantizedModule


class _Pool(QuantizedModule):
    """A function of one value between its quantizers."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Runs the pool."""
        x, _ = self._rounded("input", inputs)
        return self._rounded("output", self._pooled(x))[0]

    def _pooled(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _begin(self, quantizers: LayerQuantizers, rank: int, site: str) -> None:
        self._set(quantizers, site, (rank, rank), nnx.Rngs())


class _WindowPool(_Pool):
    """A pool of windows."""

    def __init__(
        self,
        window_shape: Sequence[int],
        strides: Sequence[int] | None = None,
        padding: Any = "VALID",
        count_include_pad: bool = True,
        *,
        quantizers: LayerQuantizers = FLOAT,
        site: str = "",
    ):
        """Makes the pool.

        Args:
          window_shape: Size of a window along each axis.
          strides: Steps between windows; None for 1.
          padding: "VALID", "SAME", or pairs of numbers.
          count_include_pad: Whether padding counts in an average.
          quantizers: The quantizers.
          site: Prefix of the names of its sites.
        """
        self.window_shape = tuple(window_shape)
        self.strides = None if strides is None else tuple(strides)
        self.padding = padding
        self.count_include_pad = count_include_pad
        self._begin(quantizers, len(self.window_shape) + 2, site)


class QAvgPool(_WindowPool):
    """A `flax.nnx.avg_pool` as a layer, whose factor has the word of a kernel."""

    def _pooled(self, x: jax.Array) -> jax.Array:
        return average_pool(
            x,
            (nnx.avg_pool, nnx.pool),
            self.window_shape,
            self.quantizers.kernel,
            site_name(self.site, "kernel"),
            strides=self.strides,
            padding=self.padding,
            counts_padding=self.count_include_pad,
        )


class QMaxPool(_WindowPool):
    """A `flax.nnx.max_pool` as a layer."""

    def _pooled(self, x: jax.Array) -> jax.Array:
        found: jax.Array = nnx.max_pool(
            x, self.window_shape, self.strides, self.padding
        )
        return found


class _GlobalPool(_Pool):
    """A pool of all axes between the first and the last."""

    def __init__(
        self,
        keepdims: bool = False,
        *,
        quantizers: LayerQuantizers = FLOAT,
        rank: int = 4,
        site: str = "",
    ):
        """Makes the pool.

        Args:
          keepdims: Whether these axes stay, with size 1.
          quantizers: The quantizers.
          rank: Number of axes of the input, for a range by axis.
          site: Prefix of the names of its sites.
        """
        self.keepdims = keepdims
        self._begin(quantizers, rank, site)


class QGlobalAvgPool(_GlobalPool):
    """The mean of all axes between the first and the last.

    Its factor has the word of a kernel.
    """

    def _pooled(self, x: jax.Array) -> jax.Array:
        word, site = self.quantizers.kernel, site_name(self.site, "kernel")
        return global_average(x, word, site, self.keepdims)


class QGlobalMaxPool(_GlobalPool):
    """The maximum of all axes between the first and the last."""

    def _pooled(self, x: jax.Array) -> jax.Array:
        return jnp.max(x, tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)
