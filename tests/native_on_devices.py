"""Native kernels where `jax.jit` splits arrays over devices, beside NumPy's integers.

python tests/native_on_devices.py [gspmd], in a process with four devices.
"""

import os
import re
import sys
import tempfile
from typing import Any

import jax
import jax.experimental.compilation_cache.compilation_cache
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.graph import reference

DEVICES = np.array(jax.devices())
LINE = Mesh(DEVICES, "d")
SQUARE = Mesh(DEVICES.reshape(-1, max(len(DEVICES) // 2, 1)), ("a", "b"))
MOVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def lowered(fn: Any, *x: np.ndarray) -> qjax.IntegerProgram:
    qmodel = qjax.quantize_model(lambda params, *x: fn(*x), {}, *x)
    program = qjax.lower(qmodel, {}, qjax.calibrate(qmodel, {}, [x]), *x)
    assert program.backend_report().is_native
    return program


def codes_of(program: qjax.IntegerProgram, size: int) -> list[np.ndarray]:
    draw = np.random.default_rng(size)
    values = [program.graph.values[v] for v in program.graph.inputs]
    shapes = [(size, *v.shape[1:]) for v in values]
    pairs = zip(values, shapes, strict=True)
    return [draw.integers(v.low, v.high + 1, s).astype(v.dtype) for v, s in pairs]


def oracle(program: qjax.IntegerProgram, codes: list[np.ndarray]) -> np.ndarray:
    values = reference.run(program.graph, program.params, codes)
    return values[program.graph.outputs[0]]


def check(fn: Any, wanted: np.ndarray, split: P | None, moves: str, *x: Any) -> None:
    """The values, how the result is split, and what devices send to each other."""
    run = jax.jit(fn)
    text = run.lower(*x).compile().as_text()
    found = run(*x)
    np.testing.assert_array_equal(found, wanted)
    assert ("qjax_native" in text) and set(re.findall(MOVES, text)) <= {moves}
    if split is not None:
        own = NamedSharding(x[0].sharding.mesh, split)
        assert found.sharding.is_equivalent_to(own, found.ndim), found.sharding
    assert bool(re.findall(MOVES, text)) == bool(moves), text


def on(mesh: Mesh, spec: P, x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, spec))


def check_meshes(program: qjax.IntegerProgram) -> None:
    """Axes of examples are split, others gathered."""
    codes = codes_of(program, 8)
    (x,), wanted = codes, oracle(program, codes)
    run, gathered = program.codes, "all-gather"
    check(run, wanted, P("d"), "", on(LINE, P("d"), x))
    check(run, wanted, P("b"), "", on(SQUARE, P("b"), x))
    check(run, wanted, P(("b", "a")), "", on(SQUARE, P(("b", "a")), x))
    check(run, wanted, P(), "", on(SQUARE, P(), x))
    check(run, wanted, P(), gathered, on(LINE, P(None, "d"), x))
    check(run, wanted, P("a"), gathered, on(SQUARE, P("a", "b"), x))
    found = program.codes(on(LINE, P("d"), x))
    np.testing.assert_array_equal(found, wanted)
    assert found.sharding.spec == P("d")
    real = np.random.default_rng(0).normal(size=x.shape).astype("f")
    wanted = np.asarray(program(real, backend="xla"))
    check(program, wanted, P("d"), "", on(LINE, P("d"), real))


def check_surroundings(program: qjax.IntegerProgram) -> None:
    """Constraints, axes in types, vmap, scan, shard_map, 64 bits, Shardy off."""
    codes = codes_of(program, 8)
    (x,), wanted, run = codes, oracle(program, codes), program.codes
    split = on(LINE, P("d"), x)
    inside = lambda mesh, n: (
        lambda x: run(
            jax.lax.with_sharding_constraint(x[:n], NamedSharding(mesh, P("d")))
        )
    )
    check(inside(LINE, 8), wanted, None, "", x)
    for n in (7, 5, 3, 1):  # No number of examples for each device.
        np.testing.assert_array_equal(jax.jit(inside(LINE, n))(split), wanted[:n])
    pairs = lambda x: jax.vmap(run)(x.reshape(4, 2, *x.shape[1:]))
    check(pairs, wanted.reshape(4, 2, -1), P("d"), "", split)
    step = lambda carry, x: (carry, run(x))
    scanned = lambda x: jax.lax.scan(step, 0, jnp.stack([x, x]))[1]
    check(scanned, np.stack([wanted, wanted]), P(None, "d"), "", split)
    with jax.enable_x64(True):
        check(run, wanted, P("d"), "", split)
    for mesh, axis in ((LINE, "d"), (SQUARE, "b")):
        own = {"mesh": mesh, "in_specs": P(axis), "out_specs": P(axis)}
        shared = jax.shard_map(run, axis_names={axis}, **own)
        check(shared, wanted, P(axis), "", on(mesh, P(axis), x))
    typed = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    check(run, wanted, P("a"), "", on(typed, P("a"), x))
    with jax.set_mesh(typed):
        check(run, wanted, P("b"), "", on(typed, P("b"), x))
        check(run, wanted, P(("a", "b")), "", on(typed, P(("a", "b")), x))
        check(run, wanted, P("a"), "all-gather", on(typed, P("a", "b"), x))
        check(run, wanted, P(), "all-gather", on(typed, P(None, "b"), x))
        twice = np.stack([x, x[::-1]])
        for spec in (P(None, "b"), P("b", "a"), P("a"), P(None, ("a", "b"))):
            found = jax.vmap(run)(on(typed, spec, twice))
            np.testing.assert_array_equal(found, [wanted, wanted[::-1]])
            deeper = on(typed, P(None, *spec), np.stack([twice, twice]))
            found = jax.vmap(jax.vmap(run))(deeper)[0]
            np.testing.assert_array_equal(found, [wanted, wanted[::-1]])
    if sys.argv[1:] == ["gspmd"]:
        jax.config.update("jax_use_shardy_partitioner", False)
        check(run, wanted, P("b"), "", on(SQUARE, P("b"), x))
        check(run, wanted, P("a"), "all-gather", on(SQUARE, P("a", "b"), x))
        jax.config.update("jax_use_shardy_partitioner", True)


def check_two_inputs() -> None:
    """One input is split, the other one is not."""
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("f")
    program = lowered(lambda x, y: (x + y, x * y)[0], x, 2 * x)
    codes = codes_of(program, 8)
    split = on(LINE, P("d"), codes[0]), codes[1]
    check(program.codes, oracle(program, codes), P("d"), "", *split)


def check_donated() -> None:
    """The memory of an input is that of an output."""
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("f")
    program = lowered(lambda x: (jnp.flip(x, 1), x), x)
    codes = codes_of(program, 8)
    run = jax.jit(program.codes, donate_argnums=0)
    flipped, same = run(on(LINE, P("d"), codes[0]))
    np.testing.assert_array_equal(flipped, codes[0][:, ::-1])
    np.testing.assert_array_equal(same, codes[0])


def check_caches(make: Any) -> None:
    """Caches of compiled programs tell two programs apart, of other weights alone."""
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
        for sign in (1, -1, 1):
            program = make(sign)
            codes = codes_of(program, 12)
            found = program.codes(on(LINE, P("d"), codes[0]))
            np.testing.assert_array_equal(found, oracle(program, codes))
            assert os.listdir(folder)


def check_meeting() -> None:
    """Examples that meet are gathered."""
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("f")
    program = lowered(lambda x: x - jnp.flip(x, 0), x)
    codes = codes_of(program, 8)
    x = on(LINE, P("d"), codes[0])
    check(program.codes, oracle(program, codes), P(), "all-gather", x)


if __name__ == "__main__":
    assert len(DEVICES) == 4
    normal = lambda *n: np.random.default_rng(0).normal(size=n).astype("f")
    kernel, wide = 0.1 * normal(4, 5), (0.1 * normal(512, 600), 0.1 * normal(600, 8))
    small = lowered(lambda x: jax.nn.relu(x @ kernel), normal(8, 4))
    check_meshes(small)
    check_surroundings(small)
    # Examples share its kernels, another number of them on each device.
    make = lambda sign: lowered(
        lambda x: jax.nn.gelu(x @ (sign * wide[0])) @ wide[1], normal(8, 512)
    )
    check_meshes(make(1))
    check_two_inputs()
    check_donated()
    check_meeting()
    check_caches(make)
