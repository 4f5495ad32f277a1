"""Biases before softmaxes that mask as well, and masks among biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax import QSpec, Scheme
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(40)
Q, K, V = (RNG.normal(size=(2, 6, 2, 8)).astype(np.float32) for _ in range(3))
KEPT = RNG.random((2, 1, 6, 6)) > 0.3
KEPT[..., 0] = True
REL = RNG.normal(size=(2, 2, 6, 6)).astype(np.float32)
P = REL[0].copy()
PAST = np.tril(np.ones((6, 6), bool))
ROWS = RNG.random((2, 6)) > 0.4
ROWS[:, 0] = True
SLOPES = np.array([0.5, 0.25], np.float32)[:, None, None]
ALIBI = -np.abs(np.arange(6)[:, None] - np.arange(6)).astype(np.float32) * SLOPES


def mixed(fill):
    return np.where(KEPT, REL, fill).astype(np.float32)


def padded(fill):
    return np.where(ROWS, 0, fill).astype(np.float32)


def _of(bias):
    """Returns attention, written out, to whose scores a bias is added."""

    def fn(p, q, k, v, *rest):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(bias(scores, p, *rest))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return fn


def _attend(attend=jax.nn.dot_product_attention, **options):
    return lambda p, q, k, v, b: attend(q, k, v, bias=b, **options)


FORMS = {
    "mask alone": (_attend(), np.where(KEPT, 0, -1e9).astype(np.float32)),
    "mixture": (_attend(), mixed(-1e9)),
    "infinity": (_attend(), mixed(-np.inf)),
    "least number": (_attend(), mixed(np.finfo(np.float32).min)),
    "of BERT": (
        lambda p, q, k, v, b: _attend()(p, q, k, v, b[:, None, None]),
        padded(-1e4),
    ),
    "causal too": (_attend(is_causal=True), mixed(-1e9)),
    "mask too": (_attend(mask=jnp.asarray(PAST)), mixed(-1e9)),
    "nnx": (_attend(nnx.dot_product_attention), mixed(-1e9)),
    "linen": (
        lambda p, q, k, v, b: nn.dot_product_attention(q, k, v, bias=b * 1.0),
        mixed(-1e9),
    ),
    "twice": (
        lambda p, q, k, v, b: _attend()(p, _attend()(p, q, k, v, b), k, v, b),
        mixed(-1e9),
    ),
    "and a parameter": (
        _of(lambda s, p, b: s + (p[None] + b[:, None, None])),
        padded(-1e9),
    ),
    "and a constant": (
        _of(lambda s, p, b: s + (ALIBI[None] + b[:, None, None])),
        padded(-1e9),
    ),
    "and an input": (
        _of(lambda s, p, b, r: s + (r + b[:, None, None])),
        padded(-1e9),
        REL,
    ),
    "scaled": (_of(lambda s, p, b: (s + jnp.swapaxes(b, 2, 3)) / 2), mixed(-1e9)),
    "truths and a parameter": (
        _of(lambda s, p, b: s + (p[None] + jnp.where(b, 0, -1e10)[:, None, None])),
        ROWS,
    ),
    "reals and a parameter": (
        _of(lambda s, p, b: s + (p[None] + (1 - b)[:, None, None] * -1e10)),
        ROWS.astype(np.float32),
    ),
    "chosen input": (
        _of(lambda s, p, b, r: s + jnp.where(b[:, None, None], r, -1e9)),
        ROWS,
        REL,
    ),
    "chosen by a constant": (_of(lambda s, p, r: s + jnp.where(PAST, r, -1e9)), REL),
    "penalty": (
        _of(lambda s, p, b: s - 1e9 * (1 - b[:, None, None])),
        ROWS.astype(np.float32),
    ),
    "penalty of truths": (
        _of(lambda s, p, b: s - 1e9 * (1 - b[:, None, None].astype(jnp.float32))),
        ROWS,
    ),
    "constant": (
        _of(lambda s, p: s + np.where(PAST, ALIBI, -np.inf).astype(np.float32)[None]),
    ),
    "chosen parameter": (_of(lambda s, p: s + jnp.where(PAST, p, -1e9)[None]),),
    "constant and a parameter": (
        _of(lambda s, p: s + (p + jnp.where(PAST, 0, -1e9)[None])[None]),
    ),
}


def _quantized(form, scheme=None):
    fn, *rest = FORMS[form]
    inputs = Q, K, V, *rest
    qmodel = qjax.quantize_model(fn, P, *inputs, scheme=scheme or Scheme())
    return fn, inputs, qmodel, qjax.calibrate(qmodel, P, [inputs], progress=False)


OFTEN = ("mixture", "chosen parameter", "truths and a parameter")  # Parts of others.


@pytest.mark.kept
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=() if form in OFTEN else pytest.mark.slow)
        for form in FORMS
    ],
)
def test_what_masks_in_a_sum_widens_no_range(form):
    fn, inputs, qmodel, qstate = _quantized(form)
    ranges = [(s.low, s.high) for s in qstate.values() if hasattr(s, "low")]
    assert max(float(np.max(np.abs(r))) for r in ranges) < 20
    program = qjax.lower(qmodel, P, qstate, *inputs)
    shipped = np.asarray(program(*inputs))
    wanted = np.asarray(jax.jit(fn)(P, *inputs))
    assert np.sum(wanted**2) > 3000 * np.sum((shipped - wanted) ** 2)
    report = qjax.verify(program, qmodel, P, qstate, *inputs)
    sites = {s: row for s, row in report.sites.items() if s.startswith("softmax")}
    assert sites and all(row.equal == row.codes for row in sites.values())
    assert_equals_oracle(program, *inputs)
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, *inputs), shipped
    )


def test_masks_that_calibration_never_met_still_mask():
    fn, _ = FORMS["mixture"]
    zeros = np.zeros_like(REL)
    for bias in (zeros, REL):
        qmodel = qjax.quantize_model(fn, P, Q, K, V, bias)
        qstate = qjax.calibrate(qmodel, P, [(Q, K, V, bias)], progress=False)
        later = np.where(KEPT, bias, -1e9).astype(np.float32)
        program = qjax.lower(qmodel, P, qstate, Q, K, V, later)
        shipped = np.asarray(program(Q, K, V, later))
        wanted = np.asarray(fn(P, Q, K, V, later))
        # Averages of fewer values go beyond the range of their site.
        assert np.sum(wanted**2) > 300 * np.sum((shipped - wanted) ** 2)
        # What is masked has no weight at all.
        moved = K.copy()
        moved[:, 1:] = K[:, :0:-1]
        only = np.full_like(later, -1e9)
        only[..., 0] = 0
        np.testing.assert_array_equal(
            program(Q, K, V, only), program(Q, moved, V, only)
        )


def test_a_row_of_masks_alone_is_uniform():
    fn, bias = FORMS["mixture"]
    bias = bias.copy()
    bias[0, 1, 2], bias[1, 0, 4] = -1e9, -np.inf
    qmodel = qjax.quantize_model(fn, P, Q, K, V, bias)
    qstate = qjax.calibrate(qmodel, P, [(Q, K, V, bias)], progress=False)
    program = qjax.lower(qmodel, P, qstate, Q, K, V, bias)
    shipped = np.asarray(program(Q, K, V, bias))
    for row in (shipped[0, 2, 1], shipped[1, 4, 0]):
        assert np.all(np.isfinite(row))
    np.testing.assert_allclose(shipped[0, 2, 1], V[0, :, 1].mean(0), atol=0.05)
    np.testing.assert_allclose(shipped[1, 4, 0], V[1, :, 0].mean(0), atol=0.05)


@pytest.mark.parametrize("bits", [4, 16])
def test_masks_in_a_sum_of_other_words(bits):
    word, own = QSpec(8, power_of_two=True), QSpec(bits, power_of_two=True)
    scheme = Scheme(word, word, rules=[qjax.Rule("input:3", own)])
    _, inputs, qmodel, qstate = _quantized("mixture", scheme)
    program = qjax.lower(qmodel, P, qstate, *inputs)
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply)(P, qstate, *inputs), program(*inputs)
    )
    assert_equals_oracle(program, *inputs)


def test_masks_in_a_sum_have_the_derivative_of_the_float_function():
    """With words so fine that rounding is all but nothing."""
    word = QSpec(16)
    fn, inputs, qmodel, qstate = _quantized("mixture", Scheme(word, word))
    weight = RNG.normal(size=V.shape).astype(np.float32)
    of = lambda run: lambda q, b: jnp.sum(weight * run(q, *inputs[1:3], b))
    own = of(lambda *x: qmodel.apply(P, qstate, *x))
    found = jax.jit(jax.grad(own, (0, 1)))(inputs[0], inputs[3])
    wanted = jax.jit(jax.grad(of(lambda *x: fn(P, *x)), (0, 1)))(inputs[0], inputs[3])
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    assert np.all(np.asarray(found[1])[np.broadcast_to(~KEPT, REL.shape)] == 0)


def test_sums_of_masks_under_stacked_schemes():
    _, inputs, qmodel, qstate = _quantized("mixture")
    schemes = [Scheme(QSpec(b), QSpec(b)) for b in (4, 8)]
    on = lambda s: qmodel.apply(P, qstate, *inputs, scheme=s)
    found = jax.jit(jax.vmap(on))(qjax.stack_schemes(schemes))
    for y, scheme in zip(found, schemes, strict=True):
        np.testing.assert_array_equal(y, jax.jit(on)(scheme))


def test_a_bias_that_counts_where_it_masks_is_refused():
    fn, _ = FORMS["mixture"]
    for bias in (REL - 150, np.where(KEPT, REL - 90, REL - 101)):
        bias = bias.astype(np.float32)
        qmodel = qjax.quantize_model(fn, P, Q, K, V, bias)
        with pytest.raises(qjax.CalibrationError, match="still counts there"):
            qjax.calibrate(qmodel, P, [(Q, K, V, bias)], progress=False)


def test_an_input_that_masks_and_is_read_elsewhere_is_refused():
    def fn(p, q, k, v, b):
        return _attend()(p, q, k, v, b) * (1 + jnp.mean(jnp.tanh(b)))

    bias = mixed(-1e9)
    qmodel = qjax.quantize_model(fn, P, Q, K, V, bias)
    with pytest.raises(qjax.CalibrationError, match="as two arguments"):
        qjax.calibrate(qmodel, P, [(Q, K, V, bias)], progress=False)


def test_words_that_leave_no_code_for_a_mask_are_refused():
    scheme = Scheme(rules=[qjax.Rule("input:3", QSpec(24))])
    with pytest.raises(ValueError, match="a code of its own"):
        _, inputs, qmodel, qstate = _quantized("mixture", scheme)
        qmodel.apply(P, qstate, *inputs)


def _scores(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)


def _layers(mask):
    """Returns attention in each step of a loop over masks."""

    def fn(p, q, k, v, masks):
        def step(x, b):
            weights = jax.nn.softmax(mask(_scores(x, k), b))
            return jnp.einsum("bhqk,bkhd->bqhd", weights, v), None

        return jax.lax.scan(step, q, masks)[0]

    return fn


WIDE = {  # Masks that widen ranges, and the same of truth values.
    "subtracted": (
        _of(lambda s, p, b: s - b),
        (Q, K, V, -mixed(-1e9)),
        _of(lambda s, p, b: jnp.where(b, s, -1e9)),
        (Q, K, V, KEPT),
    ),
    "in logits": (
        lambda p, x: jax.nn.softmax(x),
        (mixed(-1e9),),
        lambda p, x, b: jax.nn.softmax(jnp.where(b, x, -1e9)),
        (REL, KEPT),
    ),
    "rows of logits": (
        lambda p, x: jax.nn.softmax(x),
        (np.where(ROWS.T, REL[0, 0, :, :2], -1e9).astype(np.float32),),
        lambda p, x, b: jax.nn.softmax(jnp.where(b, x, -1e9)),
        (REL[0, 0, :, :2], ROWS.T),
    ),
    "joined": (
        _of(lambda s, p, b: s + jnp.concatenate([b, b], 1)),
        (Q, K, V, mixed(-1e9)[:, :1]),
        _of(lambda s, p, b: jnp.where(jnp.concatenate([b, b], 1), s, -1e9)),
        (Q, K, V, KEPT),
    ),
    "chosen by place": (
        _of(lambda s, p, b: s + b[:, np.array([1, 0])]),
        (Q, K, V, mixed(-1e9)),
        _of(lambda s, p, b: jnp.where(b, s, -1e9)),
        (Q, K, V, KEPT),
    ),
    "of a loop": (
        _layers(lambda s, b: s + b),
        (Q, K, V, np.stack([mixed(-1e9)] * 2)),
        _layers(lambda s, b: jnp.where(b, s, -1e9)),
        (Q, K, V, np.stack([KEPT] * 2)),
    ),
}


@pytest.mark.parametrize("form", WIDE)
def test_masks_that_widen_ranges_are_refused(form):
    fn, inputs, _, _ = WIDE[form]
    qmodel = qjax.quantize_model(fn, None, *inputs)
    with pytest.raises(qjax.CalibrationError, match="they widen ranges"):
        qjax.calibrate(qmodel, None, [inputs], progress=False)


@pytest.mark.parametrize("form", WIDE)
def test_masks_of_truth_values_in_their_place_are_not(form):
    _, _, fn, inputs = WIDE[form]
    qmodel = qjax.quantize_model(fn, None, *inputs)
    qstate = qjax.calibrate(qmodel, None, [inputs], progress=False)
    program = qjax.lower(qmodel, None, qstate, *inputs)
    shipped, wanted = np.asarray(program(*inputs)), np.asarray(fn(None, *inputs))
    assert np.sum(wanted**2) > 1000 * np.sum((shipped - wanted) ** 2)
    assert_equals_oracle(program, *inputs)


def test_scores_that_are_wide_may_be_bounded():
    logits = 400 * REL
    qmodel = qjax.quantize_model(lambda p, x: jax.nn.softmax(x), None, logits)
    with pytest.raises(qjax.CalibrationError, match="Bound scores"):
        qjax.calibrate(qmodel, None, [(logits,)], progress=False)
    bounded = lambda p, x: jax.nn.softmax(jnp.clip(x, -50, 50))
    scheme = Scheme(QSpec(16), QSpec(16))
    qmodel = qjax.quantize_model(bounded, None, logits, scheme=scheme)
    qstate = qjax.calibrate(qmodel, None, [(logits,)], progress=False)
    program = qjax.lower(qmodel, None, qstate, logits)
    shipped, wanted = np.asarray(program(logits)), np.asarray(bounded(None, logits))
    assert np.sum(wanted**2) > 300 * np.sum((shipped - wanted) ** 2)
    assert_equals_oracle(program, logits)


def test_inputs_behind_a_small_factor_mask_nothing():
    """There -100 is a number as any other."""
    fn = lambda p, x, b: jax.nn.softmax((x + b) / 100)
    inputs = 100 * REL[0, 0], 100 * REL[1, 1]
    qmodel = qjax.quantize_model(fn, None, *inputs)
    qstate = qjax.calibrate(qmodel, None, [inputs], progress=False)
    assert qstate["input:1"].low == inputs[1].min() < -150
    program = qjax.lower(qmodel, None, qstate, *inputs)
    shipped, wanted = np.asarray(program(*inputs)), np.asarray(fn(None, *inputs))
    assert np.sum(wanted**2) > 3000 * np.sum((shipped - wanted) ** 2)
    assert_equals_oracle(program, *inputs)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.int32, "holds int32 and is made a mask of real numbers"),
        (np.int8, "for some integers of its input"),  # 2 would add 1e9.
        (np.bool_, None),
    ],
)
def test_masks_of_integers_are_refused_and_of_truth_values_not(dtype, message):
    fn = _of(lambda s, p, b: s + (1 - b.astype(jnp.float32)) * -1e9)
    inputs = Q, K, V, KEPT.astype(dtype)
    qmodel = qjax.quantize_model(fn, None, *inputs)
    qstate = qjax.calibrate(qmodel, None, [inputs], progress=False)
    if message is None:
        assert_equals_oracle(qjax.lower(qmodel, None, qstate, *inputs), *inputs)
        return
    with pytest.raises(ValueError, match=message):
        qjax.lower(qmodel, None, qstate, *inputs)
