"""What is done to an input before it is quantized is kept, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]

KERNEL = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)


def point(x, scale=2.0**-5, bits=8, site="", zero=0):
    params = QParams(jnp.float32(scale), jnp.int32(zero))
    return fake_quant(x, params, QSpec(bits), site=site)


def integers(dtype, *shape):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


MOVES = {
    "swapped": lambda u: u.transpose(0, 2, 1),
    "turned round": lambda u: u[:, :, ::-1],
    "half": lambda u: u[:, :4],
    "every other": lambda u: u[:, ::2],
    "flat and back": lambda u: u.reshape(2, 64).reshape(2, 8, 8)[:, ::-1],
    "wider type": lambda u: u.astype(jnp.int32).transpose(0, 2, 1),
    "padded": lambda u: jnp.pad(u, ((0, 0), (1, 0), (0, 0)))[:, :8],
    "new axis": lambda u: u[:, None, :, :][:, 0],
}


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "uint8") for name in MOVES), ("swapped", "int8"), ("half", "bool")],
)
def test_moves_of_integers_before_their_cast(name, dtype):
    fn = lambda p, u: (MOVES[name](u).astype(jnp.float32) / 255.0) @ p["w"]
    u, params = integers(dtype, 2, 8, 8), {"w": KERNEL}
    scheme = qjax.Scheme(
        qjax.QSpec(8, narrow_range=True, axis=-1, power_of_two=True),
        qjax.QSpec(8, power_of_two=True),
    )
    qmodel = qjax.quantize_model(fn, params, u, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [u])
    program = qjax.lower(qmodel, params, qstate, u)
    assert qjax.verify(program, qmodel, params, qstate, u).is_exact
    np.testing.assert_array_equal(program(u), jax.jit(qmodel.apply)(params, qstate, u))
    off = np.abs(np.asarray(program(u)) - np.asarray(fn(params, jnp.asarray(u))))
    assert off.max() < 0.1 * np.abs(np.asarray(program(u))).max() + 1e-6


ARITHMETIC = {
    "sum that wraps": lambda u: u + np.uint8(100),
    "double": lambda u: u * np.uint8(2),
    "narrower type": lambda u: u.astype(jnp.int8),
    "comparison": lambda u: u > np.uint8(77),
    "moved between": lambda u: (u + np.uint8(9))[:, ::-1] * np.uint8(3),
    "chosen": lambda u: jnp.where(u > np.uint8(77), u, np.uint8(5)),
    "half precision": lambda u: u.astype(jnp.float16) * np.float16(0.1),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_of_integers_before_their_cast(name):
    fn = lambda u: point(ARITHMETIC[name](u).astype(jnp.float32), 1.0, 16, zero=5)
    u = integers("uint8", 4, 8)
    try:
        program = qjax.lower(fn, u)
    except NotImplementedError as error:
        assert name == "half precision" and "float32 arithmetic" in str(error)
        return
    np.testing.assert_array_equal(program(u), fn(jnp.asarray(u)))


CUTS = {
    "scaled": lambda x: (x * 0.3).astype(jnp.int8),
    "shifted": lambda x: (x + 0.5).astype(jnp.int32),
    "moved": lambda x: (x * 0.3).astype(jnp.int32)[:, ::-1] * 2,
    "by an array": lambda x: (x * jnp.full((4, 8), 0.3)).astype(jnp.int8),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cast_of_what_has_another_unit_cuts_it(name):
    fn = lambda x: point(CUTS[name](x.astype(jnp.float32)).astype(jnp.float32), 1.0)
    x = integers("int8", 4, 8)
    np.testing.assert_array_equal(qjax.lower(fn, x)(x), jax.jit(fn)(x))


def test_arithmetic_of_32_bits_that_float32_rounds_is_refused():
    fn = lambda u: point((u + 1).astype(jnp.float32))
    u = np.arange(8, dtype=np.int32).reshape(2, 4)
    with pytest.raises(ValueError, match=r"Pass the input as uint8(.|\n)*clip"):
        qjax.lower(fn, u)
    bounded = lambda u: point(jnp.clip(u + 1, 0, 255).astype(jnp.float32))
    np.testing.assert_array_equal(qjax.lower(bounded, u)(u), bounded(u))
    narrow = lambda u: point((u + np.int16(1)).astype(jnp.float32))
    program = qjax.lower(narrow, np.int16(u))
    np.testing.assert_array_equal(program(np.int16(u)), narrow(jnp.int16(u)))


CASTS = {
    "int32": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "bfloat16": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 2),
    "comparison": lambda x: (x > 0.3).astype(jnp.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_of_real_inputs_are_refused_and_the_remedy_lowers(name):
    x = np.float32([[-1.7, 0.2, 1.1, 3.9]])
    with pytest.raises((NotImplementedError, ValueError)) as error:
        qjax.lower(lambda x: point(CASTS[name](x)), x)
    assert "quantize" in str(error.value).lower()
    fn = lambda x: point(CASTS[name](point(x, site="x")), site="y")
    if name == "bfloat16":
        return  # Arithmetic in half precision has no integers.
    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), fn(jnp.asarray(x)))


@pytest.mark.parametrize("bits", [(8, 2), (8, 23), (5, 10)])
def test_reduced_precision_of_codes(bits):
    x = np.linspace(-4, 4, 256, dtype=np.float32).reshape(2, 128)
    fn = lambda x: point(lax.reduce_precision(point(x, site="a"), *bits), site="b")
    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), fn(jnp.asarray(x)))


def test_a_pad_before_an_offset_is_refused():
    x = np.float32([[0.2, 1.1, 0.9]])
    fn = lambda x: point(jnp.pad(x, ((0, 0), (1, 1))) - 0.5)
    with pytest.raises(ValueError, match="Quantize the input before it is padded"):
        qjax.lower(fn, x)
    other = lambda x: point(jnp.pad(point(x, site="x"), ((0, 0), (1, 1))) - 0.5)
    np.testing.assert_array_equal(qjax.lower(other, x)(x), other(jnp.asarray(x)))


def test_a_pad_before_a_grid_without_zero():
    u = integers("int8", 3, 4)
    for zero in (-9, 0, 3):  # The codes of 2 bits are -2 to 1.
        grid = QParams(jnp.float32(0.3), jnp.int32(zero))
        fn = lambda u, grid=grid: fake_quant(
            jnp.pad(u, ((0, 0), (1, 0))).astype(jnp.float32), grid, QSpec(2)
        )
        np.testing.assert_array_equal(qjax.lower(fn, u)(u), fn(jnp.asarray(u)))


def test_rows_that_are_not_there_are_refused():
    table = jnp.asarray(KERNEL)
    ids = np.int32([[0, 7, -8, 3]])
    program = qjax.lower(lambda i: jnp.take(point(table, site="t"), i, axis=0), ids)
    wanted = jnp.take(point(table), ids, axis=0)
    np.testing.assert_array_equal(program(ids), wanted)
    for bad in (8, -9, 2**31 - 1):
        with pytest.raises(ValueError, match=r"must lie in \[-8, 7\]"):
            program(np.int32([[0, 0, 0, bad]]))
    # Where the model takes the end row itself, so does the program.
    held = lambda i: jnp.take(point(table, site="t"), i, axis=0, mode="clip")
    wild = np.int32([[0, 100, -5, 3]])
    np.testing.assert_array_equal(qjax.lower(held, ids)(wild), held(wild))


@pytest.mark.parametrize(
    "row",
    [
        lambda t, i: jnp.take(t, i, axis=0, mode="wrap"),
        lambda t, i: t[i % 8],
        lambda t, i: jnp.take(t, i.astype(jnp.int8), axis=0, mode="clip"),
    ],
    ids=["wrap", "remainder", "narrow"],
)
def test_rows_that_the_model_counts_another_way(row):
    ids, table = np.int32([[0, 7, 3]]), jnp.asarray(KERNEL)
    fn = lambda i: row(point(table, site="t"), i)
    program = qjax.lower(fn, ids)
    np.testing.assert_array_equal(program(ids), fn(jnp.asarray(ids)))
    wild = np.int32([[0, 257, 300], [-9, -300, 2**31 - 1]])
    np.testing.assert_array_equal(program(wild), fn(jnp.asarray(wild)))


def test_known_places_that_are_not_there_are_refused():
    fn = lambda x: jnp.take(point(x), jnp.array([0, 99]), axis=1)
    with pytest.raises(ValueError, match="not there"):
        qjax.lower(fn, np.ones((2, 3), np.float32))


@pytest.mark.parametrize("move", [lambda i: i.T, lambda i: i[:, ::-1], lambda i: i[1:]])
def test_moved_places(move):
    table, ids = jnp.asarray(KERNEL), np.int32([[0, 7, -8], [1, 2, 3]])
    fn = lambda i: point(table, site="t")[move(i)]
    np.testing.assert_array_equal(qjax.lower(fn, ids)(ids), fn(jnp.asarray(ids)))
