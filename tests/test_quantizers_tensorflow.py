"""Properties of TensorFlow's fake quantization; tests/conformance has its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.affine import QSpec, dequantize
from qjax.quantizers import tensorflow as tf

X = np.float32([*np.linspace(-3, 3, 401), 0.0, np.inf, -np.inf, 1e30])


@pytest.mark.parametrize("narrow_range", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_values_are_dequantized_codes(bits, narrow_range):
    spec = QSpec(bits, False, narrow_range)
    value, codes, params = tf.quantize_vars(X, -0.9, 1.7, spec)
    np.testing.assert_array_equal(dequantize(codes, params), value)
    assert spec.qmin <= codes.min() and codes.max() <= spec.qmax
    assert len(np.unique(value)) <= spec.qmax - spec.qmin + 1
    assert np.all(np.diff(value[:401]) >= 0)
    assert value[401] == 0
    again = tf.fake_quant_vars(value, -0.9, 1.7, spec)
    np.testing.assert_array_equal(again, value)


def test_bits_may_be_traced():
    f = lambda bits: tf.fake_quant_vars(
        X, jnp.float32(-1), jnp.float32(2), QSpec(bits, False)
    )
    swept = jax.jit(jax.vmap(f))(jnp.arange(2, 17))
    for bits, got in zip(range(2, 17), swept, strict=True):
        np.testing.assert_array_equal(got, f(bits))


def test_an_empty_range_passes_its_gradient():
    f = lambda x, low, high: jnp.sum(tf.fake_quant_vars(x, low, high) * 3)
    zero = jnp.float32(0)
    dx, dlow, dhigh = jax.grad(f, (0, 1, 2))(X[:401], zero, zero)
    np.testing.assert_array_equal(dx, 3)
    assert dlow == dhigh == 0
    assert f(X[:401], zero, zero) == 0


def test_nan_stays_nan_and_gets_no_large_code():
    value, codes, params = tf.quantize_vars(jnp.float32([jnp.nan, 1.0]), -1.0, 1.0)
    assert np.isnan(value[0]) and codes[0] == params.zero_point


@pytest.mark.parametrize(
    ("low", "high", "spec", "match"),
    [
        (0.5, 0.5, QSpec(8, False), "low < high"),
        (1.0, -1.0, QSpec(8, False), "low < high"),
        (-1.0, 1.0, QSpec(8), "unsigned"),
        (-1.0, 1.0, QSpec(1, False), r"2\.\.16"),
        (-1.0, 1.0, QSpec(17, False), r"2\.\.16"),
        (np.zeros(2), 1.0, QSpec(8, False), r"`low` must have shape \(\)"),
    ],
)
def test_bad_input(low, high, spec, match):
    with pytest.raises(ValueError, match=match):
        tf.fake_quant_vars(X, low, high, spec)


def test_a_channel_axis_is_needed():
    ends = jnp.zeros((1,)), jnp.ones((1,))
    with pytest.raises(ValueError, match="channel axis"):
        tf.fake_quant_per_channel(X, *ends, QSpec(8, False))
