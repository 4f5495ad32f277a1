"""A node of the integer graph with the ONNX values that it reads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats import support
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.sizes import Sizes
from qjax.graph.graph import Graph, Node, Value

WRITER = "qjax.formats.onnx.write_onnx"


@dataclasses.dataclass(frozen=True)
class OnnxCall:
    """One node and what stands around it.

    Attributes:
      node: The node.
      graph: ONNX graph that grows.
      inputs: ONNX values of the inputs, in the types of the integer graph.
      values: Inputs in the integer graph.
      outputs: Outputs in the integer graph.
      shapes: Sizes of the outputs.
      params: Role -> integers, int64.
      arrays: All parameters of the program, int64.
      run: Writes a graph of a node: ``run(onnx_graph, graph, arrays, inputs, sizes)``.
    """

    node: Node
    graph: OnnxGraph
    inputs: Sequence[OnnxValue]
    values: Sequence[Value]
    outputs: Sequence[Value]
    shapes: Sequence[Sizes]
    params: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]
    run: Callable[..., list[OnnxValue]]

    def __getitem__(self, name: str) -> Any:
        return self.node.attributes[name]

    def get(self, name: str, usual: Any = None) -> Any:
        """Returns an attribute that may be there."""
        return self.node.attributes.get(name, usual)

    @property
    def x(self) -> OnnxValue:
        """Returns the first input."""
        return self.inputs[0]

    @property
    def shape(self) -> Sizes:
        """Returns the sizes of the first output."""
        return self.shapes[0]

    @property
    def dtype(self) -> str:
        """Returns the type of the first output."""
        return self.outputs[0].dtype

    @property
    def wide(self) -> str:
        """Returns the type in which sums are computed: that of the accumulator."""
        return "int64" if self.outputs[0].dtype == "int64" else "int32"

    def read(self, k: int = 0, dtype: str = "int64") -> OnnxValue:
        """Returns an input in a type."""
        return self.graph.cast(self.inputs[k], dtype)

    def moved(self, k: int = 0) -> OnnxValue:
        """Returns an input in the type of the output, or in one that ONNX reduces."""
        narrow = self.dtype in ("int8", "uint8", "int32", "int64")
        return self.read(k, self.dtype if narrow else "int32")

    def refuse(self, what: str) -> ValueError:
        """Returns the error for a form that ONNX does not express."""
        return support.unsupported(WRITER, self.node, what)

    def body(self, role: str) -> Graph:
        """Returns a graph of the node."""
        return self.node.graphs[role]
