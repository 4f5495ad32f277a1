"""C code of products, sums and windows."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

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
from qjax.graph.operations.record import Operands, window_sizes


def _finished(c: CNode, acc: str, names: Sequence[str]) -> str:
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
    rows = _Rows.of(c, turned, len(summed), (x.low, x.high))
    x_summed, x_batch = c["contract"][1 - side], c["batch"][1 - side]
    x_free = [d for d in range(len(x.shape)) if d not in (*x_summed, *x_batch)]
    outer = [*x_batch, *x_free]
    own = [kernel.shape[d] for d in free]
    found = [[x.shape[d] for d in x_free], own]
    sizes = [x.shape[d] for d in x_batch], *(found if side == 1 else found[::-1])
    _check_shape(c, [n for part in sizes for n in part])
    with c.source.loops([x.shape[d] for d in outer]) as names:
        start = place(names, [x.strides[d] for d in outer])
        with c.source.loops([x.shape[d] for d in x_summed]) as inner:
            at = place([start, *inner], [1, *(x.strides[d] for d in x_summed)])
            to = place(inner, strides_of([x.shape[d] for d in x_summed]))
            rows.fill(to, f"{x.name}[{at}]")
        of_batch, of_x = names[: len(x_batch)], names[len(x_batch) :]
        with rows.outputs(of_batch, own) as (of_kernel, acc):
            parts = [of_x, of_kernel] if side == 1 else [of_kernel, of_x]
            full = [*of_batch, *parts[0], *parts[1]]
            c.finish(full, _finished(c, acc, full))


def _check_shape(c: CNode, sizes: Sequence[int]) -> None:
    """Raises ValueError where a bias makes an output larger than its product."""
    if list(sizes) != list(c.output.shape):
        raise c.unsupported(f"a bias that makes {c.output.shape} of {tuple(sizes)}")


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A kernel by rows in C, and codes that lie as one of its rows does.

    Attributes:
      c: The call.
      name: Name of the kernel, ``[outputs..., length]``.
      strides: Strides of its axes of outputs.
      size: Length of a row, with what fills it up.
      kind: Type of a sum.
      codes: Name of the codes, less their offset.
      ctype: Type of the codes.
    """

    c: CNode
    name: str
    strides: Sequence[int]
    size: int
    kind: str
    codes: str
    ctype: str

    @staticmethod
    def of(c: CNode, turned: np.ndarray, summed: int, ends: tuple[int, int]) -> "_Rows":
        """Returns a kernel whose last axes, some, are summed over."""
        outs = turned.shape[: turned.ndim - summed]
        size = math.prod(turned.shape[turned.ndim - summed :])
        whole = _whole(size)
        filled = np.zeros((*outs, whole), np.int64)
        filled[..., :size] = turned.reshape(*outs, size)
        low, high = (end - c["offset"] for end in ends)
        kind = sum_type(_bound(filled, (-1,), max(abs(low), abs(high))))
        ctype = "int16_t" if -(1 << 15) <= low and high < 1 << 15 else "int32_t"
        name = c.source.constant(filled, "kernel")
        codes = c.source.scratch(ctype, whole)
        strides = strides_of(filled.shape)[:-1]
        return _Rows(c, name, strides, whole, kind, codes, ctype)

    def fill(self, at: str, q: str) -> None:
        """Assigns a code to a place of the row."""
        value = minus(q, self.c["offset"])
        self.c.source.line(f"{self.codes}[{at}] = ({self.ctype}){value};")

    @contextlib.contextmanager
    def outputs(
        self, first: Sequence[str], sizes: Sequence[int]
    ) -> Iterator[tuple[list[str], str]]:
        """Adds loops over outputs, some at once, so that each code is read once.

        Args:
          first: Places along the first axes of the kernel.
          sizes: Sizes of its other axes of outputs.

        Yields:
          The places of an output along these axes, and its sum.
        """
        line, source = self.c.source.line, self.c.source
        *others, n = sizes or [1]
        together = next(k for k in (4, 2, 1) if n % k == 0)
        with source.loops(others) as names:
            step, own = source.fresh(), source.fresh()
            head = f"for (int {step} = 0; {step} < {n}; {step} += {together})"
            with source.block(head):
                ends = [*first, *names, *([step] if sizes else [])]
                line(f"const {self.ctype} *p = {self.codes};")
                ctype = constant_type(self.c, self.name)
                line(f"const {ctype} *k = {self.name} + {place(ends, self.strides)};")
                sums = [f"acc{j}" for j in range(together)]
                line(f"{self.kind} {', '.join(f'{own} = 0' for own in sums)};")
                with source.block(f"for (int c = 0; c < {self.size}; ++c)"):
                    line(f"const {self.kind} q = p[c];")
                    for j, acc in enumerate(sums):
                        at = f"c + {j * self.size}" if j else "c"
                        line(f"{acc} += q * k[{at}];")
                line(f"const {self.kind} accs[] = {{{', '.join(sums)}}};")
                head = f"for (int {own} = 0; {own} < {together}; ++{own})"
                with source.block(head):
                    if sizes:
                        line(f"const int channel = {step} + {own};")
                    yield [*names, *(["channel"] if sizes else [])], f"accs[{own}]"


def _whole(size: int) -> int:
    """Returns a length of rows that vectors divide, if it is not much more."""
    more = -(-size // 16) * 16
    return more if more <= size * 5 // 4 else size


def _bound(kernel: np.ndarray, axes: tuple[int, ...], most: int) -> int:
    sums = np.abs(kernel.astype(np.int64)).sum(axes)
    return int(sums.max(initial=0)) * most


def conv(c: CNode) -> None:
    """Adds a convolution."""
    (_, ch, *_), (out, into, *_), order = c["dimensions"]
    kernel, x = c.params["kernel"], c.x
    is_last = ch == order[1] == len(x.shape) - 1
    (b, _, *space), (_, _, *taps), _ = c["dimensions"]
    names = "strides", "padding", "input_dilation", "dilation"
    sizes = [x.shape[d] for d in space]
    operands = Operands(c.node.attributes, [], {})
    window = [kernel.shape[d] for d in taps]
    places = window_sizes(operands, sizes, window, names)
    found = [x.shape[b], kernel.shape[out], *places]
    _check_shape(c, [found[order.index(d)] for d in range(len(order))])
    if is_last and c["groups"] == kernel.shape[out] and kernel.shape[into] == 1:
        _depthwise(c)
    else:
        _convolution(c)


def _ends(c: CNode) -> tuple[int, int]:
    """Returns the least and the largest code that a convolution sees."""
    pad = c["padding_code"]
    return min(c.x.low, pad), max(c.x.high, pad)


def _convolution(c: CNode) -> None:
    """Adds a convolution: its kernel as ``[out, taps, in]``, its windows in rows."""
    (b, ch, *space), (out, into, *taps), order = c["dimensions"]
    x, kernel, groups, xs = c.x, c.params["kernel"], c["groups"], c.x.strides
    outs, ins = kernel.shape[out] // groups, kernel.shape[into]
    turned = kernel.transpose(out, *taps, into)
    turned = turned.reshape(groups, outs, *turned.shape[1:])
    rows = _Rows.of(c, turned, 1 + len(taps), _ends(c))
    n, line = len(space), c.source.line
    window = [kernel.shape[t] for t in taps]
    ends = [order[k] for k in range(2 + n)]  # Axes of batch, channels, places.
    sizes = [c.output.shape[d] for d in ends]
    with c.source.loops([sizes[0], *sizes[2:], groups]) as names:
        batch, places, group = names[0], names[1 : 1 + n], names[-1]
        with c.source.loops(window) as tap:
            inside, at = window_places(c, places, tap, [x.shape[d] for d in space])
            start = place([batch, group], [xs[b], ins * xs[ch]])
            steps = place(at, [xs[d] for d in space])
            to = place([*tap, "c"], [*(s * ins for s in strides_of(window)), 1])
            p = f"const {x.ctype} *p = {x.name} + {start} + {steps};"
            step = place(["c"], [xs[ch]])
            body = f"for (int c = 0; c < {ins}; ++c)"
            with c.source.block(f"if ({inside})" if inside else ""):
                line(p)
                with c.source.block(body):
                    rows.fill(to, f"p[{step}]")
            if inside:
                with c.source.block("else"), c.source.block(body):
                    rows.fill(to, number(c["padding_code"]))
        with rows.outputs([group], [outs]) as ((own,), acc):
            channel = place([group, own], [outs, 1])
            full = dict(zip(ends, [batch, channel, *places], strict=True))
            at_out = [full[d] for d in range(len(ends))]
            c.finish(at_out, _finished(c, acc, at_out))


_TOGETHER = 64  # Most channels whose sums lie side by side.


def _depthwise(c: CNode) -> None:
    """Adds a convolution of each channel alone: its kernel as ``[taps, channels]``."""
    (b, _, *space), (out, into, *taps), order = c["dimensions"]
    x, kernel, line, n = c.x, c.params["kernel"], c.source.line, len(space)
    turned = kernel.transpose(*taps, into, out)
    name = c.source.constant(turned, "kernel")
    channels, offset = turned.shape[-1], c["offset"]
    most = max(abs(end - offset) for end in _ends(c))
    kind = sum_type(_bound(turned, tuple(range(turned.ndim - 1)), most))
    count = max(d for d in range(1, _TOGETHER + 1) if channels % d == 0)
    window = [kernel.shape[t] for t in taps]
    ends = [order[k] for k in range(2 + n)]
    sizes = [c.output.shape[d] for d in ends]
    with c.source.loops([sizes[0], *sizes[2:], channels // count]) as names:
        batch, places, block = names[0], names[1:-1], names[-1]
        line(f"{kind} accs[{count}] = {{0}};")
        with c.source.loops(window) as tap:
            inside, at = window_places(c, places, tap, [x.shape[d] for d in space])
            steps = [x.strides[d] for d in space]
            start = place([batch, block, *at], [x.strides[b], count, *steps])
            row = [s * channels for s in strides_of(window)]
            ctype = constant_type(c, name)
            line(f"const {ctype} *k = {name} + {place([*tap, block], [*row, count])};")
            body = f"for (int c = 0; c < {count}; ++c)"
            with c.source.block(f"if ({inside})" if inside else ""):
                line(f"const {x.ctype} *p = {x.name} + {start};")
                q = wide(minus("p[c]", offset), kind)
                line(f"{body} accs[c] += {q} * k[c];")
            if inside and c["padding_code"] != offset:
                filled = number(c["padding_code"] - offset)
                with c.source.block("else"):
                    line(f"{body} accs[c] += ({kind}){filled} * k[c];")
        with c.source.block(f"for (int c = 0; c < {count}; ++c)"):
            channel = place([block, "c"], [count, 1])
            full = dict(zip(ends, [batch, channel, *places], strict=True))
            at_out = [full[d] for d in range(len(ends))]
            c.finish(at_out, _finished(c, "accs[c]", at_out))


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
