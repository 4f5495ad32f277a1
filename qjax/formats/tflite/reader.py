"""The reader of TFLite files: quantized graphs as integer programs, bit for bit."""

import dataclasses
import functools
import importlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.integer import RequantizeRule
from qjax.program import IntegerProgram

_VERSION = 3


def read_tflite(
    path_or_bytes: str | os.PathLike[str] | bytes,
    *,
    rule: RequantizeRule = "tflite_double",
    dense_rule: RequantizeRule | None = "tflite_single",
    steps: int | None = None,
) -> IntegerProgram:
    """Reads a fully quantized TFLite file as the program that gives its codes.

    The weights, scales and zero points are those of the file; nothing is calibrated or
    rounded anew. Its inputs and outputs are codes, real numbers that ``QUANTIZE`` takes
    and ``DEQUANTIZE`` gives, or integers that are indices. Needs the extra
    `qjax[tflite]`.

    Args:
      path_or_bytes: The file, or what is in it. Of several subgraphs the first is read.
      rule: Rescaling of 32-bit accumulators; see `qjax.formats.tflite.build`. The
        defaults are LiteRT 2's reference kernels.
      dense_rule: The same for ``FULLY_CONNECTED`` alone; None for ``rule``.
      steps: Number of calls after a reset that the program computes, along axis 1 of
        its inputs and outputs, with the states that TFLite keeps between them; its
        `step` computes one call. Needed for ``SVDF``. None for one call.

    Returns:
      The program. Its sites are the tensors, under their names. States are zero before
      the first call, as after ``reset_all_variables`` in TFLite. Sums of an ``SVDF``
      over time that leave int32, which TFLite does not define, saturate.

    Raises:
      ImportError: if the schema of TFLite is not installed.
      NotImplementedError: for an operator, an option or a type that has no rule, by
        name.
      OSError: if the file cannot be read.
      OverflowError: if an accumulator could leave int32.
      ValueError: if the file is truncated, altered or no TFLite file.

    Example:
      >>> read_tflite(b"not a model")  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      ValueError: The TFLite file must hold the identifier 'TFL3' in bytes 4 to 8 ...

    References:
      Schema: tensorflow/lite/schema/schema.fbs, version 3.
    """
    try:
        schema = importlib.import_module("tflite")
    except ImportError as error:
        raise ImportError(
            "Reading TFLite files needs their schema. Install it by "
            "`pip install 'qjax[tflite]'`."
        ) from error
    if isinstance(path_or_bytes, str | os.PathLike):
        name = repr(os.fspath(path_or_bytes))
        with open(path_or_bytes, "rb") as file:
            data = _Bytes(file.read())
    else:
        name, data = "The TFLite file", _Bytes(path_or_bytes)
    try:
        graph = _read_graph(schema, data)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    try:
        return build_tflite(*graph, rule=rule, dense_rule=dense_rule, steps=steps)
    except (NotImplementedError, OverflowError):
        raise
    except Exception as error:  # Errors of rules for sizes and numbers that do not fit.
        raise ValueError(
            f"{name} must hold a graph whose operators fit their tensors, got "
            f"{type(error).__name__}: {error}"
        ) from error


_Graph = tuple[list[Tensor], list[Operator], list[int], list[int]]


def _read_graph(schema: Any, data: "_Bytes") -> _Graph:
    model = _read_model(schema, data)
    if model["version"] != _VERSION:
        raise ValueError(
            f"must have schema version {_VERSION}, got {model['version']}."
        )
    if not model.get("subgraphs"):
        raise ValueError("must hold a subgraph, got none.")
    graph = model["subgraphs"][0]
    buffers = [_contents(buffer, data) for buffer in model.get("buffers", ())]
    tensors = [_tensor(schema, t, buffers) for t in graph.get("tensors", ())]
    codes = [_operator_name(schema, code) for code in model.get("operator_codes", ())]
    operators = [
        _operator(schema, op, codes, len(tensors)) for op in graph.get("operators", ())
    ]
    inputs, outputs = (
        list(_numbers(graph, name, len(tensors))) for name in ("inputs", "outputs")
    )
    computed = {*inputs, *(k for op in operators for k in op.outputs)}
    for k, t in enumerate(tensors):
        if k not in computed and t.dtype in _TYPES and not math.prod(t.shape):
            none = np.zeros(t.shape, t.dtype)  # Constants of no numbers have no bytes.
            tensors[k] = dataclasses.replace(t, data=none)
    if not outputs:
        raise ValueError("must have outputs, got none.")
    return tensors, operators, inputs, outputs


# From bytes to dicts, by the classes that the schema generates.


class _Bytes(bytes):
    """Bytes whose slices are strings and must end with a zero after them."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.stop is not None and key.stop >= len(self):
            raise ValueError(f"a string ends at byte {key.stop}")
        return super().__getitem__(key)


def _read_model(schema: Any, data: _Bytes) -> dict[str, Any]:
    if len(data) < 8 or not schema.Model.ModelBufferHasIdentifier(data, 0):
        raise ValueError(
            "must hold the identifier 'TFL3' in bytes 4 to 8, got "
            f"{bytes.__getitem__(data, slice(4, 8))!r} in a file of {len(data)}."
        )
    try:
        return _Unpacker(schema, len(data)).unpack(schema.Model.GetRootAs(data, 0))
    except Exception as error:  # Offsets that point outside, and what else comes of it.
        raise ValueError(
            "is truncated or altered: its tables must lie within its "
            f"{len(data)} bytes, got {type(error).__name__}: {error}."
        ) from error


class _Unpacker:
    """A reader of generated tables as dicts, less absent fields that have no default.

    Everything is visited, so that nothing is missing. Tables do not share their parts
    in a file, hence their sizes add up to no more than its own; a file that says
    otherwise would take forever.
    """

    _UNIONS = {
        "ArrayIndices": "SparseIndexVector",
        "ArraySegments": "SparseIndexVector",
        "Details": "QuantizationDetails",
    }

    def __init__(self, schema: Any, size: int) -> None:
        self._schema = schema
        self._left = 4 * size  # In bytes, with something to spare.

    def unpack(self, table: Any) -> dict[str, Any]:
        self._spend(4)
        found = {}
        for name in _fields(table.__class__):
            value = self._field(table, name)
            if value is not None:
                found[_snake(name)] = value
        return found

    def _field(self, table: Any, name: str) -> Any:
        get = getattr(table, name)
        if not hasattr(table, f"{name}Length"):
            value = get()
            # A union comes without its class.
            return (
                self._union(table, name, value) if _is_bare(value) else self._of(value)
            )
        if getattr(table, f"{name}IsNone")():
            return None
        if hasattr(table, f"{name}AsNumpy"):
            array = getattr(table, f"{name}AsNumpy")()
            self._spend(array.nbytes)
            return array
        size = getattr(table, f"{name}Length")()
        self._spend(4 * size)
        return [self._of(get(k)) for k in range(size)]

    def _of(self, value: Any) -> Any:
        if isinstance(value, bytes):
            self._spend(len(value))
            return value.decode(errors="replace")
        return self.unpack(value) if hasattr(value, "Init") else value

    def _union(self, table: Any, name: str, value: Any) -> Any:
        kinds = getattr(self._schema, self._UNIONS.get(name, name))
        kind = _names(kinds).get(getattr(table, f"{name}Type")(), "NONE")
        if kind == "NONE":
            return None  # A kind of a later schema.
        typed = getattr(self._schema, kind)()
        typed.Init(value.Bytes, value.Pos)
        return self.unpack(typed)

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("tables that are larger than the file")


def _is_bare(value: Any) -> bool:
    return hasattr(value, "Bytes")


@functools.cache
def _fields(table: type) -> tuple[str, ...]:
    """Returns the fields of a table, read from the names of its accessors."""
    own = vars(table)
    names = [name for name in own if name[0] != "_" and name != "Init"]
    names = [n for n in names if not re.match("GetRootAs|.*BufferHasIdentifier", n)]
    parts = {f"{n}{end}" for n in names for end in ("AsNumpy", "Length", "IsNone")}
    return tuple(n for n in names if n not in parts)


@functools.cache
def _names(enumeration: type) -> dict[int, str]:
    """Returns the names of an enumeration by number."""
    items = vars(enumeration).items()
    return {number: name for name, number in items if isinstance(number, int)}


def _snake(name: str) -> str:
    """Converts ``DilationWFactor`` to ``dilation_w_factor``, as in schema.fbs."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


# From dicts to tensors.


def _contents(buffer: Mapping[str, Any], data: _Bytes) -> np.ndarray:
    """Returns the bytes of a buffer; in large files they lie behind the tables."""
    start, size = buffer["offset"], buffer["size"]
    if start <= 1:
        return buffer.get("data", np.zeros(0, np.uint8))
    if start + size > len(data):
        raise ValueError(
            f"is truncated: a buffer must lie within its {len(data)} bytes, got "
            f"{start} to {start + size}."
        )
    return np.frombuffer(data, np.uint8, size, start)


_INTEGERS = tuple(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64))
_TYPES = ("bool", "float16", "float32", "float64", *_INTEGERS)
# Files with more are altered: rules make tables of the places in a window.
_MOST = 2**28


def _tensor(schema: Any, t: Mapping[str, Any], buffers: Sequence[np.ndarray]) -> Tensor:
    name, shape = t.get("name", ""), tuple(map(int, t.get("shape", ())))
    if min(shape, default=0) < 0 or math.prod(shape) >= _MOST:
        raise ValueError(
            f"must have tensors of fewer than {_MOST} numbers, got {shape} for "
            f"{name!r}."
        )
    if t["type"] not in _names(schema.TensorType):
        raise ValueError(f"must have known types, got {t['type']} for {name!r}.")
    if t["buffer"] >= len(buffers):
        raise ValueError(
            f"must have buffers below {len(buffers)}, got {t['buffer']} for {name!r}."
        )
    dtype = _names(schema.TensorType)[t["type"]].lower()
    raw = buffers[t["buffer"]]
    data = _constant(raw, name, shape, dtype) if raw.size else None
    if dtype == "int4" and data is not None:
        dtype = "int8"
    if "sparsity" in t:
        raise NotImplementedError(f"The tensor {name!r} is sparse, which has no rule.")
    grid = _grid(t.get("quantization", {}), name, shape, dtype, data is not None)
    own: Any = {"data": data, "is_variable": bool(t.get("is_variable", False))}
    return Tensor(name, shape, dtype, *grid, **own)


def _constant(
    raw: np.ndarray, name: str, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    if dtype == "int4":
        return _of_halves(raw, name, shape)
    if dtype not in _TYPES:
        raise NotImplementedError(
            f"The constant {name!r} of type {dtype} has no rule. Known are "
            f"{', '.join(_TYPES)}."
        )
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if raw.size != wanted:
        raise ValueError(
            f"must have {wanted} bytes for {name!r} of shape {shape} and type {dtype}, "
            f"got {raw.size}."
        )
    return raw.view(np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def _of_halves(raw: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns constants of 4 bits, two in a byte and the first one low, as int8."""
    count = math.prod(shape)
    if raw.size != -(-count // 2):
        raise ValueError(
            f"must have {-(-count // 2)} bytes for {name!r} of shape {shape} and type "
            f"int4, got {raw.size}."
        )
    pairs = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[:count].astype(np.int8)
    return ((pairs ^ 8) - 8).reshape(shape)


def _grid(
    q: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    is_constant: bool,
) -> tuple[tuple[float, ...], tuple[int, ...], int]:
    """Returns the scales, the zero points and the axis of a tensor."""
    if q.get("details_type"):
        raise NotImplementedError(
            f"The tensor {name!r} has a quantization other than affine, without a rule."
        )
    scale = np.asarray(q.get("scale", ()), np.float32)
    zero_point = np.asarray(q.get("zero_point", ()), np.int64)
    axis = int(q.get("quantized_dimension", 0))
    if not scale.size:
        return (), (), 0
    if not 0 <= axis < max(len(shape), 1):
        raise ValueError(
            f"must have axes within {shape}, got {axis} for {name!r}. LiteRT takes no "
            "other either: set its `quantized_dimension`, to 0 for a bias."
        )
    if scale.size not in {1, *shape[axis : axis + 1]} or zero_point.size != scale.size:
        raise ValueError(
            f"must have one scale and zero point, or one along axis {axis} of {shape}, "
            f"got {scale.size} and {zero_point.size} for {name!r}."
        )
    least = 0.0 if is_constant else np.finfo(np.float32).smallest_subnormal
    if not np.all(np.isfinite(scale) & (scale >= least)):
        raise ValueError(
            f"must have positive scales, got {scale.min()} to {scale.max()} for "
            f"{name!r}."
        )
    if dtype in ("int8", "uint8", "int16", "int32"):
        ends = np.iinfo(dtype)
        if zero_point.min() < ends.min or zero_point.max() > ends.max:
            raise ValueError(
                f"must have zero points of type {dtype}, got {zero_point.min()} to "
                f"{zero_point.max()} for {name!r}."
            )
    return tuple(scale.tolist()), tuple(zero_point.tolist()), axis


# From dicts to operators.


def _operator_name(schema: Any, code: Mapping[str, Any]) -> str:
    # Early files have the first alone, and from 127 on the second counts.
    number = max(code["deprecated_builtin_code"], code["builtin_code"])
    name = _names(schema.BuiltinOperator).get(number, f"operator {number}")
    return f"CUSTOM {code.get('custom_code', '')}" if name == "CUSTOM" else name


_ENUMERATIONS = {
    "fused_activation_function": "ActivationFunctionType",
    "idx_out_type": "TensorType",
    "in_data_type": "TensorType",
    "kernel_type": "LSTMKernelType",
    "mode": "MirrorPadMode",
    "out_data_type": "TensorType",
    "out_type": "TensorType",
    "output_type": "TensorType",
    "padding": "Padding",
    "quantized_bias_type": "TensorType",
    "weights_format": "FullyConnectedOptionsWeightsFormat",
}
# Input 2 and later may be left out: biases, and the states of recurrent layers, of
# which a form without an input gate leaves out its weights as well.
_REQUIRED, _REQUIRED_OF = 2, {"LSTM": 1, "UNIDIRECTIONAL_SEQUENCE_LSTM": 1}


def _operator(
    schema: Any, op: Mapping[str, Any], codes: Sequence[str], size: int
) -> Operator:
    if op["opcode_index"] >= len(codes):
        raise ValueError(
            f"must have operator codes below {len(codes)}, got {op['opcode_index']}."
        )
    name = codes[op["opcode_index"]]
    inputs, outputs = _numbers(op, "inputs", size, -1), _numbers(op, "outputs", size)
    required = _REQUIRED_OF.get(name, _REQUIRED)
    if min(inputs[:required], default=0) < 0 or not outputs:
        raise ValueError(
            f"must have the inputs and outputs of {name}, got {inputs}, {outputs}."
        )
    found = op.get("builtin_options", op.get("builtin_options2", {}))
    options = {
        key: _enumerated(schema, key, value) if np.isscalar(value) else value
        for key, value in found.items()
    }
    for key, value in options.items():
        if re.match("stride_|filter_|dilation_", key) and not 0 < value < _MOST:
            raise ValueError(
                f"must have positive windows, got {key}={value} for {name}."
            )
    between = _numbers(op, "intermediates", size)
    return Operator(name, inputs, outputs, options, between)


def _enumerated(schema: Any, key: str, value: Any) -> Any:
    """Returns the name of a number of an enumeration, and any other value as it is."""
    if key not in _ENUMERATIONS:
        return value
    names = _names(getattr(schema, _ENUMERATIONS[key]))
    return names.get(value, value)  # Rules refuse unknown values.


def _numbers(
    table: Mapping[str, Any], name: str, size: int, least: int = 0
) -> tuple[int, ...]:
    found = tuple(map(int, table.get(name, ())))
    if any(not least <= k < size for k in found):
        raise ValueError(
            f"must have {name} from {least} to {size - 1}, its tensors, got {found}."
        )
    return found
