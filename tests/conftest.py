"""Strict JAX flags for all tests, and a folder of compiled programs between runs."""

import collections
import gc
import json
import os
import pathlib
import re
import resource

# All workers read what one has compiled, and processes that tests start inherit it.
# Writes are not atomic: pyproject.toml ignores the warning of a half-written entry,
# in whose place the program is compiled.
CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

# No silent promotion, no silent rank changes.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def flax_promotion():
    """Standard dtype promotion, which Flax's own average pooling needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SECONDS = pathlib.Path(__file__).parent / "seconds.json"
BUDGET = 1.0  # Seconds of one function, beyond which the whole suite leaves out cases.
MOST = 2.5  # Seconds of a case, beyond which it leaves out the function, unless kept.
LEAST = 0.01  # Seconds of a case, at least.
MOST_CASES = 8  # Cases of a function whose time is not known.


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, default=BUDGET, help="seconds a function")
    parser.addoption("--most", type=float, default=MOST, help="seconds a case")
    text = "write tests/seconds.json, the seconds that a case of each function takes"
    parser.addoption("--write-seconds", action="store_true", help=text)


def pytest_configure(config):
    if config.option.write_seconds and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Stopwatch())


def pytest_collection_modifyitems(config, items):
    """Leaves out what is heavy, unless it is asked for.

    Thousands of random programs and deep ones run with `-m fuzz`, long compilations and
    trainings beside the kinds that always run with `-m heavy`. Of a function whose
    cases take longer than the budget the whole suite runs as many as fit, at least
    one, spread over all. A function of which one case takes longer than `--most` it
    leaves to shorter ones beside it, but for the shortest of a file and what is marked
    `kept`: the rule that no shorter test has. A run that names files, or
    `-m "more or not more"`, runs each.
    """
    expression = config.option.markexpr
    is_whole = not config.option.file_or_dir and "more" not in expression
    skipped = [name for name in ("fuzz", "heavy", "more") if name not in expression]
    runs = lambda item: not any(map(item.get_closest_marker, skipped))
    chosen = list(filter(runs, items))
    for item in _further_cases(chosen, config.option) if is_whole else ():
        item.add_marker("more")
    left_out = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in gone]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes the processor time of a test, which other work on the machine leaves."""
    begun = _processor_time()
    try:
        return (yield)
    finally:
        item.user_properties.append(("seconds", _processor_time() - begun))


def _processor_time():
    """Seconds of all threads of this process, and of the processes that it ended."""
    rows = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(row.ru_utime + row.ru_stime for row in rows)


def pytest_collection_finish():
    """No collection of garbage goes through what stands before the first test."""
    gc.freeze()


def _function(nodeid):
    """The function of a test; `absl` numbers its cases."""
    return re.sub(r"\d*$", "", nodeid.partition("[")[0])


def _further_cases(items, option):
    """The cases beyond the budget of their functions, and all of long functions."""
    cases, seconds = collections.defaultdict(list), json.loads(SECONDS.read_text())
    for item in items:
        cases[_function(item.nodeid)].append(item)
    unknown = option.budget / MOST_CASES
    each = {name: max(seconds.get(name, unknown), LEAST) for name in cases}
    shortest = {}
    for name in sorted(cases, key=each.get, reverse=True):
        shortest[name.partition("::")[0]] = name
    for name, own in cases.items():
        is_kept = name in shortest.values() or own[0].get_closest_marker("kept")
        if each[name] > option.most and not is_kept:
            yield from own
            continue
        many, n = max(1, min(len(own), int(option.budget / each[name]))), len(own)
        kept = (
            {k * (n - 1) // (many - 1) for k in range(many)} if many > 1 else {n // 2}
        )
        yield from (item for k, item in enumerate(own) if k not in kept)


class _Stopwatch:
    """Writes the mean processor time of a case by function, from .1 seconds on.

    Functions that do not run keep theirs.
    """

    def __init__(self):
        self.found = collections.defaultdict(list)

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            # Doctests are not below this file, so that no hook here times them.
            own = dict(report.user_properties).get("seconds", report.duration)
            self.found[_function(report.nodeid)].append(own)

    def pytest_sessionfinish(self):
        means = {name: sum(x) / len(x) for name, x in self.found.items()}
        kept = {
            name: x
            for name, x in json.loads(SECONDS.read_text()).items()
            if name not in means
        }
        rows = {name: round(x, 1) for name, x in means.items() if x >= 0.1}
        rows = dict(sorted({**kept, **rows}.items()))
        SECONDS.write_text(json.dumps(rows, indent=0) + "\n")
