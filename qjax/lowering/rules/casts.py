"""Rules of casts, and of what keeps every value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, dequantize
from qjax.lowering.inputs import cast, moved
from qjax.lowering.interpret import LoweringRule, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.functions import curve
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Joined,
    KnownCodes,
    Real,
    ScaledIntegers,
    Sum,
)
from qjax.model.trace import Equation, Trace, evaluate


def _same(
    builder: Builder, e: Equation, trace: Trace, *xs: Abstract
) -> tuple[Abstract, ...]:
    return tuple(
        moved(e, x) if isinstance(x, Real) and x.input is not None else x for x in xs
    )


def _convert(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    """Casts a value; a cast that keeps every possible value does nothing."""
    before, dtype = (trace.avals[v].dtype for v in (e.inputs[0], e.outputs[0]))
    if isinstance(x, Curve):
        end = e.outputs[0]
        return dataclasses.replace(x, steps={**x.steps, end: e}, end=end)
    if isinstance(x, Real):
        return x if x.input is None else cast(trace, e, x)
    is_cast = e.primitive.name == "convert_element_type"
    if is_cast and trace.is_real(e.inputs[0]) and dtype in (before, *_WIDE):
        return x
    if isinstance(x, KnownCodes) and _keeps_weight(e, x):
        return x
    if isinstance(x, ScaledIntegers) and (x.is_of_codes or is_cast):
        if x.dtype and is_cast and _keeps_range(x, dtype):
            if not trace.is_real(e.outputs[0]):
                return dataclasses.replace(x, dtype=str(dtype))
            x = settled(builder, e, trace, x)
            return dataclasses.replace(x, dtype="", is_codes=True)
        found = curve(builder, e, trace, x)
        assert found is not None
        return found
    if isinstance(x, ScaledIntegers | Sum | Joined) and not is_cast:
        bits = e.params["exponent_bits"], e.params["mantissa_bits"]
        if bits[0] >= 8 and bits[1] >= 23:
            return x
    raise NotImplementedError(
        f"There is no integer rule for `{e.primitive.name}` to {dtype} of a value that "
        f"is no codes, met in {where(e)}.\n  equation: {e}\nQuantize it first, or "
        "compute this part of the model in float32."
    )


_WIDE = (np.dtype("float32"), np.dtype("float64"))


def _keeps_range(x: ScaledIntegers, dtype: Any) -> bool:
    """Returns whether a type holds all integers in the range of a value."""
    if jnp.issubdtype(dtype, jnp.floating):
        digits = jnp.finfo(dtype).nmant + 1
        return max(abs(x.low), abs(x.high)) <= 2**digits
    if dtype == np.bool_:
        return x.low >= 0 and x.high <= 1
    info = jnp.iinfo(dtype)
    return bool(info.min <= x.low and x.high <= info.max)


def _keeps_weight(e: Equation, x: KnownCodes) -> bool:
    """Returns whether a cast keeps every value of a weight."""
    grid = QParams(jnp.asarray(x.scale), jnp.asarray(x.zero_point))
    real = dequantize(jnp.asarray(x.codes.astype(np.int32)), grid)
    other = np.asarray(evaluate(e, real)[0]).astype(np.float64)
    return bool(np.array_equal(other, np.asarray(real, np.float64)))


# Primitive -> its rule.
CASTS: Mapping[str, LoweringRule] = {
    "stop_gradient": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _same,
    "convert_element_type": _convert,
    "reduce_precision": _convert,
}
