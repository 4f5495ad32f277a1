"""Rules of sums, factors and bounds, which the next requantizer absorbs."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.graph.builder import compact
from qjax.graph.graph import Grid
from qjax.lowering.constants import add_constant, anchor, real_values
from qjax.lowering.finer_biases import MOST_SHIFT, bias_shift
from qjax.lowering.inputs import rescaled
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.rules.bounds import bound, clamp
from qjax.lowering.rules.functions import curve, per_channel
from qjax.lowering.rules.levels import factor_on_grid, on_grid
from qjax.lowering.rules.products import multiply, multiply_codes, reopened
from qjax.lowering.values import (
    Abstract,
    Builder,
    ByChannel,
    Curve,
    Integers,
    Known,
    KnownCodes,
    Past,
    PendingAccumulator,
    Real,
    ScaledIntegers,
    Sum,
    is_power_of_two,
)
from qjax.model.trace import Equation, Trace

_INT32 = np.iinfo(np.int32)
_ROUNDING = 2.0**-20  # Relative, of float32 scales and of their products.
_MOST_OFF = 2.0**-6


def _add(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    sign = -1.0 if e.primitive.name == "sub" else 1.0
    if isinstance(a, ScaledIntegers) and _is_zero(b):
        return a
    if isinstance(b, ScaledIntegers) and _is_zero(a) and sign > 0:
        return b
    if _is_constant(a, b):
        a = _as_data(builder, e, trace, a, b)
    elif _is_constant(b, a):
        b = _as_data(builder, e, trace, b, a)
    if _bends(a, b) and (found := curve(builder, e, trace, a, b)) is not None:
        return found
    if isinstance(a, Known | KnownCodes):
        if sign < 0:
            b, sign = _scaled(e, b, np.asarray(-1.0), None), 1.0
        a, b = b, a
        return _add_known(builder, e, a, b, sign)
    if isinstance(b, Known | KnownCodes):
        return _add_known(builder, e, a, b, sign)
    a, b = (factor_on_grid(builder, e, trace, *pair) for pair in _pairs(e, a, b))
    left, right = _terms(e, a), _terms(e, b)
    right = tuple((t, s * sign) for t, s in right)
    return Sum(left + right, place=e.place)


def _is_constant(x: Abstract, other: Abstract) -> bool:
    """Returns whether a value is known codes of one scale beside codes of data."""
    is_beside = isinstance(other, Sum) or _is_of_codes(other)
    return isinstance(x, KnownCodes) and np.size(x.scale) == 1 and is_beside


def _as_data(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, other: Abstract
) -> Integers:
    """Adds known codes to the graph, such as a table of places, on their own grid."""
    assert isinstance(x, KnownCodes)
    shape = trace.shape(e.outputs[0])
    codes = np.broadcast_to(x.codes, shape)
    grid = Grid(float(np.max(x.scale)), int(np.max(x.zero_point)))
    own: dict[str, Any] = {"name": f"{x.site}/value", "path": x.site}
    like = anchor(builder, other, shape)
    value = add_constant(builder, codes, grid, like=like, **own)
    return Integers(
        value=value,
        scale=np.asarray(np.float64(grid.scale)),
        zero_point=grid.zero_point,
        low=int(codes.min()),
        high=int(codes.max()),
        is_codes=True,
        place=e.place,
    )


def _is_zero(x: Abstract) -> bool:
    """Returns whether a value is known to be 0."""
    if isinstance(x, KnownCodes):
        return bool(np.all(x.codes == x.zero_point))
    return isinstance(x, Known) and not np.any(x.value)


def _pairs(e: Equation, *operands: Abstract) -> Iterator[tuple[Abstract, int]]:
    """Returns operands, each with its value in the trace."""
    return zip(operands, e.inputs, strict=True)


def _bends(*operands: Abstract) -> bool:
    """Returns whether an operand is a function of codes, or codes meet a number.

    Accumulators absorb numbers; codes with a number are a function, and so are sums of
    codes with one, and an accumulator that an activation bounds.
    """
    if any(isinstance(x, Curve) or _is_bounded_sum(x) for x in operands):
        return True
    if len(operands) == 2 and all(map(_is_sum, operands)):
        return True
    whole = [x for x in operands if isinstance(x, Sum) or _is_of_codes(x)]
    known = [x for x in operands if isinstance(x, Known)]
    return len(whole) == 1 and len(known) == len(operands) - 1


def _is_of_codes(x: Abstract) -> bool:
    return isinstance(x, ScaledIntegers) and x.is_of_codes


def _is_sum(x: Abstract) -> bool:
    """Returns whether a value is an accumulator."""
    return isinstance(x, ScaledIntegers) and not x.is_of_codes


def _is_bounded_sum(x: Abstract) -> bool:
    return isinstance(x, ScaledIntegers) and _is_sum(x) and x.is_bounded


def _terms(e: Equation, x: Abstract) -> tuple[tuple[Integers, float], ...]:
    if isinstance(x, Sum) and x.bounds == (-np.inf, np.inf):
        return x.terms
    if isinstance(x, Integers) and x.is_codes:
        return ((x, 1.0),)
    raise refuse(e, x, "operand")


def _add_known(
    builder: Builder, e: Equation, x: Abstract, known: Abstract, sign: float
) -> Abstract:
    if isinstance(x, Real) and x.input is not None and _is_number(known):
        assert isinstance(known, Known)
        gain, offset = x.rescaling
        shifted = gain, offset + sign * float(known.value.flat[0])
        exact = x.is_exact and is_power_of_two(gain) and not offset
        return rescaled(e, x, _numbers(e, known), shifted, exact)
    if not isinstance(x, ScaledIntegers) or x.is_of_codes or x.is_bounded:
        raise refuse(e, x, "operand")
    if isinstance(x, Integers):
        x = reopened(builder, e, x)
    if isinstance(known, KnownCodes):
        if x.shift is None and np.ptp(known.codes):  # A sum has one bias for all.
            x = reopened(builder, e, x.emitted())
        if sign > 0 and _is_on_grid_of(x, known):
            return _with_bias(x, known.codes)
        real = known.codes * np.float64(known.scale)
    else:
        assert isinstance(known, Known)
        real = np.asarray(known.value, np.float64)
    if not np.any(real):
        return x
    if not np.all(np.isfinite(real)):
        raise _not_finite(e)
    if x.shift is None and not _is_one_step(x, compact(real)):
        x = reopened(builder, e, x.emitted())
    x = _refined(x, compact(real))
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = compact(sign * real) / x.real_scale()
        bias = np.rint(steps)
    if not np.all(np.isfinite(bias)) or np.any(np.abs(bias) > _INT32.max):
        raise OverflowError(
            f"The constant added in {where(e)} does not fit an int32 bias: it is up to "
            f"{np.max(np.abs(real)):g}, at {np.min(np.abs(x.real_scale())):g} per code."
            f"\n  equation: {e}\nA channel of what it is added to is all but zero: "
            "quantize that before the sum, or make its weights zero."
        )
    # After a factor float32 rounds twice: the product, then the sum.
    rounds_once = x.is_gain_exact and x.gain is None
    exact = x.is_bias_exact and bool(np.all(steps == bias))
    x = dataclasses.replace(x, is_gain_exact=rounds_once, is_bias_exact=exact)
    return _with_bias(x, bias)


def _is_one_step(x: PendingAccumulator, real: np.ndarray) -> bool:
    """Returns whether a constant is one whole number of steps, for a sum of codes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = real / x.real_scale()
    if steps.size != 1 or not np.all(np.isfinite(steps)) or not _is_whole(steps):
        return False
    return bool(max(abs(x.low), abs(x.high)) + np.max(np.abs(steps)) <= x.most)


def _not_finite(e: Equation) -> ValueError:
    return ValueError(
        f"A constant of `{e.primitive.name}` in {where(e)} is infinite or NaN, or "
        f"divides by zero, and no integers are.\n  equation: {e}\nReplace it by a "
        "number; an average over no values has none."
    )


def _is_on_grid_of(x: PendingAccumulator, known: KnownCodes) -> bool:
    """Returns whether a bias has the unit of its accumulator up to float32 rounding."""
    if x.gain is not None or np.any(known.zero_point):
        return False
    fits = np.all(np.abs(known.codes) <= x.most)
    return bool(fits and np.all(np.abs(known.scale / x.scale - 1) <= _ROUNDING))


def _is_number(known: Abstract) -> bool:
    return isinstance(known, Known) and known.value.size == 1


def _refined(x: PendingAccumulator, bias: np.ndarray) -> PendingAccumulator:
    """Returns a product on a grid that holds a bias, or as fine as its word allows."""
    if x.shift is None or x.bias is not None:
        return x
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = bias / x.real_scale()
    if not np.all(np.isfinite(ratio)):
        return x
    shift = _bias_shift(x, ratio)
    scale, low, high = x.scale / 2.0**shift, x.low << shift, x.high << shift
    return dataclasses.replace(x, scale=scale, low=low, high=high, shift=shift)


def _bias_shift(x: PendingAccumulator, ratio: np.ndarray) -> int:
    """Returns the bits by which a product is shifted left for a bias in its units."""
    reach = np.max(np.abs(ratio), initial=1.0)
    if x.top is not None:  # Traced code knows no more of two activations.
        return int(bias_shift(x.top + reach, x.most))
    top = max(abs(x.low), abs(x.high)) + reach
    shifts = range(1 + min(int(np.log2(x.most / top)), MOST_SHIFT))
    last = shifts[-1] if shifts else 0  # Where the bias will be rounded.
    return next((k for k in shifts if _is_whole(ratio * 2.0**k)), last)


def _is_whole(x: np.ndarray) -> bool:
    """Returns whether numbers are integers up to the float32 rounding of scales."""
    off = np.abs(x - np.rint(x))
    return bool(np.all(off <= np.minimum(_ROUNDING * np.abs(x), _MOST_OFF)))


def _with_bias(x: PendingAccumulator, bias: np.ndarray) -> PendingAccumulator:
    bias = compact(bias.astype(np.int64))
    return dataclasses.replace(x, bias=bias if x.bias is None else x.bias + bias)


def _mul(builder: Builder, e: Equation, trace: Trace, *operands: Abstract) -> Abstract:
    if e.primitive.name == "neg":
        if _bends(*operands) and (found := curve(builder, e, trace, *operands)):
            return found
        return _scaled(e, operands[0], np.asarray(-1.0), None)
    a, b = operands
    a, b = (_numbers_made_real(builder, e, trace, *pair) for pair in _pairs(e, a, b))
    if isinstance(a, ByChannel) and isinstance(b, Known) and e.primitive.name == "mul":
        return _one_unit(e, a, b)
    if _bends(a, b) and not _is_unit(e, a, b):
        if (found := curve(builder, e, trace, a, b)) is not None:
            return found
    if e.primitive.name == "div":
        if not isinstance(b, Known):
            raise refuse(e, b, "divisor")
        with np.errstate(divide="ignore", over="ignore"):
            reciprocal = np.float32(1) / np.asarray(b.value, np.float32)
        factor = compact(np.asarray(reciprocal, np.float64))
        if isinstance(a, Integers) and a.is_of_codes and factor.size == 1:
            return _rescaled(builder, e, trace, (a, b), factor.reshape(()))
        return _scaled(e, a, factor, b, is_quotient=True)
    if not any(isinstance(x, Known | KnownCodes) for x in (a, b)):
        a, b = (factor_on_grid(builder, e, trace, *pair) for pair in _pairs(e, a, b))
    x, known = (b, a) if isinstance(a, Known | KnownCodes) else (a, b)
    if isinstance(x, ScaledIntegers) and isinstance(known, ScaledIntegers):
        if _are_same_codes(x, known) and x.high - x.low < 1 << 16:
            if (found := curve(builder, e, trace, a, b)) is not None:
                return found
        return multiply_codes(builder, e, trace, x, known)
    if isinstance(known, KnownCodes) and isinstance(x, Integers) and x.is_codes:
        return multiply(builder, e, trace, x, known)
    if isinstance(known, KnownCodes) and isinstance(x, ScaledIntegers):
        known = Known(real_values(known))  # A factor of a sum that is not rounded yet.
    if not isinstance(known, Known):
        raise refuse(e, known, "operand")
    factor = compact(np.asarray(known.value, np.float64))
    if isinstance(x, Integers) and x.is_of_codes and factor.size == 1:
        return _rescaled(builder, e, trace, (a, b), factor.reshape(()))
    return _scaled(e, x, factor, known)


def _numbers_made_real(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int
) -> Abstract:
    """Returns an integer input as codes where a factor for each place meets it."""
    others = [trace.shape(u) for u in e.inputs if u != v]
    is_single = all(math.prod(shape) == 1 for shape in others)
    if not isinstance(x, Real) or is_single:
        return x
    return on_grid(builder, e, trace, x, v)


def _are_same_codes(x: Abstract, y: Abstract) -> bool:
    if not isinstance(x, Integers) or not isinstance(y, Integers):
        return False
    return x.is_codes and x.value == y.value


def _one_unit(e: Equation, x: ByChannel, known: Known) -> Integers:
    """Brings codes with a scale per channel to one scale by a factor per channel."""
    scale = compact(x.scale * np.asarray(known.value, np.float64))
    most = np.max(scale, initial=0)
    if most <= 0 or np.any(np.abs(scale / most - 1) > _ROUNDING):
        raise refuse(e, x, "operand")
    is_exact = is_power_of_two(x.scale) and scale.size == 1
    common = np.asarray(np.float64(np.float32(x.codes.scale)))
    return dataclasses.replace(x.codes, scale=common, is_gain_exact=is_exact)


def _is_unit(e: Equation, a: Abstract, b: Abstract) -> bool:
    """Returns whether codes meet one positive factor and only change their unit."""
    x, known = (b, a) if isinstance(a, Known) else (a, b)
    if not (isinstance(x, Integers) and x.is_codes and isinstance(known, Known)):
        return False
    if x.dtype:  # Whole numbers have no unit.
        return False
    is_divisor = e.primitive.name == "div" and known is a
    value = compact(np.asarray(known.value))
    return value.size == 1 and bool(np.all(value > 0)) and not is_divisor


def _rescaled(
    builder: Builder,
    e: Equation,
    trace: Trace,
    operands: tuple[Abstract, Abstract],
    factor: np.ndarray,
) -> Integers:
    """Returns codes in another unit; a function of codes keeps the model's product."""
    x = next(o for o in operands if isinstance(o, Integers))
    scale = x.scale * factor
    if factor <= 0 or x.dtype or not _MOST <= scale < 1 / _MOST:
        raise refuse(e, x, "operand")
    if x.rescaled is None and is_power_of_two(factor):
        return dataclasses.replace(x, scale=scale, bounded=None)
    chain = None
    if x.high - x.low < 1 << 16 and not np.ndim(x.scale):
        chain = curve(builder, e, trace, *operands)
    return dataclasses.replace(x, scale=scale, bounded=None, rescaled=chain)


_MOST = 2.0**-126  # Scales and their reciprocals stay normal float32 numbers.


def _round(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    """Rounds codes in units of one, which are integers but for float error."""
    if isinstance(x, Integers) and x.is_codes and not np.ndim(x.scale):
        most = max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
        if most * (abs(x.scale - 1) + 2.0**-22) < 0.25:
            one = np.ones(())
            return dataclasses.replace(x, scale=one, bounded=None, rescaled=None)
    found = curve(builder, e, trace, x)
    assert found is not None
    return found


def _scaled(
    e: Equation,
    x: Abstract,
    factor: np.ndarray,
    known: Abstract | None,
    *,
    is_quotient: bool = False,
) -> Abstract:
    """Applies a factor, which waits for the next grid."""
    if not np.all(np.isfinite(factor)):
        raise _not_finite(e)
    is_power = is_power_of_two(factor)
    if isinstance(x, Real) and x.input is not None and factor.size == 1:
        by = float(factor.flat[0])
        gain, offset = (by * number for number in x.rescaling)
        before, shift = x.rescaling
        once = not is_quotient and is_power_of_two(before) and not shift
        exact = x.is_exact and (is_power or once)
        return rescaled(e, x, _numbers(e, known), (gain, offset), exact)
    if not isinstance(x, ScaledIntegers) or x.is_of_codes or x.is_bounded:
        raise refuse(e, x, "operand")
    factor = compact(factor)
    if np.all(factor == 1):
        return x
    quotient = x.is_quotient or (is_quotient and not is_power)
    x = dataclasses.replace(x, is_quotient=quotient)
    if x.gain is None:
        return dataclasses.replace(x, gain=factor)
    return dataclasses.replace(x, gain=x.gain * factor, is_gain_exact=False)


def _numbers(e: Equation, known: Abstract | None) -> dict[int, np.ndarray]:
    """Maps operands to the number of a known one; empty if it has several numbers."""
    number = compact(known.value) if isinstance(known, Known) else np.zeros(0)
    return dict.fromkeys(e.inputs, number.reshape(())) if number.size == 1 else {}


def _remembered(rule: LoweringRule) -> LoweringRule:
    """Returns a rule whose accumulators remember the arithmetic of the model.

    A bias on their own grid is part of the integers, without a rounding.
    """

    def apply(
        builder: Builder, e: Equation, trace: Trace, *operands: Abstract
    ) -> Abstract:
        found = rule(builder, e, trace, *operands)
        assert not isinstance(found, tuple)
        data = [k for k, x in enumerate(operands) if not isinstance(x, _CONSTANTS)]
        x = operands[data[0]]
        if not isinstance(found, ScaledIntegers) or not _is_sum(found) or found is x:
            return found
        past = origin = None
        if len(data) == 1 and isinstance(x, ScaledIntegers) and _is_sum(x):
            if x.past is None and _is_biased(x, found):
                origin = _past(e, data[0], x, operands, x.origin)
            else:
                past = _past(e, data[0], x, operands, x.past)
        return dataclasses.replace(found, past=past, origin=origin)

    return apply


_CONSTANTS = (Known, KnownCodes)


def _is_biased(x: ScaledIntegers, found: ScaledIntegers) -> bool:
    """Returns whether an accumulator is another one with an exact bias."""
    is_plain = x.gain is None and found.gain is None and not found.is_bounded
    return is_plain and found.is_bias_exact and found.is_gain_exact


def _past(
    e: Equation,
    place: int,
    x: ScaledIntegers,
    operands: tuple[Abstract, ...],
    past: Past | None,
) -> Past | None:
    """Returns what an accumulator remembers after an equation; None if it cannot."""
    constants = [
        (v, o)
        for v, o in zip(e.inputs, operands, strict=True)
        if isinstance(o, Known | KnownCodes)
    ]
    shapes = [
        compact(o.value if isinstance(o, Known) else o.codes) for _, o in constants
    ]
    if any(sum(n > 1 for n in a.shape) > 1 for a in shapes):
        return None
    known = {v: per_channel(e, o) for v, o in constants}
    v, (end,) = e.inputs[place], e.outputs
    past = Past(x, v, {}, {}, v) if past is None else past
    steps = dict(past.steps)
    if past.end != v:
        steps[v] = Equation(copy_p, {}, (past.end,), (v,), e.path)
    steps[end] = e
    return Past(past.source, past.start, {**past.known, **known}, steps, end)


# Primitive -> its rule.
ARITHMETIC: Mapping[str, LoweringRule] = {
    "add": _remembered(_add),
    "add_any": _remembered(_add),
    "sub": _remembered(_add),
    "mul": _remembered(_mul),
    "div": _remembered(_mul),
    "neg": _remembered(_mul),
    "round": _round,
    "max": _remembered(bound),
    "min": _remembered(bound),
    "clamp": _remembered(clamp),
}
