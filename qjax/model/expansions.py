"""Equations as simpler ones: stacks, tiles, searches, and scans of few steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p


def expansion(eqn: Any, keep_derivatives: bool) -> Callable[..., Any] | None:
    """Returns the computation of an equation by simpler ones; None if it stays.

    Stacks and tiles are concatenations and broadcasts; what JAX itself writes out is so
    unless it has a derivative that would be lost; a search in a short sorted table
    counts the numbers that come before. A scan of few steps is unrolled where it is
    lowered; as a part of a model that is trained it stays.
    """
    params = eqn.params
    if eqn.primitive.name == "stack":
        axis = params["axis"]
        return lambda *xs: lax.concatenate(
            [lax.expand_dims(x, (axis,)) for x in xs], axis
        )
    if eqn.primitive.name == "unstack":
        axis, sizes = params["axis"], (1,) * len(eqn.outvars)
        return lambda x: [lax.squeeze(y, (axis,)) for y in lax.split(x, sizes, axis)]
    if eqn.primitive.name == "tile":
        return lambda x: _tiled(x, params["reps"])
    if params.get("name") == "searchsorted" and _is_short_table(eqn):
        return _counted(eqn)
    if eqn.primitive.name == _HIGHER and not (keep_derivatives and _is_real(eqn)):
        return _written_out(params["_prim"])
    is_short = eqn.primitive is p.scan_p and params["length"] <= MOST_STEPS
    return _unrolled(params) if is_short and not keep_derivatives else None


_HIGHER = "call_hi_primitive"  # JAX's name for what others write out, from 0.12 on.
MOST_STEPS = 256  # Most steps of a scan that is unrolled.
MOST_SEARCHED = 256  # Most numbers of a table whose comparisons are written out.


def _is_real(eqn: Any) -> bool:
    dtypes = (v.aval.dtype for v in eqn.outvars)
    return any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)


def _written_out(primitive: Any) -> Callable[..., list[Any]]:
    """Returns an operation in terms of simpler ones, as JAX defines it."""

    def run(*args: Any) -> list[Any]:
        found = primitive.expand(*jax.tree.unflatten(primitive.in_tree, args))
        return jax.tree.leaves(found)

    return run


def _is_short_table(eqn: Any) -> bool:
    shapes = [v.aval.shape for v in eqn.invars]
    return len(shapes) == 2 and len(shapes[0]) == 1 and shapes[0][0] <= MOST_SEARCHED


def _counted(eqn: Any) -> Callable[..., list[Any]]:
    """Returns a search in a sorted table as a sum of comparisons, number by number."""
    dtype = eqn.outvars[0].aval.dtype
    search = jex.jaxpr_as_fun(eqn.params["jaxpr"])
    with jax.ensure_compile_time_eval():
        zeros = (jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.invars)
        is_left = not jnp.any(search(*zeros)[0])
    is_before = lax.le if is_left else lax.lt

    def count(table: jax.Array, x: jax.Array) -> list[Any]:
        found = lax.full(x.shape, 0, dtype)
        if jnp.issubdtype(table.dtype, jnp.floating):
            table = jnp.where(jnp.isnan(table), jnp.array(jnp.inf, table.dtype), table)
        for k in range(table.shape[0]):
            number = lax.index_in_dim(table, k, keepdims=False)
            is_after = ~is_before(x, lax.broadcast(number, x.shape))  # NaN is last.
            found = found + is_after.astype(dtype)
        return [found]

    return count


def _tiled(x: jax.Array, reps: Sequence[int]) -> jax.Array:
    for axis, n in enumerate(reps):
        if n != 1:
            shape = (*x.shape[:axis], n, *x.shape[axis:])
            kept = tuple(d for d in range(len(shape)) if d != axis)
            whole = (*x.shape[:axis], n * x.shape[axis], *x.shape[axis + 1 :])
            x = lax.reshape(lax.broadcast_in_dim(x, shape, kept), whole)
    return x


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # From JAX 0.12 on.
    return len(consts), len(carry)


def _unrolled(params: Mapping[str, Any]) -> Callable[..., list[Any]]:
    """Returns a scan as a Python loop."""
    step, length = jex.jaxpr_as_fun(params["jaxpr"]), params["length"]
    first, kept = scan_counts(params)
    order = range(length)[::-1] if params["reverse"] else range(length)

    def loop(*args: Any) -> list[Any]:
        consts, xs = args[:first], args[first + kept :]
        carry, found = list(args[first : first + kept]), {}
        for t in order:
            now = [lax.index_in_dim(x, t, keepdims=False) for x in xs]
            out = step(*consts, *carry, *now)
            carry, found[t] = list(out[:kept]), out[kept:]
        columns = zip(*(found[t] for t in range(length)), strict=True)
        rows = [[lax.expand_dims(y, (0,)) for y in column] for column in columns]
        return carry + [lax.concatenate(column, 0) for column in rows]

    return loop
