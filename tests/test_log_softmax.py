"""Log-softmax and logsumexp in integers: bounds, masks, and that models ship."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.scipy.special import logsumexp

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.integer import fixed_point
from qjax.integer_softmax import (
    LOG,
    exp_tables,
    fraction,
    joined_table,
    log_codes,
    logarithm,
)
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (6, 5, 8)).astype(np.float32)
P = RNG.normal(0, 0.4, (8, 8)).astype(np.float32)
MASK = np.tril(np.ones((5, 8), bool))
EMPTY = np.where(np.arange(5)[:, None] == 2, False, MASK)
ADDED = np.where(EMPTY, 0, -1e4).astype(np.float32)[None]
KEPT = RNG.random((6, 1, 8)) > 0.4
KEPT[0] = False


def test_the_logarithm_of_a_sum_is_within_one_unit():
    powers = 2 ** np.arange(61, dtype=np.int64)
    near = [powers + k for k in (-1, 0, 1)]
    drawn = [RNG.integers(1, 1 << int(b), 2000) for b in (8, 16, 31, 32, 33, 45, 61)]
    roots = np.int64(2.0 ** (np.arange(20, 61) + 0.5))
    totals = np.concatenate([*near, *drawn, roots, np.arange(1, 4096)])
    totals = totals[totals > 0]
    for point in (30, 15):
        with jax.enable_x64(True):
            found = np.asarray(jax.jit(lambda x, p=point: logarithm(x, p))(totals))
        reals = np.log(totals.astype(np.longdouble)) - point * np.log(np.longdouble(2))
        assert np.max(np.abs(found - reals * 2**LOG)) < 0.7
        assert found[np.flatnonzero(totals == 1 << point)[0]] == 0


@functools.partial(jax.jit, static_argnums=4)
def _jitted(rows, table, keep, factors, is_sum):
    point = fraction(rows.shape[1])
    ends, own = (100, -32768, 32767), (rows, table, (1,), keep, "zero")
    return log_codes(*own, is_sum=is_sum, point=point, factors=factors, ends=ends)[0]


def _by_codes(rows, scale, scale_out, is_sum, keep=None):
    """Returns codes of 16 bits, those of float64, and what the sum may be off by."""
    n = rows.shape[1]
    table = joined_table(exp_tables(scale, n), 256).astype(np.int32)
    multipliers, shifts = fixed_point(np.float64([scale, 1]) / np.float64(scale_out))
    factors = multipliers[0], shifts[0], multipliers[1], shifts[1] + LOG
    found = _jitted(rows, table, keep, factors, is_sum)
    reals = rows * np.float64(scale)
    reals = reals if keep is None else np.where(keep, reals, -np.inf)
    top = reals.max(1, keepdims=True)
    logs = top + np.log(np.exp(reals - top).sum(1, keepdims=True))
    steps = (logs if is_sum else reals - logs) / np.float64(scale_out)
    return np.asarray(found), np.clip(np.rint(steps) + 100, -32768, 32767), steps


def _rows(n):
    """Rows of one value, of two extremes, of ties, and of random codes."""
    rows = RNG.integers(-128, 128, (12, n))
    rows[0], rows[1], rows[2] = 7, -128, 127
    rows[3, : n // 2] = -128
    rows[4] = np.where(np.arange(n) == n - 1, 127, -128)
    return rows.astype(np.int32)


@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize("scale", [0.002, 0.125, 1.1])
def test_codes_are_at_most_one_from_those_of_float64(scale, is_sum):
    """All rows of three codes of three bits, and random ones of lengths to 4096."""
    small = np.array([*itertools.product(range(-4, 4), repeat=3)], np.int32)
    scale = np.float32(scale)
    for rows in (small, *map(_rows, (1, 2, 3, 64, 1000, 4096))):
        for scale_out in np.float32([0.05, 2.0**-11, 700.0]):
            found, wanted, steps = _by_codes(rows, scale, scale_out, is_sum)
            assert np.max(np.abs(found - wanted)) <= 1
            # Beyond half a step by what is off in the sum, and before it is rounded.
            off = 2 * rows.shape[1] * 2.0 ** -fraction(rows.shape[1])
            off = (off + 2.0**-26) / float(scale_out) + 2.0**-13
            inside = np.abs(steps) < 32000
            assert np.all(np.abs(found - 100 - steps)[inside] <= 0.5 + off)


def test_what_is_masked_has_the_least_code():
    rows = _rows(64)
    keep = RNG.random(rows.shape) > 0.5
    keep[5] = False
    for is_sum in (False, True):
        with np.errstate(invalid="ignore"):
            found, wanted, _ = _by_codes(
                rows, np.float32(0.1), np.float32(0.01), is_sum, keep
            )
        own = keep.any(1, keepdims=True) if is_sum else keep
        assert np.all(found[~own] == -32768)
        assert np.max(np.abs(found - wanted)[own]) <= 1


def _by_hand(p, x):
    z = x @ p
    return jnp.log(jnp.sum(jnp.exp(z), 1, keepdims=True))


def _less_its_sum(p, x):
    z = x @ p
    return z - jax.nn.logsumexp(z, -1, keepdims=True)


FORMS = {
    "plain": (lambda p, x: jax.nn.log_softmax(x), "powers"),
    "dense": (lambda p, x: nn.log_softmax(x @ p), "floats"),
    "temperature": (lambda p, x: nn.log_softmax((x @ p) / 1.7, axis=1), "wide"),
    "where": (lambda p, x: jax.nn.log_softmax(x @ p, where=EMPTY), "floats"),
    "select": (
        lambda p, x: jax.nn.log_softmax(jnp.where(EMPTY, x @ p, -1e9)),
        "powers",
    ),
    "added": (lambda p, x: jax.nn.log_softmax(x @ p + ADDED), "floats"),
    "by parts": (_less_its_sum, "powers"),
    "of a softmax": (lambda p, x: jnp.log(jax.nn.softmax(x @ p)), "floats"),
    "sum": (lambda p, x: logsumexp(x @ p, axis=-1), "floats"),
    "sum of two axes": (
        lambda p, x: jax.nn.logsumexp(x @ p, (1, 2), keepdims=True),
        "powers",
    ),
    "sum where": (lambda p, x: jax.nn.logsumexp(x, 2, where=EMPTY), "floats"),
    "sum select": (
        lambda p, x: logsumexp(jnp.where(EMPTY, x @ p, -jnp.inf), axis=2),
        "powers",
    ),
    "sum by hand": (_by_hand, "floats"),
}
SCHEMES = {
    "floats": Scheme(),
    "powers": Scheme(QSpec(8, power_of_two=True), QSpec(8, power_of_two=True)),
    "wide": Scheme(QSpec(8), QSpec(8), [Rule("output:0", QSpec(16))]),
}


LIGHT = "where", "select", "sum", "sum of two axes"


@pytest.mark.kept
@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=() if f in LIGHT else pytest.mark.heavy) for f in FORMS],
)
def test_logarithms_of_models_compute_what_ships(form):
    fn, scheme = FORMS[form]
    qmodel = qjax.quantize_model(fn, P, X, scheme=SCHEMES[scheme])
    qstate = qjax.calibrate(qmodel, P, [X])
    program = qjax.lower(qmodel, P, qstate, X)
    operations = [node.operation for node in program.graph.nodes]
    assert operations[-1] == ("logsumexp" if "sum" in form else "log_softmax")
    other = RNG.normal(0, 2, X.shape).astype(np.float32)
    report = qjax.verify(program, qmodel, P, qstate, other)
    assert all(row.equal == row.codes for row in report.sites.values())
    assert report.is_exact
    assert_equals_oracle(program, other)
    shipped = np.asarray(program(other))
    np.testing.assert_array_equal(program(other[:3]), shipped[:3])
    np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, other), shipped)
    again = jax.jit(qmodel.apply_integer)(P, qstate, other)
    np.testing.assert_array_equal(again, shipped)
    wanted = np.asarray(fn(P, X))
    kept = wanted > -1e3
    assert np.max(np.abs(program(X) - wanted)[kept]) < 0.05 * np.ptp(wanted[kept])
    assert np.all(np.asarray(program(X))[~kept] == np.min(program(X)))


MASKED = {
    "where": (lambda p, x, m: jax.nn.log_softmax(x @ p, where=m), KEPT),
    "sum": (lambda p, x, m: jax.nn.logsumexp(x @ p, -1, where=m), KEPT),
    "added": (
        lambda p, x, m: jax.nn.log_softmax(x @ p + m),
        np.where(KEPT, 0, -1e9).astype(np.float32),
    ),
}


@pytest.mark.parametrize(
    "form", ["where", "sum", pytest.param("added", marks=pytest.mark.heavy)]
)
def test_masks_that_are_inputs_leave_logarithms_and_their_ranges_alone(form):
    fn, mask = MASKED[form]
    qmodel = qjax.quantize_model(fn, P, X, mask)
    qstate = qjax.calibrate(qmodel, P, [(X, mask)])
    assert float(qstate["output:0"].low) > -50
    program = qjax.lower(qmodel, P, qstate, X, mask)
    other = X[::-1].copy(), np.roll(mask, 1, 0)
    report = qjax.verify(program, qmodel, P, qstate, *other)
    assert report.is_exact
    assert_equals_oracle(program, *other)
    shipped = np.asarray(program(*other))
    again = jax.jit(qmodel.apply_integer)(P, qstate, *other)
    np.testing.assert_array_equal(again, shipped)


def test_ranges_that_training_moves_see_no_mask():
    fn = lambda p, x: jax.nn.log_softmax(x @ p, where=MASK)
    qmodel = qjax.quantize_model(fn, P, X)
    qstate = qjax.calibrate(qmodel, P, [X])
    y, moved = jax.jit(qmodel.apply_and_update)(P, qstate, X)
    assert np.all(np.isfinite(y))
    assert np.isfinite(moved["output:0"].low) and moved["output:0"].low > -50


GRADIENTS = {
    "plain": lambda p, x: jax.nn.log_softmax(x),
    "where": lambda p, x: jnp.where(MASK, jax.nn.log_softmax(x, where=MASK), 0),
    "sum": lambda p, x: jax.nn.logsumexp(x, -1, where=MASK),
}


@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_of_logarithms_are_those_of_the_float_function(form):
    fn = GRADIENTS[form]
    rules = [Rule(name, QSpec(16), optional=True) for name in ("log*", "output:0")]
    qmodel = qjax.quantize_model(fn, (), X, scheme=Scheme(rules=rules))
    qstate = qjax.calibrate(qmodel, (), [X])
    grid = qjax.scales(qmodel, (), qstate)["input:0"]
    x = (np.rint(X / grid.scale) * grid.scale).astype(np.float32) * np.float32(0.95)
    x = (np.rint(x / grid.scale) * grid.scale).astype(np.float32)
    dy = RNG.normal(size=fn((), X).shape).astype(np.float32)
    slope = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) * dy)))(x)
    found = slope(lambda x: qmodel.apply((), qstate, x))
    np.testing.assert_allclose(found, slope(lambda x: fn((), x)), atol=4e-6)


def test_programs_with_logarithms_are_saved(tmp_path):
    fn = lambda p, x: (jax.nn.log_softmax(x @ p), jax.nn.logsumexp(x, 2))
    qmodel = qjax.quantize_model(fn, P, X)
    program = qjax.lower(qmodel, P, qjax.calibrate(qmodel, P, [X]), X)
    program.save(tmp_path / "log.qjax")
    again = qjax.load(tmp_path / "log.qjax")
    for a, b in zip(again(X[:2]), program(X[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    text = str(program.report())
    assert "a log-softmax of integers" in text and "a logsumexp of integers" in text


def test_rows_beyond_the_places_of_a_logarithm_are_refused():
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    qmodel = qjax.quantize_model(lambda p, x: jax.nn.logsumexp(x, 0), (), x)
    program = qjax.lower(qmodel, (), qjax.calibrate(qmodel, (), [x]), x)
    with pytest.raises(ValueError, match="at most 32768 places"):
        program(np.zeros((40_000, 3), np.float32))


def test_masks_of_logarithms_that_do_not_hide_are_refused_and_infinity_is_not():
    x = X * 100
    for fill in (-150.0, -jnp.inf):
        fn = lambda p, x, fill=fill: jax.nn.log_softmax(jnp.where(MASK, x @ p, fill))
        qmodel = qjax.quantize_model(fn, P, x)
        qstate = qjax.calibrate(qmodel, P, [x])
        if fill == -150.0:
            with pytest.raises(ValueError, match="what it masks still counts"):
                qjax.lower(qmodel, P, qstate, x)
        else:
            program = qjax.lower(qmodel, P, qstate, x)
            assert program.graph.nodes[-1].operation == "log_softmax"


def test_logarithms_of_wide_codes_are_refused():
    fn = lambda p, x: jax.nn.logsumexp(x @ p, -1)
    qmodel = qjax.quantize_model(fn, P, X, scheme=Scheme(QSpec(8), QSpec(20)))
    qstate = qjax.calibrate(qmodel, P, [X])
    with pytest.raises(ValueError, match="(?s)logsumexp in .* at most 16 bits"):
        qjax.lower(qmodel, P, qstate, X)


OTHERS = {
    "weights": lambda p, x: jax.nn.logsumexp(x @ p, -1, b=jnp.arange(8.0)),
    "a maximum of other axes": lambda p, x: _less_another(x @ p),
    "masks beside": lambda p, x: x - jax.nn.logsumexp(x, -1, where=MASK, keepdims=True),
    "a mask behind": lambda p, x: jnp.where(MASK, jax.nn.log_softmax(x @ p), -jnp.inf),
}


def _less_another(z):
    top = z.max(1, keepdims=True)
    return z.max(-1) + jnp.log(jnp.sum(jnp.exp(z - top), -1))


@pytest.mark.parametrize("name", OTHERS)
def test_logarithms_that_are_others_are_no_other_number(name):
    """Either a program is close to the float model, or there is none."""
    fn = OTHERS[name]
    try:
        qmodel = qjax.quantize_model(fn, P, X)
        qstate = qjax.calibrate(qmodel, P, [X])
        program = qjax.lower(qmodel, P, qstate, X)
    except (NotImplementedError, ValueError) as error:
        assert "log" in str(error) or "infinity" in str(error)
    else:
        wanted = np.asarray(fn(P, X))
        np.testing.assert_allclose(program(X), wanted, atol=0.05 * np.ptp(wanted))


@pytest.mark.parametrize("is_param", [False, True])
def test_weights_of_a_logsumexp_are_refused_and_the_remedy_lowers(is_param):
    b = np.float32([0, 1, 0.5, 3, 1, 2, 0, 1])
    weights = lambda p: p["b"] if is_param else b
    params = {"p": P, "b": b}

    def remedied(p, x):
        b = weights(p)
        x = x @ p["p"] + jnp.log(jnp.where(b > 0, b, 1))[None, None]
        return logsumexp(x, -1, where=(b > 0)[None, None])

    weighed = lambda p, x: logsumexp(x @ p["p"], -1, b=weights(p)[None, None])
    with pytest.raises(ValueError, match=r"jnp.where\(b > 0, b, 1\)\), where=b > 0"):
        qjax.quantize_model(weighed, params, X)
    power = QSpec(8, power_of_two=True)
    scheme = Scheme(QSpec(8, power_of_two=True, axis="output"), power)
    qmodel = qjax.quantize_model(remedied, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    program = qjax.lower(qmodel, params, qstate, X)
    found, wanted = program(X), weighed(params, X)
    np.testing.assert_array_equal(found, jax.jit(qmodel.apply)(params, qstate, X))
    assert np.sum(wanted**2) > 1e4 * np.sum((found - wanted) ** 2)  # 40 dB.
