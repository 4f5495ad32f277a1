"""Models of all kinds that the writers of ONNX and QONNX are tried on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qjax
from qjax.graph import reference
from tests.models import images


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), (2, 2), use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3))(nn.relu(nn.Conv(3, (3, 3))(x)))
        return nn.Dense(2)(nn.relu(x + y).mean((1, 2)))


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(3, (3, 3), feature_group_count=3)(x))
        x = nn.avg_pool(nn.relu(nn.Conv(5, (1, 1))(x)), (2, 2), (2, 2))
        return nn.Dense(2)(x.reshape(len(x), -1))


class Concatenated(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = [nn.relu(nn.Conv(2, (1, 1))(x)), jnp.tanh(nn.Conv(3, (3, 3))(x))]
        return nn.Conv(2, (2, 2))(jnp.concatenate(y, -1))


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.Dense(4)(x) * nn.sigmoid(nn.Dense(4)(x)))


class Upsampled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.silu(nn.ConvTranspose(4, (3, 3), (2, 2))(x)).sum((1, 2)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(3), reverse=True)(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(4)(x + y)


MODELS = {
    "mlp": (Mlp(), (2, 5)),
    "cnn": (Cnn(), (2, 8, 8, 3)),
    "residual": (Residual(), (2, 4, 4, 3)),
    "separable": (Separable(), (2, 4, 4, 3)),
    "concatenated": (Concatenated(), (2, 4, 4, 3)),
    "gate": (Gate(), (2, 5)),
    "upsampled": (Upsampled(), (2, 3, 3, 2)),
    "recurrent": (Recurrent(), (2, 4, 3)),
    "attention": (Attention(), (2, 3, 4)),
}


def _scheme(bits, axis="output", activations=8, power_of_two=False, signed=True):
    word = qjax.QSpec(bits, narrow_range=True, axis=axis, power_of_two=power_of_two)
    return qjax.Scheme(
        weights=word,
        activations=qjax.QSpec(activations, signed, power_of_two=power_of_two),
    )


SCHEMES = {
    "8 bits": _scheme(8),
    "8 bits, powers of two": _scheme(8, power_of_two=True),
    "4 bits of a tensor, unsigned": _scheme(4, None, signed=False),
    "2 bits on 4 bits": _scheme(2, activations=4, power_of_two=True),
    "8 bits on 12 bits": _scheme(8, activations=12),
}


@functools.cache
def lowered(name, scheme):
    """A program of a model, its weights moved from where they start."""
    net, shape = MODELS[name]
    x = images(*shape)
    params = jax.jit(net.init)(jax.random.key(0), x)
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape)
    params = jax.tree.map(move, params)
    model = qjax.quantize_model(net.apply, params, x, scheme=SCHEMES[scheme])
    state = qjax.calibrate(model, params, [(x,)], progress=False)
    return qjax.lower(model, params, state, x)


def drawn(program, size, seed=0):
    """Codes of the inputs, many of them at the ends of their range."""
    rng, found = np.random.default_rng(seed), []
    for v in (program.graph.values[v] for v in program.graph.inputs):
        shape = list(v.shape)
        if shape and not v.fixed_by:
            shape[0] = size
        codes = rng.integers(v.low, v.high + 1, shape)
        ends = rng.choice([v.low, v.high], shape)
        found.append(np.where(rng.random(shape) < 0.3, ends, codes).astype(v.dtype))
    return found


def oracle(program, codes):
    """The codes of the outputs."""
    found = reference.run(program.graph, program.params, codes)
    return [found[v] for v in program.graph.outputs]


def reals(codes, values):
    """The real values of codes; integers stay."""
    return [
        q if v.grid is None else (q - np.float32(v.zero_point)) * v.grid.array()
        for q, v in zip(codes, values, strict=True)
    ]


def codes_of(found, values):
    """The codes of real values."""
    return [
        x if v.grid is None else np.rint(x / v.grid.array()) + v.zero_point
        for x, v in zip(found, values, strict=True)
    ]
