"""JAX primitives: one record each, of what it does to numbers and so to their grid.

Whoever asks what an equation does to a grid asks these records: the finder of blocks,
the simulation, the rules, `apply_integer`. A primitive that is not here is refused
where it meets data.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

Kind = Literal[
    "keep",
    "cast",
    "axes",
    "place",
    "pad",
    "pick",
    "place by data",
    "order",
    "select",
    "maximum",
    "minimum",
    "running extreme",
    "shift",
    "factor",
    "negate",
    "bound",
    "comparison",
    "function",
    "sum",
    "running sum",
    "reduction",
    "product",
    "number",
    "index",
    "point",
    "loop",
    "call",
]


@dataclasses.dataclass(frozen=True)
class Primitive:
    """All that is known of a JAX primitive.

    Attributes:
      name: In equations.
      kind: What becomes of the numbers of its operands. ``keep``: they stay; ``cast``:
        they stay, in another type; ``axes``: under other axes; ``place``: at other
        places; ``pad``: with others around them; ``pick``: some of one operand or all
        of several; ``place by data``: at places that another operand names; ``order``:
        in another order along an axis; ``select``: of one operand or another, by a
        mask; ``maximum``, ``minimum``: the extremes over axes or a window; ``running
        extreme``: so far along an axis; ``shift``: a sum or difference; ``factor``: a
        product or quotient, elementwise; ``negate``: of the other sign; ``bound``:
        clipped; ``comparison``: truth values; ``function``: any other, elementwise;
        ``sum``: over axes or a window; ``running sum``: so far along an axis;
        ``reduction``: any other over axes; ``product``: sums of products; ``number``:
        of its own; ``index``: places of extremes; ``point``: rounded to a grid;
        ``loop``: what its steps make of them; ``call``: what a function does.
      is_elementwise: Whether each number of the output depends on one number of each
        operand, and `jax.lax` wants equal shapes.
      remedy: What to write in place of a call that no site is inside of.
    """

    name: str
    kind: Kind
    is_elementwise: bool = False
    remedy: str = ""


def _named(kind: Kind, names: str, elementwise: str = "") -> Iterator[Primitive]:
    yield from (Primitive(name, kind) for name in names.split())
    yield from (Primitive(name, kind, True) for name in elementwise.split())


_LOOP = (
    "The number of its steps depends on data: use `jax.lax.fori_loop` with a known "
    "number, and choose with `jnp.where` in each step"
)
_DERIVATIVE = "Call the function without its own derivative"

PRIMITIVES: Mapping[str, Primitive] = {
    p.name: p
    for p in (
        *_named(
            "keep",
            "copy_p optimization_barrier sharding_constraint",
            "copy name stop_gradient",
        ),
        *_named("cast", "", "convert_element_type reduce_precision"),
        *_named("axes", "broadcast_in_dim expand_dims reshape squeeze transpose"),
        *_named("place", "rev slice"),
        *_named("pad", "pad"),
        *_named("pick", "concatenate dynamic_slice gather split"),
        *_named(
            "place by data",
            "dynamic_update_slice scatter scatter-add scatter-max scatter-min",
        ),
        *_named("order", "sort top_k"),
        *_named("select", "", "select_n"),
        *_named("maximum", "reduce_max reduce_window_max"),
        *_named("minimum", "reduce_min reduce_window_min"),
        *_named("running extreme", "cummax cummin"),
        *_named("shift", "add_any", "add sub"),
        *_named("factor", "", "mul div"),
        *_named("negate", "", "neg"),
        *_named("bound", "", "max min clamp"),
        *_named("comparison", "", "eq ge gt le lt ne"),
        *_named(
            "function",
            "",
            "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
            "bitcast_convert_type cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 "
            "expm1 floor integer_pow is_finite lgamma log log1p logistic not or pow "
            "rem round rsqrt shift_left shift_right_arithmetic shift_right_logical "
            "sign sin sinh sqrt square tan tanh xor",
        ),
        *_named("sum", "reduce_sum reduce_window_sum"),
        *_named("running sum", "cumsum"),
        *_named("reduction", "reduce_and reduce_or reduce_prod"),
        *_named("product", "conv_general_dilated dot_general"),
        *_named("number", "iota"),
        *_named("index", "argmax argmin"),
        *_named("point", "qpoint"),
        Primitive("scan", "loop"),
        Primitive("while", "call", remedy=_LOOP),
        Primitive(
            "cond", "call", remedy="Compute both branches and choose with `jnp.where`"
        ),
        Primitive(
            "shard_map",
            "call",
            remedy="Call the function itself, under `jax.jit` with shardings",
        ),
        Primitive("custom_jvp_call", "call", remedy=_DERIVATIVE),
        Primitive("custom_vjp_call", "call", remedy=_DERIVATIVE),
    )
}


def names(*kinds: Kind, is_elementwise: bool | None = None) -> frozenset[str]:
    """Returns the names of primitives.

    Args:
      *kinds: Their kinds; all if there are none.
      is_elementwise: Whether they are elementwise; None for either.
    """
    return frozenset(
        p.name
        for p in PRIMITIVES.values()
        if (not kinds or p.kind in kinds) and is_elementwise in (None, p.is_elementwise)
    )


# One data operand, the first: the output lies on its grid.
SHAPE_MOVES = names("keep", "cast", "axes", "place")
AFFINE = names("shift", "factor", "negate", is_elementwise=True)
BOUNDS = names("bound")
POINTWISE = names(is_elementwise=True)
# XLA computes them in the loops of what reads them.
FUSED = POINTWISE | SHAPE_MOVES | names("pad", "pick", "select")
REMEDIES = {p.name: p.remedy for p in PRIMITIVES.values() if p.remedy}
# Comparisons of `jnp.searchsorted`, in tables that are not written out.
REMEDIES |= dict.fromkeys(
    ("le_to", "lt_to"),
    "Search a table of at most 256 numbers, known or a parameter, with "
    "`jnp.searchsorted(table, x)`",
)
