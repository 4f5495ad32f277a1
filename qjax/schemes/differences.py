"""The first difference of two schemes that is none of their bits."""

import dataclasses
from typing import Any

import numpy as np

from qjax.tables import show


def difference(path: str, found: Any, wanted: Any) -> str:
    """Returns where two schemes differ in more than bits.

    Args:
      path: Path of both in their schemes, "" for whole ones.
      found: A scheme, or a part of one.
      wanted: The same part of another one.

    Returns:
      ``"weights.narrow_range: False for True."``, or "".
    """
    if type(found) is not type(wanted) and not _are_numbers(found, wanted):
        return f"{path}: {show(found)} for {show(wanted)}."
    if dataclasses.is_dataclass(found):
        return _first(_of_field(path, field, found, wanted) for field in _fields(found))
    if isinstance(found, tuple) and not hasattr(found, "_fields"):
        if len(found) != len(wanted):
            return f"{path}: {len(found)} for {len(wanted)} of them."
        pairs = enumerate(zip(found, wanted, strict=True))
        return _first(difference(f"{path}[{k}]", a, b) for k, (a, b) in pairs)
    if _are_numbers(found, wanted) and np.shape(found) != np.shape(wanted):
        return f"{path}: shape {np.shape(found)} for {np.shape(wanted)}."
    return ""


def _of_field(path: str, field: Any, found: Any, wanted: Any) -> str:
    """Returns where a field differs: its value if it is static, else inside of it."""
    inner = f"{path}.{field.name}" if path else field.name
    a, b = getattr(found, field.name), getattr(wanted, field.name)
    is_plain = isinstance(a, str | bool | None) or isinstance(b, str | bool | None)
    if field.metadata.get("static") or is_plain:
        return "" if a is b or a == b else f"{inner}: {show(a)} for {show(b)}."
    return difference(inner, a, b)


def _first(texts: Any) -> str:
    return next(filter(None, texts), "")


def _fields(found: Any) -> Any:
    return dataclasses.fields(found)


def _are_numbers(*values: Any) -> bool:
    """Returns whether values are numbers or arrays, known or traced."""
    return all(
        isinstance(x, int | float) or hasattr(x, "dtype") for x in values
    ) and not any(isinstance(x, bool) for x in values)
