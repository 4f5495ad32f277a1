"""Figures of prices by layer, and of the roofline of a machine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.costs.layers import Layers
from qjax.costs.rooflines import Machine, roofline
from qjax.costs.tables import PriceTable

_INK, _BAR, _MEMORY = "#333333", "#4477aa", "#cc6677"
_MOST = 40  # Rows that can be told apart.


def draw_prices(table: PriceTable, prices: Sequence[str] = ()) -> Any:
    """Draws prices by layer, a panel a price.

    Args:
      table: Prices with values, of one scheme.
      prices: Names of the prices; all by default.

    Returns:
      A figure of matplotlib: ``figure.savefig("costs.png")``. Of more than 40 layers
      the 40 that cost most in the first panel are drawn, in their order.

    Raises:
      ImportError: without matplotlib, the extra ``plot``.
      KeyError: for a price that the table does not have.
      ValueError: for a table without layers or prices.
    """
    figures = _matplotlib()
    names = tuple(prices) or tuple(table.columns)
    columns = [np.asarray([*table[name].values()], np.float64) for name in names]
    if not columns or not table.names:
        raise ValueError("There is nothing to draw: no layer, or no price.")
    kept = np.sort(np.argsort(-columns[0], kind="stable")[:_MOST])
    figure, panels = _panels(figures, [table.names[k] for k in kept], len(names))
    for panel, name, values in zip(panels, names, columns, strict=True):
        panel.barh(np.arange(len(kept)), values[kept], color=_BAR, height=0.7)
        is_largest = name == "accumulator_bits"
        end = f"{values.sum():,.4g} in all"
        end = f"at most {values.max():,.4g}" if is_largest else end
        _title(panel, f"{name.replace('_', ' ')}\n{end}")
    return figure


def draw_roofline(layers: Layers, machine: Machine, *, batch: int = 1) -> Any:
    """Draws the operations a byte of each layer with products, and its least time.

    Args:
      layers: Layers of known bits.
      machine: The machine.
      batch: Examples that share one reading of the weights.

    Returns:
      A figure of matplotlib. Left of the line, at `Machine.ridge`, a layer waits for
      memory; right of it, for arithmetic. Of more than 40 layers the 40 that take
      longest are drawn, in their order.

    Raises:
      ImportError: without matplotlib, the extra ``plot``.
      ValueError: for a model without products.
    """
    figures = _matplotlib()
    times = roofline(layers, machine, batch=batch)
    rows = [(name, own) for name, own in times.items() if own.operations]
    if not rows:
        raise ValueError("There is nothing to draw: no layer has products.")
    slow = sorted(rows, key=lambda row: -float(row[1].seconds))[:_MOST]
    kept = {name for name, _ in slow}
    labels, own = zip(*(row for row in rows if row[0] in kept), strict=True)
    colors = [_MEMORY if time.is_memory_bound else _BAR for time in own]
    figure, (left, right) = _panels(figures, labels, 2)
    y = np.arange(len(labels))
    left.scatter([float(time.intensity) for time in own], y, c=colors, s=24, zorder=3)
    left.axvline(machine.ridge, color=_INK, linewidth=1, linestyle="--")
    left.set_xscale("log")
    _title(left, f"operations a byte\nmemory-bound below {machine.ridge:,.4g}")
    microseconds = [1e6 * float(time.seconds) for time in own]
    right.barh(y, microseconds, color=colors, height=0.7)
    _title(right, f"least microseconds\n{sum(microseconds):,.4g} in all")
    return figure


def _title(panel: Any, text: str) -> None:
    panel.set_title(text, fontsize=9, color=_INK)


def _panels(figures: Any, labels: Sequence[str], count: int) -> tuple[Any, Any]:
    """Returns a figure with panels beside each other that share labeled rows."""
    wide = 1.5 + 2.6 * count + 0.09 * max(map(len, labels))
    size = (wide, 1.2 + 0.24 * len(labels))
    figure = figures.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.tick_params(labelsize=8, colors=_INK)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(np.arange(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure, panels


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "A figure needs matplotlib: install the extra `plot`, "
            "`pip install qjax[plot]`."
        ) from error
    return matplotlib.figure
