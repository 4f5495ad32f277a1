"""Tensors and operators as the bytes of a TFLite file."""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.tflite.tensors import Operator, Tensor

_VERSION = 3
# Operator -> table of its options in the schema; others are named after the operator.
_OPTIONS = {
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "L2_NORMALIZATION": "L2NormOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTMOptions",
}
_NO_OPTIONS = frozenset(("LOGISTIC", "TANH", "RELU", "RELU6", "RELU_N1_TO_1"))
# Versions of operators that runtimes ask for with int8; 1 for others.
_VERSIONS: Mapping[str, int] = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "BATCH_MATMUL": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 4,
    "L2_NORMALIZATION": 2,
    "LOG_SOFTMAX": 2,
    "LOGISTIC": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MUL": 2,
    "PAD": 2,
    "SOFTMAX": 2,
    "SUB": 2,
    "TANH": 2,
    "TRANSPOSE": 2,
    "TRANSPOSE_CONV": 3,
}
_ENUMERATIONS = {
    "fused_activation_function": "ActivationFunctionType",
    "in_data_type": "TensorType",
    "out_data_type": "TensorType",
    "output_type": "TensorType",
    "padding": "Padding",
    "quantized_bias_type": "TensorType",
}


def serialized(
    tensors: Sequence[Tensor],
    operators: Sequence[Operator],
    inputs: Sequence[int],
    outputs: Sequence[int],
    packed: frozenset[int] = frozenset(),
) -> bytes:
    """Writes a graph of TFLite operators as a file.

    Args:
      tensors: All tensors.
      operators: In the order of their execution.
      inputs: Numbers of the input tensors.
      outputs: Numbers of the output tensors.
      packed: Constants of int8 to be written with 4 bits.

    Returns:
      The bytes of the file.

    Raises:
      ImportError: if the schema of TFLite is not installed.
    """
    try:
        schema = importlib.import_module("tflite")
        flatbuffers = importlib.import_module("flatbuffers")
    except ImportError as error:
        raise ImportError(
            "Writing TFLite files needs their schema. Install it by "
            "`pip install 'qjax[tflite]'`."
        ) from error
    buffers: list[dict[str, Any]] = [{}]
    found = [_tensor(schema, t, buffers, k in packed) for k, t in enumerate(tensors)]
    names = list(dict.fromkeys(op.name for op in operators))
    graph = {
        "Name": "main",
        "Tensors": ("Tensor", found),
        "Operators": ("Operator", [_operator(schema, op, names) for op in operators]),
        "Inputs": np.asarray(inputs, np.int32),
        "Outputs": np.asarray(outputs, np.int32),
    }
    model = {
        "Version": _VERSION,
        "Description": "qjax",
        "OperatorCodes": ("OperatorCode", [_code(schema, name) for name in names]),
        "Subgraphs": ("SubGraph", [graph]),
        "Buffers": ("Buffer", buffers),
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_table(schema, builder, "Model", model), b"TFL3")
    return bytes(builder.Output())


def _code(schema: Any, name: str) -> dict[str, Any]:
    number = getattr(schema.BuiltinOperator, name)
    return {
        "BuiltinCode": number,
        "DeprecatedBuiltinCode": min(number, 127),  # What early readers know.
        "Version": _VERSIONS.get(name, 1),
    }


def _tensor(
    schema: Any, t: Tensor, buffers: list[dict[str, Any]], is_packed: bool
) -> dict[str, Any]:
    dtype = "INT4" if is_packed else t.dtype.upper()
    fields: dict[str, Any] = {
        "Name": t.name,
        "Shape": np.asarray(t.shape, np.int32),
        "HasRank": True,
        "Type": getattr(schema.TensorType, dtype),
        "Buffer": 0,
    }
    if t.is_variable:
        fields["IsVariable"] = True
    if t.scale:
        fields["Quantization"] = (
            "QuantizationParameters",
            {
                "Scale": np.asarray(t.scale, np.float32),
                "ZeroPoint": np.asarray(t.zero_point, np.int64),
                "QuantizedDimension": t.axis,
            },
        )
    if t.data is not None and t.data.size:
        raw = np.ascontiguousarray(t.data, t.dtype)
        data = _halves(raw) if is_packed else np.frombuffer(raw.tobytes(), np.uint8)
        fields["Buffer"] = len(buffers)
        buffers.append({"Data": data})
    return fields


def _halves(codes: np.ndarray) -> np.ndarray:
    """Packs codes of 4 bits, two in a byte, the first one low."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[::2] | flat[1::2] << 4


def _operator(schema: Any, op: Operator, names: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "OpcodeIndex": names.index(op.name),
        "Inputs": np.asarray(op.inputs, np.int32),
        "Outputs": np.asarray(op.outputs, np.int32),
    }
    if op.intermediates:
        fields["Intermediates"] = np.asarray(op.intermediates, np.int32)
    if op.name in _NO_OPTIONS:
        return fields
    kind = _OPTIONS.get(op.name, f"{_camel(op.name.lower())}Options")
    options = {_camel(k): _enumerated(schema, k, v) for k, v in op.options.items()}
    fields["BuiltinOptionsType"] = getattr(schema.BuiltinOptions, kind)
    fields["BuiltinOptions"] = (kind, options)
    return fields


def _camel(name: str) -> str:
    """Converts ``dilation_w_factor`` to ``DilationWFactor``."""
    return re.sub(r"(^|_)([a-z0-9])", lambda m: m[2].upper(), name)


def _enumerated(schema: Any, key: str, value: Any) -> Any:
    if key not in _ENUMERATIONS:
        return value
    return getattr(getattr(schema, _ENUMERATIONS[key]), value)


# Tables, their parts first.


def _table(schema: Any, builder: Any, kind: str, fields: Mapping[str, Any]) -> int:
    stored = {name: _stored(schema, builder, x) for name, x in fields.items()}
    getattr(schema, f"{kind}Start")(builder)
    for name, value in stored.items():
        getattr(schema, f"{kind}Add{name}")(builder, value)
    return getattr(schema, f"{kind}End")(builder)


def _stored(schema: Any, builder: Any, x: Any) -> Any:
    if isinstance(x, str):
        return builder.CreateString(x)
    if isinstance(x, np.ndarray) and x.dtype == np.uint8:
        return _aligned(builder, x)
    if isinstance(x, np.ndarray):
        return builder.CreateNumpyVector(x)
    if not isinstance(x, tuple):
        return x
    kind, own = x
    if isinstance(own, Mapping):
        return _table(schema, builder, kind, own)
    tables = [_table(schema, builder, kind, each) for each in own]
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()


_ALIGNMENT = 16  # Of the contents of a buffer, which runtimes read in place.


def _aligned(builder: Any, data: np.ndarray) -> int:
    """Adds the bytes of a buffer, which start at a multiple of 16 in the file."""
    builder.StartVector(1, data.size, _ALIGNMENT)
    builder.head = builder.head - data.size
    builder.Bytes[builder.Head() : builder.Head() + data.size] = data.tobytes()
    return builder.EndVector()
