"""Kernels and biases of a product: the form whose bias int32 holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.affine import QParams, QSpec, fake_quant
from qjax.model.lines import KernelEnds, _inverse, rounded, rounded_twice, zero_channels
from qjax.model.visits import Rounded
from qjax.rounding import half_away, half_even
from qjax.schemes.patterns import Site

SITE = Site("a/kernel", "weight", (8, 6))


def _kernel():
    kernel = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    # Zeros, values that a scale of 1 takes to 0, ties, one side, a denormal number.
    return kernel * np.float32([1, 0, 1e-3, 0.4, 1e-30, 1e-42])


@pytest.mark.parametrize("rounding", [half_even, half_away])
def test_channels_of_zeros_are_those_of_the_rounded_kernel(rounding):
    kernel, spec = _kernel(), QSpec(4, symmetric=True, axis=-1, rounding=rounding)
    kernel[:, 3] = [0.5, -0.5, 0.5, 0, 0, 0, 0.25, -0.5]  # Ties.
    scale = jnp.ones((1, 6), jnp.float32)
    value = fake_quant(kernel, QParams(scale, jnp.zeros((1, 6), jnp.int32)), spec)
    ends = (f(kernel, 0, keepdims=True) for f in (np.min, np.max))
    found = KernelEnds(*ends, scale, rounding).is_zero()
    np.testing.assert_array_equal(found, zero_channels(value, (0,)))
    np.testing.assert_array_equal(found[0], ~np.any(np.asarray(value), 0))
    wanted = [False, True, True, rounding is half_even, True, True]
    np.testing.assert_array_equal(found[0], wanted)


@pytest.mark.parametrize("bits", [2, 8])
def test_two_roundings_in_one_loop_are_those_one_after_the_other(bits):
    kernel, spec = _kernel(), QSpec(bits, symmetric=True, narrow_range=True, axis=-1)
    most = np.abs(kernel).max(0, keepdims=True)
    scale = np.where(most > 0, most, 1).astype(np.float32) / np.float32(spec.qmax)
    scale = np.maximum(scale, np.float32(2**-96))
    grid = QParams(jnp.asarray(scale), np.zeros((1, 6), np.int32))
    held = jnp.float32([[1, 2, 4, 2**10, 1, 2**40]])

    def once(kernel):
        value = fake_quant(kernel, grid, spec)
        return rounded(value, 1 / held, grid, SITE)

    def twice(kernel):
        value = fake_quant(kernel, grid, spec)
        first = Rounded(value, kernel, kernel.min(0), kernel.max(0), spec)
        return rounded_twice(value, held, grid, SITE, first)

    (a, back_a), (b, back_b) = (jax.vjp(jax.jit(f), kernel) for f in (once, twice))
    np.testing.assert_array_equal(a, b)
    codes = np.rint(np.rint(kernel / scale).clip(spec.qmin, spec.qmax) / held)
    np.testing.assert_allclose(b, codes * scale, rtol=1e-6)
    np.testing.assert_array_equal(back_a(a)[0], back_b(a)[0])


def test_an_inverse_of_powers_of_two_is_exact():
    powers = 2.0 ** np.arange(-126, 127, dtype=np.float64)
    found = jax.jit(_inverse)(powers.astype(np.float32))
    np.testing.assert_array_equal(found, (1 / powers).astype(np.float32))
