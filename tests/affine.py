"""The formulas of grids in NumPy float32 and int64, and words to try them on."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

from qjax.affine import QParams, QSpec, dequantize, fake_quant, quantize
from qjax.ranges import min_max_params

Fraction = fractions.Fraction

# bits, signed, narrow_range: plain values, whose names are the same in every process.
WORDS = [
    (bits, signed, narrow_range)
    for bits in (1, 2, 4, 8, 16, 31, 32)
    for signed in (True, False)
    for narrow_range in (True, False)
    if not (bits == 1 and narrow_range) and not (bits == 32 and not signed)
]
SPECS = [QSpec(*word) for word in WORDS]
EXTREMES = np.float32(
    [0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-30, np.nan]
)


def code_range(spec):
    first = -(2 ** (spec.bits - 1)) if spec.signed else 0
    return first + int(spec.narrow_range), first + 2**spec.bits - 1


def codes_of(x, scale, zero_point, spec):
    """The definition: products in float32, then integers that cannot overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(np.float32(x) * (np.float32(1) / np.float32(scale)))
    steps = np.where(np.isnan(steps), 0.0, np.clip(np.float64(steps), -1e15, 1e15))
    return np.clip(np.int64(steps) + np.int64(zero_point), *code_range(spec))


def values_of(codes, scale, zero_point):
    return (np.float32(codes) - np.float32(zero_point)) * np.float32(scale)


def fake_quantized(x, scale, zero_point, spec):
    value = values_of(codes_of(x, scale, zero_point, spec), scale, zero_point)
    return np.where(np.isnan(x), np.float32(np.nan), value)


def points_of(scale, spec):
    """Ties, random values over twice the range of codes, and extremes."""
    rng = np.random.default_rng(0)
    ties = (np.arange(-300, 300) + 0.5) * scale
    spread = rng.uniform(-1, 1, 300) * 2.0**spec.bits * scale
    return np.float32([*ties, *np.float32(spread), *EXTREMES])


def grid_of(scale, zero_point):
    return QParams(jnp.float32(scale), jnp.int32(zero_point))


# Jitted over every argument: one compilation serves all bits.
jit_quantize, jit_fake_quant = jax.jit(quantize), jax.jit(fake_quant)
jit_dequantize, jit_min_max = jax.jit(dequantize), jax.jit(min_max_params)

SETTINGS = settings(deadline=None, max_examples=40)
