"""Instruction sets that this machine may lack, emulated or under qemu; compilers.

Random convolutions with their requantizer, every step that the models here need, and
random graphs, against the oracle. What is not installed is a test that is skipped.
"""

import functools
import os
import pathlib
import platform
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

import qjax
from qjax.backends.native.library import SETS, Library, NativeKernel
from qjax.backends.native.plan import make_plan
from qjax.graph import reference
from qjax.graph.graph import Graph, Grid, Node, Value
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.sizes import value_shapes
from tests import test_formats_c99 as models
from tests.integer_programs import drawn as drawn_graph
from tests.models import images
from tests.test_native_fuzz import SIZES, codes_of

SOURCES = pathlib.Path(qjax.__file__).parent / "backends" / "native" / "src"
FLAGS = "-std=c++17 -O2 -fPIC -pthread -fvisibility=hidden".split()
RULES = ("half_even", "tflite_double", "tflite_single", "fp32_half_even")
SIMDE = pathlib.Path("/usr/include/simde/x86/avx512.h")
COUNT, GRAPHS = 60, 20
NEON_DOT, NEON = ("max", "neon_dot"), ("cortex-a72", "portable")  # Processor and set.

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("flax_promotion")]


def names_of(where):
    lines = (SOURCES / "sources.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return [(name, flags) for name, own, *flags in rows if own == where]


def defines(sets):
    return [f"-D{name[:-3].replace('isa', 'QJAX').upper()}" for name, _ in sets]


def build(compiler, names, out, *more):
    objects = []
    for name, flags in names:
        made = out.parent / f"{name}.o"
        command = [*compiler, *FLAGS, *flags, "-c", str(SOURCES / name)]
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
        objects.append(str(made))
    subprocess.run([*compiler, *more, "-pthread", *objects, "-o", str(out)], check=True)


@pytest.fixture(scope="module", params=["avx512_vnni", "amx_int8"])
def emulated(request, tmp_path_factory):
    """AVX-512 VNNI or AMX in plain C++."""
    if not SIMDE.exists() or platform.machine() != "x86_64":
        pytest.skip("SIMDe is not installed, or this is no x86-64")
    out = tmp_path_factory.mktemp("emulated") / "lib.so"
    name = request.param
    names = [*names_of("any"), (f"isa_{name}.cc", ["-mavx2"])]
    compiler = ["g++", f"-DQJAX_{name.upper()}", "-DQJAX_SIMDE", "-Wno-psabi"]
    build(compiler, names, out, "-shared")
    library = Library(str(out))
    assert library.call["set_isa"](name.encode()) == 0

    seen = set()

    def run(plan, xs):
        kernel = NativeKernel(library, plan)
        # Steps that have no kernels of a set, as moves, name none.
        firsts = {how.split(",")[0] for how in kernel.explain()}
        seen.update(firsts & set(SETS))
        return kernel.run(xs, 1)

    yield run
    assert seen == {name}


def check_installed(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@pytest.fixture(scope="module")
def folder_of_driver(tmp_path_factory):
    check_installed("aarch64-linux-gnu-g++", "qemu-aarch64")
    folder = tmp_path_factory.mktemp("neon")
    names = [*names_of("any"), *names_of("aarch64"), ("driver.cc", [])]
    compiler = ["aarch64-linux-gnu-g++", "-DQJAX_NEON_DOT"]
    build(compiler, names, folder / "driver", "-static")
    return folder


@pytest.fixture(params=[NEON_DOT, NEON], ids=["neon_dot", "portable"])
def neon(request, folder_of_driver):
    """An ARM processor under qemu, with dot products or without."""
    return functools.partial(drive, folder_of_driver, *request.param)


GNU_ARM = "--target=aarch64-linux-gnu"


@pytest.mark.parametrize(
    ("compiler", "machine"),
    [
        ("g++", "x86_64"),
        ("clang++", "x86_64"),
        ("aarch64-linux-gnu-g++", "aarch64"),
        (f"clang++ {GNU_ARM}", "aarch64"),
    ],
)
def test_compilers_have_no_warnings(compiler, machine):
    tool, *target = compiler.split()
    check_installed(tool, *["aarch64-linux-gnu-g++"] * (GNU_ARM in target))
    if not target and tool != "aarch64-linux-gnu-g++" and platform.machine() != machine:
        pytest.skip(f"this is no {machine}")
    define = defines(names_of(machine))
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for name, flags in [*names_of("any"), *names_of(machine), ("driver.cc", [])]:
        command = [tool, *target, *strict, *flags, *define, str(SOURCES / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
# Shifts of negative numbers have a meaning in each compiler that builds this.
SANITIZED.append("-fno-sanitize=shift-base")


RUNTIMES = {
    "g++": ([], ["libasan.so", "libubsan.so"]),
    "clang++": (["-shared-libasan"], ["libclang_rt.asan-x86_64.so"]),
}


@pytest.mark.parametrize("compiler", RUNTIMES)
def test_sanitizers_find_nothing_in_random_graphs_and_changed_plans(compiler, tmp_path):
    check_installed(compiler)
    flags, runtimes = RUNTIMES[compiler]
    found = []
    for name in runtimes:
        command = [compiler, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        found.append(done.stdout.strip())
        if not os.path.exists(found[-1]):
            pytest.skip(f"{name} is not installed")
    names, sets = names_of("any"), names_of(platform.machine())
    out, sanitized = tmp_path / "lib.so", [*SANITIZED, *flags]
    own = [compiler, *sanitized, *defines(sets)]
    build(own, [*names, *sets], out, *sanitized, "-shared")
    own = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONPATH": os.getcwd(),
    }
    script = str(pathlib.Path(__file__).parent / "run_sanitized.py")
    command = [sys.executable, "-W", "ignore", script, str(out), "200"]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 1000


def drive(folder, processor, name, plan, xs):
    """Runs a plan by the driver, whose file is that of driver.cc."""
    outs = [np.empty(shape, dtype) for shape, dtype in plan.outputs]
    number = functools.partial(struct.pack, "<q")
    blocks = [number(len(plan.words)), plan.words.tobytes()]
    blocks += [number(plan.constants.nbytes), plan.constants.tobytes()]
    blocks += [number(len(xs))]
    blocks += [part for x in xs for part in (number(x.nbytes), x.tobytes())]
    blocks += [number(len(outs)), *(number(x.nbytes) for x in outs)]
    (folder / "in").write_bytes(b"".join(blocks))
    command = ["qemu-aarch64", "-cpu", processor, str(folder / "driver"), name]
    subprocess.run([*command, str(folder / "in"), str(folder / "out")], check=True)
    content = (folder / "out").read_bytes()
    for x in outs:
        x[...] = np.frombuffer(content[: x.nbytes], x.dtype).reshape(x.shape)
        content = content[x.nbytes :]
    assert not content
    return outs


def drawn(seed):
    """A random convolution with its requantizer, and codes; None if there is none."""
    rng = np.random.default_rng(seed)
    pick = lambda low, high: int(rng.integers(low, high + 1))
    dtype = str(rng.choice(["int8", "int8", "uint8", "int16"]))
    info, zero = np.iinfo(dtype), pick(-3, 3) + (128 if dtype == "uint8" else 0)
    groups = pick(2, 36) if rng.random() < 0.3 else 1
    if groups > 1 and rng.random() < 0.7:
        channels, outputs = 1, 1  # Depthwise.
    else:
        channels, outputs = pick(1, 18) * int(rng.choice([1, 1, 1, 9])), pick(1, 66)
    rank = pick(1, 3)
    taps, strides = [pick(1, 3) for _ in range(rank)], [pick(1, 2) for _ in range(rank)]
    kernel = rng.integers(-127, 128, (*taps, channels, groups * outputs))
    x = rng.integers(
        info.min,
        info.max + 1,
        (2, *(pick(1, 8) for _ in range(rank - 1)), pick(1, 40), groups * channels),
    ).astype(dtype)
    last, space = rank + 1, list(range(1, rank + 1))
    conv = {
        "strides": strides,
        "padding": [[pick(-1, 2), pick(0, 2)] for _ in range(rank)],
        "input_dilation": [1] * rank,
        "dilation": [pick(1, 2) for _ in range(rank)],
        "groups": groups,
        "dimensions": [
            [0, last, *space],
            [rank + 1, rank, *range(rank)],
            [0, last, *space],
        ],
        "padding_code": zero,
        "offset": 128 if dtype == "uint8" else 0,
        "shift": 0,
    }
    params = {
        "kernel": kernel.astype(np.int8),
        "bias": rng.integers(-(10**4), 10**4, kernel.shape[-1]).astype(np.int32),
    }
    kind, shifts = rng.choice(["power", "float", "any"]), (kernel.shape[-1],)
    multiplier = rng.integers(1 << 30, (1 << 31) - 1, shifts)
    shift = rng.integers(33, 44, shifts)
    if kind == "power":
        multiplier, shift = np.full(shifts, 1 << 30), rng.integers(30, 42, shifts)
    elif kind == "any":
        multiplier = multiplier * rng.choice([-1, 1], shifts)
        shift = rng.integers(25, 50, shifts)
    along = (1,) * (rank + 1) + shifts
    params |= {"multiplier": multiplier.astype(np.int32).reshape(along)}
    params |= {"shift": shift.astype(np.int32).reshape(along)}
    value = Value(x.shape, dtype, int(info.min), int(info.max), Grid(1.0, zero))
    operation = OPERATIONS["conv"]
    operands = Operands(conv, [value], {k: params[k] for k in ("kernel", "bias")})
    try:
        shape = operation.shape(operands)
    except ValueError:
        return None
    if not np.prod(shape):
        return None
    low, high = operation.interval(operands)
    ends = [int(np.min(low)), int(np.max(high))]
    if ends[0] < -(2**31) or ends[1] >= 2**31:
        return None
    to = np.iinfo(rng.choice(["int8", "uint8", "int16"]))
    requantize = {
        "input_zero_point": 0,
        "zero_point": pick(-5, 5),
        "rule": str(rng.choice(RULES)),
        "low": int(to.min) if rng.random() < 0.7 else 0,
        "high": int(to.max),
    }
    own = int(requantize["low"]), int(to.max)
    values = (
        value,
        Value(shape, "int32", *ends),
        Value(shape, str(to.dtype), *own, Grid(1.0, requantize["zero_point"])),
    )
    roles = {name: name for name in params}
    first = {k: roles[k] for k in ("kernel", "bias")}
    second = {k: roles[k] for k in ("multiplier", "shift")}
    nodes = (
        Node("conv", (0,), 1, first, conv),
        Node("requantize", (1,), 2, second, requantize),
    )
    return Graph(values, nodes, (0,), (2,), {}), params, x


def check_products(run):
    count = 0
    for seed in range(10 * COUNT):
        found = drawn(seed)
        if found is None:
            continue
        graph, params, x = found
        wanted = reference.run(graph, params, [x])[2]
        (codes,) = run(make_plan(graph, params, [x.shape]), [x])
        np.testing.assert_array_equal(codes, wanted, err_msg=str(seed))
        count += 1
        if count == COUNT:
            return
    raise AssertionError(f"only {count} products were drawn")


def check_models(run):
    for name in ("convolutions", "a block"):
        net, shape, own = models.CASES[name]
        program = models.lowered(net, images(*shape), **own)
        graph = program.graph
        params = {k: np.asarray(p) for k, p in program.params.items()}
        xs = []
        for v in (graph.values[v] for v in graph.inputs):
            codes = np.random.default_rng(1).integers(v.low, v.high + 1, v.shape)
            xs.append(codes.astype(v.dtype))
        wanted = reference.run(graph, params, xs)
        found = run(make_plan(graph, params, [x.shape for x in xs]), xs)
        for codes, v in zip(found, graph.outputs, strict=True):
            np.testing.assert_array_equal(codes, wanted[v], err_msg=name)


def check_graphs(run):
    ran = 0
    for number in range(3000, 3000 + GRAPHS):
        graph, params, steps = drawn_graph(number)
        rng = np.random.default_rng(number)
        for size in SIZES:
            xs = codes_of(graph, size, rng)
            shapes = [x.shape for x in xs]
            try:
                value_shapes(graph, params, shapes)
            except ValueError:
                continue
            values = reference.run(graph, params, xs)
            found, ran = run(make_plan(graph, params, shapes), xs), ran + 1
            for codes, v in zip(found, graph.outputs, strict=True):
                message = f"graph {number}, batch {size}: {steps}"
                np.testing.assert_array_equal(codes, values[v], err_msg=message)
    assert ran > 3 * GRAPHS


def check_all(run):
    check_products(run)
    check_models(run)
    check_graphs(run)


def test_emulated_sets_compute_the_codes_of_the_oracle(emulated):
    check_all(emulated)


def test_arm_computes_the_codes_of_the_oracle(neon):
    check_all(neon)


def test_a_set_that_a_processor_lacks_is_refused(folder_of_driver):
    driver = str(folder_of_driver / "driver")
    command = ["qemu-aarch64", "-cpu", NEON[0], driver, NEON_DOT[1], "in", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no such instruction set" in done.stderr
