"""Random integer graphs, built without a model: every operation, any range of codes.

A step that does not fit is taken back, and another one drawn. Sizes are those of a
batch of three, and other batches run through the same graph.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.graph.builder import GraphBuilder
from qjax.graph.graph import Graph, Grid, holds
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.operations.arithmetic import KINDS

BATCH = 3
RULES = ("half_even", "tflite_double", "tflite_single", "fp32_half_even")
BITS = (2, 4, 8, 8, 8, 16)
_INT32 = np.iinfo(np.int32)


class Builder(GraphBuilder):
    """A builder whose nodes clip to what they reach, as those of graphs do."""

    def add(self, operation: str, *args: Any, **options: Any) -> int:
        """Adds an operation."""
        v = super().add(operation, *args, **options)
        node, own = self.nodes[-1], self.values[v]
        if not holds(own.dtype, own.zero_point, own.zero_point):
            raise ValueError("the type of the codes does not hold their zero point")
        if {"low", "high"} <= set(node.attributes):
            ends = {"low": own.low, "high": own.high}
            attributes = {**node.attributes, **ends}
            self.nodes[-1] = dataclasses.replace(node, attributes=attributes)
        return v


class Drawn:
    """A graph in the making.

    Args:
      rng: What is drawn from.
      params: Receives the parameters; those of the graph around a body.
    """

    def __init__(self, rng: np.random.Generator, params: Any = None) -> None:
        self.rng, self.b = rng, Builder()
        self.b.params = {} if params is None else params
        self.steps: list[str] = []
        self.most = self.one(400, 400, 400, 6000)  # Integers of a value.

    # Draws.

    def pick(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def one(self, *choices: Any) -> Any:
        return choices[self.pick(0, len(choices) - 1)]

    def ints(self, shape: Any, low: int, high: int) -> np.ndarray:
        """Integers of a range, or only its ends: accumulators at theirs."""
        if self.chance(0.2):
            return self.rng.choice(np.array([low, high]), shape)
        return self.rng.integers(low, high, shape, endpoint=True)

    def param(self, role: str, array: Any, dtype: str = "int32") -> str:
        return self.b.add_param(role, np.asarray(array).astype(dtype))

    def ends(self) -> tuple[int, int, int]:
        """A range of codes and its zero point."""
        bits, signed = self.one(*BITS), self.chance(0.7)
        low, high = (
            (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        )
        low += bits > 2 and self.chance(0.3)
        return low, high, 0 if self.chance() else self.pick(low, high)

    def grid(self, zero: int) -> Grid:
        return Grid(1.0, zero)

    def value(self, v: int) -> Any:
        return self.b.values[v]

    def shape(self, v: int) -> tuple[int, ...]:
        return self.value(v).shape

    def axis(self, v: int) -> int:
        """An axis that is not that of the batch."""
        return self.pick(1, len(self.shape(v)) - 1)

    def axes(self, v: int) -> list[int]:
        own = range(1, len(self.shape(v)))
        some = [d for d in own if self.chance()]
        return some or [self.axis(v)]

    def zero(self, v: int) -> int:
        return self.value(v).zero_point

    def fresh(self, is_wide: bool) -> int:
        """Adds an input of any codes, or of accumulators of any size."""
        rank = self.pick(1, 3)
        most = 7 if self.most < 1000 else (600, 40, 12)[rank - 1]
        shape = (BATCH, *(self.pick(1, most) for _ in range(rank)))
        if is_wide:
            most = 1 << self.one(31, 31, 17, 19, 23)
            return self.b.add_value(shape, -most, most - 1)
        low, high, zero = self.ends()
        return self.b.add_value(shape, low, high, self.grid(zero))

    # Between steps.

    def codes(self, v: int) -> int:
        """Makes codes of what may be an accumulator."""
        own = self.value(v)
        if own.dtype != "int32" and (own.grid is not None or self.chance(0.3)):
            return v
        return self.requantized(v)

    def like(self, v: int) -> int:
        """Returns a value of the same shape: itself or turned, on any grid."""
        if self.chance(0.3):
            return v
        found = self.b.add(
            "rev", [v], {"axes": [self.axis(v)]}, grid=self.value(v).grid
        )
        return self.requantized(found) if self.chance() else found

    def factor(self, v: int) -> int:
        """Makes codes, or leaves accumulators as they are, for a product."""
        is_wide = self.value(v).dtype == "int32"
        return v if is_wide and self.chance(0.7) else self.codes(v)

    def narrow(self, v: int) -> int:
        """Makes codes of at most 8 bits, or says that they do not fit."""
        v = self.codes(v)
        if self.value(v).high - self.value(v).low > 255:
            raise ValueError("too many codes")
        return v

    def like_codes(self, v: int) -> int:
        return self.codes(self.like(v))

    def requantized(self, v: int) -> int:
        own, (low, high, zero) = self.value(v), self.ends()
        most = max(abs(own.low - self.zero(v)), abs(own.high - self.zero(v)), 1)
        rank, channels = len(own.shape), 1
        axis = self.axis(v) if rank > 1 and self.chance(0.4) else None
        if axis is not None:
            channels = own.shape[axis]
        rule = self.one(*RULES)
        ratio = (high - low + 1) / most * 2 ** self.rng.uniform(-2.5, 1, channels)
        kind = self.one("power", "small power", "float", "any")
        multiplier = np.full(channels, 1 << 30 if kind == "power" else 1)
        if kind in ("float", "any"):
            multiplier = self.rng.integers(1 << 30, 1 << 31, channels)
        if kind == "any":
            multiplier >>= self.pick(0, 29)
        if rule in ("half_even", "fp32_half_even") and self.chance(0.3):
            multiplier *= self.rng.choice([-1, 1], channels)
        shift = np.round(np.log2(np.maximum(abs(multiplier), 1) / ratio)).astype(int)
        sizes = [1] * rank
        if axis is not None:
            sizes[axis] = channels
        if axis is None and self.chance():
            sizes = []
        params = {
            "multiplier": self.param("multiplier", multiplier.reshape(sizes)),
            "shift": self.param("shift", np.clip(shift, 0, 62).reshape(sizes)),
        }
        attributes = {"input_zero_point": self.zero(v), "zero_point": zero}
        attributes |= {"rule": rule, "low": low, "high": high}
        if max(own.high - self.zero(v), self.zero(v) - own.low) > _INT32.max:
            attributes["is_wide"] = True
        return self.b.add(
            "requantize", [v], attributes, params=params, grid=self.grid(zero)
        )

    def step(self, v: int, *first: str) -> int:
        """Adds a step that fits: one of some if one does soon, or any."""
        for tries in itertools.count():
            name = self.one(*(first if first and tries < 20 else STEPS))
            kept = len(self.b.values), len(self.b.nodes)
            try:
                found = STEPS[name](self, v)
                size = math.prod(self.shape(found))
                if size > self.most or len(self.shape(found)) not in (2, 3, 4):
                    raise ValueError("too large")
            except (ValueError, OverflowError, ZeroDivisionError):
                del self.b.values[kept[0] :], self.b.nodes[kept[1] :]
                continue
            self.steps.append(name)
            return found
        raise AssertionError


# Products.


def offset_of(dtype: str) -> int:
    return {"uint8": 128, "uint16": 1 << 15}.get(dtype, 0)


def _kernel(d: Drawn, shape: Any) -> np.ndarray:
    bits = d.one(2, 4, 8, 8, 8, 11)
    most = (1 << bits - 1) - 1
    return d.ints(shape, -most, most).astype("int8" if bits <= 8 else "int16")


def _product(
    d: Drawn, name: str, v: int, attributes: Any, kernel: np.ndarray, shape: Any
) -> int:
    """Adds a product with a bias of a shape; some reach the ends of int32."""
    if d.chance(0.3):  # All codes at one end are the most that the sums reach.
        kernel = np.abs(kernel)
    params = {"kernel": d.b.add_param("kernel", kernel), "bias": d.param("bias", 0)}
    most = d.one(0, 3, 1000, 1 << 20, 1 << 29)
    bias = d.ints(shape, -most, most)
    if d.chance(0.2):
        own = {role: d.b.params[n] for role, n in params.items()}
        operands = Operands(attributes, [d.value(v)], own)
        low, high = OPERATIONS[name].interval(operands)
        axes = tuple(k for k, n in enumerate(shape) if n == 1)
        low, high = np.broadcast_arrays(low, high, np.zeros(shape, np.int64))[:2]
        least = _INT32.min - low.min(axes, keepdims=True)
        bias = least if d.chance() else _INT32.max - high.max(axes, keepdims=True)
        if bias.shape != tuple(shape) or np.any(abs(bias) > _INT32.max):
            raise ValueError("sums differ where the bias does not")
    params["bias"] = d.param("bias", np.int32(0) if d.chance(0.1) else bias)
    return d.b.add(name, [v], attributes, params=params)


def _dot(d: Drawn, v: int) -> int:
    v, side = d.factor(v), d.pick(0, 1)
    shape, summed = d.shape(v), d.axes(v)
    batch = [k for k in range(1, len(shape)) if k not in summed and d.chance(0.3)]
    free = [d.one(1, 3, 8, 17, 33, 70) for _ in range(d.pick(1, 2))]
    parts = [*((k, "batch") for k in range(len(batch)))]
    parts += [(k, "summed") for k in range(len(summed))] + [(n, "free") for n in free]
    order = d.rng.permutation(len(parts))
    sizes, where = [], {"batch": [0] * len(batch), "summed": [0] * len(summed)}
    for at, k in enumerate(order):
        number, kind = parts[k]
        if kind == "free":
            sizes.append(number)
        else:
            where[kind][number] = at
            sizes.append(shape[(batch if kind == "batch" else summed)[number]])
    pairs = [[summed, where["summed"]], [batch, where["batch"]]]
    if side == 0:
        pairs = [pair[::-1] for pair in pairs]
    attributes = {"kernel_operand": side, "contract": pairs[0], "batch": pairs[1]}
    attributes |= {"offset": offset_of(d.value(v).dtype), "shift": d.one(0, 0, 0, 2)}
    kernel = _kernel(d, sizes)
    own = {"kernel": kernel, "bias": np.int32(0)}
    whole = list(d.b.outcome("dot", [v], own, attributes)[0])
    rest = [k for k in range(len(shape)) if k not in (*summed, *batch)]
    first = len(batch) + rest.index(0) + (len(free) if side == 0 else 0)
    whole = [1 if k == first or d.chance(0.3) else n for k, n in enumerate(whole)]
    found = _product(d, "dot", v, attributes, kernel, whole)
    return _batch_first(d, d.requantized(found) if d.chance(0.9) else found, first)


def _batch_first(d: Drawn, v: int, at: int) -> int:
    if at == 0:
        return v
    order = [at, *(k for k in range(len(d.shape(v))) if k != at)]
    return d.b.add("transpose", [v], {"permutation": order}, grid=d.value(v).grid)


def _dot_codes(d: Drawn, v: int) -> int:
    v = d.factor(v)
    other, axis = d.codes(d.like(v)), d.axis(v)
    attributes = {"zero_points": [d.zero(v), d.zero(other)]}
    attributes |= {"contract": [[axis], [axis]], "batch": [[0], [0]]}
    return d.requantized(d.b.add("dot_codes", [v, other], attributes))


def _conv(d: Drawn, v: int) -> int:
    v = d.factor(v)
    shape = d.shape(v)
    rank = len(shape)
    order = [0, *(1 + d.rng.permutation(rank - 1))]
    order = [int(k) for k in order]
    channels, space = shape[order[1]], rank - 2
    groups = d.one(1, 1, channels, *(g for g in (2, 3) if channels % g == 0))
    outputs = groups * d.one(1, 2, 5, 16, 17, 40)
    taps = [d.pick(1, 3) for _ in range(space)]
    names = [outputs, channels // groups, *taps]
    where = [int(k) for k in d.rng.permutation(rank)]
    sizes = [0] * rank
    for n, at in zip(names, where, strict=True):
        sizes[at] = n
    to = [0, *(int(k) for k in 1 + d.rng.permutation(rank - 1))]
    attributes = {
        "strides": [d.pick(1, 2) for _ in range(space)],
        "padding": [[d.pick(-1, 2), d.pick(-1, 2)] for _ in range(space)],
        "input_dilation": [d.one(1, 1, 1, 2) for _ in range(space)],
        "dilation": [d.one(1, 1, 2) for _ in range(space)],
        "groups": groups,
        "dimensions": [order, where, to],
        "padding_code": d.zero(v),
        "offset": offset_of(d.value(v).dtype),
        "shift": d.one(0, 0, 0, 3),
    }
    whole = [1] * rank
    whole[to[1]] = outputs
    made = _product(d, "conv", v, attributes, _kernel(d, sizes), whole)
    return d.requantized(made) if d.chance(0.9) else made


def _multiply(d: Drawn, v: int) -> int:
    v, shape = d.codes(v), d.shape(v)
    sizes = [1, *(n if d.chance() else 1 for n in shape[1:])]
    attributes = {"offset": offset_of(d.value(v).dtype), "shift": d.one(0, 0, 5)}
    kernel = _kernel(d, sizes)
    return d.requantized(_product(d, "multiply", v, attributes, kernel, sizes))


def _pair(d: Drawn, v: int) -> int:
    name = d.one("multiply_codes", "maximum", "minimum")
    v = d.codes(v)
    other = d.codes(d.like(v))
    if name != "multiply_codes":
        return d.b.add(name, [v, other], grid=d.value(v).grid)
    if d.chance(0.4):
        axes = d.axes(other)
        other = d.b.add("max", [other], {"axes": axes}, grid=d.value(other).grid)
        sizes = [-1, *(1 if k in axes else n for k, n in enumerate(d.shape(v)) if k)]
        other = d.b.add("reshape", [other], {"sizes": sizes}, grid=d.value(other).grid)
    attributes = {"zero_points": [d.zero(v), d.zero(other)]}
    return d.requantized(d.b.add(name, [v, other], attributes))


# Rescales.


def _add(d: Drawn, v: int) -> int:
    v = d.codes(v)
    inputs = [v, *(d.codes(d.like(v)) for _ in range(d.pick(0, 2)))]
    low, high, zero = d.ends()
    most = d.one(1, 1 << 14, (1 << 31) - 1)
    multipliers = [d.pick(-most, most) for _ in inputs]
    if d.chance():
        multipliers = [d.one(-1, 1) << d.pick(0, 20) for _ in inputs]
    total = sum(abs(m) for m in multipliers)
    shift = max(total, 1).bit_length() + d.pick(-3, 2)
    attributes = {
        "input_zero_points": [d.zero(x) for x in inputs],
        "multipliers": multipliers,
        "shift": min(max(shift, 0), 62),
    }
    attributes |= {"zero_point": zero, "low": low, "high": high}
    return d.b.add("add", inputs, attributes, grid=d.grid(zero))


def _clip(d: Drawn, v: int) -> int:
    own = d.value(v)
    low, high = sorted([d.pick(own.low, own.high), d.pick(own.low, own.high)])
    return d.b.add("clip", [v], {"low": low, "high": high}, grid=own.grid)


def _divide(d: Drawn, v: int) -> int:
    v = d.codes(v)
    other = d.codes(d.like(v))
    low, high, zero = d.ends()
    attributes = {"zero_points": [d.zero(v), d.zero(other)]}
    attributes |= {"multiplier": d.pick(0, (1 << 31) - 1), "shift": d.pick(30, 50)}
    attributes |= {"zero_point": zero, "low": low, "high": high}
    return d.b.add("divide", [v, other], attributes, grid=d.grid(zero))


# Sums and extremes.


def _window(d: Drawn, v: int) -> dict[str, Any]:
    rank = len(d.shape(v)) - 1
    return {
        "window": [1, *(d.pick(1, 3) for _ in range(rank))],
        "strides": [1, *(d.pick(1, 2) for _ in range(rank))],
        "padding": [[0, 0], *([d.pick(-1, 1), d.pick(-1, 1)] for _ in range(rank))],
        "base_dilation": [1, *(d.one(1, 1, 1, 2) for _ in range(rank))],
        "dilation": [1, *(d.one(1, 1, 2) for _ in range(rank))],
    }


def _reduce(d: Drawn, v: int) -> int:
    name = d.one("sum", "max", "min", "argmax", "argmin", "running_sum", "pool")
    v, axes = d.codes(v), d.axes(v)
    grid = d.value(v).grid
    if name == "pool":
        name = d.one("sum_pool", "max_pool", "min_pool")
        attributes = _window(d, v)
        if name != "sum_pool":
            return d.b.add(name, [v], attributes, grid=grid)
        attributes |= {"padding_code": d.zero(v), "bias": d.pick(-99, 99)}
        return d.requantized(d.b.add(name, [v], attributes))
    if name in ("argmax", "argmin"):
        return d.b.add(name, [v], {"axis": axes[0]})
    if name == "running_sum":
        attributes = {"axis": axes[0], "reverse": d.chance(), "bias": d.pick(-9, 9)}
        attributes["input_zero_point"] = d.zero(v)
        return d.requantized(d.b.add(name, [v], attributes))
    if name != "sum":
        return d.b.add(name, [v], {"axes": axes}, grid=grid)
    sizes = [d.shape(v)[k] for k in axes]
    attributes = {"axes": axes, "sizes": sizes, "bias": d.pick(-999, 999)}
    return d.requantized(d.b.add("sum", [v], attributes))


# Lookups.


def _table(d: Drawn, v: int) -> int:
    v = d.codes(v)
    own, (low, high, zero) = d.value(v), d.ends()
    axis = d.axis(v) if d.chance(0.3) and own.high - own.low < 256 else None
    if axis is not None and d.chance(0.3):
        axis -= len(own.shape)
    count = own.high - own.low + 1
    sizes = (count,) if axis is None else (count, own.shape[axis])
    table = d.param("table", d.ints(sizes, low, high))
    attributes = {"low": own.low, "axis": axis}
    return d.b.add("table", [v], attributes, params={"table": table}, grid=d.grid(zero))


def _thresholds(d: Drawn, v: int) -> int:
    own, (low, high, zero) = d.value(v), d.ends()
    axis = d.axis(v) if d.chance(0.4) else None
    rows = () if axis is None else (own.shape[axis],)
    count = d.one(0, 1, 3, 15, 40, 255)
    cuts = np.sort(d.ints((*rows, count), own.low, own.high), -1)
    params = {
        "thresholds": d.param("thresholds", cuts),
        "table": d.param("table", d.ints((*rows, count + 1), low, high)),
    }
    attributes = {"axis": axis}
    return d.b.add("thresholds", [v], attributes, params=params, grid=d.grid(zero))


def _embed(d: Drawn, v: int) -> int:
    rows, own = d.pick(2, 6), d.value(v)
    low = max(own.low, -rows)
    high = min(max(own.high, low), rows - 1)
    v = d.b.add("clip", [v], {"low": min(low, high), "high": high})
    kernel = d.b.add_param("kernel", _kernel(d, (rows, d.pick(1, 5))[: d.pick(1, 2)]))
    return d.b.add("embed", [v], params={"kernel": kernel})


def _choose(d: Drawn, v: int) -> int:
    v = d.codes(v)
    other = d.codes(d.like(v))
    kind = d.one("eq", "ne", "lt", "le", "gt", "ge")
    attributes = {"kind": kind, "zero_points": [d.zero(v), d.zero(other)]}
    attributes |= {
        "multipliers": [d.one(1, 3, 16777213, d.pick(1, 1 << 23)) for _ in "ab"]
    }
    attributes |= {"exponents": [d.pick(-24, 4) for _ in "ab"]}
    which = d.b.add("compare", [v, other], attributes)
    cases = [v, other] if d.chance() else [other, v]
    if d.chance(0.2):
        table = d.param("table", [2, 0])
        params = {"table": table}
        which = d.b.add("table", [which], {"low": 0, "axis": None}, params=params)
        cases.append(d.like(v))
    return d.b.add("select", [which, *cases], grid=d.value(v).grid)


def _arithmetic(d: Drawn, v: int) -> int:
    dtype = d.one("int8", "uint8", "int16", "uint16", "int32", "bool")
    inputs = [
        d.b.add("arithmetic", [x], {"kind": "convert", "dtype": dtype})
        for x in (v, d.like(v))
    ]
    ones = ("neg", "abs", "sign", "not", "convert")
    kind = d.one(*KINDS)
    if dtype == "bool":
        kind = d.one("and", "or", "xor", "not", "convert", "eq", "ne")
    inputs = inputs[:1] if kind in ones else inputs
    return d.b.add("arithmetic", inputs, {"kind": kind, "dtype": dtype})


# Moves.


def _move(d: Drawn, v: int) -> int:
    shape, grid = d.shape(v), d.value(v).grid
    rank = len(shape)
    name = d.one("reshape", "transpose", "slice", "rev", "pad", "broadcast", "take")
    if name == "reshape":
        size = math.prod(shape[1:])
        first = d.one(*(n for n in range(1, size + 1) if size % n == 0))
        attributes: Any = {"sizes": [-1, first, size // first]}
    elif name == "transpose":
        order = [int(k) for k in 1 + d.rng.permutation(rank - 1)]
        attributes = {"permutation": [0, *order]}
    elif name == "slice":
        steps = [1, *(d.one(1, 1, 2, -1, -2) for _ in shape[1:])]
        start = [None, *(d.one(None, d.pick(0, n - 1)) for n in shape[1:])]
        attributes = {"start": start, "stop": [None] * rank, "steps": steps}
    elif name == "rev":
        attributes = {"axes": d.axes(v)}
    elif name == "pad":
        sizes = [[d.pick(-1, 2), d.pick(-1, 2), d.one(0, 0, 1)] for _ in shape[1:]]
        attributes = {"padding": [[0, 0, 0], *sizes], "padding_code": d.zero(v)}
    elif name == "broadcast":
        at = d.pick(1, rank)
        sizes = [None] * rank
        sizes.insert(at, d.pick(1, 3))
        dimensions = [k for k in range(rank + 1) if k != at]
        attributes = {"sizes": sizes, "dimensions": dimensions}
    else:
        places = d.ints((d.pick(1, 6), d.pick(1, 3)), 0, math.prod(shape[1:]) - 1)
        params = {"places": d.param("places", places)}
        return d.b.add("take", [v], {}, params=params, grid=grid)
    return d.b.add(name, [v], attributes, grid=grid)


def _concatenate(d: Drawn, v: int) -> int:
    inputs = [v, *(d.like(v) for _ in range(d.pick(1, 2)))]
    if d.chance(0.3):
        shape = d.shape(v)
        value = d.param("value", d.ints((1, *shape[1:]), -8, 7), "int8")
        inputs.append(d.b.add("constant", [v], params={"value": value}))
    return d.b.add("concatenate", inputs, {"axis": d.axis(v)}, grid=d.value(v).grid)


# Gathers, scatters, sorts.


def _places(d: Drawn, v: int) -> int:
    """Places of the batch, two axes and a coordinate: computed, some beyond ends."""
    v = d.b.add("reshape", [v], {"sizes": [-1, math.prod(d.shape(v)[1:])]})
    rows, low = d.pick(1, 5), d.pick(-3, 0)
    at = d.ints((rows, 1), 0, d.shape(v)[1] - 1)
    v = d.b.add("take", [v], {}, params={"places": d.param("places", at)})
    return d.b.add("clip", [v], {"low": low, "high": d.pick(1, 8)})


def _gather(d: Drawn, v: int) -> int:
    at, shape, own = _places(d, v), d.shape(v), d.value(v)
    axis, mode = d.axis(v), d.one("clip", "fill")
    size = d.pick(0, shape[axis])
    single = [axis] if size == 1 and d.chance() else []
    kept = [k for k in range(1, len(shape)) if k not in single]
    first = d.pick(1, 2)
    offset = [k for k in range(len(kept) + 2) if k not in (0, first)]
    attributes = {
        "offset_dims": offset[: len(kept)],
        "collapsed_slice_dims": single,
        "start_index_map": [axis],
        "operand_batching_dims": [0],
        "start_indices_batching_dims": [0],
        "slice_sizes": [
            1,
            *(size if k == axis else None for k in range(1, len(shape))),
        ],
        "mode": mode,
        "fill": d.one(own.low, own.high, own.zero_point, max(own.low - 3, _INT32.min)),
    }
    return d.b.add("gather", [v, at], attributes, grid=own.grid)


def _scatter(d: Drawn, v: int) -> int:
    v = d.codes(v)
    at, shape, axis = _places(d, v), d.shape(v), d.axis(v)
    rows, size = d.shape(at)[1], d.pick(1, shape[axis])
    single = [axis] if size == 1 and d.chance() else []
    kept = [k for k in range(1, len(shape)) if k not in single]
    first = d.pick(1, len(kept) + 1)
    window = [k for k in range(1, len(kept) + 2) if k != first]
    sizes = [0] * (len(kept) + 2)
    sizes[0], sizes[first] = BATCH, rows
    for k, to in zip(kept, window, strict=True):
        sizes[to] = size if k == axis else shape[k]
    count = math.prod(sizes[1:])
    flat = d.b.add(
        "reshape", [v], {"sizes": [-1, math.prod(shape[1:])]}, grid=d.value(v).grid
    )
    places = d.ints(sizes[1:], 0, math.prod(shape[1:]) - 1)
    params = {"places": d.param("places", places)}
    updates = d.b.add("take", [flat], {}, params=params, grid=d.value(v).grid)
    name = d.one("scatter", "scatter_add", "scatter_max", "scatter_min")
    attributes = {
        "update_window_dims": window,
        "inserted_window_dims": single,
        "scatter_dims": [axis],
        "operand_batching_dims": [0],
        "scatter_indices_batching_dims": [0],
        "mode": d.one("clip", "drop"),
    }
    if name != "scatter_add":
        return d.b.add(name, [at, v, updates], attributes, grid=d.value(v).grid)
    attributes |= {"sizes": [None, *shape[1:]], "most_updates": count}
    attributes["input_zero_point"] = d.zero(updates)
    return d.requantized(d.b.add(name, [at, updates], attributes))


def _sort(d: Drawn, v: int) -> int:
    if d.chance():
        return d.b.add("sort", [v], {"axis": d.axis(v)}, grid=d.value(v).grid)
    return d.b.add("argsort", [v], {"axis": d.axis(v), "descending": d.chance()})


STEPS: dict[str, Callable[[Drawn, int], int]] = {
    "dot": _dot,
    "dot again": _dot,
    "dot_codes": _dot_codes,
    "conv": _conv,
    "conv again": _conv,
    "multiply": _multiply,
    "pair": _pair,
    "add": _add,
    "clip": _clip,
    "divide": _divide,
    "reduce": _reduce,
    "reduce again": _reduce,
    "table": _table,
    "thresholds": _thresholds,
    "embed": _embed,
    "choose": _choose,
    "arithmetic": _arithmetic,
    "move": _move,
    "move again": _move,
    "concatenate": _concatenate,
    "gather": _gather,
    "scatter": _scatter,
    "sort": _sort,
    "requantize": Drawn.requantized,
}


def drawn(seed: int) -> Any:
    """Returns a graph, its parameters and the names of its steps, by a number."""
    d = Drawn(np.random.default_rng(seed))
    is_wide = d.chance(0.15)
    v = first = d.fresh(is_wide)
    kept = [d.step(v, *("dot", "dot_codes", "conv") * (is_wide and d.chance()))]
    for _ in range(d.pick(0, 6)):
        kept.append(d.step(kept[-1] if d.chance(0.8) else d.one(*kept)))
    outputs = {kept[-1], *(v for v in kept if d.chance(0.2))}
    graph: Graph = d.b.graph((first,), tuple(sorted(outputs)))
    nodes = (node for _, own in graph.walk() for node in own.nodes)
    names = {name for node in nodes for name in node.params.values()}
    return graph, {k: d.b.params[k] for k in sorted(names)}, d.steps
