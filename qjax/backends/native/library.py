"""The shared library of native kernels: found, checked and called by ctypes.

Environment variables: ``QJAX_NATIVE=0`` turns it off, ``QJAX_NATIVE_ISA`` chooses its
instruction set, ``QJAX_NUM_THREADS`` its threads.
"""

import ctypes
import functools
import math
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.backends.native.emission import ABI
from qjax.backends.native.plan import NativePlan
from qjax.graph.sizes import Shape

PATH = pathlib.Path(__file__).parent / "libqjax_native.so"
SETS = ("avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
HANDLERS = {"instantiate": "QjaxNativeInstantiate", "execute": "QjaxNativeRun"}
_ERROR_SIZE = 512
_MOST_THREADS = 1 << 16
_ALIGNMENT = 64
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "version": (ctypes.c_char_p, []),
    "isa": (ctypes.c_char_p, []),
    "set_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "pack_size": (
        ctypes.c_int64,
        [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64],
    ),
    "pack": (
        ctypes.c_int,
        [
            *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
            *[ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64],
        ],
    ),
    "plan": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64],
    ),
    "free": (None, [ctypes.c_void_p]),
    "check": (
        ctypes.c_int,
        [
            *[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
            *[ctypes.c_int64, ctypes.c_int64, ctypes.c_int64],
            *[ctypes.c_char_p, ctypes.c_int64],
        ],
    ),
    "run_many": (
        ctypes.c_int,
        [
            *[*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int],
            *[ctypes.c_char_p, ctypes.c_int64],
        ],
    ),
    "explain": (
        ctypes.c_char_p,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64],
    ),
}


class Library:
    """The loaded library.

    Args:
      path: The shared library.

    Raises:
      OSError: if it cannot be loaded.
      AttributeError: if it lacks a function.
    """

    def __init__(self, path: str) -> None:
        self.own = ctypes.CDLL(path)
        self.call: dict[str, Any] = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.own, f"qjax_native_{name}")
            function.restype, function.argtypes = result, arguments
            self.call[name] = function

    @property
    def version(self) -> str:
        """Returns the number of the plans that it reads."""
        return self.call["version"]().decode()

    @property
    def isa(self) -> str:
        """Returns the instruction set in use, or "" if the variable names none."""
        return self.call["isa"]().decode()

    def refusal(self, words: np.ndarray) -> str:
        """Returns why the library does not read a plan, or ""."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        own = words.ctypes.data, len(words), error, _ERROR_SIZE
        return _text(error) if self.call["pack_size"](*own) < 0 else ""

    @property
    def handlers(self) -> dict[str, Any]:
        """Returns the functions that XLA calls by stage; none if built without."""
        found = {k: getattr(self.own, name, None) for k, name in HANDLERS.items()}
        return {} if None in found.values() else found


class Found(NamedTuple):
    """The library, or why there is none.

    Attributes:
      library: The library, or None.
      reason: Why there is none; "" if there is.
    """

    library: Library | None
    reason: str


def find_library() -> Found:
    """Finds the library, unless ``QJAX_NATIVE=0``.

    Raises:
      ValueError: if ``QJAX_NATIVE`` is neither 0 nor 1, or ``QJAX_NATIVE_ISA`` names
        no instruction set of this machine.
    """
    switch = os.environ.get("QJAX_NATIVE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"QJAX_NATIVE must be 0 or 1, got {switch!r}.")
    if switch == "0":
        return Found(None, "QJAX_NATIVE=0 turns native kernels off")
    found = load_library(str(PATH))
    if found.library is not None and not found.library.isa:
        raise ValueError(
            f"QJAX_NATIVE_ISA must be one of {', '.join(SETS)} that this machine has, "
            f"got {os.environ.get('QJAX_NATIVE_ISA')!r}. Unset it for the best one."
        )
    return found


@functools.cache
def load_library(path: str) -> Found:
    """Loads a shared library of native kernels, once."""
    if not os.path.exists(path):
        return Found(
            None,
            "the native library was not built: `pip install` builds it where there is "
            "a C++ compiler",
        )
    try:
        library = Library(path)
    except (OSError, AttributeError) as error:
        return Found(None, f"the native library cannot be loaded: {error}")
    if library.version != str(ABI):
        return Found(
            None,
            f"the native library reads plans of version {library.version}, and this "
            f"package makes version {ABI}: install it again",
        )
    return Found(library, "")


def thread_count(threads: int | None = None) -> int:
    """Returns the number of threads: the argument, the variable, or all cores.

    Raises:
      ValueError: if it is no whole number above 0.
    """
    text = os.environ.get("QJAX_NUM_THREADS", "")
    if threads is None and text:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"QJAX_NUM_THREADS must be 1 or more, got {text!r}.")
        return min(int(text), _MOST_THREADS)
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"`threads` must be 1 or more, got {threads!r}.")
    return min(threads, _MOST_THREADS)


class NativeKernel:
    """A plan with its packed constants, ready to run on arrays in memory.

    Args:
      library: The library.
      plan: The plan.

    Raises:
      RuntimeError: if the library refuses the plan.
    """

    def __init__(self, library: Library, plan: NativePlan) -> None:
        self.library, self.plan = library, plan
        words = plan.words.ctypes.data, len(plan.words)
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        end = error, _ERROR_SIZE
        size = library.call["pack_size"](*words, *end)
        if size < 0:
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        self.packed = aligned(size)
        constants = plan.constants.ctypes.data, plan.constants.nbytes
        to = self.packed.ctypes.data
        if library.call["pack"](*words, *constants, to, *end):
            raise RuntimeError(f"Native kernels refuse constants: {_text(error)}.")
        self.handle = library.call["plan"](*words, *end)
        if not self.handle:
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        weakref.finalize(self, library.call["free"], self.handle)
        given, made = (_sizes(types) for types in (plan.inputs, plan.outputs))
        ends = given, len(given), made, len(made), size, 1, *end
        if library.call["check"](self.handle, *ends):
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        self._run, self._at = library.call["run_many"], self.packed.ctypes.data
        self.types = [(shape, np.dtype(dtype)) for shape, dtype in plan.outputs]

    def run(
        self,
        inputs: Sequence[np.ndarray],
        threads: int,
        times: int = 1,
        types: Sequence[tuple[Shape, np.dtype]] | None = None,
    ) -> list[np.ndarray]:
        """Computes the outputs of contiguous arrays of the plan's shapes and types.

        Args:
          inputs: Inputs, those of several runs one after the other.
          threads: Number of threads, at most.
          times: Number of runs.
          types: Shapes and types of the outputs of all runs; None for one run.

        Raises:
          RuntimeError: if the library has no memory left.
        """
        found = [np.empty(shape, dtype) for shape, dtype in types or self.types]
        given = (ctypes.c_void_p * max(len(inputs), 1))(*map(_address, inputs))
        made = (ctypes.c_void_p * max(len(found), 1))(*map(_address, found))
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        ends = given, made, times, threads, error, _ERROR_SIZE
        if self._run(self.handle, self._at, *ends):
            raise RuntimeError(f"Native kernels failed: {_text(error)}.")
        return found

    def explain(self) -> list[str]:
        """Returns the forms of the steps that the library chose."""
        count = int(self.plan.words[5])
        own = self.handle, self._at
        names = (self.library.call["explain"](*own, k) for k in range(count))
        return [(name or b"").decode() for name in names]


def aligned(size: int) -> np.ndarray:
    """Returns bytes of memory that begin at a multiple of 64."""
    whole = np.zeros(size + _ALIGNMENT, np.uint8)
    first = -whole.ctypes.data % _ALIGNMENT
    return whole[first : first + size]


def _sizes(types: Sequence[tuple[Shape, str]]) -> Any:
    """Returns the bytes of arrays of shapes and types, for the library."""
    own = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in types]
    return (ctypes.c_int64 * len(own))(*own)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def _text(error: Any) -> str:
    return error.value.decode(errors="replace").rstrip(".")
