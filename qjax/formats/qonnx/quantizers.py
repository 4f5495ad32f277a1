"""QONNX's quantizers: IntQuant (Quant), BipolarQuant, Trunc and MultiThreshold.

Quotients and clips are those of the definitions, in their order:

    IntQuant      y = scale * (round(clip(x / scale + zeropt, low, high)) - zeropt)
    BipolarQuant  y = scale where x >= 0, else -scale
    Trunc         y = scale_out * (round(clip(round(x / scale + zeropt) / 2^k)) - z_out)
    MultiThreshold  y = out_scale * (number of thresholds <= x) + out_bias

References:
  docs/qonnx-custom-ops of github.com/fastmachinelearning/qonnx: intquant_v1.md,
  bipolarquant_v1.md, trunc_v1.md, trunc_v2.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.qonnx.values import (
    Constant,
    Data,
    affine,
    clip,
    point,
    pointwise,
    single,
)
from qjax.graph.builder import compact
from qjax.qpoint import clipped_ste
from qjax.quantizers.point import straight

# Step of the sign of a value on no grid: 2^-22 below 0 is still seen.
_SIGN_STEP = 2.0**-20


def half_away(x: Any, xp: Any = jnp) -> Any:
    """Rounds to the nearest integer, halves away from zero."""
    return xp.sign(x) * xp.floor(xp.abs(x) + np.float32(0.5))


def half_to_zero(x: Any, xp: Any = jnp) -> Any:
    """Rounds to the nearest integer, halves towards zero."""
    return xp.sign(x) * xp.ceil(xp.abs(x) - np.float32(0.5))


def away(x: Any, xp: Any = jnp) -> Any:
    """Rounds away from zero."""
    return xp.sign(x) * xp.ceil(xp.abs(x))


def to_zero(x: Any, xp: Any = jnp) -> Any:
    """Rounds towards zero."""
    return xp.sign(x) * xp.floor(xp.abs(x))


_ROUNDINGS: dict[str, Callable[..., Any]] = {
    "ROUND": lambda x, xp=jnp: xp.round(x),
    "HALF_EVEN": lambda x, xp=jnp: xp.round(x),
    "CEIL": lambda x, xp=jnp: xp.ceil(x),
    "FLOOR": lambda x, xp=jnp: xp.floor(x),
    "UP": away,
    "DOWN": to_zero,
    "ROUND_TO_ZERO": to_zero,
    "HALF_UP": half_away,
    "HALF_DOWN": half_to_zero,
}
# Equal modes for codes that are not negative.
_UPWARDS = {"UP": "CEIL", "DOWN": "FLOOR", "ROUND_TO_ZERO": "FLOOR"}
# Half to even on a grid twice as fine, moved by a quarter, then up or down: exact, as
# halves meet even codes there.
_MOVES = {
    "FLOOR": (-0.25, "FLOOR"),
    "CEIL": (0.25, "CEIL"),
    "HALF_UP": (0.25, "FLOOR"),
    "HALF_DOWN": (-0.25, "CEIL"),
}


@dataclasses.dataclass(frozen=True)
class QonnxWord:
    """The word of a quantizer: the integers that its codes can be.

    Attributes:
      scale: float32, ``[]`` or the rank of the values.
      zero_point: The same.
      low: Least code.
      high: Largest code.
      mode: Mode of rounding, a key of ``_ROUNDINGS``.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    mode: str


def int_quant(x: Constant | Data, word: QonnxWord, site: str) -> Constant | Data:
    """Computes IntQuant.

    Args:
      x: Values.
      word: Word of the codes.
      site: Name of the quantization point.

    Returns:
      Values on the grid. What has no codes for lowering (a scale per channel of what is
      no constant, directed rounding of signed raw inputs) is a float function still.
    """
    if isinstance(x, Constant):
        return _known(x, word)
    if word.scale.size > 1 or word.zero_point.size > 1:
        return Data(_by_channel(x.real(), word, site))
    scale, zero = word.scale.item(), int(word.zero_point.item())
    if x.is_pointwise:
        ends = zero, word.low, word.high
        return point(_formula(x.real(), word), scale, *ends, site=site)
    if word.mode in ("ROUND", "HALF_EVEN") and zero % 2 == 0:
        return point(x.real(), scale, zero, word.low, word.high, site=site)
    return _at_once(x, scale, zero, word, site)


def _known(x: Constant, word: QonnxWord) -> Constant:
    with np.errstate(over="ignore"):
        steps = np.asarray(x.value, np.float32) / word.scale + word.zero_point
    rounded = _ROUNDINGS[word.mode](np.clip(steps, word.low, word.high), np)
    codes = np.rint(rounded - word.zero_point).astype(np.int64)
    scale = np.broadcast_to(word.scale, codes.shape)
    return Constant((codes * scale).astype(np.float32), codes, scale)


def _formula(x: jax.Array, word: QonnxWord) -> jax.Array:
    """Computes IntQuant by its definition, with one scale or one scale per channel."""
    scale, zero = (_aligned(a, x.ndim) for a in (word.scale, word.zero_point))
    steps = x / scale
    if np.any(word.zero_point):
        steps = steps + zero
    # The ends are whole: before or after rounding, a clip is the same.
    codes = straight(steps, _ROUNDINGS[word.mode](steps))
    codes = clip(codes, word.low, word.high)
    return (codes - zero if np.any(word.zero_point) else codes) * scale


def _aligned(x: np.ndarray, rank: int) -> jax.Array:
    x = compact(np.asarray(x, np.float32))
    return single(
        x.item() if x.size == 1 else x.reshape((1,) * (rank - x.ndim) + x.shape)
    )


def _by_channel(x: jax.Array, word: QonnxWord, site: str) -> jax.Array:
    shape = np.broadcast_shapes(word.scale.shape, word.zero_point.shape)
    shape = (1,) * (x.ndim - len(shape)) + shape
    scale, zero = (np.broadcast_to(a, shape) for a in (word.scale, word.zero_point))
    ends = jnp.int32(word.low), jnp.int32(word.high)
    codes = jnp.asarray(np.int32(zero))
    return clipped_ste(_formula(x, word), single(scale), codes, *ends, site)


def _at_once(x: Data, scale: float, zero: int, word: QonnxWord, site: str) -> Data:
    """Rounds an input or a wide accumulator, which is no function of few codes."""
    mode = word.mode
    if word.low >= zero:
        mode = _UPWARDS.get(mode, mode)
    is_line = x.is_raw or (x.line is not None and x.line.bounds == (-np.inf, np.inf))
    signed_half = mode in ("HALF_UP", "HALF_DOWN") and word.low < zero
    if mode in ("ROUND", "HALF_EVEN"):
        if not is_line:
            return point(x.real(), scale, zero, word.low, word.high, site=site)
        # An odd zero point moves the ties.
        steps = point(
            _plus(x, zero * scale), scale, 0, word.low, word.high, site=f"{site}/steps"
        )
        codes = steps.real() - jnp.float32(zero * scale)
        return point(codes, scale, zero, word.low, word.high, site=site)
    if not is_line or mode not in _MOVES or signed_half:
        rounding, low, high = _ROUNDINGS[mode], word.low, word.high
        return point(x.real(), scale, zero, low, high, site=site, rounding=rounding)
    by, direction = _MOVES[mode]
    ends = 2 * word.low - 2, 2 * word.high + 2
    moved = _plus(x, (zero + by) * scale)
    half = point(moved, scale / 2, 0, *ends, site=f"{site}/halves").real()
    own = dataclasses.replace(word, mode=direction, zero_point=np.zeros(()))
    codes = _formula(half, own) - jnp.float32(zero * scale)
    return point(codes, scale, zero, word.low, word.high, site=site)


def _plus(x: Data, by: float) -> jax.Array:
    rank = (1,) * len(x.shape)
    one, bias = np.ones(rank), np.full(rank, by)
    step = lambda y: y + jnp.float32(by)
    return affine(x, one, bias, step).real() if by else x.real()


def bipolar_quant(x: Constant | Data, scale: np.ndarray, site: str) -> Constant | Data:
    """Computes BipolarQuant: codes -1 and 1, with sign 1 at 0.

    The sign of a raw input is that of the input plus 2^-22.

    Args:
      x: Values.
      scale: float32, ``[]`` or, of a constant, what broadcasts against it.
      site: Name of the quantization point.

    Returns:
      Values on the grid.
    """
    if isinstance(x, Constant):
        codes = np.where(x.value >= 0, 1, -1)
        shape = np.broadcast_shapes(codes.shape, scale.shape)
        codes, scale = np.broadcast_to(codes, shape), np.broadcast_to(scale, shape)
        return Constant((codes * scale).astype(np.float32), codes, scale)
    if scale.size > 1:
        high = _aligned(scale, len(x.shape))
        return Data(jnp.where(x.real() >= 0, high, -high))
    unit = scale.item()
    if not x.is_pointwise and x.is_raw:
        by, step = -0.25 * _SIGN_STEP, 0.5 * _SIGN_STEP
        x = point(_plus(x, by), step, 0, -1, 0, site=f"{site}/sign")
    elif not x.is_pointwise and x.line is not None:
        return _threshold(x, unit, site)
    real, one = x.real(), jnp.float32(unit)
    sign = jnp.where(real >= 0, one, -one)
    sign = straight(jnp.clip(real, -one, one), sign)
    return point(sign, unit, 0, -1, 1, site=site)


def _threshold(x: Data, unit: float, site: str) -> Data:
    """Returns the sign of a line as an accumulator compared with an integer threshold.

    ``gain * n * unit + bias >= 0`` from some integer ``n`` on, up or down. Half a unit
    away from it there is no tie, and codes saturate at -1 and 1.
    """
    line = x.line
    assert line is not None
    gain, bias = np.broadcast_arrays(line.gain, line.bias)
    bias = np.clip(bias, *line.bounds) if not np.any(gain) else bias
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = -bias / (gain * line.unit)
    first = np.where(gain > 0, np.ceil(zero), -np.floor(zero))
    most = max(np.abs(line.low).max(), np.abs(line.high).max()) + 1
    first = np.where(gain == 0, np.where(bias >= 0, -most, most), first)
    first = np.clip(first, -most, most)
    sign = np.where(gain < 0, -1.0, 1.0)
    if line.bounds[0] >= 0:
        first = np.full_like(first, -most)
    distance = dataclasses.replace(
        line,
        gain=sign,
        bias=(0.5 - first) * line.unit,
        bounds=(-np.inf, np.inf),
    )
    step = line.unit / 4
    codes = point(Data(None, line=distance).real(), step, 0, -1, 1, site=f"{site}/sign")
    one = np.full((1,) * len(x.shape), unit / step)
    rescaled = affine(codes, one, 0 * one, lambda y: y * jnp.float32(unit / step))
    return point(rescaled.real(), unit, 0, -1, 1, site=site)


def trunc(
    x: Constant | Data, words: tuple[QonnxWord, QonnxWord], bits: int, site: str
) -> Data:
    """Computes Trunc: codes of one grid without their least bits.

    Args:
      x: Values.
      words: The input's grid, how it rounds; the output's grid and codes.
      bits: Number of least bits to drop.
      site: Name of the quantization point.

    Returns:
      Values on the grid of the output.
    """
    if isinstance(x, Constant):
        raise NotImplementedError("Trunc of a constant has no rule. Fold it.")
    own, out = words
    scale, zero = (float(a.item()) for a in (own.scale, own.zero_point))

    def codes(y: jax.Array) -> jax.Array:
        steps = y / jnp.float32(scale) + jnp.float32(zero)
        steps = straight(steps, jnp.round(steps)) * jnp.float32(2.0**-bits)
        steps = clip(steps, out.low, out.high)
        return straight(steps, _ROUNDINGS[out.mode](steps))

    last, step = int(out.zero_point.item()), out.scale.item()
    real = pointwise(x, lambda y: (codes(y) - jnp.float32(last)) * jnp.float32(step))
    return point(real.real(), step, last, out.low, out.high, site=site)


def multi_threshold(
    x: Data, thresholds: np.ndarray, scale: float, bias: float, *, axis: int, site: str
) -> Data:
    """Computes MultiThreshold: the number of thresholds that are not above a value.

    Args:
      x: Values.
      thresholds: ``[channels, steps]``, or ``[1, steps]``.
      scale: Scale of the output.
      bias: Bias of the output; a whole multiple of ``scale``.
      axis: Axis of the channels in ``x``.
      site: Name of the quantization point.

    Returns:
      Values on the grid of the output.
    """
    sizes = [1] * len(x.shape)
    sizes[axis] = thresholds.shape[0]
    y = x.real()
    zero, one = jnp.float32(0), jnp.float32(1)
    reached = (
        jnp.where(y >= _aligned(t.reshape(sizes), y.ndim), one, zero)
        for t in thresholds.T
    )
    total = functools.reduce(jnp.add, reached)
    start = round(bias / scale)
    if not np.isclose(start * scale, bias):
        raise NotImplementedError(
            f"MultiThreshold must have an out_bias that is a multiple of its out_scale "
            f"{scale}, got {bias}."
        )
    real = (total + jnp.float32(start)) * jnp.float32(scale)
    most = thresholds.shape[1] + start
    return point(real, scale, 0, start, most, site=site)


def rounding_mode(name: str) -> str:
    """Returns the name of a rounding mode in upper case.

    Raises:
      NotImplementedError: if there is no such rounding.
    """
    if name.upper() not in _ROUNDINGS:
        raise NotImplementedError(
            f"There is no rounding_mode {name!r}. Known are {', '.join(_ROUNDINGS)}."
        )
    return name.upper()
