"""Single products: matrices, the convolutions of ResNet-8, products of attention.

Codes of 8 bits to codes of 8 bits, in qjax and in one node of other runtimes, which has
the same codes, scales and zero points. LiteRT lacks products of two activations.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

import qjax
from experiments.benchmarks.clock import in_turn
from experiments.benchmarks.runtimes import installed, litert
from qjax.backends.native.library import find_library


@dataclasses.dataclass(frozen=True)
class Product:
    """A product: of a kernel if it has one, else of two values.

    Attributes:
      x: Shape of the first operand; channels are last.
      kernel: Shape of the kernel, or of the second operand.
      strides: Of a convolution, along both axes.
      is_kernel: Whether the second operand is known.
    """

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: int = 1
    is_kernel: bool = True

    @property
    def operations(self) -> int:
        """Returns the number of products and sums."""
        if len(self.kernel) == 4 and self.is_kernel:
            size = [-(-n // self.strides) for n in self.x[1:3]]
            return 2 * self.x[0] * math.prod(size) * math.prod(self.kernel)
        return 2 * math.prod(self.x) * self.kernel[-1]

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Computes it in float."""
        if len(self.kernel) == 4 and self.is_kernel:
            strides, axes = (self.strides,) * 2, ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, y, strides, "SAME", dimension_numbers=axes
            )
        return x @ y


def _conv(size: int, inputs: int, outputs: int, taps: int, strides: int) -> Product:
    return Product((1, size, size, inputs), (taps, taps, inputs, outputs), strides)


PRODUCTS: dict[str, Product] = {
    **{f"dot {n}x1024x1024": Product((n, 1024), (1024, 1024)) for n in (256, 32, 1)},
    "conv 32x32 3-16": _conv(32, 3, 16, 3, 1),
    "conv 32x32 16-16": _conv(32, 16, 16, 3, 1),
    "conv 32x32 16-32 /2": _conv(32, 16, 32, 3, 2),
    "conv 32x32 16-32 1x1 /2": _conv(32, 16, 32, 1, 2),
    "conv 16x16 32-32": _conv(16, 32, 32, 3, 1),
    "conv 16x16 32-64 /2": _conv(16, 32, 64, 3, 2),
    "conv 16x16 32-64 1x1 /2": _conv(16, 32, 64, 1, 2),
    "conv 8x8 64-64": _conv(8, 64, 64, 3, 1),
    "scores 8x128x64x128": Product((8, 128, 64), (8, 64, 128), is_kernel=False),
    "values 8x128x128x64": Product((8, 128, 128), (8, 128, 64), is_kernel=False),
}


class Lowered(NamedTuple):
    """A product as a program, with its codes."""

    program: qjax.IntegerProgram
    codes: tuple[np.ndarray, ...]
    kernel: qjax.inspection.IntegerWeight | None


def lower(product: Product) -> Lowered:
    """Lowers a product of random numbers."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=s).astype(np.float32) for s in (product.x, product.kernel))
    if product.is_kernel:
        fn: Callable[..., Any] = lambda params, x: product(x, params["kernel"])
        params, inputs = {"kernel": y}, (x,)
    else:
        fn, params, inputs = lambda params, x, y: product(x, y), {}, (x, y)
    qmodel = qjax.quantize_model(fn, params, *inputs)
    batch = inputs if len(inputs) > 1 else x
    qstate = qjax.calibrate(qmodel, params, [batch], progress=False)
    program = qjax.lower(qmodel, params, qstate, *inputs)
    kernel = None
    if product.is_kernel:
        (kernel,) = qjax.integer_weights(qmodel, params).values()
    codes = tuple(np.array(q) for q in program.quantize_inputs(*inputs))
    return Lowered(program, codes, kernel)


def onnx_node(product: Product, lowered: Lowered) -> bytes:
    """Writes a product as one node between its quantizers, of unsigned bytes."""
    from onnx import TensorProto, helper, numpy_helper

    program, is_conv = lowered.program, product.is_kernel and len(product.kernel) == 4
    arrays: list[Any] = []
    nodes: list[Any] = []

    def known(name: str, value: Any) -> str:
        arrays.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def grid(name: str, own: Any) -> list[str]:
        scale, zero = np.float32(own.scale), np.uint8(own.zero_point + 128)
        return [known(f"{name}_scale", scale), known(f"{name}_zero", zero)]

    ends, names = [], []
    for name, own, codes in zip("xy", program.input_grids, lowered.codes, strict=False):
        shape = _first(codes, is_conv).shape
        ends.append(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
        dequantize = [name, *grid(name, own)]
        nodes.append(helper.make_node("DequantizeLinear", dequantize, [f"{name}_real"]))
        names.append(f"{name}_real")
    if lowered.kernel is not None:
        codes, scale = (np.asarray(lowered.kernel[k]) for k in (0, 1))
        codes = codes.astype(np.int8)
        codes, axis = (codes.transpose(3, 2, 0, 1), 0) if is_conv else (codes, 1)
        scales = np.broadcast_to(scale.reshape(-1), codes.shape[axis])
        parts = [known("w", codes), known("w_scale", scales.astype(np.float32))]
        parts += [known("w_zero", np.zeros(len(scales), np.int8))]
        nodes.append(helper.make_node("DequantizeLinear", parts, ["w_real"], axis=axis))
        names.append("w_real")
    options = {"auto_pad": "SAME_UPPER", "strides": [product.strides] * 2}
    kind, own = ("Conv", options) if is_conv else ("MatMul", {})
    nodes.append(helper.make_node(kind, names, ["real"], **own))
    out = ["real", *grid("out", program.output_grids[0])]
    nodes.append(helper.make_node("QuantizeLinear", out, ["codes"]))
    shape = _first(program.codes(*lowered.codes), is_conv).shape
    result = helper.make_tensor_value_info("codes", TensorProto.UINT8, shape)
    graph = helper.make_graph(nodes, "product", ends, [result], arrays)
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return model.SerializeToString()


def _first(x: Any, is_conv: bool) -> np.ndarray:
    x = np.asarray(x)
    return np.ascontiguousarray(np.moveaxis(x, -1, 1) if is_conv else x)


def runtimes(
    product: Product, lowered: Lowered, threads: int
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yields runtimes with calls that return codes, of signed or unsigned bytes."""
    program, codes = lowered.program, lowered.codes
    size = len(codes[0])
    run = program.compile(size, threads=threads)
    yield "native", lambda: run(*codes)
    xla = jax.jit(lambda *codes: program.codes(*codes, backend="xla"))
    yield "xla", lambda: jax.block_until_ready(xla(*codes))
    is_conv = product.is_kernel and len(product.kernel) == 4
    feeds = {
        name: _first(q.astype(np.int16) + 128, is_conv).astype(np.uint8)
        for name, q in zip("xy", codes, strict=False)
    }
    if installed("onnx", "onnxruntime"):
        import onnxruntime

        content = onnx_node(product, lowered)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        yield "onnxruntime", lambda: session.run(None, feeds)[0]
        if installed("openvino"):
            import openvino as ov

            core, hints = ov.Core(), {"INFERENCE_NUM_THREADS": threads}
            model = core.compile_model(core.read_model(content), "CPU", hints)
            request = model.create_infer_request()
            yield "openvino", lambda: request.infer(feeds, share_inputs=True)[0]
    if product.is_kernel and installed("ai_edge_litert", "flatbuffers"):
        yield "litert", litert(program, threads).prepare(codes[0])


def measure(product: Product, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Returns times, GOP/s and the largest difference of codes, by runtime.

    ``peak`` is what products from registers alone reach in the same rounds, on one
    thread, in the instruction set in use.
    """
    lowered = lower(product)
    calls = dict(runtimes(product, lowered, threads))
    library, done = find_library().library, 0
    if library is not None:
        turns = 10_000
        done = 2 * library.add_products(turns)
        calls["peak"] = lambda: library.add_products(turns)
    is_conv = product.is_kernel and len(product.kernel) == 4
    wanted = np.asarray(calls["native"]()).astype(int)
    off = {}
    for name, call in calls.items():
        if name == "peak":
            continue
        found = np.asarray(call())
        if found.dtype == np.uint8:  # Channels first, about 128.
            found = found.astype(int) - 128
            found = np.moveaxis(found, 1, -1) if is_conv else found
        off[name] = float(np.max(np.abs(found.reshape(wanted.shape) - wanted)))
    times = in_turn(calls, rounds, threads)
    for name, own in times.items():
        count = done if name == "peak" else product.operations
        own["gops"] = count / own["ms"] / 1e6
        if name in off:
            own["off"] = off[name]
    return times
