"""Writes an integer program as C99."""

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.formats.c99 import elementwise, moves, normalisations, products, tflite
from qjax.formats.c99.arena import Lifetime, plan
from qjax.formats.c99.calls import WRITER, CArray, CNode
from qjax.formats.c99.text import Source, c_type, identifier
from qjax.formats.support import check_operations, check_whole
from qjax.graph import reference
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Graph, Node, Value
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
    "tflite_add": tflite.add,
    "tflite_average": tflite.average,
    "tflite_constant": elementwise.constant,
    "tflite_softmax": tflite.softmax,
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
    check_whole(program)
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(f"`name` must be a name of C, such as 'model', got {name!r}.")
    graph = program.graph
    check_operations(WRITER, graph)
    params = {k: np.asarray(v).astype(np.int64) for k, v in program.params.items()}
    shapes = _shapes(graph, params, batch_size)
    followers = _followers(graph, shapes)
    tensors, arenas = _tensors(graph, shapes, followers, name)
    source = Source(name)

    def made(node: Node, follower: CNode | None = None) -> CNode:
        own = {role: params[k] for role, k in node.params.items()}
        inputs = tuple(tensors[v] for v in node.inputs)
        return CNode(node, inputs, tensors[node.output], own, source, follower)

    fused = {id(node) for node in followers.values()}
    for node in graph.nodes:
        if id(node) in fused:
            continue
        behind = followers.get(node.output)
        call = made(node, None if behind is None else made(behind))
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


_ACCUMULATORS = frozenset(
    "conv dot dot_codes multiply multiply_codes sum sum_pool".split()
)


def _followers(graph: Graph, shapes: list[tuple[int, ...]]) -> dict[int, Node]:
    """Returns accumulators that one requantization alone reads, each with it."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for v in node.inputs:
            readers.setdefault(v, []).append(node)
    found = {}
    for node in graph.nodes:
        v, own = node.output, readers.get(node.output, [])
        if node.operation not in _ACCUMULATORS or len(own) != 1 or v in graph.outputs:
            continue
        is_rescale = own[0].operation == "requantize"
        if is_rescale and shapes[own[0].output] == shapes[v]:
            found[v] = own[0]
    return found


def _tensors(
    graph: Graph,
    shapes: list[tuple[int, ...]],
    followers: Mapping[int, Node],
    name: str,
) -> tuple[dict[int, CArray], dict[int, int]]:
    """Returns the pointers of all values, and the sizes of the arrays by bits."""
    last = {v: k for k, n in enumerate(graph.nodes) for v in n.inputs}
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    names = {v: f"in{k}" for k, v in enumerate(graph.inputs)}
    for k, v in enumerate(graph.outputs):
        names.setdefault(v, f"out{k}")
    names.update({v: "0" for v in followers})  # They have no place.
    begun = {v: k for k, n in enumerate(graph.nodes) for v in n.outputs}
    first = {own.output: begun[v] for v, own in followers.items()}
    lives: dict[int, dict[int, Lifetime]] = {8: {}, 16: {}, 32: {}}
    for at, node in enumerate(graph.nodes):
        v, k = node.output, first.get(node.output, at)
        if v not in names:
            own = Lifetime(int(np.prod(shapes[v])), k, last.get(v, at))
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
    text = "\n".join(source.lines)  # Empty values are read in loops of no steps.
    arrays = [
        f"static int{bits}_t {name}_{bits}[{max(n, 1)}];"
        for bits, n in arenas.items()
        if f"{name}_{bits} +" in text
    ]
    helpers = SOURCE.replace("NAME", name).strip().split("\n\n")
    helpers = _used(helpers, name, source.lines)
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


def _used(helpers: list[str], name: str, lines: list[str]) -> list[str]:
    """Returns the helpers that are called, also by one another, in their order."""
    text, found = "\n".join(lines), set()
    for own in reversed(helpers):  # Each calls those before it alone.
        word = re.search(rf"(?<!\w){name}_\w+(?= ?[(;])", own)
        assert word is not None
        if re.search(rf"(?<!\w){word[0]}\b", text):
            found.add(own)
            text += own
    return [own for own in helpers if own in found]


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

/* x / 2^n, halves away from zero. */
static int64_t NAME_divide(int64_t x, int n) {
  const int64_t rest = ((int64_t)1 << n) - 1;
  const int64_t quotient = x >= 0 ? x >> n : ~(~x >> n);
  const int64_t left = x - quotient * ((int64_t)1 << n);
  return quotient + (left > (rest >> 1) + (x < 0));
}

/* a * b / 2^31, halves up, by a nudge; saturates. */
static int64_t NAME_high(int64_t a, int64_t b) {
  const int64_t product = a * b;
  const int64_t nudge = product >= 0 ? (int64_t)1 << 30 : 1 - ((int64_t)1 << 30);
  const int64_t found = (product + nudge) / ((int64_t)1 << 31);
  return found > INT32_MAX ? INT32_MAX : found;
}

/* acc * multiplier / 2^shift, rounded once. */
static int64_t NAME_single(int64_t acc, int64_t multiplier, int shift) {
  const int64_t x = acc * multiplier + (shift ? (int64_t)1 << (shift - 1) : 0);
  return x >= 0 ? x >> shift : ~(~x >> shift);
}

/* acc * multiplier / 2^shift, rounded twice. */
static int64_t NAME_double(int64_t acc, int64_t multiplier, int shift) {
  const int left = shift < 31 ? 31 - shift : 0;
  const uint32_t bits = (uint32_t)((uint64_t)acc << left);
  const int64_t wrapped = bits > INT32_MAX ? (int64_t)bits - ((int64_t)1 << 32) : bits;
  return NAME_divide(NAME_high(wrapped, multiplier), shift > 31 ? shift - 31 : 0);
}

/* 1 / (1 + x / 2^31) for x from 0 to 2^31 - 1, by three of Newton's steps. */
static int64_t NAME_newton(int64_t x) {
  const int64_t total = x + INT32_MAX;
  const int64_t half = (total + (total >= 0 ? 1 : -1)) / 2;
  int64_t y = 1515870810 + NAME_high(half, -1010580540);
  int k;
  for (k = 0; k < 3; ++k) {
    const int64_t step = NAME_high(y, ((int64_t)1 << 29) - NAME_high(half, y)) * 4;
    y += step < INT32_MIN ? INT32_MIN : step > INT32_MAX ? INT32_MAX : step;
  }
  y *= 2;
  return y < INT32_MIN ? INT32_MIN : y > INT32_MAX ? INT32_MAX : y;
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
