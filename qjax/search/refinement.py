"""Refinements of allocations: losses measured again around what was chosen."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.calibration.batches import progress_bar
from qjax.costs.prices import Price, total
from qjax.quantized_model import QuantizedModel
from qjax.schemes.patterns import is_whole
from qjax.schemes.scheme import Scheme, stack_schemes
from qjax.search.allocation import Allocation, allocate, make_blocks, make_options
from qjax.search.execution import ALONE, Configurations, Execution, make_runner
from qjax.search.grids import Axis, grid
from qjax.search.sensitivities import Sensitivities, axis_text, one_number
from qjax.tables import show

Bits = tuple[int, ...]  # Of each axis.
# Share of the predicted gain that an axis costs which moves: fewer than 1 / share do.
_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def refine(
    fn: Callable[..., Any],
    sensitivities: Sensitivities,
    budget: float,
    cost: Price,
    *data: Any,
    starts: Iterable[Mapping[Axis, int]] = (),
    groups: Iterable[Sequence[Axis]] = (),
    qmodel: QuantizedModel | None = None,
    rounds: int = 8,
    execution: Execution = "auto",
    progress: bool | None = None,
) -> Allocation:
    """Allocates bits, and measures the loss again around what was chosen.

    A sum of scores knows nothing of errors that add up, or that drown in others. So
    each round measures the loss with one axis at a time at its next more and next fewer
    bits, all others as they are, and allocates by these scores under the same budget:
    at no price for a step, and at a 16th, an 8th, a quarter and half of the gain that
    was predicted then, so that fewer and fewer axes move. The loss of each of these
    schemes is measured; the best is where the next round starts, until none is better.

    What is measured best on few examples need not be on others: where all that is left
    to gain is small, the number of examples decides.

    Args:
      fn: ``fn(scheme, *data)``, which returns the loss, one number, as in
        `sensitivity`. The divergence from the float model's outputs has less noise than
        a loss of labels.
      sensitivities: Axes, their bits, and scores: their allocation is a start.
      budget: As in `allocate`.
      cost: As in `allocate`.
      *data: Pytrees of arrays.
      starts: Bits by axis of further schemes to start from, such as the same bits
        everywhere, or ``allocate(...).bits`` by other scores. The best one is taken, so
        that the result has no larger loss than any.
      groups: As in `allocate`.
      qmodel: As in `allocate`.
      rounds: Rounds at most; 0 takes the best start.
      execution: Way to run them, as in `sweep`.
      progress: Whether a bar of rounds is shown, as in `sweep`.

    Returns:
      The scheme, with its measured loss and the number of losses that were spent. Its
      ``score`` is the sum of ``sensitivities``.

    Raises:
      TypeError, ValueError: as `allocate` and `sweep`; for a start of other axes or
        bits, apart in a group, or above the budget; for losses that are all NaN.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
      >>> fn = lambda params, x: x @ params["a"] @ params["b"]
      >>> qmodel = qjax.quantize_model(fn, params, jnp.ones((1, 2)))
      >>> of = lambda s, k: jnp.float32(s.rules[k].bits)
      >>> loss = lambda s: (2 * of(s, 0) + of(s, 1) - 11) ** 2 / of(s, 1)
      >>> from qjax import costs
      >>> from qjax.search import sensitivity
      >>> found = sensitivity(loss, qmodel, {"a": [8, 4, 2], "b": [8, 4, 2]})
      >>> best = refine(loss, found, 8, costs.weight_bytes)
      >>> best.bits, best.loss
      ({'a': 2, 'b': 8}, 0.125)
    """
    if not is_whole(rounds) or rounds < 0:
        raise ValueError(f"`rounds` must be a whole number, 0 or more, got {rounds!r}.")
    own_groups = [*map(tuple, groups)]
    chosen = allocate(sensitivities, budget, cost, qmodel=qmodel, groups=own_groups)
    model = sensitivities.base if qmodel is None else qmodel
    assert isinstance(model, QuantizedModel)  # `allocate` has seen to it.
    space = _Space(sensitivities, model, own_groups)
    price = lambda bits: float(total(model.layers(space.scheme(bits)), cost))
    first = [space.start(chosen.bits)]
    for start in starts:
        first.append(space.start(start))
        if (found := price(first[-1])) > chosen.budget:
            raise ValueError(
                f"A start costs {found:.10g}, more than the budget of "
                f"{chosen.budget:.10g}: {space.text(first[-1])}."
            )
    losses = _Losses(fn, space, data, execution)
    best = losses.best(first)
    if best is None:
        raise ValueError(
            f"The loss of no start is finite: {space.text(first[0])} has "
            f"{losses.known[first[0]]}. Start from more bits, or from other ones."
        )
    allocated = lambda own: allocate(own, budget, cost, qmodel=model, groups=own_groups)
    with progress_bar(rounds, progress, "refine", "rounds") as advance:
        for _ in range(rounds):
            losses.measure(moved for _, moved in space.steps(best))
            gain = -allocated(space.around(best, losses.known)).score
            many = (
                allocated(space.around(best, losses.known, share * gain)).bits
                for share in _SHARES
            )
            better = losses.best([best, *map(space.start, many)])
            assert better is not None
            advance()
            if better == best:
                break
            best = better
    bits = dict(zip(sensitivities.axes, best, strict=True))
    return dataclasses.replace(
        chosen,
        scheme=space.scheme(best),
        bits=bits,
        cost=price(best),
        score=math.fsum(sensitivities[axis][b] for axis, b in bits.items()),
        loss=losses.known[best],
        evaluations={"losses": len(losses.known)},
    )


class _Space:
    """The bits that axes may have, in steps of one block of axes that agree."""

    def __init__(
        self,
        found: Sensitivities,
        model: QuantizedModel,
        groups: Sequence[tuple[Axis, ...]],
    ):
        self.found, self.model = found, model
        self.blocks = make_blocks(found, groups)
        options = make_options(found, self.blocks)
        self.levels = [sorted(own) for own in options.values()]

    def scheme(self, bits: Bits) -> Scheme:
        """Returns the scheme of some bits."""
        pairs = zip(self.found.axes, bits, strict=True)
        return grid(self.model, {axis: [b] for axis, b in pairs})[0]

    def text(self, bits: Bits) -> str:
        """Returns the bits as a text."""
        pairs = zip(self.found.axes, bits, strict=True)
        return "; ".join(f"{axis_text(axis)}: {b}" for axis, b in pairs)

    def start(self, bits: Any) -> Bits:
        """Returns the bits of a mapping; raises for what cannot be chosen."""
        axes = self.found.axes
        if not isinstance(bits, Mapping):
            raise TypeError(
                "`starts` must hold mappings of bits by axis, such as "
                f"`allocate(...).bits`, got {show(bits)}."
            )
        if {*bits} != {*axes}:
            raise ValueError(
                "A start must have bits for each of the axes "
                f"{'; '.join(map(axis_text, axes))}; got {'; '.join(map(str, bits))}."
            )
        found = tuple(bits[axis] for axis in axes)
        for axis, b, levels in zip(axes, found, self.levels, strict=True):
            if b not in levels:
                raise ValueError(
                    f"A start has {b} bits for {axis_text(axis)}, where {levels} are "
                    "to choose from."
                )
        for block in self.blocks:
            if len({found[k] for k in block}) > 1:
                names = "; ".join(axis_text(axes[k]) for k in block)
                own = [found[k] for k in block]
                raise ValueError(f"A start has {own} bits for the group {names}.")
        return tuple(map(int, found))

    def steps(self, bits: Bits) -> Iterator[tuple[int, Bits]]:
        """Yields the block and the bits where one block is a step up or down."""
        for k, block in enumerate(self.blocks):
            levels = self.levels[block[0]]
            place = levels.index(bits[block[0]])
            for b in (*levels[:place][-1:], *levels[place + 1 :][:1]):
                moved = (b if j in block else own for j, own in enumerate(bits))
                yield k, tuple(moved)

    def around(
        self, bits: Bits, losses: Mapping[Bits, float], price: float = 0.0
    ) -> Sensitivities:
        """Returns the scores of steps, differences of losses; NaN for all else.

        Args:
          bits: Where the steps start.
          losses: Loss by bits.
          price: Score of each step besides.
        """
        scores = np.full(len(self.found), np.nan)
        row = lambda axis, b: np.flatnonzero(
            (self.found.places == axis) & (self.found.bits == b)
        )
        for axis, b in enumerate(bits):
            scores[row(axis, b)] = 0.0
        for k, moved in self.steps(bits):
            first, *others = self.blocks[k]
            scores[row(first, moved[first])] = losses[moved] - losses[bits] + price
            for axis in others:
                scores[row(axis, moved[axis])] = 0.0
        return dataclasses.replace(self.found, scores=scores)


class _Losses:
    """The losses of bits, each measured once, in one compile."""

    def __init__(
        self, fn: Any, space: _Space, data: tuple[Any, ...], execution: Execution
    ):
        self.space, self.data = space, data
        self.known: dict[Bits, float] = {}
        least = tuple(own[0] for own in space.levels)
        like = [least, *(moved for _, moved in space.steps(least))]
        self.runner = make_runner(
            lambda scheme, *rest: one_number(fn(scheme, *rest)),
            self._configurations(like),
            execution=execution,
        )

    def _configurations(self, many: Iterable[Bits]) -> Configurations:
        schemes = [self.space.scheme(bits) for bits in many]
        stacked = jax.device_get(stack_schemes(schemes))
        return Configurations(stacked, None, self.data)

    def measure(self, many: Iterable[Bits]) -> None:
        """Measures the losses that are not known."""
        todo = [bits for bits in dict.fromkeys(many) if bits not in self.known]
        if not todo:
            return
        own, chunk = self._configurations(todo), self.runner.chunk
        for start in range(0, len(todo), chunk):
            places = range(start, min(start + chunk, len(todo)))
            values = self.runner.run(places, own)[ALONE]
            self.known |= {
                todo[k]: float(x) for k, x in zip(places, values, strict=True)
            }

    def best(self, many: Sequence[Bits]) -> Bits | None:
        """Returns the first of the bits with the least loss; None if none is finite."""
        self.measure(many)
        finite = [bits for bits in many if math.isfinite(self.known[bits])]
        return min(finite, key=self.known.__getitem__, default=None)
