"""The axes of a mesh over which values vary inside of `jax.shard_map`.

JAX's functions bring their operands to the same axes; what binds a primitive itself, as
a trace that is run again does, has to do it here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | tuple[str, ...]  # Names of axes of `shard_map`, `pmap` or `vmap`.


def axes_of(aval: Any) -> frozenset[str]:
    """Returns the axes over which values of an abstract type vary."""
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def vary(x: Any, axes: Iterable[str]) -> Any:
    """Makes a value vary over axes, if it does not yet; its numbers stay."""
    missing = frozenset(axes) - axes_of(jax.typeof(x))
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def aligned(values: Sequence[Any]) -> Sequence[Any]:
    """Makes all values vary over the axes of any of them."""
    if not any(isinstance(x, jax.core.Tracer) for x in values):
        return values
    axes = frozenset().union(*(axes_of(jax.typeof(x)) for x in values))
    return [vary(x, axes) for x in values] if axes else values


def as_axes(axis_name: AxisName | None) -> tuple[str, ...]:
    """Returns the names of axes over which a batch is split.

    Raises:
      ValueError: for a name that is no axis where this is called.
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    for name in names:
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"`axis_name` {name!r} is no axis here: call it inside of a function "
                f"that `jax.shard_map`, `jax.pmap` or `jax.vmap` runs over {name!r}."
            ) from error
    return names


def joined(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Joins the parts of an array along their first axis, the same everywhere.

    A sum of parts in their places among zeros: its result does not vary over the axes.
    """
    for name in axes:
        size, n = lax.axis_size(name), x.shape[0]
        whole = jnp.zeros((size * n, *x.shape[1:]), x.dtype)
        place = lax.axis_index(name) * n
        x = lax.psum(lax.dynamic_update_slice_in_dim(whole, x, place, 0), name)
    return x


def ends_of(
    low: jax.Array, high: jax.Array, axes: Sequence[str]
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest values of all parts, the same everywhere."""
    return lax.pmin(low, tuple(axes)), lax.pmax(high, tuple(axes))
