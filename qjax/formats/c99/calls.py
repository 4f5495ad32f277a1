"""Nodes of a graph with their operands, as the code of C reads them."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.c99.text import (
    Source,
    broadcast_strides,
    number,
    place,
    strides_of,
)
from qjax.formats.support import unsupported
from qjax.graph.graph import Node

_INT32 = 1 << 31

WRITER = "qjax.formats.c99.write_c99"
RULES = {"tflite_double": "double", "tflite_single": "single"}  # Functions in C.


@dataclasses.dataclass(frozen=True)
class CArray:
    """A value in C: a pointer to its elements.

    Attributes:
      name: Name of the pointer.
      shape: Its shape.
      ctype: Type of its elements.
      low: Its least integer.
      high: Its largest integer.
    """

    name: str
    shape: tuple[int, ...]
    ctype: str
    low: int
    high: int

    @property
    def strides(self) -> list[int]:
        """Returns how far apart neighbours along each axis are."""
        return strides_of(self.shape)

    @property
    def size(self) -> int:
        """Returns the number of its elements."""
        return math.prod(self.shape)

    def at(self, names: Sequence[str], strides: Sequence[int] | None = None) -> str:
        """Returns an element, by the names of its places."""
        own = self.strides if strides is None else strides
        return f"{self.name}[{place(names, own)}]"


@dataclasses.dataclass(frozen=True)
class CNode:
    """A node with its operands.

    Attributes:
      node: The node.
      inputs: Its inputs.
      output: Its output.
      params: Its parameters by role, int64.
      source: Where its code goes.
      follower: The requantization of each element of an accumulator, if nothing else
        reads it; its output is the one that is written then.
    """

    node: Node
    inputs: tuple[CArray, ...]
    output: CArray
    params: Mapping[str, np.ndarray]
    source: Source
    follower: "CNode | None" = None

    def __getitem__(self, name: str) -> Any:
        return self.node.attributes[name]

    @property
    def x(self) -> CArray:
        """Returns the first input."""
        return self.inputs[0]

    def put(self, target: str, value: str) -> None:
        """Assigns a value to an element of the output."""
        self.source.line(f"{target} = ({self.output.ctype})({value});")

    def finish(self, names: Sequence[str], value: str) -> None:
        """Assigns an accumulator to its place, or its code to that of the follower."""
        own = self.follower
        if own is None:
            self.put(f"{self.output.name}[{place(names, self.output.strides)}]", value)
            return
        self.source.line(f"const int32_t sum = (int32_t)({value});")
        at = f"{own.output.name}[{place(names, own.output.strides)}]"
        own.put(at, own.requantized("sum", names))

    def requantized(self, q: str, names: Sequence[str]) -> str:
        """Returns the code of an integer by a requantization, whose node this is."""
        p, rule, zero = self.source.prefix, self["rule"], self["zero_point"]
        low, high = (number(self[k] - zero) for k in ("low", "high"))
        if self.node.attributes.get("is_wide") and rule != "half_even":
            raise self.unsupported(f"a sum of more than 32 bits by the rule {rule!r}")
        q = minus(f"(int64_t){q}", self["input_zero_point"])
        factor, shift = self.read("multiplier", names), self.read("shift", names)
        rounded = f"{p}_round(({q}) * {factor}, {shift})"
        if rule == "fp32_half_even":
            product = f"{p}_float({p}_float({q}) * {factor})"
            rounded = f"{p}_round({product}, {shift})"
        elif rule != "half_even":
            rounded = f"{p}_{RULES[rule]}({q}, {factor}, {shift})"
        clipped = f"{p}_clip({rounded}, {low}, {high})"
        return f"{clipped} + {number(zero)}" if zero else clipped

    def read(self, role: str, names: Sequence[str]) -> str:
        """Returns an element of a parameter that broadcasts to the output."""
        array = self.params[role]
        if array.size == 1:
            return number(array.reshape(-1)[0])
        name = self.source.constant(array, role)
        return f"{name}[{place(names, broadcast_strides(array.shape, len(names)))}]"

    @contextlib.contextmanager
    def each(self) -> Iterator[list[str]]:
        """Adds loops over the output."""
        with self.source.loops(self.output.shape) as names:
            yield names

    def unsupported(self, what: str) -> ValueError:
        """Returns the error for a form of the operation that C has not."""
        return unsupported(WRITER, self.node, what)


def sum_type(most: int) -> str:
    """Returns the type of a sum that stays below a number."""
    return "int32_t" if most < _INT32 else "int64_t"


def minus(x: str, zero: int) -> str:
    """Returns a code less its zero."""
    return x if not zero else f"({x} - {number(zero)})"


def wide(x: str, kind: str) -> str:
    """Returns a number in a type."""
    return f"({kind}){x}"


def farthest(t: CArray, zero: int) -> int:
    """Returns how far the codes of a value are from a zero at most."""
    return max(abs(t.low - zero), abs(t.high - zero))


def constant_type(c: CNode, name: str) -> str:
    """Returns the type of a constant that is there already."""
    head = next(t for t in c.source.constants if f" {name}[" in t.partition("\n")[0])
    return head.split()[2]
