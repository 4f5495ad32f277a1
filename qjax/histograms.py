"""Calibrators that count values in bins: percentile, least error, least divergence.

The bins of a site lie around zero, `BINS` of a width that is a power of two. Where a
value does not fit, the width is doubled until it does, and neighbours are added up: no
count is ever split, so that histograms merge exactly, in any order.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.affine import (
    QParams,
    QSpec,
    dequantize,
    grid_codes,
    min_max_params,
    reduce_range,
    scale_shape,
)
from qjax.calibration import Calibrator, named, params_if
from qjax.rounding import floor_log2, power_of_two

BINS = 4096
_HALF = BINS // 2
_NARROWEST = -102  # Exponent of the width before the first value.


class HistogramState(NamedTuple):
    """Counts of all values seen, by the magnitude of the largest."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    exponent: jax.Array  # shape of the scale, dtype=int32. Bins are 2^exponent wide.
    counts: jax.Array  # shape of the scale + (BINS,), dtype=int32. From -BINS / 2 on.
    low: jax.Array  # shape of the scale, dtype=float32. Least value.
    high: jax.Array  # shape of the scale, dtype=float32. Largest value.


Ends = tuple[jax.Array, jax.Array]
# From histogram to range: (counts, edges, low, high, spec) -> (low, high), one scale.
Search = Callable[..., Ends]


@named
def percentile(share: float = 99.99) -> Calibrator:
    """Takes the range that holds a share of the values: outliers saturate.

    The ends are the percentiles ``100 - share`` and ``share`` of all values, linear
    between ranks; a rank is known to within its bin. ``merge`` is associative and
    commutative.

    Args:
      share: In percent, in (50, 100].

    Raises:
      ValueError: if ``share`` is outside (50, 100].
    """
    if not 50 < share <= 100:
        raise ValueError(f"`share` must lie in (50, 100], got {share}.")
    return histogram(_percentile(float(share)))


def _percentile(share: float) -> Search:
    def search(
        counts: jax.Array,
        edges: jax.Array,
        low: jax.Array,
        high: jax.Array,
        spec: QSpec,
    ) -> Ends:
        if share == 100:
            return low, high
        total = jnp.cumsum(counts.astype(jnp.float32))
        last = total[-1] - 1.0

        def ranked(rank: jax.Array) -> jax.Array:
            """The value of a rank, from 0 on: spread evenly over its bin."""
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

        argmin_k sum(counts * (v - fake_quant(v; k / candidates * [low, high]))^2)

    over the centres ``v`` of the bins, ``k`` from 1 on; the widest of equal errors.
    ``merge`` is associative and commutative.

    Args:
      candidates: How many parts are tried.

    Raises:
      ValueError: if there is not one candidate.
    """
    if candidates < 1:
        raise ValueError(f"`candidates` must be at least 1, got {candidates}.")

    def search(
        counts: jax.Array,
        edges: jax.Array,
        low: jax.Array,
        high: jax.Array,
        spec: QSpec,
    ) -> Ends:
        centres = 0.5 * (edges[1:] + edges[:-1])
        weights = counts.astype(jnp.float32)

        def error(part: jax.Array) -> jax.Array:
            scale, zero_point = min_max_params(part * low, part * high, spec)
            ends = (jnp.asarray(q).astype(jnp.int32) for q in (spec.qmin, spec.qmax))
            codes = grid_codes(centres, scale, zero_point, *ends)
            off = dequantize(codes, QParams(scale, zero_point)) - centres
            return jnp.sum(weights * off * off)

        parts = jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates
        best = parts[jnp.argmin(lax.map(error, parts))]
        return best * low, best * high

    return histogram(search)


@named
def entropy() -> Calibrator:
    """Takes the clip whose grid tells least from the values: Kullback-Leibler.

    For each clip ``t`` of ``i`` bins of magnitude, the counts ``P`` inside it, with
    what lies outside added to the last one, are compared with ``Q``: the same counts
    summed to as many levels as the grid has on one side, each level spread evenly over
    its bins that are not empty.

        argmin_t sum(P * log(P / Q)),  P and Q normalised, empty bins of Q at 1e-9

    The range is ``[low, high]`` clipped to ``[-t, t]``; all of it where the grid is
    finer than the bins. ``merge`` is associative and commutative.

    References:
      Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """

    def search(
        counts: jax.Array,
        edges: jax.Array,
        low: jax.Array,
        high: jax.Array,
        spec: QSpec,
    ) -> Ends:
        sizes = (counts[_HALF:] + counts[_HALF - 1 :: -1]).astype(jnp.float32)
        codes = jnp.asarray(spec.qmax) - jnp.asarray(spec.qmin)
        levels = (codes.astype(jnp.float32) + 1.0) * jnp.where(low < 0, 0.5, 1.0)
        bins = jnp.arange(_HALF)

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
            is_candidate = (i.astype(jnp.float32) >= levels) & (jnp.sum(inside) > 0)
            return jnp.where(is_candidate, kl, jnp.inf)

        clips = jnp.arange(_HALF, 0, -1)
        found = lax.map(divergence, clips)
        best = clips[jnp.argmin(found)]
        clip = jnp.where(jnp.all(jnp.isinf(found)), edges[-1], edges[_HALF + best])
        return jnp.maximum(low, -clip), jnp.minimum(high, clip)

    return histogram(search)


@named
def histogram(search: Search) -> Calibrator:
    """Counts values in bins, and finds the range from the counts.

    ``merge`` is associative and commutative, exactly, up to 2^31 - 1 values a bin.

    Args:
      search: ``(counts, edges, low, high, spec) -> (low, high)`` of one scale: `BINS`
        counts, ``BINS + 1`` edges, the least and the largest value seen.

    Returns:
      A calibrator. Values count by magnitude from 2^-102 on.
    """

    def init(x: jax.Array, spec: QSpec) -> HistogramState:
        shape = scale_shape(x.shape, spec.axis)
        return HistogramState(
            jnp.int32(0),
            jnp.full(shape, _NARROWEST, jnp.int32),
            jnp.zeros((*shape, BINS), jnp.int32),
            jnp.full(shape, jnp.inf),
            jnp.full(shape, -jnp.inf),
        )

    def update(x: jax.Array, state: HistogramState, spec: QSpec) -> HistogramState:
        if x.size == 0:
            return state._replace(step=state.step + 1)
        low, high = reduce_range(x, spec.axis)
        exponent = jnp.maximum(_exponent(jnp.maximum(-low, high)), _NARROWEST)
        place = jnp.floor(x.astype(jnp.float32) * power_of_two(-exponent))
        k = jnp.clip(place, -_HALF, _HALF - 1).astype(jnp.int32) + _HALF
        scales = jnp.arange(math.prod(low.shape)).reshape(low.shape) * BINS
        flat = (k + scales).reshape(-1)
        counts = jnp.zeros(math.prod(low.shape) * BINS, jnp.int32).at[flat].add(1)
        new = counts.reshape(*low.shape, BINS)
        return merge(state, HistogramState(jnp.int32(1), exponent, new, low, high))

    def merge(a: HistogramState, b: HistogramState) -> HistogramState:
        exponent = jnp.maximum(a.exponent, b.exponent)
        left, right = (_widen(s.counts, exponent - s.exponent) for s in (a, b))
        return HistogramState(
            a.step + b.step,
            exponent,
            left + right,
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
        )

    def params(state: HistogramState, spec: QSpec) -> QParams:
        def one(exponent, counts, low, high):
            whole = jnp.arange(-_HALF, _HALF + 1, dtype=jnp.float32)
            edges = whole * power_of_two(exponent)
            ends = search(counts, edges, low, high, spec)
            return tuple(jnp.clip(end, low, high) for end in ends)

        shape = state.low.shape
        seen = state.step > 0
        held = (
            jnp.where(seen, end, 0.0).reshape(-1) for end in (state.low, state.high)
        )
        flat = (state.exponent.reshape(-1), state.counts.reshape(-1, BINS), *held)
        low, high = (end.reshape(shape) for end in jax.vmap(one)(*flat))
        return params_if(seen, low, high, spec)

    return Calibrator(init, update, merge, params)


def _exponent(most: jax.Array) -> jax.Array:
    """The least width of bins that holds a magnitude."""
    return floor_log2(most) + 1 - (_HALF.bit_length() - 1)


def _widen(counts: jax.Array, times: jax.Array) -> jax.Array:
    """Doubles the width of the bins so many times."""
    shape = counts.shape
    bins = jnp.arange(-_HALF, _HALF, dtype=jnp.int32)

    def one(counts: jax.Array, times: jax.Array) -> jax.Array:
        wider = (bins >> jnp.minimum(times, 31)) + _HALF
        return jnp.zeros_like(counts).at[wider].add(counts)

    flat = jax.vmap(one)(counts.reshape(-1, BINS), times.reshape(-1))
    return flat.reshape(shape)
