"""The ends of a program from NumPy to NumPy: codes of real inputs, real outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.backends.native.library import Library
from qjax.ends import check_range, input_codes, real_output
from qjax.graph.graph import Value
from qjax.graph.sizes import Shape
from qjax.leaves import at_start

_READY = 0x101  # Contiguous, and aligned.


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
    return x if x.flags.num & _READY == _READY else np.array(x, order="C")


def fitting(x: Any, shape: Shape, dtype: np.dtype) -> np.ndarray | None:
    """Returns a plain array as native kernels read it; None for anything else."""
    if type(x) is not np.ndarray or x.dtype != dtype or x.shape != shape:
        return None
    return x if x.flags.num & _READY == _READY else np.array(x, order="C")


def quantizer(end: InputEnd, library: Library | None) -> Callable[[Any], np.ndarray]:
    """Returns a function from a real input to its codes, those of `input_codes`.

    Args:
      end: The input.
      library: Library of native kernels, which quantize float32; XLA does the rest,
        but for integers that are their own codes.
    """
    value, single = end.value, np.dtype(np.float32)
    native = library and library.grid_call("quantize", value, end.shape)
    own = np.dtype(value.dtype)
    xla = jax.jit(lambda x: input_codes(jnp.reshape(x, end.shape), value))

    def quantize(x: Any) -> np.ndarray:
        if native and (real := fitting(x, end.real_shape, single)) is not None:
            codes = np.empty(end.shape, own)
            native(real, codes)
            return codes
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


def dequantizer(
    value: Value, shape: Shape, library: Library | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from output codes to real values, those of `real_output`.

    Args:
      value: The output.
      shape: Shape of the real values: without the axis of time for a step.
      library: Library of native kernels, for grids of one scale; XLA does the rest.
    """
    native = library and library.grid_call("dequantize", value, shape)
    xla = jax.jit(lambda q: real_output(q, value))

    def dequantize(codes: np.ndarray) -> np.ndarray:
        if value.grid is None:  # The integers of the model.
            dtype = jax.dtypes.canonicalize_dtype(value.dtype_of_model or codes.dtype)
            return codes.reshape(shape).astype(dtype, copy=False)
        if not native:
            return np.array(xla(codes)).reshape(shape)
        x = np.empty(shape, np.float32)
        native(codes, x)
        return x

    return dequantize
