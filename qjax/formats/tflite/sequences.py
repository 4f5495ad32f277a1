"""Calls of a TFLite graph one after another, as a loop that carries its states."""

import dataclasses
from typing import Any

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.graph import Graph
from qjax.graph.sizes import Shape


def with_time(shape: Shape, steps: int) -> Shape:
    """Returns the shape of the inputs of ``steps`` calls, along axis 1.

    Raises:
      ValueError: if there is no axis before it, or no step.
    """
    if not shape or steps < 1:
        raise ValueError(
            "`steps` must be at least 1 and add axis 1 to inputs with a leading axis, "
            f"got steps={steps} and an input of shape {shape}."
        )
    return shape[0], steps, *shape[1:]


def drop_time(shape: Shape) -> Shape:
    """Returns the shape of the input of one call."""
    return shape[0], *shape[2:]


def repeated(
    body: Graph, params: dict[str, np.ndarray], states: int, steps: int
) -> tuple[Graph, dict[str, np.ndarray]]:
    """Repeats a graph along axis 1 of its inputs and outputs.

    Args:
      body: Graph of one call, from states and inputs to these and outputs.
      params: Its parameters.
      states: Number of the states. They are zero before the first call.
      steps: Number of the calls.

    Returns:
      The graph and its parameters.
    """
    builder = GraphBuilder()
    for name, array in params.items():
        builder.add_param(name, array, body.grids.get(name))
    carried, inputs, parts = [], [], []
    for n, v in enumerate(body.inputs):
        own = body.values[v]
        options: Any = {"grid": own.grid, "dtype": own.dtype}
        if n < states:
            codes = np.full(own.shape, own.zero_point, own.dtype)
            role = {"value": builder.add_param(f"state/{n}", codes)}
            carried.append(builder.add("constant", (), params=role, **options))
            continue
        shape = with_time(own.shape, steps)
        value = builder.add_value(shape, own.low, own.high, **options)
        fields: Any = {
            "rounding": own.rounding,
            "is_place": own.is_place,
            "time_axis": 1,
        }
        builder.values[value] = dataclasses.replace(builder.values[value], **fields)
        inputs.append(value)
        parts.append(_swapped(builder, value))
    attributes = {"consts": 0, "carries": states, "length": None, "is_reversed": False}
    body = dataclasses.replace(body, grids={})
    found = builder.add_loop([*carried, *parts], body, attributes)
    outputs = tuple(_swapped(builder, v) for v in found[states:])
    return builder.graph(tuple(inputs), outputs), builder.params


def _swapped(builder: GraphBuilder, v: int) -> int:
    """Adds a value with its first two axes exchanged."""
    value = builder.values[v]
    order = [1, 0, *range(2, len(value.shape))]
    options: Any = {"grid": value.grid, "dtype": value.dtype}
    return builder.add("transpose", (v,), {"permutation": order}, **options)
