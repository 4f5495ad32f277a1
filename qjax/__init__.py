"""Quantize JAX and Flax models, train them as they ship, lower them to integers."""

from qjax import estimators, presets, quantizers
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
from qjax.calibration import (
    Calibrator,
    constant,
    ema_min_max,
    last_value,
    mean_std,
    min_max,
    moving_max,
    moving_min_max,
)
from qjax.formats.safetensors import load
from qjax.histograms import entropy, histogram, mse, percentile
from qjax.inspection import (
    IntegerWeight,
    IntegerWeights,
    Scales,
    SiteScale,
    dump_config,
    explain,
    integer_weights,
    scales,
)
from qjax.instrument import (
    CalibrationError,
    CalibrationInterrupt,
    QuantizedModel,
    calibrate,
    quantize_model,
)
from qjax.integer import fixed_point, requantize
from qjax.lowering import IntegerProgram, Verification, lower, verify
from qjax.presets import QuantizationParams
from qjax.rescaling import insert_rescaling
from qjax.rounding import int_range
from qjax.scheme import Rule, Scheme, Site, Where, stack_schemes
from qjax.scheme_json import SchemeError

__all__ = (
    "CalibrationError",
    "CalibrationInterrupt",
    "Calibrator",
    "IntegerProgram",
    "IntegerWeight",
    "IntegerWeights",
    "QParams",
    "QSpec",
    "QuantizationParams",
    "QuantizedModel",
    "Rule",
    "Scales",
    "Scheme",
    "SchemeError",
    "Site",
    "SiteScale",
    "Verification",
    "Where",
    "abs_max_params",
    "calibrate",
    "clipped_ste",
    "constant",
    "dequantize",
    "dump_config",
    "ema_min_max",
    "entropy",
    "estimators",
    "explain",
    "fake_quant",
    "fixed_point",
    "histogram",
    "insert_rescaling",
    "int_range",
    "integer_weights",
    "last_value",
    "load",
    "lower",
    "mean_std",
    "min_max",
    "min_max_params",
    "moving_max",
    "moving_min_max",
    "mse",
    "percentile",
    "presets",
    "quantize",
    "quantize_model",
    "quantizers",
    "requantize",
    "scales",
    "stack_schemes",
    "verify",
)
