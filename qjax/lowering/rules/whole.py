"""Rules of whole numbers: places, lengths, tokens, which stand for themselves.

A function of one value of at most 16 bits is a lookup table; all else is arithmetic of
the graph, in the type that the model computes in.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from qjax.graph.builder import compact
from qjax.graph.operations.arithmetic import COMPARED, TYPES
from qjax.lowering.constants import add_constant
from qjax.lowering.entries import raw, wide_input
from qjax.lowering.inputs import MOST_RANGE, integer_range
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.functions import add_exact_table, add_table
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Known,
    KnownCodes,
    PendingAccumulator,
    Real,
)
from qjax.model.primitives import POINTWISE, names
from qjax.model.trace import Equation, Trace

_SAME = names("keep")
_KINDS = {
    "add_any": "add",
    "shift_left": "shift_left",
    "convert_element_type": "convert",
    **{name: name for name in "add sub mul div rem max min and or xor neg abs".split()},
    **{name: name for name in ("sign", "not", *COMPARED)},
    **{f"shift_right_{k}": f"shift_right_{k}" for k in ("arithmetic", "logical")},
}


def whole_numbers(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int, role: str
) -> Integers:
    """Returns whole numbers as integers in the graph.

    Args:
      builder: Receives them.
      e: The equation that reads them.
      trace: The program.
      x: The numbers.
      v: Their value in the trace.
      role: Role of the operand in the equation: "index".

    Raises:
      ValueError: for what has no integers, or for real values.
    """
    if isinstance(x, Known) and not trace.is_real(v):
        return _constant(builder, e, _short(np.asarray(x.value)))
    if isinstance(x, Real) and x.input is not None and x.dtype:
        x = _input(builder, e, trace, x, v)
    if isinstance(x, Curve) and not trace.is_real(v):
        path = where(e).strip("'")
        is_bool = trace.avals[v].dtype == np.bool_
        finish = lambda y: y.astype(jnp.int32)
        dtype = "int8" if is_bool else "int32"
        value = add_table(builder, x, finish, path, dtype=dtype)
        return builder.numbers(value, e.place, str(trace.avals[v].dtype))
    if isinstance(x, PendingAccumulator | Integers) and x.dtype:
        return settled(builder, e, trace, x)
    raise refuse(e, x, role)


def _input(
    builder: Builder, e: Equation, trace: Trace, x: Real, v: int
) -> Curve | Integers:
    """Returns an integer input with what was done to it."""
    found = raw(builder, e, trace, x, v)
    return replayed(builder, e, trace, x) if found is None else found


def replayed(builder: Builder, e: Equation, trace: Trace, x: Real) -> Curve | Integers:
    """Adds an input of more than 16 bits, and the arithmetic on it, to the graph.

    What follows a cast of few integers is a function of these.
    """
    assert x.input is not None
    start = wide_input(builder, e, trace, x)
    env: dict[int, Abstract] = {trace.inputs[x.input]: start}
    env |= {v: Known(np.asarray(n)) for v, n in x.known.items()}
    found = start
    for k, (v, step) in enumerate(x.steps.items()):
        rest = dict([*x.steps.items()][k:])
        own, before = step.inputs[0], env.get(step.inputs[0])
        is_cast = trace.is_real(v) and not trace.is_real(own) and len(rest) > 1
        if is_cast and isinstance(before, Integers):
            given = {u for s in rest.values() for u in s.inputs} - {*rest, *x.known}
            if given == {own} and before.high - before.low < MOST_RANGE:
                rank = len(trace.shape(e.outputs[0]))
                known = {u: np.reshape(n, (1,) * rank) for u, n in x.known.items()}
                end = [*rest][-1]
                return Curve(before, {own: before}, known, rest, end, place=e.place)
        found = _step(builder, step, trace, [env[u] for u in step.inputs])
        env[v] = found
    return found


_QUOTE = "'"


def _step(
    builder: Builder, e: Equation, trace: Trace, operands: Sequence[Abstract]
) -> Integers:
    """Adds one elementwise equation of whole numbers to the graph."""
    name = e.primitive.name
    if name in _SAME or e.primitive.name == "copy_p":
        (x,) = operands
        assert isinstance(x, Integers)
        return x
    if name == "select_n":
        return _selected(builder, e, trace, operands)
    pieces = [
        _constant(builder, e, _short(np.asarray(x.value)))
        if isinstance(x, Known)
        else x
        for x in operands
        if isinstance(x, Known | Integers)
    ]
    assert len(pieces) == len(operands)
    if name == "clamp":
        low, x, high = pieces
        bounded = _added(builder, e, trace, "max", [low, x])
        return _added(builder, e, trace, "min", [bounded, high])
    if name in ("square", "integer_pow") and e.params.get("y", 2) == 2:
        return _added(builder, e, trace, "mul", [*pieces, *pieces])
    if name not in _KINDS:
        raise NotImplementedError(
            f"There is no integer rule for `{name}` of whole numbers of more than 16 "
            f"bits, or of two values, met in {where(e)}.\n  equation: {e}\nCompute it "
            "outside of the program, or pass the input as uint8, int8, uint16 or int16."
        )
    return _added(builder, e, trace, _KINDS[name], pieces)


def _added(
    builder: Builder, e: Equation, trace: Trace, kind: str, parts: Sequence[Integers]
) -> Integers:
    """Adds arithmetic in the type of its operands."""
    before, after = (str(trace.avals[v].dtype) for v in (e.inputs[-1], e.outputs[0]))
    dtype = after if kind == "convert" else before
    if trace.is_real(e.outputs[0]):
        return _made_real(e, trace, parts[0])
    if dtype == "uint32" and _is_below_sign(kind, parts):
        dtype = "int32"
    if dtype not in TYPES or after not in (*TYPES, "uint32"):
        raise NotImplementedError(
            f"Integer programs compute in {', '.join(TYPES)}, not {dtype}, met in "
            f"{where(e)}.\n  equation: {e}\nUse int32, as in `x.astype(jnp.int32)`."
        )
    path, attributes = where(e).strip(_QUOTE), {"kind": kind, "dtype": dtype}
    inputs = [x.value for x in parts]
    value = builder.add("arithmetic", inputs, attributes, path=path)
    return builder.numbers(value, e.place, after)


def _is_below_sign(kind: str, parts: Sequence[Integers]) -> bool:
    """Returns whether arithmetic of uint32 is that of int32: nothing reaches 2^31."""
    ends = [(x.low, x.high) for x in parts]
    if min(low for low, _ in ends) < 0:
        return False
    if kind in ("add", "mul"):
        join = sum if kind == "add" else math.prod
        return join(high for _, high in ends) < 1 << 31
    if kind == "sub":
        return ends[0][0] >= ends[1][1]
    return kind not in ("neg", "not", "abs", "sign", "shift_left")


def _made_real(e: Equation, trace: Trace, x: Integers) -> Integers:
    """Returns whole numbers as codes in the unit of one."""
    digits = jnp.finfo(trace.avals[e.outputs[0]].dtype).nmant + 1
    if e.primitive.name != "convert_element_type":
        raise refuse(e, x, "operand")
    if max(abs(x.low), abs(x.high)) > 2**digits:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} makes real numbers of integers from "
            f"{x.low} to {x.high}, of which {trace.avals[e.outputs[0]].dtype} takes "
            f"several for one.\n  equation: {e}\nPass the input as uint8, int8, uint16 "
            "or int16, or bound it first, as in `jnp.clip(x, 0, 255)`."
        )
    return dataclasses.replace(x, dtype="", is_codes=True)


def _selected(
    builder: Builder, e: Equation, trace: Trace, operands: Sequence[Abstract]
) -> Integers:
    """Adds a selection among whole numbers."""
    like = next(x for x in operands if isinstance(x, Integers))
    shape = builder.values[like.value].shape
    inputs = []
    for x in operands:
        if isinstance(x, Known):
            x = _constant(builder, e, np.broadcast_to(x.value, shape), like)
        assert isinstance(x, Integers)
        inputs.append(x.value)
    value = builder.add("select", inputs, path=where(e).strip(_QUOTE))
    return builder.numbers(value, e.place, str(trace.avals[e.outputs[0]].dtype))


def _of_one_value(operands: Sequence[Abstract]) -> bool:
    """Returns whether one table, or thresholds of one accumulator, hold a function."""
    sources: set[int] = set()
    for x in operands:
        if isinstance(x, Known | KnownCodes):
            if sum(n > 1 for n in compact(np.asarray(_array(x))).shape) > 1:
                return False
            continue
        own = x.source if isinstance(x, Curve) else x
        if not isinstance(own, Integers | PendingAccumulator):
            return False
        is_wide = own.high - own.low >= MOST_RANGE or own.gain is not None
        if is_wide and not isinstance(x, Curve):
            return False
        sources.add(own.value if isinstance(own, Integers) else id(own))
    return len(sources) == 1


def _array(x: Known | KnownCodes) -> np.ndarray:
    return x.value if isinstance(x, Known) else x.codes


def with_whole(rule: LoweringRule) -> LoweringRule:
    """Returns the rule of an elementwise primitive, for whole numbers as well.

    Args:
      rule: Rule for real values, and for functions of one value of few integers.
    """

    def either(
        builder: Builder, e: Equation, trace: Trace, *operands: Abstract
    ) -> Abstract | tuple[Abstract, ...]:
        ends = (*e.inputs, *e.outputs[:1])
        is_truth = all(trace.avals[v].dtype == np.bool_ for v in ends)
        if any(map(trace.is_real, ends)) or _of_one_value(operands):
            return rule(builder, e, trace, *operands)
        if is_truth and e.primitive.name in ("and", "or"):
            return rule(builder, e, trace, *operands)
        own = [
            x
            if isinstance(x, Known)
            else whole_numbers(builder, e, trace, x, v, "operand")
            for v, x in zip(e.inputs, operands, strict=True)
        ]
        return _step(builder, e, trace, own)

    return either


def exact_codes(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int
) -> Abstract:
    """Returns a real function of whole numbers as codes of a grid that holds it.

    Args:
      builder: Receives the table.
      e: The equation that reads them.
      trace: The program.
      x: Any value.
      v: Its value in the trace.

    Returns:
      Codes, for a function of whole numbers with values on one grid; else ``x``.
    """
    if isinstance(x, Real) and x.input is not None and x.dtype and not x.is_plain:
        ends = integer_range(trace, x)
        if ends is not None and trace.is_real(v):
            x = _input(builder, e, trace, x, v)
    if not isinstance(x, Curve) or not trace.is_real(v):
        return x
    is_whole = _is_cast(trace, x)
    if not is_whole and not all(a.dtype for a in x.aliases.values()):
        return x
    path = where(e).strip(_QUOTE)
    codes = add_exact_table(builder, x, trace.shape(v), path)
    is_long = max(abs(x.source.low), abs(x.source.high)) > 1 << 24
    if codes is None and is_whole and x.source.dtype and is_long:
        _made_real(x.steps[x.end], trace, x.source)  # Raises.
        return x
    if codes is None and is_whole:  # Of an accumulator.
        value = add_table(
            builder, x, lambda y: y.astype(jnp.int32), path, dtype="int32"
        )
        own = builder.numbers(value, e.place)
        if max(abs(own.low), abs(own.high)) <= 1 << 24:
            codes = dataclasses.replace(own, dtype="", is_codes=True)
    return x if codes is None else dataclasses.replace(codes, bounded=x)


def _is_cast(trace: Trace, x: Curve) -> bool:
    """Returns whether a function ends at a cast of whole numbers."""
    e = x.steps.get(x.end)
    while e is not None and e.primitive.name in (*_SAME, "copy_p"):
        e = x.steps.get(e.inputs[0])
    if e is None or e.primitive.name != "convert_element_type":
        return False
    return not trace.is_real(e.inputs[0])


def joined_whole(
    builder: Builder, e: Equation, trace: Trace, parts: Sequence[Abstract]
) -> Integers:
    """Concatenates whole numbers."""
    own = list(zip(parts, e.inputs, strict=True))
    found: list[Integers | None] = [
        None
        if isinstance(x, Known)
        else whole_numbers(builder, e, trace, x, v, "operand")
        for x, v in own
    ]
    axis = int(e.params["dimension"])
    like = next((x for x in found if x is not None), None) if axis else None
    inputs = []
    for x, (part, _) in zip(found, own, strict=True):
        if x is None:
            assert isinstance(part, Known)
            x = _constant(builder, e, np.asarray(part.value), like)
        inputs.append(x.value)
    path = where(e).strip(_QUOTE)
    value = builder.add("concatenate", inputs, {"axis": axis}, path=path)
    return builder.numbers(value, e.place, str(trace.avals[e.outputs[0]].dtype))


def _constant(
    builder: Builder, e: Equation, x: np.ndarray, like: Integers | None = None
) -> Integers:
    """Adds known whole numbers, with the leading size of a value that has it."""
    own = None
    if like is not None and x.ndim:
        shape = builder.values[like.value].shape
        own = like.value if shape[:1] == x.shape[:1] else None
    name, path = f"{where(e).strip(_QUOTE)}/number", where(e).strip(_QUOTE)
    codes = x.astype(np.int64)
    value = add_constant(builder, codes, None, name=name, path=path, like=own)
    return builder.numbers(value, e.place, str(x.dtype))


def _short(x: np.ndarray) -> np.ndarray:
    """Returns numbers as short as arithmetic repeats them."""
    if x.size and np.all(x == x.flat[0]):
        return x.reshape(-1)[0].reshape(())
    return x[:1] if x.ndim and np.all(x == x[:1]) else x


def places_of(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, v: int, role: str
) -> Integers:
    """Returns places that a gather or a scatter reads, known ones as a constant."""
    if isinstance(x, Known):
        return _constant(builder, e, np.asarray(x.value))
    return whole_numbers(builder, e, trace, x, v, role)


def extended(rules: Mapping[str, LoweringRule]) -> dict[str, LoweringRule]:
    """Returns rules of which those of elementwise primitives take whole numbers."""
    return {k: with_whole(r) if k in POINTWISE else r for k, r in rules.items()}
