"""Integer rules of JAX primitives, in one table.

A rule is ``rule(builder, equation, trace, *operands) -> result``: what is known of the
outputs of an equation, given what is known of its operands.
"""

from collections.abc import Mapping

from qjax.lowering.interpret import LoweringRule
from qjax.lowering.rules.arithmetic import ARITHMETIC
from qjax.lowering.rules.casts import CASTS
from qjax.lowering.rules.choices import CHOICES
from qjax.lowering.rules.distribution import distributed
from qjax.lowering.rules.functions import FUNCTIONS
from qjax.lowering.rules.gathers import GATHERS
from qjax.lowering.rules.lookups import LOOKUPS
from qjax.lowering.rules.loops import LOOPS
from qjax.lowering.rules.lstms import LSTMS
from qjax.lowering.rules.moves import MOVES
from qjax.lowering.rules.normalisations import NORMALISATIONS
from qjax.lowering.rules.points import POINTS
from qjax.lowering.rules.products import PRODUCTS
from qjax.lowering.rules.reductions import REDUCTIONS
from qjax.lowering.rules.sorts import SORTS
from qjax.lowering.rules.whole import extended

__all__ = ("RULES",)

RULES: Mapping[str, LoweringRule] = distributed(
    extended(
        {
            **ARITHMETIC,
            **CASTS,
            **CHOICES,
            **FUNCTIONS,
            **GATHERS,
            **LOOKUPS,
            **LOOPS,
            **LSTMS,
            **MOVES,
            **NORMALISATIONS,
            **POINTS,
            **PRODUCTS,
            **REDUCTIONS,
            **SORTS,
        }
    )
)
