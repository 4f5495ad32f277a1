"""Activations rounded to fixed point: relu, tanh, sigmoid, hard swish."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.activations import InternalSigmoid, internal_sigmoid
from qjax.quantizers.linear import QuantizedBits, bits_point
from qjax.quantizers.point import Point, apply, point_of, round_steps
from qjax.quantizers.scaling import Axes, divide
from qjax.quantizers.spec import Spec, check_number, is_known, require, static
from qjax.quantizers.words import (
    Alpha,
    as_float,
    as_int,
    check_alpha,
    check_slope,
    check_word,
    plain_number,
)
from qjax.rounding import power_of_two


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedRelu(Spec):
    """The options of `quantized_relu`.

    Attributes:
      bits: Word length, 1 to 31. A negative slope takes one of them.
      integer: Bits before the binary point.
      use_sigmoid: Whether values are rounded after a sigmoid.
      negative_slope: 0, or a power of two.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      relu_upper_bound: Largest value; it counts only without ``is_quantized_clip``.
      is_quantized_clip: Whether the derivative ends at the largest code.
      qnoise_factor: Share of the quantized value, 0 to 1.
      use_ste: Whether the quantized value has a derivative.
      internal_sigmoid: "hard", "smooth" or "real", of ``use_sigmoid``.
      strict: Same as in `QuantizedBits`.
    """

    name: ClassVar[str] = "quantized_relu"

    bits: ArrayLike = 8
    integer: ArrayLike = 0
    use_sigmoid: bool = static(False)
    negative_slope: ArrayLike = 0.0
    use_stochastic_rounding: bool = static(False)
    relu_upper_bound: ArrayLike | None = None
    is_quantized_clip: bool = static(True)
    qnoise_factor: ArrayLike = 1.0
    use_ste: bool = static(True, kw_only=True)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=31)
        check_slope(self)
        slope = self.negative_slope
        if is_known(slope, self.bits):
            rule = "a negative slope takes one bit: `bits` must be at least 2."
            require(
                self,
                not np.any((np.asarray(slope) != 0) & (np.asarray(self.bits) < 2)),
                rule,
            )
        check_number(self, "relu_upper_bound", "positive", 0, is_open=True)
        rule = (
            "`relu_upper_bound` must lie on the grid, or it has no code. If that is "
            "meant, set `strict=False`."
        )
        require(self, not self.strict or self.is_bound_on_grid(), rule)

    def is_bound_on_grid(self) -> bool:
        """Returns whether the bound is a multiple of the step, as far as is known."""
        bound, slope = self.relu_upper_bound, self.negative_slope
        numbers = (bound, slope, self.bits, self.integer)
        if bound is None or self.is_quantized_clip or not is_known(*numbers):
            return True
        bound, slope, bits, integer = (np.asarray(n) for n in numbers)
        step = np.exp2(integer - (bits - (slope != 0)).astype(float))
        is_beyond = bound >= np.exp2(integer.astype(float)) - step
        return bool(np.all(is_beyond | (np.mod(bound, step) == 0)))


def quantized_relu(
    x: jax.Array,
    spec: QuantizedRelu,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a relu, leaky or not, to fixed point: QKeras's `quantized_relu`.

        n = bits - (negative_slope != 0),  m = 2^n,  step = 2^(integer - n)
        q = clip(round(x / step), 0, m - 1)
          + clip(round(negative_slope * x / step), -negative_slope * m, 0)
        y = step * q

    with ``2 * round(m * sigmoid(x / 2^integer)) - m`` in place of the first ``round``
    if ``use_sigmoid`` (and ``negative_slope * m`` for ``m`` in the second). Without
    ``is_quantized_clip`` values end at ``relu_upper_bound``, on the grid.

    The derivative is 1 for ``0 < x <= top``, the slope for ``x <= 0``, and 0 above
    ``top``: the largest code, or the upper bound.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_relu(jnp.array([0.3, -2.0, 9.0]), QuantizedRelu(4, 1))
      Array([0.25 , 0.   , 1.875], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f. There stochastic rounding falls on half
      steps, off the grid; here on steps.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedTanh(Spec):
    """The options of `quantized_tanh`.

    Attributes:
      bits: Word length, sign included, 1 to 24.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      symmetric: Whether the least code is left out.
      use_real_tanh: Whether the curve is the hyperbolic tangent.
      internal_sigmoid: "hard", "smooth" or "real": the curve is ``2 sigmoid(x) - 1``.
    """

    name: ClassVar[str] = "quantized_tanh"

    bits: ArrayLike = 8
    use_stochastic_rounding: bool = static(False)
    symmetric: bool = static(False)
    use_real_tanh: bool = static(False)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=24)


def quantized_tanh(
    x: jax.Array,
    spec: QuantizedTanh,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a hyperbolic tangent: QKeras's `quantized_tanh`.

        p = 2 * sigmoid(x) - 1, or tanh(x)
        q = clip(round(p * m), -m + symmetric, m - 1),  y = q / m,  m = 2^(bits - 1)

    The derivative is that of ``p`` where ``round(p * m)`` is not clipped, else 0.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_tanh(jnp.array([0.3, -2.0]), QuantizedTanh(4))
      Array([ 0.25, -1.  ], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f. There stochastic rounding falls on half
      steps, off the grid; here on steps.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedSigmoid(Spec):
    """The options of `quantized_sigmoid`.

    Attributes:
      bits: Word length, 1 to 24.
      symmetric: Whether code 0 is left out.
      use_real_sigmoid: Whether the curve is the logistic function.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      internal_sigmoid: "hard", "smooth" or "real".
    """

    name: ClassVar[str] = "quantized_sigmoid"

    bits: ArrayLike = 8
    symmetric: bool = static(False)
    use_real_sigmoid: bool = static(False)
    use_stochastic_rounding: bool = static(False)
    internal_sigmoid: InternalSigmoid = static("hard", kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=24)


def quantized_sigmoid(
    x: jax.Array,
    spec: QuantizedSigmoid,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a sigmoid: QKeras's `quantized_sigmoid`.

        q = clip(round(sigmoid(x) * m), symmetric, m - 1),  y = q / m,  m = 2^bits

    The derivative is that of the sigmoid where ``round`` is not clipped, else 0.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_sigmoid(jnp.array([0.3, -2.0]), QuantizedSigmoid(4))
      Array([0.625, 0.   ], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedHswish(Spec):
    """The options of `quantized_hswish`: most of `QuantizedBits`, and the curve's.

    Attributes:
      bits: Word length, sign included, 1 to 32.
      integer: Bits before the binary point.
      symmetric: Whether the least code is left out.
      alpha: Same as in `QuantizedBits`.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      scale_axis: Axis or axes with scales of their own; None: the last.
      qnoise_factor: Share of the quantized value, 0 to 1.
      relu_shift: Place where the curve leaves 0, times -1. Positive.
      relu_upper_bound: Width of the bend. Positive.
      strict: Same as in `QuantizedBits`.
    """

    name: ClassVar[str] = "quantized_hswish"

    bits: ArrayLike = 8
    integer: ArrayLike = 0
    symmetric: bool = static(False)
    alpha: Alpha = None
    use_stochastic_rounding: bool = static(False)
    scale_axis: Axes = static(None)
    qnoise_factor: ArrayLike = 1.0
    relu_shift: ArrayLike = dataclasses.field(default=3, kw_only=True)
    relu_upper_bound: ArrayLike = dataclasses.field(default=6, kw_only=True)
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self)
        check_alpha(self)
        check_number(self, "relu_shift", "positive", 0, is_open=True)
        check_number(self, "relu_upper_bound", "positive", 0, is_open=True)


def quantized_hswish(
    x: jax.Array,
    spec: QuantizedHswish,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a hard swish to fixed point: QKeras's `quantized_hswish`.

        y = quantized_bits(x * clip(x + relu_shift, 0, bound) / bound)

    The derivative is that of the curve.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_hswish(jnp.array([1.0, -2.0, 9.0]), QuantizedHswish(8, 3))
      Array([ 0.6875, -0.3125,  7.9375], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f; Howard et al., 2019 (arXiv:1905.02244).
    """
    return apply(spec, x, key=key, estimator=estimator)


@point_of(QuantizedRelu)
def _relu_point(spec: QuantizedRelu, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    held = lax.stop_gradient(x)
    slope = plain_number(spec.negative_slope)
    magnitude = plain_number(spec.bits) - as_int(slope != 0)
    step = power_of_two(plain_number(spec.integer) - magnitude)
    m = power_of_two(magnitude)
    steps = held * (1.0 / step)
    bound = None if spec.is_quantized_clip else spec.relu_upper_bound
    last, is_linear = m - 1.0, spec.is_bound_on_grid()
    if bound is not None and is_linear:
        last = jnp.minimum(last, jnp.floor(as_float(bound) * (1.0 / step)))
    end = (m - 1.0) * step if spec.is_quantized_clip else bound
    real = leaky_relu(x, slope, end)
    is_plain = is_known(slope) and slope == 0 and not spec.use_sigmoid
    if is_plain and is_linear and key is None:
        return Point(real, steps, 0 * m, last, held, step, 0, last, is_direct=True)
    scaled, shift = steps, 0.0 * m
    if spec.use_sigmoid:
        sigmoid = internal_sigmoid(spec.internal_sigmoid)
        curve = sigmoid(held * power_of_two(-plain_number(spec.integer)))
        scaled, shift = curve * m, m
    keys = (None, None) if key is None else jax.random.split(key)

    def part(slope: ArrayLike, key: chex.PRNGKey | None) -> jax.Array:
        slope = as_float(slope)
        whole = round_steps(scaled * slope, key)
        return 2.0 * whole - shift * slope if spec.use_sigmoid else whole

    codes = jnp.minimum(jnp.maximum(part(1.0, keys[0]), 0.0), last)
    low = -as_float(slope) * m
    codes = codes + jnp.clip(part(slope, keys[1]), low, 0.0)
    if not is_linear:
        assert bound is not None
        value = jnp.minimum(codes * step, jnp.asarray(bound, jnp.float32))
        return Point(real, steps, low, last, value)
    # Below one step the slope has a single negative level, a part of a step.
    unit = jnp.where(low < 0, jnp.minimum(1.0, -low), 1.0)
    qmin, qmax = low * (1.0 / unit), last * (1.0 / unit)
    return Point(real, steps, low, last, codes * step, step * unit, qmin, qmax)


def leaky_relu(x: jax.Array, slope: ArrayLike, end: ArrayLike | None) -> jax.Array:
    """Returns ``x`` above 0, ``slope * x`` below, constant from ``end`` on."""
    is_flat = is_known(slope) and not np.any(slope)  # Not -inf * 0.
    below = jnp.zeros_like(x) if is_flat else as_float(slope) * x
    y = jnp.where(x > 0, x, below)
    return y if end is None else jnp.where(x > end, as_float(end), y)


@point_of(QuantizedTanh)
def _tanh_point(spec: QuantizedTanh, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    if spec.use_real_tanh:
        real = jnp.tanh(x)
    else:
        real = 2.0 * internal_sigmoid(spec.internal_sigmoid)(x) - 1.0
    levels = power_of_two(plain_number(spec.bits) - 1)
    low = -levels + float(spec.symmetric)
    return _curve_point(spec, key, real, levels, low)


@point_of(QuantizedSigmoid)
def _sigmoid_point(
    spec: QuantizedSigmoid, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    mode: InternalSigmoid = "real" if spec.use_real_sigmoid else spec.internal_sigmoid
    real = internal_sigmoid(mode)(x)
    levels = power_of_two(plain_number(spec.bits))
    return _curve_point(spec, key, real, levels, 0 * levels + float(spec.symmetric))


def _curve_point(
    spec: QuantizedTanh | QuantizedSigmoid,
    key: chex.PRNGKey | None,
    real: jax.Array,
    levels: jax.Array,
    low: jax.Array,
) -> Point:
    """Rounds a curve to ``1 / levels``, without derivative where it is clipped."""
    held = lax.stop_gradient(real)
    steps, scale, high = held * levels, 1.0 / levels, levels - 1.0
    whole = round_steps(steps, key)
    passes = (low <= whole) & (whole <= high)
    return Point(
        real,
        steps,
        low,
        high,
        held if key is None else whole * scale,
        scale,
        low,
        high,
        is_direct=key is None,
        is_curve=True,
        passes=passes,
    )


@point_of(QuantizedHswish)
def _hswish_point(
    spec: QuantizedHswish, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    shift, bound = (as_float(v) for v in (spec.relu_shift, spec.relu_upper_bound))
    is_bent = (x > -shift) & (x < bound - shift)
    inside = jnp.where(is_bent, x, 0.0)
    bend = divide(inside * (inside + shift), bound)
    real = jnp.where(x <= -shift, 0.0, jnp.where(is_bent, bend, x))
    bits = QuantizedBits(
        spec.bits,
        spec.integer,
        spec.symmetric,
        True,
        spec.alpha,
        spec.use_stochastic_rounding,
        spec.scale_axis,
        strict=spec.strict,
    )
    return bits_point(bits, key, real)._replace(is_curve=True)
