"""Real values made of whole numbers: counts, masks, one-hot rows, lengths, bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QSpec, Scheme
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.fixture(autouse=True)
def _ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


RNG = np.random.default_rng(0)
real = lambda *shape: RNG.normal(0, 1, shape).astype(np.float32)
P = {"w": real(8, 8), "v": real(8, 4), "b": real(8), "bits": real(64, 8)}
X, Y = real(6, 8), real(6, 5, 8)
IDS = RNG.integers(0, 8, 6).astype(np.int32)
SETS = RNG.integers(0, 8, (6, 4)).astype(np.int32)
BYTES = RNG.integers(0, 256, (6, 8)).astype(np.uint8)
KEPT = RNG.random((6, 5)) > 0.5
KEPT[:2] = [[False] * 5, [True] * 5]
POWERS = Scheme(*[QSpec(8, narrow_range=True, power_of_two=True)] * 2)

one_hot = lambda i: jax.nn.one_hot(i, 8)
count = lambda i: (i[..., None] == jnp.arange(8)).sum(1)
bits = lambda b: (b[..., None] >> jnp.arange(8, dtype=b.dtype) & 1).reshape(-1, 64)


def _masked_mean(p, x, m):
    total = ((x @ p["w"]) * m[..., None]).sum(1)
    return total / jnp.maximum(m.sum(1), 1)[:, None]


def _segment_mean(p, x, i):
    total = jax.ops.segment_sum(x @ p["w"], i, 9)
    return total / jnp.maximum(jax.ops.segment_sum(jnp.ones_like(i), i, 9), 1)[:, None]


FORMS = {
    "one-hot layers": (
        lambda p, i: jax.nn.relu(one_hot(i) @ p["w"] + p["b"]) @ p["v"],
        (IDS,),
    ),
    "bits": (lambda p, b: bits(b).astype(jnp.float32) @ p["bits"] + p["b"], (BYTES,)),
    "counts": (
        lambda p, i: (count(i).astype(jnp.float32) @ p["w"] + p["b"]) * p["b"],
        (SETS,),
    ),
    "joined": (
        lambda p, x, m: jnp.concatenate([x @ p["w"][:5], m.sum(-1, keepdims=True)], 1),
        (Y[:, 0, :5], KEPT),
    ),
    "greedy": (lambda p, x: one_hot(jnp.argmax(x @ p["w"], -1)) @ p["w"] + x, (X,)),
    "signs": (lambda p, x, i: jnp.where(i > 3, 1.0, -1.0)[:, None] * x, (X, IDS)),
    "halves": (lambda p, x, i: jnp.where(i > 3, 0.5, -1.5)[:, None] * x, (X, IDS)),
    "sum": (lambda p, x, i: x @ p["w"] + one_hot(i), (X, IDS)),
    "a line": (lambda p, x: jnp.tanh(x) * p["b"] + p["b"], (X,)),
    "pooled": (lambda p, i: one_hot(i).max(1) @ p["w"], (SETS,)),
    "scaled": (lambda p, i: (count(i) * 0.3) @ p["w"], (SETS,)),
    "joined rows": (
        lambda p, i: (
            jnp.concatenate([one_hot(i)[:, :6], (i > 3)[:, None] * jnp.ones(2)], 1)
            @ p["w"]
            + p["b"]
        ),
        (IDS.astype(np.uint8),),
    ),
    "chosen rows": (
        lambda p, x, i: jnp.where(x > 0, one_hot(i), (i > 3)[:, None] * 2.0) @ p["w"],
        (X, IDS),
    ),
    "padded": (
        lambda p, i: (
            jnp.pad(one_hot(i)[:, :6], ((0, 0), (2, 0)), constant_values=3.0) @ p["w"]
        ),
        (IDS,),
    ),
    "masked mean": (_masked_mean, (Y, KEPT)),
    "masked mean of bytes": (_masked_mean, (Y, KEPT.astype(np.uint8))),
    "bounded counts": (
        lambda p, x, n: (x @ p["w"]) / jnp.clip(n, 1, 7)[:, None],
        (X, IDS),
    ),
    "ratio": (
        lambda p, x, m: x + (m.sum(1) / jnp.maximum(m.sum(), 1))[:, None],
        (X, KEPT),
    ),
}
TWICE = ("counts",)  # Forms that scales of powers of two go through.


@pytest.mark.parametrize("form", FORMS)
def test_models_of_whole_numbers_compute_what_ships(form):
    fn, args = FORMS[form]
    for scheme in (Scheme(), POWERS) if form in TWICE else (Scheme(),):
        qmodel = qjax.quantize_model(fn, P, *args, scheme=scheme)
        qstate = qjax.calibrate(qmodel, P, [args])
        program = qjax.lower(qmodel, P, qstate, *args)
        others = [args, tuple(x[1:4] for x in args)]
        for inputs in others if form != "ratio" else [args]:
            assert_equals_oracle(program, *inputs)
            shipped = np.asarray(program(*inputs))
            for apply in (qmodel.apply, qmodel.apply_integer):
                found = jax.jit(apply)(P, qstate, *inputs)
                np.testing.assert_array_equal(found, shipped)
        wanted = np.asarray(fn(P, *args))
        assert np.mean((np.asarray(program(*args)) - wanted) ** 2) < 2e-3 * wanted.var()


def test_a_mean_over_segments_divides_by_their_counts():
    qmodel = qjax.quantize_model(_segment_mean, P, X, IDS)
    qstate = qjax.calibrate(qmodel, P, [(X, IDS)])
    program = qjax.lower(qmodel, P, qstate, X, IDS)
    assert [n.operation for n in program.graph.nodes].count("divide") == 1
    for ids in (IDS, IDS * 0, IDS[::-1] + 1):
        assert_equals_oracle(program, X, ids)
        shipped = np.asarray(program(X, ids))
        np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, X, ids), shipped)
        np.testing.assert_array_equal(
            jax.jit(qmodel.apply_integer)(P, qstate, X, ids), shipped
        )


def test_whole_numbers_have_no_site():
    fn = lambda p, x, m: x / jnp.maximum(m.sum(1).astype(jnp.float32), 1.0)[:, None]
    names = [s.name for s in qjax.quantize_model(fn, P, X, KEPT).sites]
    assert names == ["input:0", "output:0"]


def test_a_wide_mask_is_a_number_and_a_count():
    """Integers of 32 bits are clipped to those that have codes of their own."""
    fn = lambda p, x, m: _masked_mean(p, x, jnp.clip(m, 0, 1))
    wide = KEPT.astype(np.int32)
    qmodel = qjax.quantize_model(_masked_mean, P, Y, wide)
    qstate = qjax.calibrate(qmodel, P, [(Y, wide)])
    with pytest.raises(OverflowError, match=r"jnp.clip\(x, 0, 1\)"):
        qjax.lower(qmodel, P, qstate, Y, wide)
    wide[2, :3] = [2**31 - 1, -(2**31), 7]
    used_twice = lambda p, x, m: (x * m[..., None]).sum(1) + (m == 7).sum(1)[:, None]
    for own in (fn, used_twice):
        qmodel = qjax.quantize_model(own, P, Y, KEPT.astype(np.int32))
        qstate = qjax.calibrate(qmodel, P, [(Y, KEPT.astype(np.int32))])
        program = qjax.lower(qmodel, P, qstate, Y, wide)
        assert_equals_oracle(program, Y, wide)
        np.testing.assert_array_equal(
            jax.jit(qmodel.apply)(P, qstate, Y, wide), program(Y, wide)
        )


def test_a_count_without_bound_is_no_divisor():
    fn = lambda p, x, n: x / (n + 1)[:, None]
    qmodel = qjax.quantize_model(fn, P, X, IDS)
    qstate = qjax.calibrate(qmodel, P, [(X, IDS)])
    with pytest.raises(ValueError, match="bound"):
        qjax.lower(qmodel, P, qstate, X, IDS)


def test_a_bias_beside_whole_numbers_is_as_fine_as_int32_holds():
    fn = lambda p, i: one_hot(i) @ p["w"] + p["b"] * 1e-2
    scheme = Scheme(QSpec(8, narrow_range=True), QSpec(16))
    qmodel = qjax.quantize_model(fn, P, IDS, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [IDS])
    found = np.asarray(qjax.lower(qmodel, P, qstate, IDS)(IDS))
    step = np.abs(P["w"]).max() / 127
    rows = np.rint(P["w"] / step)[IDS] * step
    np.testing.assert_allclose(found, rows + P["b"] * 1e-2, atol=step / 256)
