"""Biases of products of two activations, on a grid finer than their accumulator's.

The program and the traced model choose this grid from what both know: the storage of
the operands, the length of the sum, and the bias.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.lowering.accumulators import Accumulator, Late, Made, TargetGrid
from qjax.model.lines import ranked
from qjax.model.trace import Equation

MOST_SHIFT = 24  # Largest shift of a product for a finer bias.


def largest_product(dtypes: Sequence[str], taps: int) -> int:
    """Bounds a sum of products of codes, less their zero points, by their storage.

    Args:
      dtypes: Types of the codes.
      taps: Number of products in a sum.

    Returns:
      ``taps * (2^bits - 1) * (2^bits - 1) ...``.
    """
    return taps * math.prod((1 << np.iinfo(d).bits) - 1 for d in dtypes)


def bias_shift(top: Any, most: int) -> Any:
    """Returns the largest shift of an accumulator that its word has room for.

        k = max(j in 0..24 with top * 2^j <= most, or j = 0)

    Args:
      top: Bound of the accumulator with its bias, float64, known or traced.
      most: Largest magnitude that the accumulator may reach.

    Returns:
      The shift, an integer of the kind of ``top``.
    """
    fits = (top * 2.0**j <= most for j in range(1, MOST_SHIFT + 1))
    # No product with 1: strict promotion knows none of truth values.
    return sum(x.astype(np.int32) if hasattr(x, "astype") else int(x) for x in fits)


class Biased(NamedTuple):
    """A product of two activations with its bias, as the program computes it."""

    acc: Accumulator  # Its factors are scales; or one of them is a gain.
    by_gain: Accumulator | None  # The same with one factor, rounded as float32 does.
    is_by_gain: jax.Array

    def codes(self, target: TargetGrid) -> jax.Array:
        """Requantizes by the rounding that lowering has for these factors."""
        if self.by_gain is None:
            return self.acc.codes(target)
        ways: tuple[Late, Late] = self.by_gain.codes, self.acc.codes
        return lax.cond(self.is_by_gain, *(lambda way=way: way(target) for way in ways))


def biased_product(
    acc: Accumulator,
    x: int,
    affine: Sequence[Equation],
    read: Callable[[int], jax.Array],
    top: int,
    most: int,
) -> Biased | None:
    """Adds constants to a product of two activations, and multiplies by others.

    Does what the rules of `qjax.lowering.rules.arithmetic` do, of traced values.

    Args:
      acc: The product.
      x: Its value in the trace.
      affine: Equations that follow it.
      read: Returns a known value.
      top: Bound of the product, by `largest_product`.
      most: Largest magnitude that the accumulator may reach.

    Returns:
      The accumulator after them; None for an equation that is none of these.
    """
    rank, factors = acc.value.ndim, []
    bias: jax.Array | None = None
    shift: Any = jnp.int32(0)
    is_once, has_gain, is_shifted = jnp.bool_(True), jnp.bool_(False), jnp.bool_(False)
    with jax.enable_x64(True):
        scale, gain = _wide(acc.scales[0]) * _wide(acc.scales[1]), _wide(jnp.ones(()))
        for e in affine:
            name = e.primitive.name
            known = [ranked(read(v), rank) for v in e.inputs if v != x]
            if name == "neg" or (name == "sub" and e.inputs[1] == x):
                factors.append(jnp.float32(-1))
                is_once, has_gain = is_once & ~has_gain, jnp.bool_(True)
                gain = -gain
            if name in ("mul", "div"):
                (factor,) = known
                factor = factor if name == "mul" else 1.0 / _still(factor)
                is_one = jnp.all(factor == 1)
                factors.append(factor)
                is_once, has_gain = is_once & (is_one | ~has_gain), has_gain | ~is_one
                gain = gain * _wide(factor)
            elif name in ("add", "add_any", "sub"):
                real = _wide(known[0])
                real = -real if name == "sub" and e.inputs[0] == x else real
                unit = scale * gain
                is_some = jnp.any(real != 0)
                ratio = jnp.abs(real) / _whole(unit, real)
                reach = top + jnp.max(ratio, initial=1.0)
                found = bias_shift(reach, most).astype(jnp.int32)
                shift = jnp.where(is_some & ~is_shifted, found, shift)
                is_shifted |= is_some
                own = unit * 2.0 ** -shift.astype(jnp.float64)
                steps = jnp.rint(real / _whole(own, real)).astype(jnp.int64)
                bias = steps if bias is None else bias + steps
                is_once &= ~(is_some & has_gain)
            elif name != "neg":
                return None
            x = e.outputs[0]
        if bias is None:
            return None
        value = (acc.value << shift) + bias.astype(jnp.int32)
        finer = (2.0 ** -shift.astype(jnp.float64)).astype(jnp.float32)
    made = Made("other", acc.made.target)
    scales = (*acc.scales, finer)
    whole = Accumulator(value, (*scales, *factors), made=made)
    if not factors:
        return Biased(whole, None, is_once)
    one = factors[0]
    for factor in factors[1:]:
        one = one * factor
    return Biased(whole, Accumulator(value, scales, one, made), is_once)


def _wide(x: jax.Array) -> jax.Array:
    return _still(x).astype(jnp.float64)


def _still(x: jax.Array) -> jax.Array:
    """Hides a value from rewrites of the compiler, and from derivatives."""
    return lax.optimization_barrier(lax.stop_gradient(x))


def _whole(unit: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts a divisor: by one number a quotient would become a product."""
    return _still(jnp.broadcast_to(unit, np.broadcast_shapes(unit.shape, x.shape)))
