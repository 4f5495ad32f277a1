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
    inputs: tuple[np.ndarray, ...]
    # Of a model that chooses: from its outputs, what each place chose, whose values are
    # the first output; shape=(*places, choices).
    choices: Callable[[Any], np.ndarray] | None = None


# Draws of weights compile in half of the time, and run once.
QUICK = {"xla_backend_optimization_level": 0}


def from_linen(
    name: str, module: nn.Module, *inputs: np.ndarray, choices: Any = None
) -> Member:
    """Initialises a Linen module."""
    init = jax.jit(module.init, compiler_options=QUICK)
    params = moved(init(jax.random.key(0), *inputs))
    return Member(name, module.apply, params, inputs, choices)


def from_nnx(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    *inputs: np.ndarray,
    choices: Any = None,
) -> Member:
    """Makes an NNX module and splits it into a function and its state."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    module.eval()
    graph, _ = nnx.split(module)
    init = lambda: nnx.state(make(nnx.Rngs(0)))
    apply = lambda state, *inputs: nnx.merge(graph, state)(*inputs)
    params = moved(jax.jit(init, compiler_options=QUICK)())
    return Member(name, apply, params, inputs, choices)


def moved(params: Any, seed: int = 0) -> Any:
    """Moves biases, scales and statistics off their zeros and ones, as training does.

    A class token becomes as large as the patches beside it; on their grid one as small
    as it starts has a single code, which a norm makes large (22 dB of a ViT's 31 are
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


def smooth(shape: tuple[int, ...], axes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draws values that vary slowly along ``axes``, as images and spectrograms do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[n // 4 if i in axes else n for i, n in enumerate(shape)])
    for axis in axes:
        known = np.arange(x.shape[axis])
        places = np.linspace(0, known[-1], shape[axis])
        x = np.apply_along_axis(
            lambda v, k=known, p=places: np.interp(p, k, v), axis, x
        )
    return np.float32(1.5 * x + rng.normal(0, 0.1, shape))


def tokens(shape: tuple[int, ...], vocabulary: int, seed: int = 0) -> np.ndarray:
    """Draws tokens, low ones more often, as in texts."""
    rank = np.random.default_rng(seed).uniform(size=shape) ** 2
    return np.int32(rank * vocabulary)


def sinusoids(length: int, features: int) -> np.ndarray:
    """Returns the position table of Vaswani et al., 2017, section 3.5: sines, cosines.

    Returns:
      shape=(length, features).
    """
    rates = 10_000.0 ** (-np.arange(features // 2) / (features // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
