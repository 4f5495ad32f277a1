"""The knowledge of the pass about each value of a trace, and the graph it builds."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.model.places import Place
from qjax.model.trace import Equation, Trace
from qjax.targets import Target, half_even


@dataclasses.dataclass(frozen=True)
class Known:
    """A constant, folded."""

    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class KnownCodes:
    """A constant on a grid: a weight or a bias."""

    codes: np.ndarray  # int64.
    scale: np.ndarray  # float32, [] or the rank of the codes.
    zero_point: np.ndarray  # int32, same shape.
    site: str


@dataclasses.dataclass(frozen=True)
class Real:
    """A value that is float at run time, for now."""

    source: str  # Origin, in the user's words.
    remedy: str  # The name of the site that would quantize it; empty if none would.
    input: int | None = None  # Number of the input of the program, before `moves`.
    moves: tuple[Equation, ...] = ()
    rescaling: tuple[float, float] = (1.0, 0.0)  # real = gain * input + offset.
    # Elementwise equations on an integer input, and their constants.
    steps: Mapping[int, Equation] = dataclasses.field(default_factory=dict)
    known: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    is_plain: bool = True  # True if moves, exact casts and the rescaling are all.
    is_exact: bool = True  # True if the rescaling rounds as these steps do.
    dtype: str = ""  # Type of an input of integers or truth values.
    is_left: bool = False  # True for a value that follows from one without integers.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledIntegers:
    """Integers that stand for real values, in the graph or about to be.

        real = clip(scale * gain * (integer - zero_point), *bounds)

    Attributes:
      scale: float64, ``[]`` or the rank of the value.
      low: Least integer.
      high: Largest integer.
      gain: float64, per-channel factors that no grid absorbed; None if there are none.
      is_gain_exact: Whether ``gain`` was one float32 factor, and the last operation,
        and no unit was merged before it.
      is_quotient: Whether ``gain`` is the reciprocal of a divisor: how the compiler
        rounds a quotient is its choice.
      is_bias_exact: Whether no bias was rounded to the unit of the integers.
      bounds: Bounds of an activation.
      place: Place of what computes them.
      most: Largest magnitude that the accumulator may reach.
      top: Bound of a product of two activations by the storage of its operands, from
        which the shift for a bias is chosen; None for others.
      dtype: Type in the model of integers that stand for themselves; empty for real
        values.
      is_still: Whether a channel is zero but for its bias, in the rank of the value or
        ``[]``; None where that is not known.
      past: Arithmetic of the model between an accumulator and this one; None if these
        are integers of their own.
      origin: The same for a sum of an accumulator and exact biases, which is integers
        of its own: a function of both starts from the accumulator.
    """

    scale: np.ndarray
    low: int
    high: int
    gain: np.ndarray | None = None
    is_gain_exact: bool = True
    is_quotient: bool = False
    is_bias_exact: bool = True
    bounds: tuple[float, float] = (-np.inf, np.inf)
    place: Place = Place()
    most: int = 2**31 - 1
    top: int | None = None
    dtype: str = ""
    is_still: np.ndarray | None = None
    past: "Past | None" = None
    origin: "Past | None" = None

    def real_scale(self) -> np.ndarray:
        """Returns units per integer: scale and gain together."""
        return self.scale if self.gain is None else self.scale * self.gain

    @property
    def is_bounded(self) -> bool:
        """Returns whether an activation waits for the next grid."""
        return self.bounds != (-np.inf, np.inf)

    @property
    def is_of_codes(self) -> bool:
        """Returns whether these are codes, or integers that stand for themselves."""
        return bool(self.dtype)

    def _shared(self) -> dict[str, Any]:
        """Returns the fields that integers have in the graph and before, by name."""
        fields = dataclasses.fields(ScaledIntegers)
        return {field.name: getattr(self, field.name) for field in fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers(ScaledIntegers):
    """Integers in the graph.

    Attributes:
      value: Number in the graph.
      zero_point: Integer that means 0.0.
      is_codes: Whether these are the codes of a quantization point.
      bounded: Codes that a bound has clipped, as a function of the codes before the
        bound. A function of both is one table.
      rescaled: Codes in another unit than that of their grid, as a function of codes
        on a grid, with the roundings of the model. Functions start from it.
    """

    value: int
    zero_point: int = 0
    is_codes: bool = False
    bounded: "Curve | None" = None
    rescaled: "Curve | None" = None

    @property
    def is_of_codes(self) -> bool:
        """Returns whether these are codes, or integers that stand for themselves."""
        return self.is_codes or bool(self.dtype)

    def elsewhere(self, value: int, **changes: Any) -> "Integers":
        """Returns the same numbers as another value of the graph."""
        own: dict[str, Any] = {
            "bounded": None,
            "rescaled": None,
            "is_still": None,
            "past": None,
            "origin": None,
        }
        changes = {**own, **changes}
        return dataclasses.replace(self, value=value, **changes)

    def before_bias(self, emit: "Emit") -> "PendingAccumulator":
        """Returns the integers, whose zero point is 0, as what waits for a bias."""
        assert not self.zero_point
        return PendingAccumulator(**self._shared(), emit=emit)


# Puts an accumulator with its bias into the graph, its product shifted left before the
# bias is added. Returns its value, its least and its largest integer.
Emit = Callable[[np.ndarray, int], tuple[int, int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingAccumulator(ScaledIntegers):
    """An accumulator that waits for its bias before it goes into the graph.

    Its zero point is 0.

    Attributes:
      emit: Puts it into the graph.
      shift: Bits by which the product is shifted left before its bias is added, so that
        a finer bias keeps its value; None where that cannot be.
      bias: int64, to be added; None if there is none yet.
    """

    emit: Emit
    shift: int | None = 0
    bias: np.ndarray | None = None

    def emitted(self) -> Integers:
        """Returns the accumulator in the graph."""
        bias = np.zeros((), np.int64) if self.bias is None else self.bias
        value, low, high = self.emit(bias, self.shift or 0)
        return dataclasses.replace(self.at(value), low=low, high=high)

    def at(self, value: int) -> Integers:
        """Returns the accumulator as a value of the graph."""
        is_plain = True if self.bias is None else self.bias == 0
        still = None if self.is_still is None else self.is_still & is_plain
        return dataclasses.replace(
            Integers(**self._shared(), value=value), is_still=still
        )


@dataclasses.dataclass(frozen=True)
class Past:
    """The arithmetic between an accumulator and what it became, as the model has it.

    A requantizer merges factors and biases. A function of them is evaluated as the
    model does it, step by step.

    Attributes:
      source: The accumulator, which has no past.
      start: Value of the trace that it is.
      known: Values of the trace that are constants: one number, or one a channel.
      steps: Value of the trace -> the equation that computes it, in order.
      end: The value of the trace at the end.
    """

    source: ScaledIntegers
    start: int
    known: Mapping[int, np.ndarray]
    steps: Mapping[int, Equation]
    end: int


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum of codes on different grids, to be rounded once."""

    terms: tuple[tuple[Integers, float], ...]  # Terms with a sign, 1.0 or -1.0.
    bounds: tuple[float, float] = (-np.inf, np.inf)
    place: Place = Place()


@dataclasses.dataclass(frozen=True)
class Curve:
    """An elementwise function of codes or of an accumulator that waits for a grid.

    It is a lookup table then, or thresholds.

    Attributes:
      source: The integers.
      aliases: Values of the trace that are these codes, each in its unit.
      known: Values of the trace that are constants: one number, or one a channel.
      steps: Value of the trace -> the equation that computes it, in order.
      end: The value of the trace that this is.
      place: Place of the function.
    """

    source: Integers
    aliases: Mapping[int, Integers]
    known: Mapping[int, np.ndarray]
    steps: Mapping[int, Equation]
    end: int
    place: Place = Place()


@dataclasses.dataclass(frozen=True)
class Joined:
    """Values that an operation joins once all are on one grid.

    Attributes:
      operation: Operation of the graph: concatenate, maximum, minimum, select, pad.
      parts: The values.
      shapes: Shapes of the parts, as traced.
      shape: Shape of the result, as traced.
      others: Numbers in the graph of what comes before them: the mask of a selection.
      attributes: Attributes of the operation.
      bounds: Bounds of an activation.
      place: Place of the operation.
      fill: Number that a pad puts around its one part.
    """

    operation: str
    parts: "tuple[Abstract, ...]"
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    others: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bounds: tuple[float, float] = (-np.inf, np.inf)
    place: Place = Place()
    fill: float = 0.0  # Fill of a pad.


@dataclasses.dataclass(frozen=True)
class ByChannel:
    """Codes with a scale per channel: ``real = scale * integer``.

    Attributes:
      codes: The same integers in the unit of the coarsest channel.
      scale: float64, the rank of the value.
      site: Site that makes the codes.
    """

    codes: Integers
    scale: np.ndarray
    site: str


Abstract = (
    Known
    | KnownCodes
    | Real
    | Integers
    | PendingAccumulator
    | Sum
    | Curve
    | Joined
    | ByChannel
)


class Builder(GraphBuilder):
    """A builder that collects the graph of a traced program and shared state of rules.

    Args:
      buffer_bits: Site of a weight -> most bits of the accumulator it makes; 32 for
        others.
      is_open: Whether quantization points of what stays float become inputs.
      is_raw: Integer inputs that are their own codes: several grids are tables of them.
      target: Roundings and algorithms of the program.
    """

    def __init__(
        self,
        buffer_bits: Mapping[str, int] | None = None,
        *,
        is_open: bool = False,
        is_raw: Collection[int] = (),
        target: Target = half_even,
    ) -> None:
        super().__init__()
        self.is_open = is_open
        self.target = target
        self._buffer_bits = dict(buffer_bits or {})
        self.inputs: dict[int, int] = {}  # Input of the program -> value.
        self.raw: dict[int, Integers] = {}  # Integer input -> itself, as codes.
        self.rows: set[int] = set()  # Inputs that choose rows of a table.
        self.is_raw = frozenset(is_raw)
        self.types: dict[int, Any] = {}  # Value of the trace -> its dtype.
        self.notes: list[str] = []  # What the program does otherwise than the model.
        # What an accumulator is made of -> its value, its least and largest integer.
        self.placed: dict[Any, tuple[int, int, int]] = {}
        # A joined value of the trace, a part of it -> the part, and it within bounds.
        self.bounded: dict[tuple[int, int], tuple[Abstract, Curve]] = {}

    # What the pass gives for the bodies of loops: the form that it interprets a trace
    # in, the results of interpreting one, some of its values given, and known values
    # that the last lowering has computed, by the place of a loop.
    prepared: Callable[[Trace], Trace]
    interpreted: Callable[[Trace, "Builder", Mapping[int, Abstract]], list[Abstract]]

    folds: dict[tuple[int, ...], dict[str, dict[int, Any]]]
    place: tuple[int, ...] = ()  # First results of the loops around it.

    @property
    def folded(self) -> dict[str, dict[int, Any]]:
        """Returns the known values of the last lowering of this body."""
        return self.folds.setdefault(self.place, {})

    def inside(self, loop: int) -> "Builder":
        """Returns a builder of the graph of a body, over the same parameters."""
        own = Builder(self._buffer_bits, target=self.target)
        own.folds, own.place = self.folds, (*self.place, loop)
        own.params, own.grids, own.notes = self.params, self.grids, self.notes
        own.taken = {*self.sites, *self.taken}
        own.prepared, own.interpreted = self.prepared, self.interpreted
        return own

    def site_of_input(self, k: int) -> str:
        """Returns the site that a rule can name to quantize an input; empty if none."""
        name = f"input:{k}"
        return name if name in self._buffer_bits else ""

    def put(self, x: PendingAccumulator) -> Integers:
        """Returns an accumulator in the graph; the same value each time."""
        bias = np.zeros(()) if x.bias is None else x.bias
        key = x.emit, x.shift, bias.shape, bias.tobytes()
        if key not in self.placed:
            own = x.emitted()
            self.placed[key] = own.value, own.low, own.high
        value, low, high = self.placed[key]
        return dataclasses.replace(x.at(value), low=low, high=high)

    def numbers(self, value: int, place: Place, dtype: str = "int32") -> Integers:
        """Returns a value of the graph as numbers that stand for themselves.

        Args:
          value: Number of the value.
          place: Place of what computes it.
          dtype: Type of the numbers in the model.
        """
        own, one = self.values[value], np.ones(())
        return Integers(
            value=value,
            scale=one,
            low=own.low,
            high=own.high,
            place=place,
            dtype=dtype,
        )

    def note(self, text: str) -> None:
        """Records what the program does otherwise than the model, once."""
        if text not in self.notes:
            self.notes.append(text)

    def most(self, site: str) -> int:
        """Returns the largest magnitude in the accumulator of a weight."""
        return int(2 ** (self._buffer_bits.get(site, 32) - 1) - 1)


def is_power_of_two(x: Any) -> bool:
    """Returns whether all real numbers are powers of two, of either sign."""
    return bool(np.all(np.abs(np.frexp(np.asarray(x, np.float64))[0]) == 0.5))
