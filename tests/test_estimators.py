"""Each estimator: its formula in NumPy, the same forward, Hessian-vector products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.estimators import clipped_ste, ewgs, make_estimator, plain_ste, soft_rounding

SCALE, ZERO, SPEC = np.float32(0.25), 2, QSpec(4)
GRID = QParams(jnp.float32(SCALE), jnp.int32(ZERO))
X = np.float32([*np.linspace(-4, 3, 141), 1e30, -1e30, np.inf, -np.inf, 0.0])
DY = np.float32(np.random.default_rng(0).normal(size=X.shape))
U = np.clip(X.astype(np.float64) / SCALE, -(2.0**31), 2.0**31)
INSIDE = (np.rint(U) + ZERO >= -8) & (np.rint(U) + ZERO <= 7)


def _tanh_slope(k):
    h = lambda u: (
        np.floor(u) + 0.5 + np.tanh(k * (u - np.floor(u) - 0.5)) / (2 * np.tanh(k / 2))
    )
    step = 1e-6  # The slope of the staircase by differences, inside a step.
    inner = np.clip(U - np.floor(U), 2 * step, 1 - 2 * step) + np.floor(U)
    return (h(inner + step) - h(inner - step)) / (2 * step)


CASES = {
    "clipped_ste": (clipped_ste, np.where(INSIDE, DY, 0)),
    "plain_ste": (plain_ste, DY),
    "soft_rounding": (soft_rounding(4.0), np.where(INSIDE, DY * _tanh_slope(4.0), 0)),
    "soft_rounding_flat": (soft_rounding(1e-3), np.where(INSIDE, DY, 0)),
    "ewgs": (
        ewgs(0.3),
        np.where(INSIDE, DY * (1 + 0.3 * np.sign(DY) * (U - np.rint(U))), 0),
    ),
    "ewgs_0": (ewgs(0.0), np.where(INSIDE, DY, 0)),
    "own": (
        make_estimator(
            lambda u, inside: inside, lambda m, dy: jnp.where(m, 2 * dy, dy)
        ),
        np.where(INSIDE, 2 * DY, DY),
    ),
}


def _point(estimator):
    return lambda x: fake_quant(x, GRID, SPEC, estimator=estimator)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_formula(name):
    estimator, wanted = CASES[name]
    f = lambda x: jnp.sum(_point(estimator)(x) * DY)
    for grad in (jax.grad(f), jax.jit(jax.grad(f))):
        np.testing.assert_allclose(grad(X), wanted, rtol=1e-4, atol=1e-5)
    rows = jax.vmap(jax.grad(lambda x, d: _point(estimator)(x) * d))(X, DY)
    np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass_is_the_same(name):
    wanted = _point(None)(X)
    np.testing.assert_array_equal(_point(CASES[name][0])(X), wanted)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_keeps_its_type(name):
    x = jnp.asarray(X, jnp.bfloat16)
    y, pull = jax.vjp(_point(CASES[name][0]), x)
    assert y.dtype == pull(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products(name):
    x = X[:141]
    loss = lambda x: jnp.sum(_point(CASES[name][0])(x) ** 3)
    _, hvp = jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))
    assert np.all(np.isfinite(hvp)) and np.any(hvp != 0)


def test_a_scheme_has_an_estimator():
    fn = lambda params, x: jnp.sum(x @ params)
    params, x = jnp.float32([[0.3], [-1.0]]), jnp.float32([[1.0, 0.5]])
    grads = []
    for estimator in (clipped_ste, ewgs(0.5)):
        scheme = qjax.Scheme(qjax.QSpec(3, narrow_range=True), estimator=estimator)
        qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
        grads.append(jax.grad(lambda p, q=qmodel, s=qstate: q.apply(p, s, x))(params))
    assert np.any(grads[0] != grads[1])


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match="`sharpness` must be positive"):
        soft_rounding(bad)
    if bad != 0:
        with pytest.raises(ValueError, match="`delta` must be finite"):
            ewgs(bad)
