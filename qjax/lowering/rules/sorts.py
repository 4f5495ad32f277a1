"""Rules of sorts, and of the largest values along an axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import lax

from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import settled
from qjax.lowering.rules.gathers import read_places
from qjax.lowering.rules.levels import on_grid
from qjax.lowering.rules.moves import add_move, placed
from qjax.lowering.rules.whole import places_of
from qjax.lowering.values import Abstract, Builder, Integers, Known
from qjax.model.trace import Equation, Trace

_MOST_SORTED = 1 << 22  # Codes beyond are several for one float32 number.


def _sort(
    builder: Builder, e: Equation, trace: Trace, *operands: Abstract
) -> tuple[Abstract, ...]:
    axis = int(e.params["dimension"]) % len(trace.shape(e.inputs[0]))
    if e.params["num_keys"] != 1:
        raise NotImplementedError(
            f"There is no integer rule for `sort` by {e.params['num_keys']} keys, met "
            f"in {where(e)}.\n  equation: {e}\nSort by one key."
        )
    key = _key(builder, e, trace, operands[0])
    found: list[Abstract] = [
        add_move(builder, e, trace, key, key.scale, "sort", {"axis": axis})
    ]
    if len(operands) == 1:
        return tuple(found)
    if not e.params["is_stable"]:
        raise NotImplementedError(
            f"`sort` in {where(e)} carries other values and leaves the order of equal "
            f"keys open.\n  equation: {e}\nUse `stable=True`."
        )
    order = _order(builder, e, key, axis, descending=False)
    for v, x in zip(e.inputs[1:], operands[1:], strict=True):
        if isinstance(x, Known) and _counts(np.asarray(x.value), axis):
            found.append(dataclasses.replace(order, dtype=str(trace.avals[v].dtype)))
        else:
            found.append(_along(builder, e, trace, x, v, order, axis))
    return tuple(found)


def _key(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Returns what is sorted by, as codes."""
    v = e.inputs[0]
    if not trace.is_real(v):
        return places_of(builder, e, trace, x, v, "key")
    x = on_grid(builder, e, trace, x, v)
    if not isinstance(x, Integers) or not x.is_codes or np.ndim(x.scale):
        raise refuse(e, x, "input")
    x = settled(builder, e, trace, x)
    most = max(abs(n) for n in (x.low, x.high, x.zero_point))
    if most > _MOST_SORTED:
        raise ValueError(
            f"`{e.primitive.name}` in {where(e)} is of codes up to {most}, of which "
            f"float32 may take several for one.\n  equation: {e}\nQuantize its input "
            "right before it, to at most 22 bits."
        )
    return x


def _order(
    builder: Builder, e: Equation, key: Integers, axis: int, *, descending: bool
) -> Integers:
    """Returns the places of keys in their order."""
    attributes = {"axis": axis, "descending": descending}
    options: Any = {"dtype": "int32", "path": where(e).strip("'")}
    value = builder.add("argsort", (key.value,), attributes, **options)
    return builder.numbers(value, e.place)


def _counts(x: np.ndarray, axis: int) -> bool:
    """Returns whether known numbers count the places along an axis."""
    sizes = [-1 if d == axis else 1 for d in range(x.ndim)]
    return bool(np.all(x == np.arange(x.shape[axis]).reshape(sizes)))


def _along(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    v: int,
    order: Integers,
    axis: int,
) -> Integers:
    """Returns values in the order of a sort by others."""
    shape = trace.shape(v)
    rank, path = len(shape), where(e).strip("'")
    others = [d for d in range(rank) if d != axis]
    sizes = {"sizes": [-1, *shape[1:], 1]} if all(shape) else {"sizes": [*shape, 1]}
    places = builder.add("reshape", (order.value,), sizes, path=path)
    attributes = {
        "offset_dims": [],
        "collapsed_slice_dims": [axis],
        "start_index_map": [axis],
        "operand_batching_dims": others,
        "start_indices_batching_dims": others,
    }
    own = dataclasses.replace(order, value=places)
    named = dataclasses.replace(e, inputs=(v, *e.inputs[1:]))
    return read_places(
        builder,
        named,
        trace,
        x,
        own,
        attributes,
        [1] * rank,
        lax.GatherScatterMode.CLIP,
    )


def _top_k(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> tuple[Abstract, ...]:
    """Returns the largest values in descending order, and their places."""
    rank = len(trace.shape(e.inputs[0]))
    axis, k = int(e.params.get("axis", -1)) % rank, int(e.params["k"])
    key, path = _key(builder, e, trace, x), where(e).strip("'")
    stop: list[int | None] = [None] * rank
    stop[axis] = k
    ends = {"start": [0] * rank, "stop": stop, "steps": [1] * rank}

    def largest(source: int) -> int:
        own = builder.values[source]
        options: Any = {"grid": own.grid, "dtype": own.dtype, "path": path}
        ordered = builder.add("sort", (source,), {"axis": axis}, **options)
        falling = builder.add("rev", (ordered,), {"axes": [axis]}, **options)
        return builder.add("slice", (falling,), ends, **options)

    values = placed(key, largest, e, rank)
    order = _order(builder, e, key, axis, descending=True)
    places = builder.add("slice", (order.value,), ends, dtype="int32", path=path)
    return values, dataclasses.replace(order, value=places)


# Primitive -> its rule.
SORTS: Mapping[str, LoweringRule] = {
    "sort": _sort,
    "top_k": _top_k,
}
