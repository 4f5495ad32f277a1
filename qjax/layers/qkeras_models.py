"""QKeras's `model_quantize`: a dictionary of quantizers onto the layers of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord, as_layer_word
from qjax.layers.qkeras import kernel_word
from qjax.quantizers.spec import Spec

Config = Mapping[str, Any]


class KerasLayer(NamedTuple):
    """A float layer as Keras names it."""

    name: str
    cls: str  # "Conv2D", "Dense", "Activation", ...
    activation: str | None = None  # Keras's name; None for none.


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """A layer as `model_quantize` leaves it.

    Attributes:
      name: Name of the layer.
      cls: Its class, with a Q where it is quantized.
      quantizers: Its quantizers in QKeras's order; None for a float layer.
      activation: Its activation, a quantizer or Keras's name.
    """

    name: str
    cls: str
    quantizers: tuple[Spec | None, ...] | None = None
    activation: Spec | str | None = None


# Class -> the keys of its quantizers, that of the kernel first.
_KEYS = {
    **dict.fromkeys(
        ("Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "Dense"),
        ("kernel_quantizer", "bias_quantizer"),
    ),
    "DepthwiseConv2D": ("depthwise_quantizer", "bias_quantizer"),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        ("depthwise_quantizer", "pointwise_quantizer", "bias_quantizer"),
    ),
    **dict.fromkeys(
        ("SimpleRNN", "LSTM", "GRU"),
        (
            "kernel_quantizer",
            "recurrent_quantizer",
            "bias_quantizer",
            "state_quantizer",
        ),
    ),
    "AveragePooling2D": ("average_quantizer",),
    "GlobalAveragePooling2D": ("average_quantizer",),
}
_NORM = tuple(
    f"{x}_quantizer" for x in ("gamma", "beta", "mean", "variance", "inverse")
)
_OTHER_KEYS = (
    "activation_quantizer",
    "recurrent_activation_quantizer",
    "folding_mode",
    "ema_freeze_delay",
)
_FOLDED = {"Conv2D": "QConv2DBatchnorm", "DepthwiseConv2D": "QDepthwiseConv2DBatchnorm"}
_ACTIVATIONS = {
    "Activation": None,
    "ReLU": "relu",
    "LeakyReLU": "leakyrelu",
}
_BY_BITS = ("relu", "tanh", "sigmoid")  # Replaced by a quantizer of as many bits.


def converted_layers(
    layers: Sequence[KerasLayer],
    config: Config,
    activation_bits: int,
    *,
    prefers_adaptive: bool = False,
    folds: bool = False,
) -> tuple[ConvertedLayer, ...]:
    """Converts the layers of a chain as QKeras's `model_quantize` does.

    A layer is looked up by its name, then by its class with a Q. Without a quantizer of
    its kernel it stays in float. Activations "relu", "tanh" and "sigmoid" of quantized
    layers become quantizers of ``activation_bits`` bits, none of them integer, where no
    ``activation_quantizer`` is given. A batch normalisation that is named has no
    quantizers but those given.

    Args:
      layers: Name, class and activation of each layer, in order.
      config: Layer or class -> names of quantizers; "QActivation" and
        "QAdaptiveActivation" -> the quantizer, or one for each of Keras's names.
      activation_bits: Bits of activations without a quantizer.
      prefers_adaptive: Whether activations become adaptive ones first.
      folds: Whether a batch normalisation right behind a convolution is folded in.

    Returns:
      The layers, those that are folded in left out.

    Raises:
      ValueError: for a key that the layer does not have, or a text that is none.

    References:
      QKeras, utils.py, `model_quantize`, snapshot 78ea90f. There a separable layer
      fails; here it takes the keys of its two kernels.
    """
    found: list[ConvertedLayer] = []
    for k, layer in enumerate(layers):
        behind = layers[k + 1].cls if k + 1 < len(layers) else ""
        before = found[-1].cls if found else ""
        if layer.cls == "BatchNormalization" and before in _FOLDED.values():
            if k and layers[k - 1].cls in _FOLDED:
                continue
        is_folded = folds and behind == "BatchNormalization"
        found.append(
            _converted(layer, config, activation_bits, prefers_adaptive, is_folded)
        )
    return tuple(found)


def qkeras_words(
    layer: KerasLayer,
    config: Config,
    activation_bits: int = 8,
    *,
    input: LayerWord = None,
) -> LayerQuantizers | None:
    """Returns the quantizers that a dictionary of `model_quantize` has for a product.

    Args:
      layer: Name and class, as "Conv2D", and activation.
      config: Same as for `converted_layers`.
      activation_bits: Same as for `converted_layers`.
      input: Word of the input, which QKeras's layers do not have.

    Returns:
      Quantizers of kernel, bias and output; None for a layer that stays in float.
    """
    (found,) = converted_layers([layer], config, activation_bits)
    if found.quantizers is None or layer.cls not in _KEYS:
        return None
    kernel, *others = found.quantizers
    bias = others[0] if len(others) == 1 else None
    output = found.activation if isinstance(found.activation, Spec) else None
    return LayerQuantizers(input, kernel, bias, output)


def _converted(
    layer: KerasLayer,
    config: Config,
    activation_bits: int,
    prefers_adaptive: bool,
    is_folded: bool,
) -> ConvertedLayer:
    name, cls, activation = layer
    same = ConvertedLayer(name, cls, None, activation)
    if cls in _ACTIVATIONS:
        return _converted_activation(layer, config, prefers_adaptive) or same
    if cls == "BatchNormalization":
        own = _entry(config, name, f"Q{cls}")
        if own is None:
            return same
        _check_keys(name, own, _NORM)
        words = tuple(_parsed(name, key, own.get(key)) for key in _NORM)
        return ConvertedLayer(name, f"Q{cls}", words)
    own = _entry(config, name, f"Q{cls}")
    if cls not in _KEYS or own is None:
        return same
    keys = _KEYS[cls]
    _check_keys(name, own, (*keys, *_OTHER_KEYS))
    if own.get(keys[0]) is None:
        return same
    words = tuple(_parsed(name, key, own.get(key)) for key in keys)
    if keys[0] != "average_quantizer":
        of_kernels = len(keys) - 1 if "pointwise_quantizer" in keys else 1
        of_kernels += "recurrent_quantizer" in keys
        made = (w if w is None else kernel_word(w) for w in words[:of_kernels])
        words = (*made, *words[of_kernels:])
    given: Any = own.get("activation_quantizer", activation)
    if given in _BY_BITS and "activation_quantizer" not in own:
        given = f"quantized_{given}({activation_bits})"
    if isinstance(given, str) and "quantize" in given or isinstance(given, Spec):
        given = _parsed(name, "activation_quantizer", given)
    new = _FOLDED[cls] if is_folded and cls in _FOLDED else f"Q{cls}"
    return ConvertedLayer(name, new, words, given)


def _converted_activation(
    layer: KerasLayer, config: Config, prefers_adaptive: bool
) -> ConvertedLayer | None:
    function = _ACTIVATIONS[layer.cls] or layer.activation
    kinds = ["QActivation", "QAdaptiveActivation"]
    for cls in reversed(kinds) if prefers_adaptive else kinds:
        own: Any = config.get(layer.name, config.get(cls))
        if isinstance(own, Mapping):
            own = own.get(function)
        if own is not None:
            word = _parsed(layer.name, cls, own)
            return ConvertedLayer(layer.name, cls, None, word)
    return None


def _entry(config: Config, name: str, cls: str) -> Mapping[str, Any] | None:
    """Returns what a dictionary has for a layer: by its name, else by its class."""
    own = config.get(name, config.get(cls))
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(
            f"{name}: names of quantizers by key are wanted, as in "
            f'{{"kernel_quantizer": "quantized_bits(4,0,1)"}}, got {own!r}.'
        )
    return own


def _check_keys(name: str, own: Mapping[str, Any], keys: Sequence[str]) -> None:
    unknown = [key for key in own if key not in keys]
    if unknown:
        raise ValueError(f"{name}: wanted is one of {', '.join(keys)}, got {unknown}.")


def _parsed(name: str, key: str, text: Any) -> Spec | None:
    if text is None:
        return None
    try:
        return as_layer_word(key, text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.{key}: {error}") from error
