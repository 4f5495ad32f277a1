"""Quantized layers for Flax Linen: Flax's own, with quantizers of their values.

Each takes the arguments of the layer that it replaces, and has its parameters.
"""

from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from qjax.linen.activations import QActivation
from qjax.linen.products import (
    QConv,
    QConvLocal,
    QConvTranspose,
    QDense,
    QDenseGeneral,
    QEinsum,
    QEmbed,
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

__all__ = (
    "FLOAT",
    "QRNN",
    "LayerQuantizers",
    "QActivation",
    "QConv",
    "QConvLSTMCell",
    "QConvLocal",
    "QConvTranspose",
    "QDense",
    "QDenseGeneral",
    "QEinsum",
    "QEmbed",
    "QGRUCell",
    "QLSTMCell",
    "QMGUCell",
    "QOptimizedLSTMCell",
    "QSimpleCell",
)
