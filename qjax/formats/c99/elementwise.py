"""C code of rescales, lookups and choices."""

import math

from qjax.formats.c99.calls import (
    CNode,
    constant_type,
    minus,
)
from qjax.formats.c99.text import broadcast_strides, number, place, strides_of


def requantize(c: CNode) -> None:
    """Adds a requantization by any of its rules."""
    xs = broadcast_strides(c.x.shape, len(c.output.shape))
    with c.each() as names:
        q = f"{c.x.name}[{place(names, xs)}]"
        c.put(c.output.at(names), c.requantized(q, names))


def add(c: CNode) -> None:
    """Adds a sum of values on grids, half to even."""
    p, (zero, low, high) = (
        c.source.prefix,
        (number(c[k]) for k in ("zero_point", "low", "high")),
    )
    with c.each() as names:
        terms = [
            f"({minus(f'(int64_t){t.name}[{at}]', z)}) * {number(m)}"
            for t, z, m, at in zip(
                c.inputs,
                c["input_zero_points"],
                c["multipliers"],
                (
                    place(names, broadcast_strides(t.shape, len(names)))
                    for t in c.inputs
                ),
                strict=True,
            )
        ]
        rounded = f"{p}_round({' + '.join(terms)}, {c['shift']})"
        c.put(c.output.at(names), f"{p}_clip({rounded} + {zero}, {low}, {high})")


def clip(c: CNode) -> None:
    """Adds a clip."""
    low, high = number(c["low"]), number(c["high"])
    with c.each() as names:
        q = c.x.at(names)
        c.put(c.output.at(names), f"{c.source.prefix}_clip({q}, {low}, {high})")


def table(c: CNode) -> None:
    """Adds a lookup in a table, of each channel its own if there is an axis."""
    array, low, axis = c.params["table"], c["low"], c["axis"]
    name = c.source.constant(array, "table")
    xs = broadcast_strides(c.x.shape, len(c.output.shape))
    with c.each() as names:
        row = f"({c.x.name}[{place(names, xs)}] - {number(low)})"
        if axis is not None:
            own = names[axis % len(names)]
            row = f"{row} * {array.shape[1]} + {own}"
        c.put(c.output.at(names), f"{name}[{row}]")


def thresholds(c: CNode) -> None:
    """Adds a search of thresholds and a lookup by their number."""
    cuts, array, axis = c.params["thresholds"], c.params["table"], c["axis"]
    n = cuts.shape[-1]
    first = c.source.constant(cuts, "thresholds")
    kind = constant_type(c, first)
    values = c.source.constant(array, "codes")
    xs = broadcast_strides(c.x.shape, len(c.output.shape))
    with c.each() as names:
        own = "0" if axis is None else names[axis % len(names)]
        q = f"{c.x.name}[{place(names, xs)}]"
        c.source.line(f"const {kind} *cut = {first} + {place([own], [n])};")
        c.source.line(f"int below = 0, above = {n};")
        with c.source.block("while (below < above)"):
            c.source.line("const int middle = (below + above) / 2;")
            c.source.line(f"if (cut[middle] <= {q}) below = middle + 1;")
            c.source.line("else above = middle;")
        c.put(c.output.at(names), f"{values}[{place([own], [n + 1])} + below]")


def embed(c: CNode) -> None:
    """Adds rows of a parameter, counted from the end below zero."""
    kernel = c.params["kernel"]
    name, rank = c.source.constant(kernel, "kernel"), len(c.x.shape)
    rows = kernel.shape[0]
    with c.each() as names:
        q = c.x.at(names[:rank])
        inner = place(names[rank:], strides_of(kernel.shape)[1:])
        row = q if c.x.low >= 0 else f"({q} < 0 ? {q} + {rows} : {q})"
        size = math.prod(kernel.shape[1:])
        c.put(c.output.at(names), f"{name}[{row} * {size} + {inner}]")


def take(c: CNode) -> None:
    """Adds known places of a value."""
    places = c.params["places"]
    name = c.source.constant(places, "places")
    crosses = c.node.attributes.get("crosses_examples")
    with c.each() as names:
        own = names if crosses else names[1:]
        at = f"{name}[{place(own, strides_of(places.shape))}]"
        size = math.prod(c.x.shape[1:])
        if not crosses and names[0] != "0":
            at = f"{names[0]} * {size} + {at}"
        c.put(c.output.at(names), f"{c.x.name}[{at}]")


def constant(c: CNode) -> None:
    """Adds a constant, the same for each example."""
    value = c.params["value"]
    name = c.source.constant(value, "value")
    strides = broadcast_strides(value.shape, len(c.output.shape))
    with c.each() as names:
        c.put(c.output.at(names), f"{name}[{place(names, strides)}]")


def select(c: CNode) -> None:
    """Adds a choice among cases by number."""
    which, *cases = c.inputs
    with c.each() as names:
        number_of = which.at(names) if which.shape else f"{which.name}[0]"
        value = cases[-1].at(names)
        for k in range(len(cases) - 2, -1, -1):
            value = f"({number_of} == {k} ? {cases[k].at(names)} : {value})"
        c.put(c.output.at(names), value)


def of_two(c: CNode) -> None:
    """Adds the larger or the smaller of two values."""
    sign = ">" if c.node.operation == "maximum" else "<"
    with c.each() as names:
        a, b = (
            f"{t.name}[{place(names, broadcast_strides(t.shape, len(names)))}]"
            for t in c.inputs
        )
        c.put(c.output.at(names), f"{a} {sign} {b} ? {a} : {b}")
