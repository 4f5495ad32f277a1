"""Calls that a trace keeps whole, known by their names."""

from typing import Any

from qjax.integer_calls import name_behind
from qjax.quantizers.point import SCOPE

WHOLE = "qjax.whole."  # Before the kind of a softmax or normalisation, in float.


def quantizer_of(e: Any) -> str:
    """Returns the name of the quantizer that an equation applies whole, or ""."""
    return name_behind(SCOPE, e)


def whole_of(e: Any) -> str:
    """Returns the kind of the softmax or normalisation that an equation is, or ""."""
    return name_behind(WHOLE, e)
