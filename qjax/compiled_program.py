"""The direct road: NumPy codes in, NumPy codes out, no JAX between."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.backends.native.library import thread_count
from qjax.ends import check_range
from qjax.execution import Backend, Execution
from qjax.graph.graph import Value
from qjax.graph.sizes import input_shapes

Runner = Callable[[list[np.ndarray]], list[np.ndarray]]


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
        runner: Runner,
        backend: Backend,
        inputs: Sequence[tuple[str, Value, tuple[int, ...]]],
        trees: tuple[Any, Any],
    ) -> None:
        self.backend = backend
        self._run, self._inputs = runner, tuple(inputs)
        self._input_tree, self._output_tree = trees
        ends = [(np.iinfo(v.dtype), v) for _, v, _ in inputs]
        # Of the others no array of their type has codes out of range.
        self._narrow = [
            k for k, (t, v) in enumerate(ends) if v.low > t.min or v.high < t.max
        ]
        self._types = [(shape, np.dtype(v.dtype)) for _, v, shape in inputs]
        # A tuple of arrays, and one array out, as most models have.
        self._is_plain = self._input_tree == jax.tree.structure((0,) * len(inputs))
        self._is_single = self._output_tree == jax.tree.structure(0)

    def __call__(self, *codes: Any) -> Any:
        """Computes output codes from input codes.

        Raises:
          TypeError: if codes are not arrays of the types of the graph.
          ValueError: if they are nested otherwise, have another shape, or lie outside
            their range.
        """
        flat: Sequence[Any] = codes
        if not self._is_plain or len(codes) != len(self._types):
            flat, tree = jax.tree.flatten(codes)
            if tree != self._input_tree:
                raise ValueError(
                    f"The program takes inputs nested as {self._input_tree}, got "
                    f"{tree}."
                )
        given = []
        for x, (shape, dtype) in zip(flat, self._types, strict=True):
            if type(x) is not np.ndarray or x.dtype != dtype or x.shape != shape:
                self._refuse(flat)
            given.append(x if x.flags.c_contiguous else np.ascontiguousarray(x))
        for k in self._narrow:
            name, v, _ = self._inputs[k]
            check_range(name, given[k], v)
        found = self._run(given)
        if self._is_single:
            return found[0]
        return jax.tree.unflatten(self._output_tree, found)

    def _refuse(self, flat: Sequence[Any]) -> None:
        """Raises for the first input that is none."""
        for x, (name, _, _), (shape, dtype) in zip(
            flat, self._inputs, self._types, strict=True
        ):
            is_array = isinstance(x, np.ndarray) and not isinstance(
                x, np.ma.MaskedArray
            )
            if not is_array or x.dtype != dtype:
                found = x.dtype if is_array else type(x).__name__
                raise TypeError(
                    f"{name} must be a NumPy array of {dtype}, got {found}. Compute "
                    "codes with `program.quantize_inputs`."
                )
            if x.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, got {x.shape}. Compile the "
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
        _check_size(batch_size)
        shapes = input_shapes(graph, batch_size)
        if batch_size not in {shape[0] for shape in shapes if shape}:
            raise ValueError(
                f"`batch_size` must be one that this program takes, got {batch_size}: "
                f"its inputs have shapes {shapes}. Lower the model for this size."
            )
    mixture = execution.mixture(backend)
    inputs = list(zip(names, execution.inputs, shapes, strict=True))
    trees = input_tree, output_tree
    if mixture is not None and mixture.is_whole:
        schedule = mixture.native[0].schedule(shapes)
        native: Runner = lambda codes: schedule.run(codes, count)
        return CompiledProgram(native, "native", inputs, trees)

    def run(codes: list[np.ndarray]) -> list[np.ndarray]:
        own = [jnp.asarray(q) for q in codes]
        return [np.asarray(q) for q in execution.run("codes", own, backend)]

    types = [np.zeros(shape, v.dtype) for _, v, shape in inputs]
    run(types)  # Compiles, and refuses shapes.
    return CompiledProgram(run, "xla", inputs, trees)


def _check_size(batch_size: Any) -> None:
    is_size = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not is_size or batch_size < 0:
        raise ValueError(f"`batch_size` must be 0 or more, got {batch_size!r}.")
