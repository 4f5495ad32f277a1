"""The record of an operation: all that any part of the package knows of it.

Backends, the oracle, the validator, the certificate and what builds graphs read these
records; a second table of the same does not exist. The operations themselves are in the
modules beside this one, and in one table in `qjax.graph.operations`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from qjax.graph.graph import Graph, Value
from qjax.integer import RequantizeRule

INT32 = np.iinfo(np.int32)
Shape = tuple[int, ...]
Ends = tuple[Any, Any]  # Least and largest integers, arrays that broadcast.


def is_integer(x: Any) -> bool:
    """Returns whether ``x`` is a Python integer and no truth value."""
    return isinstance(x, int) and not isinstance(x, bool)


@dataclasses.dataclass(frozen=True)
class Attribute:
    """The type of an attribute, in words and as a test."""

    wanted: str
    holds: Callable[[Any], bool]


def _is_int32(x: Any) -> bool:
    return is_integer(x) and -(2**31) <= x < 2**31


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list | tuple) and all(map(holds, x))


def _tuples(size: int) -> Callable[[Any], bool]:
    integers = _list_of(_is_int32)
    return _list_of(lambda x: integers(x) and len(x) == size)


def choice(*names: Any) -> Attribute:
    """Returns the type of an attribute that is one of several names."""
    return Attribute(f"one of {', '.join(map(str, names))}", lambda x: x in names)


INTEGER = Attribute("an integer of 32 bits", _is_int32)
WIDE = Attribute("an integer of 62 bits", lambda x: is_integer(x) and abs(x) < 1 << 62)
FLAG = Attribute("true or false", lambda x: isinstance(x, bool))
COUNT = Attribute("an integer, 0 or more", lambda x: _is_int32(x) and x >= 0)
SIZE = Attribute("an integer, 1 or more", lambda x: _is_int32(x) and x >= 1)
AXIS = Attribute("an axis", COUNT.holds)
AXIS_OR_NONE = Attribute("an axis or null", lambda x: x is None or _is_int32(x))
SHIFT = Attribute("an integer from 0 to 62", lambda x: is_integer(x) and 0 <= x <= 62)
LEFT = Attribute("an integer from 0 to 31", lambda x: is_integer(x) and 0 <= x <= 31)
OPERAND = Attribute("0 or 1", lambda x: is_integer(x) and x in (0, 1))
INTEGERS = Attribute("a list of integers", _list_of(_is_int32))
SIZES = Attribute("a list of integers, 1 or more", _list_of(SIZE.holds))
AXES = Attribute("a list of axes", _list_of(COUNT.holds))
SHIFTS = Attribute("a list of integers from 0 to 62", _list_of(SHIFT.holds))
ENDS = Attribute(
    "a list of integers and nulls", _list_of(lambda x: x is None or _is_int32(x))
)
PAIRS = Attribute("a list of pairs of integers", _tuples(2))
TRIPLES = Attribute("a list of three integers each", _tuples(3))
AXIS_LISTS = Attribute(
    "three lists of axes", lambda x: _list_of(AXES.holds)(x) and len(x) == 3
)
SIDES = Attribute(
    "two lists of axes of one length",
    lambda x: _list_of(AXES.holds)(x) and len(x) == 2 and len(x[0]) == len(x[1]),
)
RULE = choice(*get_args(RequantizeRule))


class Operands:
    """The operands of an operation: attributes, inputs and parameters.

    Args:
      attributes: Attributes of the node.
      inputs: Values of the inputs in the graph.
      params: Role -> array.
      graphs: Role -> graph that the node runs.
    """

    def __init__(
        self,
        attributes: Mapping[str, Any],
        inputs: Sequence[Value],
        params: Mapping[str, np.ndarray],
        graphs: Mapping[str, Graph] | None = None,
    ) -> None:
        self.attributes = attributes
        self.inputs = inputs
        self.params = params
        self.graphs = graphs or {}

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    @property
    def x(self) -> Value:
        """Returns the first input."""
        return self.inputs[0]

    @property
    def shapes(self) -> list[Shape]:
        """Returns the shapes of the inputs."""
        return [x.shape for x in self.inputs]

    def check(self, holds: bool, wanted: str, found: Any) -> None:
        """Raises ValueError unless a condition holds."""
        if not holds:
            raise ValueError(f"{wanted}, got {found}")

    def check_range(self, role: str, least: int, most: int) -> np.ndarray:
        """Returns a parameter, int64; raises unless its integers lie in a range."""
        array = self.params[role]
        ends = int(array.min(initial=least)), int(array.max(initial=least))
        self.check(
            least <= ends[0] and ends[1] <= most,
            f"the parameter of role `{role}` must lie in [{least}, {most}]",
            list(ends),
        )
        return array.astype(np.int64)

    def check_zero_points(self, name: str, found: Sequence[int]) -> None:
        """Raises ValueError unless an attribute holds the zero points of the inputs."""
        wanted = [x.zero_point for x in self.inputs]
        same = list(found) == wanted
        self.check(same, f"`{name}` must be {wanted}, as inputs have", found)

    def check_distance(self, value: Value, zero: int) -> int:
        """Returns the largest distance of codes from their zero point, within int32."""
        ends = value.low - zero, value.high - zero
        self.check(
            INT32.min <= ends[0] and ends[1] <= INT32.max,
            "codes about their zero point must fit int32",
            list(ends),
        )
        return max(abs(ends[0]), abs(ends[1]))


Meaning = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """The record of an operation of the integer graph.

    Attributes:
      name: In nodes and files.
      contract: Formula of the operation, ``q`` the codes of its input, in field words.
      kind: Effect on integers. ``accumulator``: sums of products, in another
        unit; ``rescale``: from grid to grid, which rounds; ``move``: the same integers
        elsewhere; ``choice``: some of the integers of its inputs; ``table``: looks
        integers up in a parameter; ``number``: integers of its own; ``loop``: runs the
        graphs of its node.
      shape: Shape of the output, from the operands; raises ValueError if they do not
        fit each other.
      interval: Least and largest integers of the output, arrays in its rank, or
        numbers; raises ValueError for operands that its meaning does not allow.
      meaning: ``meaning(attributes, params, inputs)`` in int64: the oracle. With
        ``graphs`` a fourth argument maps roles to functions, from the inputs of a graph
        to its outputs.
      inputs: Number of inputs, or the possible numbers; None for one or more.
      attributes: Name -> type of what must be there.
      roles: Roles of the parameters; each must be there.
      optional: Name -> type of what may be there.
      each_input: Names of the lists that have an item for each input.
      each_axis: Names of the lists that have an item for each axis of the first input.
      graphs: Roles of the graphs of its node; each must be there.
      others: Shapes and intervals of the outputs after the first; None where there is
        one. Its meaning returns a tuple then.
      reach: Of an accumulator the number of terms, and a bound on the magnitude of any
        part of their sum, 0 where the interval of the output says enough; None where
        each input is one term.
    """

    name: str
    contract: str
    kind: Literal["accumulator", "rescale", "move", "choice", "table", "number", "loop"]
    shape: Callable[[Operands], Shape]
    interval: Callable[[Operands], Ends]
    meaning: Meaning
    inputs: int | tuple[int, ...] | None = 1
    attributes: Mapping[str, Attribute] = dataclasses.field(default_factory=dict)
    roles: tuple[str, ...] = ()
    optional: Mapping[str, Attribute] = dataclasses.field(default_factory=dict)
    each_input: tuple[str, ...] = ()
    each_axis: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    others: Callable[[Operands], Sequence[tuple[Shape, Ends]]] | None = None
    reach: Callable[[Operands], tuple[int, int]] | None = None

    def outputs(self, o: Operands) -> list[tuple[Shape, Ends]]:
        """Returns shape and interval of each output, as `shape` and `interval`."""
        rest = [] if self.others is None else self.others(o)
        return [(self.shape(o), self.interval(o)), *rest]


# Shapes and intervals that several operations share.


def same_shape(o: Operands) -> Shape:
    """Returns the shape of the first input."""
    return o.x.shape


def broadcast_shape(o: Operands) -> Shape:
    """Returns the shape to which inputs and parameters broadcast."""
    params = [p.shape for p in o.params.values()]
    rank = max(map(len, o.shapes))
    fits = all(len(shape) in (0, rank) for shape in params)
    o.check(fits, f"parameters must be numbers, or of {rank} axes", params)
    return np.broadcast_shapes(*o.shapes, *params)


def same_interval(o: Operands) -> Ends:
    """Returns the interval of the first input."""
    return o.x.low, o.x.high


def joint_interval(o: Operands) -> Ends:
    """Returns the interval of all inputs."""
    return min(x.low for x in o.inputs), max(x.high for x in o.inputs)


def clip_interval(o: Operands) -> Ends:
    """Returns the ends to which an operation clips."""
    return o["low"], o["high"]


def check_axes(o: Operands, axes: Sequence[int], rank: int) -> None:
    """Raises ValueError unless axes exist and each occurs once."""
    known = all(d < rank for d in axes) and len(set(axes)) == len(axes)
    o.check(known, f"axes must be among {rank}, each once", list(axes))


CLIP = {"low": INTEGER, "high": INTEGER}
WINDOW = {
    "window": SIZES,
    "strides": SIZES,
    "padding": PAIRS,
    "base_dilation": SIZES,
    "dilation": SIZES,
}


def window_sizes(
    o: Operands,
    sizes: Sequence[int],
    window: Sequence[int],
    names: tuple[str, str, str, str],
) -> list[int]:
    """Computes the number of places of a window along each axis.

    Args:
      o: The operands.
      sizes: Sizes of the input.
      window: Sizes of the window.
      names: Attributes: strides, padding, dilation of the input, of the window.

    Returns:
      Sizes of the output.

    Raises:
      ValueError: if an axis is cropped to less than nothing.
    """
    found = []
    for n, w, s, (low, high), spread, step in zip(
        sizes, window, *(o[name] for name in names), strict=True
    ):
        padded = max((n - 1) * spread + 1, 0) + low + high
        o.check(padded >= 0, f"`{names[1]}` must leave an axis of size {n}", padded)
        found.append(max((padded - (w - 1) * step - 1) // s + 1, 0))
    return found


def spread(x: np.ndarray, steps: Sequence[int], fill: int) -> np.ndarray:
    """Spreads values ``steps`` apart, with ``fill`` between them."""
    sizes = [max((n - 1) * s + 1, 0) for n, s in zip(x.shape, steps, strict=True)]
    found = np.full(sizes, fill, np.int64)
    found[tuple(slice(None, None, s) for s in steps)] = x
    return found


def pad_or_crop(x: np.ndarray, pad: Sequence[tuple[int, int]], fill: int) -> np.ndarray:
    """Pads axes where sizes are positive and crops axes where sizes are negative."""
    grown = [(max(low, 0), max(high, 0)) for low, high in pad]
    x = np.pad(x, grown, constant_values=fill)
    return x[tuple(slice(max(-a, 0), b if b < 0 else None) for a, b in pad)]


def window_taps(a: Mapping[str, Any], x: np.ndarray, fill: int) -> list[np.ndarray]:
    """Returns one array of the output's shape for each place in the window."""
    x = spread(x, a["base_dilation"], fill)
    x = pad_or_crop(x, [tuple(pair) for pair in a["padding"]], fill)
    axes = list(zip(x.shape, a["window"], a["dilation"], a["strides"], strict=True))
    sizes = [max((n - (w - 1) * d - 1) // s + 1, 0) for n, w, d, s in axes]
    found = []
    for tap in np.ndindex(*a["window"]):
        places = zip(tap, axes, sizes, strict=True)
        index = tuple(
            slice(t * d, t * d + max((n - 1) * s + 1, 0), s)
            for t, (_, _, d, s), n in places
        )
        found.append(x[index])
    return found


def pool_shape(o: Operands) -> Shape:
    """Returns the output shape of a pool."""
    names = "strides", "padding", "base_dilation", "dilation"
    return tuple(window_sizes(o, o.x.shape, o["window"], names))
