"""Writes an integer program as C99."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.formats.c99.calls import WRITER, CArray
from qjax.formats.c99.emission import CEmission
from qjax.formats.c99.helpers import SOURCE
from qjax.formats.c99.scopes import Scope, Slot, assign_slots, make_scope
from qjax.formats.c99.text import Source, c_type, identifier, number
from qjax.formats.support import check_operations, check_whole
from qjax.graph import reference
from qjax.graph.arena import Lifetime, plan
from qjax.graph.atomic import write_atomically
from qjax.graph.graph import Value
from qjax.graph.sizes import input_shapes
from qjax.graph.streaming import streamed
from qjax.program import IntegerProgram


class CSource(NamedTuple):
    """A program in C.

    Attributes:
      header: Text of the header.
      source: Text of the source.
      arena_bytes: Bytes of the static arrays.
      constant_bytes: Bytes of weights and tables.
      state_bytes: Bytes of the state of a step; 0 without one.
    """

    header: str
    source: str
    arena_bytes: int
    constant_bytes: int
    state_bytes: int = 0


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

    A program that was lowered with ``streaming`` has two functions more, which compute
    what `IntegerProgram.step` does: ``NAME_reset(NAME_state *state)`` and
    ``NAME_step(NAME_state *state, const int8_t *in0, int32_t *out0)``.

    Args:
      program: The program.
      folder: Folder of both files, which are replaced; None to write none.
      name: Prefix of files and names, a name of C.
      batch_size: Size of the leading axis of the first input that leaves it free, and
        of those that were traced with the same one. Others keep what they had.

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
    check_operations(WRITER, program.graph)
    functions = [_run(program, batch_size)]
    if any(program.graph.values[v].time_axis is not None for v in program.graph.inputs):
        functions.append(_step(program, batch_size))
    source, memory = Source(name), Memory(name)
    for function in functions:
        memory.add(function.scope)
    texts = [_text(own, source, memory) for own in functions]
    found = _written(functions, texts, source, memory)
    if folder is not None:
        path = pathlib.Path(folder)
        write_atomically(path / f"{name}.h", found.header.encode())
        write_atomically(path / f"{name}.c", found.source.encode())
    return found


class _Function(NamedTuple):
    """A function in C.

    Attributes:
      kind: ``run`` or ``step``.
      scope: Its graph, whose first inputs and outputs are states.
      params: Parameters of the graph.
      start: Codes of the first states.
      most_steps: Steps that there may be; None for any number.
    """

    kind: str
    scope: Scope
    params: Mapping[str, np.ndarray]
    start: Sequence[np.ndarray] = ()
    most_steps: int | None = None

    def arrays(self, states: str = "state->s") -> tuple[list[CArray], ...]:
        """Returns states, inputs and outputs."""
        graph, count = self.scope.graph, len(self.start)

        def named(prefix: str, values: Sequence[int]) -> list[CArray]:
            return [
                CArray(
                    f"{prefix}{k}",
                    self.scope.shapes[v],
                    c_type(graph.values[v].dtype),
                    graph.values[v].low,
                    graph.values[v].high,
                )
                for k, v in enumerate(values)
            ]

        return (
            named(states, graph.inputs[:count]),
            named("in", graph.inputs[count:]),
            named("out", graph.outputs[count:]),
        )

    def grids(self) -> list[Value]:
        """Returns inputs and outputs as the graph has them."""
        graph, count = self.scope.graph, len(self.start)
        return [graph.values[v] for v in graph.inputs[count:] + graph.outputs[count:]]


def _run(program: IntegerProgram, batch_size: int) -> _Function:
    params = _wide(program.params)
    shapes = input_shapes(program.graph, batch_size)
    return _Function("run", make_scope(program.graph, params, shapes), params)


def _step(program: IntegerProgram, batch_size: int) -> _Function:
    graph = program.graph
    own = streamed(graph, program.params)
    codes, shapes = [], []
    for v, shape in zip(graph.inputs, input_shapes(graph, batch_size), strict=True):
        x = graph.values[v]
        codes.append(np.full(shape, min(max(x.zero_point, x.low), x.high), np.int64))
        axis = x.time_axis
        shapes.append(tuple(1 if d == axis else n for d, n in enumerate(shape)))
    values = reference.run(own.start, own.start_params, codes)
    start = [values[v] for v in own.start.outputs]
    params = _wide(own.params)
    shapes = [*(x.shape for x in start), *shapes]
    scope = make_scope(own.step, params, shapes, carries=len(start))
    most = None if own.counter is None else own.counter[1]
    return _Function("step", scope, params, start, most)


def _wide(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(p).astype(np.int64) for name, p in params.items()}


class Memory:
    """Static arrays, which functions share.

    Integers of 8 bits lie among those of 32 or 16 bits, if there are any: in C they may
    lie in an array of any type.

    Args:
      name: Prefix of the arrays.
    """

    def __init__(self, name: str):
        self.name = name
        self.sizes: dict[int, int] = {}  # Width -> elements.
        self._places: dict[int, list[tuple[int, int, int]]] = {}  # Of each graph.
        self._scopes: list[Scope] = []

    def add(self, scope: Scope) -> None:
        """Places what a graph needs."""
        slots: list[Slot] = []
        assign_slots(scope, slots)
        there = {slot.bits for slot in slots}
        home = max({8, *there} - ({16} if 32 in there else set()))
        places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(slots)
        for width in {home, 16, 32} & {home, *there}:
            spans = {}
            for k, slot in enumerate(slots):
                if width == (home if slot.bits == 8 else slot.bits):
                    spans[k] = _counted(slot, width)
            found, size = plan(spans)
            self.sizes[width] = max(size, self.sizes.get(width, 0))
            for k, at in found.items():
                places[k] = (width, slots[k].bits, at)
        self._places[id(scope)] = places
        self._scopes.append(scope)  # So that no other has its number.

    def pointer(self, scope: Scope, slot: int, ctype: str) -> str:
        """Returns a pointer to the first element of a slot."""
        width, bits, at = self._places[id(scope)][slot]
        return f"(({ctype} *){self.name}_{width} + {at * width // bits})"


def _counted(slot: Slot, width: int) -> Lifetime:
    """Returns a lifetime in elements of an array."""
    size = -(-slot.life.size * slot.bits // width)
    return slot.life._replace(size=size)


def _text(function: _Function, source: Source, memory: Memory) -> list[str]:
    """Returns the lines of a function."""
    states, inputs, outputs = function.arrays()
    source.lines = []
    places = lambda slot, ctype: memory.pointer(function.scope, slot, ctype)
    emission = CEmission(source, function.params, places)
    emission.emit(function.scope, [*states, *inputs], states, outputs)
    text = "\n".join(source.lines)
    ends = [x.name for x in (*inputs, *outputs)] + ["state"] * bool(states)
    unused = [x for x in ends if not re.search(rf"(?<!\w){x}\b", text)]
    return [*(f"  (void){x};" for x in unused), *source.lines]


def _written(
    functions: Sequence[_Function],
    texts: Sequence[Sequence[str]],
    source: Source,
    memory: Memory,
) -> CSource:
    name, upper = source.prefix, identifier(source.prefix).upper()
    whole = "\n".join(line for text in texts for line in text)
    arrays, nbytes = [], 0
    for label, sizes in (("", memory.sizes), ("scratch", source.scratches)):
        for bits, n in sorted(sizes.items()):
            called = f"{name}_{label}{bits}"
            if called in whole:  # Empty values are read in loops of no steps.
                arrays.append(f"static int{bits}_t {called}[{max(n, 1)}];")
                nbytes += bits // 8 * n
    ends, prototypes, bodies, state_bytes = [], [], [], 0
    for function, text in zip(functions, texts, strict=True):
        ends += _sizes(function, upper)
        prototype = _prototype(function, name)
        prototypes.append(f"{prototype};")
        bodies.append(_body(prototype, text))
        if function.most_steps is not None:
            ends.append(f"#define {upper}_STEP_COUNT {function.most_steps}")
            ends.append("/* Steps of a sequence, at most: then reset the state. */")
        if function.kind == "step":
            state, state_bytes = _state(function, name)
            ends.append(state)
            prototype = f"void {name}_reset({name}_state *state)"
            prototypes.append(f"{prototype};")
            bodies.append(_body(prototype, _reset(function, source)))
    header = HEADER.format(
        name=name,
        upper=upper,
        ends="\n".join(ends),
        nbytes=nbytes,
        prototypes="\n".join(prototypes),
    )
    helpers = _used(SOURCE.replace("NAME", name).strip().split("\n\n"), name, whole)
    parts = [f'#include "{name}.h"', "", *helpers, *source.constants, *arrays, ""]
    text = "\n".join([*parts, *bodies])
    return CSource(header, text, nbytes, source.nbytes, state_bytes)


def _body(prototype: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{prototype} {{", *lines, "}", ""])


def _prototype(function: _Function, name: str) -> str:
    states, inputs, outputs = function.arrays()
    ends = [f"{name}_state *state"] if states else []
    ends += [f"const {x.ctype} *{x.name}" for x in inputs]
    ends += [f"{x.ctype} *{x.name}" for x in outputs]
    return f"void {name}_{function.kind}({', '.join(ends)})"


def _sizes(function: _Function, upper: str) -> list[str]:
    """Returns what the header says of inputs and outputs."""
    _, inputs, outputs = function.arrays()
    step = "STEP_" if function.kind == "step" else ""
    found = []
    for t, x in zip([*inputs, *outputs], function.grids(), strict=True):
        found.append(f"#define {upper}_{step}{t.name.upper()}_SIZE {max(t.size, 1)}")
        found.append(f"/* {t.name}: shape {list(t.shape)}, {_grid(x)} */")
    return found


def _state(function: _Function, name: str) -> tuple[str, int]:
    """Returns the type of the state of a step, and its bytes."""
    states, _, _ = function.arrays(states="s")
    lines = [f"  {x.ctype} {x.name}[{max(x.size, 1)}];" for x in states]
    size = sum(x.size * np.dtype(x.ctype.removesuffix("_t")).itemsize for x in states)
    lines = lines or ["  int8_t none;"]
    return "\n".join(["typedef struct {", *lines, f"}} {name}_state;"]), size


def _reset(function: _Function, source: Source) -> list[str]:
    """Returns the lines that fill a state."""
    states, _, _ = function.arrays()
    source.lines = []
    for t, codes in zip(states, function.start, strict=True):
        if not codes.size:
            continue
        is_one = codes.min() == codes.max()
        first = (
            number(int(codes.flat[0])) if is_one else source.constant(codes, "start")
        )
        with source.loops([t.size]) as names:
            value = first if is_one else f"{first}[{names[0]}]"
            source.line(f"{t.name}[{names[0]}] = ({t.ctype}){value};")
    return source.lines


def _used(helpers: Sequence[str], name: str, text: str) -> list[str]:
    """Returns the helpers that are called, also by one another, in their order."""
    found = set()
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


HEADER = """#ifndef {name}_H
#define {name}_H

#ifdef {upper}_ARENA_BYTES
#error "Another program is called {name}, but for capitals: write it by another name."
#endif

#include <stdint.h>

{ends}
#define {upper}_ARENA_BYTES {nbytes}

{prototypes}

#endif
"""
