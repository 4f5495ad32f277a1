"""The base of quantized layers for Flax Linen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    OutputAxes,
    Rounding,
    learns,
    naming,
    on_grid_of,
    quantized_bias,
    quantized_weight,
    site_name,
    started,
    weight_word,
    within_bounds,
)
from qjax.schemes.words import is_random

_WORDS = {
    **dict.fromkeys(("kernel", "embedding", "scale"), "kernel"),
    "bias": "bias",
}


class QuantizedLayer(nn.Module, kw_only=True):
    """A layer whose parameters, input and output have quantizers.

    Attributes:
      quantizers: The quantizers.
      train: Whether ranges move; None: where the collection ``quant`` is mutable. With
        True it must be.
    """

    quantizers: LayerQuantizers = LayerQuantizers()
    train: bool | None = None

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *args: Any, **kw: Any):
        """Returns a parameter, rounded by its quantizer."""
        value = super().param(name, init_fn, *args, **kw)
        role = self._role(name)
        if role is None:
            return value
        word, site = getattr(self._words, role), self._site(name)
        if role == "bias":
            if self.is_initializing():
                return value
            grids = self._grids.get("input"), self._grids.get("kernel")
            return quantized_bias(value, word, grids, site)
        axis = self._output_axes(value.ndim)
        how = self._rounding(weight_word(value, word, axis, site), name, value)
        if self.is_initializing():
            return value
        value, grid = quantized_weight(value, word, axis, how, site)
        self._grids["kernel"] = grid
        return value

    @nn.nowrap
    def _role(self, name: str) -> str | None:
        """Returns which word a parameter has, if any: "kernel" or "bias"."""
        return _WORDS.get(name)

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        """Returns the axes of a weight that are its output channels."""
        return -1

    @nn.nowrap
    def _site(self, name: str) -> str:
        return site_name("/".join(self.path), name)

    @nn.nowrap
    def _rounding(
        self, word: Any, name: str = "", x: jax.Array | None = None
    ) -> Rounding:
        """Returns what a word rounds with: a key, an estimator, learned arrays.

        Args:
          word: Word.
          name: Name of the parameter or of the value, before those of its arrays.
          x: Values that these start from; None for a word without.
        """
        is_drawn = is_random(word) and self.has_rng("quant")
        key = self.make_rng("quant") if is_drawn else None
        learned: tuple[jax.Array, ...] = ()
        if learns(word) and x is not None:
            learned = self._learned(word, name, x)
        return Rounding(key, self._words.estimator, learned)

    @nn.nowrap
    def _learned(self, word: Any, name: str, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the learned arrays of a word, which are parameters of the layer."""
        start, found = lambda: started(word, x), []
        restarts = self.is_mutable_collection("params") and not self.is_initializing()
        for own in word.learning.names:
            full = f"{name}_{own}"
            value = nn.Module.param(self, full, lambda _, own=own: start()[own])
            if restarts:
                value = start()[own]
                self.put_variable("params", full, value)
            found.append(value)
        return within_bounds(word, found)

    @nn.nowrap
    def _range(self, name: str, x: jax.Array, site: str) -> Any:
        """Returns the state of the calibrator of input or output."""
        init: Any = self._words.calibrator.init
        with naming(self._site(site)):
            return self.variable("quant", site, init, x, self._word(name))

    @nn.nowrap
    def _word(self, name: str) -> Any:
        """Returns the word of an activation by its name."""
        return getattr(self._words, name)

    @nn.nowrap
    def _moves(self, train: bool | None) -> bool:
        """Returns whether ranges move."""
        train = self.train if train is None else train
        return self.is_mutable_collection("quant") if train is None else train

    @nn.nowrap
    def _rounded(
        self,
        name: str,
        x: jax.Array,
        train: bool | None,
        site: str | None = None,
        source: IntegerSource | None = None,
    ) -> jax.Array:
        """Rounds input or output, and moves the range of its word in training.

        Args:
          name: Name of the word.
          x: Real values.
          train: Whether the range moves; None: as the attribute says.
          site: Name of range and site; None: that of the word.
          source: What integers compute the values from, if they do.
        """
        word, params = self._word(name), None
        site = name if site is None else site
        if isinstance(word, QSpec):
            calibrator: Any = self._words.calibrator
            state = self._range(name, x, site)
            if self.is_initializing():
                return x
            if self._moves(train):
                seen = jax.lax.stop_gradient(x)
                state.value = calibrator.update(seen, state.value, word)
            params = calibrator.params(state.value, word)
        how = self._rounding(word, site, x)
        if self.is_initializing():
            return x
        if source is not None:
            x = source.on_grid(x, word, params, self._site(site))
        x, grid = on_grid_of(x, word, params, how, self._site(site))
        self._grids[site] = grid
        return x

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *args: Any, train: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        """Runs the layer that this one replaces between its quantizers.

        Args:
          inputs: Input of that layer.
          *args: Its other arguments.
          train: Whether ranges move; None: what the attribute says.
          **kwargs: Its other arguments.
        """
        self._begin()
        if jnp.issubdtype(inputs.dtype, jnp.inexact):
            inputs = self._rounded("input", inputs, train)
        found = super().__call__(inputs, *args, **kwargs)
        return self._rounded("output", found, train)

    @nn.nowrap
    def _begin(self, words: LayerQuantizers | None = None) -> None:
        """Checks the words, and forgets the grids of an earlier call."""
        words = self.quantizers if words is None else words
        words.check("/".join(self.path))
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "_grids", {})
