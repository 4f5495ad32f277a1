"""Runs the graph of a program: by native kernels where there are any, else by XLA."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from qjax.backends.gradients import without_gradients
from qjax.backends.native.library import Library, find_library, thread_count
from qjax.backends.xla import run as xla
from qjax.ends import input_codes, real_output
from qjax.graph.exposure import exposed
from qjax.graph.graph import Graph, Value
from qjax.graph.sizes import Shape
from qjax.mixtures import Mixture
from qjax.tables import html_table, text_table

Backend = Literal["xla", "native"]
Kind = Literal["codes", "real", "sites"]
_log = logging.getLogger("qjax")


class BackendRow(NamedTuple):
    """A node and what runs it.

    Attributes:
      node: The node: ``%4 = conv``.
      path: Its module path.
      backend: ``native`` or ``xla``.
      reason: Why it is XLA; "" for native kernels.
    """

    node: str
    path: str
    backend: str
    reason: str


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """Which nodes of a program run where.

    Attributes:
      rows: The nodes in order.
      isa: Instruction set of the native kernels, "" without them.
      reason: Why there are none, or "".
    """

    rows: tuple[BackendRow, ...]
    isa: str
    reason: str

    @property
    def is_native(self) -> bool:
        """Returns whether native kernels run every node, in one call."""
        return bool(self.isa) and all(row.backend == "native" for row in self.rows)

    def __str__(self) -> str:
        return f"{self._head()}\n{text_table(BackendRow._fields, self.rows)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._head()}</p>{html_table(BackendRow._fields, self.rows)}"

    def _head(self) -> str:
        if not self.isa:
            return f"XLA runs all nodes: {self.reason}."
        count = sum(row.backend == "native" for row in self.rows)
        return f"Native kernels ({self.isa}) run {count} of {len(self.rows)} nodes."


class Execution:
    """The functions of a program, jitted.

    Args:
      graph: Graph of the program.
      params: Its parameters.
    """

    def __init__(self, graph: Graph, params: Mapping[str, Any]) -> None:
        self.graph, self.params = graph, params
        self._mixture = functools.cache(self._make_mixture)
        self._of_native = functools.cache(self._make_native)

    def run(
        self, kind: Kind, inputs: Sequence[Any], backend: Backend | None = None
    ) -> Any:
        """Computes outputs from flat inputs.

        Args:
          kind: ``codes``: from codes to codes; ``real``: from real values to real
            values; ``sites``: from real values to the codes at all quantization points
            by name, and those of the outputs.
          inputs: Inputs, flat.
          backend: ``native`` or ``xla``; None for the best that there is.

        Raises:
          ValueError: for another backend; for ``native`` without a library, on another
            platform than the CPU, or with traced parameters.
        """
        library = self._library(backend)
        if library is None:
            return self._of_xla(kind)(self.params, *inputs)
        mixture = self._mixture(kind == "sites", library)
        shapes = self.code_shapes(kind, inputs)
        # Sizes of an export may be names.
        is_known = all(isinstance(n, int) for shape in shapes for n in shape)
        if not mixture.has_native or not is_known:
            return self._of_xla(kind)(self.params, *inputs)
        constants = mixture.constants(shapes)
        threads = thread_count()
        function = self._of_native(kind, library, library.isa, threads)
        return function(mixture.params, constants, *inputs)

    def report(self) -> BackendReport:
        """Returns which nodes run where, by default."""
        found = find_library()
        why = found.reason or self._refusal(found.library)
        if found.library is None or why:
            rows = [_row(node, why) for node in self.graph.nodes]
            return BackendReport(tuple(rows), "", why)
        mixture = self._mixture(False, found.library)
        return BackendReport(
            tuple(
                _row(node, why + mixture.inside(node))
                for piece in mixture.pieces
                for node, why in zip(piece.graph.nodes, piece.reasons, strict=True)
            ),
            found.library.isa,
            "",
        )

    def mixture(self, backend: Backend | None) -> Mixture | None:
        """Returns the pieces of the graph, or None where XLA runs all of it."""
        library = self._library(backend)
        return None if library is None else self._mixture(False, library)

    def _library(self, backend: Backend | None) -> Library | None:
        """Returns the library if it is to be used; see `run`."""
        if backend not in (None, *get_args(Backend)):
            raise ValueError(
                f"`backend` must be 'native', 'xla' or None, got {backend!r}."
            )
        if backend == "xla":
            return None
        found = find_library()
        why = found.reason or self._refusal(found.library)
        if not why:
            return found.library
        if backend == "native":
            raise ValueError(f"`backend='native'` cannot be: {why}.")
        if found.library is None and "QJAX_NATIVE=0" not in why:
            say_once(f"XLA runs integer programs: {why}.")
        return None

    def _refusal(self, library: Library | None) -> str:
        """Returns why a library does not run this program, or ""."""
        if library is None:
            return ""
        if jax.default_backend() != "cpu":
            return f"native kernels run on the CPU, not on {jax.default_backend()}"
        if self._is_traced:
            return "the parameters are traced"
        if not library.handlers:
            return "the native library was built without the headers of jaxlib"
        return ""

    @functools.cached_property
    def _is_traced(self) -> bool:
        return any(isinstance(p, jax.core.Tracer) for p in self.params.values())

    def _make_mixture(self, has_sites: bool, library: Library) -> Mixture:
        graph = self._exposed[0] if has_sites else self.graph
        return Mixture(graph, self.params, library)

    @functools.cached_property
    def _exposed(self) -> tuple[Graph, dict[str, int]]:
        """Returns the graph with all sites after its outputs, and their names."""
        graph, sites = exposed(self.graph)
        outputs = *graph.outputs, *sites.values()
        return dataclasses.replace(graph, outputs=outputs, sites={}), sites

    # Jitted functions.

    def _of_xla(self, kind: Kind) -> Callable[..., Any]:
        return {"codes": self.codes, "real": self._real, "sites": self._sites}[kind]

    def _make_native(
        self, kind: Kind, library: Library, isa: str, threads: int
    ) -> Callable[..., Any]:
        mixture = self._mixture(kind == "sites", library)

        def codes(params: Any, constants: Any, *inputs: jax.Array) -> Any:
            return mixture.run(params, constants, inputs, threads)

        def real(params: Any, constants: Any, *inputs: jax.Array) -> Any:
            ends = self.real_inputs, self.real_outputs
            given = self.arranged(inputs)
            found = mixture.run(params, constants, given, threads, ends)
            return self.put_back(found)

        def sites(params: Any, constants: Any, *inputs: jax.Array) -> Any:
            ends, given = (self.real_inputs, ()), self.arranged(inputs)
            found = mixture.run(params, constants, given, threads, ends)
            count, names = len(self.graph.outputs), self._exposed[1]
            return dict(zip(names, found[count:], strict=True)), found[:count]

        if kind == "codes":
            return jax.jit(codes)
        return jax.jit(without_gradients({"real": real, "sites": sites}[kind]))

    @functools.cached_property
    def codes(self) -> Callable[..., list[jax.Array]]:
        """Returns the program on XLA, ``(params, *codes) -> codes``, jitted."""

        def codes(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            values = xla.run(self.graph, params, inputs)
            return [values[v] for v in self.graph.outputs]

        return jax.jit(codes)

    def float_values(self) -> list[str]:
        """Returns the types of floating-point values in `codes`: none."""
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.inputs]
        closed = jax.make_jaxpr(self.codes)(self.params, *shapes)
        return sorted(set(_float_types(closed.jaxpr)))

    @functools.cached_property
    def _sites(self) -> Callable[..., Any]:
        def sites(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            found: dict[str, jax.Array] = {}
            values = xla.run(self.graph, params, self.quantize(inputs), found)
            return found, [values[v] for v in self.graph.outputs]

        return jax.jit(sites)

    @functools.cached_property
    def _real(self) -> Callable[..., list[jax.Array]]:
        @without_gradients
        def real(params: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
            return self.dequantize(self.codes(params, *self.quantize(inputs)))

        return jax.jit(real)

    @functools.cached_property
    def jitted_quantize(self) -> Callable[..., list[jax.Array]]:
        """Returns `quantize`, jitted."""
        return jax.jit(self.quantize)

    # The ends.

    def code_shapes(self, kind: Kind, inputs: Sequence[Any]) -> list[Shape]:
        """Returns the shapes of the codes of inputs, which are those of `run`."""
        return [np.shape(x) for x in inputs]

    @property
    def inputs(self) -> list[Value]:
        """Returns the inputs of the graph."""
        return [self.graph.values[v] for v in self.graph.inputs]

    @property
    def real_inputs(self) -> list[Value | None]:
        """Returns the values whose real values a call takes; None for codes."""
        return list(self.inputs)

    @property
    def real_outputs(self) -> list[Value | None]:
        """Returns the values whose real values a call returns; None for codes."""
        return [self.graph.values[v] for v in self.graph.outputs]

    def arranged(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns real inputs in the shapes of their codes."""
        return list(inputs)

    def put_back(self, outputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns real outputs, which have the shapes of codes, in their own."""
        return list(outputs)

    def quantize(self, inputs: Sequence[Any]) -> list[jax.Array]:
        """Computes the codes of real inputs."""
        pairs = zip(self.arranged(inputs), self.real_inputs, strict=True)
        return [input_codes(x, v) if v else x for x, v in pairs]

    def dequantize(self, outputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the real values of output codes."""
        pairs = zip(outputs, self.real_outputs, strict=True)
        return self.put_back([real_output(q, v) if v else q for q, v in pairs])


def _float_types(jaxpr: Any) -> list[str]:
    found = []
    atoms = [*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars]
    for eqn in jaxpr.eqns:
        atoms += [*eqn.invars, *eqn.outvars]
        for inner in jex.jaxprs_in_params(eqn.params):
            found += _float_types(getattr(inner, "jaxpr", inner))
    inexact = (a for a in atoms if jnp.issubdtype(a.aval.dtype, jnp.inexact))
    return [*found, *(str(a.aval) for a in inexact)]


def _row(node: Any, why: str) -> BackendRow:
    called = f"%{node.output} = {node.operation}"
    return BackendRow(called, node.path, "xla" if why else "native", why)


@functools.cache
def say_once(message: str) -> None:
    """Logs a warning the first time."""
    _log.warning(message)
