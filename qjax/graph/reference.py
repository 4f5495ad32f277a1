"""The integer graph in plain NumPy: int64, no JAX, as slow as it is clear.

The oracle of every backend.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph
from qjax.graph.operations import tflite as tflite_ops


def run(
    graph: Graph, params: Mapping[str, Any], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Computes all values of a graph in int64.

    Args:
      graph: What to compute.
      params: Its parameters, by name.
      inputs: Codes.

    Returns:
      Every value by number.

    Raises:
      OverflowError: if a value leaves the interval that the graph promises.
    """
    arrays = {name: np.asarray(p).astype(np.int64) for name, p in params.items()}
    env = {
        v: np.asarray(x, np.int64) for v, x in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        own = {role: arrays[name] for role, name in node.params.items()}
        out = _BODIES[node.operation](
            node.attributes, own, [env[v] for v in node.inputs]
        )
        bound = graph.values[node.output]
        if out.size and (out.min() < bound.low or out.max() > bound.high):
            raise OverflowError(f"{node} leaves [{bound.low}, {bound.high}].")
        env[node.output] = out
    return [env[v] for v in range(len(graph.values))]


def round_shift(value: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``value / 2^shift`` half to even, by quotient and remainder."""
    unit = np.int64(1) << shift
    quotient, rest = value // unit, value % unit
    up = (2 * rest > unit) | ((2 * rest == unit) & (quotient % 2 == 1))
    # 2 * rest wraps only past 2^62, which shifts do not reach.
    return quotient + up


def _to_float32_and_back(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.int64)


def _requantize(a, own, inputs):
    acc = inputs[0] - a["input_zero_point"]
    if a["rule"] == "fp32_half_even":
        acc = _to_float32_and_back(acc)
    product = acc * own["multiplier"]
    if a["rule"] == "fp32_half_even":
        product = _to_float32_and_back(product)
    if a["rule"].startswith("tflite_"):
        pair = own["multiplier"], own["shift"]
        code = tflite_ops.rescale(acc, *pair, a["rule"])
    else:
        code = round_shift(product, own["shift"])
    return np.clip(code + a["zero_point"], a["low"], a["high"])


def _add(a, own, inputs):
    terms = zip(inputs, a["input_zero_points"], a["multipliers"], strict=True)
    total = sum((q - z) * np.int64(m) for q, z, m in terms)
    code = round_shift(total, np.asarray(a["shift"])) + a["zero_point"]
    return np.clip(code, a["low"], a["high"])


def _dot(a, own, inputs):
    pair = (inputs[0] - a["offset"], own["kernel"])
    pair = pair[::-1] if a["kernel_operand"] == 0 else pair
    product = _dot_general(*pair, a["contract"], a.get("batch", ((), ())))
    return product * 2 ** a.get("shift", 0) + own["bias"]


def _conv(a, own, inputs):
    lhs, rhs, out_spec = a["dimensions"]
    x = np.transpose(inputs[0], lhs)  # Batch, channels, spatial.
    k = np.transpose(own["kernel"], rhs)  # Out, in, spatial.
    pad = [(0, 0), (0, 0), *map(tuple, a["padding"])]
    x = _spread(x, (1, 1, *a["input_dilation"]), a["padding_code"])
    x = _pad_or_crop(x, pad, a["padding_code"]) - a["offset"]
    groups, outs = a["groups"], k.shape[0] // a["groups"]
    sizes = [
        (n - (m - 1) * d - 1) // s + 1
        for n, m, d, s in zip(
            x.shape[2:], k.shape[2:], a["dilation"], a["strides"], strict=True
        )
    ]
    acc = np.zeros((x.shape[0], k.shape[0], *sizes), np.int64)
    for flat, tap in enumerate(itertools.product(*map(range, k.shape[2:]))):
        spatial: list[Any] = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, a["dilation"], sizes, a["strides"], strict=True)
        ]
        seen = x[(slice(None), slice(None), *spatial)]
        for g in range(groups):
            own_in = slice(g * k.shape[1], (g + 1) * k.shape[1])
            own_out = slice(g * outs, (g + 1) * outs)
            weights = k[own_out].reshape(outs, k.shape[1], -1)[..., flat]
            acc[:, own_out] += np.einsum("nc...,oc->no...", seen[:, own_in], weights)
    acc = np.transpose(acc, np.argsort(out_spec))
    return acc * 2 ** a.get("shift", 0) + own["bias"]


def _pad_or_crop(
    x: np.ndarray, pad: Sequence[tuple[int, int]], fill: int
) -> np.ndarray:
    """Pads where sizes are positive, crops where they are negative."""
    grown = [(max(low, 0), max(high, 0)) for low, high in pad]
    x = np.pad(x, grown, constant_values=fill)
    return x[tuple(slice(max(-a, 0), b if b < 0 else None) for a, b in pad)]


def _spread(x: np.ndarray, steps: Sequence[int], fill: int) -> np.ndarray:
    """Puts values ``steps`` apart."""
    sizes = [max((n - 1) * s + 1, 0) for n, s in zip(x.shape, steps, strict=True)]
    spread = np.full(sizes, fill, np.int64)
    spread[tuple(slice(None, None, s) for s in steps)] = x
    return spread


def _multiply(a, own, inputs):
    product = (inputs[0] - a["offset"]) * own["kernel"]
    return product * 2 ** a.get("shift", 0) + own["bias"]


def _windows(a: Mapping[str, Any], x: np.ndarray, fill: int) -> list[np.ndarray]:
    """One array of the output's shape for each place in the window."""
    x = _spread(x, a["base_dilation"], fill)
    x = _pad_or_crop(x, [tuple(pair) for pair in a["padding"]], fill)
    axes = list(zip(x.shape, a["window"], a["dilation"], a["strides"], strict=True))
    sizes = [(n - (w - 1) * d - 1) // s + 1 for n, w, d, s in axes]
    found = []
    for tap in itertools.product(*map(range, a["window"])):
        places = zip(tap, axes, sizes, strict=True)
        index = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, (_, _, d, s), n in places
        )
        found.append(x[index])
    return found


def _sum_pool(a, own, inputs):
    return np.sum(_windows(a, inputs[0], a["padding_code"]), axis=0) + a["bias"]


def _max_pool(a, own, inputs):
    least = np.iinfo(np.int64).min
    return np.max(_windows(a, inputs[0], least), axis=0)


def _min_pool(a, own, inputs):
    most = np.iinfo(np.int64).max
    return np.min(_windows(a, inputs[0], most), axis=0)


def _dot_codes(a, own, inputs):
    x, y = (x - z for x, z in zip(inputs, a["zero_points"], strict=True))
    return _dot_general(x, y, a["contract"], a["batch"])


def _dot_general(x: Any, y: Any, contract: Any, batch: Any) -> np.ndarray:
    """Axes of the output: those of the batch, then what is left of x, then of y."""
    names = iter("abcdefghijklmnopqrstuvwxyz")
    left, right = ([""] * v.ndim for v in (x, y))
    for pair in (batch, contract):
        for i, j in zip(*pair, strict=True):
            left[i] = right[j] = next(names)
    free = []
    for axes in (left, right):
        for d, name in enumerate(axes):
            if not name:
                axes[d] = next(names)
                free.append(axes[d])
    out = [left[i] for i in batch[0]] + free
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", x, y)


def _table(a, own, inputs):
    places, table = inputs[0] - a["low"], own["table"]
    if a["axis"] is None:
        return table[places]
    sizes = [1] * places.ndim
    sizes[a["axis"]] = table.shape[1]
    return table[places, np.arange(table.shape[1]).reshape(sizes)]


def _embed(a, own, inputs):
    return own["kernel"][inputs[0]]


def _take(a, own, inputs):
    if a.get("crosses_examples"):
        return inputs[0].reshape(-1)[own["places"]]
    size = math.prod(inputs[0].shape[1:])
    return inputs[0].reshape(len(inputs[0]), size)[:, own["places"]]


def _constant(a, own, inputs):
    value = own["value"]
    if not inputs or len(value) != 1:
        return value
    return np.repeat(value, len(inputs[0]), axis=0)


_KINDS = {
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "ne": np.not_equal,
}


def _compare(a, own, inputs):
    """Products as float32 rounds them, which float64 holds exactly."""
    zipped = zip(
        inputs, a["zero_points"], a["multipliers"], a["exponents"], strict=True
    )
    products = (
        np.float32((x - z).astype(np.float64) * m).astype(np.float64) * 2.0**e
        for x, z, m, e in zipped
    )
    return _KINDS[a["kind"]](*products).astype(np.int64)


def _select(a, own, inputs):
    which, *cases = inputs
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


def _pad(a, own, inputs):
    x = inputs[0]
    steps = [inner + 1 for _, _, inner in a["padding"]]
    spread = _spread(x, steps, a["padding_code"])
    ends = [(low, high) for low, high, _ in a["padding"]]
    return _pad_or_crop(spread, ends, a["padding_code"])


def _broadcast(a, own, inputs):
    shape = [1] * len(a["sizes"])
    for d, n in zip(a["dimensions"], inputs[0].shape, strict=True):
        shape[d] = n
    sizes = [shape[d] if n is None else n for d, n in enumerate(a["sizes"])]
    return np.broadcast_to(inputs[0].reshape(shape), sizes)


def _reshape(a, own, inputs):
    first, *rest = a["sizes"] or [1]
    if first == -1 and not math.prod(rest):
        return inputs[0].reshape([len(inputs[0]), *rest])
    return inputs[0].reshape(a["sizes"])


def _slice(a, own, inputs):
    ends = zip(a["start"], a["stop"], a["steps"], strict=True)
    return inputs[0][tuple(slice(*end) for end in ends)]


_BODIES: dict[str, Callable[..., np.ndarray]] = {
    "dot": _dot,
    "conv": _conv,
    "multiply": _multiply,
    "sum": lambda a, own, xs: xs[0].sum(tuple(a["axes"])) + a["bias"],
    "sum_pool": _sum_pool,
    "requantize": _requantize,
    "add": _add,
    "clip": lambda a, own, xs: np.clip(xs[0], a["low"], a["high"]),
    "max": lambda a, own, xs: xs[0].max(tuple(a["axes"])),
    "max_pool": _max_pool,
    "min": lambda a, own, xs: xs[0].min(tuple(a["axes"])),
    "min_pool": _min_pool,
    "dot_codes": _dot_codes,
    "multiply_codes": lambda a, own, xs: (
        (xs[0] - a["zero_points"][0]) * (xs[1] - a["zero_points"][1])
    ),
    "table": _table,
    "embed": _embed,
    "take": _take,
    "constant": _constant,
    "compare": _compare,
    "select": _select,
    "maximum": lambda a, own, xs: np.maximum(*xs),
    "minimum": lambda a, own, xs: np.minimum(*xs),
    "concatenate": lambda a, own, xs: np.concatenate(xs, a["axis"]),
    "argmax": lambda a, own, xs: xs[0].argmax(a["axis"]),
    "argmin": lambda a, own, xs: xs[0].argmin(a["axis"]),
    "reshape": _reshape,
    "transpose": lambda a, own, xs: xs[0].transpose(a["permutation"]),
    "rev": lambda a, own, xs: np.flip(xs[0], a["axes"]),
    "slice": _slice,
    "pad": _pad,
    "broadcast": _broadcast,
    **tflite_ops.REFERENCE_BODIES,
}
