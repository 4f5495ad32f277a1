"""The text of a C source: loops, constants and places in arrays."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_TYPES = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "int64": "int64_t",
}
_PER_LINE = 16  # Numbers of a constant in a line.


def c_type(dtype: Any) -> str:
    """Returns the C type of integers; those of fewer than 8 bits have a byte."""
    name = str(np.dtype(dtype))
    return _TYPES.get(name, "uint8_t" if name.startswith("u") else "int8_t")


def smallest(array: np.ndarray) -> np.ndarray:
    """Returns integers in the smallest type that holds them."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in _TYPES:
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return array.astype(dtype)
    raise ValueError(f"Integers from {low} to {high} do not fit 64 bits.")


def strides_of(shape: Sequence[int]) -> list[int]:
    """Returns how far apart neighbours along each axis are, the last axis inside."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def broadcast_strides(shape: Sequence[int], rank: int) -> list[int]:
    """Returns the strides of an array that broadcasts to a rank, 0 where it does."""
    own = [0 if n == 1 else s for n, s in zip(shape, strides_of(shape), strict=True)]
    return [0] * (rank - len(shape)) + own


def place(names: Sequence[str], strides: Sequence[int], offset: int = 0) -> str:
    """Returns a linear place: ``i0 * 12 + i2 + 3``."""
    whole = lambda name: f"({name})" if " " in name and name[0] != "(" else name
    parts = [
        name if stride == 1 else f"{whole(name)} * {stride}"
        for name, stride in zip(names, strides, strict=True)
        if name != "0" and stride
    ]
    if offset or not parts:
        parts.append(str(offset))
    return " + ".join(parts)


def number(value: int) -> str:
    """Returns an integer constant in C, of 64 bits where it needs them."""
    value = int(value)
    if -(2**31) < value < 2**31:
        return str(value)
    if value == -(2**31):
        return "(-2147483647 - 1)"
    return f"INT64_C({value})"


def identifier(text: str) -> str:
    """Returns a name of C for a name with slashes, colons and the like."""
    return re.sub(r"\W", "_", text)


class Source:
    """Lines of a C function, and the constants that they read."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.constants: list[str] = []
        self.lines: list[str] = []
        self.nbytes = 0  # Of constants.
        self.scratches: dict[int, int] = {}  # Width -> most elements.
        self._depth = 1
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._loops = 0

    def line(self, text: str) -> None:
        """Adds a line."""
        self.lines.append("  " * self._depth + text)

    @contextlib.contextmanager
    def block(self, head: str = "") -> Iterator[None]:
        """Adds a block, with a head such as ``if (x > 0)``."""
        self.line(f"{head} {{" if head else "{")
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}")

    @contextlib.contextmanager
    def loops(self, sizes: Sequence[int]) -> Iterator[list[str]]:
        """Adds loops one inside the other; an axis of size 1 has the place "0"."""
        with contextlib.ExitStack() as stack:
            names = []
            for n in sizes:
                if n == 1:
                    names.append("0")
                    continue
                name = self.fresh()
                head = f"for (int {name} = 0; {name} < {n}; ++{name})"
                stack.enter_context(self.block(head))
                names.append(name)
            yield names

    def fresh(self) -> str:
        """Returns a name for the place in a loop, which no other loop has."""
        self._loops += 1
        return f"i{self._loops - 1}"

    def scratch(self, ctype: str, size: int) -> str:
        """Returns the name of memory that one node alone needs."""
        bits = int(re.sub(r"\D", "", ctype))
        self.scratches[bits] = max(size, self.scratches.get(bits, 0))
        return f"(({ctype} *){self.prefix}_scratch{bits})"

    def constant(self, array: np.ndarray, hint: str = "k") -> str:
        """Adds a constant array, once, and returns its name."""
        array = smallest(np.ascontiguousarray(array))
        key = str(array.dtype), array.shape, array.tobytes()
        if key not in self._known:
            name = f"{self.prefix}_{identifier(hint)}_{len(self._known)}"
            self._known[key] = name
            self.nbytes += array.nbytes
            flat = [number(x) for x in array.reshape(-1)] or ["0"]
            rows = [
                "  " + ", ".join(flat[k : k + _PER_LINE])
                for k in range(0, len(flat), _PER_LINE)
            ]
            head = f"static const {c_type(array.dtype)} {name}[{len(flat)}] = {{"
            self.constants.append("\n".join([head, ",\n".join(rows), "};"]))
        return self._known[key]
