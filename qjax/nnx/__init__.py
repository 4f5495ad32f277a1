"""Quantized layers for Flax NNX: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.adaptive import Adaptation
from qjax.layers.attention import AttentionQuantizers
from qjax.layers.batch_norm import QKERAS_BATCH_NORM, BatchNormQuantizers
from qjax.layers.hardware import HardwareTensor, integers
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.layers.low_rank import LoRAQuantizers
from qjax.nnx.activations import QActivation, QAdaptiveActivation, QPReLU, QScaleShift
from qjax.nnx.attention import QMultiHeadAttention
from qjax.nnx.batch_norm import QBatchNorm, QFoldedBatchNorm
from qjax.nnx.conversion import qkeras_quantizers, to_float, to_quantized
from qjax.nnx.layer import QuantState
from qjax.nnx.low_rank import QLoRA, QLoRALinear
from qjax.nnx.merges import QAdd, QConcatenate, QMultiply
from qjax.nnx.norms import QGroupNorm, QInstanceNorm, QLayerNorm, QRMSNorm, QSoftmax
from qjax.nnx.octave import QOctaveConv
from qjax.nnx.pools import QAvgPool, QGlobalAvgPool, QGlobalMaxPool, QMaxPool
from qjax.nnx.products import (
    QConv,
    QConvTranspose,
    QDepthwiseConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
    QSeparableConv,
)
from qjax.nnx.recurrent import (
    QRNN,
    QGRUCell,
    QLSTMCell,
    QOptimizedLSTMCell,
    QSimpleCell,
)
from qjax.nnx.rotary import QRoPE
from qjax.nnx.weight_norms import QSpectralNorm, QWeightNorm

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
    "QConvTranspose",
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
    "QLinear",
    "QLinearGeneral",
    "QLoRA",
    "QLoRALinear",
    "QMaxPool",
    "QMultiHeadAttention",
    "QMultiply",
    "QOctaveConv",
    "QOptimizedLSTMCell",
    "QPReLU",
    "QRMSNorm",
    "QRoPE",
    "QScaleShift",
    "QSeparableConv",
    "QSimpleCell",
    "QSoftmax",
    "QSpectralNorm",
    "QWeightNorm",
    "QuantState",
    "integers",
    "qkeras_quantizers",
    "to_float",
    "to_quantized",
)
