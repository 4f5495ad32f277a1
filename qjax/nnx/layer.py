"""The base of quantized layers for Flax NNX, and the type of their state."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams, QSpec
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
from qjax.tables import show


class QuantState(nnx.Variable):
    """The state of a calibrator."""


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
    weight: ClassVar[str] = "kernel"  # The parameter with the word of a kernel.
    learned: tuple[str, ...] = ()  # Values and parameters whose words learn.
    weights: ClassVar[tuple[str, ...]] = ("kernel",)  # Words of weights.
    words: ClassVar[LayerQuantizers] = LayerQuantizers()  # If none are given.

    def __init__(
        self,
        *args: Any,
        quantizers: LayerQuantizers | None = None,
        site: str = "",
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        """Makes the layer.

        Args:
          *args: Arguments of the layer that it replaces.
          quantizers: The quantizers; None for those of the class.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
          **kwargs: Other arguments of that layer.
        """
        base: Any = self.base
        base.__init__(self, *args, rngs=rngs, **kwargs)
        own = self.words if quantizers is None else quantizers
        self._set(own, site, self._ranks(), rngs)

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        """Sets what this layer adds to the one that it replaces."""
        self._keep(quantizers, site, {"input": ranks[0], "output": ranks[1]}, rngs)

    def _keep(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: Mapping[str, int],
        rngs: nnx.Rngs,
    ) -> None:
        """Sets the quantizers, and the states of words by name."""
        quantizers.check(site)
        self.quantizers = nnx.static(quantizers)
        self.site = site
        self.learned = ()
        calibrator: Any = quantizers.calibrator
        for name, rank in ranks.items():
            word, state = getattr(quantizers, name), None
            if isinstance(word, QSpec):
                zeros, own = jnp.zeros((1,) * rank), site_name(site, name)
                with naming(own):
                    state = QuantState(calibrator.init(zeros, word))
            setattr(self, f"{name}_range", state)
            if learns(word):
                self._check_learned(word, name)
                self._learn(name, word, started(word, jnp.zeros((1,) * rank)))
                setattr(self, f"{name}_started", QuantState(jnp.bool_(False)))
        weight: Any = getattr(self, self.weight, None)
        if learns(quantizers.kernel) and weight is not None:
            x, name = weight[...], self.weight
            own = site_name(site, name)
            word = weight_word(x, quantizers.kernel, self._output_axes(), own)
            self._learn(name, word, started(word, x))
        drawn = [getattr(quantizers, name) for name in (*self.weights, *ranks)]
        has_keys = any(map(is_random, drawn)) and "quant" in rngs
        self.keys = nnx.data(rngs["quant"].fork() if has_keys else None)
        if "use_running_average" not in vars(self):  # A batch normalisation has it.
            self.use_running_average = False

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Runs the layer that this one replaces between its quantizers."""
        grid: QParams | None = None
        if jnp.issubdtype(inputs.dtype, jnp.inexact):
            inputs, grid = self._rounded("input", inputs)
        found = self.base.__call__(self._twin(grid), inputs, *args, **kwargs)
        return self._rounded("output", found)[0]

    def _check_learned(self, word: Any, name: str) -> None:
        """Raises for learned arrays whose shape only a batch would tell."""
        if getattr(word, "axis", None) is not None:
            raise ValueError(
                f"The word of {site_name(self.site, name)!r}, {show(word)}, learns an "
                "array for each channel of an activation, whose number this layer does "
                "not know. Use `axis=None`, or a layer of Linen."
            )

    def _parts(self) -> list[Any]:
        """Returns the layers inside, whose quantizers are set by this one."""
        return []

    def _ranks(self) -> tuple[int, int]:
        """Returns the numbers of axes of input and output."""
        return 2, 2

    def _twin(self, grid: QParams | None) -> Any:
        """Returns the float layer with rounded parameters."""
        words = self.quantizers
        twin: Any = object.__new__(self.base)
        vars(twin).update(vars(self))
        name = self.weight
        kernel, bias = getattr(self, name), getattr(self, "bias", None)
        value, axes = kernel[...], self._output_axes()
        site = site_name(self.site, name)
        word = weight_word(value, words.kernel, axes, site)
        how = self._rounding(word, name)
        value, scale = quantized_weight(value, word, axes, how, site)
        vars(twin)[name] = nnx.Param(value)
        if bias is not None:
            grids = grid, self._bias_grid(scale)
            site = site_name(self.site, "bias")
            value = quantized_bias(bias[...], words.bias, grids, site)
            vars(twin)["bias"] = nnx.Param(value)
        return twin

    def _output_axes(self) -> OutputAxes:
        """Returns the axes of a weight that are its output channels."""
        return -1

    def _bias_grid(self, grid: QParams | None) -> QParams | None:
        """Returns the grid of the weight with its axes as the bias has them."""
        return grid

    def _rounding(self, word: Any, name: str = "") -> Rounding:
        """Returns what a word rounds with: a key, an estimator, learned arrays.

        Words that draw at random do so in training.

        Args:
          word: Word.
          name: Name of the parameter or of the value, before those of its arrays.
        """
        is_drawn = is_random(word) and not self.use_running_average
        key = self.keys() if is_drawn and self.keys is not None else None
        learned: tuple[jax.Array, ...] = ()
        if learns(word) and name in self.learned:
            arrays = (getattr(self, f"{name}_{own}") for own in word.learning.names)
            learned = within_bounds(word, [array[...] for array in arrays])
        return Rounding(key, self.quantizers.estimator, learned)

    def _learn(self, name: str, word: Any, start: Any) -> None:
        """Adds the learned arrays of a word, which are parameters of the layer."""
        self.learned = (*self.learned, name)
        for own in word.learning.names:
            setattr(self, f"{name}_{own}", nnx.Param(start[own]))

    def _start(self, name: str, word: Any, x: jax.Array) -> None:
        """Starts the learned arrays of an activation with its first batch."""
        has_started: Any = getattr(self, f"{name}_started")
        start, is_known = started(word, x), has_started.get_value()
        for own in word.learning.names:
            array = getattr(self, f"{name}_{own}")
            array.set_value(jnp.where(is_known, array[...], start[own]))
        has_started.set_value(jnp.bool_(True))

    def _word(self, name: str) -> Any:
        """Returns the word of an activation by its name."""
        return getattr(self.quantizers, name)

    def _range(self, site: str) -> Any:
        """Returns the state of the calibrator of a site, such as "input"."""
        return getattr(self, f"{site}_range")

    def _rounded(
        self,
        name: str,
        x: jax.Array,
        is_frozen: bool | None = None,
        site: str | None = None,
        source: IntegerSource | None = None,
    ) -> tuple[jax.Array, QParams | None]:
        """Rounds input or output, and moves the range of its word in training.

        Args:
          name: Name of the word.
          x: Real values.
          is_frozen: Whether the range stays; None: as the attribute says.
          site: Name of range and site; None: that of the word.
          source: What integers compute the values from, if they do.

        Returns:
          The value, and its grid where one is known.
        """
        site = name if site is None else site
        is_frozen = self.use_running_average if is_frozen is None else is_frozen
        word, params = self._word(name), None
        if isinstance(word, QSpec):
            calibrator: Any = self.quantizers.calibrator
            kept = self._range(site)
            state = kept.get_value()
            if not is_frozen:
                state = calibrator.update(jax.lax.stop_gradient(x), state, word)
                kept.set_value(state)
            params = calibrator.params(state, word)
        own = site_name(self.site, site)
        if source is not None:
            x = source.on_grid(x, word, params, own)
        if learns(word) and site in self.learned and not is_frozen:
            self._start(site, word, x)
        return on_grid_of(x, word, params, self._rounding(word, site), own)
