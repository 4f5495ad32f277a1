"""Accumulators of an integer program whose scales are traced."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.integer import (
    RequantizeRule,
    requantize_sum,
    traced_common_fixed_point,
    traced_fixed_point,
)
from qjax.model.trace import Equation, evaluate
from qjax.qpoint import grid_codes


class TargetGrid(NamedTuple):
    """The grid of a site, and the ends of its word."""

    scale: jax.Array  # [], or the rank of the value.
    zero_point: jax.Array
    qmin: jax.Array
    qmax: jax.Array

    def codes_of(self, real: jax.Array) -> jax.Array:
        """Returns the codes of real values, by the formula of `qpoint`."""
        return grid_codes(real, *self)

    def rounded(
        self,
        terms: Sequence[tuple[jax.Array, jax.Array]],
        shift: jax.Array,
        rule: RequantizeRule = "half_even",
    ) -> jax.Array:
        """Computes `requantize_sum` to the grid of the site."""
        low, high = self.qmin, self.qmax
        return requantize_sum(
            list(terms), shift, self.zero_point, qmin=low, qmax=high, rule=rule
        )


# Codes to be, once the grid of the next site is known.
Late = Callable[[TargetGrid], jax.Array]


class Accumulator(NamedTuple):
    """An accumulator, ``real = value * scales[0] * scales[1] * ... * gain``."""

    value: jax.Array  # int32.
    scales: tuple[jax.Array, ...]  # float32, [] or the rank of the value.
    gain: jax.Array | None = None  # float32, of BatchNorm or of an average.

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """Returns all factors of the integers, in the order of the lowering."""
        gain = () if self.gain is None else (self.gain,)
        return (*self.scales, *(_of_rank(g, self.value.ndim) for g in gain))

    def real(self) -> jax.Array:
        """Returns the real value of an accumulator that no site ends."""
        with jax.enable_x64(True):
            factors = (f.astype(jnp.float64) for f in self.factors)
            scale = functools.reduce(jnp.multiply, factors).astype(jnp.float32)
        return self.value.astype(jnp.float32) * scale

    def times(self, unit: jax.Array) -> "Accumulator":
        """Returns the accumulator with one more factor."""
        return self._replace(scales=(*self.scales, unit))

    def simulated(self) -> jax.Array:
        """Returns the real value by the steps of the model, from which functions go."""
        real = self._replace(gain=None).real()
        return real if self.gain is None else real * self.factors[-1]

    def codes(self, target: TargetGrid) -> jax.Array:
        """Requantizes with one rounding, or with float32's where lowering does."""
        multiplier, shift = traced_fixed_point(self.factors, target.scale)
        # A coarser step saturates; a channel that is dead stays at zero in any unit.
        most = jnp.sign(multiplier) * jnp.int32(2**31 - 1)
        multiplier = jnp.where(shift < 0, most, multiplier)
        shift = jnp.maximum(shift, 0)
        terms = [(self.value, multiplier)]
        if self.gain is None:
            return target.rounded(terms, shift)
        scales = (*self.scales, target.scale)
        is_exact = functools.reduce(jnp.logical_and, map(_is_power_of_two, scales))
        return lax.cond(
            is_exact & ~_is_power_of_two(self.gain),
            lambda: target.rounded(terms, shift, "fp32_half_even"),
            lambda: target.rounded(terms, shift),
        )


def _of_rank(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape) if x.ndim else x


def _is_power_of_two(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(jnp.frexp(x)[0]) == 0.5)


def late_sum(steps: Any, scales: Any, signs: tuple[float, float]) -> Late:
    """Returns the sum of two values, to be rounded once."""

    def late(target: TargetGrid) -> jax.Array:
        fixed, shift = traced_common_fixed_point(scales, signs, target.scale)
        return target.rounded(list(zip(steps, fixed, strict=True)), shift)

    return late


def padded(
    e: Equation, codes: jax.Array, fill: jax.Array, target: TargetGrid
) -> jax.Array:
    """Pads codes with the codes of a real number, which may differ by channel."""
    if target.scale.ndim == 0:
        return evaluate(e, codes, target.codes_of(fill).astype(codes.dtype))[0]
    (is_pad,) = evaluate(e, jnp.zeros(codes.shape, jnp.int8), jnp.int8(1))
    (found,) = evaluate(e, codes, jnp.zeros((), codes.dtype))
    fills = target.codes_of(jnp.broadcast_to(fill, found.shape))
    return jnp.where(is_pad == 1, fills.astype(codes.dtype), found)


def whole_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the distance from zero, in steps, of a value on a grid."""
    x, scale = lax.stop_gradient((x, scale))
    return jnp.rint(x.astype(scale.dtype) * (1.0 / scale)).astype(jnp.int32)


def is_whole_code(end: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns whether all finite bounds lie on a grid."""
    ends = jnp.where(jnp.isfinite(end), end, 0.0)
    ratio = ends / lax.optimization_barrier(jnp.broadcast_to(scale, end.shape))
    return jnp.all(ratio == jnp.rint(ratio))
