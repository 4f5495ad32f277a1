"""Writes an integer program as C99."""

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.formats.c99 import elementwise, moves, normalisations, products
from qjax.formats.c99.arena import Lifetime, plan
from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import Source, c_type, identifier
from qjax.graph import reference
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, Value
from qjax.program import IntegerProgram

EMITTERS: Mapping[str, Callable[[CNode], None]] = {
    "add": elementwise.add,
    "argmax": products.arg_extreme,
    "argmin": products.arg_extreme,
    "broadcast": moves.broadcast,
    "clip": elementwise.clip,
    "concatenate": moves.concatenate,
    "constant": elementwise.constant,
    "conv": products.conv,
    "dot": products.dot,
    "dot_codes": products.dot_codes,
    "embed": elementwise.embed,
    "max": products.extreme,
    "max_pool": products.extreme_pool,
    "maximum": elementwise.of_two,
    "min": products.extreme,
    "min_pool": products.extreme_pool,
    "minimum": elementwise.of_two,
    "multiply": products.multiply,
    "multiply_codes": products.multiply_codes,
    "norm": normalisations.norm,
    "pad": moves.pad,
    "requantize": elementwise.requantize,
    "reshape": moves.reshape,
    "rev": moves.rev,
    "running_sum": products.running_sum,
    "select": elementwise.select,
    "slice": moves.slices,
    "softmax": normalisations.softmax,
    "sum": products.total,
    "sum_pool": products.sum_pool,
    "table": elementwise.table,
    "take": elementwise.take,
    "thresholds": elementwise.thresholds,
    "transpose": moves.transpose,
}


class CSource(NamedTuple):
    """A program in C.

    Attributes:
      header: Text of the header.
      source: Text of the source.
      arena_bytes: Bytes of the static arrays.
      constant_bytes: Bytes of weights and tables.
    """

    header: str
    source: str
    arena_bytes: int
    constant_bytes: int


def write_c99(
    program: IntegerProgram,
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str = "model",
    batch_size: int = 1,
) -> CSource:
    """Writes a program as ``NAME.h`` and ``NAME.c``.

    ``NAME_run`` takes the codes of the inputs and fills those of the outputs, flat, as
    `IntegerProgram.codes` has them: ``NAME_run(const int8_t *in0, int32_t *out0)``. It
    is not reentrant: values between lie in static arrays.

    Args:
      program: The program.
      folder: Folder of both files, which are replaced; None to write none.
      name: Prefix of files and names, a name of C.
      batch_size: Size of the leading axis, where the program leaves it free.

    Returns:
      The texts, and how much memory they take.

    Raises:
      ValueError: for a program that is not whole, a name that is none of C, or an
        operation without code here, with its module path. Nothing is written then.
      OSError: if a file cannot be written.
    """
    if program.residues:
        listed = "\n".join(residue.message for residue in program.residues)
        raise ValueError(f"This program is not whole. In float remain:\n{listed}")
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"`name` must be a name of C, such as 'model', got {name!r}.")
    graph = program.graph
    _check(graph)
    params = {k: np.asarray(v).astype(np.int64) for k, v in program.params.items()}
    shapes = _shapes(graph, params, batch_size)
    tensors, arenas = _tensors(graph, shapes, name)
    source = Source(name)
    for node in graph.nodes:
        own = {role: params[k] for role, k in node.params.items()}
        inputs = tuple(tensors[v] for v in node.inputs)
        call = CNode(node, inputs, tensors[node.output], own, source)
        if not call.output.size:
            continue
        source.line(f"/* {node.operation}  {_comment(node.path)} */")
        with source.block():
            EMITTERS[node.operation](call)
    for k, v in enumerate(graph.outputs):
        if tensors[v].name != f"out{k}":
            with source.loops([tensors[v].size]) as names:
                source.line(f"out{k}[{names[0]}] = {tensors[v].name}[{names[0]}];")
    found = _written(graph, tensors, arenas, source, name)
    if folder is not None:
        path = pathlib.Path(folder)
        write_atomically(path / f"{name}.h", found.header.encode())
        write_atomically(path / f"{name}.c", found.source.encode())
    return found


def _check(graph: Graph) -> None:
    """Raises ValueError for operations without code."""
    missing = [n for n in graph.nodes if n.operation not in EMITTERS]
    if missing:
        listed = "\n".join(
            f"  `{n.operation}` at {n.path or 'the program'!r}" for n in missing
        )
        raise ValueError(
            f"C99 has no code for operations of this program:\n{listed}\n"
            "`IntegerProgram.save` and `qjax.formats.stablehlo` hold every program."
        )


def _shapes(
    graph: Graph, params: Mapping[str, np.ndarray], batch_size: int
) -> list[tuple[int, ...]]:
    """Returns the shape of each value at a batch size."""
    inputs = []
    for v in graph.inputs:
        own = graph.values[v]
        is_free = bool(own.shape) and not own.fixed_by
        shape = (batch_size, *own.shape[1:]) if is_free else own.shape
        code = min(max(own.zero_point, own.low), own.high)
        inputs.append(np.full(shape, code, np.int64))
    return [x.shape for x in reference.run(graph, params, inputs)]


def _tensors(
    graph: Graph, shapes: list[tuple[int, ...]], name: str
) -> tuple[dict[int, CArray], dict[int, int]]:
    """Returns the pointers of all values, and the sizes of the arrays by bits."""
    last = {v: k for k, n in enumerate(graph.nodes) for v in n.inputs}
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    names = {v: f"in{k}" for k, v in enumerate(graph.inputs)}
    for k, v in enumerate(graph.outputs):
        names.setdefault(v, f"out{k}")
    lives: dict[int, dict[int, Lifetime]] = {8: {}, 16: {}, 32: {}}
    for k, node in enumerate(graph.nodes):
        v = node.output
        if v not in names:
            own = Lifetime(int(np.prod(shapes[v])), k, last.get(v, k))
            lives[_bits(graph.values[v])][v] = own
    sizes = {}
    for bits, spans in lives.items():
        places, sizes[bits] = plan(spans)
        for v, at in places.items():
            kind = c_type(graph.values[v].dtype)
            names[v] = f"(({kind} *){name}_{bits} + {at})"
    tensors = {}
    for v, text in names.items():
        x = graph.values[v]
        tensors[v] = CArray(text, tuple(shapes[v]), c_type(x.dtype), x.low, x.high)
    return tensors, sizes


def _bits(value: Value) -> int:
    return max(8, np.dtype(value.dtype).itemsize * 8)


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("/*", "/ *")


def _written(
    graph: Graph,
    tensors: Mapping[int, CArray],
    arenas: Mapping[int, int],
    source: Source,
    name: str,
) -> CSource:
    nbytes = sum(bits // 8 * n for bits, n in arenas.items())
    upper = identifier(name).upper()
    ends, lines = [], []
    for kind, values, is_const in (
        ("in", graph.inputs, "const "),
        ("out", graph.outputs, ""),
    ):
        for k, v in enumerate(values):
            t, x = tensors[v], graph.values[v]
            ends.append(f"{is_const}{t.ctype} *{kind}{k}")
            lines.append(f"#define {upper}_{kind.upper()}{k}_SIZE {max(t.size, 1)}")
            grid = _grid(x)
            lines.append(f"/* {kind}{k}: shape {list(t.shape)}, {grid} */")
    prototype = f"void {name}_run({', '.join(ends)})"
    header = HEADER.format(
        upper=upper, ends="\n".join(lines), nbytes=nbytes, prototype=prototype
    )
    arrays = [
        f"static int{bits}_t {name}_{bits}[{n}];" for bits, n in arenas.items() if n
    ]
    text = SOURCE.replace("NAME", name)
    helpers = [own for own in text.split("\n\n") if _is_used(own, name, source)]
    body = "\n".join(
        [
            f'#include "{name}.h"',
            "",
            *helpers,
            *source.constants,
            *arrays,
            "",
            f"{prototype} {{",
            *source.lines,
            "}",
            "",
        ]
    )
    return CSource(header, body, nbytes, source.nbytes)


def _is_used(helper: str, name: str, source: Source) -> bool:
    """Returns whether a helper is called, or is part of one that is."""
    found = re.search(rf"{name}_(\w+)", helper)
    word = f"{name}_{found[1] if found else ''}"
    lines = "\n".join(source.lines)
    return word in lines or (word.endswith("_share") and f"{name}_reciprocal" in lines)


def _grid(x: Value) -> str:
    if x.grid is None:
        return f"integers from {x.low} to {x.high}"
    scale: Any = x.grid.scale
    return f"real = {scale} * (code - {x.zero_point})"


HEADER = """#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

{ends}
#define {upper}_ARENA_BYTES {nbytes}

{prototype};

#endif
"""

SOURCE = """
/* x / 2^shift, half to even. */
static int64_t NAME_round(int64_t x, int shift) {
  int64_t quotient, rest, half;
  if (shift == 0) return x;
  quotient = x >= 0 ? x >> shift : ~(~x >> shift);
  rest = x - quotient * ((int64_t)1 << shift);
  half = (int64_t)1 << (shift - 1);
  return quotient + (rest > half || (rest == half && (quotient & 1) != 0));
}

/* x / 2^shift, halves up. */
static int64_t NAME_up(int64_t x, int shift) {
  if (shift == 0) return x;
  x += (int64_t)1 << (shift - 1);
  return x >= 0 ? x >> shift : ~(~x >> shift);
}

/* An integer rounded to 24 bits, half to even, as float32 holds it. */
static int64_t NAME_float(int64_t x) {
  uint64_t size = x < 0 ? (uint64_t)0 - (uint64_t)x : (uint64_t)x, rest, half;
  int shift = 0;
  while ((size >> shift) >= ((uint64_t)1 << 24)) ++shift;
  if (shift == 0) return x;
  half = (uint64_t)1 << (shift - 1);
  rest = size & (2 * half - 1);
  size >>= shift;
  size += rest > half || (rest == half && (size & 1) != 0);
  return x < 0 ? -(int64_t)(size << shift) : (int64_t)(size << shift);
}

static int32_t NAME_clip(int64_t x, int32_t low, int32_t high) {
  return x < low ? low : x > high ? high : (int32_t)x;
}

static int32_t NAME_least(int32_t x, int32_t most) {
  return x < most ? x : most;
}

/* 2^30 / sqrt(x), up to the shift: five of Newton's steps. */
static int64_t NAME_root(uint64_t x, int *down) {
  uint64_t a, root;
  int length = 0, up, k;
  while (length < 64 && (x >> length) != 0) ++length;
  up = (62 - length) / 2 * 2;
  a = (x << up) >> 30;
  root = UINT64_C(2362232013) - ((UINT64_C(1395864371) * a) >> 32);
  for (k = 0; k < 5; ++k)
    root = (root * (((uint64_t)3 << 30) - ((((root * root) >> 30) * a) >> 32))) >> 31;
  *down = 60 - up / 2;
  return (int64_t)(root >> 1);
}

typedef struct {
  uint64_t reciprocal;
  int length;
} NAME_share;

/* round(2^(31 + length) / total), of a sum of `length` bits. */
static NAME_share NAME_reciprocal(uint64_t total) {
  NAME_share found = {0, 0};
  uint64_t rest, quotient;
  int k;
  while (found.length < 64 && (total >> found.length) != 0) ++found.length;
  rest = (uint64_t)1 << (found.length - 1);
  quotient = rest >= total;
  rest -= quotient * total;
  for (k = 0; k < 33; ++k) {
    rest <<= 1;
    quotient <<= 1;
    if (rest >= total) {
      rest -= total;
      quotient |= 1;
    }
  }
  found.reciprocal = (quotient + 1) / 2;
  if (found.reciprocal > UINT64_C(0xffffffff)) found.reciprocal = UINT64_C(0xffffffff);
  return found;
}

/* 2^30 times a part of a sum. */
static int64_t NAME_part(NAME_share share, uint64_t e) {
  uint64_t half = (uint64_t)1 << share.length;
  return (int64_t)((e * share.reciprocal + half) >> (share.length + 1));
}
"""
