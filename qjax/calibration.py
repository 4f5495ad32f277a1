"""Calibrators: from the values seen at a site to the range of its grid.

A calibrator is four pure functions over a small pytree, its state. Nothing hides.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.affine import QParams, QSpec, min_max_params, reduce_range, scale_shape


class Calibrator(NamedTuple):
    """The functions that turn values into a range.

    Attributes:
      init: ``(x, spec) -> state``. Reads only the shape of ``x`` and ``spec.axis``.
      update: ``(x, state, spec) -> state``. Sees one batch.
      merge: ``(a, b) -> state``. The state after what ``a`` saw, then what ``b`` saw.
      params: ``(state, spec) -> QParams``. The scale is NaN before the first batch.
    """

    init: Callable[[jax.Array, QSpec], Any]
    update: Callable[[jax.Array, Any, QSpec], Any]
    merge: Callable[[Any, Any], Any]
    params: Callable[[Any, QSpec], QParams]


class MinMaxState(NamedTuple):
    """Range of all values seen."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. +inf before the first batch.
    high: jax.Array  # shape of the scale, dtype=float32. -inf before the first batch.


class EmaMinMaxState(NamedTuple):
    """Exponential moving average of the range."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. Not debiased.
    high: jax.Array  # shape of the scale, dtype=float32. Not debiased.


# Cached: two calls give the same functions, so that schemes compare and stack.
@functools.cache
def min_max() -> Calibrator:
    """Tracks the range of all values: ``low <- min(low, min(x))``, ditto ``high``.

    ``merge`` is associative and commutative.

    Example:
      >>> calibrator, spec = min_max(), QSpec(bits=8)
      >>> x = jnp.array([-1.0, 1.55])
      >>> state = calibrator.update(x, calibrator.init(x, spec), spec)
      >>> print(f"{calibrator.params(state, spec).scale:.6f}")
      0.010000
    """

    def init(x: jax.Array, spec: QSpec) -> MinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return MinMaxState(
            jnp.int32(0), jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf)
        )

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        low, high = reduce_range(x, spec.axis)
        return merge(state, MinMaxState(jnp.int32(1), low, high))

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        return MinMaxState(
            a.step + b.step, jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        )

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        return _params_if(state.step > 0, state.low, state.high, spec)

    return Calibrator(init, update, merge, params)


def ema_min_max(decay: float = 0.99) -> Calibrator:
    """Tracks the average range: ``low <- decay * low + (1 - decay) * min(x)``.

    ``params`` divides by ``1 - decay^step``, which removes the weight of the zero that
    the average starts from (Kingma and Ba, 2015, section 3, arXiv:1412.6980). ``merge``
    is associative, not commutative: it continues the average of ``a`` with that of
    ``b``.

    Args:
      decay: Share of the average that survives a batch, in [0, 1).

    Raises:
      ValueError: if ``decay`` is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
    return _ema_min_max(float(decay))


@functools.cache
def _ema_min_max(decay: float) -> Calibrator:
    log_decay = math.log(decay) if decay else -math.inf

    def init(x: jax.Array, spec: QSpec) -> EmaMinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return EmaMinMaxState(jnp.int32(0), jnp.zeros(shape), jnp.zeros(shape))

    def update(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = reduce_range(x, spec.axis)
        seen = (1.0 - decay) * low, (1.0 - decay) * high
        return merge(state, EmaMinMaxState(jnp.int32(1), *seen))

    def merge(a: EmaMinMaxState, b: EmaMinMaxState) -> EmaMinMaxState:
        kept = jnp.float32(decay) ** b.step.astype(jnp.float32)
        return EmaMinMaxState(
            a.step + b.step, kept * a.low + b.low, kept * a.high + b.high
        )

    def params(state: EmaMinMaxState, spec: QSpec) -> QParams:
        steps = jnp.maximum(state.step, 1).astype(jnp.float32)
        unbias = -1.0 / jnp.expm1(steps * jnp.float32(log_decay))
        low, high = state.low * unbias, state.high * unbias
        return _params_if(state.step > 0, low, high, spec)

    return Calibrator(init, update, merge, params)


def _params_if(
    is_calibrated: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec
) -> QParams:
    """NaN is loud where a made-up scale would be silent."""
    params = min_max_params(low, high, spec)
    scale = jnp.where(is_calibrated, params.scale, jnp.float32(jnp.nan))
    return params._replace(scale=scale)
