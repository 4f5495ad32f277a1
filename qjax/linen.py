"""Quantized layers for Flax Linen: thin shells over `qjax.layers.products`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.layers.products import (
    CALIBRATOR,
    INPUT_SPEC,
    KERNEL_SPEC,
    Padding,
    conv,
    dense,
    quantized_product,
)

Initializer = Callable[..., Any]


class QDense(nn.Module):
    """A dense layer on quantized values. Variables: params/{kernel, bias}, quant/x.

    Attributes:
      features: Size of the output.
      use_bias: Whether a bias is added.
      x_spec: Word of the input codes.
      kernel_spec: Word of the kernel codes.
      calibrator: Calibrator that finds the range of the input.
      kernel_init: Initializer of the kernel.
      bias_init: Initializer of the bias.
    """

    features: int
    use_bias: bool = True
    x_spec: QSpec = INPUT_SPEC
    kernel_spec: QSpec = KERNEL_SPEC
    calibrator: Calibrator = CALIBRATOR
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., features]``; ``train`` moves the range of x."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
        return quantized_product(
            dense,
            x,
            kernel,
            bias,
            x_params=_input_params(self, x, train),
            x_spec=self.x_spec,
            kernel_spec=self.kernel_spec,
            site="/".join(self.path),
        )


class QConv(nn.Module):
    """A convolution on quantized values, with the variables of `QDense`.

    Attributes:
      features: Channels of the output.
      kernel_size: Per spatial axis.
      strides: Per spatial axis, or one for all.
      padding: ``"SAME"``, ``"VALID"``, or sizes as
        `qjax.layers.products.conv` takes them.
      kernel_dilation: Dilation, given like ``strides``.
      feature_group_count: Groups of channels.
      use_bias: Whether a bias is added.
      x_spec: Word of the input codes.
      kernel_spec: Word of the kernel codes.
      calibrator: Calibrator that finds the range of the input.
      kernel_init: Initializer of the kernel.
      bias_init: Initializer of the bias.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    x_spec: QSpec = INPUT_SPEC
    kernel_spec: QSpec = KERNEL_SPEC
    calibrator: Calibrator = CALIBRATOR
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[batch, *spatial, in]`` to ``[batch, *spatial, features]``."""
        inputs = x.shape[-1] // self.feature_group_count
        shape = (*self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
        groups = self.feature_group_count
        return quantized_product(
            conv(self.strides, self.padding, self.kernel_dilation, groups),
            x,
            kernel,
            bias,
            x_params=_input_params(self, x, train),
            x_spec=self.x_spec,
            kernel_spec=self.kernel_spec,
            site="/".join(self.path),
        )


def _input_params(layer: Any, x: jax.Array, train: bool) -> QParams:
    """Updates the range of the input in training, and returns its grid."""
    spec, calibrator = layer.x_spec, layer.calibrator
    state = layer.variable("quant", "x", calibrator.init, x, spec)
    if layer.is_initializing():
        # No batch yet: any grid serves to find shapes.
        return QParams(jnp.float32(1), jnp.int32(0))
    if train:
        state.value = calibrator.update(jax.lax.stop_gradient(x), state.value, spec)
    return calibrator.params(state.value, spec)
