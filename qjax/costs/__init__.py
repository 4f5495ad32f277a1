"""Costs of a model by layer: bytes, products, bit operations, energy, time."""

from qjax.costs.graphs import layers_of
from qjax.costs.layers import (
    Layer,
    Layers,
    Operand,
    WordBits,
    Work,
    sum_bits,
    with_bits,
)

__all__ = (
    "Layer",
    "Layers",
    "Operand",
    "WordBits",
    "Work",
    "layers_of",
    "sum_bits",
    "with_bits",
)
