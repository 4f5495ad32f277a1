"""Checks of the arguments of `quantize_model` and `QuantizedModel`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.leaves import is_array

# Packages of modules -> what to pass in their place.
_REMEDIES = {
    "flax.nnx": "an NNX module, which is no function of its parameters. Write `graph, "
    "params = nnx.split(module)` and pass `lambda params, *inputs: nnx.merge(graph, "
    "params)(*inputs), params, *inputs`.",
    "flax.linen": "a Linen module. Pass `module.apply, variables, *inputs`, where "
    "`variables` is what `module.init` returned.",
}


def check_model(fn: Any, params: Any, inputs: tuple[Any, ...]) -> None:
    """Raises unless a model is a function of parameters and inputs.

    Args:
      fn: Should be a function ``fn(params, *inputs)``.
      params: Should be a pytree of arrays.
      inputs: Should be pytrees of arrays, at least one.

    Raises:
      TypeError: for modules in place of functions or parameters, and leaves that are
        no arrays: with what to pass.
      ValueError: if there are no inputs.
    """
    wanted = "`fn` must be a function `fn(params, *inputs)`, got "
    remedy = _remedy(fn) or _remedy_of_method(fn)
    if remedy:
        raise TypeError(f"{wanted}{remedy}")
    if not callable(fn):
        raise TypeError(f"{wanted}{type(fn).__name__}.")
    if _holds_arrays(fn):
        raise TypeError(
            f"{wanted}a {type(fn).__name__} that holds its parameters itself. Pass a "
            "function of them: `lambda module, *inputs: module(*inputs), module, "
            "*inputs`, say."
        )
    remedy = _remedy(params)
    if remedy and not _holds_arrays(params):
        raise TypeError(f"`params` must be a pytree of arrays, got {remedy}")
    check_leaves("params", params)
    if not inputs:
        raise ValueError(
            "`quantize_model` needs example inputs after the parameters: "
            "`quantize_model(fn, params, x)`."
        )
    check_leaves("inputs", inputs)


def check_leaves(name: str, tree: Any) -> None:
    """Raises TypeError for a leaf of arguments that is no array."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not is_array(leaf):
            at = jax.tree_util.keystr(path)
            raise TypeError(
                f"`{name}` must be pytrees of arrays, got {type(leaf).__name__}"
                f"{f' at {name}{at}' if at else ''}."
            )


def _remedy(x: Any) -> str:
    """Returns the remedy for a module of Flax, found by the bases of its type."""
    bases = [k.__module__ for k in type(x).__mro__ if k.__name__ == "Module"]
    found = (
        remedy
        for package, remedy in _REMEDIES.items()
        if any(f"{base}.".startswith(f"{package}.") for base in bases)
    )
    return next(found, "")


def _remedy_of_method(fn: Callable[..., Any]) -> str:
    """Returns the remedy for a call that is bound to a module of Flax."""
    is_call = getattr(fn, "__name__", "") == "__call__"
    return _remedy(getattr(fn, "__self__", None)) if is_call else ""


def _holds_arrays(x: Any) -> bool:
    """Returns whether a value is a pytree of arrays and no function that holds some."""
    leaves = jax.tree.leaves(x)
    is_whole = len(leaves) == 1 and leaves[0] is x
    return not is_whole and not isinstance(x, jax.tree_util.Partial)


def unfolded(params: Sequence[Any], *, is_each: bool) -> list[Any]:
    """Keeps the compiler from folding computations of parameters, all or each.

    Values that XLA folds are an ulp apart from those that it computes (``rsqrt``: 18 %
    of the values, JAX 0.10.2 on the CPU), and lowering must meet the same numbers.
    """
    is_real = [jnp.issubdtype(jax.dtypes.result_type(x), jnp.floating) for x in params]
    reals = [x for x, found in zip(params, is_real, strict=True) if found]
    barrier = lax.optimization_barrier
    held = iter(map(barrier, reals) if is_each else barrier(reals))
    pairs = zip(params, is_real, strict=True)
    return [next(held) if found else x for x, found in pairs]
