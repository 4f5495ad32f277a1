"""Finds the sites of a traced model: its inputs, its weights, the ends of its blocks.

A block starts at an equation that leaves the grid of its operands (a product with a
weight, a sum of two activations, an average, a nonlinear function) and goes on through
what a requantizer absorbs: bias, BatchNorm, activation. Its end is one site.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from qjax.model.elementwise import find_functions
from qjax.model.normalisations import NORM
from qjax.model.origin import origin_of
from qjax.model.primitives import AFFINE, BOUNDS, REMEDIES, SHAPE_MOVES, names
from qjax.model.statistics import batch_statistics
from qjax.model.trace import (
    MOST_STEPS,
    Equation,
    Trace,
    is_key,
    quantizer_of,
    trace,
    whole_of,
)
from qjax.qpoint import qpoint_p
from qjax.schemes.patterns import Role, Site

_MAXIMA, _MINIMA = names("maximum"), names("minimum")
_GRID_KEEPING = SHAPE_MOVES | _MAXIMA | _MINIMA | names("running extreme") | {"split"}
_SCALING = names("factor")
_PRODUCTS = names("product")
_SUMS = {"reduce_sum": "sum", "reduce_window_sum": "sum_pool"}
MEANS = {"sum": "mean", "sum_pool": "avg_pool"}  # The same, divided by a constant.
_TWO_OPERANDS = {"add": "residual", "add_any": "residual", "sub": "residual"}
_MOST_FILL = 1e6  # A constant from here on is a mask.
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
    """

    sites: tuple[Site, ...]
    activations: dict[int, int]
    weights: dict[int, int]
    blocks: tuple[Block, ...]
    inner: tuple[Block, ...]
    fused: dict[int, Block]
    on_grid: frozenset[int]
    biases: dict[int, Site] = dataclasses.field(default_factory=dict)


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


def find_blocks(model: Trace, names: Sequence[str], split: Sequence[str] = ()) -> Plan:
    """Finds the sites of a model.

    Args:
      model: Trace of ``fn(params, *inputs)``, derivative calls kept whole.
      names: Names of the parameters, which are the first inputs of the trace.
      split: Functions that end at a site also where more follows: `Constraints`.

    Returns:
      The plan. Its sites have the same names in training and in inference.
    """
    finder = _Finder(model, names, split)
    for equation in model.equations:
        finder.visit(equation)
    return finder.plan()


class _Finder:
    """A walk over the equations, which then names the sites that it found."""

    def __init__(self, model: Trace, names: Sequence[str], split: Sequence[str]):
        self.model = model
        self.names = dict(zip(model.inputs[: len(names)], names, strict=True))
        self.inputs = model.inputs[len(names) :]
        self.data = data_of(model, self.inputs)
        self.source: dict[int, Equation] = {}
        self.users: dict[int, list[Equation]] = collections.defaultdict(list)
        self.order: dict[int, int] = {}
        for i, e in enumerate(model.equations):
            self.source.update((v, e) for v in e.outputs)
            self.order.update((v, i) for v in e.outputs)
            for v in dict.fromkeys(e.inputs):
                self.users[v].append(e)
        self.statistics = batch_statistics(model, self.data)
        self._servants = self._find_servants()
        self.blocks: list[Block] = []
        self.open: dict[int, Block] = {}  # End so far -> a block that may go on.
        self.input_sites: dict[int, str] = {}
        self.weights: dict[int, str] = {}
        self.on_grid: set[int] = set()
        self.pooled: dict[int, int] = {}  # A maximum -> the end of a block it is of.
        self.functions, self.bent, self.masks = find_functions(
            model, self.data, self._is_apart, split
        )
        for k, v in enumerate(self.inputs):
            if model.is_real(v) and self.users[v] and v not in self.masks:
                self._add_input(v, k)

    # The walk.

    def visit(self, e: Equation) -> None:
        """Starts a block at an equation, extends one, or leaves it alone."""
        name, out = e.primitive.name, e.outputs[0]
        x = [v for v in e.inputs if v in self.data and v not in self.statistics]
        if not x or self._serves_statistics(out):
            return
        if whole_of(e):
            self._whole(e, whole_of(e))
            return
        self._check_call(e)
        if out in self.masks:
            return
        self._check_fill(e)
        if self._is_dropout(e):
            return
        if not any(map(self.model.shape, e.outputs)):
            return  # A number, such as a loss, is no activation.
        if out in self.bent and not self._absorbs(e, x):
            if out in self.functions and self.model.is_real(out):
                self._start(Block(self.functions[out], e, out, is_function=True))
        elif name == "convert_element_type" and not self.model.is_real(x[0]):
            self._cast(e, x[0])
        elif name in _PRODUCTS or self._is_embedding(e):
            self._product(e)
        elif not any(map(self.model.is_real, e.outputs)):
            return  # Places, masks: they have no scale.
        elif name in AFFINE and len(x) == 1 and not self._is_divisor(e, x[0]):
            self._affine(e, x[0])
        elif len(x) == 1 and (bounds := bounds_of(self.model, e)) is not None:
            self._bound(e, bounds, x[0])
        elif self._keeps_axes(e, x[0]):
            block = self.open[x[0]]
            block.moves.append(e)
            self._extend(block, e)
        elif self._is_cast(e) and x[0] in self.open and self._is_only(e, x[0]):
            self._cast_block(self.open[x[0]], e)
        elif self._keeps_grid(e):
            if x[0] in self.on_grid or x[0] in self.open:
                self.on_grid.update(e.outputs)
            source = self.pooled.get(x[0], x[0])
            if name in _MAXIMA and source in self.open and self._is_only(e, x[0]):
                self.pooled[out] = source
        elif is_quantizer(e):
            self._own_quantizer(e, x[0])
            self.on_grid.update(e.outputs)
        else:
            kind = _SUMS.get(name) or (_TWO_OPERANDS.get(name) if len(x) == 2 else None)
            called = e.params.get("name")
            for v in filter(self.model.shape, e.outputs):
                if self.model.is_real(v) and (self.users[v] or v in self.model.outputs):
                    self._start(Block(kind or str(called or name), e, v))

    def _whole(self, e: Equation, kind: str) -> None:
        """Starts a block at a softmax or normalisation, statistics included."""
        name = self._name_of(e.inputs)
        for v in e.outputs:
            if self.model.is_real(v) and self.model.shape(v):
                block = Block(kind, e, v, name=name.rpartition("/")[0] or name)
                block.is_function = kind != NORM
                self._start(block)
        before = self.open.get(self._moved_from(e.inputs[0]))
        if before is not None and before.kind in ("product", "embedding"):
            before.is_inner = self._feeds_norms(before.value)

    def _moved_from(self, x: int) -> int:
        """Returns the value that shape moves made a value of."""
        while x not in self.open and (e := self.source.get(x)) is not None:
            if e.primitive.name not in SHAPE_MOVES:
                break
            x = e.inputs[0]
        return x

    def _feeds_norms(self, v: int) -> bool:
        """Returns whether normalisations alone read a value, after shape moves."""
        if v in self.model.outputs or not self.users[v]:
            return False
        for e in self.users[v]:
            if e.primitive.name in SHAPE_MOVES and not self._is_dropout(e):
                if not self._feeds_norms(e.outputs[0]):
                    return False
            elif whole_of(e) != NORM or e.inputs.index(v) or v in e.inputs[1:]:
                return False
        return True

    def _own_quantizer(self, e: Equation, x: int) -> None:
        """Ends a block at a quantizer of the user, without a site of the scheme."""
        while x not in self.open and x not in self.input_sites:
            source = self.source.get(x)
            if source is None or not self._keeps_grid(source):
                return
            if not self._is_only(e, x):
                return
            e, x = source, source.inputs[0]
        if x in self.open:
            self.open.pop(x).has_quantizer = True
        elif all(is_quantizer(u) or u is e for u in self.users[x]):
            self.input_sites.pop(x)
            self.on_grid.discard(x)

    def _check_call(self, e: Equation) -> None:
        """Raises for a call that holds a part of the model, where no site can be."""
        name, jaxprs = e.primitive.name, [*jex.jaxprs_in_params(e.params)]
        if not jaxprs or is_quantizer(e):
            return
        inside = list(dict.fromkeys(self._leaves_of(e)))
        # A function with a parameter is a function; a loop with one is a layer.
        is_layer = name in ("scan", "while", "cond", "shard_map") and inside
        if not is_layer and not any(map(_has_product, jaxprs)):
            return
        found = ", ".join(filter(None, inside)) or "a parameter"
        what = f"holds {found}" if inside else "holds a product"
        remedy = REMEDIES.get(name, "Call what is inside directly")
        # Quantized inside, these are what `lower` can enter.
        is_entered = name.startswith("custom") or (
            name == "scan" and e.params["length"] <= MOST_STEPS
        )
        library = origin_of(e.source).library
        if library and name in ("scan", "while"):
            remedy = f"Replace {library!r} by a Python loop over its cell"
        is_own = is_entered and not library
        own = ", or quantize inside with `qjax.fake_quant`" if is_own else ""
        raise NotImplementedError(
            f"`{name}` in {place_of(e)} {what}, and no site is inside of it: this part "
            f"of the model would stay float. {remedy}{own}."
        )

    def _check_fill(self, e: Equation) -> None:
        """Raises for a mask's constant that would determine the range of a site."""
        if e.primitive.name not in ("add", "sub", "select_n", "pad"):
            return
        operands = e.inputs[1:] if e.primitive.name == "select_n" else e.inputs
        for v in operands if self.model.is_real(e.outputs[0]) else ():
            value = constant_of(self.model, v, self.source)
            if value is None or not value.size:
                continue
            most = np.max(np.abs(value.astype(np.float64)))
            if most >= _MOST_FILL:
                raise ValueError(
                    f"`{e.primitive.name}` in {place_of(e)} puts "
                    f"a constant of {most:g} among the values of a site, whose grid "
                    "would hold nothing else. Use a constant within their range, or "
                    "mask right before a softmax."
                )

    def _cast(self, e: Equation, x: int) -> None:
        """Adds the site of an integer input of the model where a cast makes it real."""
        while x in self.source and self._keeps_grid(self.source[x]):
            x = self.source[x].inputs[0]
        if x in self.inputs and self.model.is_real(e.outputs[0]):
            self._add_input(e.outputs[0], self.inputs.index(x))

    def _add_input(self, v: int, k: int) -> None:
        self.input_sites[v] = f"input:{k}"
        self.on_grid.add(v)

    def _product(self, e: Equation) -> None:
        weight = next((v for v in e.inputs[1::-1] if v not in self.data), None)
        kind = "embedding" if e.primitive.name == "gather" else "product"
        block = Block(kind, e, e.outputs[0], weight=weight)
        if weight is not None:
            leaf = self._leaf(weight, SHAPE_MOVES)
            name = self.names[leaf] if leaf is not None else self._name_of([weight])
            if user := self._quantizer_before(weight):
                name = self._name_of(sorted(user.inputs, key=self._size, reverse=True))
            block.name = name.rpartition("/")[0] or name
            block.weight = weight if leaf is None else leaf
            block.weight_operand = e.inputs.index(weight)
            if user is not None:
                block.weight = None  # The weight has its grid.
            else:
                self.weights[block.weight] = name or "weight"
        self._start(block)

    def _affine(self, e: Equation, x: int) -> None:
        block = self.open.get(x)
        own = self._before_casts(x)
        if own in self.input_sites and self._is_only(e, x) and self._is_rescaling(e, x):
            # The site of an input is where its values have got their unit.
            self.on_grid -= {x, own}
            self.input_sites[e.outputs[0]] = self.input_sites.pop(own)
            self.on_grid.add(e.outputs[0])
            return
        if not (block is not None and self._goes_on(block, e, x)):
            block = Block("affine", e, x)
            self._start(block)
        block.has_statistics |= bool(self.statistics.intersection(e.inputs))
        block.affine.append(e)
        self._extend(block, e)

    def _is_cast(self, e: Equation) -> bool:
        """Returns whether an equation casts real values to another real type."""
        is_cast = e.primitive.name == "convert_element_type"
        return is_cast and all(map(self.model.is_real, (*e.inputs, *e.outputs)))

    def _cast_block(self, block: Block, e: Equation) -> None:
        """Extends a block by a cast, as in half precision."""
        is_affine = block.kind in ("product", "affine") or bool(block.affine)
        if is_affine and not block.is_bounded:
            block.affine.append(e)
        self._extend(block, e)

    def _before_casts(self, x: int) -> int:
        """Returns the input that casts alone made a value of; else the value."""
        v = x
        while (e := self.source.get(v)) is not None and self._is_cast(e):
            if not self._is_only(e, e.inputs[0]):
                return x
            v = e.inputs[0]
        return v if v in self.input_sites else x

    def _absorbs(self, e: Equation, x: list[int]) -> bool:
        """Returns whether a function begins with an equation that a block takes in."""
        block = self.open.get(x[0])
        if block is None or len(x) != 1 or not self._is_only(e, x[0]):
            return False
        if e.primitive.name in AFFINE:
            return not self._is_divisor(e, x[0]) and self._goes_on(block, e, x[0])
        if self._is_cast(e):
            return block.kind in ("product", "affine")
        return bounds_of(self.model, e) is not None

    def _goes_on(self, block: Block, e: Equation, x: int) -> bool:
        """Returns whether an affine equation after a block belongs to the block."""
        absorbs = block.kind in ("product", "affine") or (
            block.kind in MEANS and e.primitive.name in _SCALING
        )
        return absorbs and not block.is_bounded and self._is_only(e, x)

    def _bound(self, e: Equation, bounds: list[tuple[str, Any]], x: int) -> None:
        block = self.open.get(self.pooled.get(x, x))
        if block is not None and self._is_only(e, x):
            block.bounds += bounds
            self.on_grid.discard(x)
            self._extend(block, e)
        elif (block is not None or x in self.on_grid) and bounds == [("max", 0.0)]:
            self.on_grid.add(e.outputs[0])  # Every grid holds zero.
        else:
            self._start(Block("clip", e, e.outputs[0], bounds=bounds))

    def _start(self, block: Block) -> None:
        self.blocks.append(block)
        self.open[block.value] = block

    def _extend(self, block: Block, e: Equation) -> None:
        self.open.pop(block.value, None)
        block.value, block.end = e.outputs[0], e
        self.open[block.value] = block

    # Predicates of equations and values.

    def _is_only(self, e: Equation, x: int) -> bool:
        """Returns whether ``e`` alone reads ``x``, batch statistics aside."""
        others = (u for u in self.users[x] if u is not e)
        return x not in self.model.outputs and all(map(self._is_statistic, others))

    def _is_statistic(self, e: Equation) -> bool:
        return all(map(self._serves_statistics, e.outputs))

    def _keeps_axes(self, e: Equation, x: int) -> bool:
        """Returns whether axes of size 1 come back between a sum and its division."""
        block = self.open.get(x)
        if block is None or block.kind not in MEANS or block.affine:
            return False
        users = self.users[e.outputs[0]]
        moves = e.primitive.name in ("broadcast_in_dim", "reshape")
        scales = len(users) == 1 and users[0].primitive.name in _SCALING
        size = math.prod(self.model.shape(e.outputs[0]))
        same = size == math.prod(self.model.shape(x))
        return moves and scales and same and self._is_only(e, x)

    def _is_rescaling(self, e: Equation, x: int) -> bool:
        """Returns whether an affine equation has one known number for all values."""
        known = (constant_of(self.model, v, self.source) for v in e.inputs if v != x)
        return all(c is not None and c.size == 1 for c in known)

    def _keeps_grid(self, e: Equation) -> bool:
        """Returns whether all outputs are values of the input, or zero."""
        name = e.primitive.name
        if name == "pad":
            return self._is_zero(e.inputs[1])
        if name in ("gather", "dynamic_slice"):
            return not self.data.intersection(e.inputs[1:])
        return name in _GRID_KEEPING

    def _is_embedding(self, e: Equation) -> bool:
        """Returns whether an input chooses rows of a parameter."""
        return e.primitive.name == "gather" and e.inputs[0] not in self.data

    def _is_apart(self, e: Equation) -> bool:
        """Returns whether an equation is no part of an elementwise function."""
        is_statistic = bool(self.statistics.intersection(e.inputs))
        return (
            is_statistic
            or is_quantizer(e)
            or self._is_statistic(e)
            or self._is_dropout(e)
        )

    def _is_divisor(self, e: Equation, x: int) -> bool:
        return e.primitive.name == "div" and e.inputs[1] == x

    def _is_zero(self, v: int) -> bool:
        value = constant_of(self.model, v, self.source)
        return value is not None and bool(np.all(value == 0))

    def _is_dropout(self, e: Equation) -> bool:
        """Returns whether an equation scales or selects by a mask without data."""

        def masks(u: Equation) -> bool:
            return u.primitive.name == "select_n" and u.inputs[0] not in self.data

        users = self.users[e.outputs[0]]
        scales = e.primitive.name in _SCALING and len(users) == 1 and masks(users[0])
        return masks(e) or scales

    def _quantizer_before(self, v: int) -> Equation | None:
        """Returns the quantizer of the user that a weight comes from, through moves."""
        e = self.source.get(v)
        while e is not None and e.primitive.name in SHAPE_MOVES:
            e = self.source.get(e.inputs[0])
        return e if e is not None and is_quantizer(e) else None

    def _size(self, v: int) -> int:
        return math.prod(self.model.shape(v))

    def _leaf(self, v: int, through: frozenset[str] | None) -> int | None:
        """Returns the parameter that ``v`` is made of, by ``through`` or anything."""
        if v in self.names:
            return v
        e = self.source.get(v)
        if e is None or (through is not None and e.primitive.name not in through):
            return None
        leaves = (self._leaf(u, through) for u in e.inputs)
        return next((leaf for leaf in leaves if leaf is not None), None)

    def _leaves_of(self, e: Equation) -> list[str]:
        """Returns the parameters of an equation that quantizes nothing itself."""
        known = (v for v in e.inputs if v not in self.data)
        leaves = (self._leaf(v, through=None) for v in known)
        return [self.names[leaf] for leaf in leaves if leaf is not None]

    def _name_of(self, values: Iterable[int]) -> str:
        """Returns the name of a parameter that goes into one of ``values``."""
        known = (v for v in values if v not in self.data)
        leaves = (self._leaf(v, through=None) for v in known)
        return next((self.names[leaf] for leaf in leaves if leaf is not None), "")

    # Statistics of a batch.

    def _find_servants(self) -> set[int]:
        """Returns statistics and values that serve nothing but statistics."""
        found = set(self.statistics)
        for e in reversed(self.model.equations if found else ()):
            for v in e.outputs:
                users = self.users[v]
                inner = bool(users) and v not in self.model.outputs
                if inner and all(found.issuperset(u.outputs) for u in users):
                    found.add(v)
        return found

    def _serves_statistics(self, v: int) -> bool:
        return v in self._servants

    # Names.

    def plan(self) -> Plan:
        """Names the sites in the order of the equations."""
        returned = self._returned()
        sites: list[Site] = []
        taken: collections.Counter[str] = collections.Counter()
        kinds: collections.Counter[str] = collections.Counter()
        activations: dict[int, int] = {}
        weights: dict[int, int] = {}

        def add(name: str, role: Role, v: int) -> int:
            k, taken[name] = taken[name], taken[name] + 1
            unique = f"{name}:{k}" if k else name
            sites.append(Site(unique, role, self.model.shape(v)))
            return len(sites) - 1

        for v, name in self.input_sites.items():
            activations[v] = add(name, "activation", v)
        for block in sorted(self.blocks, key=lambda b: self.order[b.root.outputs[0]]):
            if block.weight is not None and block.weight not in weights:
                name = self.weights[block.weight]
                weights[block.weight] = add(name, "weight", block.weight)
            if block.has_quantizer or self._serves_statistics(block.value):
                continue
            if block.is_inner:
                continue
            name = block.name or self._block_name(block, kinds)
            if block.kind == "affine":
                block.scale_site = add(f"{name}/scale", "weight", self._factor(block))
            end = returned.get(block.value)
            name = f"{name}/output" if end is None else f"output:{end}"
            activations[block.value] = add(name, "activation", block.value)
        blocks = tuple(b for b in self.blocks if b.value in activations)
        inner = tuple(b for b in self.blocks if b.is_inner)
        constant = (b for b in self.blocks if b.affine and not b.has_statistics)
        fused = {b.affine[-1].outputs[0]: b for b in constant}
        on_grid, biases = frozenset(self.on_grid), self._biases(weights)
        return Plan(
            tuple(sites), activations, weights, blocks, inner, fused, on_grid, biases
        )

    def _biases(self, weights: dict[int, int]) -> dict[int, Site]:
        """Returns the parameters that are added to products first."""
        found: dict[int, Site] = {}
        for block in self.blocks:
            first = (
                block.affine[0] if block.kind == "product" and block.affine else None
            )
            if first is None or first.primitive.name != "add":
                continue
            known = (v for v in first.inputs if v not in self.data)
            leaf = next((self._leaf(v, SHAPE_MOVES) for v in known), None)
            if leaf is not None and leaf not in weights:
                name = self.names[leaf]
                layer = name.rpartition("/")[0] or name
                site = Site(name, "bias", self.model.shape(leaf), layer)
                found.setdefault(leaf, site)
        return found

    def _block_name(self, block: Block, kinds: collections.Counter[str]) -> str:
        if block.kind == "affine":
            operands = [v for e in reversed(block.affine) for v in e.inputs]
            if name := self._name_of(operands):
                return name.rpartition("/")[0] or name
        kind = block.kind
        if block.affine:
            kind = MEANS.get(kind, kind)
        k, kinds[kind] = kinds[kind], kinds[kind] + 1
        return f"{kind}_{k}"

    def _factor(self, block: Block) -> int:
        """Returns a constant with the shape of the factor of an affine block."""
        known = [v for e in block.affine for v in e.inputs if v not in self.data]
        return max(known, key=lambda v: len(self.model.shape(v)), default=block.value)

    def _returned(self) -> dict[int, int]:
        """Maps ends of blocks that only the model returns to the output number."""
        ends = {b.value for b in self.blocks}
        found: dict[int, int] = {}
        for v in self.model.outputs:
            uses = 0
            while v not in ends and v in self.source and uses <= 1:
                e = self.source[v]
                if e.primitive.name not in SHAPE_MOVES:
                    break
                v = e.inputs[0]
                uses = sum(not self._is_statistic(u) for u in self.users[v])
            if v in ends and uses <= 1 and not self._serves_statistics(v):
                if uses or not [u for u in self.users[v] if not self._is_statistic(u)]:
                    found.setdefault(v, len(found))
        return found


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


def _has_product(jaxpr: Any) -> bool:
    """Returns whether a jaxpr contains a product at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        eqn.primitive.name in _PRODUCTS
        or any(map(_has_product, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def has_qpoint(e: Equation) -> bool:
    """Returns whether an equation is a quantization point or calls one."""

    def inside(jaxpr: Any) -> bool:
        return any(
            eqn.primitive is qpoint_p
            or any(map(inside, jex.jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )

    return e.primitive is qpoint_p or any(map(inside, jex.jaxprs_in_params(e.params)))
