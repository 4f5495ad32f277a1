"""Writes the certificate, the graph and statistics of a program as one page."""

import html
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from qjax.formats.html.figures import drawing, histogram
from qjax.formats.support import check_whole
from qjax.graph import reference
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Value
from qjax.graph.packing import nbytes, stored_bits
from qjax.leaves import arguments_of
from qjax.program import IntegerProgram
from qjax.tables import Markup, Row, html_table

_MOST_ROWS = 400  # Rows of a table, beyond which it says how many there are.


def write_html(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "Integer program",
    inputs: Any = None,
    tables: Iterable[tuple[str, str]] = (),
) -> bytes:
    """Writes a page on a program: ends, certificate, parameters, statistics, graph.

    The page is whole: styles and figures stand in it, nothing is fetched, no script
    runs.

    Args:
      program: The program.
      path: Path, replaced once the page is complete; None to write none.
      title: Title of the page.
      inputs: Real inputs, a tuple of arguments or the only one, of whose codes at each
        quantization point the page has statistics; None for none.
      tables: Further sections: a heading, and HTML.

    Returns:
      The page.

    Raises:
      ValueError: if something of the program stays in float; for inputs of other
        shapes. Nothing is written then.
      OSError: if the file cannot be written. An old one stays as it was.
    """
    check_whole(program)
    report = program.report()
    sites = [*report.agreement.values()]
    proven = sum(own.is_proven for own in sites)
    lines = [
        ("operations", len([n for _, g in program.graph.walk() for n in g.nodes])),
        ("bytes of parameters", f"{report.nbytes:,}"),
        ("floating-point values", ", ".join(report.float_values) or "none"),
        ("accumulator bits, most", max((o.bits for o in report.overflow), default=0)),
        ("sites proven equal", f"{proven} of {len(sites)}"),
    ]
    sections = [
        ("Summary", html_table(("", ""), lines)),
        ("Inputs and outputs", _ends(program)),
        ("Accumulators", _accumulators(program, report)),
        ("Agreement with the fake-quantized model", _agreement(report)),
        ("Parameters", _parameters(program)),
    ]
    if inputs is not None:
        sections.append(("Codes of the given inputs", _statistics(program, inputs)))
    sections += tables
    for place, graph in program.graph.walk():
        sections.append((f"Graph: {place}" if place else "Graph", drawing(graph)))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    data = _page(title, notes, sections).encode()
    if path is not None:
        write_atomically(path, data)
    return data


def _page(title: str, notes: str, sections: Sequence[tuple[str, str]]) -> str:
    head = html.escape(title)
    body = "".join(
        f"<details open><summary>{html.escape(name)}</summary>"
        f'<div class="wide">{text}</div></details>'
        for name, text in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{head}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{head}</h1>{notes}{body}</body></html>\n"
    )


def _ends(program: IntegerProgram) -> str:
    values = program.graph.values
    named = zip(program.input_names, program.graph.inputs, strict=True)
    rows = [_end(name, values[v]) for name, v in named]
    rows += [
        _end(f"output {k}", values[v]) for k, v in enumerate(program.graph.outputs)
    ]
    return html_table(("", "type", "shape", "codes", "scale", "zero point"), rows)


def _end(name: str, v: Value) -> Row:
    ends = f"{v.low} to {v.high}"
    if v.grid is None:
        return name, v.dtype, list(v.shape), ends, "", ""
    return name, v.dtype, list(v.shape), ends, _range(v.grid.array()), v.zero_point


def _range(x: np.ndarray) -> str:
    """Returns a number, or the least and the largest of several."""
    if not x.size:
        return ""
    low, high = f"{x.min():.6g}", f"{x.max():.6g}"
    return low if low == high else f"{low} to {high}"


def _accumulators(program: IntegerProgram, report: Any) -> str:
    rows = [
        (f"{o.path} {o.place}".rstrip(), o.bits, o.low.min(), o.high.max())
        for o in report.overflow
    ]
    return _table(("accumulator", "bits", "least", "largest"), rows)


def _agreement(report: Any) -> str:
    bound = lambda own: "not bounded" if own.most is None else own.most
    rows = [
        (name, "proven" if own.is_proven else "bounded", bound(own), own.reason)
        for name, own in report.agreement.items()
    ]
    return _table(("site", "", "most codes apart", "reason"), rows)


def _parameters(program: IntegerProgram) -> str:
    rows: list[Row] = []
    for name, array in program.params.items():
        x = np.asarray(array)
        grid = program.graph.grids.get(name)
        ends = (int(x.min()), int(x.max())) if x.size else (0, 0)
        scale = "" if grid is None else _range(grid.array())
        size = list(x.shape), stored_bits(x), f"{nbytes(x):,}"
        figure = Markup(histogram(x, *ends) if x.size > 1 else "")
        rows.append((name, *size, *ends, scale, figure))
    head = "parameter", "shape", "bits", "bytes", "least", "largest", "scale", "codes"
    return _table(head, rows)


def _statistics(program: IntegerProgram, inputs: Any) -> str:
    """Returns the codes of inputs at each quantization point, as a table."""
    arguments = arguments_of(inputs, program.input_tree)
    codes = [*map(np.asarray, jax.tree.leaves(program.quantize_inputs(*arguments)))]
    params = {name: np.asarray(p) for name, p in program.params.items()}
    found: dict[str, np.ndarray] = {}
    reference.run(program.graph, params, codes, found)
    values = {
        name: graph.values[v]
        for _, graph in program.graph.walk()
        for name, v in graph.sites.items()
    }
    rows: list[Row] = []
    for name, q in found.items():
        v = values[name]
        at_ends = float(np.mean((q == v.low) | (q == v.high))) if q.size else 0.0
        used = len(np.unique(q))
        ends = (int(q.min()), int(q.max())) if q.size else (0, 0)
        figure = Markup(histogram(q, v.low, v.high))
        own = f"{v.low} to {v.high}", *ends, used, f"{at_ends:.2%}"
        rows.append((name, *own, figure))
    head = "site", "range", "least", "largest", "levels used", "at the ends", "codes"
    return _table(head, rows)


def _table(head: Row, rows: Sequence[Row]) -> str:
    """Returns a table; of a long one the first rows, and how many are left."""
    left = len(rows) - _MOST_ROWS
    more = f"<p>and {left} more rows</p>" if left > 0 else ""
    return html_table(head, rows[:_MOST_ROWS]) + more


_STYLE = """
:root { color-scheme: light dark; --line: #8885; --bar: #2a6fb0; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; }
summary { font-size: 1.1rem; font-weight: 600; margin: 1rem 0 .4rem; cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
svg.bars { width: 192px; height: 32px; fill: var(--bar); }
svg.graph rect { fill: Canvas; stroke: var(--line); }
svg.graph path { fill: none; stroke: currentColor; opacity: .45; }
svg.graph text { font-size: 12px; fill: currentColor; }
svg.graph .name { font-weight: 600; }
svg.graph .path { opacity: .7; }
svg.graph .kind { text-anchor: end; opacity: .7; }
"""
