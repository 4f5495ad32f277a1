"""Models of pixels: Atari's DQN, EfficientNet's block, a U-Net that resizes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import Member, from_linen, from_nnx, smooth


class DQN(nn.Module):
    """Mnih et al., 2015, "Model architecture" (Nature 518): values of actions.

    Frames are bytes, shape=(batch, frames, height, width).
    """

    actions: int = 6

    @nn.compact
    def __call__(self, frames):
        x = jnp.transpose(frames, (0, 2, 3, 1)).astype(jnp.float32) / 255.0
        for k, (width, size, step) in enumerate([(16, 8, 4), (32, 4, 2), (32, 3, 1)]):
            name = f"conv_{k}"
            conv = nn.Conv(width, (size, size), (step, step), "VALID", name=name)
            x = nn.relu(conv(x))
        x = nn.relu(nn.Dense(64)(x.reshape((len(x), -1))))
        return nn.Dense(self.actions, name="head")(x)


def dqn() -> Member:
    frames = smooth((8, 4, 36, 36), (2, 3))
    return from_linen("dqn", DQN(), np.uint8(np.clip(128 + 64 * frames, 0, 255)))


class SqueezeExcite(nnx.Module):
    """Channels are scaled by what their means say."""

    def __init__(self, width: int, reduced: int, rngs: nnx.Rngs):
        self.reduce = nnx.Linear(width, reduced, rngs=rngs)
        self.expand = nnx.Linear(reduced, width, rngs=rngs)

    def __call__(self, x):
        y = nnx.silu(self.reduce(x.mean((1, 2))))
        return x * nnx.sigmoid(self.expand(y))[:, None, None]


class EfficientNetBlock(nnx.Module):
    """Tan and Le, 2019, section 4 (arXiv:1905.11946), between a stem and a head.

    Wide inside (Sandler et al., 2018, arXiv:1801.04381), with squeeze and excitation.
    """

    def __init__(self, rngs: nnx.Rngs, width: int = 16, times: int = 4):
        conv = lambda n, m, size, **options: nnx.Conv(
            n, m, (size, size), use_bias=False, rngs=rngs, **options
        )
        norm = lambda n: nnx.BatchNorm(n, use_running_average=True, rngs=rngs)
        wide = times * width
        self.stem, self.stem_norm = conv(3, width, 3, strides=(2, 2)), norm(width)
        self.expand, self.expand_norm = conv(width, wide, 1), norm(wide)
        self.depthwise = conv(wide, wide, 3, feature_group_count=wide)
        self.depthwise_norm = norm(wide)
        self.excite = SqueezeExcite(wide, width // 4, rngs)
        self.project, self.project_norm = conv(wide, width, 1), norm(width)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.stem_norm(self.stem(x)))
        y = nnx.silu(self.expand_norm(self.expand(x)))
        y = nnx.silu(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(self.excite(y)))
        return self.head(x.mean((1, 2)))


def efficientnet() -> Member:
    return from_nnx("efficientnet", EfficientNetBlock, smooth((8, 16, 16, 3), (1, 2)))


class SegmentationUNet(nn.Module):
    """Ronneberger et al., 2015, section 2 (arXiv:1505.04597): classes of pixels.

    The way up resizes by bilinear interpolation, then convolves.
    """

    width: int = 8
    classes: int = 4

    def twice(self, x, width, name):
        for k in range(2):
            x = nn.relu(nn.Conv(width, (3, 3), name=f"{name}_{k}")(x))
        return x

    @nn.compact
    def __call__(self, x):
        skips = []
        for k in range(2):
            skips.append(self.twice(x, self.width * 2**k, f"down_{k}"))
            x = nn.max_pool(skips[-1], (2, 2), (2, 2))
        x = self.twice(x, 4 * self.width, "bottom")
        for k in (1, 0):
            x = jax.image.resize(x, (*skips[k].shape[:3], x.shape[-1]), "bilinear")
            x = nn.Conv(self.width * 2**k, (1, 1), name=f"narrow_{k}")(x)
            x = jnp.concatenate([skips[k], x], -1)
            x = self.twice(x, self.width * 2**k, f"up_{k}")
        return nn.Conv(self.classes, (1, 1), name="head")(x)


def bilinear_unet() -> Member:
    return from_linen(
        "bilinear_unet", SegmentationUNet(), smooth((4, 16, 16, 3), (1, 2))
    )
