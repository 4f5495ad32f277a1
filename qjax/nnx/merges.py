"""Layers for Flax NNX that join several values."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.nnx.layer import QuantizedModule, QuantState

_OUTPUT = LayerQuantizers(None, None, None, QSpec(8))


class _Merge(QuantizedModule):
    """A function of several values between their quantizers."""

    def __init__(
        self,
        *,
        quantizers: LayerQuantizers = _OUTPUT,
        inputs: int = 2,
        rank: int = 2,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          quantizers: The quantizers; each value has the word of the input.
          inputs: Number of values, where that word is a `QSpec`, which has a range.
          rank: Number of axes of the values, for ranges by axis.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for a word that draws at random.
        """
        self._set(quantizers, site, (rank, rank), nnx.Rngs() if rngs is None else rngs)
        if isinstance(quantizers.input, QSpec):
            kept: Any = vars(self)["input_range"]
            for k in range(inputs):
                state = jax.tree.map(jnp.copy, kept.get_value())
                setattr(self, f"input_{k}_range", QuantState(state))
            self.input_range = nnx.data(None)

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Joins values."""
        values = [
            self._rounded("input", x, site=f"input_{k}")[0]
            for k, x in enumerate(inputs)
        ]
        return self._rounded("output", self._joined(values))[0]

    def _joined(self, values: list[jax.Array]) -> jax.Array:
        raise NotImplementedError


class QAdd(_Merge):
    """The sum of values, each with the word of the input, and that of the output."""

    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return functools.reduce(operator.add, values)


class QMultiply(_Merge):
    """The product of values, each with the word of the input."""

    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return functools.reduce(operator.mul, values)


class QConcatenate(_Merge):
    """Values one behind the other, on the one grid of the output."""

    def __init__(
        self,
        axis: int = -1,
        *,
        quantizers: LayerQuantizers = _OUTPUT,
        inputs: int = 2,
        rank: int = 2,
        site: str = "",
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the layer.

        Args:
          axis: Axis that values follow each other along.
          quantizers: The quantizers; each value has the word of the input.
          inputs: Number of values, where that word is a `QSpec`, which has a range.
          rank: Number of axes of the values, for ranges by axis.
          site: Prefix of the names of its sites.
          rngs: Keys; the stream ``quant`` is for a word that draws at random.
        """
        super().__init__(
            quantizers=quantizers, inputs=inputs, rank=rank, site=site, rngs=rngs
        )
        self.axis = axis

    def _joined(self, values: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(values, self.axis)
