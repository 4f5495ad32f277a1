"""The integer compiler: from a traced program to integers only."""

from qjax.lowering.graph import Graph
from qjax.lowering.program import IntegerProgram, lower
from qjax.lowering.rules_products import AccumulatorOverflowError
from qjax.lowering.verify import Verification, verify

__all__ = (
    "AccumulatorOverflowError",
    "Graph",
    "IntegerProgram",
    "Verification",
    "lower",
    "verify",
)
