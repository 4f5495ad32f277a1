"""Scales from the values themselves: `alpha="auto"` and `alpha="auto_po2"` of QKeras.

    least squares:  s = mean(x * q) / (mean(q * q) + eps),  eps = 1e-7
    power of two:   2^clip(round(log2(s + eps)), least, largest)

over all axes but those that have scales of their own: the last by default. A tensor of
rank 1 has one scale where a largest value is sought, and one per element where least
squares are.

Checked against QKeras (snapshot 78ea90f) by `tests/conformance`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax.mesh_axes import axes_of, vary
from qjax.rounding import power_of_two, quotient, round_log2

EPSILON = 1e-7  # Keras's epsilon.

Axes = int | tuple[int, ...] | None


class Sharing(NamedTuple):
    """The elements of a tensor that share a scale."""

    axis: Axes = None  # Axes with scales of their own; None: the last.
    elements_per_scale: Axes = None  # Group sizes along these axes; None: 1.


LAST = Sharing()


def largest(x: jax.Array, sharing: Sharing = LAST) -> jax.Array:
    """Returns the largest of the values that share a scale, in the rank of ``x``."""
    axes = tuple(range(x.ndim)) if x.ndim < 2 else _reduced(x.ndim, sharing.axis)
    return jnp.max(x, axes, keepdims=True, initial=-jnp.inf if x.size else 0.0)


def least_squares(x: jax.Array, q: jax.Array, sharing: Sharing = LAST) -> jax.Array:
    """Returns the scales ``s`` that minimize ``sum((x - s * q)^2)``, rank of ``x``."""
    # So small that no sum of products with codes of 16 bits overflows.
    small = 2.0 ** -(17 + x.size.bit_length())
    xq, qq = (x * small) * q, q * q
    if x.ndim > 1:
        xq, qq = _mean(xq, sharing), _mean(qq, sharing)
    return divide(xq, qq + EPSILON) * (1.0 / small)


def standard_deviation(x: jax.Array, over: tuple[int, ...] | None = None) -> jax.Array:
    """Returns the standard deviation over some axes, all but the last by default."""
    if over is None:
        over = tuple(range(x.ndim)) if x.ndim < 2 else _reduced(x.ndim, None)
    most = jnp.max(jnp.abs(x), over, keepdims=True, initial=0.0)
    return jnp.std(divide(x, most), over, keepdims=True) * most


def to_power_of_two(
    scale: jax.Array, least: ArrayLike | None = None, most: ArrayLike | None = None
) -> jax.Array:
    """Rounds scales to powers of two in the log domain, between two exponents."""
    exponent = round_log2(scale + EPSILON)
    if least is not None:
        exponent = jnp.maximum(exponent, jnp.asarray(least, jnp.int32))
    if most is not None:
        exponent = jnp.minimum(exponent, jnp.asarray(most, jnp.int32))
    return power_of_two(exponent)


def refine(
    step: Callable[[jax.Array], jax.Array], scale: jax.Array, times: ArrayLike
) -> jax.Array:
    """Applies ``step`` to a scale a number of times; stops where it changes nothing."""

    def go_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, is_moving, _ = state
        return (i < times) & is_moving

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        i, _, old = state
        new = jnp.broadcast_to(step(old), old.shape)
        return i + 1, jnp.any(new != old), new

    # The shape that steps settle to, and the axes of a mesh they vary over.
    found = jax.eval_shape(step, scale)
    start = jnp.broadcast_to(scale, jnp.broadcast_shapes(found.shape, scale.shape))
    start = vary(start, axes_of(found))
    is_moving = vary(jnp.bool_(True), axes_of(jax.typeof(start)))
    return jax.lax.while_loop(go_on, body, (jnp.int32(0), is_moving, start))[2]


def divide(a: jax.Array, b: ArrayLike) -> jax.Array:
    """Computes `quotient`, and 0 where ``b`` is 0."""
    b = jnp.asarray(b, a.dtype)
    return jnp.where(b == 0, 0.0, quotient(a, jnp.where(b == 0, 1.0, b)))


def check_sharing(shape: tuple[int, ...], sharing: Sharing, name: str) -> None:
    """Raises if axes or groups do not fit a shape."""
    axes = sharing.axis
    for a in () if axes is None else _tuple(axes):
        if not -len(shape) <= a < len(shape):
            raise ValueError(
                f"`{name}`: `scale_axis={axes}` does not exist in shape {shape}."
            )
    if sharing.elements_per_scale is None:
        return
    if axes is None:
        raise ValueError(
            f"`{name}`: `elements_per_scale` groups along `scale_axis`, which is None."
        )
    sizes = _group_sizes(sharing)
    for a, n in zip(_tuple(axes), sizes, strict=True):
        if n < 1 or shape[a] % n:
            raise ValueError(
                f"`{name}`: `elements_per_scale={sharing.elements_per_scale}` must "
                f"divide the axes {axes} of shape {shape}."
            )


def _mean(x: jax.Array, sharing: Sharing) -> jax.Array:
    """Averages the values that share a scale, repeated along the members of a group."""
    axes = _reduced(x.ndim, sharing.axis)
    if sharing.elements_per_scale is None:
        return jnp.mean(x, axes, keepdims=True)
    assert sharing.axis is not None
    kept = [a % x.ndim for a in _tuple(sharing.axis)]
    sizes = dict(zip(kept, _group_sizes(sharing), strict=True))
    split: list[int] = []
    over: list[int] = []
    for d, n in enumerate(x.shape):
        if d in sizes:
            over.append(len(split) + 1)
            split += [n // sizes[d], sizes[d]]
        else:
            over.append(len(split))
            split.append(n)
    mean = jnp.mean(x.reshape(split), over, keepdims=True)
    mean = mean.reshape(
        [n // sizes[d] if d in sizes else 1 for d, n in enumerate(x.shape)]
    )
    for d, n in sizes.items():
        mean = jnp.repeat(mean, n, axis=d)
    return mean


def _group_sizes(sharing: Sharing) -> tuple[int, ...]:
    assert sharing.axis is not None and sharing.elements_per_scale is not None
    axes, sizes = _tuple(sharing.axis), _tuple(sharing.elements_per_scale)
    return sizes * len(axes) if len(sizes) == 1 else sizes


def _reduced(rank: int, axis: Axes) -> tuple[int, ...]:
    kept = {rank - 1} if axis is None else {a % rank for a in _tuple(axis)}
    return tuple(d for d in range(rank) if d not in kept)


def _tuple(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
