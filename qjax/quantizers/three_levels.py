"""Quantizers of three levels: -1, 0 and 1, also at random.

Random quantizers draw with the ``key`` they are given, in training; without one they
are deterministic.
"""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.activations import InternalSigmoid
from qjax.quantizers.point import (
    Point,
    apply,
    finite,
    point_of,
    round_steps,
    sign,
    snap,
)
from qjax.quantizers.scaling import (
    EPSILON,
    divide,
    largest,
    standard_deviation,
    to_power_of_two,
)
from qjax.quantizers.spec import Spec, check_number, require, static
from qjax.quantizers.two_levels import chosen_sigmoid, scale_of_codes
from qjax.quantizers.words import Alpha, check_alpha

DEFAULT_THRESHOLD = 0.33  # Default of ternary values, as in QKeras.


def _check_ternary(spec: Any) -> None:
    check_alpha(spec)
    check_number(spec, "threshold", "0 or above", 0)
    rule = "`threshold` is found together with `alpha='auto'` or 'auto_po2'."
    require(spec, not isinstance(spec.alpha, str) or spec.threshold is None, rule)
    times = spec.number_of_unrolls
    require(spec, times >= 1, "`number_of_unrolls` must be at least 1.")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ternary(Spec):
    """The options of `ternary`.

    Attributes:
      alpha: Same as in `Binary`.
      threshold: Magnitude from which values are not 0, not negative; None for 0.33.
        Found with the scale if ``alpha`` is.
      use_stochastic_rounding: Whether a key makes rounding stochastic, if
        ``alpha`` is found.
      number_of_unrolls: Number of times that scale and threshold are found anew.
    """

    name: ClassVar[str] = "ternary"

    alpha: Alpha = None
    threshold: ArrayLike | None = None
    use_stochastic_rounding: bool = static(False)
    number_of_unrolls: int = static(5)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_ternary(self)
        found = isinstance(self.alpha, str)
        rule = "stochastic rounding needs a scale: `alpha='auto'` or 'auto_po2'."
        require(self, found or not self.use_stochastic_rounding, rule)


def ternary(
    x: jax.Array,
    spec: Ternary,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to -1, 0 or 1: QKeras's `ternary`.

        q = sign(x) where |x| >= threshold, else 0;  y = alpha * q

    Where ``alpha`` is found, per channel (last axis), from ``s = max|x| * 2 / 3``:

        q = sign(x) where |round(x / s)| >= 1, else 0;  s = least squares of x and q

    ``number_of_unrolls`` times; the last ``q`` counts, with the last ``s``. The
    derivative is 1, or ``1 - tanh(x)^2`` if ``alpha`` is None.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding: ``x / s`` is rounded at random to
        thirds in place of integers.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Three values per scale, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> ternary(jnp.array([0.3, -2.0, 0.5]), Ternary(alpha=2.0))
      Array([ 0., -2.,  2.], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f; Li et al., 2016 (arXiv:1605.04711).
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StochasticTernary(Spec):
    """The options of `stochastic_ternary`.

    Attributes:
      alpha: Same as in `Binary`.
      threshold: Same as in `Ternary`.
      temperature: Steepness of the probabilities, positive.
      use_real_sigmoid: Whether the probabilities are logistic functions.
      number_of_unrolls: Number of times that scale and threshold are found anew.
      internal_sigmoid: "hard", "smooth" or "real", if not.
    """

    name: ClassVar[str] = "stochastic_ternary"

    alpha: Alpha = None
    threshold: ArrayLike | None = None
    temperature: ArrayLike = 8.0
    use_real_sigmoid: bool = static(True)
    number_of_unrolls: int = static(5)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_ternary(self)
        check_number(self, "temperature", "positive", 0, is_open=True)


def stochastic_ternary(
    x: jax.Array,
    spec: StochasticTernary,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Draws -1, 0 or 1: QKeras's `stochastic_ternary`.

        P(a = 1) = sigmoid(t (x - T) / d), else -1;  P(b = 1) = sigmoid(t (x + T) / d)
        q = (a + b) / 2,  y = alpha * q

    with the temperature ``t``, the threshold ``T`` (half the scale where ``alpha`` is
    found) and the standard deviation ``d`` of each channel. The derivative is 1.
    Without a key: `ternary`.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key of ``jax.random``; None for `ternary`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Three values per scale, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> stochastic_ternary(jnp.array([0.3, -2.0, 0.5]), StochasticTernary())
      Array([ 0., -1.,  1.], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f. It draws only where ``alpha`` is found.
    """
    return apply(spec, x, key=key, estimator=estimator)


@point_of(Ternary)
def _ternary_point(spec: Ternary, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    held = finite(x)
    size = jnp.abs(held)
    if not isinstance(spec.alpha, str):
        given = DEFAULT_THRESHOLD if spec.threshold is None else spec.threshold
        threshold = jnp.asarray(given, jnp.float32)
        q = jnp.where(size >= threshold, jnp.sign(held), 0.0)
        width, scale = 2.0 * threshold, scale_of_codes(spec, held, q)
        real = jnp.tanh(x) if spec.alpha is None else x
        return _three_values(real, held, width, q, scale)
    scale = _first_scale(spec, size)
    for k in range(spec.number_of_unrolls):
        width, u = scale, divide(held, scale)
        if key is not None:
            thirds = round_steps(3.0 * u, jax.random.fold_in(key, k))
            q = jnp.where(jnp.abs(thirds) >= 1.5, jnp.sign(held), 0.0)
        else:
            q = jnp.where(jnp.abs(u) > 0.5, jnp.sign(held), 0.0)
        scale = scale_of_codes(spec, held, q)
    return _three_values(x, held, width, q, scale)


@point_of(StochasticTernary)
def _stochastic_ternary_point(
    spec: StochasticTernary, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    if key is None:
        fixed = Ternary(
            spec.alpha, spec.threshold, number_of_unrolls=spec.number_of_unrolls
        )
        return _ternary_point(fixed, None, x)
    held = finite(x)
    if isinstance(spec.alpha, str):
        scale = _first_scale(spec, jnp.abs(held))
        for _ in range(spec.number_of_unrolls):
            q = jnp.where(jnp.abs(held) >= 0.5 * scale, jnp.sign(held), 0.0)
            scale = scale_of_codes(spec, held, q)
        threshold = 0.5 * scale
    else:
        scale = scale_of_codes(spec, held, held)
        given = DEFAULT_THRESHOLD if spec.threshold is None else spec.threshold
        threshold = jnp.asarray(given, jnp.float32)
    deviation = standard_deviation(held) + EPSILON

    def coin(shift: jax.Array, key: jax.Array) -> jax.Array:
        u = divide(held, deviation) + divide(shift, deviation)
        p = chosen_sigmoid(spec)(jnp.asarray(spec.temperature, jnp.float32) * u)
        return sign(p - jax.random.uniform(key, x.shape))

    keys = jax.random.split(key)
    q = 0.5 * (coin(-threshold, keys[0]) + coin(threshold, keys[1]))
    return _three_values(x, held, 2.0 * threshold, q, scale)


def _first_scale(spec: Ternary | StochasticTernary, size: jax.Array) -> jax.Array:
    s = divide(largest(size), 1.5)
    return to_power_of_two(s) if spec.alpha == "auto_po2" else s


def _three_values(
    real: jax.Array, x: jax.Array, width: jax.Array, q: jax.Array, scale: jax.Array
) -> Point:
    """Makes a point of the codes -1, 0 and 1, with 0 in the middle of ``width``."""
    value, scale = snap(q, scale, 1)
    one = jnp.ones(())
    return Point(real, divide(x, width), -one, one, value, scale, -1, 1)
