"""Quotients of codes in integers: one algorithm, simulated and shipped.

    reciprocal = round(multiplier * 2^14 / b)             one division for each divisor
    code = clip(floor(a * reciprocal * 2^-shift + 1/2) + zero_point, low, high)

of codes ``a`` and ``b`` less their zero points; ``multiplier * 2^(14 - shift)`` is the
ratio of scales. What is divided by 0 saturates by its sign; 0 / 0 is 0. The
reciprocal has at least 28 bits, so that a code of 16 bits is off by 2^-12 before it is
rounded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.integer import clipped_codes

FRACTION = 14  # Bits by which a reciprocal is finer than the multiplier.
MOST = 1 << 17  # Codes are below that, less their zero point.


def divided(
    a: jax.Array,
    b: jax.Array,
    multiplier: Any,
    shift: Any,
    zero_point: Any,
    low: Any,
    high: Any,
) -> tuple[jax.Array, jax.Array]:
    """Divides codes by codes.

    Args:
      a: Dividends less their zero point, int32, below 2^17.
      b: Divisors likewise; broadcast against ``a``.
      multiplier: int32, ``[]``, not negative.
      shift: int32, ``[]``, 0 to 62: that of ``multiplier`` and `FRACTION`; what is
        more makes every code 0.
      zero_point: int32, ``[]``.
      low: Least code.
      high: Largest code.

    Returns:
      Codes, int32, and whether each is within its ends without a clip.
    """
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x).astype(jnp.int64)
        size = jnp.maximum(jnp.abs(wide(b)), 1)
        found = ((wide(multiplier) << FRACTION) + (size >> 1)) // size
        reciprocal = jnp.where(wide(b) < 0, -found, found)
        down = wide(shift)
        half = (jnp.ones_like(down) << jnp.minimum(down, 62)) >> 1
        steps = (wide(a) * reciprocal + half) >> jnp.minimum(down, 62)
        steps = jnp.where(down > 62, jnp.zeros_like(steps), steps)
        beyond = jnp.sign(wide(a)) << 40
        steps = jnp.where(wide(b) == 0, beyond, steps)
        return clipped_codes(steps, zero_point, low, high)
