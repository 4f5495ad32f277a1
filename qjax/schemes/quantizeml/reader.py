"""Reads layer configs in the JSON of QuantizeML as rules."""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator, parse_calibrator
from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse
from qjax.schemes.codec import SchemeError, check_keys
from qjax.schemes.explanation import explain_site
from qjax.schemes.patterns import Site
from qjax.schemes.quantizeml.layers import Slots, slots_by_layer, usual_word
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.schemes.words import Word

_WEIGHT_KEYS = tuple("bitwidth signed axis quantizer narrow_range power_of_two".split())
_OUTPUT_KEYS = (
    *_WEIGHT_KEYS,
    *"symmetric calibrator scale_bits buffer_bitwidth".split(),
)
_LAYER_KEYS = (
    *"weight_quantizer output_quantizer bias_quantizer".split(),
    *"buffer_bitwidth lut_bitwidth".split(),
)
_BIAS_KEYS = ("bitwidth", "quantizer")
_SEPARABLE = {"dw_weight_quantizer": "depthwise", "pw_weight_quantizer": "pointwise"}
_ELSEWHERE = {
    "max_value_quantizer": "a bound lies on the grid of the accumulator, 32 bits",
    "a_quantizer": "recurrent states have no quantizer of their own",
}


def config_rules(
    config: Mapping[str, Any],
    sites: Sequence[Site],
    base: Scheme,
    biases: Sequence[Site] = (),
) -> tuple[Rule, ...]:
    """Reads a config as rules that come before those of a scheme.

    Args:
      config: Config in the form of `dump_layers`; ``base`` fills in absent keys.
      sites: Sites of the model.
      base: The scheme under it.
      biases: Biases of the model.

    Returns:
      One rule for each site that the config speaks of.

    Raises:
      SchemeError: with the path of an unknown layer or key, the closest there are; and
        for values that no quantizer can have.
    """
    layers = slots_by_layer(sites)
    if not isinstance(config, Mapping):
        raise SchemeError(f"A config maps layers to quantizers, got {config!r}.")
    separable = _separable(layers)
    check_keys("q_config", config, [*layers, *separable])
    rules: list[Rule] = []
    for layer, entry in config.items():
        path, slots = f"q_config[{layer!r}]", layers.get(layer, {})
        if not isinstance(entry, Mapping):
            raise SchemeError(f"{path}: an object is wanted, got {entry!r}.")
        if not entry:
            raise SchemeError(
                f"{path}: it is empty, which says nothing. Leave the layer out, or "
                "write `null` for a quantizer to leave its values in float."
            )
        rest = dict(entry)
        for key in [key for key in entry if key in _SEPARABLE]:
            site = _part(path, key, separable.get(layer, {}))
            own = {"weight_quantizer": rest.pop(key)}
            if "buffer_bitwidth" in entry:
                own["buffer_bitwidth"] = entry["buffer_bitwidth"]
            rule = _rule(path, "weight_quantizer", own, site, base, said=key)
            rules.append(rule)
        if rest and not slots and set(rest) != {"buffer_bitwidth"}:
            check_keys(path, rest, list(_SEPARABLE))
        if "bias_quantizer" in rest:
            own_biases = [site for site in biases if site.layer == layer]
            rules.append(_bias_rule(path, rest.pop("bias_quantizer"), own_biases))
        _check_slots(path, rest, slots)
        for slot, site in slots.items():
            if slot in rest or "buffer_bitwidth" in rest:
                rules.append(_rule(path, slot, rest, site, base))
    return tuple(rules)


def _check_slots(path: str, entry: Mapping[str, Any], slots: Slots) -> None:
    for key in entry:
        if key in _ELSEWHERE:
            raise SchemeError(f"{path}[{key!r}]: leave it out: {_ELSEWHERE[key]}.")
        if key.endswith("_quantizer") and key in _LAYER_KEYS and key not in slots:
            raise SchemeError(
                f"{path}[{key!r}]: this layer has none. It has {', '.join(slots)}."
            )
    check_keys(path, entry, (*_LAYER_KEYS, *_SEPARABLE))
    if "lut_bitwidth" in entry:
        _whole(path, entry, "lut_bitwidth", 2, 16)


def _separable(layers: Mapping[str, Slots]) -> dict[str, dict[str, Site]]:
    """Maps a name to the depthwise and the pointwise weight of the layers below."""
    found: dict[str, dict[str, Site]] = {}
    for slots in layers.values():
        site = slots.get("weight_quantizer")
        if site is None or not site.op.startswith(("depthwise_conv", "conv", "dense")):
            continue
        part = "depthwise" if site.op.startswith("depthwise") else "pointwise"
        for name in dict.fromkeys((site.layer, site.layer.rpartition("/")[0])):
            if name:
                found.setdefault(name, {}).setdefault(part, site)
    return {name: parts for name, parts in found.items() if len(parts) == 2}


def _part(path: str, key: str, parts: Mapping[str, Site]) -> Site:
    if not parts:
        raise SchemeError(
            f"{path}[{key!r}]: this layer is no separable convolution, which has a "
            "depthwise and a pointwise weight. Use 'weight_quantizer'."
        )
    return parts[_SEPARABLE[key]]


def _bias_rule(path: str, data: Any, biases: Sequence[Site]) -> Rule:
    """Returns the rule for the bias of a layer."""
    here = f"{path}['bias_quantizer']"
    if not biases:
        raise SchemeError(f"{here}: this layer has no bias that is added to a product.")
    name = biases[0].name
    reasons = (("*", here),)
    if data is None:
        return Rule(name, None, reasons=reasons)
    if not isinstance(data, Mapping):
        raise SchemeError(f"{here}: an object or null is wanted, got {data!r}.")
    check_keys(here, data, _BIAS_KEYS)
    if "quantizer" in data:
        return Rule(name, _parsed(here, data["quantizer"]), reasons=reasons)
    bits = _whole(here, data, "bitwidth", 2, 32) if "bitwidth" in data else 8
    return Rule(name, QSpec(bits, symmetric=True), reasons=reasons)


def _parsed(path: str, text: Any) -> Spec:
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise SchemeError(f"{path}['quantizer']: {error}") from error


_AXES_IN = {"per-tensor": None, "per-axis": -1}


def _rule(
    path: str,
    slot: str,
    entry: Mapping[str, Any],
    site: Site,
    base: Scheme,
    *,
    said: str = "",
) -> Rule:
    """Returns the rule for one site: the entry's values over the scheme's."""
    under, rule = base.spec(site), base.rule(site)
    reasons = {k: reason for k, (_, reason) in explain_site(base, site).items()}
    calibrator = None if rule is None else rule.calibrator
    buffer, word = base.site_buffer_bits(site), under
    if "buffer_bitwidth" in entry:
        buffer = _whole(path, entry, "buffer_bitwidth", 2, 32)
        reasons["buffer_bits"] = f"{path}['buffer_bitwidth']"
    if slot in entry:
        here, data = f"{path}[{(said or slot)!r}]", entry[slot]
        if data is None:
            word, reasons["spec"] = None, here
        elif not isinstance(data, Mapping):
            raise SchemeError(f"{here}: an object or null is wanted, got {data!r}.")
        else:
            is_weight = site.role == "weight"
            check_keys(here, data, _WEIGHT_KEYS if is_weight else _OUTPUT_KEYS)
            word = _word(here, data, site, under)
            for key in map(str, data):
                reasons[_FIELDS.get(key, key)] = f"{here}[{key!r}]"
            if "buffer_bitwidth" in data:
                buffer = _whole(here, data, "buffer_bitwidth", 2, 32)
            if "calibrator" in data:
                calibrator = _calibrator(here, data["calibrator"])
    name = glob.escape(site.name)
    return Rule(name, word, calibrator, buffer, tuple(reasons.items()))


_FIELDS = {"bitwidth": "bits", "buffer_bitwidth": "buffer_bits"}


def _word(path: str, data: Mapping[str, Any], site: Site, under: Word | None) -> Word:
    if "quantizer" in data:
        return _parsed(path, data["quantizer"])
    spec = usual_word(under, site)
    options: dict[str, Any] = {}
    for key in ("signed", "symmetric", "narrow_range", "power_of_two"):
        if key in data:
            if not isinstance(data[key], bool):
                raise SchemeError(
                    f"{path}[{key!r}]: true or false is wanted, got {data[key]!r}."
                )
            options[key] = data[key]
    if "axis" in data:
        options["axis"] = _axis(path, data["axis"], site)
    signed = options.get("signed", spec.signed)
    if "bitwidth" in data:
        options["bits"] = _whole(path, data, "bitwidth", 2 if signed else 1, 32)
    if "scale_bits" in data:
        _whole(path, data, "scale_bits", 1, 16)
    try:
        return dataclasses.replace(spec, **options)
    except (TypeError, ValueError) as error:
        raise SchemeError(f"{path}: {error}") from error


def _axis(path: str, axis: Any, site: Site) -> Any:
    if site.role == "activation":
        if axis not in _AXES_IN:
            raise SchemeError(
                f"{path}['axis']: 'per-tensor' or 'per-axis' is wanted, got {axis!r}."
            )
        return _AXES_IN[axis]
    channel = -2 if site.op.startswith("depthwise") else -1
    if axis not in (None, channel):
        raise SchemeError(
            f"{path}['axis']: {channel}, the channels of the output, or null is wanted "
            f"for a {site.op}, got {axis!r}."
        )
    return None if axis is None else site.axis


def _calibrator(path: str, text: Any) -> Calibrator:
    try:
        return parse_calibrator(text)
    except (TypeError, ValueError) as error:
        raise SchemeError(f"{path}['calibrator']: {error}") from error


def _whole(path: str, data: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = data[key]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        raise SchemeError(
            f"{path}[{key!r}]: a whole number from {least} to {most} is wanted, got "
            f"{value!r}."
        )
    return int(value)
