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

import jax
import numpy as np

from qjax.backends.native.emission import ABI
from qjax.backends.native.plan import NativePlan
from qjax.backends.native.reals import Reals
from qjax.graph.sizes import Shape

PATH = pathlib.Path(__file__).parent / "libqjax_native.so"
SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
HANDLERS = {"instantiate": "QjaxNativeInstantiate", "execute": "QjaxNativeRun"}
READY = 0x101  # Flags of an array: contiguous, and aligned.
_CODES = Reals()
_ERROR_SIZE = 512
_MOST_THREADS = 1 << 16
_ALIGNMENT = 64
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
        [
            *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64],
            *[ctypes.c_char_p, ctypes.c_int64],
        ],
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
    # No types: the call below gives those of C, which takes less time.
    "run": (ctypes.c_int, None),
    "run_pair": (ctypes.c_int, [ctypes.c_void_p] * 3),
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

    @functools.cached_property
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
        self._at = self.packed.ctypes.data
        if library.call["pack"](*words, *constants, self._at, *end):
            raise RuntimeError(f"Native kernels refuse constants: {_text(error)}.")
        self._handles: dict[Reals, int] = {}
        self.handle = self._handle(Reals())
        self.types = [(shape, np.dtype(dtype)) for shape, dtype in plan.outputs]

    def _handle(self, reals: Reals) -> int:
        """Returns the parsed plan with certain inputs and outputs real."""
        if reals in self._handles:
            return self._handles[reals]
        plan, call, words = self.plan, self.library.call, reals.words
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        own = plan.words.ctypes.data, len(plan.words), words.ctypes.data, len(words)
        handle = call["plan"](*own, error, _ERROR_SIZE)
        if not handle:
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        weakref.finalize(self, call["free"], handle)
        given = _sizes(plan.inputs, reals.inputs)
        made = _sizes(plan.outputs, reals.outputs)
        ends = given, len(given), made, len(made), len(self.packed), 1
        if call["check"](handle, *ends, error, _ERROR_SIZE):
            raise RuntimeError(f"Native kernels refuse a plan: {_text(error)}.")
        return self._handles.setdefault(reals, handle)

    def prepare(
        self,
        threads: int,
        times: int = 1,
        types: Sequence[tuple[Shape, np.dtype]] | None = None,
        reals: Reals = _CODES,
    ) -> ArrayCall:
        """Returns a function from contiguous arrays of the plan to its outputs.

        Args:
          threads: Number of threads, at most.
          times: Number of runs, over inputs one after the other.
          types: Shapes and types of the outputs of all runs; None for one run.
          reals: Inputs and outputs that are real values.

        Returns:
          ``(inputs, outputs=None) -> outputs``. The outputs are new arrays where none
          are given. It raises RuntimeError if the library has no memory left.
        """
        own, count = types or self.types, int(self.plan.words[3])
        runs = self._runs(len(own), times, threads, reals)
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

    def prepare_pair(
        self,
        threads: int,
        times: int,
        given: tuple[Shape, np.dtype],
        made: tuple[Shape, np.dtype],
        reals: Reals,
    ) -> Callable[[Any], np.ndarray | None]:
        """Returns `prepare`'s function for one input and one output, in less time.

        Args:
          threads: Number of threads, at most.
          times: Number of runs.
          given: Shape and type of the input.
          made: Shape and type of the output.
          reals: Inputs and outputs that are real values.

        Returns:
          ``input -> output``; None for what is no plain array of the shape and type,
          contiguous and aligned.
        """
        runs, empty, array = self._runs(1, times, threads, reals), np.empty, np.ndarray
        call, shared = self.library.call["run_pair"], ctypes.addressof(runs)
        (shape, dtype), (out_shape, out_dtype) = given, made

        def run(x: Any) -> np.ndarray | None:
            if type(x) is not array or x.dtype != dtype or x.shape != shape:
                return None
            if x.flags.num & READY != READY:
                return None
            y = empty(out_shape, out_dtype)
            if call(shared, _end(x), _end(y)):
                self._raise(runs, (ctypes.c_void_p * 2)(_address(x), _address(y)))
            return y

        return run

    def _runs(self, outputs: int, times: int, threads: int, reals: Reals) -> "_Runs":
        own = self._handle(reals), self._at, int(self.plan.words[3])
        return _Runs(*own, outputs, times, threads, _HEAD)

    def _raise(self, runs: "_Runs", ends: Any) -> None:
        """Raises for a run that failed, unless it does not fail again."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        outputs = ctypes.addressof(ends) + runs.inputs * ctypes.sizeof(ctypes.c_void_p)
        own = runs.plan, self._at, ends, outputs, runs.times, runs.threads
        if self.library.call["run_many"](*own, error, _ERROR_SIZE):
            raise RuntimeError(f"Native kernels failed: {_text(error)}.")

    def run(self, inputs: Sequence[np.ndarray], threads: int) -> Sequence[np.ndarray]:
        """Computes the outputs of contiguous arrays, once: see `prepare`."""
        return self.prepare(threads)(inputs)

    def digest(self, reals: Reals) -> np.ndarray:
        """Returns 32 bytes that no other plan, constants or real ends have."""
        own = self._digest.copy()
        own.update(reals.words.data)
        return np.frombuffer(own.digest(), np.uint8)

    @functools.cached_property
    def array(self) -> jax.Array:
        """Returns the packed constants, the same memory, for calls of JAX.

        Of a NumPy array each call would take a copy.
        """
        with jax.ensure_compile_time_eval():
            return jax.device_put(self.packed, may_alias=True)

    @functools.cached_property
    def _digest(self) -> Any:
        own = hashlib.sha256(self.plan.words.data)
        own.update(self.packed.data)
        return own

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


def _sizes(types: Sequence[tuple[Shape, str]], reals: Sequence[Any]) -> Any:
    """Returns the bytes of codes or real values, for the library."""
    sizes = [np.dtype(dtype).itemsize for _, dtype in types]
    for k, end in enumerate(reals):
        sizes[k] = np.dtype(np.float32).itemsize if end else sizes[k]
    own = [math.prod(shape) * n for (shape, _), n in zip(types, sizes, strict=True)]
    return (ctypes.c_int64 * len(own))(*own)


def _text(error: Any) -> str:
    return error.value.decode(errors="replace").rstrip(".")
