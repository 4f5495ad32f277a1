"""Inputs that are returned, multiplied by 0 or masked at random: right, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X, W = (np.float32(RNG.normal(0, 1, n)) for n in ((6, 8), (8, 8)))


def lowered(fn, *args):
    qmodel = qjax.quantize_model(fn, W, *args)
    qstate = qjax.calibrate(qmodel, W, [args if len(args) > 1 else args[0]])
    program = qjax.lower(qmodel, W, qstate, *args)
    found = qjax.verify(program, qmodel, W, qstate, *args)
    assert all(row.max_difference <= 1 for row in found.sites.values()), f"\n{found}"
    return program


@pytest.mark.parametrize("returned", ["as it is", "moved"])
def test_whole_numbers_come_back(returned):
    tokens, truths = np.arange(6, dtype=np.int32), X > 0
    move = (lambda t: t.reshape(2, 3)) if returned == "moved" else lambda t: t
    program = lowered(lambda p, x, t, m: (x @ p, move(t), m), X, tokens, truths)
    _, found, same = program(X, tokens, truths)
    np.testing.assert_array_equal(found, move(tokens))
    np.testing.assert_array_equal(same, truths)
    assert found.dtype == tokens.dtype and same.dtype == bool
    assert_equals_oracle(program, X, tokens, truths)


def point(x, scale):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return qjax.fake_quant(x, grid, qjax.QSpec(8))


def test_a_real_input_comes_back_on_a_grid_alone():
    fn = lambda x: (x, point(x, 0.05) @ point(W, 0.02))
    with pytest.raises(ValueError, match="Output 0 is input 0 of the program as it is"):
        qjax.lower(fn, X)
    fn = lambda x: (point(x, 0.05), point(x, 0.05) @ point(W, 0.02))
    program = qjax.lower(fn, X)
    np.testing.assert_array_equal(program(X)[0], point(X, 0.05))


def test_an_input_times_0_is_refused_with_what_to_write():
    fn = lambda x: point(x * 0.0, 0.05) @ point(W, 0.02)
    with pytest.raises(ValueError, match="multiplied by 0, which") as error:
        qjax.lower(fn, X)
    assert "`jnp.zeros_like(x)`" in str(error.value)
    program = lowered(lambda p, x: jnp.zeros_like(x) @ p + x @ p, X)
    assert_equals_oracle(program, X)


def test_a_mask_that_a_model_draws_is_refused_and_one_that_is_given_lowers():
    draw = lambda: jax.random.bernoulli(jax.random.key(0), 0.5, X.shape)
    mask = np.float32(draw())
    with pytest.raises(ValueError, match="drops values by a mask of random") as error:
        lowered(lambda p, x: (x * draw().astype(x.dtype)) @ p, X)
    assert "draw it outside of the model" in str(error.value)
    program = lowered(lambda p, x: (x * mask) @ p, X)
    found = qjax.lower(lambda x: point(x, 2.0**-5) * point(mask, 1.0), X)(X)
    np.testing.assert_array_equal(found, point(X, 2.0**-5) * mask)
    assert_equals_oracle(program, X)
