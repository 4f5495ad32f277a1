"""Program files of versions 1 and 2, which have their graph in the header."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import read_json

# Header fields, JSON objects, and tensors for checksums and golden vectors. No version
# writes them; a reader skips them.
_RESERVED = ("checksums", "golden")
_GOLDEN = "__golden__/"
_KEYS = ("format", "version", "sha256", "graph", "packed", "inputs", "outputs")


def checksum(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of header and tensors together."""
    digest = hashlib.sha256()
    for name in sorted(set(header) - {"sha256"}):
        digest.update(f"{name}={header[name]}\0".encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def fields(
    header: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the fields of a manifest and the parameters as stored.

    Raises:
      ValueError: if the header holds others, or no JSON.
    """
    reserved = _RESERVED if header["version"] != "1" else ()
    wanted = (*_KEYS, *reserved)
    if set(header) != set(wanted):
        raise ValueError(f"Its header must hold {wanted}, got {sorted(header)}.")
    for name in reserved:
        if not isinstance(read_json(header[name]), dict):
            raise ValueError(f"Its {name} must be an object, got {header[name]!r}.")
    if reserved:
        arrays = {k: x for k, x in arrays.items() if not k.startswith(_GOLDEN)}
    names = ("graph", "packed", "inputs", "outputs")
    return {name: read_json(header[name]) for name in names}, dict(arrays)
