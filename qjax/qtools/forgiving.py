"""Sizes of a reference and of a trial, and how much of a metric a trial may lose."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from qjax.costs.energies import Memories, Process, horowitz
from qjax.qtools.energy import map_energy
from qjax.qtools.keras_models import ShapedLayer, ShapedModel
from qjax.qtools.type_maps import Reference, type_map
from qjax.quantizers.strings import parse

Parts = Collection[str]
_WEIGHED = ("Dense", "Conv2D", "Conv1D", "DepthwiseConv2D")
_GAIN_BITS, _OFFSET_BITS = 6, 5  # Of a QBatchNormalization, whatever its quantizers.


@dataclasses.dataclass(frozen=True)
class ForgivingFactor:
    """The part of a metric that a trial may lose for being small.

        delta = (delta_p if trial < reference else delta_n) / 100
                * log(reference / trial) / log(rate)

    Attributes:
      delta_p: Percent that a trial ``rate`` times smaller may lose.
      delta_n: Percent that a trial ``rate`` times larger must win.
      rate: The ratio of sizes.
      stress: Factor of the reference.

    Raises:
      ValueError: for a rate that is not positive or is 1; for NaN and infinity.

    Example:
      >>> round(ForgivingFactor(8, 8, 2).delta(1000, 500), 6)
      0.08

    References:
      QKeras, autoqkeras/forgiving_metrics/forgiving_factor.py, snapshot 78ea90f.
    """

    delta_p: float
    delta_n: float
    rate: float
    stress: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf or self.rate == 1:
            raise ValueError(
                f"`rate` must be positive and not 1, a ratio of sizes, got {self.rate}."
            )
        for name in ("delta_p", "delta_n", "stress"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"`{name}` of a `ForgivingFactor` must be finite, got "
                    f"{getattr(self, name)}."
                )

    def delta(self, reference: float, trial: float) -> float:
        """Returns the share of the metric that a trial may lose; negative: must win.

        Raises:
          ValueError: for sizes that are not positive and finite.
        """
        if not 0 < reference < math.inf or not 0 < trial < math.inf:
            raise ValueError(
                f"Sizes must be positive and finite, got {reference} for the "
                f"reference and {trial} for the trial."
            )
        reference = reference * self.stress
        percent = self.delta_p if trial < reference else self.delta_n
        return percent / 100 * math.log(reference / trial) / math.log(self.rate)

    def score(self, metric: float, reference: float, trial: float) -> float:
        """Returns the metric with what the size of the trial adds to it."""
        return metric * (1 + self.delta(reference, trial))


@dataclasses.dataclass(frozen=True)
class ModelBits:
    """The size of a model in bits.

    Attributes:
      parameters: Bits of all parameters that count.
      activations: Bits of all activations that count.
      layers: Layer -> its bits: parameters, activations, and the total that counts.
    """

    parameters: int
    activations: int
    layers: Mapping[str, Mapping[str, int]]

    @property
    def total(self) -> int:
        """Returns the bits of parameters and activations."""
        return self.parameters + self.activations

    def to_json(self) -> list[Any]:
        """Returns what QKeras's `compute_model_size` returns."""
        rows = {name: dict(row) for name, row in self.layers.items()}
        return [self.total, self.parameters, self.activations, rows]


@dataclasses.dataclass(frozen=True)
class BitSizes:
    """The bits that count in the size of a model.

    Attributes:
      input_bits: Bits of a number that goes in.
      output_bits: Bits of a result of a softmax or sigmoid.
      reference_bits: Bits of what has no quantizer.
      counted: Class of a layer -> the parts that count, "parameters" and "activations";
        "default" for other classes. Without either a layer is left out.
    """

    input_bits: int = 8
    output_bits: int = 8
    reference_bits: int = 8
    counted: Mapping[str, Parts] = dataclasses.field(
        default_factory=lambda: {"default": ("parameters", "activations")}
    )


def model_bits(model: ShapedModel, sizes: BitSizes | None = None) -> ModelBits:
    """Returns the size of a model in bits: weights, and results of activations.

    Args:
      model: The model.
      sizes: What counts.

    Returns:
      The size, the input of the model among the layers, as "in". As in QKeras layers
      that fold a normalisation have no size, and a QBatchNormalization has 6 and 5
      bits for gain and offset whatever its quantizers.

    References:
      QKeras, autoqkeras/forgiving_metrics/forgiving_bits.py, snapshot 78ea90f.
    """
    sizes = sizes or BitSizes()
    rows: dict[str, dict[str, int]] = {}
    first = sizes.input_bits * math.prod(model.input_shape)
    found = [("in", "InputLayer", (0, first))]
    for layer in model.layers:
        both = _parameter_bits(layer, sizes), _activation_bits(layer, sizes)
        found.append((layer.name, layer.cls, both))
    found += [(name, "Dropout", (0, 0)) for name in model.skipped]
    totals = {"parameters": 0, "activations": 0}
    for name, cls, own in found:
        counted = sizes.counted.get(cls, sizes.counted.get("default", ()))
        if not counted:
            continue
        parts = dict(zip(totals, own, strict=True))
        for part in totals:
            totals[part] += parts[part] if part in counted else 0
        total = sum(parts[part] for part in totals if part in counted)
        rows[name] = {**parts, "total": total}
    return ModelBits(totals["parameters"], totals["activations"], rows)


def _parameter_bits(layer: ShapedLayer, sizes: BitSizes) -> int:
    counts = [math.prod(shape) for shape in layer.weight_shapes]
    if layer.base in _WEIGHED:
        words = [layer.kernel_word, layer.word("bias")] if layer.is_quantized else []
        words += [None] * (len(counts) - len(words))
        pairs = zip(counts, words, strict=False)
        return sum(n * _word_bits(word, sizes.reference_bits) for n, word in pairs)
    if layer.base != "BatchNormalization":
        return 0
    gain, offset = sizes.reference_bits, sizes.reference_bits
    if layer.is_quantized:
        gain, offset = _GAIN_BITS, _OFFSET_BITS
    has_offset = layer.options.get("center", True)
    return counts[-1] * gain + (counts[0] * offset if has_offset else 0)


def _activation_bits(layer: ShapedLayer, sizes: BitSizes) -> int:
    size, activation = math.prod(layer.output_shape), layer.options.get("activation")
    is_linear = activation is None or activation == "linear"
    if layer.base in _WEIGHED and not layer.is_quantized:
        return 0 if is_linear else sizes.reference_bits * size
    is_activation = layer.cls in ("QActivation", "Activation")
    if not is_activation and layer.base not in _WEIGHED or is_linear:
        return 0
    names = ("softmax", "sigmoid") if is_activation else ("softmax",)
    if activation in names:
        return sizes.output_bits * size
    return _word_bits(activation, sizes.reference_bits) * size


def _word_bits(word: Any, default: int) -> int:
    """Returns the bits of a quantizer; the default for what has none."""
    if word is None:
        return default
    try:
        spec: Any = parse(word) if isinstance(word, str) else word
    except ValueError:
        return default  # A function of Keras.
    name = getattr(spec, "name", "")
    if "ternary" in name:
        return 2
    if "binary" in name or name == "bernoulli":
        return 1
    return int(getattr(spec, "bits", default))


def energy_sizes(
    model: ShapedModel,
    reference: Reference,
    *,
    memory: Memories | None = None,
    process: Process = horowitz,
) -> tuple[int, int]:
    """Returns the energy of a reference in given types, and that of a quantized model.

    Args:
      model: The model with its quantizers.
      reference: Types of the reference. Its input has the type of its weights.
      memory: Places of weights and activations; DRAM for both by default.
      process: Energies.

    Returns:
      Energy of the parts that count in the reference and in the model, whole pJ: sizes
      for a `ForgivingFactor`.

    References:
      QKeras, autoqkeras/forgiving_metrics/forgiving_energy.py, snapshot 78ea90f.
    """
    whole = dataclasses.replace(reference, is_whole=True)
    first = dataclasses.replace(model, source=reference.weights or "fp32")
    types = type_map(first, reference=whole), type_map(model, reference=reference)
    sums = [map_energy(own, memory, process).sum() for own in types]
    return sums[0], sums[1]
