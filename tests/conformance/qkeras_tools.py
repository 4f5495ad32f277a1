"""Checks of what QKeras's tools make of layers: tables, conversions and exports."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import quantizers, training
from qjax.layers.hardware import hardware_tensor
from qjax.layers.qkeras import (
    kernel_word,
    largest_value,
    quantized_initializer,
)
from qjax.layers.qkeras_models import KerasLayer, converted_layers
from tests.conformance import qkeras_qtools
from tests.conformance.nearness import check_near


def _json(case):
    """The rows of a case in JSON."""
    name = case.get("json") or case["file"]
    return json.loads((pathlib.Path(case["folder"]) / name).read_text())


def alpha_override(case, arrays):
    """What a layer does to the quantizer of its kernel."""
    for row in _json(case):
        assert set(row) == {"spec", "alpha", "symmetric"}
        spec = quantizers.parse(row["spec"])
        if getattr(spec, "threshold", None) is not None:
            with pytest.raises(ValueError, match="threshold"):  # QKeras's call asserts.
                kernel_word(spec)
            continue
        found = kernel_word(spec)
        assert getattr(found, "alpha", "absent") == row["alpha"], row
        if row["symmetric"] is not None:
            assert found.symmetric == bool(row["symmetric"]), row


def noise_schedule(case, arrays):
    for row in _json(case):
        assert set(row) == {"start", "finish", "exponent", "factor"}
        schedule = training.qnoise_schedule(
            row["start"], row["finish"], exponent=row["exponent"]
        )
        found = [float(schedule(t)) for t in range(len(row["factor"]))]
        check_near(found, row["factor"], 1e-5, 1e-6, str(row))


def initializer(case, arrays):
    fields = "spec base_std delta scale_after clip_min clip_max abs_max".split()
    for k, row in enumerate(_json(case)):
        assert set(row) == set(fields), row
        base, wanted = arrays[f"base_{k}"], arrays[f"init_{k}"]
        draw = lambda key, *_, base=base: jnp.asarray(base)
        init = jax.jit(quantized_initializer(draw, row["spec"]))
        found = init(jax.random.key(0))
        check_near(found, wanted, 1e-4, 1e-5, row["spec"])
        assert largest_value(quantizers.parse(row["spec"])) == row["clip_max"]


TABLES = {
    "_set_trainable_parameter": alpha_override,
    "QNoiseScheduler.calculate_qnoise_factor": noise_schedule,
    "QInitializer/Clip": initializer,
}


def table(case, arrays):
    check = TABLES.get(case["fn"]) or qkeras_qtools.table_check(case["fn"])
    if check is None:
        pytest.skip(f"nothing here is {case['fn']}")
    check(case, arrays)


def export(case, arrays):
    """Integers of the models of `model_forward`, whose weights they are."""
    index = json.loads((pathlib.Path(case["folder"]) / "index.json").read_text())
    models = {
        c["id"]: c["params"]["model"]
        for c in index["cases"]
        if c["kind"] == "model_forward"
    }
    for name in case["params"]["models"]:
        layers = {
            p["name"]: (cls, p) for cls, p, *_ in models[f"forward_{name}"]["layers"]
        }
        for layer, keys in _json(case)[name].items():
            assert set(keys) <= {*"enable_bn_fusing signs scales weights".split()} | {
                *"mult_factor pool_area q_mult_factor".split()
            }
            cls, p = layers[layer]
            if "mult_factor" in keys:
                _check_pool(arrays, f"{name}.{layer}", p)
                continue
            texts = [p.get("kernel_quantizer", p.get("depthwise_quantizer"))]
            texts.append(p.get("bias_quantizer"))
            for k, text in enumerate(texts):
                if f"{name}.{layer}.float.{k}" in arrays:
                    word = kernel_word(text) if k == 0 else text
                    _check_tensor(arrays, f"{name}.{layer}", k, word)


def _check_pool(arrays, start, p):
    factor = arrays[f"{start}.mult_factor"]
    found = hardware_tensor(factor, p["average_quantizer"])
    check_near(found.value, arrays[f"{start}.q_mult_factor"], 1e-6, 0)
    check_near(found.codes * found.scale, found.value, 0, 0)


def _check_tensor(arrays, start, k, word):
    found = hardware_tensor(arrays[f"{start}.float.{k}"], word)
    after, hardware = arrays[f"{start}.model_after.{k}"], arrays[f"{start}.weights.{k}"]
    check_near(found.value, after, 1e-6, 1e-7, start)
    if f"{start}.signs.{k}" in arrays:
        np.testing.assert_array_equal(found.exponents, hardware)
        np.testing.assert_array_equal(found.signs, arrays[f"{start}.signs.{k}"])
        check_near(found.signs * 2.0**found.exponents, after, 0, 0, start)
        return
    check_near(found.codes * found.scale, after, 1e-6, 1e-7, start)
    if f"{start}.scales.{k}" not in arrays:
        check_near(found.value, hardware, 1e-6, 1e-7, start)
    else:  # There the tensor holds the scale that stands beside it.
        unit = arrays[f"{start}.scales.{k}"]
        check_near(unit, np.broadcast_to(found.scale, unit.shape), 1e-6, 0, start)
        ratio = np.unique(hardware[after != 0] / after[after != 0])
        assert ratio.size == 1 and np.log2(ratio[0]) == np.rint(np.log2(ratio[0]))


def convert(case, arrays):
    """What `model_quantize` makes of a model; `float_model` lacks its activations."""
    found = _json(case)
    assert set(found) == {"float_model", "runs"}
    activations = _activations(found)
    layers = [KerasLayer(n, c, activations.get(n)) for c, n in found["float_model"]]
    for run in found["runs"]:
        assert set(run) == {"config", "bits", "fold", "adaptive", "layers"}
        got = converted_layers(
            layers,
            run["config"],
            run["bits"],
            folds=run["fold"],
            prefers_adaptive=run["adaptive"],
        )
        assert [x.name for x in got] == [x["name"] for x in run["layers"]]
        for own, wanted in zip(got, run["layers"], strict=True):
            assert set(wanted) <= {"name", "cls", "quantizers", "activation"}
            assert own.cls == wanted["cls"], wanted
            if "quantizers" in wanted:
                words = [None if w is None else _same(w) for w in wanted["quantizers"]]
                assert [*own.quantizers] == words, wanted
            if wanted.get("activation", "linear") != "linear":
                assert own.activation == _same(wanted["activation"]), wanted
            elif "activation" in wanted:
                assert own.activation in (None, "linear"), wanted


def _activations(found):
    """Keras's activations, as the layers that stay in float in some run have them."""
    rows = [x for run in found["runs"] for x in run["layers"] if "activation" in x]
    known = {
        x["name"]: x["activation"] for x in rows if "quantized" not in x["activation"]
    }
    for run in found["runs"]:  # Those that no run leaves: by the rule that took them.
        for x in run["layers"]:
            rules = run["config"].get(x["cls"])
            if x["name"] not in known and isinstance(rules, dict) and "activation" in x:
                for function, text in rules.items():
                    if "quantized" in text and _same(text) == _same(x["activation"]):
                        known[x["name"]] = function
    return known


def _same(text):
    """A quantizer by its text, symmetric where QKeras made its scale automatic."""
    if "(" not in text:
        return text
    spec = quantizers.parse(text)
    is_automatic = isinstance(getattr(spec, "alpha", None), str)
    return kernel_word(spec) if is_automatic else spec


CHECKS = {f.__name__: f for f in (convert, export, table)}
