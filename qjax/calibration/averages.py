"""Calibrators that average the ranges of batches."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.affine import QParams, QSpec, scale_shape
from qjax.calibration.calibrator import (
    Calibrator,
    Reduce,
    check_ends,
    check_option,
    named,
    params_if,
    value_range,
)
from qjax.ranges import reduce_range
from qjax.rounding import product


def _check_share(name: str, value: Any) -> None:
    check_option(name, value, "lie in [0, 1)", lambda v: 0 <= v < 1)


class MovingState(NamedTuple):
    """A moving average of a range, which starts from the first batch."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    first_low: jax.Array  # shape of the scale, dtype=float32. Of the first batch.
    first_high: jax.Array
    low: jax.Array  # shape of the scale, dtype=float32.
    high: jax.Array


class EmaMinMaxState(NamedTuple):
    """An exponential moving average of the range."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. Not debiased.
    high: jax.Array  # shape of the scale, dtype=float32. Not debiased.


@named
def ema_min_max(
    decay: float = 0.99,
    initial: tuple[float, float] | None = None,
    reduce: Reduce = value_range,
) -> Calibrator:
    """Tracks the average range: ``low <- decay * low + (1 - decay) * min(x)``.

    From zero, ``params`` divides by ``1 - decay^step``, which removes the weight of the
    zero that the average starts from (Kingma and Ba, 2015, section 3, arXiv:1412.6980).
    From an ``initial`` range the rule is TFMOT's: ``low <- low - (1 - decay) * (low -
    min(x))``, nothing removed; TFMOT starts from (-6, 6) with decay 0.999, which takes
    some 5,000 batches to forget.

    ``merge`` is associative, not commutative: it continues the average of ``a`` with
    that of ``b``.

    Args:
      decay: Share of the average that survives a batch, in [0, 1).
      initial: Range to start from; None: from zero, debiased.
      reduce: ``(x, spec) -> (low, high)`` of one batch.

    Raises:
      TypeError: if ``decay`` is no number, ``initial`` no pair, or ``reduce`` no
        function.
      ValueError: if ``decay`` is outside [0, 1), or ``initial`` no range.
    """
    _check_share("decay", decay)
    if initial is not None:
        return _started_ema(float(decay), check_ends("initial", initial), reduce)
    return _ema_min_max(float(decay), reduce)


def _ema_min_max(decay: float, reduce: Reduce) -> Calibrator:
    log_decay = math.log(decay) if decay else -math.inf

    def init(x: jax.Array, spec: QSpec) -> EmaMinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return EmaMinMaxState(
            jnp.int32(0), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        )

    def update(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = reduce(x, spec)
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
        return params_if(state.step > 0, low, high, spec)

    reads_ends = reduce in (value_range, magnitude_range)
    return Calibrator(init, update, merge, params, reads_ends=reads_ends)


def _started_ema(
    decay: float, initial: tuple[float, ...], reduce: Reduce
) -> Calibrator:
    def init(x: jax.Array, spec: QSpec) -> EmaMinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return EmaMinMaxState(
            jnp.int32(0), *(jnp.full(shape, v, jnp.float32) for v in initial)
        )

    def update(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = _follow((state.low, state.high), reduce(x, spec), decay)
        return EmaMinMaxState(state.step + 1, low, high)

    def merge(a: EmaMinMaxState, b: EmaMinMaxState) -> EmaMinMaxState:
        kept = jnp.float32(decay) ** b.step.astype(jnp.float32)
        low, high = (
            jnp.where(b.step == 0, old, new + kept * (old - start))
            for new, old, start in zip(b[1:], a[1:], initial, strict=True)
        )
        return EmaMinMaxState(a.step + b.step, low, high)

    def params(state: EmaMinMaxState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    reads_ends = reduce in (value_range, magnitude_range)
    return Calibrator(init, update, merge, params, reads_ends=reads_ends)


def _follow(old: Any, new: Any, decay: float) -> tuple[jax.Array, jax.Array]:
    """Computes ``old - (old - new) * (1 - decay)`` of both ends in this order."""
    share = jnp.float32(1.0 - decay)
    low, high = (a - product(a - b, share) for a, b in zip(old, new, strict=True))
    return low, high


def magnitude_range(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Returns ``(-max|x|, max|x|)`` of each scale."""
    low, high = reduce_range(x, spec.axis)
    most = jnp.maximum(-low, high)
    return -most, most


@named
def moving_max(momentum: float = 0.9) -> Calibrator:
    """Tracks the average of the largest magnitude from the first batch on.

        r <- max|x| of the first batch; then r <- r - (r - max|x|) * (1 - momentum)

    QuantizeML's observer, with the batches counted: there a first maximum of exactly 1
    is forgotten. ``merge`` is associative, not commutative.

    Args:
      momentum: Share of the average that survives a batch, in [0, 1).

    Raises:
      ValueError: if ``momentum`` is outside [0, 1).
    """
    return moving_min_max(momentum, magnitude_range)


@named
def moving_min_max(momentum: float = 0.9, reduce: Reduce = value_range) -> Calibrator:
    """Tracks the average of both ends of the range from the first batch on.

    Otherwise like `moving_max`; QuantizeML's observer of inputs.

    Args:
      momentum: Share of the average that survives a batch, in [0, 1).
      reduce: ``(x, spec) -> (low, high)`` of one batch.

    Raises:
      ValueError: if ``momentum`` is outside [0, 1).
    """
    _check_share("momentum", momentum)
    return _moving(float(momentum), reduce)


def _moving(momentum: float, reduce: Reduce) -> Calibrator:
    def init(x: jax.Array, spec: QSpec) -> MovingState:
        zeros = jnp.zeros(scale_shape(x.shape, spec.axis), jnp.float32)
        return MovingState(jnp.int32(0), zeros, zeros, zeros, zeros)

    def update(x: jax.Array, state: MovingState, spec: QSpec) -> MovingState:
        new, is_first = reduce(x, spec), state.step == 0
        moved = _follow((state.low, state.high), new, momentum)
        low, high = (
            jnp.where(is_first, *pair) for pair in zip(new, moved, strict=True)
        )
        started = jnp.where(is_first, low, state.first_low)
        ended = jnp.where(is_first, high, state.first_high)
        return MovingState(state.step + 1, started, ended, low, high)

    def merge(a: MovingState, b: MovingState) -> MovingState:
        # The first batch of b came with weight 1; after a it has 1 - momentum.
        kept = jnp.float32(momentum) ** b.step.astype(jnp.float32)
        low = b.low + kept * (a.low - b.first_low)
        high = b.high + kept * (a.high - b.first_high)
        both = MovingState(a.step + b.step, a.first_low, a.first_high, low, high)
        one = jax.tree.map(lambda p, q: jnp.where(b.step == 0, p, q), a, both)
        return jax.tree.map(lambda p, q: jnp.where(a.step == 0, p, q), b, one)

    def params(state: MovingState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    reads_ends = reduce in (value_range, magnitude_range)
    return Calibrator(init, update, merge, params, reads_ends=reads_ends)
