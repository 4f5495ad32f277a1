"""Native kernels as JAX calls: under jit, vmap and on several devices."""

import collections
import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from qjax.backends.native.examples import are_apart
from qjax.backends.native.library import ArrayCall, Library, NativeKernel
from qjax.backends.native.plan import make_plan
from qjax.backends.native.reals import Reals
from qjax.backends.native.sharding import call_by_examples, together
from qjax.backends.xla import run as xla
from qjax.graph.graph import Graph
from qjax.graph.sizes import Shape, value_shapes

_MOST_SHAPES = 16  # Of inputs whose kernels are kept.
_LARGE, _MOST_TOGETHER = 1 << 18, 32  # Bytes of parameters; examples that share them.
_CODES = Reals()
_SMALL = 1 << 15  # Bytes of the values of examples that run together, few of each.


class KernelRuns(NamedTuple):
    """A kernel and how often it runs, over inputs one after the other.

    Attributes:
      kernel: The kernel.
      times: Number of runs.
      types: Shape and type of each output, of all runs.
    """

    kernel: NativeKernel
    times: int
    types: tuple[tuple[Shape, np.dtype], ...]

    def prepare(self, threads: int, reals: Reals = _CODES) -> ArrayCall:
        """Returns a function from inputs to outputs: `NativeKernel.prepare`."""
        types = self.types_of(reals)
        return self.kernel.prepare(threads, self.times, types, reals)

    def prepare_pair(
        self, threads: int, given: tuple[Shape, np.dtype], reals: Reals = _CODES
    ) -> Callable[[Any], np.ndarray | None]:
        """Returns `NativeKernel.prepare_pair` of one input, of a shape and type."""
        (made,) = self.types_of(reals)
        return self.kernel.prepare_pair(threads, self.times, given, made, reals)

    def types_of(self, reals: Reals) -> tuple[tuple[Shape, np.dtype], ...]:
        """Returns the shape and type of each output where some are real values."""
        ends = reals.outputs or (None,) * len(self.types)
        single = np.dtype(np.float32)
        pairs = zip(self.types, ends, strict=True)
        return tuple((shape, single if end else own) for (shape, own), end in pairs)


class NativeGraph:
    """A graph of native operations, with kernels for each shape that it meets.

    Args:
      graph: The graph.
      params: Its parameters, NumPy arrays.
      library: The library.
    """

    def __init__(
        self, graph: Graph, params: Mapping[str, np.ndarray], library: Library
    ) -> None:
        self.graph, self.params, self.library = graph, params, library
        names = {name for node in graph.nodes for name in node.params.values()}
        self._nbytes = sum(params[name].nbytes for name in names)
        self._schedules: collections.OrderedDict[Any, KernelRuns] = (
            collections.OrderedDict()
        )
        # Those of schedules, which keep them.
        self._kernels: weakref.WeakValueDictionary[Any, NativeKernel] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def schedule(self, shapes: Sequence[Shape]) -> KernelRuns:
        """Returns the kernel for shapes of the inputs, and how often it runs.

        Examples that never meet run one by one, by one kernel for all batch sizes: they
        stay in the cache.

        Raises:
          ValueError: if an operation does not take the shapes.
          RuntimeError: if the library refuses the plan.
        """
        shapes = [tuple(shape) for shape in shapes]
        key = self.library.isa, tuple(shapes)
        with self._lock:
            if key in self._schedules:
                self._schedules.move_to_end(key)
                return self._schedules[key]
            made = self._schedules[key] = self._schedule(shapes)
            if len(self._schedules) > _MOST_SHAPES:
                self._schedules.popitem(last=False)
            return made

    def _schedule(self, inputs: list[Shape]) -> KernelRuns:
        shapes = value_shapes(self.graph, self.params, inputs)
        times = 1
        if inputs and inputs[0] and inputs[0][0] > 1:
            if are_apart(self.graph, self.params, shapes):
                size = inputs[0][0]
                times = size // self._chunk(size, shapes)
                inputs = [(size // times, *shape[1:]) for shape in inputs]
        kernel = self._kernel(tuple(inputs))
        values = [self.graph.values[v] for v in self.graph.outputs]
        types = tuple(
            (tuple(shapes[v]), np.dtype(value.dtype))
            for v, value in zip(self.graph.outputs, values, strict=True)
        )
        return KernelRuns(kernel, times, types)

    def _chunk(self, size: int, shapes: Sequence[Shape]) -> int:
        """Returns how many examples run together.

        Those of large kernels share them; of small values one run takes many.
        """
        values = {v for node in self.graph.nodes for v in (*node.inputs, *node.outputs)}
        if "conv" in {node.operation for node in self.graph.nodes}:
            return 1
        sizes = (
            math.prod(shapes[v]) * np.dtype(self.graph.values[v].dtype).itemsize
            for v in values
        )
        few = _SMALL * size // max(sum(sizes), 1)
        most = max(few, _MOST_TOGETHER if self._nbytes >= _LARGE else 1)
        most = min(most, size)
        found = max(n for n in range(1, most + 1) if size % n == 0)
        return found if 2 * found >= most else size  # Few divisors: all at once.

    def _kernel(self, shapes: tuple[Shape, ...]) -> NativeKernel:
        key = self.library.isa, shapes
        found = self._kernels.get(key)
        if found is None:
            plan = make_plan(self.graph, self.params, shapes)
            found = self._kernels[key] = NativeKernel(self.library, plan)
        return found

    def call(
        self,
        packed: Any,
        inputs: Sequence[jax.Array],
        threads: int,
        reals: Reals = _CODES,
    ) -> list[jax.Array]:
        """Computes the outputs in JAX.

        Args:
          packed: Packed constants of the kernel for the shapes of the inputs.
          inputs: Codes in the types of the graph, float32 where ``reals`` has them.
          threads: Number of threads, at most.
          reals: Inputs and outputs that are real values.
        """
        own = _NativeCall(self, threads, reals)

        @custom_vmap
        def run(packed: Any, *inputs: jax.Array) -> list[jax.Array]:
            if _has_other_platforms():
                return lax.platform_dependent(
                    packed,
                    *inputs,
                    cpu=lambda packed, *xs: own.shared(packed, xs),
                    default=lambda packed, *xs: own.of_xla(xs),
                )
            return own.shared(packed, inputs)

        @run.def_vmap
        def rule(size: int, is_mapped: Any, packed: Any, *inputs: jax.Array) -> Any:
            _, *mapped = is_mapped
            whole = [
                x if own else jax.numpy.broadcast_to(x, (size, *x.shape))
                for x, own in zip(inputs, mapped, strict=True)
            ]
            found = own.mapped(packed, whole)
            return found, [True] * len(found)

        return run(packed, *inputs)


class _NativeCall(NamedTuple):
    """A call of a native graph in JAX."""

    graph: NativeGraph
    threads: int
    reals: Reals

    def shared(self, packed: Any, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the outputs, on each device those of its own examples."""
        graph, params = self.graph.graph, self.graph.params
        shapes = value_shapes(graph, params, [x.shape for x in inputs])
        if not are_apart(graph, params, shapes):
            return self._bind(packed, inputs)
        whole = self.graph.schedule([x.shape for x in inputs]).kernel

        def call(packed: Any, *inputs: jax.Array) -> list[jax.Array]:
            own = self.graph.schedule([x.shape for x in inputs]).kernel
            # A kernel that examples share may be one for another number of them.
            return self._bind(packed if own is whole else own.packed, inputs)

        outputs = [shapes[v] for v in graph.outputs]
        digest = whole.digest(self.reals)
        return call_by_examples(call, packed, inputs, outputs, digest)

    def mapped(self, packed: Any, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the outputs of several calls, whose inputs have an axis of calls."""
        graph, params = self.graph.graph, self.graph.params
        size, rest = inputs[0].shape[0], (self.threads, self.reals)
        own = value_shapes(graph, params, [x.shape[1:] for x in inputs])
        if not size or not are_apart(graph, params, own):
            run = lambda xs: self.graph.call(packed, xs, *rest)
            return lax.map(run, list(inputs))
        joined = [
            together(x).reshape(math.prod(x.shape[:2]), *x.shape[2:]) for x in inputs
        ]
        packed = self.graph.schedule([x.shape for x in joined]).kernel.packed
        found = self.graph.call(packed, joined, *rest)
        return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in found]

    def _bind(self, packed: Any, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        library, own = (
            self.graph.library,
            self.graph.schedule([x.shape for x in inputs]),
        )
        types = [jax.ShapeDtypeStruct(*of) for of in own.types_of(self.reals)]
        call = jax.ffi.ffi_call(
            target(library, library.isa), types, vmap_method="sequential"
        )
        counts = {"threads": np.int64(self.threads), "times": np.int64(own.times)}
        words = {"words": own.kernel.plan.words, "ends": self.reals.words}
        return list(call(packed, *inputs, **words, **counts))

    def of_xla(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the outputs in XLA, on another platform."""
        graph = self.graph.graph
        given = self.reals.inputs or (None,) * len(inputs)
        ends = zip(given, inputs, strict=True)
        codes = [end.codes(x) if end else x for end, x in ends]
        env = dict(zip(graph.inputs, codes, strict=True))
        params = {name: jax.numpy.asarray(p) for name, p in self.graph.params.items()}
        xla.run_nodes(graph, params, env)
        made = self.reals.outputs or (None,) * len(graph.outputs)
        found = zip(made, graph.outputs, strict=True)
        return [end.values(env[v]) if end else env[v] for end, v in found]


@functools.cache
def target(library: Library, isa: str) -> str:
    """Makes the library known to XLA and returns the name of its call.

    Caches of compiled programs see the name: it has the version of the plans and the
    instruction set.
    """
    name = f"qjax_native_{library.version}_{isa}"
    _register_state(library)
    stages = {
        stage: jax.ffi.pycapsule(function)
        for stage, function in library.handlers.items()
    }
    jax.ffi.register_ffi_target(name, stages, platform="cpu")
    return name


@functools.cache
def _register_state(library: Library) -> None:
    """Makes the type of a parsed plan known to XLA."""
    names = {"type_id": "QjaxNativeStateId", "type_info": "QjaxNativeStateInfo"}
    found: Any = {}
    for key, name in names.items():
        function = getattr(library.own, name)
        function.restype = ctypes.c_void_p
        found[key] = jax.ffi.pycapsule(function())
    jax.ffi.register_ffi_type("qjax_native_plan", found, platform="cpu")


def _has_other_platforms() -> bool:
    return "," in (jax.config.values.get("jax_platforms") or "")
