"""Loops: sites in their bodies, one operation in programs, the same codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.graph.graph import Graph
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (3, 5, 4)).astype(np.float32)
W = {
    "a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32),
    "b": RNG.normal(0, 0.2, (1, 4)).astype(np.float32),
}
WORD = QSpec(8, power_of_two=True)
POWERS = Scheme(QSpec(8, power_of_two=True, axis="output"), WORD)


def _steps(step, p, x, start=None, **options):
    start = jnp.zeros(x.shape[::2]) if start is None else start
    xs = x.transpose(1, 0, 2)
    return lax.scan(functools.partial(step, p), start, xs, **options)


def _plain(p, h, t):
    h = jnp.tanh(t @ p["a"] + h @ p["a"] + p["b"])
    return h, h


def _counts(p, carry, t):
    n, h = carry
    h = jnp.tanh(t @ p["a"] + h)
    return (n + 1, h), jnp.where(n % 2 == 0, h, t)


def _delays(p, carry, t):
    one, two = carry
    return (t, one), nn.relu(t @ p["a"] + two)


def _gated(p, carry, t):
    h, c = carry
    f, i = (nn.sigmoid(v @ p["a"]) for v in (h, t))
    c = f * c + i * jnp.tanh(t)
    h = f * jnp.tanh(c)
    return (h, c), h


def _nested(p, h, t):
    h = lax.fori_loop(0, 2, lambda i, g: jnp.tanh(g @ p["a"] + t), h)
    return h, h


def _averages(p, c, t):
    c = c * 0.9 + t * 0.1
    return c, c


def _zeros(x):
    return jnp.zeros(x.shape[::2])


LOOPS = {
    "recurrent": lambda p, x: _steps(_plain, p, x),
    "from data, reversed": lambda p, x: _steps(_plain, p, x, x[:, 0], reverse=True)[1],
    "unrolled by two": lambda p, x: _steps(_plain, p, x, unroll=2)[1] @ p["a"],
    "counter": lambda p, x: _steps(_counts, p, x, (0, _zeros(x)))[1],
    "delays": lambda p, x: _steps(_delays, p, x, (_zeros(x), _zeros(x)))[1],
    "gated": lambda p, x: _steps(_gated, p, x, (_zeros(x), _zeros(x)))[1],
    "nested": lambda p, x: _steps(_nested, p, x)[1],
    "averages": lambda p, x: _steps(_averages, p, x)[1] @ p["a"],
    "map": lambda p, x: lax.map(lambda t: nn.relu(t @ p["a"] + p["b"]), x),
    "fori that indexes": lambda p, x: lax.fori_loop(
        0, 5, lambda i, h: jnp.tanh(h @ p["a"] + x[:, i]), x[:, 0]
    ),
    "counted while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 6,
        lambda c: (c[0] + 2, jnp.tanh(c[1] @ p["a"])),
        (1, x[:, 0]),
    )[1],
    "checkpoint": lambda p, x: _steps(jax.checkpoint(_plain), p, x)[1],
    "choice": lambda p, x: lax.cond(
        x[0, 0, 0] > 0, lambda x: x @ p["a"], lambda x: x - p["b"][None], x
    ),
    "switch": lambda p, x: lax.switch(
        jnp.argmax(x[0, 0, :3]), [jnp.tanh, nn.relu, lambda x: x @ p["a"]], x
    ),
}
ONCE = {"choice", "switch"}  # No loops.


@functools.cache
def _lowered(name, scheme=POWERS):
    fn = LOOPS[name]
    qmodel = qjax.quantize_model(fn, W, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, W, [X])
    return fn, qmodel, qstate, qjax.lower(qmodel, W, qstate, X)


HEAVY = ("recurrent", "unrolled by two", "counter", "averages", "map", "checkpoint")


@pytest.mark.kept
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.heavy) if name in HEAVY else name
        for name in LOOPS
    ],
)
def test_loops_ship_what_is_simulated(name):
    fn, qmodel, qstate, program = _lowered(name)
    graphs = [graph for _, graph in program.graph.walk()]
    assert (len(graphs) > 1) == (name not in ONCE)
    apply = jax.jit(qmodel.apply)
    found, wanted = apply(W, qstate, X), jax.jit(fn)(W, X)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.sum(b**2) > 100 * np.sum((a - b) ** 2)
    report = qjax.verify(program, qmodel, W, qstate, X)
    assert report.is_exact and set(report.sites) == set(program.site_names)
    assert_equals_oracle(program, X)
    own = jax.jit(qmodel.apply_integer)(W, qstate, X)
    jax.tree.map(np.testing.assert_array_equal, own, program(X))
    other = np.concatenate([X[::-1], X[:2] * 1.5])
    if name not in ONCE:
        jax.tree.map(
            np.testing.assert_array_equal, apply(W, qstate, other), program(other)
        )
    for row in program.report().agreement.values():
        assert row.is_proven or "no proof" not in row.reason


def test_gradients_are_those_of_the_steps_in_a_row():
    """A Python loop over the same grids: each site of the loop is a site of a step."""

    def looped(p, x):
        h = jnp.zeros((3, 4))
        for t in range(5):
            h, _ = _plain(p, h, x[:, t])
        return h

    scheme = Scheme(POWERS.weights, None)
    fn = lambda p, x: _steps(_plain, p, x)[0]
    ways = []
    for model in (fn, looped):
        qmodel = qjax.quantize_model(model, W, X, scheme=scheme)
        qstate = qjax.calibrate(qmodel, W, [X])
        loss = lambda p, q=qmodel, s=qstate: jnp.sum(q.apply(p, s, X) ** 2)
        ways.append(jax.jit(jax.value_and_grad(loss))(W))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), *ways)


def test_a_site_of_a_body_is_calibrated_over_all_steps():
    fn = lambda p, x: _steps(_averages, p, x, x[:, 0] * 3)[1]
    qmodel = qjax.quantize_model(fn, {}, X, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, {}, [X])
    values, carried = [], X[:, 0] * 3
    for t in range(5):
        values.append(carried)
        carried = carried * 0.9 + X[:, t] * 0.1
    values.append(carried)
    own = qstate["scan_0/carry:0"]
    np.testing.assert_allclose(own.high, np.max(values), rtol=1e-5)
    np.testing.assert_allclose(own.low, np.min(values), rtol=1e-5)
    assert own.step == 1


def test_ranges_move_in_a_loop_and_a_loop_starts_without_any():
    qmodel = qjax.quantize_model(LOOPS["gated"], W, X)
    step = jax.jit(qmodel.apply_and_update)
    state = qmodel.init(W, X)
    for _ in range(3):
        found, state = step(W, state, X)
    assert int(state["scan_0/carry:1"].step) == 15
    wanted = jax.jit(LOOPS["gated"])(W, X)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2)
    frozen, same = step(W, state, X, update=False)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_the_state_of_a_cell_has_16_bits_unless_a_product_reads_it():
    qmodel = qjax.quantize_model(LOOPS["gated"], W, X)
    bits = {n: c.word.bits for n, c in qmodel.choices.sites.items() if c.word}
    sites = {site.name: site for site in qmodel.sites}
    assert sites["input:0"].feeds == ("scan",) and not sites["input:0"].inputs
    assert "dense" in sites["scan_0/carry:0"].feeds
    assert sites["scan_0/carry:1"].op == "residual"
    assert bits["scan_0/carry:1"] == 16 and bits["scan_0/carry:0"] == 8
    by_rule = Scheme(rules=(Rule("*/carry:1", QSpec(6)),))
    other = qjax.quantize_model(LOOPS["gated"], W, X, scheme=by_rule)
    assert other.choices.sites["scan_0/carry:1"].word.bits == 6


def test_many_steps_are_no_more_operations():
    fn = LOOPS["recurrent"]
    sizes = []
    for length in (5, 400):
        x = RNG.normal(0, 1, (2, length, 4)).astype(np.float32)
        qmodel = qjax.quantize_model(fn, W, x, scheme=POWERS)
        qstate = qjax.calibrate(qmodel, W, [x])
        program = qjax.lower(qmodel, W, qstate, x)
        sizes.append(sum(len(graph.nodes) for _, graph in program.graph.walk()))
        found = jax.jit(qmodel.apply)(W, qstate, x)
        jax.tree.map(np.testing.assert_array_equal, found, program(x))
    assert sizes[0] == sizes[1]


def test_stacked_weights_have_scales_of_their_own_in_each_step():
    stack = RNG.normal(0, 0.5, (3, 4, 4)).astype(np.float32) * [[[0.5]], [[1]], [[2]]]
    params = {"w": stack.astype(np.float32)}
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    scheme = Scheme(QSpec(8, power_of_two=True, axis="output"), WORD)
    qmodel = qjax.quantize_model(fn, params, X[:, 0], scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X[:, 0]])
    program = qjax.lower(qmodel, params, qstate, X[:, 0])
    found = jax.jit(qmodel.apply)(params, qstate, X[:, 0])
    np.testing.assert_array_equal(found, program(X[:, 0]))
    wanted = jax.jit(fn)(params, X[:, 0])
    assert np.sum(wanted**2) > 100 * np.sum((found - wanted) ** 2)


class _Linen(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(self.cell(4))(x))


class _Nnx(nnx.Module):
    def __init__(self, cell):
        rngs = nnx.Rngs(0)
        one, two = (nnx.RNN(cell(4, 3, rngs=rngs)) for _ in range(2))
        self.rnn = nnx.Bidirectional(one, two)
        self.out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: _linen(_Linen(nn.OptimizedLSTMCell)),
        pytest.param(lambda: _linen(_Linen(nn.LSTMCell)), marks=pytest.mark.heavy),
        pytest.param(lambda: _linen(_Linen(nn.GRUCell)), marks=pytest.mark.heavy),
        pytest.param(lambda: _linen(_Linen(nn.MGUCell)), marks=pytest.mark.heavy),
        lambda: _linen(_Linen(nn.SimpleCell)),
        lambda: _of_lengths(),
        lambda: _nnx(_Nnx(nnx.GRUCell)),
        pytest.param(lambda: _convolutions(), marks=pytest.mark.heavy),
    ],
    ids=["lstm", "lstm apart", "gru", "mgu", "simple", "lengths", "nnx", "conv"],
)
def test_recurrent_layers_of_flax_ship_what_is_simulated(make):
    fn, params, x = make()
    qmodel = qjax.quantize_model(fn, params, x, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    assert len([*program.graph.walk()]) > 1
    found, wanted = (
        jax.jit(f)(params, *own) for f, own in ((qmodel.apply, (qstate, x)), (fn, (x,)))
    )
    jax.tree.map(np.testing.assert_array_equal, found, program(x))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.sum(b**2) > 100 * np.sum((a - b) ** 2)


def _linen(module, x=X, **options):
    params = module.init(jax.random.key(0), x, **options)
    return (lambda p, x: module.apply(p, x, **options)), params, x


def _nnx(model):
    graph, state = nnx.split(model)
    return (lambda p, x: nnx.merge(graph, p)(x)), state, X


def _of_lengths():
    cell = nn.RNN(nn.SimpleCell(4), return_carry=True)
    return _linen(cell, seq_lengths=jnp.array([2, 5, 3]))


def _convolutions():
    x = RNG.normal(0, 1, (2, 4, 6, 6, 2)).astype(np.float32)
    return _linen(nn.RNN(nn.ConvLSTMCell(3, (3, 3))), x)


def _is_shipped(fn, params, *x, **options):
    """Checks a program against its simulation, the oracle and the float model."""
    qmodel = qjax.quantize_model(fn, params, *x, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, params, [x if len(x) > 1 else x[0]])
    program = qjax.lower(qmodel, params, qstate, *x, **options)
    found, wanted = jax.jit(qmodel.apply)(params, qstate, *x), jax.jit(fn)(params, *x)
    jax.tree.map(np.testing.assert_array_equal, found, program(*x))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.sum(b**2) > 100 * np.sum((a - b) ** 2)
    assert_equals_oracle(program, *x)
    return program


def test_sequences_of_no_steps_and_of_all_ship():
    layer = nn.RNN(nn.SimpleCell(4), reverse=True, keep_order=True, return_carry=True)
    params = layer.init(jax.random.key(0), X)
    fn = lambda p, x, n: layer.apply(p, x, seq_lengths=n)
    _is_shipped(fn, params, X, np.int32([0, X.shape[1], 3]))


def test_a_cell_that_two_loops_share_runs_step_by_step():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.SimpleCell(4)
            return nn.RNN(cell, name="b")(nn.RNN(cell, name="a", unroll=2)(x))

    fn, params, _ = _linen(Shared())
    program = _is_shipped(fn, params, X, streaming={0: 1})
    state, steps = program.initial_state(), []
    for t in range(X.shape[1]):
        state, y = program.step(state, X[:, t])
        steps.append(y)
    np.testing.assert_array_equal(np.stack(steps, 1), program(X))


def test_programs_with_loops_are_saved_and_printed(tmp_path):
    *_, program = _lowered("nested")
    program.save(tmp_path / "loop.qjax")
    again = qjax.load(tmp_path / "loop.qjax")
    np.testing.assert_array_equal(again(X), program(X))
    assert again.graph == Graph.from_json(program.graph.to_json())
    text = str(program.graph)
    assert "= loop(" in text and text.count("body:") == 2
    places = [place for place, _ in program.graph.walk()]
    assert len(places) == 3 and places[2].startswith("the body of")


def test_bits_are_swept_through_a_loop():
    _, qmodel, qstate, _ = _lowered("gated")
    schemes = [Scheme(QSpec(b, axis="output"), QSpec(b)) for b in (3, 8)]
    stacked = qjax.stack_schemes(schemes)
    run = lambda s: jax.jit(qmodel.apply)(W, qstate, X, scheme=s)
    both = jax.jit(jax.vmap(run))(stacked)
    for k, scheme in enumerate(schemes):
        np.testing.assert_allclose(both[k], jax.jit(run)(scheme), atol=1e-5)


def test_each_step_draws_anew():
    word = qjax.quantizers.parse(
        "quantized_bits(2,0,alpha=1,use_stochastic_rounding=True)"
    )
    fn = lambda p, x: _steps(
        lambda p, h, t: (h * 0.5 + t * 0 + 0.3, t * 0 + 0.3), p, x
    )[1]
    scheme = Scheme(None, None, rules=(Rule("*output*", word),))
    qmodel = qjax.quantize_model(fn, {}, X, scheme=scheme)
    found = jax.jit(qmodel.apply)({}, qmodel.init({}, X), X, key=jax.random.key(0))
    rows = {np.asarray(row).tobytes() for row in found}
    assert len(rows) > 1


def test_what_no_loop_takes_is_refused():
    with pytest.raises(NotImplementedError, match="`while`.*The number of its steps"):
        qjax.quantize_model(
            lambda p, x: lax.while_loop(
                lambda h: jnp.max(h) > 0.1, lambda h: jnp.tanh(h @ p["a"]), x
            ),
            W,
            X,
        )
    # What is carried must come back to a grid.
    scheme = Scheme(rules=(Rule("*/carry:0", None),))
    qmodel = qjax.quantize_model(LOOPS["recurrent"], W, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, W, [X])
    with pytest.raises(ValueError, match="carries at 0 is on no grid"):
        qjax.lower(qmodel, W, qstate, X)
    # Files are checked.
    *_, program = _lowered("recurrent")
    with pytest.raises(ValueError, match="In the body of .* gives integers in"):
        Graph.from_json(program.graph.to_json())
        bad = program.graph.to_json().replace('"low": -128', '"low": -100')
        qjax.graph.validation.validate(Graph.from_json(bad), program.params)


@pytest.mark.heavy
def test_a_checkpoint_saves_less_in_steps_with_grids_of_their_own():
    wide = {"a": np.tile(W["a"], (2, 2)), "b": np.tile(W["b"], (1, 2))}
    x = np.tile(RNG.normal(0, 1, (32, 3, 4)).astype(np.float32), (1, 1, 2))
    rules = (Rule("scan_0/*", WORD, per_step=True),)
    found, saved = [], []
    for step in (_plain, jax.checkpoint(_plain)):
        fn = lambda p, x, step=step: _steps(step, p, x)[1]
        qmodel = qjax.quantize_model(fn, wide, x, scheme=Scheme(rules=rules))
        qstate = qjax.calibrate(qmodel, wide, [x], progress=False)
        loss = lambda p, q=qmodel, s=qstate: jnp.sum(q.apply(p, s, x) ** 2)
        found.append(jax.jit(qmodel.apply)(wide, qstate, x))
        kept = jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], wide))
        saved.append(sum(v.size * v.dtype.itemsize for v in kept))
    np.testing.assert_array_equal(*found)
    assert saved[1] < 0.6 * saved[0], saved


def test_derivatives_of_a_float_loop_are_those_of_the_model():
    """Without words nothing is rounded, and what is left is the loop itself."""

    def fn(p, x):
        step = lambda h, t: (jnp.tanh(t + h @ p["w"]), None)
        return lax.scan(step, jnp.zeros((2, 3)), x)[0]

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(0, 1.5, (3, 3)).astype(np.float32)}
    x = rng.normal(0, 1, (4, 2, 3)).astype(np.float32)
    qmodel = qjax.quantize_model(fn, params, x, scheme=qjax.Scheme(None, None))
    qstate = qjax.calibrate(qmodel, params, [x])
    models = (lambda p: qmodel.apply(p, qstate, x)), (lambda p: fn(p, x))
    first = [jax.grad(lambda p, f=f: jnp.sum(f(p) ** 2)) for f in models]
    second = [jax.grad(lambda p, g=g: jnp.sum(g(p)["w"] ** 3)) for g in first]
    for own, wanted in (first, second):
        np.testing.assert_allclose(
            own(params)["w"], wanted(params)["w"], rtol=1e-4, atol=1e-5
        )
