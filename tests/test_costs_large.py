"""Prices of counts beyond int32: exact where bits are known, float32 where traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import costs, search
from qjax.affine import QSpec
from qjax.schemes.scheme import Scheme

STEPS, WIDE = 2**20, 64
MACS = STEPS * WIDE * WIDE + 4 * WIDE
MACHINE = costs.Machine(1e12, 1e10)


def model(p, x):
    """A loop of 2^32 products, and a layer of 256."""
    step = lambda h, _: (jnp.tanh(h @ p["loop"]), None)
    return lax.scan(step, x, None, length=STEPS)[0] @ p["head"]


@pytest.fixture(scope="module")
def qmodel():
    params = {"loop": jnp.ones((WIDE, WIDE)), "head": jnp.ones((WIDE, 4))}
    return qjax.quantize_model(model, params, jnp.ones((1, WIDE)))


def prices(layers):
    found = {name: costs.total(layers, price) for name, price in costs.PRICES.items()}
    times = costs.roofline(layers, MACHINE).values()
    found |= {"energy": costs.total_energy(layers), "peak": costs.peak_bytes(layers)}
    found["operations"] = costs.total(layers, lambda x: 2 * costs.macs(x))
    return found | {"seconds": sum(time.seconds for time in times)}


def test_known_bits_have_exact_prices(qmodel):
    found = prices(qmodel.layers())
    assert found["macs"] == MACS and isinstance(found["macs"], int)
    assert found["bit_operations"] == 64 * MACS
    assert found["effective_bit_operations"] == 8 * 7 * MACS
    times = costs.roofline(qmodel.layers(), MACHINE).values()
    assert sum(time.operations for time in times) == 2 * MACS


# One layer may have traced bits, or all.
@pytest.mark.parametrize("sites", [("loop", "head"), ("loop",), ("head",)])
def test_traced_bits_have_those_prices_in_float32(qmodel, sites):
    of = lambda b: prices(qmodel.layers(bits=dict.fromkeys(sites, b)))
    traced = jax.jit(of)(jnp.int32(8))
    mapped = jax.vmap(of)(jnp.float32([8, 4]))
    for name, wanted in of(8).items():
        assert traced[name].dtype == jnp.float32, name
        np.testing.assert_allclose(traced[name], wanted, rtol=1e-6)
        np.testing.assert_allclose(mapped[name][0], wanted, rtol=1e-6)
    slope = jax.grad(lambda b: of(b)["bit_operations"])(8.0)
    counts = {"loop": STEPS * WIDE * WIDE, "head": 4 * WIDE}
    np.testing.assert_allclose(slope, 8.0 * sum(map(counts.get, sites)), rtol=1e-6)
    times = lambda b: costs.roofline(qmodel.layers(bits={"head": b}), MACHINE)
    found = sum(time.operations for time in jax.jit(times)(8.0).values())
    np.testing.assert_allclose(found, 2 * MACS, rtol=1e-6)


def test_tables_of_traced_bits_have_totals(qmodel):
    table = jax.jit(lambda b: costs.price_table(qmodel.layers(bits={"head": b})))(8.0)
    np.testing.assert_allclose(table.totals["bit_operations"], 64 * MACS, rtol=1e-6)
    tree = qmodel.layers()
    mixed = lambda b: costs.total(
        costs.Layers((*tree, *qmodel.layers(bits={"head": b}))), costs.bit_operations
    )
    np.testing.assert_allclose(jax.jit(mixed)(8.0), 128 * MACS, rtol=1e-6)


@pytest.mark.parametrize("execution", ["loop", "vmap", "shard"])
def test_a_sweep_prices_them(qmodel, execution):
    base = Scheme(QSpec(8, narrow_range=True, axis="output"), QSpec(8))
    schemes = search.grid(base, {"loop": [8, 4], "head": [8]})
    fn = lambda s: prices(qmodel.layers(s))
    found = search.sweep(fn, schemes, execution=execution)
    exact = search.sweep(fn, schemes, compiled=False)
    assert exact["macs"].tolist() == [MACS] * 2 and exact["macs"].dtype == np.int64
    for name, wanted in exact.values.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6)
