"""One battery for every word that trains: derivatives, transformations, resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QSpec, Rule, Scheme
from tests import training_cases
from tests.training_cases import CASES, PARAMS, X, Y

pytestmark = [
    pytest.mark.slow,  # Four compilations for each word.
    pytest.mark.usefixtures("flax_promotion"),  # Of Adam, too.
]


@functools.cache
def quantized(name):
    return training_cases.quantized(CASES[name])


def _close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(
            p, q, rtol=tolerance, atol=tolerance * max(1e-6, np.abs(q).max(initial=0))
        ),
        a,
        b,
    )


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_plain_jax(name):
    qmodel, qstate = quantized(name)
    # Some values saturate.
    learned = jax.tree.map(lambda v: v * 0.77, qstate.get("learned", {}))
    qstate = {**qstate, "learned": learned} if learned else qstate
    grids = qjax.scales(qmodel, PARAMS, qstate)
    plain = training_cases.reference(CASES[name], grids)

    def own(params, learned, x):
        return qmodel.apply(params, {**qstate, "learned": learned}, x)

    def both(f, params, learned):
        loss = lambda p, k: (out := f(p, k, X), jnp.sum(out * Y))[::-1]
        slopes, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, learned)
        return out, slopes

    found = jax.jit(functools.partial(both, own))(PARAMS, learned)
    wanted = jax.jit(functools.partial(both, plain))(PARAMS, learned)
    _close(found, wanted)
    for slope in jax.tree.leaves(found[1]):
        assert np.abs(slope).max() > 0


IN_ALL_RUNS = ("lsq plus", "bits")
TRAINED = [
    pytest.param(name, marks=() if name in IN_ALL_RUNS else pytest.mark.more)
    for name in CASES
]


@pytest.mark.kept
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_scans_maps_and_resumes(name):
    qmodel, qstate = quantized(name)
    start, step = training_cases.trainer(qmodel)
    batches = X.reshape(4, 4, 6), Y.reshape(4, 4, 4)
    first = start(PARAMS, qstate)
    one, run = jax.jit(step), first
    for k in range(4):
        run, _ = one(run, (batches[0][k], batches[1][k]))
        if k == 1:  # Saved as arrays of NumPy, and read.
            leaves, tree = jax.tree.flatten(run)
            run = jax.tree.unflatten(tree, [np.asarray(leaf) for leaf in leaves])
    scanned, losses = jax.jit(lambda run, b: jax.lax.scan(step, run, b))(first, batches)
    assert scanned.count == 4 and np.all(np.isfinite(losses))
    _close(scanned, run, 2e-5)
    moved = jax.tree.map(lambda a, b: np.any(a != b), first.params, run.params)
    assert all(jax.tree.leaves(moved))
    # Two trainings, with their own optimizers, at once.
    other = start(jax.tree.map(lambda p: p * 1.25, PARAMS), qstate)
    stack = lambda *runs: jax.tree.map(lambda *v: jnp.stack(v), *runs)
    batch = batches[0][0], batches[1][0]
    mapped, _ = jax.jit(jax.vmap(step, (0, None)))(stack(first, other), batch)
    _close(mapped, stack(one(first, batch)[0], one(other, batch)[0]), 2e-5)


@pytest.mark.parametrize(
    "words",
    [
        lambda b: (QSpec(b, narrow_range=True), QSpec(8)),
        lambda b: (qjax.quantizers.LSQ(b), qjax.quantizers.LSQ(4)),
    ],
    ids=["min-max", "lsq"],
)
def test_ranges_move_under_stacked_schemes(words):
    make = lambda b: Scheme(*words(b), (Rule("input:0", QSpec(8)),))
    schemes = [make(b) for b in (2, 5)]
    qmodel = qjax.quantize_model(training_cases.model, PARAMS, X, scheme=schemes[0])
    qstate = qjax.calibrate(qmodel, PARAMS, [X])
    if "learned" in qstate:  # Weights saturate in the short word.
        qstate["learned"] = jax.tree.map(lambda v: v * 0.4, qstate["learned"])
    start, step = training_cases.trainer(qmodel)
    run = start(PARAMS, qstate)
    on = lambda scheme: step(run, (X * 1.5, Y), scheme=scheme)
    found = jax.jit(jax.vmap(on))(qjax.stack_schemes(schemes))
    each = [jax.jit(on)(scheme) for scheme in schemes]
    _close(found, jax.tree.map(lambda *v: jnp.stack(v), *each), 2e-5)
    high = found[0].qstate["input:0"].high
    np.testing.assert_array_equal(high, np.full(2, X.max() * np.float32(1.5)))
    assert found[1][0] != found[1][1]
