"""Calibrators by all values, by the last batch, and by a known range."""

import math
from typing import NamedTuple

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
from qjax.ranges import min_max_params, reduce_range
from qjax.rounding import floor_log2, power_of_two


class MinMaxState(NamedTuple):
    """The range of all values seen."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. +inf before the first batch.
    high: jax.Array  # shape of the scale, dtype=float32. -inf before the first batch.


class MeanStdState(NamedTuple):
    """The moments of all values seen."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    number: jax.Array  # shape=(), dtype=float32. Values per scale.
    mean: jax.Array  # shape of the scale, dtype=float32.
    deviation: jax.Array  # shape of the scale, dtype=float32. Of the population.
    low: jax.Array  # shape of the scale, dtype=float32. +inf before the first batch.
    high: jax.Array  # shape of the scale, dtype=float32. -inf before the first batch.


@named
def min_max(reduce: Reduce = value_range) -> Calibrator:
    """Tracks the range of all values: ``low <- min(low, min(x))``, likewise ``high``.

    ``merge`` is associative and commutative.

    Args:
      reduce: ``(x, spec) -> (low, high)`` of one batch.

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
            jnp.int32(0),
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return merge(state, MinMaxState(jnp.int32(1), *reduce(x, spec)))

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        return MinMaxState(
            a.step + b.step, jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        )

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    reads_ends = reduce is value_range
    return Calibrator(init, update, merge, params, reads_ends=reads_ends)


@named
def last_value(reduce: Reduce = value_range) -> Calibrator:
    """Keeps the range of the last batch alone, by TFMOT's rule for weights.

    ``merge`` is associative, not commutative: ``b`` wins if it saw a batch.

    Args:
      reduce: ``(x, spec) -> (low, high)`` of one batch.
    """
    init = min_max().init

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return MinMaxState(state.step + 1, *reduce(x, spec))

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        is_later = b.step > 0
        low, high = (jnp.where(is_later, *p) for p in zip(b[1:], a[1:], strict=True))
        return MinMaxState(a.step + b.step, low, high)

    reads_ends = reduce is value_range
    params = min_max().params
    return Calibrator(init, update, merge, params, reads_ends=reads_ends)


@named
def constant(low: float, high: float) -> Calibrator:
    """Makes a calibrator of a known range: batches are counted, and not read.

    ``merge`` is associative and commutative.

    Args:
      low: Least value.
      high: Largest value, above ``low``.

    Raises:
      TypeError: if an end is no number.
      ValueError: if ``low < high`` does not hold, or an end is not finite.
    """
    low, high = check_ends("constant", (low, high))

    def init(x: jax.Array, spec: QSpec) -> MinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return MinMaxState(
            jnp.int32(0),
            jnp.full(shape, low, jnp.float32),
            jnp.full(shape, high, jnp.float32),
        )

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return state._replace(step=state.step + 1)

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        return a._replace(step=a.step + b.step)

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        return min_max_params(state.low, state.high, spec)

    return Calibrator(init, update, merge, params, reads_ends=True)


@named
def mean_std(sigmas: float = 3.0) -> Calibrator:
    """Takes a number of standard deviations around the mean of all values as the range.

        [mean - sigmas * std, mean + sigmas * std], population deviation

    as far as values were seen: the range is cut to that of all values. Squares are
    taken in units of the range, a power of two, so that none leaves float32.

    ``merge`` is associative and commutative up to float rounding (Chan et al., 1979).

    Args:
      sigmas: Positive.

    Raises:
      TypeError: if ``sigmas`` is no number.
      ValueError: if ``sigmas`` is not positive and finite.
    """
    rule = "be positive and finite"
    check_option("sigmas", sigmas, rule, lambda v: 0 < v < math.inf)

    def init(x: jax.Array, spec: QSpec) -> MeanStdState:
        shape = scale_shape(x.shape, spec.axis)
        ends = (
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )
        zeros = jnp.zeros(shape, jnp.float32)
        return MeanStdState(jnp.int32(0), jnp.float32(0), zeros, zeros, *ends)

    def update(x: jax.Array, state: MeanStdState, spec: QSpec) -> MeanStdState:
        shape = scale_shape(x.shape, spec.axis)
        over = tuple(d for d in range(x.ndim) if not shape or shape[d] != x.shape[d])
        number = math.prod(x.shape) // max(math.prod(shape), 1)
        if not number:
            return state._replace(step=state.step + 1)
        low, high = reduce_range(x, spec.axis)
        unit, per = _units(jnp.maximum(-low, high))
        steps, keep = x.astype(jnp.float32) * per, bool(shape)
        mean = jnp.mean(steps, over, keepdims=keep)
        # Once more from the mean: the first is off by the rounding of its sum.
        mean += jnp.mean(steps - mean, over, keepdims=keep)
        apart, per_apart = _units(jnp.maximum(high * per - mean, mean - low * per))
        squares = jnp.mean(((steps - mean) * per_apart) ** 2, over, keepdims=keep)
        deviation = jnp.sqrt(squares) * apart * unit
        number = jnp.float32(number)
        new = MeanStdState(jnp.int32(1), number, mean * unit, deviation, low, high)
        return merge(state, new)

    def merge(a: MeanStdState, b: MeanStdState) -> MeanStdState:
        number = a.number + b.number
        share = b.number / jnp.maximum(number, 1.0)
        apart = b.mean - a.mean
        most = jnp.maximum(jnp.maximum(a.deviation, b.deviation), jnp.abs(apart))
        unit, per = _units(most)
        of_a, of_b, between = (
            (v * per) ** 2 for v in (a.deviation, b.deviation, apart)
        )
        within = of_a * (1.0 - share) + of_b * share
        deviation = jnp.sqrt(within + between * (share * (1.0 - share))) * unit
        is_new, is_old = a.number == 0, b.number == 0
        kept = lambda new, p, q: jnp.where(is_new, q, jnp.where(is_old, p, new))
        return MeanStdState(
            a.step + b.step,
            number,
            kept(a.mean + apart * share, a.mean, b.mean),
            kept(deviation, a.deviation, b.deviation),
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
        )

    def params(state: MeanStdState, spec: QSpec) -> QParams:
        wide = sigmas * state.deviation
        low = jnp.maximum(state.mean - wide, state.low)
        high = jnp.minimum(state.mean + wide, state.high)
        return params_if(state.step > 0, low, high, spec)

    return Calibrator(init, update, merge, params)


def _units(most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the power of two below a magnitude, and its reciprocal; 1 for zero."""
    exponent = jnp.clip(jnp.where(most > 0, floor_log2(most), 0), -126, 126)
    return power_of_two(exponent), power_of_two(-exponent)
