"""Learned grids: values and gradients of scale, offset, clip and bits, in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax.quantizers as qz
from qjax.affine import dequantize
from qjax.estimators import clipped_ste, ewgs, plain_ste, soft_rounding

pytestmark = pytest.mark.slow  # Many small compilations.

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(12, 3)))
DY = np.float32(RNG.normal(size=X.shape))
EDGES = np.float32([0, -0.0, 1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan])


def _same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), wanted)


def _close(got, wanted, atol=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=atol)


def _to(shape, x):
    """Sums to the shape of a learned array."""
    axes = tuple(d for d in range(x.ndim) if len(shape) == 0 or shape[d] == 1)
    return np.sum(np.float64(x), axes).reshape(shape)


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


def _check_codes(spec, x, *learned, low, high):
    q = jax.device_get(qz.encode(spec, x, *learned))
    isnan = np.isnan(x)
    _same(np.isnan(q.value), isnan)
    _same(q.value[~isnan], np.asarray(dequantize(q.codes, q.params))[~isnan])
    _same(qz.apply(spec, x, *learned), q.value)
    assert np.all((q.codes >= low) & (q.codes <= high))
    return q


# LSQ and LSQ+.


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


# PACT.


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


# DoReFa.


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


# Differentiable bits.


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


# What holds for all.

CASES = {
    "lsq": (qz.LSQ(4), (0.25,)),
    "lsq_unsigned": (qz.LSQ(3, False), (0.3,)),
    "lsq_plus": (qz.LSQPlus(4), (0.25, 0.3)),
    "pact": (qz.PACT(3), (1.1,)),
    "dorefa_weights": (qz.DoReFaWeights(4), ()),
    "dorefa_weights_1": (qz.DoReFaWeights(1), ()),
    "dorefa_activations": (qz.DoReFaActivations(3), ()),
    "bits": (qz.DifferentiableBits(1), (4.2,)),
    "bits_unsigned": (qz.DifferentiableBits(0, False), (3.0,)),
}
BOUNDED = [name for name in CASES if name != "dorefa_weights_1"]


def _case(name):
    spec, learned = CASES[name]
    return spec, tuple(np.float32(v) for v in learned)


@pytest.mark.parametrize("name", CASES)
def test_nan_stays_and_its_code_is_0(name):
    spec, learned = _case(name)
    x = X.copy()
    x[0, 0] = np.nan
    q = jax.device_get(qz.encode(spec, x, *learned))
    assert np.isnan(q.value[0, 0]) and np.sum(np.isnan(q.value)) == 1
    if name != "lsq_plus":  # Code 0 is not the value 0 there.
        assert q.codes[0, 0] == 0
    _same(qz.apply(spec, x, *learned), q.value)


@pytest.mark.parametrize("name", CASES)
def test_zero_constant_denormal_and_huge_values_stay_finite(name):
    spec, learned = _case(name)
    f = lambda x, *learned: jnp.sum(qz.apply(spec, x, *learned) * 1e-20)
    arguments = tuple(range(1 + len(learned)))
    both = jax.jit(jax.value_and_grad(f, arguments))
    for v in (0.0, 0.7, -0.7, 1e-40, 3e38, -3e38):
        value, grads = both(np.full((4, 2), v, np.float32), *learned)
        assert all(np.all(np.isfinite(g)) for g in (value, *grads)), v


@pytest.mark.parametrize("name", ("lsq", "lsq_plus", "pact", "bits"))
def test_any_learned_value_gives_finite_gradients(name):
    spec, learned = _case(name)
    f = lambda *arrays: jnp.sum(qz.apply(spec, *arrays))
    grads = jax.jit(jax.grad(f, tuple(range(1 + len(learned)))))
    for v in (0.0, -1.0, 1e-40, 1e-30, 1e30):
        for out in grads(X, *(jnp.float32(v) for _ in learned)):
            assert np.all(np.isfinite(out)), v


@pytest.mark.parametrize("name", CASES)
def test_any_shape(name):
    spec, learned = _case(name)
    encode = jax.jit(lambda x: qz.encode(spec, x, *learned))
    for shape in ((0,), (1,), (4, 1), (2, 2, 3)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        q = jax.eval_shape(encode, x)
        assert q.value.shape == q.codes.shape == shape
    for shape in ((0, 3), ()):
        q = encode(jnp.full(shape, 0.3))
        assert q.value.shape == q.codes.shape == shape
        assert np.all(np.isfinite(q.value))


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_single_precision_rounded(name, dtype):
    spec, learned = _case(name)
    x = jnp.asarray(X).astype(dtype)
    y, pull = jax.vjp(lambda x, *learned: qz.apply(spec, x, *learned), x, *learned)
    assert y.dtype == dtype
    dx, *others = pull(y)
    assert dx.dtype == dtype and all(g.dtype == jnp.float32 for g in others)
    _same(y, qz.apply(spec, x.astype(jnp.float32), *learned).astype(dtype))


@pytest.mark.parametrize("name", CASES)
def test_integers_are_refused(name):
    spec, learned = _case(name)
    with pytest.raises(TypeError, match="takes real values, got dtype int32"):
        qz.apply(spec, jnp.arange(3), *learned)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("dorefa_w")])
def test_levels_stay_where_they_are_and_in_order(name):
    spec, learned = _case(name)
    x = np.float32(np.linspace(-4, 4, 161))
    y = np.asarray(qz.apply(spec, x, *learned))
    _same(qz.apply(spec, y, *learned), y)
    assert np.all(np.diff(y) >= 0)


@pytest.mark.parametrize(
    "name, all_bits",
    (
        ("lsq", (2, 4, 8)),
        ("lsq_plus", (2, 4, 8)),
        ("pact", (1, 4, 8)),
        ("dorefa_weights", (1, 2, 8)),
        ("dorefa_activations", (1, 4, 8)),
    ),
)
def test_traced_bits_are_known_bits(name, all_bits):
    spec, learned = _case(name)

    def f(b):
        y, pull = jax.vjp(lambda *a: qz.apply(type(spec)(b), *a), X, *learned)
        return y, pull(np.ones_like(X))

    stacked = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(type(spec)(b) for b in all_bits)
    )
    apply = lambda s: qz.apply(s, X, *learned)
    many = jax.jit(lambda bits, specs: (jax.vmap(f)(bits), jax.vmap(apply)(specs)))
    rows, loop = jax.device_get(many(np.array(all_bits), stacked))
    for i, b in enumerate(all_bits):
        y, grads = f(b)
        _close(rows[0][i], y, atol=1e-7)
        _close(loop[i], y, atol=1e-7)
        for got, wanted in zip(rows[1], grads, strict=True):
            _close(got[i], wanted)


def test_learned_values_may_be_batched():
    s = np.float32([0.1, 0.25, 0.7])
    rows = np.asarray(jax.vmap(lambda s: qz.lsq(X, s, qz.LSQ(4)))(s))
    for row, one in zip(rows, s, strict=True):
        _same(row, qz.lsq(X, one, qz.LSQ(4)))


@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products_are_those_of_the_gradient(name):
    # y passes straight through, so that H v = (dy / dx)^2 v where the slope is flat.
    spec, learned = _case(name)
    f = lambda x: qz.apply(spec, x, *learned)
    loss = lambda x: jnp.sum(jnp.square(f(x))) / 2
    slope = np.asarray(jax.grad(lambda x: jnp.sum(f(x)))(X))
    _, hvp = jax.jvp(jax.grad(loss), (X,), (jnp.ones_like(X),))
    bend = 0
    if name == "dorefa_weights":
        t, y = np.tanh(np.float64(X)), np.float64(f(X))
        bend = y * -2 * t * (1 - t**2) / np.max(np.abs(t))
    _close(hvp, slope**2 + bend)


ESTIMATORS = {
    "clipped_ste": clipped_ste,
    "plain_ste": plain_ste,
    "soft_rounding": soft_rounding(4.0),
    "ewgs": ewgs(0.2),
}


def _estimate(name, u, low, high, dy):
    inside = (np.rint(u) >= low) & (np.rint(u) <= high)
    if name == "plain_ste":
        return dy
    if name == "soft_rounding":
        m = np.floor(u) + 0.5
        dy = dy * 2 / np.tanh(2) * (1 - np.tanh(4 * (u - m)) ** 2)
    if name == "ewgs":
        dy = dy * (1 + 0.2 * np.sign(dy) * (u - np.rint(u)))
    return np.where(inside, dy, 0)


@functools.cache
def _own_pull(name):
    spec, learned = _case(name)
    return _pull(spec, X, *learned, dy=DY)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_takes_the_place_of_the_gradient_of_x_alone(name):
    steps = {
        "lsq": (X64 := np.float64(X)) * 4,
        "lsq_plus": X64 * 4 - 1,
        "dorefa_activations": X64 * 7,
        "bits": X64 * 4,
    }
    ends = {
        "lsq": (-8, 7),
        "lsq_plus": (-8, 7),
        "dorefa_activations": (0, 7),
        "bits": (-7, 7),
    }
    for case, u in steps.items():
        spec, learned = _case(case)
        own = _own_pull(case)
        y, grads = _pull(spec, X, *learned, dy=DY, estimator=ESTIMATORS[name])
        _same(y, own[0])
        for got, wanted in zip(grads[1:], own[1][1:], strict=True):
            _close(got, wanted)
        wanted = _estimate(name, u, *ends[case], np.float64(DY))
        if case == "dorefa_activations" and name != "plain_ste":
            inside = (X >= 0) & (X <= 1)  # The clip comes before the rounding.
            _close(np.asarray(grads[0])[inside], wanted[inside], atol=1e-4)
        elif case != "dorefa_activations":
            _close(grads[0], wanted, atol=1e-4)


# Random.


@pytest.mark.parametrize(
    "spec, learned, mean",
    (
        (qz.LSQ(4, use_stochastic_rounding=True), (0.3,), lambda x: x),
        (qz.LSQPlus(4, use_stochastic_rounding=True), (0.3, 0.2), lambda x: x),
        (
            qz.PACT(3, use_stochastic_rounding=True),
            (1.1,),
            lambda x: np.clip(x, 0, 1.1),
        ),
        (
            qz.DoReFaActivations(2, True),
            (),
            lambda x: np.clip(x, 0, 1),
        ),
        (
            qz.DoReFaWeights(3, True),
            (),
            lambda x: np.tanh(x) / np.max(np.abs(np.tanh(x))),
        ),
        (
            qz.DifferentiableBits(1, use_stochastic_rounding=True),
            (4.0,),
            lambda x: np.clip(x, -1.75, 1.75),
        ),
    ),
    ids=lambda v: str(v) if isinstance(v, qz.Spec) else "",
)
def test_stochastic_rounding_has_the_mean_of_what_it_rounds(spec, learned, mean):
    n = 2000
    x = np.float32([-0.9, -0.31, 0.0, 0.05, 0.4, 1.6])
    learned = tuple(jnp.float32(v) for v in learned)
    f = lambda key: qz.encode(spec, x, *learned, key=key)
    keys = jax.random.split(jax.random.key(0), n)
    draws = jax.device_get(jax.jit(jax.vmap(f))(keys))
    first = f(keys[0])
    values = np.float64(draws.value)
    step = float(np.max(draws.params.scale)) * (1 + isinstance(spec, qz.DoReFaWeights))
    tolerance = 5 * 0.5 * step / np.sqrt(n) + 1e-6
    assert np.all(np.abs(values.mean(0) - mean(np.float64(x))) <= tolerance)
    _same(draws.value[0], dequantize(draws.codes[0], first.params))
    _same(first.codes, draws.codes[0])
    assert np.any(np.diff(draws.codes, axis=0) != 0)
    deterministic = qz.apply(spec, x, *learned)
    assert np.all(np.abs(values - np.float64(deterministic)) <= 1.001 * step)
    _same(qz.apply(spec, x, *learned), deterministic)


# What cannot be.


@pytest.mark.parametrize(
    "cls, options, rule",
    (
        (qz.LSQ, dict(bits=1), "`bits` must be an integer from 2 on"),
        (qz.LSQ, dict(bits=25), "in 1..24"),
        (qz.LSQPlus, dict(bits=0, signed=False), "in 1..24"),
        (qz.LSQ, dict(gradient_scale=-1.0), "'auto' or a number from 0 on"),
        (qz.LSQPlus, dict(gradient_scale="sqrt"), "'auto' or a number from 0 on"),
        (qz.PACT, dict(bits=0), "in 1..24"),
        (qz.DoReFaWeights, dict(bits=17), "in 1..16"),
        (qz.DoReFaActivations, dict(bits=2.5), "`bits` must be an integer"),
        (qz.DifferentiableBits, dict(integer=61), "in -60..60"),
        (qz.DifferentiableBits, dict(integer=0.5), "an integer in"),
    ),
    ids=str,
)
def test_options_that_cannot_be_are_named(cls, options, rule):
    with pytest.raises(ValueError, match=rule):
        cls(**options)


@pytest.mark.parametrize(
    "spec, shapes, rule",
    (
        (qz.LSQ(), ((1,),), "`scale` must have shape"),
        (qz.LSQ(axis=-1), ((3,),), "`scale` must have shape"),
        (qz.LSQ(axis=2), ((),), "`axis=2` does not exist"),
        (qz.LSQPlus(), ((), (1,)), "`offset` must have shape"),
        (qz.LSQPlus(axis=0), ((1, 3), (12, 1)), "`scale` must have shape"),
        (qz.PACT(), ((3,),), "`clip` must have shape"),
        (qz.PACT(axis=1), ((),), "`clip` must have shape"),
    ),
    ids=lambda v: str(v) if isinstance(v, qz.Spec) else "",
)
def test_wrong_shapes_are_named(spec, shapes, rule):
    with pytest.raises(ValueError, match=rule):
        qz.apply(spec, X, *(jnp.ones(shape) for shape in shapes))


def test_the_gradient_passes_at_the_ends_of_a_range():
    x = np.float32([0.0, -0.0, 1.0])
    _, (dx, _) = _pull(qz.PACT(2), x, np.float32(3.0))
    _same(dx, [1, 1, 1])
    _same(_pull(qz.DoReFaActivations(2), x)[1][0], [1, 1, 1])
