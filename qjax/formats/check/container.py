"""The container of a `.qjax` file: its tensors, their checksums, its manifest."""

import hashlib
import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np

TYPES = {"I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4"}
INTEGERS = "int8", "uint8", "int16", "uint16", "int32"


class Unknown(Exception):
    """A file that this reader cannot judge."""


def need(holds, error, kind=ValueError):
    """Raises an error unless a condition holds."""
    if not holds:
        raise kind(error)


def holds(dtype, low, high):
    """Returns whether a type holds integers."""
    known = dtype in INTEGERS
    return known and np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max


def container(data):
    """Returns metadata, tensors and their checksums of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    need(8 < len(data) and size <= len(data) - 8, "the file is truncated")
    header, body, end = json.loads(data[8 : 8 + size]), data[8 + size :], 0
    metadata = header.pop("__metadata__", {})
    need(metadata.get("format") == "qjax.integer_program", "this is no qjax program")
    version = metadata.get("version")
    need(version == "3", f"it has version {version}, not 3", Unknown)
    tensors, sums = {}, {}
    for name, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"]):
        (first, last), shape = entry["data_offsets"], entry["shape"]
        need(entry["dtype"] in TYPES, f"{name!r} has type {entry['dtype']}")
        dtype, sized = np.dtype(TYPES[entry["dtype"]]), min(shape, default=0) >= 0
        fits = sized and last - first == math.prod(shape) * dtype.itemsize
        need(fits and first == end and last <= len(body), f"{name!r} has no place")
        tensors[name] = np.frombuffer(body[first:last], dtype).reshape(shape)
        form = f"{entry['dtype']}[{','.join(map(str, shape))}]".encode()
        sums[name], end = hashlib.sha256(form + body[first:last]).hexdigest(), last
    need(end == len(body), "bytes are left over")
    return metadata, tensors, sums


def inflated(tensor, most):
    """Decompresses a tensor to as many bytes at most."""
    stream = zlib.decompressobj()
    found = stream.decompress(tensor.tobytes(), most + 1)
    need(len(found) <= most and stream.eof and not stream.unused_data, "zlib's end")
    return found


def powers_of_two(codes, least, zero):
    """Returns the signed powers of two that codes stand for, and 0 if 0 does."""
    size = least + np.where(codes < 0, -1 - codes, codes - zero)
    need(zero in (0, 1) and np.max(size, initial=0) < 32, "a power is beyond 2^31")
    need(type(least) is int and least >= 0, "an exponent is negative")
    return np.where(codes < 0, -1, codes >= zero) * 2 ** np.maximum(size, 0)


class Program(NamedTuple):
    """The contents of a file.

    Attributes:
      fields: The manifest.
      small: Small arrays.
      params: Name -> array, int64.
      types: Name of a parameter -> its type in the program.
      golden: Name -> golden codes.
      tensors: Number of tensors.
    """

    fields: dict[str, Any]
    small: list[Any]
    params: dict[str, Any]
    types: dict[str, str]
    golden: dict[str, Any]
    tensors: int


def program(data):
    """Returns what a file holds, each tensor compared with its checksum."""
    metadata, tensors, sums = container(data)
    own, altered = sums.pop("__manifest__", ""), "was altered: it has another checksum"
    need(own and own == metadata["sha256"], f"the tensor '__manifest__' {altered}")
    fields = json.loads(inflated(tensors.pop("__manifest__"), 1 << 26))
    for name in sorted({*sums, *fields["sha256"]}):
        same = name in sums and sums[name] == fields["sha256"].get(name)
        need(same, f"the tensor {name!r} {altered}")
    sizes = [math.prod(s) * np.dtype(t).itemsize for t, s in fields["small"]]
    need(min(sizes, default=0) >= 0 and sum(sizes) <= 1 << 26, "small arrays are large")
    whole, small = inflated(tensors.pop("__small__"), sum(sizes)), []
    need(len(whole) == sum(sizes), "small arrays are too short")
    for (dtype, shape), n in zip(fields["small"], sizes, strict=True):
        planes = np.frombuffer(whole[:n], "u1").reshape(np.dtype(dtype).itemsize, -1)
        kind = np.dtype(dtype).newbyteorder("<")
        small.append(np.ascontiguousarray(planes.T).view(kind).reshape(shape))
        whole = whole[n:]
    golden = {n: tensors.pop(n) for n in [*tensors] if n.startswith("__golden__/")}
    params = {name: x.astype("i8") for name, x in tensors.items()}
    types = {name: x.dtype.name for name, x in tensors.items()}
    for name, (dtype, k) in fields["places"].items():
        ends = [int(f(small[k], initial=0)) for f in (np.min, np.max)]
        need(type(k) is int and k >= 0 and holds(dtype, *ends), f"{name!r}: {dtype}")
        params[name], types[name] = small[k].astype("i8"), dtype
    for name, (bits, shape, *powers) in fields["packed"].items():
        known = bits in ((2, 4, 8) if powers else (2, 4))
        need(known and tensors[name].dtype == "u1", f"{name!r} is not packed")
        codes = (params[name][:, None] >> np.arange(0, 8, bits)) % (1 << bits)
        codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape)
        params[name] = codes - ((codes >> (bits - 1)) << bits)  # Two's complement.
        types[name] = "int8"
        for dtype, least, zero in powers:
            params[name], types[name] = powers_of_two(params[name], least, zero), dtype
            ends = [int(f(params[name], initial=0)) for f in (np.min, np.max)]
            need(holds(dtype, *ends), f"{name!r}: {dtype}")
    return Program(fields, small, params, types, golden, len(sums) + 1)
