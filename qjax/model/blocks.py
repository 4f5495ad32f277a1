"""Blocks of a traced model, which end at a site, and the plan of all sites."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from qjax.model.kept import quantizer_of
from qjax.model.origin import origin_of
from qjax.model.primitives import BOUNDS, SHAPE_MOVES
from qjax.model.trace import Equation, Trace, has_qpoint, is_key, trace
from qjax.schemes.patterns import Site

MEANS = {"sum": "mean", "sum_pool": "avg_pool"}  # The same, divided by a constant.
RANDOM = ("random_", "threefry", "rng_")


@dataclasses.dataclass
class Block:
    """A run of equations that ends at one site."""

    kind: str
    root: Equation
    value: int  # The end so far.
    name: str = ""
    weight: int | None = None  # A parameter, or what was computed of them.
    weight_operand: int = 1  # Number of the root's operand that is the weight.
    moves: list[Equation] = dataclasses.field(default_factory=list)  # After a sum.
    affine: list[Equation] = dataclasses.field(default_factory=list)
    scale_site: int | None = None  # Site of a lone affine block's factor, a weight.
    has_statistics: bool = False  # Normalised by statistics of the batch itself.
    has_quantizer: bool = False  # The user's own, at its end.
    is_inner: bool = False  # A normalisation reads its accumulators.
    is_function: bool = False  # Elementwise, of one value.
    bounds: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    end: Equation | None = None  # The last one, if it is not the root.

    @property
    def is_bounded(self) -> bool:
        """Returns whether an activation came, after which nothing affine may follow."""
        return bool(self.bounds)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The places of quantizers in one trace. Values are the numbers of the trace.

    Attributes:
      sites: In the order of the equations.
      activations: Value -> index of its site.
      weights: Value -> index of its site. Parameters, or values made of them.
      blocks: All that end at a site.
      inner: Products without one, as a normalisation reads their accumulators.
      fused: Last affine value of a block -> the block, where constants alone scale
        and shift it.
      biases: Parameter -> its site, of those that are added to a product.
      on_grid: Values on the grid of the data that they are made of: inputs, and what
        shape moves, max-pools and relus return.
      wholes: Real values that are whole numbers -> a bound of their magnitude.
    """

    sites: tuple[Site, ...]
    activations: dict[int, int]
    weights: dict[int, int]
    blocks: tuple[Block, ...]
    inner: tuple[Block, ...]
    fused: dict[int, Block]
    on_grid: frozenset[int]
    biases: dict[int, Site] = dataclasses.field(default_factory=dict)
    wholes: Mapping[int, float] = dataclasses.field(default_factory=dict)


def path_name(path: Sequence[Any]) -> str:
    """Returns ``conv1/kernel`` for a key path of a parameter tree.

    Leaves out what Flax adds around it: Linen's collections, NNX's ``value``.
    """
    fields = ("key", "idx", "name")
    keys = [str(next(getattr(k, f) for f in fields if hasattr(k, f))) for k in path]
    if len(keys) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey):
        keys = keys[:-1]
    if len(keys) > 1 and keys[0] in ("params", "batch_stats"):
        keys = keys[1:]
    return "/".join(keys)


def data_of(model: Trace, inputs: Iterable[int]) -> set[int]:
    """Returns the values that depend on ``inputs``, random numbers aside."""
    data = set(inputs)
    for e in model.equations:
        is_random = e.primitive.name.startswith(RANDOM)
        if data.intersection(e.inputs) and not is_random:
            data.update(e.outputs)
    return data


def place_of(e: Equation) -> str:
    """Names the module of an equation for an error, or the line that it is from."""
    found = origin_of(e.source)
    if e.path or not found.place:
        return repr(e.path or "the traced function")
    inside = f", in {found.library!r}" if found.library else ""
    return f"`{found.function}` ({found.place}{inside})"


def bounds_of(model: Trace, e: Equation) -> list[tuple[str, Any]] | None:
    """Returns the bounds of an activation like relu6 (("max", 0.0), ("min", 6.0)).

    A bound that is no constant is None. Returns None for other equations.
    """
    name = e.primitive.name
    if name == "clamp":
        return [("max", constant_of(model, e.inputs[0])), ("min", None)]
    if name in BOUNDS:
        known = (constant_of(model, v) for v in e.inputs)
        return [(name, next((_scalar(c) for c in known if c is not None), None))]
    if name != "custom_jvp_call":
        return None
    call = e.params["call_jaxpr"]
    body, _ = trace(jex.jaxpr_as_fun(call), *call.in_avals, keep_derivatives=True)
    bounds: list[tuple[str, Any]] = []
    for inner in body.equations:
        if inner.primitive.name in ("max", "min"):
            bounds += bounds_of(body, inner) or []
        elif inner.primitive.name not in SHAPE_MOVES:
            return None
    return bounds if all(b is not None for _, b in bounds) else None


def constant_of(
    model: Trace, v: int, source: dict[int, Equation] | None = None
) -> np.ndarray | None:
    """Returns the value of a constant, seen through shape moves; None if it is none."""
    if v in model.constants:
        value = model.constants[v]
        is_number = not isinstance(value, jax.core.Tracer) and not is_key(value)
        return np.asarray(value) if is_number else None
    if source is None:
        source = {o: e for e in model.equations for o in e.outputs}
    e = source.get(v)
    if e is None or e.primitive.name not in SHAPE_MOVES:
        return None
    return constant_of(model, e.inputs[0], source)


def _scalar(value: np.ndarray) -> Any:
    return (
        float(value.flat[0]) if value.size and np.all(value == value.flat[0]) else None
    )


def is_quantizer(e: Equation) -> bool:
    """Returns whether an equation is a quantizer, a `qpoint` or a call of `qpoint`."""
    return bool(quantizer_of(e)) or has_qpoint(e)
