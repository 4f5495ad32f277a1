"""Models as functions of their inputs, for `lower` and `verify`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qjax.model.places import BlockSites

Folded = dict[str, dict[int, Any]]  # Digest of a computation -> what it gave.


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function of inputs alone, with the sites and words of its model.

    Attributes:
      fn: ``fn(*inputs)``.
      inputs: Example inputs.
      buffer_bits: Site of a weight -> most bits of the accumulator that it makes.
      blocks: ``blocks(*inputs)``: the sites of the blocks that ``fn`` simulates for
        inputs of these types; None for a function without a plan of sites.
      refusal: Why no program of integers only can come of it; empty if one may.
      folded: Known values that the last lowering of the model has computed, for the
        next and for `verify`.
      folds: The same of the bodies of its loops, by their places.
      half: ``half(*inputs)``: the half types of a model of which ``fn`` is the float32
        form, for inputs of these types; None for a function.
      own: The model in its own types, on the inputs of ``fn``; None for a function.
      by_grids: ``fn`` with averages as real values, of which both grids are known, for
        targets that rescale by them; None for a function.
    """

    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    buffer_bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    blocks: Callable[..., Sequence[BlockSites]] | None = None
    refusal: str = ""
    folded: Folded = dataclasses.field(default_factory=dict)
    folds: dict[tuple[int, ...], Folded] = dataclasses.field(default_factory=dict)
    half: Callable[..., Sequence[str]] | None = None
    own: Callable[..., Any] | None = None
    by_grids: Callable[..., Any] | None = None

    def half_types(self, *inputs: Any) -> tuple[str, ...]:
        """Returns the half types of the model for inputs of some types, or none."""
        return () if self.half is None else tuple(self.half(*inputs))


def bind(model: Any, args: tuple[Any, ...]) -> Bound:
    """Binds a model to the arguments of `lower` and `verify`.

    Args:
      model: Object whose method ``bind(*args)`` returns a `Bound`, or any function.
      args: Arguments after the model; of a function, its inputs.

    Returns:
      The bound model.
    """
    method = getattr(model, "bind", None)
    return Bound(model, args) if method is None else method(*args)
