"""QuantizeML's parameters of quantization, and the scheme that they mean."""

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.affine import QSpec
from qjax.calibration.averages import moving_max, moving_min_max
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Rule, as_optional
from qjax.schemes.scheme import Scheme

FUNCTIONS = (
    "celu elu erf exp function gelu hard_sigmoid hard_silu hard_swish hard_tanh "
    "leaky_relu log1p logistic mish selu sigmoid silu soft_sign softplus squareplus "
    "swish tanh"
).split()
_PRODUCTS = (
    "conv",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "depthwise_conv_transpose",
    "grouped_conv",
    "grouped_conv_transpose",
    "resize",
)
_MADE = "QuantizationParams."  # Reason of a value that a parameter gives.


@dataclasses.dataclass(frozen=True)
class QuantizationParams:
    """The bits of each kind of site, as QuantizeML has it, with its defaults.

    Meaning for a model:

    - weights are symmetric with a float scale per output channel,
      ``scale = max|w| / (2^(bits - 1) - 1)``: ``input_weight_bits`` where the input of
      the model goes in, ``weight_bits`` elsewhere;
    - activations are symmetric with power-of-two scales, found by `moving_max`; they
      are quantized where a product, a sum or a concatenation reads them: after a relu
      to ``activation_bits``, unsigned below 8 of them; elsewhere to ``output_bits``;
      before a function such as gelu to 11 bits per tensor, after it to
      ``activation_bits``. What an average or nobody reads stays as it is;
    - an accumulator has at most ``buffer_bits``, a product's at most 28.

    Attributes:
      activation_bits: After activations, 1 to 16.
      per_tensor_activations: Whether activations have one scale, not one per channel.
        The kernel of a product takes the scales of its input in before it is rounded;
        for other readers values are brought to one scale, exactly. The input of the
        model has one scale, where QuantizeML's may have one per channel.
      weight_bits: Bits of weights, 2 to 16.
      output_bits: Bits of values that no activation makes.
      input_weight_bits: Bits of the weights of the first product.
      input_dtype: Type of the input: its bits, and whether it is signed.
      buffer_bits: Bits of accumulators, 2 to 32.
      last_output_bits: Bits of the model's outputs; None leaves them unrounded.

    Raises:
      ValueError: for numbers that are no such widths, and a dtype that is no integer.

    References:
      QuantizeML 1.2.5, ``QuantizationParams``; checked by `tests/conformance`.
    """

    activation_bits: int = 8
    per_tensor_activations: bool = False
    weight_bits: int = 8
    output_bits: int = 8
    input_weight_bits: int = 8
    input_dtype: str = "uint8"
    buffer_bits: int = 32
    last_output_bits: int | None = None

    def __post_init__(self) -> None:
        least = {"activation_bits": 1, "output_bits": 2, "last_output_bits": 2}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("_bits") or value is None:
                continue
            low = least.get(field.name, 2)
            most = 32 if field.name == "buffer_bits" else 16
            is_whole = isinstance(value, numbers.Integral)
            if not is_whole or not low <= value <= most:
                raise ValueError(
                    f"`{field.name}` must be a whole number from {low} to {most}, got "
                    f"{value!r}."
                )
        if not _is_integer_type(self.input_dtype):
            raise ValueError(
                f"`input_dtype` must be an integer type such as 'uint8', got "
                f"{self.input_dtype!r}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationParams":
        """Reads the parameters from a mapping, as JSON gives one.

        Raises:
          ValueError: for an unknown name, with the closest there is.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ValueError(
                    f"`QuantizationParams` has no {name!r}. The closest is "
                    f"{close[0]!r}."
                )
        return cls(**values)

    def scheme(self) -> Scheme:
        """Returns the scheme that the parameters mean."""
        rules = (*self._weights(), self._input(), *self._activations())
        return Scheme(
            weights=QSpec(self.weight_bits, narrow_range=True, axis="output"),
            activations=_output(self.output_bits, True, self._axis),
            rules=as_optional(*rules),
            calibrator=moving_max(),
            buffer_bits=self.buffer_bits,
        )

    @property
    def _axis(self) -> int | None:
        return None if self.per_tensor_activations else -1

    def _weights(self) -> list[Rule]:
        first = Where(role="weight", inputs="input:*", op=_PRODUCTS)
        return [
            self._weight(first, "input_weight_bits"),
            self._weight(Where(role="weight", op=_PRODUCTS), "weight_bits"),
            Rule(Where(role="weight"), None, reasons=_reasons(spec="no product")),
        ]

    def _weight(self, where: Where, field: str) -> Rule:
        spec = QSpec(getattr(self, field), narrow_range=True, axis="output")
        buffer = min(self.buffer_bits, 28)
        made = {"bits": _MADE + field, "buffer_bits": _MADE + "buffer_bits"}
        return Rule(where, spec, buffer_bits=buffer, reasons=_reasons(**made))

    def _activations(self) -> list[Rule]:
        readers = (*_PRODUCTS, *FUNCTIONS, "residual", "concatenate", "matmul", "mul")
        bounded = (*_PRODUCTS, "residual", "mul", "matmul", "clip")
        looked_up = Where(role="activation", feeds=tuple(FUNCTIONS))
        rules = [
            Rule(looked_up, _output(11, True, None), reasons=_reasons(bits="a table")),
            *self._values(
                "activation_bits",
                signed=self.activation_bits >= 8,
                activation=("relu*", "clip"),
                op=bounded,
                feeds=readers,
            ),
            *self._values("activation_bits", op=tuple(FUNCTIONS), feeds=readers),
            Rule(
                Where(role="activation", op="concatenate"),
                None,
                reasons=_reasons(spec="its parts are quantized"),
            ),
            *self._values("activation_bits", op="mean", activation="?*", feeds=readers),
            *self._values("output_bits", feeds=readers),
        ]
        if self.last_output_bits is not None:
            rules += self._values("last_output_bits", channels=False, feeds="return")
        unread = _reasons(spec="no product, sum or function reads it")
        return [*rules, Rule(Where(role="activation"), None, reasons=unread)]

    def _values(
        self, field: str, *, signed: bool = True, channels: bool = True, **where: Any
    ) -> list[Rule]:
        """Returns rules for values of one kind: of few axes, and of more."""
        axis = self._axis if channels else None
        rules = []
        for ranks, a in (((0, 1, 2), None), ((), axis)):
            spec = _output(getattr(self, field), signed, a)
            by = self._why_one_scale(ranks, channels)
            reasons = _reasons(bits=_MADE + field, axis=by)
            here = Where(role="activation", ranks=ranks, **where)
            rules.append(Rule(here, spec, reasons=reasons))
        return rules

    def _why_one_scale(self, ranks: tuple[int, ...], channels: bool) -> str:
        if not channels:
            return "one scale"
        if self.per_tensor_activations or not ranks:
            return _MADE + "per_tensor_activations"
        return "one scale for at most two axes"

    def _input(self) -> Rule:
        info = np.iinfo(self.input_dtype)
        signed, calibrator = info.min < 0, moving_max()
        spec = _output(info.bits, signed, None)
        if not signed:
            spec = dataclasses.replace(spec, symmetric=False)
            calibrator = moving_min_max()
        made = _MADE + "input_dtype"
        reasons = _reasons(bits=made, signed=made, axis="one scale for an input")
        return Rule(Where(name="input:*"), spec, calibrator, reasons=reasons)


def _is_integer_type(name: str) -> bool:
    try:
        return bool(np.issubdtype(np.dtype(name), np.integer))
    except TypeError:
        return False


def _output(bits: int, signed: bool, axis: int | None) -> QSpec:
    return QSpec(bits, signed, symmetric=True, power_of_two=True, axis=axis)


def _reasons(**reasons: str) -> tuple[tuple[str, str], ...]:
    return (("*", QuantizationParams.__name__), *reasons.items())


def quantizeml(**params: Any) -> Scheme:
    """Returns QuantizeML's scheme: `QuantizationParams` with defaults or others."""
    return QuantizationParams.from_dict(params).scheme()
