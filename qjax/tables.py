"""Text forms of objects: chosen fields, tables for terminals and notebooks."""

import dataclasses
import functools
import html
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Row = Sequence[object]


class Markup(str):
    """A cell that is HTML already."""


def show_fields(obj: Any, always: Collection[str] = ()) -> str:
    """Returns ``Class(field=value, ...)`` of a dataclass without default values.

    Args:
      obj: The object.
      always: Fields that are shown whatever they hold.

    Returns:
      One line; functions by their names.
    """
    found = []
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if field.name in always or not _is_same(value, field.default):
            found.append(f"{field.name}={show(value)}")
    return f"{type(obj).__name__}({', '.join(found)})"


def show(value: Any) -> str:
    """Returns the ``repr`` of a value; for a function its name without an address."""
    if isinstance(value, functools.partial):
        return f"partial({show(value.func)})"
    name = getattr(value, "__qualname__", "") if callable(value) else ""
    if name:
        return str(name).rpartition("<locals>.")[2]
    has_own = type(value).__repr__ is not object.__repr__
    return repr(value) if has_own else type(value).__name__


def text_table(head: Row, rows: Sequence[Row]) -> str:
    """Returns rows under a head, the first column to the left, the others right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align: Callable[[int, str], str] = lambda k, cell: (
        cell.ljust(wide[k]) if k == 0 else cell.rjust(wide[k])
    )
    return "\n".join(
        " ".join(align(k, cell) for k, cell in enumerate(row)).rstrip() for row in cells
    )


def html_table(head: Row, rows: Sequence[Row]) -> str:
    """Returns rows under a head as HTML, which notebooks show."""
    line = lambda tag, row: (
        "<tr>" + "".join(f"<{tag}>{_markup(cell)}</{tag}>" for cell in row) + "</tr>"
    )
    body = "".join(line("td", row) for row in rows)
    head_line = line("th", head)
    return f"<table><thead>{head_line}</thead><tbody>{body}</tbody></table>"


def _markup(cell: object) -> str:
    return cell if isinstance(cell, Markup) else html.escape(str(cell))


def show_types(shapes: Sequence[Any]) -> str:
    """Returns ``float32[8,5], int8[8]`` for values with a shape and a dtype."""
    form = lambda x: f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"
    return ", ".join(map(form, shapes))


def _is_same(a: Any, b: Any) -> bool:
    """Returns whether a value is a default; arrays and tracers are not."""
    try:
        return a is b or bool(a == b)
    except Exception:
        return False
