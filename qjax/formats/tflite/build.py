"""Graphs of TFLite operators as integer programs that give its codes, bit for bit.

A reader of files describes them as `Tensor`s and `Operator`s; `build_tflite` makes the
program. The codes are those of TFLite's reference kernels. Weights and scales stay as
they are; what differs from native programs is how they round, which the nodes name.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.tflite.ends import MOVES_OF_REALS, input_ends, with_codes
from qjax.formats.tflite.gathers import GATHERS
from qjax.formats.tflite.moves import MOVES, fold
from qjax.formats.tflite.products import PRODUCTS
from qjax.formats.tflite.recurrent import RECURRENT
from qjax.formats.tflite.rules import FUNCTIONS
from qjax.formats.tflite.sequences import drop_time, repeated, with_time
from qjax.formats.tflite.svdf import FILTERS
from qjax.formats.tflite.tensors import (
    Call,
    Growth,
    Operator,
    Rules,
    Tensor,
    TfliteRule,
)
from qjax.graph.graph import Graph
from qjax.graph.validation import validate
from qjax.integer import RequantizeRule
from qjax.lowering.sizes import Lowered, find_fixed
from qjax.model.trace import Trace
from qjax.program import IntegerProgram, float_values

__all__ = ("Operator", "Tensor", "build_tflite")

RULES: Mapping[str, TfliteRule] = {
    **FILTERS,
    **FUNCTIONS,
    **GATHERS,
    **MOVES,
    **PRODUCTS,
    **RECURRENT,
}


def build_tflite(
    tensors: Sequence[Tensor],
    operators: Sequence[Operator],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    rule: RequantizeRule = "tflite_double",
    dense_rule: RequantizeRule | None = None,
    steps: int | None = None,
) -> IntegerProgram:
    """Builds the integer program of a TFLite graph.

    Args:
      tensors: All tensors.
      operators: In the order of their execution.
      inputs: Numbers of the input tensors. One of float32 must go to ``QUANTIZE`` and
        nowhere else, perhaps moved before; its codes become the input, and a call with
        real numbers rounds them as the kernels do. One of int32 or int64 holds integers
        within 2^24, moved or indices: those of ``GATHER`` stay within its axis.
      outputs: Numbers of the output tensors, codes or what ``DEQUANTIZE`` makes of
        them, perhaps moved after; or integers.
      rule: Rescaling of 32-bit accumulators. ``tflite_double`` is what TFLite's
        reference kernels do, ``tflite_single`` what they do when built to round once.
        ``fp32_half_even`` is what XNNPACK does to products and, but for exact ties, to
        means; ``QUANTIZE`` has 8 bits then, and the rest stays as it is.
      dense_rule: The same for ``FULLY_CONNECTED`` alone, which LiteRT 2 rounds once;
        None for ``rule``.
      steps: Number of calls that the program computes, along axis 1 of its inputs and
        outputs; its `step` computes one. None for one call, without that axis.

    Returns:
      The program. Its sites are the tensors, under their names. States of LSTM and
      SVDF start from zeros, as TFLite's do after a reset, and stay from call to call.
      The leading size of an input may differ at call time where the operators are the
      same with another one, as TFLite has them for inputs that are resized; shapes that
      the file fixes have the batch as their leading size. Else calls with another one
      are refused. Whole numbers, of ``ARG_MAX`` or moved, are int32.

    Raises:
      NotImplementedError: for an operator or an option that has no rule, by name.
      OverflowError: if an accumulator could leave int32.
      ValueError: if the graph contradicts itself.
    """
    is_xnnpack = rule == "fp32_half_even"
    integer: RequantizeRule = "tflite_double" if is_xnnpack else rule
    rules = Rules(integer, dense_rule or integer, is_xnnpack)

    tensors = with_codes(tensors, operators, outputs)
    ends = input_ends(tensors, operators, inputs)
    file: list[Tensor] = []  # Once they are known.

    def grow(*shaped: Any) -> Lowered:
        shapes = {k: x.shape for k, x in zip(inputs, shaped, strict=True)}
        if steps is not None:
            shapes = {k: drop_time(shape) for k, shape in shapes.items()}
        growth = Growth(tensors, rules, shapes, file or None)
        states = () if steps is None else _states(tensors, operators)
        for k in states:
            growth.add_state(k)
        for k in inputs:
            if growth.tensors[k].dtype != "float32":
                growth.add_input(k, ends.get(k))
        grown = _grown(growth, operators, inputs, outputs)
        if steps is not None:
            grown = repeated(*grown, len(states), steps)
        file[:] = file or growth.tensors
        return Trace((), (), (), {}, {}), *grown

    sizes = [tensors[k].shape for k in inputs]
    if steps is not None:
        sizes = [with_time(s, steps) for s in sizes]
    given = tuple(jax.ShapeDtypeStruct(s, jnp.int32) for s in sizes)
    _, graph, arrays = found = grow(*given)
    values = list(graph.values)
    for k, (reason, is_of_one) in find_fixed(
        lambda xs: grow(*xs), given, found
    ).items():
        v = graph.inputs[k]
        known: Any = {"fixed_by": reason, "is_free_beyond_one": is_of_one}
        values[v] = dataclasses.replace(values[v], **known)
    graph = dataclasses.replace(graph, values=tuple(values))
    params = {name: jnp.asarray(p) for name, p in arrays.items()}
    count = len(graph.outputs)
    trees = [(0,) * len(inputs), 0 if count == 1 else (0,) * count]
    program = IntegerProgram(graph, params, *map(jax.tree.structure, trees))
    validate(graph, params)
    floats = float_values(program)
    assert not floats, f"the integer program computes floating-point values: {floats}"
    return program


def _grown(
    growth: Growth,
    operators: Sequence[Operator],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> tuple[Graph, dict[str, np.ndarray]]:
    """Returns the integer graph of the operators and its parameters."""
    for number, op in enumerate(operators):
        call = Call(op, growth)
        with _named(number, call):
            if _gives_shape(call):
                fold(call)
            else:
                _add(call)
    missing = [growth.tensors[k].name for k in inputs if k not in growth.inputs]
    if missing:
        raise NotImplementedError(
            f"The input {missing[0]!r} is float32 and goes to no QUANTIZE, not to it "
            "alone, or to two of different scales. Only the integer part of a graph "
            "can be built."
        )
    ends = [growth.value(k) for k in outputs]
    kept = [growth.kept.get(k, v) for k, v in growth.carried.items()]
    given = (*growth.carried.values(), *(growth.inputs[k] for k in inputs))
    graph = growth.builder.graph(given, (*kept, *ends))
    return graph, growth.builder.params


@contextlib.contextmanager
def _named(number: int, call: Call) -> Iterator[None]:
    """Puts the name of the operator before any error of its rule."""
    try:
        yield
    except Exception as error:
        kinds = (NotImplementedError, OverflowError)
        kind = next((k for k in kinds if isinstance(error, k)), ValueError)
        text = str(error) if kind in kinds or type(error) is ValueError else repr(error)
        name = call.output().name
        raise kind(
            f"Operator {number} ({call.op.name}, output {name!r}): {text}"
        ) from error


def _gives_shape(call: Call) -> bool:
    """Returns whether an operator computes integers from known ones, or a shape."""
    outputs = [call.output(place) for place in range(len(call.op.outputs))]
    if not all(t.is_number for t in outputs) or call.op.name in ("ARG_MAX", "ARG_MIN"):
        return False
    given = (k for k in call.op.inputs if k >= 0)
    return call.op.name == "SHAPE" or not any(map(call.growth.is_computed, given))


# Operators that take or give integers which are no codes.
_ON_NUMBERS = (
    *("ARG_MAX", "ARG_MIN", "CAST", "CONCATENATION", "EMBEDDING_LOOKUP", "EXPAND_DIMS"),
    *("GATHER", "MAXIMUM", "MINIMUM", "MIRROR_PAD", "PACK", "PAD", "REDUCE_MAX"),
    *("REDUCE_MIN", "RESHAPE", "SLICE", "SPLIT", "SPLIT_V", "SQUEEZE"),
    *("STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK"),
)
_ON_REALS = ("ARG_MAX", "ARG_MIN", "DEQUANTIZE", "QUANTIZE", *MOVES_OF_REALS)
_STATEFUL = (
    *("LSTM", "RNN"),
    *("UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_LSTM"),
    *("BIDIRECTIONAL_SEQUENCE_RNN", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"),
)


def _states(tensors: Sequence[Tensor], operators: Sequence[Operator]) -> list[int]:
    """Returns the tensors of codes that operators keep between calls."""
    kinds = [op for op in operators if op.name in (*FILTERS, *RECURRENT)]
    read = dict.fromkeys(k for op in kinds for k in op.inputs if k >= 0)
    return [k for k in read if tensors[k].is_variable and tensors[k].data is None]


def _add(call: Call) -> None:
    name = call.op.name
    if name in _STATEFUL:
        raise NotImplementedError(
            f"TFLite's {name} keeps a state between calls, which a program of inputs "
            "and outputs does not have, so it has no rule. Convert the model with "
            "UNIDIRECTIONAL_SEQUENCE_LSTM or SVDF, or with its steps unrolled."
        )
    if name not in RULES:
        known = ", ".join(sorted(RULES))
        raise NotImplementedError(
            f"TFLite's {name} has no rule. Its output is {call.output().name!r}. Known "
            f"are {known}."
        )
    inputs = [k for k in call.op.inputs if k >= 0]
    computed = [k for k in inputs if call.growth.is_computed(k)]
    ends = [call.growth.tensors[k] for k in (*computed, *call.op.outputs)]
    kinds = (
        ("integers", _ON_NUMBERS, [t.name for t in ends if t.is_number]),
        ("real numbers", _ON_REALS, [t.name for t in ends if t.is_real]),
    )
    for kind, own, names in kinds:
        if names and name not in own:
            known = ", ".join(sorted(own))
            raise call.refuse(f"{kind}, {names[0]!r},", f" Known are {known}.")
    RULES[name](call)
