"""The direct road, from NumPy to NumPy: real ends, given outputs, addresses."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.backends.native import library
from qjax.backends.native.library import find_library
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")
NATIVE = pytest.mark.skipif(
    find_library().library is None, reason=find_library().reason
)
TOP = np.finfo(np.float32).max


def on_grid(x, scale, zero_point, name, bits=8, signed=True, axis=None):
    scale = jnp.float32(scale)
    params = QParams(scale, jnp.full(scale.shape, zero_point, jnp.int32))
    spec = QSpec(bits, signed, axis=axis)
    return fake_quant(x, params, spec, site=name)


def doubled(scale=0.1, zero_point=0, **names):
    """A program of one input, twice as large on a grid of its own."""
    fn = lambda x: on_grid(
        2.0 * on_grid(x, scale, zero_point, "x", **names), 3 * scale, -5, "y"
    )
    return qjax.lower(fn, np.zeros((2, 7), np.float32))


def hard_numbers(scale, size):
    """Numbers at ties and beside them, beyond the grid, of every kind of float32."""
    draw = np.random.default_rng(size)
    ties = (draw.integers(-300, 300, size) + 0.5) * np.float32(scale)
    ties = ties.astype(np.float32)
    beside = np.nextafter(ties, draw.choice([-TOP, TOP], size).astype(np.float32))
    odd = [0.0, -0.0, np.nan, np.inf, -np.inf, TOP, -TOP, 1e-45, -1e-40, 1e9, -1e9]
    wide = draw.normal(size=size) * 200 * scale
    return np.float32([*ties, *beside, *odd, *wide])


def definition(x, scale, zero_point, low, high):
    with np.errstate(over="ignore"):
        steps = x * (np.float32(1) / np.float32(scale))
    steps = np.rint(np.where(np.isnan(steps), np.float32(0), steps))
    steps = np.clip(steps.astype(np.float64), low - zero_point, high - zero_point)
    return steps.astype(np.int64) + zero_point


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NATIVE), "xla"])
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize(
    ("scale", "zero_point"), [(0.1, 3), (0.125, 0), (3e-5, -1), (7.3e20, 1), (1e-31, 0)]
)
def test_real_values_are_those_of_the_program(backend, bits, scale, zero_point):
    program = doubled(scale, zero_point, bits=bits)
    x = hard_numbers(scale, 400)
    x = np.resize(x, (len(x) // 7 + 1, 7))
    run = program.compile(len(x), backend=backend)
    assert run.backend == backend
    found = run.real(x)
    assert type(found) is np.ndarray and found.dtype == np.float32
    np.testing.assert_array_equal(found, program(x, backend="xla"))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = definition(x, scale, zero_point, low, high)
    own = program.graph.values[program.graph.inputs[0]]
    np.testing.assert_array_equal(found, run.real(x.astype(np.float64)))
    outputs = run(codes.astype(own.dtype)).astype(np.float32)
    np.testing.assert_array_equal(found, (outputs + 5) * np.float32(3 * scale))


def changed(program, at=0, **names):
    """A program whose input is another kind of value."""
    graph = program.graph
    values = list(graph.values)
    v = graph.inputs[at]
    values[v] = dataclasses.replace(values[v], **names)
    own = dataclasses.replace(graph, values=tuple(values))
    return dataclasses.replace(program, graph=own)


@pytest.mark.parametrize(
    "names", [{"rounding": "half_away"}, {"rescaling": (0.3, 0.05)}, {}]
)
def test_other_ends_are_those_of_the_program_too(names):
    program = changed(doubled(), **names)
    x = np.resize(hard_numbers(0.1, 60), (10, 7))
    run = program.compile(10)
    for own in (x, jnp.asarray(x), x[::-1], np.asarray(x, np.float16).clip(-9, 9)):
        np.testing.assert_array_equal(run.real(own), program(own, backend="xla"))
    whole = np.arange(70, dtype=np.int32).reshape(10, 7)
    np.testing.assert_array_equal(run.real(whole), program(whole, backend="xla"))


def test_scales_of_channels_and_integers_of_the_model():
    scales = np.float32([[0.1, 0.2, 0.3]])
    draw = np.random.default_rng(0)
    kernel, rows = draw.normal(size=(3, 3)), np.arange(12.0).reshape(4, 3)

    def fn(x, places):
        k = on_grid(jnp.asarray(kernel, jnp.float32), scales, 0, "k", axis=-1)
        table = on_grid(jnp.asarray(rows, jnp.float32), 0.1, 0, "table")
        sums = on_grid(x, 0.1, 0, "x") @ k  # Of a scale a channel.
        return {"top": jnp.argmax(table[places], -1), "sums": sums}

    x, places = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)
    program = qjax.lower(fn, x, places)
    assert np.ndim(program.output_grids[0].scale) == 2
    x, places = images(4, 3), np.int32([3, 0, 1, 2])
    run = program.compile(4)
    found, wanted = run.real(x, places), program(x, places, backend="xla")
    assert sorted(found) == ["sums", "top"]
    for name, own in wanted.items():
        assert found[name].dtype == own.dtype
        np.testing.assert_array_equal(found[name], own)
    strict = changed(program, at=1, is_place=True).compile(4)
    np.testing.assert_array_equal(strict.real(x, places)["top"], wanted["top"])
    with pytest.raises(ValueError, match="must lie in"):
        strict.real(x, places + 1)


def test_real_inputs_of_other_shapes_are_refused():
    run = doubled().compile(3)
    with pytest.raises(ValueError, match=r"must have shape \(3, 7\), got \(2, 7\)"):
        run.real(np.zeros((2, 7), np.float32))
    with pytest.raises(ValueError, match="inputs nested as"):
        run.real(np.zeros((3, 7), np.float32), 1)


def test_real_inputs_hold_real_numbers():
    program = doubled()
    run, x = program.compile(3), np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)
    wanted = run.real(x)
    for same in (x.astype(">f4"), x.tolist(), x.astype(np.float64), jnp.asarray(x)):
        np.testing.assert_array_equal(run.real(same), wanted)
    masked, texts = np.ma.masked_array(x), np.full(x.shape, "1")
    for other in (x.astype(np.complex64), x.astype(object), masked, texts):
        with pytest.raises(TypeError, match="Input 0 must be an array of real numbers"):
            run.real(other)
    with pytest.raises(TypeError, match="An input must be real, got complex64"):
        program(x.astype(np.complex64))
    np.testing.assert_array_equal(program(x.astype(np.complex64).real), wanted)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NATIVE), "xla"])
def test_given_arrays_receive_the_outputs(backend):
    def fn(x):
        x = on_grid(x, 0.1, 0, "x")
        return {"a": on_grid(x + x, 0.2, 0, "a"), "b": x[:, ::-1]}

    program = qjax.lower(fn, np.zeros((2, 7), np.float32))
    codes = np.arange(-14, 14, dtype=np.int8).reshape(4, 7)
    run = program.compile(4, backend=backend)
    wanted = run(codes)
    out = {name: np.zeros_like(y) for name, y in wanted.items()}
    assert run(codes, out=out) is out
    jax.tree.map(np.testing.assert_array_equal, out, wanted)
    np.testing.assert_array_equal(out["b"], codes[:, ::-1])
    locked = out["a"].copy()
    locked.flags.writeable = False
    wide = np.zeros((4, 14), np.int8)
    for other in (locked, out["a"][:3], wide[:, ::2], out["a"].astype(np.int16), 1):
        with pytest.raises(ValueError, match="`out` must hold contiguous, writable"):
            run(codes, out={**out, "a": other})
    with pytest.raises(ValueError, match="nested as"):
        run(codes, out=out["a"])
    for other in (codes, out["b"]):
        with pytest.raises(ValueError, match="must share no memory"):
            run(codes, out={**out, "a": other})


@NATIVE
def test_arrays_between_the_places_of_their_type_are_copied():
    program = doubled(bits=16)
    codes = np.arange(-7, 7, dtype=np.int16).reshape(2, 7)
    block = np.zeros(codes.nbytes + 1, np.uint8)
    apart = block[1:].view(np.int16).reshape(codes.shape)
    apart[...] = codes
    assert not apart.flags.aligned
    run = program.compile(2)
    wanted = run(codes)
    np.testing.assert_array_equal(run(apart), wanted)
    subclass = type("Subclass", (np.ndarray,), {})
    np.testing.assert_array_equal(run(codes.view(subclass)), wanted)
    np.testing.assert_array_equal(run(np.repeat(codes, 2, 1)[:, ::2]), wanted)
    real = codes * np.float32(0.1)
    block = np.zeros(real.nbytes + 1, np.uint8)
    apart = block[1:].view(np.float32).reshape(real.shape)
    apart[...] = real
    np.testing.assert_array_equal(run.real(apart), run.real(real))


@NATIVE
def test_addresses_are_those_that_numpy_gives(monkeypatch):
    program, codes = doubled(), np.arange(14, dtype=np.int8).reshape(2, 7)
    real, size = codes * np.float32(0.1), np.int64(2)
    assert library._HEAD > 0 and library._end is id  # In CPython.
    wanted = program.compile(int(size)), program.compile(3)
    monkeypatch.setattr(library, "_HEAD", 0)
    monkeypatch.setattr(library, "_end", library._address)
    run = program.compile(int(size))
    assert run.backend == "native"
    codes_found, real_found = run(codes), run.real(real)
    monkeypatch.undo()
    np.testing.assert_array_equal(codes_found, wanted[0](codes))
    np.testing.assert_array_equal(real_found, wanted[0].real(real))


def test_threads_share_a_compiled_program():
    program = doubled()
    run, wrong = program.compile(64), []

    def work(seed):
        x = np.random.default_rng(seed).normal(size=(64, 7)).astype(np.float32)
        codes = definition(x, 0.1, 0, -128, 127).astype(np.int8)
        wanted = run(codes)
        out = np.empty_like(wanted)
        real = (wanted.astype(np.float32) + 5) * np.float32(0.3)
        for _ in range(200):
            run(codes, out=out)
            if not np.array_equal(out, wanted) or not np.array_equal(run.real(x), real):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
