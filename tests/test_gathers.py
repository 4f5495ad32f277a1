"""Gathers, scatters, sorts and whole numbers: their records and their bodies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.backends.xla import run as xla
from qjax.graph.builder import GraphBuilder
from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.arithmetic import COMPARED, TYPES, ends_of


def integers(low, high, *shape, seed=0, dtype=np.int32):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


# Records and bodies.


def computed(operation, inputs, attributes):
    """Body and meaning of one node; the builder checks shape and interval."""
    builder = GraphBuilder()
    for x in inputs:
        ends = int(x.min(initial=0)), int(x.max(initial=0))
        builder.add_value(x.shape, *ends, dtype=str(x.dtype))
    out = builder.add(operation, range(len(inputs)), attributes)
    graph = builder.graph(tuple(range(len(inputs))), (out,))
    body = jax.jit(lambda *xs: xla.run(graph, {}, xs)[out])
    found = np.asarray(body(*map(jnp.asarray, inputs)))
    wide = [x.astype(np.int64) for x in inputs]
    meaning = OPERATIONS[operation].meaning(attributes, {}, wide)
    value = graph.values[out]
    assert found.shape == meaning.shape == value.shape
    np.testing.assert_array_equal(found.astype(np.int64), meaning)
    if meaning.size:
        assert value.low <= meaning.min() and meaning.max() <= value.high
    return meaning


PAIRS = ("add", "sub", "mul", "div", "rem", "max", "min", "and", "or", "xor", *COMPARED)
SHIFTS = ("shift_left", "shift_right_arithmetic", "shift_right_logical")
IN_LAX = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}


def of_lax(kind, *pair):
    found = getattr(lax, IN_LAX.get(kind, kind))(*map(jnp.asarray, pair))
    return np.asarray(found).astype(np.int64)


@pytest.mark.parametrize("dtype", [t for t in TYPES if t != "bool"])
def test_arithmetic_is_that_of_the_type(dtype):
    """All pairs of bytes, and of corners and random numbers of wider types."""
    low, high = ends_of(dtype)
    if high - low < 256:
        numbers = np.arange(low, high + 1)
    else:
        corners = [low, low + 1, -1, 0, 1, 2, 3, 7, 31, 32, 33, high - 1, high]
        numbers = np.r_[[n for n in corners if low <= n], integers(low, high, 80)]
    pair = [x.astype(dtype) for x in np.meshgrid(numbers, numbers)]
    for kind in (*PAIRS, *SHIFTS):
        found = computed("arithmetic", pair, {"kind": kind, "dtype": dtype})
        np.testing.assert_array_equal(found, of_lax(kind, *pair), err_msg=kind)
    for kind in ("neg", "sign", "abs")[: 3 if low < 0 else 2]:
        found = computed("arithmetic", pair[:1], {"kind": kind, "dtype": dtype})
        np.testing.assert_array_equal(found, of_lax(kind, pair[0]), err_msg=kind)
    for other in TYPES:
        x = pair[0]
        found = computed("arithmetic", [x], {"kind": "convert", "dtype": other})
        wanted = np.asarray(jnp.asarray(x).astype(other)).astype(np.int64)
        np.testing.assert_array_equal(found, wanted, err_msg=other)


def test_arithmetic_of_truth_values():
    pair = [np.int8([0, 0, 1, 1]), np.int8([0, 1, 0, 1])]
    of = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "xor": [0, 1, 1, 0]}
    for kind, wanted in of.items():
        found = computed("arithmetic", pair, {"kind": kind, "dtype": "bool"})
        np.testing.assert_array_equal(found, wanted)
    found = computed("arithmetic", pair[:1], {"kind": "not", "dtype": "bool"})
    np.testing.assert_array_equal(found, [1, 1, 0, 0])


@pytest.mark.parametrize("narrow", [(0, 1), (-3, 9), (5, 6), (-7, -2), (-(2**31), 5)])
def test_intervals_of_arithmetic_hold_what_numbers_give(narrow):
    """`computed` compares the interval of the record with all results."""
    x = np.int32(np.linspace(*narrow, 16, dtype=np.int64))[:, None]
    for other in ([1, 2, 3], [-3, 0, 3], [4], [-1]):
        pair = [*np.broadcast_arrays(x, np.int32(other))]
        for kind in (*PAIRS, *SHIFTS):
            computed("arithmetic", pair, {"kind": kind, "dtype": "int32"})


GATHERS = {
    "rows": (lambda x, i: x[i], (7, 3), (5,)),
    "pairs": (lambda x, i: x[i, i + 1], (7, 3), (5,)),
    "columns": (lambda x, i: x[:, i], (7, 3), (2, 2)),
    "along": (
        lambda x, i: jnp.take_along_axis(x, i, 1, mode="clip"),
        (4, 3),
        (4, 5),
    ),
    "filled": (lambda x, i: jnp.take(x, i, 0, fill_value=9), (7, 3), (5,)),
    "vmapped": (jax.vmap(lambda x, i: x[i]), (4, 7, 3), (4, 2)),
    "of a vmapped slice": (
        jax.vmap(lambda x, i: lax.dynamic_slice(x, (i,), (2,))),
        (4, 7),
        (4,),
    ),
}


def equations(fn, *args):
    """All equations of a function at any depth, with what they read."""
    closed = jax.make_jaxpr(fn)(*args)

    def walk(jaxpr, env):
        read = lambda v: v.val if hasattr(v, "val") else env[v]
        for eqn in jaxpr.eqns:
            own = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr")
            if inner is not None:
                inside = dict(zip(inner.jaxpr.invars, own, strict=True))
                inside |= dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
                yield from walk(inner.jaxpr, inside)
                found = jax.core.eval_jaxpr(inner.jaxpr, inner.consts, *own)
            else:
                found = eqn.primitive.bind(*own, **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
                yield eqn, own, found
            env.update(zip(eqn.outvars, found, strict=True))

    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, map(jnp.asarray, args), strict=True))
    yield from walk(closed.jaxpr, env)


@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.parametrize("name", GATHERS)
def test_a_gather_reads_what_jax_reads(name, mode):
    fn, shape, places = GATHERS[name]
    x = integers(-100, 100, *shape, dtype=np.int8)
    i = integers(-2, 9, *places, seed=1)  # Some beyond the ends.
    (case,) = [c for c in equations(fn, x, i) if c[0].primitive.name == "gather"]
    eqn, (own, at), _ = case
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fields = "offset_dims collapsed_slice_dims start_index_map operand_batching_dims"
    attributes = {
        k: list(getattr(numbers, k))
        for k in (*fields.split(), "start_indices_batching_dims")
    }
    attributes |= {"slice_sizes": list(sizes), "mode": mode, "fill": -101}
    found = computed("gather", [np.asarray(own), np.asarray(at)], attributes)
    wanted = lax.gather(own, at, numbers, sizes, mode=mode, fill_value=-101)
    np.testing.assert_array_equal(found, wanted)


SCATTERS = {
    "rows": (lambda x, i, u, how: how(x.at[i])(u), (7, 3), (5,), (5, 3)),
    "columns": (lambda x, i, u, how: how(x.at[:, i])(u), (7, 4), (2, 2), (7, 2, 2)),
    "numbers": (lambda x, i, u, how: how(x.at[i, i % 3])(u), (7, 3), (5,), (5,)),
    "vmapped": (
        lambda x, i, u, how: jax.vmap(lambda x, i, u: how(x.at[i])(u))(x, i, u),
        (4, 7, 3),
        (4, 6),
        (4, 6, 3),
    ),
}


@pytest.mark.parametrize("mode", ["drop", "clip"])
@pytest.mark.parametrize("is_sum", [True, False])
@pytest.mark.parametrize("name", SCATTERS)
def test_a_scatter_puts_what_jax_puts(name, is_sum, mode):
    fn, shape, places, given = SCATTERS[name]
    x, u = integers(-9, 9, *shape), integers(-9, 9, *given, seed=1)
    i = integers(-2, 9, *places, seed=2)
    how = lambda at: lambda v: (at.add if is_sum else at.set)(v, mode=mode)
    primitive = "scatter-add" if is_sum else "scatter"
    (case,) = [
        c
        for c in equations(lambda x, i, u: fn(x, i, u, how), x, i, u)
        if c[0].primitive.name == primitive
    ]
    eqn, (own, at, updates), (wanted,) = case
    d = eqn.params["dimension_numbers"]
    attributes = {
        "update_window_dims": list(d.update_window_dims),
        "inserted_window_dims": list(d.inserted_window_dims),
        "scatter_dims": list(d.scatter_dims_to_operand_dims),
        "operand_batching_dims": list(d.operand_batching_dims),
        "scatter_indices_batching_dims": list(d.scatter_indices_batching_dims),
        "mode": mode,
    }
    arrays = [np.asarray(v) for v in (at, own, updates)]
    if not is_sum:
        found = computed("scatter", arrays, attributes)
        np.testing.assert_array_equal(found, wanted)
        return
    attributes |= {
        "sizes": list(own.shape),
        "input_zero_point": 0,
        "most_updates": 10,
    }
    found = computed("scatter_add", [arrays[0], arrays[2]], attributes)
    np.testing.assert_array_equal(found + arrays[1], wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_sorts_keep_the_order_of_equal_codes(axis):
    x = integers(-3, 3, 9, 8, dtype=np.int8)
    np.testing.assert_array_equal(
        computed("sort", [x], {"axis": axis}), jnp.sort(x, axis)
    )
    for descending in (False, True):
        found = computed("argsort", [x], {"axis": axis, "descending": descending})
        wanted = jnp.argsort(x, axis, descending=descending, stable=True)
        np.testing.assert_array_equal(found, wanted)
    least = np.full((2, 3), -(2**31), np.int32)
    computed("argsort", [least], {"axis": 0, "descending": True})
