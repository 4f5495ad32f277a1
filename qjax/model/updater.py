"""The visitor of a simulation in training, which updates calibrators."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax.affine import QSpec
from qjax.mesh_axes import ends_of, joined
from qjax.model.visitors import Quantizer, is_fresh
from qjax.model.visits import Pending, Visit
from qjax.ranges import reduce_range
from qjax.schemes.patterns import Site


@dataclasses.dataclass(frozen=True)
class Updater(Quantizer):
    """A visitor that updates the calibrators of a state, then rounds by it.

    Attributes:
      update: Whether states move.
      axes: Names of the axes over which the batch is split.
    """

    update: ArrayLike = True
    axes: tuple[str, ...] = ()

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Updates the range of the site, then rounds by it."""
        spec = self.choices[site].word
        if isinstance(spec, QSpec) and site.name in self.qstate:
            real = jax.lax.stop_gradient(x if unit is None else unit.seen(x))
            calibrator = self.choices[site].calibrator
            old = self.qstate[site.name]
            if self.axes:
                real = self._of_all_parts(real, spec, calibrator.reads_ends)
            state = calibrator.update(real, old, spec)
            if self.update is not True:
                state = jax.tree.map(
                    functools.partial(jnp.where, self.update), state, old
                )
            self.qstate[site.name] = state
        return super().activation(site, x, unit)

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Rounds to the grid of a site as it is now, of scale 1 before any batch."""
        spec, leader = self.choices[site].word, self.choices[site].leader
        visitor: Quantizer = self
        state = self.qstate.get(leader.name)
        is_new = state is not None and is_fresh(state)
        if is_new and isinstance(spec, QSpec):
            # Known outside of the traced program, where it would be refused.
            real = jax.lax.stop_gradient(x)
            state = self.choices[leader].calibrator.update(real, state, spec)
            own = {**self.qstate, leader.name: state}
            visitor = dataclasses.replace(self, qstate=own)
        visit = Quantizer.at(visitor, site, x)
        if visit.grid is None:
            return visit
        is_known = ~jnp.isnan(visit.grid.scale) & (not is_new)
        scale = jnp.where(is_known, visit.grid.scale, 1.0)
        value = jnp.where(jnp.all(is_known), visit.value, x)
        grid = visit.grid._replace(scale=scale)
        return visit._replace(value=value, grid=grid)

    def state(self, names: Sequence[str]) -> Any:
        """Returns the states of calibrators, which go from step to step."""
        return {name: self.qstate[name] for name in names if name in self.qstate}

    def inside(self, state: Any, step: jax.Array | None) -> "Updater":
        """Returns the visitor of a step, which moves ranges of its own."""
        found = super().inside(state, step)
        assert isinstance(found, Updater)
        return dataclasses.replace(found, qstate={**self.qstate, **state})

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Takes the ranges after the last step."""
        self.qstate.update(state)

    def _of_all_parts(self, x: jax.Array, spec: QSpec, reads_ends: bool) -> jax.Array:
        """Returns the values of all parts of a batch, or the ends of each scale."""
        if not reads_ends:
            return joined(x.reshape(x.shape or (1,)), self.axes)
        low, high = ends_of(*reduce_range(x, spec.axis), self.axes)
        # Along an axis that shares its scale.
        own = low.shape or (1,)
        along = next((d for d, n in enumerate(own) if n == 1), 0)
        return jnp.concatenate([low.reshape(own), high.reshape(own)], along)
