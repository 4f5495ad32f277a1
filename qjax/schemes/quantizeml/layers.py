"""Layers of QuantizeML's configs: the sites in each, and the words that are usual."""

from collections.abc import Sequence

from qjax.affine import QSpec
from qjax.quantizers.strings import closest
from qjax.schemes.patterns import Site
from qjax.schemes.words import Word

_WEIGHT = QSpec(bits=8, narrow_range=True, axis="output")
_OUTPUT = QSpec(bits=8, symmetric=True, power_of_two=True)

Slots = dict[str, Site]  # weight_quantizer, output_quantizer -> site.


def slots_by_layer(sites: Sequence[Site]) -> dict[str, Slots]:
    """Returns the sites by layer; a layer that is called again gets a number."""
    layers: dict[str, Slots] = {}
    for site in sites:
        slot = "weight_quantizer" if site.role == "weight" else "output_quantizer"
        key, k = site.layer or site.name, 0
        while slot in layers.get(key, {}):
            k += 1
            key = f"{site.layer or site.name}:{k}"
        layers.setdefault(key, {})[slot] = site
    return layers


def usual_word(under: Word | None, site: Site) -> QSpec:
    """Returns the word that fills in the keys that a config leaves out."""
    if isinstance(under, QSpec):
        return under
    return _WEIGHT if site.role == "weight" else _OUTPUT


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
