"""The leaves of the inputs of a model: their names and their differences."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def leaf_names(inputs: Any) -> list[str]:
    """Returns the names of the leaves of positional arguments.

    Args:
      inputs: A tuple of arguments, each any pytree.

    Returns:
      For an argument that is an array ``input 0``, with its place; for a leaf of a
      nested one ``input:0['image']``.

    Example:
      >>> leaf_names((1.0, {"image": 2.0, "mask": 3.0}))
      ['input 0', "input:1['image']", "input:1['mask']"]
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(inputs)[0]]
    return [
        f"input:{path[0].idx}{jax.tree_util.keystr(path[1:])}"
        if len(path) > 1
        else f"input {path[0].idx}"
        for path in paths
    ]


def at_start(name: str) -> str:
    """Capitalizes a name at the start of a sentence; the name of a leaf stays."""
    return name if name.startswith("input:") else name[:1].upper() + name[1:]


def is_array(x: Any) -> bool:
    """Returns whether JAX takes a leaf for an array: numbers, keys, truth values."""
    if isinstance(x, str | bytes):
        return False
    try:
        np.shape(x), jax.dtypes.result_type(x)
    except (TypeError, ValueError):
        return False
    return True


def shapes_of(tree: Any) -> Any:
    """Returns shapes and dtypes in place of the leaves of a pytree."""
    one = lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x))
    return jax.tree.map(one, tree)


def show_leaves(inputs: Any) -> str:
    """Returns shapes and dtypes of inputs as text, with names where they are nested."""
    names = leaf_names(inputs)
    pairs = [(x.shape, x.dtype) for x in jax.tree.leaves(shapes_of(inputs))]
    if all(name == f"input {k}" for k, name in enumerate(names)):
        return str(pairs)
    listed = (f"{n}: {pair}" for n, pair in zip(names, pairs, strict=True))
    return f"{{{', '.join(listed)}}}"


def difference(
    found: Any, wanted: Any, is_alike: Callable[[Any, Any], bool] | None = None
) -> str:
    """Describes in a sentence where inputs differ from the wanted ones.

    Args:
      found: A tuple of arguments.
      wanted: The same, or their shapes.
      is_alike: Whether two leaves, as shapes, are alike; None looks at the nesting.

    Returns:
      A sentence that names a leaf, or "" where nothing differs by name.
    """
    names, others = leaf_names(found), leaf_names(wanted)
    missing = [name for name in others if name not in names]
    extra = [name for name in names if name not in others]
    if missing or extra:
        lacks = f"There is no {', '.join(missing)}. " if missing else ""
        has = f"No input is called {', '.join(extra)}. " if extra else ""
        return f"{lacks}{has}".strip()
    if is_alike is None:
        return ""
    pairs = zip(
        names,
        jax.tree.leaves(shapes_of(found)),
        jax.tree.leaves(shapes_of(wanted)),
        strict=True,
    )
    wrong = next(((n, a, b) for n, a, b in pairs if not is_alike(a, b)), None)
    if wrong is None:
        return ""
    name, a, b = wrong
    form = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"They differ at {name}: {form(a)} for {form(b)}."


def arguments_of(inputs: Any, tree: Any) -> tuple[Any, ...]:
    """Returns the arguments of a function, of which the only one may stand alone.

    Args:
      inputs: A tuple of the arguments, or the only one.
      tree: Structure of the tuple.
    """
    is_alone = jax.tree.structure((inputs,)) == tree
    return inputs if isinstance(inputs, tuple) and not is_alone else (inputs,)
