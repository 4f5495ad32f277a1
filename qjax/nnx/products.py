"""Layers for Flax NNX that are products with a kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams
from qjax.layers.convolutions import depthwise_transpose, window_axes
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    OutputAxes,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.layers.output_axes import einsum_axes, einsum_bias_grid
from qjax.nnx.layer import QuantizedModule

_WORDS = LayerQuantizers()
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


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

    def _bias_grid(self, grid: QParams | None) -> QParams | None:
        return einsum_bias_grid(grid, self.einsum_str)


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
    weight = "embedding"

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        query, grid = self._rounded("input", query)
        return nnx.Embed.attend(self._twin(grid), query, *args, **kwargs)

    def _output_axes(self) -> OutputAxes:
        return None


class QDepthwiseConvTranspose(QuantizedModule):
    """A transposed convolution of each channel alone; see `LayerQuantizers`.

    Flax has none. The kernel has the shape ``[*kernel_size, 1, inputs * multiplier]``,
    and is placed as that of `flax.nnx.ConvTranspose`.
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: str = "SAME",
        channel_multiplier: int = 1,
        use_bias: bool = True,
        kernel_init: Any = _KERNEL_INIT,
        bias_init: Any = _BIAS_INIT,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        quantizers: LayerQuantizers = _WORDS,
        site: str = "",
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          in_features: Number of channels.
          kernel_size: Size of the window along each axis.
          strides: Steps between windows of the output; None for 1.
          padding: "SAME" or "VALID".
          channel_multiplier: Number of outputs of each channel.
          use_bias: Whether there is a bias.
          kernel_init: Initializer of the kernel.
          bias_init: Initializer of the bias.
          dtype: Type of the computation; None: that of input and parameters.
          param_dtype: Type of the parameters.
          precision: Precision of the products.
          quantizers: The quantizers.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
        """
        features = in_features * channel_multiplier
        shape = (*window_axes(kernel_size), 1, features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        bias: Any = nnx.data(None)
        if use_bias:
            bias = nnx.Param(bias_init(rngs.params(), (features,), param_dtype))
        self.bias = bias
        if isinstance(strides, int):
            strides = (strides,) * (len(shape) - 2)
        self.strides = None if strides is None else tuple(strides)
        self.padding, self.precision = padding, precision
        self.dtype = dtype
        rank = len(shape)
        self._set(quantizers, site, (rank, rank), rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves ``[batch, ..., channels]``."""
        x, grid = self._rounded("input", inputs)
        words = self.quantizers
        own = self._rounding(words.kernel), site_name(self.site, "kernel")
        kernel, weights = quantized_weight(self.kernel[...], words.kernel, -1, *own)
        bias = None
        if self.bias is not None:
            grids, site = (grid, weights), site_name(self.site, "bias")
            bias = quantized_bias(self.bias[...], words.bias, grids, site)
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(
            (x, kernel, bias), dtype=self.dtype
        )
        options = {"padding": self.padding, "precision": self.precision}
        found = depthwise_transpose(x, kernel, self.strides, **options)
        if bias is not None:
            found = found + bias.reshape((1,) * (found.ndim - 1) + bias.shape)
        return self._rounded("output", found)[0]


class QSeparableConv(nnx.Module):
    """A depthwise convolution and a pointwise one, each with its quantizers.

    An activation between them, as MobileNet has it, is the output word of the first:
    ``"quantized_relu(4)"`` or a function.

    Attributes:
      depthwise: The depthwise convolution.
      pointwise: The pointwise convolution.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: Any = 1,
        padding: Any = "SAME",
        kernel_dilation: Any = 1,
        channel_multiplier: int = 1,
        use_bias: bool = True,
        depthwise: LayerQuantizers = _WORDS,
        pointwise: LayerQuantizers = _WORDS,
        pointwise_first: bool = False,
        is_transposed: bool = False,
        site: str = "",
        rngs: nnx.Rngs,
    ):
        """Makes both convolutions.

        Args:
          in_features: Number of input channels.
          out_features: Number of output channels.
          kernel_size: Size of the depthwise window.
          strides: Steps between its windows.
          padding: Padding as of `flax.nnx.Conv`.
          kernel_dilation: Dilation of the depthwise kernel.
          channel_multiplier: Number of depthwise outputs of each channel.
          use_bias: Whether the last convolution has a bias.
          depthwise: Quantizers of the depthwise convolution.
          pointwise: Quantizers of the pointwise convolution.
          pointwise_first: Whether the pointwise convolution comes first.
          is_transposed: Whether the depthwise convolution is a transposed one.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
        """
        self.pointwise_first = pointwise_first
        channels = out_features if pointwise_first else in_features
        between = in_features if pointwise_first else in_features * channel_multiplier
        own: dict[str, Any] = {
            "strides": strides,
            "padding": padding,
            "use_bias": use_bias and pointwise_first,
            "quantizers": depthwise,
            "site": site_name(site, "depthwise"),
            "rngs": rngs,
        }
        self.depthwise: nnx.Module
        if is_transposed:
            own |= {"channel_multiplier": channel_multiplier}
            self.depthwise = QDepthwiseConvTranspose(channels, kernel_size, **own)
        else:
            own |= {"feature_group_count": channels, "kernel_dilation": kernel_dilation}
            features = channels * channel_multiplier
            self.depthwise = QConv(channels, features, kernel_size, **own)
        self.pointwise = QConv(
            between,
            out_features,
            (1,) * len(window_axes(kernel_size)),
            use_bias=use_bias and not pointwise_first,
            quantizers=pointwise,
            site=site_name(site, "pointwise"),
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves ``[batch, ..., channels]``."""
        parts: list[Any] = [self.depthwise, self.pointwise]
        for part in reversed(parts) if self.pointwise_first else parts:
            inputs = part(inputs)
        return inputs
