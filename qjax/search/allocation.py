"""Allocations of bits to sites under a budget, by integer programming."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.table
import rich.text
import scipy.optimize  # type: ignore[import-untyped]  # It has no stubs.
import scipy.sparse  # type: ignore[import-untyped]

from qjax.costs.layers import Layer, Work, with_bits
from qjax.costs.prices import Price, total
from qjax.quantized_model import QuantizedModel
from qjax.schemes.resolution import Choices, resolve
from qjax.schemes.scheme import Scheme
from qjax.schemes.word_bits import bits_by_name
from qjax.search.grids import Axis, grid
from qjax.search.sensitivities import MEASURED, Sensitivities, axis_text, sites_of
from qjax.tables import html_table, show, text_table

MOST = 50_000  # Combinations of bits of one layer.
_LARGEST = 1e4  # Coefficient of a row: tolerances of the solver are absolute.
_CUTS = 100  # Solutions beyond the budget, within the tolerance of the solver.


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The bits that `allocate` chose. ``print`` shows a table.

    Attributes:
      scheme: Scheme with these bits.
      bits: Bits by axis.
      cost: Cost of the scheme.
      budget: The most that it might cost.
      score: Sum of the scores of the bits: of measured ones what the loss grows by.
      loss: Predicted loss, ``start + score``; NaN for scores that are no losses.
    """

    scheme: Scheme
    bits: Mapping[Axis, int]
    cost: float
    budget: float
    score: float
    loss: float

    def table(self) -> rich.table.Table:
        """Returns the table of `rich`: a row for each axis."""
        table = rich.table.Table("axis", "bits", title=self._title())
        for axis, bits in self.bits.items():
            table.add_row(rich.text.Text(axis_text(axis)), str(bits))
        return table

    def _title(self) -> str:
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.6g}"
        return f"cost {self.cost:g} of {self.budget:g}, score {self.score:.6g}{loss}"

    def __rich__(self) -> rich.table.Table:
        return self.table()

    def __str__(self) -> str:
        rows = [(axis_text(axis), bits) for axis, bits in self.bits.items()]
        return f"{self._title()}\n{text_table(('axis', 'bits'), rows)}"

    def _repr_html_(self) -> str:
        rows = [(axis_text(axis), bits) for axis, bits in self.bits.items()]
        return html_table(("axis", "bits"), rows)


def allocate(
    sensitivities: Sensitivities,
    budget: float,
    cost: Price,
    *,
    qmodel: QuantizedModel | None = None,
    groups: Iterable[Sequence[Axis]] = (),
) -> Allocation:
    """Chooses the bits of all axes with the least sum of scores under a budget.

        minimise    sum over axes of score[axis, bits[axis]]
        subject to  sum over layers of cost(layer) <= budget

    By integer programming, to the optimum. A layer whose cost is a product of the bits
    of several axes, such as the bit operations of a weight and its input, has a
    variable for each of their combinations.

    Args:
      sensitivities: Scores of the bits that there are to choose from. Those that are
        not finite are not chosen.
      budget: The most that the scheme may cost, in the unit of ``cost``.
      cost: Price of one layer, of `qjax.costs` or one's own: `weight_bytes`,
        `bit_operations`, `effective_bit_operations`, `energy`, ...
      qmodel: Model whose layers are priced; by default the one that the sensitivities
        are of.
      groups: Axes that must agree, in each group.

    Returns:
      The scheme, its cost, and its predicted loss.

    Raises:
      TypeError: for arguments of another type, and the price of a whole table, such as
        `peak_bytes`.
      ValueError: for a budget that no scheme meets, with the least cost; groups of axes
        that are not there or have no bits in common; a price that is not finite.
      NotImplementedError: for a layer that reads so many axes that its cost has more
        than 50,000 combinations.

    References:
      Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets",
      2021, section 3.3 (arXiv:2006.10518). Yao et al., "HAWQ-V3: Dyadic Neural Network
      Quantization", 2021, section 3.3 (arXiv:2011.10680).
    """
    model = _model(sensitivities, qmodel)
    limit = _budget(budget)
    blocks = _blocks(sensitivities, [*map(tuple, groups)])
    options = _options(sensitivities, blocks)
    program = _Program(blocks, options, _table(model, sensitivities, options, cost))
    cuts: list[tuple[int, ...]] = []
    while (chosen := program.solve(limit, cuts)) is not None:
        bits = program.bits(chosen)
        scheme = grid(model, {axis: [b] for axis, b in bits.items()})[0]
        price = _price_of(model, scheme, cost, program.cost(chosen))
        if price <= limit:
            score = math.fsum(options[axis][b] for axis, b in bits.items())
            is_loss = sensitivities.method == MEASURED
            loss = sensitivities.start + score if is_loss else math.nan
            return Allocation(scheme, bits, price, limit, score, loss)
        cuts.append(chosen)  # Within the tolerance of the solver alone.
        if len(cuts) > _CUTS:
            break
    least = program.solve(None, [])
    assert least is not None
    raise ValueError(
        f"No scheme costs at most {limit:g}: the least cost of these bits is "
        f"{program.cost(least):.10g}. Raise `budget`, or give the axes fewer bits to "
        "choose from."
    )


class _Term(NamedTuple):
    """A term of the cost, a function of the bits of some axes."""

    axes: tuple[int, ...]
    costs: np.ndarray  # An axis for each, of the size of its options.


class _CostTable(NamedTuple):
    """The cost as a sum of terms."""

    constant: float
    parts: list[_Term]


# Axis -> bits -> score.
_Options = dict[Axis, dict[int, float]]


class _Program:
    """The integer program: a variable for each bits of a block, one is 1."""

    def __init__(
        self, blocks: Sequence[Sequence[int]], options: _Options, table: _CostTable
    ):
        self.options, self.table = options, table
        self.block = {axis: k for k, own in enumerate(blocks) for axis in own}
        own = [*options.values()]
        self.sizes = [len(own[axes[0]]) for axes in blocks]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int)
        self.joint = [part for part in table.parts if len(part.axes) > 1]
        counts = [self.starts[-1], *(part.costs.size for part in self.joint)]
        self.ends = np.cumsum(counts)
        self.scores, self.costs = np.zeros(self.ends[-1]), np.zeros(self.ends[-1])
        for axis, scores in enumerate(own):
            self.scores[self._of(axis)] += [*scores.values()]
        for part in table.parts:
            if len(part.axes) == 1:
                self.costs[self._of(part.axes[0])] += part.costs
        for k, part in enumerate(self.joint):
            self.costs[self.ends[k] : self.ends[k + 1]] = part.costs.ravel()

    def solve(
        self, limit: float | None, cuts: Sequence[tuple[int, ...]]
    ) -> tuple[int, ...] | None:
        """Returns the place of the bits of each block, of the least score.

        Args:
          limit: The most that they may cost; None for those of the least cost.
          cuts: Places that are no solution.

        Returns:
          None if there is none.
        """
        size, count = self.ends[-1], self.starts[-1]
        aim = self.costs if limit is None else self.scores
        constraints = [self._choose_one(), *self._agree()]
        if limit is not None and math.isfinite(limit):
            scale = _scale(self.costs)
            row = scipy.sparse.csr_array(self.costs[None] * scale)
            most = (limit - self.table.constant) * scale
            constraints.append(scipy.optimize.LinearConstraint(row, -np.inf, most))
        for cut in cuts:
            row = np.zeros((1, size))
            row[0, self.starts[:-1] + np.asarray(cut)] = 1
            most = len(cut) - 1
            constraints.append(scipy.optimize.LinearConstraint(row, -np.inf, most))
        found = scipy.optimize.milp(
            aim * _scale(aim),
            integrality=np.arange(size) < count,
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None and found.status == 2:
            return None
        if found.x is None or found.status:
            raise RuntimeError(f"The integer program was not solved: {found.message}")
        return tuple(
            int(np.argmax(found.x[start : start + n]))
            for start, n in zip(self.starts, self.sizes, strict=False)
        )

    def bits(self, chosen: Sequence[int]) -> dict[Axis, int]:
        """Returns the bits of each axis."""
        return {
            axis: [*own][chosen[self.block[k]]]
            for k, (axis, own) in enumerate(self.options.items())
        }

    def cost(self, chosen: Sequence[int]) -> float:
        """Returns the cost of the bits of each block."""
        at = lambda part: part.costs[tuple(chosen[self.block[a]] for a in part.axes)]
        return self.table.constant + math.fsum(map(at, self.table.parts))

    def _of(self, axis: int) -> slice:
        """Returns the variables of an axis."""
        start = self.starts[self.block[axis]]
        return slice(start, start + self.sizes[self.block[axis]])

    def _choose_one(self) -> scipy.optimize.LinearConstraint:
        rows = np.repeat(np.arange(len(self.sizes)), self.sizes)
        columns = np.arange(self.starts[-1])
        shape = len(self.sizes), self.ends[-1]
        ones = np.ones(len(rows))
        matrix = scipy.sparse.csr_array((ones, (rows, columns)), shape=shape)
        return scipy.optimize.LinearConstraint(matrix, 1, 1)

    def _agree(self) -> list[scipy.optimize.LinearConstraint]:
        """Returns the rows that make combinations follow the bits of their axes.

        sum over combinations with the bits = variable of the bits: a product of them.
        """
        found = []
        for k, part in enumerate(self.joint):
            places = np.indices(part.costs.shape).reshape(len(part.axes), -1)
            columns = self.ends[k] + np.arange(part.costs.size)
            for axis, rows in zip(part.axes, places, strict=True):
                own = self._of(axis)
                n = own.stop - own.start
                ones = np.ones(part.costs.size), (rows, columns)
                less = -np.ones(n), (np.arange(n), np.arange(own.start, own.stop))
                shape = n, self.ends[-1]
                matrix = sum(
                    scipy.sparse.csr_array(x, shape=shape) for x in (ones, less)
                )
                found.append(scipy.optimize.LinearConstraint(matrix, 0, 0))
        return found


def _scale(row: np.ndarray) -> float:
    """Returns the factor that makes the largest number of a row `_LARGEST`."""
    most = float(np.max(np.abs(row), initial=0.0))
    return _LARGEST / most if most > 0 else 1.0


def _model(found: Any, qmodel: Any) -> QuantizedModel:
    """Returns the model that is priced."""
    if not isinstance(found, Sensitivities):
        raise TypeError(
            "`sensitivities` must be what `sensitivity` returns, got "
            f"{type(found).__name__}."
        )
    model = found.base if qmodel is None else qmodel
    if not isinstance(model, QuantizedModel):
        hint = "Pass `qmodel=`: " if qmodel is None else ""
        raise TypeError(
            f"{hint}the layers of a `QuantizedModel` are priced, got {show(model)}."
        )
    return model


def _budget(budget: Any) -> float:
    is_number = isinstance(budget, numbers.Real) or getattr(budget, "shape", 0) == ()
    if not is_number or isinstance(budget, bool):
        raise TypeError(f"`budget` must be a number, got {show(budget)}.")
    if math.isnan(float(budget)):
        raise ValueError("`budget` must be a number, got NaN.")
    return float(budget)


def _blocks(
    found: Sensitivities, groups: Sequence[tuple[Axis, ...]]
) -> list[list[int]]:
    """Returns the places of axes that agree, each axis in one block."""
    root = [*range(len(found.axes))]
    for group in groups:
        for axis in group:
            found[axis]  # Raises for another one.
        first, *others = (root[found.axes.index(axis)] for axis in group)
        root = [first if own in others else own for own in root]
    return [[k for k, own in enumerate(root) if own == r] for r in dict.fromkeys(root)]


def _options(found: Sensitivities, blocks: Sequence[Sequence[int]]) -> _Options:
    """Returns the scores of the bits that each axis may have, in one order a block."""
    finite = [
        {b: score for b, score in found[axis].items() if math.isfinite(score)}
        for axis in found.axes
    ]
    options = [*finite]
    for block in blocks:
        common = [b for b in finite[block[0]] if all(b in finite[k] for k in block)]
        if not common:
            names = "; ".join(axis_text(found.axes[k]) for k in block)
            each = [[*found[found.axes[k]]] for k in block]
            raise ValueError(
                f"There are no bits to choose for {names}: of {each} none is in all "
                "and has a finite score."
            )
        for k in block:
            options[k] = {b: finite[k][b] for b in common}
    return dict(zip(found.axes, options, strict=True))


def _table(
    model: QuantizedModel, found: Sensitivities, options: _Options, cost: Price
) -> _CostTable:
    """Returns the cost of a model as a sum of functions of the bits of few axes."""
    if not callable(cost):
        raise TypeError(
            "`cost` must be a price of a layer, such as `qjax.costs.weight_bytes`, got "
            f"{show(cost)}."
        )
    sites = sites_of(model, {axis: [*own] for axis, own in options.items()})
    first = grid(model, {axis: [*own][:1] for axis, own in options.items()})[0]
    choices = resolve(first, model.sites, model.biases)
    examples = model.layers(first).examples
    parts: dict[tuple[int, ...], np.ndarray] = {}
    constant = 0.0
    for work in model.works:
        names = {work.name, work.weight, work.bias}
        names |= {name for operand in work.inputs for name in operand.sites}
        axes = [k for k, own in enumerate(sites) if names & {*own}]
        levels = [[*[*options.values()][k]] for k in axes]
        shape = tuple(map(len, levels))
        if math.prod(shape) > MOST:
            texts = "; ".join(axis_text(found.axes[k]) for k in axes)
            raise NotImplementedError(
                f"The cost of the layer {work.name!r} depends on {len(axes)} axes "
                f"({texts}), with {math.prod(shape):,} combinations of bits, more than "
                f"{MOST:,}. Make groups of them: one axis of several sites."
            )
        costs = np.empty(shape)
        for place in np.ndindex(*shape):
            bits = {
                name: own[k]
                for axis, own, k in zip(axes, levels, place, strict=True)
                for name in sites[axis]
                if name in names
            }
            costs[place] = _price(cost, _layer(work, examples, choices, bits))
        base, own_parts = _separate(costs)
        constant += base
        for dims, part in own_parts:
            key = tuple(axes[d] for d in dims)
            parts[key] = parts.get(key, 0.0) + part
    return _CostTable(constant, [_Term(*pair) for pair in parts.items()])


def _layer(
    work: Work, examples: int, choices: Choices, bits: Mapping[str, int]
) -> Layer:
    """Returns one layer with bits in place of those of its words."""
    (layer,) = with_bits([work], examples, bits_by_name(choices, {}, bits))
    return layer


def _price(cost: Price, layer: Layer) -> float:
    """Returns the price of a layer; raises for what is none."""
    wanted = (
        f"`cost` must be a function of one layer that returns a number, whose sum over "
        f"all layers counts; {show(cost)}"
    )
    try:
        value = cost(layer)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{wanted} takes no layer: {error}. A price of the whole table, such as "
            "`peak_bytes`, is no such sum."
        ) from error
    try:
        price = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{wanted} returned {show(value)}.") from error
    if not math.isfinite(price):
        raise ValueError(
            f"`cost` gives {price} for the layer {layer.name!r}: its price must be "
            "finite."
        )
    return price


def _separate(
    costs: np.ndarray,
) -> tuple[float, list[tuple[tuple[int, ...], np.ndarray]]]:
    """Writes a table as a constant and a sum of functions of some of its axes.

    Two axes belong together if their mixed difference is not 0 everywhere.

    Returns:
      The constant, and axes with the function of each term.
    """
    rank = costs.ndim
    together = [{d} for d in range(rank)]
    noise = 1e-13 * float(np.max(np.abs(costs), initial=0.0))
    less = lambda x, d: x - np.take(x, [0], axis=d)
    for a, b in itertools.combinations(range(rank), 2):
        if np.any(np.abs(less(less(costs, a), b)) > noise):
            both = together[a] | together[b]
            for d in both:
                together[d] = both
    start = float(costs[(0,) * rank])
    found = []
    for dims in dict.fromkeys(tuple(sorted(own)) for own in together):
        at = tuple(slice(None) if d in dims else 0 for d in range(rank))
        part = costs[at] - start
        if np.any(part):
            found.append((dims, part))
    return start, found


def _price_of(
    model: QuantizedModel, scheme: Scheme, cost: Price, wanted: float
) -> float:
    """Returns the cost of a scheme; raises unless the program computed it, too."""
    price = float(total(model.layers(scheme), cost))
    if not math.isclose(price, wanted, rel_tol=1e-9, abs_tol=1e-9):
        raise ValueError(
            f"`cost` is no function of one layer's bits alone: {show(cost)} gave "
            f"{wanted:.10g} for {scheme}, and then {price:.10g}."
        )
    return price
