"""Models of texts: BERT, GPT, a decoder as later ones are, cross-attention."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import Member, from_linen, from_nnx, tokens

VOCABULARY = 64


class BertBlock(nnx.Module):
    """Attention and MLP; LayerNorm after each sum."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        linear = lambda n, m: nnx.Linear(n, m, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            linear(width, width) for _ in range(4)
        )
        self.widen, self.narrow = linear(width, 2 * width), linear(2 * width, width)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.heads = heads

    def attend(self, x, mask):
        split = lambda y: y.reshape((*y.shape[:2], self.heads, -1))
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        shares = nnx.softmax(scores + mask)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape))

    def __call__(self, x, mask):
        x = self.norm1(x + self.attend(x, mask))
        y = nnx.gelu(self.widen(x), approximate=False)
        return self.norm2(x + self.narrow(y))


class Bert(nnx.Module):
    """Devlin et al., 2018, section 3 (arXiv:1810.04805): hidden states, pooled one.

    The mask, 0 or -1e9, is added to the scores.
    """

    def __init__(
        self, rngs: nnx.Rngs, width: int = 32, heads: int = 4, length: int = 12
    ):
        table = lambda rows: nnx.Embed(
            rows, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.token, self.position, self.type = (
            table(VOCABULARY),
            table(length),
            table(2),
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-12, rngs=rngs)
        self.blocks = nnx.List([BertBlock(width, heads, rngs) for _ in range(2)])
        self.pooler = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, ids, types, mask):
        positions = self.position(jnp.arange(ids.shape[1]))[None]
        x = self.norm(self.token(ids) + positions + self.type(types))
        for block in self.blocks:
            x = block(x, mask)
        return x, jnp.tanh(self.pooler(x[:, 0]))


def bert() -> Member:
    ids = tokens((8, 12), VOCABULARY)
    places, lengths = np.arange(12), np.arange(5, 13)[:, None]
    types = np.int32(2 * places >= lengths)  # The second of two sentences.
    mask = np.float32(np.where(places < lengths, 0, -1e9))
    return from_nnx("bert", Bert, ids, types, mask[:, None, None])


class GPT(nn.Module):
    """Radford et al., 2019, section 2.3: norms first, one product for q, k and v.

    The head has weights of its own.
    """

    width: int = 32
    heads: int = 4
    blocks: int = 2

    def attend(self, x, block):
        b, t, _ = x.shape
        fused = nn.Dense(3 * self.width, name=f"qkv_{block}")(x)
        split = lambda y: y.reshape((b, t, self.heads, -1)).transpose((0, 2, 1, 3))
        q, k, v = (split(y) for y in jnp.split(fused, 3, -1))
        scores = q @ jnp.swapaxes(k, 2, 3) / np.sqrt(q.shape[-1])
        past = jnp.tril(jnp.ones((1, 1, t, t), bool))
        shares = nn.softmax(jnp.where(past, scores, -jnp.inf))
        y = (shares @ v).transpose((0, 2, 1, 3)).reshape(x.shape)
        return nn.Dense(self.width, name=f"out_{block}")(y)

    @nn.compact
    def __call__(self, ids):
        small = nn.initializers.normal(0.02)
        x = nn.Embed(VOCABULARY, self.width, embedding_init=small, name="token")(ids)
        shape = (1, ids.shape[1], self.width)
        x = x + self.param("position", nn.initializers.normal(0.01), shape)
        for block in range(self.blocks):
            x = x + self.attend(nn.LayerNorm()(x), block)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.LayerNorm()(x))


def gpt() -> Member:
    return from_linen("gpt", GPT(), tokens((8, 12), VOCABULARY))


def rotated(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates halves of features by their position.

    Su et al., 2021, section 3.2 (arXiv:2104.09864).

    Args:
      x: shape=(batch, positions, heads, features).
      base: Inverse of the slowest rate, nearly.
    """
    n = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(n) / n)[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class DecoderBlock(nnx.Module):
    """Grouped queries with rotary positions; SwiGLU; RMSNorm before each."""

    def __init__(self, width: int, heads: int, groups: int, rngs: nnx.Rngs):
        linear = lambda n, m: nnx.Linear(n, m, use_bias=False, rngs=rngs)
        size = width // heads
        self.query, self.out = linear(width, width), linear(width, width)
        self.key, self.value = (
            linear(width, groups * size),
            linear(width, groups * size),
        )
        self.gate, self.up = linear(width, 2 * width), linear(width, 2 * width)
        self.down = linear(2 * width, width)
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.groups, self.size = groups, size

    def attend(self, x):
        b, t, width = x.shape
        split = lambda y: y.reshape((b, t, -1, self.size))
        q, k = rotated(split(self.query(x))), rotated(split(self.key(x)))
        v = split(self.value(x))
        q = q.reshape((b, t, self.groups, -1, self.size))
        scores = jnp.einsum("bqghd,bkgd->bghqk", q, k) * self.size**-0.5
        past = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
        shares = nnx.softmax(jnp.where(past, scores, jnp.finfo(scores.dtype).min))
        y = jnp.einsum("bghqk,bkgd->bqghd", shares, v)
        return self.out(y.reshape((b, t, width)))

    def __call__(self, x):
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Touvron et al., 2023, section 2 (arXiv:2302.13971), with grouped queries.

    Ainslie et al., 2023 (arXiv:2305.13245). One table embeds tokens and scores them.
    """

    def __init__(self, rngs: nnx.Rngs, width: int = 32):
        self.table = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(width, 4, 2, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.table.attend(self.norm(x))


def decoder() -> Member:
    return from_nnx("decoder", Decoder, tokens((8, 12), VOCABULARY))


class CrossAttention(nn.Module):
    """A decoder's layer of Vaswani et al., 2017, section 3.1 (arXiv:1706.03762)."""

    heads: int = 4

    @nn.compact
    def __call__(self, x, memory):
        attention = nn.MultiHeadDotProductAttention(self.heads, name="self")
        x = nn.LayerNorm()(x + attention(x))
        attention = nn.MultiHeadDotProductAttention(self.heads, name="cross")
        x = nn.LayerNorm()(x + attention(x, memory))
        y = nn.relu(nn.Dense(2 * x.shape[-1])(x))
        return nn.LayerNorm()(x + nn.Dense(x.shape[-1])(y))


def cross_attention() -> Member:
    rng = np.random.default_rng(0)
    x, memory = rng.normal(size=(8, 8, 32)), rng.normal(size=(8, 12, 24))
    return from_linen(
        "cross_attention", CrossAttention(), np.float32(x), np.float32(memory)
    )
