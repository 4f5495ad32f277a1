"""Data-type maps: the types of every layer of a model, as QTools has them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.layers.qkeras import kernel_word
from qjax.qtools.data_types import DataType, data_type
from qjax.qtools.keras_models import (
    AVERAGES,
    DEPTHWISE,
    MERGES,
    NORMS,
    SEPARABLE,
    ShapedLayer,
    ShapedModel,
)
from qjax.qtools.operation_counts import operation_count
from qjax.qtools.operators import (
    Circuit,
    accumulator,
    adder,
    divider,
    merge,
    multiplier,
)
from qjax.tables import html_table, text_table

DEFAULT_SOURCE = "quantized_bits(8,0,1)"
Types = Mapping[str, DataType]
_HEAD = (
    *("layer", "class", "operations", "input", "weight"),
    *("multiplier", "accumulator", "fused", "output"),
)

# Quantizers of a QBatchNormalization that names none.
_NORM_WORDS = {
    "gamma": "quantized_relu_po2(6,2048)",
    "beta": "quantized_po2(5)",
    "mean": "quantized_po2(5)",
    "variance": "quantized_relu_po2(6,quadratic_approximation=True)",
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The types of a reference model, or of layers of Keras without quantizers.

    Attributes:
      weights: Type of weights and biases, such as "fp16"; None for "fp32".
      accumulators: Type of products, sums and results; None for "fp32".
      is_whole: Whether all layers have these types, and not only those of Keras.
    """

    weights: str | None = None
    accumulators: str | None = None
    is_whole: bool = False


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """The types of a layer.

    Attributes:
      layer: The layer, with its shapes.
      inputs: Types of what it reads.
      output: Type of its result.
      count: Its operations; 0 for classes that QTools does not count.
      types: Types of its weights and factors by name: weight, bias, average, gamma.
      operators: Its operators by name: multiplier, accumulator, fused_accumulator.
    """

    layer: ShapedLayer
    inputs: tuple[DataType, ...]
    output: DataType
    count: int
    types: Types = dataclasses.field(default_factory=dict)
    operators: Mapping[str, Circuit] = dataclasses.field(default_factory=dict)

    def row(self) -> tuple[str, ...]:
        """Returns the layer as a row of a table, its types by name and bits."""
        names = ("multiplier", "accumulator", "fused_accumulator")
        made = [self.operators.get(name) for name in names]
        own = ["" if circuit is None else str(circuit.output) for circuit in made]
        weight = str(self.types["weight"]) if "weight" in self.types else ""
        inputs = ", ".join(map(str, self.inputs))
        ends = self.layer.name, self.layer.cls, f"{self.count:,}", inputs
        return (*ends, weight, *own, str(self.output))

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of QTools's JSON."""
        layer = self.layer
        is_norm = layer.base in NORMS
        shape = layer.input_shapes[0] if is_norm else layer.output_shape
        shapes: dict[str, Any] = {}
        if layer.is_product:
            kernel = layer.weight_shapes[0]
            shapes = {"weight": [*kernel], "bias": kernel[-1]}
        found: dict[str, Any] = {
            "layer_type": layer.cls,
            "input_quantizer_list": [t.to_json() for t in self.inputs],
            "output_quantizer": self.output.to_json(shape=[-1, *shape]),
        }
        for name, own in self.types.items():
            found[f"{name}_quantizer"] = own.to_json(shape=shapes.get(name))
        for name, operator in self.operators.items():
            found[name] = operator.output.to_json(op_type=operator.op_type)
        return {**found, "operation_count": self.count}


@dataclasses.dataclass(frozen=True, repr=False)
class TypeMap:
    """The types of all layers of a model. ``str`` is a table.

    Attributes:
      model: The model.
      source: Type of its input.
      layers: Name of a layer -> its types, in order.
    """

    model: ShapedModel
    source: DataType
    layers: Mapping[str, LayerTypes]

    def __str__(self) -> str:
        return text_table(_HEAD, [types.row() for types in self.layers.values()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEAD, [types.row() for types in self.layers.values()])

    def to_json(self) -> dict[str, Any]:
        """Returns QTools's JSON, whose ``int_bits`` of fixed point count the sign."""
        rows = {name: types.to_json() for name, types in self.layers.items()}
        return {"source_quantizers": [self.source.to_json()], **rows}


def type_map(
    model: ShapedModel,
    *,
    reference: Reference | None = None,
    scales: Mapping[str, Any] | None = None,
    weights: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> TypeMap:
    """Derives the types of every layer, each from those that it reads.

    A product has a multiplier, an accumulator of all products of a channel with the
    bias added, and the accumulator fused with the scales of an ``auto_po2`` kernel,
    whose results go on:

        int += log2(max scale), frac -= log2(min scale)

    Args:
      model: The model.
      reference: Types of layers without quantizers, or of all layers.
      scales: Layer -> scales of its ``auto_po2`` kernel. A kernel without scales is
        taken as if they were 1, as QTools does before the quantizer is called.
      weights: Layer -> its quantized weights, of which powers of two are counted: what
        a shifter costs.

    Returns:
      The map. As in QTools a bias belongs to as many channels as the last axis of the
      kernel has, and a folded depthwise convolution has no operations.

    Raises:
      ValueError: for an activation or weight of a quantizer without a type, a layer
        that subtracts, a depth multiplier other than 1, a separable convolution.

    References:
      QKeras, qtools/generate_layer_data_type_map.py, snapshot 78ea90f.
    """
    reference = reference or Reference()
    source = data_type(model.source, DEFAULT_SOURCE)
    found: dict[str, LayerTypes] = {}
    for layer in model.layers:
        inputs = [source if n == "in" else found[n].output for n in layer.inputs]
        try:
            given = _Given(layer, tuple(inputs), reference, scales or {}, weights or {})
            found[layer.name] = _rule(layer)(given)
        except ValueError as error:
            raise ValueError(
                f"The layer {layer.name!r}, a {layer.cls}: {error}"
            ) from error
    return TypeMap(model, source, found)


@dataclasses.dataclass(frozen=True)
class _Given:
    layer: ShapedLayer
    inputs: tuple[DataType, ...]
    reference: Reference
    scales: Mapping[str, Any]
    weights: Mapping[str, Sequence[np.ndarray]]

    @property
    def is_fixed_by_reference(self) -> bool:
        """Returns whether the reference has the types of the layer."""
        return self.reference.is_whole or not self.layer.is_quantized

    @property
    def sums(self) -> DataType:
        """Returns the type of accumulators of the reference."""
        return data_type(self.reference.accumulators)

    def in_reference(self, operator: Circuit) -> Circuit:
        """Returns an operator with a result of the reference's type."""
        return dataclasses.replace(operator, output=self.sums)

    def weight(self, word: Any) -> DataType:
        """Returns the type of a weight: the reference's, or that of its quantizer."""
        if self.is_fixed_by_reference:
            return data_type(self.reference.weights)
        return data_type(word)

    def counted(self, own: DataType, k: int) -> DataType:
        """Returns the type of weight ``k`` with the number of its values, if known."""
        if not own.is_power or self.layer.name not in self.weights:
            return own
        values = np.unique(self.weights[self.layer.name][k])
        return dataclasses.replace(own, count=len(values))

    def made(
        self, output: DataType, types: Any = None, operators: Any = None
    ) -> LayerTypes:
        """Returns the types of the layer, with its activation's for the result."""
        activation = self.layer.options.get("activation")
        is_own = not self.reference.is_whole and self.layer.base not in NORMS
        if activation is not None and is_own and self.layer.is_quantized:
            output = _activation_type(activation) or output
        count = operation_count(self.layer)
        return LayerTypes(
            self.layer, self.inputs, output, count, types or {}, operators or {}
        )


def _activation_type(activation: Any) -> DataType | None:
    """Returns the type of an activation of a layer; None for one without a type."""
    try:
        return data_type(activation)
    except ValueError:
        return None


def _rule(layer: ShapedLayer) -> Callable[[_Given], LayerTypes]:
    base = layer.base
    if base in MERGES:
        return _merge
    if base in AVERAGES:
        return _average
    if base in ("Activation", "AdaptiveActivation"):
        return _activation
    if base in NORMS:
        return _norm
    if base in SEPARABLE:
        return _refuse_separable
    if layer.is_folded:
        return _folded
    if layer.is_product:
        return _product
    return _pass


def _refuse_separable(given: _Given) -> LayerTypes:
    raise ValueError(
        "QTools reads the quantizer of its second kernel as that of a bias. Write it "
        "as a depthwise and a 1x1 convolution."
    )


def _pass(given: _Given) -> LayerTypes:
    moves = ("MaxPool", "Reshape", "Flatten", "UpSampling")
    is_move = any(text in given.layer.cls for text in moves)
    is_first = "in" in given.layer.inputs
    has_sums = given.reference.is_whole and given.reference.accumulators
    return given.made(
        given.sums if has_sums and not (is_move or is_first) else given.inputs[0]
    )


def _merge(given: _Given) -> LayerTypes:
    operator = merge(given.layer.cls, given.inputs)
    if given.reference.is_whole:
        operator = given.in_reference(operator)
    name = f"{given.layer.cls}_quantizer"
    return given.made(operator.output, operators={name: operator})


def _activation(given: _Given) -> LayerTypes:
    if given.is_fixed_by_reference:
        return given.made(given.sums)
    if given.layer.cls == "QAdaptiveActivation":
        return given.made(_adaptive(given.layer.options))
    return given.made(data_type(given.layer.options["activation"]))


def _adaptive(options: Mapping[str, Any]) -> DataType:
    """Returns the type of an adaptive activation before it has seen values."""
    bits = options.get("total_bits", 8)
    return data_type(f"{options['activation']}({bits},0)")


def _average(given: _Given) -> LayerTypes:
    layer, x = given.layer, given.inputs[0]
    space = layer.input_shapes[0][:-1]
    window = space if layer.base.startswith("Global") else layer.pool_size
    sums = accumulator((*window, 1, 1), x)
    if given.reference.is_whole:
        sums = given.in_reference(sums)
    operators, types, output = {"pool_sum_accumulator": sums}, {}, sums.output
    if layer.is_quantized:
        factor = data_type(layer.word("average"))
        own = accumulator((*window, 1, 1), x).output
        mean = multiplier(own, factor)
        if given.reference.is_whole:
            mean = given.in_reference(mean)
        types, output = {"average": factor}, mean.output
        operators["pool_avg_multiplier"] = mean
    return given.made(output, types, operators)


def _norm(given: _Given) -> LayerTypes:
    layer, x = given.layer, given.inputs[0]
    has_gain = bool(layer.options.get("scale", True))
    has_offset = bool(layer.options.get("center", True))
    types = {name: _norm_type(given, name) for name in _NORM_WORDS}
    if has_gain:
        types["gamma"] = given.counted(types["gamma"], 0)
    last = 1 + has_gain + has_offset
    types["variance"] = given.counted(types["variance"], last)
    deviation = _deviation(types["variance"])
    own = divider(types["gamma"] if has_gain else x, deviation)
    counts = types["gamma"].count, types["variance"].count
    if has_gain and own.output.is_power and min(counts) > 0:
        output = dataclasses.replace(own.output, count=math.prod(counts))
        own = dataclasses.replace(own, output=output)
    operators = {"internal_divide_quantizer": own}
    if has_gain:
        operators["internal_multiplier"] = multiplier(own.output, x)
    end = [*operators.values()][-1]
    if has_offset:
        end = operators["internal_accumulator"] = adder(end.output, types["beta"])
    output = end.output
    if given.is_fixed_by_reference:
        operators = {name: given.in_reference(o) for name, o in operators.items()}
        output = given.sums
    return given.made(output, types, operators)


def _norm_type(given: _Given, name: str) -> DataType:
    """Returns the type of a parameter of a normalisation."""
    options, key = given.layer.options, f"{name}_quantizer"
    if given.is_fixed_by_reference:
        return data_type(given.reference.weights)
    has_inverse = options.get("inverse_quantizer") is not None
    is_out = has_inverse and name in ("gamma", "variance")
    word = options.get(key, None if is_out else _NORM_WORDS[name])
    if word is None and name in ("beta", "mean"):
        return given.inputs[0]
    return data_type(word)


def _deviation(variance: DataType) -> DataType:
    """Returns the type of the root of a variance."""
    if not variance.is_power:
        return variance
    most = variance.max_value
    root = float(np.round(math.sqrt(most))) if most >= 0 else most
    bits = variance.bits - 1
    return dataclasses.replace(variance, bits=bits, int_bits=bits, max_value=root)


def _kernel_shape(layer: ShapedLayer) -> tuple[int, ...]:
    """Returns the shape of a kernel of which all but the last axis are summed."""
    kernel = layer.weight_shapes[0]
    if layer.base not in DEPTHWISE:
        return kernel
    if kernel[-1] != 1:
        raise ValueError(f"`depth_multiplier` must be 1, got {kernel[-1]}.")
    return (*kernel[:-2], 1, 1)


def _product(given: _Given) -> LayerTypes:
    layer, x = given.layer, given.inputs[0]
    types = {"weight": given.counted(given.weight(layer.kernel_word), 0)}
    if layer.has_bias:
        types["bias"] = given.counted(given.weight(layer.word("bias")), 1)
    product = multiplier(types["weight"], x)
    fused = _rescaled(given, product)
    names = ("accumulator", "fused_accumulator")
    operators = {"multiplier": product}
    for name, own in zip(names, (product, fused), strict=True):
        sums = accumulator(_kernel_shape(layer), own.output)
        operators[name] = adder(sums.output, types["bias"]) if layer.has_bias else sums
    if given.is_fixed_by_reference:
        operators = {name: given.in_reference(o) for name, o in operators.items()}
    return given.made(operators["fused_accumulator"].output, types, operators)


def _rescaled(given: _Given, product: Circuit) -> Circuit:
    """Returns a multiplier whose result holds all channels times their scales."""
    layer = given.layer
    word = None if given.is_fixed_by_reference else layer.kernel_word
    scale = given.scales.get(layer.name)
    if word is None or scale is None or _alpha(word) != "auto_po2":
        return product
    shifts = np.log2(np.asarray(scale, np.float64))
    most, least = int(np.max(shifts)), int(np.min(shifts))
    own = product.output
    int_bits = own.int_bits + most
    bits = int_bits + own.bits - own.int_bits - least
    output = dataclasses.replace(own, bits=bits, int_bits=int_bits)
    return dataclasses.replace(product, output=output)


def _alpha(word: Any) -> Any:
    """Returns the scale of a kernel's quantizer, by default powers of two."""
    spec = kernel_word(word)
    has_scale = spec.name in ("quantized_bits", "quantized_linear")
    return getattr(spec, "alpha", None) if has_scale else None


def _folded(given: _Given) -> LayerTypes:
    layer, x = given.layer, given.inputs[0]
    weight = given.counted(given.weight(layer.kernel_word), 0)
    product = multiplier(weight, x)
    word = layer.word("bias")
    has_bias = given.is_fixed_by_reference or word is not None
    sums = accumulator(_kernel_shape(layer), product.output, has_bias=has_bias)
    bias = given.weight(word) if has_bias else sums.output
    if not has_bias and not sums.output.is_float:
        own = sums.output
        wide = dataclasses.replace(own, bits=own.bits + 1, int_bits=own.int_bits + 1)
        sums = dataclasses.replace(sums, output=wide)
    operators = {"multiplier": product, "accumulator": sums}
    if given.is_fixed_by_reference:
        operators = {name: given.in_reference(o) for name, o in operators.items()}
    types = {"weight": weight, "bias": bias}
    return given.made(operators["accumulator"].output, types, operators)
