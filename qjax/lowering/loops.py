"""Bodies of loops: what a step computes, with what is known as constants."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from qjax.model.loops import scan_parts
from qjax.model.trace import Equation, Trace, trace


class Body(NamedTuple):
    """The body of a loop.

    Attributes:
      trace: A step. Its inputs are those operands that are not known.
      given: Numbers of these operands, in order.
      constants: Number of a known operand -> its value in the trace.
    """

    trace: Trace
    given: tuple[int, ...]
    constants: Mapping[int, int]


def body_trace(e: Equation, known: Mapping[int, Any]) -> Body:
    """Traces a step of a loop.

    Args:
      e: A scan whose steps have quantization points.
      known: Number of an operand that is the same in all steps, and known -> its array.

    Returns:
      The body.
    """
    parts = scan_parts(e)
    closed = parts.body
    run = jex.jaxpr_as_fun(closed)
    arrays = {k: np.asarray(x) for k, x in known.items()}
    traced, _ = trace(run, *closed.in_avals, keep_derivatives=False, known=arrays)
    given = tuple(k for k in range(len(traced.inputs)) if k not in known)
    constants = {k: traced.inputs[k] for k in known}
    own = dataclasses.replace(
        traced,
        is_step=True,
        inputs=tuple(traced.inputs[k] for k in given),
        names=tuple(f"operand {k} of a loop" for k in given),
    )
    return Body(own, given, constants)
