"""Quantize JAX and Flax models, train them as they ship, lower them to integers."""

from qjax import (
    costs,
    estimators,
    presets,
    qtools,
    quantizers,
    search,
    targets,
    training,
)
from qjax.affine import QParams, QSpec, dequantize, fake_quant, quantize
from qjax.calibration.averages import ema_min_max, moving_max, moving_min_max
from qjax.calibration.calibrator import Calibrator
from qjax.calibration.calibrators import constant, last_value, mean_std, min_max
from qjax.calibration.histograms import entropy, histogram, mse, percentile
from qjax.conformance import Conformance, conform
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
from qjax.instrumentation import quantize_model
from qjax.integer import fixed_point, requantize
from qjax.lowering import Verification, lower, verify
from qjax.observation import CalibrationError, CalibrationInterrupt, calibrate
from qjax.program import IntegerProgram, load
from qjax.qpoint import clipped_ste
from qjax.quantized_model import QuantizedModel
from qjax.ranges import abs_max_params, min_max_params
from qjax.rounding import int_range
from qjax.schemes.codec import SchemeError
from qjax.schemes.patterns import Site, Where
from qjax.schemes.quantizeml.params import QuantizationParams
from qjax.schemes.rescaling import insert_rescaling
from qjax.schemes.rules import Constraints, Rule
from qjax.schemes.scheme import Scheme, stack_schemes

__all__ = (
    "CalibrationError",
    "CalibrationInterrupt",
    "Calibrator",
    "Conformance",
    "Constraints",
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
    "conform",
    "constant",
    "costs",
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
    "qtools",
    "quantize",
    "quantize_model",
    "quantizers",
    "requantize",
    "scales",
    "search",
    "stack_schemes",
    "targets",
    "training",
    "verify",
)
