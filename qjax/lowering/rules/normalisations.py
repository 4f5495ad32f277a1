"""Rules of softmaxes and normalisations, whose integers the simulation computes too."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax import integer_norm
from qjax.graph.graph import Grid, storage
from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.record import Operands
from qjax.integer import fixed_point
from qjax.integer_calls import LARGE, NormCall, SoftmaxCall, integer_of, rank_of
from qjax.integer_division import FRACTION as FRACTION_OF_DIVISION
from qjax.integer_division import MOST
from qjax.integer_softmax import (
    FRACTION,
    LOG,
    exp_tables,
    joined_table,
    most_places,
)
from qjax.leaves import at_start
from qjax.lowering.constants import add_constant
from qjax.lowering.entries import raw
from qjax.lowering.evaluation import tabulate
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules import tflite
from qjax.lowering.rules.choices import mask
from qjax.lowering.rules.functions import add_table, as_curve
from qjax.lowering.rules.whole import exact_codes, whole_numbers
from qjax.lowering.site_grids import SiteGrid
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    Known,
    KnownCodes,
    Real,
    ScaledIntegers,
)
from qjax.model.masks import SOFTMAXES
from qjax.model.normalisations import said
from qjax.model.trace import Equation, Trace

_MOST_CODES = 1 << 16
_VANISHES = 22.0  # exp(-22) is below half of 2^-30.


def _softmax(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    _check_rank(e, trace)
    call = SoftmaxCall.parse(e)
    first, *masks, last_scale, last_zero, least, most_code = others
    unit, scale = _known(e, first), _known(e, last_scale)
    zero_point, qmin, qmax = (_known(e, v) for v in (last_zero, least, most_code))
    x = _codes(builder, e, trace, x, unit)
    if builder.target.is_tflite:
        known = scale, zero_point, qmin, qmax
        whole = tflite.softmax(builder, x, call, _site_grid(e, known), bool(masks))
        return _added(builder, e, *whole, known)
    if x.high - x.low >= _MOST_CODES:
        raise ValueError(
            f"The {said(call.kind)} in {where(e)} is over codes from {x.low} to "
            f"{x.high}, more than its table holds.\n  equation: {e}\nUse a word of at "
            f"most 16 bits for its input, {x.place.path!r}."
        )
    factor = np.float32(unit) * np.float32(call.factor)
    most = float(factor) * max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    _check_fill(e, call, most, scale, zero_point - qmin)
    places = math.prod(trace.shape(e.inputs[0])[d] for d in call.axes)
    table = joined_table(exp_tables(factor, places), x.high - x.low + 1)
    table = table[: int(np.flatnonzero(table)[-1]) + 2]  # What is farther is 0.
    site = e.sites.output or where(e).strip("'")
    params = {"table": builder.add_param(f"{site}/table", table.astype(np.int32))}
    mask = _mask(builder, e, trace, masks, site)
    inputs = [x.value] if mask is None else [x.value, mask]
    attributes = {
        "axes": list(call.axes),
        "most_places": most_places(places),
        "empty": call.empty,
        "zero_point": int(zero_point),
        "low": int(qmin),
        "high": int(qmax),
    }
    plus = call.more(places)
    own: dict[str, Any] = (
        _of_logs(e, x, factor, scale) if call.kind != "softmax" else {}
    )
    if not own:
        multiplier, shift = fixed_point(2.0**-FRACTION / np.float64(scale))
        own = {"multiplier": int(multiplier), "shift": int(shift)}
        own |= {"algorithm": "exp_table"} | ({"plus": plus} if plus else {})
    else:
        own["input_zero_points"] = [builder.values[v].zero_point for v in inputs]
    if call.kind == "logsumexp":
        own["keepdims"] = call.keepdims
    attributes |= own
    operands = [builder.values[v] for v in inputs]
    ends = OPERATIONS[call.kind].interval(
        Operands(attributes, operands, {"table": table})
    )
    attributes |= {"low": int(ends[0]), "high": int(ends[1])}
    grid = scale, zero_point, qmin, qmax
    return _added(builder, e, call.kind, inputs, attributes, params, grid)


def _check_fill(
    e: Equation, call: SoftmaxCall, most: float, scale: Any, codes: int
) -> None:
    """Raises for a mask whose number still counts.

    Args:
      e: The call.
      call: What it computes.
      most: Largest magnitude of its input.
      scale: Scale of its site.
      codes: Codes below the zero point of the site.
    """
    # What is masked is a code below all others in a logarithm.
    below = float(scale) * (codes - 0.5) if call.kind != "softmax" else 0.0
    below += _VANISHES if call.kind == "logsumexp" else 0.0  # Log of a row's places.
    if call.fill and -call.fill < 2 * most + max(_VANISHES, below):
        raise ValueError(
            f"The mask of the {said(call.kind)} in {where(e)} puts {call.fill:g} where "
            f"its input may be as large as {most:g}, so that what it masks still "
            f"counts.\n  equation: {e}\nUse a larger number: -1e9, or `-jnp.inf`."
        )


def _of_logs(e: Equation, x: Integers, factor: Any, scale: Any) -> dict[str, Any]:
    """Returns the attributes of logarithms: both factors, in codes of their site."""
    ratios = np.array([factor, 1], np.float64) / np.float64(scale)
    if np.any(ratios >= 2.0**31):
        raise ValueError(
            f"The logarithm in {where(e)} is of values that are {float(factor):g} "
            f"apart, on a grid of the scale {float(scale):g}: 31 bits do not hold "
            f"its codes.\n  equation: {e}\nCalibrate {e.sites.output!r} with inputs "
            "whose logarithms differ, or give it a scale in `scales`."
        )
    (of_input, of_log), shifts = fixed_point(ratios)
    names = "input_multiplier", "input_shift", "multiplier", "shift"
    numbers = of_input, shifts[0], of_log, shifts[1] + LOG
    return {
        "algorithm": "exp_table_and_log_series",
        **{name: int(x) for name, x in zip(names, numbers, strict=True)},
    }


def _mask(
    builder: Builder, e: Equation, trace: Trace, masks: Sequence[Abstract], site: str
) -> int | None:
    """Returns what all masks of a softmax keep, as codes 0 and 1; None for all."""
    known, found = None, []
    for k, x in enumerate(masks):
        if isinstance(x, Known):
            own = x.value if x.value.dtype == np.bool_ else x.value > -LARGE / 2
            known = own if known is None else known & own
        else:
            found.append(_mask_of_data(builder, e, trace, x, k + 2, site))
    if known is not None:
        codes = _narrowed(known.astype(np.int8), len(trace.shape(e.inputs[0])))
        options: Any = {"name": f"{site}/mask", "path": site, "dtype": "int8"}
        found.append(add_constant(builder, codes, None, **options))
    if not found:
        return None
    both = lambda a, b: builder.add("minimum", [a, b], {}, dtype="int8", path=site)
    return functools.reduce(both, found)


def _mask_of_data(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, place: int, site: str
) -> int:
    """Returns what a mask of integer or boolean inputs keeps, as codes 0 and 1."""
    v = e.inputs[place]
    if isinstance(x, Real) and x.input is not None and x.dtype:
        if not trace.is_real(v):
            return whole_numbers(builder, e, trace, x, v, "mask").value
        if (function := raw(builder, e, trace, x, v)) is None:
            raise ValueError(
                f"{at_start(x.source)} holds {x.dtype} and is made a mask of real "
                f"numbers, in {where(e)}.\n  equation: {e}\nThat is a table of at most "
                "16 bits: pass the mask with dtype bool, uint8, int8, uint16 or int16."
            )
        x = function
    if not trace.is_real(v):
        return mask(builder, e, trace, x, v)
    if isinstance(x, ScaledIntegers) and x.high - x.low >= 1 << 16:
        raise refuse(e, x, "mask")
    x = as_curve(builder, e, v, x)
    # 1 and 0 for what it adds, 0 and numbers that are large; -1 for all others.
    kind = lambda y: jnp.where(y == 0, 1, jnp.where(y <= -LARGE, 0, -1))
    table, *_ = tabulate(x, kind, builder.types)
    if np.any(table < 0):
        raise ValueError(
            f"The mask of the softmax in {where(e)} adds other numbers than 0 and what "
            f"is below {-LARGE:g}, for some integers of its input.\n  equation: {e}\n"
            "Pass the mask as truth values, of dtype bool."
        )
    finish = lambda y: (y > -LARGE / 2).astype(jnp.int32)
    return add_table(builder, x, finish, f"{site}/mask", dtype="int8")


def _norm(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    _check_rank(e, trace)
    call = NormCall.parse(e)
    unit, *own, scale, zero_point, qmin, qmax = (_known(e, v) for v in others)
    x = _codes(builder, e, trace, x, unit)
    if builder.target.is_tflite:
        known = scale, zero_point, qmin, qmax
        whole = tflite.l2_norm(builder, x, call, _site_grid(e, known))
        return _added(builder, e, *whole, known)
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
    added = integer_norm.added(call.epsilon / square, least, count, *kind)
    epsilon, floor, point, more = added
    gain, offset = (np.asarray(v).astype(np.float64) for v in call.affine(own))
    unit = np.float64(call.unit(count)) * integer_norm.power_of_two(-more, np)
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
    multiplier, bias, shift, bias_shift = integer_norm.scaled(gain, offset)
    site, rank = e.sites.output or where(e).strip("'"), len(shape)
    numbers = {
        role: _narrowed(value, rank)
        for role, value in (("multiplier", multiplier), ("bias", bias))
    }
    params = {
        role: builder.add_param(f"{site}/{role}", x) for role, x in numbers.items()
    }
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
        "shift": int(shift),
        "bias_shift": int(bias_shift),
        "zero_point": int(zero_point),
        "low": int(qmin),
        "high": int(qmax),
    }
    operands = Operands(attributes, [builder.values[x.value]], numbers)
    ends = OPERATIONS["norm"].interval(operands)
    attributes |= {"low": int(np.min(ends[0])), "high": int(np.max(ends[1]))}
    grid = scale, zero_point, qmin, qmax
    return _added(builder, e, "norm", [x.value], attributes, params, grid)


def _check_rank(e: Equation, trace: Trace) -> None:
    """Raises for a call inside of `jax.vmap`, whose axes are others."""
    rank, found = rank_of(e), len(trace.shape(e.inputs[0]))
    if rank != found:
        raise NotImplementedError(
            f"The {integer_of(e).partition('.')[0]} in {where(e)} is of values of "
            f"{rank} axes, and `jax.vmap` gives them {found}.\n  equation: {e}\nCall "
            "the layer on the whole batch, without `jax.vmap`: its axes may count from "
            "the last."
        )


def _divide(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    first, y, *rest = others
    unit, other, scale, zero_point, qmin, qmax = (_known(e, v) for v in (first, *rest))
    pair = (
        _codes(builder, e, trace, x, unit),
        _codes(builder, e, trace, y, other, 2),
    )
    for part in pair:
        ends = part.low - part.zero_point, part.high - part.zero_point
        if max(map(abs, ends)) >= MOST:
            raise ValueError(
                f"The quotient in {where(e)} is of codes up to {max(map(abs, ends))}, "
                f"which its 64 bits do not hold.\n  equation: {e}\nUse words of at "
                "most 16 bits for what it divides, and bound a count, as in "
                "`jnp.clip(count, 1, 1000)`."
            )
    ratio = np.float64(unit) / (np.float64(other) * np.float64(scale))
    multiplier, shift = fixed_point(ratio)
    attributes = {
        "zero_points": [part.zero_point for part in pair],
        "multiplier": int(multiplier),
        "shift": int(shift) + FRACTION_OF_DIVISION,
        "zero_point": int(zero_point),
        "low": int(qmin),
        "high": int(qmax),
    }
    grid, inputs = (scale, zero_point, qmin, qmax), [part.value for part in pair]
    return _added(builder, e, "divide", inputs, attributes, {}, grid)


def _codes(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, unit: Any, place: int = 0
) -> Integers:
    """Returns the codes that a call reads, on the grid that it knows of."""
    x = exact_codes(builder, e, trace, x, e.inputs[place])
    x = settled(builder, e, trace, x)
    is_plain = x.is_codes and not np.ndim(x.scale) and x.gain is None
    if not is_plain or np.float32(x.scale) != unit:
        raise refuse(e, x, "input")  # What a rescaling rounds is no half step.
    return x


def _site_grid(e: Equation, grid: tuple[Any, Any, Any, Any]) -> SiteGrid:
    scale, zero_point, qmin, qmax = grid
    site = e.sites.output or where(e).strip("'")
    return SiteGrid(float(scale), int(zero_point), int(qmin), int(qmax), site)


def _added(
    builder: Builder,
    e: Equation,
    operation: str,
    inputs: Sequence[int],
    attributes: Mapping[str, Any],
    params: Mapping[str, str],
    grid: tuple[Any, Any, Any, Any],
) -> tuple[Integers, ...]:
    """Returns the codes of a node on the grid of its site."""
    scale, zero_point, qmin, qmax = grid
    value = builder.add(
        operation,
        inputs,
        attributes,
        params=params,
        grid=Grid(float(scale), int(zero_point)),
        dtype=storage(int(qmin), int(qmax)),
        path=e.sites.output or where(e).strip("'"),
    )
    found = Integers(
        value=value,
        scale=np.asarray(np.float64(np.float32(scale))),
        zero_point=int(zero_point),
        low=builder.values[value].low,
        high=builder.values[value].high,
        is_codes=True,
        place=e.place,
    )
    return found, found  # The second, what does not saturate, is not read.


def _narrowed(x: np.ndarray, rank: int) -> np.ndarray:
    """Gives a constant a rank, and size 1 to axes along which it does not vary."""
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    for d in range(rank):
        first = x.take([0], d) if x.shape[d] else x
        x = first if np.all(x == first) else x
    return x


def _known(e: Equation, x: Abstract) -> Any:
    if isinstance(x, KnownCodes):  # Gain or offset of a layer, on a grid.
        scale = np.asarray(x.scale, np.float32)
        return (x.codes - x.zero_point).astype(np.float32) * scale
    if not isinstance(x, Known):
        raise ValueError(
            f"The {integer_of(e).partition('.')[0]} in {where(e)} has a grid or a mask "
            f"that depends on an input.\n  equation: {e}\nPass the mask as a constant."
        )
    return np.asarray(x.value)


# What a call computes in integers -> its rule.
NORMALISATIONS: Mapping[str, LoweringRule] = {
    **dict.fromkeys(SOFTMAXES, _softmax),
    "norm": _norm,
    "divide": _divide,
}
