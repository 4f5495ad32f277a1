"""QKeras's tools: data types, energy, statistics and sizes of its layers.

A model is what `read_model` reads: classes and options of layers of Keras. What QTools
gets wrong is done as it does it, and named where it is done; `qjax.costs` prices a
quantized model or a program as they are.
"""

from qjax.qtools.accumulators import (
    Product,
    accumulator_size,
    accumulator_sizes,
    sampled_accumulator_sizes,
)
from qjax.qtools.data_types import DataType, data_type
from qjax.qtools.energy import EnergyReport, map_energy, roofline_numbers
from qjax.qtools.forgiving import (
    BitSizes,
    ForgivingFactor,
    ModelBits,
    energy_sizes,
    model_bits,
)
from qjax.qtools.keras_models import ShapedLayer, ShapedModel, read_model
from qjax.qtools.operators import (
    Circuit,
    accumulator,
    adder,
    divider,
    merge,
    multiplier,
)
from qjax.qtools.statistics import (
    LayerStatistics,
    ModelStatistics,
    mode_of,
    model_statistics,
)
from qjax.qtools.type_maps import LayerTypes, Reference, TypeMap, type_map

__all__ = (
    "BitSizes",
    "Circuit",
    "DataType",
    "EnergyReport",
    "ForgivingFactor",
    "LayerStatistics",
    "LayerTypes",
    "ModelBits",
    "ModelStatistics",
    "Product",
    "Reference",
    "ShapedLayer",
    "ShapedModel",
    "TypeMap",
    "accumulator",
    "accumulator_size",
    "accumulator_sizes",
    "adder",
    "data_type",
    "divider",
    "energy_sizes",
    "map_energy",
    "merge",
    "mode_of",
    "model_bits",
    "model_statistics",
    "multiplier",
    "read_model",
    "roofline_numbers",
    "sampled_accumulator_sizes",
    "type_map",
)
