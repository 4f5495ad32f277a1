"""Softmaxes that a simulation computes in the integers that ship.

What has no exact twin in float arithmetic is computed by the algorithm of the integer
program, from the codes of its input to the codes of its site, with the derivative of
the float function. The algorithm is a call whose name says what it computes: lowering
reads it there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams, QSpec
from qjax.calls import shared
from qjax.integer import traced_fixed_point
from qjax.integer_softmax import (
    FRACTION,
    Empty,
    coded,
    exp_table,
    exp_tables,
    probabilities,
)
from qjax.integer_softmax import fraction as fraction_of
from qjax.model.kept import INTEGER, integer_of
from qjax.qpoint import grid_values


class SoftmaxCall(NamedTuple):
    """A softmax of codes, as far as it is known before it is traced.

    Attributes:
      axes: Axes that its sums go over.
      factor: Factor of its input, a float32.
      empty: What a row is in which the mask keeps nothing.
      fill: Largest finite number that a mask puts or adds; 0 if there is none.
      is_byte: Whether the codes of the input are 256 at most.
    """

    axes: tuple[int, ...]
    factor: float
    empty: Empty
    fill: float
    is_byte: bool

    @property
    def name(self) -> str:
        """Returns the name of the call, which `parse` reads."""
        axes = "_".join(map(str, self.axes))
        factor, fill = (
            f"{np.float32(x).view(np.uint32):08x}" for x in (self.factor, self.fill)
        )
        known = axes, factor, self.empty, fill, str(int(self.is_byte))
        return f"{INTEGER}softmax.{'.'.join(known)}"

    @staticmethod
    def parse(e: Any) -> "SoftmaxCall":
        """Reads the name of an equation."""
        _, axes, factor, empty, fill, is_byte = integer_of(e).split(".")
        real = lambda bits: float(np.uint32(int(bits, 16)).view(np.float32))
        own: Any = empty
        places = tuple(map(int, axes.split("_")))
        return SoftmaxCall(places, real(factor), own, real(fill), is_byte == "1")


class Exact(NamedTuple):
    """A value that a simulation computes in integers once its grid is known.

    Attributes:
      call: What computes it.
      real: Its real value, whose derivative it has.
      operands: Operands of the call before those of the grid.
    """

    call: SoftmaxCall
    real: jax.Array
    operands: tuple[jax.Array, ...]

    def per(self, scale: Any) -> jax.Array:
        """Returns the factor from the value to codes of ``scale``."""
        return jnp.asarray(1.0 / scale, self.real.dtype)

    def on_grid(
        self, params: QParams, spec: QSpec, *, is_clipped: bool = True
    ) -> jax.Array:
        """Returns the value on a grid.

        Args:
          params: The grid.
          spec: Its word.
          is_clipped: Whether its derivative is 0 where the largest code saturates.

        Returns:
          Real values, with the derivative of the float function.
        """
        ends = (jnp.asarray(q).astype(jnp.int32) for q in (spec.qmin, spec.qmax))
        zero = jnp.asarray(params.zero_point)
        operands = (*self.operands, params.scale, zero, *ends)
        found = _exact(self.call, is_clipped, self.real.astype(jnp.float32), operands)
        return found.astype(self.real.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _exact(
    call: SoftmaxCall, is_clipped: bool, real: jax.Array, operands: Any
) -> jax.Array:
    return _jitted(call)(*operands)[0]


@_exact.defjvp
def _exact_jvp(call: SoftmaxCall, is_clipped: bool, primals: Any, tangents: Any) -> Any:
    value, inside = _jitted(call)(*primals[1])
    real_dot = tangents[0]
    if not is_clipped:
        return value, real_dot
    return value, lax.select(inside, real_dot, lax.full_like(real_dot, 0))


@functools.lru_cache(maxsize=1024)
def _jitted(call: SoftmaxCall) -> Callable[..., Any]:
    def run(x: jax.Array, unit: jax.Array, *others: jax.Array) -> Any:
        *keep, scale, zero_point, qmin, qmax = others
        places = int(np.prod([x.shape[d] for d in call.axes]))
        factor = unit * np.float32(call.factor)
        tables = shared(_tables, factor, places, call.is_byte)
        steps = jnp.rint(x.astype(jnp.float32) * (1.0 / unit)).astype(jnp.int32)
        mask = keep[0] if keep else None
        found = probabilities(steps, tables, call.axes, mask, call.empty)
        multiplier, shift = shared(_multiplier, scale)
        codes, inside = coded(found, multiplier, shift, zero_point, qmin, qmax)
        return grid_values(codes, scale, zero_point), inside

    run.__name__ = run.__qualname__ = call.name
    return jax.jit(run)


def _tables(unit: jax.Array, places: int, is_byte: bool) -> jax.Array:
    with jax.enable_x64(True):
        if is_byte and fraction_of(places) == FRACTION:
            return exp_table(unit, jnp).astype(jnp.int32)
        found = exp_tables(unit, places, jnp).astype(jnp.int32)
        return found[1] if is_byte else found


def _multiplier(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return traced_fixed_point([jnp.float32(2.0**-FRACTION)], scale)
