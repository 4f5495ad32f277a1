"""Normalisations in integers: their root, their bounds, and models compute what ships.

The oracle is the formula in long doubles, on the codes less their zero point.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.integer_norm import (
    added,
    coded,
    fraction,
    normalised,
    point,
    reciprocal_root,
    scaled,
)
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _rank_promotion():
    """Gains of one axis, as models of others have them."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_one_over_a_root_is_off_by_less_than_2_to_minus_26():
    x = np.exp(RNG.uniform(0, np.log(2.0**62), 200_000)).astype(np.int64)
    powers = 1 << np.arange(62)
    ends = [powers, powers - 1, powers + 1, [2**62 - 1, 2**62 - 2]]
    x = np.concatenate([x, np.arange(1, 5001), *ends])
    x = x[(x > 0) & (x < 1 << 62)]
    with jax.enable_x64(True):
        root, shift = map(np.asarray, jax.jit(reciprocal_root)(jnp.asarray(x)))
    assert root.min() >= 1 << 29 and root.max() <= 1 << 30
    found = root * np.longdouble(2) ** -shift
    assert np.max(np.abs(found * np.sqrt(x.astype(np.longdouble)) - 1)) < 2.0**-26


def _real(rows, is_centred, epsilon, floor):
    """Normalises rows in long doubles, in units of one code."""
    x, n = rows.astype(np.longdouble), rows.shape[1]
    u = n * x - x.sum(1, keepdims=True) if is_centred else x
    squares = (x * x).sum(1, keepdims=True)
    squares = n * squares - x.sum(1, keepdims=True) ** 2 if is_centred else squares
    below = np.maximum(squares + epsilon, floor)
    return np.where(below > 0, u / np.sqrt(np.maximum(below, 1e-300)), 0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _jitted(rows, numbers, is_centred, is_byte):
    kind = {"is_centred": is_centred, "is_byte": is_byte}
    return normalised(rows, (1,), (1,), *numbers, **kind)


def _ints(rows, numbers, is_centred, is_byte):
    with jax.enable_x64(True):
        return _jitted(rows, numbers, is_centred, is_byte)


def _assert_near(rows, *, is_centred, is_byte=True, epsilon=0.0, floor=0.0, bits=8):
    """Each code is at most one from the real value, rounded to its grid."""
    kind = rows.shape[1], is_centred
    numbers = added(np.float64(epsilon), np.float64(floor), *kind, is_byte)
    found = _ints(rows, numbers, is_centred, is_byte)
    real = _real(rows, is_centred, epsilon, floor)
    step = np.float64(np.max(np.abs(real)) or 1) / 2 ** (bits - 1)
    gain = np.array([1.0, -0.7, 0.0, 1e-4])[:, None, None] / step
    offset = np.array([0.0, 0.3, -1.0, 0.5])[:, None, None] * 2 ** (bits - 1)
    known = scaled(gain * 2.0 ** -(fraction(*kind) + int(numbers[3])), offset)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, inside = coded(found, *known, 3, low, high)
    exact = np.floor(real * gain + offset + np.longdouble(0.5)) + 3
    assert np.max(np.abs(np.asarray(codes) - np.clip(exact, low, high))) <= 1
    away = (np.abs(exact - low) > 1) & (np.abs(exact - high) > 1)
    held = (exact >= low) & (exact <= high)
    np.testing.assert_array_equal(np.asarray(inside)[away], held[away])


@pytest.mark.parametrize("is_centred", [True, False])
def test_codes_of_three_codes_of_three_bits_are_at_most_one_off(is_centred):
    rows = np.array([*itertools.product(range(-4, 4), repeat=3)], np.int32)
    for epsilon, floor in ((0, 0), (0.37, 0), (1e-9, 0), (0, 20.0), (5, 11.3)):
        for bits in (8, 16):
            own = {"epsilon": epsilon, "floor": floor, "bits": bits}
            _assert_near(rows, is_centred=is_centred, **own)


def _rows(n, least, most):
    """Rows of one value, of ties, of one alone beside the others, and random ones."""
    rows = RNG.integers(least, most + 1, (12, n))
    rows[0], rows[1], rows[2] = 0, least, most
    rows[3, : n // 2] = least
    rows[4] = np.where(np.arange(n) == n - 1, most, least)
    rows[5] = np.where(np.arange(n) == 0, 1, 0)
    rows[6] = RNG.integers(0, 2, n)
    rows[7, ::2], rows[7, 1::2] = least, most
    return rows.astype(np.int32)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_byte", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4096])
def test_codes_are_at_most_one_from_those_of_long_doubles(n, is_byte, bits):
    half = 128 if is_byte else 1 << 15
    for least, most in ((-half, half - 1), (0, 2 * half - 1), (-5, 5)):
        rows = _rows(n, least, most)
        squares = float(n * n * 100)
        pairs = (0, 0), (1e-12, 0), (squares, 0), (1e15 * squares, 0), (0, squares)
        for is_centred in (False,) if n == 1 else (False, True):
            for epsilon, floor in pairs:
                own = {"epsilon": epsilon, "floor": floor, "bits": bits}
                kind = {"is_centred": is_centred, "is_byte": is_byte}
                _assert_near(rows, **kind, **own)


@pytest.mark.parametrize("is_centred", [True, False])
def test_traced_numbers_are_those_of_numpy(is_centred):
    """For a scale that is traced, and for many under `vmap`."""
    scales = np.exp(RNG.uniform(-40, 40, 200)).astype(np.float32)
    gain = RNG.normal(0, 1, 16).astype(np.float32)

    def numbers(xp, scale):
        square = scale.astype(xp.float64) * scale.astype(xp.float64)
        kind = 48, is_centred, True, xp
        known = added(xp.float64(1e-6) / square, xp.float64(3e-4) / square, *kind)
        factor = xp.float64(2.0 ** -fraction(48, is_centred))
        held = xp.minimum(xp.maximum(scale, 1e-6), 1e6)
        own = gain.astype(np.float64) * factor, gain.astype(np.float64)
        return known, scaled(*(x / held for x in own), xp)

    alone = [numbers(np, s) for s in scales]
    wanted = jax.tree.map(lambda *x: np.stack(x), *alone)
    with jax.enable_x64(True):
        traced = lambda s: numbers(jnp, s)
        found = jax.jit(jax.vmap(traced))(jnp.asarray(scales))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        jax.tree.map(
            np.testing.assert_array_equal, jax.jit(traced)(scales[0]), alone[0]
        )


def test_groups_of_parts_of_axes_are_those_of_a_reshape():
    x = RNG.integers(-128, 128, (3, 4, 6, 8)).astype(np.int32)
    numbers = added(np.float64(900.0), np.float64(0), 4 * 6 * 4, True, True)
    kind = {"is_centred": True, "is_byte": True}
    with jax.enable_x64(True):
        found = normalised(jnp.asarray(x), (1, 2, 3), (1, 1, 2), *numbers, **kind)
    rows = x.reshape(3, 24, 2, 4).transpose(0, 2, 1, 3).reshape(6, -1)
    wanted = _ints(rows, numbers, True, True)
    wanted = wanted.reshape(3, 2, 24, 4).transpose(0, 2, 1, 3).reshape(x.shape)
    np.testing.assert_array_equal(found, wanted)


def test_points_leave_room_for_the_sums_and_for_what_is_added():
    for n, is_centred, is_byte in itertools.product(
        (1, 2, 255, 256, 1 << 15), (True, False), (True, False)
    ):
        wide = (255 if is_byte else 65535) ** 2 * n ** (2 if is_centred else 1)
        for exponent in (-100, 0, 20, 59, 60, 61, 200):
            shift = int(point(np.int64(exponent), n, is_centred, is_byte, np))
            assert shift % 2 == 0 and -60 <= shift <= 30
            assert shift < 0 or wide << shift < 1 << 60
            assert exponent + shift <= 60 or shift == -60


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = (RNG.normal(0, 2, (6, 5, 8)) + RNG.normal(0, 3, (6, 5, 1))).astype(np.float32)
IMAGES = RNG.normal(0.5, 2, (4, 6, 6, 8)).astype(np.float32)
P = {"kernel": _draw(8, 8) * 0.4, "gain": 1 + 0.3 * _draw(8), "bias": _draw(8, seed=1)}


def _layer(layer, x=X):
    """A layer of Flax with parameters that are not 1 and 0."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    draw = lambda path, t: ("scale" in str(path)) + 0.2 * _draw(*t.shape, seed=3)
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return lambda p, x: layer.apply(params, x), x


def _mean(x, axis=-1):
    return x.mean(axis, keepdims=True)


def _root(x, epsilon=1e-3, axis=-1):
    return jnp.sqrt(_mean(x * x, axis) + epsilon)


def _standard(x, axis=-1, epsilon=1e-5):
    return (x - _mean(x, axis)) / jnp.sqrt(x.var(axis, keepdims=True) + epsilon)


def _one(f, x=X):
    return lambda p, x: f(x, p), x


def _norm_of(h):
    return jnp.linalg.norm(h, axis=-1, keepdims=True)


def _negated(h, p):
    square, mean = _mean(h * h), _mean(h)
    return (h - mean) / -jnp.sqrt(-(mean * mean - square) + 1e-3)


def _grouped(h, p):
    g = h.reshape(h.shape[0], 6, 6, 2, 4)
    y = jax.nn.standardize(g, axis=(1, 2, 4)) * p["gain"].reshape(2, 4)
    return y.reshape(h.shape)


def _repeated(h, p):
    """Statistics that go back to channels by `jnp.repeat`."""
    g = h.reshape(h.shape[0], 36, 2, 4)
    spread = lambda t: jnp.repeat(t, 4, axis=-1)[:, None, None]
    mean = g.mean((1, 3))
    var = jnp.square(g - mean[:, None, :, None]).mean((1, 3))
    return (h - spread(mean)) * spread(jax.lax.rsqrt(var + 1e-3))


def _each(z):
    return (z - z.mean()) / jnp.sqrt(z.var() + 1e-5)


LAYERS = {
    "layer norm": _layer(nn.LayerNorm()),
    "two means": _layer(nn.LayerNorm(use_fast_variance=False)),
    "bare": _layer(nn.LayerNorm(use_bias=False, use_scale=False)),
    "rms norm": _layer(nn.RMSNorm()),
    "group norm": _layer(nn.GroupNorm(4), IMAGES),
    "one group": _layer(nn.GroupNorm(1), IMAGES),
    "groups of one": _layer(nn.GroupNorm(num_groups=None, group_size=1), IMAGES),
    "instance norm": _layer(nn.InstanceNorm(), IMAGES),
    "two axes": _layer(nn.LayerNorm(reduction_axes=(1, 2), feature_axes=-1)),
    "another axis": _layer(nn.LayerNorm(reduction_axes=1, feature_axes=1)),
}
DENSE = {
    "standardize": lambda h, p: jax.nn.standardize(h),
    "l2": lambda h, p: h / _norm_of(h),
    "l2 from 1.5": lambda h, p: h / jnp.maximum(_norm_of(h), 1.5),
    "relu": lambda h, p: jax.nn.relu(jax.nn.standardize(h) * p["gain"] + p["bias"]),
    "relu6": lambda h, p: jax.nn.relu6(jax.nn.standardize(h) * 3),
}
BY_HAND = {
    "l2 of a floor": lambda h, p: (
        h * jax.lax.rsqrt(jnp.maximum((h * h).sum(-1, keepdims=True), 1e-12))
    ),
    "one more than a gain": lambda h, p: h / _root(h) * (1 + p["gain"]),
    "unbiased": lambda h, p: (
        (h - _mean(h)) / jnp.sqrt(h.var(-1, keepdims=True, ddof=1) + 0.5)
    ),
    "from 4": lambda h, p: (
        (h - _mean(h))
        / jnp.sqrt(2 * jnp.maximum(3 * h.var(-1, keepdims=True) + 2, 14.0) + 3)
    ),
    "negative": lambda h, p: -_standard(h) * p["gain"] - p["bias"],
    "negated": _negated,
    "mean less values": lambda h, p: (
        (_mean(h) - h) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6) * p["gain"]
    ),
    "bias less it": lambda h, p: p["bias"] - (1.5 - _standard(h) * p["gain"]),
    "two lines": lambda h, p: (
        (_standard(h) * p["gain"] + p["bias"]) * p["gain"] + p["bias"]
    ),
    "gain before": lambda h, p: (
        ((h - _mean(h)) * p["gain"]) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    ),
    "gain on the root": lambda h, p: h * (p["gain"][:5, None] / _root(h)),
    "large epsilon": lambda h, p: _standard(h, epsilon=50.0),
    "power": lambda h, p: (h - _mean(h)) * (h.var(-1, keepdims=True) + 1e-5) ** -0.5,
    "square by a power": lambda h, p: h / jnp.sqrt(_mean(jax.lax.pow(h, 2.0)) + 1e-6),
    "gain behind its groups": lambda h, p: (
        _standard(h.reshape(-1, 5, 2, 4), (1, 3)).reshape(h.shape) * p["gain"]
        + p["bias"]
    ),
    "all axes": lambda h, p: _standard(h, (1, 2)) * 2,
    "no gain": lambda h, p: _standard(h) * 0 * p["gain"] + p["bias"],
    "swapped": lambda h, p: jnp.swapaxes(_standard(jnp.swapaxes(h, 1, 2)), 1, 2),
    "vmap": lambda h, p: jax.vmap(jax.vmap(_each))(h),
    "checkpoint": lambda h, p: jax.checkpoint(_standard)(h),
    "heads": lambda h, p: (
        _standard(h.reshape(-1, 5, 2, 4)) * p["gain"].reshape(2, 4)
    ).reshape(h.shape),
}
FORMS = (
    LAYERS
    | {name: _one(lambda x, p, f=f: f(x @ p["kernel"], p)) for name, f in DENSE.items()}
    | {name: _one(f) for name, f in BY_HAND.items()}
    | {"grouped": _one(_grouped, IMAGES), "repeated": _one(_repeated, IMAGES)}
)
POWER = QSpec(8, power_of_two=True)
SCHEMES = {
    "floats": Scheme(),
    "powers": Scheme(POWER, POWER),
    "wide": Scheme(QSpec(8), QSpec(16)),
    "narrow": Scheme(QSpec(4), QSpec(5, signed=False)),
}
# All schemes for one form of each kind, one in turn for the others.
MANY = "layer norm", "rms norm", "group norm", "relu"
CASES = [(form, scheme) for form in MANY for scheme in SCHEMES]
CASES += zip(
    (form for form in FORMS if form not in MANY), itertools.cycle(SCHEMES), strict=False
)


def _quantized(fn, x, scheme=None, params=P):
    """Returns a model, its state and its program."""
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme or Scheme())
    qstate = qjax.calibrate(qmodel, params, [x])
    return qmodel, qstate, qjax.lower(qmodel, params, qstate, x)


def _operations(program):
    return [node.operation for node in program.graph.nodes]


def _decibels(wanted, found):
    wanted, found = np.float64(wanted), np.float64(found)
    noise = np.sum((wanted - found) ** 2) or 1e-30
    return 10 * np.log10(np.sum(wanted**2) / noise)


@pytest.mark.kept
@pytest.mark.parametrize(("form", "scheme"), CASES)
def test_models_compute_what_ships(form, scheme):
    fn, x = FORMS[form]
    qmodel, qstate, program = _quantized(fn, x, SCHEMES[scheme])
    assert _operations(program).count("norm") == 1
    found = qjax.verify(program, qmodel, P, qstate, x)
    site = next(s for s in found.sites if s.startswith(("norm", "output")))
    assert found.sites[site].equal == found.sites[site].codes
    other = x[::-1] * np.float32(0.9)
    assert_equals_oracle(program, other)
    shipped = np.asarray(program(other))
    np.testing.assert_array_equal(program(other[:3]), shipped[:3])
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, other), shipped
    )
    least = {"floats": 30, "powers": 30, "wide": 40, "narrow": 12}[scheme]
    rows = slice(-3, None)
    assert _decibels(jax.jit(fn)(P, other)[rows], shipped[rows]) > least
    if scheme == "powers":
        assert found.is_exact
        np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, other), shipped)


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_half_precision_ships_the_integers_of_its_float32_form(layer):
    fn, _ = _layer(layer(dtype=jnp.bfloat16))
    qmodel, qstate, program = _quantized(fn, X, SCHEMES["wide"])
    found = qjax.verify(program, qmodel, P, qstate, X)
    assert found.is_exact and _operations(program) == ["norm"]
    shipped = np.asarray(program(X[:2]))
    found = np.asarray(jax.jit(qmodel.apply_integer)(P, qstate, X[:2]))
    np.testing.assert_array_equal(found, shipped.astype(jnp.bfloat16))


# Neighbours.


def _normed_by(other, floor=0.0):
    """Values about their mean over the root of other moments."""
    return lambda h, p: (h - _mean(h)) / jnp.sqrt(other(h) + 1e-3 + floor)


SQUARE = _draw(6, 8, 8, seed=4) * 2
STEPS = np.arange(1, 9, dtype=np.float32)[:, None]
OTHERS = {
    "a mean of another axis": lambda h, p: (h - _mean(h, 1)) / _root(h - _mean(h)),
    "a root of another axis": _normed_by(lambda h: h.var(1, keepdims=True)),
    "a root of more": _normed_by(lambda h: h.var((1, 2), keepdims=True)),
    "a mean of more": lambda h, p: (h - _mean(h, (1, 2))) / _root(h - _mean(h)),
    "squares of more": _normed_by(
        lambda h: _mean(h * h, (1, 2)) - _mean(h) ** 2, floor=50.0
    ),
    "a mean of more in the root": lambda h, p: (
        h / jnp.sqrt(_mean(h * h) - _mean(h, (1, 2)) ** 2 + 50)
    ),
    "a root with the mean": _normed_by(lambda h: _mean(h * h)),
    "a variance and the mean": _normed_by(
        lambda h: h.var(-1, keepdims=True) + _mean(h) ** 2
    ),
    "a root without the mean": lambda h, p: h / _root(h - _mean(h)),
    "half the mean": lambda h, p: (h - 0.5 * _mean(h)) / _root(h - _mean(h)),
    "twice the mean": lambda h, p: (h - 2 * _mean(h)) / _root(h - _mean(h)),
    "a mean in two steps": lambda h, p: (
        (h - _mean(_mean(h), 1)) / jnp.sqrt(h.var((1, 2), keepdims=True) + 1e-3)
    ),
    "squares in two steps": lambda h, p: h / jnp.sqrt(_mean(_mean(h * h), 1)),
    "squares of a slice": lambda h, p: h / _root(h[..., :4]),
    "the mean of a slice": lambda h, p: (h - _mean(h[..., :4])) / _root(h - _mean(h)),
    "the squares of a row": lambda h, p: h / _root(h[:, :1]),
    "rows turned round": lambda h, p: h / _root(h[:, ::-1]),
    "a cube": lambda h, p: h**3 / _root(h),
    "fourth powers": lambda h, p: h / jnp.sqrt(_mean(h**4) + 1),
    "no root": lambda h, p: h / (_mean(h * h) + 1),
    "a root twice": lambda h, p: h / _root(h) / _root(h),
    "a product with the root": lambda h, p: h * _root(h),
    "a sum with the root": lambda h, p: h / (_root(h) + 1e-3),
    "a sum of sizes": lambda h, p: h / jnp.abs(h).sum(-1, keepdims=True),
    "a ceiling": lambda h, p: h / jnp.minimum(_root(h), 2.0),
    "a ceiling by a sign": lambda h, p: h / -jnp.maximum(-_root(h), -2.0),
    "a floor of the inverse": lambda h, p: h * jnp.maximum(1 / _root(h), 0.4),
    "less than a number": lambda h, p: h / jnp.sqrt(_mean(h * h) - 1e-3),
    "an epsilon by place": lambda h, p: h / jnp.sqrt(_mean(h * h) + STEPS),
    "a floor by place": lambda h, p: h / jnp.sqrt(jnp.maximum(_mean(h * h), STEPS)),
    "weights in a mean": lambda h, p: h / jnp.sqrt(_mean(h * h * p["gain"]) + 9),
    "a mask": lambda h, p: jax.nn.standardize(h, where=np.arange(8) > 2),
    "a gain of the data": lambda h, p: _standard(h) * jax.nn.sigmoid(_mean(h, 1)),
    "an epsilon that is a weight": lambda h, p: h / jnp.sqrt(_mean(h * h) + p["one"]),
    "statistics of other rows": lambda h, p: h / jnp.swapaxes(_root(h), 1, 2),
    "values of other rows": lambda h, p: (
        (h - 0.5 * jnp.swapaxes(h, 1, 2)) / jnp.sqrt(_mean(h * h) + 1e-3)
    ),
    "products with other rows": lambda h, p: (
        h / jnp.sqrt(_mean(h * jnp.swapaxes(h, 1, 2)) + 100)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_norm_is_no_other_number(name):
    """Either a program is close to the float model, or there is none."""
    fn, x = _one(OTHERS[name], SQUARE)
    params = P | {"one": np.float32(1)}
    qmodel = qjax.quantize_model(fn, params, x, scheme=Scheme(QSpec(8), QSpec(10)))
    qstate = qjax.calibrate(qmodel, params, [x])
    near = np.asarray(jax.jit(fn)(params, x))
    assert _decibels(near, jax.jit(qmodel.apply)(params, qstate, x)) > 20
    try:
        program = qjax.lower(qmodel, params, qstate, x)
    except (NotImplementedError, ValueError) as error:
        assert "norm" in str(error) or "not quantized" in str(error)
    else:
        assert _decibels(near, program(x)) > 20


def test_a_norm_of_a_norm_and_one_with_two_readers():
    def fn(p, x):
        y = _standard(x) * p["gain"]
        return _standard(y @ p["kernel"] + y, 1) + y

    _, _, program = _quantized(fn, X)
    assert _operations(program).count("norm") == 2
    assert_equals_oracle(program, X[:2])
    assert _decibels(jax.jit(fn)(P, X), program(X)) > 25


def test_functions_behind_a_norm_read_its_codes():
    pool = lambda y: nn.max_pool(y, (2, 2), (2, 2))
    for f in (lambda y: pool(jax.nn.relu(y)), jax.nn.gelu):
        fn = lambda p, x, f=f: f(_standard(x) * p["gain"])
        qmodel, qstate, program = _quantized(fn, IMAGES)
        assert _operations(program)[0] == "norm" and len(_operations(program)) == 2
        assert qjax.verify(program, qmodel, P, qstate, IMAGES).is_exact
        assert _decibels(jax.jit(fn)(P, IMAGES), program(IMAGES)) > 30


# Derivatives, stacks, files.

ALONE = {
    "mean": lambda x: _standard(x) * P["gain"] + P["bias"],
    "zero": lambda x: x / _root(x) * P["gain"],
    "relu": lambda x: jax.nn.relu(_standard(x) * P["gain"]),
}


@pytest.mark.kept
@pytest.mark.parametrize("form", ALONE)
def test_gradients_are_those_of_the_float_function_at_the_codes(form):
    """Where no code saturates: the input is on its grid, and the output in range."""
    fn = lambda p, x: ALONE[form](x)
    scheme = Scheme(rules=[Rule("output:0", QSpec(16))])
    qmodel = qjax.quantize_model(fn, (), X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, (), [X * 1.01])
    grid = qjax.scales(qmodel, (), qstate)["input:0"]
    x = (np.rint(X / grid.scale) * grid.scale).astype(np.float32)
    wanted_y = ALONE[form](x)
    inside = np.abs(wanted_y) < 0.9 * np.abs(wanted_y).max()
    dy = np.where(inside & (np.abs(wanted_y) > 1e-2), _draw(*X.shape), 0)
    slope = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) * dy)))
    run = lambda x: jax.jit(qmodel.apply)((), qstate, x)
    found, wanted = slope(run)(x), slope(ALONE[form])(x)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    _, hessian = jax.jvp(slope(run), (x,), (dy.astype(np.float32),))
    assert np.all(np.isfinite(hessian)) and np.any(hessian)


def test_stacked_schemes_give_the_integers_of_each():
    fn, x = FORMS["relu"]
    schemes = [Scheme(QSpec(b), QSpec(b)) for b in (4, 6, 8)]
    qmodel = qjax.quantize_model(fn, P, x, scheme=schemes[0])
    qstate = qjax.calibrate(qmodel, P, [x])
    run = lambda s: jax.jit(qmodel.apply)(P, qstate, x, scheme=s)
    found = jax.jit(jax.vmap(run))(qjax.stack_schemes(schemes))
    for own, scheme in zip(found, schemes, strict=True):
        np.testing.assert_allclose(own, run(scheme), atol=1e-6)


def test_a_program_with_a_norm_is_saved(tmp_path):
    _, _, program = _quantized(*FORMS["group norm"])
    program.save(tmp_path / "norm.qjax")
    again = qjax.load(tmp_path / "norm.qjax")
    np.testing.assert_array_equal(again(IMAGES[:2]), program(IMAGES[:2]))
    assert "a normalisation of integers" in str(program.report())


def test_norms_are_the_same_inside_of_shard_map():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    fn, x = FORMS["relu"]
    qmodel = qjax.quantize_model(fn, P, x)
    qstate = qjax.calibrate(qmodel, P, [x])
    run = lambda p, x: jax.jit(qmodel.apply)(p, qstate, x)
    inside = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    np.testing.assert_array_equal(jax.jit(inside)(P, x), jax.jit(run)(P, x))


# Refusals.


def test_values_about_the_mean_of_one_are_refused():
    with pytest.raises(ValueError, match="about the mean of one value"):
        qjax.quantize_model(lambda p, x: _standard(x), (), X[..., :1])


def test_a_norm_of_wide_codes_is_refused():
    scheme = Scheme(QSpec(8), QSpec(8), [Rule("input:0", QSpec(20))])
    with pytest.raises(ValueError, match="a word of at most 16 bits for its input"):
        _quantized(lambda p, x: _standard(x), X, scheme)


def test_a_group_beyond_64_bits_is_refused():
    x = _draw(2, 40_000)
    scheme = Scheme(QSpec(8), QSpec(16))
    with pytest.raises(ValueError, match="64 bits do not hold") as error:
        _quantized(lambda p, x: _standard(x), x, scheme)
    assert "a word of at most 8 bits for its input" in str(error.value)
    _, _, program = _quantized(lambda p, x: _standard(x), x)
    assert_equals_oracle(program, x)


def test_another_batch_is_refused_for_a_norm_over_it():
    _, _, program = _quantized(lambda p, x: x / _root(x, axis=0), X)
    assert_equals_oracle(program, X[::-1])
    with pytest.raises(ValueError, match="fixed by `norm`"):
        program(X[:3])


def test_an_epsilon_beyond_all_points_is_refused_and_one_far_above_ships():
    fn = lambda p, x: _standard(x, epsilon=1e38) * 1e19
    with pytest.raises(ValueError, match="Use a smaller epsilon"):
        _quantized(fn, X)
    powers = SCHEMES["powers"]
    for epsilon, scheme in ((1e6, Scheme()), (1e20, powers)):
        fn = lambda p, x, e=epsilon: _standard(x, epsilon=e) * np.float32(e**0.5)
        qmodel, qstate, program = _quantized(fn, X, scheme)
        assert _operations(program) == ["norm"]
        assert program.graph.nodes[0].attributes["more"] > 0
        assert qjax.verify(program, qmodel, P, qstate, X).is_exact
        assert_equals_oracle(program, X)
        assert _decibels(np.asarray(fn(P, X)), program(X)) > 30


def test_statistics_behind_two_masks_are_refused_and_their_remedy_ships():
    x = RNG.normal(0, 2, (4, 5, 8)).astype(np.float32)
    mask = RNG.random(x.shape) > 0.3
    norm = nn.LayerNorm()
    params = norm.init(jax.random.key(0), x)

    def lowered(fn):
        qmodel = qjax.quantize_model(fn, params, x, mask)
        qstate = qjax.calibrate(qmodel, params, [(x, mask)])
        program = qjax.lower(qmodel, params, qstate, x, mask)
        return program, qjax.verify(program, qmodel, params, qstate, x, mask)

    def two(p, x, m):
        own = {"axis": -1, "keepdims": True}
        mean, var = jnp.mean(x, where=m, **own), jnp.var(x, where=m[::-1], **own)
        return (x - mean) / jnp.sqrt(var + 1e-5)

    with pytest.raises(NotImplementedError, match="statistics behind a mask"):
        lowered(two)
    program, report = lowered(lambda p, x, m: norm.apply(p, jnp.where(m, x, 0)))
    assert _operations(program)[-1] == "norm"
    site = report.sites["output:0"]
    assert site.equal == site.codes


@pytest.mark.parametrize("is_folded", [True, False])
def test_the_mean_in_the_bias_of_a_norm_is_refused_with_a_remedy(is_folded):
    gain, bias = RNG.normal(1, 0.3, 32), RNG.normal(size=32)
    p = gain.astype(np.float32)[None], bias.astype(np.float32)[None]
    x = RNG.normal(0.5, 2, (16, 32)).astype(np.float32)

    def fn(p, x):
        mean = jnp.mean(x, -1, keepdims=True)
        factor = p[0] * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        if is_folded:
            return x * factor + (p[1] - mean * factor)
        return (x - mean) * factor + p[1]

    qmodel = qjax.quantize_model(fn, p, x)
    qstate = qjax.calibrate(qmodel, p, [x], progress=False)
    if is_folded:
        with pytest.raises(NotImplementedError, match="without its mean in the bias"):
            qjax.lower(qmodel, p, qstate, x)
        return
    program = qjax.lower(qmodel, p, qstate, x)
    shipped, wanted = np.asarray(program(x)), np.asarray(fn(p, x))
    assert np.sum(wanted**2) > 3000 * np.sum((shipped - wanted) ** 2)
    assert_equals_oracle(program, x)
