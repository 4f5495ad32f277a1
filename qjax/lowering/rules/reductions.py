"""Rules of sums, extremes and pools: over axes, over windows, and running ones."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.operations.arithmetic import TYPES
from qjax.graph.operations.moves import sees_inputs
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.operands import emitted, settled
from qjax.lowering.rules.levels import on_grid
from qjax.lowering.rules.moves import add_move
from qjax.lowering.rules.products import AccumulatorOverflowError, multiply_codes
from qjax.lowering.rules.whole import whole_numbers
from qjax.lowering.values import Abstract, Builder, Integers, PendingAccumulator
from qjax.model.trace import Equation, Trace


def _reduce_sum(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    axes = [int(a) for a in e.params["axes"]]
    sizes = trace.shape(e.inputs[0])
    taps = math.prod(sizes[a] for a in axes)
    summed = {"axes": axes, "sizes": [int(sizes[a]) for a in axes]}
    return _sum(builder, e, trace, x, taps, "sum", summed)


def _sum_pool(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    taps = math.prod(e.params["window_dimensions"])
    return _sum(builder, e, trace, x, taps, "sum_pool", _window(e))


def _sum(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    taps: int,
    operation: str,
    attributes: dict[str, Any],
) -> Abstract:
    x = _numbers(builder, e, trace, x)
    x = _reduced(e, settled(builder, e, trace, x))
    if x.dtype and x.dtype not in ("int32", "uint32"):
        raise refuse(e, x, "input")  # Sums of narrow types wrap.
    low = taps * min(x.low - x.zero_point, 0)
    high = taps * max(x.high - x.zero_point, 0)
    limit = builder.most(e.sites.output)
    if low < -limit - 1 or high > limit:
        remedy = "Use fewer bits for the input, or more `buffer_bits`."
        if x.dtype:
            remedy = "Bound what it adds first, as in `jnp.clip(x, 0, 1)`."
        raise AccumulatorOverflowError(
            f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
            f"{high if high > -low else low} when all {taps} input codes are at their "
            f"end, beyond {limit}.\n  equation: {e}\n{remedy}",
            np.full((taps,), x.high if high > -low else x.low),
        )

    def emit(bias: np.ndarray, shift: int) -> tuple[int, int, int]:
        assert not shift
        own = int(bias.reshape(-1)[0])
        options = {"bias": own, "input_zero_point": x.zero_point, **attributes}
        if operation != "running_sum":  # As many terms at each place.
            own -= taps * options.pop("input_zero_point")
            options |= {"bias": own, "padding_code": x.zero_point}
        path = where(e).strip("'")
        value = builder.add(operation, (x.value,), options, dtype="int32", path=path)
        return value, builder.values[value].low, builder.values[value].high

    return PendingAccumulator(
        scale=x.scale,
        low=low,
        high=high,
        gain=x.gain,
        is_gain_exact=x.is_gain_exact and x.rescaled is None,
        emit=emit,
        shift=None,
        place=e.place,
        dtype=x.dtype,
    )


def _numbers(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    """Returns whole numbers, and functions of them, as integers in the graph."""
    v = e.inputs[0]
    if trace.is_real(v):
        return on_grid(builder, e, trace, x, v)
    return whole_numbers(builder, e, trace, x, v, "input")


def _max_pool(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    x = _numbers(builder, e, trace, x)
    # A bound may wait: it never changes which value is largest.
    x = emitted(builder, e, x)
    if np.any(x.real_scale() < 0):
        raise refuse(e, x, "input")
    x = _reduced(e, x)
    kind = e.primitive.name[-3:]
    if not e.primitive.name.startswith("reduce_window"):
        attributes: dict[str, Any] = {"axes": [int(a) for a in e.params["axes"]]}
        return add_move(builder, e, trace, x, x.scale, kind, attributes)
    window = _window(e)
    if not sees_inputs(trace.shape(e.inputs[0]), window):
        raise NotImplementedError(
            f"`{e.primitive.name}` in {where(e)} has a window that holds no input, "
            f"only padding or holes: an infinity, which has no code.\n  equation: {e}\n"
            "Pad less, or use a larger window."
        )
    return add_move(builder, e, trace, x, x.scale, f"{kind}_pool", window)


def _truth(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Returns whether any or all of truth values over axes are true."""
    if trace.avals[e.inputs[0]].dtype != np.bool_:
        raise refuse(e, x, "input")
    own = whole_numbers(builder, e, trace, x, e.inputs[0], "input")
    kind = "max" if e.primitive.name == "reduce_or" else "min"
    axes, path = [int(a) for a in e.params["axes"]], where(e).strip("'")
    value = builder.add(kind, (own.value,), {"axes": axes}, dtype="int8", path=path)
    return builder.numbers(value, e.place, "bool")


def _product(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Multiplies few numbers over axes, one after the other."""
    axes, shape = [int(a) for a in e.params["axes"]], trace.shape(e.inputs[0])
    taps = math.prod(shape[d] for d in axes)
    if not 0 < taps <= _MOST_FACTORS:
        raise NotImplementedError(
            f"`reduce_prod` in {where(e)} multiplies {taps} numbers, and integer "
            f"programs multiply 1 to {_MOST_FACTORS}.\n  equation: {e}\nMultiply at "
            "most that many, quantize the product, and multiply the products."
        )
    own = emitted(builder, e, _numbers(builder, e, trace, x))
    path, real = where(e).strip("'"), trace.is_real(e.inputs[0])
    if real and (not own.is_codes or np.ndim(own.scale) or own.is_bounded):
        raise refuse(e, own, "input")
    if not real and own.dtype not in TYPES:
        raise refuse(e, own, "input")
    ends = own.low - own.zero_point, own.high - own.zero_point
    most = max(map(abs, ends)) ** taps
    if real and most > (limit := builder.most(e.sites.output)):
        raise AccumulatorOverflowError(
            f"The product of `reduce_prod` in {where(e)} could reach {most}, of {taps} "
            f"codes in {ends} about their zero point, beyond {limit}.\n  equation: {e}"
            "\nMultiply in two halves, whose products are quantized: "
            "`jnp.prod(x[..., :k], -1) * jnp.prod(x[..., k:], -1)`.",
            np.full((taps,), max(ends, key=abs) + own.zero_point),
        )
    sizes = [int(n) for n in trace.shape(e.outputs[0])]
    kept = [d for d in range(len(shape)) if d not in axes]
    if sizes and kept[0] == 0:
        sizes[0] = -1

    def part(tap: Sequence[int]) -> Integers:
        start: list[int] = [0] * len(shape)
        stop: list[int | None] = [None] * len(shape)
        for d, k in zip(axes, tap, strict=True):
            start[d], stop[d] = k, k + 1
        ends = {"start": start, "stop": stop, "steps": [1] * len(shape)}
        v = builder.values[own.value]
        options: Any = {"grid": v.grid, "dtype": v.dtype, "path": path}
        cut = builder.add("slice", (own.value,), ends, **options)
        return own.elsewhere(
            builder.add("reshape", (cut,), {"sizes": sizes}, **options)
        )

    parts = [part(tap) for tap in np.ndindex(*(shape[d] for d in axes))]
    found = parts[0]
    for other in parts[1:]:
        if real:
            found = multiply_codes(builder, e, trace, found, other)
            found = dataclasses.replace(found, is_codes=True)
        else:
            attributes = {"kind": "mul", "dtype": own.dtype}
            inputs = found.value, other.value
            value = builder.add("arithmetic", inputs, attributes, path=path)
            found = builder.numbers(value, e.place, own.dtype)
    is_exact = found.is_gain_exact and own.rescaled is None
    is_codes = found.is_codes and taps == 1
    return dataclasses.replace(found, is_codes=is_codes, is_gain_exact=is_exact)


_MOST_FACTORS = 16  # Of a product over axes.


def _reduced(e: Equation, x: Integers) -> Integers:
    """Takes scales through a reduction; refuses scales that vary inside it."""
    window = e.params.get("window_dimensions")

    def reduced(scale: np.ndarray) -> np.ndarray:
        if not scale.ndim:
            return scale
        axes = e.params["axes"] if window is None else np.flatnonzero(window != 1)
        if any(scale.shape[d] != 1 for d in axes):
            raise refuse(e, x, "input")
        return scale if window is not None else scale.squeeze(tuple(axes))

    window = None if window is None else np.asarray(window)
    gain = None if x.gain is None else reduced(x.gain)
    return dataclasses.replace(x, scale=reduced(x.scale), gain=gain)


def _window(e: Equation) -> dict[str, Any]:
    names = {
        "window": "window_dimensions",
        "strides": "window_strides",
        "base_dilation": "base_dilation",
        "dilation": "window_dilation",
    }
    found = {k: [int(n) for n in e.params[name]] for k, name in names.items()}
    return {**found, "padding": [[int(n) for n in p] for p in e.params["padding"]]}


def _running_sum(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    attributes = {"axis": e.params["axis"], "reverse": e.params["reverse"]}
    e, size = _running(e, trace)
    return _sum(builder, e, trace, x, size, "running_sum", attributes) if size else x


def _running_extreme(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> Abstract:
    name, (e, size) = e.primitive.name, _running(e, trace)
    x = emitted(builder, e, x)
    if not size:
        return x
    if np.any(x.real_scale() < 0):
        raise refuse(e, x, "input")
    x = _reduced(e, x)
    return add_move(builder, e, trace, x, x.scale, f"{name[-3:]}_pool", _window(e))


def _running(e: Equation, trace: Trace) -> tuple[Equation, int]:
    """Returns a cumulative reduction as a window over all places before each place."""
    shape, axis = trace.shape(e.inputs[0]), e.params["axis"]
    size, ones = shape[axis], (1,) * len(shape)
    window, padding = list(ones), [(0, 0)] * len(shape)
    window[axis] = size
    padding[axis] = (0, size - 1) if e.params["reverse"] else (size - 1, 0)
    params = {
        "window_dimensions": tuple(window),
        "window_strides": ones,
        "base_dilation": ones,
        "window_dilation": ones,
        "padding": tuple(padding),
    }
    return dataclasses.replace(e, params=params), size


# Primitive -> its rule.
REDUCTIONS: Mapping[str, LoweringRule] = {
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _sum_pool,
    "reduce_window_max": _max_pool,
    "reduce_max": _max_pool,
    "reduce_window_min": _max_pool,
    "reduce_min": _max_pool,
    "reduce_prod": _product,
    "reduce_or": _truth,
    "reduce_and": _truth,
    "cumsum": _running_sum,
    "cummax": _running_extreme,
    "cummin": _running_extreme,
}
