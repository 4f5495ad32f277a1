"""Time of a float model over that of its integer program, and of other runtimes.

pip install onnx onnxruntime ai-edge-litert    # Optional: left out where missing.
python experiments/benchmarks/inference.py
python experiments/benchmarks/inference.py --bodies

Times of the jitted float model over those of the others, medians of 50, in turn, on 2
cores; JAX 0.10.2, ONNX Runtime 1.31 (its own QDQ), LiteRT 2 (XNNPACK). Two runs.

| model | batch | program | ONNX Runtime | LiteRT | float, program bytes | peak MB |
|---|---|---|---|---|---|---|
| MLP 3x1024 | 1 | 1.03, 1.12 | 4.4 | 4.9, 5.3 | 11,653,160, 2,947,192 | 11.7, 3.0 |
| | 32 | 1.42, 1.34 | 4.7 | 4.2, 4.5 | | 12.0, 3.2 |
| ResNet-8 | 1 | 0.83, 1.02 | 4.9 | 5.6, 5.7 | 314,856, 81,520 | 0.6, 0.4 |
| | 32 | 1.32, 1.05 | 5.6 | 7.6, 5.9 | | 9.1, 10.4 |
| MobileNet-0.25 | 1 | 9.4, 8.8 | 22 | 34, 29 | 876,232, 240,976 | 1.3, 0.5 |
| | 32 | 21, 22 | 27 | 25, 25 | | 15.1, 9.8 |
| ResNet-20 | 1 | 0.76, 0.92 | 5.0 | 7.0, 9.0 | 1,096,168, 280,432 | 1.5, 0.6 |
| | 32 | 1.20, 1.68 | 6.3 | 7.5, 4.9 | | 15.1, 10.6 |
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import logging
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments import models  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from qjax.backends.xla import bodies


@dataclasses.dataclass(frozen=True)
class Config:
    """Integer programs against float models and other runtimes, in turn."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 60 s: two models, few rounds")
    only: str = option("", "models with this in their name")
    rounds: int = option(50, "timed calls of each runtime")
    threads: int = option(2, "of ONNX Runtime and LiteRT; JAX takes all cores")
    bodies: bool = option(False, "the bodies of dot and conv in place of models")


class Runtime(NamedTuple):
    """A model in one form."""

    nbytes: int  # Of its parameters; of its file for other runtimes.
    prepare: Callable[[np.ndarray], Callable[[], Any]]  # Batch -> computes outputs.
    # Batch -> bytes: arguments, outputs and temporaries of XLA's plan; for others by
    # how much loading and one call let a fresh process grow.
    peak: Callable[[np.ndarray], int]


class Case(NamedTuple):
    """A model with what its forms are made of."""

    model: nnx.Module
    batches: np.ndarray  # [batch, sample, ...]
    program: qjax.IntegerProgram
    runtimes: dict[str, Runtime]
    agreement: str
    expected: np.ndarray  # Outputs of the fake-quantized model on the first batch.


def build(name: str, threads: int) -> Case:
    """Random weights, ranges from random images, 8 bits by the default scheme."""
    make, shape = models.MODELS[name]
    model = make(nnx.Rngs(0))
    apply, state = models.inference(model)
    state = models.with_statistics(state)
    nnx.update(model, state)
    batches = np.random.default_rng(0).normal(size=(4, 32, *shape)).astype(np.float32)
    qmodel = qjax.quantize_model(apply, state, batches[0], scheme=qjax.Scheme())
    qstate = qjax.calibrate(qmodel, state, batches)
    program = qjax.lower(qmodel, state, qstate, batches[0])
    found = qjax.verify(program, qmodel, state, qstate, batches[0])
    sites, out = found.sites.values(), found.outputs[0]
    share = sum(r.equal for r in sites) / sum(r.codes for r in sites)
    most = max(r.max_difference for r in sites)
    agreement = (
        f"codes of its sites equal to the fake-quantized model's: {100 * share:.4f} %, "
        f"others off by {most}; end to end off by {out.max_difference}"
    )
    leaves, tree = jax.tree.flatten(state)
    real = lambda leaves, x: apply(jax.tree.unflatten(tree, leaves), x)
    integer = lambda params, x: dataclasses.replace(program, params=params)(x)
    runtimes = {
        "float": _jax(real, leaves, sum(v.nbytes for v in leaves)),
        "program": _jax(integer, dict(program.params), program.nbytes),
    }
    if _installed("onnx", "onnxruntime"):
        runtimes["onnxruntime"] = onnx_runtime(model, batches, threads)
    if _installed("ai_edge_litert", "flatbuffers"):
        runtimes["litert"] = litert(program, threads)
    expected = np.asarray(jax.jit(qmodel.apply)(state, qstate, batches[0]))
    return Case(model, batches, program, runtimes, agreement, expected)


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def _jax(fn: Callable[..., Any], params: Any, nbytes: int) -> Runtime:
    run = jax.jit(fn)

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        own = jnp.asarray(x)
        return lambda: jax.block_until_ready(run(params, own))

    def peak(x: np.ndarray) -> int:
        plan: Any = run.lower(params, x).compile().memory_analysis()
        parts = ("argument", "output", "temp")
        return sum(getattr(plan, f"{part}_size_in_bytes") for part in parts)

    return Runtime(nbytes, prepare, peak)


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


def measure(case: Case, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of all runtimes, called in turn: once to settle, once for the time.

    Thread pools of other runtimes spin for a while after a call; the first call of
    each turn lets them stop.
    """
    x = case.batches[0, :batch]
    found: dict[str, dict[str, float]] = {}
    calls, times = {}, {}
    scale = float(case.program.output_grids[0].array())
    for name, runtime in case.runtimes.items():
        calls[name], peak = runtime.prepare(x), runtime.peak(x)
        off = np.max(np.abs(np.asarray(calls[name]()) - case.expected[:batch])) / scale
        found[name] = {"bytes": runtime.nbytes, "peak": peak, "off": float(off)}
        times[name] = []
    for i in range(rounds + 2):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if i >= 2:  # After warm-up.
                times[name].append(time.perf_counter() - start)
    for name, own in times.items():
        found[name]["ms"] = 1e3 * statistics.median(own)
        pairs = zip(times["float"], own, strict=True)
        found[name]["ratio"] = statistics.median(a / b for a, b in pairs)
    return found


# ONNX Runtime: the float model with BatchNorm folded, quantized by its own tools.


def onnx_runtime(model: nnx.Module, batches: np.ndarray, threads: int) -> Runtime:
    """8 bits, QDQ, per-channel weights, ranges from the same images."""
    logging.getLogger().setLevel(logging.ERROR)  # It asks for a pass that we do.
    import onnx
    import onnxruntime
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
        content = pathlib.Path(target).read_bytes()

    first = lambda x: np.ascontiguousarray(x if x.ndim == 2 else np.moveaxis(x, -1, 1))
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
    """The same codes in LiteRT's operators, which round in their own way."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    content = _LiteWriter(schema, program).model()
    grids = program.input_grids[0], program.output_grids[0]

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        own = Interpreter(model_content=content, num_threads=threads)
        place, out = (
            side[0]["index"]
            for side in (own.get_input_details(), own.get_output_details())
        )
        own.resize_tensor_input(place, x.shape)
        own.allocate_tensors()

        def call() -> np.ndarray:
            own.set_tensor(place, _quantized(x, grids[0]))
            own.invoke()
            codes = own.get_tensor(out).astype(np.float32)
            return (codes - grids[1].zero_point) * grids[1].array()

        return call

    def peak(x: np.ndarray) -> int:
        return _grown(content, _LOAD_LITERT, x.shape, threads)

    return Runtime(len(content), prepare, peak)


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
            axes = self.constant(np.int32(a["axes"]), s.TensorType.INT32)
            self.operator("MEAN", node.inputs, requantize.output, [axes], options)
            return
        kernel, bias = (self.params[node.params[k]] for k in ("kernel", "bias"))
        source, target = (
            self.graph.values[v].grid for v in (node.inputs[0], requantize.output)
        )
        assert source is not None and target is not None
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

    def activation(self, v: int) -> int:
        value = self.graph.values[v]
        assert value.grid is not None and value.dtype == "int8"
        grids = ([value.grid.scale], [value.grid.zero_point], 0)
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


# Bodies of the nodes `dot` and `conv`, each alone.

# Batch, spatial sizes, channels, outputs, taps, strides, groups.
CONVOLUTIONS = (
    ((32, 32), 3, 16, (3, 3), 1, 1),
    ((32, 32), 3, 32, (3, 3), 1, 1),
    ((96, 96), 3, 8, (3, 3), 2, 1),
    ((32, 32), 16, 16, (3, 3), 1, 1),
    ((32, 32), 16, 32, (3, 3), 2, 1),
    ((32, 32), 16, 16, (5, 5), 1, 1),
    ((16, 16), 32, 32, (3, 3), 1, 1),
    ((8, 8), 64, 64, (3, 3), 1, 1),
    ((48, 48), 8, 16, (1, 1), 1, 1),
    ((24, 24), 32, 32, (1, 1), 1, 1),
    ((12, 12), 64, 64, (1, 1), 1, 1),
    ((6, 6), 128, 128, (1, 1), 1, 1),
    ((3, 3), 256, 256, (1, 1), 1, 1),
    ((48, 48), 8, 8, (3, 3), 1, 8),
    ((48, 48), 16, 16, (3, 3), 1, 16),
    ((48, 48), 16, 16, (3, 3), 2, 16),
    ((24, 24), 32, 32, (3, 3), 1, 32),
    ((12, 12), 64, 64, (3, 3), 1, 64),
    ((12, 12), 64, 64, (3, 3), 2, 64),
    ((6, 6), 128, 128, (3, 3), 1, 128),
    ((3, 3), 256, 256, (3, 3), 1, 256),
    ((16, 16), 64, 64, (3, 3), 1, 8),
    ((16, 16), 128, 128, (3, 3), 1, 32),
    ((128,), 64, 64, (3,), 1, 1),
    ((8, 8, 8), 32, 32, (3, 3, 3), 1, 1),
)


def in_float32(x: jax.Array, kernel: jax.Array, window: bodies.Window) -> jax.Array:
    """XLA's float convolution of the codes: exact while sums stay below 2^24."""
    real = lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        window.strides,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
    )
    return real.astype(jnp.int32)


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, float]:
    """Milliseconds, called in turn; what takes long is called less often."""
    once: dict[str, float] = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            if i and i * once[name] > seconds:
                continue
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def compare_bodies(rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of times of a convolution with its sums cut to int8, by body."""
    rng = np.random.default_rng(0)
    codes = lambda *shape: jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    for batch, case in itertools.product((1, 32), CONVOLUTIONS):
        sizes, channels, outputs, taps, stride, groups = case
        rank = len(taps)
        padded = [n + k - 1 for n, k in zip(sizes, taps, strict=True)]
        x = codes(batch, *padded, channels)
        kernel = codes(*taps, channels // groups, outputs)
        window = bodies.Window((stride,) * rank, (1,) * rank, groups)
        found: dict[str, bodies.Body] = {"convolution": bodies.convolution}
        if groups == 1:
            found["windows"] = bodies.windows
        else:
            is_depthwise = channels == groups
            found["products" if is_depthwise else "blocks"] = (
                bodies.products if is_depthwise else bodies.blocks
            )
        if rank == 2:
            found["float32"] = in_float32
        calls, expected = {}, None
        for name, body in found.items():
            run = jax.jit(
                lambda x, k, body=body, w=window: (body(x, k, w) >> 9).astype(jnp.int8)
            )
            calls[name] = functools.partial(run, x, kernel)
            got = np.asarray(calls[name]())
            expected = got if expected is None else expected
            np.testing.assert_array_equal(got, expected)
        taken = bodies.choose(x.shape, kernel.shape, window).__name__
        shape = "x".join(map(str, (batch, *sizes, channels)))
        label = f"{shape}, {'x'.join(map(str, taps))}, to {outputs}"
        label += f", strides {stride}" * (stride > 1) + f", {groups} groups" * (
            groups > 1
        )
        yield {"shape": label, "taken": taken, **medians(calls, rounds, 0.5)}
    dimensions = (((1,), (0,)), ((), ()))
    plain = lambda a, b: lax.dot_general(
        a, b, dimensions, preferred_element_type=jnp.int32
    )
    wide = lambda a, b: plain(a, b.astype(a.dtype))
    first = lambda a, b: lax.dot_general(
        b, a, (((0,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    real = lambda a, b: plain(a.astype(jnp.float32), b.astype(jnp.float32))
    own = lambda a, b: bodies.in_bytes(
        lambda a, b: bodies.dot_general(a, b, dimensions), a, b, (1, a.shape[1])
    )
    for batch, kind in itertools.product((1, 32), (jnp.int8, jnp.int16)):
        x, kernel = codes(batch, 1024).astype(kind), codes(1024, 1024)
        forms = {"convolution": wide, "float32": real, "windows": own}
        calls = {
            name: functools.partial(jax.jit(form), x, kernel)
            for name, form in forms.items()
        }
        label = f"{batch}x1024 {kind.__name__} times 1024x1024"
        yield {"shape": label, "taken": "windows", **medians(calls, rounds, 0.5)}
        if kind is jnp.int8:
            calls = {"convolution": functools.partial(jax.jit(first), x, kernel)}
            label = f"{batch}x1024 int8, the kernel as the first operand"
            yield {"shape": label, "taken": "", **medians(calls, rounds, 0.5)}


def show_bodies(rounds: int) -> list[dict[str, Any]]:
    names = ("convolution", "windows", "products", "blocks", "float32")
    print("Milliseconds; [taken]. Of dots: XLA's own, in float32, as the library does.")
    print(f"{'':44}" + "".join(f"{name:>13}" for name in names))
    rows = []
    for row in compare_bodies(rounds):
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        marked = [
            f"[{cell}]" if name == row["taken"] else f"{cell} "
            for name, cell in zip(names, cells, strict=True)
        ]
        print(f"{row['shape']:44}" + "".join(f"{cell:>13}" for cell in marked))
        rows.append(row)
    return rows


def show_models(config: Config) -> list[dict[str, Any]]:
    rounds = 10 if config.quick else config.rounds
    chosen = ("mlp", "resnet-8") if config.quick else ("",)
    rows = []
    print(
        f"{'model':15} {'batch':>5} {'runtime':12} {'ms':>8} {'float/it':>8} "
        f"{'param bytes':>12} {'peak MB':>8} {'off by':>7}"
    )
    for name in models.MODELS:
        if config.only not in name or not name.startswith(chosen):
            continue
        case = build(name, config.threads)
        for batch in (1, 32):
            for runtime, found in measure(case, batch, rounds).items():
                print(
                    f"{name:15} {batch:>5} {runtime:12} {found['ms']:>8.3f} "
                    f"{found['ratio']:>8.2f} {found['bytes']:>12,} "
                    f"{found['peak'] / 1e6:>8.2f} {found['off']:>7.2f}",
                    flush=True,
                )
                rows.append(
                    {"model": name, "batch": batch, "runtime": runtime, **found}
                )
        print(f"{name:15} {case.agreement}")
    return rows


if __name__ == "__main__":
    config = parse(Config)
    rows = show_bodies(config.rounds) if config.bodies else show_models(config)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
