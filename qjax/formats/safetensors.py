"""Integer programs in one file: safetensors, with the graph as JSON in its header."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qjax.lowering.graph import Graph
from qjax.lowering.packing import pack, storage_bits, unpack
from qjax.lowering.program import IntegerProgram

_FORMAT = "qjax.integer_program"
_VERSION = 1


def save(program: IntegerProgram, path: str | os.PathLike[str]) -> None:
    """Writes a program to a file, all or nothing.

    The tensors are `IntegerProgram.params`, those of 2 and 4 bits packed four and two
    to the byte (`qjax.lowering.packing`); the header holds the graph, the shapes of
    what is packed, a format version and a SHA-256 over all of it.

    Args:
      program: What to write.
      path: Where. An existing file is replaced once the new one is complete.

    Raises:
      ValueError: if inputs or outputs are nested in other than tuples, lists, dicts.
      OSError: if the file cannot be written; nothing is left behind then.
    """
    arrays = {k: np.asarray(v, order="C") for k, v in program.params.items()}
    packed: dict[str, tuple[int, list[int]]] = {}
    for name, array in arrays.items():
        bits = storage_bits(array)
        if bits < 8:
            packed[name] = bits, list(array.shape)
            arrays[name] = pack(array, bits)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "graph": program.graph.to_json(),
        "packed": json.dumps(packed, sort_keys=True),
        "inputs": json.dumps(_tree_to_json(program.input_tree)),
        "outputs": json.dumps(_tree_to_json(program.output_tree)),
    }
    header["sha256"] = _checksum(header, arrays)
    data = safetensors.numpy.save(arrays, header)
    _write_atomically(path, data)


def load(path: str | os.PathLike[str]) -> IntegerProgram:
    """Reads a program that `save` wrote.

    Args:
      path: The file.

    Returns:
      The program, equal to the one saved.

    Raises:
      ValueError: if the file is no such program, is truncated or altered, or comes from
        a later version.
      OSError: if it cannot be read.
    """
    with open(path, "rb"):
        pass  # A file that is not there raises as files do.
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and what a broken header makes of it.
        raise ValueError(
            f"{os.fspath(path)!r} is truncated, or no safetensors file: {error}."
        ) from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} is a safetensors file, but not an integer program. "
            "Programs are written by `IntegerProgram.save`."
        )
    if header.get("version") != str(_VERSION):
        raise ValueError(
            f"{os.fspath(path)!r} has format version {header.get('version')}, this "
            f"qjax reads version {_VERSION}. Use the qjax that wrote it, or save anew."
        )
    if header.pop("sha256", None) != _checksum(header, arrays):
        raise ValueError(
            f"{os.fspath(path)!r} was altered: its contents do not have the checksum "
            "in its header. Save the program again."
        )
    for name, (bits, shape) in json.loads(header.get("packed", "{}")).items():
        arrays[name] = unpack(arrays[name], bits, tuple(shape))
    return IntegerProgram(
        Graph.from_json(header["graph"]),
        {name: jnp.asarray(array) for name, array in arrays.items()},
        _tree_from_json(json.loads(header["inputs"])),
        _tree_from_json(json.loads(header["outputs"])),
    )


def _checksum(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(header):
        digest.update(f"{name}={header[name]}\0".encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _tree_to_json(tree: Any) -> Any:
    """Containers as ``[kind, children]``, leaves as null."""

    def encode(node: Any) -> Any:
        if isinstance(node, int):
            return None
        if node is None:
            return ["none", []]
        if type(node) is dict and all(isinstance(k, str) for k in node):
            return ["dict", {k: encode(v) for k, v in node.items()}]
        if type(node) in (tuple, list):
            return [type(node).__name__, [encode(v) for v in node]]
        raise ValueError(
            "Programs are saved if their inputs and outputs are nested in tuples, "
            f"lists and dicts with string keys only, got {type(node).__name__}. "
            "Quantize a function that takes and returns these and calls the model."
        )

    return encode(jax.tree.unflatten(tree, range(tree.num_leaves)))


def _tree_from_json(data: Any) -> Any:
    def decode(node: Any) -> Any:
        if node is None:
            return 0
        kind, children = node
        if kind == "none":
            return None
        if kind == "dict":
            return {k: decode(v) for k, v in children.items()}
        return {"tuple": tuple, "list": list}[kind](map(decode, children))

    return jax.tree.structure(decode(data))
