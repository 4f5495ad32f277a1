"""Layers for Flax NNX that are products with a kernel."""

from typing import Any

import jax
from flax import nnx

from qjax.layers.layer_quantizers import OutputAxes
from qjax.layers.output_axes import einsum_axes
from qjax.nnx.layer import QuantizedModule


class QLinear(QuantizedModule, nnx.Linear):
    """A `flax.nnx.Linear` on quantized values; see `LayerQuantizers`."""

    base = nnx.Linear


class QLinearGeneral(QuantizedModule, nnx.LinearGeneral):
    """A `flax.nnx.LinearGeneral` on quantized values; see `LayerQuantizers`."""

    base = nnx.LinearGeneral

    def _ranks(self) -> tuple[int, int]:
        return 1 + len(self.in_features), 1 + len(self.out_features)

    def _output_axes(self) -> OutputAxes:
        n = len(self.out_features)
        return -1 if n == 1 else tuple(range(-n, 0))


class QEinsum(QuantizedModule, nnx.Einsum):
    """A `flax.nnx.Einsum` on quantized values; see `LayerQuantizers`."""

    base = nnx.Einsum

    def _ranks(self) -> tuple[int, int]:
        operands, _, result = self.einsum_str.replace(" ", "").partition("->")
        return len(operands.partition(",")[0]), len(result)

    def _output_axes(self) -> OutputAxes:
        return einsum_axes(self.einsum_str)


class QConv(QuantizedModule, nnx.Conv):
    """A `flax.nnx.Conv` on quantized values, of any number of spatial axes.

    ``feature_group_count`` as large as the input's channels makes it depthwise. See
    `LayerQuantizers`.
    """

    base = nnx.Conv

    def _ranks(self) -> tuple[int, int]:
        return self.kernel[...].ndim, self.kernel[...].ndim


class QConvTranspose(QuantizedModule, nnx.ConvTranspose):
    """A `flax.nnx.ConvTranspose` on quantized values; see `LayerQuantizers`."""

    base = nnx.ConvTranspose

    def _ranks(self) -> tuple[int, int]:
        return self.kernel[...].ndim, self.kernel[...].ndim

    def _output_axes(self) -> OutputAxes:
        return -2 if self.transpose_kernel else -1


class QEmbed(QuantizedModule, nnx.Embed):
    """A `flax.nnx.Embed` whose table has quantized rows; see `LayerQuantizers`.

    The table has one scale: as a kernel of `attend` its rows are output channels.
    """

    base = nnx.Embed

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        query, grid = self._rounded("input", query)
        return nnx.Embed.attend(self._twin(grid), query, *args, **kwargs)

    def _output_axes(self) -> OutputAxes:
        return None
