"""C code of softmaxes and normalisations."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import broadcast_strides, number, place
from qjax.integer_norm import fraction


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of codes in C, with a mask or without one.

    Attributes:
      c: The call.
      outer: Places along the axes that stay.
      others: These axes.
      axes: The others, along which a row lies.
      table: Name of the table of exponentials.
    """

    c: CNode
    outer: Sequence[str]
    others: Sequence[int]
    axes: Sequence[int]
    table: str

    @property
    def sizes(self) -> list[int]:
        """Returns the sizes of a row."""
        return [self.c.x.shape[d] for d in self.axes]

    def at(self, t: CArray, inner: Sequence[str]) -> str:
        """Returns an element of a value that broadcasts to the codes."""
        pairs = zip((*self.others, *self.axes), (*self.outer, *inner), strict=True)
        names = dict(pairs)
        strides = [0 if n == 1 else s for n, s in zip(t.shape, t.strides, strict=True)]
        return f"{t.name}[{place([names[d] for d in range(len(t.shape))], strides)}]"

    @property
    def mask(self) -> CArray | None:
        """Returns the mask."""
        return self.c.inputs[1] if len(self.c.inputs) > 1 else None

    def value(self, inner: Sequence[str]) -> str:
        """Returns a code; those of a row of which nothing is kept may be 0."""
        q = self.at(self.c.x, inner)
        is_reset = self.mask is not None and self.c["empty"] == "uniform"
        return f"(all ? 0 : {q})" if is_reset else q

    def counts(self, inner: Sequence[str]) -> str:
        """Says whether a code is kept."""
        if self.mask is None:
            return "1"
        return f"(all || {self.at(self.mask, inner)} != 0)"

    def share(self, inner: Sequence[str]) -> str:
        """Returns the exponential of a code."""
        last = len(self.c.params["table"]) - 1
        least = f"{self.c.source.prefix}_least(top - {self.value(inner)}, {last})"
        return f"{self.table}[{least}]"


@contextlib.contextmanager
def _rows(c: CNode) -> Iterator[_Row]:
    """Adds loops over rows, each with its largest code and its sum of exponentials."""
    x, axes, line = c.x, [d % len(c.x.shape) for d in c["axes"]], c.source.line
    others = [d for d in range(len(x.shape)) if d not in axes]
    name = c.source.constant(c.params["table"], "table")
    with c.source.loops([x.shape[d] for d in others]) as outer:
        row = _Row(c, outer, others, axes, name)
        line("int32_t top = 0;")
        line(f"uint64_t total = {c.node.attributes.get('plus', 0)};")
        line("int any = 1, seen = 0;")
        if row.mask is not None:
            line("int all = 1;")
            with c.source.loops(row.sizes) as inner:
                line(f"if ({row.at(row.mask, inner)} != 0) all = 0;")
            if c["empty"] == "zero":
                line("any = !all;")
        with c.source.loops(row.sizes) as inner:
            q, own = row.value(inner), row.counts(inner)
            line(f"if ({own} && (!seen || {q} > top)) top = {q}, seen = 1;")
        with c.source.loops(row.sizes) as inner:
            line(f"if ({row.counts(inner)}) total += (uint64_t){row.share(inner)};")
        yield row


def softmax(c: CNode) -> None:
    """Adds a softmax by a table of exponentials and one reciprocal a row."""
    p, line = c.source.prefix, c.source.line
    zero, low, high = (number(c[k]) for k in ("zero_point", "low", "high"))
    with _rows(c) as row:
        line(f"const {p}_share part = {p}_reciprocal(any ? total : 1);")
        with c.source.loops(row.sizes) as inner:
            line("int64_t e = 0;")
            line(
                f"if (any && {row.counts(inner)}) "
                f"e = {p}_part(part, (uint64_t){row.share(inner)});"
            )
            rounded = f"{p}_up(e * {number(c['multiplier'])}, {c['shift']})"
            value = f"{p}_clip({rounded} + {zero}, {low}, {high})"
            c.put(row.at(c.output, inner), value)


def _coded(c: CNode, step: str, log: str) -> str:
    """Returns the code of a step and of a logarithm in units of 2^-26."""
    p, parts = c.source.prefix, []
    pairs = (step, "input_multiplier", "input_shift"), (log, "multiplier", "shift")
    for x, multiplier, shift in pairs:
        up, down = max(14 - c[shift], 0), max(c[shift] - 14, 0)
        factor = f"{x} * {number(c[multiplier])} * {number(1 << up)}"
        # Products are below 2^62, which is half of the smallest unit then.
        parts.append(f"{p}_up({factor}, {down})" if down < 63 else f"0 * {x}")
    zero, low, high = (number(c[k]) for k in ("zero_point", "low", "high"))
    return f"{p}_clip({p}_up({' + '.join(parts)}, 14) + {zero}, {low}, {high})"


def _logarithm(c: CNode) -> None:
    """Declares the logarithm of a sum in units of its first exponential."""
    one = int(c.params["table"][0])
    total = f"any ? total : {number(one)}"
    found = f"{c.source.prefix}_logarithm({total}, {one.bit_length()})"
    c.source.line(f"const int64_t log = {found};")


def log_softmax(c: CNode) -> None:
    """Adds a logarithm of a softmax by a table of exponentials and a series."""
    low = number(c["low"])
    with _rows(c) as row:
        _logarithm(c)
        with c.source.loops(row.sizes) as inner:
            step = f"((int64_t){row.value(inner)} - top)"
            code, own = _coded(c, step, "-log"), row.counts(inner)
            value = code if row.mask is None else f"any && {own} ? {code} : {low}"
            c.put(row.at(c.output, inner), value)


def logsumexp(c: CNode) -> None:
    """Adds a logarithm of sums of exponentials, by a table and a series."""
    low, out = number(c["low"]), c.output
    if not c.x.size:
        with c.each() as names:
            c.put(out.at(names), low)
        return
    zero = number(c["input_zero_points"][0])
    with _rows(c) as row:
        _logarithm(c)
        kept = [d for d in range(len(c.x.shape)) if d in row.others or c["keepdims"]]
        whole = dict(zip(row.others, row.outer, strict=True))
        names = [whole.get(d, "0") for d in kept]
        code = _coded(c, f"((int64_t)top - {zero})", "log")
        c.put(out.at(names), f"any ? {code} : {low}")


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Groups of codes in C.

    Attributes:
      c: The call.
      outer: Numbers of groups along each axis, of 1 code where an axis has no groups.
      inner: Sizes of a group.
    """

    c: CNode
    outer: Sequence[int]
    inner: Sequence[int]

    @classmethod
    def of(cls, c: CNode) -> "_Groups":
        """Returns the groups of a normalisation."""
        shape = c.x.shape
        pairs = zip(c["axes"], c["groups"], strict=True)
        groups = {d % len(shape): g for d, g in pairs}
        outer = [groups.get(d, n) for d, n in enumerate(shape)]
        inner = [n // groups[d] if d in groups else 1 for d, n in enumerate(shape)]
        return cls(c, outer, inner)

    def places(self, own: Sequence[str], of_group: Sequence[str]) -> list[str]:
        """Returns a place along each axis."""
        found = []
        for name, i, size in zip(own, of_group, self.inner, strict=True):
            text = place([name, i], [size, 1])
            found.append(f"({text})" if " " in text else text)
        return found

    def write(self, at: Sequence[str], steps: str) -> None:
        """Assigns a code by its steps from the zero point."""
        c, p = self.c, self.c.source.prefix
        low, high = (number(c[k] - c["zero_point"]) for k in ("low", "high"))
        value = f"{p}_clip({steps}, {low}, {high}) + {number(c['zero_point'])}"
        c.put(c.output.at(at), value)


def norm(c: CNode) -> None:
    """Adds a normalisation of groups by one reciprocal root each."""
    x, source, p, groups = c.x, c.source, c.source.prefix, _Groups.of(c)
    zero, count = c["input_zero_points"][0], c["count"]
    line, point = source.line, c["point"]
    with source.loops(groups.outer) as names:
        line("int64_t total = 0, squares = 0;")
        with source.loops(groups.inner) as own:
            at = groups.places(names, own)
            line(f"const int64_t term = (int64_t){x.at(at)} - {zero};")
            line("total += term;")
            line("squares += term * term;")
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
        with source.loops(groups.inner) as own:
            at = groups.places(names, own)
            line(f"int64_t q = (int64_t){x.at(at)} - {zero};")
            if c["is_centred"]:
                line(f"q = {count} * q - total;")
            factor, bias = c.read("multiplier", at), c.read("bias", at)
            added = f"(int64_t){bias} * {number(1 << c['bias_shift'])}"
            line(f"q = {p}_up(q * root, down) * {factor} + {added};")
            groups.write(at, f"{p}_up(q, {c['shift']})")


def masked_norm(c: CNode) -> None:
    """Adds a normalisation of groups by the moments of what a mask keeps."""
    (x, mask), source, p, groups = c.inputs, c.source, c.source.prefix, _Groups.of(c)
    zero, line = c["input_zero_points"][0], c.source.line
    strides = broadcast_strides(mask.shape, len(x.shape))
    with source.loops(groups.outer) as names:
        line("int64_t count = 0, total = 0, squares = 0;")
        with source.loops(groups.inner) as own:
            at = groups.places(names, own)
            line(f"const int64_t term = (int64_t){x.at(at)} - {zero};")
            line(f"const int kept = {mask.at(at, strides)} != 0;")
            line("count += kept;")
            line("total += kept ? term : 0;")
            line("squares += kept ? term * term : 0;")
        if c["least"]:
            line("if (count < 1) count = 1;")
        if not c["is_centred"]:
            line("total = 0;")
        line("squares = count * squares - total * total;")
        line("const uint64_t ones = (uint64_t)(count * count);")
        epsilon, floor = (
            f"ones * (uint64_t){number(c[k])}" for k in ("epsilon", "floor")
        )
        line("int down, half;")
        given = f"(uint64_t)squares, {epsilon}, {floor}, {number(c['point'])}"
        line(f"const uint64_t whole = {p}_added({given}, &half);")
        line(f"const int64_t root = {p}_root(whole, &down);")
        line(f"down -= half + {fraction(c['most_places'], True)};")
        with source.loops(groups.inner) as own:
            at = groups.places(names, own)
            line("int exponent;")
            line(f"int64_t q = count * ((int64_t){x.at(at)} - {zero}) - total;")
            line(f"q = {p}_held(q * root, down, &exponent);")
            factor, bias = c.read("multiplier", at), c.read("bias", at)
            added = f"(int64_t){bias} * {number(1 << c['bias_shift'])}"
            groups.write(at, f"{p}_far(q, exponent, {factor}, {added}, {c['shift']})")
