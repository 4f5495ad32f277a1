"""Rules of quantization points: inputs are quantized, accumulators requantized."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import storage
from qjax.integer import common_fixed_point, fixed_point
from qjax.lowering.constants import (
    add_constant,
    known_codes,
    like_of,
    real_values,
    repeated,
)
from qjax.lowering.entries import held, raw
from qjax.lowering.evaluation import UNITS
from qjax.lowering.inputs import MOST_RANGE
from qjax.lowering.interpret import InputTwiceError, LoweringRule, refuse, where
from qjax.lowering.operands import added
from qjax.lowering.rules import tflite
from qjax.lowering.rules.functions import add_table, as_curve
from qjax.lowering.rules.moves import move_again
from qjax.lowering.rules.whole import replayed
from qjax.lowering.site_grids import SiteGrid
from qjax.lowering.values import (
    Abstract,
    Builder,
    ByChannel,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    PendingAccumulator,
    Real,
    ScaledIntegers,
    Sum,
    is_power_of_two,
)
from qjax.model.trace import Equation, Trace
from qjax.rounding import half_even


def _qpoint(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *operands: Abstract
) -> Abstract:
    scale, zero_point, qmin, qmax = (_constant(e, o) for o in operands)
    site = e.params["site"]
    if isinstance(x, Known) and not np.all(np.isfinite(x.value)):
        raise ValueError(
            f"The constant at {site or where(e)!r} holds NaN or infinity, which no "
            "code stands for. Check the parameters."
        )
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(
            f"The site {site or where(e)!r} has no scale yet: it is not calibrated. "
            "Run `qjax.calibrate` (or train the layer) before `qjax.lower`."
        )
    if e.params["rounding"] is not half_even:
        raise ValueError(
            f"The site {site!r} rounds by `{e.params['rounding'].__name__}`; integer "
            "programs round half to even. Use `rounding=half_even`."
        )
    if isinstance(x, Known | KnownCodes):
        real = real_values(x) if isinstance(x, KnownCodes) else x.value
        codes = known_codes(real, scale, zero_point, qmin, qmax)
        zeros = np.broadcast_to(zero_point, scale.shape)
        return KnownCodes(codes, scale, zeros, site)
    is_double = trace.avals[e.outputs[0]].dtype == np.float64
    shape, ends = trace.shape(e.outputs[0]), (int(qmin), int(qmax))
    ends = builder.target.ends(*ends)
    if scale.size > 1:
        _check_channels(e, x, zero_point, site)
        units = np.asarray(scale, np.float64)
        common = float(scale.max())
        target = SiteGrid(common, 0, *ends, site, is_double=is_double, units=units)
        return ByChannel(_by_channel(builder, e, x, target, shape), units, site)
    word = int(zero_point.reshape(())), *ends
    target = SiteGrid(float(scale.reshape(())), *word, site, is_double=is_double)
    if isinstance(x, ByChannel):
        x = dataclasses.replace(x.codes, scale=x.scale)
    if isinstance(x, Real):
        if x.input is None and builder.is_open:  # Float before it: begin anew here.
            value = target.add_input(builder, shape)
            builder.inputs[-1 - len(builder.inputs)] = value
            return target.integers(builder, value)
        return _quantize_input(builder, e, trace, x, target, shape)
    return _onto(builder, e, x, target, shape)


def _check_channels(
    e: Equation, x: Abstract, zero_point: np.ndarray, site: str
) -> None:
    """Raises where a scale per channel has no integers."""
    at, rule = site or where(e), f'Rule("{site or "..."}", QSpec(bits=8))'
    if np.any(zero_point):
        raise ValueError(
            f"The activation at {at!r} has a scale per channel and zero points, which "
            "no kernel takes in. Use `symmetric=True` in its word, or one scale: "
            f"`axis=None`, as in {rule}."
        )
    if isinstance(x, Real):
        raise ValueError(
            f"The input of the program at {at!r} has a scale per channel; its codes "
            f"have one scale. Use `axis=None`, as in {rule}."
        )


def _by_channel(
    builder: Builder, e: Equation, x: Abstract, target: SiteGrid, shape: Any
) -> Integers:
    """Returns codes with a scale per channel, in the unit of the coarsest channel."""
    if isinstance(x, Sum):
        x = added(builder, e, x)
    if isinstance(x, Curve):
        known = {**x.known, UNITS: np.asarray(target.units)}
        return _table(builder, dataclasses.replace(x, known=known), target, shape)
    if not isinstance(x, ScaledIntegers):
        raise refuse(e, x, "input")
    found = _requantize(builder, x, target, shape)
    low, high = (target.bound_codes(b) for b in x.bounds)
    if np.all(low <= found.low) and np.all(high >= found.high):
        return found
    return _capped(builder, e, found, target, (low, high), shape)


def _capped(
    builder: Builder,
    e: Equation,
    x: Integers,
    target: SiteGrid,
    ends: tuple[np.ndarray, np.ndarray],
    shape: Any,
) -> Integers:
    """Clips codes to bounds that differ by channel, by a lookup table per channel."""
    axes = [d for d, n in enumerate(target.units_of().shape) if n > 1]
    low, high = (np.broadcast_to(q, target.units_of().shape).reshape(-1) for q in ends)
    codes = np.arange(x.low, x.high + 1)[:, None]
    if len(axes) != 1 or codes.size * low.size > 1 << 20:
        raise refuse(e, x, "input")
    table = np.clip(codes, low, high)
    stored = table.astype(target.dtype)
    params = {"table": builder.add_param(f"{target.site}/bounds", stored)}
    attributes = {"low": x.low, "axis": axes[0] - len(shape)}
    value = target.add(builder, "table", (x.value,), attributes, params=params)
    builder.sites.pop(target.site, None)
    return target.integers(builder, value)


def _onto(
    builder: Builder, e: Equation, x: Abstract, target: SiteGrid, shape: Any
) -> Integers:
    """Puts the operand of a quantization point on its grid."""
    if isinstance(x, Sum):
        return _requantize_sum(builder, x, target, shape)
    if isinstance(x, ScaledIntegers):
        if e.is_of_quantizer and _is_curve(x, target):
            x = as_curve(builder, e, e.inputs[0], x)
            return _table(builder, x, target, shape)
        return _requantize(builder, x, target, shape)
    if isinstance(x, Curve):
        return _table(builder, x, target, shape)
    if isinstance(x, Joined):
        return _join(builder, e, x, target)
    raise refuse(e, x, "input")


def _is_curve(x: ScaledIntegers, target: SiteGrid) -> bool:
    """Returns whether thresholds are exact for a line that no requantizer has exactly.

    Such is the line of a sigmoid whose bias the unit of its accumulator does not hold.
    """
    if x.past is None or target.qmax - target.qmin > _MOST_LEVELS:
        return False
    source = x.past.source
    is_exact = is_power_of_two(source.scale) and source.is_bias_exact
    return is_exact and source.is_gain_exact and not _is_exact(x, target)


def _table(builder: Builder, x: Curve, target: SiteGrid, shape: Any) -> Integers:
    if builder.target.is_tflite:
        return tflite.tabled(builder, x, target)
    options: Any = {"dtype": target.dtype, "grid": target.grid}
    value = add_table(builder, x, target.codes_of, target.site, **options)
    return target.integers(builder, value)


def _join(builder: Builder, e: Equation, x: Joined, target: SiteGrid) -> Integers:
    """Puts each part on the grid, then joins them, as rounding keeps their order."""
    part = dataclasses.replace(target, is_part=True)
    pairs = list(zip(x.parts, x.shapes, strict=True))
    onto: dict[int, int] = {}
    for k, (p, shape) in enumerate(pairs):
        if not isinstance(p, Known):
            onto[k] = _onto(builder, e, p, part, shape).value
    for k, (p, shape) in enumerate(pairs):
        if isinstance(p, Known):
            likes = [*onto.values(), *x.others]
            like = like_of(builder, x, likes, shape)
            onto[k] = _constant_codes(builder, x, p, part, shape, like)
    values = [onto[k] for k in range(len(pairs))]
    attributes = dict(x.attributes)
    if x.operation == "pad":
        attributes["padding_code"] = target.codes(x.fill)
    joined = target.add(builder, x.operation, (*x.others, *values), attributes)
    if x.bounds == (-np.inf, np.inf):
        return target.integers(builder, joined)
    whole, (low, high) = builder.values[joined], target.range(x.bounds)
    ends = {"low": max(low, whole.low), "high": min(high, whole.high)}
    value = target.add(builder, "clip", (joined,), ends)
    return target.integers(builder, value)


def _constant_codes(
    builder: Builder,
    x: Joined,
    known: Known,
    target: SiteGrid,
    shape: tuple[int, ...],
    like: int | None,
) -> int:
    """Adds a constant on the grid of a site, or the code that a mask chooses."""
    real = np.asarray(known.value)
    if np.any(np.isnan(real)):
        raise ValueError(
            f"A constant that goes into the site {target.site!r} is NaN, which no code "
            "stands for. Replace it by a number."
        )
    grid, dtype = target.grid, target.dtype
    is_mask = x.operation == "select"
    if not is_mask or not real.size or np.any(real != real.flat[0]):
        codes = target.known_codes_of(real)
        codes, like = repeated(x, np.broadcast_to(codes, shape), like)
        options: Any = {"path": x.place.path, "dtype": dtype, "like": like}
        return add_constant(
            builder, codes, grid, name=f"{target.site}/constant", **options
        )
    code = target.codes(float(real.flat[0]))
    table = np.full(2, code, dtype)
    params = {"table": builder.add_param(f"{target.site}/case", table)}
    ends = {"low": 0, "axis": None}
    path = x.place.path
    return target.add(builder, "table", x.others, ends, params=params, path=path)


def _quantize_input(
    builder: Builder, e: Equation, trace: Trace, x: Real, target: SiteGrid, shape: Any
) -> Abstract:
    if x.input is None:
        raise refuse(e, x, "input")
    if not x.is_plain or x.input in builder.raw or x.input in builder.is_raw:
        if (function := raw(builder, e, trace, x)) is not None:
            return _table(builder, function, target, shape)
        if (ends := _saturating(x, target)) is not None:
            function = held(builder, e, trace, x, ends)
            return _table(builder, function, target, shape)
        again = replayed(builder, e, trace, x)
        if isinstance(again, Curve):
            return _table(builder, again, target, shape)
        return _requantize(builder, again, target, shape)
    own = trace.shape(trace.inputs[x.input])
    fresh = Builder()
    target.add_input(fresh, own)
    wanted = dataclasses.replace(
        fresh.values[0],
        rescaling=x.rescaling,
        is_rescaling_exact=x.is_exact,
        rounding=builder.target.inputs,
    )
    value = builder.inputs.get(x.input)
    if value is None:
        value = builder.inputs[x.input] = len(builder.values)
        builder.values.append(wanted)
    elif builder.values[value] != wanted:
        raise InputTwiceError(e, trace, x)
    codes: Abstract = dataclasses.replace(target, is_part=True).integers(builder, value)
    # A grid whose zero point is none of its codes holds no zero.
    zero = (target.codes(0.0) - target.zero_point) * target.scale
    codes = move_again(builder, x, trace, codes, zero=zero)
    assert isinstance(codes, Integers)
    if not target.is_part:
        builder.add_site(target.site, codes.value)
    return codes


def _saturating(x: Real, target: SiteGrid) -> tuple[int, int] | None:
    """Returns integers beyond which an input has the codes at the ends of its word.

    None for more than a table holds between them, or for an input in another unit.
    """
    if not x.is_plain or x.rescaling != (1.0, 0.0):
        return None
    steps = (target.qmin - target.zero_point - 2, target.qmax - target.zero_point + 2)
    low, high = (math.floor(n * target.scale) for n in steps)
    return (low, high + 1) if high - low < MOST_RANGE - 2 else None


def _requantize(
    builder: Builder,
    x: Integers | PendingAccumulator,
    target: SiteGrid,
    shape: tuple[int, ...],
) -> Integers:
    x = x.emitted() if isinstance(x, PendingAccumulator) else x
    low, high = target.range(x.bounds)
    is_one = target.units is None and np.ndim(x.scale) == 0
    same_grid = is_one and x.is_codes and x.scale == np.float32(target.scale)
    if same_grid and x.zero_point == target.zero_point and not x.is_bounded:
        is_whole = x.rescaled is None or x.high - x.low < _MOST_WHOLE
        # Parts are joined in one type.
        fits = builder.values[x.value].dtype == storage(target.qmin, target.qmax)
        is_whole &= fits or not target.is_part
        if is_whole and target.qmin <= x.low and x.high <= target.qmax:
            if not target.is_part:
                builder.add_site(target.site, x.value)
            return x
    if builder.target.is_tflite:
        return tflite.requantized(builder, x, target, (low, high))
    ratio = x.real_scale() / target.units_of()
    # If float32 arithmetic has one operation that rounds, round as it does.
    one_rounding = (
        x.gain is not None
        and x.is_gain_exact
        and not target.is_double
        and is_power_of_two(x.scale)
        and is_power_of_two(target.units_of())
        and not is_power_of_two(x.gain)
    )
    if x.is_still is not None:  # Zero is zero in any unit.
        ratio = np.where(x.is_still, 0.0, ratio)
    multiplier, shift = _at_site(fixed_point, ratio, target.site)
    params = {
        "multiplier": builder.add_param(f"{target.site}/multiplier", multiplier),
        "shift": builder.add_param(f"{target.site}/shift", shift),
    }
    is_power = np.all(multiplier * 2.0 ** -shift.astype(float) == ratio)
    attributes = {
        "input_zero_point": x.zero_point,
        "zero_point": target.zero_point,
        "low": low,
        "high": high,
        "rule": "fp32_half_even" if one_rounding else "half_even",
        "is_exact": _is_exact(x, target) and bool(is_power),
        **({} if x.is_bias_exact else {"is_bias_rounded": True}),
        **({"is_wide": True} if _most_steps(x) >= 1 << 31 else {}),
    }
    value = target.add(builder, "requantize", (x.value,), attributes, params=params)
    return target.integers(builder, value)


_MOST_LEVELS = 255  # Largest code less the least that prefers thresholds.
_MOST_WHOLE = 1 << 20  # Float error in a unit is no step below it.
_EXACT = 1 << 24  # Integers below are exact in float32.
_MOST_SUM = 1 << 62  # Largest sum of products without signs: `requantize_sum`.


def _most_steps(x: ScaledIntegers) -> int:
    """Returns the largest distance of codes from their zero point."""
    zero_point = x.zero_point if isinstance(x, Integers) else 0
    return max(abs(x.low - zero_point), abs(x.high - zero_point))


def _is_exact(x: ScaledIntegers, target: SiteGrid) -> bool:
    """Returns whether float32 rounds accumulators as the requantizer does.

    All scales are powers of two, nothing overflows or is denormal, and one operation at
    most rounds: a product with a factor, which is the last one.
    """
    once = x.is_gain_exact and not x.is_quotient
    scales = np.asarray(x.scale), target.units_of()
    is_rescaled = isinstance(x, Integers) and x.rescaled is not None
    if not once or is_rescaled or not x.is_bias_exact:
        return False
    units = np.abs(x.real_scale()[x.real_scale() != 0])
    ends = (*scales, units, 1 / scales[1])
    is_normal = all(np.all((s >= 2.0**-126) & (s <= 2.0**100)) for s in ends)
    return is_normal and all(map(is_power_of_two, scales)) and _most_steps(x) < _EXACT


def _is_exact_sum(x: Sum, target: SiteGrid) -> bool:
    """Returns whether float32 adds codes exactly: powers of two within 24 bits."""
    scales = np.array([*(float(t.scale) for t, _ in x.terms), target.scale])
    if not is_power_of_two(scales) or any(t.rescaled is not None for t, _ in x.terms):
        return False
    finest = scales[:-1].min()
    most = sum(_most_steps(t) * float(t.scale) / finest for t, _ in x.terms)
    is_normal = np.all((scales >= 2.0**-126) & (scales <= 2.0**100))
    return bool(is_normal and most < _EXACT)


def _requantize_sum(
    builder: Builder, x: Sum, target: SiteGrid, shape: tuple[int, ...]
) -> Integers:
    if builder.target.is_tflite:
        return tflite.summed(builder, x, target)
    ratios = np.array([sign * float(t.scale) / target.scale for t, sign in x.terms])
    multipliers, shift = _at_site(common_fixed_point, ratios, target.site)
    most = [_most_steps(t) for t, _ in x.terms]

    def total() -> int:
        pairs = zip(most, multipliers, strict=True)
        return sum(n * abs(int(m)) for n, m in pairs)

    while total() > _MOST_SUM and shift > 0 and not np.any(multipliers % 2):
        multipliers, shift = multipliers // 2, shift - 1
    if total() > _MOST_SUM or max(most) >= 1 << 31:
        raise ValueError(
            f"The sum at {target.site!r} is of codes up to {max(most)} from their zero "
            "point, more than 64 bits hold after rescaling. Use words of at most 30 "
            "bits, or `symmetric=True`."
        )
    low, high = target.range(x.bounds)
    attributes = {
        "input_zero_points": [t.zero_point for t, _ in x.terms],
        "multipliers": [int(m) for m in multipliers],
        "shift": int(shift),
        "zero_point": target.zero_point,
        "low": low,
        "high": high,
        "is_exact": _is_exact_sum(x, target),
    }
    inputs = [t.value for t, _ in x.terms]
    value = target.add(builder, "add", inputs, attributes)
    return target.integers(builder, value)


def _at_site(
    convert: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ratio: np.ndarray,
    site: str,
) -> tuple[np.ndarray, np.ndarray]:
    try:
        return convert(ratio)
    except ValueError as error:
        raise ValueError(f"The site {site!r} cannot be requantized. {error}") from error


def _constant(e: Equation, x: Abstract) -> np.ndarray:
    if not isinstance(x, Known):
        raise ValueError(
            f"The scale of the quantization point in {where(e)} depends on an input. "
            f"Integer programs have fixed scales.\n  equation: {e}"
        )
    return np.asarray(x.value)


# Primitive -> its rule.
POINTS: Mapping[str, LoweringRule] = {
    "qpoint": _qpoint,
}
