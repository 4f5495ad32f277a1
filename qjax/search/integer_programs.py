"""Integer programs of bits: the least score under a budget, then the least cost."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize  # type: ignore[import-untyped]  # It has no stubs.
import scipy.sparse  # type: ignore[import-untyped]

from qjax.search.grids import Axis

_LARGEST = 1e4  # Coefficient of a row: tolerances of the solver are absolute.
_CUTS = 100  # Solutions that are none, within the tolerance of the solver.
_FAILED = 4  # Status of the solver: neither solved nor infeasible.
_NOISE = 1e-12  # Of a sum of scores.


class Term(NamedTuple):
    """A term of the cost, a function of the bits of some axes."""

    axes: tuple[int, ...]
    costs: np.ndarray  # An axis for each, of the size of its options.


class CostTable(NamedTuple):
    """The cost as a sum of terms."""

    constant: float
    parts: list[Term]


# Axis -> bits -> score.
Options = dict[Axis, dict[int, float]]
Chosen = tuple[int, ...]  # Place of the bits of each block.
Rows = Sequence[tuple[np.ndarray, float]]


class BitProgram:
    """The integer program: a variable for each bits of a block, of which one is 1.

    Args:
      blocks: Places of the axes that agree, in each block.
      options: Scores of the bits of each axis.
      table: Cost of the bits.

    Attributes:
      scores: Score of each variable, less the least of its block.
      costs: Cost of each variable.
    """

    def __init__(
        self, blocks: Sequence[Sequence[int]], options: Options, table: CostTable
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
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            self.scores[start:end] -= self.scores[start:end].min(initial=math.inf)
        for part in table.parts:
            if len(part.axes) == 1:
                self.costs[self._of(part.axes[0])] += part.costs
        for k, part in enumerate(self.joint):
            self.costs[self.ends[k] : self.ends[k + 1]] = part.costs.ravel()

    def solve(
        self,
        aim: np.ndarray,
        kept: np.ndarray | bool = True,
        below: Rows = (),
        cuts: Sequence[Chosen] = (),
    ) -> Chosen | None:
        """Returns the place of the bits of each block, of the least sum of ``aim``.

        Args:
          aim: Number of each variable: scores or costs.
          kept: Whether a variable may be 1.
          below: Numbers of each variable with the most that their sum may be.
          cuts: Places that are no solution.

        Returns:
          None if there is none.
        """
        size, count = self.ends[-1], self.starts[-1]
        constraints = [self._choose_one(), *self._agree()]
        for numbers_of, most in below:
            if math.isfinite(most):
                scale = _scale(numbers_of)
                row = scipy.sparse.csr_array(numbers_of[None] * scale)
                row_below = scipy.optimize.LinearConstraint(row, -np.inf, most * scale)
                constraints.append(row_below)
        for cut in cuts:
            row = np.zeros((1, size))
            row[0, self.starts[:-1] + np.asarray(cut)] = 1
            constraints.append(
                scipy.optimize.LinearConstraint(row, -np.inf, len(cut) - 1)
            )
        upper = np.broadcast_to(kept, size).astype(float)
        run = functools.partial(
            scipy.optimize.milp,
            aim * _scale(aim),
            integrality=np.arange(size) < count,
            bounds=scipy.optimize.Bounds(0, upper),
            constraints=constraints,
        )
        found = run(options={"mip_rel_gap": 0.0})
        if found.status == _FAILED:  # Seen with rows of very different numbers.
            found = run(options={"mip_rel_gap": 0.0, "presolve": False})
        if found.x is None and found.status == 2:
            return None
        if found.x is None or found.status:
            raise RuntimeError(f"The integer program was not solved: {found.message}")
        return tuple(
            int(np.argmax(found.x[start : start + n]))
            for start, n in zip(self.starts, self.sizes, strict=False)
        )

    def bits(self, chosen: Chosen) -> dict[Axis, int]:
        """Returns the bits of each axis."""
        return {
            axis: [*own][chosen[self.block[k]]]
            for k, (axis, own) in enumerate(self.options.items())
        }

    def score(self, chosen: Chosen) -> float:
        """Returns the sum of the scores of all axes."""
        bits = self.bits(chosen)
        return math.fsum(own[bits[axis]] for axis, own in self.options.items())

    def gap(self, chosen: Chosen) -> float:
        """Returns the sum of scores, less the least score of each block."""
        return math.fsum(self.scores[self.starts[:-1] + np.asarray(chosen, int)])

    def cost(self, chosen: Chosen) -> float:
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


def best_within(
    program: BitProgram, limit: float, price: Callable[[Chosen], float]
) -> Chosen | None:
    """Returns the places of the least score within a budget, the cheapest of those.

    Tolerances of the solver are absolute. So bits whose score alone is above the best
    that is known are left out and the others scaled, until no score is better; and what
    it finds that costs too much, or has a worse score, is cut off.

    Args:
      program: The scores and costs of all bits.
      limit: The most that they may cost.
      price: Cost of what was found, as the user computes it.

    Returns:
      None if there is none.

    Raises:
      RuntimeError: if the solver does not tell what meets the budget.
    """
    budget = program.costs, limit - program.table.constant
    price, rank = functools.cache(price), lambda x: (program.score(x), price(x))
    best: Chosen | None = None
    cuts: list[Chosen] = []
    by_cost = False
    while len(cuts) <= _CUTS:
        gap = math.inf if best is None else program.gap(best) * (1 + _NOISE)
        kept = program.scores <= gap
        scores = np.where(kept, program.scores, 0.0)
        aim = program.costs if by_cost else scores
        rows = [budget, (scores, gap)] if by_cost else [budget]
        chosen = program.solve(aim, kept, rows, cuts)
        if chosen is None:
            return best
        cuts.append(chosen)
        if price(chosen) > limit:
            continue
        if best is None or rank(chosen) < rank(best):
            is_tie = best is not None and program.score(chosen) == program.score(best)
            best, by_cost = chosen, by_cost or is_tie
        elif by_cost and price(chosen) >= price(best):
            return best
        else:
            by_cost = True
    if best is None:
        raise RuntimeError(
            f"The solver found {_CUTS} schemes that cost a little more than the budget "
            f"of {limit:.10g}, and none that meets it. Change `budget` a little."
        )
    return best


def _scale(row: np.ndarray) -> float:
    """Returns the power of two by which the largest number of a row is `_LARGEST`.

    Within a factor of two: whole numbers keep their ratios.
    """
    most = float(np.max(np.abs(row), initial=0.0))
    return 2.0 ** math.floor(math.log2(_LARGEST / most)) if most > 0 else 1.0
