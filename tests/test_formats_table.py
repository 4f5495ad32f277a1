"""Models of every kind in every format, each in the runtime that reads it.

A cell is 0, a count of codes that are off by few, or a refusal with its sentence. All
of it, and the table of the README:

python -m tests.test_formats_table
"""

import collections
import dataclasses

import jax
import pytest

import qjax
from qjax import presets, targets
from qjax.conformance import RUNTIMES, Outcome, conform
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
# Target and model -> why it is not lowered for TFLite's kernels.
NOT_FOR_TFLITE = {
    ("tflite", "attention"): "LayerNorm",
    ("tflite_micro", "attention"): "LayerNorm",
    ("tflite_micro", "lstm"): "gates `targets.tflite_micro` rounds otherwise",
}
TFLITE_SCHEMES = ("channel", "tensor", "4 bits", "2 bits")


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
    """Checks every cell of a model in the runtimes that are here, and returns them."""
    found = conform(program, x, [RUNTIMES[name] for name in runtimes])
    for row in found.rows:
        if row.status == "not installed":
            continue
        sentence = REFUSED.get((row.runtime, model))
        if sentence is not None and (model != "residual" or scheme != POWERS):
            assert row.status == "refused" and sentence in row.reason, row
            continue
        assert row.status == "compared", row
        assert row.comparison.codes, row
        most = 0 if scheme == POWERS else CLOSE.get(row.runtime, 0)
        assert row.comparison.max_difference <= most, row
    return found.rows


FEW = ("c-gcc", "onnx")


@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_formats_of_its_own_rounding(model):
    program, x = program_of(model, qjax.Scheme(**SCHEMES["channel"]))
    check(program, x, model, FEW)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_grids_of_powers_of_two(model):
    program, x = program_of(model, qjax.Scheme(**SCHEMES[POWERS]))
    check(program, x, model, ("onnx-qdq", "onnx-qlinear"), POWERS)


def check_native(model, scheme):
    program, x = program_of(model, qjax.Scheme(**SCHEMES[scheme]))
    return check(program, x, model, NATIVE, scheme)


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_all_formats_of_its_own_rounding(model, scheme):
    check_native(model, scheme)


def tflite_scheme(scheme, lstm=False):
    """The scheme of TFLite's integers, with the weights of one of the table."""
    return dataclasses.replace(
        presets.tflite_int8(same_scales=True, lstm=lstm),
        weights=SCHEMES[scheme]["weights"],  # An LSTM keeps the words of its kernel.
    )


def check_tflite(model, scheme, runtimes):
    """Checks a model in TFLite's runtimes, each with the target that it computes."""
    scheme = tflite_scheme(scheme, lstm=model == "lstm")
    is_micro = lambda name: name == "tflite-micro"  # It rounds dense layers twice.
    rows = []
    for target in (targets.tflite, targets.tflite_micro):
        wanted = target is targets.tflite_micro
        own = [name for name in runtimes if is_micro(name) == wanted]
        sentence = NOT_FOR_TFLITE.get((target.name, model))
        if own and sentence is not None:
            with pytest.raises(NotImplementedError) as caught:
                program_of(model, scheme, target)
            assert sentence in str(caught.value)
            reason = {"status": "refused", "reason": str(caught.value)}
            rows += [Outcome(name, **reason) for name in own]
        elif own:
            rows += check(*program_of(model, scheme, target), model, own)
    return rows


@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_tflites_arithmetic(model):
    check_tflite(model, "channel", ("litert",))


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", TFLITE_SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_tflites_arithmetic_in_all_its_runtimes(model, scheme):
    check_tflite(model, scheme, TFLITE)


def cell(rows):
    """What the schemes of a model give in a runtime: refused, 0, codes that differ."""
    compared = [row.comparison for row in rows if row.status == "compared"]
    if not compared:
        return rows[0].status
    off = sum(c.codes - c.equal for c in compared)
    most = max(c.max_difference for c in compared)
    text = f"{off} of {sum(c.codes for c in compared)}, by {most}" if off else "0"
    refused = len(rows) - len(compared)
    return f"{text}; {refused} of {len(rows)} refused" if refused else text


def table():
    """Checks everything, and yields the lines of the table of the README."""
    found = collections.defaultdict(list)
    for model in MODELS:
        rows = [row for scheme in SCHEMES for row in check_native(model, scheme)]
        for scheme in TFLITE_SCHEMES:
            rows += check_tflite(model, scheme, TFLITE)
        for row in rows:
            found[row.runtime, model].append(row)
    yield f"| runtime | {' | '.join(MODELS)} |"
    yield "|---" * (1 + len(MODELS)) + "|"
    for name in (*NATIVE, *TFLITE):
        cells = (cell(found[name, model]) for model in MODELS)
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"):
        for line in table():
            print(line, flush=True)
