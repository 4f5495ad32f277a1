"""Visitors of which a share counts: values between float and their grids."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax import quantizers
from qjax.model.visitors import Quantizer
from qjax.model.visits import Biases, Pending, Visit, Visitor
from qjax.quantizers.spec import is_known
from qjax.schemes.patterns import Site


@dataclasses.dataclass(frozen=True)
class Blend:
    """A visitor that blends what another one makes of a value with the value.

    Attributes:
      visitor: The other visitor.
      share: Share of what it makes, 0 to 1.
    """

    visitor: Quantizer
    share: ArrayLike

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Blends the values of a site; the result is on no grid."""
        return self._blend(x, self.visitor.activation(site, x, unit))

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        """Blends a weight."""
        return self._blend(x, self.visitor.weight(site, x, biases))

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Blends a bias."""
        return self._blend(x, self.visitor.bias(site, x))

    def takes_factors(self, site: Site) -> bool:
        """Returns that no factor goes into a weight."""
        return False

    @property
    def draws(self) -> bool:
        """Returns whether steps of a loop differ by their numbers."""
        return self.visitor.draws

    @property
    def seen(self) -> tuple[()]:
        """Returns what the other visitor records of a step."""
        return self.visitor.seen

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Blends a value with what the grid of a site makes of it."""
        return self._blend(x, self.visitor.at(site, x))

    def state(self, names: Sequence[str]) -> Any:
        """Returns what the other visitor takes from step to step."""
        return self.visitor.state(names)

    def inside(self, state: Any, step: jax.Array | None) -> "Blend":
        """Returns the visitor of a step."""
        own = self.visitor.inside(state, step)
        return dataclasses.replace(self, visitor=own)

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Lets the other visitor take what a loop leaves."""
        self.visitor.left(state, seen, starts)

    def _blend(self, x: jax.Array, visit: Visit) -> Visit:
        return Visit(quantizers.blend_noise(x, visit.value, self.share))


def blended(visitor: Quantizer, share: ArrayLike) -> Visitor:
    """Returns a visitor of which a share counts; the visitor itself for all of it."""
    return visitor if is_known(share) and share == 1 else Blend(visitor, share)


def run_blended(run: Callable[[ArrayLike], Any], share: ArrayLike) -> Any:
    """Runs ``run(share)``, and ``run(1)`` where a traced share turns out to be 1."""
    if jnp.ndim(share):
        raise ValueError(
            f"`qnoise_factor` must be one number, got shape {jnp.shape(share)}."
        )
    if is_known(share):
        if not 0 <= float(np.asarray(share)) <= 1:
            raise ValueError(f"`qnoise_factor` must lie in [0, 1], got {share}.")
        return run(share)
    return jax.lax.cond(share == 1, lambda: run(1.0), lambda: run(share))
