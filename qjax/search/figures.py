"""A figure of a sweep: all configurations, and the front of them."""

import os
from typing import Any

import numpy as np

from qjax.search.results import Results, pareto

_GREY, _ACCENT, _INK = "#9aa5b1", "#c2410c", "#1f2933"
_MOST_LABELS = 12


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

    Points of the front bear the bits of their axes, in the order of the legend.

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
    _write_bits(axes, front, results, (x, y), x in up)
    _dress(axes, results, is_finite, (x, y), up)
    axes.set_title(title or f"{len(results)} configurations", loc="left", color=_INK)
    if path:
        figure.savefig(path, dpi=160)
    return figure


def _write_bits(
    axes: Any, front: Results, results: Results, names: tuple[str, str], is_left: bool
) -> None:
    """Writes the bits of its axes beside each point of the front, if they are few."""
    columns = [v for name, v in results.axes.items() if name not in names]
    if not columns or len(front) > _MOST_LABELS or len(columns) > 6:
        return
    rows = {int(place): k for k, place in enumerate(results.places)}
    for place, x, y in zip(front.places, front[names[0]], front[names[1]], strict=True):
        bits = "/".join(str(column[rows[int(place)]]) for column in columns)
        axes.annotate(
            bits,
            (x, y),
            xytext=(-5 if is_left else 5, 5),
            textcoords="offset points",
            ha="right" if is_left else "left",
            fontsize=8,
            color=_ACCENT,
        )


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
    labels = [name for name in results.axes if name not in names]
    legend = axes.legend(frameon=False, fontsize=8, loc="best")
    if labels and len(labels) <= 6:
        legend.set_title(f"bits of {' / '.join(labels)}", prop={"size": 8})
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
