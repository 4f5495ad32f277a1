"""Quantizer families as pure functions of arrays and one frozen spec.

Functions of quantizers share two arguments:

    key        Key of ``jax.random``, for stochastic rounding and random quantizers;
               None for the deterministic form, which rounds to the nearest.
    estimator  Backward pass of `qjax.estimators` for the rounding, in place of the
               quantizer's own; a curve before the rounding, such as a relu, and
               learned arrays keep theirs.
"""

from qjax.quantizers import quantizeml
from qjax.quantizers.activations import (
    BinarySigmoid,
    BinaryTanh,
    HardSigmoid,
    HardTanh,
    SmoothSigmoid,
    SmoothTanh,
    binary_sigmoid,
    binary_tanh,
    hard_sigmoid,
    hard_tanh,
    smooth_sigmoid,
    smooth_tanh,
)
from qjax.quantizers.companding import QuantizedUlaw, quantized_ulaw
from qjax.quantizers.curves import (
    QuantizedHswish,
    QuantizedRelu,
    QuantizedSigmoid,
    QuantizedTanh,
    quantized_hswish,
    quantized_relu,
    quantized_sigmoid,
    quantized_tanh,
)
from qjax.quantizers.dorefa import (
    DoReFaActivations,
    DoReFaWeights,
    dorefa_activations,
    dorefa_weights,
)
from qjax.quantizers.learned_bits import DifferentiableBits, differentiable_bits
from qjax.quantizers.learned_scales import (
    LSQ,
    PACT,
    LSQPlus,
    lsq,
    lsq_plus,
    lsq_plus_params,
    lsq_scale,
    pact,
)
from qjax.quantizers.linear import (
    QuantizedBits,
    QuantizedLinear,
    quantized_bits,
    quantized_linear,
)
from qjax.quantizers.msqe import (
    MsqeState,
    QuantizedBitsLearnablePo2,
    QuantizedBitsMsqePo2,
    init_msqe,
    quantized_bits_learnable_po2,
    quantized_bits_msqe_po2,
    update_msqe_weight,
)
from qjax.quantizers.point import Quantized, apply, blend_noise, encode, levels
from qjax.quantizers.power_of_two import (
    QuantizedPo2,
    QuantizedReluPo2,
    quantized_po2,
    quantized_relu_po2,
)
from qjax.quantizers.spec import SPECS, Spec
from qjax.quantizers.strings import parse
from qjax.quantizers.three_levels import (
    StochasticTernary,
    Ternary,
    stochastic_ternary,
    ternary,
)
from qjax.quantizers.two_levels import (
    Bernoulli,
    Binary,
    StochasticBinary,
    bernoulli,
    binary,
    stochastic_binary,
)

__all__ = (
    "LSQ",
    "PACT",
    "SPECS",
    "Bernoulli",
    "Binary",
    "BinarySigmoid",
    "BinaryTanh",
    "DifferentiableBits",
    "DoReFaActivations",
    "DoReFaWeights",
    "HardSigmoid",
    "HardTanh",
    "LSQPlus",
    "MsqeState",
    "Quantized",
    "QuantizedBits",
    "QuantizedBitsLearnablePo2",
    "QuantizedBitsMsqePo2",
    "QuantizedHswish",
    "QuantizedLinear",
    "QuantizedPo2",
    "QuantizedRelu",
    "QuantizedReluPo2",
    "QuantizedSigmoid",
    "QuantizedTanh",
    "QuantizedUlaw",
    "SmoothSigmoid",
    "SmoothTanh",
    "Spec",
    "StochasticBinary",
    "StochasticTernary",
    "Ternary",
    "apply",
    "bernoulli",
    "binary",
    "binary_sigmoid",
    "binary_tanh",
    "blend_noise",
    "differentiable_bits",
    "dorefa_activations",
    "dorefa_weights",
    "encode",
    "hard_sigmoid",
    "hard_tanh",
    "init_msqe",
    "levels",
    "lsq",
    "lsq_plus",
    "lsq_plus_params",
    "lsq_scale",
    "pact",
    "parse",
    "quantized_bits",
    "quantized_bits_learnable_po2",
    "quantized_bits_msqe_po2",
    "quantized_hswish",
    "quantized_linear",
    "quantized_po2",
    "quantized_relu",
    "quantized_relu_po2",
    "quantized_sigmoid",
    "quantized_tanh",
    "quantized_ulaw",
    "quantizeml",
    "smooth_sigmoid",
    "smooth_tanh",
    "stochastic_binary",
    "stochastic_ternary",
    "ternary",
    "update_msqe_weight",
)
