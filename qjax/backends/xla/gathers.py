"""Bodies of gathers, scatters, sorts and whole numbers, by XLA's own operations."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.graph.operations.arithmetic import COMPARED
from qjax.graph.operations.gathers import sum_sizes, updates_at_most

_MODES = {
    "clip": lax.GatherScatterMode.CLIP,
    "fill": lax.GatherScatterMode.FILL_OR_DROP,
    "drop": lax.GatherScatterMode.FILL_OR_DROP,
}


def _gather(node, params, inputs):
    a, (x, places) = node.attributes, inputs
    sizes = zip(a["slice_sizes"], x.shape, strict=True)
    names = (
        "offset_dims",
        "collapsed_slice_dims",
        "start_index_map",
        "operand_batching_dims",
        "start_indices_batching_dims",
    )
    options: dict[str, Any] = {"mode": _MODES[a["mode"]]}
    if a["mode"] == "fill":
        info = jnp.iinfo(x.dtype)
        x = x if info.min <= a["fill"] <= info.max else x.astype(jnp.int32)
        options["fill_value"] = a["fill"]
    return lax.gather(
        x,
        places.astype(jnp.int32),
        lax.GatherDimensionNumbers(**{name: tuple(a[name]) for name in names}),
        tuple(n if size is None else size for size, n in sizes),
        **options,
    )


def _scattering(a: Any) -> lax.ScatterDimensionNumbers:
    return lax.ScatterDimensionNumbers(
        update_window_dims=tuple(a["update_window_dims"]),
        inserted_window_dims=tuple(a["inserted_window_dims"]),
        scatter_dims_to_operand_dims=tuple(a["scatter_dims"]),
        operand_batching_dims=tuple(a["operand_batching_dims"]),
        scatter_indices_batching_dims=tuple(a["scatter_indices_batching_dims"]),
    )


def _scatter_add(node, params, inputs):
    a, (places, updates) = node.attributes, inputs
    most = a["most_updates"]
    if (found := updates_at_most(a, places.shape)) > most:
        raise ValueError(
            f"This program sums at most {most} updates at a place, as many as there "
            f"were when it was lowered, and there are now {found}. Lower the model for "
            "this shape."
        )
    zeros = jnp.zeros(sum_sizes(a, places.shape, updates.shape), jnp.int32)
    return lax.scatter_add(
        zeros,
        places.astype(jnp.int32),
        updates.astype(jnp.int32) - a["input_zero_point"],
        _scattering(a),
        mode=_MODES[a["mode"]],
    )


def _scatter(node, params, inputs, scatter=lax.scatter):
    a, (places, x, updates) = node.attributes, inputs
    if x.dtype != updates.dtype:
        x, updates = x.astype(jnp.int32), updates.astype(jnp.int32)
    options: Any = {"mode": _MODES[a["mode"]]}
    return scatter(x, places.astype(jnp.int32), updates, _scattering(a), **options)


def _argsort(node, params, inputs):
    axis, x = node.attributes["axis"], inputs[0].astype(jnp.int32)
    # The complement of a code descends as the code ascends, and never overflows.
    x = ~x if node.attributes["descending"] else x
    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return lax.sort((x, places), dimension=axis, is_stable=True, num_keys=1)[1]


def _arithmetic(node, params, inputs):
    kind, dtype = node.attributes["kind"], node.attributes["dtype"]
    if kind == "convert":  # Type by type as two's complement wraps.
        x = inputs[0].astype(jnp.int32)
        return x != 0 if dtype == "bool" else x.astype(dtype)
    pair = [x != 0 if dtype == "bool" else x.astype(dtype) for x in inputs]
    pair = jnp.broadcast_arrays(*pair)
    if kind == "abs" and dtype.startswith("u"):
        return pair[0]
    if kind in COMPARED:
        return getattr(lax, kind)(*pair)
    named = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
    named |= {"not": "bitwise_not"}
    return getattr(lax, named.get(kind, kind))(*pair)


GATHERS = {
    "gather": _gather,
    "scatter_add": _scatter_add,
    "scatter": _scatter,
    "scatter_max": lambda node, params, xs: _scatter(node, params, xs, lax.scatter_max),
    "scatter_min": lambda node, params, xs: _scatter(node, params, xs, lax.scatter_min),
    "sort": lambda node, params, inputs: lax.sort(
        inputs[0], dimension=node.attributes["axis"]
    ),
    "argsort": _argsort,
    "arithmetic": _arithmetic,
}
