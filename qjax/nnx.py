"""Quantized layers for Flax NNX: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams, QSpec
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


class QuantState(nnx.Variable):
    """The state of a calibrator."""


__all__ = (
    "FLOAT",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QLinear",
    "QLinearGeneral",
    "QuantState",
    "to_float",
    "to_quantized",
)

_WORDS = LayerQuantizers()


class _QuantizedModule(nnx.Module):
    """A layer whose parameters, input and output have quantizers.

    ``model.eval()`` freezes its ranges, ``model.train()`` lets them move.

    Attributes:
      quantizers: The quantizers.
      input_range: State of the calibrator of the input, if its word is a `QSpec`.
      output_range: The same of the output.
      use_running_average: Whether ranges stay as they are.
      site: Prefix of the names of its sites.
    """

    _base: ClassVar[type] = object  # The layer that it replaces.

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
        base: Any = self._base
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
        found = self._base.__call__(self._twin(grid), inputs, *args, **kwargs)
        return self._rounded("output", found)[0]

    def _ranks(self) -> tuple[int, int]:
        """Returns the numbers of axes of input and output."""
        return 2, 2

    def _twin(self, grid: QParams | None) -> Any:
        """Returns the float layer with rounded parameters."""
        words = self.quantizers
        twin: Any = object.__new__(self._base)
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

    def _rounded(self, name: str, x: jax.Array) -> tuple[jax.Array, QParams | None]:
        """Rounds input or output, and moves the range of its word in training."""
        word, params = getattr(self.quantizers, name), None
        if isinstance(word, QSpec):
            calibrator: Any = self.quantizers.calibrator
            kept = getattr(self, f"{name}_range")
            state = kept.get_value()
            if not self.use_running_average:
                state = calibrator.update(jax.lax.stop_gradient(x), state, word)
                kept.set_value(state)
            params = calibrator.params(state, word)
        return on_grid_of(x, word, params, self._key(word), site_name(self.site, name))


class QLinear(_QuantizedModule, nnx.Linear):
    """A `flax.nnx.Linear` on quantized values; see `LayerQuantizers`."""

    _base = nnx.Linear


class QLinearGeneral(_QuantizedModule, nnx.LinearGeneral):
    """A `flax.nnx.LinearGeneral` on quantized values; see `LayerQuantizers`."""

    _base = nnx.LinearGeneral

    def _ranks(self) -> tuple[int, int]:
        return 1 + len(self.in_features), 1 + len(self.out_features)

    def _output_axes(self) -> OutputAxes:
        n = len(self.out_features)
        return -1 if n == 1 else tuple(range(-n, 0))


class QEinsum(_QuantizedModule, nnx.Einsum):
    """A `flax.nnx.Einsum` on quantized values; see `LayerQuantizers`."""

    _base = nnx.Einsum

    def _ranks(self) -> tuple[int, int]:
        operands, _, result = self.einsum_str.replace(" ", "").partition("->")
        return len(operands.partition(",")[0]), len(result)

    def _output_axes(self) -> OutputAxes:
        return einsum_axes(self.einsum_str)


class QConv(_QuantizedModule, nnx.Conv):
    """A `flax.nnx.Conv` on quantized values, of any number of spatial axes.

    ``feature_group_count`` as large as the input's channels makes it depthwise. See
    `LayerQuantizers`.
    """

    _base = nnx.Conv

    def _ranks(self) -> tuple[int, int]:
        return self.kernel[...].ndim, self.kernel[...].ndim


class QConvTranspose(_QuantizedModule, nnx.ConvTranspose):
    """A `flax.nnx.ConvTranspose` on quantized values; see `LayerQuantizers`."""

    _base = nnx.ConvTranspose

    def _ranks(self) -> tuple[int, int]:
        return self.kernel[...].ndim, self.kernel[...].ndim

    def _output_axes(self) -> OutputAxes:
        return -2 if self.transpose_kernel else -1


class QEmbed(_QuantizedModule, nnx.Embed):
    """A `flax.nnx.Embed` whose table has quantized rows; see `LayerQuantizers`.

    The table has one scale: as a kernel of `attend` its rows are output channels.
    """

    _base = nnx.Embed

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Multiplies a query, on the grid of the input, with all rows."""
        query, grid = self._rounded("input", query)
        return nnx.Embed.attend(self._twin(grid), query, *args, **kwargs)

    def _output_axes(self) -> OutputAxes:
        return None


class QActivation(_QuantizedModule):
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


_TWINS: dict[type, type[_QuantizedModule]] = {
    cls._base: cls
    for cls in (QLinear, QLinearGeneral, QEinsum, QConv, QConvTranspose, QEmbed)
}
Chooser = Callable[[str, nnx.Module], LayerQuantizers | None]


def to_quantized(
    model: nnx.Module,
    quantizers: LayerQuantizers | Chooser = _WORDS,
    *,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Turns the layers of a model into quantized ones, in place.

    Parameters stay as they are; sites are named by the path of a layer. Layers that are
    of a subclass, or have no quantized form, stay.

    Args:
      model: Any module, also a layer itself.
      quantizers: The quantizers of all layers, or a function of path and layer that
        returns them, or None for a layer that stays in float.
      rngs: Keys; the stream ``quant`` is for words that draw at random.

    Returns:
      The model.

    Raises:
      ValueError: for a model without a layer to turn; nothing is changed then.
    """
    found = {id(m): (path, m) for path, m in nnx.iter_modules(model)}
    chosen = []
    for path, layer in found.values():
        if type(layer) in _TWINS:
            site = "/".join(map(str, path))
            own = quantizers(site, layer) if callable(quantizers) else quantizers
            if own is not None:
                own.check(site)
                chosen.append((layer, own, site))
    if not chosen:
        names = ", ".join(cls.__name__ for cls in _TWINS)
        raise ValueError(
            f"The model has no layer to quantize: none of {names} for which there are "
            "quantizers. `qjax.quantize_model` takes any function."
        )
    keys = nnx.Rngs() if rngs is None else rngs
    try:
        for layer, own, site in chosen:
            twin: Any = layer
            twin.__class__ = _TWINS[type(layer)]
            twin._set(own, site, twin._ranks(), keys)
    except Exception:
        for layer, *_ in chosen:
            _turn_back(layer)
        raise
    return model


def to_float(model: nnx.Module) -> nnx.Module:
    """Turns the quantized layers of a model into those of Flax, in place.

    Parameters stay as they are; ranges are dropped.

    Args:
      model: Any module, also a layer itself.

    Returns:
      The model.
    """
    layers: list[Any] = [m for _, m in nnx.iter_modules(model)]
    for layer in {id(m): m for m in layers}.values():
        _turn_back(layer)
    return model


def _turn_back(layer: Any) -> None:
    """Makes a quantized layer the one of Flax again; others stay."""
    if isinstance(layer, _QuantizedModule) and type(layer)._base in _TWINS:
        base = type(layer)._base
        for name in filter(vars(layer).__contains__, _ADDED):
            delattr(layer, name)
        layer.__class__ = base


_ADDED = "quantizers site input_range output_range keys use_running_average".split()
