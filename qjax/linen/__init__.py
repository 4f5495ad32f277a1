"""Quantized layers for Flax Linen: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.batch_norm import QKERAS_BATCH_NORM, BatchNormQuantizers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.linen.activations import QActivation
from qjax.linen.batch_norm import QBatchNorm, QFoldedBatchNorm
from qjax.linen.products import (
    QConv,
    QConvLocal,
    QConvTranspose,
    QDense,
    QDenseGeneral,
    QEinsum,
    QEmbed,
)

__all__ = (
    "FLOAT",
    "QKERAS_BATCH_NORM",
    "BatchNormQuantizers",
    "LayerQuantizers",
    "QActivation",
    "QBatchNorm",
    "QConv",
    "QConvLocal",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
    "QFoldedBatchNorm",
)
