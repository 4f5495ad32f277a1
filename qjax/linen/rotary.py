"""Rotary position embedding for Flax Linen."""

from typing import Any

import jax
from flax import linen as nn

from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.layers.rotary import ROTARY, rotate
from qjax.linen.layer import QuantizedLayer


class QRoPE(QuantizedLayer, kw_only=True):
    """A rotation of pairs of features by their positions, between quantizers.

    The table of cosines and sines has the word of a kernel.

    Attributes:
      max_wavelength: Base of the wavelengths.
      is_interleaved: Whether a pair stands side by side; else in both halves.
      axis: Axis of the positions, counted from the end: -2, or -3 before heads.
      length: Number of rows of the table for positions that are traced.
    """

    quantizers: LayerQuantizers = ROTARY
    max_wavelength: float = 10_000.0
    is_interleaved: bool = False
    axis: int = -2
    length: int | None = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, positions: Any = None, *, train: bool | None = None
    ) -> jax.Array:
        """Rotates features.

        Args:
          inputs: Values, ``[..., positions, features]``.
          positions: Integers, one for each position; None for 0, 1, ...
          train: Whether ranges move; None: as the attribute says.
        """
        self._begin()
        found = rotate(
            self._rounded("input", inputs, train),
            positions,
            self._words.kernel,
            site=self._site("table"),
            path="/".join(self.path),
            max_wavelength=self.max_wavelength,
            is_interleaved=self.is_interleaved,
            axis=self.axis,
            length=self.length,
        )
        return self._rounded("output", found, train)
