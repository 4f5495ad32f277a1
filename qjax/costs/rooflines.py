"""Roofline: the least time of each layer on a machine, and what bounds it."""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from qjax.costs.layers import Layer, Layers, as_price, times


@dataclasses.dataclass(frozen=True)
class Machine:
    """The peaks of a machine.

    Attributes:
      operations: Operations a second, of which a multiply-accumulate is two.
      bandwidth: Bytes a second between memory and arithmetic.

    Raises:
      ValueError: for a peak that is not positive.
    """

    operations: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name in ("operations", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"`{name}` of a `Machine` must be positive, per second, got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def ridge(self) -> float:
        """Returns the operations a byte from which arithmetic is the bound."""
        return self.operations / self.bandwidth


class LayerTime(NamedTuple):
    """The place of a layer under a roofline, for one example."""

    operations: Any  # Two for each multiply-accumulate.
    bytes: Any  # Weights, what it reads and what it makes.
    intensity: Any  # Operations a byte.
    seconds: Any  # The larger of its two bounds.
    is_memory_bound: Any  # True where bytes take longer than operations.


def layer_time(layer: Layer, machine: Machine, *, batch: int = 1) -> LayerTime:
    """Returns the least time of a layer on a machine.

        seconds = max(operations / peak, bytes / bandwidth)

    Args:
      layer: The layer.
      machine: The machine.
      batch: Examples that share one reading of the weights.

    Raises:
      ValueError: for a batch below 1.

    References:
      Williams et al., "Roofline: An Insightful Visual Performance Model for Multicore
      Architectures", 2009.
    """
    if batch < 1:
        raise ValueError(f"`batch` must be 1 or more, got {batch}.")
    work, bits = layer.work, cast(Any, 0.0)
    if work.kind == "input":
        return LayerTime(0, 0.0, 0.0, 0.0, False)
    for operand, own in zip(work.inputs, layer.input_bits, strict=True):
        bits = bits + times(operand.size, own)
    bits = bits + times(work.kept, layer.output_bits)
    if layer.weight_bits is not None:
        size = math.prod(work.weight_shape) * work.stack
        bits = bits + times(size, layer.weight_bits) / batch
    if layer.bias_bits is not None:
        bits = bits + times(work.biases, layer.bias_bits) / batch
    size, operations = bits / 8, as_price(2 * work.products, layer)
    bounds = operations / machine.operations, size / machine.bandwidth
    is_traced = isinstance(size, jax.Array)
    seconds = jnp.maximum(*bounds) if is_traced else max(bounds)
    intensity = operations / size if is_traced or size else 0.0
    return LayerTime(operations, size, intensity, seconds, bounds[1] > bounds[0])


def roofline(
    layers: Layers, machine: Machine, *, batch: int = 1
) -> dict[str, LayerTime]:
    """Returns the least time of every layer, by name: `layer_time`.

    Args:
      layers: The layers of a model.
      machine: The machine.
      batch: Examples that share one reading of the weights.
    """
    return {layer.name: layer_time(layer, machine, batch=batch) for layer in layers}
