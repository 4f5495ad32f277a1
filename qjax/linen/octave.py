"""Octave convolution for Flax Linen."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.layers.octave import HIGH, LOW, octave, octave_paths
from qjax.linen.layer import QuantizedLayer
from qjax.linen.pools import QAvgPool
from qjax.linen.products import QConv


class QOctaveConv(QuantizedLayer):
    """A convolution of two frequencies, the low one at half the resolution.

    Its parts ``high_high``, ``high_low``, ``low_high`` and ``low_low`` are `QConv`; one
    of each target has a bias. Their input, kernel and bias have the words of the layer,
    their outputs that of terms, each sum that of the output.

    Attributes:
      features: Number of output channels, of both frequencies.
      kernel_size: Size of the window.
      alpha: Share of output channels that are low; 0: all high, 1: all low.
      strides: Steps between windows.
      padding: Padding as of `flax.linen.Conv`.
      use_bias: Whether there are biases.
      is_joined: Whether the output is one array at the high resolution, on one grid.
      kernel_init: Initializer of the kernels.
      bias_init: Initializer of the biases.
      dtype: Type of the computation; None: that of input and parameters.
      param_dtype: Type of the parameters.
      precision: Precision of the products.
    """

    features: int
    kernel_size: Sequence[int]
    alpha: float = 0.5
    strides: Any = 1
    padding: Any = "SAME"
    use_bias: bool = True
    is_joined: bool = False
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        high: jax.Array | None,
        low: jax.Array | None = None,
        *,
        train: bool | None = None,
    ) -> Any:
        """Convolves images.

        Args:
          high: High frequency, ``[batch, height, width, channels]``, or None.
          low: Low frequency at half the size, or None.
          train: Whether ranges move; None: as the attribute says.

        Returns:
          Pair of high and low, None for one without channels; or one array.
        """
        self._begin()
        words, path = self._words, "/".join(self.path)
        inputs = {k: x for k, x in ((HIGH, high), (LOW, low)) if x is not None}
        own = self.features, self.alpha, self.use_bias, words, path
        paths = octave_paths(tuple(inputs), *own)
        names = "strides padding kernel_init bias_init dtype param_dtype precision"
        shared: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        moves = self._moves(train)
        convolutions = {}
        for p in paths:
            given: dict[str, Any] = {"use_bias": p.use_bias, "quantizers": p.words}
            given |= {"name": p.name, "train": moves}
            convolutions[p.name] = QConv(
                p.features, self.kernel_size, **given, **shared
            )
        only_input = LayerQuantizers(words.input, None, None, None, words.calibrator)
        size = 2, 2
        return octave(
            inputs,
            paths,
            convolutions,
            QAvgPool(size, size, quantizers=only_input, train=moves, name="pool"),
            lambda site, x: self._rounded("output", x, train, site=site),
            is_joined=self.is_joined,
            path=path,
        )
