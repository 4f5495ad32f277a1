"""Softmaxes and normalisations that a simulation computes in the integers that ship.

What has no exact twin in float arithmetic is computed by the algorithm of the integer
program, from the codes of its input to the codes of its site, with the derivative of
the float function. The algorithm is a call whose name says what it computes: lowering
reads it there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.affine import QParams, QSpec
from qjax.estimators import plain_ste
from qjax.integer_calls import LARGE, IntegerCall, on_grid
from qjax.model.common_scales import CodeEnds
from qjax.qpoint import bind_point

_MOST_STEPS = 2.0**22  # From zero to a mask; float32 tells them all apart.


class Exact(NamedTuple):
    """A value that a simulation computes in integers once its grid is known.

    Attributes:
      call: What computes it.
      real: Its real value, whose derivative it has.
      operands: Operands of the call before those of the grid.
      bounds: Bounds of an activation behind it.
      kept: Truth values of what no mask takes out of its range; None for all.
    """

    call: IntegerCall
    real: jax.Array
    operands: tuple[jax.Array, ...]
    bounds: tuple[tuple[str, float], ...] = ()
    kept: jax.Array | None = None

    def seen(self, x: jax.Array) -> jax.Array:
        """Returns the real value as calibrators see it."""
        return x if self.kept is None else unmasked(x, self.kept)

    def per(self, scale: Any) -> jax.Array:
        """Returns the factor from the value to codes of ``scale``."""
        return jnp.asarray(1.0 / scale, self.real.dtype)

    def on_grid(
        self, params: QParams, spec: QSpec | CodeEnds, *, is_clipped: bool = True
    ) -> jax.Array:
        """Returns the value on a grid.

        Args:
          params: The grid.
          spec: Its word, or the ends of its codes.
          is_clipped: Whether its derivative is 0 where the largest code saturates.

        Returns:
          Real values, with the derivative of the float function.
        """
        ends = [jnp.asarray(q).astype(jnp.int32) for q in (spec.qmin, spec.qmax)]
        zero = jnp.asarray(params.zero_point)
        least, most = ends
        for name, bound in self.bounds:
            steps = jnp.rint(jnp.float32(bound) * (1.0 / params.scale))
            code = jnp.clip(steps, -(2.0**30), 2.0**30).astype(jnp.int32) + zero
            code = jnp.clip(code, *ends)
            least, most = (
                (jnp.maximum(least, code), jnp.maximum(most, code))
                if name == "max"
                else (jnp.minimum(least, code), jnp.minimum(most, code))
            )
        grid = params.scale, zero, least, most
        own = self.call, self.real, self.operands, grid
        return on_grid(*own, is_clipped=is_clipped)


class Masked(NamedTuple):
    """Marks a real value of which masks take a part out of its range.

    Attributes:
      kept: Truth values of what they leave.
    """

    kept: jax.Array

    def per(self, scale: Any) -> Any:
        """Returns the factor from the value to codes of ``scale``."""
        return 1.0 / scale

    def seen(self, x: jax.Array) -> jax.Array:
        """Returns the value as calibrators see it."""
        return unmasked(x, self.kept)


class Unmasked(NamedTuple):
    """Marks a real value of which a part masks before a softmax.

    What masks is no part of its range, and saturates.

    Attributes:
      kept: Truth values of what does not mask.
      is_input: Whether its codes say what masks, as of an input that is added.
    """

    kept: jax.Array
    is_input: bool

    def seen(self, x: jax.Array) -> jax.Array:
        """Returns the value as calibrators see it."""
        return unmasked(x, self.kept)


def coded_masks(x: jax.Array, params: QParams, spec: QSpec) -> tuple[Any, jax.Array]:
    """Puts an input with masks on a grid, with one more code, the least, for a mask.

        least = min(round(-100 / scale), -1, qmin - zero_point - 1) + zero_point

    All codes above are those of the word; between both lies what saturates in it.

    Args:
      x: Real values.
      params: The grid, one scale.
      spec: Its word, of at most 16 bits.

    Returns:
      The values on the grid, with the derivative of ``x``, and whether each is kept.
    """
    zero = jnp.asarray(params.zero_point).astype(jnp.int32)
    scale = lax.stop_gradient(params.scale)
    steps = jnp.maximum(jnp.rint(jnp.float32(-LARGE) * (1.0 / scale)), -_MOST_STEPS)
    below = jnp.asarray(spec.qmin).astype(jnp.int32) - zero - 1
    least = jnp.minimum(jnp.minimum(steps.astype(jnp.int32), -1), below)
    most = jnp.maximum(jnp.asarray(spec.qmax).astype(jnp.int32), least + zero + 1)
    found = plain_ste(x, scale, zero, least + zero, most, "mask")
    own = lax.stop_gradient(found)
    ends = least + zero, least + zero + 1
    of_two = bind_point(own, scale, zero, *ends, site="mask")
    return found, of_two > (least.astype(jnp.float32) + 0.5) * scale


def unmasked(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Puts the least value that is kept, whose code is the least, for all others."""
    least = jnp.min(jnp.where(kept, x, jnp.inf), keepdims=True)
    least = jnp.where(jnp.isfinite(least), least, jnp.zeros_like(least))
    return jnp.where(kept, x, least.astype(x.dtype))
