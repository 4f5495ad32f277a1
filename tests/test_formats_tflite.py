"""TFLite files, written here by the schema's own classes, against Python integers."""

import contextlib
import copy
import math
import os
import pathlib
import sys

import flatbuffers
import numpy as np
import pytest
import tflite

from qjax.formats.tflite import read_tflite
from qjax.graph import reference

pytestmark = pytest.mark.slow  # Many compilations.

# Writing files.


def write(model):
    """A TFLite file: its tables as dicts of the schema's names."""
    builder = flatbuffers.Builder()
    # The first string lies last: with its zero, no padding follows.
    model = {**model, "Description": builder.CreateString("end")}
    builder.Finish(_table(builder, "Model", model), b"TFL3")
    return bytes(builder.Output())


def _table(builder, kind, fields):
    stored = {name: _stored(builder, name, x) for name, x in fields.items()}
    getattr(tflite, f"{kind}Start")(builder)
    for name, value in stored.items():
        getattr(tflite, f"{kind}Add{name}")(builder, value)
    return getattr(tflite, f"{kind}End")(builder)


_KINDS = {
    "OperatorCodes": "OperatorCode",
    "Subgraphs": "SubGraph",
    "Buffers": "Buffer",
    "Tensors": "Tensor",
    "Operators": "Operator",
    "Quantization": "QuantizationParameters",
}


def _stored(builder, name, x):
    if isinstance(x, str):
        return builder.CreateString(x)
    if isinstance(x, np.ndarray):
        return builder.CreateNumpyVector(x)
    if isinstance(x, tuple):
        return _table(builder, *x)  # A union: its class, and what is in it.
    if isinstance(x, dict):
        return _table(builder, _KINDS[name], x)
    if isinstance(x, list):
        tables = [_table(builder, _KINDS[name], each) for each in x]
        builder.StartVector(4, len(tables), 4)
        for table in reversed(tables):
            builder.PrependUOffsetTRelative(table)
        return builder.EndVector()
    return x


class Model:
    """A model under construction."""

    def __init__(self):
        self.graph = {"Tensors": [], "Operators": []}
        self.codes, self.buffers = [], [{}]

    def tensor(self, name, shape, dtype, scale=(), zero_point=0, data=None, axis=0):
        """Adds a tensor, and returns its number."""
        fields = {
            "Name": name,
            "Shape": np.asarray(shape, np.int32),
            "Type": getattr(tflite.TensorType, dtype.upper()),
            "Buffer": 0,
        }
        if np.size(scale):
            scale = np.atleast_1d(np.float32(scale))
            zero_points = np.full(scale.shape, zero_point, np.int64)
            fields["Quantization"] = {
                "Scale": scale,
                "ZeroPoint": zero_points,
                "QuantizedDimension": axis,
            }
        if data is not None:
            fields["Buffer"] = len(self.buffers)
            raw = np.frombuffer(np.asarray(data, dtype).tobytes(), np.uint8)
            self.buffers.append({"Data": raw})
        self.graph["Tensors"].append(fields)
        return len(self.graph["Tensors"]) - 1

    def operator(self, name, inputs, output, kind=None, **options):
        """Adds an operator."""
        number = getattr(tflite.BuiltinOperator, name)
        code = {"DeprecatedBuiltinCode": min(number, 127), "BuiltinCode": number}
        op = {
            "OpcodeIndex": len(self.codes),
            "Inputs": np.asarray(inputs, np.int32),
            "Outputs": np.asarray([output], np.int32),
        }
        if kind:
            op["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, kind)
            op["BuiltinOptions"] = (kind, options)
        self.codes.append({**code, "Version": 1})
        self.graph["Operators"].append(op)

    def model(self, inputs, outputs):
        """The whole, as `write` takes it."""
        graph = {
            **self.graph,
            "Inputs": np.asarray(inputs, np.int32),
            "Outputs": np.asarray(outputs, np.int32),
        }
        return {
            "Version": 3,
            "OperatorCodes": self.codes,
            "Subgraphs": [graph],
            "Buffers": self.buffers,
        }


# A network: convolution, sum, pool, dense, softmax.

_SCALES = {"x": 0.05, "z": 0.11, "conv": 0.08, "sum": 0.12, "dense": 0.09}
_RELU = tflite.ActivationFunctionType.RELU
_STRIDES, _TAPS, _WINDOW = (2, 1), (3, 2), (2, 3)
# Of LiteRT 2.3's reference kernels.
_PROBABILITIES = {
    "int8": [[-128, 99, -99], [-127, 117, -118], [-124, -108, 103], [-128, 123, -124]],
    "uint8": [[0, 227, 29], [1, 237, 17], [6, 14, 235], [0, 249, 7]],
}


def _parts(dtype):
    """Weights, biases, their scales, and zero points."""
    rng = np.random.default_rng(7)
    zero = 0 if dtype == "int8" else 128
    return {
        "kernel": rng.integers(-127, 128, (2, *_TAPS, 2)) + zero,
        "kernel_scale": [0.004, 0.0061] if dtype == "int8" else [0.005],
        "bias": rng.integers(-3000, 3000, 2),
        "weights": rng.integers(-127, 128, (3, 4)) + zero,
        "weights_scale": [0.007],
        "weights_bias": rng.integers(-2000, 2000, 3),
        "weights_zero": zero,
        "zeros": {
            name: k - 9 + zero
            for name, k in zip(_SCALES, (0, 5, 9, 11, 20), strict=True)
        },
    }


def _network(dtype):
    m, p = Model(), _parts(dtype)
    codes = lambda name, shape, grid: m.tensor(
        name, shape, dtype, _SCALES[grid], p["zeros"][grid]
    )
    x, z = codes("x", (1, 4, 5, 2), "x"), codes("z", (1, 2, 5, 2), "z")
    zero, scale = p["weights_zero"], p["kernel_scale"]
    kernel = m.tensor("kernel", (2, *_TAPS, 2), dtype, scale, zero, p["kernel"])
    scale = np.float32(scale) * np.float32(_SCALES["x"])
    bias = m.tensor("bias", (2,), "int32", scale, 0, p["bias"])
    y = codes("conv", (1, 2, 5, 2), "conv")
    steps = {"StrideH": _STRIDES[0], "StrideW": _STRIDES[1]}
    same = {"Padding": tflite.Padding.SAME, "FusedActivationFunction": _RELU}
    factors = {"DilationHFactor": 1, "DilationWFactor": 1}
    options = {**steps, **same, **factors}
    m.operator("CONV_2D", [x, kernel, bias], y, "Conv2DOptions", **options)
    total = codes("sum", (1, 2, 5, 2), "sum")
    m.operator("ADD", [y, z], total, "AddOptions")
    pooled = codes("pool", (1, 1, 3, 2), "sum")
    window = {"FilterHeight": _WINDOW[0], "FilterWidth": _WINDOW[1]}
    window |= {"StrideH": 1, "StrideW": 1, "Padding": tflite.Padding.VALID}
    m.operator("AVERAGE_POOL_2D", [total], pooled, "Pool2DOptions", **window)
    cut = codes("cut", (1, 1, 2, 2), "sum")
    begin = m.tensor("begin", (4,), "int32", data=[0, 0, 1, 0])
    size = m.tensor("size", (4,), "int32", data=[1, 1, 2, 2])
    m.operator("SLICE", [pooled, begin, size], cut, "SliceOptions")
    flat = codes("flat", (1, 4), "sum")
    shape = np.int32([1, 4])
    m.operator("RESHAPE", [cut], flat, "ReshapeOptions", NewShape=shape)
    scale = p["weights_scale"]
    weights = m.tensor("weights", (3, 4), dtype, scale, zero, p["weights"])
    scale = np.float32(scale) * np.float32(_SCALES["sum"])
    bias = m.tensor("weights_bias", (3,), "int32", scale, 0, p["weights_bias"])
    logits = codes("dense", (1, 3), "dense")
    inputs = [flat, weights, bias]
    m.operator("FULLY_CONNECTED", inputs, logits, "FullyConnectedOptions")
    low = np.iinfo(dtype).min
    out = m.tensor("probabilities", (1, 3), dtype, 1 / 256, int(low))
    m.operator("SOFTMAX", [logits], out, "SoftmaxOptions", Beta=1.0)
    return m.model([x, z], [logits, out])


def _inputs(dtype, count=4):
    rng, ends = np.random.default_rng(3), np.iinfo(dtype)
    return [
        rng.integers(ends.min, ends.max + 1, (count, n, 5, 2)).astype(dtype)
        for n in (4, 2)
    ]


# Its definition in Python integers.


def _multiplier(ratio):
    significand, exponent = math.frexp(ratio)
    return math.floor(significand * 2**31 + 0.5), 31 - exponent


def _twice(acc, ratio, left=0):
    """Rounds at 2^-31, and what is left of the shift half away from zero."""
    multiplier, shift = _multiplier(ratio)
    high = (int(acc) * multiplier * 2 ** (left + max(31 - shift, 0)) + 2**30) >> 31
    right = max(shift - 31, 0)
    half = (1 << right) >> 1
    return ((abs(high) + half) >> right) * (1 if high >= 0 else -1)


def _once(acc, ratio):
    multiplier, shift = _multiplier(ratio)
    return (int(acc) * multiplier + (1 << (shift - 1))) >> shift


def _logits(dtype, x, z):
    """The network up to the dense layer, for one example."""
    p, ends = _parts(dtype), np.iinfo(dtype)
    zeros, zero = p["zeros"], p["weights_zero"]
    scales = {name: np.float32(s) for name, s in _SCALES.items()}
    clip = lambda q, low=ends.min: int(np.clip(q, low, ends.max))
    x, z = x.astype(int) - zeros["x"], z.astype(int) - zeros["z"]
    # SAME: 4 rows in steps of 2 under 3 taps, 5 columns in steps of 1 under 2.
    x = np.pad(x, ((0, 1), (0, 1), (0, 0)))
    kernel = p["kernel"] - zero
    total = np.zeros((2, 5, 2), int)
    shared = max(scales["conv"], scales["z"])
    for i, j, c in np.ndindex(total.shape):
        acc = (x[2 * i : 2 * i + 3, j : j + 2] * kernel[c]).sum() + p["bias"][c]
        s = np.float32(p["kernel_scale"])
        if len(s) == 1:
            ratio = float(scales["x"] * s[0]) / float(scales["conv"])
        else:
            ratio = float(scales["x"]) * float(s[c]) / float(scales["conv"])
        y = clip(_twice(acc, ratio) + zeros["conv"], zeros["conv"])  # RELU.
        shifted = [
            _twice(code, float(scale) / (2 * float(shared)), left=20)
            for code, scale in (
                (y - zeros["conv"], scales["conv"]),
                (z[i, j, c], scales["z"]),
            )
        ]
        ratio = 2 * float(shared) / (2**20 * float(scales["sum"]))
        total[i, j, c] = clip(_twice(sum(shifted), ratio) + zeros["sum"])
    # Columns 1 and 2 of the pool.
    sums = np.array([total[:, j : j + 3].sum((0, 1)) for j in (1, 2)])
    pooled = np.sign(sums) * ((np.abs(sums) + 3) // 6)  # Half away from zero.
    flat = pooled.reshape(-1) - zeros["sum"]
    ratio = float(scales["sum"] * np.float32(p["weights_scale"][0]))
    ratio /= float(scales["dense"])
    acc = (p["weights"] - zero) @ flat + p["weights_bias"]
    return [clip(_once(a, ratio) + zeros["dense"]) for a in acc]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_are_those_of_the_definition(dtype):
    program = read_tflite(write(_network(dtype)))
    x, z = _inputs(dtype)
    logits, probabilities = map(np.asarray, program.codes(x, z))
    assert logits.dtype == dtype
    wanted = [_logits(dtype, *each) for each in zip(x, z, strict=True)]
    np.testing.assert_array_equal(logits, wanted)
    assert len(np.unique(wanted)) > 6
    np.testing.assert_array_equal(probabilities, _PROBABILITIES[dtype])
    found = reference.run(program.graph, program.params, [x, z])
    np.testing.assert_array_equal(found[program.graph.outputs[0]], logits)
    np.testing.assert_array_equal(found[program.graph.outputs[1]], probabilities)


def test_path_is_read_as_bytes_are(tmp_path):
    data = write(_network("int8"))
    (tmp_path / "m.tflite").write_bytes(data)
    program = read_tflite(tmp_path / "m.tflite")
    assert program.graph == read_tflite(data).graph
    grids = [(g.scale, g.zero_point) for g in program.input_grids]
    zeros = _parts("int8")["zeros"]
    assert grids == [(float(np.float32(_SCALES[k])), zeros[k]) for k in "xz"]
    with pytest.raises(FileNotFoundError):
        read_tflite(tmp_path / "none.tflite")


def test_rules_are_those_that_are_asked_for():
    data = write(_network("int8"))
    rules = lambda **how: [
        node.attributes["rule"]
        for node in read_tflite(data, **how).graph.nodes
        if node.operation == "requantize"
    ]
    assert rules() == ["tflite_double", "tflite_single"]
    assert rules(dense_rule=None) == ["tflite_double"] * 2
    assert rules(rule="tflite_single") == ["tflite_single"] * 2


def test_buffers_may_lie_behind_the_tables():
    model = _network("int8")
    moved = model["Buffers"][1]["Data"]
    outside = lambda start: [
        {},
        {"Offset": start, "Size": moved.size},
        *model["Buffers"][2:],
    ]
    model["Buffers"] = outside(2)
    start = len(write(model))
    model["Buffers"] = outside(start)
    data = write(model) + moved.tobytes()
    found, wanted = (read_tflite(d) for d in (data, write(_network("int8"))))
    for name, array in wanted.params.items():
        np.testing.assert_array_equal(found.params[name], array)
    with pytest.raises(ValueError, match="a buffer must lie within"):
        read_tflite(data[:-1])


# What is no such file.


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
    "'kernel' of type int4": _set(*_TENSORS, 2, "Type", tflite.TensorType.INT4),
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


# MLPerf Tiny.


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
