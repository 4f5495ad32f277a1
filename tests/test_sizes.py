"""Leading sizes at call time: right for any size, or fixed, with the equation named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from tests.models import images

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


def point(x, scale=2.0**-5, bits=8, site=""):
    params = QParams(jnp.float32(scale), jnp.int32(0))
    return fake_quant(x, params, QSpec(bits), site=site)


def _adjacent(x):
    """A graph network: neighbours are summed by a matrix over nodes."""
    edges = np.float32([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    return point(point(jnp.asarray(edges), 1.0) @ point(x), 2.0**-4, site="y")


FREE = {
    "elementwise": lambda x: point(jnp.tanh(point(x)), site="y"),
    "tail": lambda x: point(x)[1:],
    "every other": lambda x: point(x)[::2],
    "turned round": lambda x: point(x)[::-1],
    "transposed": lambda x: point(x).T,
    "pairs": lambda x: point(x).reshape(-1, 3),
    "ones of its size": lambda x: point(point(x) + jnp.ones((len(x), 1)), site="y"),
}
FIXED = {
    "head": (lambda x: point(x)[:-1], "slice"),
    "one row": (lambda x: point(x).reshape(1, -1), "reshape"),
    "halves": (lambda x: point(x).T.reshape(2, -1), "reshape"),
    "times its size": (lambda x: point(x) * x.shape[0], "mul"),
    "at most two": (lambda x: point(x)[:2], "slice"),
    "at most eight": (lambda x: point(x)[:8], "outputs"),
    "times what it is at most": (lambda x: point(x) * min(len(x), 4), "mul"),
    "at least three": (
        lambda x: jnp.pad(point(x), ((0, max(0, 3 - len(x))), (0, 0))),
        "pad",
    ),
    "mean of examples": (lambda x: point(point(x).mean(0), site="y"), "div"),
    "rolled": (lambda x: jnp.roll(point(x), 1, 0), "slice"),
    "picked": (lambda x: point(x)[jnp.array([2, 0, 0])], "add"),
    "constants by example": (
        lambda x: point(
            point(x) @ point(jnp.eye(6), 1.0) + jnp.arange(24.0).reshape(4, 6) / 7,
            site="y",
        ),
        "add",
    ),
    "nodes": (_adjacent, "dot_general"),
}


@pytest.mark.parametrize("name", FREE)
def test_a_free_size_computes_what_the_model_computes(name):
    fn, x = FREE[name], images(4, 6)
    program = qjax.lower(fn, x)
    for size in (4, 2, 7):
        other = images(size, 6, seed=size)
        np.testing.assert_array_equal(program(other), jax.jit(fn)(other))


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_size_is_refused_at_the_call(name, tmp_path):
    (fn, equation), x = FIXED[name], images(4, 6)
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).outputs[0].max_difference <= 1
    program.save(tmp_path / "m.qjax")
    for p in (program, qjax.load(tmp_path / "m.qjax")):
        np.testing.assert_array_equal(p(x), program(x))
        for size in (2, 8):
            with pytest.raises(ValueError, match="leading size is fixed by") as error:
                p(images(size, 6))
            assert equation in str(error.value)
            codes = np.zeros((size, 6), np.int8)
            with pytest.raises(ValueError, match="leading size is fixed by"):
                p.codes(codes)


def test_inputs_that_were_equal_stay_equal():
    fn = lambda a, b: point(point(a, site="a") + point(b, site="b"), site="y")
    program = qjax.lower(fn, images(4, 6), images(4, 6))
    a, b = images(7, 6), images(7, 6, seed=2)
    np.testing.assert_array_equal(program(a, b), fn(a, b))
    with pytest.raises(ValueError, match="had the same leading size .* got 7 and 1"):
        program(a, b[:1])


def test_inputs_of_different_sizes_vary_apart():
    fn = lambda a, b: point(point(a, site="a") @ point(b, site="b").T, 0.5, site="y")
    program = qjax.lower(fn, images(4, 6), images(3, 6))
    for sizes in ((4, 3), (2, 5), (3, 3)):
        pair = [images(n, 6, seed=n) for n in sizes]
        np.testing.assert_array_equal(program(*pair), fn(*pair))


def test_an_input_that_is_stretched_keeps_its_size():
    fn = lambda a, b: point(point(a, site="a") + point(b, site="b"), site="y")
    program = qjax.lower(fn, images(4, 6), images(1, 6))
    a, b = images(7, 6), images(1, 6, seed=2)
    np.testing.assert_array_equal(program(a, b), fn(a, b))
    with pytest.raises(ValueError, match=r"must have shape \(1, 6\), got \(7, 6\)"):
        program(a, a)


@pytest.mark.parametrize("size", [4, 5])
def test_a_model_that_asks_whether_its_size_is_even_is_fixed(size):
    """What a model does for some sizes alone shows at a size of the other parity."""

    def fn(x):
        x = qjax.fake_quant(x, QParams(jnp.float32(0.25), jnp.int32(0)), QSpec(8))
        return x.reshape(-1, 2) if x.size % 2 == 0 else x

    program = qjax.lower(fn, np.ones((size, 3), np.float32))
    with pytest.raises(ValueError, match="leading size is fixed by"):
        program(np.ones((size + 1, 3), np.float32))


ROWS = {
    "rows": lambda x, k: x[jnp.arange(len(x)), k],
    "places after rows": lambda x, k: x.T[k, jnp.arange(len(x))],
    "several": lambda x, k: x[jnp.arange(len(x))[:, None], jnp.stack([k, k // 2], 1)],
    "written": lambda x, k: x.at[jnp.arange(len(x)), k].set(0.0),
    "added": lambda x, k: x.at[jnp.arange(len(x)), k].add(x[:, 1]),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_place_of_each_example_fixes_no_size(name):
    fn = lambda x, k: point(ROWS[name](point(x, site="x"), k), 2.0**-4, site="y")
    program = qjax.lower(fn, images(4, 6), np.int32([3, 0, 5, 1]))
    for size in (4, 1, 7):
        x, k = images(size, 6, seed=size), np.arange(2, 2 + 3 * size, 3, np.int32) % 6
        np.testing.assert_array_equal(program(x, k), jax.jit(fn)(x, k))


def test_known_rows_in_another_order_fix_the_size():
    fn = lambda x, k: point(x)[jnp.arange(len(x))[::-1], k]
    x, k = images(4, 6), np.int32([3, 0, 5, 1])
    program = qjax.lower(fn, x, k)
    np.testing.assert_array_equal(program(x, k), jax.jit(fn)(x, k))
    with pytest.raises(ValueError, match="leading size is fixed by"):
        program(x[:2], k[:2])
