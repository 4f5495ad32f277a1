"""What several tests of one subject share."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from qjax.quantizers import quantizeml as qml

SETTINGS = settings(deadline=None, max_examples=30)


LEAST, MOST = -(2**31), 2**31 - 1


ENDS = [LEAST, LEAST + 1, -1, 0, 1, MOST]


WORDS = (1, 2, 7, 8, 15, 24, 31)


codes = st.lists(st.sampled_from(ENDS) | st.integers(LEAST, MOST), min_size=6)
codes = codes.map(lambda values: np.int32(values[:6]))


word = st.sampled_from(WORDS)


point = st.integers(-40, 40)


real = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


positive = st.floats(2.0**-20, 2.0**20, width=32)


def clip(value, value_bits):
    return min(max(value, -(2**value_bits)), 2**value_bits - 1)


def half_up(value):
    return math.floor(value + Fraction(1, 2))


def times_power(value, exponent):
    return Fraction(value) * Fraction(2) ** int(exponent)


def log2_up(x):
    """The least integer whose power of two is not below a positive ``x``."""
    mantissa, exponent = math.frexp(x)
    return exponent - (mantissa == 0.5)


def rounded(x, value_bits, frac_bits):
    """Half to even, which is what ``round`` does to a fraction."""
    return clip(round(times_power(float(x), frac_bits)), value_bits)


def scale_code(scale, bits):
    frac_bits = bits - log2_up(float(scale))
    return min(round(times_power(float(scale), frac_bits)), 2**bits - 1), frac_bits


def number(values, value_bits, frac_bits=0):
    """Codes of a word, cut to it, as all of its functions leave them."""
    cut = [clip(int(v), value_bits) for v in values]
    return qml.FixedPoint(jnp.int32(cut), value_bits, jnp.int32(frac_bits))


def ints(x):
    return [int(c) for c in x.codes]


def same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@functools.cache
def compiled(f, *static):
    return jax.jit(f, static_argnames=static)


def _zeros(*shape):
    return jnp.zeros(shape, jnp.int32)
