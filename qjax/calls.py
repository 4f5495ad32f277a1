"""Calls of functions that stay computations of their own in a compiled program.

XLA:CPU computes elementwise values anew in each fusion that reads them: a scale, and
sites behind sites. Without such calls a training step of a residual network has twice
the instructions (`experiments/benchmarks/lowering.py`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

SHARED = "qjax.shared."  # Before the name of a function in the name of its call.


def alone(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls a function as a separate computation that XLA:CPU fuses nothing into.

    Args:
      fn: Function of arrays, traced anew by each call.
      *args: Pytrees of arrays.

    Returns:
      The result of ``fn``.
    """
    return _called(jax.jit(_plain(fn)), *args) if _is_on_cpu() else fn(*args)


def shared(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls a function as `alone` does; calls with arguments of one type share it.

    Outside of traces too it is compiled once, where each of its operations would be.

    Args:
      fn: Function that lasts, such as one of a module.
      *args: Pytrees of arrays and of hashable constants.

    Returns:
      The result of ``fn``.
    """
    leaves, tree = jax.tree.flatten(args)
    kinds = jax.Array | np.ndarray | np.floating
    is_array = tuple(isinstance(x, kinds) for x in leaves)
    arrays, constants = _split(leaves, is_array)
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0, but not in a formula.
    marks = tuple((type(x), repr(x) if isinstance(x, float) else "") for x in constants)
    jitted = _jitted(fn, tree, is_array, tuple(constants), marks)
    return _called(jitted, *arrays)


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """Returns a value that XLA:CPU stores, where each reader would compute it anew.

    Its derivative stays in the loops of its readers.
    """
    return stored(x)


computed_once.defjvp(lambda primals, tangents: (computed_once(*primals), tangents[0]))


def stored(x: jax.Array) -> jax.Array:
    """Returns a value that XLA:CPU stores, as it does its cotangent."""
    return shared(lax.optimization_barrier, x) if _is_on_cpu() else x


def _called(jitted: Callable[..., Any], *args: Any) -> Any:
    with uninlined():
        return jitted(*args)


def uninlined() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which XLA:CPU inlines no call."""
    if not _is_on_cpu():
        return contextlib.nullcontext()
    return set_xla_metadata(inlineable="false")


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose own calls, as of `jnp.where`, are inlined."""

    def call(*args: Any) -> Any:
        # Said of each: what says nothing is lowered with what is said of the call.
        with set_xla_metadata(inlineable="true"):
            return fn(*args)

    call.__name__ = getattr(fn, "__name__", call.__name__)
    return call


def _is_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=1024)
def _jitted(
    fn: Callable[..., Any],
    tree: Any,
    is_array: tuple[bool, ...],
    constants: tuple[Any, ...],
    marks: tuple[Any, ...],
) -> Callable[..., Any]:
    """Returns a jitted function of the arrays among the leaves of the arguments."""

    def call(*arrays: Any) -> Any:
        given, known = iter(arrays), iter(constants)
        leaves = [next(given) if found else next(known) for found in is_array]
        return fn(*jax.tree.unflatten(tree, leaves))

    call.__name__ = SHARED + getattr(fn, "__name__", call.__name__)
    return jax.jit(_plain(call))


def _split(leaves: list[Any], is_first: tuple[bool, ...]) -> tuple[list, list]:
    pairs = list(zip(leaves, is_first, strict=True))
    return [x for x, found in pairs if found], [x for x, found in pairs if not found]
