"""Integer programs: a graph with its parameters, jitted; and how to make one."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, dequantize, grid_codes
from qjax.blocks import data_of
from qjax.instrument import QuantizedModel
from qjax.leaves import at_start, difference, leaf_names
from qjax.lowering import (
    rules_arithmetic,
    rules_choices,
    rules_functions,
    rules_moves,
    rules_points,
    rules_products,
    rules_shapes,
    xla,
)
from qjax.lowering.graph import Graph, Grid, Value
from qjax.lowering.interpret import InputTwiceError, Residue, interpret, refuse
from qjax.lowering.packing import nbytes
from qjax.lowering.passes import drop_dead, merge_equal
from qjax.lowering.precision import find_half
from qjax.lowering.report import Report, certify
from qjax.lowering.rules_functions import add_exact_table, add_table
from qjax.lowering.sizes import Lowered, find_fixed
from qjax.lowering.values import Abstract, Builder, Curve, Integers, Sum
from qjax.normalisations import fold_normalisations
from qjax.tables import show_types
from qjax.trace import Equation, Trace, trace

# Importing them fills the rule table.
assert (
    rules_arithmetic
    and rules_choices
    and rules_functions
    and rules_moves
    and rules_points
)
assert rules_products and rules_shapes


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A lowered model: integers from input to output.

    Attributes:
      graph: What it computes.
      params: The integer parameters, name -> array: kernels, biases, multipliers and
        shifts. An explicit pytree. A kernel has the name of its site, by which
        `qjax.scales` and `qjax.integer_weights` give its scale.
      input_tree: How inputs are nested: a tuple of positional arguments.
      output_tree: How outputs are nested.
      residues: What would stay float, causes before what follows from them; only of
        `lower` with ``strict=False``. The graph has what lies between then, and cannot
        be called.
    """

    graph: Graph
    params: Mapping[str, jax.Array]
    input_tree: Any
    output_tree: Any
    residues: tuple[Residue, ...] = ()

    def __repr__(self) -> str:
        left = f", {len(self.residues)} residues in float" if self.residues else ""
        return (
            f"IntegerProgram({len(self.graph.nodes)} operations, {self.nbytes:,} "
            f"bytes, inputs={show_types(self._inputs)}, "
            f"outputs={show_types(self._outputs)}{left})"
        )

    def __call__(self, *inputs: Any) -> Any:
        """Computes real outputs from real inputs: quantize, `codes`, dequantize.

        Args:
          *inputs: As the model takes them. The size of the leading axis may differ from
            the traced one where `lower` found that nothing depends on it; inputs that
            were traced with the same size keep the same size.

        Returns:
          As the model returns them, real values as float32.

        Raises:
          ValueError: if an input has another shape, or a leading size that an equation
            has fixed, which is named; if an input chooses rows of a table that are not
            there, unless it is traced: the first or the last row is taken then.
        """
        return self._unflatten(self._run_real(self.params, *self._flat(inputs)))

    def codes(self, *codes: Any) -> Any:
        """Computes output codes from input codes. No floating-point value occurs.

        Args:
          *codes: Integers on the grids of `input_grids`, nested as the inputs are.

        Returns:
          Integers on the grids of `output_grids`, nested as the outputs are.

        Raises:
          TypeError: if codes are not integers.
          ValueError: if they have another shape, or lie outside their range.
        """
        flat = self._flat(codes)
        typed = []
        for name, x, v in zip(self.input_names, flat, self._inputs, strict=True):
            if not jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer):
                raise TypeError(
                    f"`codes` takes integers, got {jax.dtypes.result_type(x)} for "
                    f"{name}. Call the program itself on real values."
                )
            _check_range(name, x, v)
            typed.append(jnp.asarray(x).astype(v.dtype))
        return self._unflatten(self.run_codes(self.params, *typed))

    def site_codes(self, *inputs: Any) -> dict[str, jax.Array]:
        """Computes the codes at every quantization point, from real inputs."""
        return self.run_sites(*inputs)[0]

    def run_sites(self, *inputs: Any) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """Computes the codes at every quantization point and of the outputs, flat."""
        return self._run_sites(self.params, *self._flat(inputs))

    def quantize_inputs(self, *inputs: Any) -> Any:
        """Computes the input codes of real inputs."""
        flat = self._run_quantize(self._flat(inputs))
        return jax.tree.unflatten(self.input_tree, flat)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, flat: ``input 0``, ``input:1['image']``."""
        places = range(self.input_tree.num_leaves)
        return tuple(leaf_names(jax.tree.unflatten(self.input_tree, places)))

    @property
    def input_grids(self) -> tuple[Grid, ...]:
        """The grids of the inputs, flat."""
        return tuple(_grid(v) for v in self._inputs)

    @property
    def output_grids(self) -> tuple[Grid, ...]:
        """The grids of the outputs, flat."""
        return tuple(_grid(v) for v in self._outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters as `save` writes them, 2 and 4 bits packed."""
        return sum(nbytes(np.asarray(p)) for p in self.params.values())

    def report(self) -> Report:
        """Certifies the program: no overflow, no float, how well each site agrees."""
        return certify(self.graph, self.params, tuple(float_values(self)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program to one file, which `qjax.load` reads."""
        # A lower room, so imported late: reading and writing is all it does.
        from qjax.formats.safetensors import save

        save(self, path)

    @functools.cached_property
    def run_codes(self) -> Callable[..., list[jax.Array]]:
        """``(params, *codes) -> codes``, flat and jitted: the program itself."""

        def codes(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            values = xla.run(self.graph, params, inputs)
            return [values[v] for v in self.graph.outputs]

        return jax.jit(codes)

    @functools.cached_property
    def _run_sites(self) -> Callable[..., Any]:
        def sites(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            values = xla.run(self.graph, params, self._quantize(inputs))
            found = {name: values[v] for name, v in self.graph.sites.items()}
            return found, [values[v] for v in self.graph.outputs]

        return jax.jit(sites)

    @functools.cached_property
    def _run_real(self) -> Callable[..., list[jax.Array]]:
        def real(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            return self._dequantize(self.run_codes(params, *self._quantize(inputs)))

        return jax.jit(real)

    @functools.cached_property
    def _run_quantize(self) -> Callable[..., list[jax.Array]]:
        return jax.jit(self._quantize)

    @property
    def _inputs(self) -> list[Value]:
        return [self.graph.values[v] for v in self.graph.inputs]

    @property
    def _outputs(self) -> list[Value]:
        return [self.graph.values[v] for v in self.graph.outputs]

    def _flat(self, inputs: tuple[Any, ...]) -> list[Any]:
        if self.residues:
            causes = [r.message for r in self.residues if not r.is_follower]
            follows = len(self.residues) - len(causes)
            listed = "\n".join(causes)
            raise ValueError(
                f"This program is not whole. In float remain:\n{listed}\nand {follows} "
                "equations that only follow from these."
            )
        flat, tree = jax.tree.flatten(inputs)
        if tree != self.input_tree:
            places = range(self.input_tree.num_leaves)
            wanted = jax.tree.unflatten(self.input_tree, places)
            where = difference(inputs, wanted)
            raise ValueError(
                f"The program takes inputs nested as {self.input_tree}, got {tree}. "
                f"{where}".rstrip()
            )
        leading: dict[int, tuple[str, Any]] = {}  # Traced size -> input, its size now.
        for name, x, v in zip(self.input_names, flat, self._inputs, strict=True):
            shape, called = np.shape(x), at_start(name)
            if len(shape) != len(v.shape) or shape[1:] != v.shape[1:]:
                raise ValueError(
                    f"{called} of the program must have shape "
                    f"{('batch', *v.shape[1:])}, got {shape}."
                )
            if v.is_place:
                _check_range(name, x, v)
            if not shape:
                continue
            if v.fixed_by and shape[0] != v.shape[0]:
                raise ValueError(
                    f"{called} of the program must have shape {v.shape}, got {shape}: "
                    f"its leading size is fixed by {v.fixed_by}.\nLower the model for "
                    "inputs of this size."
                )
            first, size = leading.setdefault(v.shape[0], (name, shape[0]))
            if size != shape[0]:
                raise ValueError(
                    f"{at_start(first)} and {name} of the program had the same leading "
                    f"size when it was lowered, got {size} and {shape[0]}. Lower the "
                    "model for inputs whose sizes differ."
                )
        return flat

    def _unflatten(self, outputs: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.output_tree, outputs)

    def _quantize(self, inputs: Sequence[Any]) -> list[jax.Array]:
        found = []
        for x, v in zip(inputs, self._inputs, strict=True):
            grid, operands = _grid(v), (v.low, v.high)
            zero, low, high = (jnp.int32(n) for n in (grid.zero_point, *operands))
            scale = jnp.asarray(grid.array())
            gain, offset = map(jnp.float32, v.rescaling)
            x = jnp.asarray(x).astype(jnp.float32) * gain + offset
            found.append(grid_codes(x, scale, zero, low, high).astype(v.dtype))
        return found

    def _dequantize(self, outputs: Sequence[jax.Array]) -> list[jax.Array]:
        found = []
        for q, v in zip(outputs, self._outputs, strict=True):
            if v.grid is None:
                found.append(q.astype(v.dtype_of_model) if v.dtype_of_model else q)
                continue
            grid = _grid(v)
            scale = jnp.asarray(grid.array())
            found.append(dequantize(q, QParams(scale, jnp.int32(grid.zero_point))))
        return found


def lower(
    model: QuantizedModel | Callable[..., Any], *args: Any, strict: bool = True
) -> IntegerProgram:
    """Lowers a quantized model to a program of integers only.

    Traces the model, walks the traced program once and replaces what lies between two
    quantization points by integer operations: int8 products with int32 accumulators,
    and a requantizer in which bias, BatchNorm and activation are folded.

    Args:
      model: A `QuantizedModel`; or any function of real inputs that has quantization
        points in it and its parameters closed over.
      *args: ``params, qstate, *inputs`` for a `QuantizedModel`, else ``*inputs``. Of
        the inputs only shapes are read. The size of the leading axis may differ when
        the program is called if the model lowers to the same program with another one,
        which is tried here; else it is fixed.
      strict: Whether what has no integers raises. If not, the ``residues`` of the
        program list it, each with its equation, its module path and the quantizer that
        would remove it.

    Returns:
      The program. A checker has made sure that no floating-point value occurs in it.

    Raises:
      ValueError: if a site is not calibrated, an operand is not quantized, or no
        activation has a grid.
      OverflowError: if an accumulator could leave its ``buffer_bits``, int32 by
        default; names the input that does it.
      NotImplementedError: for an operation without an integer rule.
    """
    try:
        return _lower(model, args, strict)
    except (ValueError, NotImplementedError) as error:
        # What reads files knows what its caller can do.
        advise = getattr(model, "advise", None)
        if advise is None or type(error) not in (ValueError, NotImplementedError):
            raise
        raise type(error)(advise(str(error))) from error


def _lower(model: Any, args: tuple[Any, ...], strict: bool) -> IntegerProgram:
    fn, inputs = bind_model(model, args)
    is_model = isinstance(model, QuantizedModel)
    if strict and is_model:
        _check_activations(model)
    example = jax.tree.map(_with_example, inputs)
    traced, out = _traced(fn, model, example)
    half = find_half(traced, traced.inputs, is_model=is_model)
    if half is not None and strict:
        raise NotImplementedError(half.message)
    if half is not None:
        return _partial(Builder(_buffer_bits(model), is_open=True), [], [half])
    try:
        builder, outputs, residues = _interpreted(traced, model, strict)
    except (NotImplementedError, OverflowError, ValueError) as error:
        error.args = (str(error) + _others(traced, model), *error.args[1:])
        raise
    if residues:
        return _partial(builder, outputs, residues)
    graph = _whole(builder, outputs, traced)

    def lower_again(other: tuple[Any, ...]) -> Lowered:
        again, _ = _traced(fn, model, other)
        own, ends, _ = _interpreted(again, model, strict=True)
        return again, _whole(own, ends, again), own.params

    fixed = find_fixed(lower_again, example, (traced, graph, builder.params))
    values = list(graph.values)
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    for k, reason in fixed.items():
        if shapes[k][0] == 0:
            name = at_start(traced.names[k])
            raise ValueError(
                f"{name} has shape {shapes[k]}: no example, and its leading "
                f"size is fixed by {reason}.\nLower the model for the size "
                "that it is called with."
            )
        v = graph.inputs[k]
        values[v] = dataclasses.replace(values[v], fixed_by=reason)
    graph = dataclasses.replace(graph, values=tuple(values))
    graph, params = drop_dead(graph, _arrays(builder))
    trees = jax.tree.structure(tuple(inputs)), jax.tree.structure(out)
    program = IntegerProgram(graph, params, *trees)
    check_integer_only(program)
    return program


def _with_example(x: Any) -> Any:
    """An input of no examples as one of one: models divide by their number."""
    shape = np.shape(x)
    if shape[:1] != (0,):
        return x
    return jax.ShapeDtypeStruct((1, *shape[1:]), jax.dtypes.result_type(x))


def _traced(fn: Callable[..., Any], model: Any, inputs: Any) -> tuple[Trace, Any]:
    """The trace, each softmax and each normalisation in it as one equation."""
    traced, out = trace(fn, *inputs, keep_derivatives=False)
    traced = fold_normalisations(traced, data_of(traced, traced.inputs))
    if isinstance(model, QuantizedModel):
        marked = (dataclasses.replace(e, is_simulated=True) for e in traced.equations)
        traced = dataclasses.replace(traced, equations=tuple(marked))
    return traced, out


def _others(traced: Trace, model: Any) -> str:
    """What else has no integers, for the end of an error: causes and their number."""
    try:
        _, _, residues = _interpreted(traced, model, strict=False)
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
    traced: Trace, model: Any, strict: bool
) -> tuple[Builder, list[Abstract], list[Residue]]:
    """The graph of a trace, what is known of its outputs, and what stays float."""
    is_raw: frozenset[int] = frozenset()
    while True:
        residues: list[Residue] = []
        builder = Builder(_buffer_bits(model), is_open=not strict, is_raw=is_raw)
        try:
            outputs = interpret(traced, builder, None if strict else residues)
        except InputTwiceError as error:  # A few integers can be their own codes.
            if not error.is_raw or error.input in is_raw:
                raise
            is_raw |= {error.input}
            continue
        return builder, outputs, residues


def _whole(builder: Builder, outputs: Sequence[Abstract], traced: Trace) -> Graph:
    """The graph of a program without residues, dead values in it."""
    ends: list[int] = []
    for k, x in enumerate(outputs):
        ends.append(_output(builder, k, x, traced, ends))
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
    builder: Builder, outputs: Sequence[Abstract], residues: list[Residue]
) -> IntegerProgram:
    """What lies between the residues."""
    whole = [
        x.value for x in outputs if isinstance(x, Integers) and x.value is not None
    ]
    graph = builder.graph(tuple(builder.inputs.values()), tuple(whole))
    inputs, outputs = map(jax.tree.structure, (graph.inputs, graph.outputs))
    listed = tuple(sorted(residues, key=lambda residue: residue.is_follower))
    return IntegerProgram(graph, _arrays(builder), inputs, outputs, listed)


def _arrays(builder: Builder) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in builder.params.items()}


def _buffer_bits(model: Any) -> dict[str, int]:
    """Most bits of accumulators, by the weight that makes them; of sums, by output."""
    if not isinstance(model, QuantizedModel):
        return {}
    return {site.name: model.scheme.site_buffer_bits(site) for site in model.sites}


def bind_model(
    model: QuantizedModel | Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a function of the inputs alone, and the inputs."""
    if not isinstance(model, QuantizedModel):
        return model, args
    if len(args) < 3:
        raise TypeError(
            "A `QuantizedModel` needs `params, qstate, *inputs` after it, got "
            f"{len(args)} arguments."
        )
    params, qstate, *inputs = args
    return lambda *xs: model.apply(params, qstate, *xs), tuple(inputs)


def _check_activations(model: QuantizedModel) -> None:
    """Raises for a model of which only weights are quantized."""
    words = [(site.role, model.scheme.spec(site)) for site in model.sites]
    is_on_grid = any(role == "activation" and word is not None for role, word in words)
    has_weights = any(role == "weight" and word is not None for role, word in words)
    if has_weights and not is_on_grid:
        raise ValueError(
            "No activation of this model has a grid, so its products have no integer "
            "operand beside the weights: `qjax.integer_weights(qmodel, params)` gives "
            "the integers of the weights with their scales. For a program of integers "
            "only, give `Scheme.activations` a word such as `QSpec(bits=8)`."
        )


def check_integer_only(program: IntegerProgram) -> None:
    """Raises AssertionError if a floating-point value occurs in `program.codes`."""
    found = float_values(program)
    assert not found, f"the integer program computes floating-point values: {found}"


def float_values(program: IntegerProgram) -> list[str]:
    """Returns the types of floating-point values in `program.codes`: none."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program._inputs]
    closed = jax.make_jaxpr(program.run_codes)(program.params, *shapes)
    return sorted(set(_float_values(closed.jaxpr)))


def _float_values(jaxpr: Any) -> list[str]:
    found = []
    atoms = [*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars]
    for eqn in jaxpr.eqns:
        atoms += [*eqn.invars, *eqn.outvars]
        for inner in jex.jaxprs_in_params(eqn.params):
            found += _float_values(getattr(inner, "jaxpr", inner))
    inexact = (a for a in atoms if jnp.issubdtype(a.aval.dtype, jnp.inexact))
    return [*found, *(str(a.aval) for a in inexact)]


def _output(
    builder: Builder, k: int, x: Abstract, traced: Trace, taken: Sequence[int]
) -> int:
    """The value of an output: codes, or accumulators with a scale per channel.

    It is a value of its own, unless nothing else says what its integers mean.
    """
    if not traced.equations:
        raise ValueError("The function computes nothing.")
    last, v = _maker(traced, k), traced.outputs[k]
    if not traced.is_real(v):
        return _whole_output(builder, k, x, traced)
    if isinstance(x, Curve):
        x = add_exact_table(builder, x, traced.shape(v), x.path or "output") or x
    if isinstance(x, Sum):
        x = _summed(builder, last, x, k)
    if not isinstance(x, Integers) or x.dtype:
        raise refuse(last, x, f"output {k}")
    x = rules_shapes.settled(builder, last, traced, x)
    assert x.value is not None
    grid = Grid(np.float32(x.real_scale()).tolist(), x.zero_point)
    value = builder.values[x.value]
    if value.grid is None and x.value not in (*taken, *builder.inputs.values()):
        builder.values[x.value] = dataclasses.replace(value, grid=grid)
        return x.value
    if value.grid == grid and not value.dtype_of_model:
        return x.value
    return _copy(builder, x.value, grid)


def _maker(traced: Trace, k: int) -> Equation:
    """The equation that an output comes from."""
    v = traced.outputs[k]
    return next((e for e in traced.equations if v in e.outputs), traced.equations[-1])


def _summed(builder: Builder, e: Equation, x: Sum, k: int) -> Integers:
    """A sum of codes that the model returns, where one grid holds it exactly."""
    try:
        return rules_shapes.added(builder, e, x)
    except ValueError:
        raise refuse(e, x, f"output {k}") from None


def _whole_output(builder: Builder, k: int, x: Abstract, traced: Trace) -> int:
    """The value of an output of whole numbers, which stand for themselves."""
    last, v = _maker(traced, k), traced.outputs[k]
    dtype = str(traced.avals[v].dtype)
    if isinstance(x, Curve):
        value = builder.add_value(traced.shape(v), *_INT32_RANGE, dtype="int32")
        ends = add_table(builder, x, lambda y: y, value, x.path or "output")
        builder.values[value] = dataclasses.replace(
            builder.values[value], low=ends[0], high=ends[1], dtype_of_model=dtype
        )
        return value
    if not isinstance(x, Integers) or not x.dtype or x.gain is not None:
        raise refuse(last, x, f"output {k}")
    assert np.all(x.scale == 1) and not x.zero_point
    x = rules_shapes.settled(builder, last, traced, x)
    assert x.value is not None
    return _copy(builder, x.value, None, dtype)


_INT32_RANGE = (-(2**31), 2**31 - 1)


def _copy(builder: Builder, v: int, grid: Grid | None, dtype_of_model: str = "") -> int:
    """The same integers as another value, which says what they mean."""
    x = builder.values[v]
    own = builder.add_value(x.shape, x.low, x.high, grid, dtype=x.dtype)
    builder.values[own] = dataclasses.replace(
        builder.values[own], dtype_of_model=dtype_of_model
    )
    return builder.add_node("clip", (v,), own, low=x.low, high=x.high)


def _check_range(name: str, x: Any, v: Value) -> None:
    """Raises for known codes outside of their range."""
    if isinstance(x, jax.core.Tracer) or not np.size(x):
        return
    low, high = int(np.min(x)), int(np.max(x))
    if low < v.low or high > v.high:
        raise ValueError(
            f"The codes of {name} must lie in [{v.low}, {v.high}], got [{low}, {high}]."
        )


def _grid(value: Value) -> Grid:
    """The grid of an input or output; whole numbers stand for themselves."""
    return Grid(1.0, 0) if value.grid is None else value.grid
