"""Visitors of a simulation, which see or round the values at its sites."""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax import quantizers
from qjax.affine import QParams, QSpec, fake_quant
from qjax.calibration.calibrator import Calibrator, check_calibrated
from qjax.calls import shared
from qjax.estimators import clipped_ste, plain_ste
from qjax.integer_calls import SoftmaxCall
from qjax.mesh_axes import axes_of, ends_of, joined
from qjax.model.common_scales import CodeEnds, held_scale
from qjax.model.exact import Exact, Unmasked, coded_masks
from qjax.model.visits import Biases, Pending, Rounded, Visit
from qjax.qpoint import Estimator, known_zeros
from qjax.quantizers.point import Point, make_point
from qjax.quantizers.spec import Spec, is_known
from qjax.ranges import min_max_params, reduce_range
from qjax.schemes.patterns import Site
from qjax.schemes.resolution import Choices
from qjax.schemes.words import is_random

# Least scale of a weight; times that of its input it is no denormal number.
_LEAST_SCALE = 2.0**-96

FINE = QSpec(16)  # Word of an activation whose levels are on no grid of their own.


QState = dict[str, Any]  # Name of an activation site -> state of its calibrator.

LEARNED = "learned"  # Name in a state, under which the learned arrays are, by site.


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A visitor that leaves values in float and records them by site."""

    values: dict[str, jax.Array]
    weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Records the values of a site."""
        seen = x if unit is None else unit.seen(x)
        self.values[site.name] = seen
        return Visit(x if isinstance(unit, Unmasked) else seen)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        """Records a weight."""
        self.weights[site.name] = x
        return Visit(x)

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Leaves a bias as it is."""
        return Visit(x)

    def takes_factors(self, site: Site) -> bool:
        """Returns that no factor goes into a weight."""
        return False

    @property
    def draws(self) -> bool:
        """Returns that steps of a loop do not differ by their numbers."""
        return False

    @property
    def seen(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns the values and weights of a step."""
        return self.values, self.weights

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Leaves a value as it is."""
        return Visit(x)

    def state(self, names: Sequence[str]) -> tuple[()]:
        """Returns nothing: steps go on from nothing."""
        return ()

    def inside(self, state: Any, step: jax.Array | None) -> "Recorder":
        """Returns a recorder of one step."""
        return dataclasses.replace(self, values={}, weights={})

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Records the values of all steps as those of one larger batch."""
        for own, found in zip((self.values, self.weights), seen, strict=True):
            for name, x in found.items():
                x = x.reshape(-1, *x.shape[2:])
                if name in starts:
                    first = starts[name].astype(x.dtype)
                    x = jnp.concatenate([first if first.ndim else first[None], x])
                own[name] = x


@dataclasses.dataclass(frozen=True)
class WeightRecorder(Recorder):
    """A recorder of all weights: also those that only scale what is on a grid."""

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Leaves a value as it is, and says that it is on the integers."""
        found = super().activation(site, x, unit)
        return found._replace(grid=QParams(jnp.float32(1), known_zeros()))


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A visitor that puts values on the grids of a scheme.

    Attributes:
      choices: The scheme, resolved at the sites of the model.
      qstate: Ranges of the activations; under `LEARNED` the learned arrays by site.
      key: Key of the words that draw at random; None for their deterministic form,
        which has no derivative then.
    """

    choices: Choices
    qstate: QState
    key: chex.PRNGKey | None = None

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Rounds to the grid of the state's range, or to a known grid."""
        spec, kept = self.choices[site].word, None
        if isinstance(unit, Unmasked) and not unit.is_input:
            unit = None
        if not isinstance(spec, QSpec):
            unit = None if isinstance(unit, Unmasked) else unit
            if isinstance(unit, Exact) and spec is not None and self.key is None:
                x = self._in_integers(site, x, unit, spec)
            elif unit is not None:
                x = x * unit.per(1.0)
            return self._apply(site, x, spec)
        if site.name not in self.qstate:
            raise ValueError(
                f"The state has no range for the site {site.name!r}: calibrate this "
                f"model. The state knows {', '.join(self.qstate) or 'no site'}."
            )
        params = self._grid(site, spec)
        visit = functools.partial(
            Visit,
            grid=params,
            word=spec if spec.symmetric else None,
            is_byte=is_known(spec.bits) and bool(np.all(np.asarray(spec.bits) <= 8)),
        )
        if isinstance(unit, Unmasked):
            x, kept, unit = *self._coded_masks(site, x, params, spec), None
        if isinstance(unit, Exact) and not params.scale.ndim:
            is_clipped = self.choices[site].estimator is not plain_ste
            x, unit = unit.on_grid(params, spec, is_clipped=is_clipped), None
        if unit is None:
            return visit(self._round(site, x, params, spec), kept=kept)
        if params.scale.ndim:
            x = x * unit.per(1.0)
            return visit(self._round(site, x, params, spec))
        # On a grid of scale 1, where a tie between two codes is exactly one.
        steps = x * unit.per(params.scale)
        ones = params._replace(scale=jnp.ones_like(params.scale))
        codes = self._round(site, steps, ones, spec)
        return visit(codes * params.scale.astype(x.dtype))

    def _coded_masks(
        self, site: Site, x: jax.Array, params: QParams, spec: QSpec
    ) -> tuple[jax.Array, jax.Array]:
        """Returns an input that is added before a softmax, and what does not mask."""
        is_long = is_known(spec.bits) and bool(np.any(np.asarray(spec.bits) > 16))
        if is_long or params.scale.ndim:
            raise ValueError(
                f"The input at {site.name!r} is added before a softmax, where a code "
                "of its own says what masks: that wants one scale and at most 16 bits, "
                f"got axis={spec.axis} and bits={spec.bits}. Use "
                f'Rule("{site.name}", QSpec(bits=16)), or pass the mask as truth '
                "values and select by it, `jnp.where(mask, scores, -1e9)`."
            )
        return coded_masks(x, params, spec)

    def _in_integers(
        self, site: Site, x: jax.Array, unit: Exact, spec: Spec
    ) -> jax.Array:
        """Returns what integers compute, on the grid from which a quantizer goes.

        That is the grid of the quantizer, if its codes are one rounding, else for a
        softmax one of 2^-15; other values stay real.
        """
        point = make_point(spec, None, x, *self._learned(site, spec))
        is_line, scale = point.is_direct and not point.is_curve, point.scale
        if is_line and scale is not None and scale.size == 1:
            scale, zero = lax.stop_gradient(scale).reshape(()), point.zero_point
            zero = known_zeros(()) if zero is None else jnp.reshape(zero, ())
            return unit.on_grid(QParams(scale, zero), CodeEnds(point.qmin, point.qmax))
        if isinstance(unit.call, SoftmaxCall):
            fine = QParams(jnp.float32(2.0**-15), known_zeros(()))
            return unit.on_grid(fine, CodeEnds(0, 2**15 - 1))
        return x * unit.per(1.0)

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Rounds a bias by a quantizer; an affine word waits for the accumulator."""
        spec = self.choices.biases[site.name]
        if isinstance(spec, QSpec):
            return Visit(x, None, spec)
        return self._apply(site, x, spec)

    def takes_factors(self, site: Site) -> bool:
        """Returns whether the range of a weight is found in its values."""
        return isinstance(self.choices[site].word, QSpec)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        """Rounds a weight to the grid of its own range."""
        spec = self.choices[site].word
        if not isinstance(spec, QSpec):
            return self._apply(site, x, spec)
        scale, low, high = shared(_weight_scale, x, spec)
        least = self._least_scale(spec, scale, biases)
        if least is not None:
            is_zero = (low == 0) & (high == 0) & (least > 0)  # The scale is 1.
            scale = jnp.where(is_zero, least, jnp.maximum(scale, least))
            scale = jnp.maximum(scale, _LEAST_SCALE)
        params = QParams(scale, known_zeros(scale.shape))
        value = self._round(site, x, params, spec)
        return Visit(value, params, rounded=Rounded(value, x, low, high, spec))

    @property
    def draws(self) -> bool:
        """Returns whether there is a key, of which each step of a loop has its own."""
        return self.key is not None

    @property
    def seen(self) -> tuple[()]:
        """Returns nothing: steps of a loop record nothing."""
        return ()

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Rounds to the grid of a site as it is now."""
        return Quantizer.activation(self, site, x, None)

    def state(self, names: Sequence[str]) -> Any:
        """Returns nothing: ranges stay from step to step."""
        return ()

    def inside(self, state: Any, step: jax.Array | None) -> "Quantizer":
        """Returns the visitor of a step, with a key of its own."""
        if self.key is None or step is None:
            return self
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, step))

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Takes nothing from a loop."""

    def known_grid(self, site: Site) -> QParams | None:
        """Returns the grid of a site; None if its range or its bits are traced."""
        spec, leader = self.choices[site].word, self.choices[site].leader
        if not isinstance(spec, QSpec):
            return None
        leaves = jax.tree.leaves((self.qstate[leader.name], spec.bits))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return None
        with jax.ensure_compile_time_eval():
            return self._grid(site, spec)

    def _grid(self, site: Site, spec: QSpec) -> QParams:
        """Returns the grid of a site, or of the site that leads it."""
        leader = self.choices[site].leader
        calibrator = self.choices[leader].calibrator
        state = self.qstate[leader.name]
        params = shared(calibrator.params, state, spec)
        check_calibrated(params, leader.name)
        if params.scale.ndim and spec.symmetric:
            params = _filled(params, calibrator, state, spec)
        if _is_fresh(state):
            # A constant of the traced program, which is looked at outside of it.
            with jax.ensure_compile_time_eval():
                known = calibrator.params(state, dataclasses.replace(spec, bits=8))
            check_calibrated(known, leader.name)
        return params

    def _least_scale(
        self, spec: QSpec, scale: jax.Array, biases: Biases
    ) -> jax.Array | None:
        """Returns the least scale of a weight under its constraints, if any.

            scale >= |bias| / (scale_x * qmax of the bias)
            scale >= least_range / (|factor| * qmax)

        None if they say nothing.
        """
        constraints, floors = self.choices.constraints, []
        if constraints.bias_bits is None and not constraints.least_range:
            return None
        top = jnp.asarray(spec.qmax).astype(jnp.float32)
        found = biases()
        if not found:
            floors.append(jnp.float32(constraints.least_range) / top)
        for data, bias, factor in found:
            bias, factor = (jax.lax.stop_gradient(v) for v in (bias, factor))
            gain = jnp.where(factor == 0, 1.0, jnp.abs(factor)).astype(jnp.float32)
            floors.append(constraints.least_range / top / gain)
            word = self.choices[data].word
            if constraints.bias_bits is not None and isinstance(word, QSpec):
                most = 2.0 ** (constraints.bias_bits - 1) - 1.0
                step = jnp.min(self._grid(data, word).scale)
                floors.append(jnp.abs(bias).astype(jnp.float32) / (step * most))
        return functools.reduce(jnp.maximum, (_over(f, scale) for f in floors))

    def _apply(self, site: Site, x: jax.Array, spec: Spec | None) -> Visit:
        """Rounds by a quantizer that finds its own grid; None leaves the value."""
        if spec is None:
            return Visit(x)
        learned, key = self._learned(site, spec), None
        if is_random(spec):
            key = self._key(site, x)
            x = _deterministic(site.name, x) if key is None else x
        own: dict[str, Any] = {
            "key": key,
            "estimator": self._estimator(site),
            "site": site.name,
        }
        value = quantizers.apply(spec, x, *learned, **own)
        params = quantizers.encode(spec, x, *learned, key=key).params
        fine = self.fine_scale(site, make_point(spec, key, x, *learned))
        if fine is not None:
            params = QParams(fine, known_zeros(()))
            value = fake_quant(value, params, FINE, site=site.name)
        return Visit(value, params)

    def fine_scale(self, site: Site, point: Point) -> jax.Array | None:
        """Returns the scale of the codes of an activation whose levels have none."""
        if point.scale is not None or site.role != "activation":
            return None
        return point.fine

    def _learned(self, site: Site, spec: Spec) -> tuple[jax.Array, ...]:
        """Returns the learned arrays of a site, in the order of the arguments."""
        if spec.learning is None:
            return ()
        arrays = self.qstate[LEARNED][site.name]
        return tuple(arrays[name] for name in spec.learning.names)

    def _estimator(self, site: Site) -> Estimator | None:
        """Returns the backward pass of a site; that of a bias is its quantizer's."""
        choice = self.choices.sites.get(site.name)
        return None if choice is None else choice.estimator

    def _key(self, site: Site, x: jax.Array) -> chex.PRNGKey | None:
        """Returns the key of a site, another one for each part of a mesh."""
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, zlib.crc32(site.name.encode()))
        for axis in sorted(axes_of(jax.typeof(x))):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return key

    def _round(
        self, site: Site, x: jax.Array, params: QParams, spec: QSpec
    ) -> jax.Array:
        estimator = self.choices[site].estimator
        assert estimator is not None
        if estimator is clipped_ste and site.role == "weight" and _holds_all(spec):
            estimator = plain_ste  # The same without a mask.
        return fake_quant(x, params, spec, site=site.name, estimator=estimator)


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
        is_fresh = state is not None and _is_fresh(state)
        if is_fresh and isinstance(spec, QSpec):
            # Known outside of the traced program, where it would be refused.
            real = jax.lax.stop_gradient(x)
            state = self.choices[leader].calibrator.update(real, state, spec)
            own = {**self.qstate, leader.name: state}
            visitor = dataclasses.replace(self, qstate=own)
        visit = Quantizer.at(visitor, site, x)
        if visit.grid is None:
            return visit
        is_known = ~jnp.isnan(visit.grid.scale) & (not is_fresh)
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


def check_key(choices: Choices, key: chex.PRNGKey | None) -> None:
    """Warns of a key that no word draws with."""
    if key is not None and not choices.random():
        warnings.warn(
            "`key` is not used: no word of the scheme draws at random.", stacklevel=3
        )


def _filled(
    params: QParams, calibrator: Calibrator, state: Any, spec: QSpec
) -> QParams:
    """Gives channels with an empty range the scale of the widest channel.

    An empty range has scale 1 in every word; beside it others may be of no account.
    """
    words = (dataclasses.replace(spec, bits=bits) for bits in (4, 5))
    ones = [calibrator.params(state, word).scale == 1 for word in words]
    is_empty = ones[0] & ones[1]
    most = jnp.max(jnp.where(is_empty, 0.0, params.scale))
    scale = jnp.where(is_empty & (most > 0), most, params.scale)
    if spec.power_of_two:
        scale = held_scale(scale, spec.bits)
    return params._replace(scale=scale)


def _holds_all(spec: QSpec) -> bool:
    """Returns whether no code of a weight saturates, as its range is that of all.

    A traced word counts as one of at least 2 bits: one of 1 bit is refused where it is
    known.
    """
    is_short = is_known(spec.bits) and bool(np.any(np.asarray(spec.bits) < 2))
    return spec.signed and not is_short


def _weight_scale(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scale of a weight by its own range, and the ends of that."""
    low, high = reduce_range(x, spec.axis)
    symmetric = dataclasses.replace(spec, symmetric=True)
    scale = min_max_params(low, high, symmetric).scale
    return jnp.maximum(scale, _LEAST_SCALE), low, high


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the maximum of numbers over all that shares a scale of a weight."""
    if not scale.ndim or not jnp.ndim(x):
        return jnp.max(x)
    over = tuple(d for d, n in enumerate(scale.shape) if n == 1)
    return jnp.max(x, over, keepdims=True)


def _is_fresh(state: Any) -> bool:
    """Returns whether a state is known and has seen no batch."""
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))
    return not is_traced and bool(np.all(np.asarray(getattr(state, "step", 1)) == 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _deterministic(site: str, x: jax.Array) -> jax.Array:
    """Returns a value whose derivative is refused, as no key draws for the site."""
    return x


@_deterministic.defjvp
def _refuse_derivative(site: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"The word at {site!r} draws at random in training, and there is no key: pass "
        "`key=` to `apply`, another one in each step."
    )
