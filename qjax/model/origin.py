"""The place in the user's code of an equation, for error messages."""

import os
import sysconfig
from typing import Any, NamedTuple

import jax

_JAX = os.path.dirname(jax.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(k) + os.sep for k in ("purelib", "platlib")})


class Origin(NamedTuple):
    """The place of an equation in source code.

    Attributes:
      place: The line of the user's own code, ``model.py:12``; empty if unknown.
      function: The function around that line.
      library: The layer or function of a library that was called there, with its
        package: ``flax LayerNorm``; empty if the equation is the user's own.
    """

    place: str = ""
    function: str = ""
    library: str = ""


def origin_of(source: Any) -> Origin:
    """Reads the place of an equation in source code.

    Args:
      source: ``source_info`` of the equation, or None.

    Returns:
      The place; empty where the tracer knew none.
    """
    traceback = getattr(source, "traceback", None)
    library = ""
    for frame in getattr(traceback, "frames", ()):
        name, function = frame.file_name, frame.function_name
        if name.startswith((_JAX, _HERE)) or name.startswith("<frozen"):
            continue
        folder = next((f for f in _LIBRARIES if name.startswith(f)), "")
        if not folder:
            place = f"{os.path.basename(name)}:{frame.line_num}"
            return Origin(place, function, library)
        package = name.removeprefix(folder).partition(os.sep)[0]
        if not library or function.endswith(".__call__"):
            called = function.partition(".__call__")[0].rpartition(".<locals>.")[2]
            library = f"{package} {called}"
    return Origin("", "", library)
