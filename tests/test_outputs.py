"""Outputs that depend on no input: weights and constants that a model returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
PARAMS = {"k": X[:4, :2] / 3}


@pytest.mark.parametrize("scheme", [None, qjax.presets.w4a8()])
def test_constants_that_a_model_returns_are_values_of_the_program(scheme, tmp_path):
    def fn(params, x):
        constants = jnp.float32([1.5, 2.25]), jnp.arange(3), jnp.array([True, False])
        return x @ params["k"], params["k"], constants

    qmodel = qjax.quantize_model(fn, PARAMS, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, PARAMS, [X])
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    program.save(tmp_path / "model.qjax")
    wanted = jax.jit(qmodel.apply)(PARAMS, qstate, X)
    for own in (program, qjax.load(tmp_path / "model.qjax")):
        _, weight, constants = own(X[:3])
        np.testing.assert_array_equal(weight, wanted[1])
        for found, constant in zip(constants, wanted[2], strict=True):
            assert found.dtype == constant.dtype
            np.testing.assert_array_equal(found, constant)
    assert (
        qjax.verify(program, qmodel, PARAMS, qstate, X).outputs[1].max_difference == 0
    )


@pytest.mark.parametrize("constant", [np.float32([1e-20, 1e20]), np.uint32(4 * 10**9)])
def test_constants_that_no_codes_hold_are_refused(constant):
    returned = lambda params, x: (x @ params["k"], jnp.asarray(constant))
    alone = lambda params, x: returned(params, x)[0]  # The remedy.
    for fn in (returned, alone):
        qmodel = qjax.quantize_model(fn, PARAMS, X)
        qstate = qjax.calibrate(qmodel, PARAMS, [X])
        if fn is returned:
            with pytest.raises(ValueError, match="Output 1 of the function depends on"):
                qjax.lower(qmodel, PARAMS, qstate, X)
        else:
            program = qjax.lower(qmodel, PARAMS, qstate, X)
            assert jax.tree.structure(program(X)) == jax.tree.structure(0)
