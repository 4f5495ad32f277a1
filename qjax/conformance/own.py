"""Loaders of what this package runs or writes for a compiler at hand."""

import ctypes
import importlib
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from qjax.backends.xla import run as xla
from qjax.conformance.session import Codes, Loader, Session
from qjax.formats.c99 import write_c99
from qjax.formats.stablehlo import write_stablehlo
from qjax.graph import reference
from qjax.graph.packing import nbytes
from qjax.graph.sizes import input_shapes
from qjax.program import IntegerProgram


def _bytes_of(program: IntegerProgram) -> int:
    return sum(nbytes(np.asarray(p)) for p in program.params.values())


def load_numpy(program: IntegerProgram, codes: Codes) -> Session:
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


def load_xla(program: IntegerProgram, codes: Codes) -> Session:
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


def load_native(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the native kernels, and XLA for what they lack.

    Raises:
      NotImplementedError: if they run none of the nodes.
    """
    report = program.backend_report()
    if not report.isa or all(row.backend == "xla" for row in report.rows):
        raise NotImplementedError(f"Native kernels run no node. {report}")

    def run(codes: Codes) -> list[np.ndarray]:
        found = program.execution.run("codes", [*map(jnp.asarray, codes)], "native")
        return [*map(np.asarray, found)]

    return Session(run, _bytes_of(program))


def load_stablehlo(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the file of `write_stablehlo` for the platform at hand."""
    pairs = zip(codes, program.graph.inputs, strict=True)
    if any(0 in q.shape[:1] and program.graph.values[v].shape[0] for q, v in pairs):
        raise ValueError(
            "The free sizes of `qjax.formats.stablehlo.write_stablehlo` are 1 or more, "
            "as JAX has them, got no example. Lower the program for none."
        )
    data = write_stablehlo(program, platforms=(jax.export.default_export_platform(),))
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)

    def run(codes: Codes) -> list[np.ndarray]:
        return [*map(np.asarray, call(*map(jnp.asarray, codes)))]

    return Session(run, len(data))


_C_FLAGS = ("-std=c99", "-O3", "-shared", "-fPIC")


def load_c(compiler: str) -> Loader:
    """Returns the loader of the source of `write_c99` by a compiler."""

    def load(program: IntegerProgram, codes: Codes) -> Session:
        batch_size = _batch_size(program, codes)
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


def _batch_size(program: IntegerProgram, codes: Codes) -> int:
    """Returns the batch size at which C takes codes; raises ValueError for none."""
    wanted = [q.shape for q in codes]
    for size in dict.fromkeys(shape[0] for shape in wanted if shape):
        if input_shapes(program.graph, size) == wanted:
            return size
    if not any(wanted):
        return 1
    raise ValueError(
        f"C has one batch size, that of the first input which leaves it free, got "
        f"inputs of shapes {wanted}. Lower the program for these."
    )


def _output_shapes(program: IntegerProgram, codes: Codes) -> list[tuple[int, ...]]:
    """Returns the shapes of the outputs for input codes."""
    found = jax.eval_shape(program.run_codes, program.params, *codes)
    return [x.shape for x in found]


def load_iree(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the StableHLO of a program, for these shapes, into IREE."""
    compiler = importlib.import_module("iree.compiler")
    runtime = importlib.import_module("iree.runtime")
    params = {name: np.asarray(p) for name, p in program.params.items()}
    function = jax.jit(lambda *codes: tuple(program.run_codes(params, *codes)))
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype) for q in codes]
    text = str(jax.export.export(function, platforms=("cpu",))(*shapes).mlir_module())
    data = compiler.compile_str(
        text,
        target_backends=["llvm-cpu"],
        input_type="stablehlo",
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    module = runtime.load_vm_flatbuffer(data, driver="local-sync")

    def run(codes: Codes) -> list[np.ndarray]:
        found = module.main(*codes)
        return [*map(np.asarray, found if isinstance(found, tuple | list) else [found])]

    return Session(run, len(data))
