"""Models of every kind in every format, each in the runtime that reads it.

A cell is 0, a count of codes that are off by few, or a refusal with its sentence; the
table of the README is these.
"""

import dataclasses

import jax
import pytest

import qjax
from qjax import presets, targets
from qjax.conformance import RUNTIMES, conform
from tests.format_models import MODELS, SCHEMES
from tests.models import images

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    # Of protobuf's and NumPy's, in packages that runtimes import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
NATIVE = ("stablehlo", "c-gcc", "c-clang", "onnx", "onnx-qlinear", "onnx-qdq")
NATIVE += ("qonnx", "qonnx-quant")
TFLITE = ("litert", "tflite-micro", "litert-xnnpack")
# Runtime -> most codes by which an output may differ; 0 for all others. XNNPACK rounds
# by another rule, a code a layer.
CLOSE = {"onnx-qlinear": 1, "onnx-qdq": 1, "qonnx-quant": 1, "litert-xnnpack": 2}
POWERS = "powers of two"  # The scheme whose factors float32 holds: all are 0.
# Runtime and model -> what is not expressed, with scales that are no powers of two.
REFUSED = {
    ("qonnx", "residual"): "scales that are no small multiples of each other",
    ("qonnx", "lstm"): "`loop` at",
    ("qonnx", "attention"): "`norm` at",
    ("qonnx-quant", "lstm"): "`loop` at",
    ("qonnx-quant", "attention"): "`norm` at",
}
# Model -> why it is not lowered for TFLite's kernels.
NOT_FOR_TFLITE = {"lstm": "`loop`", "attention": "LayerNorm"}


def program_of(model, scheme, target=targets.half_even):
    """A program of a model with some parameters, and real inputs beyond its range."""
    net, shape = MODELS[model]
    x = images(*shape)
    params = jax.jit(net.init)(jax.random.key(0), x)
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape)
    params = jax.tree.map(move, params)
    qmodel = qjax.quantize_model(net.apply, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    program = qjax.lower(qmodel, params, qstate, x, target=target)
    return program, 1.5 * images(*shape, seed=4)


def check(program, x, model, runtimes, scheme=""):
    """Every cell of a model, in runtimes that are here."""
    found = conform(program, x, [RUNTIMES[name] for name in runtimes])
    for row in found.rows:
        if row.status == "not installed":
            continue
        sentence = REFUSED.get((row.runtime, model))
        if sentence is not None and row.status == "refused":
            assert sentence in row.reason, row
            continue
        assert row.status == "compared", row
        assert row.comparison.codes, row
        most = 0 if scheme == POWERS else CLOSE.get(row.runtime, 0)
        assert row.comparison.max_difference <= most, row


FEW = ("c-gcc", "onnx")


@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_formats_of_its_own_rounding(model):
    program, x = program_of(model, qjax.Scheme(**SCHEMES["channel"]))
    check(program, x, model, FEW)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_grids_of_powers_of_two(model):
    program, x = program_of(model, qjax.Scheme(**SCHEMES[POWERS]))
    check(program, x, model, ("onnx-qdq", "onnx-qlinear"), POWERS)


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_all_formats_of_its_own_rounding(model, scheme):
    program, x = program_of(model, qjax.Scheme(**SCHEMES[scheme]))
    check(program, x, model, NATIVE, scheme)


def tflite_scheme(name):
    scheme = presets.tflite_int8(same_scales=True)
    return dataclasses.replace(scheme, weights=SCHEMES[name]["weights"])


def check_tflite(model, scheme, runtimes):
    if model in NOT_FOR_TFLITE:
        with pytest.raises((NotImplementedError, ValueError)) as caught:
            program_of(model, tflite_scheme(scheme), targets.tflite)
        assert NOT_FOR_TFLITE[model] in str(caught.value)
        return
    program, x = program_of(model, tflite_scheme(scheme), targets.tflite)
    exact = [name for name in runtimes if name != "tflite-micro"]
    check(program, x, model, exact)
    if "tflite-micro" in runtimes:  # It rounds dense layers twice.
        program, x = program_of(model, tflite_scheme(scheme), targets.tflite_micro)
        check(program, x, model, ("tflite-micro",))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_tflites_arithmetic(model):
    check_tflite(model, "channel", ("litert",))


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", ["channel", "tensor", "4 bits", "2 bits"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_tflites_arithmetic_in_all_its_runtimes(model, scheme):
    check_tflite(model, scheme, TFLITE)
