"""Graphs of TFLite operators as integer programs that give its codes, bit for bit.

What reads a file describes it as `Tensor`s and `Operator`s; `build_tflite` makes the
program. The codes are those of TFLite's reference kernels. Weights and scales stay as
they are; what differs from native programs is how they round, which the nodes name.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qjax.integer import RequantizeRule
from qjax.lowering import tflite_moves, tflite_products, tflite_rules
from qjax.lowering.program import IntegerProgram, float_values
from qjax.lowering.tflite_graph import RULES, Call, Growth, Operator, Rules, Tensor
from qjax.lowering.validation import validate

# Importing them fills the rule table.
assert tflite_products and tflite_rules

__all__ = ("Operator", "Tensor", "build_tflite")


def build_tflite(
    tensors: Sequence[Tensor],
    operators: Sequence[Operator],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    rule: RequantizeRule = "tflite_double",
    dense_rule: RequantizeRule | None = None,
) -> IntegerProgram:
    """Builds the integer program of a TFLite graph.

    Args:
      tensors: All tensors.
      operators: In the order of their execution.
      inputs: Numbers of the input tensors. One of float32 must go to a ``QUANTIZE``
        and nowhere else; its codes become the input.
      outputs: Numbers of the output tensors, codes or what ``DEQUANTIZE`` makes of
        them.
      rule: How 32-bit accumulators are rescaled. ``tflite_double`` is what TFLite's
        reference kernels do, ``tflite_single`` what they do when built to round once.
        ``fp32_half_even`` is what XNNPACK does to products and, but for exact ties, to
        means; ``QUANTIZE`` has 8 bits then, and the rest stays as it is.
      dense_rule: The same for ``FULLY_CONNECTED`` alone, which LiteRT 2 rounds once;
        None for ``rule``.

    Returns:
      The program. Its sites are the tensors, under their names. Where an operator keeps
      the leading axis, its size may differ at call time.

    Raises:
      NotImplementedError: for an operator or an option that has no rule, by name.
      OverflowError: if an accumulator could leave int32.
      ValueError: if the graph contradicts itself.
    """
    is_xnnpack = rule == "fp32_half_even"
    integer: RequantizeRule = "tflite_double" if is_xnnpack else rule
    growth = Growth(tensors, Rules(integer, dense_rule or integer, is_xnnpack))
    for k in inputs:
        if tensors[k].dtype != "float32":
            growth.add_input(k, k)
    for op in operators:
        call = Call(op, growth)
        if _gives_shape(call):
            tflite_moves.fold(call)
        else:
            _add(call)
    missing = [tensors[k].name for k in inputs if k not in growth.inputs]
    if missing:
        raise NotImplementedError(
            f"The input {missing[0]!r} is float32 and goes to no QUANTIZE. Only the "
            "integer part of a graph can be built."
        )
    ends = tuple(growth.value(k) for k in outputs)
    graph = growth.builder.graph(tuple(growth.inputs[k] for k in inputs), ends)
    params = {name: jnp.asarray(p) for name, p in growth.builder.params.items()}
    trees = [(0,) * len(inputs), 0 if len(ends) == 1 else (0,) * len(ends)]
    program = IntegerProgram(graph, params, *map(jax.tree.structure, trees))
    validate(graph, params)
    found = float_values(program)
    assert not found, f"the integer program computes floating-point values: {found}"
    return program


def _gives_shape(call: Call) -> bool:
    """Whether an operator computes integers that are no codes."""
    outputs = [call.output(place) for place in range(len(call.op.outputs))]
    return all(not t.scale and t.dtype in ("int32", "int64") for t in outputs)


def _add(call: Call) -> None:
    name = call.op.name
    if name not in RULES:
        known = ", ".join(sorted(RULES))
        raise NotImplementedError(
            f"TFLite's {name} has no rule. Its output is {call.output().name!r}. Known "
            f"are {known}."
        )
    RULES[name](call)
