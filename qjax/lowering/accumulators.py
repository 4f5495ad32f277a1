"""Accumulators of an integer program whose scales are traced."""

import dataclasses
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
from qjax.integer_tflite import (
    Kind,
    mean_multiplier,
    product_ratio,
    signed_multiplier,
    traced_sum,
    weight_scale,
)
from qjax.model.trace import Equation, evaluate
from qjax.qpoint import grid_codes
from qjax.targets import Target, half_even


class TargetGrid(NamedTuple):
    """The grid of a site, and the ends of its word."""

    scale: jax.Array  # [], or the rank of the value.
    zero_point: jax.Array
    qmin: jax.Array
    qmax: jax.Array
    dtype: str = "int8"  # Of its word.

    def codes_of(self, real: jax.Array) -> jax.Array:
        """Returns the codes of real values, by the formula of `qpoint`."""
        return grid_codes(real, *self[:4])

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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Made:
    """The kind of an accumulator, and the target by which it is rescaled.

    Attributes:
      kind: What it is made of.
      target: Roundings and algorithms.
      taps: Number of codes in each sum of a mean.
    """

    kind: Kind = "other"
    target: Target = half_even
    taps: int = 1


class TargetError(NotImplementedError):
    """An error for arithmetic that a target has no operator for."""


class Accumulator(NamedTuple):
    """An accumulator, ``real = value * scales[0] * scales[1] * ... * gain``."""

    value: jax.Array  # int32.
    scales: tuple[jax.Array, ...]  # float32, [] or the rank of the value.
    gain: jax.Array | None = None  # float32, of BatchNorm or of an average.
    made: Made = Made()

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
        if self.made.target.is_tflite:
            return self._tflite_codes(target)
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

    def _tflite_codes(self, target: TargetGrid) -> jax.Array:
        """Requantizes as TFLite's kernels do."""
        kind, scales = self.made.kind, self.scales
        if kind == "other" or len(scales) != _OPERANDS.get(kind, 1):
            raise TargetError(
                "is made of what TFLite has no operator for: a running sum, a product "
                "of more than two values, or a bias finer than its accumulator"
            )
        if target.scale.ndim:
            raise TargetError("has a scale per channel, and TFLite has one")
        taps = 1 if self.gain is None else self.made.taps
        if self.gain is not None and kind not in ("conv", "dot", "sum"):
            raise TargetError("has a factor that joins no weights")
        if self.gain is not None and kind != "sum":
            gain = _of_rank(self.gain, self.value.ndim)
            scales = (weight_scale(scales[0], gain), *scales[1:])
        with jax.enable_x64(True):
            ratio = product_ratio(kind, scales, target.scale)
            if kind == "sum":
                multiplier, shift = mean_multiplier(ratio, taps)
            else:
                multiplier, shift = signed_multiplier(ratio)
        own = self.made.target
        rule = own.dense if kind == "dot" else own.accumulators
        return target.rounded([(self.value, multiplier)], shift, rule)


# Kind -> number of its scales; one for others.
_OPERANDS = {"conv": 2, "dot": 2, "dot_codes": 2, "multiply_codes": 2}


def _of_rank(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape) if x.ndim else x


def _is_power_of_two(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(jnp.frexp(x)[0]) == 0.5)


def late_sum(
    steps: Any, scales: Any, signs: tuple[float, float], own: Target = half_even
) -> Late:
    """Returns the sum of two values, to be rounded once, or as a target does."""

    def late(target: TargetGrid) -> jax.Array:
        if own.is_tflite:
            is_wide = target.dtype == "int16"
            return traced_sum(steps, scales, signs, target[:4], is_wide)
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
