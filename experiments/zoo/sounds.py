"""Models of sounds: an encoder of spectrograms, the Conformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import Member, from_linen, from_nnx, sinusoids, smooth


class EncoderBlock(nnx.Module):
    """Attention and a GELU MLP, LayerNorm before each."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=0.0, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.widen = nnx.Linear(width, 2 * width, rngs=rngs)
        self.narrow = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(nnx.gelu(self.widen(self.norm2(x))))


class AudioEncoder(nnx.Module):
    """Radford et al., 2022, section 2.2 (arXiv:2212.04356): the encoder."""

    def __init__(self, rngs: nnx.Rngs, bands: int = 16, width: int = 32):
        self.conv1 = nnx.Conv(bands, width, (3,), rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3,), strides=(2,), rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(width, 4, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.conv2(nnx.gelu(self.conv1(x))))
        x = x + jnp.asarray(sinusoids(*x.shape[1:]))[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def audio() -> Member:
    return from_nnx("audio", AudioEncoder, smooth((8, 32, 16), (1, 2)))


class FeedForward(nn.Module):
    """LayerNorm, two layers with swish between."""

    @nn.compact
    def __call__(self, x):
        y = nn.swish(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return nn.Dense(x.shape[-1])(y)


class RelativeAttention(nn.Module):
    """Attention by content and by distance.

    Dai et al., 2019, section 3.3 (arXiv:1901.02860).
    """

    heads: int

    @nn.compact
    def __call__(self, x):
        _, t, width = x.shape
        heads = (self.heads, width // self.heads)
        y = nn.LayerNorm()(x)
        project = lambda name: nn.DenseGeneral(heads, name=name)(y)
        q, k, v = project("query"), project("key"), project("value")
        ahead = sinusoids(t, width)
        mirror = np.repeat(np.float32([-1, 1]), width // 2)  # Sines are odd.
        table = jnp.asarray(np.concatenate([ahead[::-1], ahead[1:] * mirror]))
        r = nn.DenseGeneral(heads, use_bias=False, name="distance")(table)
        normal = nn.initializers.normal(0.02)
        u = self.param("content", normal, heads)[None, None]
        w = self.param("place", normal, heads)[None, None]
        by_content = jnp.einsum("bqhd,bkhd->bhqk", q + u, k)
        by_distance = shifted(jnp.einsum("bqhd,khd->bhqk", q + w, r))
        scores = (by_content + by_distance) * heads[1] ** -0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)


def shifted(x: jax.Array) -> jax.Array:
    """Moves row i of scores by distance left, so that columns are keys.

    Args:
      x: shape=(batch, heads, n, 2n - 1), distances n - 1 to 1 - n.

    Returns:
      shape=(batch, heads, n, n).
    """
    b, h, n, m = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return x.reshape((b, h, m + 1, n))[:, :, 1:].reshape((b, h, n, m))[..., :n]


class ConvolutionModule(nn.Module):
    """Pointwise with GLU, depthwise, BatchNorm, swish, pointwise."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.glu(nn.Dense(2 * width)(nn.LayerNorm()(x)))
        y = nn.Conv(width, (7,), feature_group_count=width, name="depthwise")(y)
        y = nn.swish(nn.BatchNorm(use_running_average=True)(y))
        return nn.Dense(width)(y)


class Conformer(nn.Module):
    """Gulati et al., 2020, section 2 (arXiv:2005.08100): blocks, then classes."""

    width: int = 32
    blocks: int = 2
    classes: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)
        for _ in range(self.blocks):
            x = x + 0.5 * FeedForward()(x)
            x = x + RelativeAttention(4)(x)
            x = x + ConvolutionModule()(x)
            x = nn.LayerNorm()(x + 0.5 * FeedForward()(x))
        return nn.Dense(self.classes, name="head")(x)


def conformer() -> Member:
    return from_linen("conformer", Conformer(), smooth((8, 16, 16), (1, 2)))
