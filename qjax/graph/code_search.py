"""A search for integers at which a function, known by its values alone, is largest."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_ROUNDS = 16  # Populations that a budget has, at least.
_PATIENCE = 6  # Generations without a larger value.
_SWEEP = 4  # Part of the budget that goes to single places at a time.
_FEW = 4  # Codes that are tried at a place whose codes have no order known.

Values = Callable[[np.ndarray], np.ndarray]


class InputCodes(NamedTuple):
    """The codes of one input.

    Attributes:
      shape: Shape.
      low: Least code.
      high: Largest code.
      zero: Code of zero.
      is_ordered: Whether it is on a grid: what is largest likely lies at an end then.
    """

    shape: tuple[int, ...]
    low: int
    high: int
    zero: int
    is_ordered: bool


class BestRow(NamedTuple):
    """The best row of a search, and what is known of it.

    Attributes:
      row: The codes of all inputs, flat.
      tried: Number of rows that were tried.
      is_exhaustive: Whether these were all rows that there are.
      is_moved: Whether any of them changed a value.
    """

    row: np.ndarray
    tried: int
    is_exhaustive: bool
    is_moved: bool


def search(
    values: Values,
    inputs: Sequence[InputCodes],
    most: int,
    budget: int,
    size: int,
    seed: int,
) -> BestRow:
    """Searches codes at which the largest magnitude of several values is largest.

    Constant rows, those of random ends, and from the best of them places and slabs that
    are moved to ends: of one value and sign at a time, from new rows when it stays.
    Where there are no more rows than the budget, all are tried.

    Args:
      values: Function of rows, int64 ``[rows, places]``, to values ``[rows, values]``.
      inputs: Codes of the inputs, whose places follow each other.
      most: Magnitude that no value exceeds: the search ends there.
      budget: Number of rows to try, 1 or more.
      size: Number of rows in one call of ``values``.
      seed: Of random rows.

    Returns:
      The best row, and what is known of it.
    """
    own = _Search(values, inputs, most, budget, size, seed)
    own.enumerate() if own.count <= budget else own.climb()
    return BestRow(own.row, own.tried, own.tried >= own.count, own.is_moved)


class _Search:
    def __init__(
        self,
        values: Values,
        inputs: Sequence[InputCodes],
        most: int,
        budget: int,
        size: int,
        seed: int,
    ) -> None:
        self.values, self.inputs, self.most, self.budget = values, inputs, most, budget
        self.size, self.rng = size, np.random.default_rng(seed)
        self.many = min(max(budget // _ROUNDS // 2, 8), size)  # Rows of a generation.
        sizes = [math.prod(own.shape) for own in inputs]
        self.ends = np.cumsum([0, *sizes])
        spread = lambda field: np.repeat([getattr(x, field) for x in inputs], sizes)
        fields = ("low", "high", "zero", "is_ordered")
        low, high, zero, is_ordered = (
            spread(field).astype(np.int64) for field in fields
        )
        self.low, self.high, self.zero = low, high, np.clip(zero, low, high)
        self.is_ordered = is_ordered.astype(bool)
        self.count = math.prod(
            (x.high - x.low + 1) ** n for x, n in zip(inputs, sizes, strict=True)
        )
        self.row, self.best, self.tried = self.zero, -1, 0
        self.first: np.ndarray | None = None
        self.is_moved = False

    @property
    def is_over(self) -> bool:
        return self.best >= self.most or self.tried >= self.budget

    def look(self, rows: np.ndarray) -> np.ndarray:
        """Computes the values of as many rows as the budget has, and keeps the best."""
        rows = rows[: self.budget - self.tried]
        found = self.values(rows)
        self.tried += len(rows)
        self.first = found[0] if self.first is None else self.first
        self.is_moved |= bool(np.any(found != self.first))
        top = np.abs(found).max(1, initial=0)
        if len(top) and top.max() > self.best:
            self.best, self.row = int(top.max()), rows[np.argmax(top)]
        return found

    def enumerate(self) -> None:
        """Tries all rows."""
        open_ = np.flatnonzero(self.high > self.low)
        spans = tuple(int(n) for n in (self.high - self.low + 1)[open_])
        for start in range(0, self.count, self.size):
            numbers = np.arange(start, min(start + self.size, self.count))
            rows = np.repeat(self.low[None], len(numbers), 0)
            if spans:
                rows[:, open_] += np.stack(np.unravel_index(numbers, spans), 1)
            self.look(rows)
            if self.is_over:
                return

    def climb(self) -> None:
        """Climbs from populations, by one value and one sign at a time."""
        aims: set[tuple[int, int]] = set()
        for number in itertools.count():
            if self.is_over:
                return
            rows = self.population()
            if number % 2:  # Else from anew.
                rows = np.concatenate([rows, self.row[None]])
            parts = [
                self.look(rows[start : start + self.size])
                for start in range(0, len(rows), self.size)
                if not self.is_over
            ]
            found = np.concatenate(parts)
            if not found.shape[1]:
                return
            aim = self.aim(found, aims)
            aims.add(aim)
            heights = aim[1] * found[:, aim[0]]
            k = int(np.argmax(heights))
            self.ascend(rows[k], heights[k], aim)

    def aim(self, found: np.ndarray, aims: set[tuple[int, int]]) -> tuple[int, int]:
        """Chooses a value and its sign: the largest, later those of other rounds."""
        ends = np.stack([found.max(0), -found.min(0)])
        order = np.argsort(ends.reshape(-1), kind="stable")[::-1]
        pairs = (
            (int(k % ends.shape[1]), 1 - 2 * int(k // ends.shape[1])) for k in order
        )
        fresh = [pair for pair in pairs if pair not in aims][:_FEW]
        if not fresh:
            aims.clear()
            return self.aim(found, aims)
        return fresh[0 if not aims else int(self.rng.integers(len(fresh)))]

    def ascend(self, row: np.ndarray, height: int, aim: tuple[int, int]) -> None:
        """Moves slabs of a row and single places, as long as that leads higher."""
        value, sign = aim
        is_small = 2 * len(row) <= _SWEEP * self.size
        while not self.is_over:
            before, stale = height, 0
            if is_small:
                row, height = self.swept(row, height, aim)
            while stale < _PATIENCE and not self.is_over:
                rows = np.stack([self.moved(row) for _ in range(self.many)])
                found = sign * self.look(rows)[:, value]
                k = int(np.argmax(found))
                stale = 0 if found[k] > height else stale + 1
                if found[k] >= height:  # Equal ones drift.
                    equal = np.flatnonzero(found == found[k])
                    row, height = rows[self.rng.choice(equal)], found[k]
            if not is_small:
                row, height = self.swept(row, height, aim)
            if height == before:
                return

    def swept(
        self, row: np.ndarray, height: int, aim: tuple[int, int]
    ) -> tuple[np.ndarray, int]:
        """Moves each place to the code that leads highest: alone, and all together."""
        value, sign = aim
        per = 3 if self.is_ordered.all() else _FEW
        most = max((self.budget - self.tried) // (_SWEEP * per), 1)
        places = self.rng.permutation(len(row))[:most]
        for start in range(0, len(places), max(self.size // per, 1)):
            if self.is_over:
                break
            own = places[start : start + max(self.size // per, 1)]
            rows = np.repeat(row[None], per * len(own), 0)
            codes = self.at_places(own, per)
            rows[np.arange(len(rows)), np.repeat(own, per)] = codes.reshape(-1)
            found = sign * self.look(rows)[:, value]
            k = int(np.argmax(found))
            if found[k] < height:
                continue
            whole = len(found) // per * per
            each = found[:whole].reshape(-1, per)
            better = np.flatnonzero(each.max(1, initial=height) > height)
            together = row.copy()
            together[own[better]] = codes[better, each[better].argmax(1)]
            row, height = rows[k], found[k]
            if len(better) > 1 and not self.is_over:
                other = sign * self.look(together[None])[0, value]
                if other > height:
                    row, height = together, other
        return row, height

    def at_places(self, places: np.ndarray, count: int) -> np.ndarray:
        """Returns codes to try at places: both ends, then random ones."""
        low, high = self.low[places], self.high[places]
        more = [self.random(places) for _ in range(count - 2)]
        return np.stack([low, high, *more], 1)

    # Rows.

    def population(self) -> np.ndarray:
        """Returns constant rows, rows of ends by channel and by place, random rows."""
        everywhere = np.arange(len(self.low))
        rows = [self.zero, self.low, self.high]
        for k in range(self.many):
            random = self.random(everywhere) if k % 4 == 3 else self.end(everywhere)
            rows.append(random if k % 2 else self.constant_in_time(random))
        return np.stack(rows)

    def constant_in_time(self, row: np.ndarray) -> np.ndarray:
        """Returns a row that has along all axes of an input but one the first codes."""
        parts = []
        for own, start, end in zip(
            self.inputs, self.ends[:-1], self.ends[1:], strict=True
        ):
            part = row[start:end].reshape(own.shape)
            if part.size and part.ndim:
                kept = int(self.rng.integers(part.ndim))
                first = tuple(
                    slice(None) if d == kept else slice(1) for d in range(part.ndim)
                )
                part = np.broadcast_to(part[first], own.shape)
            parts.append(part.reshape(-1))
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def end(self, places: np.ndarray) -> np.ndarray:
        """Returns ends at random; where codes have no order, random codes."""
        ends = np.where(
            self.rng.random(len(places)) < 0.5, self.low[places], self.high[places]
        )
        return np.where(self.is_ordered[places], ends, self.random(places))

    def random(self, places: np.ndarray) -> np.ndarray:
        """Returns random codes, half of them of any size: a range may be of 32 bits."""
        low, high, zero = self.low[places], self.high[places], self.zero[places]
        evenly = self.rng.integers(low, high, endpoint=True)
        bits = self.rng.random(len(places)) * np.log2(high - low + 1.0)
        sizes = np.floor(2.0**bits).astype(np.int64) * self.rng.choice(
            (-1, 1), len(places)
        )
        near = np.clip(zero + sizes, low, high)
        is_wide = (high - low > 1 << 16) | (self.rng.random(len(places)) < 0.25)
        return np.where(is_wide, near, evenly)

    def moved(self, row: np.ndarray) -> np.ndarray:
        """Returns a row of which a slab, or some places, have other codes."""
        row, rng = row.copy(), self.rng
        sizes = np.diff(self.ends)
        full = np.flatnonzero(sizes)
        if not len(full):
            return row
        k = int(rng.choice(full))
        shape, start = self.inputs[k].shape, self.ends[k]
        places = np.arange(sizes[k]).reshape(shape)
        if rng.random() < 0.3:
            count = int(rng.integers(1, min(_FEW, sizes[k]) + 1))
            own = rng.choice(places.reshape(-1), count) + start
            row[own] = (self.end if rng.random() < 0.7 else self.random)(own)
            return row
        for d, n in enumerate(shape):
            places = places.take(self.span(n), d)
        own = places.reshape(-1) + start
        kind = rng.random()
        if kind < 0.2:
            row[own] = (self.end if rng.random() < 0.7 else self.random)(own)
        elif kind < 0.3:
            row[own] = self.zero[own]
        elif kind < 0.4:
            row[own] = row[rng.permutation(own)]
        else:  # One code for all of it.
            row[own] = (self.end if kind < 0.9 else self.random)(own[:1])
        return row

    def span(self, n: int) -> np.ndarray:
        """Returns all indices of an axis, one of them, or a range."""
        kind = self.rng.random()
        if kind < 0.4:
            return np.arange(n)
        if kind < 0.8:
            return self.rng.integers(n, size=1)
        first, last = np.sort(self.rng.integers(n, size=2))
        return np.arange(first, last + 1)
