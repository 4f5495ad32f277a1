"""Edited program files: refused by ValueError, or programs that do what they say.

The edits are enumerated from the files themselves: each field of each kind of value and
operation, and each parameter, gets other types, other numbers, and goes. Their checksum
is right.
"""

import collections
import copy
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import lax

import qjax
from qjax.affine import QSpec, fake_quant
from qjax.formats.tflite import read_tflite
from qjax.graph import files, reference
from qjax.graph.container import checksum
from qjax.graph.validation import validate
from tests import test_formats_tflite
from tests.models import images

_SAMPLE = 30  # Edits of each program.


def _point(x, site, scale=2.0**-5):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return fake_quant(x, grid, QSpec(8), site=site)


def _weight(name, *shape):
    return _point(jnp.asarray(images(*shape, seed=len(name))), name, 2.0**-4)


def _network(x):
    """Convolutions, a function, a residual sum, a gate, pools, moves, places."""
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, name: lax.conv_general_dilated(
        x,
        _weight(name, 3, 3, x.shape[-1], 4),
        (1, 1),
        "SAME",
        dimension_numbers=layout,
    )
    x = _point(jax.nn.gelu(_point(convolve(_point(x, "x"), "a"), "b")), "gelu")
    x = _point(x + _point(convolve(jax.nn.relu(x), "cc"), "d"), "sum", 0.1)
    window, steps = (1, 2, 2, 1), (1, 2, 2, 1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, steps, "VALID")
    mean = _point(x.mean((1, 2), keepdims=True), "mean")
    gate = _point(jax.nn.sigmoid(_point(mean @ _weight("eee", 4, 4), "f")), "gate")
    x = _point(x * gate, "product")
    x = jnp.concatenate([x, x[:, ::-1]], -1).reshape((len(x), -1))
    y = jnp.pad(x, ((0, 0), (1, 0))) @ _weight("gggg", 33, 3)
    return _point(y, "y", 0.3), jnp.argmax(x, -1)


def _words(ids, x):
    """Rows of a table, a product of two activations, choices, comparisons."""
    x, e = _point(x, "x"), _weight("table", 7, 4)[ids]
    y = _point(e @ _weight("w", 4, 4), "y")
    scores = _point(jnp.einsum("bij,bkj->bik", y, x), "scores", 0.3)
    chosen = _point(jnp.where(e > 0.1, e, -0.5), "chosen")[:, np.array([2, 0])]
    most = _point(jnp.maximum(x, e), "most", 0.1).transpose(0, 2, 1)
    return scores.max(-1), chosen, most, x > e


def _lowered_network():
    return qjax.lower(_network, images(2, 4, 4, 2))


def _lowered_words():
    ids = np.int32([[0, 1, 6], [2, 3, 4]])
    return qjax.lower(_words, ids, images(2, 3, 4, seed=3))


def _foreign():
    return read_tflite(test_formats_tflite.write(test_formats_tflite._network("int8")))


_PROGRAMS = {"network": _lowered_network, "words": _lowered_words, "tflite": _foreign}


class File:
    """A program file in its parts; each parameter is a tensor of its own."""

    def __init__(self, path, program):
        self.path, self.program = path, program
        program.save(path)
        _, tensors = files._opened(path)
        self.small = tensors[files.SMALL]
        _, self.arrays = files._fields(tensors)
        self.fields = {**files._manifest(tensors), "places": {}}
        del self.fields["sha256"]
        rng = np.random.default_rng(5)
        self.codes = [
            rng.integers(v.low, v.high + 1, v.shape).astype(v.dtype)
            for v in program._inputs
        ]

    def load(self, fields=None, arrays=None, text=None):
        """Loads the file with other parts, and right checksums."""
        tensors = dict(self.arrays if arrays is None else arrays)
        tensors[files.SMALL] = self.small
        sums = {name: checksum(x) for name, x in tensors.items()}
        fields = {"sha256": sums, **(self.fields if fields is None else fields)}
        text = json.dumps(fields) if text is None else text
        manifest = np.frombuffer(zlib.compress(text.encode()), np.uint8)
        header = {"format": "qjax.integer_program", "version": "3"}
        header["sha256"] = checksum(manifest)
        tensors[files.MANIFEST] = manifest
        self.path.write_bytes(safetensors.numpy.save(tensors, header))
        return qjax.load(self.path)

    def load_graph(self, edit):
        """Loads the file with an edited graph."""
        graph = copy.deepcopy(self.fields["graph"])
        edit(graph)
        return self.load(self.fields | {"graph": graph})


@pytest.fixture(scope="module", params=_PROGRAMS)
def file(request, tmp_path_factory):
    if request.param == "network":
        return request.getfixturevalue("network")
    folder = tmp_path_factory.mktemp(request.param)
    return File(folder / "model.qjax", _PROGRAMS[request.param]())


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return File(tmp_path_factory.mktemp("own") / "model.qjax", _lowered_network())


# Edits.


def _others(x):
    """Name -> what may stand in the place of a JSON value."""
    found = {"null": None, "text": "x", "fraction": 1.5, "true": True, "list": [x]}
    found |= {"empty": [], "names": {}}
    if isinstance(x, bool):
        return found | {"not": not x}
    if isinstance(x, int | float):
        kind = type(x)
        numbers = {"up": x + 1, "down": x - 1, "minus": -x, "zero": kind(0)}
        numbers |= {f"{n}": kind(n) for n in (-1, 40, 10**6, 2**31, 2**70)}
        found |= numbers
    if isinstance(x, float):
        found |= {"nan": math.nan, "infinite": math.inf, "tiny": 1e-60}
    if isinstance(x, list) and x:
        found |= {"short": x[:-1], "long": [*x, x[-1]], "turned": x[::-1]}
    if isinstance(x, dict):
        found |= {"more": {**x, "more": 1}}
    return {k: v for k, v in found.items() if type(v) is not type(x) or v != x}


def _places(tree, path=()):
    yield path
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, part in items:
            yield from _places(part, (*path, key))


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _changed(tree, path, value):
    if not path:
        return value
    tree = copy.deepcopy(tree)
    _at(tree, path[:-1])[path[-1]] = value
    return tree


def _without(tree, path):
    tree = copy.deepcopy(tree)
    del _at(tree, path[:-1])[path[-1]]
    return tree


def _kind(graph, path):
    """A field without the number of its value or operation."""
    head = (
        graph["nodes"][path[1]]["operation"]
        if path[:1] == ("nodes",) and path[1:]
        else ""
    )
    return head, *(key if isinstance(key, str) else "*" for key in path)


def _edits(file):
    """Kind of field and of edit -> the edits of that kind: (header, arrays) each."""
    found = collections.defaultdict(list)
    graph = file.fields["graph"]
    for key, tree in file.fields.items():
        for path in _places(tree):
            kind = (key, *_kind(graph, path))
            edited = {k: (path, v) for k, v in _others(_at(tree, path)).items()}
            for name, (own, value) in edited.items():
                found[(*kind, name)].append((key, tree, own, value))
            if path and isinstance(_at(tree, path[:-1]), dict):
                found[(*kind, "gone")].append((key, tree, path, _without))
    for name, array in file.arrays.items():
        kind = name.rpartition("/")[2]
        for edit, other in _other_arrays(array).items():
            found["array", kind, edit].append(("", None, name, other))
    return found


def _other_arrays(x):
    ends = np.iinfo(x.dtype)
    found = {"gone": None, "real": np.float32(x), "wide": np.int64(x), "byte": x > 0}
    found |= {
        "axis": x[None],
        "flat": x.reshape(-1),
        "next": np.add(x, 1, out=x.copy()),
    }
    found |= {k: np.full_like(x, getattr(ends, k)) for k in ("min", "max")}
    if x.ndim and len(x):
        found |= {"short": x[:-1], "long": np.concatenate([x, x[-1:]])}
    same = lambda y: y is not None and y.dtype == x.dtype and y.shape == x.shape
    return {k: y for k, y in found.items() if not same(y) or np.any(y != x)}


def _load_edited(file, edit):
    key, tree, place, value = edit
    if not key:
        arrays = {k: v for k, v in file.arrays.items() if k != place}
        return file.load(arrays=arrays if value is None else {**arrays, place: value})
    edited = value(tree, place) if value is _without else _changed(tree, place, value)
    return file.load(file.fields | {key: edited})


def test_edits_are_refused_or_are_programs(file):
    """What loads computes what the oracle computes, within its intervals."""
    edits, rng = _edits(file), np.random.default_rng(0)
    kinds = sorted(edits, key=str)
    wanted = _run(file.load(), file.codes)
    counts = collections.Counter()
    for k in rng.choice(len(kinds), _SAMPLE, replace=False):
        several = edits[kinds[k]]
        try:
            program = _load_edited(file, several[rng.integers(len(several))])
        except ValueError as error:
            assert str(error).startswith(repr(str(file.path)))
            counts["refused"] += 1
            continue
        inputs = [np.clip(x, v.low, v.high) for x, v in _fitting(file, program)]
        values = reference.run(program.graph, program.params, inputs)
        found = _run(program, inputs)
        for got, v in zip(found, program.graph.outputs, strict=True):
            np.testing.assert_array_equal(got, values[v], err_msg=str(kinds[k]))
        same = all(map(np.array_equal, found, wanted)) and len(found) == len(wanted)
        counts["same" if same else "other"] += 1
    # Other words of one type are other programs: a kernel, a multiplier, a place.
    assert counts["refused"] > 0.85 * _SAMPLE and counts["other"] < 0.1 * _SAMPLE


def _run(program, codes):
    """Runs a program that is compiled for this alone: integers are equal as fast."""
    traced = program.run_codes.lower(program.params, *codes)
    return traced.compile({"xla_backend_optimization_level": 0})(program.params, *codes)


def _fitting(file, program):
    """Codes for the inputs of a program, which may have changed their order."""
    shapes = {x.shape: x for x in file.codes}
    for v in program._inputs:
        yield shapes[v.shape].astype(v.dtype), v


# Faults by name, and what is said of them.


def _node(graph, operation):
    return next(n for n in graph["nodes"] if n["operation"] == operation)


def _set(tree, **changes):
    for key in changes:
        assert key in tree
    tree.update(changes)


_FAULTS = {
    "`offset` must be 0, which centres int8, got 5": lambda g: _set(
        _node(g, "conv")["attributes"], offset=5
    ),
    "conv in .*: `shift` must be an integer from 0 to 31, got 40": lambda g: _set(
        _node(g, "conv")["attributes"], shift=40
    ),
    r"Value %0 of type int8 does not hold its interval \[9, 3\]": lambda g: _set(
        g["values"][0], low=9, high=3
    ),
    r"Value %0 of type int8 does not hold its interval \[-128, 300\]": lambda g: _set(
        g["values"][0], high=300
    ),
    "Value %0: scales of codes must be positive, got -0.5": lambda g: _set(
        g["values"][0]["grid"], scale=-0.5
    ),
    "NaN is no number": lambda g: _set(g["values"][0]["grid"], scale=math.nan),
    "Value %0: scales must be finite numbers, got 1e[+]60": lambda g: _set(
        g["values"][0]["grid"], scale=1e60
    ),
    "Value %0: `zero_point` must be an integer of type int8, got 300": lambda g: _set(
        g["values"][0]["grid"], zero_point=300
    ),
    "output 0 must be one of 25, got True": lambda g: _set(g, outputs=[True, True]),
    "The graph is out of order": lambda g: g["nodes"].reverse(),
    "add in 'sum'.*must hold one for each of 2 inputs": lambda g: _set(
        _node(g, "add")["attributes"], multipliers=[1]
    ),
    "parameters must hold .'table'.": lambda g: _set(_node(g, "table"), params={}),
    "the table must have a row for each code from": lambda g: _set(
        _node(g, "table")["attributes"], low=-127
    ),
    "a value must have .*'low'": lambda g: g["values"][0].pop("low"),
    "gives integers in .*, and its output is said to lie in": lambda g: _set(
        g["values"][_node(g, "dot")["output"]], high=3, low=-3
    ),
}


@pytest.mark.parametrize("message", _FAULTS)
def test_what_is_wrong_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        network.load_graph(_FAULTS[message])


def test_a_table_cut_short_and_a_shift_too_far(network):
    names = {
        role: name
        for node in network.program.graph.nodes
        for role, name in node.params.items()
    }
    arrays = dict(network.arrays)
    arrays[names["table"]] = arrays[names["table"]][:-1]
    with pytest.raises(ValueError, match="must have a row for each code"):
        network.load(arrays=arrays)
    arrays = dict(network.arrays)
    arrays[names["shift"]] = np.full_like(arrays[names["shift"]], 64)
    with pytest.raises(ValueError, match=r"role `shift` must lie in \[0, 62\]"):
        network.load(arrays=arrays)
    with pytest.raises(ValueError, match="each parameter must have a reader.*more"):
        network.load(arrays={**network.arrays, "more": np.zeros(2, np.int8)})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"inputs": ["tuple", []]}, "nested as 1 values"),
        ({"inputs": None}, "must be a tuple"),
        ({"outputs": ["set", [None, None]]}, "tuples, lists and dicts only"),
        ({"packed": {"none": [4, [2]]}}, "packed parameter 'none' is not there"),
        ({"more": "x"}, "manifest must hold"),
        ({"places": {"none": ["float32", 0]}}, r"must be at \[type, number\]"),
        ({"places": [0]}, "Small parameters must have names"),
        ({"places": {"none": ["int8", 10**9]}}, r"must be at \[type, number\]"),
        ({"small": [["int8", [1 << 30] * 5]]}, "at most 67108864 bytes"),
        ({"small": [["int8", [1 << 20]]]}, "must take 1048576 bytes"),
        ({"small": []}, "must end after at most 0 bytes"),
        ({"small": [["int64", []]]}, r"must be \[type, shape\]"),
        ({"sha256": {}}, "the tensor '.*' is not in its manifest"),
    ],
)
def test_manifests_that_are_none(network, fields, message):
    with pytest.raises(ValueError, match=message):
        network.load(network.fields | fields)


def test_small_arrays_are_in_the_type_of_their_parameter():
    for array, found in ((np.float32([1]), "float32"), (np.int16([300]), "int16")):
        with pytest.raises(ValueError, match=f"'a' must hold int8, got {found}"):
            files._small_param("a", ["int8", 0], [array])
    assert files._small_param("a", ["int32", 0], [np.uint8([255])]).dtype == np.int32


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100000, "no JSON"),
        ('{"graph": [], "graph": []}', "stands twice"),
        ("[]", "manifest must hold"),
        (" " * ((1 << 26) + 1), "must end after at most 67108864 bytes"),
    ],
)
def test_manifests_that_are_no_data(network, text, message):
    with pytest.raises(ValueError, match=message):
        network.load(text=text)


def test_what_is_saved_is_validated(network, tmp_path):
    graph = network.program.graph
    broken = type(network.program)(
        type(graph)(graph.values[:-1], graph.nodes, graph.inputs, (0, 0), {}),
        network.program.params,
        network.program.input_tree,
        network.program.output_tree,
    )
    with pytest.raises(ValueError, match="must be one of 24 values"):
        broken.save(tmp_path / "m.qjax")
    with pytest.raises(ValueError):
        validate(broken.graph, broken.params)
    assert not list(tmp_path.iterdir())
