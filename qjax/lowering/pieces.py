"""Integers where a function of integers changes: thresholds, and what lies between.

A float function of an accumulator, rounded to codes, is constant between thresholds.
They are found by the float function itself. A range of few integers is evaluated whole.
A longer one is sampled, halved until the two integers on both sides of each change are
known, and evaluated whole in a window around each change: XLA's float functions step
back between neighbouring numbers (tanh at 11 % of them), and a code may change several
times there. All changes that are found become thresholds, forwards or back.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

MOST_WHOLE = 1 << 24  # Integers, of all functions together, that are evaluated whole.
MOST_BENT = 1 << 26  # The same, where samples rise and fall.
MOST_CUTS = 1 << 20  # Thresholds, of all functions together.
_SAMPLES = 1 << 12
# A float function is off by some units in the last place, of 24 bits: below 2^-20. A
# word of b bits has its thresholds 2^-b of its range apart, so that the codes can
# change to and fro in 2^(b - 20) of the distance between two of them: for 8 bits a
# quarter of the window. Windows are 64 integers at least.
_NEAR, _SHARE, _FAR = 64, 10, 1 << 14
_MOST_SEEN = 1 << 22  # Integers in all windows together.

# Numbers of functions and integers, flat -> codes.
Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]


class BentError(ValueError):
    """An error for a function that rises and falls, in too long a range to see it all.

    Attributes:
      at: An integer where it turns.
    """

    def __init__(self, at: int):
        super().__init__(f"The function turns near {at}.")
        self.at = at


class ManyCutsError(ValueError):
    """An error for more thresholds than a program should hold.

    Attributes:
      count: Their number.
    """

    def __init__(self, count: int):
        super().__init__(f"The function has {count} thresholds.")
        self.count = count


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A function of integers by its pieces: ``codes[number of cuts <= integer]``.

    Attributes:
      cuts: int64, ascending: the first integer of each piece but the first.
      codes: Code of each piece.
      is_whole: Whether all integers were evaluated.
    """

    cuts: np.ndarray
    codes: np.ndarray
    is_whole: bool = True


def find_pieces(
    evaluate: Evaluate, functions: int, low: int, high: int
) -> list[Pieces]:
    """Finds the pieces of functions of integers.

    Args:
      evaluate: Computes codes.
      functions: Number of functions.
      low: Least integer.
      high: Largest integer.

    Returns:
      For each function its pieces.

    Raises:
      BentError: for a function that rises and falls over more than ``MOST_BENT``
        integers.
      ManyCutsError: for more than ``MOST_CUTS`` thresholds.
    """
    size = (high - low + 1) * functions
    if size <= MOST_WHOLE:
        return _whole(evaluate, functions, low, high)
    points = _refined(evaluate, functions, low, high)
    turn = _turn(*points)
    if turn is None:
        return _split(*_with_windows(evaluate, functions, low, high, points), functions)
    if size > MOST_BENT:
        raise BentError(turn)
    return _whole(evaluate, functions, low, high)


_STEP = 1 << 20


def _whole(evaluate: Evaluate, functions: int, low: int, high: int) -> list[Pieces]:
    """Evaluates every integer."""
    found, total = [], 0
    for k in range(functions):
        cuts: list[np.ndarray] = []
        codes: list[np.ndarray] = []
        last = None
        for start in range(low, high + 1, _STEP):
            x = np.arange(start, min(start + _STEP, high + 1), dtype=np.int64)
            q = evaluate(np.full(x.shape, k), x)
            if last is None:
                codes.append(q[:1])
                last = q[0]
            changed = np.flatnonzero(np.diff(q, prepend=last))
            cuts.append(x[changed])
            codes.append(q[changed])
            last = q[-1]
            total += len(changed)
            if total > MOST_CUTS:
                raise ManyCutsError(total)
        found.append(Pieces(np.concatenate(cuts), np.concatenate(codes)))
    return found


Points = tuple[np.ndarray, np.ndarray, np.ndarray]  # Functions, integers, codes.


def _refined(evaluate: Evaluate, functions: int, low: int, high: int) -> Points:
    """Evaluates samples, and halves between different ones down to neighbours."""
    near = 3 * 2 ** np.arange(31, dtype=np.int64) // 2
    ends = np.linspace(low, high, _SAMPLES + 1).astype(np.int64)
    own = np.concatenate([ends, near, -near, near // 3 * 2, near // 3 * -2, [0, high]])
    own = np.unique(own[(own >= low) & (own <= high)])
    fn = np.repeat(np.arange(functions), len(own))
    x = np.tile(own, functions)
    q = evaluate(fn, x)
    points = [(fn, x, q)]
    left, right = np.arange(len(x) - 1), np.arange(1, len(x))
    pairs = [fn[left], x[left], x[right], q[left], q[right]]
    pairs = [p[fn[left] == fn[right]] for p in pairs]
    while True:
        fn, first, last, before, after = pairs
        open_ = (before != after) & (last - first > 1)
        fn, first, last, before, after = (p[open_] for p in pairs)
        if not len(fn):
            break
        if len(fn) > MOST_CUTS:
            raise ManyCutsError(len(fn))
        middle = (first + last) // 2
        q = evaluate(fn, middle)
        points.append((fn, middle, q))
        halves = ([fn, first, middle, before, q], [fn, middle, last, q, after])
        pairs = [np.concatenate(p) for p in zip(*halves, strict=True)]
    return _sorted(points)


def _sorted(points: list[Points]) -> Points:
    """Returns all points in order, each once."""
    fn, x, q = (np.concatenate(p) for p in zip(*points, strict=True))
    order = np.lexsort((x, fn))
    fn, x, q = fn[order], x[order], q[order]
    keep = np.ones(len(x), bool)
    keep[1:] = (fn[1:] != fn[:-1]) | (x[1:] != x[:-1])
    return fn[keep], x[keep], q[keep]


def _turn(fn: np.ndarray, x: np.ndarray, q: np.ndarray) -> int | None:
    """Returns an integer where codes rise and fall by more than float error; or None.

    A step back of one code to neighbours that go on is float error at a threshold.
    """
    changed = np.flatnonzero((fn[1:] == fn[:-1]) & (q[1:] != q[:-1])) + 1
    ups = q[changed] > q[changed - 1]
    same = fn[changed[1:]] == fn[changed[:-1]]
    turns = np.flatnonzero(same & (ups[1:] != ups[:-1]))
    for t in turns:
        first, second = changed[t], changed[t + 1]
        if x[second] - x[first] > _NEAR:
            return int(x[second])
    return None


def _with_windows(
    evaluate: Evaluate, functions: int, low: int, high: int, points: Points
) -> Points:
    """Evaluates the windows around all changes whole."""
    fn, x, q = points
    changed = np.flatnonzero((fn[1:] == fn[:-1]) & (q[1:] != q[:-1])) + 1
    if not len(changed):
        return points
    at, own = x[changed], fn[changed]
    before = np.where(np.r_[True, own[1:] != own[:-1]], low, np.r_[low, at[:-1]])
    after = np.where(np.r_[own[1:] != own[:-1], True], high, np.r_[at[1:], high])
    gap = np.maximum(at - before, after - at)
    most = max(_MOST_SEEN // (2 * len(at)), 4)
    reach = np.clip(gap >> _SHARE, _NEAR, _FAR)
    reach = np.minimum(reach, most)
    first, last = np.maximum(at - reach, low), np.minimum(at + reach, high)
    count = last - first + 1
    start = np.cumsum(count) - count
    inside = np.arange(count.sum()) - np.repeat(start, count)
    more = np.repeat(own, count), np.repeat(first, count) + inside
    return _sorted([points, (*more, evaluate(*more))])


def _split(
    fn: np.ndarray, x: np.ndarray, q: np.ndarray, functions: int
) -> list[Pieces]:
    """Returns the pieces of each function from its points in order."""
    found, total = [], 0
    for k in range(functions):
        own = fn == k
        places, codes = x[own], q[own]
        changed = np.flatnonzero(np.diff(codes)) + 1
        total += len(changed)
        pieces = Pieces(places[changed], codes[np.r_[0, changed]], is_whole=False)
        found.append(pieces)
    if total > MOST_CUTS:
        raise ManyCutsError(total)
    return found
