"""What the zoo asks of a model, and inputs that look like real ones."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of the zoo in inference: ``apply(params, *inputs)``."""

    name: str
    apply: Callable[..., Any]
    params: Any  # All that the model holds, statistics of BatchNorm included.
    inputs: tuple[jax.Array, ...]


def from_linen(name: str, module: nn.Module, *inputs: jax.Array) -> Member:
    """Initialises a Linen module."""
    variables = jax.jit(module.init)(jax.random.key(0), *inputs)
    return Member(name, module.apply, moved(variables), inputs)


def from_nnx(name: str, module: nnx.Module, *inputs: jax.Array) -> Member:
    """Splits an NNX module into a function and its state."""
    module.eval()
    graph, state = nnx.split(module)
    apply = lambda state, *inputs: nnx.merge(graph, state)(*inputs)
    return Member(name, apply, moved(state), inputs)


def moved(params: Any, seed: int = 0) -> Any:
    """Moves biases, scales and statistics off their zeros and ones, as training does.

    A class token becomes as large as the patches beside it; on their grid one as small
    as it starts has a single code, which a norm makes large (18 dB of a ViT's 27 are
    lost). Kernels and tables stay as their initialisers drew them.
    """
    rng = np.random.default_rng(seed)

    def move(path: Any, leaf: jax.Array) -> jax.Array:
        (name,) = re.findall(r"\w+", jax.tree_util.keystr(path[-1:]))[-1:]
        name = name if name != "value" else re.findall(r"\w+", str(path[-2]))[-1]
        if name in ("scale", "var", "gamma"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        if name == "class":
            return jnp.asarray(rng.normal(0, 1, leaf.shape), leaf.dtype)
        if name in ("bias", "mean"):
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(move, params)


def smooth(shape: tuple[int, ...], axes: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Draws values that vary slowly along ``axes``, as images and spectrograms do."""
    coarse, fine = jax.random.split(jax.random.key(seed))
    small = tuple(n // 4 if axis in axes else n for axis, n in enumerate(shape))
    x = jax.image.resize(jax.random.normal(coarse, small), shape, "cubic")
    return x + 0.1 * jax.random.normal(fine, shape)


def tokens(shape: tuple[int, ...], vocabulary: int, seed: int = 0) -> jax.Array:
    """Draws tokens, low ones more often, as in texts."""
    rank = jax.random.uniform(jax.random.key(seed), shape) ** 2
    return (rank * vocabulary).astype(jnp.int32)


def sinusoids(length: int, features: int) -> np.ndarray:
    """Returns the position table of Vaswani et al., 2017, section 3.5: sines, cosines.

    Returns:
      shape=(length, features).
    """
    rates = 10_000.0 ** (-np.arange(features // 2) / (features // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
