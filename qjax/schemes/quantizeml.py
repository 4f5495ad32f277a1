"""Schemes layer by layer in the JSON of QuantizeML, and the reason of each value.

    {"conv1": {"weight_quantizer": {"bitwidth": 8}, "buffer_bitwidth": 28},
     "relu": {"output_quantizer": {"bitwidth": 4, "signed": false,
                                   "axis": "per-tensor", "buffer_bitwidth": 32},
              "buffer_bitwidth": 32}}

``bias_quantizer`` has a ``bitwidth``: a bias of so many bits on steps of its
accumulator (`qjax.affine.fake_quant_bias`). A separable convolution is two layers, or
two weights of one: ``dw_weight_quantizer`` and ``pw_weight_quantizer`` tell them apart
under the name of both. ``scale_bits`` is read and changes nothing: scales are
multipliers of 31 bits here.

Beside the keys of QuantizeML there are some for what it lacks: ``quantizer`` (a string
of `qjax.quantizers.parse`), ``symmetric``, ``narrow_range``, ``power_of_two``,
``calibrator``; they appear where they differ from QuantizeML's ways. ``null`` in place
of a quantizer leaves the values in float.
"""

import dataclasses
import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator, parse_calibrator
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import closest, parse
from qjax.schemes.codec import SchemeError, check_keys
from qjax.schemes.patterns import Site
from qjax.schemes.presets import FUNCTIONS
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.schemes.words import Word
from qjax.tables import html_table

_WEIGHT = QSpec(bits=8, narrow_range=True, axis="output")
_OUTPUT = QSpec(bits=8, symmetric=True, power_of_two=True)
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
_LUT_BITS = 14  # Bits of a table, as QuantizeML writes it.

_Slots = dict[str, Site]  # weight_quantizer, output_quantizer -> site.


def dump_layers(scheme: Scheme, sites: Sequence[Site], base: Scheme) -> dict[str, Any]:
    """Writes a scheme as values for each layer of a model.

    Args:
      scheme: Scheme with known bits.
      sites: Sites of the model.
      base: Scheme that a reader starts from: where it would quantize and ``scheme``
        does not, the config says so.

    Returns:
      Layer -> its quantizers, plain JSON.

    Raises:
      ValueError: for what has no text: traced bits, calibrators of the user's own.
    """
    config = {}
    for layer, slots in _layers(sites).items():
        entry: dict[str, Any] = {}
        weight, output = (
            slots.get(f"{slot}_quantizer") for slot in ("weight", "output")
        )
        if output is not None and _speaks(scheme, base, output):
            entry["output_quantizer"] = _output_out(scheme, base, output)
        if weight is not None and _speaks(scheme, base, weight):
            entry["weight_quantizer"] = _weight_out(scheme, base, weight)
        entry.update(_buffer_out(scheme, sites, weight, output))
        if entry:
            config[layer] = entry
    return config


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
    layers = _layers(sites)
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


def _check_slots(path: str, entry: Mapping[str, Any], slots: _Slots) -> None:
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


def _separable(layers: Mapping[str, _Slots]) -> dict[str, dict[str, Site]]:
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


def accumulator_bits(site: Site, scheme: Scheme, inputs: Sequence[Site]) -> int | None:
    """Returns the bits that the accumulators of all weights of one shape may take.

    Args:
      site: A weight.
      scheme: Scheme with known bits.
      inputs: The sites that its product reads.

    Returns:
      Bits, sign included; None where a word has no affine grid or unknown bits.
    """
    words = [scheme.spec(site), *map(scheme.spec, inputs)]
    if len(words) < 2 or not all(isinstance(w, QSpec) for w in words):
        return None
    if not is_known(*(w.bits for w in words)):  # type: ignore[union-attr]
        return None
    reach = max(map(_reach, words[1:]))  # type: ignore[arg-type]
    taps = math.prod(site.shape[:-1]) if site.taps is None else site.taps
    most = taps * _reach(words[0]) * reach  # type: ignore[arg-type]
    return int(most).bit_length() + 1


class Explanation(dict[str, tuple[Any, str]]):
    """The value of each field of a site with its reason. ``str`` is a table."""

    def __str__(self) -> str:
        rows = [(k, str(v), reason) for k, (v, reason) in self.items()]
        wide = [max((len(row[k]) for row in rows), default=0) for k in (0, 1)]
        return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(field, *pair) for field, pair in self.items()]
        return html_table(("field", "value", "decided by"), rows)


def explain_site(scheme: Scheme, site: Site) -> Explanation:
    """Explains which rule decided each value at a site."""
    rule, spec = scheme.rule(site), scheme.spec(site)
    own = f"Scheme.{'weights' if site.role == 'weight' else 'activations'}"
    reasons: dict[str, str] = {}
    if rule is not None:
        reasons = dict(rule.reasons)
        at = next(k for k, r in enumerate(scheme.rules) if r is rule)
        own = reasons.get("*", f"Scheme.rules[{at}], {rule.pattern}")
    found = Explanation()
    if spec is None:
        found["spec"] = None, reasons.get("spec", own)
        return found
    if isinstance(spec, Spec):
        found["quantizer"] = str(spec), reasons.get("quantizer", own)
    else:
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            value = getattr(value, "__name__", value)
            reason = reasons.get(field.name, own)
            if field.name == "axis" and scheme.word(site) != spec:
                is_weight = site.role == "weight"
                why = site.note or "the output axis" if is_weight else "one scale"
                reason = f"{reason}: {why}"
            if field.name == "symmetric" and site.role == "weight":
                value, reason = True, "weights are symmetric"
            found[field.name] = value, reason
        if site.role == "activation":
            calibrator = scheme.site_calibrator(site)
            is_own = rule is not None and rule.calibrator is not None
            by = own if is_own else "Scheme.calibrator"
            found["calibrator"] = (
                calibrator.name or "the user's own",
                reasons.get("calibrator", by),
            )
    is_own = rule is not None and rule.buffer_bits is not None
    by = own if is_own else "Scheme.buffer_bits"
    reason = reasons.get("buffer_bits", by)
    found["buffer_bits"] = scheme.site_buffer_bits(site), reason
    return found


def _layers(sites: Sequence[Site]) -> dict[str, _Slots]:
    """Returns the sites by layer; a layer that is called again gets a number."""
    layers: dict[str, _Slots] = {}
    for site in sites:
        slot = "weight_quantizer" if site.role == "weight" else "output_quantizer"
        key, k = site.layer or site.name, 0
        while slot in layers.get(key, {}):
            k += 1
            key = f"{site.layer or site.name}:{k}"
        layers.setdefault(key, {})[slot] = site
    return layers


def _speaks(scheme: Scheme, base: Scheme, site: Site) -> bool:
    """Returns whether a config must mention a site."""
    spec, there = scheme.spec(site), base.spec(site)
    if site.op == "input":
        same = scheme.site_calibrator(site) == base.site_calibrator(site)
        return spec != there or not same
    return spec is not None or there is not None


def _weight_out(scheme: Scheme, base: Scheme, site: Site) -> dict[str, Any] | None:
    spec = scheme.spec(site)
    if not isinstance(spec, QSpec):
        return None if spec is None else {"quantizer": str(spec)}
    found: dict[str, Any] = {"bitwidth": _bits(site, spec)}
    is_depthwise = site.op.startswith("depthwise")
    is_output = spec.axis == site.axis and spec.axis is not None
    if is_depthwise or not is_output:  # The layout of Keras, not qjax's.
        found["axis"] = -2 if is_output else spec.axis
    usual = _usual(base.spec(site), site)
    return found | _differences(spec, usual, ("signed", "narrow_range"))


def _output_out(scheme: Scheme, base: Scheme, site: Site) -> dict[str, Any] | None:
    spec = scheme.spec(site)
    if spec is None:
        return None
    buffer = {"buffer_bitwidth": scheme.site_buffer_bits(site)}
    if not isinstance(spec, QSpec):
        return {"quantizer": str(spec), **buffer}
    found: dict[str, Any] = {"bitwidth": _bits(site, spec)}
    if _ends_in_relu(site):
        found["signed"] = spec.signed
    is_last = site.feeds == ("return",)
    if not (is_last and spec.axis is None):
        found["axis"] = _AXES_OUT.get(spec.axis, spec.axis)
    usual = _usual(base.spec(site), site)
    found |= _differences(spec, usual, ("signed", "symmetric", "narrow_range"))
    calibrator = scheme.site_calibrator(site)
    if calibrator != base.site_calibrator(site):
        if not calibrator.name:
            raise ValueError(
                f"The calibrator at {site.name!r} has functions of its own, which no "
                "JSON holds."
            )
        found["calibrator"] = calibrator.name
    if is_last and found["bitwidth"] >= 16:
        found["scale_bits"] = 16
    return found | buffer


_AXES_OUT: dict[Any, str] = {None: "per-tensor", -1: "per-axis"}
_AXES_IN = {"per-tensor": None, "per-axis": -1}


def _buffer_out(
    scheme: Scheme, sites: Sequence[Site], weight: Site | None, output: Site | None
) -> dict[str, int]:
    if weight is not None:
        is_quantized = scheme.spec(weight) is not None
        bits = scheme.site_buffer_bits(weight)
        return {"buffer_bitwidth": bits} if is_quantized else {}
    if output is None or output.op in ("input", "concatenate"):
        return {}
    is_quantized = scheme.spec(output) is not None
    if output.op in FUNCTIONS:
        return {"lut_bitwidth": _LUT_BITS} if is_quantized else {}
    of = [s for s in sites if s.role == "weight" and _serves(s, output)]
    if is_quantized or any(scheme.spec(site) is not None for site in of):
        return {"buffer_bitwidth": scheme.site_buffer_bits(output)}
    return {}


def _serves(weight: Site, output: Site) -> bool:
    """Returns whether a weight makes the product that ends at a site."""
    inputs = set(output.inputs)
    return weight.op == output.op and inputs.issubset(weight.inputs) and bool(inputs)


def _ends_in_relu(site: Site) -> bool:
    is_bounded = site.activation in ("relu", "relu6", "clip")
    return is_bounded and site.op not in ("mean", "avg_pool", "concatenate")


def _differences(spec: QSpec, usual: QSpec, fields: tuple[str, ...]) -> dict[str, Any]:
    names = (*fields, "power_of_two")
    pairs = ((name, getattr(spec, name), getattr(usual, name)) for name in names)
    return {name: value for name, value, default in pairs if value != default}


def _bits(site: Site, spec: QSpec) -> int:
    if not is_known(spec.bits):
        raise ValueError(f"The bits at {site.name!r} are not known: {spec.bits}.")
    return int(spec.bits)  # type: ignore[arg-type]


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
    spec = _usual(under, site)
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


def _usual(under: Word | None, site: Site) -> QSpec:
    """Returns the word that fills in the keys that a config leaves out."""
    if isinstance(under, QSpec):
        return under
    return _WEIGHT if site.role == "weight" else _OUTPUT


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


def _reach(spec: QSpec) -> int:
    """Returns the largest distance of a code from its zero point."""
    least, most = int(spec.qmin), int(spec.qmax)  # type: ignore[arg-type]
    return max(-least, most) if spec.symmetric or spec.narrow_range else most - least


def find_layer(name: str, sites: Sequence[Site]) -> int:
    """Returns the place of the last site of a layer.

    Raises:
      ValueError: for an unknown layer, with the closest.
    """
    places = [k for k, site in enumerate(sites) if name in (site.layer, site.name)]
    if not places:
        layers = dict.fromkeys(site.layer for site in sites)
        raise ValueError(f"There is no layer {name!r}. {closest(name, layers)}")
    return places[-1]
