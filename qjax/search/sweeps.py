"""Sweeps: a function of a scheme over many of them, in one compile."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qjax.calibration.batches import progress_bar
from qjax.schemes.patterns import is_whole
from qjax.schemes.scheme import Scheme, stack_schemes
from qjax.search.execution import (
    Configurations,
    Execution,
    Runner,
    Values,
    make_runner,
    named_numbers,
    spans_processes,
)
from qjax.search.records import (
    Expected,
    Heading,
    Record,
    Writer,
    all_paths,
    check_same,
    heading,
    own_path,
    read_heading,
    read_records,
)
from qjax.search.results import Results
from qjax.tables import show


def sweep(
    fn: Callable[..., Any],
    schemes: Sequence[Scheme],
    *data: Any,
    seeds: Sequence[int] | None = None,
    execution: Execution = "auto",
    path: str | os.PathLike[str] | None = None,
    name: str = "",
    mesh: Mesh | None = None,
    chunk: int | None = None,
    memory: int | None = None,
    progress: bool | None = None,
    compiled: bool = True,
) -> Results:
    """Computes a function of a scheme for many schemes, in one compile.

    The function is traced once, with bits that are data: an evaluation, a calibration
    by `QuantizedModel.observe`, a whole training in a ``lax.scan``. All executions
    give the same numbers, up to the order of float sums:

    - "loop": one compiled function, called once for each configuration.
    - "vmap": chunks of configurations at once.
    - "shard": the configurations over the axis ``config`` of a mesh. Data may lie on
      its other axes; what has no place there is copied to all devices.
    - "auto": "shard" on several devices; else "loop" on the CPU, where convolutions by
      many kernels at once are slow, and "vmap" on other devices.

    Several processes of ``jax.distributed`` call it alike: each computes its share on
    its own devices, or all do on a ``mesh`` of all devices, and each returns all.

    Args:
      fn: ``fn(scheme, *data)``, or ``fn(scheme, seed, *data)`` if there are seeds.
        Returns a number, or a dict of numbers by name.
      schemes: Schemes that differ in bits alone, as `grid` returns.
      *data: Pytrees of arrays. What ``fn`` closes over is a constant of the program,
        which compiles longer.
      seeds: Seeds, with each of which each scheme is run; ``jax.random.key`` makes keys
        of them.
      execution: Way to run them.
      path: File of JSON lines, to which each result is appended as it comes. A sweep
        that was interrupted goes on with what is not there, if schemes, seeds and
        ``data`` are the same; what ``fn`` closes over it does not know. Process k > 0
        appends to ``stem.k.jsonl``.
      name: Name of the function in that file; "" for its own. Files of two functions
        are told apart by it.
      mesh: Mesh with an axis ``config``; by default one of all devices of the process.
      chunk: Configurations at once; by default as many as fit into memory, in equal
        chunks. In a loop, those between two writes.
      memory: Bytes that a chunk may take; by default half of what is free.
      progress: Whether a bar on standard error shows configurations a second; None: if
        it is a terminal.
      compiled: False calls ``fn`` with each scheme as it is, uncompiled, for functions
        that need bits as numbers.

    Returns:
      The numbers by name, in the order of schemes, then seeds. A configuration that
      gives NaN has NaN.

    Raises:
      TypeError: for arguments of another type; for an ``fn`` that returns no numbers,
        or needs the value of a traced one.
      ValueError: for no schemes, or schemes that do not stack; for a mesh without the
        axis, and the file of another sweep.

    Example:
      >>> from qjax.search.grids import grid
      >>> schemes = grid(Scheme(), {"*/kernel": [2, 4, 8]})
      >>> results = sweep(lambda s: {"bits": s.rules[0].bits}, schemes)
      >>> print(results["bits"], results.best().rules[0].bits)
      [2 4 8] 2
    """
    own = _plan(fn, schemes, seeds, data)
    if compiled:
        runner = make_runner(
            fn,
            own.arguments,
            execution=execution,
            chunk=_positive("chunk", chunk),
            memory=_positive("memory", memory),
            mesh=mesh,
        )
    else:
        runner = _eager(fn, own, execution, mesh)
    is_global = spans_processes(mesh)
    process, processes = jax.process_index(), jax.process_count()
    found: dict[int, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        writer = None
        if path is not None:
            names = tuple(runner.types)
            head = heading(name or show(fn), names, own.schemes, own.seeds, data)
            found = _found(path, own_path(path, process), head, own)
            if not is_global or process == 0:
                writer = stack.enter_context(_writer(path, process, head))
        share = [*range(len(own.schemes))]
        if processes > 1 and is_global:
            found = _agreed(found, runner.types, len(share))
        elif processes > 1:
            share = share[process::processes]
        todo = [k for k in share if k not in found]
        words, done = ("sweep", "configurations"), len(share) - len(todo)
        bar = progress_bar(len(share), progress, *words, done=done)
        advance = stack.enter_context(bar)
        for start in range(0, len(todo), runner.chunk):
            places = todo[start : start + runner.chunk]
            rows = dict(zip(places, _rows(runner.run(places)), strict=True))
            found |= rows
            if writer is not None:
                writer.append(own.record(k, row) for k, row in rows.items())
            advance(len(places))
    if processes > 1 and not is_global:
        found = _agreed(found, runner.types, len(own.schemes))
    return _results(own, runner, found)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The configurations of a sweep, in order."""

    schemes: list[Scheme]
    seeds: list[int | None]
    arguments: Configurations

    def record(self, k: int, values: dict[str, Any]) -> Record:
        return Record(k, self.schemes[k], self.seeds[k], values)

    def call(self, fn: Callable[..., Any], k: int) -> dict[str, np.ndarray]:
        """Returns the numbers of one configuration, with its scheme as it is."""
        seed, data = self.seeds[k], self.arguments.data
        found = fn(self.schemes[k], *(() if seed is None else (seed,)), *data)
        return {name: _exact(x) for name, x in named_numbers(found).items()}


def read_results(*paths: str | os.PathLike[str]) -> Results:
    """Reads the files of a sweep, of one process or several, finished or not.

    Args:
      *paths: Files of one sweep, such as those of its hosts.

    Returns:
      The configurations that are there, in their order.

    Raises:
      ValueError: for no files, files of different sweeps, lines of another sweep than
        their file's first, and what is none.
      FileNotFoundError: for a file that is not there.
    """
    if not paths:
        raise ValueError("`read_results` needs at least one file, got none.")
    head, records = read_records(paths)
    rows = [records[k] for k in sorted(records)]
    has_seeds = any(row.seed is not None for row in rows)
    return Results(
        schemes=tuple(row.scheme for row in rows),
        values={n: np.asarray([row.values[n] for row in rows]) for n in head.names},
        seeds=np.asarray([row.seed for row in rows]) if has_seeds else None,
        places=np.asarray([row.configuration for row in rows], np.int64),
    )


def _plan(fn: Any, schemes: Any, seeds: Any, data: tuple[Any, ...]) -> _Plan:
    """Returns the configurations; raises for those that cannot be run."""
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of a scheme, got {show(fn)}.")
    if isinstance(schemes, Scheme):
        raise TypeError(
            "`schemes` must be a sequence of schemes, as `grid` returns; got one."
        )
    schemes = [*schemes]
    if not schemes:
        raise ValueError("`sweep` needs at least one scheme, got none.")
    stacked = jax.device_get(stack_schemes(schemes))
    if not jax.tree.leaves(stacked):
        raise ValueError(
            "The schemes have no bits: all sites stay in float. Give `weights` or "
            "`activations` a word."
        )
    if seeds is None:
        return _Plan(
            schemes, [None] * len(schemes), Configurations(stacked, None, data)
        )
    each = _seeds(seeds)
    repeat = lambda x: np.repeat(x, len(each), axis=0)
    column = np.tile(np.asarray(each, np.int32), len(schemes))
    arguments = Configurations(jax.tree.map(repeat, stacked), column, data)
    rows = [scheme for scheme in schemes for _ in each]
    return _Plan(rows, [*map(int, column)], arguments)


def _seeds(seeds: Any) -> list[int]:
    is_many = isinstance(seeds, Sequence | np.ndarray | range)
    if not is_many or not all(map(is_whole, seeds)):
        raise TypeError(
            f"`seeds` must be whole numbers such as (0, 1, 2), got {seeds!r}."
        )
    found = [*map(int, seeds)]
    if not found or len({*found}) < len(found) or min(found) < 0 or max(found) >= 2**31:
        raise ValueError(
            "`seeds` must hold at least one number from 0 to 2^31 - 1, each once, got "
            f"{found}."
        )
    return found


def _positive(name: str, value: Any) -> int | None:
    if value is not None and (not is_whole(value) or value < 1):
        raise ValueError(
            f"`{name}` must be a whole number of at least 1, got {value!r}."
        )
    return None if value is None else int(value)


def _eager(fn: Any, own: _Plan, execution: str, mesh: Mesh | None) -> Runner:
    """Returns a runner that calls a function with each scheme as it is."""
    if execution not in ("auto", "loop") or mesh is not None:
        raise ValueError(
            "`compiled=False` calls the function once for each scheme: leave "
            f"`execution` and `mesh` out, got {execution!r}."
        )
    # The names of the numbers are those of the first call, which is not made twice.
    call = functools.cache(lambda k: own.call(fn, k))

    def run(places: Sequence[int]) -> Values:
        rows = [call(k) for k in places]
        other = next((row for row in rows if row.keys() != call(0).keys()), None)
        if other is not None:
            raise ValueError(
                "`fn` must return the same numbers for all schemes, got "
                f"{', '.join(call(0))} and {', '.join(other)}."
            )
        return {name: np.asarray([row[name] for row in rows]) for name in call(0)}

    types = {name: type(x.item()) for name, x in sorted(call(0).items())}
    return Runner(run, 1, "eager", types)


def _exact(x: Any) -> np.ndarray:
    """Returns a number as it is, in float64 if it is an integer beyond int64."""
    found = np.asarray(x)
    return found if found.dtype.kind in "biuf" else np.asarray(x, np.float64)


def _found(
    path: Any, mine: pathlib.Path, head: Heading, own: _Plan
) -> dict[int, dict[str, Any]]:
    """Returns what the files of a sweep hold already.

    A file beside them with a number in its name is one of them if its heading says so.
    """
    must = {pathlib.Path(path), mine}
    there = (p for p in all_paths(path) if p.stat().st_size)
    paths = [p for p in there if p in must or read_heading(p) == head]
    if not paths:
        return {}
    wanted = Expected(head, own.schemes, own.seeds)
    try:
        first, records = read_records(paths, wanted)
    except ValueError as error:
        if "no line of a sweep" in str(error):
            return {}
        raise
    check_same(path, first, head)
    return {k: record.values for k, record in records.items()}


@contextlib.contextmanager
def _writer(path: Any, process: int, head: Heading) -> Iterator[Writer]:
    writer = Writer(own_path(path, process), head)
    try:
        yield writer
    finally:
        writer.close()


def _rows(values: Values) -> list[dict[str, Any]]:
    """Returns a dict of Python numbers for each configuration."""
    columns = {name: own.tolist() for name, own in values.items()}
    count = len(next(iter(columns.values())))
    return [{name: own[k] for name, own in columns.items()} for k in range(count)]


def _agreed(
    found: dict[int, dict[str, Any]], types: Mapping[str, type], count: int
) -> dict[int, dict[str, Any]]:
    """Returns what any process has found, the same in all of them."""
    table = np.zeros((count, 1 + len(types)), np.float64)
    for k, row in found.items():
        table[k] = [1, *(row[name] for name in types)]
    # In bytes: without x64, JAX has no float64.
    words = np.frombuffer(table.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(words))
    merged: dict[int, dict[str, Any]] = {}
    for part in gathered.reshape(-1, words.size):
        own = np.frombuffer(part.tobytes(), np.float64).reshape(table.shape)
        for k in map(int, np.flatnonzero(own[:, 0])):
            numbers = zip(types.items(), own[k, 1:], strict=True)
            merged[k] = {name: _as_type(kind, x) for (name, kind), x in numbers}
    return merged


def _as_type(kind: type, x: float) -> Any:
    """Returns a number in the type of the first configuration, if that holds it."""
    return kind(x) if math.isfinite(x) and kind(x) == x else float(x)


def _results(own: _Plan, runner: Runner, found: dict[int, dict[str, Any]]) -> Results:
    places = range(len(own.schemes))
    seeds = None if own.seeds[0] is None else np.asarray(own.seeds)
    return Results(
        schemes=tuple(own.schemes),
        values={n: np.asarray([found[k][n] for k in places]) for n in runner.types},
        seeds=seeds,
        places=np.arange(len(own.schemes)),
        execution=runner.execution,
    )
