"""Steps of random integer graphs: softmaxes, norms, what TFLite has, loops."""

import math
from typing import Any

import numpy as np

from qjax.graph.graph import Graph
from tests.integer_programs import RULES, STEPS, Drawn


def _mask(d: Drawn, v: int) -> int:
    """Ones and zeros in the shape of a value, some rows all zeros."""
    zeros = d.pick(-3, 3)
    attributes = {"kind": "gt", "zero_points": [d.zero(v), d.zero(v)]}
    attributes |= {"multipliers": [1, 1], "exponents": [zeros, 0]}
    return d.b.add("compare", [v, d.like_codes(v)], attributes)


def _softmax(d: Drawn, v: int) -> int:
    v = d.narrow(v)
    name = d.one("softmax", "log_softmax", "logsumexp")
    own, axes, (low, high, zero) = d.value(v), d.axes(v), d.ends()
    places = math.prod(own.shape[k] for k in axes)
    inputs = [v, _mask(d, v)] if d.chance(0.4) else [v]
    distance = own.high - own.low + 1
    slope = np.exp(-np.arange(distance) / d.one(1.5, 20, 400))
    attributes: dict[str, Any] = {
        "axes": axes,
        "empty": d.one("zero", "all", "uniform"),
    }
    attributes |= {"zero_point": zero, "low": low, "high": high}
    if name == "softmax":
        table = np.round(slope * (1 << 30))
        most = max((1 << 15), places)
        attributes |= {"algorithm": "exp_table", "most_places": most}
        attributes |= {"multiplier": high - low, "shift": 30}
        if d.chance(0.2):
            attributes["plus"] = 1 << d.pick(0, 30)
    else:
        count = max(places - 1, 1).bit_length() + d.pick(0, 3)
        table = np.floor(slope * (1 << 45 - max(count, 15)))
        attributes |= {"most_places": 1 << max(count, 15)}
        attributes |= {"algorithm": "exp_table_and_log_series"}
        attributes |= {"input_zero_points": [d.zero(v)]}
        attributes |= {"input_multiplier": d.pick(1 << 26, 1 << 30), "input_shift": 28}
        attributes |= {"multiplier": d.pick(1, 1 << 30), "shift": d.pick(26, 60)}
    if name == "logsumexp":
        attributes["keepdims"] = d.chance()
    params = {"table": d.param("table", table)}
    return d.b.add(name, inputs, attributes, params=params, grid=d.grid(zero))


def _norm(d: Drawn, v: int) -> int:
    v = d.codes(v)
    own, axes, (low, high, zero) = d.value(v), d.axes(v), d.ends()
    groups = [d.one(*(g for g in (1, 2, 3) if own.shape[k] % g == 0)) for k in axes]
    pairs = zip(axes, groups, strict=True)
    if not math.prod(own.shape):
        raise ValueError("nothing to normalise")
    sizes = [[1, *(n if d.chance() else 1 for n in own.shape[1:])] for _ in "ab"]
    params = {
        "multiplier": d.param("multiplier", d.ints(sizes[0], -(1 << 28), 1 << 28)),
        "bias": d.param("bias", d.ints(sizes[1], -(1 << 20), 1 << 20)),
    }
    attributes = {
        "algorithm": "newton_root",
        "axes": axes,
        "groups": groups,
        "count": math.prod(own.shape[k] // g for k, g in pairs),
        "is_centred": d.chance(),
        "epsilon": d.one(0, 1, 5, 1 << 20),
        "floor": d.one(0, 1, 1 << 12),
        "point": d.one(0, 4, -2, 10),
        "input_zero_points": [d.zero(v)],
        "shift": d.pick(44, 56),
        "bias_shift": d.pick(0, 24),
        "zero_point": zero,
        "low": low,
        "high": high,
    }
    return d.b.add("norm", [v], attributes, params=params, grid=d.grid(zero))


def _masked_norm(d: Drawn, v: int) -> int:
    v = d.codes(v)
    own, axes, (low, high, zero) = d.value(v), d.axes(v), d.ends()
    groups = [d.one(*(g for g in (1, 2, 3) if own.shape[k] % g == 0)) for k in axes]
    if not math.prod(own.shape):
        raise ValueError("nothing to normalise")
    most = math.prod(own.shape[k] // g for k, g in zip(axes, groups, strict=True))
    mask = _mask(d, v)
    if d.chance():  # One that broadcasts.
        some = [k for k in range(1, len(own.shape)) if d.chance()]
        if some:
            mask = d.b.add("max", [mask], {"axes": some})
            sizes = [1 if k in some else n for k, n in enumerate(own.shape)]
            sizes[0] = -1
            mask = d.b.add("reshape", [mask], {"sizes": sizes})
    sizes = [[1, *(n if d.chance() else 1 for n in own.shape[1:])] for _ in "ab"]
    params = {
        "multiplier": d.param("multiplier", d.ints(sizes[0], -(1 << 28), 1 << 28)),
        "bias": d.param("bias", d.ints(sizes[1], -(1 << 20), 1 << 20)),
    }
    bits = 60 - 2 * most.bit_length()
    attributes = {
        "algorithm": "newton_root",
        "axes": axes,
        "groups": groups,
        "most_places": most + d.one(0, 0, 1) if bits > 8 else most,
        "least": d.pick(0, 1),
        "is_centred": d.chance(),
        "epsilon": d.one(0, 1, 5, 1 << min(20, bits)),
        "floor": d.one(0, 1, 1 << min(12, bits)),
        "point": d.one(0, 4, -3, 21, -40, 900, -900),
        "input_zero_points": [d.zero(v), d.zero(mask)],
        "shift": d.pick(28, 56),
        "bias_shift": d.pick(0, 24),
        "zero_point": zero,
        "low": low,
        "high": high,
    }
    inputs = [v, mask]
    return d.b.add("masked_norm", inputs, attributes, params=params, grid=d.grid(zero))


# TFLite.


def _tflite_add(d: Drawn, v: int) -> int:
    v = d.narrow(v)
    other = d.like_codes(v)
    low, high, zero = d.ends()
    attributes = {"left_shift": d.one(8, 15, 20), "rule": d.one(*RULES[1:3])}
    attributes |= {"zero_points": [d.zero(v), d.zero(other)]}
    attributes |= {"multipliers": [d.pick(1 << 30, (1 << 31) - 1) for _ in "ab"]}
    attributes |= {"shifts": [d.pick(31, 33) for _ in "ab"], "shift": d.pick(36, 52)}
    attributes |= {"multiplier": d.pick(1 << 30, (1 << 31) - 1)}
    attributes |= {"zero_point": zero, "low": low, "high": high}
    return d.b.add("tflite_add", [v, other], attributes, grid=d.grid(zero))


def _tflite_average(d: Drawn, v: int) -> int:
    sizes = [1, *(n if d.chance() else 1 for n in d.shape(v)[1:])]
    low, high, _ = d.ends()
    params = {"counts": d.param("counts", d.ints(sizes, 1, d.one(4, 99)))}
    return d.b.add("tflite_average", [v], {"low": low, "high": high}, params=params)


def _resize(d: Drawn, v: int) -> int:
    shape, params = d.shape(v), {}
    for role, size in zip(("rows", "columns"), shape[1:3], strict=True):
        count = d.pick(1, 6)
        before = d.ints(count, 0, size - 1)
        after = np.minimum(before + 1, size - 1)
        rest = d.ints(count, 0, 1 << 10)
        params[role] = d.param(role, np.stack([before, after, rest]))
    return d.b.add("tflite_resize", [v], params=params, grid=d.value(v).grid)


def _tflite_rows(d: Drawn, v: int) -> int:
    v = d.narrow(v)
    own = d.value(v)
    count = own.high - own.low + 1
    slope = np.exp(-np.arange(count) / count * d.one(1, 8, 20))
    exponentials = np.minimum(slope * 2.0**31, 2**31 - 1)
    name = d.one("softmax", "log_softmax", "l2_norm", "softmax16")
    ends = {"low": -128, "high": 127}
    if name == "l2_norm":
        attributes = {"input_zero_points": [d.zero(v)], **ends}
        return d.b.add("tflite_l2_norm", [v], attributes)
    params = {"exponentials": d.param("exponentials", exponentials)}
    if name == "softmax":
        return d.b.add("tflite_softmax", [v], ends, params=params)
    if name == "log_softmax":
        steps = -np.arange(count) * (2.0**26 / count)
        params["steps"] = d.param("steps", steps)
        options = {"params": params, "grid": d.grid(127)}
        attributes = {"zero_point": 127, **ends}
        return d.b.add("tflite_log_softmax", [v], attributes, **options)
    params = {"exponentials": d.param("exponentials", np.round(32767 * slope))}
    table = np.round(32767 / (1 + np.arange(1 << 16) / (1 << 16)))
    params["reciprocals"] = d.param("reciprocals", table)
    return d.b.add("tflite_softmax16", [v], {"high": 32767}, params=params)


# Loops.


def _loop(d: Drawn, v: int) -> int:
    """Goes along an axis with one carry, steps drawn as those of a graph."""
    v = d.codes(v)
    own, axis = d.value(v), d.axis(v)
    rank = len(own.shape)
    order = [axis, *(k for k in range(rank) if k != axis)]
    xs = d.b.add("transpose", [v], {"permutation": order}, grid=own.grid)
    carry = d.b.add("max", [v], {"axes": [axis]}, grid=own.grid)
    inner = Drawn(d.rng, d.b.params)
    shape = tuple(n for k, n in enumerate(own.shape) if k != axis)
    given = [
        inner.b.add_value(shape, own.low, own.high, own.grid, dtype=own.dtype)
        for _ in range(3)
    ]
    steps = given[1:]
    attributes: dict[str, Any] = {"multipliers": [3, 5], "shift": 3}
    attributes |= {"input_zero_points": [own.zero_point] * 2}
    attributes |= {"zero_point": own.zero_point, "low": own.low, "high": own.high}
    new = inner.b.add("add", steps, attributes, grid=own.grid)
    left = new
    if len(shape) > 1:
        for _ in range(d.pick(0, 2)):
            left = inner.step(left)
        d.steps += inner.steps
    outputs = (new, left) if d.chance(0.8) else (new,)
    body: Graph = inner.b.graph(tuple(given), outputs)
    length = None if d.chance() else own.shape[axis]
    attributes = {"consts": 1, "carries": 1, "length": length}
    attributes |= {"is_reversed": d.chance()}
    const = d.b.add("min", [v], {"axes": [axis]}, grid=own.grid)
    found = d.b.add_loop([const, carry, xs], body, attributes)
    if len(found) == 1:
        return found[0]
    order = [1, 0, *range(2, len(d.shape(found[1])))]
    attributes = {"permutation": order}
    return d.b.add("transpose", [found[1]], attributes, grid=d.value(found[1]).grid)


ROWS = {
    "softmax": _softmax,
    "norm": _norm,
    "masked_norm": _masked_norm,
    "tflite_add": _tflite_add,
    "tflite_average": _tflite_average,
    "tflite_resize": _resize,
    "tflite_rows": _tflite_rows,
    "loop": _loop,
}
STEPS |= ROWS
