"""The direct road: NumPy codes in, NumPy codes out, no JAX between."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.array_ends import CodeRunner, InputEnd, RealRunner, fitting, ready
from qjax.backends.native.library import thread_count
from qjax.ends import check_range
from qjax.execution import Backend, Execution
from qjax.graph.graph import Value
from qjax.graph.sizes import Shape, input_shapes
from qjax.tables import show_types


class CompiledProgram:
    """A program for one batch size; calls of several threads may run at once.

    A call takes and returns NumPy arrays of codes, nested as those of
    `IntegerProgram.codes`. While native kernels run, other Python threads do.

    Attributes:
      backend: ``native``: one call of native kernels; ``xla``: XLA runs all or some of
        the nodes, and JAX lies between.
    """

    def __init__(
        self,
        runner: CodeRunner,
        inputs: Sequence[InputEnd],
        outputs: Sequence[tuple[Value, Shape]],
        trees: tuple[Any, Any],
    ) -> None:
        self.backend = runner.backend
        self._run, self._inputs = runner.run, tuple(inputs)
        self._input_tree, self._output_tree = trees
        values = [(np.iinfo(end.value.dtype), end.value) for end in inputs]
        # Of the others no array of their type has codes out of range.
        self._narrow = [
            k for k, (t, v) in enumerate(values) if v.low > t.min or v.high < t.max
        ]
        self._types = [(end.shape, np.dtype(end.value.dtype)) for end in inputs]
        self._output_types = [(shape, np.dtype(v.dtype)) for v, shape in outputs]
        # A tuple of arrays, and one array out, as most models have.
        self._is_plain = self._input_tree == jax.tree.structure((0,) * len(inputs))
        self._is_single = self._output_tree == jax.tree.structure(0)
        self._real = RealRunner(runner, 0, inputs, outputs)
        # The shortest way, of one array to another; they return None for other inputs.
        self._pair = self._real_pair = None
        if runner.kernels is not None and self._is_plain and self._is_single:
            if len(inputs) == 1 and not self._narrow:
                self._pair = runner.kernels.prepare_pair(runner.threads, self._types[0])
            self._real_pair = self._real.pair

    def __call__(self, *codes: Any, out: Any = None) -> Any:
        """Computes output codes from input codes.

        Args:
          *codes: Codes, in the types of the graph.
          out: Arrays that receive the outputs, nested as they are; None for new ones.

        Returns:
          The output codes: ``out``, if it was given.

        Raises:
          TypeError: if codes are not arrays of the types of the graph.
          ValueError: if they are nested otherwise, have another shape, or lie outside
            their range; if ``out`` has other arrays than the outputs, read-only ones,
            or some that share memory with each other or the inputs.
        """
        if out is None and self._pair is not None and len(codes) == 1:
            single = self._pair(codes[0])
            if single is not None:
                return single
        flat = self._flat(codes)
        given = []
        for x, own in zip(flat, self._types, strict=True):
            array = fitting(x, *own)
            if array is None:
                self._refuse(flat)
                array = ready(np.asarray(x))  # Of a subclass.
            given.append(array)
        for k in self._narrow:
            check_range(self._inputs[k].name, given[k], self._inputs[k].value)
        if out is not None:
            self._run(given, self._targets(out, given))
            return out
        found = self._run(given)
        return found[0] if self._is_single else self._nested(found)

    def real(self, *inputs: Any) -> Any:
        """Computes real outputs from real inputs, the numbers of the program's call.

        Native kernels take float32 arrays and return the real values of outputs of one
        scale. Arrays of other types, inputs with a rescaling or rounded as TFLite has
        it, and outputs of a scale a channel go through JAX.

        Args:
          *inputs: Inputs of the model, for this batch size.

        Returns:
          NumPy arrays in the structure of the model's outputs: float32, and integers
          in the model's type where an output has no grid.

        Raises:
          ValueError: if inputs are nested otherwise or have another shape; if one
            chooses rows of a table that are not there.
        """
        if self._real_pair is not None and len(inputs) == 1:
            single = self._real_pair(inputs[0])
            if single is not None:
                return single
        return self._nested(self._real((), self._flat(inputs))[1])

    def _flat(self, inputs: tuple[Any, ...]) -> Sequence[Any]:
        """Returns the leaves of inputs; refuses those that are nested otherwise."""
        if self._is_plain and len(inputs) == len(self._types):
            return inputs
        flat, tree = jax.tree.flatten(inputs)
        if tree != self._input_tree:
            raise ValueError(
                f"The program takes inputs nested as {self._input_tree}, got {tree}."
            )
        return flat

    def _nested(self, found: Sequence[np.ndarray]) -> Any:
        """Returns outputs in their structure."""
        if self._is_single:
            return found[0]
        return jax.tree.unflatten(self._output_tree, found)

    def _targets(self, out: Any, given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the arrays that receive the outputs; refuses others."""
        flat, tree = jax.tree.flatten(out)
        fits = tree == self._output_tree and all(
            isinstance(y, np.ndarray) and y.flags.writeable and fitting(y, *own) is y
            for y, own in zip(flat, self._output_types, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{t}{list(shape)}" for shape, t in self._output_types)
            raise ValueError(
                f"`out` must hold contiguous, writable NumPy arrays {wanted}, nested "
                f"as {self._output_tree}, got {tree} of {', '.join(map(_kind, flat))}."
            )
        for k, y in enumerate(flat):
            if any(np.may_share_memory(y, x) for x in (*given, *flat[:k])):
                raise ValueError(
                    "`out` must share no memory with the inputs or within itself: "
                    "kernels write outputs before they have read all inputs."
                )
        return flat

    def _refuse(self, flat: Sequence[Any]) -> None:
        """Raises for the first input that is none."""
        for x, end, (shape, dtype) in zip(flat, self._inputs, self._types, strict=True):
            is_array = isinstance(x, np.ndarray) and not isinstance(
                x, np.ma.MaskedArray
            )
            if not is_array or x.dtype != dtype:
                found = x.dtype if is_array else type(x).__name__
                raise TypeError(
                    f"{end.name} must be a NumPy array of {dtype}, got {found}. "
                    "Compute codes with `program.quantize_inputs`, or call `real`."
                )
            if x.shape != shape:
                raise ValueError(
                    f"{end.name} must have shape {shape}, got {x.shape}. Compile the "
                    "program for this batch size."
                )


def compiled(
    execution: Execution,
    input_tree: Any,
    output_tree: Any,
    names: Sequence[str],
    batch_size: int | None,
    threads: int | None,
    backend: Backend | None,
) -> CompiledProgram:
    """Compiles a program, as `IntegerProgram.compile`."""
    graph, count = execution.graph, thread_count(threads)
    shapes = [v.shape for v in execution.inputs]
    if batch_size is not None:
        check_size(batch_size)
        shapes = input_shapes(graph, batch_size)
        if batch_size not in {shape[0] for shape in shapes if shape}:
            raise ValueError(
                f"`batch_size` must be one that this program takes, got {batch_size}: "
                f"its inputs have shapes {shapes}. Lower the model for this size."
            )
    runner = make_runner(execution, shapes, count, backend)
    rows = zip(names, execution.inputs, shapes, shapes, strict=True)
    values = [graph.values[v] for v in graph.outputs]
    outputs = list(zip(values, runner.shapes, strict=True))
    trees = input_tree, output_tree
    return CompiledProgram(runner, [InputEnd(*row) for row in rows], outputs, trees)


def make_runner(
    execution: Execution,
    shapes: Sequence[Shape],
    threads: int,
    backend: Backend | None,
) -> CodeRunner:
    """Makes a function from NumPy codes to NumPy codes.

    Args:
      execution: The graph and its parameters.
      shapes: Shapes of the inputs.
      threads: Number of threads, at most.
      backend: As for a call of the program.
    """
    types = [np.dtype(v.dtype) for v in execution.inputs]
    _check_memory(list(zip(shapes, types, strict=True)))
    mixture = execution.mixture(backend)
    if mixture is not None and mixture.is_whole:
        runs = mixture.native[0].schedule(shapes)
        _check_memory(runs.types)
        sizes = [shape for shape, _ in runs.types]
        return CodeRunner(runs.prepare(threads), "native", sizes, runs, threads)

    def run(
        codes: list[np.ndarray], outputs: Sequence[np.ndarray] | None = None
    ) -> Sequence[np.ndarray]:
        own = [jnp.asarray(q) for q in codes]
        found = [np.asarray(q) for q in execution.run("codes", own, backend)]
        for y, q in zip(outputs or (), found, strict=bool(outputs)):
            y[...] = q
        return outputs or found

    # Compiles, and refuses shapes.
    found = run([np.zeros(*own) for own in zip(shapes, types, strict=True)])
    return CodeRunner(run, "xla", [q.shape for q in found], None, threads)


def _check_memory(types: Sequence[tuple[Shape, np.dtype]]) -> None:
    """Raises ValueError for arrays that the memory of this machine does not hold."""
    wanted = sum(math.prod(shape) * dtype.itemsize for shape, dtype in types)
    names = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return
    there = math.prod(map(os.sysconf, names))
    if wanted > there > 0:
        raise ValueError(
            "`batch_size` must be one whose arrays fit in memory: they need "
            f"{wanted:,} bytes, and there are {there:,} here. Run smaller batches in "
            "turn."
        )


def _kind(x: Any) -> str:
    if not isinstance(x, np.ndarray):
        return type(x).__name__
    faults = (
        "" if x.flags.writeable else " (read-only)",
        "" if x.flags.c_contiguous else " (not contiguous)",
        "" if x.flags.aligned and x.dtype.isnative else " (not aligned)",
    )
    return show_types([x]) + "".join(faults)


def check_size(batch_size: Any) -> None:
    """Raises ValueError for what is no number of examples."""
    is_size = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not is_size or batch_size < 0:
        raise ValueError(f"`batch_size` must be 0 or more, got {batch_size!r}.")
