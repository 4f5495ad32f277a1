"""Rules of softmaxes, whose integers the simulation computes as well."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Grid, storage
from qjax.integer import fixed_point
from qjax.integer_softmax import FRACTION, exp_tables, joined_table, most_places
from qjax.lowering.constants import add_constant
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.values import Abstract, Builder, Integers, Known
from qjax.model.exact import SoftmaxCall
from qjax.model.trace import Equation, Trace

_MOST_CODES = 1 << 16
_VANISHES = 22.0  # exp(-22) is below half of 2^-30.


def _softmax(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    call = SoftmaxCall.parse(e)
    unit, *keep, scale, zero_point, qmin, qmax = (_known(e, v) for v in others)
    x = settled(builder, e, trace, x)
    is_plain = x.is_codes and not np.ndim(x.scale) and x.gain is None
    if not is_plain or np.float32(x.scale) != unit or x.rescaled is not None:
        raise refuse(e, x, "input")
    if x.high - x.low >= _MOST_CODES:
        raise ValueError(
            f"The softmax in {where(e)} is over codes from {x.low} to {x.high}, more "
            f"than its table holds.\n  equation: {e}\nUse a word of at most 16 bits "
            f"for its input, {x.place.path!r}."
        )
    factor = np.float32(unit) * np.float32(call.factor)
    most = float(factor) * max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    if call.fill and -call.fill < 2 * most + _VANISHES:
        raise ValueError(
            f"The mask of the softmax in {where(e)} puts {call.fill:g} where its input "
            f"may be as large as {most:g}, so that what it masks still counts.\n"
            f"  equation: {e}\nUse a larger number: -1e9, or `-jnp.inf`."
        )
    places = math.prod(trace.shape(e.inputs[0])[d] for d in call.axes)
    table = joined_table(exp_tables(factor, places), x.high - x.low + 1)
    table = table[: int(np.flatnonzero(table)[-1]) + 2]  # What is farther is 0.
    multiplier, shift = fixed_point(2.0**-FRACTION / np.float64(scale))
    site = e.sites.output or where(e).strip("'")
    params = {"table": builder.add_param(f"{site}/table", table.astype(np.int32))}
    inputs = [x.value]
    if keep:
        options: Any = {"name": f"{site}/mask", "path": site, "dtype": "int8"}
        mask = _narrowed(keep[0].astype(np.int8), len(trace.shape(e.inputs[0])))
        inputs.append(add_constant(builder, mask, None, **options))
    ends = np.array([0, 1 << FRACTION]) * np.int64(multiplier)
    ends = ((ends + ((1 << int(shift)) >> 1)) >> int(shift)) + zero_point
    low, high = map(int, np.clip(ends, qmin, qmax))
    value = builder.add(
        "softmax",
        inputs,
        {
            "algorithm": "exp_table",
            "axes": list(call.axes),
            "most_places": most_places(places),
            "empty": call.empty,
            "multiplier": int(multiplier),
            "shift": int(shift),
            "zero_point": int(zero_point),
            "low": low,
            "high": high,
        },
        params=params,
        grid=Grid(float(scale), int(zero_point)),
        dtype=storage(int(qmin), int(qmax)),
        path=site,
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
    if not isinstance(x, Known):
        raise ValueError(
            f"The softmax in {where(e)} has a grid or a mask that depends on an input."
            f"\n  equation: {e}\nPass the mask as a constant."
        )
    return np.asarray(x.value)


# What a call computes in integers -> its rule.
NORMALISATIONS: Mapping[str, LoweringRule] = {"softmax": _softmax}
