"""A quantizer that learns its bit width, an array with a gradient of its own."""

import dataclasses
import math
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.learning import Learning
from qjax.quantizers.point import Point, apply, finite, line_point, point_of
from qjax.quantizers.scaling import Axes
from qjax.quantizers.spec import Spec, check_number, is_known, require, static
from qjax.quantizers.words import plain_number
from qjax.rounding import power_of_two


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DifferentiableBits(Spec):
    """The options of `differentiable_bits`.

    Attributes:
      integer: Bits before the binary point, sign not counted.
      signed: Whether codes may be negative.
      bits: Word length that learning starts from in a scheme.
      bounds: Least and largest word length that `qjax.training.keep_bounds` leaves.
      axis: The axis or axes with word lengths of their own in a scheme; None for one.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "differentiable_bits"

    learning: ClassVar[Learning | None] = Learning(
        ("bits",),
        lambda spec, seen: {"bits": _first_bits(spec, seen.low.shape)},
        lambda spec: {"bits": spec.bounds},
    )

    integer: ArrayLike = 0
    signed: bool = static(True)
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0
    bits: ArrayLike = dataclasses.field(default=8.0, kw_only=True)
    bounds: tuple[float, float] = static((1.0, 16.0), kw_only=True)
    axis: Axes = static(None, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_number(self, "integer", "an integer in -60..60", -60, 60, is_whole=True)
        low, high = self.bounds
        rule = "`bounds` must be a least and a largest number in 0..24."
        require(self, 0 <= low <= high <= 24, rule)
        if is_known(self.bits):
            rule = "`bits`, from which learning starts, must lie in `bounds`."
            bits = np.asarray(self.bits)
            require(self, bool(np.all((low <= bits) & (bits <= high))), rule)


def differentiable_bits(
    x: jax.Array,
    bits: jax.Array,
    spec: DifferentiableBits,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to fixed point of a learned bit width.

        u = clip(round(bits), 0, 24) - signed, at least 0;  s = 2^(integer - u)
        y = s * clip(round(x / s), qmin, qmax),  qmax = 2^u - 1,  qmin = -qmax or 0
        dx = dy where no code saturates, else 0
        d bits = ln(2) * sum(dy * (x - y  where no code saturates,  else s or -s))

    The worth of a bit is an error that halves with each: ``x - y`` is proportional to
    ``2^-bits``. Where a code saturates, ``y = 2^integer - s`` itself is. With no bits
    left (1 of a signed word), all is 0: pruned. A loss wants a price on ``bits``.

    Args:
      x: Real values, any shape.
      bits: Word lengths, sign included, float; broadcasts against ``x``: one per
        tensor, per channel or per value.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> x, spec = jnp.array(0.3), DifferentiableBits()
      >>> f = lambda bits: differentiable_bits(x, bits, spec)
      >>> jax.value_and_grad(f)(jnp.float32(3.8))
      (Array(0.25, dtype=float32), Array(0.03465737, dtype=float32))

    References:
      Sun et al., "Gradient-based Automatic Mixed Precision Quantization for Neural
      Networks On-Chip", 2024 (arXiv:2405.00645).
    """
    return apply(spec, x, bits, key=key, estimator=estimator)


def _first_bits(spec: DifferentiableBits, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(spec.bits, jnp.float32), shape)


@point_of(DifferentiableBits)
def _differentiable_bits_point(
    spec: DifferentiableBits, key: chex.PRNGKey | None, x: jax.Array, bits: jax.Array
) -> Point:
    b = jnp.clip(jnp.round(finite(bits)), 0.0, 24.0) - float(spec.signed)
    magnitude = jnp.maximum(b, 0.0)
    scale = power_of_two(plain_number(spec.integer) - magnitude)
    qmax = power_of_two(magnitude) - 1.0
    qmin = -qmax * float(spec.signed)
    point = line_point(key, x, x, scale, qmin, qmax)
    whole = jnp.round(point.steps)
    passes = (qmin <= whole) & (whole <= qmax)
    y = jnp.clip(whole, qmin, qmax) * scale
    worth = jnp.where(passes, finite(x) - y, jnp.where(whole > 0, scale, -scale))
    if not spec.signed:
        worth = jnp.where(whole < 0, 0.0, worth)
    learned = bits * lax.stop_gradient(math.log(2.0) * worth)
    return point._replace(passes=passes, learned=learned)
