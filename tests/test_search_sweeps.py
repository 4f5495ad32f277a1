"""`sweep`: one trace, all executions, files that resume, several processes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh

import qjax
from qjax.affine import QSpec
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.search import grid, read_results, sweep
from qjax.search.execution import peak_bytes
from tests import sweep_in_processes
from tests.sweep_in_processes import model, results, schemes

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCHEMES = grid(Scheme(), {"*/kernel": [2, 4, 8], "*/output": [4, 8]})
WAYS = ("loop", "vmap", "shard")


class Counted:
    """A function that counts how often Python runs it."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args):
        self.calls += 1
        return self.fn(*args)


def products(scheme):
    first, second = (jnp.float32(rule.bits) for rule in scheme.rules)
    return first * 1.5 + second


WANTED = [1.5 * a + b for a in (2, 4, 8) for b in (4, 8)]


@pytest.mark.parametrize("execution", WAYS)
@pytest.mark.parametrize("chunk", [None, 1, 4, 6, 50])
def test_every_execution_and_chunk_traces_once(execution, chunk):
    fn = Counted(products)
    found = sweep(fn, SCHEMES, execution=execution, chunk=chunk)
    np.testing.assert_array_equal(found["value"], WANTED)
    assert (fn.calls, found.execution) == (1, execution)
    assert found.schemes == tuple(SCHEMES)


def test_auto_is_a_loop_on_one_cpu():
    assert sweep(products, SCHEMES, execution="auto").execution == "loop"


@pytest.mark.parametrize("execution", WAYS)
def test_evaluations_equal_known_bits(execution):
    qmodel, params, x = model()
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    fn = lambda s, x: jnp.sum(jnp.abs(qmodel.apply(params, qstate, x, scheme=s)))
    found = sweep(fn, schemes(), x, execution=execution)
    wanted = [float(jax.jit(lambda s=s: fn(s, x))()) for s in schemes()]
    np.testing.assert_array_equal(found["value"], wanted)  # All sums are exact.


def trainings(layers):
    """A function that trains a model of Linen or NNX by a scheme, from a seed."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
    y = jnp.arange(16) % 3
    if layers == "linen":
        net = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
        start = lambda key: net.init(key, x)
        apply = net.apply
    else:
        net = nnx.Sequential(
            nnx.Linear(5, 6, rngs=nnx.Rngs(0)),
            nnx.relu,
            nnx.Linear(6, 3, rngs=nnx.Rngs(1)),
        )
        graph, state = nnx.split(net)
        apply = lambda state, x: nnx.merge(graph, state)(x)
        draw = lambda key, p: jax.random.normal(key, p.shape) / 2
        start = lambda key: jax.tree.map(lambda p: draw(key, p), state)
    first = start(jax.random.key(0))
    qmodel = qjax.quantize_model(apply, first, x)
    qstate = qjax.calibrate(qmodel, first, [x], progress=False)
    sgd = optax.sgd(0.1)

    def fn(scheme, seed):
        def loss(params):
            logits = qmodel.apply(params, qstate, x, scheme=scheme)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def step(carry, _):
            params, optimizer = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, optimizer = sgd.update(grads, optimizer)
            return (optax.apply_updates(params, updates), optimizer), value

        params = start(jax.random.key(seed))
        _, losses = jax.lax.scan(step, (params, sgd.init(params)), length=4)
        return {"first": losses[0], "last": losses[-1]}

    return fn, qmodel


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", ["linen", pytest.param("nnx", marks=pytest.mark.heavy)]
)
def test_trainings_of_schemes_and_seeds(layers):
    fn, qmodel = trainings(layers)
    own = grid(qmodel, {"*/kernel": [6, 8]})
    both = {way: sweep(fn, own, seeds=(0, 7), execution=way) for way in WAYS[:2]}
    known = [jax.jit(lambda n, s=s: fn(s, n)) for s in own]
    wanted = [alone(n) for alone in known for n in (0, 7)]
    for found in both.values():
        assert found.seeds.tolist() == [0, 7, 0, 7]
        for name in ("first", "last"):
            rows = [float(row[name]) for row in wanted]
            np.testing.assert_allclose(found[name], rows, rtol=2e-4)
        assert np.all(found["last"] < found["first"])
    mean = both["loop"].mean()
    np.testing.assert_allclose(mean["last"], both["loop"]["last"].reshape(2, 2).mean(1))
    assert mean.schemes == tuple(own) and mean.seeds is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "calibrator", ["min_max()", pytest.param("mse(20)", marks=pytest.mark.heavy)]
)
def test_a_function_quantizes_and_calibrates(calibrator):
    qmodel, params, x = model()

    def fn(scheme):
        own = qjax.quantize_model(qmodel.fn, params, x, scheme=scheme)
        qstate = qjax.calibrate(own, params, [x, x / 2])
        return jnp.mean(own.apply(params, qstate, x) ** 2)

    own = grid(Scheme(calibrator=calibrator), {"*/kernel": [3, 8]})
    eager = sweep(fn, own, compiled=False)
    assert eager.execution == "eager" and len({*eager["value"]}) == 2
    found = sweep(fn, own)["value"]
    np.testing.assert_allclose(found, eager["value"], rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_traced_words_are_those_of_known_ones():
    """Also at the largest weights, whose codes are at the end of the word."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype(np.float32)
    params = {"a": rng.normal(size=(4, 6)).astype(np.float32)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"])
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x / 2], progress=False)  # Some saturate.
    loss = lambda p, s: jnp.sum(qmodel.apply(p, qstate, x, scheme=s) ** 2)
    schemes = grid(qmodel, {"*": [2, 8, 20]})
    traced = jax.jit(jax.grad(loss))
    for scheme in schemes:
        known = jax.jit(lambda p, s=scheme: jax.grad(loss)(p, s))(params)["a"]
        found = traced(params, jax.tree.map(jnp.int32, scheme))["a"]
        np.testing.assert_allclose(found, known, rtol=1e-5)
        assert np.count_nonzero(found) > found.size / 2


def test_values_keep_their_types():
    fn = lambda s: {
        "whole": s.rules[0].bits,
        "truth": s.rules[0].bits > 2,
        "half": s.rules[0].bits.astype(jnp.bfloat16) * 0.5,
        "known": 3,
    }
    found = sweep(fn, SCHEMES[::2])
    kinds = {name: own.dtype.kind for name, own in found.values.items()}
    assert kinds == {"whole": "i", "truth": "b", "half": "f", "known": "i"}
    assert found["half"].tolist() == [1.0, 2.0, 4.0]
    assert found["truth"].tolist() == [False, True, True]


def test_nan_of_one_configuration_is_recorded(tmp_path):
    fn = lambda s: jnp.log(4.0 - jnp.float32(s.rules[0].bits))
    path = tmp_path / "sweep.jsonl"
    for found in (sweep(fn, SCHEMES, path=path), read_results(path)):
        assert (
            np.isnan(found["value"]).tolist() == [False] * 2 + [False] * 2 + [True] * 2
        )
        assert np.isneginf(found["value"][2:4]).all()
        assert found.best() == SCHEMES[0]
    lines = path.read_text().splitlines()
    assert all("NaN" not in line for line in lines)  # No JSON.
    assert json.loads(lines[-1])["values"] == {"value": "nan"}


def test_a_line_has_scheme_seed_and_versions(tmp_path):
    path = tmp_path / "new" / "sweep.jsonl"
    sweep(lambda s, seed: s.rules[0].bits + seed, SCHEMES, seeds=[3], path=path)
    first, *rest = map(json.loads, path.read_text().splitlines())
    assert first["configurations"] == len(rest) == 6 and first["names"] == ["value"]
    for k, (row, scheme) in enumerate(zip(rest, SCHEMES, strict=True)):
        assert row["configuration"] == k and row["seed"] == 3
        assert Scheme.from_json(json.dumps(row["scheme"])) == scheme
        assert row["versions"]["jax"] == jax.__version__
        assert {*row["versions"]} >= {"qjax", "python", "platform"}


class Stops:
    """A function that fails in its run at one configuration, after some calls."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, scheme):
        bits = int(scheme.rules[0].bits) * 10 + int(scheme.rules[1].bits)
        self.seen.append(bits)
        if len(self.seen) == self.at:
            raise KeyboardInterrupt
        return bits


@pytest.mark.parametrize("tail", [b"", b'{"configuration": 5, "val', b"\n"[:0]])
def test_an_interrupted_sweep_goes_on(tmp_path, tail):
    path = tmp_path / "sweep.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(Stops(4), SCHEMES, path=path, compiled=False, name="stops")
    with open(path, "ab") as file:
        file.write(tail)
    again = Stops(0)
    found = sweep(again, SCHEMES, path=path, compiled=False, name="stops")
    assert found["value"].tolist() == [24, 28, 44, 48, 84, 88]
    assert again.seen == [24, 48, 84, 88]  # The names of its numbers, and the rest.
    assert len(path.read_text().splitlines()) == 7
    np.testing.assert_array_equal(read_results(path)["value"], found["value"])


def test_a_whole_file_is_read_alone(tmp_path):
    path, fn = tmp_path / "sweep.jsonl", Counted(products)
    first = sweep(fn, SCHEMES, path=path, name="f")
    before = path.read_bytes()
    again = sweep(fn, SCHEMES, path=path, name="f", execution="vmap")
    np.testing.assert_array_equal(again["value"], first["value"])
    assert path.read_bytes() == before


def test_files_of_several_hosts_merge(tmp_path):
    path = tmp_path / "sweep.jsonl"
    sweep(products, SCHEMES, path=path)
    head, *rows = path.read_text().splitlines(keepends=True)
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for part, own in zip(parts, (rows[::2], rows[1:2]), strict=True):
        part.write_text(head + "".join(own))
    found = read_results(*parts)
    assert found.places.tolist() == [0, 1, 2, 4]
    np.testing.assert_array_equal(found["value"], np.asarray(WANTED)[[0, 1, 2, 4]])
    # A sweep finds the files of other processes beside its own.
    parts[0].rename(path)
    parts[1].rename(tmp_path / "sweep.1.jsonl")
    np.testing.assert_array_equal(sweep(products, SCHEMES, path=path)["value"], WANTED)
    assert len(path.read_text().splitlines()) == 1 + 3 + 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schemes": SCHEMES[:3]}, "another sweep: configurations: 6 for 3"),
        ({"schemes": SCHEMES[::-1]}, "digest: its schemes or seeds are others"),
        ({"fn": lambda s: {"b": s.rules[0].bits}}, "another sweep: names"),
        ({"name": "g"}, "another sweep: function: f for g"),
        (
            {"fn": lambda s, n: jnp.float32(n), "seeds": [1]},
            "schemes or seeds are others",
        ),
    ],
)
def test_the_file_of_another_sweep_is_refused(tmp_path, options, text):
    path = tmp_path / "sweep.jsonl"
    sweep(products, SCHEMES, path=path, name="f")
    before = path.read_bytes()
    own = {"fn": products, "schemes": SCHEMES, "name": "f"} | options
    with pytest.raises(ValueError, match=text):
        sweep(own.pop("fn"), own.pop("schemes"), path=path, **own)
    assert path.read_bytes() == before


def test_the_file_of_a_sweep_of_other_data_is_refused(tmp_path):
    path, mixed = tmp_path / "sweep.jsonl", tmp_path / "mixed.jsonl"
    fn = lambda s, data: s.rules[0].bits + data["n"] + data["x"].sum()
    first = {"x": np.int32([1, 2]), "n": 3, "key": jax.random.key(0)}
    run = lambda path, data: sweep(fn, SCHEMES, data, path=path, name="f")
    wanted = run(path, first)["value"]
    own = {**first, "x": jnp.asarray(first["x"])}  # The same on a device.
    np.testing.assert_array_equal(run(path, own)["value"], wanted)
    before = path.read_bytes()
    for change in (
        {"x": np.int32([2, 1])},
        {"x": np.int32([[1, 2]])},
        {"x": np.float32([1, 2])},
        {"n": 4},
        {"key": jax.random.key(1)},
        {"more": np.int32(0)},
    ):
        other = {**first, **change}
        with jax.numpy_dtype_promotion("standard"):
            with pytest.raises(ValueError, match="another sweep: data: its arrays"):
                run(path, other)
            if "n" in change:
                run(mixed, other)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="another sweep: data: its arrays"):
        read_results(path, mixed)
    lines = [*path.read_text().splitlines()[:2], mixed.read_text().splitlines()[2], ""]
    mixed.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 3: broken.*1 is of another sweep"):
        read_results(mixed)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("hello\n", "line 1: no file of a sweep"),
        ('{"file": "other"}\n', "line 1: no file of a sweep"),
        ("[]\n", "line 1: no file of a sweep"),
        ('HEAD\n{"configuration": 9, "values": {"value": 1}}\n', "line 2: broken"),
        ("HEAD\n\x00\n", "line 2: broken"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, where):
    path = tmp_path / "sweep.jsonl"
    sweep(products, SCHEMES, path=path)
    text = text.replace("HEAD", path.read_text().splitlines()[0])
    path.write_text(text)
    for read in (
        lambda: read_results(path),
        lambda: sweep(products, SCHEMES, path=path),
    ):
        with pytest.raises(ValueError, match=where):
            read()
    assert path.read_text() == text


def test_bad_results_files():
    with pytest.raises(ValueError, match="at least one file"):
        read_results()
    with pytest.raises(FileNotFoundError):
        read_results("nowhere.jsonl")


@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (lambda s: jnp.ones(3), ValueError, "an array of shape \\(3,\\)"),
        (lambda s: {"a": jnp.ones((1, 1))}, ValueError, "\\(1, 1\\) for 'a'"),
        (lambda s: None, TypeError, "got NoneType"),
        (lambda s: "a", TypeError, "got str"),
        (lambda s: [1.0], TypeError, "must return a number|array of shape"),
        (lambda s: {}, ValueError, "at least one number"),
        (lambda s: {1: 2.0}, TypeError, "names|name its numbers"),
        (lambda s: 1j, TypeError, "got complex"),
        (lambda s: jax.random.key(0), TypeError, "must return a number"),
        (lambda s: float(s.rules[0].bits), TypeError, "needs the value of what is tr"),
        (lambda s: 1 if s.rules[0].bits > 2 else 0, TypeError, "compiled=False"),
        (8, TypeError, "`fn` must be a function of a scheme, got 8"),
    ],
)
def test_functions_that_return_no_number(tmp_path, fn, error, text):
    path = tmp_path / "sweep.jsonl"
    with pytest.raises((error, ValueError), match=text):
        sweep(fn, SCHEMES, path=path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"schemes": []}, ValueError, "at least one scheme"),
        ({"schemes": Scheme()}, TypeError, "sequence of schemes"),
        ({"schemes": [Scheme(None, None)]}, ValueError, "have no bits"),
        ({"schemes": [Scheme(), Scheme(QSpec(4))]}, ValueError, "weights.narrow_range"),
        ({"execution": "fast"}, ValueError, "`execution` must be"),
        ({"execution": "vmap", "mesh": "config"}, ValueError, "is for execution="),
        ({"mesh": "data"}, ValueError, "must have an axis 'config'"),
        ({"chunk": 0}, ValueError, "`chunk` must be a whole number"),
        ({"memory": 1.5}, ValueError, "`memory` must be a whole number"),
        ({"seeds": []}, ValueError, "`seeds` must hold at least one"),
        ({"seeds": [1, 1]}, ValueError, "each once"),
        ({"seeds": 4}, TypeError, "`seeds` must be whole numbers"),
        ({"seeds": [0.5]}, TypeError, "`seeds` must be whole numbers"),
        ({"compiled": False, "execution": "vmap"}, ValueError, "leave `execution`"),
    ],
)
def test_bad_arguments(tmp_path, options, error, text):
    own = {"schemes": SCHEMES, "path": tmp_path / "sweep.jsonl"} | options
    if isinstance(own.get("mesh"), str):
        own["mesh"] = Mesh(np.asarray(jax.devices()), (own["mesh"],))
    with pytest.raises(error, match=text):
        sweep(products, own.pop("schemes"), **own)
    assert not (tmp_path / "sweep.jsonl").exists()


def test_schemes_that_name_no_site_are_refused():
    qmodel, params, x = model()
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    fn = lambda s: jnp.sum(qmodel.apply(params, qstate, x, scheme=s))
    with pytest.raises(ValueError, match="'c/kernel' matches no site. The closest"):
        sweep(fn, grid(Scheme(), {"c/kernel": [4]}))


def test_a_scheme_that_no_json_holds_is_refused_with_a_file_alone(tmp_path):
    scheme = Scheme(rules=(Rule(lambda site: site.name == "a/kernel", bits=4),))
    assert sweep(lambda s: s.rules[0].bits, [scheme])["value"].tolist() == [4]
    with pytest.raises(ValueError, match="goes into JSON as a `Where`"):
        sweep(lambda s: s.rules[0].bits, [scheme], path=tmp_path / "sweep.jsonl")
    assert not (tmp_path / "sweep.jsonl").exists()


def test_the_bar_shows_configurations_a_second(capsys):
    sweep(products, SCHEMES, progress=True)
    text = capsys.readouterr().err
    assert "6/6" in text and "configurations/s" in text


def test_chunks_by_memory():
    fn = Counted(
        lambda s: jnp.sum(jnp.sin(jnp.ones(1000) * jnp.float32(s.rules[0].bits)))
    )
    traced = jax.jit(lambda b: jnp.sum(jnp.sin(jnp.ones(1000) * b))).trace(1.0)
    assert 8_000 <= peak_bytes(traced.jaxpr) < 16_000
    for memory in (1, 20_000, 10**9):
        found = sweep(fn, SCHEMES, execution="vmap", memory=memory)
        np.testing.assert_allclose(found["value"][0], 1000 * np.sin(2.0), rtol=1e-5)


# Several devices and processes.


def _start(out, *args, devices=1):
    """A process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, sweep_in_processes.__file__, str(out), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def _check(process, out, devices, number=0):
    """What a process found is what one device does."""
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    found = json.loads(out.with_suffix(f".{number}.json").read_text())
    wanted = results()
    assert found["devices"] == devices
    for name in ("error", "bits"):
        assert found[name] == wanted[name].tolist(), name  # All sums are exact.
    return found["execution"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["none", pytest.param("data", marks=pytest.mark.heavy)]
)
def test_eight_devices_find_the_results_of_one(tmp_path, mesh):
    out = tmp_path / "found.npz"
    assert _check(_start(out, mesh, devices=8), out, 8) == "shard"
    assert len(read_results(out.with_suffix(".jsonl"))) == 16


@pytest.mark.heavy
@pytest.mark.parametrize("mesh", ["none", "config", "data"])
def test_two_processes_find_the_results_of_one(tmp_path, mesh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "found.npz"
    started = [_start(out, mesh, str(k), "2", address, devices=2) for k in range(2)]
    try:
        for k, process in enumerate(started):
            assert _check(process, out, 4, k) == "shard"
    finally:
        for process in started:
            process.kill()
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == (2 if mesh == "none" else 1)
    assert len(read_results(*files)) == 16


@pytest.mark.slow
def test_a_process_that_was_killed_and_started_again_finishes(tmp_path):
    out = tmp_path / "found.npz"
    killed = _start(out, "kill")
    text, _ = killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL, text
    path = out.with_suffix(".jsonl")
    rows = path.read_text().splitlines(keepends=True)
    assert 1 < len(rows) <= 1 + sweep_in_processes.FAST
    path.write_text("".join(rows[:-1]) + rows[-1][:40])  # And its last line is cut.
    _check(_start(out, "none"), out, 1)
    assert path.read_text().startswith("".join(rows[:-1]))
    assert len(read_results(path)) == 16


NUMBERS = [2**31, -(2**40), np.int64(2**40), np.uint32(2**32 - 2), 2**70, 0.1, True, 3]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_numbers_that_are_not_traced_stay_as_they_are(tmp_path, value):
    schemes, path = grid(Scheme(), {"a": [2, 8]}), tmp_path / "sweep.jsonl"
    own = lambda s: value if s.rules[0].bits == 2 else value - 1
    wanted = [value, value - 1]
    if value == 2**70:
        wanted = [float(x) for x in wanted]
    for _ in range(2):
        found = sweep(own, schemes, compiled=False, path=path, name="own")
        assert found["value"].tolist() == wanted
    assert read_results(path)["value"].tolist() == wanted
    # Compiled, the number itself is a constant of JAX.
    found = sweep(lambda s: value, schemes)["value"]
    small = (
        isinstance(value, int) and abs(value) < 2**31 or isinstance(value, np.uint32)
    )
    assert found.tolist() == [value if small else float(np.float32(value))] * 2


@pytest.mark.parametrize("value", [1e300, -(10**400), np.float64(-1e39)], ids=str)
def test_constants_beyond_float32_are_refused_where_traced(value):
    schemes = grid(Scheme(), {"a": [2, 8]})
    with pytest.raises(ValueError, match="float32 does not hold. Scale it"):
        sweep(lambda s: value, schemes)
    assert np.isinf(sweep(lambda s: -np.inf, schemes)["value"]).all()


RECORDS = [
    ({"configuration": True}, "configuration must be a whole number, got True"),
    ({"configuration": 1.7}, "configuration must be a whole number, got 1.7"),
    ({"configuration": "1"}, "configuration must be a whole number, got '1'"),
    ({"configuration": -1}, "configuration -1 of 6"),
    ({"values": {"value": None}}, "a value must be a number, got None"),
    ({"values": {"value": [1]}}, "a value must be a number, got \\[1\\]"),
    ({"values": {"value": "7"}}, "a value must be a number, got '7'"),
    ({"values": [1]}, "TypeError"),
    ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ({"seed": True}, "seed must be a whole number, got True"),
]


@pytest.mark.parametrize(("change", "text"), RECORDS)
def test_a_record_that_is_none_is_refused_with_its_line(tmp_path, change, text):
    path = tmp_path / "sweep.jsonl"
    sweep(products, SCHEMES, path=path)
    head, first, second, *_ = path.read_text().splitlines()
    path.write_text(
        "\n".join((head, first, json.dumps(json.loads(second) | change), ""))
    )
    before = path.read_bytes()
    for read in (
        lambda: read_results(path),
        lambda: sweep(products, SCHEMES, path=path),
    ):
        with pytest.raises(ValueError, match=f"sweep.jsonl, line 3: broken.*{text}"):
            read()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["scheme", "seed"])
def test_a_record_has_the_scheme_and_seed_of_its_place(tmp_path, name):
    path, seeds = tmp_path / "sweep.jsonl", [3, 5]
    fn = lambda scheme, seed: scheme.rules[0].bits * seed
    run = lambda: sweep(fn, SCHEMES, seeds=seeds, path=path, name="f")
    wanted = run()["value"].tolist()
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    rows[7][name] = rows[4][name]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (head, *rows)))
    with pytest.raises(
        ValueError, match=f"line 9: broken.*the {name} of configuration 7"
    ):
        run()
    path.unlink()
    assert run()["value"].tolist() == wanted == run()["value"].tolist()


def test_lines_of_another_sweep_are_refused_without_the_sweep(tmp_path):
    """Other schemes, other seeds, a changed scheme: the file alone tells."""
    fn = lambda scheme, seed: scheme.rules[0].bits * seed
    paths = [tmp_path / f"{k}.jsonl" for k in range(3)]
    ways = (SCHEMES, 1), (SCHEMES[::-1], 1), (SCHEMES, 2)
    for path, (own, seed) in zip(paths, ways, strict=True):
        sweep(fn, own, seeds=[seed], path=path, name="f")
    for other in paths[1:]:
        with pytest.raises(ValueError, match="another sweep: digest: its schemes or"):
            read_results(paths[0], other)
        mixed = tmp_path / "mixed.jsonl"
        lines = paths[0].read_text().splitlines()
        mixed.write_text("\n".join([*lines[:3], other.read_text().splitlines()[3], ""]))
        with pytest.raises(ValueError, match="line 4: broken.*2 is of another sweep"):
            read_results(mixed)
    head, row, *_ = map(json.loads, paths[0].read_text().splitlines())
    row["scheme"]["rules"][0]["bits"] = 3
    mixed.write_text(f"{json.dumps(head)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match="line 2: broken.*its scheme or seed was chan"):
        read_results(mixed)


@pytest.mark.parametrize("text", ["", "hello\n", '{"file": "other"}\n', None])
def test_a_file_beside_is_a_share_if_its_heading_says_so(tmp_path, text):
    path, beside = tmp_path / "w.jsonl", tmp_path / "w.2.jsonl"
    if text is None:
        sweep(products, SCHEMES[:2], path=beside)
    else:
        beside.write_text(text)
    before = beside.read_bytes()
    for _ in range(2):
        np.testing.assert_array_equal(
            sweep(products, SCHEMES, path=path)["value"], WANTED
        )
    assert beside.read_bytes() == before and len(path.read_text().splitlines()) == 7
    # What is a share and broken is refused.
    beside.write_text(path.read_text().splitlines()[0] + "\n[]\n")
    with pytest.raises(ValueError, match="w.2.jsonl, line 2: broken"):
        sweep(products, SCHEMES, path=path)
