"""Visits of sites: what a visitor is shown, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec
from qjax.model.exact import Exact, Masked, Unmasked
from qjax.schemes.patterns import Site


class Rounded(NamedTuple):
    """A weight and what it is rounded to by a word, with a scale of its own range.

    Attributes:
      value: What it is rounded to.
      real: The weight.
      low: Its least value for each scale, float32.
      high: Its largest one.
      spec: The word.
    """

    value: jax.Array
    real: jax.Array
    low: jax.Array
    high: jax.Array
    spec: QSpec


class Visit(NamedTuple):
    """The result of a visit: the value to go on with, its grid and its word."""

    value: jax.Array
    grid: QParams | None = None
    word: QSpec | None = None  # Word of codes about zero: channels may be told apart.
    is_byte: bool = False  # The word is known to have 256 codes at most.
    rounded: Rounded | None = None  # A weight that a product may round again.
    kept: jax.Array | None = None  # What does not mask, of an input that is added.


class Bias(NamedTuple):
    """The bias after the product of a weight, ``(acc + bias) * factor``, by channel."""

    data: Site  # Site of the other operand.
    bias: jax.Array  # Broadcasts against the weight.
    factor: jax.Array  # Broadcasts against the weight.


Biases = Callable[[], list[Bias]]


class Unit(NamedTuple):
    """The unit of a sum of codes: ``real = x * factor * scale``."""

    factor: jax.Array  # Factor of the sum: one over the number of codes.
    scale: jax.Array  # shape=(). Of the codes.

    def seen(self, x: jax.Array) -> jax.Array:
        """Returns the real value of a sum."""
        return x * self.per(1.0)

    def per(self, scale: ArrayLike) -> jax.Array:
        """Returns the factor from the sum to codes of ``scale``, or to reals for 1."""
        factor = self.factor.astype(self.scale.dtype) * (self.scale / scale)
        return factor.astype(self.factor.dtype)


Pending = Unit | Exact | Masked | Unmasked | None


class Visitor(Protocol):
    """A visitor of sites: each method returns the value to go on with, and its grid."""

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        """Visits the input of the model or the end of a block.

        ``x`` is real but for a `Unit`; an `Exact` computes it once its grid is known,
        and a calibrator reads what a unit has it see.
        """

    def weight(self, site: Site, x: jax.Array, biases: "Biases" = list) -> Visit:
        """Visits a weight; ``biases`` follow the products of the weight."""

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Visits a bias; without grid and word it gets the accumulator's grid."""

    def takes_factors(self, site: Site) -> bool:
        """Returns whether a weight's grid follows its values, which then may scale."""

    # Loops, whose steps have visitors of their own.

    @property
    def draws(self) -> bool:
        """Returns whether steps differ by their numbers, as what is drawn does."""

    @property
    def seen(self) -> Any:
        """Returns the arrays that a loop collects from each step."""

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Visits a value at the grid of an activation, which does not move by it."""

    def state(self, names: Sequence[str]) -> Any:
        """Returns the arrays at some sites that go from step to step."""

    def inside(self, state: Any, step: jax.Array | None) -> "Visitor":
        """Returns the visitor of a step."""

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Takes what a loop leaves: the last state, what each step saw, first values.

        Args:
          state: State after the last step.
          seen: What the steps saw, along a first axis.
          starts: Site of a carry -> its first value, unless that is zero.
        """
