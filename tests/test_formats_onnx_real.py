"""Programs as ONNX of real values, and as Quant nodes, in their runtimes."""

import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax

import qjax
from qjax.affine import QSpec
from qjax.conformance import RUNTIMES, conform
from qjax.formats.onnx import write_onnx_qdq
from qjax.formats.qonnx import write_qonnx
from tests.models import images

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    # Of protobuf's and NumPy's, in packages that runtimes import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    # OpenVINO counts processors in another process.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]
X = images(3, 4, 4, 2)
PARAMS = {"w": images(2, 2, seed=1), "k": images(3, 3, 2, 4, seed=2)}


def average(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4


def conv(params, x):
    numbers = "NHWC", "HWIO", "NHWC"
    y = lax.conv_general_dilated(
        x, params["k"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return jax.nn.relu(y)


# Name -> a function whose requantizers stand behind more than products with kernels.
FUNCTIONS = {
    "an average": lambda p, x: average(jnp.tanh(x)),
    "a gate": lambda p, x: x * jax.nn.sigmoid(x @ p["w"]),
    "a join": lambda p, x: jnp.concatenate([x, 10 * x @ p["w"]], -1) * 2.0,
    "a product": lambda p, x: jnp.einsum("bijc,bikc->bijk", x, jnp.abs(x)),
    "a comparison": lambda p, x: jnp.where(x @ p["w"] > x, x, 0.0),
    "a sum of squares": lambda p, x: (x * x).sum(-1),
}


def lowered(function, **own):
    scheme = qjax.Scheme(**own)
    model = qjax.quantize_model(function, PARAMS, X, scheme=scheme)
    state = qjax.calibrate(model, PARAMS, [X], progress=False)
    return qjax.lower(model, PARAMS, state, X)


def check(program, *runtimes):
    """Each runtime that is here has the codes of the oracle, one beside at most."""
    found = conform(program, 1.5 * X, [RUNTIMES[name] for name in runtimes])
    for row in found.rows:
        if row.status == "not installed":
            continue
        assert row.status == "compared" and row.comparison.codes, row
        assert row.comparison.max_difference <= 1, row


@pytest.mark.parametrize("name", FUNCTIONS)
def test_requantizers_and_comparisons_need_no_int64(name):
    program = lowered(FUNCTIONS[name])
    own = onnx.load_model_from_string(write_onnx_qdq(program))
    kinds = {node.op_type for node in own.graph.node}
    assert not kinds & {"BitShift", "BitwiseAnd", "Mod"}
    check(program, "onnx-qdq", "openvino")


def test_what_needs_int64_is_refused_for_openvino():
    program = lowered(lambda p, x: jax.nn.softmax(x @ p["w"]))
    row = conform(program, X, [RUNTIMES["openvino"]]).rows[0]
    if row.status != "not installed":
        assert row.status == "refused" and "has BitShift of int64" in row.reason
    check(program, "onnx-qdq")


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_activations_of_other_words(bits):
    function = lambda p, x: x + jnp.tanh(x @ p["w"])
    check(lowered(function, activations=QSpec(bits)), "onnx-qdq", "openvino")


@pytest.mark.parametrize("axis", [None, "output"])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_of_convolutions_are_int4(bits, axis):
    program = lowered(conv, weights=QSpec(bits, narrow_range=True, axis=axis))
    own = onnx.load_model_from_string(write_onnx_qdq(program))
    kinds = {array.data_type for array in own.graph.initializer}
    assert onnx.TensorProto.INT4 in kinds and own.opset_import[0].version == 21
    check(program, "onnx-qdq", "openvino")


@pytest.mark.skipif(importlib.util.find_spec("qonnx") is None, reason="without qonnx")
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_are_clipped_onto_another_grid(bits):
    program = lowered(lambda _, x: average(x), activations=QSpec(bits, symmetric=True))
    clip = next(n for n in program.graph.nodes if n.operation == "clip")
    pair = [program.graph.values[v].grid for v in (clip.inputs[0], clip.output)]
    assert pair[0].scale != pair[1].scale
    check(program, "qonnx-quant", "qonnx")


def point(x, scale, zero):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(zero))
    return qjax.fake_quant(x, grid, QSpec(8))


W = np.random.default_rng(3).integers(-127, 128, (8, 8)).astype(np.float32) / 64
# Name -> a function of values on grids, and the scale of its result.
ON_GRIDS = {
    "a sum": (lambda x, y: x + y, 1 / 4),
    "a sum of three": (lambda x, y: x + y + x, 1 / 4),
    "a difference": (lambda x, y: x - y, 1 / 4),
    "a sum behind an activation": (lambda x, y: jax.nn.relu(x + y), 1 / 4),
    "another grid": (lambda x: x, 1 / 4),
    "a product": (lambda x, y: x * y, 2.0),
    "a product of matrices": (lambda x, y: x @ y, 4.0),
    "a product with a kernel": (lambda x: x @ point(W, 1 / 64, 0), 1.0),
    "a mean": (lambda x: x.mean(1), 1 / 4),
}


@pytest.mark.parametrize("name", ON_GRIDS)
def test_no_code_differs_on_grids_of_powers_of_two(name):
    """At each level of ONNX Runtime's fusions, ties about odd zero points too."""
    fn, scale = ON_GRIDS[name]
    rng, count = np.random.default_rng(1), len(inspect.signature(fn).parameters)
    xs = [rng.integers(-300, 300, (8, 8)).astype(np.float32) / 16 for _ in range(count)]
    grids = (1 / 16, 3), (1 / 8, -5)
    levels = onnxruntime.GraphOptimizationLevel
    for zero in (-3, 0, 4, 7):
        on = lambda xs: map(lambda x, grid: point(x, *grid), xs, grids)
        whole = lambda *xs, zero=zero, on=on: point(fn(*on(xs)), scale, zero)
        program = qjax.lower(whole, *xs)
        wanted, data = np.asarray(program(*xs)), write_onnx_qdq(program)
        assert len(np.unique(wanted)) > 4
        for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = level
            run = onnxruntime.InferenceSession(data, options)
            given = zip((own.name for own in run.get_inputs()), xs, strict=True)
            np.testing.assert_array_equal(run.run(None, dict(given))[0], wanted)


def test_values_without_elements_are_refused_by_qonnx():
    program = lowered(lambda p, x: (x @ p["w"])[..., :0])
    with pytest.raises(ValueError, match="`slice` at .*: a value of no elements"):
        write_qonnx(program)
    assert conform(program, X, [RUNTIMES["onnx"]]).is_exact
    assert np.prod(program.graph.values[program.graph.outputs[0]].shape) == 0
