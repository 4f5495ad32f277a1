"""Programs as QONNX in QONNX's own executor, and read back."""

import warnings

import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import qjax
from qjax.formats.qonnx import read_qonnx, write_qonnx, write_qonnx_quant
from qjax.formats.qonnx.staircases import jumps, monotone
from tests.models import images
from tests.onnx_cases import MODELS, codes_of, drawn, lowered, oracle, reals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
REFUSED = {
    ("residual", "8 bits"): "`add` at .*no small multiples",
    ("recurrent", "8 bits"): "`loop` at",
    ("attention", "8 bits"): "`norm` at",
    ("recurrent", "8 bits, powers of two"): "`loop` at",
    ("attention", "8 bits, powers of two"): "`norm` at",
}
QUANT_REFUSED = {
    ("upsampled", "8 bits"): "`table` at .*no function of ONNX",
    ("upsampled", "8 bits, powers of two"): "`table` at .*no function of ONNX",
}
LIGHT = ("mlp", "cnn", "residual", "upsampled", "recurrent")
CASES = [
    (m, s)
    if m in LIGHT and s == "8 bits"
    else pytest.param(m, s, marks=[pytest.mark.heavy])
    for m in MODELS
    for s in ("8 bits", "8 bits, powers of two")
]


def run(data, inputs):
    """What QONNX's executor computes."""
    proto = onnx.load_model_from_string(data)
    onnx.checker.check_model(proto)
    model = ModelWrapper(proto).transform(InferShapes())
    names = [x.name for x in model.graph.input]
    given = (np.asarray(x, np.float32) for x in inputs)
    found = execute_onnx(model, dict(zip(names, given, strict=True)))
    return [found[x.name] for x in model.graph.output]


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_thresholds_give_the_codes_of_the_oracle(model, scheme):
    program = lowered(model, scheme)
    if message := REFUSED.get((model, scheme)):
        with pytest.raises(ValueError, match=f"(?s){message}.*can\\."):
            write_qonnx(program)
        return
    for size in (1, 3):
        codes = drawn(program, size)
        found = run(write_qonnx(program, batch_size=size), codes)
        for x, wanted in zip(found, oracle(program, codes), strict=True):
            np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_quant_nodes_give_codes_within_one(model, scheme):
    """With powers of two none differs."""
    program = lowered(model, scheme)
    refused = {**REFUSED, **QUANT_REFUSED}
    refused.pop(("residual", "8 bits"))
    if message := refused.get((model, scheme)):
        with pytest.raises(ValueError, match=f"(?s){message}.*can\\."):
            write_qonnx_quant(program)
        return
    graph = program.graph
    ends = [[graph.values[v] for v in vs] for vs in (graph.inputs, graph.outputs)]
    most = 0 if "two" in scheme else 1
    for size in (1, 3):
        codes = drawn(program, size)
        data = write_qonnx_quant(program, batch_size=size)
        found = codes_of(run(data, reals(codes, ends[0])), ends[1])
        for x, wanted in zip(found, oracle(program, codes), strict=True):
            assert np.abs(x - wanted).max() <= most


def test_files_read_back_are_the_same_program():
    """By the package's own reader: thresholds on codes, Quant nodes on real values."""
    program = lowered("mlp", "2 bits on 4 bits")
    codes = drawn(program, 3)
    (wanted,) = oracle(program, codes)
    word = qjax.QSpec(4, signed=program.graph.values[0].low < 0)
    grid = qjax.QParams(jnp.float32(1), jnp.int32(0)), word
    read = read_qonnx(write_qonnx(program), input_grid=grid)
    again = qjax.lower(read, *read.inputs)
    found = again(*(q.astype(np.float32) for q in codes))
    np.testing.assert_array_equal(found, wanted)
    read = read_qonnx(write_qonnx_quant(program))
    again = qjax.lower(read, *read.inputs)
    own = [program.graph.values[v] for v in program.graph.inputs]
    ends = [program.graph.values[v] for v in program.graph.outputs]
    found = codes_of([again(*reals(codes, own))], ends)
    np.testing.assert_array_equal(found[0], wanted)


def test_types_of_tensors_are_those_of_their_integers():
    proto = onnx.load_model_from_string(write_qonnx(lowered("mlp", "2 bits on 4 bits")))
    found = {
        a.tensor_name: a.quant_parameter_tensor_names[0].value
        for a in proto.graph.quantization_annotation
    }
    kernels = [name for name in found if name.startswith("kernel")]
    assert {found[name] for name in kernels} == {"INT2"}
    assert found["input_0"] == "INT4"


def test_long_sums_are_refused_and_nothing_is_written(tmp_path):
    point = lambda x: qjax.fake_quant(
        x, qjax.QParams(jnp.float32(1 / 16), jnp.int32(0)), qjax.QSpec(8)
    )
    kernel = np.full((2000, 2), 7.9, np.float32)
    program = qjax.lower(lambda x: point(point(x) @ point(kernel)), images(1, 2000))
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="(?s)more than 24 bits.*write_onnx`.* can"):
        write_qonnx(program, path)
    assert not list(tmp_path.iterdir())


def staircase(steps, x):
    """The definition: ups less downs that are not above."""
    count = lambda cuts: (cuts[:, None] <= x[..., None]).sum(-1)
    return steps.base + count(steps.up) - count(steps.down)


def test_staircases_are_the_functions():
    x = np.stack([np.arange(-50, 51)] * 3)
    gain = np.array([[0.3], [-0.21], [0.0]])
    ends = np.full((3, 1), -50), np.full((3, 1), 50)
    own = lambda x: np.clip(np.rint(x * gain), -9, 7).astype(np.int64)
    np.testing.assert_array_equal(staircase(monotone(own, *ends), x), own(x))
    places = np.array([[-20, 3, 3], [-60, 0, 40], [1, 2, 70]])
    values = np.array([[4, -2, 5, 5], [0, 1, 0, 9], [7, 7, 0, 1]])
    wanted = np.stack(
        [
            v[np.searchsorted(p, row, side="right")]
            for p, v, row in zip(places, values, x, strict=True)
        ]
    )
    found = staircase(jumps(places, values, ends[1]), x)
    np.testing.assert_array_equal(found, wanted)


def dense_program(*, is_twice=False):
    """A program of two layers with powers of two; its output once or twice."""

    def fn(p, x):
        y = jnp.maximum(x @ p, 0) @ p.T
        return (y, y, y * 0.5) if is_twice else y

    p, x = images(6, 5), images(4, 6, seed=2)
    own = {"power_of_two": True, "symmetric": True}
    scheme = qjax.Scheme(
        qjax.QSpec(6, narrow_range=True, axis=None, **own), qjax.QSpec(8, **own)
    )
    qmodel = qjax.quantize_model(fn, p, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, p, [x], progress=False)
    return qjax.lower(qmodel, p, qstate, x)


def test_outputs_are_results_of_operators_also_where_one_is_read_twice():
    program = dense_program(is_twice=True)
    data = write_qonnx_quant(program, batch_size=4)
    proto = onnx.load_model_from_string(data)
    assert [n.op_type for n in proto.graph.node].count("Identity") <= 1
    x = 1.5 * images(4, 6, seed=3)
    for found, wanted in zip(run(data, [x]), program(x), strict=True):
        np.testing.assert_array_equal(found, np.asarray(wanted))


@pytest.mark.heavy
def test_hls4ml_computes_the_same(tmp_path):
    """Its simulation in C++, where it is installed."""
    hls4ml = pytest.importorskip("hls4ml")
    from qonnx.util.cleanup import cleanup_model

    program = dense_program()
    proto = onnx.load_model_from_string(write_qonnx_quant(program))
    model = cleanup_model(ModelWrapper(proto))
    config = hls4ml.utils.config_from_onnx_model(
        model, granularity="name", default_precision="ap_fixed<32,16>"
    )
    project = hls4ml.converters.convert_from_onnx_model(
        model,
        output_dir=str(tmp_path),
        io_type="io_parallel",
        backend="Vitis",
        hls_config=config,
    )
    project.compile()
    inputs = np.ascontiguousarray(1.5 * images(500, 6, seed=3))
    found = project.predict(inputs).reshape(500, -1)
    np.testing.assert_array_equal(found, np.asarray(program(inputs)))
