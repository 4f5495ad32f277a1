"""Layers for Flax Linen that are functions of one array."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.layers.adaptive import Adaptation, adapted
from qjax.layers.layer_quantizers import (
    ACTIVATION,
    LayerQuantizers,
    LayerWord,
    OutputAxes,
    site_name,
)
from qjax.linen.layer import QuantizedLayer


class QActivation(QuantizedLayer):
    """A quantizer, or any function of an array, as a layer.

    Attributes:
      word: Word of the values.
      calibrator: Calibrator that finds the range of a `QSpec`.
    """

    word: LayerWord = QSpec(8)
    calibrator: Calibrator | str = LayerQuantizers().calibrator

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Rounds an array of any shape; ``train`` moves its range."""
        own = LayerQuantizers(None, None, None, self.word, self.calibrator)
        self._begin(own)
        return self._rounded("output", inputs, train)


class QPReLU(QuantizedLayer, nn.PReLU, kw_only=True):
    """A `flax.linen.PReLU` whose slope has the word of a kernel."""

    quantizers: LayerQuantizers = ACTIVATION

    @nn.nowrap
    def _role(self, name: str) -> str | None:
        return "kernel"

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None


class QScaleShift(QuantizedLayer):
    """A scale and an offset: ``y = Q(scale) * x + Q(bias)``.

    Attributes:
      shape: Shape of both, which broadcasts to that of the input.
      use_bias: Whether there is an offset.
    """

    shape: tuple[int, ...] = ()
    use_bias: bool = True

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Scales an array of any shape; ``train`` moves ranges."""
        self._begin()
        x = self._rounded("input", inputs, train)
        rank = (1,) * (x.ndim - len(self.shape))
        kind = jnp.result_type(x, 1.0)
        own = self.param("scale", nn.initializers.ones, self.shape)
        found = x * own.reshape(rank + self.shape).astype(kind)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape)
            found = found + bias.reshape(rank + self.shape).astype(kind)
        return self._rounded("output", found, train)

    @nn.nowrap
    def _role(self, name: str) -> str | None:
        return "kernel" if name == "scale" else "bias"

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None


class QAdaptiveActivation(nn.Module):
    """An activation whose binary point follows a moving range; see `Adaptation`.

    Attributes:
      adaptation: Word, delays and decay.
      train: Whether ranges move; None: where the collection ``quant`` is mutable.
    """

    adaptation: Adaptation = Adaptation()
    train: bool | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Rounds an array of any shape; ``train`` moves its range."""
        state = self.variable("quant", "output", self.adaptation.init, inputs)
        if self.is_initializing():
            return inputs
        train = self.train if train is None else train
        trains = self.is_mutable_collection("quant") if train is None else train
        site = site_name("/".join(self.path), "output")
        found, new = adapted(
            inputs, state.value, self.adaptation, trains=trains, site=site
        )
        if trains:
            state.value = new
        return found
