"""Writes schemes as layer configs in the JSON of QuantizeML."""

from collections.abc import Sequence
from typing import Any

from qjax.affine import QSpec
from qjax.quantizers.spec import is_known
from qjax.schemes.patterns import Site
from qjax.schemes.quantizeml.layers import slots_by_layer, usual_word
from qjax.schemes.quantizeml.params import FUNCTIONS
from qjax.schemes.scheme import Scheme

_LUT_BITS = 14  # Bits of a table, as QuantizeML writes it.


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
    for layer, slots in slots_by_layer(sites).items():
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
    usual = usual_word(base.spec(site), site)
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
    usual = usual_word(base.spec(site), site)
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
