"""Layers for Flax Linen that are functions of one array."""

import jax
from flax import linen as nn

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord
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
