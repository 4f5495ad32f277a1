"""Sensitivities: what fewer bits at a site do to a loss, measured one at a time."""

import dataclasses
import glob
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.table
import rich.text

from qjax.quantized_model import QuantizedModel
from qjax.schemes.patterns import matches
from qjax.schemes.rules import speaks_of_bias
from qjax.schemes.scheme import Scheme
from qjax.search.execution import ALONE, Execution, traced_numbers
from qjax.search.grids import Axes, Axis, grid, one_at_a_time
from qjax.search.sweeps import sweep
from qjax.tables import html_table, show, text_table

MEASURED = "measured"  # The method whose scores are differences of losses.


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """Scores of each number of bits on each axis: arrays of one entry a row.

    ``print`` shows a table of axes by bits.

    Attributes:
      axes: The axes: sites, or groups of sites that have the same bits.
      places: Place of the axis of each row in ``axes``.
      bits: Bits of the axis in each row.
      scores: Score of each row, in the unit of the method; NaN where there is none.
      schemes: Scheme of each row, with all other axes at their first bits.
      start: Loss that the scores are counted from: of the first bits of all axes where
        it is measured, else of the float model.
      method: "measured", "gradient" or "Hessian".
      evaluations: Kind of an evaluation -> number of them that was spent: "losses",
        "gradients", "Hessian products", each on one batch.
      base: Scheme or model that the axes were given for.
    """

    axes: tuple[Axis, ...]
    places: np.ndarray
    bits: np.ndarray
    scores: np.ndarray
    schemes: tuple[Scheme, ...]
    start: float
    method: str
    evaluations: Mapping[str, int]
    base: Scheme | QuantizedModel = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, axis: Axis) -> dict[int, float]:
        """Returns the score of an axis by bits.

        Raises:
          KeyError: for another axis.
        """
        if axis not in self.axes:
            known = ", ".join(map(str, self.axes))
            raise KeyError(f"There is no axis {axis!r}. The axes are: {known}.")
        rows = np.flatnonzero(self.places == self.axes.index(axis))
        return {int(self.bits[k]): float(self.scores[k]) for k in rows}

    def table(self) -> rich.table.Table:
        """Returns the table of `rich`: a row for each axis, a column for each bits."""
        head, rows = self._rows()
        table = rich.table.Table(title=self._title())
        for k, name in enumerate(head):
            table.add_column(name, justify="right" if k else "left")
        for row in rows:
            table.add_row(*map(rich.text.Text, row))
        return table

    def _title(self) -> str:
        spent = ", ".join(f"{n} {kind}" for kind, n in self.evaluations.items())
        return f"{self.method}, from {self.start:.6g}: {spent}"

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        widths = sorted({*map(int, self.bits)}, reverse=True)
        rows = []
        for axis in self.axes:
            own = self[axis]
            cells = [f"{own[b]:.4g}" if b in own else "" for b in widths]
            rows.append([axis_text(axis), *cells])
        return ["axis", *(f"{b} bits" for b in widths)], rows

    def __rich__(self) -> rich.table.Table:
        return self.table()

    def __str__(self) -> str:
        return f"{self._title()}\n{text_table(*self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(*self._rows())


def axis_text(axis: Axis) -> str:
    """Returns the text of an axis."""
    if isinstance(axis, tuple):
        return ", ".join(axis)
    return axis if isinstance(axis, str) else show(axis)


def sensitivity(
    fn: Callable[..., Any],
    base: Scheme | QuantizedModel,
    axes: Axes | Sequence[int],
    *data: Any,
    execution: Execution = "auto",
    path: Any = None,
    progress: bool | None = None,
) -> Sensitivities:
    """Measures the loss with one axis at a time at each of its bits, in one compile.

        score[axis, bits] = fn(axis at bits, others at their first) - fn(all at first)

    Args:
      fn: ``fn(scheme, *data)``, which returns the loss, one number: of a `sweep`.
      base: As in `grid`.
      axes: Bits by axis, as in `grid`. The first bits of each axis are the point to
        start from. A sequence of bits stands for those bits at each site alone that
        has a word with bits, of a model.
      *data: Pytrees of arrays.
      execution: Way to run them, as in `sweep`.
      path: File of results, with which an interrupted run goes on, as in `sweep`.
      progress: Whether a bar is shown, as in `sweep`.

    Returns:
      The scores. Where the loss was NaN the score is.

    Raises:
      TypeError, ValueError: as `sweep` and `one_at_a_time`; for a function that returns
        several numbers, and a loss at the start that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> axes = {"a/kernel": [8, 4, 2], "b/kernel": [8, 4]}
      >>> bits = lambda s, k: jnp.float32(s.rules[k].bits)
      >>> fn = lambda s: 4.0 ** -bits(s, 0) + 2.0 ** -bits(s, 1)
      >>> found = sensitivity(fn, Scheme(), axes)
      >>> found["b/kernel"], dict(found.evaluations)
      ({8: 0.0, 4: 0.05859375}, {'losses': 4})
    """
    own = as_axes(base, axes)
    schemes = one_at_a_time(base, own)
    results = sweep(
        lambda scheme, *rest: one_number(fn(scheme, *rest)),
        schemes,
        *data,
        execution=execution,
        path=path,
        name=show(fn),
        progress=progress,
    )
    losses = results[ALONE].astype(np.float64)
    if not np.isfinite(losses[0]):
        raise ValueError(
            f"The loss of the starting point, {schemes[0]}, is {losses[0]}: no "
            "difference to it means anything. Start from more bits, first on each axis."
        )
    # The starting point stands for the first bits of each axis.
    rows: list[int] = []
    for bits in own.values():
        after = max(rows, default=0) + 1
        rows += [0, *range(after, after + len(bits) - 1)]
    scores = losses[rows] - losses[0]
    spent = {"losses": len(schemes)}
    return make_sensitivities(base, own, scores, float(losses[0]), MEASURED, spent)


def as_axes(base: Scheme | QuantizedModel, axes: Any) -> dict[Axis, list[int]]:
    """Returns the bits of axes; of a sequence of bits: at each site alone."""
    if isinstance(axes, Mapping):
        return dict(axes)
    is_bits = isinstance(axes, Sequence | np.ndarray) and not isinstance(axes, str)
    if not is_bits or not isinstance(base, QuantizedModel):
        raise TypeError(
            "`axes` must be a mapping such as {'*/kernel': [8, 4, 2]}, or, of a "
            f"quantized model, bits for each of its sites, [8, 4, 2]; got {show(axes)}."
        )
    names = [site.name for site in base.sites]
    own = [n for n in names if hasattr(base.choices.sites[n].word, "bits")]
    alone = lambda name: sum(matches(other, name) for other in names) == 1
    return {n if alone(n) else glob.escape(n): [*axes] for n in own}


def sites_of(qmodel: QuantizedModel, axes: Axes) -> list[list[str]]:
    """Returns the names of the sites, and biases, whose bits each axis decides."""
    scheme = grid(qmodel, {axis: bits[:1] for axis, bits in axes.items()})[0]
    found: list[list[str]] = [[] for _ in axes]
    for site in qmodel.sites:
        rule = scheme.bits_rule(site)
        if rule is not None and scheme.word(site) is not None:
            place = next((k for k in range(len(axes)) if scheme.rules[k] is rule), None)
            if place is not None:
                found[place].append(site.name)
    for bias in qmodel.biases:
        speaks = (k for k, r in enumerate(scheme.rules) if speaks_of_bias(r, bias))
        place = next(speaks, len(axes))
        if place < len(axes):
            found[place].append(bias.name)
    return found


def make_sensitivities(
    base: Scheme | QuantizedModel,
    axes: Mapping[Axis, Sequence[int]],
    scores: Any,
    start: float,
    method: str,
    spent: Mapping[str, int],
) -> Sensitivities:
    """Makes sensitivities of the scores of all bits of all axes, in order."""
    first = {axis: [bits[0]] for axis, bits in axes.items()}
    points = [(k, axis, b) for k, (axis, own) in enumerate(axes.items()) for b in own]
    return Sensitivities(
        axes=tuple(axes),
        places=np.asarray([k for k, *_ in points], np.int64),
        bits=np.asarray([bits for *_, bits in points], np.int64),
        scores=np.asarray(scores, np.float64),
        schemes=tuple(grid(base, {**first, axis: [b]})[0] for _, axis, b in points),
        start=start,
        method=method,
        evaluations=dict(spent),
        base=base,
    )


def one_number(found: Any) -> jax.Array:
    """Returns the loss that a function returns; raises unless it is one number."""
    numbers = traced_numbers(found)
    if len(numbers) > 1:
        raise ValueError(
            "A sensitivity is that of one number, the loss; the function returns "
            f"{', '.join(numbers)}. Return one of them."
        )
    return next(iter(numbers.values()))
