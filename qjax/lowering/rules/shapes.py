"""Rules of shape moves, pools and reductions."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import copy_p

from qjax.affine import QParams, dequantize
from qjax.graph.builder import compact
from qjax.lowering.constants import codes_on, wider
from qjax.lowering.inputs import cast, moved, refuse_pad
from qjax.lowering.interpret import Rule, refuse, sites_of, where
from qjax.lowering.rules.functions import curve
from qjax.lowering.rules.products import AccumulatorOverflowError
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    Real,
    Sum,
)
from qjax.model.channels import move_scale
from qjax.model.trace import Equation, Trace, evaluate


def settled(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Returns integers in the graph, with any waiting bound applied."""
    x = _emitted(builder, e, x)
    if not x.is_bounded:
        return x
    assert x.value is not None
    scale = x.real_scale()
    ends = []
    for bound, end in zip(x.bounds, (x.low, x.high), strict=True):
        codes = bound / scale + x.zero_point if np.isfinite(bound) else np.array(end)
        code = int(codes.flat[0])
        if np.any(scale < 0) or np.any(codes != code):
            raise refuse(e, x, "input")  # The bound is no integer of this grid.
        ends.append(code)
    low, high = max(ends[0], x.low), min(ends[1], x.high)
    before = builder.values[x.value]
    options: Any = {"grid": before.grid, "dtype": before.dtype}
    options["path"] = where(e).strip("'")
    value = builder.add("clip", (x.value,), {"low": low, "high": high}, **options)
    return x.elsewhere(value, low=low, high=high, bounds=(-np.inf, np.inf))


def _emitted(builder: Builder, e: Equation, x: Abstract) -> Integers:
    """Returns an operand as integers in the graph."""
    if isinstance(x, Sum):
        x = added(builder, e, x)
    if not isinstance(x, Integers):
        raise refuse(e, x, "input")
    return x.emitted()


def added(builder: Builder, e: Equation, x: Sum) -> Integers:
    """Adds a sum of codes as an accumulator, where one grid holds all codes exactly."""
    terms = [t for t, _ in x.terms]
    scale = min(float(t.scale) for t in terms)
    factors = [sign * float(t.scale) / scale for t, sign in x.terms]
    ends = [
        sorted(f * (end - t.zero_point) for end in (t.low, t.high))
        for t, f in zip(terms, factors, strict=True)
    ]
    low, high = (sum(pair[k] for pair in ends) for k in (0, 1))
    limit = builder.most(sites_of(x.path)[0])
    if any(f != int(f) for f in factors) or not -limit - 1 <= low <= high <= limit:
        raise refuse(e, x, "input")
    inputs = tuple(t.value for t in terms if t.value is not None)
    value = builder.add(
        "add",
        inputs,
        {
            "input_zero_points": [t.zero_point for t in terms],
            "multipliers": [int(f) for f in factors],
            "shift": 0,
            "zero_point": 0,
            "low": int(low),
            "high": int(high),
        },
        dtype="int32",
        path=where(e).strip("'"),
    )
    found = Integers(value, np.asarray(scale), 0, int(low), int(high), path=x.path)
    exact = all(t.rescaled is None for t in terms)
    return dataclasses.replace(found, bounds=x.bounds, is_gain_exact=exact)


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
    x = _reduced(e, settled(builder, e, trace, x))
    if x.dtype and x.dtype != "int32":
        raise refuse(e, x, "input")  # Sums of narrow types wrap.
    source = x.value
    assert source is not None
    low = taps * min(x.low - x.zero_point, 0)
    high = taps * max(x.high - x.zero_point, 0)
    limit = builder.most(sites_of(e.path)[0])
    if low < -limit - 1 or high > limit:
        raise AccumulatorOverflowError(
            f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
            f"{high if high > -low else low} when all {taps} input codes are at their "
            f"end, beyond {limit}.\n  equation: {e}\nUse fewer bits for the input, or "
            "more `buffer_bits`.",
            np.full((taps,), x.high if high > -low else x.low),
        )

    def emit(bias: np.ndarray, shift: int) -> tuple[int, int, int]:
        assert not shift
        own = int(bias.reshape(-1)[0])
        bias_of_codes = own - taps * x.zero_point
        options = {"bias": bias_of_codes, "padding_code": x.zero_point, **attributes}
        path = where(e).strip("'")
        value = builder.add(operation, (source,), options, dtype="int32", path=path)
        return value, builder.values[value].low, builder.values[value].high

    found = Integers(None, x.scale, 0, low, high, gain=x.gain, emit=emit, path=e.path)
    exact = x.is_gain_exact and x.rescaled is None
    return dataclasses.replace(found, dtype=x.dtype, is_gain_exact=exact)


def _max_pool(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    # A bound may wait: it never changes which value is largest.
    x = _emitted(builder, e, x)
    if np.any(x.real_scale() < 0):
        raise refuse(e, x, "input")
    x = _reduced(e, x)
    kind = e.primitive.name[-3:]
    if not e.primitive.name.startswith("reduce_window"):
        attributes: dict[str, Any] = {"axes": [int(a) for a in e.params["axes"]]}
        return _moved(builder, e, trace, x, x.scale, kind, attributes)
    return _moved(builder, e, trace, x, x.scale, f"{kind}_pool", _window(e))


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
    e, size = _running(e, trace)
    return _sum(builder, e, trace, x, size, "sum_pool", _window(e)) if size else x


def _running_extreme(
    builder: Builder, e: Equation, trace: Trace, x: Abstract
) -> Abstract:
    name, (e, size) = e.primitive.name, _running(e, trace)
    x = _emitted(builder, e, x)
    if not size:
        return x
    if np.any(x.real_scale() < 0):
        raise refuse(e, x, "input")
    x = _reduced(e, x)
    return _moved(builder, e, trace, x, x.scale, f"{name[-3:]}_pool", _window(e))


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


def _same(
    builder: Builder, e: Equation, trace: Trace, *xs: Abstract
) -> tuple[Abstract, ...]:
    return tuple(
        moved(e, x) if isinstance(x, Real) and x.input is not None else x for x in xs
    )


def _convert(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    """Casts a value; a cast that keeps every possible value does nothing."""
    before, dtype = (trace.avals[v].dtype for v in (e.inputs[0], e.outputs[0]))
    if isinstance(x, Curve):
        end = e.outputs[0]
        return dataclasses.replace(x, steps={**x.steps, end: e}, end=end)
    if isinstance(x, Real):
        return x if x.input is None else cast(trace, e, x)
    is_cast = e.primitive.name == "convert_element_type"
    if is_cast and trace.is_real(e.inputs[0]) and dtype in (before, *_WIDE):
        return x
    if isinstance(x, KnownCodes) and _keeps_weight(e, x):
        return x
    if isinstance(x, Integers) and x.dtype and is_cast and _keeps_range(x, dtype):
        is_real = trace.is_real(e.outputs[0])
        return dataclasses.replace(
            x, dtype="" if is_real else str(dtype), is_codes=is_real, bounded=None
        )
    if isinstance(x, Integers) and (x.is_codes or x.dtype):
        found = curve(builder, e, trace, x)
        assert found is not None
        return found
    if isinstance(x, Integers | Sum | Joined) and not is_cast:
        bits = e.params["exponent_bits"], e.params["mantissa_bits"]
        if bits[0] >= 8 and bits[1] >= 23:
            return x
    raise NotImplementedError(
        f"There is no integer rule for `{e.primitive.name}` to {dtype} of a value that "
        f"is no codes, met in {where(e)}.\n  equation: {e}\nQuantize it first, or "
        "compute this part of the model in float32."
    )


_WIDE = (np.dtype("float32"), np.dtype("float64"))


def _keeps_range(x: Integers, dtype: Any) -> bool:
    """Returns whether a type holds all integers in the range of a value."""
    if jnp.issubdtype(dtype, jnp.floating):
        digits = jnp.finfo(dtype).nmant + 1
        return max(abs(x.low), abs(x.high)) <= 2**digits
    if dtype == np.bool_:
        return x.low >= 0 and x.high <= 1
    info = jnp.iinfo(dtype)
    return bool(info.min <= x.low and x.high <= info.max)


def _keeps_weight(e: Equation, x: KnownCodes) -> bool:
    """Returns whether a cast keeps every value of a weight."""
    grid = QParams(jnp.asarray(x.scale), jnp.asarray(x.zero_point))
    real = dequantize(jnp.asarray(x.codes.astype(np.int32)), grid)
    other = np.asarray(evaluate(e, real)[0]).astype(np.float64)
    return bool(np.array_equal(other, np.asarray(real, np.float64)))


def move(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *rest: Abstract
) -> Abstract:
    """Moves codes, and what is known of them, as the equation moves real values."""
    if e.primitive.name == "pad":
        fill = _fill(e, rest[0])
        if fill or isinstance(x, Curve | Joined) or _bounds_away(x):
            return _padded(builder, e, trace, x, fill)
    if isinstance(x, Real):
        return moved(e, x)
    if isinstance(x, Known):
        raise refuse(e, x, "operand")
    if isinstance(x, KnownCodes):
        return _move_known(e, trace, x)
    if isinstance(x, Curve):
        return _move_curve(builder, e, trace, x)
    x = _emitted(builder, e, x)
    assert x.value is not None
    shape = builder.values[x.value].shape
    scale = _move_units(e, x.scale, shape)
    gain = None if x.gain is None else _move_units(e, x.gain, shape)
    if scale is None or (gain is None and x.gain is not None):
        raise refuse(e, x, "input")
    x = dataclasses.replace(x, gain=gain)
    assert scale is not None
    return _moved(builder, e, trace, x, scale, *_MOVES[e.primitive.name](e, trace, x))


def _fill(e: Equation, x: Abstract) -> float:
    """Returns the number that a pad puts around a value."""
    if not isinstance(x, Known) or np.any(np.isnan(x.value)):
        raise refuse(e, x, "padding value")
    return float(np.asarray(x.value).reshape(-1)[0])


def _bounds_away(x: Abstract) -> bool:
    """Returns whether a waiting activation changes zero."""
    return isinstance(x, Integers) and not x.bounds[0] <= 0 <= x.bounds[1]


def _padded(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, fill: float
) -> Abstract:
    """Pads codes with a code; a value on no grid yet waits for one."""
    if isinstance(x, Real) and x.input is not None:
        raise refuse_pad(e, x)
    if not isinstance(x, Integers | Curve | Sum | Joined):
        raise refuse(e, x, "input")
    config = _padding(e)
    shapes = trace.shape(e.inputs[0]), trace.shape(e.outputs[0])
    x = x.emitted() if isinstance(x, Integers) else x
    is_ready = isinstance(x, Integers) and x.is_codes and not np.ndim(x.scale)
    if (
        isinstance(x, Integers)
        and is_ready
        and x.rescaled is None
        and x.value is not None
    ):
        codes = codes_on(np.asarray(fill, np.float32), float(x.scale), x.zero_point)
        if codes is not None and not x.is_bounded and np.isfinite(fill):
            code, own = int(codes), builder.values[x.value]
            low, high = min(own.low, code), max(own.high, code)
            dtype = wider({own.dtype}, low, high)
            ends = {"padding": config, "padding_code": code}
            options: Any = {"grid": own.grid, "dtype": dtype}
            options["path"] = where(e).strip("'")
            value = builder.add("pad", (x.value,), ends, **options)
            return x.elsewhere(value, low=low, high=high)
    attributes = {"padding": config}
    pair = (x,), (shapes[0],), shapes[1]
    return Joined("pad", *pair, attributes=attributes, path=e.path, fill=fill)


def move_again(
    builder: Builder, x: Real, trace: Trace, codes: Abstract, keep: int = 0
) -> Abstract:
    """Repeats on codes the moves of an input, except for the last ``keep`` moves."""
    for e in x.moves[: len(x.moves) - keep]:
        fill = (Known(np.zeros(())),) if e.primitive.name == "pad" else ()
        codes = move(builder, e, trace, codes, *fill)
    return codes


def _move_curve(builder: Builder, e: Equation, trace: Trace, x: Curve) -> Curve:
    """Moves a function of codes, which is the same function of moved codes."""
    rank = len(trace.shape(e.outputs[0]))
    is_uniform = all(np.size(k) == 1 for k in x.known.values())
    keeps = e.params.get("broadcast_dimensions") == tuple(range(rank))  # The axes.
    units = all(np.ndim(a.scale) == 0 for a in x.aliases.values())
    if e.primitive.name == "pad" or not (is_uniform or keeps) or not units:
        raise refuse(e, x, "input")
    source = move(builder, e, trace, x.source)
    assert isinstance(source, Integers)
    return _moved_chain(x, source, e, rank, e.outputs[0])


def _move_array(
    e: Equation, x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Moves an array that broadcasts against a value of ``shape`` by a shape move."""
    moved = move_scale(e, x, shape)
    # Axes that fell together repeat what was the same along one of them.
    return moved if moved is None or moved.size <= x.size else compact(moved)


def _move_units(
    e: Equation, x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Moves units per channel by a shape move; axes that the move leaves stay."""
    if x.ndim == 0 or e.primitive.name != "pad":
        return _move_array(e, x, shape)
    config = zip(x.shape, e.params["padding_config"], strict=True)
    return x if all(n == 1 or not any(triple) for n, triple in config) else None


def _moved(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Integers,
    scale: np.ndarray,
    operation: str,
    attributes: dict[str, Any],
) -> Integers:
    """Adds a move of codes to the graph."""

    def place(source: int) -> int:
        v = builder.values[source]
        options: Any = {"grid": v.grid, "dtype": v.dtype, "path": where(e).strip("'")}
        return builder.add(operation, (source,), attributes, **options)

    rank = len(trace.shape(e.outputs[0]))
    return placed(x, place, e, rank, scale=scale)


def placed(
    x: Integers,
    place: Callable[[int], int],
    e: Equation,
    rank: int,
    end: int | None = None,
    **changes: Any,
) -> Integers:
    """Moves codes, together with the function that they are of other codes.

    Args:
      x: The codes.
      place: Puts the move of a value into the graph; monotone, if it is no move.
      e: The equation.
      rank: Rank of the output.
      end: The output; the first one by default.
      **changes: Other fields of the result.

    Returns:
      The moved codes.
    """
    assert x.value is not None
    value = place(x.value)
    found = x.elsewhere(value, **changes)
    if x.rescaled is None:
        return found
    chain, end = x.rescaled, e.outputs[0] if end is None else end
    start = chain.source.value
    assert start is not None
    source = chain.source.elsewhere(value if start == x.value else place(start))
    return dataclasses.replace(
        found, rescaled=_moved_chain(chain, source, e, rank, end)
    )


def _moved_chain(x: Curve, source: Integers, e: Equation, rank: int, end: int) -> Curve:
    """Moves a function of codes, which is the same function of moved codes."""
    known = {
        v: np.reshape(k, (1,) * rank) if np.size(k) == 1 else k
        for v, k in x.known.items()
    }
    aliases = {
        v: dataclasses.replace(a, value=source.value) for v, a in x.aliases.items()
    }
    same = dataclasses.replace(
        e, primitive=copy_p, params={}, inputs=(x.end,), outputs=(end,)
    )
    return Curve(source, aliases, known, {**x.steps, end: same}, end, path=e.path)


def _reshape(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    sizes = [int(n) for n in trace.shape(e.outputs[0])]
    # The leading size may differ at call time: `lower` finds out.
    own = trace.shape(e.inputs[0])
    if not math.prod(sizes[1:]) and own[:1] != tuple(sizes[:1]):
        return "reshape", {"sizes": sizes}  # Nothing tells the leading size.
    return "reshape", {"sizes": [-1, *sizes[1:]] if sizes else []}


def _broadcast(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    dimensions = [int(d) for d in e.params["broadcast_dimensions"]]
    sizes: list[int | None] = [int(n) for n in e.params["shape"]]
    for d, n in zip(dimensions, trace.shape(e.inputs[0]), strict=True):
        sizes[d] = None if sizes[d] == n else sizes[d]  # Open size, like the batch.
    return "broadcast", {"sizes": sizes, "dimensions": dimensions}


def _slice(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    start, stop = e.params["start_indices"], e.params["limit_indices"]
    sizes = trace.shape(e.inputs[0])
    steps = e.params["strides"] or (1,) * len(start)
    # None: the end of the axis, whose size may differ at call time.
    ends = [None if b == n else int(b) for b, n in zip(stop, sizes, strict=True)]
    return "slice", {
        "start": [int(n) for n in start],
        "stop": ends,
        "steps": [int(n) for n in steps],
    }


def _pad(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "pad", {"padding": _padding(e), "padding_code": x.zero_point}


def _padding(e: Equation) -> list[list[int]]:
    return [[int(n) for n in triple] for triple in e.params["padding_config"]]


def _transpose(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "transpose", {"permutation": [int(d) for d in e.params["permutation"]]}


def _rev(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "rev", {"axes": [int(d) for d in e.params["dimensions"]]}


_MOVES = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
}


def _move_known(e: Equation, trace: Trace, x: KnownCodes) -> KnownCodes:
    """Moves a weight with its scales by a shape move."""
    scale, zero_point = (
        _move_array(e, part, x.codes.shape) for part in (x.scale, x.zero_point)
    )
    if scale is None or zero_point is None:
        raise NotImplementedError(
            f"There is no rule for `{e.primitive.name}` on the weight {x.site!r}, in "
            f"{where(e)}.\n  equation: {e}\nQuantize what it returns: call "
            "`qjax.fake_quant` after it."
        )
    if e.primitive.name == "broadcast_in_dim":  # A bias, to the shape of its sum.
        shape, dims = trace.shape(e.outputs[0]), e.params["broadcast_dimensions"]
        sizes = [1] * len(shape)
        for d, n in zip(dims, x.codes.shape, strict=True):
            sizes[d] = n
        codes = np.broadcast_to(x.codes.reshape(sizes), shape)
    else:
        moved = evaluate(e, jnp.asarray(x.codes.astype(np.int32)))[0]
        codes = np.asarray(moved).astype(np.int64)
    return KnownCodes(codes, scale, zero_point, x.site)


# Primitive -> its rule.
SHAPES: Mapping[str, Rule] = {
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _sum_pool,
    "reduce_window_max": _max_pool,
    "reduce_max": _max_pool,
    "reduce_window_min": _max_pool,
    "reduce_min": _max_pool,
    "cumsum": _running_sum,
    "cummax": _running_extreme,
    "cummin": _running_extreme,
    "stop_gradient": _same,
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _same,
    "convert_element_type": _convert,
    "reduce_precision": _convert,
    "reshape": move,
    "transpose": move,
    "squeeze": move,
    "expand_dims": move,
    "broadcast_in_dim": move,
    "rev": move,
    "slice": move,
    "pad": move,
}
