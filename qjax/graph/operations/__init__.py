"""The operations of the integer graph, one record each."""

from collections.abc import Mapping

from qjax.graph.operations.arithmetic import ARITHMETIC
from qjax.graph.operations.gathers import GATHERS
from qjax.graph.operations.lookups import LOOKUPS
from qjax.graph.operations.loops import LOOPS
from qjax.graph.operations.moves import MOVES
from qjax.graph.operations.normalisations import NORMALISATIONS
from qjax.graph.operations.products import PRODUCTS
from qjax.graph.operations.record import Operands, Operation
from qjax.graph.operations.rescales import RESCALES
from qjax.graph.operations.tflite import TFLITE

__all__ = ("OPERATIONS", "Operands", "Operation")

OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for operation in (
        *PRODUCTS,
        *RESCALES,
        *LOOKUPS,
        *MOVES,
        *GATHERS,
        ARITHMETIC,
        *NORMALISATIONS,
        *LOOPS,
        *TFLITE,
    )
}
