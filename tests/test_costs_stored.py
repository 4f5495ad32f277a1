"""Weights, biases and live values of tables, against parameters and unrolled loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import costs
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = normal(2, 4)
dense = lambda h, w: (jnp.tanh(h @ w), None)
inner = lambda h, w: (lax.scan(dense, h, w)[0], None)
twice = lambda h, w: (lax.scan(lambda h, _: dense(h, w), h, None, 2)[0], None)
affine = lambda h, w: (jnp.tanh(h) * w, None)
PER_STEP = Scheme(rules=(Rule("*", qjax.QSpec(8), per_step=True),))


@pytest.mark.parametrize(
    "step, shape, scheme",
    [
        (dense, (3, 4, 4), Scheme()),
        (dense, (1, 4, 4), Scheme()),
        (dense, (3, 4, 4), PER_STEP),
        (lambda h, w: dense(h, w.T), (3, 4, 4), Scheme()),
        (inner, (3, 2, 4, 4), Scheme()),
        (twice, (3, 4, 4), Scheme()),
        (affine, (5, 1, 4), Scheme()),
    ],
)
def test_weights_of_all_steps_are_stored(step, shape, scheme):
    fn = lambda p, x: lax.scan(step, x, p["w"])[0]
    qmodel = qjax.quantize_model(fn, {"w": normal(*shape)}, X, scheme=scheme)
    layers, size = qmodel.layers(), int(np.prod(shape))
    assert costs.total(layers, costs.weight_bytes) == size
    names = {layer.work.weight for layer in layers} - {""}
    of = lambda x: costs.roofline(x, costs.Machine(1e9, 1e9)).values()
    wide = of(qmodel.layers(bits=dict.fromkeys(names, 16)))
    assert sum(x.bytes for x in wide) - sum(x.bytes for x in of(layers)) == size
    memory = costs.Memories("dram", "fixed", 0, has_io=False)
    bits = sum(layer.work.weights * 8 for layer in layers)
    found = sum(costs.energy(x, memory=memory) for x in layers if x.work.weights)
    fixed = costs.Memories("fixed", "fixed", 0, has_io=False)
    less = sum(costs.energy(x, memory=fixed) for x in layers if x.work.weights)
    assert found - less == pytest.approx(20.3125 * bits) and bits == 8 * size


def test_weights_that_all_steps_share_are_stored_once():
    p = {"w": normal(4, 4), "b": normal(1, 4)}
    step = lambda p: lambda h, _: (jnp.tanh(h @ p["w"] + p["b"]), None)
    fn = lambda p, x: lax.scan(step(p), x, None, length=3)[0]
    layers = qjax.quantize_model(fn, p, X).layers()
    assert costs.total(layers, costs.weight_bytes) == 16 + 4 * 4


def test_layers_of_nn_scan_are_stored():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4)(x)), None

    axes = {"params": 0}, {"params": True}
    scan = nn.scan(Block, variable_axes=axes[0], split_rngs=axes[1], length=5)
    fn = lambda params, x: scan().apply(params, x, None)[0]
    params = scan().init(jax.random.key(0), X, None)
    layers = qjax.quantize_model(fn, params, X).layers()
    assert costs.total(layers, costs.weight_bytes) == 5 * (16 + 4 * 4)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (1,), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


W, S = normal(4, 6), normal(1, 7, 1)
B, C = normal(1, 1, 6), normal(1, 1, 4)
OFFSETS = {
    "x * s + b": (lambda p, x: x * p[0] + p[1], (C, C), (4, 4)),
    "x * s": (lambda p, x: x * p[0], (C,), (4, 0)),
    "x * s - 1": (lambda p, x: x * p[0] - 1.0, (C,), (4, 4)),
    "x + b": (lambda p, x: x + p[0], (C,), (4, 4)),
    "x * places + b": (lambda p, x: x * p[0] + p[1], (S, C), (7, 28)),
    "dense * s - b": (lambda p, x: (x @ p[0]) * 2.0 - p[1], (W, B), (24, 6)),
    "dense + 1": (lambda p, x: x @ p[0] + 1.0, (W,), (24, 6)),
    "dense + places": (lambda p, x: x @ p[0] + p[1], (W, S), (24, 42)),
    "dense": (lambda p, x: x @ p[0], (W,), (24, 0)),
    "2 x + 1": (lambda p, x: 2.0 * x + 1.0, (), (0, 0)),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_offsets_are_stored_as_biases_of_32_bits(case):
    fn, params, (weights, biases) = OFFSETS[case]
    qmodel = qjax.quantize_model(fn, params, normal(2, 7, 4))
    layers = qmodel.layers()
    assert costs.total(layers, costs.weight_bytes) == weights + 4 * biases
    assert sum(layer.work.biases for layer in layers) == biases
    ends = (layer for layer in layers if layer.work.biases)
    assert all(costs.effective_bit_operations(x) == 56 * x.products for x in ends)


def test_the_offset_of_a_norm_is_that_of_the_program():
    x, model = normal(2, 5, 3), Normed()
    params = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda a: np.abs(normal(*a.shape)) + 0.1, params)
    qmodel = qjax.quantize_model(model.apply, params, x)
    (found,) = (layer.work.biases for layer in qmodel.layers() if layer.weights)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    (stored,) = (layer.work.biases for layer in program.layers() if layer.weights)
    assert found == stored == 6


WIDE = {"a": (40, 4), "h": (4, 4), "b": (4, 100), "c": (100, 4)}


def wide_step(p, h, context):
    h = jnp.tanh(context @ p["a"] + h @ p["h"])
    return jnp.tanh(jnp.tanh(h @ p["b"]) @ p["c"])


def shared(p, x, context):
    return lax.scan(lambda h, _: (wide_step(p, h, context), None), x, None, 4)[0]


def nested(p, x, context):
    return lax.scan(lambda h, _: (shared(p, h, context), None), x, None, 2)[0]


def parts(p, x, context):
    return lax.scan(lambda h, t: (wide_step(p, h, t), None), x, context)[0]


@pytest.mark.parametrize(
    "fn, shape, outer",
    # The plan of the outer loop carries 4 more numbers, of 16 bits.
    [(shared, (1, 40), 0), (nested, (1, 40), 8), (parts, (4, 1, 40), 0)],
)
def test_what_each_step_reads_lives_to_the_last(fn, shape, outer):
    params = {name: normal(*own) for name, own in WIDE.items()}
    inputs = normal(1, 4), normal(*shape)
    qmodel = qjax.quantize_model(fn, params, *inputs)
    # What the steps read, what is carried, and two values of 100 numbers.
    wanted = np.prod(shape) + 4 + 2 * 100 + outer
    assert costs.peak_bytes(qmodel.layers()) == wanted
    qstate = qjax.calibrate(qmodel, params, [inputs])
    program = qjax.lower(qmodel, params, qstate, *inputs)
    assert any(node.graphs for node in program.graph.nodes)
    assert costs.peak_bytes(program.layers()) == wanted - outer
