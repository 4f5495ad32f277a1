"""Quantization points in TFLite's arithmetic: what its reference kernels compute."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Node
from qjax.graph.operations.record import window_taps
from qjax.graph.tflite_lstm import find_lstm
from qjax.graph.tflite_tables import (
    Codes,
    exponential_table,
    function_table,
    log_step_table,
    sigmoid,
    wide_function_table,
    wide_sigmoid_table,
    wide_softmax_tables,
    wide_tanh_table,
)
from qjax.integer_calls import NormCall, SoftmaxCall
from qjax.integer_tflite import (
    Kind,
    left_shift,
    mean_multiplier,
    product_ratio,
    signed_multiplier,
    sum_multipliers,
    weight_scale,
)
from qjax.lowering.site_grids import SiteGrid
from qjax.lowering.tflite_forms import (
    Lack,
    lack_of_ends,
    lack_of_epsilon,
    lack_of_grid,
    lack_of_norm,
    lack_of_operator,
    lack_of_scale,
    lack_of_softmax,
    lack_of_types,
    lack_of_zero_point,
    name_of,
    refuse,
)
from qjax.lowering.values import Builder, Curve, Integers, Sum
from qjax.model.trace import Equation

# Operations that only move accumulators, or choose among them.
_MOVES = frozenset("reshape transpose slice max_pool max broadcast rev take".split())
_KINDS: dict[str, Kind] = {
    name: name
    for name in ("conv", "dot", "dot_codes", "multiply_codes", "sum", "sum_pool")
}


def requantized(
    builder: Builder, x: Integers, target: SiteGrid, ends: tuple[int, int]
) -> Integers:
    """Puts integers on the grid of a site by the kernel of what computes them.

    Args:
      builder: Receives the graph.
      x: Codes or an accumulator.
      target: Grid of the site.
      ends: Least and largest code that an activation leaves.
    """
    _check_one_scale(target)
    if x.rescaled is not None:
        raise refuse(target.site, "is of codes times a number")
    if x.is_codes:
        return _of_codes(builder, x, target, ends)
    node = _maker(builder, x.value)
    kind = _KINDS.get("" if node is None else node.operation, "other")
    if node is None or kind == "other" or node.attributes.get("shift"):
        known = "`other`" if node is None else f"`{node.operation}`"
        raise refuse(
            target.site,
            f"ends {known} in {x.place.path!r}, for which TFLite has no operator",
        )
    if kind == "sum_pool":
        return _averaged(builder, x, node, target, ends)
    if kind == "sum":
        return _mean(builder, x, node, target, ends)
    grids = [builder.values[v].grid for v in node.inputs]
    if any(grid is None or np.ndim(grid.scale) for grid in grids):
        raise refuse(target.site, "is made of what has no scale, or several")
    own = [float(grid.scale) for grid in grids if grid is not None]
    scales: list[Any] = [np.float32(s) for s in own]
    if kind in ("conv", "dot"):
        weights = np.float32(np.asarray(x.scale) / own[0])
        gain = np.ones(()) if x.gain is None else np.asarray(x.gain)
        scales = [weight_scale(np.asarray(weights), np.float32(gain)), scales[0]]
    elif x.gain is not None:
        raise refuse(
            target.site,
            "multiplies a product of two values by a number",
            "Multiply one of the two by it, right behind its weights",
        )
    ratio = product_ratio(kind, scales, np.float32(target.scale))
    if x.is_still is not None:  # Zero is zero in any unit.
        ratio = np.where(x.is_still, 0.0, ratio)
    rule = builder.target.dense if kind == "dot" else builder.target.accumulators
    return _added(builder, x, target, ends, signed_multiplier(ratio), rule)


def _check_one_scale(target: SiteGrid) -> None:
    if target.units is not None:
        raise refuse(
            target.site, "has a scale per channel", "Use `axis=None` in its word"
        )


def _of_codes(
    builder: Builder, x: Integers, target: SiteGrid, ends: tuple[int, int]
) -> Integers:
    """Takes codes to another grid, or clips them on their own."""
    if x.gain is not None or np.ndim(x.scale):
        raise refuse(target.site, "is of codes with a scale per channel")
    scale = np.float32(x.scale)
    same = (scale, x.zero_point) == (np.float32(target.scale), target.zero_point)
    if same and builder.values[x.value].dtype == target.dtype:
        attributes = {"low": ends[0], "high": ends[1]}
        value = target.add(builder, "clip", (x.value,), attributes)
        return target.integers(builder, value)
    ratio = product_ratio("codes", [scale], np.float32(target.scale))
    pair, rule = signed_multiplier(ratio), builder.target.accumulators
    return _added(builder, x, target, ends, pair, rule)


def _added(
    builder: Builder,
    x: Integers,
    target: SiteGrid,
    ends: tuple[int, int],
    pair: tuple[Any, Any],
    rule: str,
) -> Integers:
    """Adds a requantizer to the graph."""
    named = zip(("multiplier", "shift"), pair, strict=True)
    params = {
        role: builder.add_param(f"{target.site}/{role}", np.asarray(p, np.int32))
        for role, p in named
    }
    attributes = {
        "input_zero_point": x.zero_point,
        "zero_point": target.zero_point,
        "low": ends[0],
        "high": ends[1],
        "rule": rule,
    }
    value = target.add(builder, "requantize", (x.value,), attributes, params=params)
    return target.integers(builder, value)


def _maker(builder: Builder, value: int) -> Node | None:
    """Returns the node that computes an accumulator, before any moves of it."""
    makers = {v: node for node in builder.nodes for v in node.outputs}
    node = makers.get(value)
    while node is not None and node.operation in _MOVES:
        node = makers.get(node.inputs[0])
    return node


def _mean(
    builder: Builder, x: Integers, node: Node, target: SiteGrid, ends: tuple[int, int]
) -> Integers:
    taps = math.prod(node.attributes["sizes"])
    if x.gain is not None and np.any(np.float32(x.gain) != np.float32(1) / taps):
        raise refuse(
            target.site, f"is no mean of {taps} codes, but times another number"
        )
    if np.ndim(x.scale):
        raise refuse(target.site, "is of codes with a scale per channel")
    scales = [np.float32(x.scale)]
    ratio = product_ratio("sum", scales, np.float32(target.scale))
    pair = mean_multiplier(ratio, 1 if x.gain is None else taps)
    return _added(builder, x, target, ends, pair, builder.target.accumulators)


def _averaged(
    builder: Builder, x: Integers, node: Node, target: SiteGrid, ends: tuple[int, int]
) -> Integers:
    """Averages codes on their own grid, and takes them to another one then."""
    source = builder.values[node.inputs[0]]
    assert source.grid is not None
    counts = _counts(node, source.shape)
    gain = np.zeros(()) if x.gain is None else np.float32(x.gain)
    is_moved = builder.values[x.value].shape != builder.values[node.output].shape
    if is_moved or np.any(gain != np.float32(1) / np.float32(counts)):
        raise refuse(
            target.site,
            "is no average of the codes in each window, padding left out",
            "Use `count_include_pad=False`, or a pool without padding",
        )
    own = {**node.attributes, "bias": 0, "padding_code": 0}
    total = builder.add("sum_pool", node.inputs, own, dtype="int32", path=node.path)
    name = builder.add_param(f"{target.site}/counts", counts.astype(np.int32))
    info = np.iinfo(source.dtype)
    is_same = source.grid == target.grid and source.dtype == target.dtype
    low, high = ends if is_same else (int(info.min), int(info.max))
    options: Any = {"grid": source.grid, "dtype": source.dtype, "path": target.site}
    options["params"] = {"counts": name}
    attributes = {"low": low, "high": high}
    value = builder.add("tflite_average", (total,), attributes, **options)
    if is_same:
        return target.integers(builder, value)
    codes = dataclasses.replace(x, gain=None, bounds=(-np.inf, np.inf)).elsewhere(
        value, zero_point=source.zero_point, low=low, high=high, is_codes=True
    )
    return _of_codes(builder, codes, target, ends)


def _counts(node: Node, shape: Sequence[int]) -> np.ndarray:
    """Counts the inputs in each window of a pool, padding left out."""
    a = node.attributes
    whole = zip(shape, a["window"], a["strides"], a["padding"], strict=True)
    sizes = [1 if (w, s, tuple(pad)) == (1, 1, (0, 0)) else n for n, w, s, pad in whole]
    return np.sum(window_taps(a, np.ones(sizes, np.int64), 0), axis=0)


def summed(builder: Builder, x: Sum, target: SiteGrid) -> Integers:
    """Adds codes of two grids as TFLite's ADD and SUB do."""
    _check_one_scale(target)
    terms = list(x.terms)
    if len(terms) != 2 or any(np.ndim(t.scale) or t.rescaled for t, _ in terms):
        raise refuse(
            target.site,
            f"adds {len(terms)} values at once, and TFLite adds two of one scale each",
            "Quantize each sum of two, with `qjax.fake_quant` or a site between them",
        )
    signs = [sign for _, sign in terms]
    if signs[0] < 0:
        terms, signs = terms[::-1], signs[::-1]
    if signs[0] < 0:
        raise refuse(target.site, "is the negative of a sum")
    left = left_shift(target.dtype == "int16")
    scales = [np.float32(t.scale) for t, _ in terms]
    y = np.float32(target.scale)
    *pairs, last = sum_multipliers(scales[0], scales[1], y, left)
    low, high = target.range(x.bounds)
    attributes = {
        "left_shift": left,
        "zero_points": [t.zero_point for t, _ in terms],
        "multipliers": [
            int(m) * int(s) for (m, _), s in zip(pairs, signs, strict=True)
        ],
        "shifts": [int(n) for _, n in pairs],
        "multiplier": int(last[0]),
        "shift": int(last[1]),
        "zero_point": target.zero_point,
        "low": low,
        "high": high,
        "rule": builder.target.accumulators,
    }
    inputs = [t.value for t, _ in terms]
    value = target.add(builder, "tflite_add", inputs, attributes)
    return target.integers(builder, value)


# Primitive -> the function, and its table of 16-bit codes if TFLite has one.
_FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "exp": (np.exp, lambda x, y: wide_function_table(np.exp, x, y)),
    "logistic": (sigmoid, lambda x, y: wide_sigmoid_table(x)),
    "tanh": (np.tanh, lambda x, y: wide_tanh_table(x)),
}


def tabled(builder: Builder, x: Curve, target: SiteGrid) -> Integers:
    """Tabulates a function of codes as TFLite's kernel of it does."""
    _check_one_scale(target)
    source, names = x.source, [_name(e) for e in x.steps.values()]
    own = [name for name in names if name]
    is_plain = source.is_codes and not np.ndim(source.scale) and source.gain is None
    first = [a for v, a in x.aliases.items() if v in _read(x)]
    is_plain &= all(a.value == source.value and not a.is_bounded for a in first)
    if len(own) != 1 or own[0] not in _FUNCTIONS or x.known or not is_plain:
        raise refuse(
            target.site,
            f"is a function of codes by {', '.join(own) or 'nothing'}, and TFLite has "
            f"tables of {', '.join(_FUNCTIONS)} alone, each of codes as they are",
            "Give each of its operations a site of its own (`Constraints(split=...)`)",
        )
    function, wide = _FUNCTIONS[own[0]]
    dtype = builder.values[source.value].dtype
    _check(target.site, lack_of_types(own[0], dtype, target.dtype))
    _check(target.site, lack_of_zero_point(dtype, source.zero_point))
    info = np.iinfo(dtype)
    given = Codes(
        np.float32(source.scale), source.zero_point, int(info.min), int(info.max)
    )
    made = Codes(np.float32(target.scale), target.zero_point, target.qmin, target.qmax)
    grid = target.scale, target.zero_point
    _check(target.site, lack_of_grid(own[0], target.dtype, *grid))
    with np.errstate(over="ignore", invalid="ignore"):
        table = (
            wide(given, made)
            if given.is_wide
            else function_table(function, given, made)
        )
    info = np.iinfo(target.dtype)
    if not np.all((table >= info.min) & (table <= info.max)):  # Of infinity.
        raise refuse(target.site, f"computes {own[0]} of values beyond float32")
    table = table[source.low - given.low : source.high - given.low + 1]
    name = builder.add_param(f"{target.site}/table", table.astype(target.dtype))
    attributes = {"low": source.low, "axis": None}
    params = {"table": name}
    value = target.add(builder, "table", (source.value,), attributes, params=params)
    return target.integers(builder, value)


def _read(x: Curve) -> set[int]:
    return {v for e in x.steps.values() for v in e.inputs} or {x.end}


def _name(e: Equation) -> str:
    """Returns the function of an equation; empty for one that changes no number."""
    name = e.primitive.name
    return "" if name in ("copy", "copy_p", "convert_element_type") else name


# Operation, inputs, attributes and parameters of a node.
NodeParts = tuple[str, tuple[int, ...], dict[str, Any], dict[str, str]]


def softmax(
    builder: Builder, x: Integers, call: SoftmaxCall, target: SiteGrid, is_masked: bool
) -> NodeParts:
    """Returns TFLite's softmax or log-softmax of codes.

    Args:
      builder: Receives its tables.
      x: The codes.
      call: What the model computes.
      target: Grid of the site.
      is_masked: Whether masks leave numbers out.

    Returns:
      Its operation, inputs, attributes and parameters.
    """
    value, name, site = builder.values[x.value], name_of(call), target.site
    types = value.dtype, target.dtype
    _check(site, lack_of_softmax(call, len(value.shape), is_masked, *types))
    _check(site, lack_of_grid(name, target.dtype, target.scale, target.zero_point))
    _check(site, lack_of_ends(name, target.dtype, target.qmin, target.qmax))
    unit, size, factor = np.float32(x.scale), value.shape[-1], call.factor
    if not 0 < size <= _MOST_SUMMANDS or factor <= 0:
        raise refuse(site, f"computes {name} of {size} numbers times {factor}")
    _check(site, lack_of_scale(name, unit, factor))
    if value.dtype == "int16":
        pair = wide_softmax_tables(unit, factor)
        tables = dict(zip(("exponentials", "reciprocals"), pair, strict=True))
        ends = {"high": target.qmax}
        return _looked_up(builder, site, x, "tflite_softmax16", ends, tables)
    tables = {"exponentials": exponential_table(unit, factor)}
    ends = {"low": target.qmin, "high": target.qmax}
    if call.kind == "softmax":
        return _looked_up(builder, site, x, "tflite_softmax", ends, tables)
    tables["steps"] = log_step_table(unit)
    ends["zero_point"] = target.zero_point
    return _looked_up(builder, site, x, "tflite_log_softmax", ends, tables)


def _check(site: str, lack: Lack) -> None:
    if lack:
        raise refuse(site, *lack)


def _looked_up(
    builder: Builder,
    site: str,
    x: Integers,
    operation: str,
    attributes: dict[str, Any],
    tables: dict[str, np.ndarray],
) -> NodeParts:
    params = {
        role: builder.add_param(f"{site}/{role}", table.astype(np.int32))
        for role, table in tables.items()
    }
    return operation, (x.value,), attributes, params


def l2_norm(
    builder: Builder, x: Integers, call: NormCall, target: SiteGrid
) -> NodeParts:
    """Returns TFLite's division of codes by the root of the sum of their squares.

    Args:
      builder: Holds the codes.
      x: The codes.
      call: What the model computes.
      target: Grid of the site.

    Returns:
      Its operation, inputs, attributes and parameters.
    """
    value, site = builder.values[x.value], target.site
    _check(site, lack_of_norm(call, len(value.shape), value.dtype, target.dtype))
    _check(site, lack_of_epsilon(call, x.scale))
    name, dtype = name_of(call), target.dtype
    _check(site, lack_of_grid(name, dtype, target.scale, target.zero_point))
    _check(site, lack_of_ends(name, dtype, target.qmin, target.qmax))
    far = max(x.zero_point - x.low, x.high - x.zero_point)
    if value.shape[-1] * far**2 >= 1 << 31:
        raise refuse(site, f"sums {value.shape[-1]} squares, more than 31 bits hold")
    attributes = {
        "input_zero_points": [x.zero_point],
        "low": target.qmin,
        "high": target.qmax,
    }
    return "tflite_l2_norm", (x.value,), attributes, {}


_MOST_SUMMANDS = 4095  # Most terms of a softmax, whose sum has 31 bits.


# Operations whose integers TFLite's kernels compute.
ALLOWED = frozenset(
    "argmax argmin broadcast clip concatenate constant conv dot dot_codes embed gather "
    "max max_pool maximum min minimum multiply_codes pad requantize reshape rev slice "
    "sum sum_pool table take tflite_add tflite_average tflite_constant tflite_l2_norm "
    "tflite_log_softmax tflite_softmax tflite_softmax16 transpose".split()
)


def check_tflite(graph: Graph, params: Mapping[str, np.ndarray]) -> None:
    """Raises NotImplementedError for what TFLite's kernels do not compute.

    Args:
      graph: Graph of a program.
      params: Its parameters.
    """
    for node in graph.nodes:
        if node.operation == "loop" and find_lstm(graph, node, params) is not None:
            continue
        if node.operation not in ALLOWED:
            lack = lack_of_operator(node.operation)
            raise refuse(node.path or "the program", *lack)
    for v in graph.outputs:
        value = graph.values[v]
        if value.grid is not None and value.dtype not in ("int8", "uint8", "int16"):
            raise refuse(
                "output",
                f"is an accumulator of {value.dtype} that no site rounds",
                "Give the output a quantizer",
            )
