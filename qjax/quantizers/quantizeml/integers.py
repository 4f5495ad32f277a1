"""Exact integers under QuantizeML's numbers: their checks, ranks, ends and shifts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.quantizers.spec import is_known

MOST_FRAC_BITS = 126  # The scale is a normal float32.


def check_value_bits(value_bits: ArrayLike) -> ArrayLike:
    """Raises if a word length, as far as it is known, is not in 1..31."""
    check_integers("value_bits", value_bits)
    if np.ndim(value_bits) != 0:
        raise ValueError(f"`value_bits` must be one number, got {value_bits}.")
    if is_known(value_bits) and not 1 <= np.asarray(value_bits) <= 31:
        raise ValueError(
            f"`value_bits` must lie in 1..31 (the sign is not counted), got "
            f"{value_bits}."
        )
    return value_bits


def check_shift(shift: ArrayLike, value_bits: ArrayLike) -> None:
    """Raises if a left shift, as far as it is known, moves every code out."""
    if is_known(shift, value_bits) and np.any(np.greater_equal(shift, value_bits)):
        raise ValueError(
            f"Codes would move left by {np.max(np.asarray(shift))} bits in a word of "
            f"value_bits={value_bits}: all saturate. Use more `value_bits`, or fewer "
            "`frac_bits`."
        )


def as_integers(name: str, value: ArrayLike) -> jax.Array:
    """Returns integers as int32; raises TypeError if they are of another type."""
    check_integers(name, value)
    return jnp.asarray(value).astype(jnp.int32)


def check_integers(name: str, value: ArrayLike) -> None:
    """Raises TypeError unless a value is of an integer type."""
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {dtype}.")


def lift(value: ArrayLike, rank: int) -> jax.Array:
    """Extends an array of the last axes to the rank of another array."""
    value = jnp.asarray(value)
    if value.ndim == 0:
        return value
    return value.reshape((1,) * (rank - value.ndim) + value.shape)


def lifted(*values: ArrayLike) -> list[jax.Array]:
    """Extends all arrays but scalars to the largest rank among them."""
    rank = max(np.ndim(v) for v in values)
    return [lift(v, rank) for v in values]


def to_int64(value: ArrayLike) -> jax.Array:
    """Widens integers to int64, inside ``jax.enable_x64``."""
    return jnp.asarray(value).astype(jnp.int64)


def saturated(wide: jax.Array, value_bits: jax.Array) -> jax.Array:
    """Clips int64 values to ``[-2^value_bits, 2^value_bits - 1]``."""
    limit = jnp.ones_like(value_bits) << value_bits
    return jnp.clip(wide, -limit, limit - 1)


def shifted(wide: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``floor(wide * 2^shift)``, int64: right for what saturates at 2^31."""
    # Numbers that move left saturate at 2^31 all the same.
    left = jnp.clip(wide, -(1 << 31), (1 << 31) - 1) << jnp.clip(shift, 0, 32)
    return jnp.where(shift > 0, left, wide >> jnp.clip(-shift, 0, 63))


def shifted_half_up(wide: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``floor(wide * 2^shift + 1/2)``, int64: right for what saturates."""
    next_bit = shifted(wide, shift + 1) & 1
    return shifted(wide, shift) + next_bit


def fitting_bits(frac_bits: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns fraction bits as int32; raises unless they suit codes of a shape."""
    bits = as_integers("frac_bits", frac_bits)
    check_fits("frac_bits", bits.shape, shape)
    known = np.asarray(frac_bits, np.int64) if is_known(frac_bits) else 0
    if np.any(np.abs(known) > MOST_FRAC_BITS):
        raise ValueError(f"`frac_bits` must lie in -126..126, got {frac_bits}.")
    return bits


def check_fits(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises unless a shape broadcasts against the last axes of another."""
    last = shape[len(shape) - len(got) :]
    if len(got) > len(shape) or any(
        n not in (1, m) for n, m in zip(got, last, strict=True)
    ):
        raise ValueError(
            f"`{name}` must have shape (), or broadcast against the last axes of "
            f"{shape}, got {got}."
        )
