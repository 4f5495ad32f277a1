"""Models that the tests share: NNX, Linen and plain functions, small and odd-sized."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


class Example(NamedTuple):
    """A model as a function of its parameters, with data."""

    fn: Any
    params: Any
    x: np.ndarray


def randomized(state: Any, seed: int = 0) -> Any:
    """Gives every real array values that no initializer gives: nonzero, both signs."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            known = isinstance(leaf, jax.Array)
            return leaf if known else np.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path)
        value = rng.normal(size=leaf.shape) / np.sqrt(
            max(1, leaf.size // leaf.shape[-1])
        )
        if "var" in name:
            value = rng.uniform(0.2, 2.0, size=leaf.shape)
        return jnp.asarray(np.asarray(value, leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, state)


def images(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nnx_example(make: Callable[[], nnx.Module], x: np.ndarray) -> Example:
    model = nnx.eval_shape(make)  # Initializers would have to be compiled.
    model.eval()
    graph, state = nnx.split(model)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    return Example(fn, randomized(state), x)


def linen_example(model: nn.Module, x: np.ndarray) -> Example:
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), x[:1]))
    return Example(model.apply, variables, x)


class NnxResidual(nnx.Module):
    """Convolutions with BatchNorm, a residual sum, every pool, a global mean."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(x + self.bn2(self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), strides=(1, 1), padding="SAME")
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return self.head(self.dropout(jnp.mean(x, axis=(1, 2))))


class NnxMobile(nnx.Module):
    """Depthwise, grouped, dilated convolutions; explicit and VALID padding; relu6."""

    def __init__(self, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            4, 4, (3, 3), feature_group_count=4, padding=[(2, 0), (1, 1)], rngs=rngs
        )
        self.pointwise = nnx.Conv(4, 6, (1, 1), padding="VALID", rngs=rngs)
        self.grouped = nnx.Conv(
            6, 4, (3, 2), feature_group_count=2, kernel_dilation=(1, 2), rngs=rngs
        )
        self.head = nnx.Linear(4 * 7 * 5, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu6(self.depthwise(x))
        x = nnx.relu(self.pointwise(x))
        x = self.grouped(x)
        return self.head(x.reshape((x.shape[0], -1)))


class NnxPreactivation(nnx.Module):
    """BatchNorm on its own, before a convolution, and a sequence input."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 6, (3,), rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x + self.conv(nnx.relu(self.bn(x)))
        return self.head(jnp.max(x, axis=1))


class LinenResidual(nn.Module):
    """The Linen twin of `NnxResidual`; one module is called twice."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), strides=2, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(x))
        shared = nn.Conv(4, (3, 3), use_bias=False, name="conv2")
        y = nn.relu(shared(x))
        y = nn.BatchNorm(use_running_average=not train, name="bn2")(shared(y))
        x = nn.relu(x + y)
        x = nn.avg_pool(x, (3, 3), (2, 2), padding="SAME", count_include_pad=False)
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(3, name="head")(x)


class LinenMlp(nn.Module):
    """Dense layers on any number of leading axes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(7)(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        x = jnp.clip(nn.Dense(5)(x), -1.0, 1.0)
        return nn.Dense(3, use_bias=False)(jnp.transpose(x, (0, 2, 1)))


def plain(params: Any, x: jax.Array) -> jax.Array:
    """A function of arrays: weights transposed, a subtraction, a lone factor."""
    y = jax.nn.relu(x @ params["a"] + params["b"])
    z = x @ params["c"].T
    return (y - z) * 0.3 + 0.7


def _plain() -> Example:
    weights = {"a": (5, 4), "b": (1, 4), "c": (4, 5)}
    params = {k: np.zeros(shape, np.float32) for k, shape in weights.items()}
    return Example(plain, randomized(params), images(33, 5))


_MAKERS: dict[str, Callable[[], Example]] = {
    "nnx_residual": lambda: nnx_example(
        lambda: NnxResidual(nnx.Rngs(0)), images(33, 9, 7, 2)
    ),
    "nnx_mobile": lambda: nnx_example(
        lambda: NnxMobile(nnx.Rngs(0)), images(33, 7, 5, 4)
    ),
    "nnx_preactivation": lambda: nnx_example(
        lambda: NnxPreactivation(nnx.Rngs(0)), images(33, 11, 3)
    ),
    "linen_residual": lambda: linen_example(LinenResidual(), images(33, 9, 7, 2)),
    "linen_mlp": lambda: linen_example(LinenMlp(), images(33, 5, 6)),
    "plain": _plain,
}
NAMES = tuple(_MAKERS)
_made = functools.cache(lambda name: _MAKERS[name]())


def example(name: str) -> Example:
    """The example of a name, with parameters of the caller's own."""
    fn, params, x = _made(name)
    return Example(fn, jax.tree.map(lambda leaf: leaf, params), x)
