"""Probes: visitors that leave a model in float and look at the values of its sites."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from qjax.model.visitors import Quantizer
from qjax.model.visits import Biases, Pending, Visit
from qjax.schemes.patterns import Site

Rounded = Callable[[Quantizer], jax.Array]  # The value on the grid of a visitor.
# Site, its value, the value on grids, key of this visit -> the value to go on with.
Look = Callable[[Site, jax.Array, Rounded, chex.PRNGKey], jax.Array]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A visitor that shows a function each value, in float.

    What a loop computes or scans over is another value in each step, whose visit has
    another key; a weight that all steps share is visited once.

    Attributes:
      look: Function of a site, its value, its value on a grid, and a key.
      key: Key of the visits, split by site and step.
    """

    look: Look
    key: chex.PRNGKey

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Shows the values of a site."""
        x = x if unit is None else unit.seen(x)
        return self._seen(site, x, lambda own: own.activation(site, x, None).value)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        """Shows a weight."""
        return self._seen(site, x, lambda own: own.weight(site, x, biases).value)

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Leaves a bias as it is."""
        return Visit(x)

    def takes_factors(self, site: Site) -> bool:
        """Returns that no factor goes into a weight."""
        return False

    @property
    def draws(self) -> bool:
        """Returns that steps of a loop have keys of their own."""
        return True

    @property
    def seen(self) -> tuple[()]:
        """Returns nothing: what a step finds leaves it as a derivative."""
        return ()

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Leaves a value as it is."""
        return Visit(x)

    def state(self, names: Sequence[str]) -> tuple[()]:
        """Returns nothing: steps go on from nothing."""
        return ()

    def inside(self, state: Any, step: jax.Array | None) -> "Probe":
        """Returns the visitor of a step."""
        assert step is not None
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, step))

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Takes nothing from a loop."""

    def _seen(self, site: Site, x: jax.Array, rounded: Rounded) -> Visit:
        key = jax.random.fold_in(self.key, zlib.crc32(site.name.encode()))
        return Visit(self.look(site, x, rounded, key).astype(x.dtype))


@jax.custom_vjp
def tap_gradient(x: jax.Array, sink: jax.Array, squares: jax.Array) -> jax.Array:
    """Returns ``x``; the derivative by ``sink`` is ``sum(g^2 * squares)``, by row.

    Args:
      x: Values, ``[...]``, with the derivative ``g``.
      sink: Zeros, ``[k]``.
      squares: Numbers, ``[k, ...]``.
    """
    return x


def _with_squares(x: jax.Array, sink: jax.Array, squares: jax.Array) -> Any:
    return x, squares


def _weighed(squares: jax.Array, g: jax.Array) -> Any:
    own = g.astype(jnp.float32)[None] ** 2 * squares
    rows = jnp.sum(own, axis=tuple(range(1, own.ndim)))
    return g, rows, jnp.zeros_like(squares)


tap_gradient.defvjp(_with_squares, _weighed)


@jax.custom_vjp
def tap_squares(x: jax.Array, sink: jax.Array, squares: jax.Array) -> jax.Array:
    """Returns ``x``; the derivative by ``sink`` is ``sum(squares)``, by row.

    Args:
      x: Values, ``[...]``.
      sink: Zeros, ``[k]``.
      squares: Numbers, ``[k, ...]``.
    """
    return x


def _summed(squares: jax.Array, g: jax.Array) -> Any:
    rows = jnp.sum(squares, axis=tuple(range(1, squares.ndim)))
    return g, rows, jnp.zeros_like(squares)


tap_squares.defvjp(_with_squares, _summed)
