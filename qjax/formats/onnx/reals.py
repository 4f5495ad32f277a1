"""Real values of a program: scales of values, of kernels and of accumulators."""

from collections.abc import Mapping

import numpy as np

from qjax.graph.graph import Graph, Grid, Node, Value

CLOSE = 2.0**-20  # Factors that are so near to 1 are roundings of it.


def scale_of(value: Value) -> np.ndarray:
    """Returns the scale of a value as float64; integers have 1."""
    return (value.grid or Grid(1.0, 0)).array().astype(np.float64)


def followers(graph: Graph) -> dict[int, Node]:
    """Returns accumulators that one requantizer alone reads, with it."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for v in node.inputs:
            readers.setdefault(v, []).append(node)
    return {
        v: own[0]
        for v, own in readers.items()
        if len(own) == 1 and own[0].operation == "requantize" and v not in graph.outputs
    }


def ratio_of(node: Node, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the factors of a requantizer, float64."""
    own = {role: arrays[name] for role, name in node.params.items()}
    return own["multiplier"] * 2.0 ** -own["shift"].astype(np.float64)


def kernel_scale(
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    node: Node,
    follower: Node | None,
    channel: int | None,
    count: int,
) -> np.ndarray:
    """Returns the scale of a kernel: the one that the next requantizer speaks of.

    It holds what a normalisation multiplies channels by; where there is none, or it is
    negative, the scale is that of the weights, or 1.

    Args:
      graph: The graph.
      arrays: Its parameters, int64.
      node: Product with a kernel.
      follower: The requantizer that alone reads it.
      channel: Axis of the channels in the output, None if it is not one.
      count: Number of the channels.

    Returns:
      float64, ``[count]`` or ``[1]``.
    """
    if follower is not None:
        ratio = ratio_of(follower, arrays)
        at = [d for d, n in enumerate(ratio.shape) if n > 1]
        offset = len(graph.values[node.output].shape) - ratio.ndim
        is_fit = not at or (len(at) == 1 and at[0] + offset == channel)
        is_fit = is_fit and ratio.size in (1, count)
        steps = [graph.values[v] for v in (follower.output, node.inputs[0])]
        is_fit = is_fit and all(scale_of(v).size == 1 for v in steps)
        if is_fit and np.all(ratio > 0):
            y, x = (scale_of(v).item() for v in steps)
            return ratio.reshape(-1) * y * 2.0 ** node.attributes["shift"] / x
    grid = graph.grids.get(node.params["kernel"])
    if grid is None:
        return np.ones(1)
    own = grid.array().astype(np.float64)
    is_fit = own.size == 1 or (channel is not None and own.size == count)
    return own.reshape(-1) if is_fit else np.ones(1)
