"""Times of calls in turn, in one process."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

_LEAST_SECONDS = 2e-4  # Of a sample: shorter calls are repeated.


def pin(threads: int) -> None:
    """Keeps the process on as many cores, before JAX and others start their threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-threads:])


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Measures calls, one after the other in each round.

    Thread pools of other runtimes spin for a while after a call: the first call of each
    turn lets them stop, and is not timed. The first two rounds are warm-up.

    Args:
      calls: What to call, by name.
      rounds: Samples of each.
      threads: 1 for the median of processor time, more for the least wall-clock time.

    Returns:
      By name ``wall ms`` and ``processor ms``, medians; ``least ms``, the least
      wall-clock time; ``ms``, the one of these that ``threads`` asks for.
    """
    walls: dict[str, list[float]] = {name: [] for name in calls}
    processors: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        seconds = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, min(1000, int(_LEAST_SECONDS / seconds)))
    for i in range(rounds + 2):
        for name, call in calls.items():
            call()
            start, begun = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            spent = time.perf_counter() - start, time.process_time() - begun
            if i >= 2:
                walls[name].append(1e3 * spent[0] / repeats[name])
                processors[name].append(1e3 * spent[1] / repeats[name])
    found = {}
    for name in calls:
        wall, processor = walls[name], processors[name]
        found[name] = {
            "ms": statistics.median(processor) if threads == 1 else min(wall),
            "wall ms": statistics.median(wall),
            "least ms": min(wall),
            "processor ms": statistics.median(processor),
        }
    return found


def against_peers(
    times: Mapping[str, Mapping[str, float]], own: str, peers: set[str]
) -> float | None:
    """Returns the time of the fastest peer over that of ``own``; None without peers."""
    others = [times[name]["ms"] for name in peers if name in times]
    return min(others) / times[own]["ms"] if others else None
