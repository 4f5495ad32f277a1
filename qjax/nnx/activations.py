"""Layers for Flax NNX that are functions of one array."""

import jax
from flax import nnx

from qjax.calibration.calibrator import Calibrator
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord
from qjax.nnx.layer import QuantizedModule

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
