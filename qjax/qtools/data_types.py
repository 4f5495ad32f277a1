"""Data types of QKeras's tools: the bits and the kind of the values of a quantizer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse

FIXED, POWER, TERNARY, BINARY, ZERO_ONE, FLOAT = range(6)  # Kinds, as QTools numbers.


@dataclasses.dataclass(frozen=True)
class DataType:
    """The type of values in hardware.

    Attributes:
      name: Name of the quantizer; "floating_point" for floats.
      kind: Row and column of the tables of operators: fixed point, power of two,
        {-1, 0, 1}, {-1, 1}, {0, 1}, float.
      bits: Word length, sign included.
      int_bits: Bits before the binary point, sign not counted.
      is_signed: Whether it has a sign.
      max_value: Largest power of two; -1 for no bound.
      count: Different values of a known weight; -1 where it is not known.
    """

    name: str
    kind: int
    bits: int
    int_bits: int
    is_signed: bool = True
    max_value: float = -1
    count: int = -1

    def __str__(self) -> str:
        if self.kind == FIXED:
            sign = "" if self.is_signed else "u"
            return f"{sign}fixed({self.bits},{self.int_bits})"
        short = {"floating_point": "float", "quantized_po2": "po2"}
        name = short.get(self.name, self.name.removeprefix("quantized_"))
        return f"{name}({self.bits})"

    @property
    def is_float(self) -> bool:
        """Returns whether values are floats."""
        return self.kind == FLOAT

    @property
    def is_power(self) -> bool:
        """Returns whether values are powers of two, so that bits are of exponents."""
        return self.kind == POWER

    @property
    def fraction(self) -> int:
        """Returns the bits behind the binary point."""
        return self.bits - self.is_signed - self.int_bits

    def exponents(self) -> tuple[int, int]:
        """Returns how far powers of two reach below and above 1, neither negative.

            left = min(2^(n-1) - 1, ceil(log2(max_value))), right = 2^(n-1)

        with ``n`` the bits without the sign.
        """
        bits = self.bits - self.is_signed
        least, most = 2.0 ** (bits - 1), 2.0 ** (bits - 1) - 1
        if self.max_value != -1:
            bounded = self.max_value > 0
            most = min(most, math.ceil(math.log2(self.max_value))) if bounded else 0
        return int(least), int(max(0, most))

    def as_fixed(self) -> "DataType":
        """Returns the fixed-point type of powers of two; other types as they are.

        As in QTools it has a place for all below the largest power, and none for that.
        """
        if not self.is_power:
            return self
        right, left = self.exponents()
        return fixed(left + right + self.is_signed, left, self.is_signed)

    def to_json(self, op_type: str | None = None, shape: Any = None) -> dict[str, Any]:
        """Returns the entry of a data-type map, whose ``int_bits`` count the sign."""
        found: dict[str, Any] = {"quantizer_type": self.name, "bits": self.bits}
        if self.kind == POWER:
            found |= {"is_signed": int(self.is_signed), "max_value": self.max_value}
        elif self.kind == TERNARY:
            found |= {"bits": 2, "int_bits": 2, "is_signed": 1, "values": [0, -1, 1]}
        elif self.kind != FLOAT:
            is_fixed = self.kind == FIXED
            int_bits = self.int_bits + (self.is_signed if is_fixed else 0)
            found |= {"int_bits": int_bits, "is_signed": int(self.is_signed)}
        if self.kind in (BINARY, ZERO_ONE):
            found["values"] = [-1, 1] if self.kind == BINARY else [0, 1]
        if shape is not None:
            found["shape"] = shape
        if op_type is not None:
            found["op_type"] = op_type
        return found


def fixed(bits: int, int_bits: int, is_signed: bool) -> DataType:
    """Returns a fixed-point type."""
    return DataType("quantized_bits", FIXED, bits, int_bits, is_signed)


def floating(bits: int) -> DataType:
    """Returns a floating-point type."""
    return DataType("floating_point", FLOAT, bits, -1)


_NAMED: Mapping[str, DataType] = {
    "fp16": floating(16),
    "fp32": floating(32),
    "int8": fixed(8, 0, True),
    "int16": fixed(16, 7, True),
    "int32": fixed(32, 10, True),
}
_FIXED_KINDS: Mapping[str, tuple[int, int]] = {
    "ternary": (TERNARY, 2),
    "stochastic_ternary": (TERNARY, 2),
    "binary": (BINARY, 1),
    "stochastic_binary": (BINARY, 1),
    "bernoulli": (ZERO_ONE, 1),
}


def data_type(word: Spec | str | DataType | None, default: str = "fp32") -> DataType:
    """Returns the data type of a quantizer.

    Args:
      word: Options of a quantizer, their text, "fp16", "fp32", "int8", "int16" or
        "int32"; None for the default.
      default: Type of None.

    Returns:
      The type. As in QTools that of `quantized_tanh` has -1 integer bits, where 0 is
      right, and three levels count 2 integer bits.

    Raises:
      ValueError: for a quantizer that QTools has no type of.

    Example:
      >>> data_type("quantized_relu(4,2)")
      DataType(name='quantized_relu', kind=0, bits=4, int_bits=2, is_signed=False, \
max_value=-1, count=-1)

    References:
      QKeras, qtools/quantized_operators/quantizer_impl.py, snapshot 78ea90f.
    """
    word = default if word is None else word
    if isinstance(word, DataType):
        return word
    if isinstance(word, str) and word in _NAMED:
        return _NAMED[word]
    spec: Any = parse(word) if isinstance(word, str) else word
    name = str(getattr(spec, "name", ""))
    if name in _FIXED_KINDS:
        kind, bits = _FIXED_KINDS[name]
        is_positive = kind == ZERO_ONE or bool(getattr(spec, "use_01", False))
        kind = ZERO_ONE if is_positive else kind
        return DataType(name, kind, bits, bits, not is_positive)
    if name in ("quantized_po2", "quantized_relu_po2"):
        bits, most = int(spec.bits), spec.max_value
        return DataType(name, POWER, bits, bits, name == "quantized_po2", most or -1)
    if name in ("quantized_bits", "quantized_linear"):
        ends = int(spec.bits), int(spec.integer)
        return DataType(name, FIXED, *ends, bool(spec.keep_negative))
    if name == "quantized_relu":
        bits, integer = int(spec.bits), int(spec.integer)
        kind = ZERO_ONE if bits == 1 and integer == 1 else FIXED
        return DataType(name, kind, bits, integer, bool(spec.negative_slope))
    if name in ("quantized_tanh", "quantized_ulaw"):
        integer = int(spec.integer) if name == "quantized_ulaw" else -1
        return DataType(name, FIXED, int(spec.bits), integer)
    raise ValueError(
        f"QTools has no data type of {str(word)!r}. It has those of quantized_bits, "
        "quantized_linear, quantized_relu, quantized_po2, quantized_relu_po2, "
        "quantized_tanh, quantized_ulaw, binary, ternary, bernoulli, their stochastic "
        "forms, fp16, fp32, int8, int16 and int32."
    )
