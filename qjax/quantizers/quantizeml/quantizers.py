"""QuantizeML's quantizers of weights, biases, inputs and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.quantizers.quantizeml.arithmetic import SameKind, add, parts, rescale
from qjax.quantizers.quantizeml.integers import (
    as_integers,
    check_shift,
    lift,
    lifted,
    saturated,
    shifted_half_up,
)
from qjax.quantizers.quantizeml.numbers import FixedPoint, Number, QFloat, make_number
from qjax.quantizers.quantizeml.reals import (
    as_real,
    max_frac_bits,
    optimal_scales,
    quantize_fixed_point,
    quantize_qfloat,
    quantize_scales,
)
from qjax.quantizers.spec import is_known
from qjax.ranges import reduce_range
from qjax.rounding import check_bits, product, quotient

_LEAST_SCALE = 1e-6


def quantize_weight(
    w: jax.Array,
    bits: ArrayLike = 4,
    *,
    signed: bool = True,
    axis: int | None = -1,
    power_of_two: bool = False,
) -> Number:
    """Rounds a weight to the finest grid that holds it.

        scale = max(max|w| / (2^value_bits - 1), 1e-6)
        codes = clip(round(w / scale), -2^value_bits, 2^value_bits - 1)

    with ``round`` half to even. With ``power_of_two`` there is no scale but the
    ``frac_bits`` of `max_frac_bits`. Backward, ``dw = dy``, and the scale passes its
    own derivative on to the largest weight: `straight_through`.

    Args:
      w: Real values, shape ``[...]``. NaN makes all values of its channel NaN, or 0 if
        ``power_of_two``.
      bits: Word length, 2 to 32, or 1 to 31 if not signed.
      signed: Whether the sign is counted.
      axis: The channel axis (-2 for depthwise kernels), or None for one scale.
      power_of_two: Whether the grid is one of powers of two, QuantizeML's
        ``fp_quantizer``.

    Returns:
      `QFloat`, its scale of the shape of ``w`` from ``axis`` on, with size 1 behind it
      (``[c]`` for -1, ``[c, 1]`` for -2); `FixedPoint` if ``power_of_two``.

    Raises:
      ValueError: for another word length or axis.
      TypeError: if ``w`` is not real, or ``bits`` is no integer.

    Example:
      >>> q = quantize_weight(jnp.array([[0.7, -0.2], [-0.15, 0.1]]))
      >>> q.codes, q.scale * 7
      (Array([[ 7, -7],
             [-2,  4]], dtype=int32), Array([0.7, 0.2], dtype=float32))

    References:
      QuantizeML 1.2.5, WeightQuantizer.
    """
    value_bits = _value_bits(bits, signed)
    w = as_real(w)
    ranges = _ranges(w, axis)
    if power_of_two:
        return quantize_fixed_point(w, value_bits, max_frac_bits(value_bits, ranges))
    scale = jnp.maximum(optimal_scales(ranges, value_bits), _LEAST_SCALE)
    return quantize_qfloat(w, value_bits, scale)


def quantize_aligned_weight(
    w: jax.Array, other: SameKind, bits: ArrayLike = 8, *, signed: bool = True
) -> SameKind:
    """Rounds a bias, or any constant, to the format of the numbers it is added to.

        own = min(max_frac_bits(value_bits, max|w| / scale), frac_bits)
        codes = clip(round(w / scale * 2^own)) * 2^(frac_bits - own)

    with ``scale`` (1 without one) and ``frac_bits`` of the other: ``bits`` significant
    bits, moved left. ``max|w|`` is that of each channel if ``bits > 4``, else of all.
    Backward, ``dw = dy``: `straight_through`.

    Args:
      w: Real values, shape ``[]`` or ``[c]``, or any that broadcasts. NaN is refused as
        what is too large is, and makes its channel 0 where it is traced.
      other: Numbers, an accumulator.
      bits: Word length, 2 to 32, or 1 to 31 if not signed.
      signed: Whether the sign is counted.

    Returns:
      Numbers of the kind, the ``value_bits``, the ``frac_bits`` and the scale of the
      other: ready for `add`.

    Raises:
      ValueError: for another word length, or for bits so large, in steps of the other,
        that all saturate; as far as they are known.
      TypeError: if ``w`` is not real, or ``bits`` is no integer.

    Example:
      >>> from qjax.quantizers.quantizeml import add, from_codes
      >>> acc = from_codes(jnp.int32([[100, 200]]), 23, frac_bits=10)
      >>> bias = quantize_aligned_weight(jnp.array([0.3, -9.9]), acc)
      >>> bias.codes, add(acc, bias).codes
      (Array([   304, -10112], dtype=int32), Array([[  404, -9912]], dtype=int32))

    References:
      QuantizeML 1.2.5, AlignedWeightQuantizer.
    """
    value_bits, w = _value_bits(bits, signed), as_real(w)
    fixed, scale = parts(other)
    per_channel, per_tensor = _ranges(w, -1 if w.ndim else None), _ranges(w, None)
    ranges = jnp.where(jnp.asarray(bits) > 4, per_channel, per_tensor)
    ranges, w = (quotient(*lifted(v, scale)) for v in (ranges, w))
    frac_bits = as_integers("frac_bits", fixed.frac_bits)
    own = jnp.minimum(*lifted(max_frac_bits(value_bits, ranges), frac_bits))
    w = jnp.broadcast_to(w, jnp.broadcast_shapes(w.shape, own.shape))
    q = quantize_fixed_point(w, value_bits, own)
    q = rescale(q, frac_bits, fixed.value_bits)
    return QFloat(q, other.scale) if isinstance(other, QFloat) else q


def quantize_input(
    x: jax.Array,
    low: ArrayLike,
    high: ArrayLike,
    bits: ArrayLike = 8,
    *,
    signed: bool = True,
) -> tuple[Number, jax.Array]:
    """Rounds an input to a power-of-two grid.

        signed:    frac_bits = max_frac_bits(value_bits, max(|low|, |high|))
                   codes = clip(round(x * 2^frac_bits)),  zero_point = 0
        unsigned:  frac_bits = max_frac_bits(value_bits, high - low)
                   zero_point = clip(round(-low * 2^frac_bits))
                   codes = clip(clip(round(x * 2^frac_bits)) + zero_point)

    with ``round`` half to even and ``clip`` to ``[-2^value_bits, 2^value_bits - 1]``.
    The numbers that are returned stand for ``x - low``, with low as it was rounded: the
    next layer folds the zero point into its bias. Backward, ``dx = dy``:
    `straight_through`.

    Args:
      x: Real values, shape ``[...]``. NaN becomes the code of 0.
      low: Least value, ``[]``, or one of each channel of the last axis: ``[c]``, or the
        rank of ``x`` with size 1 before it.
      high: Largest value, same shape.
      bits: Word length, 2 to 32, or 1 to 31 if not signed.
      signed: Whether the sign is counted.

    Returns:
      ``(q, zero_point)``: `FixedPoint` if signed, else `QFloat` of scale 1; int32, the
      shape of ``q.params.zero_point``, in whose place it makes the grid of ``x``.

    Raises:
      TypeError: if ``x`` is not real, or ``bits`` is no integer.
      ValueError: for another word length or shape.

    Example:
      >>> x = jnp.array([0.5, -0.3])
      >>> q, zero_point = quantize_input(x, -0.5, 0.5, signed=False)
      >>> q.codes, zero_point
      (Array([255,  51], dtype=int32), Array(128, dtype=int32))

    References:
      QuantizeML 1.2.5, InputQuantizer.
    """
    value_bits, x = _value_bits(bits, signed), as_real(x)
    low, high = _of_channels("low", low, x), _of_channels("high", high, x)
    if signed:
        most = jnp.maximum(*lifted(jnp.abs(low), jnp.abs(high)))
        q = quantize_fixed_point(x, value_bits, max_frac_bits(value_bits, most))
        return q, q.params.zero_point
    low, high = jnp.broadcast_arrays(*lifted(low, high))
    frac_bits = max_frac_bits(value_bits, high - low)
    q = quantize_fixed_point(x, value_bits, frac_bits)
    zero = quantize_fixed_point(-low, value_bits, frac_bits)
    return QFloat(add(q, zero), jnp.float32(1)), lift(zero.codes, x.ndim)


def quantize_output(
    x: Number,
    range_max: ArrayLike,
    bits: ArrayLike = 8,
    *,
    signed: bool = True,
    scale_bits: ArrayLike = 8,
    buffer_bits: ArrayLike = 32,
    rescaling_rate: ArrayLike = 1.0,
) -> FixedPoint:
    """Rescales accumulators to a short word at the end of a block.

        frac_bits = max_frac_bits(value_bits, range_max)
        s = quantize_scales(scale * rescaling_rate, scale_bits)
        p = clip(x.codes * s.codes, -2^buffer_bits, 2^buffer_bits - 1)
        codes = clip(floor(p * 2^(frac_bits - x.frac_bits - s.frac_bits) + 1/2))

    in exact integers. Numbers without a scale are moved only: there ``s.codes`` is 1,
    and the buffer has no end. For a derivative, `straight_through` of the real value.

    Args:
      x: Accumulators, codes of shape ``[...]``.
      range_max: Largest magnitude of the output, ``[]``, or one of each channel of the
        last axis: ``[c]``, or the rank of ``x`` with size 1 before it.
      bits: Word length, 2 to 32, or 1 to 31 if not signed.
      signed: Whether the sign is counted.
      scale_bits: Word length of the integers that stand for scales, 1 to 31.
      buffer_bits: Bits at which the product saturates, 1 to 48.
      rescaling_rate: Factor of the scale, of cross-layer equalization. Shaped as
        ``range_max``.

    Returns:
      `FixedPoint`, shape of ``x``.

    Raises:
      ValueError: for another word length or shape, for ranges of channels and an ``x``
        of less than three axes, if ``x`` is not longer than the result, or if all would
        saturate; of bits, as far as they are known.
      TypeError: if bits are no integers.

    Example:
      >>> from qjax.quantizers.quantizeml import QFloat, from_codes, to_float
      >>> x = QFloat(from_codes(jnp.int32([300, -77]), 27), jnp.float32(0.01))
      >>> y = quantize_output(x, 4.0)
      >>> to_float(y)
      Array([ 3.     , -0.78125], dtype=float32)

    References:
      QuantizeML 1.2.5, OutputQuantizer.
    """
    value_bits = _value_bits(bits, signed)
    fixed, scale = parts(x)
    range_max = _of_channels("range_max", range_max, fixed.codes)
    _check_output(fixed, range_max, value_bits, buffer_bits)
    frac_bits = max_frac_bits(value_bits, range_max)
    if not isinstance(x, QFloat):
        return rescale(fixed, frac_bits, value_bits)
    rate = _of_channels("rescaling_rate", rescaling_rate, fixed.codes)
    s = quantize_scales(product(*lifted(scale, rate)), scale_bits)
    have = as_integers("frac_bits", fixed.frac_bits)
    want, have, of_scale = lifted(frac_bits, have, s.frac_bits)
    moves = want - have - of_scale
    check_shift(moves, value_bits)

    def product_in_buffer(codes, scale, move, buffer):
        return shifted_half_up(saturated(codes * scale, buffer), move)

    operands = lifted(fixed.codes, s.codes, moves)
    buffer = as_integers("buffer_bits", buffer_bits)
    return make_number(product_in_buffer, value_bits, frac_bits, *operands, buffer)


def _value_bits(bits: ArrayLike, signed: bool) -> ArrayLike:
    """Returns the word length without the sign; raises if known to be out of range."""
    least, most = 1 + signed, 31 + signed
    check_bits(bits)
    if is_known(bits) and not least <= np.min(bits) <= np.max(bits) <= most:
        raise ValueError(
            f"`bits` must lie in {least}..{most} where signed={signed}, got {bits}."
        )
    return bits - int(signed)


def _ranges(w: jax.Array, axis: int | None) -> jax.Array:
    """Returns the largest magnitudes, with the axes of ``w`` from ``axis`` on."""
    low, high = reduce_range(w, axis)
    most = jnp.maximum(high, -low)
    return most if axis is None else most.reshape(most.shape[axis % w.ndim :])


def _of_channels(name: str, value: ArrayLike, x: jax.Array) -> jax.Array:
    """Returns one number, or one per channel of the last axis, as ``[]`` or ``[c]``."""
    value = jnp.asarray(value, jnp.float32)
    last = x.shape[-1:]
    if value.shape == () or (value.shape == last and x.ndim):
        return value
    if value.shape == (1,) * (x.ndim - 1) + last:
        return value.reshape(last)
    raise ValueError(
        f"`{name}` must have shape (), {last} or {(1,) * (x.ndim - 1) + last} for an "
        f"input of shape {x.shape}, got {value.shape}: ranges are of the tensor or of "
        "its last axis."
    )


def _check_output(
    x: FixedPoint, range_max: jax.Array, value_bits: ArrayLike, buffer_bits: ArrayLike
) -> None:
    if range_max.ndim and x.codes.ndim < 3:
        raise ValueError(
            f"`range_max` of shape {range_max.shape} is of channels, which an output "
            f"of shape {x.codes.shape} does not have: at least 3 axes are wanted. Use "
            "one range."
        )
    if is_known(x.value_bits, value_bits) and np.less_equal(x.value_bits, value_bits):
        raise ValueError(
            f"`quantize_output` makes words shorter, got value_bits={x.value_bits} in "
            f"and {value_bits} out. Leave it out, or use fewer `bits`."
        )
    if is_known(buffer_bits) and not 1 <= np.asarray(buffer_bits) <= 48:
        raise ValueError(f"`buffer_bits` must lie in 1..48, got {buffer_bits}.")
