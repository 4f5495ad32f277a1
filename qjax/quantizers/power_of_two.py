"""Power-of-two quantizers, for weights whose products are shifts.

Exponents are rounded in the log domain, without a logarithm: ``round(log2(a))`` is read
from the bits of ``a``.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.qpoint import Estimator
from qjax.quantizers.curves import leaky_relu
from qjax.quantizers.point import Point, apply, finite, levels_of, point_of, sign
from qjax.quantizers.scaling import EPSILON
from qjax.quantizers.spec import Spec, check_number, is_known, require, static
from qjax.quantizers.words import (
    as_float,
    as_int,
    check_slope,
    check_word,
    plain_number,
)
from qjax.rounding import floor_log2, power_of_two, round_log2

_MOST_LINEAR = 16  # Exponents: codes up to 2^15, whose products fit int32.


def _check_po2(spec: Any, signed: int) -> None:
    check_word(spec, most=8)
    if spec.log2_rounding not in ("rnd", "floor"):
        raise ValueError(
            f"`{spec.name}`: `log2_rounding` must be 'rnd' or 'floor', got "
            f"{spec.log2_rounding!r}."
        )
    top = spec.max_value
    check_number(spec, "max_value", "positive", 0, is_open=True)
    if top is None or is_known(top):
        left = (
            np.asarray(plain_number(spec.bits))
            if is_known(spec.bits)
            else np.asarray(8)
        )
        left = left - signed - (1 if top is None else np.asarray(top) > 1)
        rule = (
            "no bit is left for exponents: the sign takes one, and values above 1 "
            "another."
        )
        require(spec, bool(np.all(left >= 0)), rule)
    if top is not None and is_known(top) and spec.strict:
        exponent = np.log2(np.asarray(top, np.float64))
        base = 2 if spec.quadratic_approximation else 1
        rule = (
            f"`max_value` must be a power of {2**base}: rounding exceeds others, or "
            "hangs on a tie. If that is meant, set `strict=False`."
        )
        require(spec, bool(np.all(exponent % base == 0)), rule)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedPo2(Spec):
    """The options of `quantized_po2`.

    Attributes:
      bits: Word length, 2 to 8: one for the sign, the others for the exponent.
      max_value: Largest magnitude before rounding; a power of two, of four with
        ``quadratic_approximation``. None: whatever the exponents hold.
      use_stochastic_rounding: Whether a key makes rounding stochastic: unbiased,
        between neighbouring powers.
      quadratic_approximation: Whether exponents are even.
      log2_rounding: "rnd" to the nearest exponent, or "floor".
      qnoise_factor: Share of the quantized value, 0 to 1.
      use_ste: Whether the quantized value has a derivative.
      strict: Whether a ``max_value`` that rounding may exceed is an error.
    """

    name: ClassVar[str] = "quantized_po2"

    bits: ArrayLike = 8
    max_value: ArrayLike | None = None
    use_stochastic_rounding: bool = static(False)
    quadratic_approximation: bool = static(False)
    log2_rounding: Literal["rnd", "floor"] = static("rnd")
    qnoise_factor: ArrayLike = 1.0
    use_ste: bool = static(True, kw_only=True)
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_po2(self, signed=1)


def quantized_po2(
    x: jax.Array,
    spec: QuantizedPo2,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds to signed powers of two: QKeras's `quantized_po2`.

        n = bits - 1 - (max_value is None or above 1)
        E = clip(round(log2(min(|x|, max_value))), -2^n, 2^n - 1),  y = sign(x) * 2^E

    with ``sign(0) = 1``: zero is no value, it becomes ``2^(-2^n)``, as all below 1e-7
    does. ``quadratic_approximation`` has ``E = 2 * clip(round(log2(a) / 2), -2^n, h)``
    with ``h = 2^n - 1`` made even, ties up, and zero as without. A ``max_value`` of at
    most 1 leaves the exponents up to its own, 0 included: for 1, one more than the bits
    count. The derivative is 1 everywhere.

    Over at most 16 exponents codes are linear, ``2^(E - least)`` with the sign; over
    more `encode` gives their place in the table `levels`.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Key for stochastic rounding: of ``l <= |x| < 2 l`` to ``2 l``
        with probability ``(|x| - l) / l``; None rounds to the nearest exponent.
      estimator: Backward pass of the rounding of exponents; see `qjax.quantizers`.

    Returns:
      Powers of two, shape and dtype of ``x``. NaN stays NaN.

    Example:
      >>> quantized_po2(jnp.array([0.3, -3.0, 0.0]), QuantizedPo2(4))
      Array([ 0.25  , -4.    ,  0.0625], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f. There one bit gives the exponent -1/2;
      here it is an error.
    """
    return apply(spec, x, key=key, estimator=estimator)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedReluPo2(Spec):
    """The options of `quantized_relu_po2`.

    Attributes:
      bits: Word length, 1 to 8, all for the exponent.
      max_value: Same as in `QuantizedPo2`.
      negative_slope: 0, or a power of two.
      use_stochastic_rounding: Whether a key makes rounding stochastic.
      quadratic_approximation: Whether exponents are even.
      log2_rounding: "rnd" to the nearest exponent, or "floor".
      qnoise_factor: Share of the quantized value, 0 to 1.
      use_ste: Whether the quantized value has a derivative.
      strict: Same as in `QuantizedPo2`.
    """

    name: ClassVar[str] = "quantized_relu_po2"

    bits: ArrayLike = 8
    max_value: ArrayLike | None = None
    negative_slope: ArrayLike = 0
    use_stochastic_rounding: bool = static(False)
    quadratic_approximation: bool = static(False)
    log2_rounding: Literal["rnd", "floor"] = static("rnd")
    qnoise_factor: ArrayLike = 1.0
    use_ste: bool = static(True, kw_only=True)
    strict: bool = static(True, kw_only=True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check_po2(self, signed=0)
        check_slope(self)


def quantized_relu_po2(
    x: jax.Array,
    spec: QuantizedReluPo2,
    *,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds a relu, leaky or not, to powers of two: QKeras's `quantized_relu_po2`.

        n = bits - (max_value is None or above 1)
        y = 2^E(x) for x >= 0,  -2^E(negative_slope * |x|) for x < 0

    with ``E`` as in `quantized_po2`. Without a slope negative values become the least
    power, ``2^(-2^n)``: zero is no value. The derivative is 1 for
    ``0 < x <= max_value``, the slope for ``x <= 0``, and 0 above.

    Args:
      x: Real values, any shape. Computed in float32.
      spec: Options.
      key: Same as for `quantized_po2`.
      estimator: Same as for `quantized_po2`.

    Returns:
      Powers of two, shape and dtype of ``x``; those below 2^-126 are 0. NaN stays NaN.

    Example:
      >>> quantized_relu_po2(jnp.array([0.3, -3.0, 5.0]), QuantizedReluPo2(3))
      Array([0.25  , 0.0625, 4.    ], dtype=float32)

    References:
      QKeras, quantizers.py, snapshot 78ea90f.
    """
    return apply(spec, x, key=key, estimator=estimator)


class _Word(NamedTuple):
    """The exponents of a word and of its values."""

    low: Any  # Least exponent, before it is doubled by the quadratic approximation.
    high: Any
    times: int  # 2 with that approximation.
    least: Any  # Least exponent of a value.
    most: Any
    reached: Any  # The largest that `max_value` leaves, if it is known.


def _word(spec: Any, signed: int) -> _Word:
    top = None if spec.max_value is None else plain_number(spec.max_value)
    has_large = 1 if top is None else as_int(top > 1)
    n = plain_number(spec.bits) - signed - has_large
    reach: Any = 2**n if isinstance(n, int) else power_of_two(n).astype(jnp.int32)
    high = reach - 1
    times = 1
    if spec.quadratic_approximation:
        high, times = 2 * (high // 2), 2
    least, most = -reach * times, times * high
    reached = most
    if isinstance(n, int) and isinstance(top, int | float):
        share = np.log2(top) / times
        rounded = np.floor(share) if spec.log2_rounding == "floor" else np.ceil(share)
        reached = max(min(most, times * int(rounded)), least)
    return _Word(-reach, high, times, least, most, reached)


def _round_exponent(
    spec: Any, word: _Word, a: jax.Array, key: chex.PRNGKey | None
) -> tuple[jax.Array, jax.Array]:
    """Returns int32 exponents of magnitudes, and the coordinate of their rounding."""
    is_tiny = a < EPSILON
    a = jnp.where(is_tiny, 1.0, a)
    if spec.max_value is not None:
        a = jnp.minimum(a, as_float(spec.max_value))
    e, times = floor_log2(a), word.times
    if key is not None:
        e = e // times
        share = (a * power_of_two(-times * e) - 1.0) / (2.0**times - 1.0)
        e = e + (jax.random.uniform(key, a.shape) < share).astype(jnp.int32)
    elif spec.log2_rounding == "floor":
        e = e // times
    else:
        e = round_log2(a) if times == 1 else (e + 1) // 2
    e = times * jnp.clip(e, word.low, word.high)
    steps = jnp.where(is_tiny, as_float(word.low), jnp.log2(a) * (1.0 / times))
    return jnp.where(is_tiny, word.low, e), steps


def _is_linear(word: _Word) -> bool:
    """Returns whether codes of at most 16 bits and a sign hold all values."""
    known = isinstance(word.reached, int) and isinstance(word.least, int)
    return known and word.reached - word.least < _MOST_LINEAR


def _point(
    smooth: jax.Array,
    word: _Word,
    signs: jax.Array,
    is_signed: bool | jax.Array,
    exponents: jax.Array,
    steps: jax.Array,
) -> Point:
    value = signs * power_of_two(exponents)
    low, high = as_float(word.low), as_float(word.high)
    if _is_linear(word):
        scale, top = power_of_two(word.least), 2 ** (word.reached - word.least)
        qmin = 0 if is_signed is False else -top
        return Point(smooth, steps, low, high, value, scale, qmin, top)
    above, count = exponents - word.least, word.most - word.least + 1
    both = jnp.where(signs > 0, count + above, count - 1 - above)
    codes = jnp.where(is_signed, both, above)
    # Without a largest value the levels are too far apart for one grid.
    is_bounded = isinstance(word.reached, int) and word.reached < word.most
    fine = power_of_two(word.reached - 14) if is_bounded else None
    return Point(smooth, steps, low, high, value, codes=codes, fine=fine)


@point_of(QuantizedPo2)
def _po2_point(spec: QuantizedPo2, key: chex.PRNGKey | None, x: jax.Array) -> Point:
    word, held = _word(spec, signed=1), finite(x)
    rounded = _round_exponent(spec, word, jnp.abs(held), key)
    return _point(x, word, sign(held), True, *rounded)


@point_of(QuantizedReluPo2)
def _relu_po2_point(
    spec: QuantizedReluPo2, key: chex.PRNGKey | None, x: jax.Array
) -> Point:
    word, held = _word(spec, signed=0), finite(x)
    slope = plain_number(spec.negative_slope)
    is_signed = slope != 0
    signs = jnp.where((held < 0) & is_signed, -1.0, 1.0)
    size = jnp.where(held < 0, -as_float(slope) * held, held)
    rounded = _round_exponent(spec, word, size, key)
    relu = leaky_relu(x, slope, spec.max_value)
    return _point(relu, word, signs, is_signed, *rounded)


@levels_of(QuantizedPo2)
def _po2_levels(spec: QuantizedPo2) -> jax.Array:
    return _levels(_word(spec, signed=1), is_signed=True)


@levels_of(QuantizedReluPo2)
def _relu_po2_levels(spec: QuantizedReluPo2) -> jax.Array:
    return _levels(_word(spec, signed=0), bool(plain_number(spec.negative_slope) != 0))


def _levels(word: _Word, is_signed: bool) -> jax.Array:
    positive = power_of_two(np.arange(word.least, word.most + 1))
    return jnp.concatenate([-positive[::-1], positive]) if is_signed else positive
