"""Places of equations: the module path, and the block of a simulated model."""

import re
from typing import NamedTuple

_BLOCK = "qjax.block."
_BLOCK_SCOPE = re.compile(re.escape(_BLOCK) + r"(\d+)")
_MARK = "qjax.region."
_MARK_SCOPE = re.compile("/?" + re.escape(_MARK) + r"((?:\d+\.)*)(site)?")


class BlockSites(NamedTuple):
    """The sites of a block of a simulated model."""

    output: str = ""  # Name of the site at its end.
    weight: str = ""  # Name of the site of its weight; empty if it has none.


class Place(NamedTuple):
    """The place of an equation in its model, for graphs and errors."""

    path: str = ""  # Module path.
    sites: BlockSites = BlockSites()  # Sites of its block, if these are known.


class Mark(NamedTuple):
    """A mark of what a simulation computes, in a model with regions."""

    regions: tuple[int, ...] = ()  # Numbers of the regions around it, outermost first.
    is_site: bool = False  # True if it puts a value on the grid of a site.


def block_scope(path: str, number: int) -> str:
    """Returns the scope of a block's simulation: its module path and its number."""
    return f"{path}/{_BLOCK}{number}"


def split_scope(scope: str) -> tuple[str, int | None]:
    """Splits a scope into a module path and the number of a simulated block."""
    scope = _MARK_SCOPE.sub("", scope)
    found = _BLOCK_SCOPE.search(scope)
    if found is None:
        return scope, None
    return scope[: found.start()].rstrip("/"), int(found[1])


def mark_scope(mark: Mark) -> str:
    """Returns the scope that carries a mark."""
    numbers = "".join(f"{k}." for k in mark.regions)
    return f"{_MARK}{numbers}{'site' if mark.is_site else ''}"


def mark_of(scope: str) -> Mark:
    """Returns the innermost mark of a scope."""
    numbers, site = ([("", ""), *_MARK_SCOPE.findall(scope)])[-1]
    return Mark(tuple(map(int, numbers.split(".")[:-1])), bool(site))
