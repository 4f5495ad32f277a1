"""The lineage of values in a traced model: their makers, readers and parameters."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from qjax.model.blocks import constant_of, data_of, is_quantizer
from qjax.model.primitives import SHAPE_MOVES, names
from qjax.model.trace import Equation, Trace, makers_and_readers

_GRID_KEEPING = SHAPE_MOVES | names("maximum", "minimum", "running extreme")
_PRODUCTS = names("product")
_GRID_KEEPING |= names("order") | {"split"}


class Lineage:
    """A traced model with the makers and readers of its values.

    Args:
      model: Trace of ``fn(params, *inputs)``.
      names: Names of the parameters, which are the first inputs of the trace.

    Attributes:
      names: Parameter -> its name.
      inputs: Values of the model's inputs.
      data: Values that depend on inputs.
      source: Value -> the equation that makes it.
      users: Value -> the equations that read it.
      order: Value -> number of the equation that makes it.
    """

    def __init__(self, model: Trace, names: Sequence[str]):
        self.model = model
        self.names = dict(zip(model.inputs[: len(names)], names, strict=True))
        self.inputs = model.inputs[len(names) :]
        self.data = data_of(model, self.inputs)
        self.source, self.users = makers_and_readers(model)
        numbered = enumerate(model.equations)
        self.order = {v: i for i, e in numbered for v in e.outputs}

    def is_zero(self, v: int) -> bool:
        """Returns whether a value is a constant of zeros."""
        value = constant_of(self.model, v, self.source)
        return value is not None and bool(np.all(value == 0))

    def quantizer_before(self, v: int) -> Equation | None:
        """Returns the quantizer of the user that a weight comes from, through moves."""
        e = self.source.get(v)
        while e is not None and e.primitive.name in SHAPE_MOVES:
            e = self.source.get(e.inputs[0])
        return e if e is not None and is_quantizer(e) else None

    def size(self, v: int) -> int:
        """Returns how many numbers a value has."""
        return math.prod(self.model.shape(v))

    def leaf(self, v: int, through: frozenset[str] | None) -> int | None:
        """Returns the parameter that ``v`` is made of, by ``through`` or anything."""
        if v in self.names:
            return v
        e = self.source.get(v)
        if e is None or (through is not None and e.primitive.name not in through):
            return None
        leaves = (self.leaf(u, through) for u in e.inputs)
        return next((leaf for leaf in leaves if leaf is not None), None)

    def leaves_of(self, e: Equation) -> list[str]:
        """Returns the parameters of an equation that quantizes nothing itself."""
        known = (v for v in e.inputs if v not in self.data)
        leaves = (self.leaf(v, through=None) for v in known)
        return [self.names[leaf] for leaf in leaves if leaf is not None]

    def leaf_name(self, v: int) -> str:
        """Returns the name of the parameter that a known value is made of, or ""."""
        leaf = self.leaf(v, SHAPE_MOVES)
        return self.name_of([v]) if leaf is None else self.names[leaf]

    def name_of(self, values: Iterable[int]) -> str:
        """Returns the name of a parameter that goes into one of ``values``."""
        known = (v for v in values if v not in self.data)
        leaves = (self.leaf(v, through=None) for v in known)
        return next((self.names[leaf] for leaf in leaves if leaf is not None), "")

    def is_embedding(self, e: Equation) -> bool:
        """Returns whether data chooses parts of what is known: rows, a slice."""
        table, *places = e.inputs
        is_lookup = e.primitive.name in ("gather", "dynamic_slice")
        is_chosen = not self.data.isdisjoint(places)
        is_real = self.model.is_real(table)
        return is_lookup and is_chosen and is_real and table not in self.data

    def is_cast(self, e: Equation) -> bool:
        """Returns whether an equation casts real values to another real type."""
        is_cast = e.primitive.name == "convert_element_type"
        return is_cast and all(map(self.model.is_real, (*e.inputs, *e.outputs)))

    def is_divisor(self, e: Equation, x: int) -> bool:
        """Returns whether an equation divides by a value."""
        return e.primitive.name == "div" and e.inputs[1] == x

    def is_rescaling(self, e: Equation, x: int) -> bool:
        """Returns whether an affine equation has one known number for all values."""
        known = (constant_of(self.model, v, self.source) for v in e.inputs if v != x)
        return all(c is not None and c.size == 1 for c in known)

    def checked_for_nan(self, e: Equation) -> int | None:
        """Returns what a check for NaN passes on; None for other equations."""
        if e.primitive.name != "select_n":
            return None
        data = [v for v in e.inputs[1:] if v in self.data]
        others = [v for v in e.inputs[1:] if v not in self.data]
        known = [constant_of(self.model, v, self.source) for v in others]
        is_nan = [x is not None and bool(np.all(np.isnan(x))) for x in known]
        return data[0] if len(data) == 1 and others and all(is_nan) else None

    def keeps_grid(self, e: Equation) -> bool:
        """Returns whether all outputs are values of the input, or zero."""
        name = e.primitive.name
        if name == "pad":
            return self.is_zero(e.inputs[1])
        if name in ("gather", "dynamic_slice"):
            return not self.data.intersection(e.inputs[1:])
        return name in _GRID_KEEPING


def has_product(jaxpr: Any) -> bool:
    """Returns whether a jaxpr contains a product at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        eqn.primitive.name in _PRODUCTS
        or any(map(has_product, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
