"""Allocations of bits to sites under a budget, by integer programming."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.table
import rich.text

from qjax.costs.layers import Layer, Work, with_bits
from qjax.costs.prices import Price, total
from qjax.quantized_model import QuantizedModel
from qjax.schemes.resolution import Choices, resolve
from qjax.schemes.scheme import Scheme
from qjax.schemes.word_bits import bits_by_name
from qjax.search.grids import Axis, grid
from qjax.search.integer_programs import (
    BitProgram,
    CostTable,
    Options,
    Term,
    best_within,
)
from qjax.search.sensitivities import MEASURED, Sensitivities, axis_text, sites_of
from qjax.tables import html_table, show, text_table

MOST = 50_000  # Combinations of bits of one layer.


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The bits that `allocate` chose. ``print`` shows a table.

    Attributes:
      scheme: Scheme with these bits.
      bits: Bits by axis.
      cost: Cost of the scheme.
      budget: The most that it might cost.
      score: Sum of the scores of the bits: of measured ones what the loss grows by.
      loss: Predicted loss, ``start + score``; NaN for scores that are no losses; of
        `refine` the measured one.
      evaluations: Kind of an evaluation -> number of them that `refine` spent.
    """

    scheme: Scheme
    bits: Mapping[Axis, int]
    cost: float
    budget: float
    score: float
    loss: float
    evaluations: Mapping[str, int] = dataclasses.field(default_factory=dict)

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

    By integer programming, to the optimum; of equal sums of scores the one that costs
    least. A layer whose cost is a product of the bits of several axes, such as the bit
    operations of a weight and its input, has a variable for each of their combinations.

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
    blocks = make_blocks(sensitivities, [*map(tuple, groups)])
    options = make_options(sensitivities, blocks)
    program = BitProgram(blocks, options, _table(model, sensitivities, options, cost))
    scheme_of = lambda chosen: grid(
        model, {axis: [b] for axis, b in program.bits(chosen).items()}
    )[0]
    price_of = lambda chosen: _price_of(
        model, scheme_of(chosen), cost, program.cost(chosen)
    )
    chosen = best_within(program, limit, price_of)
    if chosen is None:
        least = program.solve(program.costs)
        assert least is not None
        raise ValueError(
            f"No scheme costs at most {limit:g}: the least cost of these bits is "
            f"{program.cost(least):.10g}. Raise `budget`, or give the axes fewer bits "
            "to choose from."
        )
    bits, score = program.bits(chosen), program.score(chosen)
    scheme, price = scheme_of(chosen), price_of(chosen)
    is_loss = sensitivities.method == MEASURED
    loss = sensitivities.start + score if is_loss else math.nan
    return Allocation(scheme, bits, price, limit, score, loss)


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


def make_blocks(
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


def make_options(found: Sensitivities, blocks: Sequence[Sequence[int]]) -> Options:
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
    model: QuantizedModel, found: Sensitivities, options: Options, cost: Price
) -> CostTable:
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
    return CostTable(constant, [Term(*pair) for pair in parts.items()])


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
