"""A graph in pieces that native kernels and XLA run, between real values."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.backends.native.calls import NativeGraph
from qjax.backends.native.library import Library
from qjax.backends.native.partition import Piece, partition
from qjax.backends.native.reals import RealEnd, Reals, input_end, output_end
from qjax.backends.xla import run as xla
from qjax.ends import as_single, input_codes, real_output
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.sizes import Shape, body_shapes, value_shapes

# Of kernels in a body that XLA runs otherwise. LSTM with a sort, 32 steps, milliseconds
# of one core with native kernels and without: kernels of 32 KB at batch 1 .17 and .29,
# at batch 8 1.00 and 1.09; 8 KB .11 and .11, .60 and .39.
_LEAST_BYTES = 1 << 14


class Mixture:
    """A graph in pieces, of which native kernels run some.

    Args:
      graph: The graph.
      params: Its parameters, concrete.
      library: The library of native kernels.
      least: Bytes of kernels from which nodes are worth a call of native kernels.
    """

    def __init__(
        self,
        graph: Graph,
        params: Mapping[str, Any],
        library: Library,
        least: int = 0,
    ) -> None:
        self.graph, self.library = graph, library
        arrays = {name: np.asarray(p) for name, p in params.items()}
        self._arrays = arrays
        shapes = value_shapes(
            graph, arrays, [graph.values[v].shape for v in graph.inputs]
        )
        self.pieces = partition(graph, arrays, shapes, library.refusal)
        self.native: dict[int, NativeGraph] = {}
        # Loops that XLA runs, around native kernels, by their first output.
        self.loops: dict[int, Mixture] = {}
        rest: list[Graph] = []
        for k, piece in enumerate(self.pieces):
            if piece.is_native and _kernel_bytes(piece.graph, arrays) >= least:
                self.native[k] = NativeGraph(piece.graph, arrays, library)
                continue
            rest.append(piece.graph)
            for node in piece.graph.nodes:
                for body in node.graphs.values():
                    inner = Mixture(body, params, library, _LEAST_BYTES)
                    if inner.has_native:
                        self.loops[node.output] = inner
        names = {
            name
            for graph in rest
            for _, own in graph.walk()
            for node in own.nodes
            for name in node.params.values()
        }
        self.params = {name: p for name, p in params.items() if name in names}
        # Values that a piece reads and another one makes.
        self._shared = {v for piece in self.pieces for v in piece.graph.inputs}

    @property
    def has_native(self) -> bool:
        """Returns whether native kernels run some of it."""
        return bool(self.native or self.loops)

    def inside(self, node: Node) -> str:
        """Returns which nodes of a loop native kernels run, where XLA runs the loop."""
        if node.output not in self.loops:
            return ""
        inner = self.loops[node.output]
        count = sum(len(own.graph.nodes) for own in inner.native.values())
        all_ = sum(len(piece.graph.nodes) for piece in inner.pieces)
        return f"; native kernels run {count} of {all_} nodes of its body"

    @property
    def is_whole(self) -> bool:
        """Returns whether native kernels run all of it in one call."""
        return len(self.pieces) == 1 and bool(self.native)

    def constants(self, inputs: Sequence[Shape]) -> list[Any]:
        """Returns the packed constants of its kernels for shapes of its inputs.

        Those of a loop are a list.
        """
        if self.is_whole:
            return [self.native[0].schedule(inputs).kernel.array]
        shapes = value_shapes(self.graph, self._arrays, inputs)
        given = lambda vs: [shapes[v] for v in vs]
        found: list[Any] = []
        for k, piece in enumerate(self.pieces):
            if k in self.native:
                runs = self.native[k].schedule(given(piece.graph.inputs))
                found.append(runs.kernel.array)
                continue
            for node in self._own_loops(piece):
                own = body_shapes(node, given(node.inputs))
                found.append(self.loops[node.output].constants(own))
        return found

    def _own_loops(self, piece: Piece) -> list[Node]:
        """Returns the loops of a piece that have native kernels inside."""
        return [node for node in piece.graph.nodes if node.output in self.loops]

    def run(
        self,
        params: Mapping[str, jax.Array],
        constants: Sequence[Any],
        inputs: Sequence[jax.Array],
        threads: int,
        real: tuple[Sequence[Value | None], Sequence[Value | None]] = ((), ()),
    ) -> list[jax.Array]:
        """Computes the outputs in JAX.

        Args:
          params: Parameters of the pieces that XLA runs.
          constants: From `constants`.
          inputs: Codes in the types of the graph, and real values.
          threads: Threads of native kernels, at most.
          real: For each input, and for each output, the value whose real values it
            has; None for codes. Empty if all are codes.
        """
        env = _Values(self.graph, inputs, real)
        packed = iter(constants)
        for k, piece in enumerate(self.pieces):
            if k not in self.native:
                bodies = {
                    node.output: functools.partial(
                        self.loops[node.output].run,
                        params,
                        next(packed),
                        threads=threads,
                    )
                    for node in self._own_loops(piece)
                }
                for v in piece.graph.inputs:
                    env.codes[v] = env.code(v)
                xla.run_nodes(piece.graph, params, env.codes, bodies=bodies)
                continue
            ends = [env.input_end(v) for v in piece.graph.inputs]
            pairs = zip(ends, piece.graph.inputs, strict=True)
            given = [as_single(env.real[v]) if end else env.code(v) for end, v in pairs]
            made = [
                None if v in self._shared else env.output_end(v)
                for v in piece.graph.outputs
            ]
            reals = Reals(tuple(ends), tuple(made))
            found = self.native[k].call(next(packed), given, threads, reals)
            for v, end, x in zip(piece.graph.outputs, made, found, strict=True):
                (env.found if end else env.codes)[v] = x
        return env.outputs()


class _Values:
    """The values of a run: codes, and real ones at the ends of the graph.

    Args:
      graph: The graph.
      inputs: Inputs.
      real: As `Mixture.run` takes it.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Sequence[jax.Array],
        real: tuple[Sequence[Value | None], Sequence[Value | None]],
    ) -> None:
        self._graph = graph
        given, made = real
        self._given = dict(zip(graph.inputs, given, strict=bool(given)))
        self._made = made or [None] * len(graph.outputs)
        self.codes: dict[int, jax.Array] = {}
        self.real: dict[int, jax.Array] = {}  # Inputs, of any type.
        self.found: dict[int, jax.Array] = {}  # Outputs that kernels made real.
        for v, x in zip(graph.inputs, inputs, strict=True):
            (self.real if self._given.get(v) else self.codes)[v] = x

    def code(self, v: int) -> jax.Array:
        """Returns the codes of a value."""
        if v not in self.codes:
            own = self._given[v]
            assert own is not None
            self.codes[v] = input_codes(self.real[v], own)
        return self.codes[v]

    def input_end(self, v: int) -> RealEnd | None:
        """Returns how kernels compute the codes of a value, if they do."""
        own = self._given.get(v)
        return input_end(own) if own else None

    def output_end(self, v: int) -> RealEnd | None:
        """Returns how kernels make an output real, if it is needed so alone."""
        outputs = zip(self._graph.outputs, self._made, strict=True)
        first, *others = [value for u, value in outputs if u == v] or [None]
        is_one = first and all(value == first for value in others)
        return output_end(first) if first and is_one else None

    def outputs(self) -> list[jax.Array]:
        """Returns the outputs."""
        pairs = zip(self._graph.outputs, self._made, strict=True)
        return [self._output(v, value) for v, value in pairs]

    def _output(self, v: int, value: Value | None) -> jax.Array:
        if v in self.found:
            return self.found[v]
        return real_output(self.code(v), value) if value else self.code(v)


def _kernel_bytes(graph: Graph, params: Mapping[str, np.ndarray]) -> int:
    names = {node.params["kernel"] for node in graph.nodes if "kernel" in node.params}
    return sum(params[name].nbytes for name in names)
