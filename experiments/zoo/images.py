"""Models of images: ViT, MLP-Mixer, ConvNeXt, the U-Net of diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import (
    Member,
    from_linen,
    from_nnx,
    sinusoids,
    smooth,
)


class GeluMLP(nn.Module):
    """Two layers with GELU between, back to the width of the input."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.hidden)(x), approximate=False)
        return nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Dosovitskiy et al., 2020, section 3.1 (arXiv:2010.11929)."""

    width: int = 32
    heads: int = 4
    blocks: int = 2
    patch: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="embed")(x)
        x = x.reshape((len(x), -1, self.width))
        token = self.param("class", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], 1)
        shape = (1, *x.shape[1:])
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            x = x + GeluMLP(2 * self.width)(nn.LayerNorm()(x))
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])


def vit() -> Member:
    return from_linen("vit", ViT(), smooth((8, 16, 16, 3), (1, 2)))


class Mixer(nn.Module):
    """MLP-Mixer: Tolstikhin et al., 2021, section 2 (arXiv:2105.01601)."""

    width: int = 32
    blocks: int = 2
    patch: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="embed")(x)
        x = x.reshape((len(x), -1, self.width))
        for _ in range(self.blocks):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(GeluMLP(self.width // 2)(y), 1, 2)
            x = x + GeluMLP(2 * self.width)(nn.LayerNorm()(x))
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


def mixer() -> Member:
    return from_linen("mixer", Mixer(), smooth((8, 16, 16, 3), (1, 2)))


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7x7, LayerNorm, an inverted bottleneck with GELU, layer scale."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            width, width, (7, 7), feature_group_count=width, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)
        # It starts at 1e-6 in the paper, where a block does nothing yet.
        self.gamma = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, x):
        y = self.widen(self.norm(self.depthwise(x)))
        y = self.narrow(nnx.gelu(y, approximate=False))
        return x + self.gamma[...].reshape((1, 1, 1, -1)) * y


class ConvNeXt(nnx.Module):
    """Liu et al., 2022, section 2 (arXiv:2201.03545); patches of 2 at the start."""

    def __init__(self, rngs: nnx.Rngs, widths: tuple[int, ...] = (16, 32)):
        patches = lambda n, m: nnx.Conv(
            n, m, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs
        )
        self.stem = patches(3, widths[0])
        self.stem_norm = nnx.LayerNorm(widths[0], rngs=rngs)
        self.first = ConvNeXtBlock(widths[0], rngs)
        self.down_norm = nnx.LayerNorm(widths[0], rngs=rngs)
        self.down = patches(*widths)
        self.second = ConvNeXtBlock(widths[1], rngs)
        self.norm = nnx.LayerNorm(widths[1], rngs=rngs)
        self.head = nnx.Linear(widths[1], 10, rngs=rngs)

    def __call__(self, x):
        x = self.first(self.stem_norm(self.stem(x)))
        x = self.second(self.down(self.down_norm(x)))
        return self.head(self.norm(x.mean((1, 2))))


def convnext() -> Member:
    return from_nnx("convnext", ConvNeXt, smooth((8, 16, 16, 3), (1, 2)))


class ResidualBlock(nnx.Module):
    """GroupNorm, SiLU, convolution, twice; the time is added between."""

    def __init__(self, inputs: int, outputs: int, time: int, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(inputs, num_groups=4, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.time = nnx.Linear(time, outputs, rngs=rngs)
        self.norm2 = nnx.GroupNorm(outputs, num_groups=4, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs)
        self.shortcut = (
            None if inputs == outputs else nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)
        )

    def __call__(self, x, time):
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = y + self.time(nnx.silu(time))[:, None, None]
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class PixelAttention(nnx.Module):
    """Each pixel attends to all, one head."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(width, num_groups=4, rngs=rngs)
        layer = lambda: nnx.Conv(width, width, (1, 1), rngs=rngs)
        self.query, self.key, self.value, self.out = (layer() for _ in range(4))

    def __call__(self, x):
        y = self.norm(x)
        flat = lambda z: z.reshape((len(z), -1, z.shape[-1]))
        q, k, v = flat(self.query(y)), flat(self.key(y)), flat(self.value(y))
        scores = jnp.einsum("bqc,bkc->bqk", q, k) * q.shape[-1] ** -0.5
        y = jnp.einsum("bqk,bkc->bqc", nnx.softmax(scores), v)
        return x + self.out(y.reshape(x.shape))


class UNet(nnx.Module):
    """Ho et al., 2020, appendix B (arXiv:2006.11239): the noise in a noisy image."""

    def __init__(self, rngs: nnx.Rngs, width: int = 16, steps: int = 100):
        self.steps, self.width, time = steps, width, 2 * width
        self.time1 = nnx.Linear(width, time, rngs=rngs)
        self.time2 = nnx.Linear(time, time, rngs=rngs)
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.down_block = ResidualBlock(width, width, time, rngs)
        self.down = nnx.Conv(width, width, (3, 3), strides=(2, 2), rngs=rngs)
        self.bottom1 = ResidualBlock(width, 2 * width, time, rngs)
        self.attention = PixelAttention(2 * width, rngs)
        self.bottom2 = ResidualBlock(2 * width, 2 * width, time, rngs)
        self.up = nnx.Conv(2 * width, 2 * width, (3, 3), rngs=rngs)
        self.up_block = ResidualBlock(3 * width, width, time, rngs)
        self.norm = nnx.GroupNorm(width, num_groups=4, rngs=rngs)
        self.head = nnx.Conv(width, 3, (3, 3), rngs=rngs)

    def __call__(self, x, step):
        table = jnp.asarray(sinusoids(self.steps, self.width))
        time = self.time2(nnx.silu(self.time1(table[step])))
        skip = self.down_block(self.stem(x), time)
        x = self.bottom1(self.down(skip), time)
        x = self.bottom2(self.attention(x), time)
        b, h, w, c = x.shape
        x = self.up(jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest"))
        x = self.up_block(jnp.concatenate([x, skip], -1), time)
        return self.head(nnx.silu(self.norm(x)))


def unet() -> Member:
    step = np.arange(0, 96, 12, dtype=np.int32)
    return from_nnx("unet", UNet, smooth((8, 8, 8, 3), (1, 2)), step)
