"""Other runtimes for the models of `experiments.models`: ONNX Runtime and LiteRT."""

import dataclasses
import importlib.util
import itertools
import logging
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

import qjax
from experiments import models


def installed(*names: str) -> bool:
    """Returns whether there are packages of these names."""
    return all(importlib.util.find_spec(name) for name in names)


class Runtime(NamedTuple):
    """A model in one form."""

    nbytes: int  # Of its parameters; of its file for other runtimes.
    prepare: Callable[[np.ndarray], Callable[[], Any]]  # Batch -> computes outputs.
    # Batch -> bytes: arguments, outputs and temporaries of XLA's plan; for others by
    # how much loading and one call let a fresh process grow.
    peak: Callable[[np.ndarray], int]


def _grown(content: bytes, load: str, shape: tuple[int, ...], threads: int) -> int:
    """By how many bytes a fresh process grows that loads a file and runs it once."""
    if not pathlib.Path("/proc/self/status").exists():
        return 0
    script = f"""
import re, sys
import numpy as np
{load.splitlines()[0]}
def size():
    found = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
    return 1024 * int(found[1])
path, threads, x = sys.argv[1], {threads}, np.zeros({shape}, np.float32)
before = size()
{chr(10).join(load.splitlines()[1:])}
print(size() - before)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        path.write_bytes(content)
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


# ONNX Runtime: the float model with BatchNorm folded, quantized by its own tools.


def onnx_file(model: nnx.Module, batches: np.ndarray) -> bytes:
    """8 bits, QDQ, per-channel weights, ranges from the same images."""
    logging.getLogger().setLevel(logging.ERROR)  # It asks for a pass that we do.
    import onnx
    from onnxruntime import quantization

    images = batches if batches.ndim == 3 else np.moveaxis(batches, -1, 2)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"x": batch} for batch in images])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(pathlib.Path(folder) / n) for n in ("f.onnx", "q.onnx"))
        onnx.save(_OnnxWriter(onnx).model(model, images.shape[2:]), source)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,  # Up to 4 times QInt8's.
        )
        return pathlib.Path(target).read_bytes()


def _first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x if x.ndim == 2 else np.moveaxis(x, -1, 1))


def openvino(content: bytes, threads: int) -> Runtime:
    """The same file."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(content)
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        feed = _first(x)
        own = model.clone()
        own.reshape(feed.shape)
        request = core.compile_model(own, "CPU", hints).create_infer_request()
        return lambda: request.infer({0: feed}, share_inputs=True)[0]

    return Runtime(len(content), prepare, lambda x: 0)


def onnx_runtime(content: bytes, threads: int) -> Runtime:
    """The file of `onnx_file`."""
    import onnxruntime

    first = _first
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    own = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        feed = {"x": first(x)}
        return lambda: own.run(None, feed)[0]

    def peak(x: np.ndarray) -> int:
        return _grown(content, _LOAD_ONNX, first(x).shape, threads)

    return Runtime(len(content), prepare, peak)


_LOAD_ONNX = """import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
own = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
own.run(None, {"x": x})"""


class _OnnxWriter:
    """The models of `experiments.models` as float ONNX graphs, channels first."""

    def __init__(self, onnx: Any):
        self.onnx, self.nodes, self.arrays = onnx, [], []
        self.names = (f"v{k}" for k in itertools.count())

    def model(self, model: Any, shape: tuple[int, ...]) -> Any:
        y = {
            models.MLP: self.mlp,
            models.ResNet: self.resnet,
            models.MobileNet: self.mobilenet,
        }[type(model)](model, "x")
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "model",
            [helper.make_tensor_value_info("x", kind, ["n", *shape])],
            [helper.make_tensor_value_info(y, kind, ["n", None])],
            self.arrays,
        )
        opset = helper.make_opsetid("", 17)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def mlp(self, model: Any, x: str) -> str:
        for layer in model.hidden:
            x = self.node("Relu", self.linear(layer, x))
        return self.linear(model.head, x)

    def resnet(self, model: Any, x: str) -> str:
        x = self.node("Relu", self.conv(model.stem, x))
        for block in model.blocks:
            y = self.conv(block.second, self.node("Relu", self.conv(block.first, x)))
            x = x if block.shortcut is None else self.conv(block.shortcut, x)
            x = self.node("Relu", self.node("Add", y, x))
        return self.linear(model.head, self.mean(x))

    def mobilenet(self, model: Any, x: str) -> str:
        x = self.node("Relu", self.conv(model.stem, x))
        for pair in zip(model.depthwise, model.pointwise, strict=True):
            for block in pair:
                x = self.node("Relu", self.conv(block, x))
        return self.linear(model.head, self.mean(x))

    def conv(self, block: Any, x: str) -> str:
        conv, bn = block.conv, block.bn
        gain = np.asarray(bn.scale[...]) / np.sqrt(np.asarray(bn.var[...]) + bn.epsilon)
        kernel = np.asarray(conv.kernel[...]) * gain
        bias = np.asarray(bn.bias[...]) - np.asarray(bn.mean[...]) * gain
        arrays = kernel.transpose(3, 2, 0, 1), bias
        return self.node(
            "Conv",
            x,
            *map(self.array, arrays),
            auto_pad="SAME_UPPER",
            strides=[conv.strides] * 2,
            group=conv.feature_group_count,
        )

    def linear(self, layer: Any, x: str) -> str:
        arrays = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        return self.node("Gemm", x, *map(self.array, arrays))

    def mean(self, x: str) -> str:
        return self.node("Flatten", self.node("GlobalAveragePool", x))

    def node(self, operation: str, *inputs: str, **attributes: Any) -> str:
        name = next(self.names)
        make = self.onnx.helper.make_node
        self.nodes.append(make(operation, inputs, [name], name=name, **attributes))
        return name

    def array(self, values: np.ndarray) -> str:
        name = next(self.names)
        proto = self.onnx.numpy_helper.from_array(values.astype(np.float32), name)
        self.arrays.append(proto)
        return name


# LiteRT: the integer program itself, its codes and scales in a flatbuffer.


def litert(program: qjax.IntegerProgram, threads: int) -> Runtime:
    """The same codes in LiteRT's operators, which round in their own way.

    What is prepared for codes, int8, returns codes.
    """
    from ai_edge_litert import schema_py_generated as schema

    content = _LiteWriter(schema, program).model()
    grids = program.input_grids[0], program.output_grids[0]

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        if x.dtype == np.int8:
            return litert_codes(content, x, threads)
        codes = np.empty(x.shape, np.int8)
        run_codes = litert_codes(content, codes, threads)

        def call() -> np.ndarray:
            codes[:] = _quantized(x, grids[0])
            return (run_codes().astype(np.float32) - grids[1].zero_point) * grids[
                1
            ].array()

        return call

    def peak(x: np.ndarray) -> int:
        return _grown(content, _LOAD_LITERT, x.shape, threads)

    return Runtime(len(content), prepare, peak)


def litert_codes(content: bytes, codes: np.ndarray, threads: int) -> Callable[[], Any]:
    """A call of a TFLite file, of one input and one output, on these codes."""
    from ai_edge_litert.interpreter import Interpreter

    own = Interpreter(model_content=content, num_threads=threads)
    place, out = (
        side[0]["index"] for side in (own.get_input_details(), own.get_output_details())
    )
    own.resize_tensor_input(place, codes.shape)
    own.allocate_tensors()

    def run() -> np.ndarray:
        own.set_tensor(place, codes)
        own.invoke()
        return own.get_tensor(out)

    return run


_LOAD_LITERT = """from ai_edge_litert.interpreter import Interpreter
own = Interpreter(path, num_threads=threads)
own.resize_tensor_input(0, x.shape)
own.allocate_tensors()
own.set_tensor(0, x.astype(np.int8))
own.invoke()"""


def _quantized(x: np.ndarray, grid: Any) -> np.ndarray:
    codes = x * np.float32(1 / grid.scale)
    np.rint(codes, out=codes)
    codes += grid.zero_point
    return np.clip(codes, -128, 127, out=codes).astype(np.int8)


_LITERT_VERSIONS = {  # The oldest that knows int8, with scales per channel.
    "ADD": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 5,
    "MEAN": 2,
}


class _LiteWriter:
    """Integer graphs of convolutions, products with matrices, sums and means."""

    def __init__(self, schema: Any, program: qjax.IntegerProgram):
        self.schema, self.graph = schema, program.graph
        self.params = {k: np.asarray(v) for k, v in program.params.items()}
        self.buffers, self.tensors, self.operators = [schema.BufferT()], [], []
        self.names: list[str] = []
        self.places: dict[int, int] = {}  # Value of the graph -> tensor.
        self.grids: dict[int, Any] = {}  # Of values whose grid is not the graph's.

    def model(self) -> bytes:
        import flatbuffers

        graph, s = self.graph, self.schema
        for v in graph.inputs:
            self.places[v] = self.activation(v)
        sums = {n.output: n for n in graph.nodes if n.operation != "requantize"}
        for node in graph.nodes:
            if node.operation == "requantize":
                self.rescaled(sums[node.inputs[0]], node)
            elif node.operation == "add":
                self.operator("ADD", node.inputs, node.output, [], s.AddOptionsT())
        subgraph = s.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs = [self.places[v] for v in graph.inputs]
        subgraph.outputs = [self.places[v] for v in graph.outputs]
        model = s.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [subgraph], self.buffers
        model.operatorCodes = []
        for name in self.names:
            own = s.OperatorCodeT()
            own.builtinCode = getattr(s.BuiltinOperator, name)
            own.deprecatedBuiltinCode = own.builtinCode
            own.version = _LITERT_VERSIONS[name]
            model.operatorCodes.append(own)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def rescaled(self, node: Any, requantize: Any) -> None:
        """An accumulator with its requantizer: one operator of LiteRT."""
        s, a = self.schema, node.attributes
        if node.operation == "sum":
            options = s.ReducerOptionsT()
            options.keepDims = False
            # Where a later scale is merged into the mean, its grid says 1.
            count = np.prod(
                [self.graph.values[node.inputs[0]].shape[d] for d in a["axes"]]
            )
            ratio = [
                float(self.params[requantize.params[k]])
                for k in ("multiplier", "shift")
            ]
            own = self.grid(node.inputs[0])
            scale = own.scale / (count * ratio[0] * 2.0 ** -ratio[1])
            self.grids[requantize.output] = dataclasses.replace(
                self.grid(requantize.output), scale=scale
            )
            axes = self.constant(np.int32(a["axes"]), s.TensorType.INT32)
            self.operator("MEAN", node.inputs, requantize.output, [axes], options)
            return
        kernel, bias = (self.params[node.params[k]] for k in ("kernel", "bias"))
        source, target = map(self.grid, (node.inputs[0], requantize.output))
        multiplier, shift = (
            self.params[requantize.params[k]].astype(np.float64).reshape(-1)
            for k in ("multiplier", "shift")
        )
        grown = 2.0 ** a["shift"]
        scale = multiplier * 2.0**-shift * grown * target.scale / source.scale
        total = kernel.astype(np.int64).sum(tuple(range(kernel.ndim - 1)))
        # LiteRT keeps the zero point apart from the bias, and the bias at 2^0.
        plain = bias.reshape(-1) / grown + (source.zero_point - a["offset"]) * total
        if node.operation == "dot":
            name, options, axis = "FULLY_CONNECTED", s.FullyConnectedOptionsT(), 0
            kernel = kernel.T
        elif a["groups"] > 1:
            name, options, axis = "DEPTHWISE_CONV_2D", s.DepthwiseConv2DOptionsT(), 3
            options.depthMultiplier = 1
            kernel = kernel.reshape(1, *kernel.shape[:2], -1)
        else:
            name, options, axis = "CONV_2D", s.Conv2DOptionsT(), 0
            kernel = kernel.transpose(3, 0, 1, 2)
        if node.operation == "conv":
            options.padding = s.Padding.SAME
            options.strideH, options.strideW = a["strides"]
            options.dilationHFactor = options.dilationWFactor = 1
        scales = np.broadcast_to(scale, kernel.shape[axis])
        grids = (scales, np.zeros(len(scales), int), axis)
        constants = [
            self.constant(kernel, s.TensorType.INT8, grids),
            self.constant(
                np.rint(plain).astype(np.int32),
                s.TensorType.INT32,
                (scales * source.scale, grids[1], 0),
            ),
        ]
        self.operator(name, node.inputs, requantize.output, constants, options)

    def operator(
        self, name: str, inputs: Any, output: int, constants: list[int], options: Any
    ) -> None:
        s = self.schema
        if name not in self.names:
            self.names.append(name)
        own = s.OperatorT()
        self.places[output] = self.activation(output)
        own.opcodeIndex = self.names.index(name)
        own.inputs = [*(self.places[v] for v in inputs), *constants]
        own.outputs = [self.places[output]]
        kind = type(options).__name__.removesuffix("T")
        own.builtinOptionsType = getattr(s.BuiltinOptions, kind)
        own.builtinOptions = options
        self.operators.append(own)

    def grid(self, v: int) -> Any:
        found = self.grids.get(v, self.graph.values[v].grid)
        assert found is not None
        return found

    def activation(self, v: int) -> int:
        value, own = self.graph.values[v], self.grid(v)
        assert value.dtype == "int8"
        grids = ([own.scale], [own.zero_point], 0)
        return self.tensor((1, *value.shape[1:]), self.schema.TensorType.INT8, 0, grids)

    def constant(self, values: np.ndarray, kind: int, grids: Any = None) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self.tensor(values.shape, kind, len(self.buffers) - 1, grids)

    def tensor(self, shape: Any, kind: int, buffer: int, grids: Any) -> int:
        own = self.schema.TensorT()
        own.shape, own.type, own.buffer = list(shape), kind, buffer
        own.name = f"t{len(self.tensors)}"
        if buffer == 0:
            own.shapeSignature = [-1, *shape[1:]]
        if grids is not None:
            own.quantization = self.schema.QuantizationParametersT()
            own.quantization.scale = np.float32(grids[0])
            own.quantization.zeroPoint = np.int64(grids[1])
            own.quantization.quantizedDimension = grids[2]
        self.tensors.append(own)
        return len(self.tensors) - 1
