"""Masks of softmaxes and of normalisations: what they keep, as codes 0 and 1."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.integer_calls import LARGE
from qjax.leaves import at_start
from qjax.lowering.constants import add_constant
from qjax.lowering.entries import raw
from qjax.lowering.evaluation import tabulate
from qjax.lowering.interpret import refuse, where
from qjax.lowering.rules.choices import mask
from qjax.lowering.rules.functions import add_table, as_curve
from qjax.lowering.rules.integer_nodes import narrowed
from qjax.lowering.rules.whole import whole_numbers
from qjax.lowering.values import Abstract, Builder, Known, Real, ScaledIntegers
from qjax.model.trace import Equation, Trace


def kept_codes(
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
        codes = narrowed(known.astype(np.int8), len(trace.shape(e.inputs[0])))
        options: Any = {"name": f"{site}/mask", "path": site, "dtype": "int8"}
        found.append(add_constant(builder, codes, None, **options))
    if not found:
        return None
    both = lambda a, b: builder.add("minimum", [a, b], {}, dtype="int8", path=site)
    return functools.reduce(both, found)


_REMEDY = (
    "Pass the mask as truth values, of dtype bool; or select by a comparison of it, "
    "`jnp.where(mask > 0, 0.0, -1e9)`."
)


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
                f"numbers, in {where(e)}.\n  equation: {e}\n" + _REMEDY
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
            f"is {-LARGE:g} or less, for some integers of its input.\n  equation: {e}\n"
            + _REMEDY
        )
    finish = lambda y: (y > -LARGE / 2).astype(jnp.int32)
    return add_table(builder, x, finish, f"{site}/mask", dtype="int8")
