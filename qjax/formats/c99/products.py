"""C code of products, sums and windows."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from qjax.formats.c99.calls import (
    CArray,
    CNode,
    constant_type,
    farthest,
    minus,
    sum_type,
    wide,
)
from qjax.formats.c99.text import broadcast_strides, number, place, strides_of


def _finished(c: CNode, acc: str, names: Sequence[str], kind: str) -> str:
    """Returns an accumulator with its shift and its bias."""
    shift, bias = c["shift"], c.params["bias"]
    is_plain = not shift and not np.any(bias)
    if is_plain:
        return acc
    scaled = f"(int64_t){acc}" + (f" * {number(1 << shift)}" if shift else "")
    return f"{scaled} + {c.read('bias', names)}"


def dot(c: CNode) -> None:
    """Adds a contraction with a parameter, whose contracted axes come last."""
    side, kernel, x = c["kernel_operand"], c.params["kernel"], c.x
    summed, batch = c["contract"][side], c["batch"][side]
    free = [d for d in range(kernel.ndim) if d not in (*summed, *batch)]
    turned = kernel.transpose(*batch, *free, *summed)
    name = c.source.constant(turned, "kernel")
    ks = strides_of(turned.shape)
    xs = x.strides
    x_summed, x_batch = c["contract"][1 - side], c["batch"][1 - side]
    x_free = [d for d in range(len(x.shape)) if d not in (*x_summed, *x_batch)]
    batches = [x.shape[d] for d in x_batch]
    sizes = [[x.shape[d] for d in x_free], [kernel.shape[d] for d in free]]
    order = [0, 1] if side == 1 else [1, 0]
    with c.source.loops([*batches, *sizes[order[0]], *sizes[order[1]]]) as names:
        of_batch, rest = names[: len(batches)], names[len(batches) :]
        first = len(sizes[order[0]])
        parts = {order[0]: rest[:first], order[1]: rest[first:]}
        start = place(
            [*of_batch, *parts[0]],
            [*(xs[d] for d in x_batch), *(xs[d] for d in x_free)],
        )
        n = len(batch) + len(free)
        row = place([*of_batch, *parts[1]], ks[:n])
        c.source.line(f"const {x.ctype} *p = {x.name} + {start};")
        ctype = constant_type(c, name)
        c.source.line(f"const {ctype} *k = {name} + {row};")
        axes = tuple(range(n, turned.ndim))
        kind = sum_type(_bound(turned, axes, farthest(x, c["offset"])))
        c.source.line(f"{kind} acc = 0;")
        with c.source.loops([kernel.shape[d] for d in summed]) as inner:
            q = f"p[{place(inner, [xs[d] for d in x_summed])}]"
            w = f"k[{place(inner, ks[n:])}]"
            c.source.line(f"acc += {_product(q, c['offset'], w, kind)};")
        c.finish(names, _finished(c, "acc", names, kind))


def _bound(kernel: np.ndarray, axes: tuple[int, ...], most: int) -> int:
    sums = np.abs(kernel.astype(np.int64)).sum(axes)
    return int(sums.max(initial=0)) * most


def _product(q: str, offset: int, w: str, kind: str) -> str:
    return f"{wide(minus(q, offset), kind)} * {w}"


def conv(c: CNode) -> None:
    """Adds a convolution: its kernel as ``[out, taps, in]``."""
    (b, ch, *space), (out, into, *taps), order = c["dimensions"]
    x, kernel, groups = c.x, c.params["kernel"], c["groups"]
    turned = kernel.transpose(out, *taps, into)
    name = c.source.constant(turned, "kernel")
    ks, xs = strides_of(turned.shape), x.strides
    outs, ins = turned.shape[0] // groups, turned.shape[-1]
    n = len(space)
    ends = [order[k] for k in range(2 + n)]  # Axes of batch, channels, places.
    sizes = [c.output.shape[d] for d in ends]
    pad, offset = c["padding_code"], c["offset"]
    most = max(farthest(x, offset), abs(pad - offset))
    kind = sum_type(_bound(turned, tuple(range(1, turned.ndim)), most))
    with c.source.loops([sizes[0], *sizes[2:], groups, outs]) as names:
        batch, places, group, own = names[0], names[1 : 1 + n], names[-2], names[-1]
        channel = place([group, own], [outs, 1])
        c.source.line(f"const int channel = {channel};")
        ctype = constant_type(c, name)
        c.source.line(f"const {ctype} *k = {name} + channel * {ks[0]};")
        c.source.line(f"{kind} acc = 0;")
        with c.source.loops([kernel.shape[t] for t in taps]) as tap:
            w = f"k[{place([*tap, 'c'], [*ks[1:-1], 1])}]"
            inside, at = _window(c, places, tap, [x.shape[d] for d in space])
            start = place([batch, group], [xs[b], ins * xs[ch]])
            steps = place(at, [xs[d] for d in space])
            body = f"for (int c = 0; c < {ins}; ++c)"
            step = "c" if xs[ch] == 1 else f"c * {xs[ch]}"

            def visit() -> None:
                c.source.line(f"const {x.ctype} *p = {x.name} + {start} + {steps};")
                c.source.line(
                    f"{body} acc += {_product(f'p[{step}]', offset, w, kind)};"
                )

            if inside is None:
                visit()
            elif pad == offset:
                with c.source.block(f"if ({inside})"):
                    visit()
            else:
                with c.source.block(f"if ({inside})"):
                    visit()
                with c.source.block("else"):
                    filled = number(pad - offset)
                    c.source.line(f"{body} acc += ({kind}){filled} * {w};")
        full = dict(zip(ends, [batch, "channel", *places], strict=True))
        at_out = [full[d] for d in range(len(ends))]
        c.finish(at_out, _finished(c, "acc", at_out, kind))


def _window(
    c: CNode, places: Sequence[str], tap: Sequence[str], sizes: Sequence[int]
) -> tuple[str | None, list[str]]:
    """Declares the places of the input in a window, and says when they are there."""
    spread = c.node.attributes.get(
        "input_dilation", c.node.attributes.get("base_dilation")
    )
    checks, found = [], []
    whole = zip(
        places,
        tap,
        sizes,
        c["strides"],
        c["padding"],
        c["dilation"],
        spread,
        strict=True,
    )
    for k, (i, t, n, stride, (low, high), dilation, gap) in enumerate(whole):
        name = f"a{k}"
        at = place([i, t], [stride, dilation], -low)
        c.source.line(f"const int {name} = {at};")
        reach = (n - 1) * gap
        if low > 0 or high > 0 or gap > 1:
            checks.append(f"{name} >= 0 && {name} <= {reach}")
        if gap > 1:
            checks.append(f"{name} % {gap} == 0")
            name = f"{name} / {gap}"
        found.append(f"({name})" if gap > 1 else name)
    return " && ".join(checks) or None, found


def multiply(c: CNode) -> None:
    """Adds products with a parameter, place by place."""
    xs = broadcast_strides(c.x.shape, len(c.output.shape))
    with c.each() as names:
        q = f"{c.x.name}[{place(names, xs)}]"
        value = f"(int64_t){minus(q, c['offset'])} * {c.read('kernel', names)}"
        if c["shift"]:
            value = f"{value} * {number(1 << c['shift'])}"
        c.finish(names, f"{value} + {c.read('bias', names)}")


def dot_codes(c: CNode) -> None:
    """Adds a contraction of two values."""
    (x, y), zeros = c.inputs, c["zero_points"]
    (xc, yc), (xb, yb) = c["contract"], c["batch"]
    free = [
        [d for d in range(len(t.shape)) if d not in (*s, *b)]
        for t, s, b in ((x, xc, xb), (y, yc, yb))
    ]
    batch = [x.shape[d] for d in xb]
    sizes = [[t.shape[d] for d in f] for t, f in zip((x, y), free, strict=True)]
    terms = math.prod(x.shape[d] for d in xc)
    kind = sum_type(terms * farthest(x, zeros[0]) * farthest(y, zeros[1]))
    with c.source.loops([*batch, *sizes[0], *sizes[1]]) as names:
        of_batch, rest = names[: len(batch)], names[len(batch) :]
        own = rest[: len(free[0])], rest[len(free[0]) :]
        starts = [
            place([*of_batch, *n], [t.strides[d] for d in (*b, *f)])
            for t, b, f, n in zip((x, y), (xb, yb), free, own, strict=True)
        ]
        for letter, t, start in zip("pk", (x, y), starts, strict=True):
            c.source.line(f"const {t.ctype} *{letter} = {t.name} + {start};")
        c.source.line(f"{kind} acc = 0;")
        with c.source.loops([x.shape[d] for d in xc]) as inner:
            p = f"p[{place(inner, [x.strides[d] for d in xc])}]"
            k = f"k[{place(inner, [y.strides[d] for d in yc])}]"
            value = f"{wide(minus(p, zeros[0]), kind)} * {minus(k, zeros[1])}"
            c.source.line(f"acc += {value};")
        c.finish(names, "acc")


def multiply_codes(c: CNode) -> None:
    """Adds products of two values, place by place."""
    with c.each() as names:
        parts = [
            minus(
                f"{t.name}[{place(names, broadcast_strides(t.shape, len(names)))}]", z
            )
            for t, z in zip(c.inputs, c["zero_points"], strict=True)
        ]
        c.finish(names, f"(int64_t){parts[0]} * {parts[1]}")


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
            inside, at = _window(c, names, tap, x.shape)
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
