"""Calls that a trace keeps whole, known by their names."""

from typing import Any

from qjax.quantizers.point import SCOPE

# Before the kind of a softmax or normalisation, in float; and before what is computed
# in integers, whatever it reads, and how.
WHOLE = "qjax.whole."
INTEGER = "qjax.integer."
BEGIN = "begin"  # A first value of a loop: data for the steps, though it is known.


def quantizer_of(e: Any) -> str:
    """Returns the name of the quantizer that an equation applies whole, or ""."""
    return _behind(SCOPE, e)


def whole_of(e: Any) -> str:
    """Returns the kind of the softmax or normalisation that an equation is, or ""."""
    return _behind(WHOLE, e)


def integer_of(e: Any) -> str:
    """Returns what a call computes in integers, and how, or ""."""
    return _behind(INTEGER, e)


def _behind(prefix: str, e: Any) -> str:
    name = str(e.params.get("name", ""))
    return name.removeprefix(prefix) if name.startswith(prefix) else ""
