"""A runtime, and a program that is loaded into it."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qjax.backends.native.library import find_library
from qjax.program import IntegerProgram

Codes = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Session:
    """A program loaded into a runtime.

    Attributes:
      run: Input codes -> output codes, flat.
      nbytes: Bytes of what the runtime reads.
      sites: Input codes -> codes by quantization point; None where the runtime keeps
        them to itself.
    """

    run: Callable[[Codes], list[np.ndarray]]
    nbytes: int
    sites: Callable[[Codes], Mapping[str, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A consumer of programs.

    Attributes:
      name: Name in tables and on the command line.
      load: Loads a program for inputs of certain shapes; raises ValueError or
        NotImplementedError for what its format does not express.
      needs: Modules, and commands as ``$gcc``, without which it does not run.
      install: What installs them.
      has_library: Whether it needs the native library of this package.
    """

    name: str
    load: Callable[[IntegerProgram, Codes], Session]
    needs: tuple[str, ...] = ()
    install: str = ""
    has_library: bool = False

    @property
    def is_installed(self) -> bool:
        """Returns whether all that it needs is there."""
        if self.has_library and find_library().library is None:
            return False
        return all(map(_is_there, self.needs))


def _is_there(name: str) -> bool:
    if name.startswith("$"):
        return shutil.which(name[1:]) is not None
    parent = name.rpartition(".")[0]
    is_module = not parent or _is_there(parent)
    return is_module and importlib.util.find_spec(name) is not None


Loader = Callable[[IntegerProgram, Codes], Session]
