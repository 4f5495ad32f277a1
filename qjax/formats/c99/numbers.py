"""C code of numbers that stand for themselves: arithmetic, comparisons, quotients."""

from qjax.formats.c99.calls import CNode, minus
from qjax.formats.c99.text import broadcast_strides, number, place
from qjax.graph.operations.arithmetic import bits_of

_PAIRS = {
    "add": "{x} + {y}",
    "sub": "{x} - {y}",
    "mul": "{x} * {y}",
    "div": "{y} == 0 ? -1 : {x} / ({y} == 0 ? 1 : {y})",
    "rem": "{y} == 0 ? {x} : {x} % ({y} == 0 ? 1 : {y})",
    "max": "{x} > {y} ? {x} : {y}",
    "min": "{x} < {y} ? {x} : {y}",
    "and": "{x} & {y}",
    "or": "{x} | {y}",
    "xor": "{x} ^ {y}",
    "eq": "{x} == {y}",
    "ne": "{x} != {y}",
    "lt": "{x} < {y}",
    "le": "{x} <= {y}",
    "gt": "{x} > {y}",
    "ge": "{x} >= {y}",
    "shift_left": "{p}_left({x}, {y}, {bits})",
    "shift_right_arithmetic": "{p}_right({p}_wrap({x}, {bits}), {y}, {bits})",
    "shift_right_logical": "{p}_logical({x}, {y}, {bits})",
}
_ONES = {
    "neg": "-{x}",
    "abs": "{x} < 0 ? -{x} : {x}",
    "sign": "({x} > 0) - ({x} < 0)",
    "not": "~{x}",
    "convert": "{x}",
}
_SIGNS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!="}
_MOST_SHIFT = 62  # Beyond, what is below 2^62 rounds to 0.


def _wrapped(c: CNode, value: str) -> str:
    """Returns a number of 64 bits in the type of the node, as two's complement."""
    dtype = c["dtype"]
    if dtype == "bool":
        return f"({value}) != 0"
    bits = bits_of(dtype)
    if dtype.startswith("u"):
        return f"(int64_t)((uint64_t)({value}) & {number((1 << bits) - 1)})"
    return f"{c.source.prefix}_wrap({value}, {bits})"


def arithmetic(c: CNode) -> None:
    """Adds arithmetic of whole numbers, in a type that wraps."""
    kind, dtype = c["kind"], c["dtype"]
    form = _PAIRS[kind] if len(c.inputs) > 1 else _ONES[kind]
    if kind == "not" and dtype == "bool":
        form = "1 - {x}"
    names = {"x": "x", "y": "y", "p": c.source.prefix, "bits": bits_of(dtype)}
    with c.each() as at:
        for name, t in zip("xy", c.inputs, strict=False):
            own = place(at, broadcast_strides(t.shape, len(at)))
            c.source.line(f"const int64_t {name} = {t.name}[{own}];")
        c.put(c.output.at(at), _wrapped(c, form.format(**names)))


def compare(c: CNode) -> None:
    """Adds a comparison of products, each rounded as float32 is."""
    p, up = c.source.prefix, c["exponents"][0] - c["exponents"][1]
    with c.each() as names:
        for letter, t, zero, multiplier in zip(
            "ab", c.inputs, c["zero_points"], c["multipliers"], strict=True
        ):
            q = minus(f"(int64_t){t.at(names)}", zero)
            line = f"{p}_float(({q}) * {number(multiplier)})"
            c.source.line(f"const int64_t {letter} = {line};")
        order = f"{p}_order(a, b, {min(up, _MOST_SHIFT)})"
        if up < 0:
            order = f"-{p}_order(b, a, {min(-up, _MOST_SHIFT)})"
        c.put(c.output.at(names), f"{order} {_SIGNS[c['kind']]} 0")


def divide(c: CNode) -> None:
    """Adds quotients by a reciprocal; by zero they saturate."""
    low, high = (number(c[k] - c["zero_point"]) for k in ("low", "high"))
    line, p, shift = c.source.line, c.source.prefix, c["shift"]
    with c.each() as names:
        for letter, t, zero in zip("xy", c.inputs, c["zero_points"], strict=True):
            at = place(names, broadcast_strides(t.shape, len(names)))
            q = minus(f"(int64_t){t.name}[{at}]", zero)
            line(f"const int64_t {letter} = {q};")
        line("const int64_t size = y == 0 ? 1 : y < 0 ? -y : y;")
        whole = number(c["multiplier"] << 14)
        line(f"int64_t steps = x * (({whole} + size / 2) / size);")
        line("if (y < 0) steps = -steps;")
        rounded = f"{p}_up(steps, {shift})" if shift <= _MOST_SHIFT else "0"
        line(f"steps = {rounded};")
        line("if (y == 0) steps = ((x > 0) - (x < 0)) * ((int64_t)1 << 40);")
        code = f"{p}_clip(steps, {low}, {high}) + {number(c['zero_point'])}"
        c.put(c.output.at(names), code)
