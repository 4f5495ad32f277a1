"""The form of a graph: fields and their types, links between values, grids."""

import math
import re

import numpy as np

from .container import Unknown, holds, need

# Field, its type, in brackets if it may be missing. No mark: an integer; ?: an integer
# or null; *: a list of integers; %: of integers and nulls; #: of lists of integers;
# !: true or false; ": a text; :: more than that.
GRAPH = "values: nodes: inputs* outputs* sites: [grids:]"
VALUE = (
    'shape* dtype" low high [grid:] [rescaling:] [is_rescaling_exact!] [rounding"] '
    '[fixed_by"] [is_free_beyond_one!] [is_place!] [time_axis?] [dtype_of_model"]'
)
NODE = 'operation" inputs* output params: attributes: [path"] [graphs:] [others*]'
# Fields that inputs alone have, and what they are for all other values.
OF_INPUTS = {
    "rescaling": [1.0, 0.0],
    "is_rescaling_exact": True,
    "rounding": "half_even",
    "fixed_by": "",
    "is_free_beyond_one": False,
    "is_place": False,
    "time_axis": None,
}
_WINDOW = "window* strides* padding# base_dilation* dilation*"
# Operation -> possible numbers of inputs, roles of its parameters, its attributes.
FORMS = {
    "add": (
        "+",
        "",
        "input_zero_points* multipliers* shift zero_point low high [is_exact!]",
    ),
    "argmax": ("1", "", "axis"),
    "argmin": ("1", "", "axis"),
    "broadcast": ("1", "", "sizes% dimensions*"),
    "clip": ("1", "", "low high"),
    "compare": ("2", "", 'kind" zero_points* multipliers* exponents*'),
    "concatenate": ("+", "", "axis"),
    "constant": ("01", "value", ""),
    "conv": (
        "1",
        "kernel bias",
        "strides* padding# input_dilation* dilation* groups dimensions# padding_code "
        "offset shift",
    ),
    "dot": ("1", "kernel bias", "kernel_operand contract# batch# offset shift"),
    "dot_codes": ("2", "", "zero_points* contract# batch#"),
    "embed": ("1", "kernel", ""),
    "loop": ("+", "", "consts carries length? is_reversed!"),
    "masked_norm": (
        "2",
        "multiplier bias",
        'algorithm" axes* groups* most_places least is_centred! epsilon floor point '
        "input_zero_points* shift bias_shift zero_point low high",
    ),
    "max": ("1", "", "axes*"),
    "max_pool": ("1", "", _WINDOW),
    "maximum": ("2", "", ""),
    "min": ("1", "", "axes*"),
    "min_pool": ("1", "", _WINDOW),
    "minimum": ("2", "", ""),
    "multiply": ("1", "kernel bias", "offset shift"),
    "multiply_codes": ("2", "", "zero_points*"),
    "norm": (
        "1",
        "multiplier bias",
        'algorithm" axes* groups* count is_centred! epsilon floor point '
        "input_zero_points* shift bias_shift zero_point low high [more]",
    ),
    "pad": ("1", "", "padding# padding_code"),
    "requantize": (
        "1",
        "multiplier shift",
        'input_zero_point zero_point rule" low high [is_exact!] [is_bias_rounded!] '
        "[is_wide!]",
    ),
    "reshape": ("1", "", "sizes*"),
    "rev": ("1", "", "axes*"),
    "running_sum": ("1", "", "axis reverse! input_zero_point bias"),
    "select": ("+", "", ""),
    "slice": ("1", "", "start% stop% steps%"),
    "softmax": (
        "12",
        "table",
        'algorithm" axes* most_places empty" multiplier shift zero_point low high '
        "[plus]",
    ),
    "sum": ("1", "", "axes* sizes* bias [padding_code]"),
    "sum_pool": ("1", "", f"bias padding_code {_WINDOW}"),
    "table": ("1", "table", "low axis? [most_off] [is_exact!]"),
    "take": ("1", "places", "[crosses_examples]"),
    "tflite_add": (
        "2",
        "",
        "left_shift zero_points* multipliers* shifts* multiplier shift zero_point "
        'rule" low high',
    ),
    "tflite_average": ("1", "counts", "low high"),
    "tflite_constant": ("0", "value", ""),
    "tflite_l2_norm": ("1", "", "input_zero_points* low high"),
    "tflite_log_softmax": ("1", "exponentials steps", "zero_point low high"),
    "tflite_resize": ("1", "rows columns", ""),
    "tflite_softmax": ("1", "exponentials", "low high"),
    "tflite_softmax16": ("1", "exponentials reciprocals", "high"),
    "thresholds": (
        "1",
        "thresholds table",
        "axis? [most_off] [is_exact!] [is_sampled!]",
    ),
    "transpose": ("1", "", "permutation*"),
}
OPERATIONS = set(FORMS)
# Attributes whose integers are at least 0, or at least 1.
_LEAST = dict.fromkeys(
    "axis axes batch bias_shift carries consts contract dimensions epsilon floor "
    "least left_shift length more most_off permutation plus shift shifts".split(),
    0,
) | dict.fromkeys(
    "base_dilation count crosses_examples dilation groups input_dilation most_places "
    "strides window".split(),
    1,
)
_WIDE = "bias", "epsilon", "floor"
_MOST = {"shift": 62, "shifts": 62, "left_shift": 31, "bias_shift": 31}
_TEXTS = {
    "algorithm": ("exp_table", "newton_root"),
    "empty": ("zero", "all", "uniform"),
    "rule": ("half_even", "fp32_half_even", "tflite_double", "tflite_single"),
    "kind": ("eq", "ge", "gt", "le", "lt", "ne"),
}
_MODELS = ["", "bool"] + [f"{k}{n}" for k in ("int", "uint") for n in (8, 16, 32, 64)]


def _integer(x):
    return type(x) is int


def _list_of(holds):
    return lambda x: type(x) is list and all(map(holds, x))


_TYPES = {
    "": _integer,
    "?": lambda x: x is None or _integer(x),
    "*": _list_of(_integer),
    "%": _list_of(lambda n: n is None or _integer(n)),
    "#": _list_of(_list_of(_integer)),
    "!": lambda x: type(x) is bool,
    '"': lambda x: type(x) is str,
    ":": lambda x: True,
}


def _fields(part, form, where):
    """Raises unless a part has the fields of a form, each of its type."""
    need(type(part) is dict, f"{where} is {part!r}, and has no fields")
    kinds = re.findall(r"(\[?)(\w+)(\W?)", form.replace("]", ""))
    known = {name: mark for _, name, mark in kinds}
    lacking = [name for bracket, name, _ in kinds if not bracket and name not in part]
    need(not lacking, f"{where} has no {lacking}")
    for name, x in part.items():
        need(name in known, f"{where} has {name!r}, which is not of it")
        need(_TYPES[known[name].strip()](x), f"{name!r} of {where} is {x!r}")


def _numbers(x):
    """Returns the integers in lists of lists."""
    return [n for part in x for n in _numbers(part)] if type(x) is list else [x]


def formed(found):
    """Raises unless the graph of a program has its form, and its parameters theirs."""
    graph = found.fields["graph"]
    _formed(graph, found.types, found.small, "")
    nodes = [node for inner in _graphs(graph) for node in inner["nodes"]]
    used = {name for node in nodes for name in node["params"].values()}
    need(used == set(found.params), f"{set(found.params) - used} have no reader")
    for name in ("inputs", "outputs"):
        same = _leaves(found.fields[name]) == len(graph[name])
        need(same, f"{name} are nested otherwise than those of the graph")
    _grids_of_parameters(graph.get("grids", {}), found)


def _graphs(graph):
    inner = [g for node in graph["nodes"] for g in node.get("graphs", {}).values()]
    return [graph, *(own for g in inner for own in _graphs(g))]


def _formed(graph, types, small, place):
    """Raises unless a graph, and those inside of its nodes, have their form."""
    _fields(graph, GRAPH, f"the graph{place}")
    values, nodes = graph["values"], graph["nodes"]
    need(type(values) is list and type(nodes) is list, "values and nodes are no lists")
    for v, value in enumerate(values):
        _value(value, f"%{v}{place}", small)
    for node in nodes:
        _node(node, types, f"{node.get('operation')!r} in {node.get('path', '')!r}")
    _linked(graph)
    _roles(graph, small)
    need(not place or not graph.get("grids"), "grids of parameters are of the whole")
    for node in nodes:
        for role, inner in node.get("graphs", {}).items():
            _formed(inner, types, small, f" in {role} of %{node['output']}{place}")


def _value(value, where, small):
    _fields(value, VALUE, where)
    low, high, shape = value["low"], value["high"], value["shape"]
    need(holds(value["dtype"], low, high), f"{where} is no {value['dtype']}")
    sizes = min(shape, default=0) >= 0 and math.prod(shape) < 1 << 40
    need(sizes, f"{where} has the shape {shape}")
    if value.get("grid") is not None:
        _gridded(value["grid"], value["dtype"], shape, small, where)
    known = value.get("rounding", "half_even") in ("half_even", "half_away")
    known = known and value.get("dtype_of_model", "") in _MODELS
    axis, pair = value.get("time_axis"), value.get("rescaling", [1.0, 0.0])
    known = known and (axis is None or 0 <= axis < len(shape))
    known = known and type(pair) is list and len(pair) == 2 and all(map(_real, pair))
    need(known and pair[0] != 0, f"{where} has an unknown word, axis or rescaling")


def _real(x):
    return type(x) is float and bool(np.isfinite(np.float32(x)))


def _scale_of(scale, small):
    """Returns a scale as an array; raises unless it is one of finite numbers."""
    if type(scale) is dict:
        k = scale.get("small")
        there = list(scale) == ["small"] and type(k) is int and 0 <= k < len(small)
        need(there and small[k].dtype == "f4", f"a scale is {scale}")
        scale = small[k].tolist()
    need(all(map(_real, _numbers(scale))), f"a scale is {scale}")
    return np.asarray(scale, "f4")


def _gridded(grid, dtype, shape, small, where):
    """Raises unless a grid is one for integers of a type and a shape."""
    _fields(grid, "scale: zero_point", f"the grid of {where}")
    z, scale = grid["zero_point"], _scale_of(grid["scale"], small)
    fits = not scale.ndim or len(scale.shape) == len(shape)
    fits = fits and all(n in (1, m) for n, m in zip(scale.shape, shape, strict=False))
    need(holds(dtype, z, z) and fits, f"{where} has another grid: {grid}")


def _grids_of_parameters(grids, found):
    """Raises unless grids, by name, are those of parameters."""
    need(type(grids) is dict, "grids have no names")
    for name, grid in grids.items():
        need(name in found.params, f"the grid of {name!r} is of no parameter")
        _fields(grid, "scale: zero_point", f"the grid of {name!r}")
        scale = grid["scale"]
        if type(scale) is dict and set(scale) == {"of", "times"}:
            known = scale["of"] in [*grids] and type(scale["times"]) is float
            need(known, f"a scale is {scale}")
            other = grids[scale["of"]]
            array = _scale_of(other["scale"], found.small)
            need(array.ndim > 0, f"a scale is a multiple of no list: {scale}")
            scale = (array.astype("f8") * scale["times"]).astype("f4").tolist()
        whole = {**grid, "scale": scale}
        shape = found.params[name].shape
        _gridded(whole, found.types[name], shape, found.small, repr(name))


def _node(node, types, where):
    _fields(node, NODE, where)
    name = node["operation"]
    need(name in FORMS, f"the operation {name!r} is not here", Unknown)
    count, roles, form = FORMS[name]
    known = count == "+" and node["inputs"] or str(len(node["inputs"])) in count
    need(known, f"{where} has {len(node['inputs'])} inputs")
    own = node["params"]
    need(type(own) is dict and set(own) == set(roles.split()), f"{where} has {own}")
    for role, parameter in own.items():
        there = type(parameter) is str and parameter in types
        need(there, f"the parameter {parameter!r} of {where} is not there")
        wide = role not in ("bias", "multiplier", "shift")
        need(wide or types[parameter] == "int32", f"the {role} of {where} is no int32")
    graphs = set(node.get("graphs", {}))
    need(graphs == ({"body"} if name == "loop" else set()), f"{where} has {graphs}")
    _fields(node["attributes"], form, where)
    for key, x in node["attributes"].items():
        of = [n for n in _numbers(x) if type(n) is int]
        most = 1 << (62 if key in _WIDE else 31)
        least = _LEAST.get(key, -most)
        most = min(most, _MOST.get(key, most) + 1)
        need(all(least <= n < most for n in of), f"{key!r} of {where} is {x}")
        need(key not in _TEXTS or x in _TEXTS[key], f"{key!r} of {where} is {x}")


def _linked(graph):
    """Raises unless each value is computed once, before it is read."""
    values, sites, done = graph["values"], graph["sites"], [*graph["inputs"]]
    for node in graph["nodes"]:
        need(set(node["inputs"]) <= set(done), f"{node['inputs']} are not there yet")
        done += [node["output"], *node.get("others", [])]
    need(sorted(done) == [*range(len(values))], "a value is computed twice, or never")
    named = type(sites) is dict and all(map(_integer, sites.values()))
    ends = {*graph["outputs"], *(sites.values() if named else ())}
    need(named and ends <= set(done), "the graph names what it does not compute")


def _roles(graph, small):
    """Raises for statements about values that are no inputs, outputs or codes."""
    inputs, outputs = set(graph["inputs"]), set(graph["outputs"])
    for v, value in enumerate(graph["values"]):
        for name, usual in OF_INPUTS.items():
            own = v in inputs or value.get(name, usual) == usual
            need(own, f"%{v} is no input, and has {name!r}")
        grid, model = value.get("grid"), value.get("dtype_of_model", "")
        need(not model or v in outputs and grid is None, f"%{v} is no whole output")
        if model not in ("", "bool"):
            info = np.iinfo(model)
            inside = info.min <= value["low"] and value["high"] <= info.max
            need(inside, f"%{v} is beyond {model}")
        codes = v in inputs or value["dtype"] != "int32" or v in graph["sites"].values()
        if grid is not None and codes:
            positive = np.all(_scale_of(grid["scale"], small) > 0)
            need(positive, f"%{v} has a scale that is not positive")


def _leaves(tree):
    """Counts the leaves of what inputs or outputs are nested in."""
    if tree is None:
        return 1
    kind, parts = tree
    named = {"dict": dict, "list": list, "tuple": list, "none": list}
    need(type(parts) is named[kind], f"{tree} is no nesting")
    return sum(map(_leaves, parts.values() if kind == "dict" else parts))
