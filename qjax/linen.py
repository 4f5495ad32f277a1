"""Quantized layers for Flax Linen: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.layers.layer_quantizers import (
    FLOAT,
    LayerQuantizers,
    LayerWord,
    OutputAxes,
    on_grid_of,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.layers.output_axes import einsum_axes
from qjax.schemes.words import is_random

__all__ = (
    "FLOAT",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvLocal",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
)

_WORDS = {"kernel": "kernel", "embedding": "kernel", "bias": "bias"}


class _QuantizedLayer(nn.Module, kw_only=True):
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
        if name not in _WORDS or self.is_initializing():
            return value
        word, site = getattr(self._words, _WORDS[name]), self._site(name)
        if name == "bias":
            grids = self._grids.get("input"), self._grids.get("kernel")
            return quantized_bias(value, word, grids, site)
        axis = self._output_axes(value.ndim)
        value, grid = quantized_weight(value, word, axis, self._key(word), site)
        self._grids["kernel"] = grid
        return value

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        """Returns the axes of a weight that are its output channels."""
        return -1

    @nn.nowrap
    def _site(self, name: str) -> str:
        return site_name("/".join(self.path), name)

    @nn.nowrap
    def _key(self, word: Any) -> Any:
        is_drawn = is_random(word) and self.has_rng("quant")
        return self.make_rng("quant") if is_drawn else None

    @nn.nowrap
    def _range(self, name: str, x: jax.Array) -> Any:
        """Returns the state of the calibrator of input or output."""
        init: Any = self._words.calibrator.init
        return self.variable("quant", name, init, x, getattr(self._words, name))

    @nn.nowrap
    def _rounded(self, name: str, x: jax.Array, train: bool | None) -> jax.Array:
        """Rounds input or output, and moves the range of its word in training."""
        word, params = getattr(self._words, name), None
        if isinstance(word, QSpec):
            calibrator: Any = self._words.calibrator
            state = self._range(name, x)
            if self.is_initializing():
                return x
            train = self.train if train is None else train
            if self.is_mutable_collection("quant") if train is None else train:
                seen = jax.lax.stop_gradient(x)
                state.value = calibrator.update(seen, state.value, word)
            params = calibrator.params(state.value, word)
        elif self.is_initializing():
            return x
        x, grid = on_grid_of(x, word, params, self._key(word), self._site(name))
        self._grids[name] = grid
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


class QDense(_QuantizedLayer, nn.Dense):
    """A `flax.linen.Dense` on quantized values; see `LayerQuantizers`."""


class QDenseGeneral(_QuantizedLayer, nn.DenseGeneral):
    """A `flax.linen.DenseGeneral` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        features = self.features
        n = 1 if isinstance(features, int) else len(features)
        return -1 if n == 1 else tuple(range(-n, 0))


class QEinsum(_QuantizedLayer, nn.Einsum):
    """A `flax.linen.Einsum` on quantized values; see `LayerQuantizers`."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, einsum_str: str | None = None, **kwargs: Any
    ) -> jax.Array:
        """Contracts input and kernel."""
        formula = nn.merge_param("einsum_str", self.einsum_str, einsum_str)
        object.__setattr__(self, "_axes", einsum_axes(formula))
        return super().__call__(inputs, einsum_str, **kwargs)

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return self._axes


class QConv(_QuantizedLayer, nn.Conv):
    """A `flax.linen.Conv` on quantized values, of any number of spatial axes.

    ``feature_group_count`` as large as the input's channels makes it depthwise. See
    `LayerQuantizers`.
    """


class QConvLocal(_QuantizedLayer, nn.ConvLocal):
    """A `flax.linen.ConvLocal` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None


class QConvTranspose(_QuantizedLayer, nn.ConvTranspose):
    """A `flax.linen.ConvTranspose` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return -2 if self.transpose_kernel else -1


class QEmbed(_QuantizedLayer, nn.Embed):
    """A `flax.linen.Embed` whose table has quantized rows; see `LayerQuantizers`.

    The table has one scale: as a kernel of `attend` its rows are output channels.
    """

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None

    def setup(self):
        """Makes the table, and the ranges of what the two methods read and return."""
        self._begin()
        super().setup()
        row = jnp.zeros((1, self.features))
        names = [
            n for n in ("input", "output") if isinstance(getattr(self._words, n), QSpec)
        ]
        made = super()._range
        object.__setattr__(self, "_ranges", {name: made(name, row) for name in names})

    @nn.nowrap
    def _range(self, name: str, x: jax.Array) -> Any:
        return self._ranges[name]

    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Maps integers to rows of the table; ``train`` moves ranges."""
        return self._rounded("output", super().__call__(inputs), train)

    def attend(self, query: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        return super().attend(self._rounded("input", query, train))


class QActivation(_QuantizedLayer):
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
