"""Native kernels: programs under JAX and on the direct road, with and without them."""

import ctypes
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.backends.native import library
from qjax.backends.native.calls import NativeGraph
from qjax.backends.native.library import NativeKernel, find_library, thread_count
from qjax.backends.native.plan import NATIVE, make_plan
from qjax.backends.native.reals import Reals, input_end
from qjax.formats.stablehlo import write_stablehlo
from qjax.graph import reference
from qjax.graph.operations import OPERATIONS
from tests.models import images, linen_example
from tests.native_plans import STEPS, interpret

NO_LIBRARY = find_library().library is None
pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    pytest.mark.skipif(NO_LIBRARY, reason=find_library().reason),
]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        y = y + nn.Conv(6, (3, 3), feature_group_count=6)(y)
        y = nn.max_pool(nn.gelu(y), (2, 2), (1, 1), "SAME")
        return nn.Dense(5)(y.mean((1, 2)))


def lower(model, x):
    fn, params, x = linen_example(model, x)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    return qjax.lower(qmodel, params, qstate, x)


@pytest.fixture(scope="module")
def program():
    with jax.numpy_dtype_promotion("standard"):
        return lower(Net(), images(4, 7, 6, 3))


@pytest.fixture(scope="module")
def sorting():
    """A sort between two products."""
    with jax.numpy_dtype_promotion("standard"):
        order = lambda x: jnp.sort(x, -1)
        return lower(nn.Sequential([nn.Dense(8), order, nn.Dense(3)]), images(4, 5))


@pytest.fixture
def partly(sorting, monkeypatch):
    """The same, where native kernels lack sorts."""
    monkeypatch.delitem(NATIVE, "sort")
    return dataclasses.replace(sorting)


def codes_of(program, size, seed=0):
    value = program.graph.values[program.graph.inputs[0]]
    draw = np.random.default_rng(seed)
    shape = (size, *value.shape[1:])
    return draw.integers(value.low, value.high + 1, size=shape).astype(value.dtype)


def oracle(program, *codes):
    values = reference.run(program.graph, program.params, codes)
    return values[program.graph.outputs[0]]


@pytest.mark.parametrize("size", [0, 1, 3, 32, 257])
def test_each_batch_size_has_the_codes_of_the_oracle(program, size):
    x = codes_of(program, size)
    wanted = oracle(program, x)
    run = program.compile(size)
    assert run.backend == "native"
    np.testing.assert_array_equal(run(x), wanted)
    np.testing.assert_array_equal(program.codes(x), wanted)
    np.testing.assert_array_equal(program.codes(x, backend="xla"), wanted)


def test_the_report_says_what_runs_where(program, partly):
    report = program.backend_report()
    assert report.is_native and len(report.rows) == len(program.graph.nodes)
    assert report.isa in library.SETS and report.isa in str(report)
    found = partly.backend_report()
    assert not found.is_native and "sort" in found._repr_html_()
    others = [row for row in found.rows if row.backend == "xla"]
    assert 0 < len(others) < len(found.rows) and all(row.reason for row in others)


def test_a_graph_in_pieces_is_the_oracle(partly):
    x = codes_of(partly, 6)
    wanted = oracle(partly, x)
    np.testing.assert_array_equal(partly.codes(x), wanted)
    np.testing.assert_array_equal(jax.jit(partly.codes)(x), wanted)
    run = partly.compile(6)
    assert run.backend == "xla"
    np.testing.assert_array_equal(run(x), wanted)


@pytest.fixture
def no_sort(monkeypatch):
    """Native kernels that lack sorts."""
    monkeypatch.delitem(NATIVE, "sort", raising=False)


def looped(width):
    """A loop that sorts what it carries, between products."""
    draw = np.random.default_rng(width)
    kernels = draw.normal(0, 0.1, (2, width, width)).astype(np.float32)

    def fn(kernels, x):
        def step(h, t):
            h = jnp.sort(nn.relu(t @ kernels[0] + h), -1)
            h = jnp.tanh(h @ kernels[1])
            return h, h

        start = jnp.zeros((x.shape[0], width))
        return jax.lax.scan(step, start, x.transpose(1, 0, 2))[1]

    x = images(2, 5, width)
    qmodel = qjax.quantize_model(fn, kernels, x)
    return qjax.lower(qmodel, kernels, qjax.calibrate(qmodel, kernels, [x]), x)


@pytest.mark.kept
def test_a_loop_of_xla_runs_native_kernels_where_products_are_large(no_sort):
    program = looped(128)
    x = codes_of(program, 2)
    wanted = oracle(program, x)
    text = jax.jit(program.codes).lower(x).as_text()
    assert text.count("custom_call @qjax_native") == 2 and "while" in text
    np.testing.assert_array_equal(program.codes(x), wanted)
    np.testing.assert_array_equal(program.compile(2)(x), wanted)
    pair = np.stack([x, x[::-1]])
    found = jax.vmap(program.codes)(pair)
    np.testing.assert_array_equal(found, np.stack([oracle(program, y) for y in pair]))
    real = images(2, 5, 128, seed=3)
    sites, outputs = program.run_sites(real)
    others = program.run_sites(real, backend="xla")
    jax.tree.map(np.testing.assert_array_equal, (sites, outputs), others)
    (row,) = [row for row in program.backend_report().rows if "loop" in row.node]
    assert row.backend == "xla" and "nodes of its body" in row.reason
    assert "sort" in row.reason


def test_a_loop_of_xla_with_small_products_is_xla_whole(no_sort):
    program = looped(16)
    x = codes_of(program, 2)
    assert "qjax_native" not in jax.jit(program.codes).lower(x).as_text()
    np.testing.assert_array_equal(program.codes(x), oracle(program, x))


def test_quantization_points_are_those_of_xla(program):
    x = images(3, 7, 6, 3, seed=5)
    ours, outputs = program.run_sites(x)
    theirs, wanted = program.run_sites(x, backend="xla")
    assert list(ours) == list(theirs) and set(ours) == set(program.site_names)
    jax.tree.map(np.testing.assert_array_equal, (ours, outputs), (theirs, wanted))
    np.testing.assert_array_equal(program(x), program(x, backend="xla"))


def test_under_jit_the_program_is_one_call(program):
    x = codes_of(program, 4)
    text = jax.jit(program.codes).lower(x).as_text()
    assert text.count("custom_call @qjax_native") == 1
    own = jax.jit(lambda x: program.codes(x, backend="xla")).lower(x).as_text()
    assert "qjax_native" not in own
    wanted = oracle(program, x)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(program.codes)(x), wanted)
    step = lambda carry, x: (carry, program.codes(x))
    found = jax.lax.scan(step, 0, x.reshape(2, 2, *x.shape[1:]))[1]
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def hard_reals(shape, scale):
    """Numbers at ties and beside them, beyond the grid, of every kind of float32."""
    draw, most = np.random.default_rng(0), np.finfo(np.float32).max
    ties = np.float32((draw.integers(-300, 300, 200) + 0.5) * scale)
    odd = [0.0, -0.0, np.nan, np.inf, -np.inf, most, -most, 1e-45, -1e-40, 1e9]
    beside = np.nextafter(ties, np.float32(draw.choice([-most, most], 200)))
    return draw.choice(np.float32([*ties, *beside, *odd]), shape)


def test_real_values_go_into_the_call_and_come_out(program, partly):
    x = hard_reals((8, 7, 6, 3), program.input_grids[0].scale)
    text = jax.jit(program).lower(x).as_text()
    assert text.count("custom_call @qjax_native") == 1 and "round" not in text
    wanted = program(x, backend="xla")
    np.testing.assert_array_equal(program(x), wanted)
    np.testing.assert_array_equal(jax.jit(program)(x), wanted)
    mapped = jax.vmap(program)(x.reshape(2, 4, *x.shape[1:]))
    np.testing.assert_array_equal(mapped.reshape(wanted.shape), wanted)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(program)(np.float64(x)), wanted)
    half = x.clip(-9, 9).astype(np.float16)
    np.testing.assert_array_equal(program(half), program(half, backend="xla"))
    # Two pieces, and XLA between them.
    y = hard_reals((6, 5), partly.input_grids[0].scale)
    text = jax.jit(partly).lower(y).as_text()
    assert text.count("custom_call @qjax_native") == 2 and "round" not in text
    np.testing.assert_array_equal(partly(y), partly(y, backend="xla"))
    with pytest.raises(TypeError, match="An input must be real"):
        program(x.astype(np.complex64))


def test_a_value_may_be_real_here_and_codes_there(monkeypatch):
    """An input that both pieces and an output have; an output that a piece reads."""
    monkeypatch.delitem(NATIVE, "sort")

    def fn(x):
        y = jnp.sort(x * x, -1)
        z = y + x
        return y, jnp.maximum(z, x), z, x, z

    x = images(4, 6)
    program = lower_function(fn, x)
    x = hard_reals(x.shape, program.input_grids[0].scale)
    assert len(program.execution.mixture("native").pieces) > 2
    found, wanted = jax.jit(program)(x), program(x, backend="xla")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_vmap_joins_examples_and_maps_what_cannot_be_joined(program, partly):
    x = codes_of(program, 8)
    wanted = oracle(program, x)
    calls = x.reshape(2, 2, 2, *x.shape[1:])
    mapped = jax.vmap(jax.vmap(program.codes))
    np.testing.assert_array_equal(mapped(calls).reshape(wanted.shape), wanted)
    assert "while" not in jax.jit(mapped).lower(calls).as_text()
    same = jax.vmap(lambda _: program.codes(x))(jnp.arange(2))
    np.testing.assert_array_equal(same, np.stack([wanted, wanted]))
    y = codes_of(partly, 6)
    found = jax.vmap(partly.codes)(y.reshape(3, 2, -1))
    np.testing.assert_array_equal(found.reshape(6, -1), oracle(partly, y))


def test_examples_that_meet_are_mapped_one_by_one():
    fn = lambda x: x - jnp.flip(x, 0)
    x = images(4, 5)
    program = lower_function(fn, x)
    codes = np.stack([np.asarray(program.quantize_inputs(x)[0])] * 3)
    codes[1] = codes[1, ::-1]
    found = jax.vmap(program.codes)(codes)
    for own, wanted in zip(found, codes, strict=True):
        np.testing.assert_array_equal(own, oracle(program, wanted))


def lower_function(fn, x):
    qmodel = qjax.quantize_model(lambda params, x: fn(x), {}, x)
    return qjax.lower(qmodel, {}, qjax.calibrate(qmodel, {}, [x]), x)


def test_threads_call_one_program_at_once(program):
    sizes = 1, 2, 3
    codes = [codes_of(program, n, seed=n) for n in sizes]
    wanted = [oracle(program, x) for x in codes]
    runs, wrong = [program.compile(n, threads=2) for n in sizes], []

    def work(k):
        for _ in range(20):
            for found in (runs[k](codes[k]), program.codes(codes[k])):
                if not np.array_equal(found, wanted[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k % 3,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["portable", "avx2", "avx_vnni", "avx512_vnni", "amx_int8"]
)
def test_no_set_shares_code_with_another(tmp_path, name):
    """The linker keeps one copy of a shared function: maybe that of another machine."""
    folder = library.PATH.parent / "src"
    rows = [line.split() for line in (folder / "sources.txt").read_text().splitlines()]
    _, where, *flags = next(row for row in rows if row[0] == f"isa_{name}.cc")
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if where not in ("any", platform.machine()):
        pytest.skip(f"the set is of {where}")
    made = tmp_path / "set.o"
    source = str(folder / f"isa_{name}.cc")
    define = f"-DQJAX_{name.upper()}"
    command = ["g++", "-std=c++17", "-O0", define, *flags, "-c", source]
    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
    found = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True)
    kinds = [
        line.split()[-2:] if " U " in line else line.split()[1:]
        for line in found.stdout.splitlines()
    ]
    assert any("run_rows" in " ".join(own) for own in kinds)
    assert not [own for own in kinds if own[0] == "W"]  # Weak functions.


FORK = """
import os, signal, threading
import jax.numpy as jnp, numpy as np
import qjax
from qjax.affine import QParams, QSpec, fake_quant

def fn(x):
    def q(v, s, name):
        params = QParams(jnp.float32(s), jnp.int32(0))
        return fake_quant(v, params, QSpec(8), site=name)

    return q(q(x, .1, "x") @ q(jnp.eye(4), .02, "k"), .2, "y")

codes = np.arange(200_000, dtype=np.int8).reshape(-1, 4)
run = qjax.lower(fn, np.zeros((2, 4), np.float32)).compile(len(codes), threads=1)
wanted, is_over = run(codes), []

def work():
    while not is_over:
        run(codes)

threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads:
    t.start()
for _ in range(4):
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(int(not np.array_equal(run(codes), wanted)))
    assert os.waitpid(child, 0)[1] == 0
is_over.append(True)
"""


@pytest.mark.slow
@pytest.mark.kept
def test_a_forked_child_runs_what_threads_of_its_parent_run():
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("zero_point", [0, 3])
def test_padding_around_no_codes_is_summed(zero_point):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    numbers = ("NWC", "WIO", "NWC")

    def fn(x):
        x = on_grid(x, 0.1, zero_point, "x")
        k = on_grid(kernel, 0.02, 0, "k")
        y = jax.lax.conv_general_dilated(
            x, k, (1,), [(2, 2)], dimension_numbers=numbers
        )
        return on_grid(y, 0.2, 0, "y")

    program = qjax.lower(fn, np.zeros((2, 0, 4), np.float32))
    codes = np.zeros((2, 0, 4), np.int8)
    found = program.compile(2)(codes)
    assert found.shape == (2, 2, 5)
    np.testing.assert_array_equal(found, oracle(program, codes))
    np.testing.assert_array_equal(program.codes(codes), oracle(program, codes))


def on_grid(x, scale, zero_point, name):
    params = QParams(jnp.float32(scale), jnp.int32(zero_point))
    return fake_quant(x, params, QSpec(8), site=name)


def test_a_masked_array_is_no_array_of_codes(program):
    codes = np.ma.masked_array(codes_of(program, 2))
    with pytest.raises(TypeError, match="got MaskedArray"):
        program.compile(2)(codes)


def test_more_threads_than_there_can_be_are_many(monkeypatch):
    monkeypatch.setenv("QJAX_NUM_THREADS", "9" * 30)
    assert thread_count() == thread_count(10**20) == 1 << 16


def test_an_input_that_is_an_output_is_not_overwritten():
    program = lower_function(lambda x: (x, jnp.flip(x, -1), x), images(2, 3))
    x = codes_of(program, 2)
    kept = x.copy()
    first, second, third = program.compile(2)(x)
    first[...] = 0
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(third, kept)
    np.testing.assert_array_equal(second, kept[:, ::-1])
    donated = jax.jit(program.codes, donate_argnums=0)(jnp.asarray(x))
    jax.tree.map(np.testing.assert_array_equal, donated, (kept, kept[:, ::-1], kept))


def test_exports_take_xla(program):
    pytest.importorskip("flatbuffers")
    assert b"qjax_native" not in write_stablehlo(program)


def test_other_params_take_xla(program):
    x = codes_of(program, 2)
    params = {name: jnp.asarray(p) for name, p in program.params.items()}
    run = lambda params, x: dataclasses.replace(program, params=params).codes(x)
    assert "qjax_native" not in jax.jit(run).lower(params, x).as_text()
    np.testing.assert_array_equal(jax.jit(run)(params, x), oracle(program, x))
    changed = {k: np.asarray(p) for k, p in params.items()}
    name = next(name for name in changed if name.endswith("kernel"))
    changed[name] = changed[name][::-1].copy()
    other = dataclasses.replace(program, params=changed)
    np.testing.assert_array_equal(other.codes(x), oracle(other, x))
    assert not np.array_equal(other.codes(x), program.codes(x))


def test_without_the_library_xla_runs(program, monkeypatch, caplog, tmp_path):
    x = codes_of(program, 2)
    monkeypatch.setenv("QJAX_NATIVE", "0")
    np.testing.assert_array_equal(program.codes(x), oracle(program, x))
    assert "QJAX_NATIVE=0" in str(program.backend_report()) and not caplog.records
    with pytest.raises(ValueError, match="QJAX_NATIVE=0 turns native kernels off"):
        program.codes(x, backend="native")
    monkeypatch.delenv("QJAX_NATIVE")
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    for _ in range(2):
        np.testing.assert_array_equal(program.codes(x), oracle(program, x))
    assert len(caplog.records) == 1 and "was not built" in caplog.text
    (tmp_path / "none.so").write_bytes(b"no library")
    library.load_library.cache_clear()
    assert "cannot be loaded" in program.backend_report().reason
    assert program.compile(2).backend == "xla"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("QJAX_NATIVE", "yes", "QJAX_NATIVE must be 0 or 1, got 'yes'"),
        ("QJAX_NUM_THREADS", "0", "QJAX_NUM_THREADS must be 1 or more, got '0'"),
    ],
)
def test_variables_are_checked(program, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        program.codes(codes_of(program, 1))


def test_every_instruction_set_here_is_the_oracle(program):
    own, x = find_library().library, codes_of(program, 5)
    before, seen = own.isa, []
    real = hard_reals(x.shape, program.input_grids[0].scale)
    wanted = program(real, backend="xla")
    try:
        for name in library.SETS:
            if own.call["set_isa"](name.encode()):
                continue
            seen.append(name)
            assert program.backend_report().isa == own.isa == name
            np.testing.assert_array_equal(program.compile(5)(x), oracle(program, x))
            np.testing.assert_array_equal(program.codes(x), oracle(program, x))
            np.testing.assert_array_equal(program.compile(5).real(real), wanted)
    finally:
        own.call["set_isa"](before.encode())
    assert "portable" in seen and before in seen


def test_threads_share_the_outputs_of_large_products():
    """Batches of one kernel run, and one of a prime number, which is one run too."""
    model = nn.Sequential([nn.Dense(600), nn.relu, nn.Dense(520)])
    program, own = lower(model, images(4, 512)), find_library().library
    graph = NativeGraph(program.graph, program.params, own)
    before, codes = own.isa, [codes_of(program, n) for n in (32, 37, 64)]
    wanted = [oracle(program, x) for x in codes]
    try:
        for name in library.SETS:
            if own.call["set_isa"](name.encode()):
                continue
            runs = [graph.schedule([x.shape]) for x in codes]
            assert [run.times for run in runs] == [1, 1, 2]
            for run, x, y in zip(runs, codes, wanted, strict=True):
                for threads in (1, 2, 3, 64):
                    np.testing.assert_array_equal(run.prepare(threads)([x])[0], y)
    finally:
        own.call["set_isa"](before.encode())


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["avx3", "portable"])
def test_the_variable_chooses_an_instruction_set(name):
    script = (
        "from qjax.backends.native.library import find_library\n"
        "print(find_library().library.isa)"
    )
    own = {**os.environ, "QJAX_NATIVE_ISA": name, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    if name == "portable":
        assert done.stdout.strip() == name
    else:
        assert "QJAX_NATIVE_ISA must be one of amx_int8" in done.stderr


def test_bad_calls_say_what_was_wanted(program):
    x = codes_of(program, 2)
    for backend in ("gpu", 1):
        with pytest.raises(ValueError, match="`backend` must be 'native', 'xla'"):
            program.codes(x, backend=backend)
    run = program.compile(2)
    with pytest.raises(ValueError, match=r"must have shape \(2, 7, 6, 3\), got"):
        run(x[:1])
    with pytest.raises(TypeError, match="must be a NumPy array of int8, got float32"):
        run(x.astype(np.float32))
    with pytest.raises(ValueError, match="inputs nested as"):
        run(x, x)
    with pytest.raises(ValueError, match="`threads` must be 1 or more"):
        program.compile(2, threads=0)
    with pytest.raises(ValueError, match="`batch_size` must be 0 or more"):
        program.compile(-1)
    with pytest.raises(ValueError, match="must be one whose arrays fit in memory"):
        program.compile(1 << 40)
    strided = np.repeat(x, 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(run(strided), oracle(program, x))


def test_plans_that_fit_no_graph_are_refused(program):
    own = find_library().library
    params = {name: np.asarray(p) for name, p in program.params.items()}
    plan = make_plan(program.graph, params, [(2, 7, 6, 3)])
    for k in range(7):
        words = plan.words.copy()
        words[k] = -(1 << 40)
        with pytest.raises(RuntimeError, match="refuse"):
            NativeKernel(own, plan._replace(words=words))
    for words in (plan.words[:-1], plan.words[:3], plan.words[:0]):
        with pytest.raises(RuntimeError, match="refuse"):
            NativeKernel(own, plan._replace(words=words))
    with pytest.raises(RuntimeError, match="refuse"):
        NativeKernel(own, plan._replace(constants=plan.constants[:64]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ends: ends[:-1], "ends too early"),
        (lambda ends: [*ends, 0], "words too many"),
        (lambda ends: [2, *ends[1:]], "a flag must be 0 or 1"),
        (lambda ends: [*ends[:1], 1 << 30, *ends[2:]], "near their zero point"),
        (lambda ends: [*ends[:4], -1, *ends[5:]], "a scale must have 32 bits"),
    ],
)
def test_words_of_real_ends_are_checked(program, change, words):
    params = {name: np.asarray(p) for name, p in program.params.items()}
    plan = make_plan(program.graph, params, [(2, 7, 6, 3)])
    own, values = find_library().library, program.graph.values
    end = input_end(values[program.graph.inputs[0]])
    ends = np.array(change(Reals((end,), (None,)).words.tolist()), np.int64)
    text = ctypes.create_string_buffer(200)
    given = (x for own in (plan.words, ends) for x in (own.ctypes.data, len(own)))
    assert own.call["plan"](*given, text, len(text)) is None
    assert words in text.value.decode()


def test_no_word_of_a_plan_leads_out_of_its_memory(program):
    """A changed word is refused, or is a number of the arithmetic alone."""
    own = find_library().library
    params = {name: np.asarray(p) for name, p in program.params.items()}
    plan = make_plan(program.graph, params, [(2, 7, 6, 3)])
    x, refused = codes_of(program, 2), 0
    for k in np.random.default_rng(0).integers(7, len(plan.words), 60):
        for number in (-(1 << 40), -1, 1 << 40, int(plan.words[k]) + 1):
            words = plan.words.copy()
            words[k] = number
            try:
                NativeKernel(own, plan._replace(words=words)).run([x], 1)
            except RuntimeError:
                refused += 1
    assert refused > 60


def test_kernels_of_few_shapes_are_kept(program):
    own = NativeGraph(program.graph, program.params, find_library().library)
    first = own.schedule([(1, 7, 6, 3)])
    assert own.schedule([(1, 7, 6, 3)]) is first and first.times == 1
    for size in range(2, 20):
        found = own.schedule([(size, 7, 6, 3)])
        assert found.kernel is first.kernel and found.times == size
    assert own.schedule([(1, 7, 6, 3)]) is not first


def test_every_operation_is_native(sorting):
    assert set(OPERATIONS) == set(NATIVE)
    assert sorting.backend_report().is_native
    assert len(STEPS) == 35


def test_a_plan_is_what_its_interpreter_computes(program):
    params = {name: np.asarray(p) for name, p in program.params.items()}
    x = codes_of(program, 3)
    plan = make_plan(program.graph, params, [x.shape])
    wanted = oracle(program, x)
    np.testing.assert_array_equal(interpret(plan, [x])[0], wanted)
    kernel = NativeKernel(find_library().library, plan)
    np.testing.assert_array_equal(kernel.run([x], thread_count())[0], wanted)
    assert len(kernel.explain()) == plan.words[5]
