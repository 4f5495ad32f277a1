"""Quantizers of two levels: signs, and 0 or 1, also at random.

Random quantizers draw with the ``key`` they are given, in training; without one they
are deterministic.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.activations import InternalSigmoid, internal_sigmoid
from qjax.quantizers.point import (
    Point,
    apply,
    finite,
    known_scale,
    point_of,
    round_steps,
    sign,
    sign_line,
    snap,
)
from qjax.quantizers.scaling import (
    EPSILON,
    LAST,
    Axes,
    Sharing,
    check_sharing,
    divide,
    largest,
    least_squares,
    standard_deviation,
    to_power_of_two,
)
from qjax.quantizers.spec import Spec, check_number, static
from qjax.quantizers.words import Alpha, check_alpha, check_groups


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Binary(Spec):
    """The options of `binary`.

    Attributes:
      use_01: Whether the codes are 0 and 1, not -1 and 1.
      alpha: Scale of the value: None for 1, a number, an array per channel (last axis),
        "auto" or "auto_po2" for the least-squares one.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      scale_axis: Axis or axes with scales of their own; None: the last.
      elements_per_scale: Same as in `QuantizedBits`.
      min_po2_exponent: Same as in `QuantizedBits`.
      max_po2_exponent: Same as in `QuantizedBits`.
    """

    name: ClassVar[str] = "binary"

    use_01: bool = static(False)
    alpha: Alpha = None
    use_stochastic_rounding: bool = static(False)
    scale_axis: Axes = static(None, kw_only=True)
    elements_per_scale: Axes = static(None, kw_only=True)
    min_po2_exponent: ArrayLike | None = dataclasses.field(default=None, kw_only=True)
    max_po2_exponent: ArrayLike | None = dataclasses.field(default=None, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_alpha(self)
        check_groups(self)


def binary(
    x: jax.Array,
    spec: Binary,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to a sign: QKeras's `binary`.

        q = sign(x) with sign(0) = 1; (q + 1) / 2 with use_01;  y = alpha * q

    The derivative is 1, or ``1 - tanh(x)^2`` if ``alpha`` is None.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding: with ``m = 2 min(max|x|, 1)`` per
        channel, ``x / m`` is rounded at random to eighths first, and the sign of a 0 is
        drawn.
      estimator: Backward pass, for which the two values are one step apart; see
        `qjax.quantizers`.

    Returns:
      Two values per scale, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: for a ``scale_axis`` or groups that ``x`` does not have.

    Example:
      >>> binary(jnp.array([0.3, -2.0, 0.0]), Binary(alpha=0.5))
      Array([ 0.5, -0.5,  0.5], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StochasticBinary(Spec):
    """The options of `stochastic_binary`.

    Attributes:
      alpha: Same as in `Binary`.
      temperature: Steepness of the probability, positive.
      use_real_sigmoid: Whether the probability is the logistic function.
      internal_sigmoid: "hard", "smooth" or "real", if not.
    """

    name: ClassVar[str] = "stochastic_binary"

    alpha: Alpha = None
    temperature: ArrayLike = 6.0
    use_real_sigmoid: bool = static(True)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_alpha(self)
        check_number(self, "temperature", "positive", 0, is_open=True)


def stochastic_binary(
    x: jax.Array,
    spec: StochasticBinary,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Draws signs: QKeras's `stochastic_binary`.

        P(q = 1) = sigmoid(temperature * x / d), else q = -1;  y = alpha * q

    with ``d = 1``, or the standard deviation of each channel if ``alpha`` is found; the
    scale is that of ``sign(x)``. The derivative is 1. Without a key: `binary`.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key of ``jax.random``; None for `binary`.
      estimator: Same as for `binary`.

    Returns:
      Two values per scale, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> stochastic_binary(jnp.array([0.3, -2.0, 0.0]), StochasticBinary())
      Array([ 1., -1.,  1.], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bernoulli(Spec):
    """The options of `bernoulli`: those of `StochasticBinary`.

    Attributes:
      alpha: Same as in `Binary`.
      temperature: Steepness of the probability, positive.
      use_real_sigmoid: Whether the probability is the logistic function.
      internal_sigmoid: "hard", "smooth" or "real", if not.
    """

    name: ClassVar[str] = "bernoulli"

    alpha: Alpha = None
    temperature: ArrayLike = 6.0
    use_real_sigmoid: bool = static(True)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_alpha(self)
        check_number(self, "temperature", "positive", 0, is_open=True)


def bernoulli(
    x: jax.Array,
    spec: Bernoulli,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Draws 0 or 1: QKeras's `bernoulli`.

        P(q = 1) = sigmoid(temperature * x / d), else q = 0;  y = alpha * q

    with ``d`` as in `stochastic_binary`; the scale is that of ``x >= 0``, which is also
    what the codes are without a key. The derivative is 1.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key of ``jax.random``; None for the more likely code.
      estimator: Same as for `binary`.

    Returns:
      0 and one value per scale, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> bernoulli(jnp.array([0.3, -2.0, 0.0]), Bernoulli())
      Array([1., 0., 1.], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f, which also draws in inference.
    """
    return apply(spec, x, key=key, estimator=estimator)


def scale_of_codes(
    spec: Any, x: jax.Array, q: jax.Array, sharing: Sharing = LAST
) -> jax.Array:
    """Returns the scale of codes, given or by least squares."""
    alpha = spec.alpha
    if not isinstance(alpha, str):
        return known_scale(x, 1.0 if alpha is None else alpha)
    s = least_squares(x, q, sharing)
    if alpha == "auto":
        return s
    ends = (getattr(spec, f"{end}_po2_exponent", None) for end in ("min", "max"))
    return to_power_of_two(s, *ends)


def _two_values(
    real: jax.Array, x: jax.Array, q: jax.Array, scale: jax.Array, is_01: bool
) -> Point:
    """Makes a point of two codes: -1 and 1, or 0 and 1."""
    value, scale = snap(q, scale, 1)
    steps = divide(x, scale)
    zero = jnp.zeros(())
    if is_01:
        return Point(real, steps - 0.5, zero - 1, zero, value, scale, 0, 1)
    line = sign_line(True, steps, steps, zero, zero)
    return Point(real, *line, value, scale, -1, 1)


@point_of(Binary)
def _binary_point(spec: Binary, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    sharing = Sharing(spec.scale_axis, spec.elements_per_scale)
    check_sharing(x.shape, sharing, spec.name)
    held = finite(x)
    q = sign(held)
    if key is not None:
        rounding, drawing = jax.random.split(key)
        m = 2.0 * jnp.minimum(largest(jnp.abs(held), sharing), 1.0)
        eighths = round_steps(divide(held, m) * 8.0, rounding)
        held = m * eighths * 0.125
        coin = jax.random.rademacher(drawing, x.shape, x.dtype)
        q = jnp.where(held == 0, coin, sign(held))
    if spec.use_01:
        q = 0.5 * q + 0.5
    scale = scale_of_codes(spec, held, q, sharing)
    real = jnp.tanh(x) if spec.alpha is None else x
    return _two_values(real, held, q, scale, spec.use_01)


@point_of(StochasticBinary)
def _stochastic_binary_point(
    spec: StochasticBinary, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    if key is None:
        return _binary_point(Binary(alpha=spec.alpha), None, x)
    held = finite(x)
    scale = scale_of_codes(spec, held, sign(held))
    q = 2.0 * _draw(spec, key, held) - 1.0
    return _two_values(x, held, q, scale, False)


@point_of(Bernoulli)
def _bernoulli_point(spec: Bernoulli, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    held = finite(x)
    likely = (held >= 0).astype(jnp.float32)
    q = likely if key is None else _draw(spec, key, held)
    return _two_values(x, held, q, scale_of_codes(spec, held, likely), True)


def _draw(
    spec: StochasticBinary | Bernoulli, key: jax.Array, x: jax.Array
) -> jax.Array:
    """Draws 1 with the probability of the sigmoid, else 0."""
    if isinstance(spec.alpha, str):
        x = divide(x, standard_deviation(x) + EPSILON)
    p = chosen_sigmoid(spec)(jnp.asarray(spec.temperature, jnp.float32) * x)
    return (p >= jax.random.uniform(key, x.shape)).astype(jnp.float32)


def chosen_sigmoid(spec: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the curve that gives the probability of a random quantizer."""
    return internal_sigmoid("real" if spec.use_real_sigmoid else spec.internal_sigmoid)
