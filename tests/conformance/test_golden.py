"""Every case of the golden vectors, eagerly and under jit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QSpec, dequantize, scale_shape
from qjax.quantizers import tensorflow as tf
from tests.conformance import (
    models,
    qkeras,
    qkeras_layers,
    qkeras_models,
    qkeras_norms,
    qkeras_other_layers,
    qkeras_qtools,
    qkeras_recurrent,
    qkeras_tools,
    quantizeml,
    samples,
    tflite,
)


def _word(params, axis=None):
    return QSpec(params["num_bits"], False, params["narrow_range"], axis=axis)


def _both_ways(f, *args):
    """Results of ``f`` eagerly and compiled."""
    return f(*args), jax.jit(f)(*args)


def _check_gradient(f, case, arrays, args, names):
    """The gradients of ``sum(y * upstream)``, bit for bit but for float summation."""
    loss = lambda *args: jnp.sum(f(*args) * arrays["upstream"])
    for got in _both_ways(jax.grad(loss, tuple(range(len(args)))), *args):
        np.testing.assert_array_equal(got[0], arrays["dx"])
        for name, d in zip(names, got[1:], strict=True):
            wanted = arrays[name].reshape(np.shape(d))
            np.testing.assert_allclose(d, wanted, rtol=1e-5, atol=1e-5)


def _is_subnormal(x):
    return (np.abs(x) < np.finfo(np.float32).tiny) & (x != 0)


def fake_quant_vars(case, arrays):
    spec = _word(case["params"])
    rows = zip(*(arrays[k] for k in ("x", "min", "max", "y")), strict=True)
    f = lambda x, low, high: tf.fake_quant_vars(x, low, high, spec)
    compiled = jax.jit(f)
    for x, low, high, y in rows:
        np.testing.assert_array_equal(f(x, low, high), y)
        np.testing.assert_array_equal(compiled(x, low, high), y)
    batch = jax.vmap(f)(arrays["x"], arrays["min"], arrays["max"])
    np.testing.assert_array_equal(batch, arrays["y"])
    got = jax.vmap(lambda *row: tf.quantize_vars(*row, spec))(
        arrays["x"], arrays["min"], arrays["max"]
    )
    real = jax.vmap(dequantize)(got.codes, got.params)
    np.testing.assert_array_equal(real, arrays["y"])
    assert got.codes.min() >= spec.qmin and got.codes.max() <= spec.qmax
    loss = lambda x, low, high, g: jnp.sum(f(x, low, high) * g)
    grad = jax.vmap(jax.grad(loss, (0, 1, 2)))
    args = (arrays["x"], arrays["min"], arrays["max"], arrays["upstream"])
    flushed = _is_subnormal(arrays["x"])  # TensorFlow takes them to zero.
    for dx, dmin, dmax in _both_ways(grad, *args):
        np.testing.assert_array_equal(dx[~flushed], arrays["dx"][~flushed])
        rows = ~flushed.any(1)
        np.testing.assert_allclose(dmin[rows], arrays["dmin"][rows], 1e-5, 1e-5)
        np.testing.assert_allclose(dmax[rows], arrays["dmax"][rows], 1e-5, 1e-5)


def fake_quant_per_channel(case, arrays):
    x, axis = arrays["x"], case["params"].get("axis", -1)
    spec = _word(case["params"], axis)
    low, high = (arrays[k].reshape(scale_shape(x.shape, axis)) for k in ("min", "max"))
    f = lambda x, low, high: tf.fake_quant_per_channel(x, low, high, spec)
    for got in _both_ways(f, x, low, high):
        np.testing.assert_array_equal(got, arrays["y"])
    _, codes, grid = tf.quantize_per_channel(x, low, high, spec)
    np.testing.assert_array_equal(dequantize(codes, grid), arrays["y"])
    if not _is_subnormal(x).any():
        _check_gradient(f, case, arrays, (x, low, high), ("dmin", "dmax"))


def fake_quant_args(case, arrays):
    spec, p = _word(case["params"]), case["params"]
    f = lambda x: tf.fake_quant_args(x, p["min"], p["max"], spec)
    for got in _both_ways(f, arrays["x"]):
        np.testing.assert_array_equal(got, arrays["y"])
    _check_gradient(f, case, arrays, (arrays["x"],), ())


def fake_quant_vars_special(case, arrays):
    spec = _word(case["params"])
    for low, high, y in zip(arrays["min"], arrays["max"], arrays["y"], strict=True):
        if low > high or (low == high != 0):  # Undefined upstream.
            with pytest.raises(ValueError, match="low < high"):
                tf.fake_quant_vars(arrays["x"], low, high, spec)
            continue
        f = lambda x, a=low, b=high: tf.fake_quant_vars(x, a, b, spec)
        for got in _both_ways(f, arrays["x"]):
            np.testing.assert_array_equal(got, y)


def fake_quant_error(case, arrays):
    with pytest.raises(ValueError, match=r"2\.\.16"):
        tf.fake_quant_vars(
            jnp.zeros(3), -1.0, 1.0, QSpec(case["params"]["num_bits"], False)
        )


# TFMOT's observers.


def _check_channels(p, batches, state):
    """The range of each channel by TFMOT's formula, bit for bit."""
    over = tuple(range(1, batches.ndim - 1))
    low, high = batches.min(over), batches.max(over)  # By batch and channel.
    if p["symmetric"]:
        levels = np.float32(2 ** p["num_bits"])
        ratio = np.float32(1) if p["narrow_range"] else (levels - 2) / levels
        low, high = np.minimum(low, -high / ratio), np.maximum(high, -low * ratio)
    seen = np.minimum(low, 0).min(0), np.maximum(high, 0).max(0)
    for end, wanted in zip((state.low, state.high), seen, strict=True):
        np.testing.assert_array_equal(np.ravel(end), wanted)


def tfmot_quantizer(case, arrays):
    p = case["params"]
    axis = -1 if p["per_axis"] else None
    symmetric = {"symmetric": p["symmetric"], "narrow_range": p["narrow_range"]}
    spec = QSpec(p["num_bits"], axis=axis, **symmetric)
    calibrator = {
        "AllValuesQuantizer": qjax.min_max(tf.tfmot_range),
        "LastValueQuantizer": qjax.last_value(tf.tfmot_range),
        "MovingAverageQuantizer": qjax.ema_min_max(0.999, (-6, 6), tf.tfmot_range),
    }[p["quantizer"]]
    update = jax.jit(lambda x, state: calibrator.update(x, state, spec))
    state = calibrator.init(arrays["x_train"][0], spec)
    is_corrected = p["per_axis"] and not p["state_shape"]  # There, per_axis is dropped.
    if not is_corrected:
        ends = [v.reshape(state.low.shape) for v in arrays["state_init"]]
        f = lambda x: _tfmot_fake_quant(p, x, *map(jnp.float32, ends))
        np.testing.assert_array_equal(
            f(arrays["x_infer"]), arrays["y_infer_before_training"]
        )
    for i, x in enumerate(arrays["x_train"]):
        state = update(x, state)
        for end, name in ((state.low, "min_after"), (state.high, "max_after")):
            wanted = arrays[name][i]
            if is_corrected:
                least = np.min if name == "min_after" else np.max
                assert end.size == x.shape[-1]
                # One range there: a quotient comes back an ulp apart in its order.
                np.testing.assert_allclose(least(end), wanted.reshape(()), 2.0**-22)
            else:
                np.testing.assert_array_equal(end.reshape(wanted.shape), wanted)
        if is_corrected:
            _check_channels(p, arrays["x_train"][: i + 1], state)
            continue
        f = lambda x, s=state: _tfmot_fake_quant(p, x, s.low, s.high)
        y, pull = jax.vjp(f, jnp.asarray(x))
        np.testing.assert_array_equal(y, arrays["y_train"][i])
        dx = pull(jnp.asarray(arrays["upstream"]))[0]
        np.testing.assert_array_equal(dx, arrays["dx_train"][i])
        np.testing.assert_array_equal(
            f(jnp.asarray(arrays["x_infer"])), arrays["y_infer_after_step"][i]
        )


def _tfmot_fake_quant(p, x, low, high):
    if p["per_axis"]:
        return tf.fake_quant_per_channel(x, low, high, _word(p, -1))
    return tf.fake_quant_vars(x, low, high, _word(p))


CHECKS = {
    f.__name__: f
    for f in (
        fake_quant_vars,
        fake_quant_per_channel,
        fake_quant_args,
        fake_quant_vars_special,
        fake_quant_error,
        tfmot_quantizer,
    )
}
CHECKS |= models.CHECKS | samples.CHECKS | tflite.CHECKS
CHECKS |= qkeras.CHECKS | qkeras_models.CHECKS | quantizeml.CHECKS
CHECKS |= qkeras_tools.CHECKS | qkeras_qtools.CHECKS
LAYERS = qkeras_layers.LAYERS | qkeras_norms.LAYERS | qkeras_other_layers.LAYERS
LAYERS |= qkeras_recurrent.LAYERS
STATEFUL = qkeras_other_layers.STATEFUL


def layer(case, arrays):
    """A layer of QKeras, by the check of its class."""
    if case["fn"] not in LAYERS:
        pytest.skip(f"no layer here is a {case['fn']}")
    LAYERS[case["fn"]](case, arrays)


def layer_stateful(case, arrays):
    """A layer of QKeras over several steps, by the check of its class."""
    STATEFUL[case["fn"]](case, arrays)


CHECKS |= {f.__name__: f for f in (layer, layer_stateful)}


def _arrays(case):
    """The arrays of a case, in either layout."""
    if not case.get("arrays"):
        return {}
    with np.load(pathlib.Path(case["folder"]) / case["file"]) as file:
        keys = {n: a.get("key", n) for n, a in case["arrays"].items()}
        return {name: file[key] for name, key in keys.items()}


@pytest.mark.slow
def test_case(case, record_property):
    record_property("kind", case["kind"])
    if case["kind"] not in CHECKS:
        pytest.fail(f"no check reads the kind {case['kind']!r}")
    if case.get("follow") is False:
        record_property("outcome", "not followed")
        return
    CHECKS[case["kind"]](case, _arrays(case))
