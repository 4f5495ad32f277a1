"""Schemes of few bits: 4-bit weights, and weights of one bit."""

from qjax.affine import QSpec
from qjax.quantizers.two_levels import Binary
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Rule, as_optional
from qjax.schemes.scheme import Scheme

_FIRST = Where(role="weight", inputs="input:*")
_LAST = Where(role="weight", feeds="return")


def w4a8() -> Scheme:
    """Returns a scheme of 4-bit weights per output channel and 8-bit activations."""
    return Scheme(weights=QSpec(bits=4, narrow_range=True, axis="output"))


def binary(*, activation_bits: int = 8) -> Scheme:
    """Returns a scheme of one-bit weights, -s or s, least-squares s per channel.

    The first and the last product keep weights of 8 bits, as XNOR-Net does.

    Args:
      activation_bits: Bits of activations.

    References:
      Rastegari et al., "XNOR-Net", 2016, sections 3.1 and 4 (arXiv:1603.05279).
    """
    word = QSpec(bits=8, narrow_range=True, axis="output")
    return Scheme(
        weights=Binary(alpha="auto"),
        activations=QSpec(bits=activation_bits),
        rules=as_optional(Rule(_FIRST, word), Rule(_LAST, word)),
    )
