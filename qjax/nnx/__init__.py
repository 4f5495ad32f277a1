"""Quantized layers for Flax NNX: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.attention import AttentionQuantizers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.nnx.activations import QActivation
from qjax.nnx.attention import QMultiHeadAttention
from qjax.nnx.conversion import to_float, to_quantized
from qjax.nnx.layer import QuantState
from qjax.nnx.norms import QGroupNorm, QInstanceNorm, QLayerNorm, QRMSNorm, QSoftmax
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
    "AttentionQuantizers",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QGroupNorm",
    "QInstanceNorm",
    "QLayerNorm",
    "QLinear",
    "QLinearGeneral",
    "QMultiHeadAttention",
    "QRMSNorm",
    "QSoftmax",
    "QuantState",
    "to_float",
    "to_quantized",
)
