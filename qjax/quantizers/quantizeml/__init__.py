"""QuantizeML's quantizers of weights, biases, inputs and outputs.

Their numbers and the arithmetic on them, `FixedPoint` and `QFloat`, are in this
namespace too. ``bits`` counts the sign: ``value_bits = bits - signed``. Codes reach
from ``-2^value_bits`` to ``2^value_bits - 1``, of unsigned words too: QuantizeML leaves
it to the activation to remove negative ones. The derivative of what a quantizer returns
is that of `straight_through`, and is 1 also where codes saturate.

Checked against QuantizeML 1.2.5 by `tests/conformance`.
"""

from qjax.quantizers.quantizeml.arithmetic import (
    absolute,
    add,
    align,
    divide,
    equal,
    expand,
    greater,
    matmul,
    multiply,
    promote,
    reduce_mean,
    reduce_sum,
    rescale,
    right_shift,
    shift,
    subtract,
    to_fixed_point,
)
from qjax.quantizers.quantizeml.layers import (
    ACTIVATIONS,
    activation_table,
    bounded_relu,
    flatten,
)
from qjax.quantizers.quantizeml.numbers import (
    FixedPoint,
    QFloat,
    from_codes,
    power,
    to_float,
)
from qjax.quantizers.quantizeml.quantizers import (
    quantize_aligned_weight,
    quantize_input,
    quantize_output,
    quantize_weight,
)
from qjax.quantizers.quantizeml.reals import (
    ceil_log2,
    max_frac_bits,
    optimal_scales,
    quantize_fixed_point,
    quantize_qfloat,
    quantize_scales,
    straight_through,
)

__all__ = (
    "ACTIVATIONS",
    "FixedPoint",
    "QFloat",
    "absolute",
    "activation_table",
    "add",
    "align",
    "bounded_relu",
    "ceil_log2",
    "divide",
    "equal",
    "expand",
    "flatten",
    "from_codes",
    "greater",
    "matmul",
    "max_frac_bits",
    "multiply",
    "optimal_scales",
    "power",
    "promote",
    "quantize_aligned_weight",
    "quantize_fixed_point",
    "quantize_input",
    "quantize_output",
    "quantize_qfloat",
    "quantize_scales",
    "quantize_weight",
    "reduce_mean",
    "reduce_sum",
    "rescale",
    "right_shift",
    "shift",
    "straight_through",
    "subtract",
    "to_fixed_point",
    "to_float",
)
