"""One program in every runtime that is installed, and the codes that differ."""

from qjax.conformance.comparison import Conformance, Outcome, conform
from qjax.conformance.runtimes import RUNTIMES
from qjax.conformance.session import Runtime, Session

__all__ = ("RUNTIMES", "Conformance", "Outcome", "Runtime", "Session", "conform")
