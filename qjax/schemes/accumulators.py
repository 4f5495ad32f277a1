"""The bits of accumulators that a scheme leads to."""

import math
import warnings
from collections.abc import Sequence

from qjax.affine import QSpec
from qjax.quantizers.spec import is_known
from qjax.schemes.patterns import Site
from qjax.schemes.scheme import Scheme


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


def _reach(spec: QSpec) -> int:
    """Returns the largest distance of a code from its zero point."""
    least, most = int(spec.qmin), int(spec.qmax)  # type: ignore[arg-type]
    return max(-least, most) if spec.symmetric or spec.narrow_range else most - least


def warn_of_buffers(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of accumulators that may overflow."""
    by_name = {site.name: site for site in sites}
    narrow = []
    for site in sites:
        spec = scheme.spec(site)
        if site.role == "weight" and isinstance(spec, QSpec):
            inputs = [by_name[name] for name in site.inputs]
            needed = accumulator_bits(site, scheme, inputs)
            bits = scheme.site_buffer_bits(site)
            if needed is not None and needed > bits:
                narrow.append(f"{site.name} (up to {needed} bits, has {bits})")
    if narrow:
        warnings.warn(
            "These accumulators saturate their buffers, if the weights use their whole "
            f"range: {', '.join(narrow)}. `lower` checks the actual weights. Use more "
            "`buffer_bits`, or fewer bits.",
            stacklevel=3,
        )
