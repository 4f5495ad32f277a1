"""Fixed-point quantizers: `quantized_bits` and `quantized_linear`.

Words of ``bits`` bits, of which ``integer`` stand before the binary point, the sign not
counted. With ``u = bits - keep_negative`` the step of a grid is ``2^(integer - u)``.
Names, options and defaults are those of QKeras.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.point import (
    LARGEST,
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
    Axes,
    Sharing,
    check_sharing,
    divide,
    largest,
    least_squares,
    refine,
    to_power_of_two,
)
from qjax.quantizers.spec import Spec, check_number, require, static
from qjax.quantizers.words import (
    Alpha,
    as_float,
    check_alpha,
    check_groups,
    check_word,
    is_known_power_of_two,
    make_word,
    plain_number,
)
from qjax.rounding import power_of_two


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedBits(Spec):
    """The options of `quantized_bits`.

    Attributes:
      bits: Word length, sign included, 1 to 32.
      integer: Bits before the binary point.
      symmetric: Whether the least code is left out.
      keep_negative: Whether codes are signed.
      alpha: Scale of the value, not of the rounding: None for 1, a number, an array per
        channel (last axis), or found from the values: "auto", "auto_po2".
      use_stochastic_rounding: Whether a key makes rounding stochastic; not with
        an ``alpha`` found from the values.
      scale_axis: Axis or axes with scales of their own; None: the last.
      qnoise_factor: Share of the quantized value, 0 to 1 (`blend_noise`).
      use_ste: Whether the quantized value has a derivative.
      elements_per_scale: Size of the groups along ``scale_axis`` that share a scale of
        "auto_po2"; one number, or one per axis.
      min_po2_exponent: Least exponent of a scale of "auto_po2".
      max_po2_exponent: Largest exponent.
      post_training_scale: Frozen scales in place of those found from the values, in
        units of ``2^(integer - u)``.
      strict: Whether options that QKeras accepts but that leave no useful grid are
        errors: more integer bits than bits.
    """

    name: ClassVar[str] = "quantized_bits"

    bits: ArrayLike = 8
    integer: ArrayLike = 0
    symmetric: bool = static(False)
    keep_negative: bool = static(True)
    alpha: Alpha = None
    use_stochastic_rounding: bool = static(False)
    scale_axis: Axes = static(None)
    qnoise_factor: ArrayLike = 1.0
    use_ste: bool = static(True, kw_only=True)
    elements_per_scale: Axes = static(None, kw_only=True)
    min_po2_exponent: ArrayLike | None = dataclasses.field(default=None, kw_only=True)
    max_po2_exponent: ArrayLike | None = dataclasses.field(default=None, kw_only=True)
    post_training_scale: ArrayLike | tuple[float, ...] | None = dataclasses.field(
        default=None, kw_only=True
    )
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self)
        check_alpha(self)
        check_groups(self)
        found = isinstance(self.alpha, str)
        rule = (
            "`post_training_scale` freezes the scales of `alpha='auto'` or 'auto_po2'."
        )
        require(self, found or self.post_training_scale is None, rule)
        check_number(self, "post_training_scale", "positive", 0, is_open=True)


def quantized_bits(
    x: jax.Array,
    spec: QuantizedBits,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to fixed point: QKeras's `quantized_bits`.

        step = 2^(integer - u),  u = bits - keep_negative
        q = clip(round(x / step), qmin, qmax),  y = alpha * step * q

    with ``qmin = -2^u + symmetric`` or 0, ``qmax = 2^u - 1``. A signed word of one bit
    is the sign, ``y = alpha * sign(x)`` with ``sign(0) = 1``. Rounding is half to even
    and does not see ``alpha``. Where ``alpha`` is found, with ``t = x / 2^integer`` and
    ``h = 2^(bits - 1) - 1`` (2^bits - 1 without negatives), by halves away from zero:

        q(s) = sign(t) * min(floor(|t| / s + 1 / 2), h),  y = s * 2^integer * q(s)
        auto:      s = max|t| / h
        auto_po2:  that to a power of two, then 5 times least squares of t and q(s)

    over all axes but ``scale_axis``. The derivative is 1 everywhere.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: for a ``scale_axis`` or groups that ``x`` does not have.

    Example:
      >>> quantized_bits(jnp.array([0.3, -2.0, 0.0625]), QuantizedBits(4, 0, 1))
      Array([ 0.25 , -0.875,  0.   ], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f. There one bit with "auto" gives NaN and
      "auto" keeps negatives without ``keep_negative``; here the scale of one bit is the
      least-squares one, and negatives are cut.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedLinear(Spec):
    """The options of `quantized_linear`: those of `QuantizedBits`, with other defaults.

    Attributes:
      bits: Word length, sign included, 1 to 32.
      integer: Bits before the binary point.
      symmetric: Whether the least code is left out.
      keep_negative: Whether codes are signed.
      alpha: Scale of the grid: None for 1, a number, an array per channel, "auto" or
        "auto_po2".
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      scale_axis: Axis or axes with scales of their own; None: the last.
      qnoise_factor: Share of the quantized value, 0 to 1.
      strict: Same as in `QuantizedBits`.
    """

    name: ClassVar[str] = "quantized_linear"

    bits: ArrayLike = 8
    integer: ArrayLike = 0
    symmetric: bool = static(True)
    keep_negative: bool = static(True)
    alpha: Alpha = None
    use_stochastic_rounding: bool = static(False)
    scale_axis: Axes = static(None)
    qnoise_factor: ArrayLike = 1.0
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self)
        check_alpha(self)


def quantized_linear(
    x: jax.Array,
    spec: QuantizedLinear,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to fixed point with ``alpha`` in the grid: QKeras's `quantized_linear`.

        s = alpha * 2^(integer - u),  u = bits - keep_negative
        q = round(clip(x / s, qmin, qmax)),  y = s * q

    Range of the codes as in `quantized_bits`; rounding is half to even. A signed word
    of one bit is ``y = s * sign(x) / 2``, where ``x / s`` from -2^-25 on counts as 0,
    which float32 makes of it in ``round(x / s - 1 / 2)``. Where ``alpha`` is found:

        auto:      s = max(max|x| / ((qmax - qmin) / 2), 1e-7); max(x) if not negative
        auto_po2:  that to a power of two, then least squares until nothing changes, at
                   most 5 times

    The derivative is 1 where ``qmin <= x / s <= qmax``, else 0.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: for a ``scale_axis`` that ``x`` does not have.

    Example:
      >>> quantized_linear(jnp.array([0.3, -2.0]), QuantizedLinear(4, alpha=2.0))
      Array([ 0.25, -1.75], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


@point_of(QuantizedBits)
def bits_point(spec: QuantizedBits, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    """Rounds by the formula of `quantized_bits`."""
    if isinstance(spec.alpha, str):
        return _auto_bits_point(spec, x)
    held = lax.stop_gradient(x)
    word = make_word(spec, spec.keep_negative, spec.symmetric)
    ends = as_float(word.qmin), as_float(word.qmax)
    steps = held * (1.0 / word.step)
    range_ = word.qmin, word.qmax
    if word.is_sign is False and spec.alpha is None and key is None:
        return Point(x, steps, *ends, held, word.step, *range_, is_direct=True)
    codes = jnp.clip(round_steps(steps, key), *ends)
    codes = jnp.where(word.is_sign, sign(held), codes)
    scale = jnp.where(word.is_sign, 1.0, word.step)
    if spec.alpha is not None:
        scale = scale * known_scale(x, spec.alpha)
    line = sign_line(word.is_sign, held, steps, *ends)
    return Point(x, *line, codes * scale, scale, *range_)


def _auto_bits_point(spec: QuantizedBits, x: jax.Array) -> Point:
    sharing = Sharing(spec.scale_axis, spec.elements_per_scale)
    check_sharing(x.shape, sharing, spec.name)
    word = make_word(spec, spec.keep_negative, symmetric=True)
    unit = power_of_two(plain_number(spec.integer))
    t = finite(finite(x) * (1.0 / unit))
    top = as_float(word.qmax)
    if not spec.keep_negative:
        t = jnp.maximum(t, 0.0)
    frozen = spec.post_training_scale
    is_po2 = spec.alpha == "auto_po2" and frozen is None

    def code(s: jax.Array) -> jax.Array:
        size = jnp.abs(t) * (1.0 / s) if is_po2 else divide(jnp.abs(t), s)
        q = jnp.sign(t) * jnp.minimum(jnp.floor(size + 0.5), top)
        return jnp.where(word.is_sign, sign(t), q)

    def fit(s: jax.Array) -> jax.Array:
        return to_power_of_two(s, spec.min_po2_exponent, spec.max_po2_exponent)

    if frozen is not None:
        s = known_scale(x, jnp.asarray(frozen)) / word.levels
    else:
        s = divide(largest(jnp.abs(t), sharing), top)
        if word.is_sign is not False:
            s = jnp.where(word.is_sign, least_squares(t, sign(t), sharing), s)
    if is_po2:
        s = refine(lambda s: fit(least_squares(t, code(s), sharing)), fit(s), 5)
    value, scale = snap(code(s), s * unit, top)
    low = -top if spec.keep_negative else 0.0 * top
    u = divide(t, s)
    line = sign_line(word.is_sign, u, u, low, top)
    return Point(x, *line, value, scale, word.qmin, word.qmax)


@point_of(QuantizedLinear)
def _linear_point(
    spec: QuantizedLinear, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    held = finite(x)
    word = make_word(spec, spec.keep_negative, spec.symmetric)
    # A sign is half a step: levels -1/2 and 1/2.
    half = jnp.where(word.is_sign, 0.5, 1.0)
    shift = jnp.where(word.is_sign, 0.5, 0.0)
    low, high = as_float(word.qmin) * half, as_float(word.qmax) * half

    def level(u: jax.Array, key: chex.PRNGKey | None = None) -> jax.Array:
        inside = jnp.clip(u, low, high) - shift
        return round_steps(inside, key) + shift

    if isinstance(spec.alpha, str):
        s = _auto_linear_scale(spec, held, level, high - low, word.is_sign)
    else:
        s = word.step
        if spec.alpha is not None:
            s = s * known_scale(x, spec.alpha)
    u = divide(held, s)
    passes = (low <= u) & (u <= high)
    is_direct = (
        key is None and word.is_sign is False and is_known_power_of_two(spec.alpha)
    )
    value = lax.stop_gradient(x) if is_direct else level(u, key) * s
    line = sign_line(word.is_sign, 2.0 * u, u, low, high)
    codes = word.qmin, word.qmax
    return Point(x, *line, value, s * half, *codes, is_direct=is_direct, passes=passes)


def _auto_linear_scale(
    spec: QuantizedLinear,
    x: jax.Array,
    level: Callable[[jax.Array], jax.Array],
    width: jax.Array,
    is_sign: bool | jax.Array,
) -> jax.Array:
    sharing = Sharing(spec.scale_axis)
    check_sharing(x.shape, sharing, spec.name)
    # In a tensor of rank 1, every element is a channel here.
    most = largest if x.ndim > 1 else lambda x, _: x
    if spec.keep_negative:
        s = divide(most(jnp.abs(x), sharing), 0.5 * width)
    else:
        s = divide(most(x, sharing), width)
    s = jnp.clip(s, EPSILON, LARGEST)
    if spec.alpha == "auto":
        return s

    def step(s: jax.Array) -> jax.Array:
        return to_power_of_two(least_squares(x, level(x * (1.0 / s)), sharing))

    times = jnp.where(is_sign, 1, 5)
    return refine(step, to_power_of_two(s), times)
