"""Octave convolution for Flax NNX."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers, site_name
from qjax.layers.octave import HIGH, LOW, octave, octave_paths
from qjax.nnx.layer import QuantizedModule, QuantState
from qjax.nnx.pools import QAvgPool
from qjax.nnx.products import QConv

_WORDS = LayerQuantizers()


class QOctaveConv(QuantizedModule):
    """A convolution of two frequencies, the low one at half the resolution.

    Its parts ``high_high``, ``high_low``, ``low_high`` and ``low_low`` are `QConv`; one
    of each target has a bias. Their input, kernel and bias have the words of the layer,
    their outputs that of terms, each sum that of the output.
    """

    def __init__(
        self,
        in_features: int | tuple[int, int],
        out_features: int,
        kernel_size: Sequence[int],
        *,
        alpha: float = 0.5,
        strides: Any = 1,
        padding: Any = "SAME",
        use_bias: bool = True,
        is_joined: bool = False,
        quantizers: LayerQuantizers = _WORDS,
        site: str = "",
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        """Makes the layer.

        Args:
          in_features: Numbers of high and low channels; 0 for a frequency that the
            input has not. One number: high ones.
          out_features: Number of output channels, of both frequencies.
          kernel_size: Size of the window.
          alpha: Share of output channels that are low; 0: all high, 1: all low.
          strides: Steps between windows.
          padding: Padding as of `flax.nnx.Conv`.
          use_bias: Whether there are biases.
          is_joined: Whether the output is one array at the high resolution.
          quantizers: The quantizers.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
          **kwargs: Other arguments of each `flax.nnx.Conv`.
        """
        sizes = (in_features, 0) if isinstance(in_features, int) else in_features
        known = {name: n for name, n in zip((HIGH, LOW), sizes, strict=True) if n}
        self.sources, self.is_joined = tuple(known), is_joined
        own = out_features, alpha, use_bias, quantizers, site
        self.paths = nnx.static(octave_paths(self.sources, *own))
        for p in self.paths:
            part = QConv(
                known[p.source],
                p.features,
                kernel_size,
                strides=strides,
                padding=padding,
                use_bias=p.use_bias,
                quantizers=p.words,
                site=site_name(site, p.name),
                rngs=rngs,
                **kwargs,
            )
            setattr(self, p.name, part)
        only_input = LayerQuantizers(
            quantizers.input, None, None, None, quantizers.calibrator
        )
        size, at = (2, 2), site_name(site, "pool")
        self.pool = QAvgPool(size, size, quantizers=only_input, site=at)
        self._set(quantizers, site, (4, 4), rngs)

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        self._keep(quantizers, site, {"output": ranks[1]}, rngs)
        if isinstance(quantizers.output, QSpec):
            kept: Any = vars(self)["output_range"]
            for name in (HIGH, LOW):
                state = jax.tree.map(jnp.copy, kept.get_value())
                setattr(self, f"{name}_range", QuantState(state))

    def __call__(self, high: jax.Array | None, low: jax.Array | None = None) -> Any:
        """Convolves images.

        Args:
          high: High frequency, ``[batch, height, width, channels]``, or None.
          low: Low frequency at half the size, or None.

        Returns:
          Pair of high and low, None for one without channels; or one array.

        Raises:
          ValueError: for frequencies that the layer was not made for.
        """
        inputs = {k: x for k, x in ((HIGH, high), (LOW, low)) if x is not None}
        if tuple(inputs) != self.sources:
            raise ValueError(
                f"{self.site or 'this layer'!r} was made for the frequencies "
                f"{self.sources}, got {tuple(inputs)}. `in_features` has a number for "
                "each, 0 for one that is not there."
            )
        return octave(
            inputs,
            self.paths,
            {p.name: getattr(self, p.name) for p in self.paths},
            self.pool,
            lambda site, x: self._rounded("output", x, site=site)[0],
            is_joined=self.is_joined,
            path=self.site,
        )
