"""Plans: an integer graph with its sizes as words that the native executor reads.

One table of operations, joined from the modules beside this one: a function an
operation, which adds steps to a plan or raises NotNativeError with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qjax.backends.native.contractions import CONTRACTIONS
from qjax.backends.native.emission import Constants, Emission, NotNativeError
from qjax.backends.native.gathers import GATHERS
from qjax.backends.native.lookups import LOOKUPS
from qjax.backends.native.moves import MOVES
from qjax.backends.native.normalisations import NORMALISATIONS
from qjax.backends.native.products import PRODUCTS
from qjax.backends.native.reductions import REDUCTIONS
from qjax.backends.native.rescales import RESCALES
from qjax.backends.native.tflite import TFLITE_STEPS
from qjax.graph.graph import Graph, Node
from qjax.graph.sizes import Shape, body_shapes, loop_length, value_shapes

_LOOP = 23
# Their steps write int32, also where a graph has a smaller type for few codes.
_IN_INT32 = frozenset(
    "dot conv dot_codes multiply multiply_codes sum sum_pool running_sum argmax "
    "argmin scatter_add".split()
)


class NativePlan(NamedTuple):
    """A graph with its sizes, for the native executor.

    Attributes:
      words: What it computes, int64.
      constants: Kernels, biases, tables, uint8.
      inputs: Shape and type of each input.
      outputs: Shape and type of each output.
      arena_bytes: Memory of the values between.
    """

    words: np.ndarray
    constants: np.ndarray
    inputs: tuple[tuple[Shape, str], ...]
    outputs: tuple[tuple[Shape, str], ...]
    arena_bytes: int


def make_plan(
    graph: Graph, params: Mapping[str, np.ndarray], inputs: Sequence[Shape]
) -> NativePlan:
    """Makes the plan of a graph for shapes of its inputs.

    Args:
      graph: A graph of operations that are native: `reason` returns none.
      params: Its parameters, NumPy arrays.
      inputs: Shapes of the inputs.

    Raises:
      NotNativeError: for a node that native kernels do not compute.
      ValueError: if an operation does not take the shapes.
    """
    shapes = value_shapes(graph, params, inputs)
    e = Emission(graph, params, shapes, Constants())
    _emit(e)
    words, arena = e.finish()
    numbers = np.array(words, np.int64)
    given, made = (
        tuple((tuple(shapes[v]), graph.values[v].dtype) for v in own)
        for own in (graph.inputs, graph.outputs)
    )
    return NativePlan(numbers, e.constants.joined(), given, made, arena)


def reason(
    graph: Graph,
    node: Node,
    params: Mapping[str, np.ndarray],
    shapes: Sequence[Shape],
    refusal: Callable[[np.ndarray], str],
) -> str:
    """Returns why native kernels do not compute a node, or "".

    Args:
      graph: Graph of the node.
      node: The node.
      params: Parameters of the graph, NumPy arrays.
      shapes: Shapes of the values of the graph.
      refusal: Returns why the library does not read the words of a plan, or "".
    """
    ends = tuple(dict.fromkeys(node.inputs)), node.outputs
    e = Emission(Graph(graph.values, (node,), *ends, {}), params, shapes, Constants())
    try:
        _emit(e)
    except NotNativeError as error:
        return str(error)
    return refusal(np.array(e.finish()[0], np.int64))


def _emit(e: Emission) -> None:
    for node in e.graph.nodes:
        if node.output in e.fused:
            continue
        if node.operation not in NATIVE:
            raise NotNativeError(f"there is no native kernel of `{node.operation}`")
        is_wide = node.operation in _IN_INT32
        e.computed = "int32" if is_wide else None
        NATIVE[node.operation](e, node)
        if is_wide and node.output in e.of:
            _narrow(e, node.output)
        e.computed = None


def _narrow(e: Emission, v: int) -> None:
    """Emits the copy of a value to the type that the graph has for it."""
    x, dtype = e.of[v], e.graph.values[v].dtype
    if e.buffers[x].dtype != dtype:
        e.of[v] = e.buffer(dtype, e.buffers[x].elements)
        e.copy(x, e.of[v], [e.buffers[x].elements], [1])


def _loop(e: Emission, node: Node) -> None:
    """Emits a loop, whose body is a plan inside of the plan."""
    a, body = node.attributes, node.graphs["body"]
    given = [e.shapes[v] for v in node.inputs]
    consts, carries = a["consts"], a["carries"]
    first, length = consts + carries, loop_length(node, given)
    shapes = value_shapes(body, e.params, body_shapes(node, given))
    types = [body.values[v].dtype for v in body.inputs]
    made = [body.values[v].dtype for v in body.outputs]
    made[:carries] = types[consts:first]
    inner = Emission(body, e.params, shapes, e.constants, made)
    _emit(inner)
    words, arena_bytes = inner.finish()
    inputs = [
        e.whole(v, e.shapes[v], dtype)
        for v, dtype in zip(node.inputs, types, strict=True)
    ]
    own = [e.make(v) for v in node.outputs]
    outs = [
        out
        if e.buffers[out].dtype == dtype
        else e.buffer(dtype, e.buffers[out].elements)
        for out, dtype in zip(own, made, strict=True)
    ]
    arena = e.buffer("uint8", arena_bytes)
    counts = [consts, carries, len(inputs) - first, len(outs) - carries]
    head = [length, a["is_reversed"], *counts, *inputs, *outs, arena]
    e.step(_LOOP, [*head, len(words), *words], inputs, [*outs, arena])
    for out, x in zip(own, outs, strict=True):
        if out != x:
            e.copy(x, out, [e.buffers[out].elements], [1])


NATIVE: Mapping[str, Callable[[Emission, Node], None]] = {
    **PRODUCTS,
    **CONTRACTIONS,
    **RESCALES,
    **REDUCTIONS,
    **LOOKUPS,
    **MOVES,
    **GATHERS,
    **NORMALISATIONS,
    **TFLITE_STEPS,
    "loop": _loop,
}
