"""Integer programs: a graph with its parameters, jitted."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled_program import CompiledProgram, compiled
from qjax.costs.graphs import layers_of
from qjax.costs.layers import Layers
from qjax.ends import check_range, grid_of
from qjax.execution import Backend, BackendReport, Execution
from qjax.graph import files
from qjax.graph.certificate import Overflow, Report, certify
from qjax.graph.graph import Graph, Grid, Value
from qjax.graph.packing import nbytes
from qjax.graph.witnesses import Witness, chosen, find_witness
from qjax.leaves import arguments_of, at_start, difference, leaf_names
from qjax.steps import CompiledStep, StepExecution, compiled_step
from qjax.tables import show_types


class Residue(NamedTuple):
    """A part of a program that would stay float.

    Attributes:
      primitive: Primitive of the equation.
      path: Module path.
      message: The equation, and what would remove it.
      is_follower: Whether it reads what stays float for a cause before it: with the
        cause it goes.
    """

    primitive: str
    path: str
    message: str
    is_follower: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A lowered model: integers from input to output.

    Attributes:
      graph: Graph that the program computes.
      params: The integer parameters, name -> array: kernels, biases, multipliers and
        shifts. An explicit pytree. A kernel has the name of its site, by which
        `qjax.scales` and `qjax.integer_weights` give its scale.
      input_tree: Structure of the inputs: a tuple of positional arguments.
      output_tree: Structure of the outputs.
      residues: Parts that would stay float, causes before their followers; only of
        `lower` with ``strict=False``. The graph has what lies between then, and cannot
        be called.
      notes: What is to be known of the program beside its graph: that its model is in
        half precision, say. `report` prints them; a saved program has none.
    """

    graph: Graph
    params: Mapping[str, jax.Array]
    input_tree: Any
    output_tree: Any
    residues: tuple[Residue, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        left = f", {len(self.residues)} residues in float" if self.residues else ""
        return (
            f"IntegerProgram({len(self.graph.nodes)} operations, {self.nbytes:,} "
            f"bytes, inputs={show_types(self._inputs)}, "
            f"outputs={show_types(self._outputs)}{left})"
        )

    def __call__(self, *inputs: Any, backend: Backend | None = None) -> Any:
        """Computes real outputs from real inputs: quantize, `codes`, dequantize.

        Args:
          *inputs: Inputs of the model. The size of the leading axis may differ from
            the traced one where `lower` found that nothing depends on it; inputs that
            were traced with the same size keep the same size.
          backend: ``native`` for compiled kernels on the CPU and XLA for what they
            lack, ``xla`` for XLA alone; None for the best that there is. The integers
            are the same: `backend_report` says which nodes run where.

        Returns:
          Outputs in the structure of the model's, real values as float32.

        Raises:
          ValueError: if an input has another shape, or a leading size that an equation
            has fixed, which is named; if an input chooses rows of a table that are not
            there, unless it is traced: the first or the last row is taken then; if
            there is no such backend.
        """
        flat = self._flat(inputs)
        return self._unflatten(self.execution.run("real", flat, backend))

    def codes(self, *codes: Any, backend: Backend | None = None) -> Any:
        """Computes output codes from input codes. No floating-point value occurs.

        Args:
          *codes: Integers on the grids of `input_grids`, nested as the inputs are.
          backend: As for a call of the program.

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
            check_range(name, x, v)
            typed.append(jnp.asarray(x).astype(v.dtype))
        return self._unflatten(self.execution.run("codes", typed, backend))

    def site_codes(
        self, *inputs: Any, backend: Backend | None = None
    ) -> dict[str, jax.Array]:
        """Computes the codes at every quantization point, from real inputs.

        Those inside of loops have an axis of steps before the others.
        """
        return self.run_sites(*inputs, backend=backend)[0]

    def run_sites(
        self, *inputs: Any, backend: Backend | None = None
    ) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """Computes the codes at every quantization point and of the outputs, flat."""
        return self.execution.run("sites", self._flat(inputs), backend)

    def compile(
        self,
        batch_size: int | None = None,
        *,
        threads: int | None = None,
        backend: Backend | None = None,
    ) -> CompiledProgram:
        """Compiles `codes` for one batch size, without JAX between NumPy and kernels.

        Args:
          batch_size: Number of examples, as `write_c99` takes it; None for that of
            lowering.
          threads: Threads of native kernels at most; None for ``QJAX_NUM_THREADS``, or
            as many as there are cores.
          backend: As for a call of the program.

        Returns:
          ``run``, from NumPy codes to NumPy codes; ``run.real``, between real values.

        Raises:
          ValueError: if there is no such backend, number of threads or batch size.
        """
        self._check_whole()
        size = self.input_tree, self.output_tree, self.input_names
        return compiled(self.execution, *size, batch_size, threads, backend)

    def backend_report(self) -> BackendReport:
        """Returns which nodes native kernels run, which XLA runs, and why."""
        return self.execution.report()

    @property
    def site_names(self) -> tuple[str, ...]:
        """Returns the names of the quantization points, those of a loop after it."""
        return tuple(name for _, own in self.graph.walk() for name in own.sites)

    def quantize_inputs(self, *inputs: Any) -> Any:
        """Computes the input codes of real inputs."""
        flat = self.execution.jitted_quantize(self._flat(inputs))
        return jax.tree.unflatten(self.input_tree, flat)

    @functools.cached_property
    def input_names(self) -> tuple[str, ...]:
        """Returns the names of the inputs, flat: ``input 0``, ``input:1['image']``."""
        places = range(self.input_tree.num_leaves)
        return tuple(leaf_names(jax.tree.unflatten(self.input_tree, places)))

    @property
    def input_grids(self) -> tuple[Grid, ...]:
        """Returns the grids of the inputs, flat."""
        return tuple(grid_of(v) for v in self._inputs)

    @property
    def output_grids(self) -> tuple[Grid, ...]:
        """Returns the grids of the outputs, flat."""
        return tuple(grid_of(v) for v in self._outputs)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the parameters as saved, 2 and 4 bits packed."""
        return sum(nbytes(np.asarray(p)) for p in self.params.values())

    def report(self) -> Report:
        """Certifies the program: no overflow, no float, agreement of each site."""
        found = certify(self.graph, self.params, tuple(float_values(self)))
        return dataclasses.replace(found, notes=self.notes)

    def find_witness(
        self,
        accumulator: Overflow | str,
        *,
        steps: int | None = None,
        budget: int = 2000,
        seed: int = 0,
    ) -> Witness:
        """Searches an input that drives an accumulator to the bound of its certificate.

        A step of a loop is certified at any codes carried; this runs whole inputs.

        Args:
          accumulator: One of ``report().overflow``, or the name of the site whose codes
            are made of it, or its path where no other has it.
          steps: Steps, of a program with ``streaming``; None for those of lowering.
          budget: Inputs to try: all, if there are no more.
          seed: Of what is drawn.

        Returns:
          What was reached, the bound, the codes of the input; ``is_attained`` if both
          are equal, ``is_exhaustive`` if all inputs were tried.

        Raises:
          ValueError: for a name of no accumulator or several, or of a loop without
            steps; for ``budget`` or ``steps`` below 1, and ``steps`` of a program
            without ``streaming``; if something stays in float.
        """
        self._check_whole()
        own = self.graph, self.params, chosen(self.graph, self.params, accumulator)
        found = find_witness(*own, steps=steps, budget=budget, seed=seed)
        codes = jax.tree.unflatten(self.input_tree, found.codes)
        return dataclasses.replace(found, codes=codes)

    def layers(self, *, examples: int | None = None) -> Layers:
        """Returns its layers with the bits of its own integers: `costs.layers_of`."""
        return layers_of(self.graph, self.params, examples=examples)

    def initial_state(self, batch_size: int | None = None) -> tuple[jax.Array, ...]:
        """Returns the state before the first step: integers, a pytree.

        Args:
          batch_size: Number of examples; None for that of lowering.

        Raises:
          ValueError: for a program that was lowered without ``streaming``; for another
            number of examples where the program fixes it.
        """
        return self._steps.initial_state(batch_size)

    def step(
        self, state: Any, *inputs: Any, backend: Backend | None = None
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """Computes one step of a sequence: the codes that the whole has at its time.

        Args:
          state: State of `initial_state` or of the last step.
          *inputs: Inputs of the model at one time: without the axes of time that
            ``lower(..., streaming=)`` named.
          backend: As for a call of the program.

        Returns:
          The next state, and the outputs at this time, real values as float32; what
          has no axis of time is what it would be if the sequence ended here.

        Raises:
          ValueError: for a program that was lowered without ``streaming``; for the
            state of another program, and inputs of other shapes; for a step after the
            last, where a position table or a sum of all steps limits them to those of
            lowering. A state that JAX traces cannot raise: after the last step outputs
            are NaN then, or the least integer, and those of dtype bool mean nothing.
        """
        flat, tree = jax.tree.flatten(inputs)
        if tree != self.input_tree:
            raise ValueError(
                f"The program takes inputs nested as {self.input_tree}, got {tree}."
            )
        states, outputs = self._steps.step(jax.tree.leaves(state), flat, backend)
        return tuple(states), self._unflatten(outputs)

    def compile_step(
        self,
        batch_size: int | None = None,
        *,
        threads: int | None = None,
        backend: Backend | None = None,
    ) -> CompiledStep:
        """Compiles `step` for one number of examples, as `compile` does a program.

        Args:
          batch_size: Number of examples; None for that of lowering.
          threads: As in `compile`.
          backend: As for a call of the program.

        Returns:
          ``run``, from a state and real inputs to the next state and real outputs, all
          of NumPy.

        Raises:
          ValueError: as `compile` and `initial_state`.
        """
        trees = self.input_tree, self.output_tree
        return compiled_step(self._steps, trees, batch_size, threads, backend)

    @functools.cached_property
    def _steps(self) -> StepExecution:
        """Returns the functions of a step."""
        return StepExecution(self.graph, self.params, self.input_names)

    def save(self, path: str | os.PathLike[str], *, golden: Any = None) -> None:
        """Writes the program to one file, which `qjax.load` reads, all or nothing.

        Args:
          path: Path. An existing file is replaced once the new one is complete, and
            keeps its mode; a symbolic link stays, and what it points to is written.
          golden: Real inputs: a tuple of them, or the only one. Their codes and those
            of the outputs go to the file, so that every reader can compare its own.

        Raises:
          ValueError: if inputs or outputs are nested in other than tuples, lists,
            dicts; if a parameter has a name that no file holds; if something of the
            program stays in float; if `qjax.load` would refuse it; if ``golden`` is no
            input of the program. Nothing is written then.
          OSError: if the file cannot be written. An old one stays as it was.
        """
        if self.residues:
            listed = "\n".join(residue.message for residue in self.residues)
            raise ValueError(
                "This program is not whole, so no file can hold it. In float remain:\n"
                f"{listed}"
            )
        trees = self.input_tree, self.output_tree
        codes = None if golden is None else self._golden_codes(golden)
        files.save(path, self.graph, self.params, *trees, codes)

    def _golden_codes(self, inputs: Any) -> files.Golden:
        """Computes the codes of real inputs, and those of the outputs."""
        flat = self._flat(arguments_of(inputs, self.input_tree))
        codes = self.execution.jitted_quantize(flat)
        outputs = self.execution.run("codes", codes)
        return list(map(np.asarray, codes)), list(map(np.asarray, outputs))

    def golden_differences(self, path: str | os.PathLike[str]) -> tuple[int, ...]:
        """Counts the output codes that differ from the golden ones of a file.

        Args:
          path: File of this program or of another one, written with ``golden``.

        Returns:
          The number for each output, flat: 0 for the program that was saved.

        Raises:
          ValueError: if the file is none that `qjax.load` reads; if it has no golden
            codes, or those of other inputs and outputs.
          OSError: if the file cannot be read.
        """
        inputs, wanted = files.load_golden(path)
        if (len(inputs), len(wanted)) != (len(self._inputs), len(self._outputs)):
            raise ValueError(
                f"The golden codes of {os.fspath(path)!r} must be of "
                f"{len(self._inputs)} inputs and {len(self._outputs)} outputs, got "
                f"{len(inputs)} and {len(wanted)}."
            )
        found = jax.tree.leaves(
            self.codes(*jax.tree.unflatten(self.input_tree, inputs))
        )
        shapes = [x.shape for x in found]
        if shapes != [x.shape for x in wanted]:
            raise ValueError(
                f"The golden outputs of {os.fspath(path)!r} must have shapes {shapes}, "
                f"got {[x.shape for x in wanted]}."
            )
        pairs = zip(found, wanted, strict=True)
        return tuple(int(np.sum(np.asarray(x) != y)) for x, y in pairs)

    @functools.cached_property
    def execution(self) -> Execution:
        """Returns the functions that run the graph, jitted."""
        return Execution(self.graph, self.params)

    @property
    def run_codes(self) -> Callable[..., list[jax.Array]]:
        """Returns the program on XLA, ``(params, *codes) -> codes``, flat and jitted.

        It takes any parameters, traced ones too.
        """
        return self.execution.codes

    @property
    def _inputs(self) -> list[Value]:
        return [self.graph.values[v] for v in self.graph.inputs]

    @property
    def _outputs(self) -> list[Value]:
        return [self.graph.values[v] for v in self.graph.outputs]

    def _check_whole(self) -> None:
        if self.residues:
            causes = [r.message for r in self.residues if not r.is_follower]
            follows = len(self.residues) - len(causes)
            listed = "\n".join(causes)
            raise ValueError(
                f"This program is not whole. In float remain:\n{listed}\nand {follows} "
                "equations that only follow from these."
            )

    def _flat(self, inputs: tuple[Any, ...]) -> list[Any]:
        self._check_whole()
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
                check_range(name, x, v)
            if not shape:
                continue
            if v.is_free_beyond_one and shape[0] < 2:
                raise ValueError(
                    f"{called} of the program must have a leading size of 2 or more, "
                    f"got shape {shape}: for 1 the model differs, by {v.fixed_by}.\n"
                    "Lower the model for inputs of this size."
                )
            is_other = shape[0] != v.shape[0] and not v.is_free_beyond_one
            if v.fixed_by and is_other:
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


def load(path: str | os.PathLike[str], *, check: bool = False) -> IntegerProgram:
    """Reads a program written by `IntegerProgram.save`.

    Args:
      path: The file.
      check: Whether the program has to compute the golden codes of the file, here and
        now: `IntegerProgram.golden_differences`.

    Returns:
      The program, equal to the one saved.

    Raises:
      ValueError: if the file is no such program, is truncated or altered, which names
        the tensor, or comes from a later version; if what it holds is no program:
        `qjax.graph.validation`; with ``check``, if it has no golden codes or computes
        others.
      OSError: if it cannot be read.
    """
    graph, params, *trees = files.load(path)
    program = IntegerProgram(graph, params, *trees)
    if check and any(differ := program.golden_differences(path)):
        raise ValueError(
            f"{os.fspath(path)!r} computes other codes than its golden ones: "
            f"{sum(differ)} differ, by output {differ}. Run "
            "`python -m qjax.formats.check` on it to see who is right."
        )
    return program


def check_integer_only(program: IntegerProgram) -> None:
    """Raises AssertionError if a floating-point value occurs in `program.codes`."""
    found = float_values(program)
    assert not found, f"the integer program computes floating-point values: {found}"


def float_values(program: IntegerProgram) -> list[str]:
    """Returns the types of floating-point values in `program.codes`: none."""
    return program.execution.float_values()
