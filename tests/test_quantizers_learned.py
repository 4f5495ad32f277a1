"""Learned grids: values and gradients of scale, offset, clip and bits, in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax.quantizers as qz
from qjax.affine import dequantize
from tests.learned_cases import DY, RNG, X, _close, _pull, _same

pytestmark = pytest.mark.slow  # Many small compilations.


EDGES = np.float32([0, -0.0, 1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan])


def _to(shape, x):
    """Sums to the shape of a learned array."""
    axes = tuple(d for d in range(x.ndim) if len(shape) == 0 or shape[d] == 1)
    return np.sum(np.float64(x), axes).reshape(shape)


def _check_codes(spec, x, *learned, low, high):
    q = jax.device_get(qz.encode(spec, x, *learned))
    isnan = np.isnan(x)
    _same(np.isnan(q.value), isnan)
    _same(q.value[~isnan], np.asarray(dequantize(q.codes, q.params))[~isnan])
    _same(qz.apply(spec, x, *learned), q.value)
    assert np.all((q.codes >= low) & (q.codes <= high))
    return q


def _ends(spec):
    u = spec.bits - spec.signed
    return (-(2**u) if spec.signed else 0) + spec.narrow_range, 2**u - 1


def _damping(spec, n):
    if spec.gradient_scale == "auto":
        return 1 / np.sqrt(n * _ends(spec)[1])
    return spec.gradient_scale


def _step_size(spec, x, s, dy, offset=None):
    """The formulas of `lsq_plus`; with no offset, those of `lsq`."""
    low, high = _ends(spec)
    v = np.float64(x * (np.float32(1) / s))
    z = 0 if offset is None else -np.rint(offset * (np.float32(1) / s))
    u, codes = v + z, np.clip(np.rint(v) + z, low, high)
    inside = (low < u) & (u < high)
    g = _damping(spec, x.size / s.size)
    ds = g * _to(s.shape, dy * np.where(inside, codes - u, codes))
    return (
        np.float32((codes - z) * s),
        codes,
        np.where(inside, dy, 0),
        ds,
        g * _to(s.shape, np.where(inside, 0, dy)),
    )


WORDS = (
    dict(bits=2),
    dict(bits=4, narrow_range=True),
    dict(bits=8, gradient_scale=0.5),
    dict(bits=3, signed=False),
    dict(bits=1, signed=False, gradient_scale=0),
    dict(bits=4, gradient_scale=1.0),
)


AXES = ((None, ()), (0, (12, 1)), (-1, (1, 3)), ((0, 1), (12, 3)))


@pytest.mark.parametrize("axis, shape", AXES)
@pytest.mark.parametrize("word", WORDS)
def test_lsq_is_its_formula(word, axis, shape):
    spec = qz.LSQ(axis=axis, **word)
    s = np.float32(RNG.uniform(0.1, 0.6, size=shape))
    value, codes, dx, ds, _ = _step_size(spec, X, s, DY)
    y, grads = _pull(spec, X, s, dy=DY)
    _same(y, value)
    _same(grads[0], np.float32(dx))
    _close(grads[1], ds)
    assert grads[1].shape == shape
    low, high = _ends(spec)
    _same(_check_codes(spec, X, s, low=low, high=high).codes, codes)


@pytest.mark.parametrize("axis, shape", AXES)
@pytest.mark.parametrize("word", WORDS)
def test_lsq_plus_is_its_formula(word, axis, shape):
    spec = qz.LSQPlus(axis=axis, **word)
    s = np.float32(RNG.uniform(0.1, 0.6, size=shape))
    offset = np.float32(RNG.normal(size=shape))
    value, codes, dx, ds, d_offset = _step_size(spec, X, s, DY, offset)
    y, grads = _pull(spec, X, s, offset, dy=DY)
    _same(y, value)
    _same(grads[0], np.float32(dx))
    _close(grads[1], ds)
    _close(grads[2], d_offset)
    low, high = _ends(spec)
    _same(_check_codes(spec, X, s, offset, low=low, high=high).codes, codes)


def test_lsq_rounds_ties_to_even_and_saturates():
    s = jnp.float32(0.25)
    ties = np.float32((np.arange(-20, 20) + 0.5) / 4)
    near = [ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9))]
    x = np.concatenate([*near, EDGES])
    codes = np.clip(np.rint(np.float64(np.nan_to_num(x)) * 4), -8, 7)
    q = _check_codes(qz.LSQ(4), x, s, low=-8, high=7)
    _same(q.codes, codes)
    assert q.codes[-1] == 0
    q = _check_codes(qz.LSQPlus(4), x, s, jnp.float32(0.0), low=-8, high=7)
    _same(q.codes, codes)


def test_the_gradient_at_the_ends_is_that_of_the_ends():
    # Exactly on qmin and qmax: not inside.
    x = np.float32([-2.0, 1.75, 1.74])
    _, (dx, ds) = _pull(qz.LSQ(4, gradient_scale=1.0), x, np.float32(0.25))
    _same(dx, [0, 0, 1])
    _close(ds, -8 + 7 + (7 - 6.96))


def test_half_a_scale_is_learned_as_far_as_the_paper_says():
    # The example of the docstring, by hand.
    f = lambda s: jnp.sum(qz.lsq(jnp.float32([0.3, 9.0]), s, qz.LSQ(4)))
    _close(jax.grad(f)(jnp.float32(0.25)), (1 - 1.2 + 7) / math.sqrt(14))


def test_learning_the_scale_lowers_the_error():
    x = np.float32(RNG.normal(size=(256,)))
    spec = qz.LSQ(3)
    loss = lambda s: jnp.mean(jnp.square(qz.lsq(x, s, spec) - x))
    optimizer = optax.sgd(2.0, momentum=0.5)
    s = jnp.float32(1.5)
    state, first = optimizer.init(s), loss(s)
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(40):
        value, ds = step(s)
        update, state = optimizer.update(ds, state)
        s = optax.apply_updates(s, update)
    assert value < 0.5 * first
    grid = min(float(loss(jnp.float32(g))) for g in np.linspace(0.1, 1.5, 57))
    assert value < 1.1 * grid


@pytest.mark.parametrize("axis, shape", AXES[:3])
@pytest.mark.parametrize("word", WORDS[:4])
def test_lsq_starts_from_its_scale(word, axis, shape):
    spec = qz.LSQ(axis=axis, **word)
    over = tuple(d for d in range(2) if not shape or shape[d] == 1)
    wanted = 2 * np.mean(np.abs(np.float64(X)), over) / np.sqrt(_ends(spec)[1])
    s = np.asarray(qz.lsq_scale(X, spec))
    assert s.dtype == jnp.float32
    _close(s, wanted.reshape(shape))
    assert qz.lsq(X, s, spec).shape == X.shape
    assert np.all(np.asarray(qz.lsq_scale(0 * X, spec)) == 2.0**-64)


@pytest.mark.parametrize("axis, shape", AXES[:3])
@pytest.mark.parametrize("word", WORDS[:4])
def test_lsq_plus_starts_from_the_range(word, axis, shape):
    spec = qz.LSQPlus(axis=axis, **word)
    s, offset = jax.device_get(qz.lsq_plus_params(X, spec))
    assert s.shape == offset.shape == shape
    over = tuple(d for d in range(2) if not shape or shape[d] == 1)
    low = np.minimum(np.min(X, over, initial=0), 0).reshape(shape)
    high = np.maximum(np.max(X, over, initial=0), 0).reshape(shape)
    qmin, qmax = _ends(spec)
    width = (np.float64(high) - low) / (qmax - qmin)
    _close(s, width)
    zero_point = np.minimum(qmin - np.rint(low / width), qmax)
    _close(offset, -zero_point * width)
    y = np.asarray(qz.lsq_plus(X, s, offset, spec))
    assert np.all(np.abs(y - X) <= 0.5001 * s)


@pytest.mark.parametrize("axis, shape", AXES[:3])
@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_pact_is_its_formula(bits, axis, shape):
    spec = qz.PACT(bits, axis=axis)
    clip = np.float32(RNG.uniform(0.4, 1.2, size=shape))
    n = 2**bits - 1
    s = clip / np.float32(n)
    codes = np.clip(np.rint(np.float64(X * (np.float32(1) / s))), 0, n)
    y, (dx, d_clip) = _pull(spec, X, clip, dy=DY)
    _same(y, np.float32(codes) * s)
    _same(dx, np.where((X >= 0) & (X < clip), DY, 0))
    _close(d_clip, _to(shape, np.where(X >= clip, DY, 0)))
    _same(_check_codes(spec, X, clip, low=0, high=n).codes, codes)


def test_pact_at_its_ends():
    x = np.float32([3.0, np.nextafter(np.float32(3), np.float32(0)), -1.0])
    _, (dx, d_clip) = _pull(qz.PACT(2), x, np.float32(3.0))
    _same(dx, [0, 1, 0])
    _same(d_clip, 1.0)
    ties = np.float32([0.5, 1.5, 2.5, 9.0, *EDGES])
    q = _check_codes(qz.PACT(2), ties, jnp.float32(3.0), low=0, high=3)
    _same(q.codes, [0, 2, 2, 3, 0, 0, 0, 3, 0, 3, 0, 0])


@pytest.mark.parametrize("bits", (2, 3, 4, 8, 16))
def test_dorefa_weights_are_their_formula(bits):
    n = 2**bits - 1
    curve = np.tanh(np.float64(X))
    most = np.max(np.abs(curve))
    steps = n * (curve / (2 * most) + 0.5)
    # A float32 tangent may fall to the other side of a tie.
    far = np.abs(steps % 1 - 0.5) > n * 1e-6
    codes = 2 * np.rint(steps) - n
    y, (dx,) = _pull(qz.DoReFaWeights(bits), X, dy=DY)
    _close(np.asarray(y)[far], (codes / n)[far], atol=1e-7)
    _close(dx, DY * (1 - curve**2) / most)
    q = _check_codes(qz.DoReFaWeights(bits), X, low=-n, high=n)
    _same(np.asarray(q.codes)[far], codes[far])
    assert np.all(np.asarray(q.codes) % 2 == 1)
    assert np.sum(far) > 30


def test_dorefa_weights_of_one_bit_are_signs():
    y, (dx,) = _pull(qz.DoReFaWeights(1), X, dy=DY)
    _close(y, np.where(X >= 0, 1, -1) * np.mean(np.abs(np.float64(X))))
    _same(dx, DY)
    mean = np.mean(np.abs(np.float64([0.5, 1.5, 0])))
    _close(
        qz.apply(qz.DoReFaWeights(1), np.float32([0.5, -1.5, 0])), [mean, -mean, mean]
    )


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_dorefa_activations_are_their_formula(bits):
    n = 2**bits - 1
    ties = (np.arange(min(n, 40)) + 0.5) / n
    # Always as many, so that each operation is compiled once.
    x = np.float32([*X.ravel(), *np.resize(ties, 40), 0, 1, 9, -9])
    scale = np.float32(1) / np.float32(n)
    codes = np.clip(np.rint(np.float64(x * (np.float32(1) / scale))), 0, n)
    y, (dx,) = _pull(qz.DoReFaActivations(bits), x)
    _same(y, np.float32(codes) * scale)
    _same(dx[:-4], np.where((x >= 0) & (x <= 1), 1, 0)[:-4])
    _same(_check_codes(qz.DoReFaActivations(bits), x, low=0, high=n).codes, codes)


def _of_bits(x, bits, integer, signed, dy):
    u = np.maximum(np.clip(np.rint(np.float64(bits)), 0, 24) - signed, 0)
    s = 2.0 ** (integer - u)
    high = 2**u - 1
    low = -high if signed else 0 * high
    whole = np.rint(np.float64(x) / s)
    inside = (whole >= low) & (whole <= high)
    y = s * np.clip(whole, low, high)
    worth = np.where(inside, x - y, np.where(whole > 0, s, -s))
    if not signed:
        worth = np.where(whole < 0, 0, worth)  # It stays 0 whatever the bits.
    db = math.log(2) * _to(np.shape(bits), dy * worth)
    return y, np.where(inside, dy, 0), db


@pytest.mark.parametrize("signed", (True, False))
@pytest.mark.parametrize("integer", (0, 1, -1))
@pytest.mark.parametrize("shape", ((), (1, 3), (12, 1), (12, 3)))
def test_differentiable_bits_are_their_formula(shape, integer, signed):
    spec = qz.DifferentiableBits(integer, signed)
    bits = np.float32(RNG.uniform(-0.4, 9.4, size=shape))
    y, grads = _pull(spec, X, bits, dy=DY)
    value, dx, db = _of_bits(X, bits, integer, signed, DY)
    _same(y, np.float32(value))
    _same(grads[0], np.float32(dx))
    _close(grads[1], db)
    _check_codes(spec, X, bits, low=-(2**9), high=2**9)


@pytest.mark.parametrize("bits", (-3.0, 0.0, 0.5, 1.0, 1.49, 2.0, 8.0, 24.0, 99.0))
def test_every_number_of_bits_is_a_grid(bits):
    x = np.float32([0.3, -0.7, 1.0, -1.0, 5.0, 0.0])
    for signed in (True, False):
        spec = qz.DifferentiableBits(0, signed)
        y, grads = _pull(spec, x, np.float32(bits))
        value, dx, db = _of_bits(x, bits, 0, signed, 1.0)
        _same(y, np.float32(value))
        _same(grads[0], dx)
        _close(grads[1], db)
        if np.rint(bits) <= signed:
            _same(y, 0 * x)


def test_the_gradient_of_bits_is_the_slope_of_the_error():
    # Of many values at random, the error is halved by each bit.
    x = np.float32(np.random.default_rng(1).uniform(-0.95, 0.95, 4000))
    spec = qz.DifferentiableBits()
    loss = lambda b: jnp.mean(jnp.square(qz.differentiable_bits(x, b, spec) - x))
    slope = jax.grad(loss)(jnp.float32(5.0))
    values = [loss(jnp.float32(b)) for b in (4, 6)]
    assert slope < 0 and values[1] < 0.4 * values[0]
    _close(slope, -2 * math.log(2) * loss(jnp.float32(5.0)), atol=2e-5)
