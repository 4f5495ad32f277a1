"""Tables of small models against products and bytes that were counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import costs
from qjax.affine import QSpec
from qjax.schemes.scheme import Scheme

WORDS = Scheme(
    weights=QSpec(4, narrow_range=True, axis=-1), activations=QSpec(8)
)  # Of kernels and of data.
ones = lambda *shape: np.ones(shape, np.float32)


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )


def scanned(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["u"] + h @ p["w"])
        return h, h

    return lax.scan(step, jnp.zeros((2, 4)), jnp.swapaxes(xs, 0, 1))[1]


def nested(p, x):
    inner = lambda _, h: jnp.tanh(h @ p["w"])
    outer = lambda h, _: (lax.fori_loop(0, 3, inner, h), None)
    return lax.scan(outer, x, None, length=4)[0]


def tied(p, x):
    return jax.nn.relu(x @ p["k"]) @ p["k"].T


def attention(p, x):
    return (x @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2)


DEPTHWISE = lambda p, x: conv(x, p["k"], feature_group_count=3)
GROUPED = lambda p, x: conv(x, p["k"], (2, 2), "VALID", feature_group_count=2)
WIDENED = lambda p, x: conv(x, p["k"], padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))
# Function, parameters, input, then of one example: products, bit operations, numbers of
# weights of 4 bits, biases of 32 bits.
CASES = {
    "depthwise": (DEPTHWISE, {"k": (3, 3, 1, 6)}, (2, 6, 6, 3), 1944, 1944 * 32, 54, 0),
    "grouped": (GROUPED, {"k": (3, 3, 2, 6)}, (2, 8, 8, 4), 972, 972 * 32, 108, 0),
    "widened": (WIDENED, {"k": (3, 3, 2, 3)}, (2, 4, 4, 2), 4374, 4374 * 32, 54, 0),
    "bias": (
        lambda p, x: jax.nn.relu(x @ p["k"] + p["b"][None]),
        *({"k": (4, 3), "b": (3,)}, (2, 4), 12, 12 * 32, 12, 3),
    ),
    "einsum": (
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"]),
        *({"w": (4, 2, 3)}, (2, 5, 4), 120, 120 * 32, 24, 0),
    ),
    "tied": (tied, {"k": (4, 6)}, (2, 4), 48, 48 * 32, 24, 0),
    "scan": (scanned, {"u": (3, 4), "w": (4, 4)}, (2, 5, 3), 140, 140 * 32, 28, 0),
    "nested": (nested, {"w": (4, 4)}, (2, 4), 192, 192 * 32, 16, 0),
    "attention": (
        *(attention, {"q": (4, 4), "k": (4, 4)}, (2, 5, 4)),
        *(260, 160 * 32 + 100 * 64, 32, 0),
    ),
    "no weights": (lambda p, x: jax.nn.relu(x) + x, {}, (2, 4), 0, 0, 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_by_hand(case):
    fn, shapes, x, products, operations, weights, biases = CASES[case]
    params = {name: ones(*shape) for name, shape in shapes.items()}
    layers = qjax.quantize_model(fn, params, ones(*x), scheme=WORDS).layers()
    of = lambda price: costs.total(layers, price)
    assert of(costs.macs) == products
    assert of(costs.bit_operations) == operations
    assert of(costs.weight_bytes) == weights / 2 + biases * 4


@pytest.mark.parametrize("price", costs.PRICES)
def test_a_stack_of_schemes_has_the_prices_of_each(price):
    params, x = {"k": ones(4, 3)}, ones(2, 4)
    qmodel = qjax.quantize_model(lambda p, x: x @ p["k"], params, x)
    schemes = qjax.search.grid(qmodel, {"input:0": [2, 16], "k": [2, 5]})
    of = lambda s: jnp.float32(costs.total(qmodel.layers(s), costs.PRICES[price]))
    found = jax.jit(jax.vmap(of))(qjax.stack_schemes(schemes))
    np.testing.assert_array_equal(found, [of(s) for s in schemes])


def test_a_weight_of_two_loops_has_a_site_in_each_as_its_program_stores_it():
    fn = lambda p, x: scanned(p, jnp.swapaxes(scanned(p, x), 0, 1))
    params = {"u": ones(4, 4) / 4, "w": ones(4, 4) / 4}
    x = ones(2, 5, 4)
    qmodel = qjax.quantize_model(fn, params, x, scheme=WORDS)
    names = {site.name for site in qmodel.sites if site.role == "weight"}
    assert names == {"u", "w", "u:1", "w:1"}
    layers = qmodel.layers()
    assert costs.total(layers, costs.macs) == 2 * 5 * 32
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    program = qjax.lower(qmodel, params, qstate, x)
    stored = sum(np.size(program.params[name]) for name in names)
    assert stored == sum(layer.weights for layer in layers) == 64
