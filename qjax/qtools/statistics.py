"""Statistics of QKeras: the operations and weights of each layer, `qstats`."""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

from qjax.qtools.data_types import (
    BINARY,
    FIXED,
    FLOAT,
    POWER,
    TERNARY,
    ZERO_ONE,
)
from qjax.qtools.keras_models import (
    CONVS,
    DEPTHWISE,
    PRODUCTS,
    ShapedLayer,
    ShapedModel,
)
from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse
from qjax.tables import html_table, text_table

# Strength of a product, by the kinds of weight (row) and value.
_STRENGTHS = (
    ("mult", "barrel", "mux", "mux", "mux", "fmult"),
    ("barrel", "adder", "mux", "xor", "mux", "fmult"),
    ("mux", "mux", "mux", "mux", "xor", "fmult"),
    ("mux", "xor", "mux", "xor", "xor", "fmult"),
    ("mux", "mux", "xor", "xor", "xor", "fmult"),
    ("fmult",) * 6,
)
_TYPED = ("Dense", *CONVS, *DEPTHWISE)  # Layers whose activation gives a type.
_INPUT = "quantized_relu(8,0)"  # What QKeras takes any input for.
_HEAD = ("layer", "operations", "operator", "weights", "bits", "biases", "bits")


class Mode(NamedTuple):
    """The kind of a quantizer, its word length, and whether it has a sign."""

    kind: int
    bits: int
    sign: int


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """The statistics of a layer.

    Attributes:
      strength: Operator of its products: mult, barrel, adder, mux, xor or fmult.
      operands: Modes of weight and value.
      operations: Its products.
      weights: Numbers of its kernel; of each, for a separable convolution.
      biases: Numbers of its bias.
      weight_modes: Mode of its kernel, or of each.
      bias_mode: Mode of its bias; that of float if it has none.
    """

    strength: str
    operands: tuple[Mode, Mode]
    operations: int
    weights: tuple[int, ...]
    biases: int
    weight_modes: tuple[Mode, ...]
    bias_mode: Mode

    @property
    def operator(self) -> str:
        """Returns the operator with its bits, a sign before it: ``smult_4_8``."""
        sign = "s" if any(mode.sign for mode in self.operands) else "u"
        weight, x = self.operands
        return f"{sign}{self.strength}_{weight.bits}_{x.bits}"

    @property
    def total_bits(self) -> int:
        """Returns the bits of all weights and biases."""
        own = zip(self.weights, self.weight_modes, strict=True)
        return sum(n * m.bits for n, m in own) + self.biases * self.bias_mode.bits

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `extract_model_operations`."""
        is_one = len(self.weights) == 1
        modes = [[*mode] for mode in self.weight_modes]
        return {
            "type": [self.strength, *map(list, zip(*self.operands, strict=True))],
            "number_of_operations": self.operations,
            "number_of_weights": self.weights[0] if is_one else [*self.weights],
            "number_of_bias": self.biases,
            "type_of_weights": modes[0] if is_one else modes,
            "type_of_bias": [*self.bias_mode],
        }


class ModelStatistics(dict[str, LayerStatistics]):
    """The statistics of the layers with products, by name. ``str`` is a table."""

    @property
    def operators(self) -> dict[str, int]:
        """Returns the operations of each operator."""
        found = Counter[str]()
        for row in self.values():
            found[row.operator] += row.operations
        return dict(sorted(found.items()))

    @property
    def total_bits(self) -> int:
        """Returns the bits of all weights and biases."""
        return sum(row.total_bits for row in self.values())

    def to_json(self) -> dict[str, Any]:
        """Returns what QKeras's `extract_model_operations` returns."""
        return {name: row.to_json() for name, row in self.items()}

    def __str__(self) -> str:
        rows = [f"{name}: {count}" for name, count in self.operators.items()]
        total = f"total bits of weights: {self.total_bits}"
        return "\n".join([text_table(_HEAD, self._rows()), *rows, total])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._rows())

    def _rows(self) -> list[tuple[Any, ...]]:
        return [
            (
                name,
                row.operations,
                row.operator,
                "+".join(map(str, row.weights)),
                "+".join(str(mode.bits) for mode in row.weight_modes),
                row.biases,
                row.bias_mode.bits,
            )
            for name, row in self.items()
        ]


def mode_of(word: Spec | str | None) -> Mode:
    """Returns the mode of a quantizer: that of float for none.

    As in QKeras 2 bits with 1 integer bit are three levels, 1 bit with 1 integer bit of
    a relu {0, 1}, and a relu has no sign whatever its slope.

    Raises:
      ValueError: for a quantizer that has none.

    References:
      QKeras, estimate.py, `get_quant_mode`, snapshot 78ea90f.
    """
    if word is None or word == "linear":
        return Mode(FLOAT, 32, 1)
    spec: Any = parse(word) if isinstance(word, str) else word
    fixed = {
        "bernoulli": Mode(ZERO_ONE, 1, 0),
        "stochastic_ternary": Mode(TERNARY, 2, 1),
        "ternary": Mode(TERNARY, 2, 1),
        "stochastic_binary": Mode(BINARY, 1, 1),
        "binary": Mode(BINARY, 1, 1),
    }
    name, bits = str(getattr(spec, "name", "")), int(getattr(spec, "bits", 0))
    if name in fixed:
        return fixed[name]
    integer = int(getattr(spec, "integer", 0))
    if name in ("quantized_bits", "quantized_ulaw", "quantized_tanh"):
        is_ternary = bits == 2 and integer == 1
        return Mode(TERNARY if is_ternary else FIXED, bits, 1)
    if name == "quantized_relu":
        return Mode(ZERO_ONE if bits == 1 and integer == 1 else FIXED, bits, 0)
    if name in ("quantized_po2", "quantized_relu_po2"):
        return Mode(POWER, bits, int(name == "quantized_po2"))
    raise ValueError(
        f"QKeras's statistics have no mode of {str(word)!r}. They have those of "
        "quantized_bits, quantized_relu, quantized_tanh, quantized_ulaw, "
        "quantized_po2, quantized_relu_po2, binary, ternary and bernoulli."
    )


def model_statistics(model: ShapedModel) -> ModelStatistics:
    """Returns the operations and weights of the quantized layers with products.

    Args:
      model: The model.

    Returns:
      Name -> statistics. As in QKeras any input of the model is taken for
      ``quantized_relu(8,0)``; a depthwise kernel counts the square of its channels,
      `ShapedLayer.weight_shapes` has its real shape; a pointwise one of a separable
      convolution has as many products as results.

    Raises:
      ValueError: for a quantizer without a mode; for a dense layer on more than a
        vector.

    References:
      QKeras, estimate.py, `extract_model_operations`, snapshot 78ea90f.
    """
    words: dict[str, Any] = {"in": _INPUT}
    found = ModelStatistics()
    for layer in model.layers:
        activation = layer.options.get("activation")
        if layer.cls == "QActivation":
            words[layer.name] = activation
        elif layer.cls == "QAdaptiveActivation":
            bits = layer.options.get("total_bits", 8)
            words[layer.name] = f"{activation}({bits},0)"
        elif layer.is_quantized and layer.base in _TYPED:
            words[layer.name] = activation
        else:
            words[layer.name] = words[layer.inputs[0]]
        if layer.is_quantized and layer.base in PRODUCTS:
            found[layer.name] = _statistics(layer, words[layer.inputs[0]])
    return found


def _statistics(layer: ShapedLayer, word: Any) -> LayerStatistics:
    texts = [layer.kernel_word]
    if layer.base.startswith("Separable"):
        texts.append(layer.word("pointwise"))
    modes = tuple(map(mode_of, texts))
    operands = modes[0], mode_of(word)
    operations, weights = _counts(layer)
    return LayerStatistics(
        strength=_STRENGTHS[operands[0].kind][operands[1].kind],
        operands=operands,
        operations=operations,
        weights=weights,
        biases=layer.output_shape[-1] if layer.has_bias or layer.is_folded else 0,
        weight_modes=modes,
        bias_mode=mode_of(layer.word("bias")),
    )


def _counts(layer: ShapedLayer) -> tuple[int, tuple[int, ...]]:
    """Returns the operations and the weights of a layer, as QKeras counts them."""
    x, out, kernel = layer.input_shapes[0], layer.output_shape, layer.weight_shapes[0]
    window, places = math.prod(kernel[:-2]), math.prod(out[:-1])
    if layer.base == "Dense":
        if any(n > 1 for n in x[:-1]):
            raise ValueError(
                f"The layer {layer.name!r} is counted on one vector, got {x}."
            )
        return x[-1] * out[-1], (x[-1] * out[-1],)
    if layer.base.startswith("Separable"):
        products = window * places * x[-1] + places * out[-1]
        return products, (window * x[-1], out[-1] * x[-1])
    if layer.base.startswith("Depthwise"):
        return window * places * x[-1], (window * out[-1] * x[-1],)
    return places * out[-1] * window * x[-1], (window * out[-1] * x[-1],)
