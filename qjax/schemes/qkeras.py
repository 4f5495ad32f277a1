"""Schemes from the config of QKeras: names of quantizers, layer by layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse
from qjax.schemes.patterns import Globs, Role, Where
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme


def qkeras(
    layers: Mapping[str, Mapping[str, str | Spec | None]], base: Scheme | None = None
) -> Scheme:
    """Returns a scheme from QKeras's config: names of quantizers, layer by layer.

        qkeras({"input:0": {"activation": "quantized_bits(8,0,1)"},
                "conv1": {"kernel_quantizer": "quantized_bits(4,0,1)",
                          "bias_quantizer": "quantized_bits(4)",
                          "activation": "quantized_relu(4)"}, "fc": {...}})

    A bias has the very value that its quantizer gives it: its accumulator is made finer
    where its grid does not hold that. Without a quantizer it takes the grid of the
    accumulator. A kernel's ``alpha`` is what its string says, 1 if nothing; QKeras's
    layers make it "auto_po2". A quantized model has no random key: what draws in
    QKeras's training is replaced by what QKeras computes in inference, with a warning.

    Args:
      layers: Module path, or a glob of module paths, ``input:0`` for an input -> names
        of quantizers, each a string as `qjax.quantizers.parse` reads it, a spec, or
        None for none:

        - ``kernel_quantizer``, also ``depthwise_quantizer``, ``pointwise_quantizer``:
          together they tell the weights of a separable convolution apart;
        - ``bias_quantizer``;
        - ``activation``, also ``activation_quantizer``, of what the layer returns.
          Keras's own functions, such as "relu", stay what the model makes of them.
      base: Scheme of other sites; None: they stay float, as layers that QKeras is not
        told of.

    Returns:
      The scheme.

    Raises:
      ValueError: for an unknown key, or a string that is no quantizer, with the layer
        and the key.
    """
    rules = []
    for layer, texts in layers.items():
        if not isinstance(texts, Mapping):
            raise ValueError(
                f"{layer}: names of quantizers by key are wanted, as in "
                f'{{"kernel_quantizer": "quantized_bits(4,0,1)"}}, got {texts!r}.'
            )
        for key, text in texts.items():
            word = _named_word(f"{layer}.{key}", key, text)
            where = _qkeras_site(layer, key, {_DEPTHWISE, _POINTWISE} <= set(texts))
            rules.append(Rule(where, word))
    if base is None:
        base = Scheme(weights=None, activations=None)
    return dataclasses.replace(base, rules=(*rules, *base.rules))


_DEPTHWISE, _POINTWISE = "depthwise_quantizer", "pointwise_quantizer"
_QKERAS_KEYS: dict[str, Role] = {
    "kernel_quantizer": "weight",
    _DEPTHWISE: "weight",
    _POINTWISE: "weight",
    "bias_quantizer": "bias",
    "activation": "activation",
    "activation_quantizer": "activation",
}
# Functions of Keras, which quantize nothing.
_KERAS = frozenset(
    "elu exponential gelu linear relu relu6 selu sigmoid silu softmax softplus "
    "softsign swish tanh".split()
)


def _named_word(path: str, key: str, text: Any) -> Spec | None:
    """Returns the quantizer that an entry names; None for no quantizer."""
    if key not in _QKERAS_KEYS:
        raise ValueError(
            f"{path}: wanted is one of {', '.join(_QKERAS_KEYS)}. A BatchNorm is part "
            "of its product; averages and states have no quantizer of their own."
        )
    if text is None or isinstance(text, Spec):
        return text
    if _QKERAS_KEYS[key] == "activation" and text in _KERAS:
        return None
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _qkeras_site(layer: str, key: str, is_separable: bool) -> Where:
    """Returns the sites that a key of a layer means."""
    where = Where(role=_QKERAS_KEYS[key], layer=layer)
    ops: dict[str, Globs] = {_DEPTHWISE: "depthwise_*", _POINTWISE: ("conv*", "dense")}
    if not is_separable or where.role == "activation":
        return where
    return dataclasses.replace(
        where, layer=(layer, f"{layer}/*"), op=ops.get(key, where.op)
    )
