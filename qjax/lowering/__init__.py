"""The integer compiler: from a traced program to integers only."""

from qjax.graph.graph import Graph
from qjax.lowering.binding import Bound
from qjax.lowering.pipeline import lower
from qjax.lowering.rules.products import AccumulatorOverflowError
from qjax.lowering.verification import Verification, verify
from qjax.program import IntegerProgram

__all__ = (
    "AccumulatorOverflowError",
    "Bound",
    "Graph",
    "IntegerProgram",
    "Verification",
    "lower",
    "verify",
)
