"""Random quantizers"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from tests.quantizer_cases import NORMAL, ROWS, _decoded, _hswish, _logistic, _same

pytestmark = pytest.mark.slow  # Many small compilations.


@pytest.fixture(autouse=True)
def quiet_oracles():
    """Infinities and NaN are meant."""
    with np.errstate(all="ignore"):
        yield


DRAWS = 2000


KEYS = jax.random.split(jax.random.key(1), DRAWS)


@functools.partial(jax.jit, static_argnums=0)
def _draw(spec, x):
    # Not `vmap`, which takes thrice as long to compile.
    return jax.lax.map(lambda key: qz.apply(spec, x, key=key), KEYS)


LINEAR = (
    (qz.QuantizedBits(4, 1, use_stochastic_rounding=True), 0.25, -2, 1.75, lambda x: x),
    (
        qz.QuantizedBits(4, 1, keep_negative=False, use_stochastic_rounding=True),
        0.125,
        0,
        1.875,
        lambda x: x,
    ),
    (
        qz.QuantizedLinear(4, 1, use_stochastic_rounding=True, alpha=0.6),
        0.15,
        -1.05,
        1.05,
        lambda x: x,
    ),
    (
        qz.QuantizedRelu(4, 1, use_stochastic_rounding=True),
        0.125,
        0,
        1.875,
        lambda x: x,
    ),
    (
        qz.QuantizedRelu(4, 1, negative_slope=0.5, use_stochastic_rounding=True),
        0.25,
        -1,
        1.75,
        lambda x: np.where(x < 0, x / 2, x),
    ),
    (
        qz.QuantizedTanh(4, True, use_real_tanh=True),
        0.125,
        -1,
        0.875,
        np.tanh,
    ),
    (
        qz.QuantizedSigmoid(4, use_stochastic_rounding=True),
        0.0625,
        0,
        0.9375,
        lambda x: np.clip(x / 2 + 0.5, 0, 1),
    ),
    (
        qz.QuantizedHswish(6, 2, use_stochastic_rounding=True),
        0.125,
        -4,
        3.875,
        _hswish,
    ),
)


SOME = np.float32([-5, -1.77, -1.0, -0.3, -0.01, 0, 0.05, 0.31, 0.8, 1.6, 3.1, 9])


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: str(case[0]))
def test_stochastic_rounding_has_the_mean_of_what_it_rounds(case):
    spec, step, low, high, curve = case
    draws = np.float64(_draw(spec, SOME))
    p = curve(np.float64(SOME)) / step
    share = p - np.floor(p)
    sigma = step * np.sqrt(share * (1 - share) / DRAWS)
    inside = np.clip(p * step, low, high)
    assert np.all(np.abs(draws.mean(0) - inside) <= 5 * sigma + 1e-5)
    k = draws / step
    np.testing.assert_allclose(k, np.rint(k), atol=1e-5)
    assert np.all(np.rint(k) >= np.floor(inside / step + 1e-5))
    assert np.all(np.rint(k) <= np.ceil(inside / step - 1e-5))


def test_stochastic_powers_of_two_have_the_mean_of_what_they_round():
    x = np.float32([-3.0, -0.7, 0.07, 0.3, 1.0, 1.5, 5.0, 7.9])
    for quadratic in (False, True):
        spec = qz.QuantizedPo2(6, None, True, quadratic)
        draws = np.float64(_draw(spec, x))
        a, times = np.abs(x), 1 + quadratic
        low = 2.0 ** (times * np.floor(np.log2(a) / times))
        high = low * 2**times
        assert np.all((np.abs(draws) == low) | (np.abs(draws) == high))
        share = (a - low) / (high - low)
        sigma = (high - low) * np.sqrt(share * (1 - share) / DRAWS)
        assert np.all(np.abs(draws.mean(0) - x) <= 5 * sigma + 1e-6)
    spec = qz.QuantizedReluPo2(4, 4.0, use_stochastic_rounding=True)
    draws = np.float64(_draw(spec, np.float32([0.3, 1.5, 9.0, -1.0])))
    assert np.all(np.abs(draws.mean(0)[:2] - [0.3, 1.5]) < 0.06)
    _same(draws[:, 2], 4.0)


def test_probabilities_are_those_of_the_sigmoid():
    x = np.float32([-0.6, -0.1, 0.0, 0.05, 0.4])
    tolerance = 5 * 0.5 / np.sqrt(DRAWS)
    p = _logistic(6 * np.float64(x))
    draws = np.asarray(_draw(qz.Bernoulli(), x))
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert np.all(np.abs(draws.mean(0) - p) < tolerance)
    draws = np.asarray(_draw(qz.StochasticBinary(0.5), x))
    assert set(np.unique(draws)) == {-0.5, 0.5}
    assert np.all(np.abs(draws.mean(0) - (p - 0.5)) < tolerance)
    hard = qz.Bernoulli(None, 2.0, False)
    p = np.clip(np.float64(x) + 0.5, 0, 1)
    assert np.all(np.abs(np.asarray(_draw(hard, x)).mean(0) - p) < tolerance)


def test_probabilities_of_three_values():
    x = np.float32([[-0.6], [-0.1], [0.0], [0.05], [0.9]])
    draws = np.asarray(_draw(qz.StochasticTernary(2.0, 0.25, 3.0), x))
    assert set(np.unique(draws)) == {-2.0, 0.0, 2.0}
    d = np.std(np.float64(x))
    a, b = (_logistic(3 * (np.float64(x) + t) / d) for t in (-0.25, 0.25))
    assert np.all(np.abs(draws.mean(0) / 2 - (a + b - 1)) < 5 / np.sqrt(DRAWS))


RANDOM = (
    *(case[0] for case in LINEAR),
    qz.QuantizedLinear(4, alpha="auto", use_stochastic_rounding=True),
    qz.QuantizedPo2(4, use_stochastic_rounding=True),
    qz.QuantizedReluPo2(4, use_stochastic_rounding=True),
    qz.QuantizedUlaw(5, use_stochastic_rounding=True),
    qz.Binary(use_stochastic_rounding=True),
    qz.Binary(alpha="auto", use_stochastic_rounding=True),
    qz.StochasticBinary("auto"),
    qz.Bernoulli("auto"),
    qz.Ternary("auto", use_stochastic_rounding=True),
    qz.StochasticTernary("auto"),
    qz.StochasticTernary(),
)


@pytest.mark.parametrize("spec", RANDOM[2:], ids=str)
def test_a_key_settles_the_draw(spec):
    x = np.float32(0.5 * np.random.default_rng(3).normal(size=(40, 3)))
    x[0, 0] = np.nan
    isnan = np.isnan(x)
    f = lambda key: (qz.encode(spec, x, key=key), qz.apply(spec, x, key=key))
    both = lambda keys: (jax.lax.map(f, keys), qz.encode(spec, x))
    (draws, y), still = jax.device_get(jax.jit(both)(KEYS[np.array([0, 0, 1])]))
    _same(draws.value, y)
    one, same, other = (jax.tree.map(lambda v, i=i: v[i], draws) for i in range(3))
    _same(one.codes, same.codes)
    _same(one.value[~isnan], _decoded(spec, one)[~isnan])
    _same(np.isnan(one.value), isnan)
    assert one.codes[0, 0] == 0
    assert np.any(one.codes != other.codes)
    assert np.any(one.codes != still.codes)


@pytest.mark.parametrize("spec", RANDOM[::2], ids=str)
def test_draws_of_extreme_values_are_finite(spec):
    f = lambda x: jnp.sum(qz.apply(spec, x, key=KEYS[0]) * 1e-20)
    y, slope = jax.jit(lambda x: jax.lax.map(jax.value_and_grad(f), x))(ROWS)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(slope))
    for shape in ((), (0, 3)):
        assert jax.eval_shape(jax.grad(f), jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("spec", (qz.QuantizedBits(4), qz.QuantizedPo2(4), qz.Binary()))
def test_a_key_that_no_option_asks_for_is_not_used(spec):
    _same(qz.apply(spec, NORMAL, key=KEYS[0]), qz.apply(spec, NORMAL))
