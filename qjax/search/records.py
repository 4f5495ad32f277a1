"""Files of sweeps: a line of JSON for each configuration, appended as results come."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from qjax.schemes.scheme import Scheme

_FORMAT = "qjax sweep 3"
_NOT_FINITE = ("nan", "inf", "-inf")  # Numbers that JSON has not.


class Heading(NamedTuple):
    """The first line of a file: what tells sweeps apart."""

    function: str  # Name of the function.
    names: tuple[str, ...]  # Of the numbers that it returns.
    configurations: int
    digest: str  # Of the schemes and seeds, in their order.
    data: str  # Digest of the arrays that the function is given.

    @property
    def identity(self) -> str:
        """Returns what the lines of a file know their sweep by."""
        return f"{self.digest} {self.data}"

    def text(self) -> str:
        """Returns the line."""
        own = {"file": _FORMAT, **self._asdict(), "names": [*self.names]}
        return json.dumps(own)


class Expected(NamedTuple):
    """The sweep that files are read for."""

    heading: Heading
    schemes: Sequence[Scheme]  # Of each configuration.
    seeds: Sequence[int | None]


class Record(NamedTuple):
    """The result of one configuration."""

    configuration: int
    scheme: Scheme
    seed: int | None
    values: dict[str, float]

    def text(self, sweep: str, versions: Mapping[str, str]) -> str:
        """Returns the line, with the versions that computed it.

        Args:
          sweep: Identity of the sweep, which the line's digest tells apart.
          versions: Versions by name.
        """
        scheme = json.loads(self.scheme.to_json())
        own = {
            "configuration": self.configuration,
            "values": {k: _number_out(v) for k, v in self.values.items()},
            "seed": self.seed,
            "scheme": scheme,
            "digest": _line_digest(sweep, self.configuration, self.seed, scheme),
            "versions": dict(versions),
        }
        return json.dumps(own)


def heading(
    function: str,
    names: Sequence[str],
    schemes: Sequence[Scheme],
    seeds: Sequence[int | None],
    data: Any,
) -> Heading:
    """Returns the heading of a sweep, from each configuration's scheme and seed."""
    texts = {id(s): s.to_json(indent=None) for s in schemes}
    rows = (f"{texts[id(s)]} {n}\n" for s, n in zip(schemes, seeds, strict=True))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.encode())
    configurations = len(schemes), digest.hexdigest()
    return Heading(function, tuple(names), *configurations, data_digest(data))


def data_digest(data: Any) -> str:
    """Returns the digest of the arrays of a pytree: paths, shapes, dtypes and bytes.

    Of an array of which this process has a part alone, the bytes do not count.
    """
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(data)[0]:
        dtype = jax.dtypes.result_type(x)
        digest.update(f"{jax.tree_util.keystr(path)} {dtype} {np.shape(x)}\n".encode())
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
            own = jax.random.key_data(x) if is_key else x
            digest.update(np.asarray(own).tobytes())
    return digest.hexdigest()


def _line_digest(sweep: str, place: int, seed: int | None, scheme: Any) -> str:
    """Returns the digest of a line: of its sweep, place, seed and scheme."""
    text = json.dumps([sweep, place, seed, scheme], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def own_path(path: str | os.PathLike[str], process: int) -> pathlib.Path:
    """Returns the file of a process: ``sweep.jsonl``, ``sweep.1.jsonl``."""
    found = pathlib.Path(path)
    return found if not process else found.with_suffix(f".{process}{found.suffix}")


def all_paths(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Returns the files of all processes that are there."""
    found = pathlib.Path(path)
    others = found.parent.glob(f"{_escaped(found.stem)}.*{found.suffix}")
    is_number = lambda p: p.name[len(found.stem) + 1 :].split(".")[0].isdigit()
    return [p for p in (found, *sorted(filter(is_number, others))) if p.exists()]


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def read_heading(path: pathlib.Path) -> Heading | None:
    """Returns the first line of a file; None if it is none of a sweep."""
    try:
        for _, line in _whole_lines(path):
            return _heading_in(json.loads(line))
    except (KeyError, TypeError, ValueError):
        pass
    return None


def read_records(
    paths: Iterable[Any], wanted: Expected | None = None
) -> tuple[Heading, dict[int, Record]]:
    """Reads and joins the files of one sweep.

    A last line that is cut, as of a process that was killed, is left out.

    Args:
      paths: The files.
      wanted: The sweep; None if it is not known.

    Returns:
      The heading, and the records by the place of their configuration.

    Raises:
      ValueError: for a file that is none of a sweep, of two sweeps, or broken in the
        middle, with its line; for a record that is not of ``wanted``.
    """
    first: Heading | None = None
    found: dict[int, Record] = {}
    for path in map(pathlib.Path, paths):
        own, records = _read(path, wanted)
        if own is None:
            continue
        if first is not None:
            check_same(path, own, first)
        first = first or own
        found |= records
    if first is None:
        raise ValueError("The files hold no line of a sweep.")
    return first, found


def check_same(path: Any, found: Heading, wanted: Heading) -> None:
    """Raises for the file of another sweep, naming what differs."""
    if found == wanted:
        return
    pairs = zip(Heading._fields, found, wanted, strict=True)
    name, a, b = next(p for p in pairs if p[1] != p[2])
    others = {"digest": "schemes or seeds", "data": "arrays"}
    what = f"its {others[name]} are others" if name in others else f"{a} for {b}"
    raise ValueError(
        f"{os.fspath(path)} is the file of another sweep: {name}: {what}. Choose "
        "another path, or delete the file."
    )


class Writer:
    """A file of a sweep that is open for more records."""

    def __init__(self, path: pathlib.Path, own: Heading):
        self.path, self.versions, self.sweep = path, versions(), own.identity
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path)
        self._file: IO[str] = open(path, "a", encoding="utf-8")
        if not path.stat().st_size:
            self._write([own.text()])

    def append(self, records: Iterable[Record]) -> None:
        """Appends records, which a process that is killed afterwards leaves."""
        self._write(record.text(self.sweep, self.versions) for record in records)

    def _write(self, lines: Iterable[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; what it holds is on disk then."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def versions() -> dict[str, str]:
    """Returns the versions that results depend on."""
    try:
        own = metadata.version("qjax")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "qjax": own,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": jax.default_backend(),
    }


def _read(
    path: pathlib.Path, wanted: Expected | None
) -> tuple[Heading | None, dict[int, Record]]:
    found: dict[int, Record] = {}
    own: Heading | None = None
    for number, line in _whole_lines(path):
        try:
            data = json.loads(line)
            if own is None:
                own = _heading_in(data)
                continue
            record = _record_in(data, own)
            if wanted is not None and wanted.heading == own:
                _check_record(record, data["scheme"], wanted)
            _check_digest(data, own)
        except (KeyError, TypeError, ValueError) as error:
            what = "no file of a sweep" if own is None else "broken"
            raise ValueError(
                f"{path}, line {number}: {what} ({type(error).__name__}: {error}). "
                "Choose another path, or delete the file."
            ) from error
        found[record.configuration] = record
    return own, found


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that end, by number; a line that is cut is none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield number, line


def _cut(path: pathlib.Path) -> None:
    """Takes a last line without its end away."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)


def _heading_in(data: Mapping[str, Any]) -> Heading:
    if data["file"] != _FORMAT:
        raise ValueError(f"the format is {data['file']!r}, known is {_FORMAT!r}")
    fields = {name: data[name] for name in Heading._fields}
    return Heading(**{**fields, "names": tuple(fields["names"])})


def _record_in(data: Mapping[str, Any], own: Heading) -> Record:
    values = {name: _number_in(data["values"][name]) for name in own.names}
    place, seed = data["configuration"], data["seed"]
    for name, number in (("configuration", place), ("seed", seed)):
        is_whole = isinstance(number, int) and not isinstance(number, bool)
        if not is_whole and (name, number) != ("seed", None):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
    if not 0 <= place < own.configurations:
        raise ValueError(f"configuration {place} of {own.configurations}")
    scheme = Scheme.from_json(json.dumps(data["scheme"]))
    return Record(place, scheme, seed, values)


def _check_record(record: Record, scheme: Any, wanted: Expected) -> None:
    """Raises for a record with another scheme or seed than its place has."""
    place = record.configuration
    known = json.loads(wanted.schemes[place].to_json())
    pairs = {"scheme": (scheme, known), "seed": (record.seed, wanted.seeds[place])}
    for name, pair in pairs.items():
        there, here = (json.dumps(x, sort_keys=True) for x in pair)
        if there != here:
            raise ValueError(f"the {name} of configuration {place} is another")


def _check_digest(data: Mapping[str, Any], own: Heading) -> None:
    """Raises for a line that was not written for this sweep, as it stands."""
    place, rest = data["configuration"], (data["seed"], data["scheme"])
    if data["digest"] != _line_digest(own.identity, place, *rest):
        raise ValueError(
            f"configuration {place} is of another sweep than the first line, or its "
            "scheme or seed was changed"
        )


def _number_out(value: Any) -> Any:
    """Returns a number that JSON has, or the text of one that it has not."""
    own = value.item() if isinstance(value, np.generic) else value
    return own if math.isfinite(own) else str(float(own))


def _number_in(value: Any) -> float:
    if isinstance(value, str):
        if value not in _NOT_FINITE:
            raise ValueError(f"a value must be a number, got {value!r}")
        return float(value)
    if not isinstance(value, int | float):
        raise TypeError(f"a value must be a number, got {value!r}")
    return value
