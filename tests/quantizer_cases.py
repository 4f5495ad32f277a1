"""What several tests of one subject share."""

import jax
import numpy as np

import qjax.quantizers as qz
from qjax.affine import dequantize

encode = jax.jit(qz.encode, static_argnums=0)


apply = jax.jit(qz.apply, static_argnums=0)


# On the CPU, what is below 2^-126 counts as 0.
EDGES = np.float32(
    [0, -0.0, 1e-40, 1e-9, 3e38, -3e38, 1.0, -1.0, 0.3, -0.3, np.inf, -np.inf, np.nan]
)


RNG = np.random.default_rng(0)


# One shape and one number of rows: an eager operation is compiled for each.
NORMAL = np.float32(RNG.normal(size=(12, 3)))


def _same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), wanted)


def _decoded(spec, q):
    """What codes stand for, in NumPy."""
    if q.params is None:
        return np.asarray(qz.levels(spec))[np.asarray(q.codes)]
    return np.asarray(dequantize(q.codes, q.params))


def _sign(x):
    return np.where(np.nan_to_num(x) >= 0, 1, -1)


def _auto_code(spec, t, s, po2):
    h = 2 ** (spec.bits - spec.keep_negative) - 1
    size = np.abs(t) * (1 / s) if po2 else np.abs(t) / s
    q = np.sign(t) * np.minimum(np.floor(size + np.float32(0.5)), h)
    return _sign(t) if spec.bits == 1 and spec.keep_negative else q


def _least_squares(x, q, axes, eps=1e-7):
    x, q = np.float64(x), np.float64(q)
    xq, qq = (np.mean(v, axes, keepdims=True) for v in (x * q, q * q))
    return xq / (qq + eps)


def _po2(s):
    return np.float32(2.0 ** np.rint(np.log2(s + 1e-7)))


def _hswish(x, shift=3.0, bound=6.0):
    x = np.float64(x)
    y = x * np.clip(x + shift, 0, bound) / bound
    return np.where(x <= -shift, 0, np.where(x >= bound - shift, x, y))


GRIDS = (
    qz.QuantizedBits(4, 1),
    qz.QuantizedBits(1),
    qz.QuantizedBits(16, 2, True),
    qz.QuantizedBits(3, 0, False, False),
    qz.QuantizedLinear(4, alpha=0.3),
    qz.QuantizedLinear(8),
    qz.QuantizedLinear(3, 0, False, False),
    qz.QuantizedRelu(4, 1),
    qz.QuantizedRelu(
        4, 1, negative_slope=1.0, relu_upper_bound=1.0, is_quantized_clip=False
    ),
    qz.Binary(),
    qz.Binary(alpha=0.3),
    qz.StochasticBinary(),
    qz.Ternary(),
    qz.Ternary(2.0, 0.75),
    qz.StochasticTernary(),
    qz.QuantizedPo2(4),
    qz.QuantizedPo2(8, 4.0),
    qz.QuantizedReluPo2(3),
    qz.QuantizedReluPo2(6, 4.0),
)


BENT = (qz.QuantizedHswish(8, 3), qz.QuantizedPo2(5, 16.0, False, True))


FOUND = (
    qz.QuantizedBits(4, alpha="auto"),
    qz.QuantizedBits(4, alpha="auto_po2"),
    qz.QuantizedBits(1, alpha="auto"),
    qz.QuantizedBits(1, alpha="auto_po2"),
    qz.QuantizedBits(4, 0, False, False, "auto"),
    qz.QuantizedBits(4, 0, False, False, "auto_po2"),
    qz.QuantizedLinear(4, alpha="auto"),
    qz.QuantizedLinear(4, alpha="auto_po2"),
    qz.QuantizedLinear(1, alpha="auto"),
    qz.QuantizedLinear(1, alpha="auto_po2"),
    qz.QuantizedLinear(4, 0, False, False, "auto"),
    qz.QuantizedHswish(4, 1, alpha="auto"),
    qz.QuantizedHswish(4, 1, alpha="auto_po2"),
    qz.Binary(alpha="auto"),
    qz.Binary(True, "auto_po2"),
    qz.StochasticBinary("auto"),
    qz.Bernoulli("auto_po2"),
    qz.Ternary("auto"),
    qz.Ternary("auto_po2"),
    qz.StochasticTernary("auto"),
)


ROWS = np.stack(
    [
        np.zeros(NORMAL.shape, np.float32),
        np.full(NORMAL.shape, 0.7, np.float32),
        np.full(NORMAL.shape, -0.7, np.float32),
        np.full(NORMAL.shape, 1e-40, np.float32),
        np.full(NORMAL.shape, 3e38, np.float32),
        np.float32(np.where(NORMAL > 0, 3e38, -3e38)),
        np.float32(np.where(NORMAL > 0, 3e38, 1e-40)),
        1e-20 * NORMAL,
        NORMAL,
    ]
)


_logistic = lambda x: 1 / (1 + np.exp(-x))
