"""Graphs inside of nodes: every traversal of the integer graph enters them."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import qjax
from qjax.graph import files, header_files, reference
from qjax.graph.builder import GraphBuilder
from qjax.graph.certificate import certify
from qjax.graph.graph import Graph, Grid
from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.record import SIZE, Operation, same_shape
from qjax.graph.passes import drop_dead, merge_equal
from qjax.graph.validation import validate
from qjax.lowering.sizes import _first_difference


def _meaning(attributes, params, inputs, graphs):
    (x,) = inputs
    for _ in range(attributes["times"]):
        (x,) = graphs["body"](x)
    return x


def _interval(o):
    body = o.graphs["body"]
    end = body.values[body.outputs[0]]
    return end.low, end.high


REPEAT = Operation(
    "repeat",
    "q = body(body(... q))",
    "loop",
    shape=same_shape,
    interval=_interval,
    meaning=_meaning,
    attributes={"times": SIZE},
    graphs=("body",),
)


@pytest.fixture(autouse=True)
def repeat(monkeypatch):
    """An operation that runs a graph several times, as loops will."""
    monkeypatch.setitem(OPERATIONS, "repeat", REPEAT)


def _body(builder, dtype="int8"):
    """A dot of codes, its requantizer twice, and a clip that nobody reads."""
    inner = GraphBuilder()
    inner.params = builder.params
    x = inner.add_value((2, 3), -128, 127, dtype=dtype)
    kernel = inner.add_param("loop/kernel", np.arange(9, dtype=np.int8).reshape(3, 3))
    bias = inner.add_param("loop/bias", np.full((1, 3), 5, np.int32))
    acc = inner.add(
        "dot",
        [x],
        {
            "contract": [[1], [0]],
            "batch": [[], []],
            "kernel_operand": 1,
            "offset": 0,
            "shift": 0,
        },
        params={"kernel": kernel, "bias": bias},
        path="loop",
    )
    ends = []
    for name in ("loop/multiplier", "loop/other"):
        role = {
            "multiplier": inner.add_param(name, np.full((1, 3), 1 << 30, np.int32)),
            "shift": inner.add_param(f"{name}/shift", np.full((1, 3), 34, np.int32)),
        }
        a = {"zero_point": 0, "input_zero_point": 0, "low": -128, "high": 127}
        a |= {"rule": "half_even", "is_exact": True}
        ends.append(inner.add("requantize", [acc], a, params=role, path="loop"))
    inner.add("clip", [ends[0]], {"low": 0, "high": 7})
    inner.add_site("loop/output", ends[1])
    inner.add_site("loop/twin", ends[0])
    return inner.graph((x,), (ends[1],))


def _program(times=3):
    builder = GraphBuilder()
    x = builder.add_value((2, 3), -128, 127, dtype="int8")
    body = _body(builder)
    y = builder.add("repeat", [x], {"times": times}, graphs={"body": body}, path="loop")
    return builder.graph((x,), (y,)), builder.params


def _formula(x, times=3):
    x = np.asarray(x, np.int64)
    for _ in range(times):
        acc = x @ np.arange(9).reshape(3, 3) + 5
        x = np.clip(np.rint(acc / 16), -128, 127).astype(np.int64)
    return x


X = np.random.default_rng(0).integers(-128, 128, (2, 3))


def test_the_oracle_runs_graphs_inside():
    graph, params = _program()
    validate(graph, params)
    np.testing.assert_array_equal(
        reference.run(graph, params, [X])[graph.outputs[0]], _formula(X)
    )


def test_the_oracle_checks_intervals_inside():
    graph, params = _program()
    (node,) = graph.nodes
    body = node.graphs["body"]
    low = dataclasses.replace(body.values[body.outputs[0]], low=0, high=1)
    values = tuple(
        low if v == body.outputs[0] else x for v, x in enumerate(body.values)
    )
    inner = {"body": dataclasses.replace(body, values=tuple(values))}
    wrong = dataclasses.replace(graph, nodes=(dataclasses.replace(node, graphs=inner),))
    with pytest.raises(OverflowError):
        reference.run(wrong, params, [X])
    with pytest.raises(ValueError, match="In the body of %1 = repeat: .*%3 = requant"):
        validate(wrong, params)


def test_printing_shows_graphs_inside():
    text = str(_program()[0])
    lines = text.splitlines()
    at = lines.index("  body:")
    assert lines[at - 1].startswith("%1:int8[2,3] = repeat(%0)")
    assert lines[at + 1] == "    inputs: %0:int8[2,3]"
    assert any(line.startswith("    %1:int16[2,3] = dot(") for line in lines)


def test_walk_names_each_graph():
    graph, _ = _program()
    outer = GraphBuilder()
    x = outer.add_value((2, 3), -128, 127, dtype="int8")
    outer.add("repeat", [x], {"times": 1}, graphs={"body": graph})
    places = [place for place, _ in outer.graph((x,), (1,)).walk()]
    first = "the body of %1 = repeat"
    assert places == ["", first, f"the body of %1 = repeat in {first}"]


def test_json_holds_graphs_inside():
    graph, _ = _program()
    again = Graph.from_json(graph.to_json())
    assert again == graph and again.to_json() == graph.to_json()


def test_passes_enter_graphs():
    graph, params = _program()
    merged = merge_equal(graph, params)
    body = merged.nodes[0].graphs["body"]
    assert body.sites["loop/output"] == body.sites["loop/twin"] == body.outputs[0]
    pruned, left = drop_dead(merged, params)
    body = pruned.nodes[0].graphs["body"]
    assert [node.operation for node in body.nodes] == ["dot", "requantize"]
    assert set(params) - set(left) == {"loop/other", "loop/other/shift"}
    found = reference.run(pruned, left, [X])[pruned.outputs[0]]
    np.testing.assert_array_equal(found, _formula(X))


def test_equal_loops_are_merged_and_others_are_not():
    builder = GraphBuilder()
    x = builder.add_value((2, 3), -128, 127, dtype="int8")
    body = _body(builder)
    ends = [
        builder.add("repeat", [x], {"times": times}, graphs={"body": body})
        for times in (2, 2, 3)
    ]
    merged = merge_equal(builder.graph((x,), tuple(ends)), builder.params)
    assert merged.outputs == (ends[0], ends[0], ends[2])


def test_the_certificate_enters_graphs():
    graph, params = _program()
    report = certify(graph, params, ())
    (bound,) = report.overflow
    # Columns of the kernel sum to 9, 12 and 15.
    np.testing.assert_array_equal(bound.low, [-128 * n + 5 for n in (9, 12, 15)])
    assert bound.path == "loop" and bound.bits == 12
    assert report.agreement["loop/output"].is_proven
    assert set(report.agreement) == {"loop/output", "loop/twin"}


def test_sizes_inside_may_differ_and_attributes_may_not():
    (graph, params), (other, same) = _program(), _program()
    assert _first_difference((graph, params), (other, same)) is None
    body = other.nodes[0].graphs["body"]
    nodes = [
        dataclasses.replace(n, attributes={**n.attributes, "high": 6})
        if n.operation == "clip"
        else n
        for n in body.nodes
    ]
    inner = {"body": dataclasses.replace(body, nodes=tuple(nodes))}
    changed = dataclasses.replace(other.nodes[0], graphs=inner)
    other = dataclasses.replace(other, nodes=(changed,))
    assert _first_difference((graph, params), (other, same)) is graph.nodes[0]


def _edited(graph, **fields):
    (node,) = graph.nodes
    return dataclasses.replace(graph, nodes=(dataclasses.replace(node, **fields),))


def test_nodes_without_their_graphs_are_refused():
    graph, params = _program()
    wrong = [
        ({"graphs": {}}, r"graphs must hold \['body'\]"),
        ({"graphs": {**graph.nodes[0].graphs, "tail": graph}}, "graphs must be"),
        ({"graphs": {"body": "no graph"}}, "graphs must be integer graphs"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            validate(_edited(graph, **fields), params)
    builder = GraphBuilder()
    x = builder.add_value((3,), 0, 1)
    plain = builder.add("clip", [x], {"low": 0, "high": 1})
    clip = builder.graph((x,), (plain,))
    with pytest.raises(ValueError, match="graphs must be"):
        validate(_edited(clip, graphs={"body": graph}), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "half_even"}, "one of tflite_double, tflite_single"),
        ({"rule": "fp32_half_even"}, "one of tflite_double, tflite_single"),
        ({"shifts": [24, 31]}, "sum of rescaled codes must fit int32"),
        ({"left_shift": 24}, "shifted codes must fit int32"),
    ],
)
def test_tflite_sums_that_tflite_does_not_compute_are_refused(fields, message):
    builder = GraphBuilder()
    x, y = (builder.add_value((3,), -128, 127, Grid(1.0, 0)) for _ in "xy")
    a = {"left_shift": 20, "zero_points": [0, 0], "shifts": [31, 31], "shift": 50}
    a |= {"multipliers": [1 << 30, 3 << 29], "multiplier": 1 << 30, "zero_point": 0}
    a |= {"rule": "tflite_single", "low": -128, "high": 127}
    z = builder.add("tflite_add", [x, y], a, grid=Grid(1.0, 0))
    graph = builder.graph((x, y), (z,))
    validate(graph, {})
    with pytest.raises(ValueError, match=message):
        validate(_edited(graph, attributes={**a, **fields}), {})


def test_files_hold_graphs_inside(tmp_path):
    graph, params = drop_dead(*_program())
    path = tmp_path / "loop.qjax"
    trees = _trees()
    files.save(path, graph, params, *trees)
    again, found, *_ = files.load(path)
    assert again == graph and set(found) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(found[name], array)


def _trees():
    return jax.tree.structure((0,)), jax.tree.structure(0)


VERSION2 = pathlib.Path(__file__).parent / "golden/programs/version2.qjax"


def _rewritten(path, change):
    """Writes a file of version 2 with another header and other tensors."""
    with safetensors.safe_open(VERSION2, framework="numpy") as file:
        header = dict(file.metadata())
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, arrays)
    header["sha256"] = header_files.checksum(header, arrays)
    path.write_bytes(safetensors.numpy.save(arrays, header))


def test_readers_skip_golden_vectors_of_later_writers(tmp_path):
    path = tmp_path / "loop.qjax"

    def change(header, arrays):
        header["golden"] = '{"inputs": ["__golden__/input:0"]}'
        header["checksums"] = '{"loop/kernel": "ab"}'
        arrays["__golden__/input:0"] = X.astype(np.int8)

    _rewritten(path, change)
    assert "__golden__/input:0" not in files.load(path)[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, a: h.pop("golden"), "Its header must hold"),
        (lambda h, a: h.update(golden="[]"), "Its golden must be an object"),
        (lambda h, a: h.update(version="4"), "version 4.* versions 1, 2 and 3"),
        (lambda h, a: h.update(version="3"), "no tensor '__manifest__'"),
        (
            lambda h, a: h.update(graph=h["graph"].replace('"loop"', '"until"')),
            "no integer operation 'until' in this qjax",
        ),
        (lambda h, a: a.update(more=np.zeros(3, np.int8)), "must have a reader"),
    ],
)
def test_files_of_version_2_that_are_none_are_refused(tmp_path, change, message):
    path = tmp_path / "loop.qjax"
    _rewritten(path, lambda header, arrays: change(header, arrays) and None)
    with pytest.raises(ValueError, match=message):
        files.load(path)


def test_names_of_golden_vectors_are_kept(tmp_path):
    x = np.ones((1, 3), np.float32)
    params = {"__golden__": {"kernel": np.eye(3, dtype=np.float32)}}
    qmodel = qjax.quantize_model(lambda p, x: x @ p["__golden__"]["kernel"], params, x)
    program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)
    with pytest.raises(ValueError, match="keep the name '__golden__/kernel'.* Rename"):
        program.save(tmp_path / "x.qjax")
    assert not list(tmp_path.iterdir())
