"""Masks of softmaxes that are inputs: bool, made of inputs, or added; what is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax import QSpec, Rule, Scheme
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (6, 5, 8)).astype(np.float32)
P = RNG.normal(0, 0.4, (8, 8)).astype(np.float32)
KEPT = RNG.random((6, 5)) > 0.4
KEPT[:, 0] = True
PAST = np.tril(np.ones((5, 5), bool))


def cases(forms, slow, heavy):
    marks = dict.fromkeys(slow, pytest.mark.slow)
    marks |= dict.fromkeys(heavy, pytest.mark.heavy)
    return [pytest.param(form, marks=marks.get(form, ())) for form in forms]


def _scores(p, x):
    return jnp.einsum("bnc,bmc->bnm", x @ p, x) / 2


def _attend(p, x, mask, attend=jax.nn.dot_product_attention, **options):
    heads = lambda y: y.reshape(-1, 5, 2, 4)
    return attend(heads(x @ p), heads(x), heads(x), mask=mask, **options)


def _twice(p, x, m):
    h = jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(_scores(p, x) + m[:, None]), x)
    return jax.nn.softmax(_scores(p, h) + m[:, None])


ADDED = np.where(KEPT, 0, -1e9).astype(np.float32)
FORMS = {
    "select": (
        lambda p, x, m: jax.nn.softmax(jnp.where(m[:, None], _scores(p, x), -1e9)),
        KEPT,
    ),
    "select the rest": (
        lambda p, x, m: nnx.softmax(jnp.where(~m[:, None], -jnp.inf, _scores(p, x))),
        KEPT,
    ),
    "where": (
        lambda p, x, m: jax.nn.softmax(_scores(p, x), where=m[:, None]),
        KEPT,
    ),
    "attention": (lambda p, x, m: _attend(p, x, m[:, None, None]), KEPT),
    "causal too": (
        lambda p, x, m: _attend(p, x, m[:, None, None], is_causal=True),
        KEPT,
    ),
    "pairs": (
        lambda p, x, m: _attend(
            p, x, nn.make_attention_mask(m, m), nn.dot_product_attention
        ),
        KEPT,
    ),
    "times a number": (
        lambda p, x, m: jax.nn.softmax(
            _scores(p, x) + ((1 - m.astype(jnp.float32)) * -1e9)[:, None]
        ),
        KEPT,
    ),
    "times a real number": (
        lambda p, x, m: _twice(p, x, (1 - m) * -1e9),
        KEPT.astype(np.float32),
    ),
    "compared": (
        lambda p, x, m: jax.nn.softmax(
            _scores(p, x) + jnp.where(m > 0, 0.0, -1e4)[:, None]
        ),
        KEPT.astype(np.uint8),
    ),
    "added": (lambda p, x, m: jax.nn.softmax(_scores(p, x) + m[:, None]), ADDED),
    "added twice": (_twice, ADDED),
}
POWERS = Scheme(QSpec(8, power_of_two=True), QSpec(8, power_of_two=True))


SLOW = ("pairs", "times a real number", "compared", "added")
HEAVY = ("select", "attention", "added twice")  # Parts of other forms.


@pytest.mark.kept
@pytest.mark.parametrize("form", cases(FORMS, SLOW, HEAVY))
def test_masks_that_are_inputs_ship_and_widen_no_range(form):
    fn, mask = FORMS[form]
    scheme = POWERS if form in ("added", "pairs") else Scheme()
    qmodel = qjax.quantize_model(fn, P, X, mask, scheme=scheme)
    assert "input:1" not in [site.name for site in qmodel.sites]
    qstate = qjax.calibrate(qmodel, P, [(X, mask)])
    found = np.asarray(jax.jit(qmodel.apply)(P, qstate, X, mask))
    wanted = np.asarray(jax.jit(fn)(P, X, mask))
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2)
    program = qjax.lower(qmodel, P, qstate, X, mask)
    assert program.graph.nodes[-1].operation != "divide"
    report = qjax.verify(program, qmodel, P, qstate, X, mask)
    sites = {s: row for s, row in report.sites.items() if s.startswith("softmax")}
    assert all(row.equal == row.codes for row in sites.values())
    assert_equals_oracle(program, X, mask)
    shipped = np.asarray(program(X, mask))
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, X, mask), shipped
    )
    other = X[::-1].copy(), np.roll(mask, 1, 0)
    if scheme is POWERS:
        np.testing.assert_array_equal(
            jax.jit(qmodel.apply)(P, qstate, *other), program(*other)
        )
    assert_equals_oracle(program, *other)


def test_what_is_added_and_no_mask_is_met_by_calibration():
    fn, _ = FORMS["added"]
    bias = RNG.normal(size=(6, 5)).astype(np.float32)
    qmodel = qjax.quantize_model(fn, P, X, bias)
    with pytest.raises(qjax.CalibrationError, match="as a mask, and has other"):
        qjax.calibrate(qmodel, P, [(X, bias)])
    # Both remedies.
    other = lambda p, x, m: jax.nn.softmax(_scores(p, x) + m[:, None] * 1.0)
    qmodel = qjax.quantize_model(other, P, X, bias)
    qstate = qjax.calibrate(qmodel, P, [(X, bias)])
    program = qjax.lower(qmodel, P, qstate, X, bias)
    assert np.max(np.abs(program(X, bias) - other(P, X, bias))) < 0.2
    fn, mask = FORMS["select"]
    qjax.calibrate(qjax.quantize_model(fn, P, X, mask), P, [(X, mask)])


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_a_mask_of_integers_that_are_no_truth_values_is_refused(dtype):
    fn, mask = FORMS["times a number"]
    mask = mask.astype(dtype)
    qmodel = qjax.quantize_model(fn, P, X, mask)
    qstate = qjax.calibrate(qmodel, P, [(X, mask)])
    with pytest.raises(ValueError, match="select by a comparison of it"):
        qjax.lower(qmodel, P, qstate, X, mask)
    remedy = lambda p, x, m: jax.nn.softmax(
        _scores(p, x) + jnp.where(m > 0, 0.0, -1e9)[:, None]
    )
    qmodel = qjax.quantize_model(remedy, P, X, mask)
    qstate = qjax.calibrate(qmodel, P, [(X, mask)])
    program = qjax.lower(qmodel, P, qstate, X, mask)
    assert np.all(np.asarray(program(X, mask)).swapaxes(1, 2)[mask == 0] == 0)


def test_what_neighbours_in_a_mask_make_is_none():
    """Equal truth values make 0 of it; others make numbers above 0, too."""

    def fn(p, x, m):
        m = m.astype(jnp.float32)[:, None]
        next_ = jnp.concatenate([m[..., 1:], m[..., :1]], -1)
        return jax.nn.softmax(_scores(p, x) + (m - next_) * 1e3)

    mask = KEPT.astype(np.int8)
    qmodel = qjax.quantize_model(fn, P, X, mask)
    qstate = qjax.calibrate(qmodel, P, [(X, mask)])
    found, wanted = jax.jit(qmodel.apply)(P, qstate, X, mask), fn(P, X, mask)
    np.testing.assert_allclose(found, wanted, atol=0.05)


def _of_tokens(p, t):
    x = p["table"][t]
    return jax.nn.softmax(jnp.where((t != 0)[:, None], _scores(p["kernel"], x), -1e9))


def test_integers_choose_rows_and_mask():
    params = {"table": RNG.normal(size=(16, 8)).astype(np.float32), "kernel": P}
    tokens = np.where(KEPT, RNG.integers(1, 16, KEPT.shape), 0).astype(np.int32)
    qmodel = qjax.quantize_model(_of_tokens, params, tokens)
    qstate = qjax.calibrate(qmodel, params, [tokens])
    program = qjax.lower(qmodel, params, qstate, tokens)
    shipped = np.asarray(program(tokens))
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(params, qstate, tokens), shipped
    )
    assert np.all(shipped[np.broadcast_to(~KEPT[:, None], shipped.shape)] == 0)
    assert_equals_oracle(program, tokens[:2])
    with pytest.raises(ValueError, match="input 0"):
        program(tokens + 16)  # No row, so that nothing is known of its mask.


@pytest.mark.parametrize("is_norm", [False, True])
def test_a_sum_of_bytes_in_16_bits_is_not_read_as_bytes(is_norm):
    def fn(p, x):
        h = jnp.tanh(x @ p) + x
        return jax.nn.standardize(h) if is_norm else jax.nn.softmax(h)

    scheme = Scheme(rules=[Rule("residual_0/output", QSpec(16))])
    qmodel = qjax.quantize_model(fn, P, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [X])
    wanted = np.asarray(jax.jit(fn)(P, X))
    found = np.asarray(jax.jit(qmodel.apply)(P, qstate, X))
    assert np.sum(wanted**2) > 1e3 * np.sum((found - wanted) ** 2)
    np.testing.assert_array_equal(qjax.lower(qmodel, P, qstate, X)(X), found)


Q = RNG.normal(0, 2, (4, 5, 3, 8)).astype(np.float32)
CHOSEN = RNG.random((5, 3, 8)) > 0.3
TURNED = {
    "vmap": lambda x: jax.vmap(jax.nn.softmax, 1)(x),
    "vmap back": lambda x: jax.vmap(jax.nn.softmax, 2, 2)(x),
    "masked before": lambda x: jax.nn.softmax(
        jnp.swapaxes(jnp.where(CHOSEN, x, -1e9), 1, 2)
    ),
    "masked between": lambda x: jnp.swapaxes(
        jax.nn.softmax(
            jnp.where(np.swapaxes(CHOSEN, 0, 1), jnp.swapaxes(x, 1, 2), -1e9)
        ),
        1,
        2,
    ),
    "attention": lambda x: jax.nn.dot_product_attention(x, x, x),
    "joined axes": lambda x: jax.nn.softmax(x.reshape(len(x), 5, 24)),
    "of a mean": lambda x: jax.nn.softmax(x.mean((1, 2))),
}


@pytest.mark.parametrize(
    "form", cases(TURNED, ("masked before", "joined axes"), ("vmap", "attention"))
)
def test_softmaxes_of_turned_values(form):
    fn = lambda p, x: TURNED[form](x)
    qmodel = qjax.quantize_model(fn, (), Q)
    qstate = qjax.calibrate(qmodel, (), [Q])
    program = qjax.lower(qmodel, (), qstate, Q)
    assert [n.operation for n in program.graph.nodes].count("softmax") == 1
    assert_equals_oracle(program, Q[:2])
    report = qjax.verify(program, qmodel, (), qstate, Q)
    site = next(s for s in report.sites if s.startswith(("softmax", "output")))
    assert report.sites[site].equal == report.sites[site].codes
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)((), qstate, Q), program(Q)
    )
    wanted = np.asarray(fn((), Q))
    error = np.asarray(program(Q)) - wanted
    assert np.sum(wanted**2) > 200 * np.sum(error**2)


def test_known_masks_that_the_model_makes_widen_no_range():
    """`jnp.tril` is a call inside of the model, not a constant of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, 6, 8)).astype(np.float32)
    w = rng.normal(0, 0.3, (8, 16)).astype(np.float32)

    def fn(w, x):
        q, k = jnp.split((x @ w)[:, :, None], 2, -1)
        kept = jnp.tril(jnp.ones((1, 1, 6, 6), bool))
        bias = jnp.where(kept, 0.0, jnp.finfo(jnp.float32).min)
        return nn.dot_product_attention(q, k, k, bias=bias)

    qmodel = qjax.quantize_model(fn, w, x)
    qstate = qjax.calibrate(qmodel, w, [x])
    assert qjax.scales(qmodel, w, qstate)["product_0/output"].scale < 1
    program = qjax.lower(qmodel, w, qstate, x)
    assert_equals_oracle(program, x)
    report = qjax.verify(program, qmodel, w, qstate, x)
    assert all(row.max_difference <= 1 for row in report.sites.values())


HIDDEN = np.where(RNG.random((3, 5, 5)) < 0.4, np.float32(-100), np.float32(0))
HIDDEN[:, range(5), range(5)] = 0
WINDOWS = {
    "added": lambda s: jax.nn.softmax(
        (s.reshape(2, 3, 5, 5) + HIDDEN[None]).reshape(s.shape)
    ),
    "chosen": lambda s: jax.nn.softmax(
        jnp.where(HIDDEN[None] == 0, s.reshape(2, 3, 5, 5), -jnp.inf).reshape(s.shape)
    ),
    "rows joined": lambda s: jax.nn.softmax(
        (s.reshape(2, 3, 5, 5) + HIDDEN[None]).reshape(2, 15, 5)
    ).reshape(s.shape),
    "behind another": lambda s: jax.nn.softmax(
        (jnp.where(PAST[None], s, -100.0).reshape(2, 3, 5, 5) + HIDDEN[None]).reshape(
            s.shape
        )
    ),
}


@pytest.mark.kept
@pytest.mark.parametrize("form", WINDOWS)
def test_known_masks_have_an_axis_of_windows_that_the_result_has_not(form):
    """Shifted windows: -100 itself masks, and the range is that of the scores."""
    fn = lambda p, x: WINDOWS[form](_scores(p, x))
    qmodel = qjax.quantize_model(fn, P, X, scheme=POWERS)
    qstate = qjax.calibrate(qmodel, P, [(X,)])
    grids = qjax.scales(qmodel, P, qstate)
    assert all(np.max(grid.scale) < 0.5 for grid in grids.values())
    program = qjax.lower(qmodel, P, qstate, X)
    assert_equals_oracle(program, X)
    shipped = np.asarray(program(X))
    np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, X), shipped)
    np.testing.assert_array_equal(jax.jit(qmodel.apply_integer)(P, qstate, X), shipped)
    hidden = np.broadcast_to(HIDDEN < 0, (2, 3, 5, 5)).reshape(6, 5, 5)
    if form == "behind another":
        hidden = hidden | ~PAST
    assert np.all(shipped[hidden] == 0) and np.all(np.sum(shipped, -1) > 0.95)
    wanted = np.asarray(jax.jit(fn)(P, X))
    assert np.sum(wanted**2) > 200 * np.sum((shipped - wanted) ** 2)


def test_unlike_masks_that_leave_a_row_nothing_are_refused():
    """One masks a whole row alike, the other leaves its maximum: no row has both."""
    last = np.where(np.arange(5) == 4, np.float32(-100), np.float32(0))
    kept = np.arange(5) == 4  # What is left of each row, the other one masks.

    def fn(p, x):
        chosen = jnp.where(kept[None, None], _scores(p, x), -100.0)
        return jax.nn.softmax(chosen + last[None, None])

    qmodel = qjax.quantize_model(fn, P, X)
    qstate = qjax.calibrate(qmodel, P, [(X,)])
    with pytest.raises(NotImplementedError, match="no integer rule"):
        qjax.lower(qmodel, P, qstate, X)
