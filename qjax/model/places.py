"""Places of equations: the module path, and the block of a simulated model."""

import re
from typing import NamedTuple

_BLOCK = "qjax.block."
_BLOCK_SCOPE = re.compile(re.escape(_BLOCK) + r"(\d+)")


class BlockSites(NamedTuple):
    """The sites of a block of a simulated model."""

    output: str = ""  # Name of the site at its end.
    weight: str = ""  # Name of the site of its weight; empty if it has none.


class Place(NamedTuple):
    """The place of an equation in its model, for graphs and errors."""

    path: str = ""  # Module path.
    sites: BlockSites = BlockSites()  # Sites of its block, if these are known.


def block_scope(path: str, number: int) -> str:
    """Returns the scope of a block's simulation: its module path and its number."""
    return f"{path}/{_BLOCK}{number}"


def split_scope(scope: str) -> tuple[str, int | None]:
    """Splits a scope into a module path and the number of a simulated block."""
    found = _BLOCK_SCOPE.search(scope)
    if found is None:
        return scope, None
    return scope[: found.start()].rstrip("/"), int(found[1])
