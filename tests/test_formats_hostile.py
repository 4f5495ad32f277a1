"""Files made to harm: both readers refuse them in bounded time and memory.

python -m pytest tests/test_formats_hostile.py -m fuzz    # 2,000 more
"""

import io
import json
import pathlib
import time
import tracemalloc
import zlib
from contextlib import redirect_stdout

import numpy as np
import pytest
import safetensors.numpy

import qjax
from qjax.formats import check
from qjax.graph import files
from tests.test_validation import _at, _changed, _others, _places, _without

PROGRAMS = pathlib.Path(__file__).parent / "golden/programs"
ABSURD = (-1, 0, 1, 3, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, "8", None)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files with a loop, packed kernels and golden codes; with rows and places."""
    again = tmp_path_factory.mktemp("hostile") / "again.qjax"
    qjax.load(PROGRAMS / "version1.qjax").save(again)
    return [(PROGRAMS / "version3.qjax").read_bytes(), again.read_bytes()]


def _bytes(rng, data):
    """Alters bytes, wherever they are."""
    kind, at = rng.integers(6), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + bytes(rng.integers(0, 256, 1 + at % 64).astype(np.uint8))
    if kind == 2:
        return data[:at] + data[at + 1 + int(rng.integers(16)) :]
    if kind == 3:
        return rng.integers(0, 256, 8).astype(np.uint8).tobytes() + data[8:]
    found = bytearray(data)
    for i in range(at, min(at + int(rng.integers(1, 20)), len(data))):
        found[i] = 0 if kind == 4 else int(rng.integers(256))
    return bytes(found)


def _absurd(rng):
    return ABSURD[rng.integers(len(ABSURD))]


def _header(rng, data):
    """Alters an entry of the header."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [*header]
    entry = header[names[rng.integers(len(names))]]
    key = [*entry][rng.integers(len(entry))]
    value = entry[key]
    if isinstance(value, list) and value and rng.integers(3):
        value[rng.integers(len(value))] = _absurd(rng)
    elif rng.integers(2):
        words = ("F64", "I8", "U8", "I32", "BOOL", "3", "4", "", [_absurd(rng)] * 40)
        entry[key] = words[rng.integers(len(words))]
    else:
        entry[key] = [_absurd(rng) for _ in range(rng.integers(4))]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _manifest(rng, data):
    """Alters the manifest, with right checksums."""
    fields, tensors = _parts(data)
    places = [p for p in _places(fields) if p and p[0] != "sha256"]
    path = places[rng.integers(len(places))]
    if rng.integers(5) == 0 and isinstance(_at(fields, path[:-1]), dict):
        fields = _without(fields, path)
    elif rng.integers(2):
        fields = _changed(fields, path, _absurd(rng))
    else:
        others = [*_others(_at(fields, path)).values()]
        fields = _changed(fields, path, others[rng.integers(len(others))])
    return _joined(fields, tensors)


def _tensor(rng, data):
    """Alters a tensor, with right checksums."""
    fields, tensors = _parts(data)
    name = [*tensors][rng.integers(len(tensors))]
    x = tensors[name]
    if name == "__small__" and rng.integers(2):
        small = bytearray(zlib.decompress(x.tobytes()))
        small[rng.integers(len(small))] ^= 1 << rng.integers(8)
        x = np.frombuffer(zlib.compress(bytes(small)), np.uint8)
    ways = (
        lambda: x.reshape(-1)[: rng.integers(x.size + 1)],
        lambda: x[None],
        lambda: x.astype(np.int32),
        lambda: np.zeros((0,) * int(rng.integers(1, 9)), x.dtype),
        lambda: rng.integers(0, 256, x.shape).astype(np.uint8).view(np.int8),
        lambda: x.astype(np.float32),
        lambda: x,
    )
    tensors[name] = np.ascontiguousarray(ways[rng.integers(len(ways))]())
    if rng.integers(4) == 0:
        tensors["more"] = tensors.pop(name)
    return _joined(fields, tensors)


def _parts(data):
    tensors = safetensors.numpy.load(data)
    manifest = tensors.pop("__manifest__")
    return json.loads(zlib.decompress(manifest.tobytes())), tensors


def _joined(fields, tensors, text=None):
    if isinstance(fields, dict):
        fields["sha256"] = {name: files.checksum(x) for name, x in tensors.items()}
    text = json.dumps(fields).encode() if text is None else text
    manifest = np.frombuffer(zlib.compress(text), np.uint8)
    header = {"format": "qjax.integer_program", "version": "3"}
    header["sha256"] = files.checksum(manifest)
    return safetensors.numpy.save({**tensors, "__manifest__": manifest}, header)


MUTATIONS = _bytes, _header, _manifest, _manifest, _tensor


def _read(path):
    """Reads a file in both ways: returns whether qjax loads it, and an exit code."""
    start, printed = time.perf_counter(), io.StringIO()
    try:
        qjax.load(path)
        loads = True
    except ValueError as error:
        assert str(error).startswith(repr(str(path))), error
        loads = False
    with redirect_stdout(printed):
        code = check.main([str(path)])
    assert code in (0, 1, 2) and printed.getvalue().count("\n") > 0
    assert time.perf_counter() - start < 20
    return loads, code


def _mutate(sources, path, seeds):
    counts = {"refused": 0, "wrong": 0, "unknown": 0}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        data = sources[rng.integers(len(sources))]
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        path.write_bytes(mutation(rng, data))
        try:
            loads, code = _read(path)
        except BaseException as error:
            error.add_note(f"seed {seed}, {mutation.__name__}")
            raise
        counts["refused"] += not loads
        counts["wrong"] += code == 1
        counts["unknown"] += code == 2
    return counts


def test_mutations_are_refused(sources, tmp_path):
    """What loads is another program, or the same one by other bytes."""
    counts = _mutate(sources, tmp_path / "m.qjax", range(60))
    assert counts["refused"] > 45 and counts["wrong"] + counts["unknown"] > 40, counts


# What `load` refuses and the second reader must not accept: texts, flags, sizes, grids.
FORMS = {
    "a path": lambda f: f["nodes"][0].update(path=3),
    "a flag": lambda f: _node_of(f, "requantize").update(is_exact=1),
    "a size": lambda f: f["values"][0].update(shape=[4, 3, "8"]),
    "a scale": lambda f: f["values"][0]["grid"].update(scale=1),
    "a zero point": lambda f: f["values"][0]["grid"].update(zero_point=1.5),
    "another zero point": lambda f: _node_of(f, "requantize").update(zero_point=-5),
    "a field of a grid": lambda f: f["values"][0]["grid"].update(more=1),
    "an end": lambda f: _node_of(f, "requantize").update(low=None),
    "a flag of a value": lambda f: f["values"][0].update(is_place="x"),
    "a reason": lambda f: f["values"][0].update(fixed_by=None),
}


def _node_of(graph, operation):
    nodes = (n for n in graph["nodes"] if n["operation"] == operation)
    return next(nodes)["attributes"]


@pytest.mark.parametrize("name", FORMS)
def test_both_readers_refuse_other_types(sources, tmp_path, name):
    fields, tensors = _parts(sources[1])
    FORMS[name](fields["graph"])
    path = tmp_path / "m.qjax"
    path.write_bytes(_joined(fields, tensors))
    assert _read(path) == (False, 1)


def test_forms_inside_of_loops_are_looked_at_before_the_loop(sources, tmp_path):
    """A loop compares the intervals of its body, which must be numbers first."""
    fields, tensors = _parts(sources[0])
    loop = next(n for n in fields["graph"]["nodes"] if n["operation"] == "loop")
    loop["graphs"]["body"]["values"][0]["low"] = "8"
    path = tmp_path / "m.qjax"
    path.write_bytes(_joined(fields, tensors))
    assert _read(path) == (False, 1)


@pytest.mark.fuzz
def test_more_mutations_are_refused(sources, tmp_path):
    counts = _mutate(sources, tmp_path / "m.qjax", range(60, 2060))
    assert counts["refused"] > 1500 and counts["wrong"] > 1000, counts


def _bomb(name):
    """Returns a file whose tensor unpacks to 70 MB."""
    fields, tensors = _parts((PROGRAMS / "version3.qjax").read_bytes())
    zeros = (b"[" if name == "nested" else b" ") * 70_000_000
    if name == "small":
        tensors["__small__"] = np.frombuffer(zlib.compress(zeros, 1), np.uint8)
        fields["small"] = [["int8", [70_000_000]]]
        return _joined(fields, tensors)
    if name == "shapes":
        fields["small"] = [["int32", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1]]] * 50
        return _joined(fields, tensors)
    if name == "packed":
        fields["packed"] = {k: [2, [2**30, 2**30, 16]] for k in fields["packed"]}
        return _joined(fields, tensors)
    if name == "loop":
        loop = next(n for n in fields["graph"]["nodes"] if n["operation"] == "loop")
        loop["attributes"]["length"] = 2**31 - 1
        fields["graph"]["values"][0]["shape"][0] = 2**31 - 1
        return _joined(fields, {k: x for k, x in tensors.items() if "golden" not in k})
    return _joined(None, tensors, zeros)


@pytest.mark.parametrize(
    "name", ["manifest", "nested", "small", "shapes", "packed", "loop"]
)
def test_bombs_do_not_go_off(name, tmp_path):
    path = tmp_path / "bomb.qjax"
    path.write_bytes(_bomb(name))
    tracemalloc.start()
    try:
        loads, code = _read(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A loop may be as long as it likes, until it is run.
    assert loads == (name == "loop") and code != 0 and most < 400_000_000


def test_wrong_versions(tmp_path):
    for version in ("0", "4", "", "3.0"):
        data = (PROGRAMS / "version3.qjax").read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + size].replace(
            b'"version":"3"', f'"version":"{version}"'.encode()
        )
        path = tmp_path / "m.qjax"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        with pytest.raises(ValueError, match="has format version"):
            qjax.load(path)
        with redirect_stdout(io.StringIO()):
            assert check.main([str(path)]) == 2
