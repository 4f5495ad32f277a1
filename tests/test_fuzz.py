"""Random programs: the integer program is the NumPy oracle, and the simulated model.

What `apply_integer` computes is the integer program, too; what a report says is so.
"""

import functools
import pathlib
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

import qjax
from qjax.backends.xla import run as xla
from qjax.graph import graph, reference
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.validation import validate
from qjax.lowering import AccumulatorOverflowError
from tests.chains import Chain, chains
from tests.looped import Looped, example, loops, weights
from tests.models import images, linen_example, nnx_example
from tests.programs import Linen, Nnx, Program, programs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]
SECONDS = 24  # Of processor time, on new programs for each commit.


BACKENDS = ("xla", None)  # The best: native, where it is there.


def check_claims(
    lowered: qjax.IntegerProgram, *inputs: Any, backends: tuple[Any, ...] = BACKENDS
) -> list[np.ndarray]:
    """Backends are the oracle, and accumulators lie where the certificate says."""
    validate(lowered.graph, lowered.params)
    assert graph.Graph.from_json(lowered.graph.to_json()) == lowered.graph
    codes = [np.asarray(c) for c in jax.tree.leaves(lowered.quantize_inputs(*inputs))]
    own: dict[str, np.ndarray] = {}
    values = reference.run(lowered.graph, lowered.params, codes, own)
    check_shapes(lowered)
    for backend in backends:
        ours, outputs = lowered.run_sites(*inputs, backend=backend)
        assert set(ours) == set(own)
        for name, found in ours.items():
            np.testing.assert_array_equal(found, own[name], err_msg=name)
        for found, v in zip(outputs, lowered.graph.outputs, strict=True):
            np.testing.assert_array_equal(found, values[v])
    for bound in lowered.report().overflow:
        value = values[bound.value] if not bound.place else np.zeros(0)
        if value.size:
            assert bound.low.min() <= value.min(), bound
            assert value.max() <= bound.high.max(), bound
            assert -(2 ** (bound.bits - 1)) <= value.min(), bound
            assert value.max() < 2 ** (bound.bits - 1), bound
    return values


def check_shapes(lowered: qjax.IntegerProgram) -> None:
    """Every record gives the shape that XLA gives."""
    pairs = ((g, node) for _, g in lowered.graph.walk() for node in g.nodes)
    for inner, node in ((g, node) for g, node in pairs if not node.graphs):
        inputs = [inner.values[v] for v in node.inputs]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
        body = functools.partial(xla.BODIES[node.operation], node)
        found = jax.eval_shape(body, dict(lowered.params), shapes)
        arrays = {k: np.asarray(lowered.params[n]) for k, n in node.params.items()}
        operands = Operands(node.attributes, inputs, arrays)
        assert OPERATIONS[node.operation].shape(operands) == found.shape, node


def check_agreement(
    lowered: qjax.IntegerProgram, report: qjax.Verification, context: Any
) -> bool:
    """Sites agree as the report says; returns whether all of them are proven."""
    claims = lowered.report().agreement
    assert set(claims) == set(report.sites)
    for name, row in report.sites.items():
        claim = claims[name]
        if claim.is_proven:
            assert row.equal == row.codes, f"{name}: {claim}\n{report}\n{context}"
        if claim.most is not None:
            assert row.max_difference <= claim.most, f"{name}: {claim}\n{context}"
    return all(claim.is_proven for claim in claims.values())


def check(program: Program, is_trained: bool = True) -> None:
    """One program, from the float model to the oracle and to the form that trains."""
    x = images(*program.shape, seed=3)
    if program.is_nnx:
        fn, params, _ = nnx_example(lambda: Nnx(program.steps, program.shape), x)
    else:
        fn, params, _ = linen_example(Linen(program.steps), x)
    check_model(fn, params, x, program, is_trained)


def check_model(
    fn: Any, params: Any, x: Any, program: Program | Looped, is_trained: bool = True
) -> qjax.IntegerProgram | None:
    """One model on some data; returns its program, if it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qmodel = qjax.quantize_model(fn, params, x, scheme=program.scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
    try:
        lowered = qjax.lower(qmodel, params, qstate, x)
    except AccumulatorOverflowError:
        return None  # 16-bit codes through wide sums: said, and right.
    check_claims(lowered, x)
    report = qjax.verify(lowered, qmodel, params, qstate, x)
    check_agreement(lowered, report, program)
    claims = lowered.report().agreement
    for name, row in report.sites.items():
        if "float32 may lose" in claims[name].reason:
            # Its range is what float32 rounds off: `x - x`. It keeps to its bound.
            assert claims[name].most is not None
            continue
        most = 0 if program.is_power_of_two else 1
        assert row.max_difference <= most, f"{name}\n{report}\n{lowered.graph}"
    if is_trained:
        ours = jax.jit(qmodel.apply_integer)(params, qstate, x)
        jax.tree.map(np.testing.assert_array_equal, ours, lowered(x))
    return lowered


def check_loop(looped: Looped) -> None:
    """One loop, and other numbers of examples."""
    # Compilation is what takes time: every other program trains, each other size has
    # one backend.
    is_trained = (len(looped.steps) + len(looped.others)) % 2 == 0
    lowered = check_model(*example(looped), looped, is_trained)
    if lowered is None:
        return
    for size, backend in ((5, "xla"), (1, None)):
        x = looped.inputs(size, seed=1)
        try:
            found = lowered(x)
        except ValueError as error:
            assert "leading size is fixed by" in str(error), error
            continue
        shapes = jax.eval_shape(looped, weights(), x)
        jax.tree.map(lambda a, b: chex.assert_shape(a, b.shape), found, shapes)
        check_claims(lowered, x, backends=(backend,))


def check_chain(chain: Chain) -> None:
    """One function: it lowers and is right at any size, or is refused in words."""
    x = chain.inputs(chain.shape[0])
    try:
        jax.eval_shape(chain, x)
    except (ValueError, TypeError, IndexError):
        return  # No function of this shape.
    try:
        lowered = qjax.lower(chain, x)
    except (NotImplementedError, OverflowError, ValueError) as error:
        assert len(str(error)) > 40, error
        return
    check_claims(lowered, x)
    report = qjax.verify(lowered, chain, x)
    if check_agreement(lowered, report, chain):
        sites = set(lowered.graph.sites.values())
        for v, row in zip(lowered.graph.outputs, report.outputs, strict=True):
            if v in sites or lowered.graph.values[v].dtype_of_model:
                assert row.equal == row.codes, f"{report}\n{chain}"
    for size in (chain.shape[0] + 3, max(chain.shape[0] - 1, 1)):
        check_size(lowered, chain, size)


def check_size(lowered: qjax.IntegerProgram, chain: Chain, size: int) -> None:
    """Another leading size: what the model lowers to for that size, or a refusal."""
    x = chain.inputs(size, seed=1)
    try:
        found = lowered(x)
    except ValueError as error:
        assert "leading size is fixed by" in str(error), error
        return
    wanted = qjax.lower(chain, x)(x)
    np.testing.assert_array_equal(found, wanted, err_msg=str(chain))


def program_of(drawn: Looped | Chain) -> qjax.IntegerProgram | None:
    """The integer program of a loop or a function; None if it is refused in words."""
    try:
        if isinstance(drawn, Looped):
            fn, params, x = example(drawn)
            qmodel = qjax.quantize_model(fn, params, x, scheme=drawn.scheme)
            qstate = qjax.calibrate(qmodel, params, [x], progress=False)
            return qjax.lower(qmodel, params, qstate, x)
        x = drawn.inputs(drawn.shape[0])
        jax.eval_shape(drawn, x)
        return qjax.lower(drawn, x)
    except (NotImplementedError, OverflowError, ValueError, TypeError, IndexError):
        return None


def check_some(strategy: Any, check_one: Callable[[Any], None], first: int, n: int):
    """Some programs, the same for the same number."""
    options = settings(
        max_examples=n,
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    seed(first)(options(given(strategy())(lambda program: check_one(program))))()


def commit() -> str:
    """Returns the number of the commit; zeros where there is none."""
    root = pathlib.Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "0" * 40
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(k, marks=pytest.mark.heavy) for k in (1, 2))]
)
def test_random_programs_of_this_commit(part):
    """For a time: the seed is that of the commit, and is named by a failure."""
    kinds = (
        (programs, lambda p: check(p, len(p.steps) % 3 == 0)),
        (chains, check_chain),
        (loops, check_loop),
    )
    start, first = time.process_time(), int(commit()[:7], 16) * 1000
    number = 0
    while time.process_time() - start < SECONDS / 2:
        check_some(*kinds[part], first + number, 4)
        number += 1
    assert number


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(100))
def test_many_random_programs(part, request):
    """Pieces of 25, of which those that this commit has passed are left out."""
    key, now = f"fuzz/{part}", commit()
    if request.config.cache.get(key, None) == now:
        pytest.skip("passed already")
    check_some(programs, check, 1000 + part, 10)
    check_some(chains, check_chain, 1000 + part, 10)
    nested = functools.partial(loops, is_nested=True)
    check_some(nested, check_loop, 1000 + part, 5)
    request.config.cache.set(key, now)
