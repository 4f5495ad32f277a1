"""Layers for Flax Linen that join several values."""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.linen.layer import QuantizedLayer

_OUTPUT = LayerQuantizers(None, None, None, QSpec(8))


class _Merge(QuantizedLayer, kw_only=True):
    """A function of several values between their quantizers."""

    quantizers: LayerQuantizers = _OUTPUT

    @nn.compact
    def __call__(  # type: ignore[override]
        self, *inputs: jax.Array, train: bool | None = None
    ) -> jax.Array:
        """Joins values; ``train`` moves ranges, None: as the attribute says."""
        self._begin()
        values = [
            self._rounded("input", x, train, site=f"input_{k}")
            for k, x in enumerate(inputs)
        ]
        return self._rounded("output", self._joined(values), train)

    @nn.nowrap
    def _joined(self, values: list[jax.Array]) -> jax.Array:
        raise NotImplementedError


class QAdd(_Merge):
    """The sum of values, each with the word of the input, and that of the output."""

    @nn.nowrap
    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return functools.reduce(operator.add, values)


class QMultiply(_Merge):
    """The product of values, each with the word of the input."""

    @nn.nowrap
    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return functools.reduce(operator.mul, values)


class QConcatenate(_Merge):
    """Values one behind the other, on the one grid of the output.

    Attributes:
      axis: Axis that they follow each other along.
    """

    axis: int = -1

    @nn.nowrap
    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(values, self.axis)
