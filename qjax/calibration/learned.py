"""Calibrator of sites whose words learn their grid: statistics for their start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import Calibrator, params_if
from qjax.quantizers.learning import Statistics, statistics


class LearnedState(NamedTuple):
    """Statistics of all values of a site so far."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    size: jax.Array  # shape=(), dtype=float32. Values of one scale.
    low: jax.Array  # shape of the scale, dtype=float32.
    high: jax.Array  # shape of the scale, dtype=float32.
    mean: jax.Array  # shape of the scale, dtype=float32.
    mean_abs: jax.Array  # shape of the scale, dtype=float32.
    squares: jax.Array  # shape of the scale, dtype=float32. Sum of (x - mean)^2.

    def statistics(self) -> Statistics:
        """Returns what learned arrays start from; NaN before the first batch."""
        deviation = jnp.sqrt(self.squares / jnp.maximum(self.size, 1.0))
        found = Statistics(self.low, self.high, self.mean, self.mean_abs, deviation)
        is_known = self.step > 0
        return Statistics(*(jnp.where(is_known, x, jnp.nan) for x in found))


def _init(x: Any, spec: Any) -> LearnedState:
    zeros = jnp.zeros(spec.learning.shape(spec, x.shape), jnp.float32)
    zero = jnp.float32(0)
    return LearnedState(jnp.int32(0), zero, zeros, zeros, zeros, zeros, zeros)


def _update(x: jax.Array, state: LearnedState, spec: Any) -> LearnedState:
    found = statistics(x, spec.learning.shape(spec, x.shape))
    count = jnp.float32(x.size / max(1, state.low.size))
    squares = found.deviation * found.deviation * count
    batch = LearnedState(jnp.int32(1), count, *found[:4], squares)
    return _merge(state, batch)


def _merge(a: LearnedState, b: LearnedState) -> LearnedState:
    count = a.size + b.size
    share = b.size / jnp.maximum(count, 1.0)
    off = b.mean - a.mean
    is_first, is_last = a.step == 0, b.step == 0
    least = jnp.where(is_last, a.low, jnp.minimum(a.low, b.low))
    most = jnp.where(is_last, a.high, jnp.maximum(a.high, b.high))
    return LearnedState(
        a.step + b.step,
        count,
        jnp.where(is_first, b.low, least),
        jnp.where(is_first, b.high, most),
        a.mean + off * share,
        a.mean_abs + (b.mean_abs - a.mean_abs) * share,
        a.squares + b.squares + off * off * a.size * share,
    )


def _params(state: LearnedState, spec: Any) -> QParams:
    word = QSpec(8, axis=getattr(spec, "axis", None))
    return params_if(state.step > 0, state.low, state.high, word)


# Range, mean magnitude and deviation of all values, merged as Chan et al., "Updating
# Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, eq. 2.1.
learned_start = Calibrator(_init, _update, _merge, _params, "learned_start()")
