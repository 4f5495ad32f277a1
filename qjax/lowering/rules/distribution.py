"""Elementwise equations of values that an operation joins: each part by itself.

A function of a concatenation is the concatenation of functions, and so for choices by a
mask and for pads, while the parts lie on grids of their own.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jax.extend.core.primitives import clamp_p

from qjax.graph.builder import compact
from qjax.lowering.constants import real_values
from qjax.lowering.interpret import LoweringRule
from qjax.lowering.rules.functions import as_curve
from qjax.lowering.values import Abstract, Builder, Curve, Joined, Known, KnownCodes
from qjax.model.primitives import POINTWISE, names
from qjax.model.trace import Equation, Trace, evaluate

_DISTRIBUTES = frozenset({"concatenate", "select", "pad"})
_KEEP = names("keep", "cast")


def distributed(rules: Mapping[str, LoweringRule]) -> dict[str, LoweringRule]:
    """Returns rules of which those of elementwise primitives take joined values."""
    return {k: _with_joined(r) if k in POINTWISE else r for k, r in rules.items()}


def _with_joined(rule: LoweringRule) -> LoweringRule:
    def apply(
        builder: Builder, e: Equation, trace: Trace, *operands: Abstract
    ) -> Abstract | tuple[Abstract, ...]:
        joined = [x for x in operands if isinstance(x, Joined)]
        if not joined or _waits(trace, e, operands):
            return rule(builder, e, trace, *operands)
        rows = _rows(trace, e, operands)
        if rows is None:
            return rule(builder, e, trace, *operands)
        first, parts, shapes = joined[0], [], []
        for k, row in enumerate(rows):
            found, shape = _part(builder, apply, e, trace, operands, row, k)
            parts.append(found)
            shapes.append(shape)
        fill = first.fill
        if first.operation == "pad":
            dtypes = (trace.avals[v].dtype for v in e.inputs)
            pairs = zip(map(_number, operands), dtypes, strict=True)
            fill = float(evaluate(e, *(np.asarray(n, d) for n, d in pairs))[0])
        return dataclasses.replace(
            first,
            parts=tuple(parts),
            shapes=tuple(shapes),
            bounds=(-np.inf, np.inf),
            place=e.place,
            fill=fill,
        )

    return apply


def _waits(trace: Trace, e: Equation, operands: tuple[Abstract, ...]) -> bool:
    """Returns whether a join takes an equation in without a function of its parts."""
    is_real = all(trace.is_real(v) for v in (*e.inputs, *e.outputs))
    if e.primitive.name in _KEEP:
        return is_real
    if e.primitive.name not in names("bound") or not is_real:
        return False
    rest = [x for x in operands if not isinstance(x, Joined)]
    numbers = [x for x in rest if isinstance(x, Known) and _is_number(x)]
    return len(numbers) == len(rest)


def _rows(
    trace: Trace, e: Equation, operands: tuple[Abstract, ...]
) -> list[tuple[Abstract, ...]] | None:
    """Returns the operands of each part; None where the parts do not stand apart."""
    joined = [x for x in operands if isinstance(x, Joined)]
    first = joined[0]
    form = first.operation, first.shapes, first.others, dict(first.attributes)
    forms = ((x.operation, x.shapes, x.others, dict(x.attributes)) for x in joined)
    if first.operation not in _DISTRIBUTES or any(own != form for own in forms):
        return None
    if first.shape != trace.shape(e.outputs[0]):
        return None
    columns = []
    for x in operands:
        if isinstance(x, Joined):
            columns.append(x.parts)
            continue
        if not isinstance(x, Known | KnownCodes):
            return None
        value = real_values(x) if isinstance(x, KnownCodes) else np.asarray(x.value)
        own = _split(first, compact(value))
        if own is None:
            return None
        columns.append(tuple(map(Known, own)))
    return [*zip(*columns, strict=True)]


def _split(x: Joined, value: np.ndarray) -> list[np.ndarray] | None:
    """Returns what each part has of a constant; None where a pad needs more of it."""
    if value.size == 1 or x.operation == "select":
        return [value] * len(x.parts)
    if x.operation == "pad":
        return None
    axis = int(x.attributes["axis"]) - len(x.shape)
    if value.ndim < -axis or value.shape[axis] == 1:
        return [value] * len(x.parts)
    sizes = [shape[axis] for shape in x.shapes]
    return np.split(value, np.cumsum(sizes)[:-1], axis)


def _part(
    builder: Builder,
    rule: LoweringRule,
    e: Equation,
    trace: Trace,
    operands: tuple[Abstract, ...],
    row: tuple[Abstract, ...],
    k: int,
) -> tuple[Abstract, tuple[int, ...]]:
    """Returns a function of one part, and its shape."""
    avals, own = dict(trace.avals), []
    shapes = []
    for v, whole, x in zip(e.inputs, operands, row, strict=True):
        if isinstance(whole, Joined):
            shapes.append(whole.shapes[k])
            avals[v] = avals[v].update(shape=shapes[-1])
            x = _bounded(builder, e, v, whole, x)
        own.append(x)
    shape = shapes[0]
    avals[e.outputs[0]] = avals[e.outputs[0]].update(shape=shape)
    inside = dataclasses.replace(trace, avals=avals)
    if all(isinstance(x, Known) for x in own):
        args = [
            np.broadcast_to(np.asarray(x.value, avals[v].dtype), shape)
            for x, v in zip(own, e.inputs, strict=True)
            if isinstance(x, Known)
        ]
        return Known(np.asarray(evaluate(e, *args)[0])), shape
    found = rule(builder, e, inside, *own)
    assert not isinstance(found, tuple)
    return found, shape


def _bounded(
    builder: Builder, e: Equation, v: int, whole: Joined, x: Abstract
) -> Abstract:
    """Returns a part behind the activation that waits at a join."""
    if not any(map(math.isfinite, whole.bounds)):
        return x
    if isinstance(x, Known):
        return Known(np.clip(x.value, *whole.bounds))
    if (v, id(x)) in builder.bounded:  # All readers share one function.
        return builder.bounded[v, id(x)][1]
    start, low, high, end = (max(builder.types) + 1 + k for k in range(4))
    builder.types |= dict.fromkeys((start, low, high, end), builder.types[v])
    before = as_curve(builder, e, start, x)
    known = {
        end_: np.asarray(bound, np.float32)
        for end_, bound in zip((low, high), whole.bounds, strict=True)
    }
    step = Equation(clamp_p, {}, (low, before.end, high), (end,), e.path)
    steps = {**before.steps, end: step}
    known |= before.known
    found = Curve(before.source, before.aliases, known, steps, end, place=e.place)
    builder.bounded[v, id(x)] = x, found
    return found


def _is_number(x: Known) -> bool:
    return x.value.size > 0 and bool(np.all(x.value == x.value.flat[0]))


def _number(x: Abstract) -> float:
    """Returns what an operand has around the part of a pad."""
    if isinstance(x, Joined):
        return float(np.clip(x.fill, *x.bounds))
    assert isinstance(x, Known | KnownCodes)  # `_rows` has seen to it.
    value = real_values(x) if isinstance(x, KnownCodes) else x.value
    return float(np.reshape(value, -1)[0])
