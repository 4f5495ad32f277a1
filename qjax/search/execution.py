"""Executions of a function over configurations: in a loop, under vmap, on a mesh."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.leaves import is_array
from qjax.tables import show

Execution = Literal["auto", "vmap", "loop", "shard"]
Values = dict[str, np.ndarray]  # Name of a number -> one for each configuration.

CONFIG = "config"  # The mesh axis of configurations.
ALONE = "value"  # Name of the number of a function that returns one.


@dataclasses.dataclass(frozen=True)
class Configurations:
    """The arguments of a function in each of its calls.

    Attributes:
      schemes: The stacked schemes, of NumPy's arrays.
      seeds: Seed of each call, int32; None if the function takes none.
      data: Further arguments, the same in each call.
    """

    schemes: chex.ArrayTree
    seeds: np.ndarray | None
    data: tuple[Any, ...]

    def __len__(self) -> int:
        return len(jax.tree.leaves((self.schemes, self.seeds))[0])

    def at(self, places: Any) -> tuple[list[Any], Any]:
        """Returns the bits of schemes, and seeds, at some places."""
        # Not as schemes: these look at bits, which may lie on other hosts.
        leaves = jax.tree.leaves(self.schemes)
        return jax.tree.map(lambda x: x[places], (leaves, self.seeds))


@dataclasses.dataclass(frozen=True)
class Runner:
    """A compiled function of chunks of configurations.

    Attributes:
      run: Maps the places of at most `chunk` configurations to the values there; of
        others with the same data, if they are given.
      chunk: Number of configurations of a call.
      execution: Way of running them.
      types: Name of a value -> bool, int or float.
    """

    run: Callable[..., Values]  # (places, configurations=own)
    chunk: int
    execution: str
    types: Mapping[str, type]


def make_runner(
    fn: Callable[..., Any],
    own: Configurations,
    *,
    execution: Execution = "auto",
    chunk: int | None = None,
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> Runner:
    """Traces a function once, for any number of configurations.

    Args:
      fn: Function of a scheme, a seed if there are seeds, and data.
      own: Its arguments.
      execution: Way of running: `sweep` has them.
      chunk: Configurations of a call; None: by memory.
      memory: Bytes that a call may take; None: half of what is free.
      mesh: Mesh with an axis ``config``; None: that of all devices of this process.

    Returns:
      The runner. It compiles with its first call.

    Raises:
      TypeError, ValueError: as `sweep`.
    """
    mesh = _mesh(mesh, execution)
    way = _chosen(execution, mesh)
    takes_seed, structure = own.seeds is not None, jax.tree.structure(own.schemes)

    def named(bits: Any, seed: Any, *data: Any) -> dict[str, jax.Array]:
        scheme = jax.tree.unflatten(structure, bits)
        return traced_numbers(fn(scheme, *((seed,) * takes_seed), *data))

    inner = jax.jit(named)
    data = jax.device_put(own.data) if mesh is None else _placed(own.data, mesh)
    width = 1 if mesh is None else mesh.shape[CONFIG]
    many = inner if way == "loop" else _many(inner, mesh, len(data))
    # Inside of a mesh everything is traced anew: there it is looked at.
    is_local = mesh is not None and mesh.axis_names == (CONFIG,)
    first = own.at(np.zeros(width, np.int32)) if is_local else own.at(0)
    looked = many if is_local else inner
    traced = _trace(
        looked, (*_spread(first, mesh if is_local else None), *data), show(fn)
    )
    types = {name: _type(x.dtype) for name, x in sorted(traced.out_info.items())}
    if way == "loop":
        loop = lambda places, given=own: _rows(
            [jax.device_get(inner(*given.at(k), *data)) for k in places]
        )
        return Runner(loop, 1 if chunk is None else chunk, way, types)
    if chunk is None:
        chunk = _chunk(traced.jaxpr, len(own), width, memory, way)
    size = -(-chunk // width) * width

    def run(places: Sequence[int], given: Configurations = own) -> Values:
        padded = [*places, *[places[-1]] * (size - len(places))]
        found = many(*_spread(given.at(np.asarray(padded)), mesh), *data)
        return {k: _local(x)[: len(places)] for k, x in found.items()}

    return Runner(run, size, way, types)


def _type(dtype: Any) -> type:
    """Returns the type of Python's numbers for a dtype."""
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    return bool if dtype == jnp.bool_ else int if is_whole else float


def spans_processes(mesh: Mesh | None) -> bool:
    """Returns whether the devices of a mesh belong to several processes."""
    return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1


def _mesh(mesh: Mesh | None, execution: str) -> Mesh | None:
    """Returns the mesh of an execution; raises for one without configurations."""
    if execution not in ("auto", "vmap", "loop", "shard"):
        raise ValueError(
            f'`execution` must be "auto", "vmap", "loop" or "shard", got {execution!r}.'
        )
    if mesh is None:
        devices = np.asarray(jax.local_devices())
        is_wide = execution == "shard" or (execution == "auto" and len(devices) > 1)
        return Mesh(devices, (CONFIG,)) if is_wide else None
    if execution in ("vmap", "loop"):
        raise ValueError(
            f'A `mesh` is for execution="shard", got {execution!r}. Leave one of them '
            "out."
        )
    if CONFIG not in mesh.axis_names:
        raise ValueError(
            f"`mesh` must have an axis {CONFIG!r} for the configurations, got the axes "
            f"{mesh.axis_names}."
        )
    return mesh


def _chosen(execution: str, mesh: Mesh | None) -> str:
    if execution != "auto":
        return execution
    if mesh is not None:
        return "shard"
    # On the CPU convolutions by several kernels become grouped ones, three times slower
    # than the step of one configuration; and a dense step fills its cores.
    return "loop" if jax.default_backend() == "cpu" else "vmap"


def traced_numbers(found: Any) -> dict[str, jax.Array]:
    """Returns the numbers that a traced function returns, as JAX has them.

    Raises:
      TypeError, ValueError: as `named_numbers`; for numbers that float32 does not hold.
    """
    return {name: _traced(name, x) for name, x in named_numbers(found).items()}


def _traced(name: str, value: Any) -> jax.Array:
    """Returns a number as an array; an integer beyond those of JAX as a float."""
    if isinstance(value, jax.Array):
        return value
    array, kind = np.asarray(value), jax.dtypes.canonicalize_dtype(float)
    number, most = array.item(), float(jnp.finfo(kind).max)
    if isinstance(number, bool):
        return jnp.asarray(value)
    if isinstance(number, int):
        own = np.dtype(np.int64) if array.dtype == object else array.dtype
        ends = jnp.iinfo(jax.dtypes.canonicalize_dtype(own))
        if ends.min <= number <= ends.max:
            return jnp.asarray(value)
    if most < abs(number) < math.inf:
        raise ValueError(
            f"`fn` returns {show(number)} for {name!r}, which {kind.name} does not "
            "hold. Scale it, or pass `compiled=False`."
        )
    return jnp.asarray(value if isinstance(number, float) else float(number), kind)


def named_numbers(found: Any) -> dict[str, Any]:
    """Returns the numbers that a function returns, by name, as they are.

    Raises:
      TypeError: for anything but a number or a dict of them.
      ValueError: for an array of several, and for none.
    """
    by_name = dict(found) if isinstance(found, Mapping) else {ALONE: found}
    if not by_name:
        raise ValueError("`fn` must return at least one number, got an empty dict.")
    for name, value in by_name.items():
        if not isinstance(name, str):
            raise TypeError(f"`fn` must name its numbers by texts, got {name!r}.")
        _check_number(name, value)
    return by_name


def _check_number(name: str, value: Any) -> None:
    """Raises unless a value is one real number, an integer or a truth value."""
    what = "" if name == ALONE else f" for {name!r}"
    shape, is_number = (), isinstance(value, int | float)
    if not is_number and value is not None and is_array(value):
        shape, dtype = np.shape(value), jax.dtypes.result_type(value)
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        is_number = any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not is_number:
        raise TypeError(
            "`fn` must return a number or a dict of numbers by name, got "
            f"{type(value).__name__}{what}."
        )
    if shape:
        raise ValueError(
            "`fn` must return a number or a dict of numbers by name, got an array of "
            f"shape {shape}{what}. Return its mean, or one number a name."
        )


def _trace(inner: Any, arguments: tuple[Any, ...], name: str) -> Any:
    """Traces a function of traced bits."""
    try:
        return inner.trace(*arguments)
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            f"{name} needs the value of what is traced: bits, or what is computed by "
            "them. In a sweep bits are data, of one program for all of them. Calibrate "
            "before the sweep (ranges know no bits), keep `float`, `if` and NumPy away "
            "from traced values, or pass `compiled=False`: then it is called with each "
            f"scheme as it is.\n{error}"
        ) from error


def _rows(rows: Sequence[Mapping[str, Any]]) -> Values:
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}


def _many(inner: Any, mesh: Mesh | None, width: int) -> Callable[..., Any]:
    """Returns the function of a chunk of configurations."""
    vmapped = jax.vmap(inner, (0, 0, *[None] * width))
    if mesh is None:
        return jax.jit(vmapped)
    over = PartitionSpec(CONFIG)
    if mesh.axis_names != (CONFIG,):
        return jax.jit(vmapped, out_shardings=NamedSharding(mesh, over))

    def part(bits: Any, seeds: Any, *data: Any) -> Any:
        if len(jax.tree.leaves((bits, seeds))[0]) > 1:
            return vmapped(bits, seeds, *data)
        # One configuration a device: a convolution by one kernel stays one.
        one = jax.tree.map(lambda x: x[0], (bits, seeds))
        return jax.tree.map(lambda x: x[None], inner(*one, *data))

    specs = (over, over, *[PartitionSpec()] * width)
    options: dict[str, Any] = {"in_specs": specs, "out_specs": over}
    return jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **options))


def _placed(data: tuple[Any, ...], mesh: Mesh) -> tuple[Any, ...]:
    """Returns data on a mesh: copied, unless it has a place there already."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if mesh.axis_names == (CONFIG,):
        return jax.tree.map(lambda x: _put(x, everywhere), data)

    def place(x: Any) -> Any:
        own = getattr(x, "sharding", None)
        is_there = isinstance(own, NamedSharding) and own.mesh == mesh
        return x if is_there else _put(x, everywhere)

    return jax.tree.map(place, data)


def _spread(configurations: Any, mesh: Mesh | None) -> Any:
    """Returns configurations dealt to the devices of a mesh."""
    if mesh is None:
        return configurations
    over = NamedSharding(mesh, PartitionSpec(CONFIG))
    return jax.tree.map(lambda x: _put(x, over), configurations)


def _put(x: Any, sharding: NamedSharding) -> Any:
    """Puts an array that all processes hold on a mesh."""
    if not spans_processes(cast(Mesh, sharding.mesh)):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(jax.dtypes.result_type(x), jax.dtypes.prng_key):
        bits = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, sharding, lambda k: own[k])


def _local(x: jax.Array) -> np.ndarray:
    """Returns an array that may lie on the devices of several processes."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _chunk(
    jaxpr: Any, count: int, width: int, memory: int | None, execution: str
) -> int:
    """Returns the configurations of a call: of equal calls, as few as fit."""
    if execution == "shard" and jax.default_backend() == "cpu" and memory is None:
        return width  # One on each device: `_many`.
    free = _free_bytes() if memory is None else memory
    most = max(1, int(free // max(1, peak_bytes(jaxpr)))) * width
    calls = -(-count // most)
    return -(-count // calls)


def _free_bytes() -> int:
    """Returns half of the memory that is free, of a device or of the machine."""
    found = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in found:
        return int(found["bytes_limit"] - found.get("bytes_in_use", 0)) // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # Not on Linux.
        return 2**30


def peak_bytes(closed: Any) -> int:
    """Returns the bytes of the values that live at once in a traced program, at most.

    Each equation has its own results, and those of before that are read later; what the
    compiler fuses takes less.

    Args:
      closed: A closed jaxpr.
    """
    return _peak(closed.jaxpr)


def _peak(jaxpr: Any) -> int:
    last: dict[Any, int] = {}
    for k, eqn in enumerate(jaxpr.eqns):
        last.update({id(v): k for v in eqn.invars})
    last.update({id(v): len(jaxpr.eqns) for v in jaxpr.outvars})
    alive: dict[Any, int] = {}
    now = most = 0
    for k, eqn in enumerate(jaxpr.eqns):
        inner = max(map(_peak, _inner(eqn.params)), default=0)
        for v in eqn.outvars:
            alive[id(v)] = _nbytes(v.aval)
            now += alive[id(v)]
        most = max(most, now + inner)
        gone = [v for v in (*eqn.invars, *eqn.outvars) if last.get(id(v), k) <= k]
        now -= sum(alive.pop(id(v), 0) for v in gone)
    return most


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    several = (x if isinstance(x, tuple | list) else (x,) for x in params.values())
    found = (getattr(x, "jaxpr", x) for own in several for x in own)
    return [x for x in found if hasattr(x, "eqns")]


def _nbytes(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    size = getattr(dtype, "itemsize", 4)
    return int(functools.reduce(lambda a, b: a * b, shape, 1)) * size
