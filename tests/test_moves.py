"""Moves, joins and constants of codes, against NumPy on the codes themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.graph.reference import run
from qjax.lowering.constants import codes_on, exact_grid


def point(x, scale=2.0**-5, site="a", bits=8, zero_point=0):
    symmetric = zero_point == 0
    spec = QSpec(bits, symmetric=symmetric)
    return fake_quant(
        x, QParams(jnp.float32(scale), jnp.int32(zero_point)), spec, site=site
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def real(x, scale=2.0**-5):
    """What an 8-bit point makes of values, in NumPy."""
    return (np.clip(np.rint(x / scale), -128, 127) * scale).astype(np.float32)


ONE = normal(4, 3)
ROWS = ONE.reshape(4, 1, 1, 3)

# Codes in, codes out: JAX and NumPy side by side, for values [batch, 4, 3].
MOVES = {
    "stack": (
        lambda x: jnp.stack([x, x[:, ::-1]], 1),
        lambda x: np.stack([x, x[:, ::-1]], 1),
    ),
    "unstack": (lambda x: jnp.unstack(x, axis=1)[2], lambda x: x[:, 2]),
    "tile": (lambda x: jnp.tile(x, (1, 2, 3)), lambda x: np.tile(x, (1, 2, 3))),
    "repeat": (lambda x: jnp.repeat(x, 2, 1), lambda x: np.repeat(x, 2, 1)),
    "cumsum": (lambda x: jnp.cumsum(x, 1), lambda x: np.cumsum(x, 1)),
    "back": (
        lambda x: lax.cumsum(x, 2, reverse=True),
        lambda x: np.cumsum(x[..., ::-1], 2)[..., ::-1],
    ),
    "cummax": (lambda x: lax.cummax(x, 1), lambda x: np.maximum.accumulate(x, 1)),
    "tril": (lambda x: jnp.tril(x), lambda x: np.tril(x)),
    "edge": (
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode="edge"),
        lambda x: np.pad(x, ((0, 0), (1, 2), (0, 0)), mode="edge"),
    ),
    "padded": (
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 2)), constant_values=-5.0),
        lambda x: np.pad(x, ((0, 0), (1, 1), (0, 2)), constant_values=-5),
    ),
    "state": (
        lambda x: jnp.concatenate([jnp.zeros((len(x), 1, 3)), x], 1),
        lambda x: np.concatenate([np.zeros((len(x), 1, 3)), x], 1),
    ),
    "flat": (lambda x: x.reshape(len(x), 12), lambda x: x.reshape(len(x), 12)),
    "taken": (lambda x: x[:, np.array([3, 0])], lambda x: x[:, [3, 0]]),
    "twice": (
        lambda x: jnp.concatenate([x, x[:, ::-1]], 1),
        lambda x: np.concatenate([x, x[:, ::-1]], 1),
    ),
    "told": (
        lambda x: (jnp.argmax(x, -1) == 0).astype(jnp.float32),
        lambda x: (x.argmax(-1) == 0).astype(np.float32),
    ),
    "chosen": (
        lambda x: jnp.where(x > 0.5, 0.75, -3.0),
        lambda x: np.where(x > 0.5, 0.75, -3.0),
    ),
}


@pytest.fixture(scope="module")
def moves():
    fn = lambda x: tuple(f(point(x)) for f, _ in MOVES.values())
    return qjax.lower(fn, np.zeros((2, 4, 3), np.float32))


@pytest.mark.parametrize("size", [2, 5, 1, 0])
def test_moves_of_codes_are_moves_of_values(moves, size):
    x = 2 * normal(size, 4, 3)
    for name, found in zip(MOVES, moves(x), strict=True):
        np.testing.assert_array_equal(found, MOVES[name][1](real(x)), err_msg=name)


def test_the_reference_and_the_report_know_them(moves):
    codes = np.random.default_rng(0).integers(-128, 128, (2, 4, 3))
    values = run(moves.graph, moves.params, [codes])
    found = moves.codes(codes)
    for v, q in zip(moves.graph.outputs, found, strict=True):
        np.testing.assert_array_equal(values[v], q)
    assert all(a.is_proven for a in moves.report().agreement.values())


def weight(*shape, scale=2.0**-6, site="k"):
    return point(normal(*shape, seed=1), scale, site)


GROWN = {
    "bias": lambda x: point(point(x) @ weight(3, 1) + ROWS[0], 2.0**-4, "b"),
    "factor": lambda x: point(point(x) @ weight(3, 1) * ROWS[1], 2.0**-4, "b"),
    "alike": lambda x: point(
        point(x)[..., :1] * point(jnp.full((1, 1, 3), 0.5), 2.0**-7, "c"), 2.0**-4, "b"
    ),
    "function": lambda x: point(jnp.tanh(point(x)[..., :1]) + ROWS[2], 2.0**-4, "b"),
    "moved": lambda x: point(
        (point(x) @ weight(3, 4)).swapaxes(1, 2)[:, 1:] + ONE.T[None, 1:2, :],
        2.0**-4,
        "b",
    ),
    "sum": lambda x: point(jnp.sum(point(x), 1) + ONE[:1], 2.0**-3, "b"),
    "average": lambda x: point(
        jnp.mean(point(x), 1, keepdims=True) * ONE[None], 2.0**-5, "b"
    ),
}


@pytest.fixture(scope="module")
def grown():
    """One program of them all, lowered for one example."""
    x = np.zeros((1, 4, 3), np.float32)
    fn = lambda x: tuple(f(x) for f in GROWN.values())
    return qjax.lower(fn, x), jax.jit(fn)


@pytest.mark.parametrize("size", [1, 6])
def test_values_grow_to_the_shape_of_constants(grown, size):
    program, fn = grown
    x = normal(size, 4, 3, seed=size)
    for name, found, wanted in zip(GROWN, program(x), fn(x), strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_a_leading_axis_grows_to_that_of_a_constant():
    fn = lambda x: point(point(x) @ weight(3, 2) + ONE[:, :2], 2.0**-4, "b")
    x = normal(1, 3)
    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), fn(x))
    with pytest.raises(ValueError, match="leading size is fixed"):
        program(normal(5, 3))


def test_axes_of_size_0():
    def fn(x, y):
        x = point(x)
        none = point(y, site="y")[:, :0]
        return (
            point(x @ weight(3, 0, site="o"), 2.0**-4, "b"),
            point(none @ weight(0, 2, site="i") + ONE[:1, :2], 2.0**-4, "c"),
            point(jnp.sum(none, -1), 2.0**-4, "d"),
            jnp.concatenate([none, none], 1),
            jnp.tanh(none) > 0,
        )

    x = normal(4, 3)
    program = qjax.lower(fn, x, x)
    for found, wanted in zip(program(x, x), fn(x, x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert program.report().float_values == ()
    with pytest.raises(ValueError, match=r"divides by zero(.|\n)*average over no"):
        qjax.lower(lambda x: point(jnp.mean(point(x)[:, :0], -1)), x)


def test_a_program_without_examples_is_lowered_for_any_number():
    fn = lambda x: point(x).reshape(len(x), -1) if len(x) else 1 // 0
    program = qjax.lower(fn, np.zeros((0, 2, 3), np.float32))
    x = normal(4, 2, 3)
    np.testing.assert_array_equal(program(x), real(x).reshape(4, 6))
    assert program(x[:0]).shape == (0, 6)
    with pytest.raises(ValueError, match="no example.*size is fixed by"):
        qjax.lower(lambda x: point(x).reshape(1, -1), np.zeros((0, 3), np.float32))


def test_sums_whose_zero_point_passes_int32():
    spec, n = QSpec(16, symmetric=False), 70_000
    params = QParams(jnp.float32(2.0**-15), jnp.int32(-32768))
    fn = lambda x: jnp.sum(jnp.clip(fake_quant(x, params, spec, site="a"), 0, 0.25), -1)
    x = np.abs(normal(1, n)) / 4
    program = qjax.lower(fn, x)
    wanted = np.rint(np.clip(x.astype(np.float64), 0, 0.25) * 2**15).sum() / 2**15
    assert program(x)[0] == np.float32(wanted)
    with pytest.raises(OverflowError, match="could reach"):
        qjax.lower(lambda x: jnp.sum(fake_quant(x, params, spec), -1), x)


def test_a_dead_channel_beside_tiny_ones():
    kernel = np.concatenate([np.zeros((6, 1)), 1e-12 * normal(6, 3)], 1).astype("f")
    x, fn = normal(8, 6), lambda p, x: jax.nn.relu(x @ p["k"])
    params = {"k": kernel}
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    found = np.asarray(program(x))
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_allclose(found, fn(params, x), atol=0.02 * found.max())
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(params, qstate, x), found
    )


def test_a_class_token_has_the_grid_of_the_site():
    x = normal(3, 5, 4)
    params = {"token": normal(1, 1, 4, seed=3), "k": normal(4, 2, seed=4)}

    def fn(p, x):
        token = jnp.broadcast_to(p["token"], (len(x), 1, 4))
        return jnp.concatenate([token, x], 1) @ p["k"]

    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    other = normal(7, 5, 4, seed=5)
    assert program(other).shape == (7, 6, 2)
    assert (
        qjax.verify(program, qmodel, params, qstate, other)
        .sites["concatenate_0/output"]
        .max_difference
        == 0
    )
    np.testing.assert_allclose(program(x), fn(params, x), atol=0.15)


def test_an_integer_input_on_two_grids_is_two_tables():
    u = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10

    def fn(u, m):
        u = u.astype(jnp.float32)
        y = point(u / 255, 2.0**-7, "a") + point(u / 128 - 1, 2.0**-6, "b")
        return jnp.where(m, point(y, 2.0**-5, "c"), 0.0)

    mask = u > 90
    program = qjax.lower(fn, u, mask)
    np.testing.assert_array_equal(program(u, mask), jax.jit(fn)(u, mask))


def test_exact_grids():
    values = np.float32([0.75, -3.0, 0.0, 1.5])
    scale, codes = exact_grid(values)
    assert scale == 0.75 and codes.tolist() == [1, -4, 0, 2]
    assert exact_grid(np.float32([0.1, 0.3])) is None  # 13421773 and 40265320 * 2^-27.
    assert exact_grid(np.zeros(3, np.float32))[1].tolist() == [0, 0, 0]
    assert exact_grid(np.float32([np.inf])) is None
    assert exact_grid(np.float32([1e-30, 1e30])) is None
    assert codes_on(np.float32([0.5, -0.25]), 0.25, 7).tolist() == [9, 6]
    assert codes_on(np.float32([0.3]), 0.25, 0) is None
    assert codes_on(np.float32([np.nan]), 0.25, 0) is None


def test_known_rows_of_a_weight_are_added():
    """`jnp.take` fills places that are not there with NaN: none of these are."""
    weight = np.float32(np.random.default_rng(0).normal(size=(6, 4)))
    params = {"rows": weight, "kernel": -weight}
    x = np.float32(np.random.default_rng(1).normal(size=(3, 6)))
    places = np.array([0, 2, 5])

    def fn(p, x):
        return jnp.take(p["rows"], places, axis=0) + jax.nn.relu(x @ p["kernel"])

    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(row.max_difference <= 1 for row in report.sites.values()), str(report)
    np.testing.assert_allclose(program(x), fn(params, x), atol=0.1)
