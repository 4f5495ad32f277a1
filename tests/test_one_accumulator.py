"""Functions of an accumulator and of its sums with biases are one set of thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QSpec
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (6, 8)).astype(np.float32)
KERNEL = RNG.normal(0, 1, (8, 8)).astype(np.float32)

FORMS = {
    "a sum": lambda h: jnp.tanh(h) + jax.nn.sigmoid(h + 0.5),
    "channels": lambda h: jnp.tanh(h) + jax.nn.sigmoid(h + jnp.arange(8.0)[None] / 4),
    "two biases": lambda h: jnp.tanh(h + 0.25) + jax.nn.sigmoid(h + 0.5 + 0.25) * h,
    "differences": lambda h: jnp.tanh(0.25 - h) * jax.nn.sigmoid(h - 0.5),
    "bounds": lambda h: jax.nn.relu(h) + jax.nn.relu(h - 0.5),
    "an extreme": lambda h: jnp.maximum(jnp.tanh(h), h + 0.5),
    "a comparison": lambda h: (jnp.tanh(h) > h - 0.5).astype(jnp.float32),
}


def _point(x, scale):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return qjax.fake_quant(x, grid, QSpec(8))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_functions_of_biased_accumulators_are_of_one(form):
    for scale in (2.0**-5, 0.03):
        product = lambda x, scale=scale: _point(x, scale) @ _point(KERNEL, 2.0**-5)
        fn = lambda x, product=product: _point(FORMS[form](product(x)), 2.0**-6)
        program = qjax.lower(fn, X)
        found = [node.operation for node in program.graph.nodes]
        assert found == ["dot", "thresholds"]
        for x in (X, X[:2] * 3):
            assert_equals_oracle(program, x)
            np.testing.assert_array_equal(program(x), jax.jit(fn)(x))
