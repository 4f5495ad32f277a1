"""Layers for Flax Linen that are products with a kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.layers.layer_quantizers import OutputAxes
from qjax.layers.output_axes import einsum_axes
from qjax.linen.layer import QuantizedLayer


class QDense(QuantizedLayer, nn.Dense):
    """A `flax.linen.Dense` on quantized values; see `LayerQuantizers`."""


class QDenseGeneral(QuantizedLayer, nn.DenseGeneral):
    """A `flax.linen.DenseGeneral` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        features = self.features
        n = 1 if isinstance(features, int) else len(features)
        return -1 if n == 1 else tuple(range(-n, 0))


class QEinsum(QuantizedLayer, nn.Einsum):
    """A `flax.linen.Einsum` on quantized values; see `LayerQuantizers`."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, einsum_str: str | None = None, **kwargs: Any
    ) -> jax.Array:
        """Contracts input and kernel."""
        formula = nn.merge_param("einsum_str", self.einsum_str, einsum_str)
        object.__setattr__(self, "_axes", einsum_axes(formula))
        return super().__call__(inputs, einsum_str, **kwargs)

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return self._axes


class QConv(QuantizedLayer, nn.Conv):
    """A `flax.linen.Conv` on quantized values, of any number of spatial axes.

    ``feature_group_count`` as large as the input's channels makes it depthwise. See
    `LayerQuantizers`.
    """


class QConvLocal(QuantizedLayer, nn.ConvLocal):
    """A `flax.linen.ConvLocal` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None


class QConvTranspose(QuantizedLayer, nn.ConvTranspose):
    """A `flax.linen.ConvTranspose` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return -2 if self.transpose_kernel else -1


class QEmbed(QuantizedLayer, nn.Embed):
    """A `flax.linen.Embed` whose table has quantized rows; see `LayerQuantizers`.

    The table has one scale: as a kernel of `attend` its rows are output channels.
    """

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None

    def setup(self):
        """Makes the table, and the ranges of what the two methods read and return."""
        self._begin()
        super().setup()
        row = jnp.zeros((1, self.features))
        names = [
            n for n in ("input", "output") if isinstance(getattr(self._words, n), QSpec)
        ]
        made = super()._range
        object.__setattr__(self, "_ranges", {name: made(name, row) for name in names})

    @nn.nowrap
    def _range(self, name: str, x: jax.Array) -> Any:
        return self._ranges[name]

    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Maps integers to rows of the table; ``train`` moves ranges."""
        return self._rounded("output", super().__call__(inputs), train)

    def attend(self, query: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        return super().attend(self._rounded("input", query, train))
