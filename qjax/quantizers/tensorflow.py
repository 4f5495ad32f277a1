"""TensorFlow's fake quantization, bit for bit, with its gradients.

Codes are unsigned. The range is nudged so that zero is a code; values round half up:

    scale = (high - low) / (qmax - qmin),  inverse = (qmax - qmin) / (high - low)
    zero_point = clip(round_half_away(qmin - low / scale), qmin, qmax)
    lo = (qmin - zero_point) * scale,      hi = (qmax - zero_point) * scale
    z = floor(-lo * inverse + 0.5)
    y = floor((clip(x, lo, hi) - lo) / scale - z + 0.5) * scale        `fake_quant_vars`
    y = floor((clip(x, lo, hi) - lo) * inverse - z + 0.5) * scale      the other two

A range without zero is moved, not widened. Where ``low == high == 0``, ``y`` is 0 and
the gradient passes. The gradient of ``x`` passes where ``lo <= x <= hi``; that of
``low`` (``high``) is the sum over what lies below ``lo`` (above ``hi``).

Checked against TensorFlow 2.19.1 by `tests/conformance`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec, scale_shape
from qjax.quantizers.point import SCOPE, Quantized
from qjax.ranges import reduce_range
from qjax.rounding import floor_log2, half_away, power_of_two, product, quotient

_NEAR_ZERO = 1e-6  # A range that is no wider has no scale of its own.
UINT8 = QSpec(8, signed=False)


class _Range(NamedTuple):
    scale: jax.Array
    inverse: jax.Array
    zero_point: jax.Array
    lo: jax.Array
    hi: jax.Array
    is_empty: jax.Array


def fake_quant_vars(
    x: jax.Array, low: ArrayLike, high: ArrayLike, spec: QSpec = UINT8
) -> jax.Array:
    """Rounds as ``tf.quantization.fake_quant_with_min_max_vars``: one trainable range.

    Args:
      x: Real values, float32.
      low: Least value, shape ``[]``.
      high: Largest value, shape ``[]``.
      spec: 2 to 16 bits, unsigned; ``narrow_range`` leaves code 0 out.

    Returns:
      Values on the grid, shape of ``x``, by the formula at the head of this module,
      with a quotient. NaN stays NaN.

    Raises:
      ValueError: for other words or shapes, or a range that TensorFlow leaves undefined
        (``low > high``, or equal and not 0), as far as it is known.

    Example:
      >>> fake_quant_vars(jnp.array([-1.0, 0.1, 0.12, 9.0]), -0.5, 1.5, QSpec(4, False))
      Array([-0.53333336,  0.13333334,  0.13333334,  1.4666667 ], dtype=float32)

    References:
      tensorflow/core/kernels/fake_quant_ops_functor.h, TensorFlow 2.19.1.
    """
    return quantize_vars(x, low, high, spec).value


def fake_quant_per_channel(
    x: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec
) -> jax.Array:
    """Rounds as ``fake_quant_with_min_max_vars_per_channel``: a range per channel.

    Args:
      x: Real values, float32.
      low: Least values, the rank of ``x`` with size 1 everywhere but at ``spec.axis``.
      high: Largest values, same shape.
      spec: Same as for `fake_quant_vars`, with ``axis``.

    Returns:
      Same as `fake_quant_vars`, with a product by the inverse instead of the quotient.

    Raises:
      ValueError: as `fake_quant_vars`.
    """
    return quantize_per_channel(x, low, high, spec).value


def fake_quant_args(
    x: jax.Array, low: float, high: float, spec: QSpec = UINT8
) -> jax.Array:
    """Rounds as ``fake_quant_with_min_max_args``: one fixed range.

    Args:
      x: Real values, float32.
      low: Least value.
      high: Largest value.
      spec: Same as for `fake_quant_vars`.

    Returns:
      Same as `fake_quant_per_channel`, for one range. The range gets no gradient.

    Raises:
      ValueError: as `fake_quant_vars`.
    """
    least, largest = (jax.lax.stop_gradient(jnp.float32(v)) for v in (low, high))
    return _quantize(x, least, largest, spec, reciprocal=True).value


def quantize_vars(
    x: jax.Array, low: ArrayLike, high: ArrayLike, spec: QSpec = UINT8
) -> Quantized:
    """Returns `fake_quant_vars` with its codes and grid."""
    return _quantize(x, jnp.float32(low), jnp.float32(high), spec, reciprocal=False)


def quantize_per_channel(
    x: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec
) -> Quantized:
    """Returns `fake_quant_per_channel` with its codes and grid."""
    if spec.axis is None:
        raise ValueError("`spec.axis` must name the channel axis, got None.")
    return _quantize(x, low, high, spec, reciprocal=True)


def tfmot_range(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Returns the range of a batch as TFMOT's quantizers take it.

        low, high = min(min(x), 0), max(max(x), 0)

    and, if ``spec.symmetric``, with ``r = (2^bits - 2) / 2^bits``, or 1 for a narrow
    range, from the extremes themselves:

        low = min(min(x), -max(x) / r),  high = max(max(x), -min(x) * r)

    so that zero is in the middle of the unsigned codes. The ``reduce`` of
    `qjax.min_max`, `qjax.last_value` and `qjax.ema_min_max`.

    Args:
      x: Values of one batch.
      spec: Word, signed, and the axis along which ranges are kept apart.

    Returns:
      ``(low, high)``, in the shape of a scale.

    References:
      tensorflow-model-optimization 0.8.0, quantization/keras/quantizers.py. There
      ``per_axis`` gives one range in AllValuesQuantizer, and an error in
      MovingAverageQuantizer; here it gives a range per channel.
    """
    low, high = reduce_range(x, spec.axis)
    if not spec.symmetric:
        return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    levels = power_of_two(spec.bits)
    ratio = jnp.ones(()) if spec.narrow_range else (levels - 2.0) * (1.0 / levels)
    # Each end from the extremes: `low` would come back an ulp apart from a quotient.
    return jnp.minimum(low, quotient(-high, ratio)), jnp.maximum(high, -low * ratio)


def tflite_params(low: jax.Array, high: jax.Array, spec: QSpec) -> QParams:
    """Returns the grid that TFLite's converter makes of a range.

        asymmetric:  scale = (high - low) / (qmax - qmin)
                     zero_point = round_half_away(qmin - low / scale)
        symmetric:   scale = max(high, -low) / qmax,  zero_point = 0

    after widening the range to contain 0 and, if it is at most 1e-6 wide, 5e-7 on both
    sides. float32, but for the quotient of the zero point, which is float64 rounded to
    float32.

    Args:
      low: Least value, shape ``[]``.
      high: Largest value, same shape.
      spec: Word length and range of the codes.

    Returns:
      `QParams`, shape of ``low``.

    References:
      TensorFlow 2.19.1, compiler/mlir/quantization/common/quantization_lib; symmetric:
      its 16x8 quantizer. Checked by `tests/conformance`.
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    is_narrow = high - low <= _NEAR_ZERO
    low = jnp.where(is_narrow, jnp.minimum(low, -0.5 * _NEAR_ZERO), low)
    high = jnp.where(is_narrow, jnp.maximum(high, 0.5 * _NEAR_ZERO), high)
    ends = jnp.asarray(spec.qmin), jnp.asarray(spec.qmax)
    qmin, qmax = (end.astype(jnp.float32) for end in ends)
    if spec.symmetric:
        scale = quotient(jnp.maximum(high, -low), qmax)
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32))
    scale = quotient(high - low, qmax - qmin)
    steps, rest = _long_quotient(low, scale)
    # The compiler may move a known term from one difference to the next.
    qmin = jax.lax.optimization_barrier(qmin)
    zero = qmin - steps
    # Lost parts of the difference and the quotient: together as in float64.
    above = zero - qmin
    lost = (qmin - (zero - above)) + (-steps - above)
    zero = jnp.clip(half_away(zero + (lost - rest)), qmin, qmax)
    return QParams(scale, zero.astype(jnp.int32))


def _long_quotient(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``a / b`` as a float32, and the rest of the quotient (Dekker, 1971)."""
    unit = power_of_two(-floor_log2(b))
    a, b = a * unit, b * unit
    near = quotient(a, b)
    halves = []
    for x in (near, b):
        wide = product(x, 4097.0)
        high = wide - (wide - x)
        halves.append((high, x - high))
    (p, q), (r, s) = halves
    whole = product(near, b)
    error = ((p * r - whole) + p * s + q * r) + q * s  # All exact, fused or not.
    return near, quotient((a - whole) - error, b)


def _quantize(
    x: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec, *, reciprocal: bool
) -> Quantized:
    _check(x, low, high, spec)
    # The compiler folds known values in its own way.
    low, high = jax.lax.optimization_barrier((low, high))
    ends = jnp.asarray(spec.qmin), jnp.asarray(spec.qmax)
    qmin, qmax = (end.astype(jnp.float32) for end in ends)
    with jax.named_scope(f"{SCOPE}fake_quant"):
        value, codes = _value_and_codes(reciprocal, x, low, high, qmin, qmax)
    r = _nudge(low, high, qmin, qmax)
    scale = jnp.where(r.is_empty, 1.0, r.scale)
    zero_point = jnp.where(r.is_empty, qmin, r.zero_point).astype(jnp.int32)
    return Quantized(value, codes, QParams(scale, zero_point))


def _check(x: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec) -> None:
    if spec.signed or spec.symmetric or spec.power_of_two:
        raise ValueError(
            "TensorFlow's fake quantization has unsigned asymmetric words, got "
            f"{spec}. Use `QSpec(bits, signed=False)`."
        )
    if not isinstance(spec.bits, jax.core.Tracer):
        bits = np.asarray(spec.bits)
        if np.any(bits < 2) or np.any(bits > 16):
            raise ValueError(f"`bits` must lie in 2..16, got {spec.bits}.")
    expected = scale_shape(x.shape, spec.axis)
    for name, end in (("low", low), ("high", high)):
        if jnp.shape(end) != expected:
            raise ValueError(
                f"`{name}` must have shape {expected} for an input of shape {x.shape} "
                f"and axis={spec.axis}, got {jnp.shape(end)}."
            )
    if not any(isinstance(end, jax.core.Tracer) for end in (low, high)):
        a, b = np.asarray(low), np.asarray(high)
        if np.any((a > b) | ((a == b) & (a != 0))):
            raise ValueError(
                f"The range must have low < high, or be 0 on both sides, got [{low}, "
                f"{high}]."
            )


def _nudge(low: jax.Array, high: jax.Array, qmin: jax.Array, qmax: jax.Array) -> _Range:
    """Moves a range so that zero is a code."""
    steps, width = qmax - qmin, high - low
    scale = quotient(width, steps)
    inverse = quotient(steps, width)
    from_min = qmin - quotient(low, scale)
    inside = jnp.floor(from_min + 0.5)  # Half away from zero: it is positive.
    zero_point = jnp.where(
        from_min < qmin, qmin, jnp.where(from_min > qmax, qmax, inside)
    )
    lo = product(qmin - zero_point, scale)
    hi = product(qmax - zero_point, scale)
    is_empty = (low == 0) & (high == 0)
    return _Range(scale, inverse, zero_point, lo, hi, is_empty)


def _steps(reciprocal: bool, x: jax.Array, r: _Range) -> jax.Array:
    """Returns whole steps from zero."""
    above = jnp.clip(x, r.lo, r.hi) - r.lo
    z = jnp.floor(product(-r.lo, r.inverse) + 0.5)
    ratio = product(above, r.inverse) if reciprocal else quotient(above, r.scale)
    return jnp.floor((ratio - z) + 0.5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_codes(reciprocal, x, low, high, qmin, qmax):
    r = _nudge(low, high, qmin, qmax)
    steps = _steps(reciprocal, x, r)
    value = jnp.where(r.is_empty, 0.0, steps * r.scale)
    zero_point = jnp.where(r.is_empty, qmin, r.zero_point)
    whole = jnp.where(r.is_empty | jnp.isnan(x), 0.0, steps)
    return value, (whole + zero_point).astype(jnp.int32)


def _forward(reciprocal, x, low, high, qmin, qmax):
    r = _nudge(low, high, qmin, qmax)
    out = _value_and_codes(reciprocal, x, low, high, qmin, qmax)
    below, above = (x < r.lo) & ~r.is_empty, (x > r.hi) & ~r.is_empty
    passes = r.is_empty | ((x >= r.lo) & (x <= r.hi))
    return out, (passes, below, above, low, high)


def _backward(reciprocal, residuals, cotangents):
    passes, below, above, low, high = residuals
    dy, _ = cotangents
    zero = jnp.zeros_like(dy)
    dx = jnp.where(passes, dy, zero)
    ends = (_sum_to(jnp.where(m, dy, zero), low.shape) for m in (below, above))
    return dx, *ends, None, None


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which a range is shared."""
    if not shape:
        return jnp.sum(x)
    axes = tuple(d for d, n in enumerate(shape) if n != x.shape[d])
    return jnp.sum(x, axes, keepdims=True)


_value_and_codes.defvjp(_forward, _backward)
