"""Attention whose scores and probabilities are rounded.

    scores = query . key                                   on the grid of its word
    probabilities = softmax(scores / sqrt(depth))          of what a mask keeps, too
    result = probabilities . value

The square root is a factor inside of the softmax, so that scores are sums of products
of codes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    LayerWord,
    as_layer_word,
    site_name,
)
from qjax.layers.norms import NORM
from qjax.layers.softmax import masks, softmax_source
from qjax.quantizers.spec import Spec
from qjax.schemes.words import check_site_word

_OWN = "query", "key", "value", "scores", "probabilities"
PROJECTIONS = "query", "key", "value", "out"
QK_NORMS = "query_ln", "key_ln"


@dataclasses.dataclass(frozen=True)
class AttentionQuantizers(LayerQuantizers):
    """The quantizers of an attention layer.

    Attributes:
      input: Word of what each of its four products with a kernel reads.
      kernel: Word of their kernels.
      bias: Word of their biases.
      output: Word of the output.
      calibrator: Calibrator that finds the ranges.
      query: Word of queries, behind their normalisation if they have one.
      key: Word of keys, likewise.
      value: Word of values.
      scores: Word of the products of queries and keys, over the depth alone.
      probabilities: Word of the softmax.
    """

    output: LayerWord = QSpec(8)
    query: LayerWord = QSpec(8)
    key: LayerWord = QSpec(8)
    value: LayerWord = QSpec(8)
    scores: LayerWord = QSpec(8)
    probabilities: LayerWord = QSpec(8)

    def __post_init__(self):
        super().__post_init__()
        for name in _OWN:
            object.__setattr__(self, name, as_layer_word(name, getattr(self, name)))

    def check(self, path: str) -> None:
        """Raises for a word that cannot hold the values of its site.

        Args:
          path: Path of the layer, for the message.
        """
        super().check(path)
        for name in _OWN:
            word = getattr(self, name)
            if isinstance(word, QSpec | Spec):
                check_site_word(site_name(path, name), "activation", word)


ATTENTION = AttentionQuantizers()


def attention_words(words: LayerQuantizers) -> AttentionQuantizers:
    """Returns the quantizers of attention; those of a plain layer are completed.

    Its word of the input is that of all activations inside.
    """
    if isinstance(words, AttentionQuantizers):
        return words
    names = "input", "kernel", "bias", "output", "calibrator", "estimator"
    own = {name: getattr(words, name) for name in names}
    return AttentionQuantizers(**own, **dict.fromkeys(_OWN, words.input))


def words_of_parts(
    words: AttentionQuantizers, is_normalised: bool
) -> dict[str, LayerQuantizers]:
    """Returns the quantizers of the layers inside of attention, by name.

    Args:
      words: The quantizers of attention.
      is_normalised: Whether queries and keys are normalised.
    """
    names = "input", "kernel", "bias", "calibrator", "estimator"
    own = {name: getattr(words, name) for name in names}
    found = {}
    for name in PROJECTIONS:
        output = words.output if name == "out" else getattr(words, name)
        if is_normalised and name in ("query", "key"):
            output = None  # That of the normalisation.
        found[name] = LayerQuantizers(**own, output=output)
    for name in QK_NORMS if is_normalised else ():
        word: Any = getattr(words, name.partition("_")[0])
        wide, norm = word, NORM.input
        if isinstance(word, QSpec):
            assert isinstance(norm, QSpec)
            wide = dataclasses.replace(word, bits=norm.bits)
        ends = {"input": wide, "kernel": None, "bias": None, "output": word}
        found[name] = LayerQuantizers(**{**own, **ends})
    return found


def is_plain(words: AttentionQuantizers) -> bool:
    """Returns whether scores and probabilities have no words."""
    return words.scores is None and words.probabilities is None


def check_functions(path: str, is_own: bool) -> None:
    """Raises for attention by a function of its own, which has words.

    Args:
      path: Path of the layer, for the message.
      is_own: Whether the layer has such a function.
    """
    if is_own:
        raise ValueError(
            f"The attention at {path or 'this layer'!r} has a function of its own "
            "(`attention_fn`, or the class of an einsum), and words of scores and "
            "probabilities. Leave the function out, or use "
            "`AttentionQuantizers(scores=None, probabilities=None)`."
        )


Rounded = Callable[[str, jax.Array, IntegerSource | None], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class RoundedAttention:
    """Attention between quantizers, in place of Flax's `dot_product_attention`.

    Attributes:
      words: The quantizers.
      rounded: Function of the name of a word, real values and what integers compute
        them from, which returns values and their grid, if one is known.
      sow: Function that keeps the probabilities where Flax's sows them.
      path: Path of the layer.
    """

    words: AttentionQuantizers
    rounded: Rounded
    sow: Callable[[jax.Array], Any]
    path: str = ""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> jax.Array:
        """Computes attention; arguments are those of Flax's function.

        Args:
          query: ``[..., length, heads, depth]``.
          key: ``[..., places, heads, depth]``, or fewer heads, each for some of the
            query's.
          value: ``[..., places, heads, channels]``, likewise.
          mask: What is kept; broadcasts to ``[..., heads, length, places]``.
          dropout_rng: Key of the dropout.
          dropout_rate: Share of the probabilities that become 0.
          broadcast_dropout: Whether these are the same along batch and heads.
          deterministic: Whether none does.
          dtype: Type that is computed in; None for that of the operands.
          precision: Precision of the products.
          module: Module that keeps the probabilities, or None.
          is_causal: Whether no place sees a later one.

        Returns:
          ``[..., length, heads, channels]``.
        """
        kind = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (x.astype(kind) for x in (query, key, value))
        wide = jnp.promote_types(kind, jnp.float32)
        options = {"precision": precision, "preferred_element_type": wide}
        raw = _scores(query, key, **options)
        scores, grid = self.rounded("scores", raw, None)
        mask = _joined(mask, is_causal, scores.shape[-2:])
        factor = 1 / math.sqrt(query.shape[-1])
        logits = scores * np.float32(factor)
        if mask is not None:
            (kept,) = masks(mask, scores.ndim)
            logits = jnp.where(kept, logits, jnp.finfo(wide).min)
        source = softmax_source(
            scores,
            self.words.scores,
            grid,
            where=mask,
            factor=factor,
            empty="uniform",
            site=site_name(self.path, "scores"),
        )
        shares = jax.nn.softmax(logits)
        shares, _ = self.rounded("probabilities", shares, source)
        shares = shares.astype(kind)
        if module is not None:
            self.sow(shares)
        if not deterministic and dropout_rate > 0:
            size = shares.shape
            if broadcast_dropout:
                size = (1,) * (len(size) - 2) + size[-2:]
            keep = 1 - dropout_rate
            kept = jax.random.bernoulli(dropout_rng, keep, size)
            shares = shares * (kept.astype(kind) / jnp.asarray(keep, kind))
        return _mean_values(shares, value, **options).astype(kind)


def _scores(query: jax.Array, key: jax.Array, **options: Any) -> jax.Array:
    """Returns products ``[..., heads, length, places]``; heads may share a key."""
    heads, groups = query.shape[-2], key.shape[-2]
    if heads == groups:
        return jnp.einsum("...qhd,...khd->...hqk", query, key, **options)
    query = query.reshape(*query.shape[:-2], groups, heads // groups, query.shape[-1])
    found = jnp.einsum("...qhgd,...khd->...hgqk", query, key, **options)
    return found.reshape(*found.shape[:-4], heads, *found.shape[-2:])


def _mean_values(shares: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Returns sums ``[..., length, heads, channels]``; heads may share a value."""
    heads, groups = shares.shape[-3], value.shape[-2]
    if heads == groups:
        return jnp.einsum("...hqk,...khd->...qhd", shares, value, **options)
    shares = shares.reshape(
        *shares.shape[:-3], groups, heads // groups, *shares.shape[-2:]
    )
    found = jnp.einsum("...hgqk,...khd->...qhgd", shares, value, **options)
    return found.reshape(*found.shape[:-3], heads, value.shape[-1])


def _joined(
    mask: jax.Array | None, is_causal: bool, lengths: tuple[int, ...]
) -> jax.Array | None:
    """Returns a mask that is causal too, as truth values."""
    if not is_causal:
        return mask
    causal = np.tril(np.ones(lengths, bool))
    return jnp.asarray(causal) if mask is None else (mask != 0) & causal
