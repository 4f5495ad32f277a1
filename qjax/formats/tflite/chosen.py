"""Moves, choices, tables and composites of a program as TFLite operators."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite import tensors
from qjax.formats.tflite.emission import (
    WRITER,
    Pending,
    TfliteGraph,
    activation,
    is_close,
)
from qjax.formats.tflite.written_moves import MOVES, padded
from qjax.graph import tflite_tables as tables
from qjax.graph.graph import Node

# Moves, of codes and of accumulators.


def _move(emission: TfliteGraph, node: Node) -> None:
    """Writes a move; of an accumulator it comes after the rescaling."""
    before = emission.pending.get(node.inputs[0])
    if before is not None:
        own = Pending(before.node, (*before.moves, node))
        emission.pending[node.output] = own
        return
    t = emission.tensor(node.inputs[0], node)
    emission.places[node.output] = MOVES[node.operation](emission, node, t)


def _pad(emission: TfliteGraph, node: Node) -> None:
    t = emission.tensor(node.inputs[0], node)
    emission.places[node.output] = padded(emission, node, t)


def _concatenate(emission: TfliteGraph, node: Node) -> None:
    given = [emission.tensor(v, node) for v in node.inputs]
    out = emission.add_value(node.output, node.path)
    axis = node.attributes["axis"]
    own: Any = {"axis": axis, "fused_activation_function": "NONE"}
    emission.add("CONCATENATION", given, out, **own)


# Choices.


def _of_two(emission: TfliteGraph, node: Node) -> None:
    given = [emission.tensor(v, node) for v in node.inputs]
    grids = {emission.tensors[t].scale + emission.tensors[t].zero_point for t in given}
    if len(grids) > 1:
        raise unsupported(WRITER, node, "operands on different grids")
    out = emission.add_value(node.output, node.path)
    emission.add(node.operation.upper(), given, out)


def _arg_extreme(emission: TfliteGraph, node: Node) -> None:
    t = emission.tensor(node.inputs[0], node)
    name = {"argmax": "ARG_MAX", "argmin": "ARG_MIN"}[node.operation]
    out = emission.add_value(node.output, node.path)
    axis = emission.constant([node.attributes["axis"]])
    emission.add(name, (t, axis), out, output_type="INT32")


def _clip(emission: TfliteGraph, node: Node) -> None:
    x, a = node.inputs[0], node.attributes
    t, value = emission.tensor(x, node), emission.value(x)
    same = emission.value(node.output).grid == value.grid
    if not same and emission.tensors[t].scale:
        raise unsupported(WRITER, node, "the same codes on another grid")
    if a["low"] <= value.low and value.high <= a["high"]:
        emission.places[node.output] = t
        return
    codes = emission.codes(x, node)
    ends = a["low"], a["high"]
    name = activation(ends, codes)
    if name is not None and name != "NONE":
        out = emission.add_like(t, emission.tensors[t].shape, node.path)
        emission.places[node.output] = emission.add(name, (t,), out)
        return
    emission.places[node.output] = emission.clipped(t, ends, codes, node.path)


# Numbers and lookups.


def _constant(emission: TfliteGraph, node: Node) -> None:
    value = emission.value(node.output)
    data = emission.params[node.params["value"]]
    data = np.broadcast_to(data, value.shape).astype(value.dtype)
    t = emission.add_value(node.output, node.params["value"])
    own = emission.tensors[t]
    grid = own.scale, own.zero_point
    emission.tensors[t] = tensors.Tensor(
        own.name, own.shape, own.dtype, *grid, data=data
    )


def _embed(emission: TfliteGraph, node: Node) -> None:
    """Writes GATHER of a table by an input."""
    name = node.params["kernel"]
    table, grid = emission.params[name], emission.graph.grids.get(name)
    value = emission.value(node.output)
    own = value.grid or grid
    scale: Any = ()
    if own is not None:
        units = np.unique(own.array())
        if units.size != 1:
            raise unsupported(WRITER, node, "a table with several scales")
        scale = (float(units[0]),), (own.zero_point,)
    data = table.astype(value.dtype)
    t = emission.add_tensor(name, table.shape, value.dtype, *scale, data=data)
    out = emission.add_tensor(node.path or name, value.shape, value.dtype, *scale)
    ids = emission.tensor(node.inputs[0], node)
    emission.places[node.output] = emission.add("GATHER", (t, ids), out, axis=0)


def _table(emission: TfliteGraph, node: Node) -> None:
    """Writes the operator whose table a lookup is, if there is one."""
    x, a = node.inputs[0], node.attributes
    t, own = emission.tensor(x, node), emission.codes(x, node)
    y = emission.codes(node.output, node)
    table = emission.params[node.params["table"]].astype(np.int64)
    value, dtype = emission.value(x), emission.value(node.output).dtype
    is_same = np.array_equal if emission.is_exact else is_close
    for name, make, options in _FUNCTIONS:
        is_one = tables.has_fixed_grid(name.lower(), dtype, y) and a["axis"] is None
        whole = make(own, y) if is_one else None
        if whole is None:
            continue
        whole = whole[a["low"] - own.low :][: len(table)]
        part = slice(value.low - a["low"], value.high - a["low"] + 1)
        if is_same(whole[part], table[part]):
            out = emission.add_value(node.output, node.path)
            emission.add(name, (t,), out, **options)
            return
    names = ", ".join(dict.fromkeys(name for name, *_ in _FUNCTIONS))
    raise unsupported(WRITER, node, f"a table that is none of TFLite's: {names}")


def _narrow(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    def make(x: tables.Codes, y: tables.Codes) -> np.ndarray | None:
        return None if x.is_wide else tables.function_table(function, x, y)

    return make


def _wide(make: Callable[[tables.Codes], np.ndarray]) -> Callable[..., Any]:
    def table(x: tables.Codes, y: tables.Codes) -> np.ndarray | None:
        is_unit = (float(y.scale), y.zero_point) == (2.0**-15, 0)
        return make(x) if x.is_wide and is_unit else None

    return table


def _exp(x: tables.Codes, y: tables.Codes) -> np.ndarray | None:
    return tables.wide_function_table(np.exp, x, y) if x.is_wide else None


def _hard_swish(x: tables.Codes, y: tables.Codes) -> np.ndarray | None:
    return None if x.is_wide else tables.hard_swish_table(x, y)


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.expm1(x), x)


_FUNCTIONS: tuple[tuple[str, Callable[..., Any], Mapping[str, Any]], ...] = (
    ("LOGISTIC", _narrow(tables.sigmoid), {}),
    ("LOGISTIC", _wide(tables.wide_sigmoid_table), {}),
    ("TANH", _narrow(np.tanh), {}),
    ("TANH", _wide(tables.wide_tanh_table), {}),
    ("EXP", _narrow(np.exp), {}),
    ("EXP", _exp, {}),
    ("GELU", _narrow(tables.gelu), {"approximate": False}),
    ("GELU", _narrow(tables.gelu_tanh), {"approximate": True}),
    ("ELU", _narrow(_elu), {}),
    ("HARD_SWISH", _hard_swish, {}),
)


# Composites.


def _softmax(emission: TfliteGraph, node: Node) -> None:
    x = node.inputs[0]
    t, own = emission.tensor(x, node), emission.codes(x, node)
    _check_whole(emission, node, "softmax")
    table = emission.params[node.params["exponentials"]]
    is_wide = node.operation == "tflite_softmax16"
    for beta in _betas(table, own):
        if is_wide:
            pair = tables.wide_softmax_tables(own.scale, beta)
            other = emission.params[node.params["reciprocals"]]
            same = all(map(np.array_equal, pair, (table, other)))
        else:
            same = np.array_equal(tables.exponential_table(own.scale, beta), table)
        if same:
            _check_scale(node, float(own.scale) * beta)
            out = emission.add_value(node.output, node.path)
            emission.add("SOFTMAX", (t,), out, beta=beta)
            return
    raise unsupported(WRITER, node, "a table of exponentials that is not TFLite's")


def _log_softmax(emission: TfliteGraph, node: Node) -> None:
    x = node.inputs[0]
    t, own = emission.tensor(x, node), emission.codes(x, node)
    _check_whole(emission, node, "log-softmax")
    _check_scale(node, float(own.scale))
    wanted = {
        "exponentials": tables.exponential_table(own.scale, 1.0),
        "steps": tables.log_step_table(own.scale),
    }
    found = {role: emission.params[node.params[role]] for role in wanted}
    if not all(np.array_equal(found[role], wanted[role]) for role in wanted):
        raise unsupported(WRITER, node, "tables that are not TFLite's")
    out = emission.add_value(node.output, node.path)
    emission.add("LOG_SOFTMAX", (t,), out)


def _l2_norm(emission: TfliteGraph, node: Node) -> None:
    t = emission.tensor(node.inputs[0], node)
    _check_whole(emission, node, "l2-normalisation")
    out = emission.add_value(node.output, node.path)
    emission.add("L2_NORMALIZATION", (t,), out, fused_activation_function="NONE")


def _check_whole(emission: TfliteGraph, node: Node, name: str) -> None:
    """Raises unless all codes of an output are on the grid that TFLite fixes."""
    own = [emission.value(v).dtype for v in (node.inputs[0], node.output)]
    y, a = emission.codes(node.output, node), node.attributes
    is_known = own[0] == own[1] and (name, own[1]) in tables.FIXED_GRIDS
    if not is_known or not tables.has_fixed_grid(name, own[1], y):
        raise unsupported(WRITER, node, f"a grid that TFLite's {name} does not have")
    ends = a.get("low", 0 if y.is_wide else y.low), a["high"]
    if ends != (0 if y.is_wide else y.low, y.high):
        raise unsupported(WRITER, node, f"a {name} within {ends[0]} and {ends[1]}")


def _check_scale(node: Node, scale: float) -> None:
    if scale <= tables.LEAST_SOFTMAX_SCALE:
        what = f"codes of the scale {scale:g}, where TFLite's kernels end the process"
        raise unsupported(WRITER, node, what)


def _betas(table: np.ndarray, x: tables.Codes) -> list[float]:
    """Returns factors of a softmax that its table may be of."""
    found = [1.0]
    if len(table) > 1 and 0 < table[1] < table[0]:
        slope = -math.log(table[1] / table[0]) / float(x.scale)
        found += [float(np.float32(slope)), float(np.float32(round(slope, 4)))]
    return found


def _resize(emission: TfliteGraph, node: Node) -> None:
    x = node.inputs[0]
    t, shape = emission.tensor(x, node), emission.value(x).shape
    wanted = [emission.params[node.params[k]] for k in ("rows", "columns")]
    sizes = [w.shape[1] for w in wanted]
    for corners, centers in ((False, False), (False, True), (True, False)):
        own: Any = {"align_corners": corners, "half_pixel_centers": centers}
        found = [
            tables.bilinear_places(n, out, **own)
            for n, out in zip(shape[1:3], sizes, strict=True)
        ]
        if all(map(np.array_equal, found, wanted)):
            out = emission.add_value(node.output, node.path)
            given = (t, emission.constant(sizes))
            emission.add("RESIZE_BILINEAR", given, out, **own)
            return
    raise unsupported(WRITER, node, "places that are not TFLite's")


# Operation -> what writes it.
CHOSEN: Mapping[str, Callable[[TfliteGraph, Node], None]] = {
    **dict.fromkeys(MOVES, _move),
    "argmax": _arg_extreme,
    "argmin": _arg_extreme,
    "clip": _clip,
    "concatenate": _concatenate,
    "constant": _constant,
    "embed": _embed,
    "maximum": _of_two,
    "minimum": _of_two,
    "table": _table,
    "pad": _pad,
    "tflite_constant": _constant,
    "tflite_l2_norm": _l2_norm,
    "tflite_log_softmax": _log_softmax,
    "tflite_resize": _resize,
    "tflite_softmax": _softmax,
    "tflite_softmax16": _softmax,
}
