"""Layers for Flax NNX that normalise: a softmax, and by the moments of groups."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    OutputAxes,
    quantized_bias,
    quantized_weight,
    site_name,
)
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
from qjax.nnx.layer import QuantizedModule


class QuantizedNorm(QuantizedModule):
    """A normalisation of a value on a grid, computed in the integers that ship.

    Its input has 16 bits by default, its output 8. It is in float, and does not lower,
    where one of these words is no `QSpec` of one scale, and with an ``axis_name``.
    Where a ``mask`` keeps nothing of a group its result is the bias.
    """

    words = NORM

    def __call__(self, inputs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises an input on its grid.

        Args:
          inputs: Input of the layer of Flax.
          mask: Truth values of the places that the moments are of; None for all.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            found = self.base.__call__(self._twin(None), inputs, mask=mask)
            return self._rounded("output", found)[0]
        # Half precision does not hold 16 bits.
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        (x, grid), own = self._rounded("input", wide), self._twin(None)
        geometry, of_all = self._geometry(inputs.shape), mask
        if own.axis_name is None:  # Else others may keep what this device does not.
            of_all = finite_mask(mask, inputs.shape, geometry)
        found = self.base.__call__(own, x.astype(inputs.dtype), mask=of_all)
        source, known = None, [getattr(own, n, None) for n in ("scale", "bias")]
        gain, offset = (None if v is None else v[...] for v in known)
        if own.axis_name is None:
            source = norm_source(
                x,
                self.quantizers.input,
                grid,
                geometry,
                epsilon=own.epsilon,
                gain=gain,
                offset=offset,
                site=site_name(self.site, "input"),
                mask=mask,
            )
            found = defined(found, mask, geometry, offset)
        return self._rounded("output", found, source=source)[0]

    def _output_axes(self) -> OutputAxes:
        return None

    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        """Returns the groups, and the axes of gain and offset."""
        own: Any = self
        return layer_geometry(shape, own.reduction_axes, own.feature_axes)

    def _twin(self, grid: QParams | None) -> Any:
        """Returns the float layer with rounded gain and offset."""
        words, own = self.quantizers, vars(self)
        twin: Any = object.__new__(self.base)
        vars(twin).update(own)
        if (gain := own.get("scale")) is not None:
            how, site = self._rounding(words.kernel), site_name(self.site, "scale")
            value, _ = quantized_weight(gain[...], words.kernel, None, how, site)
            vars(twin)["scale"] = nnx.Param(value)
        if (offset := own.get("bias")) is not None:
            none, site = (None, None), site_name(self.site, "bias")
            value = quantized_bias(offset[...], words.bias, none, site)
            vars(twin)["bias"] = nnx.Param(value)
        return twin


class QLayerNorm(QuantizedNorm, nnx.LayerNorm):
    """A `flax.nnx.LayerNorm` on quantized values; see `LayerQuantizers`."""

    base = nnx.LayerNorm


class QRMSNorm(QuantizedNorm, nnx.RMSNorm):
    """A `flax.nnx.RMSNorm` on quantized values; see `LayerQuantizers`."""

    base = nnx.RMSNorm

    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        return layer_geometry(shape, self.reduction_axes, self.feature_axes, False)


class QGroupNorm(QuantizedNorm, nnx.GroupNorm):
    """A `flax.nnx.GroupNorm` on quantized values; see `LayerQuantizers`."""

    base = nnx.GroupNorm

    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        return group_geometry(shape, self.reduction_axes, self.num_groups)


class QInstanceNorm(QuantizedNorm, nnx.InstanceNorm):
    """A `flax.nnx.InstanceNorm` on quantized values; see `LayerQuantizers`."""

    base = nnx.InstanceNorm

    def _geometry(self, shape: Sequence[int]) -> NormGeometry:
        return instance_geometry(shape, self.feature_axes)


class QSoftmax(QuantizedModule):
    """A `jax.nn.softmax` of a value on a grid, in the integers that ship."""

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        *,
        quantizers: LayerQuantizers = SOFTMAX,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          axis: Axis or axes that the sums go over.
          quantizers: The quantizers, of input and output.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
        """
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self._set(quantizers, site, (2, 2), nnx.Rngs() if rngs is None else rngs)

    def __call__(
        self, inputs: jax.Array, *, where: jax.Array | None = None
    ) -> jax.Array:
        """Returns the shares of what ``where`` keeps; all are 0 where it keeps none."""
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        x, grid = self._rounded("input", wide)
        found = jax.nn.softmax(x.astype(inputs.dtype), self.axis, where)
        site = site_name(self.site, "input")
        options: Any = {"axes": self.axis, "where": where, "site": site}
        source = softmax_source(x, self.quantizers.input, grid, **options)
        return self._rounded("output", found, source=source)[0]
