"""The shared library of native kernels: found, checked and called by ctypes.

Environment variables: ``QJAX_NATIVE=0`` turns it off, ``QJAX_NATIVE_ISA`` chooses its
instruction set, ``QJAX_NUM_THREADS`` its threads.
"""

import ctypes
import functools
import hashlib
import math
import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.backends.native.emission import ABI, DTYPES
from qjax.backends.native.plan import NativePlan
from qjax.graph.graph import Value
from qjax.graph.sizes import Shape

PATH = pathlib.Path(__file__).parent / "libqjax_native.so"
SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
HANDLERS = {"instantiate": "QjaxNativeInstantiate", "execute": "QjaxNativeRun"}
_ERROR_SIZE = 512
_MOST_THREADS = 1 << 16
_ALIGNMENT = 64
_MOST_STEPS = 1 << 21  # From the zero point of a grid.
ArrayCall = Callable[..., Sequence[np.ndarray]]
_FUNCTIONS: dict[str, tuple[Any, list[Any] | None]] = {
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
    "peak": (ctypes.c_int64, [ctypes.c_int64]),
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
    # No types: the calls below give those of C, which takes less time.
    **dict.fromkeys(("run", "quantize", "dequantize"), (ctypes.c_int, None)),
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

    def add_products(self, rounds: int) -> int:
        """Adds up products from registers alone, the most that a core can, for timing.

        Args:
          rounds: Number of turns of all registers, some nanoseconds each.

        Returns:
          The number of products, two operations each.
        """
        return self.call["peak"](rounds)

    def refusal(self, words: np.ndarray) -> str:
        """Returns why the library does not read a plan, or ""."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        own = words.ctypes.data, len(words), error, _ERROR_SIZE
        return _text(error) if self.call["pack_size"](*own) < 0 else ""

    def grid_call(
        self, name: str, value: Value, shape: Shape
    ) -> Callable[[np.ndarray, np.ndarray], None] | None:
        """Returns a function that computes codes of one grid, or their real values.

        Args:
          name: ``quantize``, from float32 to codes, or ``dequantize``, from codes to
            float32.
          value: Input or output of a graph.
          shape: Shape of the arrays.

        Returns:
          ``(source, target) -> None``, on contiguous arrays; None for a grid of
          another kind.
        """
        if value.grid is None or value.dtype not in DTYPES or np.ndim(value.grid.scale):
            return None
        scale, zero = value.grid.array(), value.grid.zero_point
        # Beyond these numbers XLA takes those without an exponent for 0.
        is_plain = 2.0**-100 <= scale <= 2.0**100 and abs(zero) < 1 << 31
        if name == "quantize":
            steps = max(abs(value.low - zero), abs(value.high - zero))
            is_plain &= steps <= _MOST_STEPS and value.rounding == "half_even"
            is_plain &= value.rescaling == (1.0, 0.0)
        if not is_plain:
            return None
        ends = DTYPES.index(value.dtype), zero, value.low, value.high
        floats = scale, np.float32(1) / scale
        own = ctypes.byref(_CodesOfGrid(*ends, math.prod(shape), _HEAD, *floats))
        call, places = self.call[name], ctypes.c_void_p * 2

        def run(source: np.ndarray, target: np.ndarray) -> None:
            failed = call(own, places(_end(source), _end(target)))
            assert not failed, value

        return run

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


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def _head() -> int:
    """Returns where arrays hold the addresses of their data, or 0 if that is not known.

    In NumPy's C interface, `PyArrayObject`, that is right after the head of the object.
    NumPy itself takes a microsecond to give an address.
    """
    head, read = object.__basicsize__, ctypes.c_void_p.from_address
    whole = np.arange(12, dtype=np.int32)
    probes = whole, whole[3:], whole.reshape(3, 4)[1:, ::2], np.empty(0), np.empty(())
    if sys.implementation.name != "cpython":
        return 0
    return head if all(read(id(x) + head).value == _address(x) for x in probes) else 0


_HEAD = _head()
_end: Callable[[np.ndarray], int] = id if _HEAD else _address  # As kernels take arrays.


class _Runs(ctypes.Structure):
    """Shares what all calls of a plan have in common: `QjaxNativeRuns`."""

    _fields_ = [
        ("plan", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in "inputs outputs times threads head".split()
        ),
    ]


class _CodesOfGrid(ctypes.Structure):
    """Describes an array of codes: `QjaxNativeGrid`."""

    _INTEGERS = "dtype", "zero_point", "low", "high", "count", "head"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in ("scale", "inverse")),
    ]


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
        self._at = self.packed.ctypes.data
        given, made = (_sizes(types) for types in (plan.inputs, plan.outputs))
        ends = given, len(given), made, len(made), size, 1, *end
        if library.call["check"](self.handle, *ends):
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        self.types = [(shape, np.dtype(dtype)) for shape, dtype in plan.outputs]

    def prepare(
        self,
        threads: int,
        times: int = 1,
        types: Sequence[tuple[Shape, np.dtype]] | None = None,
    ) -> ArrayCall:
        """Returns a function from contiguous arrays of the plan to its outputs.

        Args:
          threads: Number of threads, at most.
          times: Number of runs, over inputs one after the other.
          types: Shapes and types of the outputs of all runs; None for one run.

        Returns:
          ``(inputs, outputs=None) -> outputs``. The outputs are new arrays where none
          are given. It raises RuntimeError if the library has no memory left.
        """
        own, count = types or self.types, int(self.plan.words[3])
        runs = _Runs(self.handle, self._at, count, len(own), times, threads, _HEAD)
        places = ctypes.c_void_p * max(count + len(own), 1)
        call, shared, empty = self.library.call["run"], ctypes.byref(runs), np.empty

        def run(
            inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray] | None = None
        ) -> Sequence[np.ndarray]:
            if outputs is None:
                outputs = [empty(shape, dtype) for shape, dtype in own]
            ends = places(*map(_end, inputs), *map(_end, outputs))
            if call(shared, ends):
                self._raise(runs, ends)
            return outputs

        return run

    def _raise(self, runs: "_Runs", ends: Any) -> None:
        """Raises for a run that failed, unless it does not fail again."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        outputs = ctypes.addressof(ends) + runs.inputs * ctypes.sizeof(ctypes.c_void_p)
        own = self.handle, self._at, ends, outputs, runs.times, runs.threads
        if self.library.call["run_many"](*own, error, _ERROR_SIZE):
            raise RuntimeError(f"Native kernels failed: {_text(error)}.")

    def run(self, inputs: Sequence[np.ndarray], threads: int) -> Sequence[np.ndarray]:
        """Computes the outputs of contiguous arrays, once: see `prepare`."""
        return self.prepare(threads)(inputs)

    @functools.cached_property
    def digest(self) -> np.ndarray:
        """Returns 32 bytes that no other plan with other constants has."""
        own = hashlib.sha256(self.plan.words.data)
        own.update(self.packed.data)
        return np.frombuffer(own.digest(), np.uint8)

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


def _text(error: Any) -> str:
    return error.value.decode(errors="replace").rstrip(".")
