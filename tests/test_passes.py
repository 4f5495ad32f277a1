"""The validator refuses what a graph does not hold; dead values go."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.graph.passes import drop_dead
from qjax.graph.validation import validate


def _point(x, site=""):
    grid = QParams(jnp.float32(1 / 16), jnp.int32(0))
    return fake_quant(x, grid, QSpec(8), site=site)


@pytest.fixture(scope="module")
def program():
    fn = lambda x: _point(_point(x, "x") @ _point(jnp.eye(3), "w"), "y")
    return qjax.lower(fn, np.ones((2, 3), np.float32))


def _with_value(graph, v, **changes):
    values = list(graph.values)
    values[v] = dataclasses.replace(values[v], **changes)
    return dataclasses.replace(graph, values=tuple(values))


def test_a_lowered_graph_is_valid(program):
    validate(program.graph, program.params)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: _with_value(g, 1, low=-(2**40)), "does not hold its interval"),
        (lambda g: _with_value(g, 1, low=9, high=3), "does not hold its interval"),
        (lambda g: _with_value(g, 2, shape=(2, 4)), r"is int8\[2, 4\] in the graph"),
        (lambda g: _with_value(g, 2, dtype="float32"), "value of type float32"),
        (lambda g: dataclasses.replace(g, nodes=g.nodes[::-1]), "out of order"),
        (lambda g: dataclasses.replace(g, outputs=(9,)), "does not compute"),
        (
            lambda g: dataclasses.replace(
                g, nodes=(dataclasses.replace(g.nodes[0], operation="sin"), g.nodes[1])
            ),
            "no integer operation 'sin'",
        ),
    ],
)
def test_what_is_wrong_is_said(program, change, message):
    with pytest.raises(ValueError, match=message):
        validate(change(program.graph), program.params)


def test_a_parameter_that_is_not_there(program):
    params = {k: v for k, v in program.params.items() if k != "w"}
    with pytest.raises(ValueError, match="The parameter 'w' of .* is not there"):
        validate(program.graph, params)


def test_dead_values_go_and_nothing_else(program):
    graph = program.graph
    sites = {k: v for k, v in graph.sites.items() if k == "x"}
    cut = dataclasses.replace(graph, outputs=graph.inputs, sites=sites)
    pruned, params = drop_dead(cut, program.params)
    assert pruned.nodes == () and params == {} and len(pruned.values) == 1
    again, params = drop_dead(graph, program.params)
    assert again == graph and set(params) == set(program.params)


def test_what_two_readers_requantize_alike_is_requantized_once():
    """``maximum(x, y)`` and ``minimum(x, y)`` end on one grid, to which x and y go."""

    def fn(x):
        a = _point(x, "a")
        b = _point(a @ _point(jnp.eye(3), "w"), "b")
        grid = QParams(jnp.float32(0.3), jnp.int32(0))
        ends = (jnp.maximum(a, b), jnp.minimum(a, b))
        return [fake_quant(y, grid, QSpec(8), site=f"y{k}") for k, y in enumerate(ends)]

    x = np.linspace(-5, 5, 6, dtype=np.float32).reshape(2, 3)
    program = qjax.lower(fn, x)
    operations = [node.operation for node in program.graph.nodes]
    assert operations.count("requantize") == 3  # b itself, a and b on the other grid.
    assert qjax.verify(program, fn, x).is_exact


def test_a_clip_that_a_table_replaces_goes():
    """``relu(x) * tanh(relu(x))`` is one table of x: the clip is not computed."""
    fn = lambda x: _point((lambda y: y * jnp.tanh(y))(jnp.maximum(_point(x), 0.0)))
    program = qjax.lower(fn, np.ones((2, 3), np.float32))
    assert [node.operation for node in program.graph.nodes] == ["table"]
    x = np.linspace(-5, 5, 6, dtype=np.float32).reshape(2, 3)
    assert qjax.verify(program, fn, x).is_exact
