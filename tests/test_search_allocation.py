"""`allocate` against all allocations of a small model, for prices of all kinds."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import costs
from qjax.affine import QSpec
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.search import Sensitivities, allocate, grid, sensitivity
from tests.sweep_in_processes import model

BITS = [8, 4, 2]


def scored(qmodel, axes, seed=0):
    """Sensitivities of random scores: fewer bits cost more, mostly."""
    rng = np.random.default_rng(seed)
    found = sensitivity(lambda s: jnp.float32(1), qmodel, axes, progress=False)
    scores = rng.uniform(0, 1, len(found)) * (10 - found.bits)
    return dataclasses.replace(found, scores=scores)


def branches():
    """Two products of one input, their sum, and a product of two activations."""
    rng = np.random.default_rng(1)
    kernel = lambda *shape: {"kernel": rng.normal(size=shape).astype(np.float32)}
    params = {"a": kernel(4, 6), "b": kernel(4, 6), "c": kernel(6, 3)}
    x = rng.normal(size=(5, 4)).astype(np.float32)

    def fn(params, x):
        a = jax.nn.relu(x @ params["a"]["kernel"])
        h = a + jnp.tanh(x @ params["b"]["kernel"])
        return (a @ h.T) @ (h @ params["c"]["kernel"])

    return qjax.quantize_model(fn, params, x)


def price_of(qmodel, bits, cost):
    scheme = grid(qmodel, {axis: [b] for axis, b in bits.items()})[0]
    return float(costs.total(qmodel.layers(scheme), cost))


@functools.cache
def small():
    """A model with its scores, and the layers of all its allocations."""
    qmodel, _, _ = model()
    found = scored(qmodel, BITS)
    return qmodel, found, [*tables(qmodel, found)]


def tables(qmodel, found, groups=()):
    """Yields all allocations: their bits, score and layers."""
    for own in itertools.product(*(found[axis] for axis in found.axes)):
        bits = dict(zip(found.axes, own, strict=True))
        if all(len({bits[axis] for axis in group}) == 1 for group in groups):
            score = math.fsum(found[axis][b] for axis, b in bits.items())
            scheme = grid(qmodel, {axis: [b] for axis, b in bits.items()})[0]
            yield bits, score, qmodel.layers(scheme)


def brute(tables, cost):
    """All allocations: their bits, score and cost."""
    return [(b, score, float(costs.total(x, cost))) for b, score, x in tables]


def joined(layer):
    """A price of one's own: no sum, and no product."""
    return max([0, *layer.input_bits]) * layer.output_bits**0.5


PRICES = (
    costs.weight_bytes,
    costs.bit_operations,
    costs.effective_bit_operations,
    costs.energy,
    costs.activation_bytes,
    costs.accumulator_bits,
    joined,
)


@pytest.mark.parametrize("cost", PRICES)
def test_the_best_of_all_allocations_is_found(cost):
    qmodel, found, all_tables = small()
    rows = brute(all_tables, cost)
    prices = sorted({price for *_, price in rows})
    for budget in (prices[0], *np.quantile(prices, [0.2, 0.5, 0.8]), prices[-1]):
        wanted = min(score for _, score, price in rows if price <= budget)
        chosen = allocate(found, budget, cost)
        assert chosen.score == pytest.approx(wanted, rel=1e-9)
        assert chosen.cost == price_of(qmodel, chosen.bits, cost) <= budget
        assert chosen.loss == pytest.approx(found.start + chosen.score)
        own = [rule.bits for rule in chosen.scheme.rules]
        assert own == [*chosen.bits.values()]


@pytest.mark.parametrize("cost", [costs.weight_bytes, costs.bit_operations])
@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_of_equal_scores_the_cheapest_is_found(cost, unit):
    """Few different scores, beside a huge one that hides them from a solver."""
    qmodel, found, all_tables = small()
    rng = np.random.default_rng(4)
    for _ in range(3):
        scores = unit * rng.integers(0, 3, len(found))
        scores[found.bits == 2] *= 1e6
        own = dataclasses.replace(found, scores=scores)
        rows = []
        for bits, _, layers in all_tables:
            score = math.fsum(own[axis][b] for axis, b in bits.items())
            rows.append((score, float(costs.total(layers, cost))))
        for budget in (*np.quantile([price for _, price in rows], [0.1, 0.5]), 1e9):
            wanted = min(row for row in rows if row[1] <= budget)
            chosen = allocate(own, budget, cost)
            assert (chosen.score, chosen.cost) == wanted
    flat = dataclasses.replace(found, scores=np.zeros(len(found)))
    least = min(float(costs.total(layers, cost)) for *_, layers in all_tables)
    assert allocate(flat, 1e9, cost).cost == least


def test_of_equal_scores_in_groups_the_cheapest_is_found():
    qmodel = branches()
    kernels = [s.name for s in qmodel.sites if s.role == "weight"]
    axes = dict.fromkeys([*kernels, "*"], [2, 8, 4])
    found = scored(qmodel, axes)
    scores = np.where(found.bits == 2, 3.0, 0.0)
    scores[found.places == 2] = [1, 0, 1]
    found = dataclasses.replace(found, scores=scores)
    chosen = allocate(found, 1e9, costs.bit_operations, groups=[kernels[:2]])
    assert [*chosen.bits.values()] == [4, 4, 8, 4]


@pytest.mark.parametrize("cost", [costs.bit_operations, costs.energy, joined])
def test_groups_and_products_of_activations(cost):
    qmodel = branches()
    kernels = [s.name for s in qmodel.sites if s.role == "weight"]
    others = [s.name for s in qmodel.sites if s.role != "weight"]
    axes = {kernels[0]: [8, 4, 3], kernels[1]: [2, 4, 8], kernels[2]: [8, 4, 2]}
    axes |= {others[0]: [8, 4], tuple(others[1:3]): [8, 6, 4], others[3]: [4, 8]}
    found = scored(qmodel, axes, seed=2)
    groups = [(kernels[0], kernels[1]), (others[0], others[3])]
    rows = brute(tables(qmodel, found, groups), cost)
    assert len(rows) == 2 * 3 * 2 * 3
    prices = sorted(price for *_, price in rows)
    for budget in (prices[0], prices[len(prices) // 2], prices[-2]):
        wanted = min(score for _, score, price in rows if price <= budget)
        chosen = allocate(found, budget, cost, groups=groups)
        assert chosen.score == pytest.approx(wanted, rel=1e-9)
        assert chosen.cost <= budget
        assert chosen.bits[kernels[0]] == chosen.bits[kernels[1]] in (8, 4)
        assert chosen.bits[others[0]] == chosen.bits[others[3]]


def test_a_budget_that_no_scheme_meets_names_the_least_cost():
    qmodel, _, _ = model()
    found = scored(qmodel, BITS)
    least = price_of(qmodel, dict.fromkeys(found.axes, 2), costs.bit_operations)
    assert allocate(found, least, costs.bit_operations).cost == least == 42 * 4
    with pytest.raises(ValueError, match="the least cost of these bits is 168"):
        allocate(found, least - 1e-6, costs.bit_operations)
    groups = [("a/kernel", "b/kernel"), ("b/kernel", "input:0")]
    some = dataclasses.replace(found, scores=np.where(found.bits == 2, np.nan, 0))
    with pytest.raises(ValueError, match=f"the least cost of these bits is {42 * 16}"):
        allocate(some, 600, costs.bit_operations, groups=groups)


def test_what_costs_nothing_has_the_best_scores():
    qmodel, _, _ = model()
    found = scored(qmodel, BITS)
    for budget in (math.inf, 0, np.float32(3)):
        chosen = allocate(found, budget, lambda layer: 0)
        best = math.fsum(min(found[axis].values()) for axis in found.axes)
        assert (chosen.score, chosen.cost) == (pytest.approx(best), 0)


def test_one_axis_and_bits_of_negative_score():
    qmodel, _, _ = model()
    found = scored(qmodel, {"*": [8, 4, 2]})
    found = dataclasses.replace(found, scores=np.array([0.0, -1e-9, -3e-9]))
    assert allocate(found, 1e9, costs.weight_bytes).bits == {"*": 2}
    found = dataclasses.replace(found, scores=np.array([0.0, 1e12, np.inf]))
    assert allocate(found, 1e9, costs.weight_bytes).bits == {"*": 8}


def test_scores_that_are_no_losses_predict_none():
    qmodel, _, _ = model()
    found = dataclasses.replace(scored(qmodel, BITS), method="gradient")
    chosen = allocate(found, 1e9, costs.weight_bytes)
    assert math.isnan(chosen.loss) and "loss" not in str(chosen)
    assert "a/kernel" in str(chosen) and "<table>" in chosen._repr_html_()


def test_what_is_wrong_is_named():
    qmodel, _, _ = model()
    found = scored(qmodel, BITS)
    with pytest.raises(TypeError, match="such as `peak_bytes`, is no such sum"):
        allocate(found, 1, costs.peak_bytes)
    with pytest.raises(TypeError, match="returned 'x'"):
        allocate(found, 1, lambda layer: "x")
    with pytest.raises(ValueError, match="`cost` gives nan for the layer 'input:0'"):
        allocate(found, 1, lambda layer: math.nan)
    with pytest.raises(TypeError, match="must be a price of a layer"):
        allocate(found, 1, "weight_bytes")
    with pytest.raises(TypeError, match="`budget` must be a number, got 'x'"):
        allocate(found, "x", costs.macs)
    with pytest.raises(ValueError, match="got NaN"):
        allocate(found, math.nan, costs.macs)
    with pytest.raises(KeyError, match="no axis 'c'"):
        allocate(found, 1, costs.macs, groups=[("a/kernel", "c")])
    with pytest.raises(TypeError, match="what `sensitivity` returns, got dict"):
        allocate({}, 1, costs.macs)
    calls = itertools.count()
    with pytest.raises(ValueError, match="no function of one layer's bits alone"):
        allocate(found, 1e9, lambda layer: next(calls))
    alone = sensitivity(lambda s: 1.0, Scheme(), {"*/kernel": [8, 4]})
    assert isinstance(alone, Sensitivities)
    with pytest.raises(TypeError, match="Pass `qmodel=`"):
        allocate(alone, 1, costs.macs)
    assert allocate(alone, 1e9, costs.macs, qmodel=qmodel).bits == {"*/kernel": 8}
    none = dataclasses.replace(found, scores=np.full(len(found), np.nan))
    with pytest.raises(ValueError, match="no bits to choose for input:0"):
        allocate(none, 1, costs.macs)


def test_a_layer_of_too_many_axes_is_refused():
    qmodel = branches()
    found = scored(qmodel, [8, 7, 6, 5, 4, 3])
    wide = dataclasses.replace(
        qmodel.works[-1],
        inputs=tuple(operand for work in qmodel.works for operand in work.inputs),
    )
    wider = dataclasses.replace(qmodel, works=(*qmodel.works[:-1], wide))
    with pytest.raises(NotImplementedError, match="Make groups of them"):
        allocate(found, 1, costs.weight_bytes, qmodel=wider)


def test_bits_of_a_bias_are_priced():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}
    params = jax.tree.map(jnp.float32, params)
    fn = lambda params, x: x @ params["a"]["kernel"] + params["a"]["bias"][None]
    scheme = Scheme(rules=(Rule("a/bias", QSpec(8)),))
    qmodel = qjax.quantize_model(fn, params, np.ones((2, 4), np.float32), scheme=scheme)
    found = scored(qmodel, {"a/bias": [16, 8, 4], "a/kernel": [8, 4]})
    rows = brute(tables(qmodel, found), costs.weight_bytes)
    assert len({price for *_, price in rows}) == 6
    wanted = min(score for _, score, price in rows if price <= 10)
    chosen = allocate(found, 10, costs.weight_bytes)
    assert chosen.score == pytest.approx(wanted)
    assert (
        chosen.cost == 12 * chosen.bits["a/kernel"] / 8 + 3 * chosen.bits["a/bias"] / 8
    )
