"""Lookup tables that TFLite makes of functions of codes, and of places in an image.

Made by whatever makes them in TFLite, which is float32 arithmetic for most; once made
they are integers. All in NumPy, int64.

References:
  TensorFlow Lite 2.19, lite/kernels/activations.cc, lite/kernels/internal/common.h and
  lite/kernels/internal/reference; gemmlowp, fixedpoint/fixedpoint.h.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.graph.operations.shifts import (
    c_round,
    divide_by_power,
    high_product,
    rescale,
    truncated,
)
from qjax.integer_tflite import LEAST_STEP, tflite_multiplier

_INT32 = np.iinfo(np.int32)


class Codes(NamedTuple):
    """The codes on a grid: ``real = scale * (code - zero_point)``."""

    scale: Any  # np.float32
    zero_point: int
    low: int
    high: int

    def all(self) -> np.ndarray:
        """Returns every code, int64."""
        return np.arange(self.low, self.high + 1)

    @property
    def is_wide(self) -> bool:
        """Returns whether codes have 16 bits."""
        return self.high - self.low > 255


# Function and type of its codes -> scale and zero point that LiteRT's kernel has.
FIXED_GRIDS: Mapping[tuple[str, str], tuple[float, int]] = {
    ("l2-normalisation", "int8"): (2.0**-7, 0),
    ("log-softmax", "int8"): (2.0**-4, 127),
    ("logistic", "int8"): (2.0**-8, -128),
    ("logistic", "uint8"): (2.0**-8, 0),
    ("logistic", "int16"): (2.0**-15, 0),
    ("softmax", "int8"): (2.0**-8, -128),
    ("softmax", "uint8"): (2.0**-8, 0),
    ("softmax", "int16"): (2.0**-15, 0),
    ("tanh", "int8"): (2.0**-7, 0),
    ("tanh", "uint8"): (2.0**-7, 128),
    ("tanh", "int16"): (2.0**-15, 0),
}
# Scales times factors up to which the kernels of softmaxes end the process.
LEAST_SOFTMAX_SCALE = 2.0**-26


def has_fixed_grid(name: str, dtype: str, y: Codes) -> bool:
    """Returns whether an output has the grid that LiteRT's kernel of a function wants.

    Args:
      name: Function, as JAX names it.
      dtype: Type of the codes of the output.
      y: The codes.

    Returns:
      Whether it is that of `FIXED_GRIDS`, as the kernel's ``Prepare`` checks it; True
      for other functions.

    References:
      LiteRT 2.3, kernels/activations.cc and l2norm.cc.
    """
    own = float(y.scale), y.zero_point
    return FIXED_GRIDS.get((name, dtype), own) == own


def function_table(
    function: Callable[[np.ndarray], np.ndarray], x: Codes, y: Codes
) -> np.ndarray:
    """Tabulates a function of 8-bit codes.

    In float32, each step rounded once, as TFLite makes its tables. The function itself
    is computed in float64 and rounded.

    Args:
      function: float64 to float64.
      x: Codes of the input.
      y: Codes of the output.

    Returns:
      A code for each code of ``x``, int64.
    """
    real = x.scale * (x.all() - x.zero_point).astype(np.float32)
    most = np.float32(1 << 24)
    with np.errstate(over="ignore"):
        found = function(real.astype(np.float64)).astype(np.float32)
        found = np.clip(found * (np.float32(1) / y.scale), -most, most)
    code = c_round(found) + np.float32(y.zero_point)
    return np.clip(code, y.low, y.high).astype(np.int64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Computes ``1 / (1 + exp(-x))`` with TFLite's roundings to float32."""
    exponential = np.exp(-x).astype(np.float32)
    return (np.float32(1) / (np.float32(1) + exponential)).astype(np.float64)


def gelu(x: np.ndarray) -> np.ndarray:
    """Computes ``x * P(X <= x)`` of the normal distribution."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Computes the approximation of `gelu` by a hyperbolic tangent."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def wide_sigmoid_table(x: Codes) -> np.ndarray:
    """Tabulates TFLite's logistic function of 16-bit codes; the output is x 2^-15."""
    scaled = _wide_sigmoid_places(x, (0,))
    value = _interpolated_sigmoid(np.abs(scaled), 9, 0x7FFF << 10)
    below = (1 << 25) - value + (1 << 9) - 1
    return np.where(scaled >= 0, value + (1 << 9), below) >> 10


def wide_tanh_table(x: Codes) -> np.ndarray:
    """Tabulates TFLite's hyperbolic tangent of 16-bit codes; the output is x 2^-15."""
    scaled = _wide_sigmoid_places(x, (0, 1))
    value = _interpolated_sigmoid(np.abs(scaled), 8, 0xFFFF << 8)
    half = 1 << 23
    above = value - half + (1 << 7)
    return np.where(scaled >= 0, above, -value + half + (1 << 7) - 1) >> 8


def _wide_sigmoid_places(x: Codes, exact: Sequence[int]) -> np.ndarray:
    """Returns codes in units of 2^-12 / 3, exact if their shift is in ``exact``."""
    scale = float(x.scale)
    power = round(math.log2(scale))
    if abs(math.log2(scale) - power) < 1e-3 and 12 + power in exact:
        return x.all() * (3 << (12 + power))
    multiplier, shift = scale * 4096 * 3, 0
    while multiplier <= 32767 / 2 and shift <= 30:
        multiplier, shift = multiplier * 2, shift + 1
    return (x.all() * int(multiplier) + ((1 << shift) >> 1)) >> shift


def _interpolated_sigmoid(scaled: np.ndarray, bits: int, most: int) -> np.ndarray:
    """Interpolates ``2^16 * sigmoid`` at steps of 1/24, with 2^bits places between."""
    steps = sigmoid_steps()
    place = scaled >> bits
    at = np.minimum(place, 254)
    rest = scaled & ((1 << bits) - 1)
    value = (steps[at] << bits) + rest * (steps[at + 1] - steps[at])
    return np.where(place >= 255, most, value)


def sigmoid_steps() -> np.ndarray:
    """Returns TFLite's 256 anchors, moved by half the error of the line to the next."""
    value = 65536 / (1 + np.exp(-np.arange(513) / 48))
    line = (value[:-2:2] + value[2::2]) / 2
    steps = np.rint(value[:-2:2] + (value[1::2] - line) / 2)
    steps[-1] = 65535
    return steps.astype(np.int64)


def leaky_relu_table(alpha: float, x: Codes, y: Codes, rule: str) -> np.ndarray:
    """Tabulates ``x``, and ``alpha * x`` below zero, each rescaled by its own ratio."""
    code = x.all() - x.zero_point
    below, above = (
        rescale(code, *_wide_pair(ratio), rule)
        for ratio in (x.scale * np.float32(alpha) / y.scale, x.scale / y.scale)
    )
    found = np.where(code >= 0, above, below) + y.zero_point
    return np.clip(found, y.low, y.high)


def prelu_table(
    alpha: np.ndarray, scale: np.float32, x: Codes, y: Codes, rule: str
) -> np.ndarray:
    """Tabulates ``x``, and ``alpha * x`` below zero.

    Args:
      alpha: Codes less their zero point, one for each channel.
      scale: Scale of ``alpha``.
      x: The input.
      y: The output.
      rule: Rule of rescaling.

    Returns:
      Codes, ``[codes, channels]``.
    """
    code = (x.all() - x.zero_point)[:, None]
    above = rescale(code, *_wide_pair(x.scale / y.scale), rule)
    below = rescale(code * alpha, *_wide_pair(x.scale * scale / y.scale), rule)
    found = np.where(code >= 0, above, below) + y.zero_point
    return np.clip(found, y.low, y.high)


def requantized_table(x: Codes, y: Codes) -> np.ndarray:
    """Tabulates the codes on another grid, by float32 arithmetic."""
    factor = x.scale * (np.float32(1) / y.scale)
    real = x.all().astype(np.float32) * factor + np.float32(-x.zero_point) * factor
    return np.clip(c_round(real).astype(np.int64) + y.zero_point, y.low, y.high)


def quantized_table(x: Codes, y: Codes) -> np.ndarray:
    """Tabulates the codes on another grid of real numbers: a float32 quotient."""
    real = x.scale * (x.all() - x.zero_point).astype(np.float32)
    with np.errstate(over="ignore"):
        code = c_round(np.clip(real / y.scale, -(2.0**24), 2.0**24))
    return np.clip(code.astype(np.int64) + y.zero_point, y.low, y.high)


def _wide_pair(ratio: Any) -> tuple[np.ndarray, np.ndarray]:
    """Writes a factor of either sign as multiplier and shift."""
    multiplier, shift = tflite_multiplier(np.abs(np.float64(ratio)))
    return np.sign(ratio).astype(np.int64) * multiplier, shift.astype(np.int64)


def hard_swish_table(x: Codes, y: Codes) -> np.ndarray:
    """Tabulates ``x * clip(x + 3, 0, 6) / 6`` in TFLite's 16-bit fixed point."""
    fine = np.float32(1 / 128) * x.scale
    out_multiplier, out_exponent = _short_multiplier(fine / y.scale)
    multiplier, exponent = _short_multiplier(fine / np.float32(3 / 32768))
    code = (x.all() - x.zero_point) << 7
    factor = short_left(code, exponent - 1) if exponent > 0 else code
    factor = short_product(factor, multiplier)
    if exponent > 0:
        factor = short_left(factor, 1)
    if exponent < 0:
        factor = divide_by_power(factor, -exponent)
    factor = (factor + (1 << 15)) >> 1  # In [0, 1].
    product = factor * short_product(code, out_multiplier)
    code = divide_by_power(truncated(product, 1 << 15), -out_exponent)
    return np.clip(code + y.zero_point, y.low, y.high)


def _short_multiplier(ratio: np.float32) -> tuple[int, int]:
    """Returns a multiplier of 16 bits, and the exponent of the remainder."""
    multiplier, shift = tflite_multiplier(np.float64(ratio))
    return reduced(int(multiplier)), 31 - int(shift)


def reduced(multiplier: Any) -> Any:
    """Returns the 16 leading bits of a multiplier, rounded, below 2^15."""
    rounded = (np.asarray(multiplier, np.int64) + (1 << 15)) >> 16
    return np.minimum(rounded, 0x7FFF)


def short_product(a: np.ndarray, b: Any) -> np.ndarray:
    """Computes `high_product` of 16-bit numbers."""
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    return np.minimum(truncated(nudged, 1 << 15), 0x7FFF)


def short_left(a: np.ndarray, n: int) -> np.ndarray:
    """Computes ``a * 2^n`` within 16 bits."""
    return np.clip(a << n, -(1 << 15), (1 << 15) - 1)


def exponential_table(scale: np.float32, beta: float) -> np.ndarray:
    """Tabulates ``exp(-beta * scale * n)``, n = 0, ..., 255, 31 bits after the point.

    Zero from TFLite's radius on, where the argument would leave its 5 bits.
    """
    scaled, inside = _scaled_places(scale, beta)
    return np.where(inside, _exponential(scaled), 0)


def log_step_table(scale: np.float32) -> np.ndarray:
    """Tabulates ``-scale * n``, n = 0, ..., 255, 26 bits after the point.

    At least -20, which no code of a log-softmax reaches.
    """
    scaled, inside = _scaled_places(scale, 1.0)
    return np.where(inside, np.maximum(scaled, LEAST_STEP), LEAST_STEP)


def _scaled_places(scale: np.float32, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``-beta * scale * n`` as `log_step_table`, and whether 5 bits hold it."""
    ratio = float(np.float32(beta)) * float(scale) * 2.0**26
    multiplier, shift = tflite_multiplier(min(ratio, 2.0**31 - 1))
    left = 31 - int(shift)
    radius = math.floor(31 * 2.0**26 / 2.0**left)
    n = np.arange(256)
    inside = n <= radius
    return high_product(-np.where(inside, n, 0) << left, multiplier), inside


def _exponential(x: np.ndarray) -> np.ndarray:
    """Computes ``exp`` of numbers <= 0 with 26 fraction bits, to 31 fraction bits."""
    quarter = 1 << 24
    rest = (x & (quarter - 1)) - quarter
    # A polynomial around -1/8, then a factor for each bit of the quarters.
    y = (rest << 5) + (1 << 28)
    y2 = high_product(y, y)
    y3, y4 = high_product(y2, y), high_product(y2, y2)
    third = high_product(divide_by_power(y4, 2) + y3, 715827883)
    tail = divide_by_power(third + y2, 1)
    eighth = 1895147668
    value = eighth + high_product(eighth, y + tail)
    factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
    for bit, factor in enumerate(factors, 24):
        hit = ((rest - x) >> bit) & 1 == 1
        value = np.where(hit, high_product(value, factor), value)
    return np.where(x == 0, _INT32.max, value)


def wide_softmax_tables(scale: np.float32, beta: float) -> tuple[np.ndarray, ...]:
    """Makes the lookup tables of the softmax of 16-bit codes.

    Returns:
      ``exp(-beta * scale * n)`` for n = 0, ..., 65535; and ``1 / (1 + x)`` for 65,536
      numbers in [0, 1]; 15 bits after the point.
    """
    ratio = float(scale * np.float32(beta)) / (10 / 65535)
    scaled = rescale(-np.arange(1 << 16), *_wide_pair(ratio), "tflite_double")
    place = np.clip(scaled + 32767, -32768, 32767)
    return softmax_exponentials()[place + 32768], softmax_reciprocals()


@functools.cache
def softmax_exponentials() -> np.ndarray:
    """Tabulates ``exp(x)`` of 65,536 numbers in [-10, 0], 15 bits after the point."""
    return wide_function_table(np.exp, _parts(10, 32767), _parts(2, 0))


@functools.cache
def softmax_reciprocals() -> np.ndarray:
    """Tabulates ``1 / (1 + x)`` of 65,536 numbers in [0, 1], like the exponentials."""
    return wide_function_table(lambda x: 1 / (1 + x), _parts(1, -32768), _parts(2, 0))


def _parts(size: int, zero_point: int) -> Codes:
    return Codes(np.float64(size / 65535), zero_point, -32768, 32767)


def wide_function_table(
    function: Callable[[np.ndarray], np.ndarray], x: Codes, y: Codes
) -> np.ndarray:
    """Tabulates a function of 16-bit codes, as `function_table` does for 8-bit codes.

    At 513 places only, each moved by half the error of the line to the next; the codes
    between them lie on the line. In float64 if the scales are.
    """
    f = type(x.scale)
    low, high = (x.scale * f(end - x.zero_point) for end in (x.low, x.high))
    inverse = f(65536) / (y.scale * f(y.high) - y.scale * f(y.low))
    step = (high - low) / f(512)
    at = low + np.arange(513).astype(f) * step
    own, middle, after, last = (
        function(places.astype(np.float64)).astype(f) * inverse
        for places in (at[:-1], at[:-1] + step / f(2), at[1:], np.array([high]))
    )
    line = c_round((after + c_round(own)) / f(2))
    bias = c_round((line - c_round(middle)) / f(2))
    anchors = np.append(c_round(own) - bias, c_round(last))
    anchors = np.clip(anchors, y.low, y.high).astype(np.int64)
    codes = x.all()
    place, rest = 256 + (codes >> 7), codes & 0x7F
    slope = anchors[place + 1] - anchors[place]
    return anchors[place] + ((slope * rest + 64) >> 7)


def bilinear_places(
    size: int, out: int, *, align_corners: bool, half_pixel_centers: bool
) -> np.ndarray:
    """Returns the place of each output of a resized axis among the inputs.

    Returns:
      ``[3, out]``: the places before and after it, and its distance from the first,
      times 2^10.
    """
    corners = 1 if align_corners and out > 1 else 0
    step = (((size - corners) << 10) + (out - corners) // 2) // (out - corners)
    at = np.arange(out) * step
    if half_pixel_centers:
        at = at + step // 2 - (1 << 9)
    before = np.maximum(truncated(at, 1 << 10), 0)
    after = np.minimum(truncated(at + (1 << 10) - 1, 1 << 10), size - 1)
    return np.stack([before, after, at - (before << 10)])


def exact_bilinear_places(
    size: int, out: int, *, align_corners: bool, half_pixel_centers: bool
) -> np.ndarray | None:
    """Returns `bilinear_places` in float32, as for uint8; None if float32 rounds.

    Returns:
      None if a distance has more than 7 bits after the point: float32 would round.
    """
    f, corners = np.float32, 1 if align_corners and out > 1 else 0
    step = f(size - corners) / f(out - corners)
    at = np.arange(out, dtype=f)
    at = (at + f(0.5)) * step - f(0.5) if half_pixel_centers else at * step
    if np.any(at * 128 % 1):
        return None
    before = np.maximum(np.floor(at), 0).astype(np.int64)
    after = np.minimum(np.ceil(at), size - 1).astype(np.int64)
    return np.stack([before, after, (at * 1024).astype(np.int64) - (before << 10)])


def nearest_places(
    size: int, out: int, *, align_corners: bool, half_pixel_centers: bool
) -> np.ndarray:
    """Returns the input that each output of a resized axis takes, ``[out]``."""
    f, corners = np.float32, 1 if align_corners and out > 1 else 0
    step = f(size - corners) / f(out - corners)
    at = (np.arange(out, dtype=f) + f(0.5 if half_pixel_centers else 0)) * step
    at = c_round(at) if align_corners else np.floor(at)
    return np.clip(at.astype(np.int64), 0, size - 1)
