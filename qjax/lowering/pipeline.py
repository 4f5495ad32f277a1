"""The way from a traced model to its integer program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.graph.graph import Graph
from qjax.graph.passes import drop_dead, merge_equal
from qjax.leaves import at_start
from qjax.lowering.binding import Bound, bind
from qjax.lowering.interpret import InputTwiceError, interpret
from qjax.lowering.outputs import add_output
from qjax.lowering.precision import find_half
from qjax.lowering.rules import RULES
from qjax.lowering.rules.tflite import check_tflite
from qjax.lowering.sizes import Lowered, find_fixed
from qjax.lowering.values import Abstract, Builder, Integers
from qjax.model.blocks import data_of
from qjax.model.folding import fold_normalisations
from qjax.model.masked_exponentials import masked_behind
from qjax.model.places import BlockSites
from qjax.model.trace import Equation, Trace, trace
from qjax.program import IntegerProgram, Residue, check_integer_only
from qjax.targets import Target, half_even


def lower(
    model: Any,
    *args: Any,
    strict: bool = True,
    streaming: Mapping[int, int] | None = None,
    target: Target = half_even,
) -> IntegerProgram:
    """Lowers a quantized model to a program of integers only.

    Traces the model, walks the traced program once and replaces what lies between two
    quantization points by integer operations: int8 products with int32 accumulators,
    and a requantizer in which bias, BatchNorm and activation are folded.

    Args:
      model: A `QuantizedModel`; or any function of real inputs that has quantization
        points in it and its parameters closed over. Any other object whose method
        ``bind(*args)`` returns a `qjax.lowering.Bound` is taken as well.
      *args: ``params, qstate, *inputs`` for a `QuantizedModel`, else ``*inputs``. Of
        the inputs only shapes are read. The size of the leading axis may differ when
        the program is called if the model lowers to the same program with another one,
        which is tried here; else it is fixed.
      strict: Whether what has no integers raises. If not, the ``residues`` of the
        program list it, each with its equation, its module path and the quantizer that
        would remove it.
      streaming: Number of an input -> its axis of time. The program has `step` then,
        which computes one time after the other, with the codes of whole sequences.
      target: Roundings and algorithms of the program, such as `qjax.targets.tflite`:
        then each operation is what LiteRT's reference kernels compute.

    Returns:
      The program. A checker has made sure that no floating-point value occurs in it.
      Of a `QuantizedModel` in half precision it is the program of the float32 form,
      float32 at its ends, and ``notes`` say so.

    Raises:
      ValueError: if a site is not calibrated, an operand is not quantized, or no
        activation has a grid.
      OverflowError: if an accumulator could leave its ``buffer_bits``, int32 by
        default; names the input that does it.
      NotImplementedError: for an operation without an integer rule; for a function in
        half precision; for what the target has no exact operator for.
    """
    try:
        return _lower(model, args, strict, streaming or {}, target)
    except (ValueError, NotImplementedError) as error:
        # A reader of files knows what its caller can do.
        advise = getattr(model, "advise", None)
        if advise is None or type(error) not in (ValueError, NotImplementedError):
            raise
        raise type(error)(advise(str(error))) from error


def _lower(
    model: Any,
    args: tuple[Any, ...],
    strict: bool,
    streaming: Mapping[int, int],
    target: Target,
) -> IntegerProgram:
    bound = bind(model, args)
    if target.is_tflite and bound.by_grids is not None:
        bound = dataclasses.replace(bound, fn=bound.by_grids)
    if strict and bound.refusal:
        raise ValueError(bound.refusal)
    example = jax.tree.map(_with_example, bound.inputs)
    traced, out = _traced(bound, example)
    notes = _notes(bound.half_types(*example))
    half = find_half(traced, traced.inputs, is_model=bound.blocks is not None)
    if half is not None and strict:
        raise NotImplementedError(half.message)
    if half is not None:
        return _partial(Builder(bound.buffer_bits, is_open=True), [], [half], notes)
    try:
        builder, outputs, residues = _interpreted(traced, bound, strict, target)
    except (NotImplementedError, OverflowError, ValueError) as error:
        error.args = (str(error) + _others(traced, bound, target), *error.args[1:])
        raise
    if residues:
        return _partial(builder, outputs, residues, notes)
    graph = _whole(builder, outputs, traced)

    def lower_again(other: tuple[Any, ...]) -> Lowered:
        again, _ = _traced(bound, other)
        own, ends, _ = _interpreted(again, bound, True, target)
        return again, _whole(own, ends, again), own.params

    fixed = find_fixed(lower_again, example, (traced, graph, builder.params))
    values = list(graph.values)
    shapes = [np.shape(x) for x in jax.tree.leaves(bound.inputs)]
    for k, (reason, is_of_one) in fixed.items():
        if shapes[k][0] == 0:
            name = at_start(traced.names[k])
            raise ValueError(
                f"{name} has shape {shapes[k]}: no example, and its leading "
                f"size is fixed by {reason}.\nLower the model for the size "
                "that it is called with."
            )
        v = graph.inputs[k]
        sizes: Any = {"fixed_by": reason, "is_free_beyond_one": is_of_one}
        values[v] = dataclasses.replace(values[v], **sizes)
    for k, axis in streaming.items():
        _check_time(traced, graph.inputs, k, axis)
        v = graph.inputs[k]
        axis %= len(values[v].shape)
        values[v] = dataclasses.replace(values[v], time_axis=axis)
    graph = dataclasses.replace(graph, values=tuple(values))
    graph, params = drop_dead(graph, _arrays(builder))
    if target.is_tflite:
        check_tflite(graph, builder.params)
    trees = jax.tree.structure(tuple(bound.inputs)), jax.tree.structure(out)
    notes = (*notes, *builder.notes)
    program = IntegerProgram(graph, params, *trees, notes=notes)
    check_integer_only(program)
    if streaming:
        program.initial_state()  # Raises for what no step computes.
    return program


def _check_time(traced: Trace, inputs: Sequence[int], k: int, axis: int) -> None:
    """Raises ValueError unless an input has an axis."""
    if k not in range(len(inputs)):
        raise ValueError(
            f"`streaming` names input {k}, and the program has {len(inputs)}, numbered "
            "from 0 on."
        )
    shape = traced.shape(traced.inputs[k])
    if axis not in range(-len(shape), len(shape)):
        raise ValueError(
            f"`streaming` names axis {axis} of input {k}, which has shape {shape}."
        )


def _notes(half: Sequence[str]) -> tuple[str, ...]:
    """Returns what a program says of a model in half precision."""
    if not half:
        return ()
    return (
        f"The model computes in {' and '.join(half)}. This is the program of its "
        "float32 form, which has the same sites, parameters and state; numbers of the "
        "code that the half type rounded are the shortest decimals with that rounding. "
        "`qjax.verify` gives the distance between the two.",
    )


def _with_example(x: Any) -> Any:
    """Replaces an input of no examples by one example, as models divide by the size."""
    shape = np.shape(x)
    if shape[:1] != (0,):
        return x
    return jax.ShapeDtypeStruct((1, *shape[1:]), jax.dtypes.result_type(x))


def _traced(bound: Bound, inputs: Any) -> tuple[Trace, Any]:
    """Traces a model, with each softmax and each normalisation as one equation."""
    traced, out = trace(bound.fn, *inputs, keep_derivatives=False)
    blocks = None if bound.blocks is None else bound.blocks(*inputs)
    return _prepared(traced, blocks), out


def _prepared(traced: Trace, blocks: Sequence[BlockSites] | None) -> Trace:
    """Returns a trace in the form that is interpreted, its blocks marked."""
    traced = fold_normalisations(traced, data_of(traced, traced.inputs))
    traced = masked_behind(traced)
    if blocks is None:
        return traced
    marked = (_in_block(e, blocks) for e in traced.equations)
    return dataclasses.replace(traced, equations=tuple(marked))


def _in_block(e: Equation, blocks: Sequence[BlockSites]) -> Equation:
    """Gives an equation of a simulation the sites of its block."""
    sites = BlockSites() if e.block is None else blocks[e.block]
    return dataclasses.replace(e, sites=sites, is_simulated=True)


def _others(traced: Trace, bound: Bound, target: Target) -> str:
    """Lists all else that has no integers, for the end of an error."""
    try:
        _, _, residues = _interpreted(traced, bound, False, target)
    except Exception:  # The first error says enough.
        return ""
    causes = [r for r in residues if not r.is_follower]
    followers = len(residues) - len(causes)
    if len(residues) < 2:
        return ""
    one = followers == 1
    more = f"{followers} more equation{'' if one else 's'} only follow{'s' * one} from"
    if len(causes) == 1:
        return f"\n{more} this one."
    named = [f"`{r.primitive}`" + (f" in {r.path!r}" if r.path else "") for r in causes]
    rest = f", and {len(named) - _MOST_SHOWN} more" if len(named) > _MOST_SHOWN else ""
    shown = ", ".join(named[:_MOST_SHOWN])
    return (
        f"\nIn all {len(causes)} parts of the model have no integers: {shown}{rest}; "
        f"{more} them. `strict=False` lists all."
    )


_MOST_SHOWN = 8  # Causes in one error.


def _interpreted(
    traced: Trace, bound: Bound, strict: bool, target: Target
) -> tuple[Builder, list[Abstract], list[Residue]]:
    """Returns the builder of a trace, what it knows of outputs, and the residues."""
    is_raw: frozenset[int] = frozenset()
    tree = jax.tree.structure(tuple(bound.inputs))
    types = jax.tree.unflatten(tree, [traced.avals[v] for v in traced.inputs])
    blocks = None if bound.blocks is None else bound.blocks(*types)
    while True:
        residues: list[Residue] = []
        own: Any = {"is_open": not strict, "is_raw": is_raw, "target": target}
        builder = Builder(bound.buffer_bits, **own)
        builder.prepared = lambda own: _prepared(own, blocks)
        builder.interpreted = lambda own, child, given: interpret(
            own, child, RULES, folded=child.folded, given=given
        )
        builder.folds = bound.folds
        try:
            left = None if strict else residues
            outputs = interpret(traced, builder, RULES, left, bound.folded)
        except InputTwiceError as error:  # A few integers can be their own codes.
            if not error.is_raw or error.input in is_raw:
                raise
            is_raw |= {error.input}
            continue
        return builder, outputs, residues


def _whole(builder: Builder, outputs: Sequence[Abstract], traced: Trace) -> Graph:
    """Returns the graph of a program without residues, dead values included."""
    ends: list[int] = []
    for k, x in enumerate(outputs):
        ends.append(add_output(builder, k, x, traced, ends))
    missing = [k for k in range(len(traced.inputs)) if k not in builder.inputs]
    if missing:
        name = at_start(traced.names[missing[0]])
        raise ValueError(
            f"{name} reaches no quantization point, so it has no codes. Quantize it, "
            "or take it out of the function."
        )
    order = tuple(builder.inputs[k] for k in range(len(traced.inputs)))
    return merge_equal(builder.graph(order, tuple(ends)), builder.params)


def _partial(
    builder: Builder,
    outputs: Sequence[Abstract],
    residues: list[Residue],
    notes: tuple[str, ...],
) -> IntegerProgram:
    """Returns the program between the residues."""
    whole = [x.value for x in outputs if isinstance(x, Integers)]
    graph = builder.graph(tuple(builder.inputs.values()), tuple(whole))
    inputs, outputs = map(jax.tree.structure, (graph.inputs, graph.outputs))
    listed = tuple(sorted(residues, key=lambda residue: residue.is_follower))
    return IntegerProgram(graph, _arrays(builder), inputs, outputs, listed, notes)


def _arrays(builder: Builder) -> dict[str, jax.Array]:
    return {name: jax.device_put(array) for name, array in builder.params.items()}
