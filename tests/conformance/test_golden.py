"""Every case of the golden vectors, eagerly and under jit."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import quantizers
from qjax.affine import QSpec, dequantize, scale_shape
from qjax.quantizers import quantizeml as qml
from qjax.quantizers import tensorflow as tf
from qjax.rounding import floor_log2, round_log2
from tests.conformance import models, samples, tflite


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


# QKeras.

ACTIVATIONS = (
    "hard_sigmoid",
    "smooth_sigmoid",
    "binary_sigmoid",
    "hard_tanh",
    "smooth_tanh",
    "binary_tanh",
)
KERAS_ONLY = ("var_name", "use_variables", "enable_fast_inference")


def _quantizer(case):
    """``f(x, key)`` and the spec of a case, None for a plain function."""
    name, params = case["fn"], dict(case["params"])
    if name in ACTIVATIONS:
        return lambda x, key=None: getattr(quantizers, name)(x), None
    if name not in quantizers.SPECS:
        pytest.fail(f"unknown quantizer {name!r}")
    kind = quantizers.SPECS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    params = {k: v for k, v in params.items() if k not in KERAS_ONLY}
    if "strict" in fields:  # QKeras takes coarse grids as well.
        params["strict"] = False
    if "internal_sigmoid" in case:
        params["internal_sigmoid"] = case["internal_sigmoid"]
    spec = kind(**params)
    return lambda x, key=None: quantizers.apply(spec, x, key=key), spec


def _compared(case, arrays):
    """Where a case is compared."""
    if case["exactness"] == "edge-tolerant" and "edge" in arrays:
        return arrays["edge"] == 0
    return np.ones(arrays["x"].shape, bool)


def _within(got, wanted, rtol, atol, message=""):
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(wanted, np.float64),
        rtol=rtol,
        atol=atol,
        err_msg=message,
    )


def _check_close(case, got, wanted, at, rtol=1e-4, atol=1e-5, message=""):
    rtol, atol = (1e-4, 1e-5) if case["exactness"] == "allclose" else (rtol, atol)
    _within(np.asarray(got)[at], wanted[at], rtol, atol, message)


def quantizer(case, arrays):
    f, spec = _quantizer(case)
    x, g, at = (
        jnp.asarray(arrays["x"]),
        jnp.asarray(arrays["g"]),
        _compared(case, arrays),
    )
    off = 2e-6 * np.maximum(np.abs(arrays["x"]), np.abs(arrays["y"])) + 2e-6

    def run(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0], quantizers.encode(spec, x) if spec else None

    for y, dx, q in _both_ways(run, x, g):
        assert np.all(np.abs(y - arrays["y"])[at] <= off[at])
        if "y_exact" in arrays:
            np.testing.assert_array_equal(q.value[at], arrays["y_exact"][at])
        if case["follow"] != "forward-only":
            _check_close(case, dx, arrays["dx"], at, 2e-6, 2e-6, "dx")
        for name in {"scale", "quantization_scale"} & set(arrays):
            _check_scale(case, arrays[name], name, spec, q)
        if q is not None:
            _check_codes(spec, q)


def _check_scale(case, wanted, name, spec, q):
    scale = np.asarray(q.params.scale, np.float64) * _steps_of(spec, name)
    shape = np.broadcast_shapes(scale.shape, wanted.shape)
    scale, wanted = np.broadcast_to(scale, shape), np.broadcast_to(wanted, shape)
    # An empty range has scale 0 there and 1 here: all of its codes are 0.
    empty = wanted == 0
    assert not np.any(np.where(empty, q.codes, 0))
    if "po2" in str(case["params"].get("alpha")):
        np.testing.assert_array_equal(scale[~empty], wanted[~empty])
    _check_close(case, scale, wanted, ~empty, 1e-6, 0, name)


def _check_codes(spec, q):
    """The value is what the codes stand for."""
    if q.params is None:
        np.testing.assert_array_equal(q.value, quantizers.levels(spec)[q.codes])
    else:
        np.testing.assert_array_equal(q.value, dequantize(q.codes, q.params))


def _steps_of(spec, name):
    """What takes the scale of a code to the attribute of the same name in QKeras."""
    kinds = quantizers.QuantizedBits, quantizers.QuantizedLinear
    if isinstance(spec, quantizers.QuantizedHswish):
        kinds = (quantizers.QuantizedHswish,)
    if not isinstance(spec, kinds):
        return 1.0
    keep = getattr(spec, "keep_negative", True)
    unit = 2.0 ** (spec.integer - spec.bits + keep)
    if isinstance(spec, quantizers.QuantizedLinear):
        half = 2.0 if spec.bits == 1 and keep else 1.0  # A sign is half a step.
        return half if name == "quantization_scale" else half / unit
    is_sign = spec.bits == 1 and keep
    return 1.0 if is_sign else 1.0 / unit


def quantizer_statistics(case, arrays):
    f, spec = _quantizer(case)
    x, n = jnp.asarray(arrays["x"]), case["n_draws"]
    keys = jax.random.split(jax.random.key(0), n)
    if not case["learning_phase"] and case["fn"] != "bernoulli":
        f = lambda x, key, f=f: f(x)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: f(x, key)))(keys), np.float64)
    off = np.abs(draws.mean(0) - arrays["mean"])
    assert np.all(off < 5 * arrays["std"] / np.sqrt(n) + 1e-3)
    if len(arrays["support"]) <= 64:  # Else the scale is random as well.
        for value in np.unique(np.round(draws, 5)):
            assert np.min(np.abs(arrays["support"] - value)) < 1e-4
    scales = [quantizers.encode(spec, x, key=key).params.scale for key in keys[:2]]
    if "scale" in arrays and np.array_equal(*scales):
        wanted = arrays["scale"]
        got = np.broadcast_to(scales[0] * _steps_of(spec, "scale"), wanted.shape)
        _check_close(case, got, wanted, wanted != 0, 1e-5)


def quantizer_stateful(case, arrays):
    _, spec = _quantizer(case)
    step = getattr(quantizers, case["fn"])
    if isinstance(spec, quantizers.QuantizedBitsLearnablePo2):
        states = ("scale", "scale_exponent", "d_scale_exponent", "msqe_weight")
    else:
        states = ("scale", "scale_exponent", "msqe_weight")

    def call(x, g, state):
        def loss(x, exponent):
            y, new = step(x, state._replace(exponent=exponent), spec)
            return jnp.sum(y * g), (y, new)

        (_, (y, new)), (dx, de) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            x, state.exponent
        )
        return y, dx, de, quantizers.update_msqe_weight(x, g, new, spec)

    for f in (call, jax.jit(call)):
        state = quantizers.init_msqe(jnp.asarray(arrays["x0"]), spec)
        for i in range(sum(name[:1] == "x" for name in arrays)):
            x, g = (jnp.asarray(arrays[f"{name}{i}"]) for name in "xg")
            y, dx, de, state = f(x, g, state)
            got = {"y": y, "dx": dx, "scale": state.scale, "d_scale_exponent": de}
            got["scale_exponent"] = state.exponent
            got["msqe_weight"] = state.msqe_weight
            for name in ("y", "dx", *states):
                if f"{name}{i}" in arrays:
                    _within(got[name], arrays[f"{name}{i}"], 1e-4, 1e-5, name)


# TFMOT's and QuantizeML's observers.


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
                assert end.size == x.shape[-1] and least(end) == wanted.reshape(())
            else:
                np.testing.assert_array_equal(end.reshape(wanted.shape), wanted)
        if is_corrected:
            channels = np.float64(arrays["x_train"][: i + 1])
            over = tuple(range(channels.ndim - 1))
            if not p["symmetric"]:
                seen = np.minimum(channels.min(over), 0)
                np.testing.assert_array_equal(np.ravel(state.low), np.float32(seen))
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


def qml_observer(case, arrays):
    axis = {"per-axis": -1, "per-tensor": None}[case["params"]["axis"]]
    spec, momentum = QSpec(8, axis=axis), case["params"]["momentum"]
    largest, both = qjax.moving_max(momentum), qjax.moving_min_max(momentum)
    batches = jnp.asarray(arrays["batches"])
    states = [c.init(batches[0], spec) for c in (largest, both)]
    for i, x in enumerate(batches):
        states = [
            c.update(x, s, spec) for c, s in zip((largest, both), states, strict=True)
        ]
        got = {
            "range_max_after": states[0].high,
            "in_range_max_after": states[1].high,
            "in_range_min_after": states[1].low,
        }
        if "advisory" in case:  # There, a first maximum of 1 is forgotten.
            reduce = lambda x: np.max(np.abs(x), None if axis is None else (0, 1, 2))
            wanted = reduce(batches[0])
            for x in batches[1 : i + 1]:
                wanted = wanted - (wanted - reduce(x)) * (1 - momentum)
            _within(np.ravel(states[0].high), np.ravel(wanted), 1e-6, 1e-7)
            continue
        for name, value in got.items():
            _within(np.ravel(value), np.ravel(arrays[name][i]), 1e-6, 1e-7, name)


# QuantizeML's numbers and quantizers.


def _number(case, arrays, name):
    """A number of a case, as an argument."""
    frac_bits = jnp.asarray(arrays[f"{name}/frac_bits"], jnp.int32)
    values = jnp.asarray(arrays[f"{name}/values"].astype(np.int32))
    fixed = qml.FixedPoint(values, _meta(case, name)["value_bits"], frac_bits)
    if f"{name}/scales" not in arrays:
        return fixed
    return qml.QFloat(fixed, jnp.asarray(arrays[f"{name}/scales"]))


def _meta(case, name):
    return case["params"]["meta"][name]


def _check_qml(case, arrays, f, *args):
    """Checks all that a case holds of ``f(*args)``, a dict, eagerly and compiled."""
    wanted = {n.split("/")[1] for n in arrays if n.startswith("out/")}
    for got in _both_ways(f, *args):
        assert set(got) == wanted
        for key, value in got.items():
            name = f"out/{key}"
            if isinstance(value, qml.FixedPoint | qml.QFloat):
                _check_number(case, arrays, name, value)
            else:
                assert np.shape(value) == arrays[name].shape
                np.testing.assert_array_equal(value, arrays[name], name)


def _check_number(case, arrays, name, got):
    meta = _meta(case, name)
    assert type(got).__name__ == meta["type"]
    fixed = got
    if isinstance(got, qml.QFloat):
        fixed, scale = got.fixed_point, arrays[f"{name}/scales"]
        assert got.scale.shape == scale.shape
        np.testing.assert_array_equal(got.scale, scale)
    assert int(fixed.value_bits) == meta["value_bits"]
    parts = {"frac_bits": fixed.frac_bits, "values": fixed.codes}
    for part, value in parts.items():
        wanted = arrays[f"{name}/{part}"]
        assert np.shape(value) == wanted.shape and value.dtype == jnp.int32
        if part == "values" and meta["beyond_float32_exact"]:  # Float32 there.
            value, wanted = np.float32(value), np.float32(wanted)
        np.testing.assert_array_equal(value, wanted, name)
    # The grid gives the values.
    real = np.float64(fixed.codes) * 2.0 ** -np.float64(fixed.frac_bits)
    real = real * np.float64(getattr(got, "scale", 1.0))
    np.testing.assert_allclose(qml.to_float(got), real, rtol=3e-7)


def _add_int(case, a):
    other = case["params"]["other"]
    return {"add": qml.add(a, other), "sub": qml.subtract(a, other)}


def _align_add(case, a, b):
    word = case["params"]["buffer_value_bits"]
    x, y = qml.align(qml.promote(a, word), qml.promote(b, word))
    return {
        "a_aligned": x,
        "b_aligned": y,
        "a_shift": x.frac_bits - a.frac_bits,
        "b_shift": y.frac_bits - b.frac_bits,
        "add": qml.add(x, y),
        "sub": qml.subtract(x, y),
        "eq": qml.equal(a, b),
        "gt": qml.greater(a, b),
    }


def _divide(case, a, b):
    return {"y": qml.divide(a, b), "y_int": qml.divide(a, case["params"].get("s", 3))}


def _shifts(case, a):
    s = case["params"]["s"]
    return {"left": qml.shift(a, s), "right": qml.right_shift(a, s)}


def _expand(case, a):
    y = qml.expand(a, case["params"]["value_bits"])
    return {"y": y, "shift": y.frac_bits - a.frac_bits}


def _rescale(case, a):
    p = case["params"]
    y = qml.rescale(a, np.int32(p["frac_bits"]), p["value_bits"])
    return {"y": y, "shift": y.frac_bits - a.frac_bits}


def _reduce(case, a):
    over = {"sum": qml.reduce_sum(a, (1, 2)), "mean": qml.reduce_mean(a, (1, 2))}
    return {**over, "abs": qml.absolute(a)}


def _max_frac_bits(case, ranges):
    p = case["params"]
    return {"frac_bits": qml.max_frac_bits(p["value_bits"], ranges, p["clamp"])}


def _quantize_fixed_point(case, x):
    p = case["params"]
    y = qml.quantize_fixed_point(x, p["value_bits"], p["frac_bits"])
    is_whole = "note" in p  # Without its values.
    return {"y": y} if is_whole else {"y": y, "y_float": qml.to_float(y)}


def _logarithms(case, x):
    logs = {"ceil": qml.ceil_log2, "floor": floor_log2, "round": round_log2}
    return {name: f(x) for name, f in logs.items()}


def _quantize_qfloat(case, ranges, x):
    word = case["params"]["value_bits"]
    scale = qml.optimal_scales(ranges, word)
    q = qml.quantize_qfloat(x, word, scale)
    found = {"scales": scale, "q": q, "y_float": qml.to_float(q)}
    for scale_bits in (8, 16):
        long = qml.promote(
            q.fixed_point, _meta(case, f"out/fp{scale_bits}")["value_bits"]
        )
        y, s = qml.to_fixed_point(qml.QFloat(long, q.scale), scale_bits)
        found |= {f"fp{scale_bits}": y, f"qs{scale_bits}": s}
    return found


def _scalar_scales(case, scales):
    f = lambda s: qml.quantize_scales(s, case["params"]["scale_bits"])
    y = jax.vmap(f)(scales)
    return {"values": y.codes, "frac_bits": y.frac_bits}


def _vector_scales(case, scales):
    return {"y": qml.quantize_scales(scales, case["params"]["scale_bits"])}


QML_OPERATIONS = {
    "FixedPoint + int / - int": _add_int,
    "align then add/sub (QuantizedAdd)": _align_add,
    "/ (truncation toward zero)": _divide,
    "<< and >>": _shifts,
    "FixedPoint.shift": lambda case, a: {
        "y": qml.shift(a, np.int32(case["params"]["s"]))
    },
    "promote": lambda case, a: {"y": qml.promote(a, case["params"]["bits"])},
    "expand": _expand,
    "rescale": _rescale,
    "reduce_sum/mean over axes 1,2 (mean floors)": _reduce,
    "tf.matmul": lambda case, a, b: {"y": qml.matmul(a, b)},
    "tf.math.multiply(FixedPoint,FixedPoint)": lambda case, a, b: {
        "y": qml.multiply(a, b)
    },
    "FixedPoint.max_frac_bits": _max_frac_bits,
    "FixedPoint.quantize": _quantize_fixed_point,
    "ceil_log2/floor_log2/round_log2": _logarithms,
    "QFloat.optimal_scales, quantize, to_fixed_point": _quantize_qfloat,
    "quantize_scales (one scalar scale per element)": _scalar_scales,
    "quantize_scales (vector: per-element frac_bits)": _vector_scales,
}


def qml_fixed_point(case, arrays):
    operation = case["params"]["op"]
    if operation not in QML_OPERATIONS:
        pytest.fail(f"no check for the operation {operation!r}")
    names = sorted({"/".join(n.split("/")[:2]) for n in arrays if n[:3] == "in/"})
    args = [
        jnp.asarray(arrays[name]) if name in arrays else _number(case, arrays, name)
        for name in names
    ]
    f = lambda *args: QML_OPERATIONS[operation](case, *args)
    _check_qml(case, arrays, f, *args)


def qml_qfloat(case, arrays):
    qml_fixed_point(case, arrays)


def qml_weight_quantizer(case, arrays):
    p, w = case["params"], jnp.asarray(arrays["in/w"])
    options = {"signed": p.get("signed", True), "axis": p["axis"]}
    options["power_of_two"] = p.get("fp_quantizer", False)
    f = lambda w: {"q": qml.quantize_weight(w, p["bitwidth"], **options)}
    _check_qml(case, arrays, f, w)


def qml_aligned_weight_quantizer(case, arrays):
    p, bias = case["params"], jnp.asarray(arrays["in/bias"])
    options = {"signed": p.get("signed", True)}
    f = lambda w, other: {
        "q": qml.quantize_aligned_weight(w, other, p["bitwidth"], **options)
    }
    _check_qml(case, arrays, f, bias, _number(case, arrays, "in/other"))


def qml_input_quantizer(case, arrays):
    p, x = case["params"], jnp.asarray(arrays["in/x"])
    ends = [jnp.asarray(arrays[f"in/range_{end}"]) for end in ("min", "max")]

    def f(x, low, high):
        return qml.quantize_input(x, low, high, p["bitwidth"], signed=p["signed"])

    _check_qml(case, arrays, lambda *args: {"y": f(*args)[0]}, x, *ends)
    for q, zero_point in _both_ways(f, x, *ends):
        grid = q.params._replace(zero_point=zero_point)
        off = np.abs(dequantize(q.codes, grid) - x)
        low, high = (np.asarray(end) for end in ends)
        high = high - np.asarray(grid.scale)
        is_inside = (arrays["in/x"] >= low) & (arrays["in/x"] <= high)
        assert np.all((off <= grid.scale) | ~is_inside)


def qml_output_quantizer(case, arrays):
    p, x = case["params"], _number(case, arrays, "in/x")
    options = {"signed": p["signed"], "scale_bits": p["scale_bits"]}
    options["buffer_bits"] = p["buffer_bitwidth"]

    def f(x, most, rate):
        rate = {"rescaling_rate": rate}
        y = qml.quantize_output(x, most, p["bitwidth"], **options, **rate)
        return {"y": y, "frac_bits": y.frac_bits}

    ranges = [jnp.asarray(arrays[f"in/{n}"]) for n in ("range_max", "rescaling_rate")]
    _check_qml(case, arrays, f, x, *ranges)


QML_ERRORS = {
    "FixedPoint add with different frac_bits": lambda: qml.add(
        qml.from_codes(_ones(2, 2), 7, 2), qml.from_codes(_ones(2, 2), 7, 3)
    ),
    "WeightQuantizer(bitwidth=4.0)": lambda: qml.quantize_weight(jnp.ones(3), 4.0),
    "WeightQuantizer(bitwidth=1, signed)": lambda: qml.quantize_weight(jnp.ones(3), 1),
    "InputQuantizer on ints": lambda: qml.quantize_input(_ones(2, 2), 0.0, 1.0),
    "per-axis OutputQuantizer on 2-D": lambda: qml.quantize_output(
        qml.from_codes(_ones(2, 2), 27), jnp.ones(2)
    ),
    # The shape of the range tells the axis, which is the last or none.
    "OutputQuantizer(axis=-1)": lambda: qml.quantize_output(
        qml.from_codes(_ones(4, 3, 2), 27), jnp.ones((4, 1, 1))
    ),
    "OutputQuantizer to same bits": lambda: qml.quantize_output(
        qml.from_codes(_ones(2, 2), 7), 1.0
    ),
    "promote to fewer bits": lambda: qml.promote(qml.from_codes(_ones(2, 2), 8), 4),
    "rescale shift >= value_bits": lambda: qml.rescale(
        qml.from_codes(_ones(2, 2), 4), 8
    ),
}


def _ones(*shape):
    return jnp.ones(shape, jnp.int32)


def qml_error(case, arrays):
    name = case["params"]["case"]
    if name in models.MODEL_ERRORS:
        models.MODEL_ERRORS[name]()
        return
    if name == "FixedPoint ** 2":  # A defect there.
        y = qml.multiply(*[qml.from_codes(jnp.int32([3, -5]), 7, 1)] * 2)
        np.testing.assert_array_equal(y.codes, [9, 25])
        return
    if name not in QML_ERRORS:
        pytest.fail(f"no check for the error {name!r}")
    with pytest.raises((ValueError, TypeError), match="`|Real values"):
        QML_ERRORS[name]()


CHECKS = {
    f.__name__: f
    for f in (
        fake_quant_vars,
        fake_quant_per_channel,
        fake_quant_args,
        fake_quant_vars_special,
        fake_quant_error,
        quantizer,
        quantizer_statistics,
        quantizer_stateful,
        tfmot_quantizer,
        qml_observer,
        qml_fixed_point,
        qml_qfloat,
        qml_weight_quantizer,
        qml_aligned_weight_quantizer,
        qml_input_quantizer,
        qml_output_quantizer,
        qml_error,
    )
}
CHECKS |= models.CHECKS | samples.CHECKS | tflite.CHECKS


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
        pytest.skip(f"no check for the kind {case['kind']!r}")
    if case.get("follow") is False:
        record_property("outcome", "not followed")
        return
    CHECKS[case["kind"]](case, _arrays(case))
