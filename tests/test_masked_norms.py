"""Normalisations by what a mask keeps: bounds of their integers, and models that ship.

The oracle is the formula in long doubles, on the codes less their zero point.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax import QSpec, Scheme
from qjax.backends.xla import run as xla
from qjax.formats import check
from qjax.graph import reference
from qjax.integer_masked_norm import added, coded, most_places, normalised
from qjax.integer_norm import fraction, scaled
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _rank_promotion():
    """Gains of one axis, as models of others have them."""
    with jax.numpy_rank_promotion("allow"):
        yield


def _real(rows, kept, least, is_centred, epsilon, floor):
    """Normalises rows in long doubles, in units of one code."""
    x, m = rows.astype(np.longdouble), kept.astype(np.longdouble)
    count = np.maximum(m.sum(1, keepdims=True), least)
    total = (m * x).sum(1, keepdims=True) if is_centred else np.longdouble(0)
    u = count * x - total
    v = count * (m * x * x).sum(1, keepdims=True) - total * total
    below = np.maximum(v + epsilon * count**2, floor * count**2)
    root = np.sqrt(np.where(below > 0, below, 1))
    return np.where(below > 0, u / root, np.where(u == 0, 0, np.copysign(np.inf, u)))


@functools.partial(jax.jit, static_argnames=("least", "is_centred"))
def _jitted(rows, kept, numbers, least, is_centred):
    own = {"least": least, "is_centred": is_centred}
    return normalised(rows, kept, (1,), (1,), *numbers, **own)


def _assert_near(rows, kept, *, is_centred, epsilon, floor=0.0, bits=8, least=0):
    """Each code is at most one from the real value, rounded to its grid."""
    numbers = added(np.float64(epsilon), np.float64(floor), rows.shape[1])
    with jax.enable_x64(True):
        found = _jitted(rows, kept, numbers, least=least, is_centred=is_centred)
    real = _real(rows, kept, least, is_centred, epsilon, floor)
    step = np.float64(np.max(np.abs(real[kept]), initial=1e-9)) / 2 ** (bits - 1)
    gain = np.array([1.0, -0.7, 0.0, 1e-2])[:, None, None] / step
    offset = np.array([0.0, 0.3, -1.0, 0.5])[:, None, None] * 2 ** (bits - 1)
    unit = 2.0 ** -fraction(rows.shape[1], True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, _ = coded(*found, *scaled(gain * unit, offset), 3, low, high)
    with np.errstate(invalid="ignore"):
        exact = np.where(gain == 0, 0, real * gain) + offset
    exact = np.clip(np.floor(exact + np.longdouble(0.5)) + 3, low, high)
    assert np.max(np.abs(np.asarray(codes) - exact)) <= 1


@pytest.mark.parametrize("is_centred", [True, False])
def test_codes_of_all_small_rows_and_masks_are_at_most_one_off(is_centred):
    pairs = itertools.product(
        itertools.product(range(-4, 4), repeat=3),
        itertools.product((False, True), repeat=3),
    )
    rows, kept = map(np.array, zip(*pairs, strict=True))
    for epsilon, floor in ((0, 0), (0.37, 0), (1e-9, 0), (1e-3, 2.5)):
        for least in (0, 1):
            own = {"epsilon": epsilon, "floor": floor, "least": least}
            _assert_near(np.int32(rows), kept, is_centred=is_centred, **own)


@pytest.mark.parametrize("is_byte", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 64, 4096])
def test_codes_are_at_most_one_from_those_of_long_doubles(n, is_byte):
    rng, half = np.random.default_rng(n), 128 if is_byte else 1 << 15
    rows = rng.integers(-half, half, (14, n)).astype(np.int32)
    rows[4:8] = rng.integers(0, 3, (4, n))
    rows[8], rows[9] = 5, -half
    kept = rng.random((14, n)) < np.linspace(0, 1, 14)[:, None]
    # One that is kept, of like and of far ones; all.
    kept[1], kept[5], kept[8] = np.arange(n) == 0, np.arange(n) == n - 1, True
    for epsilon, floor in ((1e-6, 0), (3.0, 0), (1e7, 0), (0, 100.0), (0, 0)):
        for is_centred, bits in ((True, 8), (False, 16), (True, 16)):
            own = {"epsilon": epsilon, "floor": floor, "bits": bits}
            _assert_near(rows, kept, is_centred=is_centred, **own)


def test_sums_of_the_largest_groups_fit():
    n = most_places(False)
    rows = np.where(np.arange(n) % 2, -(1 << 15), (1 << 15) - 1).astype(np.int32)[None]
    _assert_near(rows, np.ones((1, n), bool), is_centred=True, epsilon=1e-6, bits=16)
    shifted = rows + (1 << 15)
    _assert_near(shifted, np.ones((1, n), bool), is_centred=False, epsilon=0, bits=16)


# Models.

X = RNG.normal(0, 2, (4, 5, 8)).astype(np.float32)
MASK = RNG.random(X.shape) > 0.3
MASK[1, 1] = np.arange(8) == 3
P = {
    "scale": RNG.uniform(0.5, 2, 8).astype(np.float32),
    "bias": RNG.normal(0, 1, 8).astype(np.float32),
}


def _layer(layer):
    names = ["scale"] if isinstance(layer, nn.RMSNorm) else ["scale", "bias"]
    own = lambda p: {"params": {name: p[name] for name in names}}
    return lambda p, x, m: layer.apply(own(p), x, mask=m)


def _nnx(layer):
    graph, state = nnx.split(layer)

    def fn(p, x, m):
        return nnx.merge(graph, state)(x, mask=m) * p["scale"]

    return fn


def _by_factor(p, x, m):
    m = m.astype(jnp.float32)
    count = jnp.maximum(m.sum(-1, keepdims=True), 1)
    u = x - (x * m).sum(-1, keepdims=True) / count
    var = (u**2 * m).sum(-1, keepdims=True) / count
    return u * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def _by_inverse(p, x, m):
    pad = ~m
    over = 1 / (1e-6 + jnp.sum(~pad, -1, keepdims=True, dtype=jnp.float32))
    square = jnp.sum(jnp.where(pad, 0, x * x), -1, keepdims=True) * over
    return x / jnp.sqrt(square + 1e-5)


def _by_where(p, x, m):
    mean = jnp.mean(x, -1, keepdims=True, where=m)
    var = jnp.var(x, -1, keepdims=True, where=m)
    return jnp.where(m, (x - mean) / jnp.sqrt(var + 1e-6), 0)


def _by_places(p, x, m):
    """Over other axes, in another order, behind a swap."""
    x, m = jnp.swapaxes(x, 1, 2), jnp.swapaxes(m, 1, 2)
    return jax.nn.standardize(x, (1, 2), where=m, epsilon=1e-5)


MODELS = {
    "layer": _layer(nn.LayerNorm()),
    "slow variance": _layer(nn.LayerNorm(use_fast_variance=False)),
    "rms": _layer(nn.RMSNorm()),
    "group": _layer(nn.GroupNorm(num_groups=2)),
    "instance": _layer(nn.InstanceNorm()),
    "nnx": _nnx(nnx.LayerNorm(8, rngs=nnx.Rngs(0))),
    "factor": _by_factor,
    "inverse": _by_inverse,
    "where": _by_where,
    "places": _by_places,
}
POWER = QSpec(8, power_of_two=True)
SCHEMES = Scheme(), Scheme(POWER, POWER), Scheme(QSpec(8), QSpec(16))


def _quantized(fn, *inputs, scheme=None):
    qmodel = qjax.quantize_model(fn, P, *inputs, scheme=scheme or Scheme())
    qstate = qjax.calibrate(qmodel, P, [inputs])
    return qmodel, qstate, qjax.lower(qmodel, P, qstate, *inputs)


def _decibels(wanted, found):
    noise = np.sum((np.float64(wanted) - np.float64(found)) ** 2) or 1e-30
    return 10 * np.log10(np.sum(np.float64(wanted) ** 2) / noise)


@pytest.mark.kept
@pytest.mark.parametrize(
    ("name", "is_known", "scheme"),
    [(name, bool(k % 2), k % 3) for k, name in enumerate(MODELS)]
    + [("layer", True, 1), ("factor", False, 2), ("group", False, 0)],
)
def test_models_compute_what_ships(name, is_known, scheme):
    fn = MODELS[name]
    own = (lambda p, x: fn(p, x, MASK)) if is_known else fn
    inputs = (X,) if is_known else (X, MASK)
    qmodel, qstate, program = _quantized(own, *inputs, scheme=SCHEMES[scheme])
    operations = [node.operation for node in program.graph.nodes]
    assert operations.count("masked_norm") == 1
    report = qjax.verify(program, qmodel, P, qstate, *inputs)
    assert all(site.equal == site.codes for site in report.sites.values())
    others = [(0.9 * X[::-1]).astype(np.float32), ~MASK][: len(inputs)]
    assert_equals_oracle(program, *others)
    shipped = np.asarray(program(*others))
    if not is_known:
        fewer = np.asarray(program(*(v[:3] for v in others)))
        np.testing.assert_array_equal(fewer, shipped[:3])
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, *others), shipped
    )
    kept = MASK if name != "places" else np.swapaxes(MASK, 1, 2)
    wanted, found = own(P, *inputs), program(*inputs)
    assert _decibels(np.asarray(wanted)[kept], found[kept]) > (30, 30, 60)[scheme]


def test_a_masked_norm_is_saved_and_its_report_names_it(tmp_path):
    qmodel, qstate, program = _quantized(MODELS["layer"], X, MASK)
    mask = MASK.copy()
    mask[2] = False
    program.save(tmp_path / "norm.qjax", golden=(X, mask))
    assert check.main([str(tmp_path / "norm.qjax")]) == 0
    again = qjax.load(tmp_path / "norm.qjax")
    np.testing.assert_array_equal(again(X, MASK), program(X, MASK))
    assert "normalisation" in str(program.report())
    (row,) = (r for r in program.backend_report().rows if "masked_norm" in r.node)
    assert row.backend == "native"


def test_tflite_has_no_norm_behind_a_mask():
    scheme = qjax.presets.tflite_int8()
    fn = MODELS["layer"]
    qmodel = qjax.quantize_model(fn, P, X, MASK, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [(X, MASK)], progress=False)
    with pytest.raises((NotImplementedError, ValueError), match="behind a mask"):
        qjax.lower(qmodel, P, qstate, X, MASK, target=qjax.targets.tflite)


def test_fewer_places_than_a_graph_is_made_for():
    """Bits of values are by the most places, in XLA too."""
    _, _, program = _quantized(MODELS["layer"], X, MASK)
    graph, params = program.graph, {k: np.asarray(p) for k, p in program.params.items()}
    (node,) = (n for n in graph.nodes if n.operation == "masked_norm")
    own = {**node.attributes, "most_places": 40, "point": node.attributes["point"] - 8}
    own |= {name: own[name] >> 8 for name in ("epsilon", "floor")}
    new = dataclasses.replace(node, attributes=own)
    nodes = tuple(new if n is node else n for n in graph.nodes)
    graph = dataclasses.replace(graph, nodes=nodes)
    codes = [RNG.integers(-128, 128, X.shape).astype(np.int8), MASK.astype(np.int8)]
    codes = [
        c.astype(graph.values[v].dtype)
        for c, v in zip(codes, graph.inputs, strict=True)
    ]
    values = reference.run(graph, params, codes)
    made = jax.jit(lambda xs: xla.run(graph, params, xs))(codes)
    np.testing.assert_array_equal(made[node.output], values[node.output])


@pytest.mark.parametrize("least", [0, 1])
def test_where_nothing_is_kept_is_no_part_of_the_range(least):
    mask = MASK.copy()
    mask[0, 0] = mask[2] = False
    fn = MODELS["factor" if least else "layer"]
    qmodel, qstate, program = _quantized(fn, X, mask)
    report = qjax.verify(program, qmodel, P, qstate, X, mask)
    assert report.sites["output:0"].equal == X.size
    found = np.asarray(program(X, mask))
    assert _decibels(np.asarray(fn(P, X, mask))[mask], found[mask]) > 30
    if least:  # No batch at all has the same form.
        assert qmodel.apply_integer(P, qstate, X[:0], mask[:0]).shape == X[:0].shape
    if not least:
        offset = np.broadcast_to(P["bias"], (5, 8))
        np.testing.assert_allclose(found[2], offset, atol=0.05)
    assert_equals_oracle(program, X, mask)


def _halved(p, x, m):
    total = jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True)
    return x / jnp.sqrt(total / (0.5 * jnp.sum(m, -1, keepdims=True)) + 1)


OTHERS = {
    "half the count": _halved,
    "a count of others": lambda p, x, m: (
        x
        / jnp.sqrt(
            jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True)
            / jnp.maximum(jnp.sum(m[:, ::-1], -1, keepdims=True), 1)
            + 1
        )
    ),
    "two masks": lambda p, x, m: (
        (x - jnp.mean(x, -1, keepdims=True, where=m))
        / jnp.sqrt(1 + jnp.var(x, -1, keepdims=True, where=m[..., ::-1]))
    ),
    "the mean of all": lambda p, x, m: (
        (x - jnp.mean(x, -1, keepdims=True))
        / jnp.sqrt(1 + jnp.var(x, -1, keepdims=True, where=m))
    ),
    "a sum": lambda p, x, m: (
        x / jnp.sqrt(1 + jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True))
    ),
    "all places": lambda p, x, m: (
        x / jnp.sqrt(1 + jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True) / 8)
    ),
    "at least two": lambda p, x, m: (
        x
        / jnp.sqrt(
            1
            + jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True)
            / jnp.maximum(jnp.sum(m, -1, keepdims=True), 2)
        )
    ),
    "ones beside it": lambda p, x, m: (
        x
        / jnp.sqrt(
            1
            + jnp.sum(jnp.where(m, x * x, 1), -1, keepdims=True)
            / jnp.maximum(jnp.sum(m, -1, keepdims=True), 1)
        )
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_masked_norm_is_no_other_number(name):
    """Either a program is close to the float model, or there is none."""
    fn = OTHERS[name]
    try:
        qmodel, qstate, program = _quantized(fn, X, MASK)
    except (NotImplementedError, ValueError) as error:
        assert "norm" in str(error) or "not quantized" in str(error)
    else:
        assert _decibels(fn(P, X, MASK), program(X, MASK)) > 25


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("least", [2, 8])
def test_a_larger_least_count_is_no_count(least, is_inverse):
    """It differs for groups alone of which a mask keeps few."""
    x = RNG.normal(0, 2, (2, 64)).astype(np.float32)
    kept = np.arange(64) == np.array([[3], [40]])

    def fn(p, x, m):
        m = ~m if is_inverse else m
        total = jnp.sum(jnp.where(m, x * x, 0), -1, keepdims=True)
        count = jnp.maximum(jnp.sum(m, -1, keepdims=True), least)
        return x / jnp.sqrt(total / count + 1)

    with pytest.raises(NotImplementedError, match="norm"):
        _quantized(fn, x, ~kept if is_inverse else kept)


def test_too_large_groups_and_too_unequal_factors_are_refused():
    wide = RNG.normal(0, 1, (1, 1 << 15, 2)).astype(np.float32)
    norm = lambda p, x: jax.nn.standardize(x, (1, 2), where=np.arange(2) < 1)
    with pytest.raises(ValueError, match="Use a word of at most 8 bits"):
        _quantized(norm, wide, scheme=Scheme(QSpec(8), QSpec(16)))
    unequal = np.float32([1e-12] + [1] * 7)
    norm = lambda p, x, m: jax.nn.standardize(x, where=m, epsilon=1e-30) * unequal
    with pytest.raises(ValueError, match="a larger epsilon"):
        _quantized(norm, X, MASK)


def test_gradients_are_those_of_the_float_function():
    mask = MASK.copy()
    mask[1, 1, :4] = True
    qmodel, qstate, _ = _quantized(_by_factor, X, mask)
    loss = lambda f: lambda p: jnp.sum(f(p) ** 2)
    found = jax.grad(loss(lambda p: qmodel.apply(p, qstate, X, mask)))(P)
    wanted = jax.grad(loss(lambda p: _by_factor(p, X, mask)))(P)
    for name in P:
        # The largest codes saturate: no derivative is theirs.
        far = np.linalg.norm(found[name] - wanted[name])
        assert far < 0.1 * np.linalg.norm(wanted[name])


def test_an_empty_batch_needs_no_mask():
    """JAX leaves out a choice among no values, without which no mask is found."""
    fn = lambda p, x, mask: nn.LayerNorm().apply(p, x, mask=mask)
    x, mask = RNG.normal(size=(4, 8)).astype(np.float32), np.ones((4, 8), bool)
    p = nn.LayerNorm().init(jax.random.key(0), x)
    qmodel = qjax.quantize_model(fn, p, x, mask)
    qstate = qjax.calibrate(qmodel, p, [(x, mask)], progress=False)
    for run in (qmodel.apply, qmodel.apply_integer):
        assert run(p, qstate, x[:0], mask[:0]).shape == (0, 8)
