"""Sites of a model, and patterns that select sites."""

import dataclasses
import difflib
import fnmatch
import glob
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from qjax.tables import show_fields

Role = Literal["weight", "activation", "bias"]
Globs = str | tuple[str, ...]


class Site(NamedTuple):
    """A place in a model where values are put on a grid."""

    name: str  # conv1/kernel, conv1/output, input:0, residual_2/output, output:0.
    role: Role
    shape: tuple[int, ...]  # Shape of the value in the traced example.
    layer: str = ""  # Module path: of what the weight serves; of where a value is made.
    op: str = ""  # Operation that makes the value or reads the weight: conv, ...
    activation: str = ""  # Function that the value has passed: relu, clip, gelu, ...
    inputs: tuple[str, ...] = ()  # Names of the sites that the op reads.
    feeds: tuple[str, ...] = ()  # Ops that read the value, or the product; and
    # "return" if the model returns it.
    axis: int | tuple[int, ...] | None = -1  # Output axis of a weight, if any.
    taps: int | None = None  # Terms of a weight in one sum.
    note: str = ""  # Why `axis` is not what a use of the weight asks for.
    reads: tuple[str, ...] = ()  # Site of each operand of the op, in order; "" for one
    # that several sites make.
    overwrites: str = ""  # The first operand that nothing else reads, of this shape.
    whole: Any = None  # Site of all steps, for that of one step: `Rule.per_step`.
    lstm: str = ""  # Tensor of the LSTM that a loop is: kernel, gate, share, ...


@dataclasses.dataclass(frozen=True)
class Where:
    """A predicate on sites: true where all of its fields match.

    Patterns are globs, or tuples of globs of which one must match. A text matches
    itself, brackets and all.

    Attributes:
      name: Globs of the name of the site.
      role: "weight" or "activation"; None for both. "bias" for the bias of a product,
        which no other rule speaks of but one with its very name.
      layer: Module path that the site belongs to.
      op: Globs of the operation that makes the value, or that a weight serves.
      activation: Globs of the function that the value has passed; ``"?*"`` for any.
      inputs: Globs of the names of the sites that the op reads; all must match, and at
        least one be there.
      feeds: Globs of the ops that read the value; one must match.
      feeds_only: Globs of the ops that read the value; all must match, and at least one
        be there.
      ranks: Numbers of axes of the value; empty for any.
      lstm: Globs of what the value is in an LSTM that a loop computes: ``kernel``
        (weights), ``gate`` (before its function), ``share`` (behind it), ``product``
        (what is summed to the cell), ``cell`` and ``state``; ``"?*"`` for any.

    Raises:
      TypeError: for patterns that are no text.
      ValueError: for an unknown role.

    Example:
      >>> is_first = Where(role="weight", inputs="input:*")
      >>> is_first(Site("conv1/kernel", "weight", (3, 3, 1, 8), inputs=("input:0",)))
      True
    """

    name: Globs = "*"
    role: Role | None = None
    layer: Globs = "*"
    op: Globs = "*"
    activation: Globs = "*"
    inputs: Globs = "*"
    feeds: Globs = "*"
    feeds_only: Globs = "*"
    ranks: tuple[int, ...] = ()
    lstm: Globs = "*"

    def __post_init__(self) -> None:
        for name in _PATTERNS:
            value = getattr(self, name)
            globs = tuple(value) if isinstance(value, list) else value
            parts = globs if isinstance(globs, tuple) else (globs,)
            if not all(isinstance(part, str) for part in parts):
                raise TypeError(
                    f"`{name}` of a `Where` must be a text or a tuple of texts, got "
                    f"{value!r}."
                )
            object.__setattr__(self, name, globs)
        if self.role not in (None, *get_args(Role)):
            raise ValueError(
                "`role` of a `Where` must be 'weight', 'activation', 'bias' or None, "
                f"got {self.role!r}."
            )
        ranks = (self.ranks,) if isinstance(self.ranks, int) else self.ranks
        if not isinstance(ranks, tuple | list) or not all(map(is_whole, ranks)):
            raise TypeError(
                f"`ranks` of a `Where` must be a tuple of whole numbers, got {ranks!r}."
            )
        object.__setattr__(self, "ranks", tuple(map(int, ranks)))

    def __repr__(self) -> str:
        return show_fields(self)

    def __call__(self, site: Site) -> bool:
        """Returns whether all fields match."""
        return all(self.holds(name, site) for name in _FIELDS)

    def holds(self, field: str, site: Site) -> bool:
        """Returns whether one field matches."""
        wanted = getattr(self, field)
        if wanted is None or wanted == "*":
            return True
        found = found_at(site, field)
        if field == "ranks":
            return not wanted or found[0] in wanted
        several = any if field == "feeds" else all
        return bool(found) and several(matches(text, wanted) for text in found)


_PATTERNS = (
    *("name", "layer", "op", "activation", "inputs", "feeds", "feeds_only"),
    "lstm",
)
_FIELDS = (*_PATTERNS, "role", "ranks")


def found_at(site: Site, field: str) -> tuple[Any, ...]:
    """Returns the values of a site that a field of a `Where` is compared with."""
    if field == "ranks":
        return (len(site.shape),)
    value = getattr(site, "feeds" if field == "feeds_only" else field)
    return value if isinstance(value, tuple) else (value,)


def matches(text: str, globs: Globs) -> bool:
    """Returns whether one of several globs matches a text or is the text itself."""
    several = (globs,) if isinstance(globs, str) else globs
    return any(text == one or fnmatch.fnmatchcase(text, one) for one in several)


def check_name(name: str, sites: Sequence[Site]) -> None:
    """Raises for the name of a site that as a glob also matches other sites."""
    names = [site.name for site in sites]
    others = [n for n in names if n != name and fnmatch.fnmatchcase(n, name)]
    if name in names and others and not any(c in name for c in "*?"):
        raise ValueError(
            f"The rule {name!r} is the name of a site, and as a glob it also matches "
            f"{others[0]!r}. Write {glob.escape(name)!r} for the former alone."
        )


# Field of a `Where` -> what it looks at, one and several.
_KINDS = {
    "name": "site",
    "role": "role",
    "layer": "layer",
    "op": "op",
    "activation": "activation",
    "inputs": "input",
    "feeds": "reader",
    "feeds_only": "reader",
    "ranks": "number of axes",
    "lstm": "tensor",
}
_MANY = "A rule for many models says `optional=True`."


def check_fields(where: Where, sites: Sequence[Site]) -> None:
    """Raises for fields that match at no site, alone or together."""
    for field, kind in _KINDS.items():
        wanted = getattr(where, field)
        if wanted == () and field != "ranks":
            raise ValueError(
                f"The rule {where} matches no site: `{field}` is an empty tuple. Leave "
                f"it out for any {kind}."
            )
        is_each = isinstance(wanted, tuple) and field in ("name", "layer")
        for part in wanted if is_each else (wanted,):
            same: Any = _with_inner(part, wanted) if is_each else part
            alone = dataclasses.replace(Where(), **{field: same})
            if not any(alone.holds(field, site) for site in sites):
                there = [text for site in sites for text in found_at(site, field)]
                text = no_match(part, kind, there)
                raise ValueError(f"The rule {where}: {part!r} {text}")
    if any(map(where, sites)):
        return
    near = max(sites, key=lambda site: sum(where.holds(f, site) for f in _KINDS))
    wrong = next(f for f in _KINDS if not where.holds(f, near))
    found = ", ".join(map(str, found_at(near, wrong))) or "none"
    raise ValueError(
        f"The rule {where} matches no site: each of its fields does, no site has all "
        f"of them. The closest is {near.name!r}, where `{wrong}` meets {found}. {_MANY}"
    )


def _with_inner(part: str, wanted: Globs) -> tuple[str, ...]:
    """Returns the pair ``a, a/*`` if the patterns have both, else the pattern alone."""
    outer = part.removesuffix("/*")
    pair = outer, f"{outer}/*"
    return pair if set(pair) <= set(wanted) else (part,)


def no_match(wanted: Any, kind: str, there: Sequence[Any]) -> str:
    """Explains that a pattern matches nothing, with the closest and all names."""
    texts = [*dict.fromkeys(str(text) for text in there if text != "")]
    parts = wanted if isinstance(wanted, tuple) else (wanted,)
    texts_wanted = [str(part) for part in parts if not callable(part)]
    close = [c for part in texts_wanted for c in _closest(part, texts)]
    if kind == "site" and close and len(_matching(close[0], texts)) > 1:
        close = [glob.escape(close[0])]
    hint = f" The closest is {close[0]!r}." if close else ""
    kinds = "numbers of axes" if " " in kind else f"{kind}s"
    listed = (
        f"The {kinds} are: {', '.join(texts)}." if texts else f"There is no {kind}."
    )
    return f"matches no {kind}.{hint} {listed} {_MANY}"


def _closest(text: str, texts: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(text, texts, n=1, cutoff=0.0)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if matches(name, pattern)]


def is_whole(x: Any) -> bool:
    """Returns whether a value is an integer of any type and no truth value."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)
