"""The container of a program file: safetensors, the same bytes for the same tensors."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = {"int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32"}
_MULTIPLE = 8  # Data begin at a multiple of these bytes, the header's length included.


def to_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Writes tensors in a safetensors container.

    Its own writer orders metadata at random. Tensors of wide types come first, so that
    each begins at a multiple of its type's bytes; those of one type are ordered by
    name.

    Args:
      tensors: Name -> integers of at most 32 bits.
      metadata: Texts of the header.

    Returns:
      Length of the header in 8 bytes, the header as JSON, the data.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, at = [], 0
    for name in order:
        array = tensors[name]
        data = _data(array)
        entries[name] = {
            "dtype": _NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _MULTIPLE)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def checksum(array: np.ndarray) -> str:
    r"""Returns the SHA-256 of a tensor: its type and shape in the header, and its data.

    Example:
      >>> checksum(np.int8([[1, 2]])) == hashlib.sha256(b"I8[1,2]\x01\x02").hexdigest()
      True
    """
    name = _NAMES.get(str(array.dtype), str(array.dtype))
    head = f"{name}[{','.join(map(str, array.shape))}]"
    return hashlib.sha256(head.encode() + _data(array)).hexdigest()


def _data(array: np.ndarray) -> bytes:
    """Returns the numbers of an array, least byte first."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
