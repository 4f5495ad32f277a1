"""An ONNX graph under construction: operators in integers, with types and sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.sizes import FreeSize, FreeSizeError, Size, Sizes

_COMPARISONS = "Equal Less LessOrEqual Greater GreaterOrEqual".split()
_END = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class OnnxValue:
    """A tensor of an ONNX graph."""

    name: str
    dtype: str
    shape: Sizes


@dataclasses.dataclass(frozen=True)
class OnnxOp:
    """An operator with the names of its ends; graphs may stand in attributes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    domain: str = ""


class OnnxGraph:
    """Operators in the order in which they are added, and the constants they read.

    Args:
      outer: Graph around this one, whose values it may read.
    """

    def __init__(self, outer: "OnnxGraph | None" = None) -> None:
        self.ops: list[OnnxOp] = []
        self.constants: dict[str, np.ndarray] = {} if outer is None else outer.constants
        self.names: set[str] = set() if outer is None else outer.names
        self.symbols: dict[str, OnnxValue] = {} if outer is None else outer.symbols
        self._known: dict[Any, OnnxValue] = {} if outer is None else outer._known
        self._casts: dict[tuple[str, str], OnnxValue] = {}

    def unique(self, name: str) -> str:
        """Returns a name that no value has, and takes it."""
        found, k = name, 1
        while found in self.names:
            found, k = f"{name}_{k}", k + 1
        self.names.add(found)
        return found

    def constant(self, array: Any, dtype: str, name: str = "c") -> OnnxValue:
        """Returns a constant, the same for the same numbers."""
        array = np.asarray(array).astype(dtype)
        key = dtype, array.shape, array.tobytes()
        if key not in self._known:
            own = OnnxValue(self.unique(name), dtype, array.shape)
            self._known[key], self.constants[own.name] = own, array
        return self._known[key]

    def op(
        self,
        kind: str,
        *inputs: OnnxValue | None,
        dtype: str,
        shape: Sizes,
        domain: str = "",
        **attributes: Any,
    ) -> OnnxValue:
        """Adds an operator with one output."""
        found = OnnxValue(self.unique(f"t{len(self.names)}"), dtype, shape)
        names = tuple("" if x is None else x.name for x in inputs)
        self.ops.append(OnnxOp(kind, names, (found.name,), attributes, domain))
        return found

    # Elementwise.

    def cast(self, x: OnnxValue, dtype: str) -> OnnxValue:
        """Converts to a type that holds all numbers, or wraps."""
        if x.dtype == dtype:
            return x
        key = x.name, dtype
        if key not in self._casts:
            own = self.op("Cast", x, dtype=dtype, shape=x.shape, to=dtype)
            self._casts[key] = own
        return self._casts[key]

    def two(self, kind: str, a: Any, b: Any, **attributes: Any) -> OnnxValue:
        """Adds an operator on two values of one type; numbers become constants."""
        dtype = a.dtype if isinstance(a, OnnxValue) else b.dtype
        a, b = (
            x if isinstance(x, OnnxValue) else self.constant(x, dtype) for x in (a, b)
        )
        assert a.dtype == b.dtype, (kind, a, b)
        made = "bool" if kind in _COMPARISONS else dtype
        shape = joint_shape(a.shape, b.shape)
        return self.op(kind, a, b, dtype=made, shape=shape, **attributes)

    def one(self, kind: str, x: OnnxValue, **attributes: Any) -> OnnxValue:
        """Adds an operator on one value."""
        return self.op(kind, x, dtype=x.dtype, shape=x.shape, **attributes)

    def add(self, a: OnnxValue, b: Any) -> OnnxValue:
        """Adds; nothing where ``b`` is zero and changes no shape."""
        return a if _is_neutral(b, a, 0) else self.two("Add", a, b)

    def sub(self, a: OnnxValue, b: Any) -> OnnxValue:
        """Subtracts; nothing where ``b`` is zero and changes no shape."""
        return a if _is_neutral(b, a, 0) else self.two("Sub", a, b)

    def mul(self, a: OnnxValue, b: Any) -> OnnxValue:
        """Multiplies; nothing where ``b`` is one and changes no shape."""
        return a if _is_neutral(b, a, 1) else self.two("Mul", a, b)

    def where(self, which: OnnxValue, a: Any, b: Any) -> OnnxValue:
        """Chooses ``a`` where a truth value is true, ``b`` elsewhere."""
        dtype = a.dtype if isinstance(a, OnnxValue) else b.dtype
        a, b = (
            x if isinstance(x, OnnxValue) else self.constant(x, dtype) for x in (a, b)
        )
        shape = joint_shape(which.shape, joint_shape(a.shape, b.shape))
        return self.op("Where", which, a, b, dtype=dtype, shape=shape)

    def clip(self, x: OnnxValue, low: int, high: int) -> OnnxValue:
        """Clips to two numbers, as far as the type has them."""
        info = np.iinfo(x.dtype)
        if low > info.min:
            x = self.two("Max", x, low)
        return self.two("Min", x, high) if high < info.max else x

    # Moves.

    def sizes(self, sizes: Sequence[Size]) -> OnnxValue:
        """Returns sizes as integers for an operator."""
        if all(isinstance(n, int) for n in sizes):
            return self.constant(list(sizes), "int64")
        parts = [
            self.constant([n], "int64") if isinstance(n, int) else self._size(n)
            for n in sizes
        ]
        shape = (len(parts),)
        return self.op("Concat", *parts, dtype="int64", shape=shape, axis=0)

    def _size(self, n: FreeSize) -> OnnxValue:
        found = self.symbols[n.symbols[0]]
        for symbol in n.symbols[1:]:
            found = self.mul(found, self.symbols[symbol])
        return self.add(self.mul(found, n.factor), n.offset)

    def reshape(self, x: OnnxValue, shape: Sequence[Size]) -> OnnxValue:
        """Gives values another shape."""
        shape = tuple(shape)
        if shape == x.shape:
            return x
        free = [d for d, n in enumerate(shape) if isinstance(n, FreeSize)]
        target = shape
        if len(free) == 1 and 0 not in shape:  # Beside 0 nothing can be left open.
            target = (*shape[: free[0]], -1, *shape[free[0] + 1 :])
        own: dict[str, Any] = {"dtype": x.dtype, "shape": shape}
        if 0 in shape:  # A size of 0 would be that of the input otherwise.
            own["allowzero"] = 1
        return self.op("Reshape", x, self.sizes(target), **own)

    def transpose(self, x: OnnxValue, order: Sequence[int]) -> OnnxValue:
        """Orders axes."""
        if list(order) == list(range(len(x.shape))):
            return x
        shape = tuple(x.shape[d] for d in order)
        return self.op("Transpose", x, dtype=x.dtype, shape=shape, perm=list(order))

    def expand(self, x: OnnxValue, shape: Sizes) -> OnnxValue:
        """Broadcasts to a shape of the same rank."""
        if x.shape == shape:
            return x
        return self.op("Expand", x, self.sizes(shape), dtype=x.dtype, shape=shape)

    def gather(self, x: OnnxValue, places: OnnxValue, axis: int = 0) -> OnnxValue:
        """Takes what is at places of an axis."""
        shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
        return self.op("Gather", x, places, dtype=x.dtype, shape=shape, axis=axis)

    def slice(
        self, x: OnnxValue, ends: Sequence[tuple[Any, Any, Any]], shape: Sizes
    ) -> OnnxValue:
        """Slices all axes, as Python does, into a shape."""
        axes = [d for d, own in enumerate(ends) if own not in _WHOLE]
        if not axes:
            return x
        given = [_plain_ends(*ends[d]) for d in axes]
        rows = [*map(list, zip(*given, strict=True)), axes]
        start, stop, step, over = (self.constant(row, "int64") for row in rows)
        own: dict[str, Any] = {"dtype": x.dtype, "shape": shape}
        return self.op("Slice", x, start, stop, over, step, **own)

    def concatenate(self, parts: Sequence[OnnxValue], axis: int) -> OnnxValue:
        """Joins values along an axis."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0].shape
        size = _total([x.shape[axis] for x in parts])
        shape = (*first[:axis], size, *first[axis + 1 :])
        return self.op("Concat", *parts, dtype=parts[0].dtype, shape=shape, axis=axis)

    def reduce(
        self, kind: str, x: OnnxValue, axes: Sequence[int], keepdims: bool = False
    ) -> OnnxValue:
        """Reduces axes by an operator such as ``ReduceSum``."""
        if not axes:
            return x
        shape: Sizes = tuple(
            1 if d in axes else n
            for d, n in enumerate(x.shape)
            if keepdims or d not in axes
        )
        over = self.constant(list(axes), "int64")
        own: dict[str, Any] = {"dtype": x.dtype, "shape": shape}
        return self.op(kind, x, over, keepdims=int(keepdims), **own)

    def ordered(
        self, x: OnnxValue, n: Size, axis: int, **attributes: Any
    ) -> tuple[OnnxValue, OnnxValue]:
        """Orders all ``n`` values along an axis, and returns their places, too."""
        size = self.sizes([n])
        names = self.unique(f"t{len(self.names)}"), self.unique(f"t{len(self.names)}p")
        own = {"axis": axis, **attributes}
        self.ops.append(OnnxOp("TopK", (x.name, size.name), names, own))
        pair = (
            OnnxValue(name, dtype, x.shape)
            for name, dtype in zip(names, (x.dtype, "int64"), strict=True)
        )
        first, second = pair
        return first, second

    # Shifts.

    def shift_floor(self, x: OnnxValue, shift: Any) -> OnnxValue:
        """Computes ``floor(x / 2^shift)`` of int64 within 2^62, by shifts of uint64."""
        shift = np.asarray(shift, np.int64)
        if not np.any(shift):
            return self.add(x, shift)
        u = self.cast(self.add(x, 1 << 62), "uint64")
        return self._shifted_back(u, shift)

    def shift_round(self, x: OnnxValue, shift: Any) -> OnnxValue:
        """Computes ``x / 2^shift`` of int64 within 2^62, half to even."""
        shift = np.asarray(shift, np.int64)
        if not np.any(shift):
            return self.add(x, shift)
        u = self.cast(self.add(x, 1 << 62), "uint64")
        one = (shift > 0).astype(np.uint64)
        odd = self.two("BitShift", u, shift.astype(np.uint64), direction="RIGHT")
        if np.any(shift == 62):  # The 2^62 that were added are odd there.
            odd = self.two("BitwiseXor", odd, shift == 62)
        odd = self.two("BitwiseAnd", odd, one)
        below = ((np.int64(1) << shift) >> 1) - one.astype(np.int64)
        return self._shifted_back(self.add(self.add(u, odd), below), shift)

    def _shifted_back(self, u: OnnxValue, shift: np.ndarray) -> OnnxValue:
        found = self.two("BitShift", u, shift.astype(np.uint64), direction="RIGHT")
        return self.sub(self.cast(found, "int64"), np.int64(1) << (62 - shift))

    def shift_half_up(self, x: OnnxValue, shift: Any) -> OnnxValue:
        """Computes ``x / 2^shift`` of int64 within 2^61, halves up."""
        shift = np.asarray(shift, np.int64)
        half = (np.int64(1) << shift) >> 1
        return self.shift_floor(self.add(x, half) if np.any(half) else x, shift)


_WHOLE = ((None, None, None), (None, None, 1), (0, None, 1), (0, None, None))


def _plain_ends(start: Any, stop: Any, step: Any) -> tuple[int, int, int]:
    """Returns ends of a slice without nulls."""
    step = 1 if step is None else step
    first, last = (0, _END) if step > 0 else (_END, -_END)
    return first if start is None else start, last if stop is None else stop, step


def _total(sizes: Sequence[Size]) -> Size:
    if all(isinstance(n, int) for n in sizes):
        return sum(n for n in sizes if isinstance(n, int))
    known = sum(n for n in sizes if isinstance(n, int))
    free = [n for n in sizes if isinstance(n, FreeSize)]
    if len({n.symbols for n in free}) > 1:
        raise FreeSizeError("a sum of sizes that are free")
    factor, offset = sum(n.factor for n in free), sum(n.offset for n in free)
    return FreeSize(free[0].symbols, factor, offset + known)


def joint_shape(a: Sizes, b: Sizes) -> Sizes:
    """Returns the shape to which two shapes broadcast."""
    rank = max(len(a), len(b))
    a, b = ((1,) * (rank - len(x)) + x for x in (a, b))
    return tuple(n if m == 1 else m for n, m in zip(a, b, strict=True))


def _is_neutral(b: Any, a: OnnxValue, number: int) -> bool:
    """Returns whether numbers leave a value as it is."""
    if isinstance(b, OnnxValue):
        return False
    b = np.asarray(b)
    is_same = bool(np.all(b == number))
    return is_same and joint_shape(a.shape, b.shape) == a.shape
