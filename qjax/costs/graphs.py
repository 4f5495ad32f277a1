"""Layers of an integer graph, with the bits that its own integers need."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.costs.counts import conv_counts, dot_counts, tap_counts
from qjax.costs.layers import (
    Layer,
    Layers,
    Operand,
    WordBits,
    Work,
    count_examples,
    counted_once,
    read_in_loop,
)
from qjax.graph.certificate import certify
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations import OPERATIONS
from qjax.graph.packing import nbytes

Names = tuple[str, ...]
_KINDS = {"dot": "dense", "dot_codes": "matmul", "multiply": "affine"}
# Operations that take the sums of a layer to its site.
_RESCALES = ("requantize", "clip")
_LAYERS = ("accumulator", "rescale", "table", "number")
_FOLLOWERS = ("move", "choice", "table")


def layers_of(
    graph: Graph, params: Mapping[str, Any], *, examples: int | None = None
) -> Layers:
    """Returns the layers of an integer graph.

    Args:
      graph: Graph of a program.
      params: Its integers.
      examples: Examples in the traced inputs, by which counts are divided. None for
        the size of the first axis that all inputs share and no product sums over, 1 if
        there is none.

    Returns:
      The table, in the order of computation, a layer with the rescaling and the
      function that follow its sums. Weights have the bits that their codes need,
      accumulators those of the certificate. Constants that belong to no layer are not
      in it; `IntegerProgram.nbytes` counts all.

    Raises:
      ValueError: for a number of examples below 1, or that no input has.
    """
    shapes = [graph.values[v].shape for v in graph.inputs]
    arrays = {name: np.asarray(p) for name, p in params.items()}
    found = certify(graph, arrays, ()).overflow
    sums = {(bound.place, bound.value): bound.bits for bound in found}
    layers = [*_GraphLayers(graph, arrays, sums).layers()]
    works = [*counted_once(layer.work for layer in layers)]
    count = count_examples(shapes, works, examples)
    each = (_per_example(*pair, count) for pair in zip(layers, works, strict=True))
    return Layers(tuple(each), count)


def _per_example(layer: Layer, work: Work, count: int) -> Layer:
    spans = layer.weight_spans
    spans = None if spans is None else spans / count
    return dataclasses.replace(layer, work=work.per_example(count), weight_spans=spans)


def code_bits(low: int, high: int, zero_point: int = 0) -> WordBits:
    """Returns the bits of the codes from ``low`` to ``high``.

    Example:
      >>> code_bits(-7, 7)
      WordBits(bits=4, is_signed=True, is_narrow=True)
    """
    if low >= 0:
        return WordBits(max(1, high.bit_length()), is_signed=False)
    bits = max((-1 - low).bit_length(), high.bit_length()) + 1
    is_narrow = low > -(1 << (bits - 1))
    return WordBits(bits, zero_point == 0, zero_point == 0 and is_narrow)


def spans(codes: np.ndarray) -> np.ndarray:
    """Returns the bits of each code from its first to its last that is 1, sign aside.

    Example:
      >>> spans(np.int8([0, 1, -12, 127]))
      array([0, 1, 2, 7])

    References:
      Sun et al., "Gradient-based Automatic Mixed Precision Quantization for Neural
      Networks On-Chip", 2024, section III (arXiv:2405.00645).
    """
    size = np.abs(codes.astype(np.int64))
    _, first = np.frexp(size.astype(np.float64))
    _, last = np.frexp((size & -size).astype(np.float64))
    return np.where(size > 0, first.astype(np.int64) - last + 1, 0)


class _GraphLayers:
    """The layers of one graph: of a program, or of a step of a loop of it.

    Args:
      graph: The graph.
      arrays: Parameters of the program.
      sums: Place of a graph and number of an accumulator -> its bits.
      place: Place of the graph in the program.
      steps: Times that it runs.
      outside: Input -> names of the layers that its values come from.
      stacked: Outputs of which those of all steps stay.
    """

    def __init__(
        self,
        graph: Graph,
        arrays: Mapping[str, np.ndarray],
        sums: Mapping[tuple[str, int], int],
        place: str = "",
        steps: int = 1,
        outside: Mapping[int, Names] | None = None,
        stacked: Sequence[int] = (),
    ) -> None:
        self.graph, self.arrays, self.sums, self.place = graph, arrays, sums, place
        self.steps, self.outside, self.stacked = steps, outside or {}, set(stacked)
        self.site_of = {v: name for name, v in reversed([*graph.sites.items()])}
        self.users: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for v in dict.fromkeys(node.inputs):
                self.users.setdefault(v, []).append(node)
        self.makers = {v: node for node in graph.nodes for v in node.outputs}
        self.ends: dict[int, int] = {}  # First value of a layer -> its last.
        self.inner: set[int] = set()  # Outputs inside of layers.
        self.bodies: dict[int, _GraphLayers] = {}
        for node in graph.nodes:
            if node.output not in self.inner and _is_layer(node):
                self.ends[node.output] = self._follow(node.output)
        self.names = {v: self._name(v) for v in self.ends.values()}

    def layers(self) -> Iterator[Layer]:
        """Yields the layers, what goes in first."""
        if not self.place:
            for v in self.graph.inputs:
                self.names[v] = self.site_of.get(
                    v, f"input:{self.graph.inputs.index(v)}"
                )
                yield self._with_result(Work(self.names[v], self.names[v], "input"), v)
        for node in self.graph.nodes:
            if node.graphs:
                reads, a = [*map(self.sources, node.inputs)], node.attributes
                lasting = reads[: a["consts"]] + reads[a["consts"] + a["carries"] :]
                layers = [*self._body(node).layers()]
                own = [layer.work for layer in layers]
                works = read_in_loop(own, _union(reads), _union(lasting))
                for layer, work in zip(layers, works, strict=True):
                    yield dataclasses.replace(layer, work=work)
            elif node.output in self.ends:
                yield self._layer(node)

    def _follow(self, v: int) -> int:
        """Returns the last value of a layer: at its site, or where others read it."""
        while v not in self.site_of and v not in self.graph.outputs:
            users = self.users.get(v, [])
            if len(users) != 1 or set(users[0].inputs) != {v} or users[0].graphs:
                break
            name = users[0].operation
            if name not in _RESCALES and OPERATIONS[name].kind not in _FOLLOWERS:
                break
            v = users[0].output
            self.inner.add(v)
        return v

    def _name(self, v: int) -> str:
        if v in self.site_of:
            return self.site_of[v]
        if v in self.graph.outputs and not self.place:
            return f"output:{self.graph.outputs.index(v)}"
        node = self.makers[v]
        inside = f" in {self.place}" if self.place else ""
        return f"{node.path or node.operation} %{v}{inside}".strip()

    def sources(self, v: int) -> Names:
        """Returns the names of the nearest layers that a value is made of."""
        if v in self.names:
            return (self.names[v],)
        node = self.makers.get(v)
        if node is None:
            return self.outside.get(v, ())
        if node.operation == "constant":
            return ()
        if node.graphs:
            body = self._body(node)
            return body.sources(body.graph.outputs[node.outputs.index(v)])
        return _union(self.sources(u) for u in node.inputs)

    def _body(self, node: Node) -> "_GraphLayers":
        if node.output in self.bodies:
            return self.bodies[node.output]
        a, body = node.attributes, node.graphs["body"]
        first = a["consts"] + a["carries"]
        length = a["length"]
        if length is None:
            length = self.graph.values[node.inputs[first]].shape[0]
        place = self.graph.place_of(node, "body", self.place)
        given = {}
        for k, v in enumerate(body.inputs):
            names = self.sources(node.inputs[k])
            if a["consts"] <= k < first:
                end = body.outputs[k - a["consts"]]
                same = (n for n, u in body.sites.items() if u == end)
                names = tuple(same) or names
            given[v] = names
        stacked = body.outputs[a["carries"] :]
        steps = self.steps * length
        common = self.arrays, self.sums
        found = _GraphLayers(body, *common, place, steps, given, stacked)
        self.bodies[node.output] = found
        return found

    def _layer(self, node: Node) -> Layer:
        end, values = self.ends[node.output], self.graph.values
        inputs = [self._operand(v) for v in node.inputs]
        products, useful, terms = self._count(node)
        work = Work(
            name=self.names[end],
            path=node.path,
            kind=self._kind(node),
            products=products * self.steps,
            useful_products=useful * self.steps,
            terms=terms,
            inputs=tuple(inputs),
            places=self._places(node),
            other_bytes=self._other_bytes(node.output, end),
            **self._params_of(node),
        )
        layer = self._with_result(work, end)
        own = [_of_value(values[v]) for v in node.inputs]
        weight = self._codes(node, "kernel")
        operands = own if weight is None else [*own, weight]
        is_sum = OPERATIONS[node.operation].kind == "accumulator"
        sums = self.sums.get((self.place, node.output)) if is_sum else None
        return dataclasses.replace(
            layer,
            input_bits=tuple(x.bits for x in own),
            weight_bits=None if weight is None else weight.bits,
            bias_bits=32 if work.bias else None,
            accumulator_bits=sums,
            sign_bits=tuple(x.is_signed for x in operands),
            weight_spans=self._spans(node) if work.weight and products else None,
        )

    def _operand(self, v: int) -> Operand:
        value, names = self.graph.values[v], self.sources(v)
        size = math.prod(value.shape) * self.steps
        is_given = any(name.startswith("input:") for name in names)
        return Operand(value.shape, names, size=size, is_given=is_given)

    def _with_result(self, work: Work, v: int) -> Layer:
        value = self.graph.values[v]
        size = math.prod(value.shape) * (self.steps if v in self.stacked else 1)
        is_returned = v in self.graph.outputs and not self.place
        shape = value.shape
        own: dict[str, Any] = {"output_shape": shape, "kept": size, "steps": self.steps}
        work = dataclasses.replace(work, is_returned=is_returned, **own)
        return Layer(work, (), None, None, _of_value(value).bits, None)

    def _kind(self, node: Node) -> str:
        a, name = node.attributes, node.operation
        if name != "conv" or a["groups"] == 1:
            return _KINDS.get(name, name)
        channels = self.graph.values[node.inputs[0]].shape[a["dimensions"][0][1]]
        return "depthwise_conv" if a["groups"] == channels else "grouped_conv"

    def _shape(self, v: int) -> tuple[int, ...]:
        return self.graph.values[v].shape

    def _count(self, node: Node) -> tuple[int, int, int]:
        a, shapes = node.attributes, [self._shape(v) for v in node.inputs]
        first, last = shapes[0], shapes[-1]
        out = math.prod(self._shape(node.output))
        if node.operation in ("multiply", "multiply_codes"):
            return out, out, 1
        if node.operation == "dot_codes":
            return dot_counts(first, last, (a["contract"], a["batch"]))
        if node.operation not in ("dot", "conv"):
            return 0, 0, 0
        kernel = self.arrays[node.params["kernel"]].shape
        if node.operation == "conv":
            return conv_counts(first, kernel, self._shape(node.output), _conv_params(a))
        x, y = (kernel, first) if a["kernel_operand"] == 0 else (first, kernel)
        return dot_counts(x, y, (a["contract"], a["batch"]))

    def _places(self, node: Node) -> int:
        a = node.attributes
        if node.operation not in ("dot", "dot_codes", "conv"):
            return 0
        x = self._shape(node.inputs[0])
        if node.operation == "conv":
            return x[a["dimensions"][0][0]]
        side = 1 - a["kernel_operand"] if node.operation == "dot" else 0
        summed = a["contract"][side]
        return math.prod(n for d, n in enumerate(x) if d not in summed)

    def _params_of(self, node: Node) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "kernel" in node.params:
            array = self.arrays[node.params["kernel"]]
            found["weight"] = node.params["kernel"]
            found |= {"weight_shape": array.shape, "weights": array.size}
        if "bias" in node.params:
            bias = node.params["bias"]
            found |= {"bias": bias, "biases": self.arrays[bias].size}
        return found

    def _codes(self, node: Node, role: str) -> WordBits | None:
        if role not in node.params:
            return None
        codes = self.arrays[node.params[role]]
        return code_bits(int(codes.min(initial=0)), int(codes.max(initial=0)))

    def _other_bytes(self, first: int, last: int) -> int:
        """Returns the bytes of tables, multipliers and shifts of a layer."""
        total, v = 0, last
        while True:
            node = self.makers[v]
            roles = node.params.items()
            names = (name for role, name in roles if role not in ("kernel", "bias"))
            total += sum(nbytes(self.arrays[name]) for name in names)
            if v == first or first in node.outputs:
                return total
            v = node.inputs[0]

    def _spans(self, node: Node) -> float:
        """Returns the sum over all products of the span of the weight."""
        kernel = self.arrays[node.params["kernel"]]
        own = spans(kernel)
        if node.operation != "conv":
            products = self._count(node)[0] * self.steps
            return float(own.mean() * products) if own.size else 0.0
        a = node.attributes
        x, out = self._shape(node.inputs[0]), self._shape(node.output)
        uses = tap_counts(x, kernel.shape, out, _conv_params(a))
        batch = out[a["dimensions"][2][0]]
        return float((own * uses).sum()) * batch * self.steps


def _is_layer(node: Node) -> bool:
    """Returns whether an operation begins a layer: it sums, looks up or compares."""
    if node.operation in ("constant", *_RESCALES):
        return False
    return OPERATIONS[node.operation].kind in _LAYERS


def _of_value(value: Value) -> WordBits:
    return code_bits(value.low, value.high, value.zero_point)


def _conv_params(a: Mapping[str, Any]) -> dict[str, Any]:
    names = {"window_strides": "strides", "rhs_dilation": "dilation"}
    names |= {"padding": "padding", "lhs_dilation": "input_dilation"}
    return {"dimensions": a["dimensions"]} | {k: a[v] for k, v in names.items()}


def _union(names: Any) -> Names:
    return tuple(dict.fromkeys(name for some in names for name in some))
