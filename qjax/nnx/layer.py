"""The base of quantized layers for Flax NNX, and the type of their state."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams, QSpec
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    OutputAxes,
    on_grid_of,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.schemes.words import is_random


class QuantState(nnx.Variable):
    """The state of a calibrator."""


_WORDS = LayerQuantizers()


class QuantizedModule(nnx.Module):
    """A layer whose parameters, input and output have quantizers.

    ``model.eval()`` freezes its ranges, ``model.train()`` lets them move.

    Attributes:
      quantizers: The quantizers.
      input_range: State of the calibrator of the input, if its word is a `QSpec`.
      output_range: The same of the output.
      use_running_average: Whether ranges stay as they are.
      site: Prefix of the names of its sites.
    """

    base: ClassVar[type] = object  # The layer that it replaces.

    def __init__(
        self,
        *args: Any,
        quantizers: LayerQuantizers = _WORDS,
        site: str = "",
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        """Makes the layer.

        Args:
          *args: Arguments of the layer that it replaces.
          quantizers: The quantizers.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
          **kwargs: Other arguments of that layer.
        """
        base: Any = self.base
        base.__init__(self, *args, rngs=rngs, **kwargs)
        self._set(quantizers, site, self._ranks(), rngs)

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        """Sets what this layer adds to the one that it replaces."""
        quantizers.check(site)
        self.quantizers = nnx.static(quantizers)
        self.site = site
        calibrator: Any = quantizers.calibrator
        words = ("input", quantizers.input), ("output", quantizers.output)
        for (name, word), rank in zip(words, ranks, strict=True):
            state = None
            if isinstance(word, QSpec):
                state = QuantState(calibrator.init(jnp.zeros((1,) * rank), word))
            setattr(self, f"{name}_range", state)
        drawn: Any = (quantizers.input, quantizers.kernel, quantizers.output)
        has_keys = any(map(is_random, drawn)) and "quant" in rngs
        self.keys = nnx.data(rngs["quant"].fork() if has_keys else None)
        self.use_running_average = False

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Runs the layer that this one replaces between its quantizers."""
        grid: QParams | None = None
        if jnp.issubdtype(inputs.dtype, jnp.inexact):
            inputs, grid = self._rounded("input", inputs)
        found = self.base.__call__(self._twin(grid), inputs, *args, **kwargs)
        return self._rounded("output", found)[0]

    def _ranks(self) -> tuple[int, int]:
        """Returns the numbers of axes of input and output."""
        return 2, 2

    def _twin(self, grid: QParams | None) -> Any:
        """Returns the float layer with rounded parameters."""
        words = self.quantizers
        twin: Any = object.__new__(self.base)
        vars(twin).update(vars(self))
        name = "embedding" if hasattr(self, "embedding") else "kernel"
        kernel, bias = getattr(self, name), getattr(self, "bias", None)
        value, axes = kernel[...], self._output_axes()
        own = self._key(words.kernel), site_name(self.site, name)
        value, scale = quantized_weight(value, words.kernel, axes, *own)
        vars(twin)[name] = nnx.Param(value)
        if bias is not None:
            grids, site = (grid, scale), site_name(self.site, "bias")
            value = quantized_bias(bias[...], words.bias, grids, site)
            vars(twin)["bias"] = nnx.Param(value)
        return twin

    def _output_axes(self) -> OutputAxes:
        """Returns the axes of a weight that are its output channels."""
        return -1

    def _key(self, word: Any) -> Any:
        return self.keys() if is_random(word) and self.keys is not None else None

    def _word(self, name: str) -> Any:
        """Returns the word of an activation by its name."""
        return getattr(self.quantizers, name)

    def _range(self, name: str) -> Any:
        """Returns the state of the calibrator of input or output."""
        return getattr(self, f"{name}_range")

    def _rounded(self, name: str, x: jax.Array) -> tuple[jax.Array, QParams | None]:
        """Rounds input or output, and moves the range of its word in training."""
        word, params = self._word(name), None
        if isinstance(word, QSpec):
            calibrator: Any = self.quantizers.calibrator
            kept = self._range(name)
            state = kept.get_value()
            if not self.use_running_average:
                state = calibrator.update(jax.lax.stop_gradient(x), state, word)
                kept.set_value(state)
            params = calibrator.params(state, word)
        return on_grid_of(x, word, params, self._key(word), site_name(self.site, name))
