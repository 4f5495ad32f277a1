"""Programs with loops of kinds that models have: tokens, caches, tables, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import QSpec, Scheme
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (3, 5, 4)).astype(np.float32)
W = {
    "a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32),
    "rows": RNG.normal(0, 0.7, (7, 4)).astype(np.float32),
    "scores": RNG.normal(0, 0.7, (4, 7)).astype(np.float32),
}
WORD = QSpec(8, power_of_two=True)
POWERS = Scheme(QSpec(8, power_of_two=True, axis="output"), WORD)


def _zeros(x):
    return jnp.zeros(x.shape[::2])


def _scan(step, start, x, *more):
    return lax.scan(step, start, (jnp.swapaxes(x, 0, 1), *more))


def _wraps(dtype, p, x):
    def step(carry, t):
        n, h = carry
        h = jnp.tanh(h @ p["a"] + jnp.where(n > 100, t[0], 0.5 * t[0]))
        return (n * dtype(3) + dtype(50), h), n

    return _scan(step, (dtype(7), _zeros(x)), x)


def _flags(p, x):
    def step(carry, t):
        was, h = carry
        h = jnp.where(was, h, jnp.tanh(h @ p["a"] + t[0]))
        return (was | (t[0][:, :1] > 1.0), h), was

    return _scan(step, (jnp.zeros((len(x), 1), bool), _zeros(x)), x)


def _decoded(p, x):
    def step(carry, _):
        token, h = carry
        h = jnp.tanh(p["rows"][token] + h @ p["a"])
        token = jnp.argmax(h @ p["scores"], -1)
        return (token, h), token

    start = jnp.zeros(len(x), jnp.int32), x[:, 0]
    return lax.scan(step, start, None, length=4)


def _counts_rows(p, x):
    def step(carry, t):
        n, h = carry
        return (n + 1, jnp.tanh(h @ p["a"] + t[0] + p["rows"][n][None])), None

    return _scan(step, (0, _zeros(x)), x)[0]


def _known_rows(p, x):
    def step(h, t):
        return jnp.tanh(h @ p["a"] + t[0] + p["rows"][t[1]][None]), None

    return _scan(step, _zeros(x), x, jnp.arange(5))[0]


def _known_numbers(p, x):
    def step(h, t):
        return jnp.tanh(h @ p["a"] + t[0] * t[1].astype(jnp.float32)), None

    return _scan(step, _zeros(x), x, jnp.arange(5))[0]


def _cache(p, x):
    def step(carry, t):
        n, cache = carry
        key = t[0] @ p["a"]
        cache = lax.dynamic_update_slice(cache, key[:, None], (0, n, 0))
        scores = jnp.einsum("bd,btd->bt", key, cache)
        shares = nn.softmax(jnp.where(jnp.arange(5)[None] <= n, scores, -1e9))
        return (n + 1, cache), jnp.einsum("bt,btd->bd", shares, cache)

    return _scan(step, (0, jnp.zeros((len(x), 5, 4))), x)[1]


def _inner(p, x):
    def step(h, t):
        add = lambda k, g: jnp.tanh(g @ p["a"] + t[0])
        return lax.fori_loop(0, 2, add, jnp.zeros_like(h)) + h * 0.5, None

    return _scan(step, _zeros(x), x)[0]


def _inner_rows(p, x):
    def step(h, t):
        rows = lambda g, w: (jnp.tanh(g * w[None] + t[0]), None)
        return lax.scan(rows, h, p["a"][:2])[0], None

    return _scan(step, _zeros(x), x)[0]


def _shares(p, x):
    def step(h, t):
        return nn.softmax(h @ p["a"] + t[0]), None

    return _scan(step, _zeros(x), x)[0]


PROGRAMS = {
    "int8": functools.partial(_wraps, jnp.int8),
    "uint8": functools.partial(_wraps, jnp.uint8),
    "flags": _flags,
    "decoded": _decoded,
    "counts rows": _counts_rows,
    "known rows": _known_rows,
    "known numbers": _known_numbers,
    "cache": _cache,
    "inner": _inner,
    "inner rows": _inner_rows,
    "shares": _shares,
}
ONE_SIZE = ("cache",)  # Of what a mask is repeated for.
HEAVY = {*PROGRAMS} - {"decoded"}


@functools.cache
def _lowered(name):
    fn = PROGRAMS[name]
    qmodel = qjax.quantize_model(fn, W, X, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, W, [X])
    return fn, qmodel, qstate, qjax.lower(qmodel, W, qstate, X)


@pytest.mark.kept
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.heavy) if name in HEAVY else name
        for name in PROGRAMS
    ],
)
def test_programs_with_loops_are_what_is_simulated(name):
    fn, qmodel, qstate, program = _lowered(name)
    apply = jax.jit(qmodel.apply)
    found, wanted = apply(W, qstate, X), jax.jit(fn)(W, X)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        if b.dtype == np.float32:
            assert np.sum(b**2) > 50 * np.sum((a - b) ** 2)
    jax.tree.map(np.testing.assert_array_equal, found, program(X))
    assert_equals_oracle(program, X)
    if name not in ONE_SIZE:
        other = np.concatenate([X[::-1], X])
        own = apply(W, qstate, other)
        jax.tree.map(np.testing.assert_array_equal, own, program(other))


def test_what_is_added_before_a_softmax_in_a_loop_is_no_mask():
    _, qmodel, qstate, _ = _lowered("shares")
    assert qstate["a/output"].high < qstate["scan_0/residual_0/output"].high
    assert "mask" not in qmodel.choices.sites


def test_a_slice_of_a_table_that_data_chooses_is_an_embedding():
    fn = lambda p, x, k: x[:, k] @ p["a"] + p["rows"][k][None]
    k = np.int32(2)
    qmodel = qjax.quantize_model(fn, W, X, k, scheme=POWERS)
    assert {"rows", "a"} <= set(qmodel.choices.sites)
    qstate = qjax.calibrate(qmodel, W, [(X, k)])
    program = qjax.lower(qmodel, W, qstate, X, k)
    for place in np.int32([0, 2, 4]):
        found = jax.jit(qmodel.apply)(W, qstate, X, place)
        np.testing.assert_array_equal(found, program(X, place))


def test_a_weight_in_a_loop_and_outside_has_two_words_of_its_own_values():
    def fn(p, x):
        step = lambda h, t: (jnp.tanh(h @ p["a"] + t[0]), None)
        return _scan(step, _zeros(x), x)[0] @ p["a"]

    word = QSpec(8, power_of_two=True)
    rules = tuple(
        qjax.Rule(name, QSpec(b, power_of_two=True)) for name, b in NAMES_AND_BITS
    )
    qmodel = qjax.quantize_model(fn, W, X, scheme=Scheme(word, WORD, rules=rules))
    qstate = qjax.calibrate(qmodel, W, [X])
    program = qjax.lower(qmodel, W, qstate, X)
    inside = dict(program.graph.walk()).popitem()[1]
    assert inside is not program.graph
    widest = {program.params[n].itemsize for g in (inside,) for n in _kernels(g)}
    found = jax.jit(qmodel.apply)(W, qstate, X)
    np.testing.assert_array_equal(found, program(X))
    # Inside 8 bits, whose codes are no multiples of those of 2 bits outside.
    codes = [np.unique(program.params[n]) for n in _kernels(inside)]
    assert widest == {1} and max(map(len, codes)) > 4


NAMES_AND_BITS = (("a", 2), ("a:1", 8))


def _kernels(graph):
    return [n for node in graph.nodes for r, n in node.params.items() if r == "kernel"]


def test_a_loop_that_no_data_reaches_is_folded():
    def fn(p, x):  # The loop is given the input, and does not read it.
        step = lambda n, h: (x[:, n], jnp.tanh(h @ p["a"]))[1]
        return lax.fori_loop(0, 2, step, jnp.full((1, 4), 0.25)), x @ p["a"]

    qmodel = qjax.quantize_model(fn, W, X, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, W, [X])
    program = qjax.lower(qmodel, W, qstate, X)
    assert qjax.verify(program, qmodel, W, qstate, X).is_exact


def test_ranges_move_from_a_fresh_state_outside_of_jit():
    fn = PROGRAMS["shares"]
    qmodel = qjax.quantize_model(fn, W, X, scheme=POWERS)
    state = qmodel.init(W, X)
    found = jax.jit(lambda p: qmodel.apply_and_update(p, state, X))(W)
    wanted = jax.jit(qmodel.apply_and_update)(W, state, X)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "rules", [(), (qjax.Rule("scan_0/*", WORD, per_step=True),)], ids=["one", "steps"]
)
def test_a_number_that_a_loop_carries_has_a_site(rules):
    def fn(p, x):
        def step(carry, t):
            heat, total, h = carry
            h = jnp.tanh(h @ p["a"] + t[0] * heat)
            return (heat * 0.5 + 0.1, total + jnp.sum(h * h), h), total

        return _scan(step, (jnp.float32(1), jnp.float32(0), _zeros(x)), x)

    x = X[:, :3]
    scheme = Scheme(POWERS.weights, WORD, rules=rules)
    qmodel = qjax.quantize_model(fn, W, x, scheme=scheme)
    assert any(s.name.endswith("/carry:0") and s.shape == () for s in qmodel.sites)
    qstate = qjax.calibrate(qmodel, W, [x])
    program = qjax.lower(qmodel, W, qstate, x)
    found, wanted = jax.jit(qmodel.apply)(W, qstate, x), jax.jit(fn)(W, x)
    jax.tree.map(np.testing.assert_array_equal, found, program(x))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.sum(b**2) > 300 * np.sum((a - b) ** 2)
    assert_equals_oracle(program, x)


def test_weights_of_many_steps_are_refused_and_the_remedy_lowers():
    x, stack = X[:, 0, :2], RNG.normal(0, 0.5, (300, 2, 2)).astype(np.float32)
    params = {"w": stack + 0.7 * np.eye(2, dtype=np.float32)}
    step = lambda h, w: (jnp.tanh(h @ w), None)
    scanned = lambda p, x: lax.scan(step, x, p["w"])[0]
    by_number = lambda p, x: lax.scan(
        lambda h, n: step(h, p["w"][n]), x, jnp.arange(300)
    )[0]
    for fn in (scanned, by_number):
        qmodel = qjax.quantize_model(fn, params, x, scheme=POWERS)
        qstate = qjax.calibrate(qmodel, params, [x])
        if fn is scanned:
            with pytest.raises(ValueError, match="300 steps reads other weights in ea"):
                qjax.lower(qmodel, params, qstate, x)
            continue
        program = qjax.lower(qmodel, params, qstate, x)
        found = jax.jit(qmodel.apply)(params, qstate, x)
        np.testing.assert_array_equal(found, program(x))


def test_a_counter_of_64_bits_is_refused_and_the_remedy_lowers():
    with jax.enable_x64(True):
        for count in (jnp.int64, jnp.int32):
            fn = lambda p, x, n=count: lax.fori_loop(
                n(0), n(3), lambda i, h: jnp.tanh(h @ p["a"] + x[:, i]), x[:, 0]
            )
            qmodel = qjax.quantize_model(fn, W, X, scheme=POWERS)
            qstate = qjax.calibrate(qmodel, W, [X])
            if count is jnp.int64:
                with pytest.raises(
                    NotImplementedError, match="(?s)has int64.*Count in int32"
                ):
                    qjax.lower(qmodel, W, qstate, X)
                continue
            program = qjax.lower(qmodel, W, qstate, X)
            found = jax.jit(qmodel.apply)(W, qstate, X)
            np.testing.assert_array_equal(found, program(X))


def _rounded(p, x):
    half = lambda h, t: jnp.tanh(h @ p["a"][:, :2] + jnp.floor(2 * t[:, :2]))
    step = lambda h, t: jnp.concatenate([half(h, t), jnp.sign(t[:, 2:]) * 0.5], -1)
    return _scan(lambda h, t: (step(h, t[0]),) * 2, _zeros(x), x)


def test_slices_of_weights_and_steps_of_data_in_a_loop():
    x = X[:, :3]
    qmodel = qjax.quantize_model(_rounded, W, x, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, W, [x])
    program = qjax.lower(qmodel, W, qstate, x)
    other = np.concatenate([x[::-1], x])
    found = jax.jit(qmodel.apply)(W, qstate, other)
    jax.tree.map(np.testing.assert_array_equal, found, program(other))
    wanted = jax.jit(_rounded)(W, x)
    for a, b in zip(*map(jax.tree.leaves, (program(x), wanted)), strict=True):
        assert np.sum(b**2) > 100 * np.sum((a - b) ** 2)
    assert_equals_oracle(program, x)


def test_nothing_is_proven_of_what_a_loop_reads_beyond_a_table():
    grid = qjax.QParams(jnp.float32(2.0**-5), jnp.int32(0))
    point = lambda x: qjax.fake_quant(x, grid, qjax.QSpec(8), site="h")

    def fn(x, i):
        rows = jnp.take(point(x), i, axis=0, mode="fill")
        step = lambda h, t: (point(jnp.maximum(h, t)),) * 2
        return jax.lax.scan(step, jnp.zeros(4), rows)[1]

    x, i = np.ones((3, 4), np.float32), np.array([0, 2, 1], np.int32)
    report = qjax.lower(fn, x, i).report().agreement
    assert report["h"].is_proven and not report["h:1"].is_proven


@pytest.mark.parametrize("first", [0.26, 4.0, 0.25, -0.0])
def test_a_first_value_that_is_not_on_the_grid_is_refused(first):
    grid = qjax.QParams(jnp.float32(2.0**-5), jnp.int32(0))
    point = lambda x, site: qjax.fake_quant(x, grid, qjax.QSpec(8), site=site)

    def fn(x, start=lambda h: h):
        step = lambda h, t: (point(0.5 * h + t, "h"),) * 2
        first_ = start(jnp.full((3, 4), first))
        return lax.scan(step, first_, jnp.swapaxes(point(x, "x"), 0, 1))[1]

    if first not in (0.25, -0.0):  # 4.0 would be code 128.
        with pytest.raises(ValueError, match="'h' starts on another grid"):
            qjax.lower(fn, X)
    own = functools.partial(fn, start=functools.partial(point, site="start"))
    np.testing.assert_array_equal(qjax.lower(own, X)(X), jax.jit(own)(X))


@pytest.mark.parametrize(
    "name, word", [("counts rows", WORD), ("known rows", qjax.QSpec(8))]
)
def test_rows_at_the_number_of_a_step_with_grids_of_its_own(name, word):
    rules = (qjax.Rule("scan_0/*", word, per_step=True),)
    scheme, x = Scheme(POWERS.weights, WORD, rules=rules), X
    qmodel = qjax.quantize_model(PROGRAMS[name], W, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, W, [x])
    program = qjax.lower(qmodel, W, qstate, x)
    # Each row has a grid of its own, and is no computed value.
    constants = [n for n in program.params if n.endswith("rows/output/value")]
    assert len(constants) == 5
    own = jax.jit(qmodel.apply_integer)(W, qstate, x)
    jax.tree.map(np.testing.assert_array_equal, own, program(x))
    found = jax.jit(qmodel.apply)(W, qstate, x)
    if word is WORD:
        jax.tree.map(np.testing.assert_array_equal, found, program(x))
    report = qjax.verify(program, qmodel, W, qstate, x)
    assert max(row.max_difference for row in report.sites.values()) <= 1
    assert_equals_oracle(program, x)
