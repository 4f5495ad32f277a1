"""Random integer graphs: native kernels of all instruction sets, XLA and NumPy.

    python -m pytest tests/test_native_fuzz.py -m fuzz    # 2,000 graphs, in parts

A failure names the number of its graph: `check(number)` is that graph again. Kernels
run each graph with batches of 0, 1, 3 and 32, XLA, which compiles it, every
fourth one with one of 3.
"""

import collections
import itertools

import jax
import numpy as np
import pytest

from qjax.backends.native import library
from qjax.backends.native.calls import NativeGraph
from qjax.backends.native.library import find_library
from qjax.backends.native.plan import NATIVE, reason
from qjax.backends.xla import run as xla
from qjax.graph import reference
from qjax.graph.sizes import value_shapes
from qjax.graph.validation import validate
from tests import integer_rows
from tests.integer_programs import BATCH, STEPS, drawn

FOUND = find_library()
pytestmark = pytest.mark.skipif(FOUND.library is None, reason=FOUND.reason)
PARTS, SIZES = 100, (BATCH, 0, 1, 32)
assert set(STEPS) >= set(integer_rows.ROWS)


def codes_of(graph, size, rng):
    """Any codes, or only the least and the largest, or one of both."""
    found = []
    for value in (graph.values[v] for v in graph.inputs):
        shape, ends = (size, *value.shape[1:]), np.array([value.low, value.high])
        kinds = (
            rng.integers(*ends, shape, endpoint=True),
            rng.choice(ends, shape),
            np.full(shape, rng.choice(ends)),
        )
        found.append(kinds[rng.choice(3, p=[0.6, 0.2, 0.2])].astype(value.dtype))
    return found


def sets(own):
    """Takes each instruction set of this machine in turn."""
    before = own.isa
    try:
        for name in library.SETS:
            if own.call["set_isa"](name.encode()) == 0:
                yield name
    finally:
        own.call["set_isa"](before.encode())


def check(number, is_in_xla=True):
    """One graph, its plans and its body; returns the graph and what it ran."""
    graph, params, steps = drawn(number)
    validate(graph, params)
    own, rng, ran = FOUND.library, np.random.default_rng(number), collections.Counter()
    shapes = [value.shape for value in graph.values]
    for node in graph.nodes:
        assert reason(graph, node, params, shapes, own.refusal) == "", (number, node)
    runs = NativeGraph(graph, params, own)
    for size in SIZES:
        xs = codes_of(graph, size, rng)
        try:
            value_shapes(graph, params, [x.shape for x in xs])
        except ValueError:
            assert size != BATCH
            continue
        values = reference.run(graph, params, xs)
        wanted = [values[v] for v in graph.outputs]
        named = {}
        for name in sets(own):
            named[name] = runs.schedule([x.shape for x in xs]).prepare(2)(xs)
        if is_in_xla and size == BATCH:
            body = lambda params, xs: xla.run(graph, params, xs)
            made = jax.jit(body)(params, xs)
            named["xla"] = [made[v] for v in graph.outputs]
        for name, found in named.items():
            ran[name] += 1
            for x, y in zip(found, wanted, strict=True):
                message = f"graph {number}, {name}, batch {size}: {steps}\n{graph}"
                np.testing.assert_array_equal(np.asarray(x), y, err_msg=message)
    return graph, ran


def operations(graph):
    return {node.operation for _, own in graph.walk() for node in own.nodes}


@pytest.mark.slow
def test_some_graphs():
    for number in range(12):
        check(number, is_in_xla=number == 0)


def test_all_operations_are_drawn():
    seen = set(itertools.chain(*(operations(drawn(n)[0]) for n in range(900))))
    assert set(NATIVE) - seen == {"tflite_constant"}


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(PARTS))
def test_many_graphs(part):
    ran = collections.Counter()
    for number in range(1000 + 20 * part, 1020 + 20 * part):
        ran += check(number, is_in_xla=number % 4 == 0)[1]
    assert len(ran) > 1 and ran["xla"] == 5
