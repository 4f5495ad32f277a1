"""Writes an integer program as ONNX with the quantizers of runtimes."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.elementwise import compared
from qjax.formats.onnx.files import end_names, model, notes_of, onnx_module
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.matrices import ImageProduct, image_product
from qjax.formats.onnx.reals import CLOSE, followers, kernel_scale, ratio_of, scale_of
from qjax.formats.onnx.sizes import FreeSizeError, Sizes, value_sizes
from qjax.formats.onnx.writer import EMITTERS, check_opset, emit, ended, entered
from qjax.formats.support import check_operations, check_whole
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, Node, Value
from qjax.program import IntegerProgram

QDQ_WRITER = "qjax.formats.onnx.write_onnx_qdq"
QLINEAR_WRITER = "qjax.formats.onnx.write_onnx_qlinear"
_STORED = ("int8", "uint8")


class _Walk:
    """The values of a program in ONNX: as codes, and as what else has been made.

    Args:
      program: The program.
      writer: Function that writes the format.
      names: Names of inputs and outputs.
    """

    def __init__(
        self, program: IntegerProgram, writer: str, names: tuple[list[str], list[str]]
    ) -> None:
        self.program, self.writer = program.graph, writer
        arrays = program.params.items()
        self.arrays = {k: np.asarray(v).astype(np.int64) for k, v in arrays}
        self.graph = OnnxGraph()
        self.inputs = entered(self.graph, self.program, names[0])
        self.graph.names.update(names[1])
        own = [x.shape for x in self.inputs]
        self.sizes: list[Sizes] = value_sizes(self.program, self.arrays, own, writer)
        self.codes: dict[int, OnnxValue] = {}
        self.bytes: dict[int, OnnxValue] = {}  # Codes without a sign, from 0 to 255.
        self.reals: dict[int, OnnxValue] = {}
        self.units: dict[int, np.ndarray] = {}  # Accumulator -> real value of its 1.
        self.followers = followers(self.program)

    def call(self, node: Node, inputs: Sequence[OnnxValue]) -> OnnxCall:
        """Returns a node with its surroundings."""
        values = self.program.values
        return OnnxCall(
            node=node,
            graph=self.graph,
            inputs=inputs,
            values=[values[v] for v in node.inputs],
            outputs=[values[v] for v in node.outputs],
            shapes=[self.sizes[v] for v in node.outputs],
            params={role: self.arrays[name] for role, name in node.params.items()},
            arrays=self.arrays,
            run=emit,
        )

    def seen(self, v: int) -> OnnxValue:
        """Returns a value for its type and shape alone."""
        return OnnxValue("", self.program.values[v].dtype, self.sizes[v])

    def scale(self, call: OnnxCall, own: ImageProduct) -> np.ndarray:
        """Returns the scale of the kernel of a product."""
        behind, node = self.followers.get(call.node.output), call.node
        pair = (own.channel, len(own.kernel))
        return kernel_scale(self.program, self.arrays, node, behind, *pair)

    def exactly(self, node: Node) -> None:
        """Adds a node in integers."""
        call = self.call(node, [self.code(v) for v in node.inputs])
        try:
            made = EMITTERS[node.operation](call)
        except FreeSizeError as error:
            raise call.refuse(str(error)) from error
        made = made if isinstance(made, tuple) else (made,)
        for v, x, value in zip(node.outputs, made, call.outputs, strict=True):
            self.codes[v] = self.graph.cast(x, value.dtype)

    def unsigned(self, v: int) -> OnnxValue:
        """Returns codes as uint8, 128 above those with a sign."""
        if v not in self.bytes:
            x = self.codes[v]
            if x.dtype == "int8":
                x = self.graph.add(self.graph.cast(x, "int32"), 128)
            self.bytes[v] = self.graph.cast(x, "uint8")
        return self.bytes[v]

    def code(self, v: int) -> OnnxValue:
        """Returns codes in the type of the graph."""
        if v not in self.codes:
            x, own = self.bytes[v], self.program.values[v]
            if own.dtype == "int8":
                x = self.graph.sub(self.graph.cast(x, "int32"), 128)
            self.codes[v] = self.graph.cast(x, own.dtype)
        return self.codes[v]


class _QdqWalk(_Walk):
    """Real values between QuantizeLinear and DequantizeLinear.

    Both are of uint8: of int8 that other operators read, too, ONNX Runtime 1.32 makes
    uint8 and leaves those as they are.
    """

    def code(self, v: int) -> OnnxValue:
        """Returns the codes of a value, quantized if it is real."""
        if v in self.units and v not in self.codes:  # Whole steps of an accumulator.
            steps = self.graph.two("Div", self.reals[v], self.units[v])
            wide = self.graph.cast(self.graph.one("Round", steps), "int64")
            self.codes[v] = self.graph.cast(wide, self.program.values[v].dtype)
        return super().code(v)

    def real(self, v: int) -> OnnxValue:
        """Returns the real values of codes, on the grid of the graph."""
        if v not in self.reals:
            own, g = self.program.values[v], self.graph
            scale = g.constant(scale_of(own), "float32")
            if _is_linear(own):
                x, zero = self.unsigned(v), g.constant(_centre(own), "uint8")
                pair: dict[str, Any] = {"dtype": "float32", "shape": x.shape}
                self.reals[v] = g.op("DequantizeLinear", x, scale, zero, **pair)
            else:
                self.reals[v] = self.unfused(v)
        return self.reals[v]

    def unfused(self, v: int) -> OnnxValue:
        """Returns the real values of codes as no operator that runtimes fuse.

        Of QuantizeLinear, DequantizeLinear, QuantizeLinear ONNX Runtime 1.32 leaves the
        last one alone, and so rounds once.
        """
        own, g = self.program.values[v], self.graph
        wide = g.sub(g.cast(self.code(v), "int64"), own.zero_point)
        scale = g.constant(scale_of(own), "float32")
        return g.two("Mul", g.cast(wide, "float32"), scale)

    def quantize(self, v: int, x: OnnxValue) -> None:
        """Keeps real values as codes on the grid of a value."""
        g, own = self.graph, self.program.values[v]
        scale, zero = scale_of(own), own.zero_point
        pair: dict[str, Any] = {"dtype": "float32", "shape": x.shape}
        if not _is_linear(own):
            steps = g.one("Round", g.two("Div", x, scale))
            ends = (g.constant(e - zero, "float32") for e in (own.low, own.high))
            steps = g.op("Clip", steps, *ends, **pair)
            wide = g.add(g.cast(steps, "int64"), zero)
            self.codes[v] = g.cast(wide, own.dtype)
            return
        info = np.iinfo(own.dtype)
        if (own.low, own.high) != (info.min, info.max):
            reals = ((e - zero) * scale.item() for e in (own.low, own.high))
            ends = (g.constant(e, "float32") for e in reals)
            x = g.op("Clip", x, *ends, **pair)
        given = (g.constant(scale, "float32"), g.constant(_centre(own), "uint8"))
        own_: dict[str, Any] = {"dtype": "uint8", "shape": x.shape}
        self.bytes[v] = g.op("QuantizeLinear", x, *given, **own_)

    def product(self, node: Node, opset: int) -> bool:
        """Adds a product with a kernel in real values; returns whether it is one."""
        call = self.call(node, [self.seen(v) for v in node.inputs])
        own, g = image_product(call), self.graph
        if own is None or own.bias is None:
            return False
        scale = self.scale(call, own).astype(np.float32)
        axis: dict[str, Any] = {"axis": 0} if scale.size > 1 else {}
        one = scale if scale.size > 1 else scale.reshape(())
        dtype = weight_type(own.kernel, opset, is_conv=bool(own.attributes))
        zero = 128 if dtype == "uint8" else 0
        weights = g.op(
            "DequantizeLinear",
            g.constant(own.kernel + zero, dtype, "kernel"),
            g.constant(one, "float32"),
            *([g.constant(np.full(one.shape, zero), dtype)] if zero else []),
            dtype="float32",
            shape=own.kernel.shape,
            **axis,
        )
        unit = one.astype(np.float64) * scale_of(call.values[0]).item()
        unit = unit / 2.0 ** node.attributes["shift"]
        bias = np.broadcast_to(own.bias, (len(own.kernel),))
        shift = g.op(
            "DequantizeLinear",
            g.constant(bias, "int32", "bias"),
            g.constant(unit, "float32"),
            dtype="float32",
            shape=bias.shape,
            **axis,
        )
        x = own.enter(g, self.real(node.inputs[0]))
        pair: dict[str, Any] = {"dtype": "float32", "shape": own.shape}
        if own.attributes:
            y = g.op("Conv", x, weights, shift, **own.attributes, **pair)
        else:
            y = g.op("Gemm", x, weights, shift, transB=1, **pair)
        sizes = [1] * len(call.shape)
        if unit.size > 1 and own.channel is not None:
            sizes[own.channel] = unit.size
        self.reals[node.output] = own.leave(g, y)
        self.units[node.output] = np.asarray(unit).reshape(sizes)
        return True

    def requantized(self, node: Node) -> bool:
        """Adds a requantizer of real values; returns whether it is one."""
        (v,), own = node.inputs, self.program.values[node.output]
        if v not in self.units and not _is_short(own):
            return False
        x, unit = self._steps(v, node.attributes["input_zero_point"])
        gain = ratio_of(node, self.arrays) * scale_of(own) / unit
        if np.any(np.abs(gain - 1) > CLOSE):
            x = self.graph.two("Mul", x, gain)
        self.quantize(node.output, x)
        return True

    def _steps(self, v: int, zero: int) -> tuple[OnnxValue, np.ndarray]:
        """Returns a value about a zero point as float32, and what its 1 stands for."""
        own, g = self.program.values[v], self.graph
        if v in self.units:
            return self.reals[v], self.units[v]
        if own.grid is not None and own.zero_point == zero:
            return self.unfused(v), scale_of(own)
        wide = g.sub(g.cast(self.code(v), "int64"), zero)
        return g.cast(wide, "float32"), np.ones(())

    def compared(self, node: Node) -> bool:
        """Adds a comparison of values in float32; returns whether it is one."""
        a, values = node.attributes, [self.program.values[v] for v in node.inputs]
        rows = zip(a["zero_points"], a["multipliers"], a["exponents"], strict=True)
        wanted = [(zero, m * 2.0**e) for zero, m, e in rows]
        own = [(x.zero_point, *scale_of(x).reshape(-1)) for x in values]
        if own != wanted or not all(map(_is_short, values)):
            return False
        sides = map(self.real, node.inputs)
        self.codes[node.output] = compared(self.graph, a["kind"], *sides)
        return True

    def sum_of(self, node: Node) -> bool:
        """Adds a sum of codes in real values; returns whether it is one."""
        values = [self.program.values[v] for v in node.inputs]
        own, g = self.program.values[node.output], self.graph
        multipliers, shift = node.attributes["multipliers"], node.attributes["shift"]
        most = sum(
            abs(m) * max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
            for x, m in zip(values, multipliers, strict=True)
        )
        if not all(map(_is_short, (*values, own))) or most >> shift > 1 << 22:
            return False
        step = scale_of(own) * 2.0**-shift
        # Fused sums add the zero point before they round, which turns ties about an
        # odd one. Longer factors have none in float32.
        common = functools.reduce(math.gcd, multipliers, 1 << shift)
        is_fused = own.zero_point % 2 == 0 or (1 << shift) // common >= 1 << 24
        found = None
        for v, m in zip(node.inputs, multipliers, strict=True):
            gain = m * step / scale_of(self.program.values[v])
            is_first = found is None and not is_fused
            x = self.unfused(v) if is_first else self.real(v)
            x = x if abs(gain - 1) < CLOSE else g.two("Mul", x, gain)
            found = x if found is None else g.two("Add", found, x)
        assert found is not None
        self.quantize(node.output, found)
        return True


def _is_short(own: Value) -> bool:
    """Returns whether codes have 16 bits, of which float32 is wrong by one at most."""
    return own.high - own.low < 1 << 16


def _is_linear(own: Value) -> bool:
    """Returns whether QuantizeLinear has the grid of a value."""
    if own.grid is None or own.dtype not in _STORED or scale_of(own).size > 1:
        return False
    info = np.iinfo(own.dtype)
    return bool(info.min <= own.zero_point <= info.max)


def _centre(own: Value) -> int:
    """Returns the zero point of codes without a sign."""
    return own.zero_point + (128 if own.dtype == "int8" else 0)


def weight_type(kernel: np.ndarray, opset: int, *, is_conv: bool) -> str:
    """Returns the smallest type of weights that an operator set has.

    ONNX Runtime 1.32 makes QLinearConv of a convolution of int2, and refuses it then.
    """
    low, high = int(kernel.min(initial=0)), int(kernel.max(initial=0))
    for bits, least in ((4, 21),) if is_conv else ((2, 25), (4, 21)):
        end = 1 << (bits - 1)
        if opset >= least and -end <= low and high < end:
            return f"int{bits}"
    # Two products of uint8 and int8 of 7 bits fit 16 bits, in which chips add them.
    return "int8" if -64 <= low and high < 64 else "uint8"


def write_onnx_qdq(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int | None = None,
) -> bytes:
    """Writes a program as ONNX of real values, with QuantizeLinear on its grids.

    The file takes and gives the real values of the program itself; what is on no grid,
    such as tokens and places, stays integer. Products with kernels and sums are float
    operators between DequantizeLinear and QuantizeLinear, which runtimes fuse; so are
    requantizers of up to 16 bits, and comparisons. All else is computed on codes, as
    `write_onnx` has it: softmaxes, normalisations, quotients and loops need int64,
    which OpenVINO's CPU computes as int32, wrongly. Activations are uint8. Weights are
    int4 by their codes, int2 outside of convolutions, int8 up to 7 bits and uint8 about
    128 beyond: products of uint8 with more of int8 saturate on chips without VNNI.
    Biases are int32. float32 sums round: one requantization may differ by a code near a
    tie; with scales that are powers of two and sums below 2^24 none does. ONNX Runtime
    1.32 has no products of int4 and int2 with codes: it converts such weights. Kernels
    with scales of blocks have none here: graphs have a product for each block.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      opset: Operator set, 18 to 25; int4 needs 21, int2 needs 25. None for the least
        that has the types of the weights.

    Returns:
      What the file holds.

    Raises:
      ImportError: without `onnx`: the extra ``qjax[onnx]``.
      OSError: if the file cannot be written. An old one stays as it was.
      ValueError: as for `write_onnx`.
    """
    check_whole(program)
    onnx_module()
    graph = program.graph
    check_operations(QDQ_WRITER, graph)
    if opset is None:
        opset = _least_opset(graph, program.params)
    check_opset(opset)
    names = end_names(program)
    walk = _QdqWalk(program, QDQ_WRITER, names)
    inputs = []
    for v, x in zip(graph.inputs, walk.inputs, strict=True):
        own, (gain, offset) = graph.values[v], graph.values[v].rescaling
        if own.grid is None:
            walk.codes[v] = x
            inputs.append(x)
            continue
        real = OnnxValue(x.name, "float32", x.shape)
        inputs.append(real)
        moved = walk.graph.add(walk.graph.mul(real, gain), offset)
        walk.quantize(v, moved)
    for node in graph.nodes:
        kind = node.operation
        is_done = kind in ("conv", "dot") and walk.product(node, opset)
        is_done = is_done or (kind == "requantize" and walk.requantized(node))
        is_done = is_done or (kind == "add" and walk.sum_of(node))
        is_done = is_done or (kind == "compare" and walk.compared(node))
        if not is_done:
            walk.exactly(node)
    found = []
    for v in graph.outputs:
        is_real = graph.values[v].grid is not None
        if is_real and v in walk.units:
            walk.codes[v] = walk.code(v)
            del walk.reals[v]
        found.append(walk.real(v) if is_real else walk.code(v))
    outputs = ended(walk.graph, found, names[1])
    data = bytes(model(walk.graph, inputs, outputs, opset=opset).SerializeToString())
    if path is not None:
        write_atomically(path, data)
    return data


def _least_opset(graph: Graph, params: Mapping[str, Any]) -> int:
    kernels = (
        (np.asarray(params[node.params["kernel"]]).astype(np.int64), node.operation)
        for node in graph.nodes
        if node.operation in ("conv", "dot")
    )
    kinds = {weight_type(own, 25, is_conv=kind == "conv") for own, kind in kernels}
    return 25 if "int2" in kinds else 21 if "int4" in kinds else 18


class _QlinearWalk(_Walk):
    """Codes without a sign, which QLinearConv takes fastest."""

    def product(self, node: Node) -> bool:
        """Adds a product with its requantizer as QLinearConv, if it is one."""
        call = self.call(node, [self.seen(v) for v in node.inputs])
        own, g = image_product(call), self.graph
        behind = self.followers.get(node.output)
        if own is None or own.bias is None or behind is None:
            return False
        y, x = self.program.values[behind.output], call.values[0]
        scale = self.scale(call, own)
        unit = scale * scale_of(x).item() / 2.0 ** node.attributes["shift"]
        ratio = ratio_of(behind, self.arrays)
        is_one = np.all(np.abs(ratio.reshape(-1) * scale_of(y) / unit - 1) < CLOSE)
        if not is_one or not _is_linear(y) or node.attributes["shift"]:
            return False
        image = own.enter(g, self.unsigned(node.inputs[0]))
        shape, kernel = own.shape, own.kernel
        if not own.attributes:
            image = g.reshape(image, (*image.shape, 1))
            shape, kernel = (*shape, 1), kernel[..., None]
        size = (len(kernel),) if scale.size > 1 else ()
        found = g.op(
            "QLinearConv",
            image,
            g.constant(scale_of(x).item(), "float32"),
            g.constant(_centre(x), "uint8"),
            g.constant(kernel + 128, "uint8", "kernel"),
            g.constant(scale.reshape(size), "float32"),
            g.constant(np.full(size, 128), "uint8"),
            g.constant(scale_of(y).item(), "float32"),
            g.constant(_centre(y), "uint8"),
            g.constant(np.broadcast_to(own.bias, (len(kernel),)), "int32", "bias"),
            dtype="uint8",
            shape=shape,
            **own.attributes,
        )
        found = own.leave(g, g.reshape(found, own.shape))
        more = _centre(y) - y.zero_point
        found = g.clip(found, y.low + more, y.high + more)
        self.bytes[behind.output] = found
        return True


def write_onnx_qlinear(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = 18,
) -> bytes:
    """Writes the codes of a program as ONNX with QLinearConv, for speed.

    The file takes and gives integers as that of `write_onnx` does. A product with a
    kernel of bytes and the requantizer that reads it are one QLinearConv, of codes and
    weights without a sign, which no chip saturates; all else is as in `write_onnx`. It
    requantizes by a float32 factor: one requantization may differ by a code near a tie.

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      opset: Operator set of ONNX, 18 to 25.

    Returns:
      What the file holds.

    Raises:
      ImportError: without `onnx`: the extra ``qjax[onnx]``.
      OSError: if the file cannot be written. An old one stays as it was.
      ValueError: as for `write_onnx`.
    """
    check_whole(program)
    onnx_module()
    graph = program.graph
    check_operations(QLINEAR_WRITER, graph)
    check_opset(opset)
    names = end_names(program)
    walk = _QlinearWalk(program, QLINEAR_WRITER, names)
    walk.codes.update(zip(graph.inputs, walk.inputs, strict=True))
    fused = set()
    for node in graph.nodes:
        if id(node) in fused:
            continue
        if node.operation in ("conv", "dot") and walk.product(node):
            fused.add(id(walk.followers[node.output]))
            continue
        walk.exactly(node)
    outputs = ended(walk.graph, [walk.code(v) for v in graph.outputs], names[1])
    ends = [graph.values[v] for v in (*graph.inputs, *graph.outputs)]
    notes = notes_of([*names[0], *names[1]], ends)
    made = model(walk.graph, walk.inputs, outputs, opset=opset, notes=notes)
    data = bytes(made.SerializeToString())
    if path is not None:
        write_atomically(path, data)
    return data
