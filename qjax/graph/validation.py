"""Checks that a graph with its parameters is an integer program, before it runs.

Order and references, the form of each operation, shapes and intervals as the records of
the operations give them (`qjax.graph.operations`), grids. What passes computes what
`qjax.graph.reference` computes, whether or not it is what was meant.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Graph, Grid, Node, Value, check_order
from qjax.graph.operations import OPERATIONS, Operands
from qjax.graph.operations.record import Attribute, is_integer

PARAM_TYPES = ("int8", "uint8", "int16", "uint16", "int32")
_MODEL_TYPES = ("", "bool", *PARAM_TYPES, "uint32", "int64", "uint64")
_MOST_NUMBERS = 1 << 40  # Most numbers in a value of a program.
_ROLE_TYPES = {"bias": ("int32",), "multiplier": ("int32",), "shift": ("int32",)}


def validate(graph: Graph, params: Mapping[str, Any]) -> None:
    """Raises ValueError unless a graph is a valid integer program.

    Args:
      graph: Any graph.
      params: Parameters of the graph, by name.

    Raises:
      ValueError: names what is wrong, and where: a value that is used before it is
        computed, a parameter that is not there or does not fit, an attribute of
        another type, an interval that its type or its operation does not hold, an
        operation that gives another shape than the graph names, a scale that is not
        finite, and the like.
    """
    arrays = {name: np.asarray(p) for name, p in params.items()}
    _validate(graph, _check_forms, "")
    _validate(graph, functools.partial(_check_meaning, arrays=arrays), "")
    nodes = (node for _, own in graph.walk() for node in own.nodes)
    used = {name for node in nodes for name in node.params.values()}
    unused = sorted(map(repr, set(arrays) - used))
    _need(not unused, "The graph", "each parameter must have a reader", unused)
    for name, grid in graph.grids.items():
        _need(name in arrays, "The graph", "only parameters have grids", name)
        where = f"The parameter {name!r}"
        _check_grid(where, str(arrays[name].dtype), arrays[name].shape, grid)


def _validate(graph: Graph, check: Callable[[Graph], None], place: str) -> None:
    """Raises ValueError unless a graph and those inside of its nodes pass a check."""
    try:
        if place and graph.grids:
            raise ValueError("Grids of parameters stand in the whole program.")
        check(graph)
    except ValueError as error:
        error.args = (f"In {place}: {error}" if place else str(error),)
        raise
    for node in graph.nodes:
        for role, inner in node.graphs.items():
            _validate(inner, check, graph.place_of(node, role, place))


def _check_forms(graph: Graph) -> None:
    """Raises ValueError unless values and nodes are what they must be, each alone.

    Of all graphs before anything else, as a loop reads the values of its body.
    """
    for v, value in enumerate(graph.values):
        _check_value(f"Value %{v}", value)
    for node in graph.nodes:
        _check_node(graph, node)
    _check_ends(graph)


def _check_meaning(graph: Graph, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless a graph is valid, whatever is inside of its nodes."""
    check_order(graph)
    _check_computed(graph)
    _check_params(graph, arrays)
    _check_roles(graph)
    for node in graph.nodes:
        _check_operation(graph, node, arrays)


def _need(holds: bool, where: str, wanted: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: {wanted}, got {found!r}.")


def _at(node: Node) -> str:
    path = f" in {node.path!r}" if node.path else ""
    return f"The operation %{node.output} = {node.operation}{path}"


# Values.


def _check_value(where: str, v: Value) -> None:
    sizes = isinstance(v.shape, tuple) and all(
        is_integer(n) and 0 <= n < 1 << 31 for n in v.shape
    )
    _need(sizes, where, "`shape` must hold sizes", v.shape)
    few = math.prod(v.shape) < _MOST_NUMBERS
    _need(few, where, f"`shape` must hold fewer than {_MOST_NUMBERS} numbers", v.shape)
    if v.dtype not in PARAM_TYPES:
        raise ValueError(
            f"The graph holds a value of type {v.dtype}: {where}. Known are "
            f"{', '.join(PARAM_TYPES)}."
        )
    for name in ("low", "high"):
        found = getattr(v, name)
        _need(is_integer(found), where, f"`{name}` must be an integer", found)
    info = np.iinfo(v.dtype)
    if not info.min <= v.low <= v.high <= info.max:
        raise ValueError(
            f"{where} of type {v.dtype} does not hold its interval [{v.low}, {v.high}]."
        )
    if v.grid is not None:
        _check_grid(where, v.dtype, v.shape, v.grid)
    pair = isinstance(v.rescaling, tuple) and len(v.rescaling) == 2
    finite = pair and all(_is_float32(x) for x in v.rescaling) and v.rescaling[0] != 0
    _need(finite, where, "`rescaling` must be a finite gain and offset", v.rescaling)
    for name in ("is_rescaling_exact", "is_place"):
        found = getattr(v, name)
        _need(isinstance(found, bool), where, f"`{name}` must be true or false", found)
    is_flag = isinstance(v.is_free_beyond_one, bool)
    _need(is_flag, where, "`is_free_beyond_one` must be a flag", v.is_free_beyond_one)
    known = isinstance(v.rounding, str) and v.rounding in _ROUNDINGS
    _need(known, where, f"`rounding` must be one of {_ROUNDINGS}", v.rounding)
    _need(isinstance(v.fixed_by, str), where, "`fixed_by` must be a text", v.fixed_by)
    axis = v.time_axis
    is_axis = axis is None or (is_integer(axis) and 0 <= axis < len(v.shape))
    _need(is_axis, where, f"`time_axis` must be one of {len(v.shape)} axes", axis)
    _need(
        isinstance(v.dtype_of_model, str) and v.dtype_of_model in _MODEL_TYPES,
        where,
        "`dtype_of_model` must be an integer type",
        v.dtype_of_model,
    )


_ROUNDINGS = ("half_even", "half_away")


def _is_float32(x: Any) -> bool:
    """Returns whether ``x`` is a number that is finite in float32."""
    with np.errstate(over="ignore"):
        return isinstance(x, float) and bool(np.isfinite(np.float32(x)))


def _check_grid(where: str, dtype: str, sizes: tuple[int, ...], grid: Grid) -> None:
    info = np.iinfo(dtype)
    z = grid.zero_point
    _need(
        is_integer(z) and info.min <= z <= info.max,
        where,
        f"`zero_point` must be an integer of type {dtype}",
        z,
    )
    scales = _leaves(grid.scale)
    _need(
        all(map(_is_float32, scales)),
        where,
        "scales must be finite numbers",
        grid.scale,
    )
    try:
        shape = grid.array().shape
    except ValueError as error:
        raise ValueError(f"{where}: the scale has no shape: {error}.") from error
    fits = not shape or (
        len(shape) == len(sizes)
        and all(n in (1, m) for n, m in zip(shape, sizes, strict=True))
    )
    _need(fits, where, f"a scale must broadcast to {sizes}", shape)


def _leaves(scale: Any) -> list[Any]:
    if not isinstance(scale, list | tuple):
        return [scale]
    return [leaf for part in scale for leaf in _leaves(part)]


# Operations.


def _check_node(graph: Graph, node: Node) -> None:
    if not isinstance(node.operation, str) or node.operation not in OPERATIONS:
        raise ValueError(
            f"There is no integer operation {node.operation!r} in this qjax; a later "
            "one may know it."
        )
    size = len(graph.values)
    for v in node.outputs:
        is_value = is_integer(v) and 0 <= v < size
        text = f"its output must be one of {size} values"
        _need(is_value, f"The operation {node.operation}", text, v)
    _need(
        isinstance(node.path, str), "An operation", "`path` must be a text", node.path
    )
    where, form = _at(node), OPERATIONS[node.operation]
    known = all(is_integer(v) and 0 <= v < size for v in node.inputs)
    _need(known, where, f"its inputs must be among {size} values", node.inputs)
    wanted = "at least 1" if form.inputs is None else form.inputs
    count = len(node.inputs)
    if form.inputs is None:
        fits = count >= 1
    else:
        fits = count in np.atleast_1d(form.inputs)
    _need(fits, where, f"the number of its inputs must be {wanted}", count)
    _check_names(where, "parameters", node.params, form.roles, ())
    names = all(isinstance(name, str) for name in node.params.values())
    _need(names, where, "parameters must be texts", node.params)
    own = node.attributes
    _check_names(where, "attributes", own, form.attributes, form.optional)
    for name, given in own.items():
        kind = form.attributes.get(name) or form.optional[name]
        _check_attribute(where, name, kind, given)
    _check_names(where, "graphs", node.graphs, form.graphs, ())
    graphs = all(isinstance(graph, Graph) for graph in node.graphs.values())
    _need(graphs, where, "graphs must be integer graphs", [*node.graphs])
    for name in form.each_input:
        wanted = f"`{name}` must hold one for each of {count} inputs"
        _need(len(own[name]) == count, where, wanted, own[name])
    for name in form.each_axis:
        rank = len(graph.values[node.inputs[0]].shape)
        wanted = f"`{name}` must hold one for each of {rank} axes"
        _need(len(own[name]) == rank, where, wanted, own[name])


def _check_attribute(where: str, name: str, kind: Attribute, found: Any) -> None:
    _need(kind.holds(found), where, f"`{name}` must be {kind.wanted}", found)


def _check_names(where: str, what: str, found: Any, wanted: Any, optional: Any) -> None:
    _need(isinstance(found, Mapping), where, f"{what} must have names", found)
    missing = sorted(set(wanted) - set(found))
    _need(not missing, where, f"{what} must hold {missing}", sorted(map(str, found)))
    unknown = [name for name in found if name not in wanted and name not in optional]
    _need(not unknown, where, f"{what} must be {sorted({*wanted, *optional})}", unknown)


# Ends.


def _check_ends(graph: Graph) -> None:
    size = len(graph.values)
    _need(
        isinstance(graph.sites, Mapping), "The graph", "sites have names", graph.sites
    )
    sites = {repr(name): v for name, v in graph.sites.items()}
    named = all(isinstance(name, str) for name in graph.sites)
    _need(named, "The graph", "sites must have names", list(graph.sites))
    inputs = {f"input {k}": v for k, v in enumerate(graph.inputs)}
    outputs = {f"output {k}": v for k, v in enumerate(graph.outputs)}
    for name, v in {**inputs, **outputs, **sites}.items():
        if not (is_integer(v) and 0 <= v < size):
            raise ValueError(
                f"The graph returns or names values that it does not compute: {name} "
                f"must be one of {size}, got {v!r}."
            )
    once = len(set(graph.inputs)) == len(graph.inputs)
    _need(once, "The graph", "inputs must differ", graph.inputs)


def _check_computed(graph: Graph) -> None:
    made = (v for node in graph.nodes for v in node.outputs)
    computed = {*graph.inputs, *made}
    for v in range(len(graph.values)):
        if v not in computed:
            raise ValueError(f"Value %{v} is no input, and no operation computes it.")


def _check_roles(graph: Graph) -> None:
    """Raises for statements about values that are no inputs, outputs or codes."""
    plain = Value((), "int32", 0, 0)
    names = (
        *("rescaling", "is_rescaling_exact", "is_place", "rounding"),
        *("fixed_by", "is_free_beyond_one", "time_axis"),
    )
    for v, value in enumerate(graph.values):
        where = f"Value %{v}"
        if v not in graph.inputs:
            for name in names:
                found = getattr(value, name)
                same = found == getattr(plain, name)
                _need(same, where, f"only inputs have `{name}`", found)
        is_whole = value.grid is None and v in graph.outputs
        if not is_whole and value.dtype_of_model:
            raise ValueError(f"{where}: only whole outputs have `dtype_of_model`.")
        # Scales of accumulators are factors, which may have a sign.
        is_codes = v in graph.inputs or value.dtype != "int32"
        is_codes = is_codes or v in graph.sites.values()
        if value.grid is not None and is_codes:
            scale = value.grid.array()
            is_positive = bool(np.all(scale > 0))
            _need(
                is_positive, where, "scales of codes must be positive", scale.tolist()
            )
        if value.dtype_of_model not in ("", "bool"):
            info = np.iinfo(value.dtype_of_model)
            holds = info.min <= value.low and value.high <= info.max
            wanted = f"`dtype_of_model` must hold [{value.low}, {value.high}]"
            _need(holds, where, wanted, value.dtype_of_model)


# Parameters.


def _check_params(graph: Graph, arrays: Mapping[str, np.ndarray]) -> None:
    for node in graph.nodes:
        for role, name in node.params.items():
            if name not in arrays:
                raise ValueError(f"The parameter {name!r} of {node} is not there.")
            types = _ROLE_TYPES.get(role, PARAM_TYPES)
            dtype = str(arrays[name].dtype)
            wanted = f"the parameter {name!r} must have a type of {', '.join(types)}"
            _need(dtype in types, _at(node), wanted, dtype)


# Shapes and intervals.


def _check_operation(graph: Graph, node: Node, arrays: Mapping[str, Any]) -> None:
    """Raises unless the output of a node in the graph is as its record computes it."""
    record = OPERATIONS[node.operation]
    inputs = [graph.values[v] for v in node.inputs]
    own = {role: arrays[name] for role, name in node.params.items()}
    operands = Operands(node.attributes, inputs, own, node.graphs)
    try:
        shape = record.shape(operands)
    except ValueError as error:
        raise ValueError(
            f"{_at(node)} does not fit its inputs of shapes {operands.shapes}: {error}."
        ) from error
    _check_shape(node, node.output, graph.values[node.output], shape)
    _check_ends_of_output(node, graph.values[node.output])
    try:
        found = record.outputs(operands)
    except ValueError as error:
        raise ValueError(f"{_at(node)}: {error}.") from error
    count = len(node.outputs)
    _need(len(found) == count, _at(node), f"it must have {len(found)} outputs", count)
    for v, (shape, ends) in zip(node.outputs, found, strict=True):
        _check_shape(node, v, graph.values[v], shape)
        _check_interval(node, graph.values[v], ends)


def _check_shape(node: Node, v: int, value: Value, shape: tuple[int, ...]) -> None:
    if shape != value.shape:
        raise ValueError(
            f"Value %{v} is {value.dtype}{list(value.shape)} in the graph, "
            f"and is computed as {list(shape)} by {node.operation}"
            f"{f' in {node.path!r}' if node.path else ''}."
        )


def _check_interval(node: Node, value: Value, ends: tuple[Any, Any]) -> None:
    if math.prod(value.shape) and all(np.size(end) for end in ends):
        low, high = int(np.min(ends[0])), int(np.max(ends[1]))
        if not value.low <= low <= high <= value.high:
            raise ValueError(
                f"{_at(node)} gives integers in [{low}, {high}], and its output is "
                f"said to lie in [{value.low}, {value.high}]."
            )


def _check_ends_of_output(node: Node, value: Value) -> None:
    """Raises unless attributes about the output agree with the graph."""
    a = node.attributes
    if "zero_point" in a:
        wanted = f"`zero_point` must be {value.zero_point}, of the output"
        same = a["zero_point"] == value.zero_point
        _need(same, _at(node), wanted, a["zero_point"])
    if OPERATIONS[node.operation].kind == "rescale" and {"low", "high"} <= set(a):
        ends = [value.low, value.high]
        wanted = f"`low` and `high` must be {ends}, of the output"
        found = [a["low"], a["high"]]
        _need(found == ends, _at(node), wanted, found)
