"""Figures of a page as SVG: histograms of integers, the graph."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from qjax.graph.graph import Graph, Node
from qjax.tables import show_types

_BARS = 64  # Most bars of a histogram.
_WIDE, _TALL = 192, 32  # Of a histogram, pixels.
_STEP, _LEFT, _BOX = 30, 8, 520  # Of the graph: row, margin, width of a box.


def histogram(codes: np.ndarray, low: int, high: int) -> str:
    """Draws how often the integers from ``low`` to ``high`` occur.

    Args:
      codes: Integers.
      low: Least integer of the axis.
      high: Largest integer of the axis.

    Returns:
      An ``svg`` element; each bar says its integers and their count on hovering.
    """
    width = -(-(high - low + 1) // _BARS)  # Integers a bar.
    count = -(-(high - low + 1) // width)
    places = (codes.astype(np.int64).reshape(-1) - low) // width
    found = np.bincount(np.clip(places, 0, count - 1), minlength=count)
    most, step = max(int(found.max(initial=0)), 1), _WIDE / count
    bars = []
    for k, n in enumerate(found.tolist()):
        first = low + k * width
        last = min(first + width - 1, high)
        name = f"{first}" if first == last else f"{first} to {last}"
        tall = _TALL * n / most
        bars.append(
            f'<rect x="{k * step:.2f}" y="{_TALL - tall:.2f}" width="{step * 0.9:.2f}" '
            f'height="{tall:.2f}"><title>{name}: {n}</title></rect>'
        )
    head = f'<svg class="bars" viewBox="0 0 {_WIDE} {_TALL}" role="img">'
    return head + "".join(bars) + "</svg>"


def drawing(graph: Graph) -> str:
    """Draws the operations of a graph from the top down, with what each reads.

    Args:
      graph: Any graph; those inside of its nodes are named only.

    Returns:
      An ``svg`` element.
    """
    rows: list[tuple[str, str, str]] = [
        ("input", "", _type(graph, [v])) for v in graph.inputs
    ]
    row_of = {v: k for k, v in enumerate(graph.inputs)}
    edges = []
    for node in graph.nodes:
        place = len(rows)
        edges += [(row_of[v], place) for v in dict.fromkeys(node.inputs)]
        row_of.update(dict.fromkeys(node.outputs, place))
        rows.append((_name(node), node.path, _type(graph, node.outputs)))
    for v in graph.outputs:
        edges.append((row_of[v], len(rows)))
        rows.append(("output", "", _type(graph, [v])))
    lanes = _lanes(edges)
    right = _LEFT + _BOX
    wide = right + 10 * (1 + max(lanes.values(), default=0)) + 10
    parts = [_edge(pair, lanes.get(pair)) for pair in edges]
    parts += [_box(k, *row) for k, row in enumerate(rows)]
    size = f'viewBox="0 0 {wide} {len(rows) * _STEP + 8}" width="{wide}"'
    return f'<svg class="graph" {size} role="img">{"".join(parts)}</svg>'


def _name(node: Node) -> str:
    below = f" ({', '.join(node.graphs)} below)" if node.graphs else ""
    return node.operation + below


def _type(graph: Graph, values: Sequence[int]) -> str:
    return show_types([graph.values[v] for v in values])


def _lanes(edges: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], int]:
    """Returns the lane beside the boxes of each edge that passes a row."""
    ends: list[int] = []  # Row in which each lane is free again.
    found = {}
    for first, last in sorted({pair for pair in edges if pair[1] - pair[0] > 1}):
        free = next((k for k, end in enumerate(ends) if end <= first), len(ends))
        ends[free:] = [last, *ends[free + 1 :]]
        found[first, last] = free
    return found


def _edge(pair: tuple[int, int], lane: int | None) -> str:
    top, bottom = (_STEP * k + _STEP / 2 + 4 for k in pair)
    if lane is None:
        x = _LEFT + 24
        ends = f"M{x} {top} L{x} {bottom}"
    else:
        edge, x = _LEFT + _BOX, _LEFT + _BOX + 10 * (lane + 1)
        ends = f"M{edge} {top} H{x} V{bottom} H{edge}"
    return f'<path d="{ends}"/>'


def _box(row: int, name: str, path: str, kind: str) -> str:
    y = _STEP * row + 5
    text = (
        f'<text x="{_LEFT + 8}" y="{y + 15}"><tspan class="name">{html.escape(name)}'
        f'</tspan> <tspan class="path">{html.escape(path)}</tspan></text>'
        f'<text class="kind" x="{_LEFT + _BOX - 8}" y="{y + 15}">{html.escape(kind)}'
        "</text>"
    )
    rest = f'y="{y}" width="{_BOX}" height="{_STEP - 8}" rx="4"/>'
    return f'<g><rect x="{_LEFT}" {rest}{text}</g>'
