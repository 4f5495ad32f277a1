"""Twins of two models in Haiku and Equinox; need the extra `zoo`.

    python experiments/zoo/table.py --models haiku_mixer,haiku_dqn,equinox_mixer

A Haiku transform is a function of its parameters already; an Equinox module becomes one
by `equinox.partition`, and works on one example, so `jax.vmap` gives it a batch.
"""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from experiments.zoo.member import Member, moved, smooth

_WIDTH, _BLOCKS, _PATCH, _CLASSES = 32, 2, 4, 10
_CONVOLUTIONS = (4, 16, 8, 4), (16, 32, 4, 2), (32, 32, 3, 1)
_ACTIONS = 6


def _images() -> np.ndarray:
    return smooth((8, 16, 16, 3), (1, 2))


def _frames() -> np.ndarray:
    frames = smooth((8, 4, 36, 36), (2, 3))
    return np.uint8(np.clip(128 + 64 * frames, 0, 255))


def _haiku_norm() -> hk.LayerNorm:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)


def _haiku_wide(x: jax.Array, wide: int) -> jax.Array:
    y = jax.nn.gelu(hk.Linear(wide)(x))
    return hk.Linear(x.shape[-1])(y)


def _haiku_mixer(x: jax.Array) -> jax.Array:
    """MLP-Mixer: Tolstikhin et al., 2021, section 2 (arXiv:2105.01601)."""
    x = hk.Conv2D(_WIDTH, _PATCH, _PATCH, padding="VALID")(x)
    x = x.reshape((len(x), -1, _WIDTH))
    for _ in range(_BLOCKS):
        y = jnp.swapaxes(_haiku_norm()(x), 1, 2)
        x = x + jnp.swapaxes(_haiku_wide(y, _WIDTH // 2), 1, 2)
        x = x + _haiku_wide(_haiku_norm()(x), 2 * _WIDTH)
    return hk.Linear(_CLASSES)(_haiku_norm()(x).mean(1))


def _haiku_dqn(frames: jax.Array) -> jax.Array:
    """Mnih et al., 2015, "Model architecture" (Nature 518)."""
    x = jnp.transpose(frames, (0, 2, 3, 1)).astype(jnp.float32) / 255.0
    for _, width, size, step in _CONVOLUTIONS:
        x = jax.nn.relu(hk.Conv2D(width, size, step, padding="VALID")(x))
    x = jax.nn.relu(hk.Linear(64)(x.reshape((len(x), -1))))
    return hk.Linear(_ACTIONS)(x)


def _from_haiku(name: str, forward: Any, x: np.ndarray) -> Member:
    model = hk.without_apply_rng(hk.transform(forward))
    return Member(name, model.apply, moved(model.init(jax.random.key(0), x)), (x,))


class _EquinoxMLP(eqx.Module):
    """Two dense layers on the last axis of a matrix."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, wide: int, key: jax.Array):
        first, second = jax.random.split(key)
        self.up = eqx.nn.Linear(width, wide, key=first)
        self.down = eqx.nn.Linear(wide, width, key=second)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


class _EquinoxMixer(eqx.Module):
    """MLP-Mixer of one image, channels first."""

    embed: eqx.nn.Conv2d
    norms: list[eqx.nn.LayerNorm]
    mixers: list[_EquinoxMLP]
    head: eqx.nn.Linear

    def __init__(self, places: int, key: jax.Array):
        keys = jax.random.split(key, 2 + 2 * _BLOCKS)
        self.embed = eqx.nn.Conv2d(3, _WIDTH, _PATCH, _PATCH, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(_WIDTH) for _ in range(2 * _BLOCKS + 1)]
        sizes = [(places, _WIDTH // 2), (_WIDTH, 2 * _WIDTH)] * _BLOCKS
        self.mixers = [
            _EquinoxMLP(*pair, k) for pair, k in zip(sizes, keys[2:], strict=True)
        ]
        self.head = eqx.nn.Linear(_WIDTH, _CLASSES, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(jnp.transpose(x, (2, 0, 1))).reshape((_WIDTH, -1)).T
        for k, (norm, mixer) in enumerate(
            zip(self.norms[:-1], self.mixers, strict=True)
        ):
            y = jax.vmap(norm)(x)
            x = x + (mixer(y) if k % 2 else mixer(y.T).T)
        return self.head(jax.vmap(self.norms[-1])(x).mean(0))


class _EquinoxDQN(eqx.Module):
    """Atari's DQN of one stack of frames."""

    convolutions: list[eqx.nn.Conv2d]
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.convolutions = [
            eqx.nn.Conv2d(*row, key=k)
            for row, k in zip(_CONVOLUTIONS, keys[:3], strict=True)
        ]
        self.hidden = eqx.nn.Linear(32, 64, key=keys[3])
        self.head = eqx.nn.Linear(64, _ACTIONS, key=keys[4])

    def __call__(self, frames: jax.Array) -> jax.Array:
        x = frames.astype(jnp.float32) / 255.0
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.head(jax.nn.relu(self.hidden(x.reshape(-1))))


def _from_equinox(name: str, model: eqx.Module, x: np.ndarray) -> Member:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    rng = np.random.default_rng(0)
    shift = lambda a: a + 0.1 * jnp.float32(rng.normal(size=a.shape))
    return Member(name, apply, jax.tree.map(shift, params), (x,))


def haiku_mixer() -> Member:
    return _from_haiku("haiku_mixer", _haiku_mixer, _images())


def haiku_dqn() -> Member:
    return _from_haiku("haiku_dqn", _haiku_dqn, _frames())


def equinox_mixer() -> Member:
    places = (16 // _PATCH) ** 2
    model = _EquinoxMixer(places, jax.random.key(0))
    return _from_equinox("equinox_mixer", model, _images())


def equinox_dqn() -> Member:
    return _from_equinox("equinox_dqn", _EquinoxDQN(jax.random.key(0)), _frames())


MODELS = (haiku_mixer, haiku_dqn, equinox_mixer, equinox_dqn)
