"""Results of a sweep: arrays by name, a table, the best, the front."""

import dataclasses
import io
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
import rich.text

from qjax.quantizers.strings import closest
from qjax.schemes.patterns import Where
from qjax.schemes.scheme import Scheme
from qjax.tables import html_table, show

_MOST_ROWS = 40  # Of a table that is printed whole.
Names = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Results:
    """The numbers that a sweep found, an array for each name.

    ``print`` shows a table.

    Attributes:
      schemes: The scheme of each configuration.
      values: Name of a number -> array with one entry for each configuration; of a
        function that returns one number, under ``"value"``.
      seeds: Seed of each configuration; None without seeds.
      places: Place of each configuration in the sweep.
      execution: Way they were run: "vmap", "loop", "shard", "eager", or "file".
    """

    schemes: tuple[Scheme, ...]
    values: Mapping[str, np.ndarray]
    seeds: np.ndarray | None
    places: np.ndarray
    execution: str = "file"

    def __len__(self) -> int:
        return len(self.schemes)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the numbers of a name, or the bits of an axis.

        Raises:
          KeyError: for another name, with the closest.
        """
        if name in self.values:
            return self.values[name]
        known = {**self.axes, **self.values}
        if name not in known:
            raise KeyError(f"There is no {name!r} here. {closest(str(name), known)}")
        return known[name]

    @property
    def axes(self) -> dict[str, np.ndarray]:
        """Returns the bits of rules for bits, and others that differ, by name.

        The name is the pattern of the rule, "weights" or "activations".
        """
        flat = [jax.tree_util.tree_flatten_with_path(s)[0] for s in self.schemes]
        found: dict[str, np.ndarray] = {}
        for k, (path, _) in enumerate(flat[0] if flat else ()):
            column = np.asarray([row[k][1] for row in flat])
            text = jax.tree_util.keystr(path)
            is_axis = text.startswith(".rules") and text.endswith("].bits")
            if is_axis or np.any(column != column[0]):
                name = _label(self.schemes[0], path)
                found[text if name in found else name] = column
        return found

    @property
    def is_finite(self) -> np.ndarray:
        """Returns which configurations gave finite numbers alone."""
        rows = [np.isfinite(v) for v in self.values.values()]
        return np.all(rows, axis=0)

    def take(self, rows: Any) -> "Results":
        """Returns some configurations: places in these results, or truth values."""
        rows = np.arange(len(self))[rows]
        return Results(
            schemes=tuple(self.schemes[k] for k in rows),
            values={name: own[rows] for name, own in self.values.items()},
            seeds=None if self.seeds is None else self.seeds[rows],
            places=self.places[rows],
            execution=self.execution,
        )

    def best(self, name: str = "", *, maximize: bool = False) -> Scheme:
        """Returns the scheme with the least, or the largest, number.

        Args:
          name: Name of the number; may be left out where there is one.
          maximize: Whether the largest is the best.

        Raises:
          ValueError: if no number is finite, or several names are there and none given.
        """
        if not name and len(self.values) > 1:
            raise ValueError(
                f"Which number is it? Name one of {', '.join(self.values)}."
            )
        own = self[name or next(iter(self.values))].astype(np.float64)
        if not np.any(np.isfinite(own)):
            raise ValueError(f"No configuration has a finite {name or 'number'}.")
        own = np.where(np.isfinite(own), -own if maximize else own, np.inf)
        return self.schemes[int(np.argmin(own))]

    def mean(self) -> "Results":
        """Returns the means over seeds, a row for each scheme."""
        if self.seeds is None:
            return self
        texts = [str(scheme) for scheme in self.schemes]
        first = list({text: k for k, text in reversed([*enumerate(texts)])}.values())
        rows = [np.asarray([t == texts[k] for t in texts]) for k in sorted(first)]
        found = self.take(sorted(first))
        means = {
            name: np.asarray([own[mask].mean() for mask in rows])
            for name, own in self.values.items()
        }
        return dataclasses.replace(found, values=means, seeds=None)

    def table(self) -> rich.table.Table:
        """Returns the table of `rich`: a row for each configuration."""
        head, rows = self._rows()
        table = rich.table.Table(title=f"{len(self)} configurations")
        for name in head:
            table.add_column(rich.text.Text(name), justify="right")
        for row, is_fine in zip(rows, self.is_finite, strict=True):
            cells = (rich.text.Text(cell) for cell in row)
            table.add_row(*cells, style=None if is_fine else "red")
        return table

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        columns: dict[str, np.ndarray] = {"#": self.places, **self.axes}
        if self.seeds is not None:
            columns["seed"] = self.seeds
        columns |= self.values
        cells = [[_cell(x) for x in own] for own in columns.values()]
        return [*columns], [[*row] for row in zip(*cells, strict=True)]

    def __rich__(self) -> rich.table.Table:
        return self.table()

    def __str__(self) -> str:
        console = rich.console.Console(file=io.StringIO(), width=200)
        console.print(self.take(slice(_MOST_ROWS)).table() if len(self) else "empty")
        text = console.file.getvalue().rstrip()  # type: ignore[attr-defined]
        left = len(self) - _MOST_ROWS
        return text if left <= 0 else f"{text}\n... and {left} more: `table()`"

    def __repr__(self) -> str:
        names = ", ".join(self.values)
        return f"Results({len(self)} configurations: {names})"

    def _repr_html_(self) -> str:
        return html_table(*self._rows())


def pareto(results: Results, *, minimize: Names = (), maximize: Names = ()) -> Results:
    """Returns the configurations that no other one beats in every respect.

    One beats another if it is at least as good in all numbers and better in one. What
    gave NaN or infinity in one of the numbers is left out.

    Args:
      results: Results of a sweep.
      minimize: Names of numbers, or of axes, of which less is better.
      maximize: Names of those of which more is better.

    Returns:
      The front, by the first of the names.

    Raises:
      ValueError: if no number is named, or one twice.
      KeyError: for a name that is not there.

    Example:
      >>> found = Results(
      ...     schemes=(Scheme(),) * 3,
      ...     values={"loss": np.array([3, 1, 2]), "bytes": np.array([5, 9, 10])},
      ...     seeds=None,
      ...     places=np.arange(3),
      ... )
      >>> pareto(found, minimize=("loss", "bytes")).places
      array([1, 0])
    """
    down, up = ((x,) if isinstance(x, str) else tuple(x) for x in (minimize, maximize))
    if not down + up or len({*down, *up}) < len(down + up):
        raise ValueError(
            "`pareto` needs the names of numbers, each once, such as "
            f"minimize=('loss', 'bytes'); got minimize={down}, maximize={up}."
        )
    columns = [results[name].astype(np.float64) for name in down]
    columns += [-results[name].astype(np.float64) for name in up]
    points = np.stack(columns, axis=-1)
    finite = np.flatnonzero(np.all(np.isfinite(points), axis=1))
    # By all columns in turn: none is beaten by a later one.
    order = finite[np.lexsort(points[finite].T[::-1])]
    front: list[int] = []
    for k in order:
        kept = points[front]
        beats = np.all(kept <= points[k], axis=1) & np.any(kept < points[k], axis=1)
        if not np.any(beats):
            front.append(int(k))
    return results.take(np.asarray(front, np.int64))


def _label(scheme: Scheme, path: Any) -> str:
    """Returns the name of a leaf of a scheme: the pattern of its rule, its role."""
    text = jax.tree_util.keystr(path)
    if text.startswith(".rules"):
        pattern = scheme.rules[path[1].idx].pattern
        is_names = isinstance(pattern, Where) and pattern == Where(name=pattern.name)
        name = pattern.name if is_names and isinstance(pattern, Where) else pattern
        own = ", ".join(name) if isinstance(name, tuple) else name
        own = own if isinstance(own, str) else show(own)
        rest = jax.tree_util.keystr(path[2:]).removeprefix(".spec").lstrip(".")
        return own if rest == "bits" else f"{own} {rest}"
    return text.removeprefix(".").removesuffix(".bits")


def _cell(x: Any) -> str:
    own = x.item() if isinstance(x, np.generic) else x
    return str(own) if isinstance(own, numbers.Integral) else f"{own:.6g}"
