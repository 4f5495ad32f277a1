"""Rotary position embedding for Flax NNX."""

from typing import Any

import jax
from flax import nnx

from qjax.layers.layer_quantizers import LayerQuantizers, site_name
from qjax.layers.rotary import ROTARY, rotate
from qjax.nnx.layer import QuantizedModule


class QRoPE(QuantizedModule):
    """A rotation of pairs of features by their positions, between quantizers.

    The table of cosines and sines has the word of a kernel.
    """

    def __init__(
        self,
        *,
        max_wavelength: float = 10_000.0,
        is_interleaved: bool = False,
        axis: int = -2,
        length: int | None = None,
        quantizers: LayerQuantizers = ROTARY,
        rank: int = 3,
        site: str = "",
    ):
        """Makes the layer.

        Args:
          max_wavelength: Base of the wavelengths.
          is_interleaved: Whether a pair stands side by side; else in both halves.
          axis: Axis of the positions, counted from the end: -2, or -3 before heads.
          length: Number of rows of the table for positions that are traced.
          quantizers: The quantizers.
          rank: Number of axes of the input, for a range by axis.
          site: Prefix of the names of its sites.
        """
        self.max_wavelength, self.is_interleaved = max_wavelength, is_interleaved
        self.axis, self.length = axis, length
        self._set(quantizers, site, (rank, rank), nnx.Rngs())

    def __call__(self, inputs: jax.Array, positions: Any = None) -> jax.Array:
        """Rotates features.

        Args:
          inputs: Values, ``[..., positions, features]``.
          positions: Integers, one for each position; None for 0, 1, ...
        """
        found = rotate(
            self._rounded("input", inputs)[0],
            positions,
            self.quantizers.kernel,
            site=site_name(self.site, "table"),
            path=self.site,
            max_wavelength=self.max_wavelength,
            is_interleaved=self.is_interleaved,
            axis=self.axis,
            length=self.length,
        )
        return self._rounded("output", found)[0]
