"""The ends of a program from NumPy to NumPy: codes of real inputs, real outputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.backends.native.calls import KernelRuns
from qjax.backends.native.library import READY, ArrayCall
from qjax.backends.native.reals import Reals, input_end, output_end
from qjax.ends import check_range, input_codes, real_output
from qjax.execution import Backend
from qjax.graph.graph import Value
from qjax.graph.sizes import Shape
from qjax.leaves import at_start

_SINGLE = np.dtype(np.float32)


class CodeRunner(NamedTuple):
    """A function from codes to codes.

    Attributes:
      run: ``(inputs, outputs=None) -> outputs``, of contiguous arrays.
      backend: ``native`` or ``xla``.
      shapes: Shapes of the outputs.
      kernels: Native kernels, if they run all of it.
      threads: Their threads, at most.
    """

    run: Callable[..., Sequence[np.ndarray]]
    backend: Backend
    shapes: Sequence[Shape]
    kernels: KernelRuns | None
    threads: int


class InputEnd(NamedTuple):
    """An input of a program, for one batch size.

    Attributes:
      name: Its name: ``input 0``.
      value: Its value in the graph.
      shape: Shape of its codes.
      real_shape: Shape of real values: without the axis of time for a step.
    """

    name: str
    value: Value
    shape: Shape
    real_shape: Shape


def ready(x: np.ndarray) -> np.ndarray:
    """Returns an array as native kernels read it: itself, or a copy."""
    return x if x.flags.num & READY == READY else np.array(x, order="C")


def fitting(x: Any, shape: Shape, dtype: np.dtype) -> np.ndarray | None:
    """Returns a plain array as native kernels read it; None for anything else."""
    if type(x) is not np.ndarray or x.dtype != dtype or x.shape != shape:
        return None
    return x if x.flags.num & READY == READY else np.array(x, order="C")


class RealRunner:
    """A function from NumPy arrays to NumPy arrays, real ones after states of codes.

    Native kernels take float32 as it is where one scale rounds it half to even, and
    return the real values of outputs of one scale; JAX does the rest.

    Args:
      runner: The function from codes to codes.
      states: Number of states, which are codes on both sides.
      inputs: Real inputs.
      outputs: Values of real outputs, and their shapes: without the axis of time for a
        step.
    """

    def __init__(
        self,
        runner: CodeRunner,
        states: int,
        inputs: Sequence[InputEnd],
        outputs: Sequence[tuple[Value, Shape]],
    ) -> None:
        self._run, self._states = runner.run, states
        self._quantizers = [quantizer(end) for end in inputs]
        self._dequantizers = [dequantizer(*end) for end in outputs]
        self._real: ArrayCall | None = None
        # One input to one output, where kernels do all; None for what they do not take.
        self.pair: Callable[[Any], np.ndarray | None] | None = None
        ends = [input_end(end.value) for end in inputs]
        made = [output_end(value) for value, _ in outputs]
        # How kernels take inputs, and how their outputs end.
        self._takers: list[Callable[[Any], np.ndarray | None]] = [
            _taker(end.real_shape, end.shape) if own else quantize
            for end, own, quantize in zip(inputs, ends, self._quantizers, strict=True)
        ]
        self._makers: list[Callable[[np.ndarray], np.ndarray]] = [
            _shaper(shape) if own else dequantize
            for (_, shape), own, dequantize in zip(
                outputs, made, self._dequantizers, strict=True
            )
        ]
        if runner.kernels is not None and (any(ends) or any(made)):
            codes = (None,) * states
            reals = Reals((*codes, *ends), (*codes, *made))
            self._real = runner.kernels.prepare(runner.threads, reals)
            if not states and len(inputs) == len(outputs) == 1 and all((*ends, *made)):
                given = inputs[0].shape, _SINGLE
                self.pair = runner.kernels.prepare_pair(runner.threads, given, reals)

    def __call__(
        self, states: Sequence[np.ndarray], inputs: Sequence[Any]
    ) -> tuple[Sequence[np.ndarray], list[np.ndarray]]:
        """Computes states, codes, and real outputs."""
        run, makers = self._run, self._dequantizers
        if self._real is not None:
            given = [own(x) for own, x in zip(self._takers, inputs, strict=True)]
            if all(x is not None for x in given):
                run, makers = self._real, self._makers
        if run is self._run:
            given = [own(x) for own, x in zip(self._quantizers, inputs, strict=True)]
        found = run([*states, *given])
        pairs = zip(makers, found[self._states :], strict=True)
        return found[: self._states], [own(y) for own, y in pairs]


def _taker(shape: Shape, own: Shape) -> Callable[[Any], np.ndarray | None]:
    """Returns a function from float32 of a shape to the same in another; or to None."""

    def take(x: Any) -> np.ndarray | None:
        real = fitting(x, shape, _SINGLE)
        return real if real is None or shape == own else real.reshape(own)

    return take


def _shaper(shape: Shape) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x.reshape(shape)


def quantizer(end: InputEnd) -> Callable[[Any], np.ndarray]:
    """Returns a function from a real input to its codes, those of `input_codes`.

    Args:
      end: The input.
    """
    value, own = end.value, np.dtype(end.value.dtype)
    xla = jax.jit(lambda x: input_codes(jnp.reshape(x, end.shape), value))

    def quantize(x: Any) -> np.ndarray:
        if np.shape(x) != end.real_shape:
            raise ValueError(
                f"{at_start(end.name)} must have shape {end.real_shape}, got "
                f"{np.shape(x)}. Compile the program for this batch size."
            )
        x = real_array(x, end.name)
        if value.is_place:
            check_range(end.name, x, value)
        is_array = type(x) is np.ndarray and x.dtype.kind in "iu"
        if value.grid is None and is_array and x.dtype.itemsize <= 4:
            ends = np.iinfo(x.dtype)  # Integers are their own codes.
            low, high = max(value.low, ends.min), min(value.high, ends.max)
            codes = np.clip(x, low, high).astype(own, order="C")
            return codes.reshape(end.shape)
        return np.asarray(xla(x))

    return quantize


def real_array(x: Any, name: str) -> Any:
    """Returns an input as an array; refuses what holds no real numbers."""
    if not isinstance(x, np.ndarray | jax.Array):
        x = np.asarray(x)
    kinds = jnp.floating, jnp.integer, jnp.bool_
    is_real = any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    if not is_real or isinstance(x, np.ma.MaskedArray):
        found = "a masked array" if isinstance(x, np.ma.MaskedArray) else x.dtype
        raise TypeError(
            f"{at_start(name)} must be an array of real numbers, got {found}."
        )
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def dequantizer(value: Value, shape: Shape) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from output codes to real values, those of `real_output`.

    Args:
      value: The output.
      shape: Shape of the real values: without the axis of time for a step.
    """
    xla = jax.jit(lambda q: real_output(q, value))

    def dequantize(codes: np.ndarray) -> np.ndarray:
        if value.grid is None:  # The integers of the model.
            dtype = jax.dtypes.canonicalize_dtype(value.dtype_of_model or codes.dtype)
            return codes.reshape(shape).astype(dtype, copy=False)
        return np.array(xla(codes)).reshape(shape)

    return dequantize
