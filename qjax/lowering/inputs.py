"""Follows an input of the program until it is quantized."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.graph.builder import compact
from qjax.lowering.values import Abstract, Known, Real
from qjax.model.primitives import POINTWISE, SHAPE_MOVES, names
from qjax.model.trace import Equation, Trace

MOST_RANGE = 1 << 16  # Most integers that are tried one by one.
_CASTS = names("cast")
_NEUTRAL = names("keep") - {"sharding_constraint"}


def is_place(trace: Trace, e: Equation, operands: Sequence[Abstract]) -> bool:
    """Returns whether an equation makes no real value of an input of the program."""
    return (
        any(isinstance(x, Real) for x in operands)
        and not trace.is_real(e.outputs[0])
        and e.primitive.name in POINTWISE | SHAPE_MOVES
    )


def follow(trace: Trace, e: Equation, operands: Sequence[Abstract]) -> Real:
    """Follows an integer input through an equation whose output is no real value.

    Args:
      trace: The program.
      e: A shape move, or an elementwise equation; one operand is `Real`.
      operands: Operands of the equation.

    Returns:
      The input with what was done to it. What is no function of one integer input is
      none of the inputs any more.
    """
    own = [x for x in operands if isinstance(x, Real)]
    name, first = e.primitive.name, own[0]
    lost = Real(f"`{name}` of {first.source}", first.remedy, is_left=first.is_left)
    if integer := next((x.dtype for x in own if x.dtype), ""):
        lost = dataclasses.replace(lost, dtype=integer)
    if first.input is None or integer_range(trace, first) is None:
        return lost
    others = [x for x in operands if not isinstance(x, Real)]
    same = all(x.input == first.input and x.moves == first.moves for x in own)
    if not same or not all(isinstance(x, Known) for x in others):
        return lost
    if name in _CASTS:
        return cast(trace, e, first)
    if name in SHAPE_MOVES:
        return moved(e, first)
    known = {}
    for v, x in zip(e.inputs, operands, strict=True):
        if isinstance(x, Known):
            number = compact(x.value)
            if number.size != 1:
                return lost
            known[v] = number.reshape(())
    steps: dict[int, Equation] = {}
    for x in own:
        steps.update(x.steps)
        known.update(x.known)
    steps[e.outputs[0]] = e
    return dataclasses.replace(first, steps=steps, known=known, is_plain=False)


def moved(e: Equation, x: Real) -> Real:
    """Returns an input after a shape move.

    Raises:
      ValueError: for a pad with zeros of what has been shifted: they need a code.
    """
    if e.primitive.name == "pad" and (not x.is_plain or x.rescaling[1]):
        raise refuse_pad(e, x)  # Zero is no zero any more.
    kept = e.primitive.name in _NEUTRAL
    moves = x.moves if kept else (*x.moves, e)
    same = Equation(copy_p, {}, e.inputs[:1], e.outputs[:1], e.path)
    return dataclasses.replace(x, moves=moves, steps={**x.steps, e.outputs[0]: same})


def cast(trace: Trace, e: Equation, x: Real) -> Real:
    """Returns an input after a cast to another type.

    Raises:
      NotImplementedError: if a real input would be rounded by it.
    """
    ends = integer_range(trace, x)
    if ends is None:
        if _keeps_reals(trace, e):
            return x
        raise NotImplementedError(
            f"`{e.primitive.name}` rounds {x.source} before it is quantized.\n"
            f"  equation: {e}\nRound it outside of the program, or quantize it first."
        )
    steps = {**x.steps, e.outputs[0]: e}
    # A value in another unit is no integer any more, and a cast cuts it.
    is_itself = x.rescaling == (1.0, 0.0) or trace.is_real(e.outputs[0])
    is_plain = x.is_plain and is_itself and _keeps(trace, e, ends)
    return dataclasses.replace(x, steps=steps, is_plain=is_plain)


def rescaled(
    e: Equation,
    x: Real,
    known: Mapping[int, np.ndarray],
    rescaling: tuple[float, float],
    is_exact: bool,
) -> Real:
    """Returns an input after a rescaling to another unit.

    Args:
      e: The equation.
      x: The input so far.
      known: Value of the trace -> the number that it is.
      rescaling: Gain and offset of all so far.
      is_exact: Whether they round as the equations do.

    Raises:
      ValueError: for an offset after a pad, or a factor of 0.
    """
    if not rescaling[0]:
        raise ValueError(
            f"`{e.primitive.name}` in {e.path or 'the traced function'!r}: {x.source} "
            f"is multiplied by 0, which leaves nothing of it.\n  equation: {e}\nWrite "
            "`jnp.zeros_like(x)` in its place, or leave this input out."
        )
    if rescaling[1] and any(m.primitive.name == "pad" for m in x.moves):
        raise refuse_pad(e, x)
    found = dataclasses.replace(x, rescaling=rescaling, is_exact=is_exact)
    if not x.steps:
        return found
    numbers = {v: number for v, number in known.items() if v not in x.steps}
    steps = {**x.steps, e.outputs[0]: e}
    return dataclasses.replace(found, steps=steps, known={**x.known, **numbers})


def refuse_pad(e: Equation, x: Real) -> ValueError:
    """Returns the error for an input that is padded before it is quantized."""
    return ValueError(
        f"`{e.primitive.name}` in {e.path or 'the traced function'!r}: {x.source} is "
        f"padded before it is quantized, with what needs a code of its own: a number "
        f"that is not zero, or zeros beside an offset.\n  equation: {e}\nQuantize the "
        "input before it is padded."
    )


def integer_range(trace: Trace, x: Real) -> tuple[int, int] | None:
    """Returns the least and the largest number of an integer input; None if real."""
    assert x.input is not None
    dtype = trace.avals[trace.inputs[x.input]].dtype
    if dtype == np.bool_:
        return 0, 1
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    return int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)


def _keeps(trace: Trace, e: Equation, ends: tuple[int, int]) -> bool:
    """Returns whether a cast keeps all integers of a range, or makes them float32."""
    dtype = trace.avals[e.outputs[0]].dtype
    if e.primitive.name == "reduce_precision":
        return False
    if ends[1] - ends[0] >= MOST_RANGE:
        if jnp.issubdtype(dtype, jnp.integer):
            info = jnp.iinfo(dtype)
            return bool(info.min <= ends[0] and ends[1] <= info.max)
        return dtype in (np.float32, np.float64)
    numbers = np.arange(ends[0], ends[1] + 1)
    other = np.asarray(jnp.asarray(numbers).astype(dtype)).astype(np.float64)
    return bool(np.array_equal(other, numbers))


def _keeps_reals(trace: Trace, e: Equation) -> bool:
    """Returns whether a cast rounds no real number, except to float32."""
    before, after = (trace.avals[v].dtype for v in (e.inputs[0], e.outputs[0]))
    if e.primitive.name == "reduce_precision":
        bits = e.params["exponent_bits"], e.params["mantissa_bits"]
        return bits[0] >= 8 and bits[1] >= 23 and before == np.float32
    return before == after or after in (np.float32, np.float64)
