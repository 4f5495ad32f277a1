"""C code of operations whose integers are TFLite's."""

import contextlib
from collections.abc import Iterator

from qjax.formats.c99.calls import RULES, CNode, minus
from qjax.formats.c99.text import broadcast_strides, number, place


def add(c: CNode) -> None:
    """Adds TFLite's sum of two values on grids."""
    p, up = c.source.prefix, number(1 << c["left_shift"])
    rescale = f"{p}_{RULES[c['rule']]}"
    columns = zip(
        c.inputs, c["zero_points"], c["multipliers"], c["shifts"], strict=True
    )
    with c.each() as names:
        terms = []
        for t, zero, multiplier, shift in columns:
            at = place(names, broadcast_strides(t.shape, len(names)))
            q = f"(int64_t)({minus(f'{t.name}[{at}]', zero)}) * {up}"
            terms.append(f"{rescale}({q}, {number(multiplier)}, {shift})")
        own = f"{number(c['multiplier'])}, {c['shift']}"
        total = f"{rescale}({' + '.join(terms)}, {own}) + {number(c['zero_point'])}"
        low, high = number(c["low"]), number(c["high"])
        c.put(c.output.at(names), f"{p}_clip({total}, {low}, {high})")


def average(c: CNode) -> None:
    """Adds TFLite's average of a sum, halves away from zero."""
    xs = broadcast_strides(c.x.shape, len(c.output.shape))
    low, high = number(c["low"]), number(c["high"])
    with c.each() as names:
        c.source.line(f"const int32_t acc = {c.x.name}[{place(names, xs)}];")
        c.source.line(f"const int32_t count = {c.read('counts', names)};")
        half = "(acc > 0 ? count / 2 : -(count / 2))"
        value = f"{c.source.prefix}_clip((acc + {half}) / count, {low}, {high})"
        c.put(c.output.at(names), value)


def softmax(c: CNode) -> None:
    """Adds TFLite's softmax of the last axis, of 8 bits."""
    line, p = c.source.line, c.source.prefix
    low, high = number(c["low"]), number(c["high"])
    with _rows(c) as (size, name):
        line("int64_t quotient;")
        line("int length = 0;")
        line("while ((total >> length) != 0) ++length;")
        line(
            f"quotient = {p}_newton(total * ((int64_t)1 << (32 - length))"
            " - ((int64_t)1 << 31));"
        )
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t share = {p}_high(quotient, {name}[top - p[c]]);")
            value = f"{p}_clip({p}_divide(share, length + 3) + {low}, {low}, {high})"
            c.put("q[c]", value)


def log_softmax(c: CNode) -> None:
    """Adds TFLite's log-softmax of the last axis."""
    line, p = c.source.line, c.source.prefix
    steps = c.source.constant(c.params["steps"], "steps")
    low, high, zero = (number(c[k]) for k in ("low", "high", "zero_point"))
    with _rows(c) as (size, _):
        line(f"const int64_t of_sum = {p}_log(total);")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t rest = {steps}[top - p[c]] - of_sum;")
            c.put("q[c]", f"{p}_clip({p}_divide(rest, 22) + {zero}, {low}, {high})")


@contextlib.contextmanager
def _rows(c: CNode) -> Iterator[tuple[int, str]]:
    """Loops over rows ``p`` of codes, with the sum ``total`` of their exponentials.

    Yields:
      The length of a row, and the name of the table of exponentials.
    """
    x, line = c.x, c.source.line
    name = c.source.constant(c.params["exponentials"], "exponentials")
    *outer, size = x.shape
    with c.source.loops(outer) as names:
        start = place(names, x.strides[:-1])
        line(f"const {x.ctype} *p = {x.name} + {start};")
        line(f"{c.output.ctype} *q = {c.output.name} + {start};")
        line("int32_t top = p[0];")
        line("int64_t total = 0;")
        line(f"for (int c = 1; c < {size}; ++c) if (p[c] > top) top = p[c];")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"total += {c.source.prefix}_divide({name}[top - p[c]], 12);")
        yield size, name


def l2_norm(c: CNode) -> None:
    """Adds TFLite's division of the last axis by the root of its squares."""
    x, p, line = c.x, c.source.prefix, c.source.line
    *outer, size = x.shape
    low, high = number(c["low"]), number(c["high"])
    step = minus("p[c]", c["input_zero_points"][0])
    with c.source.loops(outer) as names:
        start = place(names, x.strides[:-1])
        line(f"const {x.ctype} *p = {x.name} + {start};")
        line(f"{c.output.ctype} *q = {c.output.name} + {start};")
        line("int64_t total = 0, root;")
        line("int shift;")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t step = {step};")
            line("total += step * step;")
        line(f"root = {p}_inverse(total, &shift);")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t code = {p}_double({step}, root, 24 + shift);")
            c.put("q[c]", f"{p}_clip(code, {low}, {high})")


def softmax16(c: CNode) -> None:
    """Adds TFLite's softmax of the last axis, of 16 bits."""
    x, p, line = c.x, c.source.prefix, c.source.line
    exponentials = c.source.constant(c.params["exponentials"], "exponentials")
    reciprocals = c.source.constant(c.params["reciprocals"], "reciprocals")
    *outer, size = x.shape
    with c.source.loops(outer) as names:
        start = place(names, x.strides[:-1])
        line(f"const {x.ctype} *p = {x.name} + {start};")
        line(f"{c.output.ctype} *q = {c.output.name} + {start};")
        line("int32_t top = p[0];")
        line("int64_t total = 0, at;")
        line("int length = 0;")
        line(f"for (int c = 1; c < {size}; ++c) if (p[c] > top) top = p[c];")
        line(f"for (int c = 0; c < {size}; ++c) total += {exponentials}[top - p[c]];")
        line("while ((total >> length) != 0) ++length;")
        line(f"at = {p}_up(total * ((int64_t)1 << (31 - length)), 14) - 98304;")
        line(f"at = {p}_clip(at, -32768, 32767) + 32768;")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t e = {exponentials}[top - p[c]];")
            share = f"{p}_up(e * {reciprocals}[at], length - 1)"
            c.put("q[c]", f"{p}_clip({share}, 0, {number(c['high'])})")


def resize(c: CNode) -> None:
    """Adds TFLite's bilinear interpolation of an image."""
    x, line = c.x, c.source.line
    rows, columns = (
        c.source.constant(c.params[role].T, role) for role in ("rows", "columns")
    )
    with c.source.loops(c.output.shape) as names:
        batch, row, column, channel = names
        line("int64_t total = 0;")
        for letter, name, at in (("y", rows, row), ("x", columns, column)):
            line(f"const int64_t {letter}1 = {name}[{place([at], [3], 2)}];")
            line(f"const int64_t {letter}0 = 1024 - {letter}1;")
        for a in range(2):
            for b in range(2):
                y = f"{rows}[{place([row], [3], a)}] * {x.strides[1]}"
                z = f"{columns}[{place([column], [3], b)}] * {x.strides[2]}"
                start = place([batch, channel], [x.strides[0], 1])
                q = f"{x.name}[{start} + {y} + {z}]"
                line(f"total += {q} * y{a} * x{b};")
        half = "(total > 0 ? 524288 : -524288)"
        c.put(c.output.at(names), f"(total + {half}) / 1048576")
