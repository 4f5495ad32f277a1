"""What several tests of one subject share."""

import flatbuffers
import numpy as np
import tflite


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
            "Outputs": np.atleast_1d(np.int32(output)),
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


_SCALES = {"x": 0.05, "z": 0.11, "conv": 0.08, "sum": 0.12, "dense": 0.09}


_RELU = tflite.ActivationFunctionType.RELU


_STRIDES, _TAPS, _WINDOW = (2, 1), (3, 2), (2, 3)


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
