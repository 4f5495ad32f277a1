"""Attention layers for Flax NNX."""

from typing import Any

import jax
from flax import nnx

from qjax.layers.attention import (
    ATTENTION,
    RoundedAttention,
    attention_words,
    check_functions,
    is_plain,
    words_of_parts,
)
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import LayerQuantizers, site_name
from qjax.nnx.layer import QuantizedModule
from qjax.nnx.norms import QLayerNorm
from qjax.nnx.products import QLinearGeneral

_TWINS: dict[type, type[QuantizedModule]] = {
    cls.base: cls for cls in (QLinearGeneral, QLayerNorm)
}


class QMultiHeadAttention(QuantizedModule, nnx.MultiHeadAttention):
    """A `flax.nnx.MultiHeadAttention` on quantized values, in the call of Flax itself.

    Its projections are `QLinearGeneral`, their normalisations `QLayerNorm`. See
    `qjax.layers.attention.AttentionQuantizers`.
    """

    base = nnx.MultiHeadAttention
    words = ATTENTION

    def __call__(  # type: ignore[override]
        self, inputs_q: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Runs the attention of Flax between quantizers."""
        words: Any = self.quantizers
        if is_plain(words):
            return nnx.MultiHeadAttention.__call__(self, inputs_q, *args, **kwargs)
        is_own = self.attention_fn is not nnx.dot_product_attention
        check_functions(self.site, is_own)
        twin: Any = object.__new__(nnx.MultiHeadAttention)
        vars(twin).update(vars(self))
        sow = lambda x: self.sow(nnx.Intermediate, "attention_weights", x)
        vars(twin)["attention_fn"] = RoundedAttention(
            words, self._rounded_as, sow, self.site
        )
        return twin(inputs_q, *args, **kwargs)

    def _rounded_as(self, name: str, x: jax.Array, source: IntegerSource | None) -> Any:
        return self._rounded(name, x, source=source)

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        words = attention_words(quantizers)
        self._keep(words, site, dict.fromkeys(("scores", "probabilities"), 4), rngs)
        for name, own in words_of_parts(words, self.normalize_qk).items():
            part: Any = getattr(self, name)
            if type(part) in _TWINS:
                part.__class__ = _TWINS[type(part)]
                part._set(own, site_name(site, name), part._ranks(), rngs)

    def _parts(self) -> list[Any]:
        return [getattr(self, name) for name in words_of_parts(ATTENTION, True)]
