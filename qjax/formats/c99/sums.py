"""C code of sums, extremes and windows."""

import contextlib
from collections.abc import Iterator, Sequence

from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import number, place
from qjax.formats.c99.windows import window_places


def total(c: CNode) -> None:
    """Adds sums over axes."""
    x, axes = c.x, list(c["axes"])
    with _reduced(c) as (names, at):
        c.source.line(f"int64_t acc = {number(c['bias'])};")
        with c.source.loops([x.shape[d] for d in axes]) as inner:
            c.source.line(f"acc += {x.name}[{place([*at, *inner], _split(x, axes))}];")
        c.finish(names, "acc")


def running_sum(c: CNode) -> None:
    """Adds sums of all places up to each along an axis."""
    x, axis = c.x, c["axis"] % len(c.x.shape)
    n, stride = x.shape[axis], x.strides[axis]
    sizes = [1 if d == axis else m for d, m in enumerate(x.shape)]
    with c.source.loops(sizes) as names:
        start = place(names, x.strides)
        c.source.line(f"int64_t acc = {number(c['bias'])};")
        step = f"{n - 1} - c" if c["reverse"] else "c"
        with c.source.block(f"for (int c = 0; c < {n}; ++c)"):
            at = f"{start} + ({step}) * {stride}"
            c.source.line(
                f"acc += (int64_t){x.name}[{at}] - {number(c['input_zero_point'])};"
            )
            c.put(f"{c.output.name}[{at}]", "acc")


@contextlib.contextmanager
def _reduced(c: CNode) -> Iterator[tuple[list[str], list[str]]]:
    """Adds loops over an output whose axes are those of the input that stay."""
    with c.source.loops(c.output.shape) as names:
        yield names, names


def _split(x: CArray, axes: Sequence[int]) -> list[int]:
    """Returns the strides of the axes that stay, then of the others."""
    kept = [d for d in range(len(x.shape)) if d not in axes]
    return [x.strides[d] for d in (*kept, *axes)]


def sum_pool(c: CNode) -> None:
    """Adds sums over windows."""
    _pooled(c, f"int64_t acc = {number(c['bias'])};", "acc += {};", c["padding_code"])


def extreme_pool(c: CNode) -> None:
    """Adds extremes over windows; padding counts in none."""
    sign = ">" if c.node.operation == "max_pool" else "<"
    start = "INT64_MIN" if sign == ">" else "INT64_MAX"
    step = f"if ({{0}} {sign} acc) acc = {{0}};"
    _pooled(c, f"int64_t acc = {start};", step, None)


def _pooled(c: CNode, start: str, step: str, pad: int | None) -> None:
    x = c.x
    with c.each() as names:
        c.source.line(start)
        with c.source.loops(c["window"]) as tap:
            inside, at = window_places(c, names, tap, x.shape)
            q = f"{x.name}[{place(at, x.strides)}]"
            if inside is None:
                c.source.line(step.format(q))
            else:
                with c.source.block(f"if ({inside})"):
                    c.source.line(step.format(q))
                if pad:
                    with c.source.block("else"):
                        c.source.line(step.format(number(pad)))
        c.finish(names, "acc")


def extreme(c: CNode) -> None:
    """Adds extremes over axes."""
    x, axes = c.x, list(c["axes"])
    sign = ">" if c.node.operation == "max" else "<"
    with _reduced(c) as (names, at):
        limit = "INT64_MIN" if sign == ">" else "INT64_MAX"
        c.source.line(f"int64_t acc = {limit};")
        with c.source.loops([x.shape[d] for d in axes]) as inner:
            q = f"{x.name}[{place([*at, *inner], _split(x, axes))}]"
            c.source.line(f"if ({q} {sign} acc) acc = {q};")
        c.finish(names, "acc")


def arg_extreme(c: CNode) -> None:
    """Adds the places of extremes along an axis, the first of equal ones."""
    x, axis = c.x, c["axis"] % len(c.x.shape)
    sign = ">" if c.node.operation == "argmax" else "<"
    with _reduced(c) as (names, at):
        start = place(at, _split(x, [axis])[:-1])
        c.source.line(f"const {x.ctype} *p = {x.name} + {start};")
        c.source.line("int best = 0;")
        step = x.strides[axis]
        with c.source.block(f"for (int c = 1; c < {x.shape[axis]}; ++c)"):
            c.source.line(f"if (p[c * {step}] {sign} p[best * {step}]) best = c;")
        c.put(c.output.at(names), "best")
