"""C code of operations whose integers are TFLite's."""

from qjax.formats.c99.calls import RULES, CNode, minus
from qjax.formats.c99.text import broadcast_strides, number, place


def add(c: CNode) -> None:
    """Adds TFLite's sum of two values on grids."""
    if c["rule"] not in RULES:
        raise c.unsupported(f"the rule {c['rule']!r}")
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
    x, p = c.x, c.source.prefix
    name = c.source.constant(c.params["exponentials"], "exponentials")
    *outer, size = x.shape
    low, high = number(c["low"]), number(c["high"])
    with c.source.loops(outer) as names:
        start = place(names, x.strides[:-1])
        line = c.source.line
        line(f"const {x.ctype} *p = {x.name} + {start};")
        line(f"{c.output.ctype} *q = {c.output.name} + {start};")
        line("int32_t top = p[0];")
        line("int64_t total = 0, quotient;")
        line("int length = 0;")
        line(f"for (int c = 1; c < {size}; ++c) if (p[c] > top) top = p[c];")
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"total += {p}_divide({name}[top - p[c]], 12);")
        line("while ((total >> length) != 0) ++length;")
        line(
            f"quotient = {p}_newton(total * ((int64_t)1 << (32 - length))"
            " - ((int64_t)1 << 31));"
        )
        with c.source.block(f"for (int c = 0; c < {size}; ++c)"):
            line(f"const int64_t share = {p}_high(quotient, {name}[top - p[c]]);")
            value = f"{p}_clip({p}_divide(share, length + 3) + {low}, {low}, {high})"
            c.put("q[c]", value)
