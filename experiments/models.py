"""Models that experiments share: Flax NNX, channels last."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class MLP(nnx.Module):
    """Three hidden layers of 1024 on 784 pixels."""

    def __init__(self, rngs: nnx.Rngs, hidden: int = 1024):
        sizes = (784, hidden, hidden, hidden)
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.hidden = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])
        self.head = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


Layer = Callable[..., Any]  # (inputs, outputs, rngs, *, size, strides) -> module.


class ConvBlock(nnx.Module):
    """Convolution without bias and BatchNorm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        *,
        size: int = 3,
        strides: int = 1,
        groups: int = 1,
        padding: Any = "SAME",
        epsilon: float = 1e-5,
        momentum: float = 0.99,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=strides,
            padding=padding,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(outputs, epsilon=epsilon, momentum=momentum, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut, which is 1x1 where the shape changes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        strides: int,
        rngs: nnx.Rngs,
        *,
        conv: Layer = ConvBlock,
        shortcut: Layer = ConvBlock,
    ):
        self.first = conv(inputs, outputs, rngs, strides=strides)
        self.second = conv(outputs, outputs, rngs)
        keeps = strides == 1 and inputs == outputs
        self.shortcut = (
            None if keeps else shortcut(inputs, outputs, rngs, size=1, strides=strides)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """CIFAR ResNet: stages of 16, 32, 64 channels with ``blocks`` blocks each.

    One block a stage is the ResNet-8 of MLPerf Tiny; three give 20 layers (He et al.,
    2015, section 4.2), here with 1x1 convolutions as shortcuts. ``conv`` and
    ``shortcut`` make other layers, of ``widths`` channels.
    """

    def __init__(
        self,
        blocks: int,
        rngs: nnx.Rngs,
        *,
        widths: tuple[int, ...] = (16, 32, 64),
        conv: Layer = ConvBlock,
        shortcut: Layer = ConvBlock,
    ):
        self.stem = conv(3, widths[0], rngs)
        block = functools.partial(ResidualBlock, conv=conv, shortcut=shortcut)
        found, inputs = [], widths[0]
        for outputs in widths:
            for i in range(blocks):
                strides = 2 if i == 0 and outputs != widths[0] else 1
                found.append(block(inputs, outputs, strides, rngs))
                inputs = outputs
        self.blocks = nnx.List(found)
        self.head = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class MobileNet(nnx.Module):
    """MobileNetV1 of width 0.25: two classes, as the visual wake words of MLPerf Tiny.

    Howard et al., 2017, table 1 (arXiv:1704.04861).
    """

    def __init__(self, rngs: nnx.Rngs, *, conv: Layer = ConvBlock):
        self.stem = conv(3, 8, rngs, strides=2)
        pairs = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)]
        pairs += [(128, 1)] * 5 + [(256, 2), (256, 1)]
        depthwise, pointwise, inputs = [], [], 8
        for outputs, strides in pairs:
            depthwise.append(conv(inputs, inputs, rngs, strides=strides, groups=inputs))
            pointwise.append(conv(inputs, outputs, rngs, size=1))
            inputs = outputs
        self.depthwise = nnx.List(depthwise)
        self.pointwise = nnx.List(pointwise)
        self.head = nnx.Linear(inputs, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = nnx.relu(pointwise(nnx.relu(depthwise(x))))
        return self.head(jnp.mean(x, axis=(1, 2)))


MODELS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]] = {
    "mlp-3x1024": (MLP, (784,)),
    "resnet-8": (lambda rngs: ResNet(1, rngs), (32, 32, 3)),
    "mobilenet-0.25": (MobileNet, (96, 96, 3)),
    "resnet-20": (lambda rngs: ResNet(3, rngs), (32, 32, 3)),
}


def inference(model: nnx.Module) -> tuple[Callable[..., jax.Array], Any]:
    """The model as a pure function of its state, and the state."""
    model.eval()
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), state


def with_statistics(state: Any, seed: int = 0) -> Any:
    """Gives BatchNorm statistics and parameters that training would have moved."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "'bn'" not in name:
            return leaf
        if "var" in name or "scale" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, state)
