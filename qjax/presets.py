"""Presets: schemes with familiar names, TFLite's, QuantizeML's, QKeras's and more."""

from qjax.schemes.low_bit import binary, w4a8
from qjax.schemes.qkeras import qkeras
from qjax.schemes.quantizeml.params import FUNCTIONS, QuantizationParams, quantizeml
from qjax.schemes.tensorflow import (
    tflite_int8,
    tflite_int16x8,
    tflite_min_max,
    tfmot_all_values,
    tfmot_int8,
    tfmot_moving_average,
)

__all__ = (
    "FUNCTIONS",
    "QuantizationParams",
    "binary",
    "qkeras",
    "quantizeml",
    "tflite_int8",
    "tflite_int16x8",
    "tflite_min_max",
    "tfmot_all_values",
    "tfmot_int8",
    "tfmot_moving_average",
    "w4a8",
)
