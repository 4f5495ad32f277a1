"""Costs of a model by layer: bytes, products, bit operations, energy, time.

`QuantizedModel.layers` gives a table of layers from the plan of a model, with the bits
of a scheme, which may be traced; `IntegerProgram.layers` that of a program, with those
of its integers. A price is a function of one layer, so that each is differentiable in
bits, maps over schemes by `jax.vmap`, and a price of one's own is a function.
"""

from qjax.costs.energies import (
    Memories,
    Process,
    access_energy,
    energy,
    horowitz,
    operation_energy,
    total_energy,
)
from qjax.costs.figures import draw_prices, draw_roofline
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
from qjax.costs.prices import (
    PRICES,
    Price,
    accumulator_bits,
    activation_bytes,
    bit_operations,
    effective_bit_operations,
    macs,
    peak_bytes,
    total,
    weight_bytes,
)
from qjax.costs.rooflines import LayerTime, Machine, layer_time, roofline
from qjax.costs.tables import PriceTable, price_table

__all__ = (
    "PRICES",
    "Layer",
    "LayerTime",
    "Layers",
    "Machine",
    "Memories",
    "Operand",
    "Price",
    "PriceTable",
    "Process",
    "WordBits",
    "Work",
    "access_energy",
    "accumulator_bits",
    "activation_bytes",
    "bit_operations",
    "draw_prices",
    "draw_roofline",
    "effective_bit_operations",
    "energy",
    "horowitz",
    "layer_time",
    "layers_of",
    "macs",
    "operation_energy",
    "peak_bytes",
    "price_table",
    "roofline",
    "sum_bits",
    "total",
    "total_energy",
    "weight_bytes",
    "with_bits",
)
