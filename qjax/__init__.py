"""Quantize JAX and Flax models, train them as they ship, lower them to integers."""

from qjax import estimators, quantizers
from qjax.affine import (
    QParams,
    QSpec,
    abs_max_params,
    clipped_ste,
    dequantize,
    fake_quant,
    min_max_params,
    quantize,
)
from qjax.calibration import Calibrator, ema_min_max, min_max
from qjax.formats.safetensors import load
from qjax.instrument import QuantizedModel, calibrate, quantize_model
from qjax.integer import fixed_point, requantize
from qjax.lowering import IntegerProgram, Verification, lower, verify
from qjax.rounding import int_range
from qjax.scheme import Rule, Scheme, Site, stack_schemes

__all__ = (
    "Calibrator",
    "IntegerProgram",
    "QParams",
    "QSpec",
    "QuantizedModel",
    "Rule",
    "Scheme",
    "Site",
    "Verification",
    "abs_max_params",
    "calibrate",
    "clipped_ste",
    "dequantize",
    "ema_min_max",
    "estimators",
    "fake_quant",
    "fixed_point",
    "int_range",
    "load",
    "lower",
    "min_max",
    "min_max_params",
    "quantize",
    "quantize_model",
    "quantizers",
    "requantize",
    "stack_schemes",
    "verify",
)
