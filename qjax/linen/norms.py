"""Layers for Flax Linen that normalise: a softmax, and by the moments of groups."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.layers.layer_quantizers import LayerQuantizers, OutputAxes
from qjax.layers.norms import (
    NORM,
    NormGeometry,
    defined,
    finite_mask,
    group_geometry,
    instance_geometry,
    layer_geometry,
    norm_source,
)
from qjax.layers.softmax import SOFTMAX, softmax_source
from qjax.linen.layer import QuantizedLayer


class QuantizedNorm(QuantizedLayer, kw_only=True):
    """A normalisation of a value on a grid, computed in the integers that ship.

    Its input has 16 bits by default, its output 8. It is in float, and does not lower,
    where one of these words is no `QSpec` of one scale, and with an ``axis_name``.
    Where a ``mask`` keeps nothing of a group its result is the bias.
    """

    quantizers: LayerQuantizers = NORM

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *args: Any, **kw: Any):
        """Returns gain or offset, rounded by the word of the kernel or of the bias."""
        value = super().param(name, init_fn, *args, **kw)
        self._known[name] = value
        return value

    @nn.nowrap
    def _output_axes(self, ndim: int) -> OutputAxes:
        return None

    @nn.nowrap
    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        """Returns the groups, and the axes of gain and offset."""
        own: Any = self
        return layer_geometry(shape, own.reduction_axes, own.feature_axes)

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        train: bool | None = None,
    ) -> jax.Array:
        """Normalises an input on its grid.

        Args:
          inputs: Input of the layer of Flax.
          mask: Truth values of the places that the moments are of; None for all.
          train: Whether ranges move; None: what the attribute says.
        """
        self._begin()
        object.__setattr__(self, "_known", {})
        own: Any = self
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            found = super(QuantizedLayer, own).__call__(inputs, mask=mask)
            return self._rounded("output", found, train)
        # Half precision does not hold 16 bits.
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        x = self._rounded("input", wide, train)
        geometry, of_all = self._geometry(inputs.shape), mask
        if own.axis_name is None:  # Else others may keep what this device does not.
            of_all = finite_mask(mask, inputs.shape, geometry)
        found = super(QuantizedLayer, own).__call__(x.astype(inputs.dtype), mask=of_all)
        source = None
        if own.axis_name is None:
            source = norm_source(
                x,
                self._words.input,
                self._grids.get("input"),
                geometry,
                epsilon=own.epsilon,
                gain=self._known.get("scale"),
                offset=self._known.get("bias"),
                site=self._site("input"),
                mask=mask,
            )
            found = defined(found, mask, geometry, self._known.get("bias"))
        return self._rounded("output", found, train, source=source)


class QLayerNorm(QuantizedNorm, nn.LayerNorm):
    """A `flax.linen.LayerNorm` on quantized values; see `LayerQuantizers`."""


class QRMSNorm(QuantizedNorm, nn.RMSNorm):
    """A `flax.linen.RMSNorm` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        return layer_geometry(shape, self.reduction_axes, self.feature_axes, False)


class QGroupNorm(QuantizedNorm, nn.GroupNorm):
    """A `flax.linen.GroupNorm` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        groups = self.num_groups
        if self.group_size is not None:
            groups = shape[-1] // self.group_size
        assert groups is not None
        return group_geometry(shape, self.reduction_axes, groups)


class QInstanceNorm(QuantizedNorm, nn.InstanceNorm):
    """A `flax.linen.InstanceNorm` on quantized values; see `LayerQuantizers`."""

    @nn.nowrap
    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        return instance_geometry(shape, self.feature_axes)


class QSoftmax(QuantizedLayer):
    """A `jax.nn.softmax` of a value on a grid, in the integers that ship.

    Attributes:
      axis: Axis or axes that the sums go over.
    """

    axis: int | Sequence[int] = -1
    quantizers: LayerQuantizers = dataclasses.field(default=SOFTMAX, kw_only=True)

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        inputs: jax.Array,
        *,
        where: jax.Array | None = None,
        train: bool | None = None,
    ) -> jax.Array:
        """Returns the shares of what ``where`` keeps; all are 0 where it keeps none."""
        self._begin()
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        x = self._rounded("input", wide, train)
        found = jax.nn.softmax(x.astype(inputs.dtype), self.axis, where)
        word, grid = self._words.input, self._grids.get("input")
        options: Any = {"axes": self.axis, "where": where, "site": self._site("input")}
        source = softmax_source(x, word, grid, **options)
        return self._rounded("output", found, train, source=source)
