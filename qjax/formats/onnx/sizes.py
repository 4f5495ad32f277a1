"""Sizes of axes that are known when a file runs, and those of all values of a graph."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.graph.graph import Graph, Node
from qjax.graph.operations import OPERATIONS, Operands


@dataclasses.dataclass(frozen=True)
class FreeSize:
    """A size that an input brings: ``factor * prod(symbols) + offset``."""

    symbols: tuple[str, ...]
    factor: int = 1
    offset: int = 0

    def __str__(self):
        text = "*".join([*([str(self.factor)] * (self.factor != 1)), *self.symbols])
        return f"{text}+{self.offset}" if self.offset else text


Size = int | FreeSize
Sizes = tuple[Size, ...]


class FreeSizeError(ValueError):
    """An error for sizes that a file would have to compute in another way."""


def times(sizes: Sequence[Size]) -> Size:
    """Returns the product of sizes.

    Raises:
      FreeSizeError: if it is no product of symbols.
    """
    known = math.prod(n for n in sizes if isinstance(n, int))
    free = [n for n in sizes if isinstance(n, FreeSize)]
    if not free or not known:
        return known
    if len(free) == 1:
        (n,) = free
        return dataclasses.replace(n, factor=n.factor * known, offset=n.offset * known)
    if any(n.offset for n in free):
        raise FreeSizeError("a product of sizes that are free")
    factor = known * math.prod(n.factor for n in free)
    return FreeSize(tuple(sorted(s for n in free for s in n.symbols)), factor)


def input_sizes(graph: Graph) -> list[Sizes]:
    """Returns the sizes of the inputs; leading ones that nothing fixes are symbols."""
    names: dict[int, str] = {}
    found: list[Sizes] = []
    for v in (graph.values[v] for v in graph.inputs):
        if v.shape and (not v.fixed_by or v.is_free_beyond_one):
            name = names.setdefault(v.shape[0], f"batch{len(names) or ''}")
            found.append((FreeSize((name,)), *v.shape[1:]))
        else:
            found.append(v.shape)
    return found


def value_sizes(
    graph: Graph,
    params: Mapping[str, np.ndarray],
    inputs: Sequence[Sizes],
    writer: str,
) -> list[Sizes]:
    """Returns the sizes of all values of a graph.

    The shapes are computed for several sizes of the inputs; what changes with one is
    free.

    Args:
      graph: The graph.
      params: Its parameters, int64.
      inputs: Sizes of its inputs.
      writer: Function that writes the format.

    Raises:
      ValueError: if a size depends on those of the inputs in another way than as their
        product, as half of the examples does, with the node.
    """
    free = [n for own in inputs for n in own if isinstance(n, FreeSize)]
    symbols = sorted({s for n in free for s in n.symbols})
    base = {s: 5 + 2 * k for k, s in enumerate(symbols)}

    def at(values: Mapping[str, int]) -> list[tuple[int, ...]]:
        own = [tuple(evaluated(n, values) for n in sizes) for sizes in inputs]
        return _shapes(graph, params, own)

    plain = at(base)
    moved = {s: at({**base, s: base[s] + 1}) for s in symbols}
    found = []
    for v, shape in enumerate(plain):
        sizes = []
        for d, n in enumerate(shape):
            steps = {s: moved[s][v][d] - n for s in symbols if moved[s][v][d] != n}
            sizes.append(_fitted(n, steps, base))
        found.append(tuple(sizes))
    check = {s: n + 3 + k for k, (s, n) in enumerate(base.items())}
    makers = {v: node for node in graph.nodes for v in node.outputs}
    for v, (shape, own) in enumerate(zip(at(check), found, strict=True)):
        if shape != tuple(evaluated(n, check) for n in own):
            what = "a size that is no product of those of the inputs"
            raise unsupported(writer, makers[v], what)
    return found


def evaluated(size: Size, values: Mapping[str, int]) -> int:
    """Returns a size for values of the symbols."""
    if isinstance(size, int):
        return size
    return size.factor * math.prod(values[s] for s in size.symbols) + size.offset


def _fitted(n: int, steps: Mapping[str, int], base: Mapping[str, int]) -> Size:
    if not steps:
        return n
    if len(steps) == 1:
        ((symbol, factor),) = steps.items()
        return FreeSize((symbol,), factor, n - factor * base[symbol])
    return FreeSize(tuple(steps), n // math.prod(base[s] for s in steps))


def _shapes(
    graph: Graph, params: Mapping[str, np.ndarray], inputs: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Returns the shapes of all values for some shapes of the inputs."""
    found: dict[int, tuple[int, ...]] = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        own = [found[v] for v in node.inputs]
        if node.graphs:
            made = _shapes_of_loop(node, params, own)
        else:
            values = [
                dataclasses.replace(graph.values[v], shape=shape)
                for v, shape in zip(node.inputs, own, strict=True)
            ]
            roles = {role: params[name] for role, name in node.params.items()}
            operands = Operands(node.attributes, values, roles)
            made = [OPERATIONS[node.operation].shape(operands)]
        found.update(zip(node.outputs, made, strict=True))
    return [found.get(v, x.shape) for v, x in enumerate(graph.values)]


def _shapes_of_loop(
    node: Node, params: Mapping[str, np.ndarray], inputs: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    a: Mapping[str, Any] = node.attributes
    first, body = a["consts"] + a["carries"], node.graphs["body"]
    given = [*inputs[:first], *(shape[1:] for shape in inputs[first:])]
    values = _shapes(body, params, given)
    length = a["length"] if a["length"] is not None else inputs[first][0]
    kept = [(length, *values[v]) for v in body.outputs[a["carries"] :]]
    return [*inputs[a["consts"] : first], *kept]
