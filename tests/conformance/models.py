"""Checks of whole models: QuantizeML's `quantize` and TFMOT's `quantize_apply`."""

import collections
import dataclasses
import glob
import json
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import presets
from qjax.affine import QSpec, scale_shape
from qjax.presets import FUNCTIONS
from qjax.quantizers import tensorflow as tf
from qjax.schemes.patterns import Site
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.conformance import keras_models as keras
from tests.conformance.examples import described, draw
from tests.conformance.keras_models import Layer


def _check_close(got, wanted, rate):
    """Up to a rate of the largest value: float sums have another order upstream."""
    assert np.shape(got) == np.shape(wanted)
    off = np.max(np.abs(np.float64(got) - np.float64(wanted)), initial=0.0)
    assert off <= rate * np.max(np.abs(wanted), initial=1e-6)


# QuantizeML.


def qml_quantize(case, arrays):
    p, advisory = case["params"], case.get("advisory", "")
    is_sanitized = any(name.startswith("sanitized_weights/") for name in arrays)
    layers, prefix = keras.read_layers(p["float_config"]), "float_weights"
    if is_sanitized:  # BatchNorm is folded, and the like.
        kinds = dict(p["sanitized_layers"])
        layers = keras.read_layers(p["quantized_config"], kinds)
        prefix = "sanitized_weights"
    fn, params = keras.build(layers), keras.read_params(arrays, prefix, layers)
    samples = arrays["samples"]
    _check_close(fn(params, arrays["x"]), arrays["y_float_model"], 1e-4)
    if "invalid" in advisory:  # Swallowed there.
        with pytest.raises(ValueError, match="q_config" if p["q_config"] else "bit"):
            _quantize(p, fn, params, samples)
        return
    qmodel, said = _quantize(p, fn, params, samples)
    assert all("saturate" in text for text in said)
    assert said or "saturate the" not in advisory
    schedule = {name: p[name] for name in ("num_samples", "batch_size", "epochs")}
    qstate = qjax.calibrate(qmodel, params, samples=samples, **schedule)
    config = qjax.dump_config(qmodel, qstate)
    assert config == p["dump_config"]
    assert json.loads(json.dumps(config)) == config
    again, _ = _quantize({**p, "q_config": config}, fn, params, samples)
    assert qjax.dump_config(again) == config
    _check_ranges(qmodel, qstate, arrays)


def _quantize(p, fn, params, *inputs):
    """The model quantized as a case says, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qjax.quantize_model(
            fn,
            params,
            *(x[:2] for x in inputs),
            qparams=qjax.QuantizationParams.from_dict(p["qparams"]),
            q_config=p["q_config"],
            quantize_until=p.get("quantize_until"),
        )
    return qmodel, [str(warning.message) for warning in caught]


def _check_ranges(qmodel, qstate, arrays):
    """The ranges by layer, as they are before cross-layer equalization."""
    found = {
        site.layer: np.ravel(qstate[site.name].high)
        for site, *_ in qmodel.calibrated()
        if site.op != "input"
    }
    prefix = "calibrated_range_max/"
    wanted = {n.removeprefix(prefix): a for n, a in arrays.items() if prefix in n}
    assert set(found) == set(wanted)
    for layer, most in wanted.items():
        _check_close(found[layer], np.ravel(most), 1e-5)


def qml_quantize_error(case, arrays):
    """A name that no layer has is an error here too; all else works."""
    p, samples = case["params"], arrays["samples"]
    layers = keras.read_layers(p["float_config"])
    fn, params = keras.build(layers), keras.random_params(layers, samples[:2])
    asked = {*(p["q_config"] or ()), *filter(None, [p.get("quantize_until")])}
    unknown = asked - {layer.name for layer in layers}
    if unknown:
        with pytest.raises(ValueError, match="|".join(map(re.escape, unknown))):
            _quantize(p, fn, params, samples)
        return
    qmodel, _ = _quantize(p, fn, params, samples)
    _check_kernels(qmodel, params)
    qstate = qjax.calibrate(qmodel, params, [samples])
    bits = (p["qparams"][f"{name}_bits"] for name in ("weight", "activation"))
    rate = 0.03 * 2.0 ** (8 - min(bits))
    _check_close(qmodel.apply(params, qstate, samples), fn(params, samples), rate)


def _check_kernels(qmodel, params):
    """No weight of a product stays float."""
    words = {site.name: qmodel.scheme.spec(site) for site in qmodel.sites}
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = "/".join(key.key for key in path)
        assert not name.endswith("kernel") or words.get(name) is not None, name


def _check_works(example, rate=0.05, **options):
    """All kernels are quantized; values and gradients are those of the float model."""
    fn, params, inputs = example
    qmodel = qjax.quantize_model(fn, params, *inputs, **options)
    _check_kernels(qmodel, params)
    if all(np.issubdtype(x.dtype, np.integer) for x in inputs):
        assert qmodel.sites[0].op == "embedding"  # Nothing before it is real.
    qstate = qjax.calibrate(qmodel, params, [inputs])
    exact = fn(params, *inputs)
    _check_close(qmodel.apply(params, qstate, *inputs), exact, rate)

    def loss(params):
        y, _ = qmodel.apply_and_update(params, qstate, *inputs)
        return jnp.mean(y**2)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.all(np.isfinite(leaf))
    return qmodel


def tfmot_unsupported(case, arrays):
    """TFMOT's scheme works, or says which part of the model it cannot quantize."""
    words = case["params"]["case"]
    whole = presets.tfmot_all_values()  # Not -6 to 6, which clips until trained.
    scheme = dataclasses.replace(presets.tfmot_int8(), calibrator=whole)
    example = described(words)
    try:
        _check_works(example, scheme=scheme)
    except (NotImplementedError, ValueError) as error:
        # No rule reaches a weight inside of a loop over time: an error says so.
        is_loop = "scan" in str(
            jax.make_jaxpr(example.fn)(example.params, *example.inputs)
        )
        if not is_loop or "scan" not in str(error):
            raise


# TFMOT.


def tfmot_quantizer_error(case, arrays):
    """A range per channel of any rank and any calibrator, which raises there."""
    p = case["params"]
    signs = {"neg": lambda x: -np.abs(x), "pos": np.abs}.get(p["mode"], np.asarray)
    batches = [signs(draw(*p["shape"], seed=k)) for k in range(4)]
    axis = -1 if p["per_axis"] else None
    symmetric = {"symmetric": p["symmetric"], "narrow_range": p["narrow_range"]}
    word = QSpec(p["num_bits"], False, p["narrow_range"], axis=axis)
    if not 2 <= p["num_bits"] <= 16:
        with pytest.raises(ValueError, match=r"2\.\.16"):
            tf.fake_quant_vars(batches[0], -1.0, 1.0, word)
        return
    spec = QSpec(p["num_bits"], axis=axis, **symmetric)
    calibrator = {
        "AllValuesQuantizer": qjax.min_max(tf.tfmot_range),
        "LastValueQuantizer": qjax.last_value(tf.tfmot_range),
        "MovingAverageQuantizer": qjax.ema_min_max(0.999, (-6, 6), tf.tfmot_range),
    }[p["quantizer"]]
    state = calibrator.init(batches[0], spec)
    low, high = _first_range(p)
    for x in batches:
        state = jax.jit(lambda x, s: calibrator.update(x, s, spec))(x, state)
        low, high = _next_range(p, x, low, high)
        for got, wanted in ((state.low, low), (state.high, high)):
            assert got.shape == scale_shape(x.shape, axis)
            np.testing.assert_allclose(np.ravel(got), np.ravel(wanted), rtol=1e-5)
        fake_quant = tf.fake_quant_per_channel if p["per_axis"] else tf.fake_quant_vars
        y = np.float64(fake_quant(jnp.asarray(x), state.low, state.high, word))
        least, most = (np.reshape(end, state.low.shape) for end in (low, high))
        step = (most - least) / float(word.qmax - word.qmin)
        off = np.abs(y - np.clip(x, least - step / 2, most + step / 2))
        assert np.all(off <= 1.001 * step + 1e-6)
        codes = y / step
        assert np.all(np.abs(codes - np.round(codes)) < 1e-2)


def _first_range(p):
    return {"AllValuesQuantizer": (0.0, 0.0)}.get(p["quantizer"], (-6.0, 6.0))


def _next_range(p, x, low, high):
    """TFMOT's rules in float64."""
    over = tuple(range(x.ndim - 1)) if p["per_axis"] else None
    least, most = (np.float64(f(x, over)) for f in (np.min, np.max))
    if p["symmetric"]:
        levels = 2.0 ** p["num_bits"]
        ratio = 1.0 if p["narrow_range"] else (levels - 2) / levels
        least = np.minimum(least, -most / ratio)
        most = np.maximum(most, -least * ratio)
    least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
    if p["quantizer"] == "MovingAverageQuantizer":
        share = np.float64(np.float32(1.0 - 0.999))
        return low - (low - least) * share, high - (high - most) * share
    if p["quantizer"] == "AllValuesQuantizer":
        return np.minimum(low, least), np.maximum(high, most)
    return least, most


class Point(NamedTuple):
    """A quantizer of TFMOT."""

    layer: Layer
    site: Site | None  # Where it is here; None: its value has no site.
    stem: str  # Of its variables: "quant_c/kernel", before "_min:0" and "_max:0".
    weight: dict[str, Any] | None  # Options of the quantizer of a weight.


def tfmot_quantize_model(case, arrays):
    p, default = case["params"], presets.tfmot_int8()
    layers, params = _read_tfmot(p, arrays)
    fn, train = keras.build(layers), keras.build(layers, train=True)
    x = arrays["x"]
    _check_close(fn(params, x), arrays["y_float"], 1e-5)
    sites = qjax.quantize_model(train, params, x, scheme=default).sites
    points = [*_points(p["structure"], layers, sites)]
    _check_preset(default, sites, points)
    # Their choice of tensors, defects included, as rules: then the numbers are theirs.
    upstream = Scheme(rules=tuple(_upstream_rules(sites, points, arrays)))
    moved, qstate = _train(train, params, upstream, points, arrays, steps=1)
    for layer, name in _entries(arrays, "final/"):
        _check_close(moved[layer][name], arrays[f"final/{layer}/{name}:0"], 1e-4)
    shipped = qjax.quantize_model(fn, params, x, scheme=upstream)
    y = shipped.apply(moved, qstate, x)
    _check_steps(_last_step(shipped, moved, qstate), y, arrays["y_infer_after"])
    _check_untrained(shipped, params, x, arrays["y_infer_before"])
    # The preset rounds more weights and fewer activations.
    _train(train, params, default, [], arrays, steps=2)


def _read_tfmot(p, arrays):
    """Layers and parameters, separable convolutions split as TFMOT splits them."""
    layers = keras.read_layers(p["float_config"])
    params = keras.read_params(arrays, "w", layers)
    names = {layer.name for layer in layers}
    made = collections.defaultdict(list)
    for entry in p["structure"]:
        name = entry["name"].removeprefix("quant_")
        if entry["wrapper"] == "QuantizeWrapperV2" and name not in names:
            made[entry["layer"]].append(name)
    pairs = zip(made["DepthwiseConv2D"], made["Conv2D"], strict=True)
    return keras.split_separable(layers, params, pairs)


def _points(structure, layers, sites):
    """Yields the quantizers by their variables."""
    by_name = {layer.name: layer for layer in layers}
    inputs = [layer.name for layer in layers if layer.kind == "InputLayer"]
    weights = {site.name: site for site in sites}
    for entry in structure:
        options = {name: of for name, _, of in entry.get("weights", ())}
        stems = [v[0].removesuffix("_min:0") for v in entry["vars"] if "_min" in v[0]]
        for stem in stems:
            name = stem.rpartition("/")[2]
            if entry["wrapper"] == "QuantizeLayer":
                k = inputs.index(entry["inbound"][0])
                yield Point(by_name[inputs[k]], weights[f"input:{k}"], stem, None)
                continue
            layer = by_name[entry["name"].removeprefix("quant_")]
            if name in options:
                site = weights[f"{layer.name}/{name}"]
            else:
                site = _end_of(layer, name, by_name, sites)
            yield Point(layer, site, stem, options.get(name))


def _end_of(layer, stem, layers, sites):
    """The site where the value of a layer is made, or what goes into its function."""
    ends = [s for s in sites if s.role == "activation" and s.op != "input"]
    own = [site for site in ends if site.layer == layer.name]
    if not own:
        is_absorbed = layer.kind == "BatchNormalization"
        before = layers[layer.inputs[0]]
        return _end_of(before, "output", layers, sites) if is_absorbed else None
    if stem == "pre_activation":
        return own[0]
    after = [s for s in ends if s.op in FUNCTIONS and s.inputs == (own[-1].name,)]
    is_function = layer.config.get("activation") in FUNCTIONS
    return after[0] if is_function and own[-1].op not in FUNCTIONS else own[-1]


_PER_TENSOR = ("dense", "conv_transpose")
_KEEP_GRIDS = ("ReLU", "Activation", "UpSampling2D", "MaxPooling2D")


def _check_preset(scheme, sites, points):
    """Which tensors the preset quantizes, and how; their defects are not copied."""
    known = {point.site.name: point for point in points if point.site is not None}
    for point in points:
        if point.site is None:  # A relu takes a BatchNorm in; others move values.
            assert point.layer.kind in ("BatchNormalization", *_KEEP_GRIDS), point
    for site in sites:
        spec, calibrator = scheme.spec(site), scheme.site_calibrator(site)
        point = known.get(site.name)
        if site.role == "weight":
            # Also before a relu of its own layer; a depthwise kernel by channels.
            bits, axis = 8, None if site.op in _PER_TENSOR else -1
            if point is not None:
                assert point.weight["symmetric"] and point.weight["narrow_range"]
                bits = point.weight["num_bits"]
                axis = -1 if point.weight["per_axis"] else None
            assert spec == QSpec(bits, narrow_range=True, axis=axis), site
        elif site.feeds == ("concatenate",):
            assert spec is None, f"{site.name} is rounded twice"
        elif point is not None:
            of = presets.tfmot_moving_average()
            of = presets.tfmot_all_values() if site.op == "input" else of
            assert spec == QSpec(bits=8) and calibrator == of, site
        elif not set(site.feeds) <= {*FUNCTIONS}:  # Integer functions read codes.
            is_fixed = calibrator.name.startswith("constant")
            assert spec is None or is_fixed, f"{site.name} is quantized"


def _upstream_rules(sites, points, arrays):
    """A rule for each site: its quantizer, or none."""
    known = {point.site.name: point for point in points if point.site is not None}
    for site in sites:
        point, name = known.get(site.name), glob.escape(site.name)
        if point is None:
            yield Rule(name, None)
        elif point.weight is not None:
            is_one = arrays[f"state0/{point.stem}_min:0"].size == 1
            bits, axis = point.weight["num_bits"], None if is_one else -1
            yield Rule(name, QSpec(bits, narrow_range=True, axis=axis))
        elif site.op == "input":
            yield Rule(name, QSpec(bits=8), presets.tfmot_all_values())
        else:
            yield Rule(name, QSpec(bits=8), presets.tfmot_moving_average())


def _train(fn, params, scheme, points, arrays, *, steps):
    """Runs the training batches; returns the last parameters and state."""
    qmodel = qjax.quantize_model(fn, params, arrays["x"], scheme=scheme)
    qstate = qmodel.init(params, arrays["x"])
    step, found = jax.jit(qmodel.apply_and_update), []
    for k in range(sum(name.startswith("xb") for name in arrays)):
        (y, params), qstate = step(params, qstate, arrays[f"xb{k}"])
        found.append((y, qstate))
    size = steps * _last_step(qmodel, params, qstate)
    scales = qjax.scales(qmodel, params, qstate)
    for k, (y, state) in enumerate(found):
        _check_steps(size, y, arrays[f"y_train{k}"])
        for point in points:
            if point.site is not None:
                _check_state(point, scales, state, arrays, k)
    return params, qstate


def _check_state(point, scales, qstate, arrays, k):
    low, high = (arrays[f"state{k}/{point.stem}_{end}:0"] for end in ("min", "max"))
    scale = np.float64(scales[point.site.name].scale)
    if point.weight is not None:
        most = np.ravel(scale * (2 ** (point.weight["num_bits"] - 1) - 1))
        np.testing.assert_allclose(most, np.ravel(high), rtol=1e-6)
        np.testing.assert_allclose(-most, np.ravel(low), rtol=1e-6)
        return
    # A code at a tie moves the extreme of a batch by a step, which counts 1/1000.
    off = 0.0 if point.site.op == "input" else 1e-5 + 1e-3 * (k + 1) * scale
    state = qstate[point.site.name]
    assert np.abs(np.float64(state.low) - low) <= off, point.stem
    assert np.abs(np.float64(state.high) - high) <= off, point.stem


def _last_step(qmodel, params, qstate):
    """The step of the grid of the output; of what it is made of, if it has none."""
    scales = qjax.scales(qmodel, params, qstate)
    by_name = {site.name: site for site in qmodel.sites}
    ends = [s for s in qmodel.sites if s.role == "activation" and "return" in s.feeds]
    site = ends[-1]
    while site.name not in scales:
        site = by_name[site.inputs[-1]]
    return float(np.max(scales[site.name].scale))


def _check_steps(step, y, wanted):
    """Equal up to a step of a grid: a tie may fall to the other side."""
    off = np.abs(np.float64(y) - wanted)
    assert y.shape == wanted.shape and np.all(off <= 1.001 * step)


def _check_untrained(qmodel, params, x, wanted):
    """Their first range of the input is empty, so all is 0; here it is an error."""
    qstate = qmodel.init(params, x)
    with pytest.raises(ValueError, match="'input:0' has no range yet"):
        qmodel.apply(params, qstate, x)
    one = jnp.int32(1)
    for site, *_ in qmodel.calibrated():
        state = qstate[site.name]._replace(step=one)
        if site.op == "input":
            state = state._replace(low=jnp.float32(0), high=jnp.float32(1))
        qstate[site.name] = state
    y = qmodel.apply(params, qstate, np.zeros_like(x))
    _check_steps(_last_step(qmodel, params, qstate), y, wanted)


def _entries(arrays, prefix):
    """Pairs of a layer and a variable."""
    names = (n.removeprefix(prefix).removesuffix(":0") for n in arrays if prefix in n)
    return [name.split("/") for name in names]


CHECKS = {
    f.__name__: f
    for f in (
        qml_quantize,
        qml_quantize_error,
        tfmot_quantize_model,
        tfmot_quantizer_error,
        tfmot_unsupported,
    )
}
CHECKS["qml_quantize_legacy_0_12_1"] = qml_quantize
