"""Strict JAX flags for all tests, and a folder of compiled programs between runs."""

import collections
import gc
import os
import pathlib
import re

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


MANY_CASES, KEPT_CASES = 12, 8  # Of a function with more, the whole suite runs these.


def pytest_collection_modifyitems(config, items):
    """Leaves out what is heavy, unless it is asked for.

    Thousands of random programs and deep ones run with `-m fuzz`, long compilations and
    trainings beside the kinds that always run with `-m heavy`. Of a function with
    more than a dozen cases the whole suite runs eight, spread over all; a run that
    names files, or `-m "more or not more"`, runs each.
    """
    expression = config.option.markexpr
    is_whole = not config.option.file_or_dir and "more" not in expression
    skipped = [name for name in ("fuzz", "heavy", "more") if name not in expression]
    runs = lambda item: not any(map(item.get_closest_marker, skipped))
    for item in _further_cases(filter(runs, items)) if is_whole else ():
        item.add_marker("more")
    left_out = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in gone]


def pytest_collection_finish():
    """No collection of garbage goes through what stands before the first test."""
    gc.freeze()


def _further_cases(items):
    """All cases of functions with many but `KEPT_CASES`, which are spread over them."""
    cases = collections.defaultdict(list)
    for item in items:
        cases[re.sub(r"\d*$", "", item.nodeid.partition("[")[0])].append(item)
    for own in cases.values():
        if (n := len(own)) > MANY_CASES:
            kept = {k * (n - 1) // (KEPT_CASES - 1) for k in range(KEPT_CASES)}
            yield from (item for k, item in enumerate(own) if k not in kept)
