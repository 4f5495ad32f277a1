"""Loops: operations that run the graph inside of their node step by step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Value
from qjax.graph.operations.record import (
    COUNT,
    FLAG,
    Attribute,
    Ends,
    Operands,
    Operation,
    Shape,
)

_LENGTH = Attribute(
    "an integer, 0 or more, or null", lambda x: x is None or COUNT.holds(x)
)


def _results(o: Operands) -> list[tuple[Shape, Ends]]:
    """Returns shape and interval of each result: what is carried, then what is kept."""
    body, consts, carries = o.graphs["body"], o["consts"], o["carries"]
    first = consts + carries
    given = [body.values[v] for v in body.inputs]
    made = [body.values[v] for v in body.outputs]
    counts = len(given), len(made) >= carries, first <= len(given)
    wanted = "the body must have an input for each, and an output for each carry"
    o.check(counts == (len(o.inputs), True, True), wanted, [len(given), len(made)])
    for k, (x, own) in enumerate(zip(o.inputs, given, strict=True)):
        shape = x.shape[1:] if k >= first else x.shape
        o.check(k < first or bool(x.shape), f"input {k} must have steps", x.shape)
        _check_fit(o, f"input {k} of the body", x, shape, own)
    for k, (x, own) in enumerate(zip(made, given[consts:first], strict=False)):
        _check_fit(o, f"what is carried at {k}", x, x.shape, own)
    length = _length(o, first)
    carried = [(own.shape, (own.low, own.high)) for own in given[consts:first]]
    kept = [((length, *x.shape), (x.low, x.high)) for x in made[carries:]]
    return carried + kept


def _check_fit(o: Operands, what: str, x: Value, shape: Shape, own: Value) -> None:
    """Raises ValueError unless an input of the body takes all integers of a value."""
    o.check(shape == own.shape, f"{what} must have shape {own.shape}", shape)
    ends = own.low <= x.low and x.high <= own.high
    wanted = f"{what} must lie in [{own.low}, {own.high}]"
    o.check(ends, wanted, [x.low, x.high])
    same = x.grid == own.grid
    o.check(same, f"{what} must be on the grid {own.grid}", x.grid)


def _length(o: Operands, first: int) -> int:
    """Returns the number of steps; raises unless inputs and attribute agree."""
    found = {x.shape[0] for x in o.inputs[first:]}
    found |= set() if o["length"] is None else {o["length"]}
    o.check(len(found) == 1, "the steps must have one number", sorted(found))
    return int(found.pop())


def _loop(
    a: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    inputs: Sequence[np.ndarray],
    graphs: Mapping[str, Callable[..., list[np.ndarray]]],
) -> tuple[np.ndarray, ...]:
    step, first = graphs["body"], a["consts"] + a["carries"]
    consts, carried, xs = (
        inputs[: a["consts"]],
        inputs[a["consts"] : first],
        inputs[first:],
    )
    length = a["length"] if a["length"] is not None else len(xs[0])
    order = range(length)[::-1] if a["is_reversed"] else range(length)
    kept: dict[int, list[np.ndarray]] = {}
    for t in order:
        found = step(*consts, *carried, *(x[t] for x in xs))
        carried, kept[t] = found[: a["carries"]], found[a["carries"] :]
    if not length:
        zeros = [np.zeros(x.shape[1:], np.int64) for x in xs]
        rest = step(*consts, *carried, *zeros)[a["carries"] :]
        return (*carried, *(np.zeros((0, *x.shape), np.int64) for x in rest))
    columns = zip(*(kept[t] for t in range(length)), strict=True)
    return (*carried, *(np.stack(column) for column in columns))


LOOPS = (
    Operation(
        name="loop",
        contract=(
            "carry, y[t] = body(consts, carry, x[t]) for each step t, the last first "
            "if is_reversed; inputs are consts, carry, x; outputs the last carry, y"
        ),
        kind="loop",
        shape=lambda o: _results(o)[0][0],
        interval=lambda o: _results(o)[0][1],
        others=lambda o: _results(o)[1:],
        meaning=_loop,
        inputs=None,
        attributes={
            "consts": COUNT,
            "carries": COUNT,
            "length": _LENGTH,
            "is_reversed": FLAG,
        },
        graphs=("body",),
    ),
)
