"""Words of bits, which quantizers with codes of a fixed length share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.quantizers.spec import check_number, is_known, require
from qjax.rounding import int_range, power_of_two

Alpha = ArrayLike | tuple[float, ...] | str | None


def as_int(flag: Any) -> Any:
    """Returns a truth value, known or traced, as the integer 0 or 1."""
    return flag.astype(jnp.int32) if isinstance(flag, jax.Array) else int(flag)


class FixedPointWord(NamedTuple):
    """The codes of a fixed-point word."""

    step: jax.Array
    qmin: ArrayLike
    qmax: ArrayLike
    is_sign: bool | jax.Array  # One signed bit.
    levels: jax.Array  # 2^u, float32.


def make_word(spec: Any, keep_negative: bool, symmetric: bool) -> FixedPointWord:
    """Returns the codes of ``spec.bits`` with ``spec.integer`` before the point."""
    bits = plain_number(spec.bits)
    integer = plain_number(getattr(spec, "integer", 0))
    magnitude = bits - as_int(keep_negative)
    step = power_of_two(integer - magnitude)
    levels = power_of_two(magnitude)
    is_sign = keep_negative and bits == 1
    if isinstance(is_sign, bool) and is_sign:
        return FixedPointWord(step, -1, 1, True, levels)
    bits = int(bits) if isinstance(bits, int | float) else jnp.asarray(bits)
    qmin, qmax = int_range(bits, keep_negative, keep_negative and symmetric)
    if not isinstance(is_sign, bool):
        qmin, qmax = jnp.where(is_sign, -1, qmin), jnp.where(is_sign, 1, qmax)
    return FixedPointWord(step, qmin, qmax, is_sign, levels)


def as_float(q: ArrayLike) -> jax.Array:
    """Returns a code as float32."""
    return jnp.asarray(q).astype(jnp.float32)


def check_word(spec: Any, most: int = 32) -> None:
    """Raises if bits and integer bits, as far as they are known, make no word."""
    if not getattr(spec, "keep_negative", True):
        most = 31  # Codes are int32.
    check_number(spec, "bits", f"an integer in 1..{most}", 1, most, is_whole=True)
    if not hasattr(spec, "integer"):
        return
    check_number(spec, "integer", "an integer", is_whole=True)
    if not is_known(spec.bits, spec.integer):
        return
    bits, integer = np.asarray(spec.bits), np.asarray(spec.integer)
    rule = "a step of 2^(integer - bits) must be a normal float32."
    require(spec, bool(np.all(np.abs(integer - bits) <= 120)), rule)
    rule = (
        "more integer bits than bits leave a step above 1. If that is meant, set "
        "`strict=False`."
    )
    is_strict = getattr(spec, "strict", True)
    require(spec, not is_strict or bool(np.all(integer <= bits)), rule)


def check_alpha(spec: Any) -> None:
    """Raises if ``alpha``, as far as it is known, is no scale."""
    alpha = spec.alpha
    if isinstance(alpha, str) and alpha not in ("auto", "auto_po2"):
        raise ValueError(
            f"`{spec.name}`: `alpha` must be None, a number, an array, 'auto' or "
            f"'auto_po2', got {alpha!r}."
        )
    if not isinstance(alpha, str):
        check_number(spec, "alpha", "positive", 0, is_open=True)


def check_groups(spec: Any) -> None:
    """Raises if groups or exponents of scales are given for another ``alpha``."""
    is_po2 = isinstance(spec.alpha, str) and spec.alpha == "auto_po2"
    least, most = spec.min_po2_exponent, spec.max_po2_exponent
    rule = "exponents of scales are for `alpha='auto_po2'`."
    require(spec, is_po2 or (least is None and most is None), rule)
    rule = "groups that share a scale are for an `alpha` that is found."
    require(spec, isinstance(spec.alpha, str) or spec.elements_per_scale is None, rule)
    check_number(spec, "min_po2_exponent", "an integer", is_whole=True)
    check_number(spec, "max_po2_exponent", "an integer", is_whole=True)
    if least is not None and most is not None and is_known(least, most):
        rule = "`min_po2_exponent` must not be above `max_po2_exponent`."
        require(spec, bool(np.all(np.asarray(least) <= np.asarray(most))), rule)


def check_slope(spec: Any) -> None:
    """Raises if ``negative_slope``, as far as it is known, is neither 0 nor a shift."""
    check_number(spec, "negative_slope", "0 or a power of two", 0)
    slope = spec.negative_slope
    if is_known(slope):
        slope = np.asarray(slope)
        rule = "`negative_slope` must be 0 or a power of two, so that it is a shift."
        require(spec, is_known_power_of_two(np.where(slope == 0, 1, slope)), rule)


def is_known_power_of_two(scale: Alpha) -> bool:
    """Returns whether a scale is known to be powers of two; None counts as 1."""
    if scale is None:
        return True
    if isinstance(scale, str) or not is_known(scale):
        return False
    mantissa, _ = np.frexp(np.asarray(scale, np.float64))
    return bool(np.all(mantissa == 0.5))


def plain_number(n: ArrayLike) -> Any:
    """Returns a known number as a Python one, and arrays and tracers as they are."""
    return np.asarray(n).item() if is_known(n) and np.ndim(n) == 0 else n
