"""Operators of QKeras's tools: their types, and the gates that they are built of."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from qjax.qtools.data_types import (
    BINARY,
    FIXED,
    FLOAT,
    POWER,
    TERNARY,
    ZERO_ONE,
    DataType,
    fixed,
    floating,
)

_CHOICE = 0.3  # Energy of a choice between two values, in adders of as many bits.
_GATE = 0.1  # Energy of an and gate, ditto.


@dataclasses.dataclass(frozen=True)
class Circuit:
    """An operation in hardware.

    Attributes:
      output: Type of its result.
      op_type: Hardware: mul, add, shifter, mux, xor or and.
      gate_factor: Energy relative to ``op_type`` of ``gate_bits`` bits.
      gate_bits: Bits that its energy is computed for.
    """

    output: DataType
    op_type: str
    gate_factor: float = 1
    gate_bits: float = 0


def multiplier(weight: DataType, x: DataType) -> Circuit:
    """Returns the multiplier of a weight and a value.

        fixed * fixed:      int = int_w + int_x, frac = frac_w + frac_x
        fixed * power:      a shifter, wider by all places that the power may move
        power * power:      an adder of exponents, max(bits) + 1
        {-1, (0,) 1} * any: a mux; {-1, 1} * {-1, 1}: xor; {0, 1} * any: and
        float * any:        a multiplier of floats

    Args:
      weight: Type of the weight.
      x: Type of the value.

    Returns:
      The multiplier. As in QTools: ternary times binary has 1 bit; a stochastic
      binary value costs twice a binary one; a power of two behind an and gate has the
      integer bits of its weight.

    References:
      QKeras, qtools/quantized_operators/multiplier_impl.py, snapshot 78ea90f.
    """
    kinds = {weight.kind, x.kind}
    is_signed = weight.is_signed or x.is_signed
    if FLOAT in kinds:
        bits = max(t.bits for t in (weight, x) if t.is_float)
        return Circuit(floating(bits), "mul", 1, bits)
    if ZERO_ONE in kinds:
        return _and_gate(weight, x, is_signed)
    if kinds == {BINARY}:
        bits, int_bits = max(weight.bits, x.bits), max(weight.int_bits, x.int_bits)
        output = DataType("binary", BINARY, bits, int_bits, is_signed)
        return Circuit(output, "xor", _CHOICE, 1)
    if kinds & {BINARY, TERNARY}:
        return _mux(weight, x, is_signed)
    if kinds == {POWER}:
        return _exponent_adder(weight, x, is_signed)
    if POWER in kinds:
        power, other = (weight, x) if weight.is_power else (x, weight)
        return shifter(power, other, *power.exponents())
    int_bits = weight.int_bits + x.int_bits
    bits = int_bits + weight.fraction + x.fraction + is_signed
    output = fixed(bits, int_bits, is_signed)
    return Circuit(output, "mul", 1, math.sqrt(weight.bits * x.bits))


def shifter(power: DataType, other: DataType, right: int, left: int) -> Circuit:
    """Returns the shifter of a fixed-point value by a power of two.

    Args:
      power: Type of the power.
      other: Type of the value.
      right: Places that it may move to the right.
      left: Places that it may move to the left.
    """
    is_signed = other.is_signed or power.is_signed
    bits = other.bits + left + right + (power.is_signed and not other.is_signed)
    output = fixed(bits, other.int_bits + left, is_signed)
    if power.count > 0:
        return Circuit(output, "shifter", power.count * _CHOICE, other.bits)
    size = math.sqrt(2.0**power.bits * other.bits)
    return Circuit(output, "shifter", 1, size * math.log10(size))


def _power(bits: int, int_bits: int, is_signed: bool, most: float) -> DataType:
    name = "quantized_po2" if is_signed else "quantized_relu_po2"
    return DataType(name, POWER, bits, int_bits, is_signed, most)


def _exponent_adder(a: DataType, b: DataType, is_signed: bool) -> Circuit:
    bits = max(a.bits, b.bits) + 1
    has_most = -1 not in (a.max_value, b.max_value)
    most = a.max_value * b.max_value if has_most else -1
    output = _power(bits, max(a.int_bits, b.int_bits) + 1, is_signed, most)
    return Circuit(output, "add", 1, bits)


def _mux(weight: DataType, x: DataType, is_signed: bool) -> Circuit:
    is_of_weight = weight.kind in (BINARY, TERNARY)
    choice, value = (weight, x) if is_of_weight else (x, weight)
    bits = value.bits + (choice.is_signed and not value.is_signed)
    is_cheap = weight.kind == BINARY if is_of_weight else x.name == "binary"
    factor = _CHOICE if is_cheap else 2 * _CHOICE
    if value.is_power:
        output = _power(bits, bits, is_signed, value.max_value)
    elif value.kind == FIXED:
        output = fixed(bits, value.int_bits, is_signed)
    else:
        output = DataType("ternary", TERNARY, bits, value.int_bits, is_signed)
    return Circuit(output, "mux", factor, value.bits)


def _and_gate(weight: DataType, x: DataType, is_signed: bool) -> Circuit:
    bits = max(weight.bits, x.bits)
    is_gate = weight.name == "binary" and weight.kind == ZERO_ONE
    int_bits = x.int_bits if is_gate else weight.int_bits
    other = x if weight.kind == ZERO_ONE else weight
    if other.kind == POWER:
        output = _power(bits, int_bits, is_signed, other.max_value)
    elif other.kind == FIXED:
        output = fixed(bits, int_bits, is_signed)
    elif other.kind == ZERO_ONE:
        output = DataType("binary", ZERO_ONE, bits, int_bits, is_signed)
    else:
        output = DataType("ternary", TERNARY, 2, 2)
    return Circuit(output, "and", _GATE, output.bits)


def accumulator(
    kernel_shape: Sequence[int], product: DataType, *, has_bias: bool = False
) -> Circuit:
    """Returns the accumulator of the products with one output channel of a kernel.

        L = ceil(log2(terms + has_bias)), int = int + L, bits = bits + L

    Args:
      kernel_shape: Shape of the kernel, output channels last.
      product: Type of the products; powers of two become fixed-point numbers first.
      has_bias: Whether the bias counts among the terms.

    Raises:
      ValueError: for a kernel without terms.
    """
    if product.is_float:
        return Circuit(floating(product.bits), "add", 1, product.bits)
    terms = math.prod(kernel_shape[:-1]) + has_bias
    if terms < 1:
        raise ValueError(f"A kernel of shape {tuple(kernel_shape)} sums no product.")
    more, own = math.ceil(math.log2(terms)), product.as_fixed()
    output = fixed(own.bits + more, own.int_bits + more, own.is_signed)
    return Circuit(output, "add", 1, output.bits)


def adder(a: DataType, b: DataType) -> Circuit:
    """Returns the adder of two values: int = max + 1, frac = max.

    As in QTools a power of two before {0, 1} is added as if its exponent were the
    value, and a sum with a float has the larger of both word lengths.

    References:
      QKeras, qtools/quantized_operators/adder_impl.py, snapshot 78ea90f.
    """
    if a.is_float or b.is_float:
        bits = max(a.bits, b.bits)
        return Circuit(floating(bits), "add", 1, bits)
    if not (a.is_power and b.kind == ZERO_ONE):
        a, b = a.as_fixed(), b.as_fixed()
    int_bits, is_signed = max(a.int_bits, b.int_bits) + 1, a.is_signed or b.is_signed
    bits = int_bits + max(a.fraction, b.fraction) + is_signed
    return Circuit(fixed(bits, int_bits, is_signed), "add", 1, bits)


def divider(numerator: DataType, denominator: DataType) -> Circuit:
    """Returns the divider of a normalisation.

    Raises:
      ValueError: for a denominator of two or three levels.

    References:
      QKeras, qtools/quantized_operators/divider_impl.py, snapshot 78ea90f.
    """
    if denominator.kind in (TERNARY, BINARY, ZERO_ONE):
        raise ValueError(
            f"Nothing is divided by a {denominator.name}: a variance must be fixed "
            "point, a power of two or float."
        )
    if denominator.is_float or numerator.is_float or denominator.kind == FIXED:
        floats = [t.bits for t in (numerator, denominator) if t.is_float]
        is_fixed = denominator.kind == FIXED and not numerator.is_float
        bits = 32 if is_fixed else max(floats)
        return Circuit(floating(bits), "mul", 1, bits)
    if not numerator.is_power:
        left, right = denominator.exponents()  # A quotient moves the other way.
        return shifter(denominator, numerator, right, left)
    bits = max(numerator.bits, denominator.bits) + 1
    int_bits = max(numerator.int_bits, denominator.int_bits) + 1
    has_most = -1 not in (numerator.max_value, denominator.max_value)
    most = numerator.max_value / denominator.max_value if has_most else -1
    return Circuit(_power(bits, int_bits, True, most), "add", 1, bits)


def merge(cls: str, inputs: Sequence[DataType]) -> Circuit:
    """Returns the operator of a layer of Keras that merges its inputs.

    Args:
      cls: Class of the layer: Add, Multiply, Maximum, Minimum, Average, Concatenate.
      inputs: Types of its inputs.

    Raises:
      ValueError: for another class, which QTools does not know either.

    References:
      QKeras, qtools/quantized_operators/merge_factory.py, snapshot 78ea90f.
    """
    if cls == "Multiply":
        first, *others = inputs
        made = Circuit(first, "mul")
        for other in others:
            made = multiplier(made.output, other)
        return made
    if cls == "Add":
        output = _joined(inputs, more=1)
        return Circuit(output, "add", 1, output.bits)
    factors = {"Maximum": 0.2, "Minimum": 0.2, "Average": 1, "Concatenate": 0}
    if cls not in factors:
        raise ValueError(
            f"QTools merges by Add, Multiply, {', '.join(factors)}, got {cls}."
        )
    same = [(t.name, t.bits, t.int_bits, t.is_signed) for t in inputs]
    output = inputs[0] if len(set(same)) == 1 else _joined(inputs)
    return Circuit(output, "add", factors[cls], output.bits)


def _joined(inputs: Sequence[DataType], more: int = 0) -> DataType:
    """Returns the type with the most bits and the most integer bits of several."""
    if floats := [t.bits for t in inputs if t.is_float]:
        return floating(max(floats))
    wide = [t.as_fixed() for t in inputs]
    bits, int_bits = max(t.bits for t in wide), max(t.int_bits for t in wide)
    is_signed = functools.reduce(lambda a, t: a or t.is_signed, inputs, False)
    return fixed(bits + more, int_bits + more, is_signed)
