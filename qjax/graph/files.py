"""Integer programs in one file: safetensors, with the graph in a manifest beside them.

`qjax/graph/FORMAT.md` has the file byte by byte.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from qjax.graph import header_files
from qjax.graph.atomic import write_atomically
from qjax.graph.container import checksum, to_bytes
from qjax.graph.graph import Graph, holds
from qjax.graph.manifest import (
    SmallArrays,
    graph_fields,
    read_manifest,
    read_small,
    smallest,
    with_scales,
    write_manifest,
)
from qjax.graph.operations.record import is_integer
from qjax.graph.packing import Powers, pack, powers_of, storage_bits, unpack
from qjax.graph.validation import PARAM_TYPES, validate

_FORMAT = "qjax.integer_program"
# Version 1 has no graphs inside of nodes; 1 and 2 have all JSON in the header.
_VERSION = 3
_READ = ("1", "2", "3")
MANIFEST, SMALL, GOLDEN = "__manifest__", "__small__", "__golden__/"
_RESERVED = {
    "__metadata__": "their header",
    MANIFEST: "the graph",
    SMALL: "small arrays",
}

Contents = tuple[Graph, dict[str, jax.Array], Any, Any]
Golden = tuple[list[np.ndarray], list[np.ndarray]]


def save(
    path: str | os.PathLike[str],
    graph: Graph,
    params: Mapping[str, Any],
    input_tree: Any,
    output_tree: Any,
    golden: Golden | None = None,
) -> None:
    """Writes a graph with its parameters to a file, all or nothing.

    Kernels and large parameters are tensors of their own, those of 2 and 4 bits packed
    four and two to the byte, powers of two by exponents (`qjax.graph.packing`). The
    small ones, and the scales of
    grids, are compressed together in one tensor, the graph in another: the manifest,
    which has the SHA-256 of each tensor as well. Equal programs make equal files.

    Args:
      path: Path. An existing file is replaced once the new one is complete, and keeps
        its mode; a symbolic link stays, and what it points to is written.
      graph: Graph to write.
      params: Name -> array.
      input_tree: Structure of the inputs.
      output_tree: Structure of the outputs.
      golden: Codes of the inputs, and those of the outputs that belong to them.

    Raises:
      ValueError: if inputs or outputs are nested in other than tuples, lists, dicts; if
        a parameter has a name that no file holds; if `load` would refuse it. Nothing is
        written then.
      OSError: if the file cannot be written. An old one stays as it was.
    """
    for name in params:
        _check_name(name)
    validate(graph, params)
    small, tensors, places, packed = SmallArrays(), {}, {}, {}
    kernels = _kernels(graph)
    for name in sorted(params):
        array = np.asarray(params[name])
        if name not in kernels and small.takes(array):
            places[name] = [str(array.dtype), small.add(smallest(array))]
            continue
        bits, shape, powers = storage_bits(array), list(array.shape), powers_of(array)
        if powers is not None:
            form = [str(array.dtype), powers.least, powers.zero]
            packed[name] = [powers.bits, shape, form]
            array, bits = powers.codes(array), powers.bits
        elif bits < 8:
            packed[name] = [bits, shape]
        tensors[name] = pack(array, bits) if name in packed else array
    if golden is not None:
        tensors |= _golden_tensors(graph, golden)
    fields: dict[str, Any] = {
        "graph": graph_fields(graph, small),
        "inputs": _tree_to_json(input_tree),
        "outputs": _tree_to_json(output_tree),
        "packed": packed,
        "places": places,
    }
    fields["small"], tensors[SMALL] = small.forms, small.compressed()
    fields["sha256"] = {name: checksum(x) for name, x in tensors.items()}
    tensors[MANIFEST] = manifest = write_manifest(fields)
    header = {"format": _FORMAT, "version": str(_VERSION), "sha256": checksum(manifest)}
    write_atomically(path, to_bytes(tensors, header))


def _kernels(graph: Graph) -> set[str]:
    """Returns the names of the parameters that are kernels of products and of rows."""
    nodes = (node for _, own in graph.walk() for node in own.nodes)
    wanted = ("conv", "dot", "embed")
    return {n.params["kernel"] for n in nodes if n.operation in wanted}


def _golden_tensors(graph: Graph, golden: Golden) -> dict[str, np.ndarray]:
    found = {}
    for kind, ends, codes in _golden_ends(graph, *golden):
        for k, (v, x) in enumerate(zip(ends, codes, strict=True)):
            found[f"{GOLDEN}{kind}/{k}"] = np.asarray(x).astype(graph.values[v].dtype)
    return found


def _golden_ends(graph: Graph, inputs: Any, outputs: Any) -> Any:
    return ("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)


def load(path: str | os.PathLike[str]) -> Contents:
    """Reads a file written by `save`.

    Args:
      path: The file.

    Returns:
      The graph, its parameters, and how inputs and outputs are nested.

    Raises:
      ValueError: if the file is no such program, is truncated or altered, which names
        the tensor, or comes from a later version; if what it holds is no program:
        `qjax.graph.validation`.
      OSError: if it cannot be read.
    """
    return _loaded(path, _contents)


def load_golden(path: str | os.PathLike[str]) -> Golden:
    """Reads the golden codes of a file written by `save`.

    Args:
      path: The file.

    Returns:
      Codes of the inputs, and those of the outputs.

    Raises:
      ValueError: as `load`; if the file has none.
      OSError: if it cannot be read.
    """
    return _loaded(path, _golden)


def has_golden(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file written by `save` has golden codes.

    Raises:
      ValueError: if it is truncated, or no such file.
      OSError: if it cannot be read.
    """
    _, arrays = _opened(path)
    return any(name.startswith(GOLDEN) for name in arrays)


def _loaded(path: str | os.PathLike[str], read: Callable[..., Any]) -> Any:
    """Reads something of the header and the tensors of a file, once it is checked."""
    header, arrays = _opened(path)
    try:
        _check_whole(header, arrays)
        return read(header, arrays)
    except _AlteredError as error:
        raise ValueError(
            f"{os.fspath(path)!r} was altered: {error}. Save the program again."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds no integer program that could run. {error}"
        ) from error


def _opened(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Returns header and tensors of a program file, which may have been altered."""
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
            f"qjax reads versions {', '.join(_READ[:-1])} and {_READ[-1]}. Use the "
            "qjax that wrote it, or save anew."
        )
    return header, arrays


class _AlteredError(ValueError):
    """Contents that do not have their checksum."""


def _check_whole(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `_AlteredError` unless contents have their checksums."""
    if header["version"] != "3":
        if header.get("sha256") != header_files.checksum(header, arrays):
            raise _AlteredError("its contents do not have the checksum in its header")
        return
    if MANIFEST not in arrays:
        raise ValueError(f"It has no tensor {MANIFEST!r}.")
    if header.get("sha256") != checksum(arrays[MANIFEST]):
        raise _AlteredError(f"{MANIFEST!r} does not have the checksum in its header")
    wanted = _manifest(arrays)["sha256"]
    if not isinstance(wanted, dict):
        raise ValueError(f"Checksums must have names, got {wanted!r}.")
    found = {name: checksum(x) for name, x in arrays.items() if name != MANIFEST}
    for name in sorted({*map(str, wanted), *found}):
        if name not in found or name not in wanted:
            where = "file" if name in wanted else "manifest"
            raise _AlteredError(f"the tensor {name!r} is not in its {where}")
        if wanted[name] != found[name]:
            raise _AlteredError(
                f"the tensor {name!r} does not have the checksum in its manifest"
            )


_KEYS = ("graph", "inputs", "outputs", "packed", "places", "sha256", "small")


def _manifest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a manifest; raises ValueError for others."""
    fields = read_manifest(arrays[MANIFEST])
    if not isinstance(fields, dict) or set(fields) != set(_KEYS):
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise ValueError(f"Its manifest must hold {_KEYS}, got {found!r}.")
    return fields


def _contents(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> Contents:
    """Returns the contents of a file.

    Raises:
      ValueError: if there is none.
    """
    if header["version"] == "3":
        fields, arrays = _fields(arrays)
    else:
        fields, arrays = header_files.fields(header, arrays)
    unpacked = {**arrays, **_unpacked(fields["packed"], arrays)}
    graph = Graph.from_data(fields["graph"])
    validate(graph, unpacked)
    trees = []
    for name, ends in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        tree = _tree_from_json(fields[name])
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


def _fields(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the manifest, scales in their places, and the parameters as stored."""
    fields = _manifest(arrays)
    if SMALL not in arrays:
        raise ValueError(f"It has no tensor {SMALL!r}.")
    small = read_small(fields["small"], arrays[SMALL])
    is_own = lambda name: name in (MANIFEST, SMALL) or name.startswith(GOLDEN)
    found = {name: x for name, x in arrays.items() if not is_own(name)}
    if not isinstance(fields["places"], dict):
        raise ValueError(f"Small parameters must have names, got {fields['places']!r}.")
    for name, place in fields["places"].items():
        if name in found:
            raise ValueError(f"The parameter {name!r} must have one place.")
        found[name] = _small_param(name, place, small)
    return {**fields, "graph": with_scales(fields["graph"], small)}, found


def _small_param(name: str, place: Any, small: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a parameter from its place among the small arrays, in its own type."""
    is_place = isinstance(place, list) and len(place) == 2 and is_integer(place[1])
    if not is_place or place[0] not in PARAM_TYPES or not 0 <= place[1] < len(small):
        raise ValueError(f"{name!r} must be at [type, number], got {place!r}.")
    dtype, array = place[0], small[place[1]]
    ends = int(array.min(initial=0)), int(array.max(initial=0))
    if array.dtype == np.float32 or not holds(dtype, *ends):
        raise ValueError(f"{name!r} must hold {dtype}, got {array.dtype} in {ends}.")
    return array.astype(dtype)


def _golden(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> Golden:
    """Returns golden codes; raises ValueError if there are none, or others."""
    graph, *_ = _contents(header, arrays)
    codes = {name: x for name, x in arrays.items() if name.startswith(GOLDEN)}
    if not codes:
        raise ValueError("It has no golden vectors: they are saved with `golden=`.")
    found: dict[str, list[np.ndarray]] = {"inputs": [], "outputs": []}
    for kind, ends, _ in _golden_ends(graph, (), ()):
        for k, v in enumerate(ends):
            name, value = f"{GOLDEN}{kind}/{k}", graph.values[v]
            if name not in codes:
                raise ValueError(f"It has no tensor {name!r}.")
            x = codes.pop(name)
            fits = x.shape[1:] == value.shape[1:] and x.ndim == len(value.shape)
            if str(x.dtype) != value.dtype or not fits:
                raise ValueError(
                    f"{name!r} must be {value.dtype}{value.shape}, the leading size "
                    f"aside, got {x.dtype}{x.shape}."
                )
            found[kind].append(x)
    if codes:
        raise ValueError(f"It has no inputs or outputs for {sorted(codes)}.")
    return found["inputs"], found["outputs"]


def _unpacked(packed: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unpacks the parameters of 2 and 4 bits, and powers of two, from their bytes."""
    if not isinstance(packed, dict):
        raise ValueError(f"Packed parameters must have names, got {packed!r}.")
    found = {}
    for name, form in packed.items():
        if name not in arrays:
            raise ValueError(f"The packed parameter {name!r} is not there.")
        is_form = isinstance(form, list) and len(form) in (2, 3) and is_integer(form[0])
        if not is_form or not isinstance(form[1], list):
            raise ValueError(f"{name!r} must be packed as [bits, shape], got {form!r}.")
        bits, shape, *powers = form
        if not all(is_integer(n) and 0 <= n < 1 << 31 for n in shape):
            raise ValueError(f"{name!r} must have a shape, got {shape!r}.")
        if not powers and bits == 8:
            raise ValueError(f"{name!r} must be packed in 2 or 4 bits, got 8.")
        try:
            codes = unpack(arrays[name], bits, tuple(shape))
        except ValueError as error:
            raise ValueError(f"The parameter {name!r}: {error}") from error
        found[name] = _numbers(name, codes, bits, *powers) if powers else codes
    return found


def _numbers(name: str, codes: np.ndarray, bits: int, form: Any) -> np.ndarray:
    """Returns the powers of two that codes stand for, in their own type."""
    is_form = isinstance(form, list) and len(form) == 3 and form[0] in PARAM_TYPES
    if not is_form or not all(map(is_integer, form[1:])):
        raise ValueError(f"{name!r} must have powers [type, least, zero], got {form}.")
    dtype, least, zero = form
    if not 0 <= least < 32 or zero not in (0, 1):
        raise ValueError(f"{name!r} must have exponents from 0 to 31, got {form}.")
    steps = np.where(codes < 0, ~codes.astype(np.int64), codes.astype(np.int64) - zero)
    if least + int(steps.max(initial=0)) > 31:
        raise ValueError(f"{name!r} holds powers beyond {dtype}.")
    numbers = Powers(bits, least, zero).numbers(codes)
    if not holds(dtype, int(numbers.min(initial=0)), int(numbers.max(initial=0))):
        raise ValueError(f"{name!r} holds powers beyond {dtype}.")
    return numbers.astype(dtype)


def _check_name(name: str) -> None:
    """Raises ValueError for a parameter name that no file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The parameter {name!r} has half of a surrogate pair in its name, which "
            "no file holds. Rename it in the model, and lower it anew."
        ) from error
    kept = _RESERVED.get(name, "golden vectors" if name.startswith(GOLDEN) else "")
    if kept:
        raise ValueError(
            f"Program files keep the name {name!r} for {kept}. Rename this parameter "
            "in the model, and lower it anew."
        )


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
