"""Schedules, transformations, keys and shares of noise; what is wrong with them."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import qjax
from qjax import QSpec, Rule, Scheme, training
from qjax import quantizers as qz
from qjax.model.visitors import Quantizer
from qjax.quantizers.learning import Learning, statistics
from qjax.quantizers.point import Point, point_of
from tests.training_cases import PARAMS, X, Y, model

pytestmark = pytest.mark.usefixtures("flax_promotion")  # Of optax's Adam.


W4, A8 = QSpec(4, narrow_range=True), QSpec(8)


def quantized(weights=W4, activations=A8, **fields):
    rules = (*fields.pop("rules", ()), Rule("input:0", QSpec(8)))
    scheme = Scheme(weights, activations, rules, **fields)
    qmodel = qjax.quantize_model(model, PARAMS, X, scheme=scheme)
    return qmodel, qjax.calibrate(qmodel, PARAMS, [X])


RANDOM = qz.QuantizedBits(3, 1, use_stochastic_rounding=True)


# Schedules.


@pytest.mark.parametrize("exponent", [1.0, 3.0])
@pytest.mark.parametrize("interval", [1, 4])
def test_the_noise_schedule_is_that_of_qkeras(exponent, interval):
    schedule = training.qnoise_schedule(3, 19, exponent=exponent, interval=interval)
    steps = np.arange(30)
    t = steps - steps % interval
    wanted = np.where(
        t < 3, 0, np.where(t >= 19, 1, 1 - np.maximum((19 - t) / 16, 0.0) ** exponent)
    )
    found = jax.jit(jax.vmap(schedule))(steps)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found[-1] == 1 and schedule(0) == 0
    delay = training.quant_delay(7)
    np.testing.assert_array_equal([delay(k) for k in (0, 6, 7, 8)], [0, 0, 1, 1])


@pytest.mark.parametrize(
    "arguments", [(5, 3), (-1, 3), (0, 3, 0.0), (0, 3, 1.0, 0)], ids=str
)
def test_schedules_that_are_none(arguments):
    start, finish, *rest = arguments
    options = dict(zip(("exponent", "interval"), rest, strict=False))
    with pytest.raises(ValueError, match="must"):
        training.qnoise_schedule(start, finish, **options)


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), (qz.LSQ(3), qz.LSQ(4)), (qz.Ternary(), qz.PACT(4))]
)
def test_a_share_of_0_is_the_float_model_and_of_1_the_quantized_one(words):
    qmodel, qstate = quantized(*words)
    at = jax.jit(lambda n: qmodel.apply(PARAMS, qstate, X, qnoise_factor=n))
    plain = jax.jit(lambda: model(PARAMS, X))()
    whole = jax.jit(lambda: qmodel.apply(PARAMS, qstate, X))()
    np.testing.assert_allclose(at(0.0), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(at(1.0), whole)
    # Compiled, as `apply` is: sums of eager operations end in other digits.
    found = qmodel.apply(PARAMS, qstate, X, qnoise_factor=0)
    np.testing.assert_array_equal(found, jax.jit(model)(PARAMS, X))
    off = [np.abs(at(n) - plain).mean() for n in (0.25, 0.5, 0.75)]
    assert 0 < off[0] < off[1] < off[2]
    off = lambda p: (qmodel.apply(p, qstate, X, qnoise_factor=0.0) * Y).sum()
    slope = jax.jit(jax.grad(off))
    wanted = jax.jit(jax.grad(lambda p: (model(p, X) * Y).sum()))(PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        slope(PARAMS),
        wanted,
    )


@pytest.mark.parametrize("share", [1.5, -0.1, np.ones(2)], ids=str)
def test_a_share_that_is_none(share):
    qmodel, qstate = quantized()
    with pytest.raises(ValueError, match="`qnoise_factor` must"):
        qmodel.apply(PARAMS, qstate, X, qnoise_factor=share)


# Ranges.


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.relu(x)


def test_batch_norm_freezes_whole_by_a_condition_on_the_step():
    """From a step on it normalises by its averages, which no longer move."""
    network, x = _Normed(), np.asarray(X)
    params = network.init(jax.random.key(0), x, False)
    moving = lambda v, x: network.apply(v, x, True, mutable=["batch_stats"])
    fixed = lambda v, x: network.apply(v, x, False)
    qtrain, qinfer = (qjax.quantize_model(fn, params, x) for fn in (moving, fixed))
    qstate = qjax.calibrate(qtrain, params, [x])

    def train(v, qstate):
        (y, stats), moved = qtrain.apply_and_update(v, qstate, x)
        return y, stats, moved

    def infer(v, qstate):
        y, moved = qinfer.apply_and_update(v, qstate, x)
        return y, {"batch_stats": v["batch_stats"]}, moved

    def step(choose):
        def loss(weights, stats, qstate):
            y, *moved = choose({"params": weights, **stats}, qstate)
            return jnp.mean((y - 1.0) ** 2), moved

        def run(weights, stats, qstate):
            grads, moved = jax.grad(loss, has_aux=True)(weights, stats, qstate)
            return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), *moved

        return run

    def scanned(run, count):
        frozen = lambda *own: jax.lax.cond(count >= 2, infer, train, *own)
        return step(frozen)(*run), run[1]

    start = params["params"], {"batch_stats": params["batch_stats"]}, qstate
    scan = jax.jit(lambda run: jax.lax.scan(scanned, run, jnp.arange(4)))
    found, seen = scan(start)
    wanted = start
    for choose in (train, train, infer, infer):
        wanted = jax.jit(step(choose))(*wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    means = jax.tree.leaves(seen)[0]
    assert np.any(means[1] != means[2])
    np.testing.assert_array_equal(means[2], means[3])


def test_ranges_freeze():
    qmodel, qstate = quantized()
    move = jax.jit(
        lambda s, update: qmodel.apply_and_update(PARAMS, s, 3 * X, update=update)
    )
    out, frozen = move(qstate, False)
    chex.assert_trees_all_equal(frozen, qstate)
    np.testing.assert_array_equal(
        out, jax.jit(lambda: qmodel.apply(PARAMS, qstate, 3 * X))()
    )
    out, moved = move(qstate, True)
    chex.assert_trees_all_equal(
        moved, qmodel.apply_and_update(PARAMS, qstate, 3 * X)[1]
    )
    assert moved["input:0"].high == 3 * X.max()
    fresh = qmodel.init(PARAMS, X)
    with pytest.raises(ValueError, match="'input:0' has no range yet"):
        qmodel.apply_and_update(PARAMS, fresh, X, update=False)


def test_ranges_of_a_batch_in_parts_are_those_of_the_batch():
    """Under `vmap` over a named axis, for ends alone and for all values."""
    for calibrator in (qjax.ema_min_max(0.9), qjax.moving_max(), qjax.mean_std()):
        qmodel, qstate = quantized(calibrator=calibrator)
        parts = (2 * X).reshape(4, 4, 6)
        run = lambda x, s=qstate, q=qmodel: q.apply_and_update(
            PARAMS, s, x, axis_name="parts"
        )[1]
        found = jax.jit(jax.vmap(run, axis_name="parts"))(parts)
        wanted = qmodel.apply_and_update(PARAMS, qstate, 2 * X)[1]
        for k in range(4):
            own = jax.tree.map(lambda v, k=k: v[k], found)
            chex.assert_trees_all_close(own, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'data' is no axis here"):
        qmodel.apply_and_update(PARAMS, qstate, X, axis_name="data")


def test_estimators_by_rule():
    own = qjax.estimators.plain_ste
    rules = (Rule("a/kernel", QSpec(2, narrow_range=True), estimator=own),)
    qmodel, qstate = quantized(rules=rules, estimator=qjax.estimators.ewgs(0.5))
    assert qmodel.choices.sites["a/kernel"].estimator is own
    assert qmodel.choices.sites["b/kernel"].estimator is qjax.estimators.ewgs(0.5)
    slope = lambda q: jax.grad(lambda p: (q.apply(p, qstate, X) * Y).sum())(PARAMS)
    every = slope(quantized(rules=rules, estimator=own)[0])
    np.testing.assert_array_equal(slope(qmodel)["a"]["kernel"].shape, (6, 8))
    assert np.any(slope(qmodel)["b"]["kernel"] != every["b"]["kernel"])
    text = dataclasses.replace(qmodel.scheme, estimator=own).to_json()
    assert '"estimator": "plain_ste"' in text
    assert Scheme.from_json(text).rules[0].estimator is own
    with pytest.raises(TypeError, match="`estimator` of a `Rule`"):
        Rule("a/*", QSpec(8), estimator="ewgs")


# Keys.


def test_a_random_word_draws_with_its_key_and_rounds_without():
    qmodel, qstate = quantized(RANDOM)
    run = jax.jit(lambda key: qmodel.apply(PARAMS, qstate, X, key=key))
    one, two = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, run(jax.random.key(0)))
    assert np.any(one != two)
    still = jax.jit(lambda: qmodel.apply(PARAMS, qstate, X))()
    word = dataclasses.replace(RANDOM, use_stochastic_rounding=False)
    other, state = quantized(word)
    np.testing.assert_array_equal(
        still, jax.jit(lambda: other.apply(PARAMS, state, X))()
    )
    many = jax.vmap(run)(jax.random.split(jax.random.key(2), 400))
    spread = np.std(many, 0).mean() / np.sqrt(400)
    assert np.abs(np.mean(many, 0) - model(PARAMS, X)).mean() < 0.1 + 5 * spread
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    assert qjax.verify(program, qmodel, PARAMS, qstate, X).is_exact
    np.testing.assert_array_equal(program(X), still)


def test_each_site_has_its_own_key():
    fn = lambda p, x: x @ p["a"] + x @ p["b"]
    w = np.full((6, 4), 0.3, np.float32)
    scheme = Scheme(RANDOM, None)
    qmodel = qjax.quantize_model(fn, {"a": w, "b": w}, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, {"a": w, "b": w}, [X])
    both = lambda p: qmodel.apply(p, qstate, np.eye(6, dtype=np.float32), key=key)
    key, none = jax.random.key(0), np.zeros_like(w)
    codes = [both({"a": w, "b": none}), both({"a": none, "b": w})]
    assert np.any(codes[0] != codes[1])


def test_a_derivative_without_a_key_names_the_site():
    qmodel, qstate = quantized(RANDOM)
    loss = lambda p, key=None: (qmodel.apply(p, qstate, X, key=key) * Y).sum()
    with pytest.raises(ValueError, match="'a/kernel' draws at random.*pass `key=`"):
        jax.grad(loss)(PARAMS)
    with pytest.raises(ValueError, match="'a/kernel' draws at random"):
        jax.jit(jax.grad(loss))(PARAMS)
    slopes = jax.grad(loss)(PARAMS, jax.random.key(0))  # The remedy.
    chex.assert_tree_all_finite(slopes)
    with pytest.raises(ValueError, match="draws at random"):
        jax.grad(lambda p: qmodel.apply_and_update(p, qstate, X)[0].sum())(PARAMS)


def test_a_key_that_nothing_draws_with_is_told_of():
    qmodel, qstate = quantized()
    with pytest.warns(UserWarning, match="`key` is not used"):
        qmodel.apply(PARAMS, qstate, X, key=jax.random.key(0))


def test_the_grid_is_that_of_what_was_drawn():
    """Scales that are found for the drawn levels: not those without a key."""
    qmodel, qstate = quantized(qz.StochasticTernary(alpha="auto"))
    site = next(site for site in qmodel.sites if site.name == "a/kernel")
    for key in map(jax.random.key, range(3)):
        visitor = Quantizer(qmodel.choices, qstate, key)
        value, grid, *_ = visitor.weight(site, jnp.asarray(PARAMS["a"]["kernel"]))
        levels = np.asarray(value) / np.asarray(grid.scale)
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-5)
        assert set(np.rint(levels).ravel()) <= {-1, 0, 1}


# Learned arrays.


def test_learned_arrays_start_by_their_rules():
    words = qz.LSQ(4, axis="output"), qz.LSQPlus(4)
    rules = (
        Rule("b/kernel", qz.DifferentiableBits(bits=5.0, bounds=(2, 6))),
        Rule("output:0", qz.PACT(4)),
    )
    qmodel, qstate = quantized(*words, rules=rules)
    seen = qmodel.float_values(PARAMS, (X,))
    learned = qstate["learned"]
    w = np.float64(PARAMS["a"]["kernel"])
    np.testing.assert_allclose(
        learned["a/kernel"]["scale"],
        2 * np.abs(w).mean(0, keepdims=True) / math.sqrt(7),
        rtol=1e-6,
    )
    assert learned["b/kernel"]["bits"] == 5
    assert learned["output:0"]["clip"] == seen["output:0"].max()
    hidden = learned["a/output"]
    low, high = (hidden["offset"] + q * hidden["scale"] for q in (-8, 7))
    assert low <= 0 and high >= seen["a/output"].max() * 0.999
    assert set(learned) == {"a/kernel", "b/kernel", "a/output", "output:0"}
    # Statistics of batches are those of all values.
    halves = qjax.calibrate(qmodel, PARAMS, [X[:4], X[4:]])
    for site in ("input:0", "a/output", "output:0"):
        assert halves[site].step == 2
        halves[site] = halves[site]._replace(step=qstate[site].step)
    chex.assert_trees_all_close(halves, qstate, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_numpy():
    x = np.float32(np.random.default_rng(0).normal(2, 3, (7, 5)))
    for shape, axis in (((), None), ((1, 5), 0)):
        found = statistics(jnp.asarray(x), shape)
        keep = {"axis": axis, "keepdims": bool(shape)}
        means = x.mean(**keep), np.abs(x).mean(**keep)
        wanted = x.min(**keep), x.max(**keep), *means, x.std(**keep)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == shape
            np.testing.assert_allclose(a, b, rtol=1e-5)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Halves(qz.Spec):
    """Rounds to multiples of a learned unit, of which it has seven."""

    name = "halves_of_a_test"
    learning = Learning(
        ("unit",),
        lambda spec, seen: {"unit": seen.high / 4},
        shape=(lambda spec, shape: ()),
    )


@point_of(Halves)
def _halves(spec, key, x, unit):
    steps = jax.lax.stop_gradient(x / unit)
    held = jax.lax.stop_gradient(unit)
    codes = jnp.clip(jnp.round(steps), -3.0, 3.0)
    ends = jnp.float32(-3), jnp.float32(3)
    return Point(
        x,
        steps,
        *ends,
        jax.lax.stop_gradient(x),
        held,
        *ends,
        is_direct=True,
        learned=unit * codes,
    )


def test_a_quantizer_of_ones_own_learns():
    qmodel, qstate = quantized(Halves(), Halves())
    own = qstate["learned"]
    assert own["a/kernel"]["unit"] == PARAMS["a"]["kernel"].max() / 4
    loss = lambda k: (qmodel.apply(PARAMS, {**qstate, "learned": k}, X) * Y).sum()
    slopes = jax.grad(loss)(own)
    assert all(np.abs(v).max() > 0 for v in jax.tree.leaves(slopes))
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    assert qjax.verify(program, qmodel, PARAMS, qstate, X).is_exact


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["lsq", "bits"])
def test_learned_words_lower_as_they_were_trained(name):
    words = {
        "lsq": (qz.LSQ(3, axis="output"), qz.LSQ(4)),
        "bits": (qz.DifferentiableBits(1, bits=5), qz.DifferentiableBits(3, bits=6)),
    }[name]
    qmodel, qstate = quantized(*words)
    qstate["learned"] = jax.tree.map(lambda v: v * 0.83, qstate["learned"])
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    report = qjax.verify(program, qmodel, PARAMS, qstate, X)
    assert all(row.max_difference <= 1 for row in report.sites.values()), str(report)
    np.testing.assert_array_equal(program(X), qmodel.apply_integer(PARAMS, qstate, X))
    table = qjax.scales(qmodel, PARAMS, qstate)
    rows = qjax.integer_weights(qmodel, PARAMS, qstate)
    for site in ("a/kernel", "b/kernel"):
        np.testing.assert_array_equal(table[site].scale, rows[site].scale)
        if name == "bits":  # Those that were learned, not those of the start.
            assert table[site].bits == rows[site].bits == 4
    with pytest.raises(ValueError, match=r"integer_weights\(qmodel, params, qstate\)"):
        qjax.integer_weights(qmodel, PARAMS)


def test_learned_arrays_of_another_scheme():
    qmodel, qstate = quantized(qz.LSQ(3), qz.LSQ(4))
    learned = qstate["learned"]
    wrong = {
        "those of \\[\\]": {},
        "'a/kernel'.*must hold": {**learned, "a/kernel": {"clip": jnp.float32(1)}},
        "of shape \\(\\)": {**learned, "b/kernel": {"scale": jnp.ones((1, 4))}},
        "must hold the learned": {**learned, "c": {}},
    }
    for match, tree in wrong.items():
        with pytest.raises(ValueError, match=match):
            qmodel.apply(PARAMS, {**qstate, "learned": tree}, X)
        if "scale" not in match and "shape" not in match and "'a/kernel'" not in match:
            with pytest.raises(ValueError, match="those of another scheme"):
                training.keep_bounds(qmodel).init(tree)
    plain = {k: v for k, v in qstate.items() if k != "learned"}
    with pytest.raises(ValueError, match=re.escape("`init_learned`")):
        qmodel.apply(PARAMS, plain, X)
    again = {**plain, "learned": qmodel.init_learned(PARAMS, plain)}  # The remedy.
    chex.assert_trees_all_equal(again, qstate)
    with pytest.raises(ValueError, match="'a/output' has no range yet"):
        qmodel.init_learned(PARAMS, qmodel.init(PARAMS, X))
    with pytest.raises(ValueError, match="must hold the learned arrays of no site"):
        other, state = quantized()
        other.apply(PARAMS, {**state, "learned": learned}, X)


@pytest.mark.parametrize(
    "fields", [{"bits": 9, "bounds": (2, 8)}, {"bounds": (8, 2)}, {"bounds": (1, 30)}]
)
def test_bounds_that_exclude_the_start(fields):
    with pytest.raises(ValueError, match="`differentiable_bits`: `b"):
        qz.DifferentiableBits(**fields)


def test_words_with_a_state_between_calls_are_refused():
    for word in (qz.QuantizedBitsMsqePo2(4), qz.QuantizedBitsLearnablePo2(4)):
        with pytest.raises(ValueError, match="use_second_moments_msqe_opt=False"):
            quantized(word)
        quantized(dataclasses.replace(word, use_second_moments_msqe_opt=False))


# Transformations.


def test_bits_stay_within_their_bounds_under_a_price():
    """A price on bits drives them to their least, not beyond."""
    word = qz.DifferentiableBits(1, bits=6, bounds=(3, 8))
    qmodel, qstate = quantized(word)
    tx = optax.chain(optax.sgd(1.0), training.keep_bounds(qmodel))
    learned = qstate["learned"]
    state = tx.init(learned)
    price = lambda k: sum(v.sum() for v in jax.tree.leaves(k))
    for _ in range(9):
        updates, state = tx.update(jax.grad(price)(learned), state, learned)
        learned = optax.apply_updates(learned, updates)
    assert all(v == 3 for v in jax.tree.leaves(learned))
    out = jax.tree.map(lambda v: v - 5.0, learned)
    with pytest.raises(ValueError, match=r"`bits` of 'a/kernel' must lie in 3..8"):
        tx.init(out)
    with pytest.raises(ValueError, match="arrays that the updates are of"):
        training.keep_bounds(qmodel).update(learned, optax.EmptyState())


def test_rates_by_kind_and_freezing():
    qmodel, qstate = quantized(qz.LSQ(3), qz.LSQPlus(4))
    learned = qstate["learned"]
    tx = optax.chain(
        training.scale_learned({"offset": 0.5, "scale": 2.0}), training.freeze_after(2)
    )
    state, ones = tx.init(learned), jax.tree.map(jnp.ones_like, learned)
    for wanted in (1.0, 1.0, 0.0, 0.0):
        updates, state = tx.update(ones, state, learned)
        assert updates["a/output"]["offset"] == 0.5 * wanted
        assert updates["a/output"]["scale"] == 2.0 * wanted
    with pytest.raises(ValueError, match="No learned array is called 'bits'"):
        training.scale_learned({"bits": 1.0}).init(learned)
    old, new = {"m": jnp.zeros(2)}, {"m": jnp.ones(2)}
    chex.assert_trees_all_equal(training.freeze(True, old, new), old)
    chex.assert_trees_all_equal(jax.jit(training.freeze)(False, old, new), new)
    with pytest.raises(ValueError, match="one structure"):
        training.freeze(True, old, {})


def test_weights_stay_within_the_values_of_their_words():
    rules = (Rule("b/kernel", QSpec(4, narrow_range=True)),)
    qmodel, _ = quantized(qz.QuantizedBits(4, 0, alpha=1.0), rules=rules)
    tx = optax.chain(optax.sgd(1.0), training.clip_weights(qmodel))
    push = jax.tree.map(lambda p: -np.sign(p) * 3, PARAMS)
    updates, _ = tx.update(push, tx.init(PARAMS), PARAMS)
    moved = optax.apply_updates(PARAMS, updates)
    kernel = moved["a"]["kernel"]
    np.testing.assert_allclose([kernel.min(), kernel.max()], [-1, 0.875], atol=1e-6)
    for free in (("a", "bias"), ("b", "kernel")):
        own, before = (tree[free[0]][free[1]] for tree in (moved, PARAMS))
        np.testing.assert_allclose(own, before + np.sign(before) * 3, rtol=1e-6)


def test_what_looks_on_keeps_the_learned_arrays():
    qmodel, qstate = quantized(qz.LSQ(3), A8)
    moved = qmodel.observe(PARAMS, qstate, 2 * X)
    chex.assert_trees_all_equal(moved["learned"], qstate["learned"])
    assert moved["input:0"].high == 2 * X.max()
    qmodel.apply(PARAMS, moved, X)


def test_a_random_bias_draws_with_the_key():
    rules = (Rule(qjax.Where(role="bias"), RANDOM),)
    qmodel, qstate = quantized(rules=rules)
    assert qmodel.choices.random() == ["a/bias"]
    run = lambda k: qmodel.apply(PARAMS, qstate, X, key=jax.random.key(k))
    assert np.any(run(0) != run(1))
    with pytest.raises(ValueError, match="'a/bias' draws at random"):
        jax.grad(lambda p: qmodel.apply(p, qstate, X).sum())(PARAMS)


def test_a_bias_does_not_learn():
    rules = (Rule(qjax.Where(role="bias"), qz.LSQ(8)),)
    with pytest.raises(ValueError, match="'a/bias' cannot have `lsq"):
        quantized(rules=rules)
    quantized(rules=(Rule(qjax.Where(role="bias"), QSpec(8)),))  # The remedy.


def test_weights_that_only_scale_or_shift_learn():
    """A position that is added, a gain: sites without a product."""

    def fn(p, x):
        return jnp.tanh(x + p["places"]) * p["gain"] + p["shift"]

    params = {"places": X[:1], "gain": np.abs(X[:1]) + 1, "shift": X[1:2]}
    scheme = Scheme(qz.LSQ(4, axis=-1), qz.LSQ(8), (Rule("input:0", QSpec(8)),))
    qmodel = qjax.quantize_model(fn, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    weights = {site.name for site in qmodel.sites if site.role == "weight"}
    assert weights and weights <= set(qstate["learned"])
    program = qjax.lower(qmodel, params, qstate, X)
    report = qjax.verify(program, qmodel, params, qstate, X)
    assert all(row.max_difference <= 1 for row in report.sites.values()), str(report)
