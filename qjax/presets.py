"""The presets of `qjax.schemes.presets` under their public name."""

from qjax.schemes.presets import (
    FUNCTIONS,
    QuantizationParams,
    binary,
    qkeras,
    quantizeml,
    tflite_int8,
    tflite_int16x8,
    tflite_min_max,
    tfmot_all_values,
    tfmot_int8,
    tfmot_moving_average,
    w4a8,
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
