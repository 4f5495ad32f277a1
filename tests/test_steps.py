"""Grids of each step of a loop: their sites, their ranges, the same codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import QSpec, Rule, Scheme, Where
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (2, 3, 4)).astype(np.float32)
W = {"a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32)}
WORD = QSpec(8, power_of_two=True)
KERNEL = QSpec(8, power_of_two=True, axis="output")
WIDE = QSpec(16, power_of_two=True)


def _powers(*rules):
    return Scheme(KERNEL, WORD, rules=rules)


def _steps(step, p, x, start, **options):
    return lax.scan(functools.partial(step, p), start, jnp.swapaxes(x, 0, 1), **options)


def _plain(p, h, t):
    h = jnp.tanh(h @ p["a"] + t)
    return h, h


def _nested(p, h, t):
    h = lax.fori_loop(0, 2, lambda i, g: jnp.tanh(g @ p["a"] + t), h)
    return h, h


def _recurrent(p, x):
    return _steps(_plain, p, x, jnp.zeros((len(x), 4)))[1]


def _constant(p, x):
    return _steps(_plain, p, x, jnp.full((len(x), 4), 0.3))


def _reversed(p, x):
    return _steps(_plain, p, x, x[:, 0], reverse=True)[0]


def _deep(p, x):
    return _steps(_nested, p, x, jnp.zeros((len(x), 4)))[0]


def _stacked(p, x):
    step = lambda h, w: (jnp.tanh(h @ w), h)
    return lax.scan(step, x[:, 0], p["w"])


STACK = {"w": RNG.normal(0, 0.5, (3, 4, 4)).astype(np.float32)}
OF_STEPS = Rule("scan_0/*", WORD, per_step=True)
EACH = {
    "constant": (_constant, W, OF_STEPS),
    "reversed": (_reversed, W, OF_STEPS),
    "deep": (_deep, W, OF_STEPS),
    "inner": (_deep, W, Rule("scan_0/scan_0/*", WORD, per_step=True)),
    "stacked": (_stacked, STACK, OF_STEPS),
}


@pytest.mark.kept
@pytest.mark.parametrize(
    "name",
    [
        name if name == "constant" else pytest.param(name, marks=pytest.mark.heavy)
        for name in EACH
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "powers"])
def test_loops_in_steps_ship_what_is_simulated(name, kind):
    fn, params, rule = EACH[name]
    every = Scheme(rules=(Rule("*", QSpec(8), per_step=True),))
    scheme = _powers(rule) if kind == "powers" else every
    qmodel = qjax.quantize_model(fn, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    program = qjax.lower(qmodel, params, qstate, X)
    for x in (X, np.concatenate([X[::-1], X])):
        own = jax.jit(qmodel.apply_integer)(params, qstate, x)
        jax.tree.map(np.testing.assert_array_equal, own, program(x))
        if kind == "powers":
            found = jax.jit(qmodel.apply)(params, qstate, x)
            jax.tree.map(np.testing.assert_array_equal, found, program(x))
    wanted = jax.jit(fn)(params, X)
    for a, b in zip(*map(jax.tree.leaves, (program(X), wanted)), strict=True):
        assert np.sum(b**2) > 500 * np.sum((a - b) ** 2)
    assert_equals_oracle(program, X)


def _grown():
    """Returns inputs that grow from step to step, about 0.02 to 1.3."""
    return (X * [[[0.02], [0.16], [1.28]]]).astype(np.float32)


@functools.cache
def _lstm(per_step):
    x, module = _grown(), nn.RNN(nn.OptimizedLSTMCell(4))
    params = module.init(jax.random.key(0), x)
    ends = tuple(Rule(name, WIDE, optional=True) for name in ("input:0", "scan_0/out*"))
    scheme = _powers(*ends, Rule("scan_0/*", WORD, per_step=per_step))
    qmodel = qjax.quantize_model(module.apply, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    found = jax.jit(qmodel.apply)(params, qstate, x)
    return module.apply, params, x, qmodel, qstate, found


@pytest.mark.heavy
def test_steps_of_an_lstm_have_ranges_of_their_own(tmp_path):
    fn, params, x, qmodel, qstate, found = _lstm(True)
    highs = [float(qstate[f"scan_0/step_{t}/carry:1"].high) for t in range(3)]
    assert 3 * highs[0] < highs[1] < highs[2] / 3
    program = qjax.lower(qmodel, params, qstate, x)
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact
    assert_equals_oracle(program, x)
    program.save(tmp_path / "steps.qjax")
    other = np.concatenate([x[::-1], x])
    own = jax.jit(qmodel.apply)(params, qstate, other)
    np.testing.assert_array_equal(own, qjax.load(tmp_path / "steps.qjax")(other))
    assert "scan_0/step_1/carry:0" in program.report().agreement
    # Of the first steps, for which one grid in all steps is too coarse.
    wanted = jax.jit(fn)(params, x)
    errors = [np.sum((y - wanted)[:, :2] ** 2) for y in (found, _lstm(False)[-1])]
    assert 20 * errors[0] < errors[1]


def test_rules_match_sites_of_steps_and_of_the_loop():
    rules = (
        Rule("scan_0/step_2/*", QSpec(4), per_step=True),
        Rule("scan_0/carry:0", QSpec(6)),
        Rule(Where(name="a/output"), QSpec(7)),
        Rule(Where(inputs="scan_0/carry:0", op="dense"), QSpec(3)),
    )
    with pytest.warns(UserWarning, match="decides nothing"):
        qmodel = qjax.quantize_model(_recurrent, W, X, scheme=Scheme(rules=rules))
    bits = {name: c.word.bits for name, c in qmodel.choices.sites.items()}
    names = "carry:0", "a/output"
    of = lambda t: [bits[f"scan_0/step_{t}/{name}"] for name in names]
    assert list(map(of, range(3))) == [[6, 7], [6, 7], [4, 4]]
    assert "scan_0/carry:0" not in bits and bits["a"] == 8
    sites = {site.name: site for site in qmodel.sites}
    assert sites["scan_0/step_1/a/output"].inputs == ("scan_0/step_0/carry:0",)
    assert sites["scan_0/output:0"].feeds == ("return",)
    assert len(sites["a"].inputs) == 3


def test_a_rule_of_steps_goes_into_json_and_old_files_have_none():
    scheme = _powers(Rule("scan_0/*", WORD, per_step=True), Rule("a", WORD))
    text = scheme.to_json()
    assert Scheme.from_json(text) == scheme and text.count("per_step") == 1
    old = text.replace(',\n      "per_step": true', "")
    assert "per_step" not in old and not Scheme.from_json(old).per_step
    wrong = text.replace('"per_step": true', '"per_step": 1')
    with pytest.raises(ValueError, match=r"rules\[0\].per_step: true or false"):
        Scheme.from_json(wrong)
    with pytest.raises(TypeError, match="`per_step` of a `Rule` must be True or False"):
        Rule("scan_0/*", WORD, per_step=2)


def test_ranges_of_steps_move_in_training_and_learned_words_learn():
    words = Rule("scan_0/*", "lsq(8)", per_step=True), Rule("a", "lsq(8)")
    for rules in ((OF_STEPS,), words):
        qmodel = qjax.quantize_model(_recurrent, W, X, scheme=Scheme(rules=rules))
        state = qjax.calibrate(qmodel, W, [X])

        @jax.jit
        def loss(p, state, qmodel=qmodel):
            found, new = qmodel.apply_and_update(p, state, X)
            return jnp.sum(found**2), new

        (_, new), grads = jax.value_and_grad(loss, has_aux=True)(W, state)
        assert float(jnp.abs(grads["a"]).sum()) > 0
        learned = new.get("learned", {})
        own = learned if learned else new
        assert {f"scan_0/step_{t}/carry:0" for t in range(3)} <= set(own)
        assert "a" in learned or not learned


LONG = RNG.normal(0, 1, (1, 300, 4)).astype(np.float32)


def test_what_has_no_steps_of_its_own_is_refused_and_the_remedies_work():
    quantize = lambda fn, x, *rules: qjax.quantize_model(
        fn, W, x, scheme=Scheme(rules=rules)
    )
    with pytest.raises(ValueError, match="'scan_0' that it matches has 300 steps: at"):
        quantize(_recurrent, LONG, Rule("*/carry:0", QSpec(8), per_step=True))
    quantize(_recurrent, LONG, Rule("*/carry:0", QSpec(8)))
    deep = Rule("scan_0/*", QSpec(8), per_step=True)
    with pytest.raises(ValueError, match="has 400 steps, with those inside: at most"):
        quantize(_deep, LONG[:, :200], deep)
    quantize(_deep, LONG[:, :200], Rule("scan_0/scan_0/*", QSpec(8), per_step=True))
    found = "'a'.*no site in a loop that .* 'scan_0' of 3 steps .'a/output', .*Leave"
    with pytest.raises(ValueError, match=found):
        quantize(_recurrent, X, Rule("a", QSpec(8), per_step=True))
    quantize(_recurrent, X, Rule("a", QSpec(8)))
    with pytest.raises(ValueError, match="The model has no loop"):
        quantize(lambda p, x: x @ p["a"], X, Rule("a", QSpec(8), per_step=True))
    qmodel = quantize(_recurrent, X, Rule("a", QSpec(8)))
    qstate = qmodel.init(W, X)
    with pytest.raises(ValueError, match="`per_step=True` in its rules for 'scan_0/"):
        qmodel.apply(W, qstate, X, scheme=_powers(OF_STEPS))


@pytest.mark.parametrize("rules", [(OF_STEPS,), ()], ids=["per step", "one grid"])
def test_a_row_at_the_number_of_a_step_lowers(rules):
    step = lambda p, c, t: ((c[0] + 1, jnp.tanh(c[1] + t + p["a"][c[0]][None])), None)
    fn = lambda p, x: _steps(step, p, x, (0, x[:, 0]))[0][1]
    qmodel = qjax.quantize_model(fn, W, X, scheme=_powers(*rules))
    qstate = qjax.calibrate(qmodel, W, [X])
    program = qjax.lower(qmodel, W, qstate, X)
    found = jax.jit(qmodel.apply)(W, qstate, X)
    np.testing.assert_array_equal(found, program(X))
