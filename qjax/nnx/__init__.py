"""Quantized layers for Flax NNX: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.batch_norm import QKERAS_BATCH_NORM, BatchNormQuantizers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.nnx.activations import QActivation
from qjax.nnx.batch_norm import QBatchNorm, QFoldedBatchNorm
from qjax.nnx.conversion import to_float, to_quantized
from qjax.nnx.layer import QuantState
from qjax.nnx.products import (
    QConv,
    QConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
)

__all__ = (
    "FLOAT",
    "QKERAS_BATCH_NORM",
    "BatchNormQuantizers",
    "LayerQuantizers",
    "QActivation",
    "QBatchNorm",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QFoldedBatchNorm",
    "QLinear",
    "QLinearGeneral",
    "QuantState",
    "to_float",
    "to_quantized",
)
