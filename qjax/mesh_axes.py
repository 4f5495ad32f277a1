"""The axes of a mesh over which values vary inside of `jax.shard_map`.

JAX's functions bring their operands to the same axes; what binds a primitive itself, as
a trace that is run again does, has to do it here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax


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
