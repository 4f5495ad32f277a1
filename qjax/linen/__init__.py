"""Quantized layers for Flax Linen: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.adaptive import Adaptation
from qjax.layers.attention import AttentionQuantizers
from qjax.layers.batch_norm import QKERAS_BATCH_NORM, BatchNormQuantizers
from qjax.layers.hardware import HardwareTensor, integers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.layers.low_rank import LoRAQuantizers
from qjax.linen.activations import QActivation, QAdaptiveActivation, QPReLU, QScaleShift
from qjax.linen.attention import (
    QMultiHeadAttention,
    QMultiHeadDotProductAttention,
    QSelfAttention,
)
from qjax.linen.batch_norm import QBatchNorm, QFoldedBatchNorm
from qjax.linen.low_rank import QLoRADense
from qjax.linen.merges import QAdd, QConcatenate, QMultiply
from qjax.linen.norms import (
    QGroupNorm,
    QInstanceNorm,
    QLayerNorm,
    QRMSNorm,
    QSoftmax,
)
from qjax.linen.octave import QOctaveConv
from qjax.linen.pools import QAvgPool, QGlobalAvgPool, QGlobalMaxPool, QMaxPool
from qjax.linen.products import (
    QConv,
    QConvLocal,
    QConvTranspose,
    QDense,
    QDenseGeneral,
    QDepthwiseConvTranspose,
    QEinsum,
    QEmbed,
    QSeparableConv,
)
from qjax.linen.recurrent import (
    QRNN,
    QConvLSTMCell,
    QGRUCell,
    QLSTMCell,
    QMGUCell,
    QOptimizedLSTMCell,
    QSimpleCell,
)
from qjax.linen.rotary import QRoPE
from qjax.linen.weight_norms import QSpectralNorm, QWeightNorm

__all__ = (
    "FLOAT",
    "QKERAS_BATCH_NORM",
    "QRNN",
    "Adaptation",
    "AttentionQuantizers",
    "BatchNormQuantizers",
    "HardwareTensor",
    "LayerQuantizers",
    "LoRAQuantizers",
    "QActivation",
    "QAdaptiveActivation",
    "QAdd",
    "QAvgPool",
    "QBatchNorm",
    "QConcatenate",
    "QConv",
    "QConvLSTMCell",
    "QConvLocal",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QDepthwiseConvTranspose",
    "QEinsum",
    "QEmbed",
    "QFoldedBatchNorm",
    "QGRUCell",
    "QGlobalAvgPool",
    "QGlobalMaxPool",
    "QGroupNorm",
    "QInstanceNorm",
    "QLSTMCell",
    "QLayerNorm",
    "QLoRADense",
    "QMGUCell",
    "QMaxPool",
    "QMultiHeadAttention",
    "QMultiHeadDotProductAttention",
    "QMultiply",
    "QOctaveConv",
    "QOptimizedLSTMCell",
    "QPReLU",
    "QRMSNorm",
    "QRoPE",
    "QScaleShift",
    "QSelfAttention",
    "QSeparableConv",
    "QSimpleCell",
    "QSoftmax",
    "QSpectralNorm",
    "QWeightNorm",
    "integers",
)
