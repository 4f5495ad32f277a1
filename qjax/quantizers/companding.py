"""Companding quantizers, whose levels are unequally spaced."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.activations import InternalSigmoid, internal_sigmoid
from qjax.quantizers.point import Point, apply, levels_of, point_of, round_steps
from qjax.quantizers.spec import Spec, check_number, static
from qjax.quantizers.words import check_word, plain_number
from qjax.rounding import power_of_two


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedUlaw(Spec):
    """The options of `quantized_ulaw`.

    Attributes:
      bits: Word length, sign included, 1 to 24.
      integer: Bits before the binary point.
      symmetric: Whether the least value is one step above ``-2^integer``.
      u: The strength of the curve, positive.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      internal_sigmoid: "hard", "smooth" or "real".
      strict: Same as in `QuantizedBits`.
    """

    name: ClassVar[str] = "quantized_ulaw"

    bits: ArrayLike = 8
    integer: ArrayLike = 0
    symmetric: bool = static(False)
    u: ArrayLike = 255.0
    use_stochastic_rounding: bool = static(False, kw_only=True)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=24)
        check_number(self, "u", "positive", 0, is_open=True)


def quantized_ulaw(
    x: jax.Array,
    spec: QuantizedUlaw,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to the levels of the u-law: QKeras's `quantized_ulaw`.

        q = round(sigmoid(x / 2^integer) * m),  r = 2 q / m - 1,  m = 2^(bits - 1)
        v = sign(r) * log(1 + u |r|) / log(1 + u)
        y = 2^integer * clip(v, -1 + symmetric / m, 1 - 1 / m)

    The levels are not equally far apart: `encode` gives codes ``q`` without a scale,
    and `levels` the table that they index. The derivative is that of ``y`` with
    ``round`` left out, but 0 where ``r`` is 0 or ``v`` is clipped.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values among the levels, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_ulaw(jnp.array([0.3, -2.0]), QuantizedUlaw(4, u=15.0))
      Array([ 0.56198186, -1.        ], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


@point_of(QuantizedUlaw)
def _ulaw_point(spec: QuantizedUlaw, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    m = power_of_two(plain_number(spec.bits) - 1)
    unit = power_of_two(plain_number(spec.integer))
    u = jnp.asarray(spec.u, jnp.float32)
    curve = 2.0 * internal_sigmoid(spec.internal_sigmoid)(x * (1.0 / unit))
    steps = lax.stop_gradient(curve) * (0.5 * m)
    codes = round_steps(steps, key)
    r, v = _expand(codes, m, u)
    low, high = -1.0 + float(spec.symmetric) / m, 1.0 - 1.0 / m
    slope = u / ((1.0 + u * jnp.abs(r)) * jnp.log(1.0 + u))
    passes = (r != 0) & (low <= v) & (v <= high)
    value = unit * jnp.clip(v, low, high)
    real = slope * unit * curve
    fine = unit * 2.0**-15
    return Point(real, steps, 0.0 * m, m, value, codes=codes, passes=passes, fine=fine)


def _expand(
    codes: jax.Array, m: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns ``r`` and ``v`` of the formula for codes."""
    r = codes * (2.0 / m) - 1.0
    return r, jnp.sign(r) * jnp.log(1.0 + u * jnp.abs(r)) / jnp.log(1.0 + u)


@levels_of(QuantizedUlaw)
def _ulaw_levels(spec: QuantizedUlaw) -> jax.Array:
    m = 2.0 ** (plain_number(spec.bits) - 1)
    u = jnp.asarray(spec.u, jnp.float32)
    _, v = _expand(jnp.arange(m + 1, dtype=jnp.float32), jnp.float32(m), u)
    low, high = -1.0 + float(spec.symmetric) / m, 1.0 - 1.0 / m
    return power_of_two(plain_number(spec.integer)) * jnp.clip(v, low, high)
