"""The manifest of a program file: its graph as JSON, and its small arrays, compressed.

`qjax/graph/FORMAT.md` has the form byte by byte.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Node, Value, read_json, storage, usual_fields
from qjax.graph.operations.record import is_integer

_LEVEL = 9
_MOST_BYTES = 1 << 26  # Of JSON, and of small arrays: what a file may unpack to.
_SMALL = 1 << 16  # Bytes below which a parameter is a small array.
_FLOAT = "float32"
_TYPES = ("int8", "uint8", "int16", "uint16", "int32", _FLOAT)


class SmallArrays:
    """Small arrays one after the other, equal ones once.

    Attributes:
      forms: Type and shape of each.
      parts: Bytes of each: the first byte of all its numbers, then the second, ...
    """

    def __init__(self) -> None:
        self.forms: list[tuple[str, list[int]]] = []
        self.parts: list[bytes] = []
        self._places: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._size = 0

    def add(self, array: np.ndarray) -> int:
        """Adds an array; returns its number."""
        data = _by_planes(array)
        key = str(array.dtype), array.shape, data
        if key not in self._places:
            self._places[key] = len(self.forms)
            self.forms.append((str(array.dtype), list(array.shape)))
            self.parts.append(data)
            self._size += len(data)
        return self._places[key]

    def takes(self, array: np.ndarray) -> bool:
        """Returns whether a parameter is small, and has room among the others."""
        return array.nbytes < _SMALL and self.has_room(array)

    def has_room(self, array: np.ndarray) -> bool:
        """Returns whether an array has room among the others."""
        return self._size + array.nbytes <= _MOST_BYTES

    def compressed(self) -> np.ndarray:
        """Returns all of them, uint8."""
        return _compressed(b"".join(self.parts))


def smallest(array: np.ndarray) -> np.ndarray:
    """Returns integers in the smallest type that holds them."""
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    return array.astype(storage(low, high))


def write_manifest(fields: Mapping[str, Any]) -> np.ndarray:
    """Writes a manifest: JSON with sorted keys, compressed, uint8.

    Raises:
      ValueError: if `read_manifest` would refuse it for its length.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > _MOST_BYTES:
        raise ValueError(
            f"The graph takes {len(text)} bytes as JSON, of which a file holds at most "
            f"{_MOST_BYTES}. Save it in parts."
        )
    return _compressed(text)


def read_manifest(data: np.ndarray) -> Any:
    """Reads a manifest.

    Raises:
      ValueError: if it is no JSON, or is longer than `write_manifest` writes.
    """
    text = _decompressed("manifest", data, _MOST_BYTES)
    try:
        return read_json(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"The manifest is no text: {error}.") from error


def read_small(forms: Any, data: np.ndarray) -> list[np.ndarray]:
    """Reads small arrays.

    Args:
      forms: Type and shape of each, from a manifest that nobody has checked.
      data: The arrays, compressed.

    Raises:
      ValueError: if the forms are none, or others than those of the arrays.
    """
    if not isinstance(forms, list):
        raise ValueError(f"Forms of small arrays must be a list, got {forms!r}.")
    sizes = [_size(form) for form in forms]
    if sum(sizes) > _MOST_BYTES:
        raise ValueError(
            f"Small arrays must take at most {_MOST_BYTES} bytes, got {sum(sizes)}."
        )
    whole = _decompressed("small arrays", data, sum(sizes))
    if len(whole) != sum(sizes):
        raise ValueError(
            f"Small arrays must take {sum(sizes)} bytes, got {len(whole)}."
        )
    ends = np.cumsum([0, *sizes])
    parts = (whole[a:b] for a, b in zip(ends, ends[1:], strict=False))
    return [_from_planes(x, *form) for x, form in zip(parts, forms, strict=True)]


# Scales.


def graph_fields(graph: Graph, small: SmallArrays) -> Any:
    """Returns a graph as JSON data: its fields, without those of usual values.

    Lists of scales are among the small arrays; those of a bias, which are a multiple of
    those of its kernel, are written as such.
    """

    def replaced(scale: Any) -> Any:
        if not isinstance(scale, list | tuple):
            return scale
        wide = np.asarray(scale, np.float64)
        with np.errstate(over="ignore"):
            array = wide.astype(np.float32)
        is_exact = np.array_equal(wide, array) and small.has_room(array)
        return {"small": small.add(array)} if is_exact else scale

    data: Any = _without_usual(graph)
    multiples = _multiples(graph)
    for name, multiple in multiples.items():
        data["grids"][name]["scale"] = multiple
    return _with_scales(data, replaced)


def with_scales(data: Any, arrays: list[np.ndarray]) -> Any:
    """Returns JSON data of a graph with its scales in their places.

    Args:
      data: JSON data that nobody has checked.
      arrays: The small arrays.

    Raises:
      ValueError: if a scale is an array that is not there.
    """

    def replaced(scale: Any) -> Any:
        if not isinstance(scale, dict) or set(scale) == {"of", "times"}:
            return scale
        k: Any = scale.get("small")
        is_there = is_integer(k) and 0 <= k < len(arrays) and len(scale) == 1
        if not is_there or arrays[k].dtype != np.float32:
            raise ValueError(f"A scale must be a small array of float32, got {scale}.")
        return arrays[k].tolist()

    found = _with_scales(data, replaced)
    own = found.get("grids") if isinstance(found, dict) else None
    if not isinstance(own, dict):
        return found
    grids = {name: _without_multiple(own, grid) for name, grid in own.items()}
    return {**found, "grids": grids}


def _without_usual(graph: Graph) -> dict[str, Any]:
    """Returns the fields of a graph, with those alone that have no usual value."""
    data = {**dataclasses.asdict(graph), "values": list(map(_unusual, graph.values))}
    nodes = []
    for node in graph.nodes:
        own = {role: _without_usual(inner) for role, inner in node.graphs.items()}
        nodes.append(_unusual(node) | ({"graphs": own} if own else {}))
    return {**data, "nodes": nodes}


def _unusual(part: Value | Node) -> dict[str, Any]:
    usual = usual_fields(type(part))
    fields = dataclasses.asdict(part).items()
    return {k: x for k, x in fields if k not in usual or x != usual[k]}


def _multiples(graph: Graph) -> dict[str, dict[str, Any]]:
    """Returns scales of biases as multiples of those of kernels, where they are."""
    found = {}
    for node in graph.nodes:
        bias, kernel = (node.params.get(role, "") for role in ("bias", "kernel"))
        if not {bias, kernel} <= set(graph.grids) or not node.inputs:
            continue
        grid = graph.values[node.inputs[0]].grid
        own, other = graph.grids[bias].array(), graph.grids[kernel].array()
        if grid is None or np.ndim(grid.scale) or not own.ndim:
            continue
        factor = float(np.ldexp(grid.scale, -node.attributes.get("shift", 0)))
        if np.array_equal(_times(other, factor), own):
            found[bias] = {"of": kernel, "times": factor}
    return found


def _without_multiple(grids: Any, grid: Any) -> Any:
    """Returns a grid whose scale is no multiple of that of another."""
    scale = grid.get("scale") if isinstance(grid, dict) else None
    if not isinstance(scale, dict):
        return grid
    other, factor = grids.get(str(scale.get("of"))), scale.get("times")
    known = isinstance(other, dict) and isinstance(other.get("scale"), list)
    if not known or not isinstance(factor, float):
        raise ValueError(
            f"A scale must be a multiple of a list of scales, got {scale}."
        )
    try:
        array = _times(np.asarray(other["scale"], np.float64), factor)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"A scale must be of numbers: {error}.") from error
    return {**grid, "scale": array.tolist()}


def _times(scale: np.ndarray, factor: float) -> np.ndarray:
    """Returns products, rounded once."""
    with np.errstate(over="ignore"):
        return (scale.astype(np.float64) * factor).astype(np.float32)


def _with_scales(data: Any, replaced: Any) -> Any:
    """Replaces the scales of all grids in JSON data."""
    if isinstance(data, list | tuple):
        return [_with_scales(part, replaced) for part in data]
    if not isinstance(data, dict):
        return data
    if set(data) == {"scale", "zero_point"}:
        return {**data, "scale": replaced(data["scale"])}
    return {key: _with_scales(data[key], replaced) for key in sorted(data)}


# Bytes.


def _by_planes(array: np.ndarray) -> bytes:
    """Returns the first bytes of all numbers, then the second ones, and so on."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _from_planes(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    each = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(each, -1)
    little = np.ascontiguousarray(planes.T).view(np.dtype(dtype).newbyteorder("<"))
    return little.astype(dtype).reshape(shape)


def _size(form: Any) -> int:
    """Returns the bytes of a small array; raises ValueError for what is no form."""
    is_form = isinstance(form, list) and len(form) == 2 and form[0] in _TYPES
    is_shape = is_form and isinstance(form[1], list)
    if not is_shape or not all(is_integer(n) and 0 <= n < 1 << 31 for n in form[1]):
        raise ValueError(f"A small array must be [type, shape], got {form!r}.")
    return math.prod(form[1]) * np.dtype(form[0]).itemsize


def _compressed(data: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(data, _LEVEL), np.uint8)


def _decompressed(what: str, data: np.ndarray, most: int) -> bytes:
    """Decompresses bytes, of which there may be at most ``most``."""
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"The {what} must be bytes, got {data.dtype}{data.shape}.")
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data.tobytes(), most + 1)
    except zlib.error as error:
        raise ValueError(f"The {what} cannot be decompressed: {error}.") from error
    if len(found) > most or not stream.eof or stream.unused_data:
        raise ValueError(f"The {what} must end after at most {most} bytes.")
    return found
