"""Runtimes that compute a program, each behind the same few functions."""

import ctypes
import dataclasses
import importlib.util
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from qjax.backends.xla import run as xla
from qjax.formats.c99 import write_c99
from qjax.formats.stablehlo import write_stablehlo
from qjax.graph import reference
from qjax.graph.packing import nbytes
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
    """

    name: str
    load: Callable[[IntegerProgram, Codes], Session]
    needs: tuple[str, ...] = ()
    install: str = ""

    @property
    def is_installed(self) -> bool:
        """Returns whether all that it needs is there."""
        return all(map(_is_there, self.needs))


def _is_there(name: str) -> bool:
    if name.startswith("$"):
        return shutil.which(name[1:]) is not None
    return importlib.util.find_spec(name) is not None


def _bytes_of(program: IntegerProgram) -> int:
    return sum(nbytes(np.asarray(p)) for p in program.params.values())


def _load_numpy(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the oracle: int64, operation by operation."""
    params = {name: np.asarray(p) for name, p in program.params.items()}

    def run(codes: Codes) -> list[np.ndarray]:
        values = reference.run(program.graph, params, codes)
        return [values[v] for v in program.graph.outputs]

    def sites(codes: Codes) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        reference.run(program.graph, params, codes, found)
        return found

    return Session(run, _bytes_of(program), sites)


def _load_xla(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the jitted program itself."""

    @jax.jit
    def run_sites(params: Mapping[str, jax.Array], *codes: jax.Array) -> Any:
        found: dict[str, jax.Array] = {}
        xla.run(program.graph, params, codes, found)
        return found

    def run(codes: Codes) -> list[np.ndarray]:
        return [*map(np.asarray, program.run_codes(program.params, *codes))]

    def sites(codes: Codes) -> dict[str, np.ndarray]:
        found = run_sites(program.params, *codes)
        return {name: np.asarray(q) for name, q in found.items()}

    return Session(run, _bytes_of(program), sites)


def _load_stablehlo(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the file of `write_stablehlo` for the platform at hand."""
    data = write_stablehlo(program, platforms=(jax.default_backend(),))
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)

    def run(codes: Codes) -> list[np.ndarray]:
        return [*map(np.asarray, call(*map(jnp.asarray, codes)))]

    return Session(run, len(data))


_C_FLAGS = ("-std=c99", "-O3", "-shared", "-fPIC")


def _load_c(compiler: str) -> Callable[[IntegerProgram, Codes], Session]:
    """Returns the loader of the source of `write_c99` by a compiler."""

    def load(program: IntegerProgram, codes: Codes) -> Session:
        sizes = {len(q) for q in codes if q.ndim} or {1}
        batch_size = max(sizes)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            write_c99(program, path, batch_size=batch_size)
            library = path / "model.so"
            command = [compiler, *_C_FLAGS, "-o", str(library), str(path / "model.c")]
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).model_run
            size = library.stat().st_size
        values, graph = program.graph.values, program.graph
        shapes = _output_shapes(program, codes)

        def run(codes: Codes) -> list[np.ndarray]:
            given = [
                np.ascontiguousarray(q, values[v].dtype)
                for q, v in zip(codes, graph.inputs, strict=True)
            ]
            outputs = [
                np.zeros(shape, values[v].dtype)
                for shape, v in zip(shapes, graph.outputs, strict=True)
            ]
            function(*(x.ctypes.data_as(ctypes.c_void_p) for x in (*given, *outputs)))
            return outputs

        return Session(run, size)

    return load


def _output_shapes(program: IntegerProgram, codes: Codes) -> list[tuple[int, ...]]:
    """Returns the shapes of the outputs for input codes."""
    found = jax.eval_shape(program.run_codes, program.params, *codes)
    return [x.shape for x in found]


def _table(*runtimes: Runtime) -> Mapping[str, Runtime]:
    return {runtime.name: runtime for runtime in runtimes}


# Name -> runtime, in the order of tables.
RUNTIMES: Mapping[str, Runtime] = _table(
    Runtime("numpy", _load_numpy),
    Runtime("xla", _load_xla),
    Runtime("stablehlo", _load_stablehlo, ("flatbuffers",), "qjax[stablehlo]"),
    Runtime("c-gcc", _load_c("gcc"), ("$gcc",), "gcc"),
    Runtime("c-clang", _load_c("clang"), ("$clang",), "clang"),
)
