"""Plans where the values of a graph lie, by when they are read last."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Lifetime(NamedTuple):
    """A value that needs memory.

    Attributes:
      size: Number of its elements.
      first: Number of the node that computes it.
      last: Number of the last node that reads it.
    """

    size: int
    first: int
    last: int


def plan(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """Places values in one array, none where another one lives.

    The largest come first, each at the lowest place that is free while it lives.

    Args:
      lifetimes: Value -> its lifetime.

    Returns:
      Value -> its first element, and the size of the array.
    """
    found: dict[int, int] = {}
    order = sorted(lifetimes, key=lambda v: (-lifetimes[v].size, v))
    for v in order:
        own = lifetimes[v]
        taken = sorted(
            (found[u], found[u] + lifetimes[u].size)
            for u in found
            if lifetimes[u].first <= own.last and own.first <= lifetimes[u].last
        )
        found[v] = _lowest(taken, own.size)
    ends = [found[v] + lifetimes[v].size for v in found]
    return found, max(ends, default=0)


def _lowest(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Returns the lowest place of a gap between spans in order."""
    at = 0
    for start, end in taken:
        if start - at >= size:
            break
        at = max(at, end)
    return at
