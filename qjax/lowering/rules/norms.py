"""Rules of normalisations, whose integers the simulation computes too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax import integer_masked_norm, integer_norm
from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.record import Operands
from qjax.integer_calls import MaskedNormCall, NormCall
from qjax.lowering.interpret import LoweringRule, where
from qjax.lowering.rules import tflite
from qjax.lowering.rules.integer_nodes import (
    added,
    check_rank,
    codes_of,
    known_of,
    narrowed,
    site_grid_of,
)
from qjax.lowering.rules.kept import kept_codes
from qjax.lowering.values import Abstract, Builder, Integers
from qjax.model.trace import Equation, Trace

_MOST_CODES = 1 << 16


def _norm(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    check_rank(e, trace)
    call = NormCall.parse(e)
    unit, *own, scale, zero_point, qmin, qmax = (known_of(e, v) for v in others)
    x = codes_of(builder, e, trace, x, unit)
    if builder.target.is_tflite:
        known = scale, zero_point, qmin, qmax
        whole = tflite.l2_norm(builder, x, call, site_grid_of(e, known))
        return added(builder, e, *whole, known)
    shape = trace.shape(e.inputs[0])
    count = integer_norm.places(shape, call.axes, call.groups)
    wide = max(x.high - x.low, abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    if wide >= _MOST_CODES or count > integer_norm.most_places(call.is_byte):
        raise ValueError(
            f"The normalisation in {where(e)} is over {count} codes from {x.low} to "
            f"{x.high}, whose squares 64 bits do not hold.\n  equation: {e}\nUse a "
            f"word of at most {8 if wide < _MOST_CODES else 16} bits for its input, "
            f"{x.place.path!r}."
        )
    square = np.float64(unit) * np.float64(unit)
    least, kind = call.floor / square, (call.is_centred, call.is_byte)
    sums = integer_norm.added(call.epsilon / square, least, count, *kind)
    epsilon, floor, point, more = sums
    unit = np.float64(call.unit(count)) * integer_norm.power_of_two(-more, np)
    affine, _ = _affine(e, call.affine(own), unit, scale)
    numbers, params = _lines(builder, e, affine[:2], len(shape))
    attributes: dict[str, Any] = {
        "algorithm": "newton_root",
        "axes": list(call.axes),
        "groups": list(call.groups),
        "count": count,
        "is_centred": call.is_centred,
        "epsilon": int(epsilon),
        "floor": int(floor),
        "point": int(point),
        "input_zero_points": [x.zero_point],
        **({"more": int(more)} if more else {}),
        "shift": int(affine[2]),
        "bias_shift": int(affine[3]),
        "zero_point": int(zero_point),
        "low": int(qmin),
        "high": int(qmax),
    }
    operands = Operands(attributes, [builder.values[x.value]], numbers)
    ends = OPERATIONS["norm"].interval(operands)
    attributes |= {"low": int(np.min(ends[0])), "high": int(np.max(ends[1]))}
    grid = scale, zero_point, qmin, qmax
    return added(builder, e, "norm", [x.value], attributes, params, grid)


def _masked_norm(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    check_rank(e, trace)
    call = MaskedNormCall.parse(e)
    first, kept, *rest = others
    unit, *own, scale, zero_point, qmin, qmax = (known_of(e, v) for v in (first, *rest))
    x = codes_of(builder, e, trace, x, unit)
    if builder.target.is_tflite:
        raise NotImplementedError(
            f"The normalisation in {where(e)} has statistics behind a mask, which no "
            f"operation of TFLite has.\n  equation: {e}\nLower it for qjax's own "
            "programs, without `target`."
        )
    shape = trace.shape(e.inputs[0])
    count = integer_norm.places(shape, call.axes, call.groups)
    wide = max(x.high - x.low, abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    if wide >= _MOST_CODES or count > integer_masked_norm.most_places(call.is_byte):
        raise ValueError(
            f"The masked normalisation in {where(e)} is over {count} codes from "
            f"{x.low} to {x.high}, whose squares 64 bits do not hold.\n  equation: {e}"
            f"\nUse a word of at most {8 if wide < _MOST_CODES else 16} bits for its "
            f"input, {x.place.path!r}, or smaller groups."
        )
    square = np.float64(unit) * np.float64(unit)
    pair = call.epsilon / square, call.floor / square
    epsilon, floor, point = integer_masked_norm.added(*pair, count)
    factor = np.float64(call.unit(count))
    affine, gain = _affine(e, call.affine(own), factor, scale)
    # Least and largest values are so far from what is kept.
    far = wide * 2.0 ** integer_norm.fraction(count, True)
    far /= math.sqrt(max(*pair, 1e-300))
    codes = int(qmax) - int(qmin)
    codes += int(np.max(np.abs(affine[1]) * 2.0 ** (affine[3] - affine[2])))
    _check_far(e, gain, far, int(affine[2]), codes)
    numbers, params = _lines(builder, e, affine[:2], len(shape))
    site = e.sites.output or where(e).strip("'")
    node = kept_codes(builder, e, trace, [kept], site)
    assert node is not None
    inputs = [x.value, node]
    attributes: dict[str, Any] = {
        "algorithm": "newton_root",
        "axes": list(call.axes),
        "groups": list(call.groups),
        "most_places": count,
        "least": call.least,
        "is_centred": call.is_centred,
        "epsilon": int(epsilon),
        "floor": int(floor),
        "point": int(point),
        "input_zero_points": [builder.values[v].zero_point for v in inputs],
        "shift": int(affine[2]),
        "bias_shift": int(affine[3]),
        "zero_point": int(zero_point),
        "low": int(qmin),
        "high": int(qmax),
    }
    grid = scale, zero_point, qmin, qmax
    return added(builder, e, "masked_norm", inputs, attributes, params, grid)


def _affine(
    e: Equation, affine: tuple[Any, Any], unit: np.float64, scale: Any
) -> tuple[tuple[Any, Any, Any, Any], np.ndarray]:
    """Returns factors and offsets of normalised values as integers, and the factors.

    Args:
      e: The call.
      affine: Gain and offset.
      unit: Factor of the values before their gain.
      scale: Scale of the site.
    """
    gain, offset = (np.asarray(v).astype(np.float64) for v in affine)
    gain = gain * unit / np.float64(scale)
    offset = offset / np.float64(scale)
    if np.max(np.abs(gain)) > integer_norm.MOST_GAIN:
        raise ValueError(
            f"The normalisation in {where(e)} divides by much more than the root of "
            f"its squares: its values of 32 bits are {np.max(np.abs(gain)):g} codes of "
            f"{e.sites.output!r} apart.\n  equation: {e}\nUse a smaller "
            "epsilon, inputs of larger values, or fewer bits for this site."
        )
    if not integer_norm.is_scalable(gain, offset):
        raise ValueError(
            f"The normalisation in {where(e)} has factors up to "
            f"{np.max(np.abs(gain)):g} and offsets up to {np.max(np.abs(offset)):g} in "
            f"codes of its site, which 32 bits do not hold.\n  equation: {e}\n"
            f"Calibrate {e.sites.output!r} with what it makes of them."
        )
    return integer_norm.scaled(gain, offset), gain


def _lines(
    builder: Builder, e: Equation, numbers: Sequence[Any], rank: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Adds factors and offsets to the parameters; returns them, and their names."""
    site = e.sites.output or where(e).strip("'")
    roles = zip(("multiplier", "bias"), numbers, strict=True)
    own = {role: narrowed(value, rank) for role, value in roles}
    names = {role: builder.add_param(f"{site}/{role}", x) for role, x in own.items()}
    return own, names


def _check_far(
    e: Equation, gain: np.ndarray, far: float, shift: int, codes: int
) -> None:
    """Raises where the rounding of a factor shows.

    What a mask leaves out is as far from the mean as the variance is small. A factor
    is off by ``2^-(shift + 1)``, which shows if a value is large before its site
    saturates.

    Args:
      e: The call.
      gain: Factors, codes for each unit of a value.
      far: Largest value.
      shift: Bits behind the point of the factors.
      codes: Most codes of a product that does not saturate.
    """
    own = np.abs(gain[gain != 0])
    if not own.size or min(far, codes / np.min(own)) <= 2.0 ** (shift - 1):
        return
    raise ValueError(
        f"The masked normalisation in {where(e)} has factors from {np.min(own):g} to "
        f"{np.max(own):g}, and what its mask leaves out may be so far from the others "
        f"that the rounding of the least one shows.\n  equation: {e}\nUse a larger "
        "epsilon, or factors nearer to each other."
    )


# What a call computes in integers -> its rule.
NORMS: Mapping[str, LoweringRule] = {"norm": _norm, "masked_norm": _masked_norm}
