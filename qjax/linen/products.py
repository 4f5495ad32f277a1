"""Layers for Flax Linen that are products with a kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.layers.convolutions import depthwise_transpose, window_axes
from qjax.layers.layer_quantizers import LayerQuantizers, OutputAxes
from qjax.layers.output_axes import einsum_axes, einsum_bias_grid
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
        object.__setattr__(self, "_formula", formula)
        return super().__call__(inputs, einsum_str, **kwargs)

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *args: Any, **kw: Any) -> Any:
        """Returns a parameter, rounded by its quantizer."""
        value = super().param(name, init_fn, *args, **kw)
        if name == "kernel":
            grid = self._grids.get(name)
            self._grids[name] = einsum_bias_grid(grid, self._formula)
        return value

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return einsum_axes(self._formula)


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
        object.__setattr__(
            self, "_ranges", {name: made(name, row, name) for name in names}
        )

    @nn.nowrap
    def _range(self, name: str, x: jax.Array, site: str) -> Any:
        return self._ranges[name]

    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Maps integers to rows of the table; ``train`` moves ranges."""
        return self._rounded("output", super().__call__(inputs), train)

    def attend(self, query: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        return super().attend(self._rounded("input", query, train))


class QDepthwiseConvTranspose(QuantizedLayer):
    """A transposed convolution of each channel alone; see `LayerQuantizers`.

    Flax has none. The kernel has the shape ``[*kernel_size, 1, inputs * multiplier]``,
    and is placed as that of `flax.linen.ConvTranspose`.

    Attributes:
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
    """

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: str = "SAME"
    channel_multiplier: int = 1
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Convolves ``[batch, ..., channels]``; ``train`` moves ranges."""
        self._begin()
        x = self._rounded("input", inputs, train)
        features = x.shape[-1] * self.channel_multiplier
        shape = (*window_axes(self.kernel_size), 1, features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        options = {"padding": self.padding, "precision": self.precision}
        found = depthwise_transpose(x, kernel, self.strides, **options)
        if bias is not None:
            found = found + bias.reshape((1,) * (found.ndim - 1) + bias.shape)
        return self._rounded("output", found, train)


class QSeparableConv(nn.Module):
    """A depthwise convolution and a pointwise one, each with its quantizers.

    Parameters are those of `flax.linen.Conv` under ``depthwise`` and ``pointwise``. An
    activation between them, as MobileNet has it, is the output word of the first:
    ``"quantized_relu(4)"`` or a function.

    Attributes:
      features: Number of output channels.
      kernel_size: Size of the depthwise window.
      strides: Steps between its windows.
      padding: Padding as of `flax.linen.Conv`.
      kernel_dilation: Dilation of the depthwise kernel.
      channel_multiplier: Number of depthwise outputs of each channel.
      use_bias: Whether the last convolution has a bias.
      depthwise: Quantizers of the depthwise convolution.
      pointwise: Quantizers of the pointwise convolution.
      pointwise_first: Whether the pointwise convolution comes first.
      is_transposed: Whether the depthwise convolution is a transposed one.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: Any = 1
    padding: Any = "SAME"
    kernel_dilation: Any = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    depthwise: LayerQuantizers = LayerQuantizers()
    pointwise: LayerQuantizers = LayerQuantizers()
    pointwise_first: bool = False
    is_transposed: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Convolves ``[batch, ..., channels]``; ``train`` moves ranges."""
        is_last = self.pointwise_first
        channels = self.features if is_last else inputs.shape[-1]
        parts = [
            self._depthwise(channels, self.use_bias and is_last),
            self._pointwise(self.use_bias and not is_last),
        ]
        x = inputs
        for part in reversed(parts) if is_last else parts:
            x = part(x, train=train)
        return x

    @nn.nowrap
    def _depthwise(self, channels: int, use_bias: bool) -> QuantizedLayer:
        own: dict[str, Any] = {
            "strides": self.strides,
            "padding": self.padding,
            "use_bias": use_bias,
            "quantizers": self.depthwise,
            "name": "depthwise",
        }
        if self.is_transposed:
            own |= {"channel_multiplier": self.channel_multiplier}
            return QDepthwiseConvTranspose(self.kernel_size, **own)
        own |= {"feature_group_count": channels}
        own |= {"kernel_dilation": self.kernel_dilation}
        return QConv(channels * self.channel_multiplier, self.kernel_size, **own)

    @nn.nowrap
    def _pointwise(self, use_bias: bool) -> QConv:
        ones = (1,) * len(window_axes(self.kernel_size))
        own: dict[str, Any] = {"quantizers": self.pointwise, "name": "pointwise"}
        return QConv(self.features, ones, use_bias=use_bias, **own)
