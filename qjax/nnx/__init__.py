"""Quantized layers for Flax NNX: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.nnx.activations import QActivation
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
from qjax.nnx.recurrent import (
    QRNN,
    QGRUCell,
    QLSTMCell,
    QOptimizedLSTMCell,
    QSimpleCell,
)

__all__ = (
    "FLOAT",
    "QRNN",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvTranspose",
    "QEinsum",
    "QEmbed",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QLinearGeneral",
    "QOptimizedLSTMCell",
    "QSimpleCell",
    "QuantState",
    "to_float",
    "to_quantized",
)
