"""Calibrators that count values in bins: percentile, least error, least divergence.

The bins of a site lie around zero, `BINS` of a width that is a power of two. Where a
value does not fit, the width is doubled until it does, and neighbours are added up: no
count is ever split, so that histograms merge exactly, in any order.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.affine import QParams, QSpec, scale_shape
from qjax.calibration.calibrator import Calibrator, check_option, named, params_if
from qjax.ranges import min_max_params, reduce_range
from qjax.rounding import floor_log2, power_of_two

BINS = 4096
_HALF = BINS // 2
_NARROWEST = -126  # Exponent of the width before the first value.
# An estimate of an error is off by less than this share: below it, no clip is a gain.
_CLEAR_GAIN = 0.98


class HistogramState(NamedTuple):
    """The counts of all values seen, in bins that widen with the largest magnitude."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    exponent: jax.Array  # shape of the scale, dtype=int32. Bins are 2^exponent wide.
    counts: jax.Array  # shape of the scale + (BINS,), dtype=int32. From -BINS / 2 on.
    least: jax.Array  # shape of counts, dtype=float32. Least value in a bin, but zero.
    most: jax.Array  # shape of counts, dtype=float32. Largest value, but zero.
    zeros: jax.Array  # shape of the scale, dtype=int32. Values that are exactly zero.
    low: jax.Array  # shape of the scale, dtype=float32. Least value.
    high: jax.Array  # shape of the scale, dtype=float32. Largest value.


class Histogram(NamedTuple):
    """The histogram of one scale, in units of the width of a bin."""

    counts: jax.Array  # shape=(BINS,), dtype=int32.
    least: jax.Array  # shape=(BINS,), dtype=float32. Least value in a bin, but zero.
    most: jax.Array  # shape=(BINS,), dtype=float32. Largest value in a bin, but zero.
    zeros: jax.Array  # shape=(), dtype=int32. Values that are exactly zero.
    low: jax.Array  # shape=(), dtype=float32. Least value.
    high: jax.Array  # shape=(), dtype=float32. Largest value.
    unit: jax.Array  # shape=(), dtype=float32. Width of a bin, a power of two.


Range = tuple[jax.Array, jax.Array]
# From histogram to range: (counts, edges, low, high, spec) -> (low, high), one scale.
Search = Callable[..., Range]
_Find = Callable[[Histogram, QSpec], Range]


@named
def percentile(share: float = 99.99) -> Calibrator:
    """Takes the range that holds a given share of the values; outliers saturate.

    The ends are the percentiles ``100 - share`` and ``share`` of all values, linear
    between ranks; a rank is known to within its bin. ``merge`` is associative and
    commutative.

    Args:
      share: In percent, in (50, 100].

    Raises:
      ValueError: if ``share`` is outside (50, 100].
    """
    check_option("share", share, "lie in (50, 100]", lambda v: 50 < v <= 100)
    return histogram(_percentile(float(share)))


def _percentile(share: float) -> Search:
    def search(
        counts: jax.Array,
        edges: jax.Array,
        low: jax.Array,
        high: jax.Array,
        spec: QSpec,
    ) -> Range:
        if share == 100:
            return low, high
        total = jnp.cumsum(counts.astype(jnp.float32))
        last = total[-1] - 1.0

        def ranked(rank: jax.Array) -> jax.Array:
            """Returns the value of a rank from 0 on, spread evenly over its bin."""
            k = jnp.clip(jnp.searchsorted(total, rank, side="right"), 0, BINS - 1)
            before = jnp.where(k > 0, total[k - 1], 0.0)
            inside = (rank - before + 0.5) / jnp.maximum(total[k] - before, 1.0)
            return edges[k] + inside * (edges[k + 1] - edges[k])

        def end(rank: jax.Array) -> jax.Array:
            whole = jnp.floor(rank)
            a, b = ranked(whole), ranked(jnp.minimum(whole + 1.0, last))
            return a + (rank - whole) * (b - a)

        cut = (1.0 - share / 100.0) * last
        return end(cut), end(last - cut)

    return search


@named
def mse(candidates: int = 100) -> Calibrator:
    """Takes the part of the range whose grid has the least squared error.

        argmin_k E(k / candidates * [low, high]),  k from 1 on
        E(range) = sum(counts * mean((v - fake_quant(v; range))^2))

    The mean is that of values ``v`` spread evenly from the least to the largest one of
    a bin, in closed form; zeros have no error. The whole range is kept unless ``E``
    falls by 2 %, which is what the estimate is good for. ``merge`` is associative and
    commutative.

    Args:
      candidates: Number of parts that are tried.

    Raises:
      TypeError: if ``candidates`` is no whole number.
      ValueError: if there is not one candidate.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, numbers.Integral):
        raise TypeError(f"`candidates` must be a whole number, got {candidates!r}.")
    if candidates < 1:
        raise ValueError(f"`candidates` must be at least 1, got {candidates}.")

    def find(values: Histogram, spec: QSpec) -> Range:
        parts = jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates
        error = lambda part: _error(values, part * values.low, part * values.high, spec)
        errors = lax.map(error, parts)
        best = jnp.argmin(errors)
        part = jnp.where(errors[best] < _CLEAR_GAIN * errors[0], parts[best], 1.0)
        return part * values.low, part * values.high

    return _histogram(find)


@named
def entropy() -> Calibrator:
    """Takes the clip whose grid has the least Kullback-Leibler divergence.

    For each clip ``t`` of ``i`` bins of magnitude, the counts ``P`` inside it, with
    what lies outside added to the last one, are compared with ``Q``: the same counts
    summed to as many levels as the grid has on one side, each level spread evenly over
    its bins that are not empty.

        argmin_t sum(P * log(P / Q)),  P and Q normalised, empty bins of Q at 1e-9

    among the clips that serve: those whose squared error, ``E`` of `mse`, is 2 % less
    than that of the whole range, and those that hold it. Divergence knows shapes, not
    distances: on few values, or few levels, it is least where all values saturate.

    The bin at zero is left out: after a relu it holds half of the values, and every
    grid has a zero. The range is ``[low, high]`` clipped to ``[-t, t]``; all of it
    where the grid is finer than the bins. ``merge`` is associative and commutative.

    References:
      Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """

    def find(values: Histogram, spec: QSpec) -> Range:
        counts, low, high = values.counts, values.low, values.high
        sizes = (counts[_HALF:] + counts[_HALF - 1 :: -1]).astype(jnp.float32)
        sizes = sizes.at[0].set(0.0)
        codes = jnp.asarray(spec.qmax) - jnp.asarray(spec.qmin)
        is_halved = (low < 0) & (high > 0) | (spec.symmetric and spec.signed)
        levels = (codes.astype(jnp.float32) + 1.0) * jnp.where(is_halved, 0.5, 1.0)
        bins, whole = jnp.arange(_HALF), _error(values, low, high, spec)
        clipped = lambda clip: (jnp.maximum(low, -clip), jnp.minimum(high, clip))

        def divergence(i: jax.Array) -> jax.Array:
            inside = jnp.where(bins < i, sizes, 0.0)
            outside = jnp.sum(sizes) - jnp.sum(inside)
            p = inside + jnp.where(bins == i - 1, outside, 0.0)
            share = bins.astype(jnp.float32) * (levels / i.astype(jnp.float32))
            group = jnp.clip(share.astype(jnp.int32), 0, _HALF - 1)
            add = functools.partial(jax.ops.segment_sum, num_segments=_HALF)
            held, used = (
                add(inside, group),
                add((inside > 0).astype(jnp.float32), group),
            )
            q = jnp.where(inside > 0, held[group] / jnp.maximum(used[group], 1.0), 0.0)
            p, q = (v / jnp.maximum(jnp.sum(v), 1.0) for v in (p, q))
            ratio = jnp.where(p > 0, p, 1.0) / jnp.maximum(q, 1e-9)
            kl = jnp.sum(jnp.where(p > 0, p * jnp.log(ratio), 0.0))
            clip = i.astype(jnp.float32)
            error = _error(values, *clipped(clip), spec)
            serves = (error < _CLEAR_GAIN * whole) | (clip >= jnp.maximum(-low, high))
            is_candidate = serves & (clip >= levels) & (jnp.sum(inside) > 0)
            return jnp.where(is_candidate, kl, jnp.inf)

        clips = jnp.arange(_HALF, 0, -1)
        found = lax.map(divergence, clips)
        best = clips[jnp.argmin(found)]  # The whole range if there is no candidate.
        return clipped(best.astype(jnp.float32))

    return _histogram(find)


def _error(
    values: Histogram, low: jax.Array, high: jax.Array, spec: QSpec
) -> jax.Array:
    """Estimates the sum of squared errors of the grid of a range.

    With ``t = v / scale`` and ``n`` its code without the zero point, saturated, the
    integral of ``(t - n)^2`` from 0 to ``t`` is ``n / 12 + (t - n)^3 / 3``.
    """
    scale, zero_point = min_max_params(low, high, spec)
    zero = zero_point.astype(jnp.float32)
    first, last = (
        jnp.asarray(q).astype(jnp.float32) - zero for q in (spec.qmin, spec.qmax)
    )
    a, b = (v * (1.0 / scale) for v in (values.least, values.most))
    n, m = (jnp.clip(jnp.round(t), first, last) for t in (a, b))
    f, g = a - n, b - m
    within = (f * f + f * g + g * g) / 3.0
    across = ((m - n) / 12.0 + (g**3 - f**3) / 3.0) / jnp.maximum(b - a, 1e-3)
    narrow = 0.5 * (f * f + g * g)
    mean = jnp.where(n == m, within, jnp.where(b - a > 1e-3, across, narrow))
    counts = values.counts.at[_HALF].add(-values.zeros)
    weights = counts.astype(jnp.float32)
    return jnp.sum(jnp.where(counts > 0, weights * jnp.maximum(mean, 0.0), 0.0)) * (
        scale * scale
    )


@named
def histogram(search: Search) -> Calibrator:
    """Counts values in bins and finds the range from the counts.

    ``merge`` is associative and commutative, exactly, up to 2^31 - 1 values a bin.

    Args:
      search: ``(counts, edges, low, high, spec) -> (low, high)`` of one scale: `BINS`
        counts, ``BINS + 1`` edges, the least and the largest value seen.

    Returns:
      A calibrator. Values count by magnitude from 2^-126 on.

    Raises:
      TypeError: if ``search`` is no function.
    """
    if not callable(search):
        raise TypeError(f"`search` must be a function, got {search!r}.")

    def find(values: Histogram, spec: QSpec) -> Range:
        whole, unit = jnp.arange(-_HALF, _HALF + 1, dtype=jnp.float32), values.unit
        seen = values.low * unit, values.high * unit
        low, high = search(values.counts, whole * unit, *seen, spec)
        return low / unit, high / unit

    return _histogram(find)


def _histogram(find: _Find) -> Calibrator:
    """Makes a calibrator from a search in units of the width of a bin."""

    def init(x: jax.Array, spec: QSpec) -> HistogramState:
        shape = scale_shape(x.shape, spec.axis)
        return HistogramState(
            jnp.int32(0),
            jnp.full(shape, _NARROWEST, jnp.int32),
            jnp.zeros((*shape, BINS), jnp.int32),
            jnp.full((*shape, BINS), jnp.inf, jnp.float32),
            jnp.full((*shape, BINS), -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.int32),
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )

    def update(x: jax.Array, state: HistogramState, spec: QSpec) -> HistogramState:
        if x.size == 0:
            return state._replace(step=state.step + 1)
        return merge(state, _counted(x.astype(jnp.float32), spec))

    def merge(a: HistogramState, b: HistogramState) -> HistogramState:
        exponent = jnp.maximum(a.exponent, b.exponent)
        left, right = (_widen(s, exponent - s.exponent) for s in (a, b))
        return HistogramState(
            a.step + b.step,
            exponent,
            left[0] + right[0],
            jnp.minimum(left[1], right[1]),
            jnp.maximum(left[2], right[2]),
            a.zeros + b.zeros,
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
        )

    def params(state: HistogramState, spec: QSpec) -> QParams:
        shape = state.low.shape
        seen = state.step > 0
        held = (
            jnp.where(seen, end, 0.0).reshape(-1) for end in (state.low, state.high)
        )
        bins = (v.reshape(-1, BINS) for v in (state.counts, state.least, state.most))
        zeros, exponent = state.zeros.reshape(-1), state.exponent.reshape(-1)
        flat = (exponent, *bins, zeros, *held)
        one = functools.partial(_searched, find, spec)
        low, high = (end.reshape(shape) for end in jax.vmap(one)(*flat))
        return params_if(seen, low, high, spec)

    return Calibrator(init, update, merge, params)


def _counted(real: jax.Array, spec: QSpec) -> HistogramState:
    """Counts the values of one batch in the narrowest bins that hold them."""
    low, high = reduce_range(real, spec.axis)
    exponent = jnp.maximum(_exponent(jnp.maximum(-low, high)), _NARROWEST)
    place = jnp.floor(real * power_of_two(-exponent))
    k = jnp.clip(place, -_HALF, _HALF - 1).astype(jnp.int32) + _HALF
    number = math.prod(low.shape)
    scale = jnp.broadcast_to(jnp.arange(number).reshape(low.shape), real.shape)
    flat, values = (k + scale * BINS).reshape(-1), real.reshape(-1)
    is_zero = values == 0
    bins = jnp.zeros(number * BINS, jnp.int32)
    counts = bins.at[flat].add(1)
    least = (
        jnp.full(bins.shape, jnp.inf, jnp.float32)
        .at[flat]
        .min(jnp.where(is_zero, jnp.inf, values))
    )
    most = (
        jnp.full(bins.shape, -jnp.inf, jnp.float32)
        .at[flat]
        .max(jnp.where(is_zero, -jnp.inf, values))
    )
    zeros = (
        jnp.zeros(number, jnp.int32)
        .at[scale.reshape(-1)]
        .add(is_zero.astype(jnp.int32))
    )
    counts, least, most = (v.reshape(*low.shape, BINS) for v in (counts, least, most))
    zeros, step = zeros.reshape(low.shape), jnp.int32(1)
    return HistogramState(step, exponent, counts, least, most, zeros, low, high)


def _searched(
    find: _Find,
    spec: QSpec,
    exponent: jax.Array,
    counts: jax.Array,
    least: jax.Array,
    most: jax.Array,
    zeros: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> Range:
    """Searches the range of one scale, from the fields of its state."""
    unit, per = power_of_two(exponent), power_of_two(-exponent)
    # Bins without values have infinite ends.
    least, most = (jnp.where(jnp.isfinite(v), v * per, 0.0) for v in (least, most))
    values = Histogram(counts, least, most, zeros, low * per, high * per, unit)
    start, stop = find(values, spec)
    return jnp.clip(start * unit, low, high), jnp.clip(stop * unit, low, high)


def _exponent(most: jax.Array) -> jax.Array:
    """Returns the exponent of the least bin width that holds a magnitude."""
    return floor_log2(most) + 1 - (_HALF.bit_length() - 1)


def _widen(state: HistogramState, times: jax.Array) -> tuple[jax.Array, ...]:
    """Doubles the bin width ``times`` times; returns counts, least and most."""
    shape = state.counts.shape
    places = jnp.arange(-_HALF, _HALF, dtype=jnp.int32)

    def one(counts, least, most, times):
        wider = (places >> jnp.minimum(times, 31)) + _HALF
        return (
            jnp.zeros_like(counts).at[wider].add(counts),
            jnp.full_like(least, jnp.inf).at[wider].min(least),
            jnp.full_like(most, -jnp.inf).at[wider].max(most),
        )

    bins = (v.reshape(-1, BINS) for v in (state.counts, state.least, state.most))
    flat = (*bins, times.reshape(-1))
    wide = jax.vmap(one)(*flat)
    return tuple(v.reshape(shape) for v in wide)
