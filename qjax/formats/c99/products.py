"""C code of products, sums and windows."""

import math
from collections.abc import Sequence

import numpy as np

from qjax.formats.c99.calls import (
    CNode,
    constant_type,
    farthest,
    minus,
    sum_type,
    wide,
)
from qjax.formats.c99.text import broadcast_strides, number, place, strides_of
from qjax.formats.c99.windows import window_places


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
            inside, at = window_places(c, places, tap, [x.shape[d] for d in space])
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
