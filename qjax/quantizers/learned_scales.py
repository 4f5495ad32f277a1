"""Quantizers that learn their grid: a scale, also with an offset, or a clip.

Each learned number is an argument, an array with a gradient of its own; the options are
a frozen spec. Codes are those of `qjax.quantize`:
``clip(round(x / s) + z, qmin, qmax)``.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import QSpec, scale_shape
from qjax.qpoint import Estimator
from qjax.quantizers.learning import Learned, Learning
from qjax.quantizers.point import (
    Point,
    apply,
    finite,
    line_point,
    point_of,
    round_steps,
    straight,
)
from qjax.quantizers.scaling import Axes, divide
from qjax.quantizers.spec import Spec, check_number, static
from qjax.quantizers.words import as_float, check_word, plain_number
from qjax.ranges import min_max_params, reduce_range
from qjax.rounding import int_range, power_of_two

_LEAST = 2.0**-64  # Least scale, in place of one that training took below it.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LSQ(Spec):
    """The options of `lsq`.

    Attributes:
      bits: Word length, sign included, 2 to 24 (1 to 24 unsigned).
      signed: Whether codes may be negative.
      narrow_range: Whether the least code is left out.
      axis: The axis or axes with scales of their own; None for one scale.
      gradient_scale: Factor of the gradient of the scale; "auto" for
        ``1 / sqrt(n * qmax)`` with ``n`` values per scale.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "lsq"
    learning: ClassVar[Learning | None] = Learning(
        ("scale",),
        lambda spec, seen: {"scale": _lsq_start(spec, seen.mean_abs)},
        lambda spec: {"scale": (_LEAST, math.inf)},
    )

    bits: ArrayLike = 8
    signed: bool = static(True)
    narrow_range: bool = static(False)
    axis: Axes = static(None)
    gradient_scale: ArrayLike | Literal["auto"] = "auto"
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_learned(self)


def lsq(
    x: jax.Array,
    scale: jax.Array,
    spec: LSQ,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to a grid whose scale has a gradient: learned step size.

        u = x / s,  y = s * clip(round(u), qmin, qmax)
        dx = dy where qmin < u < qmax, else 0
        ds = g * sum(dy * (round(u) - u  where qmin < u < qmax,  else qmin or qmax))

    with ``g = 1 / sqrt(n * qmax)`` for ``n`` values per scale.

    Args:
      x: Real values, any shape.
      scale: ``s``, positive, shape ``[]``; with ``spec.axis`` the rank of ``x`` with
        size 1 elsewhere. Start from `lsq_scale`. Below 2^-64 it counts as that.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: if ``scale`` has another shape.

    Example:
      >>> f = lambda s: lsq(jnp.array([0.3, 9.0]), s, LSQ(4)).sum()
      >>> jax.grad(f)(jnp.float32(0.25))  # (1 - 1.2 + 7) / sqrt(14)
      Array(1.8173765, dtype=float32)

    References:
      Esser et al., "Learned Step Size Quantization", 2020, eq. 1 to 5
      (arXiv:1902.08153).
    """
    return apply(spec, x, scale, key=key, estimator=estimator)


def lsq_scale(x: jax.Array, spec: LSQ) -> jax.Array:
    """Returns the initial scale of `lsq`: ``2 * mean|x| / sqrt(qmax)``.

    Args:
      x: First values, a weight or a batch.
      spec: Options.

    Returns:
      float32, in the shape that `lsq` takes; at least 2^-64.

    References:
      Esser et al., 2020, section 2.1 (arXiv:1902.08153).
    """
    shape = scale_shape(x.shape, spec.axis)
    over = tuple(d for d in range(x.ndim) if not shape or shape[d] == 1)
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)), over, keepdims=bool(shape))
    return jnp.maximum(_first_scale(spec, mean), _LEAST)


def _first_scale(spec: LSQ, mean_abs: jax.Array) -> jax.Array:
    _, qmax = _code_range(spec)
    return 2.0 * mean_abs / jnp.sqrt(qmax)


def _lsq_start(spec: LSQ, mean_abs: jax.Array) -> jax.Array:
    """Returns the initial scale in a scheme, where values that are all 0 have 1."""
    scale = jnp.maximum(_first_scale(spec, mean_abs), _LEAST)
    return jnp.where(mean_abs == 0, 1.0, scale)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LSQPlus(Spec):
    """The options of `lsq_plus`: those of `LSQ`.

    Attributes:
      bits: Word length, sign included, 2 to 24 (1 to 24 unsigned).
      signed: Whether codes may be negative.
      narrow_range: Whether the least code is left out.
      axis: The axis or axes with scales of their own; None for one scale.
      gradient_scale: Same as in `LSQ`, for scale and offset.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "lsq_plus"
    learning: ClassVar[Learning | None] = Learning(
        ("scale", "offset"),
        lambda spec, seen: _lsq_plus_start(spec, seen.low, seen.high),
        lambda spec: {"scale": (_LEAST, math.inf)},
    )

    bits: ArrayLike = 8
    signed: bool = static(True)
    narrow_range: bool = static(False)
    axis: Axes = static(None)
    gradient_scale: ArrayLike | Literal["auto"] = "auto"
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_learned(self)


def lsq_plus(
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    spec: LSQPlus,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to a grid whose scale and offset have gradients.

        z = -round(offset / s),  u = x / s + z,  q = clip(round(x / s) + z, qmin, qmax)
        y = s * (q - z)
        dx = dy where qmin < u < qmax, else 0
        ds = g * sum(dy * (q - u  where qmin < u < qmax,  else qmin or qmax))
        d offset = g * sum(dy where not qmin < u < qmax)

    The offset is put on the grid, so that zero is a code: integers need that. The
    gradients are those of the paper, for an offset that is not.

    Args:
      x: Real values, any shape.
      scale: ``s``, as in `lsq`. Start from `lsq_plus_params`.
      offset: Value of code 0, shape of ``scale``.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: if ``scale`` or ``offset`` has another shape.

    Example:
      >>> x = jnp.array([0.3, -0.7, 9.0])
      >>> lsq_plus(x, jnp.float32(0.25), jnp.float32(1.5), LSQPlus(4))
      Array([ 0.25, -0.5 ,  3.25], dtype=float32)

    References:
      Bhalgat et al., "LSQ+", 2020, eq. 3 to 7 (arXiv:2004.09576).
    """
    return apply(spec, x, scale, offset, key=key, estimator=estimator)


def lsq_plus_params(x: jax.Array, spec: LSQPlus) -> tuple[jax.Array, jax.Array]:
    """Returns the initial scale and offset of `lsq_plus`, from the range of ``x``.

    Args:
      x: First values, a batch.
      spec: Options.

    Returns:
      ``(scale, offset)``, float32, in the shape that `lsq_plus` takes.

    References:
      Bhalgat et al., 2020, section 3.2 (arXiv:2004.09576).
    """
    start = _lsq_plus_start(spec, *reduce_range(x, spec.axis))
    return start["scale"], start["offset"]


def _lsq_plus_start(spec: LSQPlus, low: jax.Array, high: jax.Array) -> Learned:
    word = QSpec(spec.bits, spec.signed, spec.narrow_range, axis=spec.axis)
    scale, zero_point = min_max_params(low, high, word)
    offset = -zero_point.astype(jnp.float32) * scale
    return {"scale": scale, "offset": offset}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PACT(Spec):
    """The options of `pact`.

    Attributes:
      bits: Word length, 1 to 24.
      axis: The axis or axes with clips of their own; None for one clip.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      qnoise_factor: Share of the quantized value, 0 to 1.
    """

    name: ClassVar[str] = "pact"
    learning: ClassVar[Learning | None] = Learning(
        ("clip",),
        lambda spec, seen: {"clip": jnp.where(seen.high <= 0, 1.0, seen.high)},
        lambda spec: {"clip": (_LEAST, math.inf)},
    )

    bits: ArrayLike = 8
    axis: Axes = static(None)
    use_stochastic_rounding: bool = static(False)
    qnoise_factor: ArrayLike = 1.0

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        check_word(self, most=24)


def pact(
    x: jax.Array,
    clip: jax.Array,
    spec: PACT,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a relu that ends at a learned value: parameterized clipping.

        s = clip / (2^bits - 1),  y = s * round(min(max(x, 0), clip) / s)
        dx = dy where 0 <= x < clip, else 0;  d clip = sum(dy where x >= clip)

    Args:
      x: Real values, any shape.
      clip: Largest value, positive, shape ``[]``; with ``spec.axis`` the rank of ``x``
        with size 1 elsewhere. Below 2^-64 it counts as that.
      spec: Options.
      key: Key for stochastic rounding; see `qjax.quantizers`.
      estimator: Backward pass; see `qjax.quantizers`.

    Returns:
      Values on the grid, shape and dtype of ``x``. NaN stays NaN.

    Raises:
      ValueError: if ``clip`` has another shape.

    Example:
      >>> pact(jnp.array([0.3, -1.0, 9.0]), jnp.float32(3.0), PACT(2))
      Array([0., 0., 3.], dtype=float32)

    References:
      Choi et al., "PACT", 2018, eq. 1 to 3 (arXiv:1805.06085).
    """
    return apply(spec, x, clip, key=key, estimator=estimator)


def _check_learned(spec: Any) -> None:
    check_word(spec, most=24)
    low = 2 if spec.signed else 1
    check_number(spec, "bits", f"an integer from {low} on", low, is_whole=True)
    if not isinstance(spec.gradient_scale, str) or spec.gradient_scale != "auto":
        check_number(spec, "gradient_scale", "'auto' or a number from 0 on", 0)


def _code_range(spec: Any) -> tuple[jax.Array, jax.Array]:
    qmin, qmax = int_range(plain_number(spec.bits), spec.signed, spec.narrow_range)
    return as_float(qmin), as_float(qmax)


def _check_shape(name: str, what: str, x: Any, learned: Any, axis: Axes) -> None:
    expected = scale_shape(x.shape, axis)
    if learned.shape != expected:
        raise ValueError(
            f"`{name}`: `{what}` must have shape {expected} for an input of shape "
            f"{x.shape} and axis={axis}, got {learned.shape}."
        )


def _damped(spec: Any, v: jax.Array, x: jax.Array, qmax: jax.Array) -> jax.Array:
    """Scales the gradient of a learned array."""
    g = spec.gradient_scale
    if isinstance(g, str):
        g = 1.0 / jnp.sqrt(max(x.size, 1) / math.prod(v.shape) * qmax)
    return g * v + lax.stop_gradient(v - g * v)


@point_of(LSQ)
def _lsq_point(
    spec: LSQ, key: chex.PRNGKey | None, x: jax.Array, scale: jax.Array
) -> Point:
    _check_shape(spec.name, "scale", x, scale, spec.axis)
    return _step_size_point(spec, key, x, scale, None)


@point_of(LSQPlus)
def _lsq_plus_point(
    spec: LSQPlus,
    key: chex.PRNGKey | None,
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
) -> Point:
    _check_shape(spec.name, "scale", x, scale, spec.axis)
    _check_shape(spec.name, "offset", x, offset, spec.axis)
    return _step_size_point(spec, key, x, scale, offset)


def _step_size_point(
    spec: LSQ | LSQPlus,
    key: chex.PRNGKey | None,
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None,
) -> Point:
    qmin, qmax = _code_range(spec)
    s = jnp.maximum(lax.stop_gradient(scale), _LEAST)
    z = jnp.zeros(s.shape)
    if offset is not None:
        z = -jnp.clip(jnp.round(finite(offset) * (1.0 / s)), -(2.0**22), 2.0**22)
    held = lax.stop_gradient(x)
    v = finite(held * (1.0 / s))
    u = v + z
    whole = round_steps(v, key) + z
    codes = jnp.clip(whole, qmin, qmax)
    inside = (qmin < u) & (u < qmax)
    learned = _damped(spec, scale, x, qmax) * jnp.where(inside, codes - u, codes)
    if offset is not None:
        learned = learned + jnp.where(inside, 0.0, _damped(spec, offset, x, qmax))
    return Point(
        x,
        u,
        qmin,
        qmax,
        held if key is None else (codes - z) * s,
        s,
        qmin,
        qmax,
        z.astype(jnp.int32),
        is_direct=key is None,
        passes=inside,
        learned=learned,
    )


@point_of(PACT)
def _pact_point(
    spec: PACT, key: chex.PRNGKey | None, x: jax.Array, clip: jax.Array
) -> Point:
    _check_shape(spec.name, "clip", x, clip, spec.axis)
    levels = power_of_two(plain_number(spec.bits)) - 1.0
    top = jnp.maximum(lax.stop_gradient(clip), _LEAST)
    learned = jnp.where(lax.stop_gradient(x) >= top, clip, 0.0)
    passes = (x >= 0) & (x < top)
    clipped = straight(x, lax.stop_gradient(jnp.clip(x, 0.0, top)))
    return line_point(
        key, clipped, x, divide(top, levels), 0 * levels, levels
    )._replace(passes=passes, learned=learned)
