"""C code of softmaxes and normalisations."""

from collections.abc import Sequence

from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import number, place
from qjax.integer_norm import fraction


def softmax(c: CNode) -> None:
    """Adds a softmax by a table of exponentials and one reciprocal a row."""
    x, axes, p = c.x, [d % len(c.x.shape) for d in c["axes"]], c.source.prefix
    others = [d for d in range(len(x.shape)) if d not in axes]
    table = c.params["table"]
    name = c.source.constant(table, "table")
    inside = [x.shape[d] for d in axes]
    mask = c.inputs[1] if len(c.inputs) > 1 else None
    plus = c.node.attributes.get("plus", 0)

    def at(t: CArray, outer: Sequence[str], inner: Sequence[str]) -> str:
        names = dict(zip((*others, *axes), (*outer, *inner), strict=True))
        strides = [0 if n == 1 else s for n, s in zip(t.shape, t.strides, strict=True)]
        return f"{t.name}[{place([names[d] for d in range(len(t.shape))], strides)}]"

    with c.source.loops([x.shape[d] for d in others]) as outer:
        line = c.source.line
        line("int32_t top = 0;")
        line(f"uint64_t total = {plus};")
        line("int any = 1, seen = 0;")
        if mask is not None:
            line("int all = 1;")
            with c.source.loops(inside) as inner:
                line(f"if ({at(mask, outer, inner)} != 0) all = 0;")
            if c["empty"] == "zero":
                line("any = !all;")
        is_reset = mask is not None and c["empty"] == "uniform"

        def value(inner: Sequence[str]) -> str:
            q = at(x, outer, inner)
            return f"(all ? 0 : {q})" if is_reset else q

        def counts(inner: Sequence[str]) -> str:
            own = "1" if mask is None else f"(all || {at(mask, outer, inner)} != 0)"
            return own

        with c.source.loops(inside) as inner:
            q = value(inner)
            line(f"if ({counts(inner)} && (!seen || {q} > top)) top = {q}, seen = 1;")
        last = len(table) - 1
        share = lambda inner: f"{name}[{p}_least(top - {value(inner)}, {last})]"
        with c.source.loops(inside) as inner:
            line(f"if ({counts(inner)}) total += (uint64_t){share(inner)};")
        line(f"const {p}_share part = {p}_reciprocal(any ? total : 1);")
        with c.source.loops(inside) as inner:
            line("int64_t e = 0;")
            line(
                f"if (any && {counts(inner)}) "
                f"e = {p}_part(part, (uint64_t){share(inner)});"
            )
            rounded = f"{p}_up(e * {number(c['multiplier'])}, {c['shift']})"
            ends = (number(c[k]) for k in ("zero_point", "low", "high"))
            zero, low, high = ends
            target = at(c.output, outer, inner)
            c.put(target, f"{p}_clip({rounded} + {zero}, {low}, {high})")


def norm(c: CNode) -> None:
    """Adds a normalisation of groups by one reciprocal root each."""
    x, source, p = c.x, c.source, c.source.prefix
    pairs = zip(c["axes"], c["groups"], strict=True)
    groups = {d % len(x.shape): g for d, g in pairs}
    zero, count = c["input_zero_points"][0], c["count"]
    outer = [groups.get(d, n) for d, n in enumerate(x.shape)]
    inner = [n // groups[d] if d in groups else 1 for d, n in enumerate(x.shape)]
    line, point = source.line, c["point"]

    def places(own: Sequence[str], of_group: Sequence[str]) -> list[str]:
        found = []
        for name, i, size in zip(own, of_group, inner, strict=True):
            text = place([name, i], [size, 1])
            found.append(f"({text})" if " " in text else text)
        return found

    with source.loops(outer) as names:
        line("int64_t total = 0, squares = 0;")
        with source.loops(inner) as own:
            line(f"const int64_t q = (int64_t){x.at(places(names, own))} - {zero};")
            line("total += q;")
            line("squares += q * q;")
        if c["is_centred"]:
            line(f"squares = {count} * squares - total * total;")
        if point:
            sign = "<<" if point > 0 else ">>"
            line(f"squares = (int64_t)((uint64_t)squares {sign} {abs(point)});")
        line(f"squares += {number(c['epsilon'])};")
        least = number(max(c["floor"], 1))
        line(f"if (squares < {least}) squares = {least};")
        line("int down;")
        line(f"const int64_t root = {p}_root((uint64_t)squares, &down);")
        more = point // 2 + fraction(count, c["is_centred"])
        more += c.node.attributes.get("more", 0)
        line(f"down -= {more};")
        line("down = down < 0 ? 0 : down > 62 ? 62 : down;")
        with source.loops(inner) as own:
            at = places(names, own)
            line(f"int64_t q = (int64_t){x.at(at)} - {zero};")
            if c["is_centred"]:
                line(f"q = {count} * q - total;")
            factor, bias = c.read("multiplier", at), c.read("bias", at)
            added = f"(int64_t){bias} * {number(1 << c['bias_shift'])}"
            line(f"q = {p}_up(q * root, down) * {factor} + {added};")
            low, high = (number(c[k] - c["zero_point"]) for k in ("low", "high"))
            steps = f"{p}_clip({p}_up(q, {c['shift']}), {low}, {high})"
            c.put(c.output.at(at), f"{steps} + {number(c['zero_point'])}")
