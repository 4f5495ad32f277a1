"""Steps of integers: where a requantizer or a table goes up and down."""

import dataclasses
from collections.abc import Callable

import numpy as np

MOST_STEPS = 1 << 22  # Most thresholds of one operator, over all of its channels.


class StepsError(ValueError):
    """An error for what has too many steps."""


@dataclasses.dataclass(frozen=True)
class Staircase:
    """A function of integers: ``base + number of ups <= x - number of downs <= x``.

    Attributes:
      base: Its least value before any step.
      up: ``[channels, steps]``, int64, in ascending order; those that are never reached
        lie beyond the range.
      down: The same.
    """

    base: int
    up: np.ndarray
    down: np.ndarray


def monotone(
    function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> Staircase:
    """Finds the steps of a monotone function of integers by bisection.

    Args:
      function: From ``[channels, n]`` to the same, up or down in each channel.
      low: ``[channels, 1]``: least integer.
      high: ``[channels, 1]``: largest integer.

    Raises:
      StepsError: if there are more than `MOST_STEPS`.
    """
    first, last = function(low), function(high)
    sign = np.where(last < first, -1, 1)
    count = int(np.abs(last - first).max(initial=0))
    _check(count * len(low))
    wanted = np.arange(1, count + 1)[None]
    below = np.broadcast_to(low, (len(low), count)).copy()
    above = np.broadcast_to(high + 1, below.shape).copy()  # One that is far enough.
    while np.any(above - below > 1):
        middle = (below + above) // 2
        reached = (function(middle) - first) * sign >= wanted
        above = np.where(reached, middle, above)
        below = np.where(reached, below, middle)
    base = int(first.min()) if first.size else 0
    always = np.broadcast_to(low, (len(low), int((first - base).max(initial=0))))
    always = np.where(np.arange(always.shape[1]) < first - base, always, high + 1)
    up = np.where(sign > 0, above, high + 1)
    down = np.where(sign < 0, above, high + 1)
    return _staircase(base, np.concatenate([always, up], 1), down, high)


def jumps(places: np.ndarray, values: np.ndarray, high: np.ndarray) -> Staircase:
    """Finds the steps of a function that jumps at places.

    Args:
      places: ``[channels, n]``, in ascending order: the first integer after each jump.
      values: ``[channels, n + 1]``: what it is before, between and after.
      high: ``[channels, 1]``: largest integer.

    Raises:
      StepsError: if there are more than `MOST_STEPS`.
    """
    base = int(values[:, 0].min())
    least = np.iinfo(np.int64).min // 2
    firsts = np.concatenate([np.full_like(high, least), places], 1)
    rises = np.diff(np.concatenate([np.full_like(high, base), values], 1), axis=1)
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for at, by in zip(firsts, rises, strict=True):
        for k, sign in enumerate((1, -1)):
            _check(int(np.maximum(sign * by, 0).sum()) * len(high))
            rows[k].append(np.repeat(at, np.maximum(sign * by, 0)))
    made = []
    for own in rows:
        size = max(map(len, own), default=0)
        pairs = zip(own, high[:, 0], strict=True)
        padded = [
            np.pad(r, (0, size - len(r)), constant_values=h + 1) for r, h in pairs
        ]
        made.append(np.array(padded, np.int64).reshape(len(high), size))
    return _staircase(base, made[0], made[1], high)


def _check(count: int) -> None:
    if count > MOST_STEPS:
        raise StepsError(f"{count:,} thresholds, more than {MOST_STEPS:,}")


def _staircase(
    base: int, up: np.ndarray, down: np.ndarray, high: np.ndarray
) -> Staircase:
    """Drops columns of steps that no channel reaches."""
    kept = [np.sort(np.minimum(own, high + 1), 1) for own in (up, down)]
    kept = [own[:, np.any(own <= high, 0)] for own in kept]
    return Staircase(base, *kept)
