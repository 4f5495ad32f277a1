"""Layers for Flax NNX with a product of low rank."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    quantized_weight,
    site_name,
)
from qjax.layers.low_rank import LORA, lora_words, low_rank
from qjax.nnx.layer import QuantizedModule


class QLoRA(QuantizedModule, nnx.LoRA):
    """A `flax.nnx.LoRA` on quantized values; see `LoRAQuantizers`.

    A base module reads the values on the grid of the input.
    """

    base = nnx.LoRA
    words = LORA
    weights = "lora_a", "lora_b"

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., out]``, on other arguments of a base module."""
        x, _ = self._rounded("input", x)
        promote: Any = getattr(self, "promote_dtype", dtypes.promote_dtype)
        matrices = self._matrix("lora_a"), self._matrix("lora_b")
        y, a, b = promote((x, *matrices), dtype=self.dtype)
        found = low_rank(y, a, b, lambda low: self._rounded("low", low)[0])
        if self.base_module is not None:
            module: Any = self.base_module
            if not callable(module):
                raise ValueError(
                    f"`base_module` of {self.site or 'this layer'!r} is called, and "
                    f"{type(module).__name__} has no `__call__`. Leave it out, and add "
                    "both results by `QAdd`."
                )
            found, _ = self._rounded("update", found)
            found = found + self._rounded("base", module(y, *args, **kwargs))[0]
        return self._rounded("output", found)[0]

    def _matrix(self, name: str) -> jax.Array:
        word, value = getattr(self.quantizers, name), getattr(self, name)[...]
        own = self._rounding(word), site_name(self.site, name)
        return quantized_weight(value, word, -1, *own)[0]

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        names = ["input", "low", "output"]
        if self.base_module is not None:
            names += ["base", "update"]
        self._keep(lora_words(quantizers), site, dict.fromkeys(names, 2), rngs)


class QLoRALinear(QuantizedModule, nnx.LoRALinear):
    """A `flax.nnx.LoRALinear` on quantized values; see `LoRAQuantizers`.

    What is trained is up to the filter of the gradient: `flax.nnx.LoRAParam` leaves the
    kernel as it is. The part ``lora`` is a `QLoRA`.
    """

    base = nnx.LoRALinear
    words = LORA

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., out]``."""
        x, grid = self._rounded("input", x)
        found = nnx.Linear.__call__(self._twin(grid), x, *args, **kwargs)
        found, _ = self._rounded("base", found)
        return self._rounded("output", found + self.lora(x))[0]

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        words = lora_words(quantizers)
        names = "input", "base", "output"
        self._keep(words, site, dict.fromkeys(names, 2), rngs)
        part: Any = self.lora
        if type(part) is nnx.LoRA:
            part.__class__ = QLoRA
        inside = dataclasses.replace(words, input=None, output=words.update)
        part._set(inside, site_name(site, "lora"), (2, 2), rngs)

    def _parts(self) -> list[Any]:
        return [self.lora]
