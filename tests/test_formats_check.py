"""The reader that runs on NumPy alone: it judges as qjax does, and stands alone."""

import ast
import copy
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from jax import lax

import qjax
from qjax import targets
from qjax.formats import check
from qjax.formats.check.forms import FORMS
from qjax.formats.tflite import read_tflite
from qjax.graph import files, reference
from qjax.graph.graph import Grid
from qjax.graph.operations import OPERATIONS
from qjax.graph.tflite_tables import exponential_table
from tests import lstm_cases
from tests.c99_cases import joined, random_codes, single
from tests.models import images
from tests.test_formats_c99_operations import _tflite as tflite_nodes
from tests.test_formats_table import program_of, tflite_scheme
from tests.test_formats_tflite_lstm import draw, inputs_of
from tests.test_validation import _network, _words

ROOT = pathlib.Path(__file__).parent


def _transformer(params, x, keep):
    """A block with masked attention, LayerNorm, GELU, and a residual each."""
    norm = lambda x: nn.LayerNorm(use_scale=False, use_bias=False).apply({}, x)
    y = norm(x)
    q, k, v = (y @ params[name] for name in "qkv")
    scores = jnp.einsum("btc,bsc->bts", q, k) / 2
    scores = jnp.where(keep[:, None], scores, -1e9)
    x = x + nn.softmax(scores) @ v @ params["o"]
    return x + nn.gelu(norm(x) @ params["up"]) @ params["down"]


def _lstm(params, x):
    return nn.RNN(nn.OptimizedLSTMCell(4)).apply(params, x)[:, -1]


def _pools(params, x):
    """Convolutions of 1 to 3 axes, groups, dilation, transposed; sums and pools."""
    one = lax.conv_general_dilated(
        x[:, 0], params["one"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    two = lax.conv_general_dilated(
        jnp.transpose(x, (3, 0, 1, 2)),
        params["two"],
        (1, 2),
        ((0, 1), (2, 0)),
        rhs_dilation=(2, 1),
        dimension_numbers=("CNHW", "OIHW", "NHWC"),
        feature_group_count=2,
    )
    turned = lax.conv_transpose(x, params["turned"], (2, 2), "VALID")
    mean = lax.reduce_window(
        nn.relu(turned), 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
    )
    return one, two, mean / 4, jnp.cumsum(x, 1), x.max(-1), jnp.argmin(x, 2)


def _made(name):
    """Returns the program of a model, and real inputs."""
    if name == "network":
        return qjax.lower(_network, images(2, 4, 4, 2)), (images(3, 4, 4, 2, seed=7),)
    if name == "words":
        own = np.int32([[0, 1, 6], [2, 3, 4]]), images(2, 3, 4, seed=3)
        return qjax.lower(_words, *own), own
    rng = np.random.default_rng(0)
    if name == "lstm":
        x = images(2, 5, 3)
        params = nn.RNN(nn.OptimizedLSTMCell(4)).init(jax.random.key(0), x)
        fn, args = _lstm, (x,)
    elif name == "transformer":
        shapes = dict.fromkeys("qkvo", (4, 4)) | {"up": (4, 8), "down": (8, 4)}
        params = {k: np.float32(rng.normal(0, 0.5, s)) for k, s in shapes.items()}
        args = images(2, 3, 4), np.array([[True, True, False], [True, False, False]])
        fn = _transformer
    else:
        shapes = {"one": (3, 4, 3), "two": (4, 2, 2, 3), "turned": (3, 3, 4, 2)}
        params = {k: np.float32(rng.normal(0, 0.5, s)) for k, s in shapes.items()}
        fn, args = _pools, (images(2, 5, 5, 4),)
    word = qjax.QSpec(4, narrow_range=True, axis="output")
    scheme = qjax.Scheme(word, qjax.QSpec(8))
    qmodel = qjax.quantize_model(fn, params, *args, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [args], progress=False)
    return qjax.lower(qmodel, params, qstate, *args), args


heavy = lambda name: pytest.param(name, marks=pytest.mark.heavy)
NAMES = "network", "words", "pools", heavy("lstm"), heavy("transformer")


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program, args = _made(request.param)
        path = tmp_path_factory.mktemp(request.param) / "golden.qjax"
        program.save(path, golden=args)
    return program, path


@pytest.fixture
def path(tmp_path):
    """A small file with golden codes."""
    path = tmp_path / "m.qjax"
    fn = lambda params, x: x @ params["w"]
    params, x = {"w": images(4, 3)}, images(5, 4)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    qjax.lower(qmodel, params, qstate, x).save(path, golden=x)
    return path


def test_it_finds_what_qjax_finds(made, tmp_path, capsys):
    """The golden codes, and the bits of each accumulator."""
    program, path = made
    assert check.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert f"OK {path}" in out and "on golden inputs" in out
    for k, v in enumerate(program.graph.outputs):
        assert f"output  {k}: " in out, v
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")][1:]
    found = sorted(tuple(map(int, row[-3:])) for row in rows)
    wanted = sorted(
        (int(o.low.min()), int(o.high.max()), o.bits)
        for o in program.report().overflow
        if o.low.size and _is_product(program, o)
    )
    if not any("turned" in name for name in program.params):
        assert found == wanted
    for own, other in zip(found, wanted, strict=True):  # Taps that never meet.
        assert own[0] >= other[0] and own[1] <= other[1] and own[2] == other[2]
    plain = tmp_path / "plain.qjax"
    program.save(plain)
    assert check.main([str(plain)]) == 0
    assert "drawn at random" in capsys.readouterr().out


def _is_product(program, bound):
    graphs = dict(program.graph.walk())
    nodes = graphs[bound.place].nodes
    own = next(n.operation for n in nodes if bound.value in n.outputs)
    return own in check.SUMS


ALONE = """
import runpy, sys
sys.argv = ["check", sys.argv[1]]
sys.path.insert(0, ".")
try:
    runpy.run_module("check", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not {"jax", "qjax", "safetensors"} & {m.split(".")[0] for m in sys.modules}
    raise
"""


def test_it_computes_the_loop_of_version_3(capsys):
    path = ROOT / "golden/programs/version3.qjax"
    assert check.main([str(path)]) == 0
    assert "18 golden codes, 0 differ" in capsys.readouterr().out


def test_it_runs_alone(path, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copytree(pathlib.Path(check.__file__).parent, folder / "check")
    for command in (["-Es", "-m", "check"], ["-I", "-c", ALONE]):
        own = [sys.executable, *command, str(path)]
        run = subprocess.run(own, cwd=folder, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, ""), run
        assert run.stdout.endswith(f"OK {path}\n")
    names = set()
    for file in (folder / "check").glob("*.py"):
        for n in ast.walk(ast.parse(file.read_text())):
            if isinstance(n, ast.Import):
                names |= {a.name for a in n.names}
            elif isinstance(n, ast.ImportFrom) and not n.level:  # Its own have one.
                names.add(n.module)
    assert names - set(sys.stdlib_module_names) == {"numpy"}


def _rewritten(path, change):
    """Writes a program anew with other fields and tensors, and right checksums."""
    tensors = safetensors.numpy.load_file(path)
    fields = files.read_manifest(tensors.pop("__manifest__"))
    change(fields, tensors)
    fields["sha256"] = {name: files.checksum(x) for name, x in tensors.items()}
    tensors["__manifest__"] = manifest = files.write_manifest(fields)
    header = {"format": "qjax.integer_program", "version": "3"}
    header["sha256"] = files.checksum(manifest)
    path.write_bytes(safetensors.numpy.save(tensors, header))


def _node(fields, operation):
    return next(n for n in fields["graph"]["nodes"] if n["operation"] == operation)


CHANGES = {
    "2 of 15 golden codes of output 0 differ": (
        1,
        lambda f, t: t["__golden__/outputs/0"].__setitem__((slice(2), 0), 1),
    ),
    "the operation 'until' is not here": (
        2,
        lambda f, t: _node(f, "dot").update(operation="until"),
    ),
    "'rule' of 'requantize'": (
        1,
        lambda f, t: _node(f, "requantize")["attributes"].update(rule="up"),
    ),
    "'w' reaches": (
        1,
        lambda f, t: f["graph"]["values"][_node(f, "dot")["output"]].update(low=-9),
    ),
    "input %0 is in": (1, lambda f, t: f["graph"]["values"][0].update(low=0)),
    "is too large": (
        2,
        lambda f, t: f["graph"]["values"][0].update(shape=[1 << 28, 4]),
    ),
    "KeyError": (1, lambda f, t: f.pop("small")),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_is_wrong_is_said(path, message, capsys):
    code, change = CHANGES[message]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_contents", None)  # The other reader takes no part.
        _rewritten(path, change)
    assert check.main([str(path)]) == code, capsys.readouterr().out
    out = capsys.readouterr().out
    assert message in out and ("UNKNOWN " if code == 2 else "WRONG ") in out


@pytest.mark.parametrize("name", ["w", "__small__", "__manifest__"])
def test_an_altered_tensor_is_named(path, name, capsys):
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    end = json.loads(data[8 : 8 + size])[name]["data_offsets"][1]
    data[8 + size + end - 1] ^= 0xFF
    path.write_bytes(data)
    assert check.main([str(path)]) == 1
    assert f"the tensor '{name}' was altered" in capsys.readouterr().out


def test_what_it_cannot_read(tmp_path, capsys):
    assert check.main([]) == check.main(["a", "b"]) == 2
    assert check.main([str(tmp_path / "missing.qjax")]) == 2
    assert "UNKNOWN" in capsys.readouterr().out
    other = tmp_path / "other.qjax"
    other.write_bytes(b"hello")
    assert check.main([str(other)]) == 1


def test_it_knows_most_operations():
    """The others are named here, so that a new one is a choice."""
    assert check.OPERATIONS <= set(OPERATIONS)
    missing = set(OPERATIONS) - check.OPERATIONS
    assert missing == {
        *("arithmetic", "gather", "scatter", "scatter_add", "scatter_max"),
        *("scatter_min", "sort", "argsort", "log_softmax", "logsumexp", "divide"),
    }


@pytest.mark.parametrize("name", ["lstm", "residual", "average"])
def test_it_computes_in_the_arithmetic_of_tflite(name, tmp_path, capsys):
    if name == "lstm":
        rng = np.random.default_rng(4)
        program = read_tflite(lstm_cases.file(draw(rng, 7, 3, 40), 2, 4))
        grid, codes = program.graph.values[0].grid, inputs_of(rng, 2, 4, 7)
        x = grid.array() * (codes - np.float32(grid.zero_point))
    else:
        with jax.numpy_dtype_promotion("standard"):
            program, x = program_of(name, tflite_scheme("channel"), targets.tflite)
    path = tmp_path / "m.qjax"
    program.save(path, golden=x)
    assert check.main([str(path)]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "golden codes, 0 differ" in out
    _agree(path, tmp_path / "other.qjax", 40, capsys)


def _rows_of_tflite():
    """What TFLite computes along rows: softmaxes, logarithms, roots, resizes."""
    yield from tflite_nodes()
    ends = {"low": -128, "high": 127}
    for scale in np.float32([0.004, 0.11, 2.0]):
        own = {"exponentials": exponential_table(scale, 1.0)}
        yield "tflite_softmax", [((4, 9), -128, 127)], ends, own
    own = {"exponentials": exponential_table(np.float32(0.2), 1.0)}
    yield "tflite_softmax", [((2, 1000), 0, 255)], {"low": 0, "high": 255}, own
    a, zero = {"input_zero_points": [0], **ends}, Grid(1.0, 0)
    yield "tflite_l2_norm", [((300, 2), -1, 1, zero)], a, {}  # 0, 1 and 2 squares.
    yield "tflite_l2_norm", [((9, 1), -32767, 32767, zero)], a, {}


def test_it_computes_the_rows_of_tflite(tmp_path, capsys):
    program = joined([single(*case) for case in _rows_of_tflite()])
    names = {node.operation for node in program.graph.nodes}
    assert len(names) == 5
    own, trees = program.graph, (program.input_tree, program.output_tree)
    for seed in range(3):
        codes = random_codes(program, seed)
        found = reference.run(own, program.params, codes)
        golden = codes, [found[v] for v in own.outputs]
        kinds = [[own.values[v].dtype for v in vs] for vs in (own.inputs, own.outputs)]
        golden = tuple(
            [x.astype(kind) for x, kind in zip(xs, each, strict=True)]
            for xs, each in zip(golden, kinds, strict=True)
        )
        path = tmp_path / f"{seed}.qjax"
        files.save(path, own, program.params, *trees, golden)
        assert check.main([str(path)]) == 0, capsys.readouterr().out
        out = capsys.readouterr().out
        assert out.count("golden codes, 0 differ") == len(own.outputs)
    _agree(path, tmp_path / "other.qjax", 40, capsys)
    moved = [golden[1][0] + 0, *golden[1][1:]]
    moved[0].flat[0] ^= 1  # One code of an image.
    files.save(path, own, program.params, *trees, (golden[0], moved))
    assert check.main([str(path)]) == 1
    assert "1 of" in capsys.readouterr().out


TABLES = {
    "exponentials lack codes": ("tflite_softmax", "exponentials", lambda t: t[:-1]),
    "exponentials do not fit": ("tflite_softmax", "exponentials", lambda t: t - 1),
    "steps do not fit": ("tflite_log_softmax", "steps", lambda t: t + 1),
    "reciprocals do not fit": ("tflite_softmax16", "reciprocals", lambda t: t[1:]),
    "rows are not between": ("tflite_resize", "rows", lambda t: t + 1),
}


@pytest.mark.parametrize("message", TABLES)
def test_tables_of_tflite_that_do_not_fit_are_refused(message, tmp_path, capsys):
    name, role, change = TABLES[message]
    case = next(case for case in _rows_of_tflite() if case[0] == name)
    program = joined([single(*case)])
    params = {"0/" + role: change(program.params["0/" + role])}
    path = tmp_path / "m.qjax"
    trees = program.input_tree, program.output_tree
    with pytest.MonkeyPatch.context() as patch:  # `save` refuses it, too.
        patch.setattr(files, "validate", lambda *args, **options: None)
        files.save(path, program.graph, {**program.params, **params}, *trees)
    assert check.main([str(path)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(FORMS))
def test_its_forms_are_those_of_the_operations(name):
    count, roles, form = FORMS[name]
    own = OPERATIONS[name]
    assert set(roles.split()) == set(own.roles)
    required = set(re.findall(r"(?<!\S)\w+", form))
    optional = set(re.findall(r"\[(\w+)", form))
    assert (required, optional) == (set(own.attributes), set(own.optional))
    wanted = "+" if own.inputs is None else "".join(map(str, np.ravel(own.inputs)))
    assert count == wanted


# Mutants: one field of a graph is another one, gone, or one too many.


def _leaves(data, path=()):
    items = ()
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        yield from _leaves(value, (*path, key))


def _others(x):
    """Returns other values for a field, of its type and of others."""
    if isinstance(x, bool):
        return [not x, 1]
    if isinstance(x, int):
        return [x + 1, x - 1, float(x), str(x), None]
    if isinstance(x, float):
        return [1e40, -x, int(x), str(x), 2 * x]
    if isinstance(x, str):
        return [f"{x}?", "", 3]
    if isinstance(x, list):
        return [x[:-1], x + x[:1], {}, 7]
    return [{}, [], {**x, "more": 1}] if isinstance(x, dict) else [0, "a", 1.5]


def _mutants(graph, rng, count):
    """Yields graphs of which one field, drawn at random, is altered."""
    places = list(_leaves(graph))
    for place in rng.choice(len(places), count):
        own = copy.deepcopy(graph)
        *way, last = places[place]
        part = functools.reduce(lambda part, key: part[key], way, own)
        others = _others(part[last])
        k = int(rng.integers(len(others) + isinstance(part, dict)))
        if k == len(others):
            del part[last]
        else:
            part[last] = others[k]
        yield [*way, last, "gone" if k == len(others) else others[k]], own


def _verdicts(path, out, count, capsys, seed=0):
    """Yields what both readers say of mutants of a file."""
    tensors = safetensors.numpy.load_file(path)
    fields = files.read_manifest(tensors.pop("__manifest__"))
    fields["sha256"] = {name: files.checksum(x) for name, x in tensors.items()}
    rng = np.random.default_rng(seed)
    for change, graph in _mutants(fields["graph"], rng, count):
        manifest = files.write_manifest({**fields, "graph": graph})
        header = {"format": "qjax.integer_program", "version": "3"}
        header["sha256"] = files.checksum(manifest)
        whole = {**tensors, "__manifest__": manifest}
        out.write_bytes(safetensors.numpy.save(whole, header))
        try:
            qjax.load(out)
            loads = True
        except ValueError:
            loads = False
        code = check.main([str(out)])
        yield change, loads, code, capsys.readouterr().out


def _agree(path, out, count, capsys):
    """Both refuse; if one finds that golden codes differ, so does the other."""
    refused = 0
    for change, loads, code, said in _verdicts(path, out, count, capsys):
        assert loads or code, change
        if loads and code == 1:
            with pytest.raises(Exception):  # noqa: B017, as codes of no fitting shape.
                qjax.load(out, check=True)
                pytest.fail(f"{change}: {said}")
        refused += not loads
    assert refused > count / 2


def test_it_refuses_the_mutants_that_load_refuses(made, tmp_path, capsys):
    _agree(made[1], tmp_path / "m.qjax", 40, capsys)


@pytest.mark.fuzz
def test_it_refuses_more_mutants_that_load_refuses(made, tmp_path, capsys):
    _agree(made[1], tmp_path / "m.qjax", 2000, capsys)


def test_a_program_that_computes_other_codes_is_found(path, capsys):
    program = qjax.load(path)
    inputs, outputs = files.load_golden(path)
    moved = {**program.params, "w": np.roll(program.params["w"], 1, 0)}
    other = dataclasses.replace(program, params=moved)
    trees = program.input_tree, program.output_tree
    files.save(path, other.graph, moved, *trees, (inputs, outputs))
    assert check.main([str(path)]) == 1
    assert "golden codes of output 0 differ" in capsys.readouterr().out
