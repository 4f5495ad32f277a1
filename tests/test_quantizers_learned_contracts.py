"""What holds for all learned quantizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from qjax.affine import dequantize
from qjax.estimators import clipped_ste, ewgs, plain_ste, soft_rounding
from tests.learned_cases import DY, X, _close, _pull, _same

pytestmark = pytest.mark.slow  # Many small compilations.


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
