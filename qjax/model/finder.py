"""Finds the sites of a traced model: its inputs, its weights, the ends of its blocks.

A block starts at an equation that leaves the grid of its operands (a product with a
weight, a sum of two activations, an average, a nonlinear function) and goes on through
what a requantizer absorbs: bias, BatchNorm, activation. Its end is one site.
"""

import collections
import math
from collections.abc import Collection, Sequence
from typing import Any

from qjax.model.blocks import (
    MEANS,
    Block,
    Plan,
    bounds_of,
    is_quantizer,
)
from qjax.model.channels import scaled_axes
from qjax.model.elementwise import find_functions
from qjax.model.kept import whole_of
from qjax.model.lineage import Lineage
from qjax.model.loops import Surroundings, is_loop
from qjax.model.model_checks import check_call, check_fill
from qjax.model.normalisations import NORM
from qjax.model.primitives import AFFINE, SHAPE_MOVES, names
from qjax.model.statistics import batch_statistics
from qjax.model.trace import Equation, Trace
from qjax.model.wholes import whole_numbers
from qjax.schemes.patterns import Role, Site

_MAXIMA = names("maximum")
_SCALING = names("factor")
_PRODUCTS = names("product")
_SUMS = {"reduce_sum": "sum", "reduce_window_sum": "sum_pool"}
_TWO_OPERANDS = {"add": "residual", "add_any": "residual", "sub": "residual"}


def find_blocks(
    model: Trace,
    names: Sequence[str],
    split: Sequence[str] = (),
    exact: Collection[int] = (),
    around: Surroundings | None = None,
) -> Plan:
    """Finds the sites of a model.

    Args:
      model: Trace of ``fn(params, *inputs)``, derivative calls kept whole.
      names: Names of the parameters, which are the first inputs of the trace.
      split: Functions that end at a site also where more follows: `Constraints`.
      exact: Softmaxes and normalisations that integers compute, from codes of a site.
      around: Loop of which the model is the body; None for a whole model.

    Returns:
      The plan. Its sites have the same names in training and in inference.
    """
    finder = _Finder(model, names, split, exact, around)
    for equation in model.equations:
        finder.visit(equation)
    return finder.plan()


class _Finder(Lineage):
    """A walk over the equations, which then names the sites that it found."""

    def __init__(
        self,
        model: Trace,
        names: Sequence[str],
        split: Sequence[str],
        exact: Collection[int],
        around: Surroundings | None = None,
    ):
        super().__init__(model, names)
        self.exact, self.around = exact, around
        self.statistics = batch_statistics(model, self.data)
        count = 0 if around is None else len(around.carried)
        self.carries_number = any(
            model.is_real(v) and not model.shape(v) for v in model.outputs[:count]
        )
        self._servants = self._find_servants()
        self.blocks: list[Block] = []
        self.open: dict[int, Block] = {}  # End so far -> a block that may go on.
        self.input_sites: dict[int, str] = {}
        self.weights: dict[int, str] = {}
        self.wholes = whole_numbers(self)
        self.on_grid: set[int] = set(self.wholes)
        self.pooled: dict[int, int] = {}  # A maximum -> the end of a block it is of.
        self.functions, self.bent, self.masks = find_functions(
            model, self.data, self._is_apart, split
        )
        for k, v in enumerate(self.inputs):
            if model.is_real(v) and self.users[v] and v not in self.masks:
                if around is None:
                    self._add_input(v, k)
                else:  # On the grid that it has outside, or had after the last step.
                    self.on_grid.add(v)

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
        if is_loop(e):
            self.on_grid.update(filter(self.model.is_real, e.outputs))
            return
        check_call(self, e)
        if out in self.masks:
            return
        check_fill(self, e)
        if self._is_dropout(e):
            if e.primitive.name == "select_n" and x[0] in {*self.open, *self.on_grid}:
                self.on_grid.add(out)
            return
        if not any(map(self.model.shape, e.outputs)) and not self.carries_number:
            return  # A number, such as a loss, is no activation.
        if out in self.wholes:
            return  # Its grid is known.
        if out in self.bent and not self._absorbs(e, x):
            if out in self.functions and self.model.is_real(out):
                self._start(Block(self.functions[out], e, out, is_function=True))
        elif name == "convert_element_type" and not self.model.is_real(x[0]):
            self._cast(e, x[0])
        elif name in _PRODUCTS or self.is_embedding(e):
            self._product(e)
        elif not any(map(self.model.is_real, e.outputs)):
            return  # Places, masks: they have no scale.
        elif name in AFFINE and len(x) == 1 and not self.is_divisor(e, x[0]):
            self._affine(e, x[0])
        elif len(x) == 1 and (bounds := bounds_of(self.model, e)) is not None:
            self._bound(e, bounds, x[0])
        elif self._keeps_axes(e, x[0]):
            block = self.open[x[0]]
            block.moves.append(e)
            self._extend(block, e)
        elif self.is_cast(e) and x[0] in self.open and self._is_only(e, x[0]):
            self._cast_block(self.open[x[0]], e)
        elif (kept := self.checked_for_nan(e)) is not None:
            self.on_grid |= {out} if kept in {*self.open, *self.on_grid} else set()
        elif self.keeps_grid(e):
            if x[0] in self.on_grid or x[0] in self.open:
                self.on_grid.update(e.outputs)
            source = self.pooled.get(x[0], x[0])
            is_next = source in self.open and self._is_only(e, x[0])
            if name in _MAXIMA and is_next and self._has_one_scale(source, e):
                self.pooled[out] = source
        elif is_quantizer(e):
            self._own_quantizer(e, x[0])
            self.on_grid.update(e.outputs)
        else:
            kind = _SUMS.get(name) or (_TWO_OPERANDS.get(name) if len(x) == 2 else None)
            called = e.params.get("name")
            for v in e.outputs:
                has_axes = bool(self.model.shape(v)) or self.carries_number
                if (
                    has_axes
                    and self.model.is_real(v)
                    and (self.users[v] or v in self.model.outputs)
                ):
                    self._start(Block(kind or str(called or name), e, v))

    def _whole(self, e: Equation, kind: str) -> None:
        """Starts a block at a softmax or normalisation, statistics included."""
        name = self.name_of(e.inputs)
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
            elif e.outputs[0] in self.exact:
                return False
        return True

    def _own_quantizer(self, e: Equation, x: int) -> None:
        """Ends a block at a quantizer of the user, without a site of the scheme."""
        while x not in self.open and x not in self.input_sites:
            source = self.source.get(x)
            if source is None or not self.keeps_grid(source):
                return
            if not self._is_only(e, x):
                return
            e, x = source, source.inputs[0]
        if x in self.open:
            self.open.pop(x).has_quantizer = True
        elif all(is_quantizer(u) or u is e for u in self.users[x]):
            self.input_sites.pop(x)
            self.on_grid.discard(x)

    def _cast(self, e: Equation, x: int) -> None:
        """Adds the site of an integer input of the model where a cast makes it real."""
        while x in self.source and self.keeps_grid(self.source[x]):
            x = self.source[x].inputs[0]
        if x in self.inputs and self.model.is_real(e.outputs[0]):
            self._add_input(e.outputs[0], self.inputs.index(x))

    def _add_input(self, v: int, k: int) -> None:
        name = f"input:{k}"
        self.input_sites[v] = f"{self.around.name}/{name}" if self.around else name
        self.on_grid.add(v)

    def _product(self, e: Equation) -> None:
        is_lookup = self.is_embedding(e)
        operands = e.inputs[:1] if is_lookup else e.inputs[1::-1]
        weight = next((v for v in operands if v not in self.data), None)
        kind = "embedding" if is_lookup else "product"
        block = Block(kind, e, e.outputs[0], weight=weight)
        if weight is not None:
            leaf = self.leaf(weight, SHAPE_MOVES)
            name = self.names[leaf] if leaf is not None else self.name_of([weight])
            if user := self.quantizer_before(weight):
                name = self.name_of(sorted(user.inputs, key=self.size, reverse=True))
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
        if own in self.input_sites and self._is_only(e, x) and self.is_rescaling(e, x):
            # The site of an input is where its values have got their unit.
            self.on_grid -= {x, own}
            self.input_sites[e.outputs[0]] = self.input_sites.pop(own)
            self.on_grid.add(e.outputs[0])
            return
        if not (block is not None and self._goes_on(block, e, x)):
            block = Block("affine", e, x)
            self.blocks.append(block)  # What ends at ``x`` stays open for others.
        block.has_statistics |= bool(self.statistics.intersection(e.inputs))
        block.affine.append(e)
        self._extend(block, e)

    def _cast_block(self, block: Block, e: Equation) -> None:
        """Extends a block by a cast, as in half precision."""
        is_affine = block.kind in ("product", "affine") or bool(block.affine)
        if is_affine and not block.is_bounded:
            block.affine.append(e)
        self._extend(block, e)

    def _before_casts(self, x: int) -> int:
        """Returns the input that casts alone made a value of; else the value."""
        v = x
        while (e := self.source.get(v)) is not None and self.is_cast(e):
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
            return not self.is_divisor(e, x[0]) and self._goes_on(block, e, x[0])
        if self.is_cast(e):
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
        if self.open.get(block.value) is block:
            self.open.pop(block.value)
        block.value, block.end = e.outputs[0], e
        self.open[block.value] = block

    # Predicates of equations and values.

    def _is_only(self, e: Equation, x: int) -> bool:
        """Returns whether ``e`` alone reads ``x``, batch statistics aside."""
        others = (u for u in self.users[x] if u is not e)
        return x not in self.model.outputs and all(map(self._is_statistic, others))

    def _is_statistic(self, e: Equation) -> bool:
        return all(map(self._serves_statistics, e.outputs))

    def _has_one_scale(self, v: int, e: Equation) -> bool:
        """Returns whether what a maximum compares may wait for the bound behind it."""
        window = e.params.get("window_dimensions")
        axes = e.params.get("axes", [d for d, n in enumerate(window or ()) if n > 1])
        return scaled_axes(self.model, self.data, self.open[v]).isdisjoint(axes)

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

    def _is_apart(self, e: Equation) -> bool:
        """Returns whether an equation is no part of an elementwise function."""
        is_statistic = bool(self.statistics.intersection(e.inputs))
        return (
            is_statistic
            or is_quantizer(e)
            or self._is_statistic(e)
            or self._is_dropout(e)
        )

    def _is_dropout(self, e: Equation) -> bool:
        """Returns whether an equation scales or selects by a mask without data."""

        def masks(u: Equation) -> bool:
            if u.primitive.name != "select_n" or u.inputs[0] in self.data:
                return False
            others = [v for v in u.inputs[1:] if v not in self.data]
            return len(others) == len(u.inputs) - 2 and all(map(self.is_zero, others))

        users = self.users[e.outputs[0]]
        scales = e.primitive.name in _SCALING and len(users) == 1 and masks(users[0])
        return masks(e) or scales

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
        carried = self._carried()
        returned = {} if self.around else self._returned()
        sites: list[Site] = []
        taken = collections.Counter[str]() if not self.around else self.around.taken
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
            name = carried.get(block.value, name)
            activations[block.value] = add(name, "activation", block.value)
        blocks = tuple(b for b in self.blocks if b.value in activations)
        inner = tuple(b for b in self.blocks if b.is_inner)
        constant = (b for b in self.blocks if b.affine and not b.has_statistics)
        fused = {b.affine[-1].outputs[0]: b for b in constant}
        own = frozenset(self.on_grid), self._biases(weights), self.wholes
        return Plan(tuple(sites), activations, weights, blocks, inner, fused, *own)

    def _carried(self) -> dict[int, str]:
        """Names the sites of what goes on to the next step, and makes those missing."""
        found: dict[int, str] = {}
        ends = {b.value for b in self.blocks}
        count = 0 if self.around is None else len(self.around.carried)
        for k, v in enumerate(self.model.outputs[:count]):
            if not self.model.is_real(v):
                continue
            found[v] = f"{self.around.name}/carry:{k}"  # type: ignore[union-attr]
            if v not in ends:
                self.blocks.append(Block("carry", self.source[v], v))
        return found

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
            leaf = next((self.leaf(v, SHAPE_MOVES) for v in known), None)
            if leaf is not None and leaf not in weights:
                name = self.names[leaf]
                layer = name.rpartition("/")[0] or name
                site = Site(name, "bias", self.model.shape(leaf), layer)
                found.setdefault(leaf, site)
        return found

    def _block_name(self, block: Block, kinds: collections.Counter[str]) -> str:
        if block.kind == "affine":
            operands = [v for e in reversed(block.affine) for v in e.inputs]
            if name := self.name_of(operands):
                return name.rpartition("/")[0] or name
        kind = block.kind
        if block.affine:
            kind = MEANS.get(kind, kind)
        k, kinds[kind] = kinds[kind], kinds[kind] + 1
        return f"{self.around.name}/{kind}_{k}" if self.around else f"{kind}_{k}"

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
