"""Softmax in integers: its table, its bounds, and that models compute what ships."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.integer_softmax import (
    exp_table,
    exp_tables,
    fraction,
    joined_table,
    probabilities,
)
from tests.oracles import assert_equals_oracle

ONE = 1 << 30
RNG = np.random.default_rng(0)
SCALES = [
    1.0,
    0.1,
    2.0**-20,
    3e-6,
    2.0**-126,
    2.0**100,
    *np.exp(RNG.uniform(-9, 3, 40)),
]


@pytest.mark.parametrize("scale", SCALES)
def test_the_table_is_that_of_exp_to_two_units(scale):
    scale = np.float32(scale)
    found = exp_table(scale)
    real = np.exp(-np.arange(256, dtype=np.longdouble) * np.longdouble(scale)) * ONE
    assert np.max(np.abs(found - real)) <= 2 and found[0] == ONE
    with jax.enable_x64(True):
        traced = jax.jit(lambda s: exp_table(s, jnp))(scale)
        np.testing.assert_array_equal(traced, found)
        traced = jax.vmap(lambda s: exp_table(s, jnp))(jnp.stack([scale, scale / 3]))
        np.testing.assert_array_equal(traced[0], found)
    whole = joined_table(exp_tables(scale, 4), 1 << 16)
    real = np.exp(-np.arange(1 << 16, dtype=np.longdouble) * np.longdouble(scale)) * ONE
    assert np.max(np.abs(whole - real)) <= 5
    np.testing.assert_array_equal(whole[:256], found)


def _rows(n):
    """Rows of one value, of two extremes, of ties, and of random codes."""
    rows = RNG.integers(-128, 128, (40, n))
    rows[0], rows[1], rows[2] = 7, -128, 127
    rows[3, : n // 2] = -128
    rows[4] = np.where(np.arange(n) == n - 1, 127, -128)
    return rows.astype(np.int32)


@pytest.mark.parametrize("scale", [0.002, 0.07, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4096, 40_000])
def test_shares_add_up_to_one_within_half_a_step_each(n, scale):
    rows, scale = _rows(n), np.float32(scale)
    table = joined_table(exp_tables(scale, n), 256).astype(np.int32)
    found = np.asarray(
        probabilities(jnp.asarray(rows), jnp.asarray(table), (1,))
    ).astype(np.int64)
    assert np.all(np.abs(found.sum(1) - ONE) <= n / 2)
    reals = np.exp((rows - rows.max(1, keepdims=True)) * np.float64(scale))
    reals *= ONE / reals.sum(1, keepdims=True)
    lost = 2 * n * 2.0 ** (30 - fraction(n)) / ONE  # Relative, of the sum.
    assert np.all(np.abs(found - reals) <= 3 + lost * reals)
    both = exp_tables(scale, n).astype(np.int32)
    np.testing.assert_array_equal(
        probabilities(jnp.asarray(rows), jnp.asarray(both), (1,)), found
    )


@pytest.mark.parametrize(("scale", "bits"), [(0.3, 8), (0.05, 8), (1.1, 4), (0.3, 16)])
def test_codes_are_at_most_one_from_those_of_float64(scale, bits):
    """All rows of three codes of three bits, and random ones."""
    small = np.array([*itertools.product(range(-4, 4), repeat=3)], np.int32)
    for rows in (small, _rows(100), _rows(4096)):
        step, most = 2.0**-bits, 2**bits - 1
        table = joined_table(exp_tables(np.float32(scale), rows.shape[1]), 256)
        found = np.asarray(
            probabilities(jnp.asarray(rows), jnp.asarray(table.astype(np.int32)), (1,))
        )
        codes = np.minimum(np.rint(found / (ONE * step)), most)
        reals = np.exp(
            (rows - rows.max(1, keepdims=True)) * np.float64(np.float32(scale))
        )
        reals /= reals.sum(1, keepdims=True)
        assert np.max(np.abs(codes - np.minimum(np.rint(reals / step), most))) <= 1


MASK = np.tril(np.ones((5, 8), bool))
EMPTY = np.where(np.arange(5)[:, None] == 2, False, MASK)
LOWEST = np.finfo(np.float32).min
ADDED = np.where(EMPTY, 0, -1e4).astype(np.float32)[None]


def _by_hand(p, x):
    e = jnp.exp(x @ p)
    return e / e.sum(-1, keepdims=True)


def _plus(p, x, eps=1e-6, join=jnp.add):
    z = jnp.where(EMPTY, x @ p, -1e9)
    e = jnp.where(EMPTY, jnp.exp(z - z.max(-1, keepdims=True)), 0)
    return e / join(e.sum(-1, keepdims=True), np.float32(eps))


PLUS = {
    "a little": (_plus, "floats"),
    "a third": (lambda p, x: _plus(p, x, 0.33), "powers"),
    "at least": (lambda p, x: _plus(p, x, 1e-3, jnp.maximum), "floats"),
}


@pytest.mark.parametrize(
    "form", ["a little", "a third", pytest.param("at least", marks=pytest.mark.heavy)]
)
def test_sums_plus_a_small_number_ship(form):
    fn, scheme = PLUS[form]
    qmodel = qjax.quantize_model(fn, P, X, scheme=SCHEMES[scheme])
    qstate = qjax.calibrate(qmodel, P, [X])
    program = qjax.lower(qmodel, P, qstate, X)
    assert program.graph.nodes[-1].operation == "softmax"
    assert qjax.verify(program, qmodel, P, qstate, X).is_exact
    assert_equals_oracle(program, X)
    again = jax.jit(qmodel.apply_integer)(P, qstate, X)
    np.testing.assert_array_equal(again, program(X))
    np.testing.assert_allclose(program(X), fn(P, X), atol=0.05)
    assert np.all(np.asarray(program(X))[:, 2] == 0)


@pytest.mark.parametrize("plus", [1, 1 << 10, ONE // 3, ONE])
def test_shares_of_more_than_a_sum_are_those_of_float64(plus):
    rows, scale = _rows(64), np.float32(0.07)
    table = joined_table(exp_tables(scale, 64), 256).astype(np.int32)
    own = jnp.asarray(rows), jnp.asarray(table), (1,), None, "zero"
    found = np.asarray(probabilities(*own, plus)).astype(np.int64)
    reals = np.exp((rows - rows.max(1, keepdims=True)) * np.float64(scale))
    reals *= ONE / (reals.sum(1, keepdims=True) + plus / ONE)
    assert np.all(np.abs(found - reals) <= 3 + 128 / ONE * reals)


FORMS = {
    "plain": lambda p, x: jax.nn.softmax(x),
    "dense": lambda p, x: jax.nn.softmax(x @ p),
    "temperature": lambda p, x: nn.softmax((x @ p) / 1.7, axis=1),
    "two axes": lambda p, x: jax.nn.softmax(x @ p, (1, 2)),
    "where": lambda p, x: jax.nn.softmax(x @ p, where=MASK),
    "select": lambda p, x: jax.nn.softmax(jnp.where(MASK, x @ p, -1e9)),
    "lowest": lambda p, x: jax.nn.softmax(jnp.where(~EMPTY, LOWEST, x @ p)),
    "infinite": lambda p, x: nnx.softmax(jnp.where(MASK, x, -jnp.inf)),
    "added": lambda p, x: jax.nn.softmax(x @ p + ADDED),
    "by hand": _by_hand,
    "attention": lambda p, x: jax.nn.dot_product_attention(
        (x @ p).reshape(-1, 5, 2, 4), *[x.reshape(-1, 5, 2, 4)] * 2, is_causal=True
    ),
}
X = RNG.normal(0, 2, (6, 5, 8)).astype(np.float32)
P = RNG.normal(0, 0.4, (8, 8)).astype(np.float32)
WIDE = Scheme(QSpec(8), QSpec(8), [Rule("softmax*", QSpec(16), optional=True)])
SCHEMES = {
    "floats": Scheme(),
    "powers": Scheme(QSpec(8, power_of_two=True), QSpec(8, power_of_two=True)),
    "wide": WIDE,
    "narrow": Scheme(QSpec(4), QSpec(5, signed=False)),
}


@pytest.mark.kept
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_models_compute_what_ships(form, scheme):
    fn = FORMS[form]
    qmodel = qjax.quantize_model(fn, P, X, scheme=SCHEMES[scheme])
    qstate = qjax.calibrate(qmodel, P, [X])
    program = qjax.lower(qmodel, P, qstate, X)
    operations = [node.operation for node in program.graph.nodes]
    assert operations.count("softmax") == 1
    found = qjax.verify(program, qmodel, P, qstate, X)
    site = next(s for s in found.sites if s.startswith(("softmax", "output")))
    assert found.sites[site].equal == found.sites[site].codes
    other = RNG.normal(0, 2, X.shape).astype(np.float32)
    assert_equals_oracle(program, other)
    shipped = np.asarray(program(other))
    np.testing.assert_array_equal(program(other[:3]), shipped[:3])
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, other), shipped
    )
    if scheme == "powers":
        assert found.is_exact
        np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, other), shipped)


MASKS_ALONE = {
    "where": lambda x: jax.nn.softmax(x, where=MASK),
    "select": lambda x: jax.nn.softmax(jnp.where(MASK, x, -1e9)),
    "added": lambda x: jax.nn.softmax(x + ADDED),
}


@pytest.mark.kept
@pytest.mark.parametrize("form", MASKS_ALONE)
def test_gradients_are_those_of_the_float_function_at_the_codes(form):
    """Where no code saturates: the input is on its grid, and the output in range."""
    fn = lambda p, x: MASKS_ALONE[form](x)
    rules = [Rule(name, QSpec(16), optional=True) for name in ("softmax*", "output:0")]
    scheme = Scheme(rules=rules)
    qmodel = qjax.quantize_model(fn, (), X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, (), [X])
    grid = qjax.scales(qmodel, (), qstate)["input:0"]
    x = (np.rint(X / grid.scale) * grid.scale).astype(np.float32)
    dy = RNG.normal(size=X.shape).astype(np.float32)
    slope = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) * dy)))(x)
    found = slope(lambda x: jax.jit(qmodel.apply)((), qstate, x))
    wanted = slope(lambda x: fn((), x))
    inside = np.abs(X) < 0.98 * np.abs(X).max()
    np.testing.assert_allclose(found[inside], wanted[inside], atol=2e-6)
    hessian = jax.jvp(lambda x: slope_of(qmodel, qstate, dy)(x), (x,), (dy,))
    assert np.all(np.isfinite(hessian[1]))


def slope_of(qmodel, qstate, dy):
    """Returns the gradient of a weighted sum of outputs."""
    return jax.grad(lambda x: jnp.sum(jax.jit(qmodel.apply)((), qstate, x) * dy))


def test_stacked_schemes_give_the_integers_of_each():
    fn = FORMS["attention"]
    schemes = [Scheme(QSpec(b), QSpec(b)) for b in (4, 6, 8)]
    qmodel = qjax.quantize_model(fn, P, X, scheme=schemes[0])
    qstate = qjax.calibrate(qmodel, P, [X])
    run = lambda s: jax.jit(qmodel.apply)(P, qstate, X, scheme=s)
    found = jax.jit(jax.vmap(run))(qjax.stack_schemes(schemes))
    for own, scheme in zip(found, schemes, strict=True):
        np.testing.assert_allclose(own, run(scheme), atol=1e-6)


def test_a_program_with_a_softmax_is_saved(tmp_path):
    qmodel = qjax.quantize_model(FORMS["where"], P, X)
    program = qjax.lower(qmodel, P, qjax.calibrate(qmodel, P, [X]), X)
    program.save(tmp_path / "softmax.qjax")
    again = qjax.load(tmp_path / "softmax.qjax")
    np.testing.assert_array_equal(again(X[:2]), program(X[:2]))
    assert "a softmax of integers" in str(program.report())


def _with_one(p, x):
    e = jnp.exp(x @ p)
    return e / (e.sum(-1, keepdims=True) + 1.0)


def _over_both(p, x):
    e = jnp.exp(x @ p)
    return e / e.sum(1, keepdims=True).sum(-1, keepdims=True)


def _of_two(p, x):
    e = jnp.exp2(x @ p)
    return e / e.sum(-1, keepdims=True)


PLACES = np.arange(1, 9, dtype=np.float32)[None, None]
OTHERS = {
    "a bias by place": lambda p, x: jax.nn.softmax(x @ p + PLACES),
    "a mask of ones": lambda p, x: jax.nn.softmax(x @ p + np.where(MASK, 1, ADDED)),
    "a factor by place": lambda p, x: nn.softmax(x @ p * PLACES),
    "a negative factor": lambda p, x: jax.nn.softmax(-(x @ p)),
    "base two": _of_two,
    "a sum over more": _over_both,
    "a one more": _with_one,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_integers_compute_otherwise_or_not_at_all_is_no_other_number(name):
    """Either a program is close to the float model, or there is none."""
    qmodel = qjax.quantize_model(OTHERS[name], P, X)
    qstate = qjax.calibrate(qmodel, P, [X])
    near = np.asarray(OTHERS[name](P, X))
    np.testing.assert_allclose(jax.jit(qmodel.apply)(P, qstate, X), near, atol=0.2)
    try:
        program = qjax.lower(qmodel, P, qstate, X)
    except (NotImplementedError, ValueError) as error:
        assert "softmax" in str(error) or "norm" in str(error)
    else:
        np.testing.assert_allclose(program(X), near, atol=0.2)


def test_a_mask_that_does_not_hide_is_refused():
    fn = lambda p, x: jax.nn.softmax(jnp.where(MASK, x @ p, -150.0))
    x = X * 30
    qmodel = qjax.quantize_model(fn, P, x)
    qstate = qjax.calibrate(qmodel, P, [x])
    with pytest.raises(ValueError, match="what it masks still counts"):
        qjax.lower(qmodel, P, qstate, x)


def test_a_softmax_of_wide_codes_is_refused():
    qmodel = qjax.quantize_model(
        FORMS["dense"], P, X, scheme=Scheme(QSpec(8), QSpec(20))
    )
    qstate = qjax.calibrate(qmodel, P, [X])
    with pytest.raises(ValueError, match="at most 16 bits"):
        qjax.lower(qmodel, P, qstate, X)


def test_masks_are_read_inside_of_shard_map():
    """There JAX puts moves between mesh axes among the equations of a mask."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    qmodel = qjax.quantize_model(FORMS["select"], P, X)
    qstate = qjax.calibrate(qmodel, P, [X])
    run = lambda p, x: jax.jit(qmodel.apply)(p, qstate, x)
    inside = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    np.testing.assert_array_equal(jax.jit(inside)(P, X), jax.jit(run)(P, X))


def _maximum_of_another_axis(p, x):
    z = x @ p
    e = jnp.exp(z - z.max(1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _maximum_above_alone(p, x):
    z = x @ p
    return jnp.exp(z - z.max(-1, keepdims=True)) / jnp.exp(z).sum(-1, keepdims=True)


def _maximum_below_alone(p, x):
    z = x @ p
    below = jnp.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
    return jnp.exp(z) / below


NO_SOFTMAX = _maximum_of_another_axis, _maximum_above_alone, _maximum_below_alone


@pytest.mark.parametrize("fn", NO_SOFTMAX)
def test_a_maximum_that_does_not_cancel_makes_no_softmax(fn):
    qmodel = qjax.quantize_model(fn, P, X)
    qstate = qjax.calibrate(qmodel, P, [X])
    wanted = np.asarray(fn(P, X))
    found = np.asarray(jax.jit(qmodel.apply)(P, qstate, X))
    assert np.max(np.abs(found - wanted)) < 0.1 * np.max(np.abs(wanted))
    with pytest.raises(NotImplementedError, match="has no integer rule"):
        qjax.lower(qmodel, P, qstate, X)


def test_a_maximum_of_more_axes_cancels():
    def fn(p, x):
        z = x @ p
        e = jnp.exp(z - z.max((1, 2), keepdims=True))
        return e / e.sum(-1, keepdims=True)

    qmodel = qjax.quantize_model(fn, P, X)
    qstate = qjax.calibrate(qmodel, P, [X])
    program = qjax.lower(qmodel, P, qstate, X)
    assert "softmax" in [node.operation for node in program.graph.nodes]
    np.testing.assert_allclose(program(X), jax.nn.softmax(X @ P), atol=0.1)


def test_rows_beyond_the_places_of_the_table_are_refused():
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    qmodel = qjax.quantize_model(lambda p, x: jax.nn.softmax(x, axis=0), (), x)
    program = qjax.lower(qmodel, (), qjax.calibrate(qmodel, (), [x]), x)
    assert_equals_oracle(program, x[:2])
    with pytest.raises(ValueError, match="at most 32768 places"):
        program(np.zeros((40_000, 3), np.float32))
