"""Rules of loops: one graph of a step, on grids that do not change."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Grid, storage
from qjax.graph.operations.arithmetic import TYPES, ends_of
from qjax.integer_calls import BEGIN
from qjax.lowering import tflite_forms
from qjax.lowering.constants import add_constant, codes_on, real_values
from qjax.lowering.folding import fold_known
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.loops import Body, body_trace
from qjax.lowering.operands import settled
from qjax.lowering.rules.whole import whole_numbers
from qjax.lowering.site_grids import SiteGrid
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    Known,
    KnownCodes,
    PendingAccumulator,
    Sum,
)
from qjax.model.expansions import MOST_STEPS
from qjax.model.loops import ScanParts, has_point, scan_parts
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.trace import Equation, Trace
from qjax.qpoint import qpoint_p


def _scan(
    builder: Builder, e: Equation, trace: Trace, *operands: Abstract
) -> tuple[Abstract, ...]:
    """Lowers a loop to one operation, which runs the graph of its body.

    What is carried has the grid of the quantization point at its end: the first value
    is on it, or zero.
    """
    parts = scan_parts(e)
    if builder.target.is_tflite:
        lack = tflite_forms.lack_of_operator("loop")
        raise tflite_forms.refuse(where(e).strip("'"), *lack)
    if not has_point(e):
        raise NotImplementedError(
            f"There is no integer rule for a `scan` without quantization points in its "
            f"steps, met in {where(e)}.\n  equation: {e}\nScans of at most "
            f"{MOST_STEPS} steps are unrolled, this one has {parts.length}: "
            "quantize what a step carries with `qjax.fake_quant`, or shorten it."
        )
    known = {
        k: _array(x)
        for k, x in enumerate(operands)
        if k < parts.consts and isinstance(x, Known | KnownCodes)
    }
    body = body_trace(e, known)
    body = body._replace(trace=builder.prepared(body.trace))
    child = builder.inside(e.outputs[0])
    grids = _grids(body, parts, fold_known(body.trace, child.folded))
    given: dict[int, Abstract] = {
        v: operands[k]
        for k, v in body.constants.items()
        if isinstance(operands[k], KnownCodes)
    }
    on = lambda k: grids[k - parts.consts] if parts.is_carry(k) else None
    before: dict[int, Integers] = {}
    # Data first, which has the examples that constants are repeated for.
    is_known = lambda k: isinstance(operands[k], Known | KnownCodes)
    for k in sorted(body.given, key=is_known):
        options: Any = {"grid": on(k), "is_step": parts.is_step(k)}
        before[k] = _operand(builder, e, trace, operands[k], e.inputs[k], **options)
    inputs: list[int] = []
    for k, v in zip(body.given, body.trace.inputs, strict=True):
        shape = trace.shape(e.inputs[k])
        own, given[v] = _inside(child, e, shape, before[k], parts, k, on(k))
        child.inputs[len(inputs)] = own
        inputs.append(own)
    made = builder.interpreted(body.trace, child, given)
    graph, ends = _graph(child, body, e, parts, inputs, made)
    attributes = {
        "consts": sum(k < parts.consts for k in body.given),
        "carries": parts.carries,
        "length": None
        if len(operands) > parts.consts + parts.carries
        else parts.length,
        "is_reversed": parts.is_reversed,
    }
    path = where(e).strip("'")
    values = builder.add_loop(
        [before[k].value for k in body.given], graph, attributes, path=path
    )
    builder.taken |= {*child.sites, *child.taken}
    return tuple(_outside(builder, v, x) for v, x in zip(values, ends, strict=True))


def _array(x: Known | KnownCodes) -> np.ndarray:
    return np.asarray(x.value) if isinstance(x, Known) else real_values(x)


def _grids(
    body: Body, parts: ScanParts, known: Mapping[int, Any]
) -> list[SiteGrid | None]:
    """Returns the grid at the end of each carry; None for whole numbers."""
    makers = {v: step for step in body.trace.equations for v in step.outputs}
    found: list[SiteGrid | None] = []
    for k, v in enumerate(body.trace.outputs[: parts.carries]):
        if not body.trace.is_real(v):
            found.append(None)
            continue
        step = makers.get(v)
        while step is not None and step.primitive.name in SHAPE_MOVES:
            step = makers.get(step.inputs[0])
        if step is None or step.primitive is not qpoint_p:
            raise ValueError(_NO_GRID.format(k))
        numbers = [np.asarray(known[u]) for u in step.inputs[1:] if u in known]
        if len(numbers) < 4 or any(n.size != 1 for n in numbers):
            raise ValueError(_MANY.format(k, step.params["site"]))
        scale, zero_point, low, high = (n.reshape(()) for n in numbers)
        ends, site = (int(low), int(high)), step.params["site"]
        word = int(zero_point), *ends
        found.append(SiteGrid(float(scale), *word, site, is_part=True))
    return found


_NO_GRID = (
    "What a loop carries at {0} is on no grid at the end of a step, so that the next "
    "step has no codes. Quantize it there: a rule of the scheme, or `qjax.fake_quant` "
    "in a loop of your own."
)
_STACKED = (
    "A loop of {0} steps reads other weights in each step, met in {1}.\n  equation: "
    "{2}\nSuch loops are unrolled, up to {3} steps. Split it into loops of at most "
    "{3}, or choose the weights in the step by its number, `w[n]` with "
    "`jnp.arange({0})` among what is scanned: they have one scale then."
)
_MANY = (
    "What a loop carries at {0} has no single scale, at {1!r}. Use one scale, "
    'Rule("{1}", QSpec(bits=8)).'
)


def _operand(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    v: int,
    *,
    grid: SiteGrid | None,
    is_step: bool,
) -> Integers:
    """Returns an operand of a loop as integers of the graph."""
    if isinstance(x, Known | KnownCodes) and (grid is not None or not trace.is_real(v)):
        return _constant(builder, e, trace, x, v, grid=grid, is_step=is_step)
    if not trace.is_real(v):
        return whole_numbers(builder, e, trace, x, v, "operand")
    if is_step and isinstance(x, Known | KnownCodes):
        length = scan_parts(e).length
        raise ValueError(_STACKED.format(length, where(e), e, MOST_STEPS))
    if isinstance(x, Integers | PendingAccumulator | Sum):
        x = settled(builder, e, trace, x)
    if not isinstance(x, Integers) or not x.is_of_codes or x.gain is not None:
        raise refuse(e, x, "operand")
    if x.rescaled is not None or np.ndim(x.scale):
        raise refuse(e, x, "operand")
    if grid is None:
        return x
    if x.scale != np.float32(grid.scale) or x.zero_point != grid.zero_point:
        raise _refuse_start(e, grid)
    return x


def _refuse_start(e: Equation, grid: SiteGrid) -> ValueError:
    return ValueError(
        f"What a loop carries to {grid.site!r} starts on another grid, in "
        f"{where(e)}.\n  equation: {e}\nQuantize the first value as `qjax."
        "quantize_model` does: to the grid that it has after each step."
    )


def _constant(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Known | KnownCodes,
    v: int,
    *,
    grid: SiteGrid | None,
    is_step: bool,
) -> Integers:
    """Adds a known operand, in the examples of another one."""
    shape, array = trace.shape(v), _array(x)
    is_same = not is_step or not shape or bool(np.all(array == array[:1]))
    like = alike(builder, shape) if is_same else None
    own: dict[str, Any] = {"like": like, "path": where(e).strip("'")}
    if grid is None:
        numbers = np.broadcast_to(array, shape).astype(np.int64)
        name = f"{own['path']}/number"
        value = add_constant(builder, numbers, None, name=name, **own)
        return builder.numbers(value, e.place, str(trace.avals[v].dtype))
    codes = codes_on(np.asarray(array), grid.scale, grid.zero_point)
    if codes is None or not np.all((grid.qmin <= codes) & (codes <= grid.qmax)):
        raise _refuse_start(e, grid)
    codes = np.broadcast_to(codes, shape)
    own |= {"name": f"{grid.site}/start", "path": f"{grid.site}/start"}
    own |= {"dtype": grid.dtype}
    return grid.integers(builder, add_constant(builder, codes, grid.grid, **own))


def alike(builder: Builder, shape: tuple[int, ...]) -> int | None:
    """Returns an input of the graph that has as many examples; None if none has.

    Args:
      builder: Has the inputs.
      shape: Shape of a value with an axis of examples, the first.
    """
    found = builder.inputs.values()
    same = (u for u in found if builder.values[u].shape[:1] == shape[:1])
    return next(same, None) if shape else None


def _inside(
    child: Builder,
    e: Equation,
    shape: tuple[int, ...],
    x: Integers,
    parts: ScanParts,
    k: int,
    grid: SiteGrid | None,
) -> tuple[int, Integers]:
    """Adds an input of the body, which stands for an operand in each step."""
    shape = shape[1:] if parts.is_step(k) else shape
    if grid is not None:
        value = child.add_value(
            shape, grid.qmin, grid.qmax, grid.grid, dtype=grid.dtype
        )
        return value, grid.integers(child, value)
    if x.dtype:
        if x.dtype not in TYPES:
            raise NotImplementedError(
                f"Integer programs compute in {', '.join(TYPES)}, and a loop has "
                f"{x.dtype}, met in {where(e)}.\n  equation: {e}\nCount in int32: "
                "start with `jnp.int32(0)`, and give such bounds to a `fori_loop`."
            )
        ends = (x.low, x.high)
        if parts.is_carry(k):
            ends = ends_of(x.dtype)
        value = child.add_value(shape, *ends, dtype="int32")
        return value, child.numbers(value, x.place, x.dtype)
    scale = Grid(float(np.float32(x.scale)), x.zero_point)
    dtype = storage(min(x.low, x.zero_point), max(x.high, x.zero_point))
    value = child.add_value(shape, x.low, x.high, scale, dtype=dtype)
    return value, x.elsewhere(value)


def _graph(
    child: Builder,
    body: Body,
    e: Equation,
    parts: ScanParts,
    inputs: Sequence[int],
    made: Sequence[Abstract],
) -> tuple[Graph, list[Integers]]:
    """Returns the graph of a step, and what its outputs mean."""
    ends = []
    for v, x in zip(body.trace.outputs, made, strict=True):
        if not body.trace.is_real(v):
            own = whole_numbers(child, e, body.trace, x, v, "result")
        else:
            own = x if isinstance(x, Integers) else settled(child, e, body.trace, x)
            if not own.is_codes or own.gain is not None or np.ndim(own.scale):
                raise refuse(e, own, "result")
            own = settled(child, e, body.trace, own)
            grid = Grid(float(np.float32(own.scale)), own.zero_point)
            if child.values[own.value].grid != grid:
                raise refuse(e, own, "result")
        ends.append(own)
    outputs = tuple(x.value for x in ends)
    graph = child.graph(tuple(inputs), outputs)
    return dataclasses.replace(graph, grids={}), ends  # The whole program has them.


def _outside(builder: Builder, v: int, x: Integers) -> Integers:
    """Returns what a loop leaves, as its step has it."""
    own = builder.values[v]
    return x.elsewhere(v, low=own.low, high=own.high, place=x.place)


def _begin(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *known: Known
) -> Integers:
    """Adds the first value of a loop in steps, whose grid is known."""
    v = e.inputs[0]
    if not isinstance(x, KnownCodes | Known):
        assert isinstance(x, Integers)
        return x
    scale, zero_point = (np.asarray(own.value).reshape(()) for own in known)
    site = x.site if isinstance(x, KnownCodes) else where(e).strip("'")
    codes = np.rint(_array(x) / scale).astype(np.int64) + int(zero_point)
    ends = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    grid = SiteGrid(float(scale), int(zero_point), *ends, site, is_part=True)
    return _constant(builder, e, trace, x, v, grid=grid, is_step=False)


# Primitive, or call -> its rule.
LOOPS: Mapping[str, LoweringRule] = {"scan": _scan, BEGIN: _begin}
