"""DoReFa's quantizers of weights and of activations."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.point import (
    Point,
    apply,
    finite,
    line_point,
    point_of,
    round_steps,
    sign,
    straight,
)
from qjax.quantizers.scaling import divide
from qjax.quantizers.spec import Spec, static
from qjax.quantizers.words import check_word, plain_number
from qjax.rounding import power_of_two


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DoReFaWeights(Spec):
    """The options of `dorefa_weights`.

    Attributes:
      bits: Word length, 1 to 16.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "dorefa_weights"

    bits: ArrayLike = 8
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=16)


def dorefa_weights(
    x: jax.Array,
    spec: DoReFaWeights,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds DoReFa's weights: a tangent, over ``[-1, 1]``, to ``2^bits`` levels.

        n = 2^bits - 1,  r = tanh(x) / (2 max|tanh(x)|) + 1 / 2
        y = 2 * round(n * r) / n - 1;   one bit: y = mean|x| * sign(x), sign(0) = 1

    The derivative is that of ``2 r - 1`` with the maximum held fixed; 1 for one bit.

    Args:
      x: Real values, any shape: one weight.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. Codes are odd, in ``[-n, n]`` (the
      grid has no 0). NaN stays NaN.

    Example:
      >>> dorefa_weights(jnp.array([0.3, -1.0, 0.1]), DoReFaWeights(2))
      Array([ 0.33333334, -1.        ,  0.33333334], dtype=float32)

    References:
      Zhou et al., "DoReFa-Net", 2016, eq. 7 to 9 (arXiv:1606.06160).
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DoReFaActivations(Spec):
    """The options of `dorefa_activations`.

    Attributes:
      bits: Word length, 1 to 24.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "dorefa_activations"

    bits: ArrayLike = 8
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=24)


def dorefa_activations(
    x: jax.Array,
    spec: DoReFaActivations,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds as DoReFa does: ``round(n * clip(x, 0, 1)) / n``, ``n = 2^bits - 1``.

    The derivative is 1 where ``0 <= x <= 1``, else 0.

    Args:
      x: Real values, any shape.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> dorefa_activations(jnp.array([0.3, -1.0, 9.0]), DoReFaActivations(2))
      Array([0.33333334, 0.        , 1.        ], dtype=float32)

    References:
      Zhou et al., "DoReFa-Net", 2016, eq. 5 and 10 (arXiv:1606.06160).
    """
    return apply(spec, x, key=key, estimator=estimator)


@point_of(DoReFaActivations)
def _dorefa_activations_point(
    spec: DoReFaActivations, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    levels = power_of_two(plain_number(spec.bits)) - 1.0
    passes = (x >= 0) & (x <= 1)
    clipped = straight(x, lax.stop_gradient(jnp.clip(x, 0.0, 1.0)))
    scale = divide(jnp.ones(()), levels)
    point = line_point(key, clipped, x, scale, 0 * levels, levels)
    return point._replace(passes=passes)


@point_of(DoReFaWeights)
def _dorefa_weights_point(
    spec: DoReFaWeights, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    n = power_of_two(plain_number(spec.bits)) - 1.0
    curve = jnp.tanh(x)
    held = finite(curve)
    most = jnp.max(jnp.abs(held), initial=0.0)
    most = jnp.where(most == 0, 1.0, most)
    half = divide(held, 2.0 * most) + 0.5
    steps = n * half
    codes = 2.0 * round_steps(steps, key) - n
    is_sign = n == 1
    mean = jnp.mean(jnp.abs(finite(x)) * 2.0**-24) * 2.0**24 if x.size else n
    scale = jnp.where(is_sign, mean, divide(jnp.ones(()), n))
    codes = jnp.where(is_sign, sign(finite(x)), codes)
    codes = jnp.where(scale == 0, 0.0, codes)
    scale = jnp.where(scale == 0, 1.0, scale)
    smooth = jnp.where(is_sign, x, curve / most)
    return Point(smooth, steps, 0 * n, n, codes * scale, scale, -n, n)
