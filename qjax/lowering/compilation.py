"""Functions that are compiled once for equal programs, whoever makes them anew.

A model is lowered for several numbers of examples, each time with the same tables.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_MOST_KEPT = 256  # Compiled programs.
_kept: "collections.OrderedDict[str, Any]" = collections.OrderedDict()


def compiled_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs compiled, as `jax.jit` of it does.

    What has the same StableHLO, constants and all, is compiled once, also of another
    function.
    """
    own: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        types = tuple((np.shape(x), str(jax.dtypes.result_type(x))) for x in leaves)
        if (tree, types) not in own:
            own[tree, types] = _executable(fn, leaves, tree)
        return own[tree, types](leaves)

    return call


def _executable(fn: Callable[..., Any], leaves: Any, tree: Any) -> Callable[..., Any]:
    trees: list[Any] = []

    def flat(*leaves: Any) -> Any:
        found, out = jax.tree.flatten(fn(*jax.tree.unflatten(tree, leaves)))
        trees.append(out)
        return found

    # Without `keep_unused`, equal texts could read other operands.
    lowered = jax.jit(flat, keep_unused=True).lower(*leaves)
    text = f"{jax.devices()[0]}\n{lowered.as_text()}"
    if text not in _kept:
        _kept[text] = lowered.compile()
    _kept.move_to_end(text)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    executable = _kept[text]
    return lambda leaves: jax.tree.unflatten(trees[0], executable(*leaves))
