"""A layer for Flax Linen with a product of low rank beside its kernel."""

from typing import Any

import jax
from flax import linen as nn

from qjax.layers.low_rank import LORA, LoRAQuantizers, lora_words, low_rank
from qjax.linen.layer import QuantizedLayer

_A_INIT = nn.initializers.he_uniform()
_B_INIT = nn.initializers.zeros_init()
_MATRICES = "lora_a", "lora_b"


class QLoRADense(QuantizedLayer, nn.Dense, kw_only=True):
    """A `flax.linen.Dense` and a product of low rank, on quantized values.

    Flax's Linen has none; `flax.nnx.LoRALinear` is its twin. Parameters ``kernel`` and
    ``bias`` are those of a dense layer. An optimizer that leaves them out freezes them.
    See `LoRAQuantizers`.

    Attributes:
      lora_rank: Size between the two matrices.
      a_initializer: Initializer of the first matrix.
      b_initializer: Initializer of the second.
    """

    quantizers: LoRAQuantizers = LORA
    lora_rank: int
    a_initializer: Any = _A_INIT
    b_initializer: Any = _B_INIT

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, *, train: bool | None = None
    ) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., features]``; ``train`` moves ranges."""
        self._begin(lora_words(self.quantizers))
        x = self._rounded("input", inputs, train)
        base = self._rounded("base", nn.Dense.__call__(self, x), train)
        shape = x.shape[-1], self.lora_rank
        a = self.param("lora_a", self.a_initializer, shape, self.param_dtype)
        shape = self.lora_rank, self.features
        b = self.param("lora_b", self.b_initializer, shape, self.param_dtype)
        x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=self.dtype)
        update = low_rank(x, a, b, lambda y: self._rounded("low", y, train))
        update = self._rounded("update", update, train)
        return self._rounded("output", base + update, train)

    @nn.nowrap
    def _role(self, name: str) -> str | None:
        return name if name in _MATRICES else super()._role(name)
