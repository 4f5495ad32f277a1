"""What several tests of one subject share."""

import jax
import numpy as np

import qjax.quantizers as qz

RNG = np.random.default_rng(0)


X = np.float32(RNG.normal(size=(12, 3)))


DY = np.float32(RNG.normal(size=X.shape))


def _same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), wanted)


def _close(got, wanted, atol=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=atol)


def _both(spec, estimator, dy, *arrays):
    y, pull = jax.vjp(lambda *a: qz.apply(spec, *a, estimator=estimator), *arrays)
    return y, pull(dy)


_compiled_both = jax.jit(_both, static_argnums=(0, 1))


def _pull(spec, x, *learned, dy=None, estimator=None):
    """Value and gradients, eager and under jit, in NumPy."""
    arguments = spec, estimator, np.ones_like(x) if dy is None else dy, x, *learned
    one = jax.device_get(_both(*arguments))
    two = jax.device_get(_compiled_both(*arguments))
    _same(one[0], two[0])
    for a, b in zip(one[1], two[1], strict=True):
        _close(a, b)
    return one
