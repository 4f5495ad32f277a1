"""A rescaling for models of raw integer inputs, which lowers without loss."""

import fractions
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec
from qjax.calibration.calibrators import constant
from qjax.schemes.rules import Rule

_MOST_PARTS = 128  # Most parts of a step between codes: words of 8 bits get 16.


def insert_rescaling(
    fn: Callable[..., Any],
    scale: float,
    offset: float = 0.0,
    *,
    dtype: str = "uint8",
) -> tuple[Callable[..., Any], Rule]:
    """Puts ``scale * x + offset`` in front of a model, for raw integer inputs.

    The rule that comes with it gives the input a grid that holds every input value:
    with ``offset / scale`` whole, its codes are the raw integers (or they shifted, if
    zero is not among them); else its steps are a whole part of ``scale``, up to 1/128,
    and its word has the bits for it. For other offsets the nearest multiple of
    ``scale / 128`` is taken in place of ``offset``, by the model too.

    Args:
      fn: ``fn(params, x, *inputs)``, where ``x`` is real.
      scale: Units per raw integer, positive: ``1 / 255``.
      offset: Real value of the integer 0: ``-1`` for [-1, 1].
      dtype: Type of the raw input, an integer type of at most 8 bits.

    Returns:
      A function that takes raw integers in place of ``x``, and the rule for the site
      ``input:0``, to be put first in a scheme.

    Raises:
      TypeError: for what is no function.
      ValueError: for a scale that is not positive and finite, numbers per channel
        (they belong in the first kernel and its bias), or another dtype; for a function
        of its parameters alone.

    Example:
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> raw, rule = insert_rescaling(fn, 1 / 255)
      >>> rule.spec.bits, rule.spec.signed
      (8, False)
      >>> raw({"kernel": jnp.eye(2)}, jnp.array([[0, 255]], jnp.uint8))
      Array([[0., 1.]], dtype=float32)
    """
    _check_takes_input(fn)
    if np.ndim(scale) or np.ndim(offset):
        raise ValueError(
            "`scale` and `offset` must be one number each: the input has one grid. Put "
            "numbers per channel into the first kernel and its bias."
        )
    if not (0 < scale < math.inf and math.isfinite(offset)):
        raise ValueError(
            f"A positive scale and a finite offset are wanted, got {scale}, {offset}."
        )
    kind = np.dtype(dtype)
    if not np.issubdtype(kind, np.integer) or kind.itemsize > 1:
        raise ValueError(f"`dtype` must be 'uint8' or 'int8', got {dtype!r}.")
    ratio = fractions.Fraction(offset / scale).limit_denominator(_MOST_PARTS)
    if abs(float(ratio) - offset / scale) > 2.0**-20 * max(1.0, abs(offset / scale)):
        ratio = fractions.Fraction(round(offset / scale * _MOST_PARTS), _MOST_PARTS)
    shift = float(ratio) * scale
    info, parts = np.iinfo(kind), int(ratio.denominator)
    zero = int(ratio.numerator)  # Place of the raw integer 0, in these parts.
    ends: list[int] = [0, *(int(end) * parts + zero for end in (info.min, info.max))]
    least, most = min(ends), max(ends)
    bits = max((most - least).bit_length(), kind.itemsize * 8)
    low, high = (float(k * scale / parts) for k in (least, least + 2**bits - 1))
    signed = info.min < 0 or bits > 8
    spec = QSpec(bits=bits, signed=signed)
    reasons = (("*", f"insert_rescaling({scale:g}, {offset:g})"),)
    rule = Rule("input:0", spec, constant(low, high), reasons=reasons)

    def rescaled(params: Any, x: jax.Array, *inputs: Any, **options: Any) -> Any:
        with jax.named_scope("rescaling"):
            real = jnp.asarray(x).astype(jnp.float32) * jnp.float32(scale)
            if shift:
                real = real + jnp.float32(shift)
        return fn(params, real, *inputs, **options)

    return rescaled, rule


def _check_takes_input(fn: Any) -> None:
    """Raises for a model without an input that a rescaling could precede."""
    if not callable(fn):
        raise TypeError(
            f"`fn` must be a function `fn(params, x, *inputs)`, got {fn!r}."
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # Not every callable has one.
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        raise ValueError(
            "`fn` takes no input after its parameters, so there is nothing to rescale. "
            "Use `fn(params, x, *inputs)`, where `x` is real."
        ) from error
