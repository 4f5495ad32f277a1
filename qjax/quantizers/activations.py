"""Sigmoids and hyperbolic tangents made of straight lines, and their binary forms.

    hard_sigmoid(x)   = clip(x / 2 + 1 / 2, 0, 1)
    smooth_sigmoid(x) = clip(3 x / 16 + 1 / 2, 0, 1)
    binary_sigmoid(x) = round(hard_sigmoid(x))
    *_tanh(x)         = 2 * *_sigmoid(x) - 1

The derivative is the slope of the line where it is not clipped, ends included, also for
the binary forms. (Keras's own hard sigmoid has slope 1 / 5.) Checked against QKeras
(snapshot 78ea90f) by `tests/conformance`.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import chex
import jax
import jax.numpy as jnp
from jax import lax

from qjax.quantizers.point import Point, apply, point_of, straight
from qjax.quantizers.spec import Spec

InternalSigmoid = Literal["hard", "smooth", "real"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HardSigmoid(Spec):
    """The options of `hard_sigmoid`: none."""

    name: ClassVar[str] = "hard_sigmoid"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SmoothSigmoid(Spec):
    """The options of `smooth_sigmoid`: none."""

    name: ClassVar[str] = "smooth_sigmoid"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BinarySigmoid(Spec):
    """The options of `binary_sigmoid`: none."""

    name: ClassVar[str] = "binary_sigmoid"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HardTanh(Spec):
    """The options of `hard_tanh`: none."""

    name: ClassVar[str] = "hard_tanh"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SmoothTanh(Spec):
    """The options of `smooth_tanh`: none."""

    name: ClassVar[str] = "smooth_tanh"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BinaryTanh(Spec):
    """The options of `binary_tanh`: none."""

    name: ClassVar[str] = "binary_tanh"


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """Returns ``clip(x / 2 + 1 / 2, 0, 1)``, shape and dtype of ``x``."""
    return _clip(0.5 * x + 0.5)


def smooth_sigmoid(x: jax.Array) -> jax.Array:
    """Returns ``clip(3 x / 16 + 1 / 2, 0, 1)``, shape and dtype of ``x``."""
    return _clip(0.1875 * x + 0.5)


def hard_tanh(x: jax.Array) -> jax.Array:
    """Returns ``clip(x, -1, 1)`` by way of `hard_sigmoid`."""
    return 2.0 * hard_sigmoid(x) - 1.0


def smooth_tanh(x: jax.Array) -> jax.Array:
    """Returns ``clip(3 x / 8, -1, 1)`` by way of `smooth_sigmoid`."""
    return 2.0 * smooth_sigmoid(x) - 1.0


def binary_sigmoid(x: jax.Array) -> jax.Array:
    """Returns 1 where ``x > 0``, else 0, with the derivative of `hard_sigmoid`."""
    return apply(BinarySigmoid(), x)


def binary_tanh(x: jax.Array) -> jax.Array:
    """Returns 1 where ``x > 0``, else -1, with the derivative of `hard_tanh`."""
    return apply(BinaryTanh(), x)


def internal_sigmoid(mode: InternalSigmoid) -> Callable[[jax.Array], jax.Array]:
    """Returns the sigmoid from which other quantizers are made.

    Raises:
      ValueError: for another word than "hard", "smooth" or "real".
    """
    if mode not in _SIGMOIDS:
        raise ValueError(
            f"`internal_sigmoid` must be one of {', '.join(_SIGMOIDS)}, got {mode!r}."
        )
    return _SIGMOIDS[mode]


_SIGMOIDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "hard": hard_sigmoid,
    "smooth": smooth_sigmoid,
    "real": jax.nn.sigmoid,
}


def _clip(z: jax.Array) -> jax.Array:
    """Clips to [0, 1] with derivative 1 at the ends."""
    inside = jnp.where((z >= 0) & (z <= 1), z, lax.stop_gradient(z))
    return straight(inside, lax.stop_gradient(jnp.clip(z, 0.0, 1.0)))


def _register(spec: type[Spec], function: Callable[[jax.Array], jax.Array]) -> None:
    @point_of(spec)
    def point(spec: Spec, key: chex.PRNGKey | None, x: jax.Array) -> Point:
        real = function(x)
        nothing = jnp.zeros(())
        return Point(real, real, nothing, nothing, lax.stop_gradient(real))


def _register_binary(
    spec: type[Spec], function: Callable[[jax.Array], jax.Array], low: int
) -> None:
    @point_of(spec)
    def point(spec: Spec, key: chex.PRNGKey | None, x: jax.Array) -> Point:
        steps = lax.stop_gradient(hard_sigmoid(x))
        zero, one = jnp.zeros(()), jnp.ones(())
        value = jnp.where(steps > 0.5, 1.0, float(low))
        return Point(function(x), steps, zero, one, value, one, low, 1)


_register(HardSigmoid, hard_sigmoid)
_register(SmoothSigmoid, smooth_sigmoid)
_register(HardTanh, hard_tanh)
_register(SmoothTanh, smooth_tanh)
_register_binary(BinarySigmoid, hard_sigmoid, 0)
_register_binary(BinaryTanh, hard_tanh, -1)
