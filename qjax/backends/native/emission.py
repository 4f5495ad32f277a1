"""Buffers, steps and constants of a plan while it is made."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.graph.arena import Lifetime, plan
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.sizes import Shape

ABI = 3
MAGIC = 0x716A6178
DTYPES = ("int8", "uint8", "int16", "uint16", "int32")
ARENA, INPUT, OUTPUT, CONSTANT = range(4)
_ALIGNMENT = 64
_FILL, _COPY = 1, 2


class NotNativeError(NotImplementedError):
    """A node that the native kernels do not compute; XLA does."""


class Step(NamedTuple):
    """A step of a plan.

    Attributes:
      kind: Number of its kind.
      words: Its words.
      reads: Buffers that it reads.
      writes: Buffers that it writes, whole or in part.
    """

    kind: int
    words: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclasses.dataclass
class Buffer:
    """A buffer of a plan: `elements` of a type, in one of four kinds of memory."""

    dtype: str
    elements: int
    kind: int = ARENA
    place: int = 0

    @property
    def nbytes(self) -> int:
        """Returns its bytes, up to where the next buffer may begin."""
        return _aligned(self.elements * np.dtype(self.dtype).itemsize)


class Constants:
    """The constants of a plan, one after the other, equal ones once."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.nbytes = 0
        self._places: dict[Any, int] = {}

    def add(self, array: np.ndarray) -> int:
        """Adds an array and returns its first byte."""
        array = np.ascontiguousarray(array)
        key = str(array.dtype), hashlib.sha256(array.tobytes()).digest()
        if key not in self._places:
            self._places[key] = self.nbytes
            self.parts.append(array)
            self.nbytes += _aligned(array.nbytes)
        return self._places[key]

    def joined(self) -> np.ndarray:
        """Returns all of them, uint8."""
        found = np.zeros(self.nbytes, np.uint8)
        at = 0
        for array in self.parts:
            found[at : at + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            at += _aligned(array.nbytes)
        return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Emission:
    """A plan in the making: one graph with its sizes.

    Args:
      graph: The graph.
      params: Its parameters, NumPy arrays.
      shapes: Shapes of all its values.
      constants: Receives the constants.
      output_types: Types of the outputs where they are not those of the graph.
    """

    def __init__(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        shapes: Sequence[Shape],
        constants: Constants,
        output_types: Sequence[str] | None = None,
    ) -> None:
        self.graph, self.params, self.shapes = graph, params, shapes
        self.constants = constants
        self.output_types = output_types or [
            graph.values[v].dtype for v in graph.outputs
        ]
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.of: dict[int, int] = {}  # Value -> buffer.
        for k, v in enumerate(graph.inputs):
            size = math.prod(shapes[v])
            self.of[v] = self.buffer(graph.values[v].dtype, size, INPUT, k)
        self.followers = _followers(graph, shapes)
        self.fused: set[int] = set()  # Values that the node before theirs computes.
        self.computed: str | None = None  # Type in which a step computes values.

    # What nodes read.

    def value(self, v: int) -> Value:
        """Returns a value of the graph with its shape now."""
        return dataclasses.replace(self.graph.values[v], shape=tuple(self.shapes[v]))

    def param(self, node: Node, role: str) -> np.ndarray:
        """Returns a parameter of a node."""
        return self.params[node.params[role]]

    # Buffers.

    def buffer(self, dtype: str, elements: int, kind: int = ARENA, at: int = 0) -> int:
        """Adds a buffer and returns its number."""
        self.buffers.append(Buffer(dtype, elements, kind, at))
        return len(self.buffers) - 1

    def make(self, v: int) -> int:
        """Adds the buffer of a value that a node computes."""
        dtype = self.computed if v not in self.fused else None
        dtype = dtype or self.graph.values[v].dtype
        self.of[v] = self.buffer(dtype, math.prod(self.shapes[v]))
        return self.of[v]

    def constant(self, array: np.ndarray) -> int:
        """Adds a buffer of known integers."""
        at = self.constants.add(array)
        return self.buffer(str(array.dtype), array.size, CONSTANT, at)

    def table(self, array: Any, dtype: str = "int32") -> int:
        """Adds a parameter of steps and returns its first byte among the constants."""
        found = np.asarray(array)
        info = np.iinfo(dtype)
        if found.size and (found.min() < info.min or found.max() > info.max):
            raise NotNativeError(f"a parameter leaves {dtype}")
        return self.constants.add(found.astype(dtype))

    # Steps.

    def step(
        self,
        kind: int,
        words: Sequence[int],
        reads: Sequence[int],
        writes: Sequence[int],
    ) -> None:
        """Adds a step, unless it has nothing to write."""
        if any(self.buffers[b].elements for b in writes):
            own = tuple(map(int, words))
            self.steps.append(Step(kind, own, tuple(reads), tuple(writes)))

    def fill(self, out: int, code: int) -> None:
        """Adds the step that fills a buffer with one integer."""
        self.step(_FILL, [out, code], (), [out])

    def copy(
        self,
        x: int,
        out: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        out_strides: Sequence[int] | None = None,
        offsets: tuple[int, int] = (0, 0),
    ) -> None:
        """Adds the step that copies a box of integers, axes merged where they can be.

        Args:
          x: Buffer to read.
          out: Buffer to write.
          sizes: Sizes of the box.
          strides: Elements from place to place in ``x``.
          out_strides: In ``out``; None for one place after the other.
          offsets: First element in each.
        """
        if not math.prod(sizes):
            return
        target = dense(sizes) if out_strides is None else out_strides
        axes = merged(zip(sizes, strides, target, strict=True)) or [(1, 1, 1)]
        columns = list(zip(*axes, strict=True))
        words = [x, out, len(axes), *columns[0], offsets[0], *columns[1], offsets[1]]
        self.step(_COPY, [*words, *columns[2]], [x], [out])

    # Values in other layouts.

    def whole(self, v: int, shape: Sequence[int], dtype: str | None = None) -> int:
        """Returns a buffer of a value broadcast to a shape, and of a type."""
        own, x = self.shapes[v], self.of[v]
        dtype = dtype or self.buffers[x].dtype
        if tuple(own) == tuple(shape) and dtype == self.buffers[x].dtype:
            return x
        out = self.buffer(dtype, math.prod(shape))
        self.copy(x, out, shape, broadcast_strides(own, shape))
        return out

    def arranged(self, x: int, shape: Sequence[int], order: Sequence[int]) -> int:
        """Returns a buffer of the same integers with axes in another order."""
        if is_in_order(shape, order):
            return x
        out = self.buffer(self.buffers[x].dtype, math.prod(shape))
        strides = dense(shape)
        sizes = [shape[d] for d in order]
        self.copy(x, out, sizes, [strides[d] for d in order])
        return out

    def put_back(
        self, x: int, out: int, shape: Sequence[int], order: Sequence[int]
    ) -> None:
        """Adds the step that undoes `arranged`, into another buffer."""
        strides = dense(shape)
        sizes = [shape[d] for d in order]
        self.copy(x, out, sizes, dense(sizes), [strides[d] for d in order])

    def narrow(self, v: int) -> int:
        """Returns a buffer of a value in a type of 8 or 16 bits.

        Raises:
          NotNativeError: if its integers need more.
        """
        value = self.value(v)
        if self.buffers[self.of[v]].dtype != "int32":
            return self.of[v]
        if value.low < -(1 << 15) or value.high >= 1 << 15:
            raise NotNativeError("its codes need more than 16 bits")
        return self.whole(v, value.shape, "int16")

    # The plan.

    def finish(self) -> tuple[list[int], int]:
        """Returns the words of the plan and the bytes of its arena."""
        self._write_outputs()
        arena = self._place()
        header = [MAGIC, ABI, len(self.buffers), len(self.graph.inputs)]
        header += [len(self.graph.outputs), len(self.steps), arena]
        words = list(header)
        for b in self.buffers:
            words += [DTYPES.index(b.dtype), b.elements, b.kind, b.place]
        for step in self.steps:
            words += [step.kind, len(step.words), *step.words]
        return words, arena

    def _write_outputs(self) -> None:
        """Makes buffers of the arena outputs, and copies what lies elsewhere."""
        for k, (v, dtype) in enumerate(
            zip(self.graph.outputs, self.output_types, strict=True)
        ):
            own = self.buffers[self.of[v]]
            if own.kind == ARENA and own.dtype == dtype:
                own.kind, own.place = OUTPUT, k
                continue
            out = self.buffer(dtype, own.elements, OUTPUT, k)
            self.copy(self.of[v], out, [own.elements], [1])

    def _place(self) -> int:
        """Gives each buffer of the arena its place and returns the bytes of all."""
        lives: dict[int, Lifetime] = {}
        for time, step in enumerate(self.steps):
            for b in (*step.reads, *step.writes):
                if self.buffers[b].kind != ARENA:
                    continue
                first = lives[b].first if b in lives else time
                lives[b] = Lifetime(self.buffers[b].nbytes, first, time)
        places, size = plan(lives)
        for b, at in places.items():
            self.buffers[b].place = at
        return size


def _followers(graph: Graph, shapes: Sequence[Shape]) -> dict[int, Node]:
    """Returns values that one requantization alone reads, each with it."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for v in node.inputs:
            readers.setdefault(v, []).append(node)
    found = {}
    for v, own in readers.items():
        node = own[0]
        if len(own) > 1 or v in graph.outputs or node.operation != "requantize":
            continue
        if tuple(shapes[node.output]) == tuple(shapes[v]):
            found[v] = node
    return found


# Strides, in elements.


def dense(shape: Sequence[int]) -> list[int]:
    """Returns the strides of an array without gaps, the last axis first in memory."""
    found, step = [], 1
    for n in reversed(shape):
        found.append(step)
        step *= n
    return found[::-1]


def broadcast_strides(own: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Returns the strides by which an array is read in a shape it broadcasts to."""
    gap = len(shape) - len(own)
    pairs = zip(own, dense(own), strict=True)
    return [0] * gap + [0 if n == 1 else step for n, step in pairs]


def merged(axes: Any) -> list[tuple[int, ...]]:
    """Merges axes that are one after the other in all arrays.

    Args:
      axes: For each axis its size, then its strides.

    Returns:
      The same without axes of size 1, neighbours as one where their strides allow it.
    """
    found: list[tuple[int, ...]] = []
    for n, *steps in axes:
        if n == 1:
            continue
        if found and all(a == n * b for a, b in zip(found[-1][1:], steps, strict=True)):
            found[-1] = (found[-1][0] * n, *steps)
        else:
            found.append((n, *steps))
    return found


def is_in_order(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Returns whether an order of axes leaves all integers where they are."""
    kept = [d for d in order if shape[d] != 1]
    return kept == sorted(kept)


def by_channel(
    shape: Sequence[int], *arrays: np.ndarray
) -> tuple[tuple[int, int, int], list[np.ndarray]]:
    """Splits a shape where parameters differ.

    Args:
      shape: Shape of a value.
      *arrays: Parameters that broadcast to it.

    Returns:
      ``(outer, channels, inner)``, whose product is the size of the shape, and each
      parameter with one integer a channel; ``(1, 1, size)`` where none differs.
    """
    rank = len(shape)
    wide = [a.reshape((1,) * (rank - a.ndim) + a.shape) for a in arrays]
    axes = [d for d in range(rank) if any(a.shape[d] != 1 for a in wide)]
    if not axes:
        return (1, 1, math.prod(shape)), [a.reshape(-1) for a in wide]
    first, last = axes[0], axes[-1] + 1
    sizes = tuple(shape[first:last])
    own = [np.broadcast_to(a.reshape(a.shape[first:last]), sizes) for a in wide]
    outer, inner = math.prod(shape[:first]), math.prod(shape[last:])
    return (outer, math.prod(sizes), inner), [a.reshape(-1) for a in own]
