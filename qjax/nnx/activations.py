"""Layers for Flax NNX that are functions of one array."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.calibration.calibrator import Calibrator
from qjax.layers.adaptive import Adaptation, adapted
from qjax.layers.layer_quantizers import (
    ACTIVATION,
    LayerQuantizers,
    LayerWord,
    OutputAxes,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.nnx.layer import QuantizedModule, QuantState

_WORDS = LayerQuantizers()


class QActivation(QuantizedModule):
    """A quantizer, or any function of an array, as a layer."""

    def __init__(
        self,
        word: LayerWord,
        *,
        calibrator: Calibrator | str = _WORDS.calibrator,
        rank: int = 2,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          word: Word of the values.
          calibrator: Calibrator that finds the range of a `QSpec`.
          rank: Number of axes of the input, for a range by axis.
          site: Prefix of the name of its site.
          rngs: Keys; the stream ``quant`` is for a word that draws at random.
        """
        own = LayerQuantizers(None, None, None, word, calibrator)
        self._set(own, site, (rank, rank), nnx.Rngs() if rngs is None else rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Rounds an array of any shape."""
        return self._rounded("output", inputs)[0]


class QPReLU(QuantizedModule, nnx.PReLU):
    """A `flax.nnx.PReLU` whose slope has the word of a kernel."""

    base = nnx.PReLU
    weight = "negative_slope"
    words = ACTIVATION

    def __init__(
        self,
        *args: Any,
        quantizers: LayerQuantizers = ACTIVATION,
        site: str = "",
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ):
        """Makes the layer.

        Args:
          *args: Arguments of `flax.nnx.PReLU`.
          quantizers: The quantizers.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
          **kwargs: Other arguments of that layer.
        """
        nnx.PReLU.__init__(self, *args, **kwargs)
        self._set(quantizers, site, (2, 2), nnx.Rngs() if rngs is None else rngs)

    def _output_axes(self) -> OutputAxes:
        return None


class QScaleShift(QuantizedModule):
    """A scale and an offset: ``y = Q(scale) * x + Q(bias)``."""

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        *,
        use_bias: bool = True,
        quantizers: LayerQuantizers = _WORDS,
        rank: int = 2,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          shape: Shape of both, which broadcasts to that of the input.
          use_bias: Whether there is an offset.
          quantizers: The quantizers.
          rank: Number of axes of the input, for a range by axis.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
        """
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
        self._set(quantizers, site, (rank, rank), nnx.Rngs() if rngs is None else rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Scales an array of any shape."""
        x, grid = self._rounded("input", inputs)
        words, scale = self.quantizers, self.scale[...]
        rank, kind = (1,) * (x.ndim - scale.ndim), jnp.result_type(x, 1.0)
        own = self._rounding(words.kernel), site_name(self.site, "scale")
        scale, weights = quantized_weight(scale, words.kernel, None, *own)
        found = x * scale.reshape(rank + scale.shape).astype(kind)
        if self.bias is not None:
            site = site_name(self.site, "bias")
            grids = grid, weights
            bias = quantized_bias(self.bias[...], words.bias, grids, site)
            found = found + bias.reshape(rank + bias.shape).astype(kind)
        return self._rounded("output", found)[0]


class QAdaptiveActivation(nnx.Module):
    """An activation whose binary point follows a moving range; see `Adaptation`.

    ``model.eval()`` freezes the range, ``model.train()`` lets it move.
    """

    def __init__(
        self,
        adaptation: Adaptation | None = None,
        *,
        shape: tuple[int, ...] = (1, 1),
        site: str = "",
    ):
        """Makes the layer.

        Args:
          adaptation: Word, delays and decay; None for the default ones.
          shape: Shape of an input, of which the channel axis counts.
          site: Prefix of the name of its site.
        """
        own = Adaptation() if adaptation is None else adaptation
        self.adaptation = nnx.static(own)
        self.site = site
        self.output_range = QuantState(own.init(jnp.zeros(shape)))
        self.use_running_average = False

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Rounds an array of any shape."""
        trains, site = not self.use_running_average, site_name(self.site, "output")
        own: Any = {"trains": trains, "site": site}
        state = self.output_range.get_value()
        found, new = adapted(inputs, state, self.adaptation, **own)
        if trains:
            self.output_range.set_value(new)
        return found
