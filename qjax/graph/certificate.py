"""The certificate of an integer program: no overflow, no float, agreement of sites."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.operations.products import by_channel
from qjax.graph.packing import nbytes

_EXACT_FLOAT32 = 1 << 24  # Integers below are exact in float32.
_HALF_ULP = 2.0**-24  # Relative rounding of one float32 operation.
_OTHER_ROUNDINGS = 8  # Roundings beside a sum's: bias, factor, scales, their products.
_OF_LOOPS = "in loops from any codes carried; `find_witness` searches inputs that do it"
_AT_ANY_SCALE = "at any scale, given equal input codes"


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The bound of one accumulator, from the integer weights themselves.

    Attributes:
      path: Place of the accumulator.
      low: Least sum, for each output channel where there are weights.
      high: Largest sum, same shape.
      bits: Bits that an accumulator needs, its sign included.
      value: Number of the accumulator in its graph.
      witness: Input codes that attain the bound of a product with a kernel, in the
        shape of the kernel of the worst channel; empty for other operations. Of a loop,
        codes of one step: `IntegerProgram.find_witness` searches inputs of the program
        that lead to them.
      place: Place of its graph in the program; empty for the program itself.
    """

    path: str
    low: np.ndarray
    high: np.ndarray
    bits: int
    value: int
    witness: np.ndarray
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The reason that a site has the codes of the fake-quantized model.

    Attributes:
      is_proven: Whether they are equal whatever the input, given the same codes before
        the site.
      reason: The proof, or the step that rounds.
      most: Most codes by which they can differ, given the same codes before the site: 0
        if proven, 1 behind a requantizer, the step between two levels of a word that
        leaves codes out, or more where float32 rounds by more than the step of a code;
        None where no bound is known.
    """

    is_proven: bool
    reason: str
    most: int | None

    def __str__(self):
        if self.is_proven:
            return f"proven: {self.reason}"
        plural = "" if self.most == 1 else "s"
        bound = f"within {self.most} code{plural}"
        bound = "not bounded" if self.most is None else bound
        return f"{bound}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class KnownValue:
    """A constant among the values of a program: a class token, a table of positions.

    Attributes:
      name: Name of its codes in the parameters.
      shape: Shape, 1 where examples share it.
      low: Least code.
      high: Largest code.
      scale: Units per code.
    """

    name: str
    shape: tuple[int, ...]
    low: int
    high: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The certificates of a program. Its ``str`` is a table.

    Attributes:
      overflow: For each accumulator.
      agreement: For each quantization point.
      float_values: Types of floating-point values in ``program.codes``; empty.
      nbytes: Bytes of the parameters, 2 and 4 bits packed, powers of two by exponents.
      notes: Notes of the program.
      constants: Constants that meet data, each on the grid of its place.
    """

    overflow: tuple[Overflow, ...]
    agreement: Mapping[str, Agreement]
    float_values: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()
    constants: tuple[KnownValue, ...] = ()

    def __str__(self):
        names = [*(o.path for o in self.overflow), *self.agreement]
        wide = max([4, *map(len, names), *(len(c.name) for c in self.constants)])
        lines = [f"{'accumulator':<{wide}} {'bits':>4} {'least':>12} {'largest':>12}"]
        lines += [
            f"{o.path:<{wide}} {o.bits:>4} {o.low.min():>12} {o.high.max():>12}"
            for o in self.overflow
        ]
        lines += [_OF_LOOPS] if any(o.place for o in self.overflow) else []
        lines += ["", f"{'site':<{wide}} agreement"]
        lines += [f"{name:<{wide}} {a}" for name, a in self.agreement.items()]
        if self.constants:
            head = f"{'scale':>12} {'least':>7} {'largest':>7} shape"
            lines += ["", f"{'constant':<{wide}} {head}"]
        lines += [
            f"{c.name:<{wide}} {c.scale:>12.6g} {c.low:>7} {c.high:>7} {c.shape}"
            for c in self.constants
        ]
        found = ", ".join(self.float_values) or "none"
        lines += ["", f"float values: {found}; {self.nbytes} bytes"]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def certify(
    graph: Graph, params: Mapping[str, Any], float_values: tuple[str, ...]
) -> Report:
    """Reads from a graph what is certain.

    Args:
      graph: Graph of a program.
      params: Parameters of the graph.
      float_values: Found in its jaxpr.

    Returns:
      The certificates.
    """
    arrays = {name: np.asarray(p) for name, p in params.items()}
    agreement, constants = {}, []
    for place, own, is_nan in _with_nan(graph):
        constants += _constants(own)
        makers = {v: node for node in own.nodes for v in node.outputs}
        for name, v in own.sites.items():
            found = _agreement(own, makers, arrays, v, is_inside=bool(place))
            if found.is_proven and (is_nan or _meets_nan(own, makers, v)):
                found = Agreement(False, _BEYOND, None)
            agreement[name] = found
    size = sum(map(nbytes, arrays.values()))
    ends = accumulators(graph, params), agreement, float_values, size
    return Report(*ends, constants=tuple(constants))


def accumulators(graph: Graph, params: Mapping[str, Any]) -> tuple[Overflow, ...]:
    """Bounds the accumulators of a graph and of those inside of its nodes, in order."""
    arrays = {name: np.asarray(p) for name, p in params.items()}
    return tuple(
        dataclasses.replace(_overflow(own, node, arrays), place=place)
        for place, own in graph.walk()
        for node in filter(_accumulates, own.nodes)
    )


def _with_nan(
    graph: Graph, place: str = "", is_nan: bool = False
) -> Iterator[tuple[str, Graph, bool]]:
    """Yields graphs as `Graph.walk`, and whether what comes into one may be NaN."""
    yield place, graph, is_nan
    makers = {v: node for node in graph.nodes for v in node.outputs}
    for node in graph.nodes:
        bare = set(node.inputs) - set(graph.sites.values()) if node.graphs else ()
        inside = is_nan or any(_meets_nan(graph, makers, v) for v in bare)
        for role, own in node.graphs.items():
            yield from _with_nan(own, graph.place_of(node, role, place), inside)


def _constants(graph: Graph) -> list[KnownValue]:
    """Returns the constants of a graph that stand for real values."""
    found: dict[str, KnownValue] = {}
    for node in graph.nodes:
        value = graph.values[node.output]
        if node.operation == "constant" and value.grid is not None:
            name, scale = node.params["value"], float(np.max(value.grid.array()))
            own = KnownValue(name, value.shape, value.low, value.high, scale)
            found.setdefault(name, own)
    return list(found.values())


def _accumulates(node: Node) -> bool:
    """Returns whether an operation makes accumulators; plain sums are among them."""
    is_sum = node.operation == "add" and node.attributes["shift"] == 0
    return OPERATIONS[node.operation].kind == "accumulator" or is_sum


def _overflow(graph: Graph, node: Node, arrays: Mapping[str, np.ndarray]) -> Overflow:
    value = graph.values[node.output]
    low, high = np.array(value.low), np.array(value.high)
    witness = np.zeros(0, np.int64)
    kernel = arrays[node.params["kernel"]] if "kernel" in node.params else low
    if node.operation in ("dot", "conv") and kernel.size:
        low, high, witness = _of_kernel(graph, node, arrays)
    most = max(int(high.max(initial=0)), -1 - int(low.min(initial=0)))
    bits = most.bit_length() + 1
    return Overflow(node.path, low, high, bits, node.output, witness)


def _of_kernel(
    graph: Graph, node: Node, arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the ends of a sum by output channel, and the codes that attain them."""
    inputs = [graph.values[v] for v in node.inputs]
    own = {role: arrays[name] for role, name in node.params.items()}
    plain = Operands(node.attributes, inputs, {**own, "bias": np.zeros((), np.int64)})
    record = OPERATIONS[node.operation]
    axes = [d for d, n in enumerate(record.interval(plain)[0].shape) if n > 1]
    # A bias may vary by place too: its ends count at each channel.
    ends = record.interval(Operands(node.attributes, inputs, own))
    over = tuple(d for d in range(ends[0].ndim) if d not in axes)
    lows, highs = ends[0].min(over).reshape(-1), ends[1].max(over).reshape(-1)
    is_high = highs.max(initial=0) >= -lows.min(initial=0)
    channel = int(np.argmax(highs) if is_high else np.argmin(lows))
    x, kernel = inputs[0], by_channel(node.operation, node.attributes, own["kernel"])
    witness = np.where(
        kernel[..., channel] > 0, *((x.high, x.low) if is_high else (x.low, x.high))
    )
    return lows, highs, witness


# What a simulation computes in integers as well.
_IN_BOTH = {
    "softmax": "a softmax",
    "log_softmax": "a log-softmax",
    "logsumexp": "a logsumexp",
    "norm": "a normalisation",
    "masked_norm": "a normalisation",
    "divide": "a quotient",
}


_BEYOND = "a gather before it, whose places beyond its table are NaN in the model"


def _meets_nan(graph: Graph, makers: Mapping[int, Node], site: int) -> bool:
    """Returns whether a site is NaN in the model for some places that are inputs."""
    todo, sites = [site], set(graph.sites.values()) - {site}
    seen: set[int] = set()
    while todo:
        v = todo.pop()
        if v in seen or v in sites or v not in makers:
            continue
        seen.add(v)
        graphs = (own for g in makers[v].graphs.values() for _, own in g.walk())
        inside = (node for own in graphs for node in own.nodes)
        if any(node.attributes.get("is_nan") for node in (makers[v], *inside)):
            return True
        todo += makers[v].inputs
    return False


_WHOLE = ("arithmetic", "argsort", "argmax", "argmin")  # Numbers of their own.


def _agreement(
    graph: Graph,
    makers: Mapping[int, Node],
    arrays: Mapping[str, np.ndarray],
    v: int,
    is_inside: bool = False,
) -> Agreement:
    node = makers.get(v)
    if node is None and is_inside:
        return _proven(f"codes from outside of its loop, {_AT_ANY_SCALE}")
    if node is None:
        return _of_input(graph.values[v])
    if node.operation == "loop":
        return _of_loop(graph, makers, arrays, v, is_inside)
    if node.operation in ("table", "thresholds"):
        return _of_function(graph, makers, node, arrays)
    if node.operation == "requantize":
        return _of_requantizer(graph, makers, node, arrays)
    if node.operation == "embed":
        return _proven(f"rows of a table, {_AT_ANY_SCALE}")
    if node.operation in _IN_BOTH:
        what = f"{_IN_BOTH[node.operation]} of integers in the model too"
        return _proven(f"{what}, {_AT_ANY_SCALE}")
    if node.operation == "constant":
        return _proven("a constant, rounded as the model rounds it")
    if node.operation == "compare":
        return _proven(f"products compared as float32 rounds them, {_AT_ANY_SCALE}")
    if node.operation in _WHOLE:
        return _proven(f"whole numbers, {_AT_ANY_SCALE}")
    if node.operation == "add":
        if node.attributes.get("is_exact"):
            return _proven("a sum on scales that are powers of two, within 24 bits")
        return _rounded(_error_of_sum(graph, node), "a sum of codes on other scales")
    if OPERATIONS[node.operation].kind in ("move", "choice"):
        given = graph, makers, arrays
        own = [_agreement(*given, i, is_inside) for i in _moved_by(node)]
        worst = [a for a in own if not a.is_proven]
        if not worst:
            return _proven(f"{node.operation} of codes on one grid, {_AT_ANY_SCALE}")
        return max(worst, key=lambda a: np.inf if a.most is None else a.most)
    return Agreement(False, f"no proof is known of {node.operation}", None)


def _of_loop(
    graph: Graph,
    makers: Mapping[int, Node],
    arrays: Mapping[str, np.ndarray],
    v: int,
    is_inside: bool,
) -> Agreement:
    """Returns the agreement of what a loop leaves, which is that inside of its body."""
    node = makers[v]
    k, a, body = node.outputs.index(v), node.attributes, node.graphs["body"]
    inner = {u: own for own in body.nodes for u in own.outputs}
    found = _agreement(body, inner, arrays, body.outputs[k], is_inside=True)
    if not found.is_proven or k >= a["carries"]:
        return found
    return _agreement(graph, makers, arrays, node.inputs[a["consts"] + k], is_inside)


def _moved_by(node: Node) -> tuple[int, ...]:
    """Returns the values that a move or a choice takes codes from, without places."""
    places = {"gather": slice(1), "select": slice(1, None)}
    names = "scatter", "scatter_max", "scatter_min"
    places |= dict.fromkeys(names, slice(1, None))
    return node.inputs[places.get(node.operation, slice(None))]


def _proven(reason: str) -> Agreement:
    return Agreement(True, reason, 0)


def _rounded(error: float, reason: str) -> Agreement:
    """Returns the agreement of a site where float32 is off by at most ``error`` steps.

    Numbers that are ``error`` apart round to codes that are ``floor(error) + 1`` apart
    at most.
    """
    if error >= 0.5:
        reason = f"{reason}; float32 may lose {error:.1f} steps"
    return Agreement(False, reason, int(error) + 1)


def _of_input(value: Value) -> Agreement:
    if value.is_rescaling_exact:
        return _proven("quantized by the formula of the model")
    steps = max(abs(value.low), abs(value.high))
    error = steps * _OTHER_ROUNDINGS * _HALF_ULP
    return _rounded(error, "an input that is rescaled in float32 first")


def _of_function(
    graph: Graph,
    makers: Mapping[int, Node],
    node: Node,
    arrays: Mapping[str, np.ndarray],
) -> Agreement:
    """Returns the agreement of a function of integers, by a table or by thresholds.

    It is proven for codes. An accumulator may fall on the other side of a threshold,
    unless float32 holds it.
    """
    own = {role: arrays[name].astype(np.int64) for role, name in node.params.items()}
    off, is_exact = node.attributes.get("most_off", 0), node.attributes.get("is_exact")
    is_table = node.operation == "table"
    text = "thresholds of the float function"
    if is_table:
        count = own["table"].shape[0]
        text = f"a table of the float function on all {count} codes"
    if is_exact is None and not off:
        return _proven(f"{text}, {_AT_ANY_SCALE}")
    if is_exact is None:
        text += f"; how the compiler fuses it changes some by up to {off} codes"
        return Agreement(False, text, None)
    if node.attributes.get("is_sampled"):
        text += " in a range too long to look at all of it"
        return Agreement(False, text, None)
    terms, most = _reach(graph, makers, node.inputs[0], arrays)
    if is_exact and most < _EXACT_FLOAT32 and not off:
        return _proven(f"{text}, of an accumulator that float32 holds")
    if off:
        text += "; how the compiler fuses it moves some"
    elif most >= _EXACT_FLOAT32:
        text += f"; accumulators up to {most}, beyond float32's 2^24"
    else:
        text += "; scales that are no powers of two: float32 rounds sums"
    reach = int(np.ceil((terms + _OTHER_ROUNDINGS) * _HALF_ULP * most)) + 1
    if is_table:
        table = np.atleast_2d(own["table"].T)
        cuts = np.broadcast_to(np.arange(1, count), (len(table), count - 1))
    else:
        cuts, table = (np.atleast_2d(own[role]) for role in ("thresholds", "table"))
    return Agreement(False, text, max(off, _most_change(cuts, table, reach)))


def _of_requantizer(
    graph: Graph,
    makers: Mapping[int, Node],
    node: Node,
    arrays: Mapping[str, np.ndarray],
) -> Agreement:
    """Returns the agreement of a requantizer, proven where float32 rounds only once."""
    a, acc = node.attributes, graph.values[node.inputs[0]]
    terms, most = _reach(graph, makers, node.inputs[0], arrays)
    z = a["input_zero_point"]
    most = max(most, abs(acc.low - z), abs(acc.high - z))
    if most < _EXACT_FLOAT32 and a.get("is_exact"):
        if a["rule"] == "fp32_half_even":
            return _proven("one factor, rounded as float32 rounds it")
        return _proven("a shift: scales are powers of two")
    multiplier = np.abs(arrays[node.params["multiplier"]].astype(np.float64))
    ratio = float(np.max(multiplier * 2.0 ** -arrays[node.params["shift"]], initial=0))
    error = (terms + _OTHER_ROUNDINGS) * _HALF_ULP * most * ratio
    if a.get("is_bias_rounded"):
        reason = "a bias that is rounded to the unit of its accumulator"
        error += ratio
    elif most >= _EXACT_FLOAT32:
        reason = f"accumulators up to {most}, beyond float32's 2^24"
    elif np.all(_is_power_of_two(arrays[node.params["multiplier"]])):
        reason = "scales that are no powers of two, though their ratio is"
    else:
        reason = "scales that are no powers of two: ties may fall elsewhere"
    return _rounded(error, reason)


def _most_change(cuts: np.ndarray, table: np.ndarray, reach: int) -> int:
    """Returns the most that a code changes between integers ``reach`` apart."""
    found = 0
    for row, codes in zip(cuts, table, strict=True):
        last = np.searchsorted(row, row + reach - 1, side="right")
        # Pieces from the one before a threshold to the last within reach of it.
        for count in range(1, int(np.max(last - np.arange(len(row)), initial=0)) + 1):
            first = np.flatnonzero(last - np.arange(len(row)) >= count)
            change = np.abs(codes[first + count] - codes[first])
            found = max(found, int(np.max(change, initial=0)))
    return found


def _error_of_sum(graph: Graph, node: Node) -> float:
    """Bounds the float32 error, in steps, of a sum of codes on different grids."""
    a = node.attributes
    terms = zip(node.inputs, a["input_zero_points"], a["multipliers"], strict=True)
    steps = sum(
        max(abs(graph.values[v].low - z), abs(graph.values[v].high - z)) * abs(m)
        for v, z, m in terms
    )
    roundings = len(node.inputs) + _OTHER_ROUNDINGS
    return float(steps * 2.0 ** -a["shift"] * roundings * _HALF_ULP)


def _reach(
    graph: Graph,
    makers: Mapping[int, Node],
    v: int,
    arrays: Mapping[str, np.ndarray],
) -> tuple[int, int]:
    """Returns the number of terms of an accumulator, and their total magnitude."""
    node, value = makers.get(v), graph.values[v]
    most = max(abs(value.low), abs(value.high))
    if node is None:
        return 1, most
    if OPERATIONS[node.operation].kind in ("move", "choice"):
        found = [_reach(graph, makers, i, arrays) for i in _moved_by(node)]
        return max(n for n, _ in found), max(most, *(m for _, m in found))
    if node.operation == "multiply" and graph.values[node.inputs[0]].grid is None:
        terms, inner = _reach(graph, makers, node.inputs[0], arrays)
        kernel = np.abs(arrays[node.params["kernel"]].astype(np.int64))
        times = int(kernel.max(initial=0)) << node.attributes.get("shift", 0)
        return terms, max(most, inner * times)
    if (reach := OPERATIONS[node.operation].reach) is None:
        return len(node.inputs), most
    inputs = [graph.values[i] for i in node.inputs]
    params = {role: arrays[name] for role, name in node.params.items()}
    terms, inner = reach(Operands(node.attributes, inputs, params))
    return terms, max(most, inner)


def _is_power_of_two(x: Any) -> Any:
    x = np.abs(np.asarray(x, np.int64))
    return (x & (x - 1)) == 0
