"""Quantized layers for Flax NNX: thin shells over `qjax.layers.products`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.layers.products import (
    CALIBRATOR,
    INPUT_SPEC,
    KERNEL_SPEC,
    Padding,
    check_specs,
    conv,
    dense,
    quantized_product,
)


class QuantState(nnx.Variable):
    """The state of a calibrator."""


class QLinear(nnx.Module):
    """A dense layer on quantized values. ``model.eval()`` freezes its range.

    Attributes:
      kernel: ``[in_features, out_features]``.
      bias: ``[out_features]``, or None.
      x_range: State of the calibrator of the input.
      use_running_average: Whether the range stays as it is; set by ``model.eval()``
        and ``model.train()``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        x_spec: QSpec = INPUT_SPEC,
        kernel_spec: QSpec = KERNEL_SPEC,
        calibrator: Calibrator = CALIBRATOR,
        site: str = "",
        rngs: nnx.Rngs,
    ):
        """Makes the layer; ``site`` is the prefix of the names of its sites."""
        check_specs(x_spec, kernel_spec, site)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None
        self.x_range = QuantState(calibrator.init(jnp.zeros((1, in_features)), x_spec))
        self.x_spec = nnx.static(x_spec)
        self.kernel_spec = nnx.static(kernel_spec)
        self.calibrator = nnx.static(calibrator)
        self.site = site
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        return _apply(self, dense, x)


class QConv(nnx.Module):
    """A convolution on quantized values, with the attributes of `QLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        x_spec: QSpec = INPUT_SPEC,
        kernel_spec: QSpec = KERNEL_SPEC,
        calibrator: Calibrator = CALIBRATOR,
        site: str = "",
        rngs: nnx.Rngs,
    ):
        """Makes the layer; windows are given as to `qjax.layers.products.conv`."""
        check_specs(x_spec, kernel_spec, site)
        init = nnx.initializers.lecun_normal()
        shape = (*kernel_size, in_features // feature_group_count, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None
        example = jnp.zeros((1,) * (len(kernel_size) + 1) + (in_features,))
        self.x_range = QuantState(calibrator.init(example, x_spec))
        self.window = nnx.static((strides, padding, kernel_dilation))
        self.feature_group_count = feature_group_count
        self.x_spec = nnx.static(x_spec)
        self.kernel_spec = nnx.static(kernel_spec)
        self.calibrator = nnx.static(calibrator)
        self.site = site
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, *spatial, in]`` to ``[batch, *spatial, out]``."""
        return _apply(self, conv(*self.window, self.feature_group_count), x)


def _apply(layer: Any, product: Any, x: jax.Array) -> jax.Array:
    state = layer.x_range.get_value()
    if not layer.use_running_average:
        seen = jax.lax.stop_gradient(x)
        state = layer.calibrator.update(seen, state, layer.x_spec)
        layer.x_range.set_value(state)
    x_params: QParams = layer.calibrator.params(state, layer.x_spec)
    return quantized_product(
        product,
        x,
        layer.kernel.get_value(),
        None if layer.bias is None else layer.bias.get_value(),
        x_params=x_params,
        x_spec=layer.x_spec,
        kernel_spec=layer.kernel_spec,
        site=layer.site,
    )
