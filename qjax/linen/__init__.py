"""Quantized layers for Flax Linen: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.attention import AttentionQuantizers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.linen.activations import QActivation
from qjax.linen.attention import (
    QMultiHeadAttention,
    QMultiHeadDotProductAttention,
    QSelfAttention,
)
from qjax.linen.norms import (
    QGroupNorm,
    QInstanceNorm,
    QLayerNorm,
    QRMSNorm,
    QSoftmax,
)
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
    "AttentionQuantizers",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvLocal",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
    "QGroupNorm",
    "QInstanceNorm",
    "QLayerNorm",
    "QMultiHeadAttention",
    "QMultiHeadDotProductAttention",
    "QRMSNorm",
    "QSelfAttention",
    "QSoftmax",
)
