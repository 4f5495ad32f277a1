"""Inputs that drive accumulators of loops: against all inputs, and rerun in XLA."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.affine import QParams, fake_quant
from qjax.ends import real_input
from qjax.graph.code_search import InputCodes, search

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (3, 5, 4)).astype(np.float32)
W = {
    "a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32),
    "b": RNG.normal(0, 0.5, (4, 4)).astype(np.float32),
    "rows": RNG.normal(0, 0.7, (7, 4)).astype(np.float32),
}
WORD = QSpec(8, power_of_two=True)
POWERS = Scheme(QSpec(8, power_of_two=True, axis="output"), WORD)


def _point(x, bits, site=""):
    params = QParams(jnp.float32(1), jnp.int32(0))
    return fake_quant(x, params, QSpec(bits), site=site)


def _explicit(kernel, is_reversed, lead=None):
    """A loop on grids of step 1, so that its codes are its numbers."""

    def fn(x):
        x = _point(x, 2)
        x = x if lead is None else _point(x @ _point(lead, 4), 3)

        def step(h, t):
            acc = _point(h @ _point(kernel, 4), 16, "sum")
            h = _point(acc + t, 3)
            return h, h

        xs, start = jnp.swapaxes(x, 0, 1), jnp.zeros(x.shape[::2])
        return lax.scan(step, start, xs, reverse=is_reversed)

    return qjax.lower(fn, np.zeros((1, 3, 2), np.float32))


EVERY = np.array(list(itertools.product(range(-2, 2), repeat=6)))


def _sums(kernel, is_reversed, x, lead=None):
    """The sums of all steps, ``[example, step, channel]``, by their formula."""
    x = x if lead is None else np.clip(x @ lead, -4, 3)
    h, found = np.zeros((len(x), 2), int), np.zeros_like(x)
    for t in range(3)[::-1] if is_reversed else range(3):
        found[:, t] = h @ kernel
        h = np.clip(found[:, t] + x[:, t], -4, 3)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_reversed", [False, True])
def test_what_is_found_is_the_largest_of_all_inputs(seed, is_reversed):
    rng = np.random.default_rng(seed)
    kernel, lead = rng.integers(-3, 4, (2, 2, 2))
    lead = lead if seed % 2 else None
    program = _explicit(np.float32(kernel), is_reversed, lead)
    sums = _sums(kernel, is_reversed, EVERY.reshape(-1, 3, 2), lead)
    largest = np.abs(sums).max()
    for budget in (len(EVERY), 400):
        found = program.find_witness("sum", budget=budget)
        is_whole = budget == len(EVERY)
        assert (1 if is_whole else 0.9) * largest <= abs(found.value) <= largest
        assert found.is_attained == (abs(found.value) == found.bound)
        assert found.is_exhaustive == (is_whole and not found.is_attained)
        (x,) = found.codes
        own = _sums(kernel, is_reversed, x, lead)
        assert x.shape == (1, 3, 2)
        assert own[0, found.step[0], found.index[1]] == found.value
        sites, _ = program.run_sites(np.float32(x), backend="xla")
        assert sites["sum"][(*found.step, *found.index)] == found.value


def test_a_bound_that_no_input_attains_is_not_called_attained():
    # The sum of the first step is 0, and the second has what 2 bits lead to.
    program = _explicit(np.float32([[3, 3], [3, 3]]), False)
    found = program.find_witness("sum", budget=4096)
    largest = np.abs(_sums(np.full((2, 2), 3), False, EVERY.reshape(-1, 3, 2))).max()
    assert found.bound == 24 and found.is_attained == (largest == 24)
    kernel = np.float32([[1, 0], [0, 1]])
    fn = lambda x: lax.fori_loop(
        0, 3, lambda n, h: _point(_point(h @ _point(kernel, 4), 16, "sum"), 3), x
    )
    narrow = qjax.lower(
        lambda x: fn(_point(_point(x, 2), 3)), np.ones((1, 2), np.float32)
    )
    found = narrow.find_witness("sum", budget=16)
    assert (abs(found.value), found.is_exhaustive, found.tried) == (2, True, 16)
    assert not found.is_attained and found.fraction == 2 / found.bound
    assert "the largest of all 16 inputs" in str(found) and "attained" not in str(found)
    found = narrow.find_witness("sum", budget=15)
    assert not found.is_exhaustive and "was not attained with 15 inputs" in str(found)


def _lowered(fn, *x, scheme=POWERS, p=W, **options):
    qmodel = qjax.quantize_model(fn, p, *x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, p, [x if len(x) > 1 else x[0]])
    return qjax.lower(qmodel, p, qstate, *x, **options)


def _scan(p, x, start=None, **options):
    step = lambda h, t: ((h := jnp.tanh(h @ p["a"] + t)), h)
    start = jnp.zeros(x.shape[::2]) if start is None else start
    return lax.scan(step, start, jnp.swapaxes(x, 0, 1), **options)


def _flags(p, x, keep):
    def step(h, t):
        h = jnp.where(t[1][:, None], jnp.tanh(h @ p["a"] + t[0]), h)
        return h, h

    return lax.scan(step, jnp.zeros(x.shape[::2]), (jnp.swapaxes(x, 0, 1), keep.T))


def _time_first(p, x):
    step = lambda h, t: ((h := jnp.tanh(h @ p["a"] + t)), h)
    return lax.scan(step, jnp.zeros(x.shape[1:]), x)


def _meeting(p, x):
    return _scan(p, x - x.max(0, keepdims=True))


KEEP = RNG.random((3, 5)) < 0.5
TOKENS = RNG.integers(0, 7, (3, 5)).astype(np.int32)
# Function, inputs, examples of the input found.
KINDS = {
    "scan": (_scan, (X,), 1),
    "reverse": (lambda p, x: _scan(p, x, reverse=True), (X,), 1),
    "dense before": (lambda p, x: _scan(p, nn.relu(x @ p["b"])), (X,), 1),
    "tokens": (lambda p, k: _scan(p, p["rows"][k]), (TOKENS,), 1),
    "truth values": (_flags, (X, KEEP), 1),
    "first state": (lambda p, x, h: _scan(p, x, h), (X, X[:, 0]), 1),
    "time first": (_time_first, (X,), 3),
    "examples that meet": (_meeting, (X,), 3),
}


def _products(program, codes, is_reversed):
    """Computes the sums of the kernel in all steps from the codes that XLA carries."""
    ends = [program.graph.values[v] for v in program.graph.inputs]
    flat = map(np.asarray, jax.tree.leaves(codes))
    real = [real_input(x, v) for x, v in zip(flat, ends, strict=True)]
    real = [
        x.astype(bool) if v.dtype == "bool" else x
        for x, v in zip(real, ends, strict=True)
    ]
    sites, _ = program.run_sites(*real, backend="xla")
    name = "scan_0/carry:0:1" if "input:1" in sites else "scan_0/carry:0"
    after = np.asarray(sites[name]).astype(int)
    starts = [v[:1] for k, v in program.params.items() if k.endswith("/start")]
    (start,) = starts or [sites["input:1"]]
    start = np.broadcast_to(start, after[0].shape).astype(int)
    before = [*after[1:], start] if is_reversed else [start, *after[:-1]]
    kernel, bias = (np.asarray(program.params[k]).astype(int) for k in ("a", "a/bias"))
    return np.stack(before) @ kernel + bias


@pytest.mark.parametrize("name", KINDS)
def test_an_input_of_a_program_leads_to_what_is_said(name):
    fn, x, examples = KINDS[name]
    program = _lowered(fn, *x)
    found = program.find_witness("a/output", budget=200)
    assert found.place and found.tried <= 200 and found.is_moved
    for codes, own in zip(found.codes, x, strict=True):
        assert codes.shape == (examples, *own.shape[1:])
    sums = _products(program, found.codes, name == "reverse")
    assert sums[(*found.step, *found.index)] == found.value
    assert np.abs(sums).max() == abs(found.value) <= found.bound
    # No random input of as many leads as far.
    ends = [program.graph.values[v] for v in program.graph.inputs]
    rng = np.random.default_rng(1)
    size = 3 if examples == 3 else 60
    random = [
        rng.integers(v.low, v.high, (size, *v.shape[1:]), endpoint=True) for v in ends
    ]
    others = _products(program, random, name == "reverse")
    assert np.abs(others).max() <= abs(found.value)


def test_an_lstm_is_driven_to_what_xla_reaches():
    x = X[:, :, :3]
    lstm = nn.RNN(nn.OptimizedLSTMCell(4))
    program = _lowered(lstm.apply, x, p=lstm.init(jax.random.key(0), x))
    bounds = [own.path for own in program.report().overflow]
    assert len(bounds) == 5 and len(set(bounds)) == 1
    hidden = program.find_witness("cell/hi/output", budget=500)
    inner = program.find_witness("cell/ii/output", budget=500)
    assert inner.is_attained and not hidden.is_attained and hidden.fraction > 0.3
    for found, name in ((hidden, "hi"), (inner, "ii")):
        (codes,) = found.codes
        real = real_input(codes, program.graph.values[program.graph.inputs[0]])
        sites, _ = program.run_sites(real, backend="xla")
        h = np.asarray(sites["scan_0/carry:1"]).astype(int)
        start = np.asarray(program.params["scan_0/carry:1/start"])[:1].astype(int)
        given = np.concatenate([start[None], h[:-1]])
        given = given if name == "hi" else np.swapaxes(codes, 0, 1)
        own = (program.params[f"cell/{name}/{k}"] for k in ("kernel", "bias"))
        kernel, bias = (np.asarray(p).astype(int) for p in own)
        sums = given @ kernel + bias
        assert sums[(*found.step, *found.index)] == found.value
        assert np.abs(sums).max() == abs(found.value)


def test_nested_loops_and_grids_by_step():
    def nested(p, x):
        def step(h, t):
            add = lambda k, g: jnp.tanh(g @ p["a"] + t)
            return lax.fori_loop(0, 2, add, h), None

        return lax.scan(step, jnp.zeros(x.shape[::2]), jnp.swapaxes(x, 0, 1))[0]

    found = _lowered(nested, X).find_witness("a/output", budget=100)
    assert len(found.step) == 2 and found.step[1] < 2 and "at step" in str(found)
    rule = Rule("scan_0/*", WORD, per_step=True)
    by_step = dataclasses.replace(POWERS, rules=(rule,))
    program = _lowered(lambda p, x: _scan(p, x)[1], X, scheme=by_step)
    found = program.find_witness("scan_0/step_0/a/output", budget=50)
    assert (found.step, found.value) == ((), found.bound) and not found.place
    assert not found.is_moved and found.is_attained  # Of the known first state.
    later = program.find_witness("scan_0/step_2/a/output", budget=50)
    assert later.is_moved and later.value


def test_a_streaming_program_is_driven_for_more_steps_than_it_was_lowered_for():
    fn = lambda p, x: jnp.swapaxes(_scan(p, nn.relu(x @ p["b"]))[1], 0, 1)
    program = _lowered(fn, X, streaming={0: 1})
    kernel, bias = (np.asarray(program.params[k]).astype(int) for k in ("a", "a/bias"))
    for steps in (1, 5, 8):
        found = program.find_witness("a/output", steps=steps, budget=100)
        (codes,) = found.codes
        assert codes.shape == (1, steps, 4)
        real = real_input(codes, program.graph.values[program.graph.inputs[0]])
        state = program.initial_state(1)
        sums = []
        for t in range(steps):
            (h,) = state
            sums.append(np.asarray(h).astype(int) @ kernel + bias)
            state, _ = program.step(state, real[:, t])
        assert np.stack(sums)[(*found.step, *found.index)] == found.value
        assert np.abs(sums).max() == abs(found.value)
    outside = program.find_witness("b/output", steps=2, budget=50)
    assert len(outside.step) == 1 and outside.is_moved


def test_names_that_stand_for_no_accumulator_or_for_several():
    lstm = nn.RNN(nn.OptimizedLSTMCell(4))
    program = _lowered(lstm.apply, X, p=lstm.init(jax.random.key(0), X))
    with pytest.raises(ValueError, match="no accumulator 'nothing'.*cell/hi/output"):
        program.find_witness("nothing")
    with pytest.raises(ValueError, match="5 accumulators.*cell/hi/output"):
        program.find_witness("cell.scan_fn/cell")
    with pytest.raises(ValueError, match="made of no accumulator.*cell/hi/output"):
        program.find_witness("scan_0/tanh_0/output")
    for budget in (0, -1):
        with pytest.raises(ValueError, match="`budget` must be 1 input or more"):
            program.find_witness("cell/hi/output", budget=budget)
    with pytest.raises(ValueError, match="`steps=7`. Lower the model with `streaming"):
        program.find_witness("cell/hi/output", steps=7)
    with pytest.raises(ValueError, match="`steps` must be 1 or more"):
        program.find_witness("cell/hi/output", steps=0)
    (other, *_) = _lowered(_scan, X).report().overflow
    with pytest.raises(ValueError, match="of another"):
        program.find_witness(other)
    own = program.report().overflow[1]
    assert program.find_witness(own, budget=1).tried == 1
    assert "find_witness" in str(program.report())


def test_a_loop_without_steps_is_refused():
    kernel = np.float32([[1, 2], [3, -1]])
    step = lambda n, h: _point(_point(h @ _point(kernel, 4), 16, "sum"), 3)
    fn = lambda x: lax.fori_loop(0, 0, step, _point(x, 3))
    program = qjax.lower(fn, np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="its loop has no steps"):
        program.find_witness("sum")


# The search itself.


def _codes(shape, low, high, is_ordered=True):
    return InputCodes(shape, low, high, 0, is_ordered)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_finds_the_ends_of_a_linear_function(seed):
    weights = np.random.default_rng(seed).integers(-9, 10, 30)
    values = lambda rows: np.stack([rows @ weights, rows[:, :1].sum(1)], 1)
    inputs = [_codes((5, 4), -128, 127), _codes((10,), -8, 7)]
    ends = np.repeat([[-128, 127], [-8, 7]], (20, 10), 0)
    terms = weights[:, None] * ends
    largest = max(terms.max(1).sum(), -terms.min(1).sum())
    found = search(values, inputs, largest, 2000, 64, seed)
    assert abs(found.row @ weights) == largest and found.tried < 2000
    assert found.is_moved and not found.is_exhaustive


def test_a_tenth_of_all_inputs_most_often_has_the_largest():
    hits, rng = 0, np.random.default_rng(0)
    for kernel in rng.integers(-3, 4, (40, 2, 2)):
        sums = lambda rows: _sums(kernel, False, rows.reshape(-1, 3, 2)).reshape(-1, 6)  # noqa: B023
        most = np.abs(sums(EVERY)).max()
        found = search(sums, [_codes((3, 2), -2, 1)], most, 400, 64, 0)
        hits += np.abs(sums(found.row[None])).max() == most
    assert hits >= 34


def test_a_search_keeps_its_budget_and_the_ranges():
    seen = []

    def values(rows):
        seen.append(rows)
        return np.zeros((len(rows), 3), np.int64)

    inputs = [
        _codes((3,), 2, 5),
        _codes((), -(2**31), 2**31 - 1, False),
        _codes((0,), 0, 1),
    ]
    for budget in (1, 7, 100):
        seen.clear()
        found = search(values, inputs, 10, budget, 16, 0)
        rows = np.concatenate(seen)
        assert found.tried == len(rows) == budget and not found.is_moved
        assert rows[:, :3].min() >= 2 and rows[:, :3].max() <= 5
        assert rows[:, 3].min() >= -(2**31) and rows[:, 3].max() < 2**31
    assert len(np.unique(rows[:, 3])) > 20  # No end of what has no order is enough.
