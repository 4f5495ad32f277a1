"""Attention layers for Flax Linen."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from qjax.layers.attention import (
    ATTENTION,
    RoundedAttention,
    attention_words,
    check_functions,
    is_plain,
    words_of_parts,
)
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.linen.layer import QuantizedLayer
from qjax.linen.norms import QLayerNorm
from qjax.linen.products import QDenseGeneral

_TWINS: dict[type, type[QuantizedLayer]] = {
    nn.DenseGeneral: QDenseGeneral,
    nn.LayerNorm: QLayerNorm,
}


class QuantizedAttention(QuantizedLayer, kw_only=True):
    """Attention on quantized values, in the call of Flax itself.

    Its projections are `QDenseGeneral`, their normalisations `QLayerNorm`. See
    `qjax.layers.attention.AttentionQuantizers`.
    """

    quantizers: LayerQuantizers = ATTENTION

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs_q: jax.Array, *args: Any, train: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        """Runs the attention of Flax between quantizers.

        Args:
          inputs_q: Queries, ``[..., length, features]``.
          *args: Other arguments of the layer of Flax.
          train: Whether ranges move; None: what the attribute says.
          **kwargs: Other arguments of that layer.
        """
        own: Any = self
        words, given = attention_words(self.quantizers), own.attention_fn
        self._begin(words)
        parts = words_of_parts(words, own.normalize_qk)
        train = self.train if train is None else train
        try:
            if not is_plain(words):
                attend = self._attention(words, train)
                object.__setattr__(self, "attention_fn", attend)
            with nn.intercept_methods(_Parts(self, parts, train)):
                return super(QuantizedLayer, own).__call__(inputs_q, *args, **kwargs)
        finally:
            object.__setattr__(self, "attention_fn", given)

    @nn.nowrap
    def _attention(self, words: Any, train: bool | None) -> RoundedAttention:
        own: Any = self
        einsums = own.qk_attn_weights_einsum_cls, own.attn_weights_value_einsum_cls
        is_own = own.attention_fn is not nn.dot_product_attention
        path = "/".join(self.path)
        check_functions(path, is_own or einsums != (None, None))

        def rounded(name: str, x: jax.Array, source: IntegerSource | None) -> Any:
            found = self._rounded(name, x, train, source=source)
            return found, self._grids.get(name)

        sow = lambda x: self.sow("intermediates", "attention_weights", x)
        return RoundedAttention(words, rounded, sow, path)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """An interceptor of methods that has parts of a layer run as quantized ones.

    Attributes:
      layer: The layer.
      words: Name of a part -> its quantizers.
      train: Whether their ranges move.
    """

    layer: nn.Module
    words: dict[str, LayerQuantizers]
    train: bool | None

    def __call__(self, run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs the method of a part, or the call of its quantized twin."""
        part = context.module
        words = self.words.get(part.name)
        is_part = part.parent is self.layer and context.method_name == "__call__"
        if not is_part or words is None or type(part) not in _TWINS or words == FLOAT:
            return run(*args, **kwargs)
        own = [f.name for f in dataclasses.fields(part) if f.init]
        fields = {name: getattr(part, name) for name in own}
        fields |= {"parent": part.scope, "name": None}
        cls: Any = _TWINS[type(part)]
        twin = cls(**fields, quantizers=words, train=self.train)
        return twin(*args, **kwargs)


class QMultiHeadDotProductAttention(
    QuantizedAttention, nn.MultiHeadDotProductAttention
):
    """A `flax.linen.MultiHeadDotProductAttention` on quantized values."""


class QMultiHeadAttention(QuantizedAttention, nn.MultiHeadAttention):
    """A `flax.linen.MultiHeadAttention` on quantized values."""


class QSelfAttention(QuantizedAttention, nn.SelfAttention):
    """A `flax.linen.SelfAttention` on quantized values."""
