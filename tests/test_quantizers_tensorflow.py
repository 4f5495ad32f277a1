"""Properties of TensorFlow's fake quantization; tests/conformance has its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
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


BITS = np.arange(2, 17)


def _range_in_numpy(x, bits, symmetric, narrow_range, over):
    """TFMOT's range of a batch, operation by operation in float32."""
    low, high = x.min(over), x.max(over)
    if not symmetric:
        return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    ratio = np.float32(-1 if narrow_range else -(2.0**bits - 2) / 2.0**bits)
    return np.minimum(low, high / ratio), np.maximum(high, low * ratio)


def _fake_quant_in_numpy(x, low, high, bits, narrow_range, reciprocal):
    qmin, qmax = np.float32(narrow_range), np.float32(2.0**bits - 1)
    half, scale = np.float32(0.5), (high - low) / (qmax - qmin)
    inverse = (qmax - qmin) / (high - low)
    zero = np.clip(np.floor(qmin - low / scale + half), qmin, qmax)
    lo, hi = (qmin - zero) * scale, (qmax - zero) * scale
    above, z = np.clip(x, lo, hi) - lo, np.floor(-lo * inverse + half)
    steps = above * inverse if reciprocal else above / scale
    return np.floor((steps - z) + half) * scale


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("narrow_range", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tfmots_ranges_and_values_are_those_of_float32(symmetric, narrow_range, axis):
    """All words at once, compiled: XLA would take an ulp where the formula lets it."""
    rng, decay = np.random.default_rng(7), 0.9
    xs = np.float32(
        rng.normal(size=(2, 40, 6, 5)) * rng.choice([0.1, 1, 30], (40, 1, 1))
    )
    over = None if axis is None else 0
    kinds = {"symmetric": symmetric, "narrow_range": narrow_range, "axis": axis}
    moving = qjax.ema_min_max(decay, (-6, 6), tf.tfmot_range)
    fake_quant = tf.fake_quant_vars if axis is None else tf.fake_quant_per_channel

    def one(bits, first, second):
        spec = QSpec(bits, **kinds)
        state = moving.init(first, spec)
        for x in (first, second):
            state = moving.update(x, state, spec)
        word = QSpec(bits, False, narrow_range, axis=axis)
        value = fake_quant(second, state.low, state.high, word)
        return tf.tfmot_range(first, spec), (state.low, state.high), value

    of_all = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None))
    found = jax.tree.map(np.asarray, jax.jit(of_all)(BITS, *xs))
    share = np.float32(1 - decay)
    for b, bits in enumerate(BITS):
        for k in range(xs.shape[1]):
            first, second = (
                _range_in_numpy(x[k], bits, symmetric, narrow_range, over) for x in xs
            )
            ends = []
            for end, new, last in zip(np.float32([-6, 6]), first, second, strict=True):
                end = end - (end - new) * share
                ends.append(end - (end - last) * share)
            word = bits, narrow_range, axis is not None
            value = _fake_quant_in_numpy(xs[1, k], *ends, *word)
            for got, wanted in zip(
                jax.tree.leaves(found), (*first, *ends, value), strict=True
            ):
                np.testing.assert_array_equal(got[b, k].reshape(wanted.shape), wanted)
