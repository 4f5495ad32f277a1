"""Grids of many sites at once have the numbers of each site alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from experiments.benchmarks.lowering import Residual
from qjax.affine import QSpec
from qjax.calls import shared
from qjax.model.stacked_grids import stacked_grids
from tests.models import linen_example

CALIBRATORS = (
    qjax.ema_min_max(0.9),
    qjax.ema_min_max(0.999, initial=(-6, 6)),
    qjax.moving_max(),
    qjax.min_max(),
    qjax.last_value(),
    qjax.constant(-1, 3),
)
WORDS = QSpec(8), QSpec(4, symmetric=True), QSpec(16, power_of_two=True)


def _model(scheme):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    model = Residual(4, 4)
    _, params, _ = linen_example(model, x)
    return qjax.quantize_model(model.apply, params, x, scheme=scheme), params, x


def _states(qmodel, params, x):
    """Returns states of ranges of many sizes, after many numbers of batches."""
    rng = np.random.default_rng(1)
    found = {}
    for (name, state), (_, spec, calibrator) in zip(
        qmodel.init(params, x).items(), qmodel.calibrated(), strict=True
    ):
        values = rng.normal(size=3) * 10.0 ** rng.uniform(-4, 4)
        state = calibrator.update(jnp.float32(values), state, spec)
        found[name] = state._replace(step=jnp.int32(rng.integers(1, 3000)))
    return found


@pytest.mark.parametrize("word", WORDS, ids=str)
@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda c: c.name)
def test_a_stack_has_the_grids_of_each_site(calibrator, word):
    scheme = qjax.Scheme(activations=word, calibrator=calibrator)
    qmodel, params, x = _model(scheme)
    qstate = _states(qmodel, params, x)
    for bits in (word.bits, jnp.int32(word.bits)):
        own = dataclasses.replace(word, bits=bits)
        table = qmodel._resolved(dataclasses.replace(scheme, activations=own))
        found = stacked_grids(table, qstate)
        assert set(found) == set(qstate)
        for name, grid in found.items():
            alone = shared(calibrator.params, qstate[name], own)
            np.testing.assert_array_equal(grid.scale, alone.scale)
            np.testing.assert_array_equal(grid.zero_point, alone.zero_point)


def test_ranges_that_are_no_function_of_each_number_stay_alone():
    qmodel, params, x = _model(qjax.Scheme(calibrator=qjax.percentile()))
    assert not stacked_grids(qmodel.choices, qmodel.init(params, x))


def test_a_step_computes_its_grids_at_once():
    qmodel, params, x = _model(qjax.Scheme())
    qstate = qjax.calibrate(qmodel, params, [x])
    text = jax.jit(qmodel.apply).lower(params, qstate, x).as_text()
    assert text.count("call @qjax.shared._stacked") == 1
    assert "qjax.shared.params" not in text
