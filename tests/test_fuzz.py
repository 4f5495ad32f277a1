"""Random programs: the integer program is the NumPy oracle, and the simulated model.

What `apply_integer` computes is the integer program, too.
"""

import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, seed, settings

import qjax
from qjax.lowering import AccumulatorOverflowError, graph, reference
from qjax.lowering.passes import validate
from tests.models import images, linen_example, nnx_example
from tests.programs import Linen, Nnx, Program, programs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


def check(program: Program, is_trained: bool = True) -> None:
    """One program, from the float model to the oracle and to the form that trains."""
    x = images(*program.shape, seed=3)
    if program.is_nnx:
        model = nnx.eval_shape(lambda: Nnx(program.steps, program.shape))
        fn, params, _ = nnx_example(model, x)
    else:
        fn, params, _ = linen_example(Linen(program.steps), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qmodel = qjax.quantize_model(fn, params, x, scheme=program.scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
    try:
        lowered = qjax.lower(qmodel, params, qstate, x)
    except AccumulatorOverflowError:
        return  # 16-bit codes through wide sums: said, and right.
    validate(lowered.graph, lowered.params)
    assert graph.Graph.from_json(lowered.graph.to_json()) == lowered.graph
    codes = [np.asarray(c) for c in lowered.quantize_inputs(x)]
    values = reference.run(lowered.graph, lowered.params, codes)
    for name, ours in lowered.site_codes(x).items():
        wanted = values[lowered.graph.sites[name]]
        np.testing.assert_array_equal(ours, wanted, err_msg=name)
    report = qjax.verify(lowered, qmodel, params, qstate, x)
    for name, row in report.sites.items():
        most = 0 if program.is_power_of_two else 1
        assert row.max_difference <= most, f"{name}\n{report}\n{lowered.graph}"
    if is_trained:
        ours = jax.jit(qmodel.apply_integer)(params, qstate, x)
        np.testing.assert_array_equal(ours, lowered(x))


def check_some(first: int, count: int, is_trained: bool = True) -> None:
    """Some programs, the same for the same number."""
    options = settings(
        max_examples=count,
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run = options(given(programs())(lambda program: check(program, is_trained)))
    seed(first)(run)()


@pytest.mark.parametrize("part", range(3))
def test_random_programs(part):
    check_some(part, 20, is_trained=part == 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(100))
def test_many_random_programs(part):
    check_some(1000 + part, 50)
