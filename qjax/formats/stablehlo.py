"""Writes programs as StableHLO: files that JAX runs without this package."""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from qjax.formats.support import check_whole
from qjax.graph.atomic import write_atomically
from qjax.program import IntegerProgram

_FLOATS = re.compile(r"\b(bf16|f16|f32|f64|f8\w*)\b")


def write_stablehlo(
    program: IntegerProgram,
    path: str | os.PathLike[str] | None = None,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> bytes:
    """Writes the codes of a program as StableHLO, its parameters within.

    The file takes and gives what `IntegerProgram.codes` does, flat: integers of the
    types of the inputs. A leading size that nothing fixes is free in it, too, from 1
    on. It runs where JAX is:
    ``jax.export.deserialize(bytearray(data)).call(*codes)``. JAX reads such files for
    half a year: keep the program's own file (`IntegerProgram.save`).

    Args:
      program: The program.
      path: Path, replaced once the file is complete; None to write none.
      platforms: Platforms that it runs on, as JAX names them.

    Returns:
      What the file holds.

    Raises:
      ValueError: if something of the program stays in float, or for a platform that JAX
        does not know. Nothing is written then.
      ImportError: without `flatbuffers`.
      OSError: if the file cannot be written. An old one stays as it was.

    References:
      JAX, `jax.export`; StableHLO, https://openxla.org/stablehlo.
    """
    check_whole(program)
    known = {"cpu", "cuda", "rocm", "tpu"}
    if not platforms or set(platforms) - known:
        raise ValueError(
            f"`platforms` are some of {', '.join(sorted(known))}, got {platforms!r}."
        )
    params = {name: np.asarray(value) for name, value in program.params.items()}
    run = jax.jit(lambda *codes: tuple(program.run_codes(params, *codes)))
    exported = jax.export.export(run, platforms=platforms)(*_shapes(program))
    text = exported.mlir_module()
    if found := sorted(set(_FLOATS.findall(text))):
        raise ValueError(
            f"The StableHLO of this program has values of the types {found}: a body of "
            "an operation is not in integers on these platforms. Export for one of "
            'them, such as `platforms=("cpu",)`.'
        )
    try:
        data = bytes(exported.serialize())
    except ImportError as error:
        raise ImportError(
            "JAX writes StableHLO with `flatbuffers`: install the extra `stablehlo`, "
            "`pip install qjax[stablehlo]`."
        ) from error
    if path is not None:
        write_atomically(path, data)
    return data


def _shapes(program: IntegerProgram) -> list[Any]:
    """Returns the types of the inputs; leading sizes that are free have names."""
    values = [program.graph.values[v] for v in program.graph.inputs]
    is_free = lambda v: v.shape and (not v.fixed_by or v.is_free_beyond_one)
    names: dict[int, str] = {}
    for v in filter(is_free, values):
        names.setdefault(v.shape[0], f"b{len(names)}")
    least = {names[v.shape[0]] for v in filter(is_free, values) if v.is_free_beyond_one}
    scope = jax.export.SymbolicScope([f"{name} >= 2" for name in sorted(least)])
    found = []
    for v in values:
        shape: Any = v.shape
        if is_free(v):
            text = ", ".join([names[v.shape[0]], *map(str, v.shape[1:])])
            shape = jax.export.symbolic_shape(f"{text},", scope=scope)
        found.append(jax.ShapeDtypeStruct(shape, jnp.dtype(v.dtype)))
    return found
