"""A figure of a sweep: all configurations, and the front of them."""

import os
from typing import Any

import numpy as np

from qjax.search.results import Results, pareto

_GREY, _ACCENT, _INK = "#9aa5b1", "#c2410c", "#1f2933"
_MOST_AXES = 6  # Whose bits are written.
_WIDE, _TALL = 8.0, 13.0  # Of a digit and a line, pixels.


def draw_front(
    results: Results,
    x: str,
    y: str,
    *,
    maximize: tuple[str, ...] | str = (),
    path: str | os.PathLike[str] = "",
    title: str = "",
) -> Any:
    """Draws two numbers of all configurations, and the front that none beats.

    Points of the front bear the bits of their axes, in the order of the legend, where
    there is room.

    Args:
      results: Results of a sweep.
      x: Name of the number, or axis, to the right.
      y: Name of the number, or axis, upwards.
      maximize: Those of the two of which more is better.
      path: File to save it to, of any type that matplotlib writes; "" for none.
      title: Title; "" for the numbers of configurations.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ImportError: without matplotlib, the extra `plot`.
      ValueError: if no configuration has finite numbers, or ``maximize`` is another.
      KeyError: for a name that is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`draw_front` needs matplotlib: pip install 'qjax[plot]'."
        ) from error
    up = (maximize,) if isinstance(maximize, str) else tuple(maximize)
    if not {*up} <= {x, y}:
        raise ValueError(f"`maximize` must name {x!r} or {y!r}, got {maximize!r}.")
    down = tuple(name for name in (x, y) if name not in up)
    front = pareto(results, minimize=down, maximize=up)
    if not len(front):
        raise ValueError(f"No configuration has both a finite {x!r} and {y!r}.")
    front = front.take(np.argsort(front[x], kind="stable"))
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    both = results[x], results[y]
    is_finite = np.isfinite(both[0]) & np.isfinite(both[1])
    others = is_finite & ~np.isin(results.places, front.places)
    axes.scatter(
        both[0][others],
        both[1][others],
        s=22,
        color=_GREY,
        alpha=0.7,
        linewidths=0,
        label=f"{int(others.sum())} others",
        zorder=2,
    )
    axes.plot(
        front[x],
        front[y],
        color=_ACCENT,
        drawstyle="steps-pre" if x in up else "steps-post",
        linewidth=1.4,
        marker="o",
        markersize=5.5,
        label=f"front: {len(front)} of {len(results)}",
        zorder=3,
    )
    _dress(axes, results, is_finite, (x, y), up)
    figure.draw_without_rendering()  # Labels look where points lie.
    _write_bits(axes, front, results, (x, y), up)
    axes.set_title(title or f"{len(results)} configurations", loc="left", color=_INK)
    if path:
        figure.savefig(path, dpi=160)
    return figure


def _write_bits(
    axes: Any,
    front: Results,
    results: Results,
    names: tuple[str, str],
    up: tuple[str, ...],
) -> None:
    """Writes the bits of its axes beside points of the front, where there is room."""
    rows = np.flatnonzero(np.isin(results.places, front.places))
    rows = rows[np.argsort(results[names[0]][rows], kind="stable")]
    columns = [results[name][rows] for name in _shown_axes(results, names)]
    if not columns:
        return
    is_right, is_up = (name in up for name in names)
    offset = (6 if is_right else -6, 4 if is_up else -4)
    places = axes.transData.transform(np.stack([front[name] for name in names], -1))
    last = np.full(2, -np.inf)
    for k, place in enumerate(places):
        width = _WIDE * (2 * len(columns) - 1)
        if abs(place[0] - last[0]) < width and abs(place[1] - last[1]) < _TALL:
            continue
        last = place
        axes.annotate(
            "/".join(str(column[k]) for column in columns),
            (front[names[0]][k], front[names[1]][k]),
            xytext=offset,
            textcoords="offset points",
            ha="left" if is_right else "right",
            va="bottom" if is_up else "top",
            fontsize=8,
            color=_ACCENT,
            zorder=4,
        )


def _shown_axes(results: Results, names: tuple[str, str]) -> list[str]:
    """Returns the axes whose bits points bear; none if there are many."""
    found = [name for name in results.axes if name not in names]
    return found if len(found) <= _MOST_AXES else []


def _dress(
    axes: Any,
    results: Results,
    is_finite: np.ndarray,
    names: tuple[str, str],
    up: tuple[str, ...],
) -> None:
    """Gives the figure its names, scales and legend."""
    better = {True: "more is better", False: "less is better"}
    axes.set_xlabel(f"{names[0]} ({better[names[0] in up]})", color=_INK)
    axes.set_ylabel(f"{names[1]} ({better[names[1] in up]})", color=_INK)
    for name, scale in zip(names, (axes.set_xscale, axes.set_yscale), strict=True):
        own = np.asarray(results[name])[is_finite]
        if own.min() > 0 and own.max() > 50 * own.min():
            scale("log")
    axes.margins(0.07, 0.09)
    axes.grid(True, color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=8, loc="best")
    if labels := _shown_axes(results, names):
        legend.set_title(f"labels: bits of {' / '.join(labels)}", prop={"size": 8})
    if lost := int((~is_finite).sum()):
        axes.annotate(
            f"{lost} without a number",
            (1, -0.01),
            xycoords=("axes fraction", "figure fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#b91c1c",
        )
