"""Real values at the ends of a native call: kernels compute their codes themselves."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.backends.native.emission import DTYPES
from qjax.graph.graph import Value
from qjax.qpoint import grid_codes, grid_values

_MOST_STEPS = 1 << 21  # From the zero point of a grid.
_WORDS = 6  # Of one input or output.


@dataclasses.dataclass(frozen=True)
class RealEnd:
    """An input or an output of real values on one grid, float32.

    Attributes:
      scale: Units of the real value per code.
      zero_point: Code of 0.
      low: Least code.
      high: Largest code.
      dtype: Type of the codes.
    """

    scale: np.float32
    zero_point: int
    low: int
    high: int
    dtype: str

    def words(self) -> list[int]:
        """Returns what the library reads: ends.h."""
        floats = np.array([self.scale, np.float32(1) / self.scale], np.float32)
        bits = map(int, floats.view(np.uint32))
        return [1, self.zero_point, self.low, self.high, *bits]

    def codes(self, x: jax.Array) -> jax.Array:
        """Computes the codes of real values in XLA."""
        ends = (jnp.int32(n) for n in (self.zero_point, self.low, self.high))
        return grid_codes(x, jnp.asarray(self.scale), *ends).astype(self.dtype)

    def values(self, q: jax.Array) -> jax.Array:
        """Computes the real values of codes in XLA."""
        return grid_values(q, jnp.asarray(self.scale), jnp.int32(self.zero_point))


def input_end(value: Value) -> RealEnd | None:
    """Returns an input whose codes kernels compute, or None for one of another kind.

    That is one scale for all, without a rescaling, rounded half to even.
    """
    zero = value.zero_point
    steps = max(abs(value.low - zero), abs(value.high - zero))
    is_plain = value.rounding == "half_even" and value.rescaling == (1.0, 0.0)
    return _real_end(value) if is_plain and steps <= _MOST_STEPS else None


def output_end(value: Value) -> RealEnd | None:
    """Returns an output whose real values kernels compute, or None: of one scale."""
    return _real_end(value)


def _real_end(value: Value) -> RealEnd | None:
    if value.grid is None or value.dtype not in DTYPES or np.ndim(value.grid.scale):
        return None
    scale, zero = np.float32(value.grid.scale), value.grid.zero_point
    # Beyond these numbers XLA takes those without an exponent for 0.
    if not 2.0**-100 <= scale <= 2.0**100 or not -(1 << 31) <= zero < 1 << 31:
        return None
    return RealEnd(scale, zero, value.low, value.high, value.dtype)


class Reals(NamedTuple):
    """The inputs and outputs of a call that are real values; the others are codes.

    Attributes:
      inputs: For each input its end, or None for codes.
      outputs: For each output its end, or None for codes.
    """

    inputs: tuple[RealEnd | None, ...] = ()
    outputs: tuple[RealEnd | None, ...] = ()

    @property
    def words(self) -> np.ndarray:
        """Returns what the library reads, int64; nothing where all are codes."""
        return np.array(_words((*self.inputs, *self.outputs)), np.int64)


@functools.cache
def _words(ends: Sequence[RealEnd | None]) -> tuple[int, ...]:
    if not any(ends):
        return ()
    return tuple(n for end in ends for n in (end.words() if end else [0] * _WORDS))
