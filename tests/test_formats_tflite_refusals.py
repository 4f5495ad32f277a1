"""Files that are no fully quantized TFLite model."""

import contextlib
import copy
import os
import pathlib
import sys

import flatbuffers
import numpy as np
import pytest
import tflite

from qjax.formats.tflite import read_tflite
from tests.tflite_cases import _network, write

pytestmark = pytest.mark.slow  # Many compilations.


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\0" * 64, b"not a TFLite file" * 9])
def test_other_files_are_refused(data):
    with pytest.raises(ValueError, match="must hold the identifier 'TFL3'"):
        read_tflite(data)


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_refused(seed):
    rng = np.random.default_rng(seed)
    for ends in (256, 4):  # Small numbers are offsets that point inside.
        data = bytearray(rng.integers(0, ends, 4096, np.uint8).tobytes())
        data[4:8] = b"TFL3"
        data[0:4] = (64).to_bytes(4, "little")
        with pytest.raises(ValueError, match="TFLite file"):
            read_tflite(bytes(data))


@pytest.mark.parametrize("part", range(4))
def test_cut_files_are_refused(part):
    data = write(_network("int8"))
    lengths = [*range(part, len(data) - 32, 28), *range(len(data) - 32, len(data))]
    for length in lengths:
        with pytest.raises(ValueError, match="must hold the identifier|is truncated"):
            read_tflite(data[:length])


def test_altered_files_give_a_program_or_say_what_is_wrong():
    data, rng = write(_network("int8")), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(8, len(data), 250):
        altered = bytearray(data)
        altered[place] ^= int(rng.integers(1, 256))
        with np.errstate(all="ignore"):
            try:
                read_tflite(bytes(altered))
            except (ValueError, NotImplementedError, OverflowError):
                refused += 1
    assert 50 < refused < 250


def test_one_vector_that_many_tables_share_does_not_take_forever():
    builder = flatbuffers.Builder()
    shape = builder.CreateNumpyVector(np.ones(5000, np.int32))
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tensor = tflite.TensorEnd(builder)
    tflite.SubGraphStartTensorsVector(builder, 5000)
    for _ in range(5000):
        builder.PrependUOffsetTRelative(tensor)
    tensors = builder.EndVector()
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensors)
    graph = tflite.SubGraphEnd(builder)
    tflite.ModelStartSubgraphsVector(builder, 1)
    builder.PrependUOffsetTRelative(graph)
    graphs = builder.EndVector()
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddSubgraphs(builder, graphs)
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    with pytest.raises(ValueError, match="larger than the file"):
        read_tflite(bytes(builder.Output()))


def _set(*path):
    """An edit: what stands at the end of a path becomes its last item."""

    def edit(model):
        *most, key, value = path
        for step in most:
            model = model[step]
        model[key] = value

    return edit


_TENSORS, _OPERATORS = ("Subgraphs", 0, "Tensors"), ("Subgraphs", 0, "Operators")


_CONTRADICTIONS = {
    "version": (_set("Version", 4), "schema version 3, got 4"),
    "no graph": (_set("Subgraphs", []), "must hold a subgraph"),
    "no outputs": (_set("Subgraphs", 0, "Outputs", np.int32([])), "must have outputs"),
    "output": (
        _set("Subgraphs", 0, "Outputs", np.int32([99])),
        r"outputs from 0 to 14",
    ),
    "input": (
        _set(*_OPERATORS, 0, "Inputs", np.int32([0, 17])),
        r"inputs from -1 to 14",
    ),
    "no input": (
        _set(*_OPERATORS, 0, "Inputs", np.int32([0, -1])),
        "inputs and outputs",
    ),
    "few inputs": (_set(*_OPERATORS, 1, "Inputs", np.int32([4])), "operators fit"),
    "order": (_set(*_OPERATORS, 1, "Inputs", np.int32([5, 6])), "used before"),
    "code": (_set(*_OPERATORS, 0, "OpcodeIndex", 7), "operator codes below 7, got 7"),
    "buffer": (_set(*_TENSORS, 0, "Buffer", 9), "buffers below 7, got 9"),
    "bytes": (
        _set(*_TENSORS, 2, "Shape", np.int32([2, 3, 2, 3])),
        "must have 36 bytes",
    ),
    "size": (
        _set(*_TENSORS, 0, "Shape", np.int32([1, 4, -5, 2])),
        "fewer than 268435456",
    ),
    "type": (_set(*_TENSORS, 0, "Type", 77), "known types, got 77"),
    "scale": (
        _set(*_TENSORS, 0, "Quantization", "Scale", np.float32([np.nan])),
        "positive scales",
    ),
    "scales": (
        _set(*_TENSORS, 0, "Quantization", "Scale", np.float32([1, 1, 1])),
        "one scale and zero point",
    ),
    "zero point": (
        _set(*_TENSORS, 0, "Quantization", "ZeroPoint", np.int64([128])),
        "zero points of type int8",
    ),
    "axis": (
        _set(*_TENSORS, 2, "Quantization", "QuantizedDimension", 4),
        "axes within",
    ),
    "stride": (
        _set(*_OPERATORS, 0, "BuiltinOptions", 1, "StrideH", 0),
        "stride_h=0",
    ),
    "filter": (
        _set(*_OPERATORS, 2, "BuiltinOptions", 1, "FilterHeight", -(2**30)),
        "positive windows",
    ),
}


@pytest.mark.parametrize("name", _CONTRADICTIONS)
def test_contradictions_are_refused(name):
    edit, message = _CONTRADICTIONS[name]
    model = copy.deepcopy(_network("int8"))
    edit(model)
    with pytest.raises(ValueError, match=message):
        read_tflite(write(model))


def test_the_axis_of_a_bias_is_its_only_one():
    """Some writers give it that of the kernel, 3; the remedy is applied."""
    model = copy.deepcopy(_network("int8"))
    bias = next(t for t in model["Subgraphs"][0]["Tensors"] if t["Name"] == "bias")
    bias["Quantization"]["QuantizedDimension"] = 3
    with pytest.raises(ValueError, match=r"\(2,\), got 3 for 'bias'.*to 0 for a bias"):
        read_tflite(write(model))
    bias["Quantization"]["QuantizedDimension"] = 0
    wanted = read_tflite(write(_network("int8")))
    assert read_tflite(write(model)).graph == wanted.graph


_MISSING = {
    "LSTM": _set("OperatorCodes", 0, {"DeprecatedBuiltinCode": 16, "BuiltinCode": 16}),
    "CUSTOM Mine": _set(
        "OperatorCodes", 0, {"DeprecatedBuiltinCode": 32, "CustomCode": "Mine"}
    ),
    "operator 999": _set(
        "OperatorCodes", 0, {"DeprecatedBuiltinCode": 127, "BuiltinCode": 999}
    ),
    "fused_activation_function='TANH'": _set(
        *_OPERATORS, 0, "BuiltinOptions", 1, "FusedActivationFunction", 4
    ),
    "'x' must be int8, uint8, int16 with one scale, got int32": _set(
        *_TENSORS, 0, "Type", 2
    ),
    "'kernel' of type complex64": _set(
        *_TENSORS, 2, "Type", tflite.TensorType.COMPLEX64
    ),
}


@pytest.mark.parametrize("name", _MISSING)
def test_what_is_lacking_is_named(name):
    model = copy.deepcopy(_network("int8"))
    _MISSING[name](model)
    with pytest.raises(NotImplementedError, match=name):
        read_tflite(write(model))


def test_missing_schema_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(ImportError, match=r"pip install 'qjax\[tflite\]'"):
        read_tflite(b"")


def _data():
    own = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folders = [pathlib.Path(os.environ.get("QJAX_DATA") or own), own]
    with contextlib.suppress(StopIteration):
        return next(f for f in folders if (f / "mlperf_tiny").is_dir())
    pytest.skip("mlperf_tiny is not in $QJAX_DATA.")


@pytest.mark.parametrize(
    ("name", "output", "zoom"),
    [
        ("resnet8", "int8_ref_out", 1),
        ("resnet8_large", "int8_ref_out", 1),
        ("vww_mobilenet", "parity_int8_ref_out", 3),
    ],
)
def test_mlperf_tiny_gives_the_codes_of_reference_kernels(name, output, zoom):
    folder = _data()
    program = read_tflite(folder / "mlperf_tiny" / f"{name}_int8.tflite")
    images = np.load(folder / "cifar10_test1017.npz")["x"][:16]
    codes = (images.astype(np.int32) - 128).astype(np.int8)
    codes = codes.repeat(zoom, 1).repeat(zoom, 2)
    wanted = np.load(folder / "mlperf_tiny" / f"{name}_ref_outputs.npz")[output][:16]
    np.testing.assert_array_equal(program.codes(codes), wanted)


def test_float_files_are_refused():
    with pytest.raises(NotImplementedError, match="float32 without a scale"):
        read_tflite(_data() / "mlperf_tiny" / "resnet8_float.tflite")
