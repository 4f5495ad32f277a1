"""The quantizers of layers by a scheme of whole models."""

from typing import Any

from qjax.layers.layer_quantizers import ACCUMULATOR, LayerQuantizers, site_name
from qjax.schemes.patterns import Role, Site
from qjax.schemes.scheme import Scheme


def scheme_words(
    scheme: Scheme, path: str, *, op: str = "", weight: str = "kernel", is_end: bool
) -> LayerQuantizers | None:
    """Returns the quantizers that a scheme has for a layer.

    Its sites are ``path/input``, ``path/kernel``, ``path/bias`` and ``path/output``. An
    output has the word of activations where values end there, as behind a
    normalisation; else that of a rule that names it, and none by default: the input of
    the next layer has one.

    Args:
      scheme: Defaults and rules.
      path: Path of the layer.
      op: Operation of the layer, for rules that look at it: "dense", "conv".
      weight: Name of its weight.
      is_end: Whether its output has the word of activations by default.

    Returns:
      The quantizers; None if all words are None.
    """

    def at(name: str, role: Role) -> Site:
        return Site(site_name(path, name), role, (), layer=path, op=op)

    ends = at("input", "activation"), at("output", "activation")
    is_named = scheme.rule(ends[1]) is not None or scheme.bits_rule(ends[1]) is not None
    output = scheme.word(ends[1]) if is_end or is_named else None
    bias: Any = scheme.bias_spec(at("bias", "bias"))
    own = scheme.word(ends[0]), scheme.word(at(weight, "weight"))
    if own == (None, None) and output is None:
        return None
    return LayerQuantizers(
        *own,
        ACCUMULATOR if bias is None else bias,
        output,
        scheme.site_calibrator(ends[0]),
        estimator=scheme.site_estimator(ends[0]),
    )
