"""Integer programs in one file: safetensors, with the graph as JSON in its header."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, read_json
from qjax.graph.operations.record import is_integer
from qjax.graph.packing import pack, storage_bits, unpack
from qjax.graph.validation import validate

_FORMAT = "qjax.integer_program"
_VERSION = 2  # Version 1 has no graphs inside of nodes, and no reserved fields.
_READ = ("1", "2")
# Header fields, JSON objects, and tensors for checksums and golden vectors. They are
# reserved: a reader that does not know them skips them.
_RESERVED = ("checksums", "golden")
_GOLDEN = "__golden__/"


Contents = tuple[Graph, dict[str, jax.Array], Any, Any]


def save(
    path: str | os.PathLike[str],
    graph: Graph,
    params: Mapping[str, Any],
    input_tree: Any,
    output_tree: Any,
) -> None:
    """Writes a graph with its parameters to a file, all or nothing.

    The tensors are the parameters, those of 2 and 4 bits packed four and two to the
    byte (`qjax.graph.packing`); the header holds the graph, the shapes of what is
    packed, a format version and a SHA-256 over all of it.

    Args:
      path: Path. An existing file is replaced once the new one is complete, and keeps
        its mode; a symbolic link stays, and what it points to is written.
      graph: Graph to write.
      params: Name -> array.
      input_tree: Structure of the inputs.
      output_tree: Structure of the outputs.

    Raises:
      ValueError: if inputs or outputs are nested in other than tuples, lists, dicts; if
        a parameter has a name that no file holds; if `load` would refuse it. Nothing is
        written then.
      OSError: if the file cannot be written. An old one stays as it was.
    """
    for name in params:
        _check_name(name)
    validate(graph, params)
    arrays = {k: np.asarray(v, order="C") for k, v in params.items()}
    packed: dict[str, tuple[int, list[int]]] = {}
    for name, array in arrays.items():
        bits = storage_bits(array)
        if bits < 8:
            packed[name] = bits, list(array.shape)
            arrays[name] = pack(array, bits)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "graph": graph.to_json(),
        "packed": json.dumps(packed, sort_keys=True),
        "inputs": json.dumps(_tree_to_json(input_tree)),
        "outputs": json.dumps(_tree_to_json(output_tree)),
        **dict.fromkeys(_RESERVED, "{}"),
    }
    header["sha256"] = _checksum(header, arrays)
    data = safetensors.numpy.save(arrays, header)
    write_atomically(path, data)


def load(path: str | os.PathLike[str]) -> Contents:
    """Reads a file written by `save`.

    Args:
      path: The file.

    Returns:
      The graph, its parameters, and how inputs and outputs are nested.

    Raises:
      ValueError: if the file is no such program, is truncated or altered, or comes from
        a later version; if what it holds is no program: `qjax.graph.validation`.
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
    if header.get("version") not in _READ:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {header.get('version')}, this "
            f"qjax reads versions {' and '.join(_READ)}. Use the qjax that wrote it, "
            "or save anew."
        )
    if header.pop("sha256", None) != _checksum(header, arrays):
        raise ValueError(
            f"{os.fspath(path)!r} was altered: its contents do not have the checksum "
            "in its header. Save the program again."
        )
    try:
        return _contents(header, arrays)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds no integer program that could run. {error}"
        ) from error


_KEYS = ("format", "version", "graph", "packed", "inputs", "outputs")


def _contents(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> Contents:
    """Returns the contents of a file.

    Raises:
      ValueError: if there is none.
    """
    reserved = _RESERVED if header["version"] != "1" else ()
    if set(header) != {*_KEYS, *reserved}:
        wanted = (*_KEYS, *reserved)
        raise ValueError(f"Its header must hold {wanted}, got {sorted(header)}.")
    for name in reserved:
        if not isinstance(read_json(header[name]), dict):
            raise ValueError(f"Its {name} must be an object, got {header[name]!r}.")
    if reserved:
        arrays = {k: x for k, x in arrays.items() if not k.startswith(_GOLDEN)}
    unpacked = {**arrays, **_unpacked(read_json(header["packed"]), arrays)}
    graph = Graph.from_json(header["graph"])
    validate(graph, unpacked)
    trees = []
    for name, ends in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        tree = _tree_from_json(read_json(header[name]))
        if tree.num_leaves != len(ends):
            raise ValueError(
                f"Its {name} must be nested as {len(ends)} values, got {tree}."
            )
        trees.append(tree)
    top = jax.tree.unflatten(trees[0], range(trees[0].num_leaves))
    if not isinstance(top, tuple):
        raise ValueError(f"Its inputs must be a tuple, got {trees[0]}.")
    params = {name: jnp.asarray(array) for name, array in unpacked.items()}
    return graph, params, trees[0], trees[1]


def _unpacked(packed: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unpacks the parameters of 2 and 4 bits from their bytes."""
    if not isinstance(packed, dict):
        raise ValueError(f"Packed parameters must have names, got {packed!r}.")
    found = {}
    for name, form in packed.items():
        if name not in arrays:
            raise ValueError(f"The packed parameter {name!r} is not there.")
        is_form = isinstance(form, list) and len(form) == 2 and is_integer(form[0])
        if not is_form or not isinstance(form[1], list):
            raise ValueError(f"{name!r} must be packed as [bits, shape], got {form!r}.")
        bits, shape = form
        if not all(is_integer(n) and 0 <= n < 1 << 31 for n in shape):
            raise ValueError(f"{name!r} must have a shape, got {shape!r}.")
        try:
            found[name] = unpack(arrays[name], bits, tuple(shape))
        except ValueError as error:
            raise ValueError(f"The parameter {name!r}: {error}") from error
    return found


def _check_name(name: str) -> None:
    """Raises ValueError for a parameter name that no file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The parameter {name!r} has half of a surrogate pair in its name, which "
            "no file holds. Rename it in the model, and lower it anew."
        ) from error
    if name == "__metadata__":
        raise ValueError(
            "Safetensors files keep the name '__metadata__' for their header. Rename "
            "this parameter in the model, and lower it anew."
        )
    if name.startswith(_GOLDEN):
        raise ValueError(
            f"Names that begin with {_GOLDEN!r} are kept for golden vectors. Rename "
            f"the parameter {name!r} in the model, and lower it anew."
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


def _tree_to_json(tree: Any) -> Any:
    """Writes containers as ``[kind, children]`` and leaves as null."""

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
        if not isinstance(node, list) or len(node) != 2:
            raise ValueError(f"A container must be [kind, children], got {node!r}.")
        kind, children = node
        if kind == "none" and children == []:
            return None
        if kind == "dict" and isinstance(children, dict):
            return {k: decode(v) for k, v in children.items()}
        if kind in ("tuple", "list") and isinstance(children, list):
            parts = map(decode, children)
            return tuple(parts) if kind == "tuple" else list(parts)
        raise ValueError(
            f"Programs are nested in tuples, lists and dicts only, got {node!r}."
        )

    try:
        return jax.tree.structure(decode(data))
    except RecursionError as error:
        raise ValueError("Inputs or outputs are nested too deep.") from error
