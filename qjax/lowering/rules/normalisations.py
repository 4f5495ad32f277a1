"""Rules of softmaxes and normalisations, whose integers the simulation computes too."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.record import Operands
from qjax.integer import fixed_point
from qjax.integer_calls import SoftmaxCall
from qjax.integer_division import FRACTION as FRACTION_OF_DIVISION
from qjax.integer_division import MOST
from qjax.integer_softmax import (
    FRACTION,
    LOG,
    exp_tables,
    joined_table,
    most_places,
)
from qjax.lowering.interpret import LoweringRule, where
from qjax.lowering.rules import tflite
from qjax.lowering.rules.integer_nodes import (
    added,
    check_rank,
    codes_of,
    known_of,
    site_grid_of,
)
from qjax.lowering.rules.kept import kept_codes
from qjax.lowering.rules.norms import NORMS
from qjax.lowering.values import Abstract, Builder, Integers
from qjax.model.masks import SOFTMAXES
from qjax.model.normalisations import said
from qjax.model.trace import Equation, Trace

_MOST_CODES = 1 << 16
_VANISHES = 22.0  # exp(-22) is below half of 2^-30.


def _softmax(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    check_rank(e, trace)
    call = SoftmaxCall.parse(e)
    first, *masks, last_scale, last_zero, least, most_code = others
    unit, scale = known_of(e, first), known_of(e, last_scale)
    zero_point, qmin, qmax = (known_of(e, v) for v in (last_zero, least, most_code))
    x = codes_of(builder, e, trace, x, unit)
    if builder.target.is_tflite:
        known = scale, zero_point, qmin, qmax
        whole = tflite.softmax(builder, x, call, site_grid_of(e, known), bool(masks))
        return added(builder, e, *whole, known)
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
    mask = kept_codes(builder, e, trace, masks, site)
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
    return added(builder, e, call.kind, inputs, attributes, params, grid)


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


def _divide(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    first, y, *rest = others
    unit, other, scale, zero_point, qmin, qmax = (
        known_of(e, v) for v in (first, *rest)
    )
    pair = (
        codes_of(builder, e, trace, x, unit),
        codes_of(builder, e, trace, y, other, 2),
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
    return added(builder, e, "divide", inputs, attributes, {}, grid)


# What a call computes in integers -> its rule.
NORMALISATIONS: Mapping[str, LoweringRule] = {
    **dict.fromkeys(SOFTMAXES, _softmax),
    **NORMS,
    "divide": _divide,
}
