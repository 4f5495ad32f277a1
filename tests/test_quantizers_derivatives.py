"""Derivatives of quantizers, their own and those of estimators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from qjax.estimators import clipped_ste, ewgs, make_estimator, plain_ste, soft_rounding
from tests.quantizer_cases import (
    BENT,
    FOUND,
    GRIDS,
    RNG,
    ROWS,
    _hswish,
    _logistic,
    _same,
)

pytestmark = pytest.mark.slow  # Many small compilations.


@pytest.fixture(autouse=True)
def quiet_oracles():
    """Infinities and NaN are meant."""
    with np.errstate(all="ignore"):
        yield


X = np.float32([*np.linspace(-4.03, 4.03, 62), -20.0, 20.0, 0.0])


DY = np.float32(RNG.normal(size=X.shape))


X64 = np.float64(X)


ONE = np.ones_like(X64)


def _relu_slope(x, slope, top):
    return np.where(x > top, 0, np.where(x > 0, 1.0, slope))


def _unclipped(u, low, high):
    return (np.rint(u) >= low) & (np.rint(u) <= high)


def _hswish_slope(x):
    return np.where(x <= -3, 0, np.where(x >= 3, 1, (2 * x + 3) / 6))


def _ulaw_slope(x, m=16.0, u=255.0):
    r = 2 * np.rint((np.clip(x / 2 + 0.5, 0, 1)) * m) / m - 1
    v = np.sign(r) * np.log1p(u * abs(r)) / np.log1p(u)
    passes = (r != 0) & (v >= -1) & (v <= 1 - 1 / m) & (np.abs(x) <= 1)
    return np.where(passes, u / ((1 + u * abs(r)) * np.log1p(u)), 0)


def _hard(x, slope=1.0):
    return np.where(np.abs(slope * x) <= 1, slope, 0)


_tanh2 = lambda x: 1 - np.tanh(x) ** 2


SLOPES = (
    (qz.QuantizedBits(4, 1), lambda x: x * 0 + 1),
    (qz.QuantizedBits(1), lambda x: x * 0 + 1),
    (qz.QuantizedBits(4, 1, alpha=0.3), lambda x: x * 0 + 1),
    (qz.QuantizedBits(4, 1, alpha="auto"), lambda x: x * 0 + 1),
    (qz.QuantizedLinear(4, 1), lambda x: 1.0 * (np.abs(x) <= 1.75)),
    (qz.QuantizedLinear(4, 1, False), lambda x: 1.0 * ((x >= -2) & (x <= 1.75))),
    (qz.QuantizedLinear(4, 1, alpha=0.5), lambda x: 1.0 * (np.abs(x) <= 0.875)),
    (qz.QuantizedLinear(1), lambda x: 1.0 * (np.abs(x) <= 0.5)),
    (qz.QuantizedRelu(4, 1), lambda x: _relu_slope(x, 0, 1.875)),
    (qz.QuantizedRelu(4, 1, False, 0.25), lambda x: _relu_slope(x, 0.25, 1.75)),
    (
        qz.QuantizedRelu(4, 1, relu_upper_bound=1.5, is_quantized_clip=False),
        lambda x: _relu_slope(x, 0, 1.5),
    ),
    (
        qz.QuantizedRelu(4, 1, is_quantized_clip=False),
        lambda x: _relu_slope(x, 0, np.inf),
    ),
    (qz.QuantizedRelu(4, 1, True), lambda x: _relu_slope(x, 0, 1.875)),
    (qz.QuantizedTanh(4), lambda x: np.where(_unclipped(x * 8, -8, 7), _hard(x), 0)),
    (
        qz.QuantizedTanh(4, use_real_tanh=True),
        lambda x: np.where(_unclipped(np.tanh(x) * 8, -8, 7), _tanh2(x), 0),
    ),
    (
        qz.QuantizedSigmoid(4),
        lambda x: np.where(_unclipped(8 * x + 8, 0, 15), _hard(x) / 2, 0),
    ),
    (
        qz.QuantizedSigmoid(4, True, True),
        lambda x: np.where(
            _unclipped(_logistic(x) * 16, 1, 15), _logistic(x) * _logistic(-x), 0
        ),
    ),
    (qz.QuantizedHswish(6, 3), _hswish_slope),
    (qz.QuantizedUlaw(5), _ulaw_slope),
    (qz.Binary(), _tanh2),
    (qz.Binary(True), _tanh2),
    (qz.Binary(alpha=0.5), lambda x: x * 0 + 1),
    (qz.Binary(alpha="auto"), lambda x: x * 0 + 1),
    (qz.StochasticBinary(1.0), lambda x: x * 0 + 1),
    (qz.Bernoulli(), lambda x: x * 0 + 1),
    (qz.Ternary(), _tanh2),
    (qz.Ternary("auto"), lambda x: x * 0 + 1),
    (qz.StochasticTernary(1.0), lambda x: x * 0 + 1),
    (qz.QuantizedPo2(4), lambda x: x * 0 + 1),
    (qz.QuantizedPo2(4, 2.0), lambda x: x * 0 + 1),
    (qz.QuantizedReluPo2(4), lambda x: _relu_slope(x, 0, np.inf)),
    (qz.QuantizedReluPo2(4, 2.0, 0.5), lambda x: _relu_slope(x, 0.5, 2)),
    (qz.HardSigmoid(), lambda x: _hard(x) / 2),
    (qz.HardTanh(), _hard),
    (qz.SmoothSigmoid(), lambda x: _hard(x, 0.375) / 2),
    (qz.SmoothTanh(), lambda x: _hard(x, 0.375)),
    (qz.BinarySigmoid(), lambda x: _hard(x) / 2),
    (qz.BinaryTanh(), _hard),
)


SLOPE_IDS = [str(spec) for spec, _ in SLOPES]


@pytest.mark.parametrize("spec, slope", SLOPES, ids=SLOPE_IDS)
def test_the_derivative_is_the_formula(spec, slope):
    grad = jax.jit(jax.grad(lambda x: jnp.sum(qz.apply(spec, x) * DY)))(X)
    np.testing.assert_allclose(grad, slope(X64) * DY, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("spec, slope", SLOPES, ids=SLOPE_IDS)
def test_hessian_vector_products_are_the_formula_differentiated(spec, slope):
    loss = lambda x: jnp.sum(jnp.square(qz.apply(spec, x))) / 2
    y = np.float64(qz.apply(spec, X))
    h = 1e-6
    bend = (slope(X64 + h) - slope(X64 - h)) / (2 * h)
    steady = np.abs(bend) < 2
    wanted = slope(X64) ** 2 + y * bend
    both = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),)))
    grad, hvp = both(X)
    np.testing.assert_allclose(grad, y * slope(X64), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(hvp[steady], wanted[steady], rtol=1e-4, atol=1e-5)
    assert np.sum(steady) > 50


def test_quantized_values_without_a_derivative():
    for n in (0.0, 0.25, 1.0):
        spec = qz.QuantizedBits(4, 1, qnoise_factor=n, use_ste=False)
        _same(jax.grad(lambda x, s=spec: jnp.sum(qz.apply(s, x)))(X), np.float32(1 - n))
    spec = qz.QuantizedRelu(4, 1, qnoise_factor=0.25, use_ste=False)
    grad = jax.grad(lambda x: jnp.sum(qz.apply(spec, x)))(X)
    _same(grad, np.float32(0.75 * _relu_slope(X64, 0, 1.875)))


@pytest.mark.parametrize(
    "spec, real, slope",
    (
        (qz.QuantizedBits(4, 1), lambda x: x, lambda x: ONE),
        (
            qz.QuantizedLinear(4, 1),
            lambda x: x,
            lambda x: np.where(np.abs(x) <= 1.75, 1, 0),
        ),
        (
            qz.QuantizedRelu(4, 1, False, 0.25),
            lambda x: np.where(x > 1.75, 1.75, np.where(x > 0, x, 0.25 * x)),
            lambda x: _relu_slope(x, 0.25, 1.75),
        ),
        (qz.QuantizedHswish(6, 3), _hswish, _hswish_slope),
        (qz.QuantizedPo2(4), lambda x: x, lambda x: ONE),
        (
            qz.QuantizedReluPo2(4, 2.0),
            lambda x: np.clip(x, 0, 2),
            lambda x: _relu_slope(x, 0, 2),
        ),
    ),
    ids=lambda v: str(v) if isinstance(v, qz.Spec) else "",
)
def test_noise_is_a_share_of_the_quantized_value(spec, real, slope):
    own = np.float64(qz.apply(spec, X))
    for n in (0.0, 0.25, 1.0):
        options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        noisy = type(spec)(**options | {"qnoise_factor": n})
        y, pull = jax.vjp(lambda x, s=noisy: qz.apply(s, x), X)
        np.testing.assert_allclose(y, (1 - n) * real(X64) + n * own, rtol=1e-6)
        real_slope = ONE if isinstance(spec, qz.QuantizedLinear) else slope(X64)
        wanted = (1 - n) * real_slope + n * slope(X64)
        np.testing.assert_allclose(pull(jnp.ones(X.shape))[0], wanted, rtol=1e-6)
        _same(qz.encode(noisy, X).value, np.float32(own))


ESTIMATORS = {
    "clipped_ste": clipped_ste,
    "plain_ste": plain_ste,
    "soft_rounding": soft_rounding(4.0),
    "ewgs": ewgs(0.2),
    "own": make_estimator(lambda u, inside: u, lambda u, dy: dy * (1 + 0.5 * u)),
}


def _estimate(name, u, low, high, dy):
    inside = (np.rint(u) >= low) & (np.rint(u) <= high)
    if name == "plain_ste":
        return dy
    if name == "own":
        return dy * (1 + 0.5 * u)
    if name == "soft_rounding":
        m = np.floor(u) + 0.5
        dy = dy * 2 / np.tanh(2) * (1 - np.tanh(4 * (u - m)) ** 2)
    if name == "ewgs":
        dy = dy * (1 + 0.2 * np.sign(dy) * (u - np.rint(u)))
    return np.where(inside, dy, 0)


def _log2(x):
    return np.log2(np.maximum(np.abs(x), 1e-9))


STEPS = (
    (qz.QuantizedBits(4, 1), lambda x: ONE, lambda x: x * 4, -8, 7),
    (qz.QuantizedBits(4, 1, alpha=0.3), lambda x: ONE, lambda x: x * 4, -8, 7),
    (qz.QuantizedBits(1), lambda x: ONE, lambda x: x / 2 - 0.5, -1, 0),
    (qz.QuantizedLinear(4, alpha=0.5), lambda x: ONE, lambda x: x * 16, -7, 7),
    (qz.QuantizedLinear(1), lambda x: ONE, lambda x: x - 0.5, -1, 0),
    (
        qz.QuantizedRelu(4, 1),
        lambda x: _relu_slope(x, 0, 1.875),
        lambda x: x * 8,
        0,
        15,
    ),
    (
        qz.QuantizedRelu(4, 1, False, 0.25),
        lambda x: _relu_slope(x, 0.25, 1.75),
        lambda x: x * 4,
        -2,
        7,
    ),
    (qz.QuantizedTanh(4, use_real_tanh=True), _tanh2, lambda x: 8 * np.tanh(x), -8, 7),
    (
        qz.QuantizedSigmoid(4, use_real_sigmoid=True),
        lambda x: _logistic(x) * _logistic(-x),
        lambda x: 16 * _logistic(x),
        0,
        15,
    ),
    (qz.QuantizedHswish(6, 3), _hswish_slope, lambda x: 4 * _hswish(x), -32, 31),
    (qz.Binary(), _tanh2, lambda x: x / 2 - 0.5, -1, 0),
    (qz.Binary(alpha=0.5), lambda x: ONE, lambda x: x - 0.5, -1, 0),
    (qz.Ternary(0.5, 0.25), lambda x: ONE, lambda x: x / 0.5, -1, 1),
    (qz.QuantizedPo2(4), lambda x: ONE, _log2, -4, 3),
    (qz.QuantizedPo2(4, 2.0), lambda x: ONE, lambda x: np.minimum(_log2(x), 1), -4, 3),
    (
        qz.QuantizedReluPo2(4, 2.0),
        lambda x: _relu_slope(x, 0, 2),
        lambda x: np.where(x < 0, -8, np.minimum(_log2(x), 1)),
        -8,
        7,
    ),
)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_sees_the_coordinate_that_is_rounded(name, case):
    spec, slope, steps, low, high = case
    f = lambda x: qz.apply(spec, x, estimator=ESTIMATORS[name])
    y, pull = jax.vjp(f, X)
    _same(y, qz.apply(spec, X))
    u = steps(X64)
    wanted = _estimate(name, u, low, high, np.float64(DY)) * slope(X64)
    # Powers of two take 0 to their least exponent.
    far = (np.abs(u - np.rint(u)) < 0.499) & (X != 0)
    far &= (np.abs(u - np.rint(u)) > 1e-3) | (name != "soft_rounding")
    got = np.asarray(pull(jnp.asarray(DY))[0])
    np.testing.assert_allclose(got[far], wanted[far], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [case[0] for case in STEPS[::3]], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_hessian_vector_products_of_estimators(name, spec):
    loss = lambda x: jnp.sum(jnp.square(qz.apply(spec, x, estimator=ESTIMATORS[name])))
    _, hvp = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),)))(X)
    assert np.all(np.isfinite(hvp)) and np.any(hvp != 0)


@pytest.mark.parametrize("spec", (*GRIDS[::4], *BENT, *FOUND[::4]), ids=str)
def test_estimators_keep_extreme_values_finite(spec):
    f = lambda x: jnp.sum(qz.apply(spec, x, estimator=soft_rounding(4.0)))
    slopes = jax.jit(lambda x: jax.lax.map(jax.grad(f), x))(ROWS)
    assert np.all(np.isfinite(slopes))
