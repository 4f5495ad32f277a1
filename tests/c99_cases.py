"""Programs in C: compiled by gcc with all warnings and checks, and single nodes."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
import tempfile

import jax
import numpy as np
import pytest

import qjax
from qjax.formats.c99 import write_c99
from qjax.graph import reference
from qjax.graph.graph import Graph, Grid, Node, Value, storage
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.validation import validate

STRICT = "-std=c99 -pedantic -Wall -Wextra -Wconversion -Werror".split()
CHECKED = "-fsanitize=undefined -fno-sanitize-recover=all".split()


def check_sanitizers(compiler, flags):
    """Skips where a compiler has no runtime of its sanitizers: clang's is apart."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags, "-x", "c", "-", "-o", f"{folder}/test"]
        program = "int main(void) { return 0; }"
        done = subprocess.run(command, input=program, capture_output=True, text=True)
    if done.returncode:
        name = "libclang-rt" if compiler == "clang" else "libubsan and libasan"
        pytest.skip(f"{compiler} lacks its sanitizers ({name}): {done.stderr[-200:]}")


def library(program, folder, compiler="gcc", flags=("-O1", *CHECKED), **options):
    """A program in C, compiled with all warnings."""
    found = write_c99(program, folder, **options)
    path = folder / f"model_{compiler}.so"
    command = [compiler, *STRICT, *flags, "-shared", "-fPIC"]
    command += ["-o", str(path), str(folder / "model.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert not re.search(r"\b(float|double|malloc|free|printf)\b", found.source)
    return ctypes.CDLL(str(path))


def compiled(program, folder, **options):
    """The function ``model_run`` of a program."""
    return library(program, folder, **options).model_run


def pointers(*arrays):
    """Arrays as C takes them."""
    return [x.ctypes.data_as(ctypes.c_void_p) for x in arrays]


def run(function, program, codes):
    """What the function computes of codes."""
    values = program.graph.values
    wanted = reference.run(program.graph, program.params, codes)
    given = [
        np.ascontiguousarray(q, values[v].dtype)
        for q, v in zip(codes, program.graph.inputs, strict=True)
    ]
    outs = [np.zeros(wanted[v].shape, values[v].dtype) for v in program.graph.outputs]
    function(*pointers(*given, *outs))
    return outs, [wanted[v] for v in program.graph.outputs]


def single(operation, inputs, attributes, params):
    """A program of one node, whose outputs have the intervals of its record.

    Args:
      operation: Name of the operation.
      inputs: For each input its shape, its least and its largest code, and a grid.
      attributes: Attributes of the node.
      params: Role -> integers.
    """
    params = {role: np.asarray(x, np.int32) for role, x in params.items()}
    values = [_value(*x, fixed_by="the test") for x in inputs]
    record = OPERATIONS[operation]
    for shape, (low, high) in record.outputs(Operands(attributes, values, params)):
        ends = (int(np.min(low)), int(np.max(high)))
        if record.kind == "rescale":
            ends = attributes.get("low", ends[0]), attributes.get("high", ends[1])
        values.append(_value(shape, *ends, _grid(attributes)))
    n = len(inputs)
    own = {role: role for role in params}
    outputs = range(n, len(values))
    node = Node(operation, tuple(range(n)), n, own, attributes, operation)
    graph = Graph(tuple(values), (node,), tuple(range(n)), tuple(outputs), {})
    validate(graph, params)
    return graph, params


def _grid(attributes):
    return Grid(1.0, attributes["zero_point"]) if "zero_point" in attributes else None


def _value(shape, low, high, grid=None, fixed_by=""):
    own = {"grid": grid, "fixed_by": fixed_by}
    return Value(tuple(shape), storage(low, high), low, high, **own)


def joined(parts):
    """One program of several graphs, so that C is compiled once."""
    values, nodes, inputs, outputs, params = [], [], [], [], {}
    for k, (graph, own) in enumerate(parts):
        start = len(values)
        moved = lambda vs, start=start: tuple(v + start for v in vs)
        values += graph.values
        nodes += [
            dataclasses.replace(
                n,
                inputs=moved(n.inputs),
                output=n.output + start,
                others=moved(n.others),
                params={role: f"{k}/{name}" for role, name in n.params.items()},
            )
            for n in graph.nodes
        ]
        inputs += moved(graph.inputs)
        outputs += moved(graph.outputs)
        params |= {f"{k}/{name}": x for name, x in own.items()}
    graph = Graph(tuple(values), tuple(nodes), tuple(inputs), tuple(outputs), {})
    tree = jax.tree.structure
    leaves = tree(tuple(inputs)), tree(tuple(outputs))
    return qjax.IntegerProgram(graph, params, *leaves)


def random_codes(program, seed):
    """Codes of the whole range of each input."""
    rng = np.random.default_rng(seed)
    own = (program.graph.values[v] for v in program.graph.inputs)
    return [rng.integers(x.low, x.high + 1, x.shape) for x in own]
