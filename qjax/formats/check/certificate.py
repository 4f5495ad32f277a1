"""The certificate of a graph: shapes, intervals and accumulators, node by node."""

import itertools
import math

import numpy as np

from .container import need
from .operations import fits
from .tflite import check_tables

SUMS = "dot conv multiply dot_codes multiply_codes sum sum_pool running_sum".split()
RESCALES = (
    *("add", "requantize", "softmax", "norm", "masked_norm"),
    *("tflite_add", "tflite_average"),
)
# Of the shape of their input.
_ALIKE = (
    *("softmax", "norm", "masked_norm"),
    *("tflite_softmax", "tflite_log_softmax", "tflite_l2_norm"),
)


def certificate(graph, own):
    """Yields the line of each accumulator; raises where a node and its values differ.

    Args:
      graph: The graph, whose form is right.
      own: Operations over the parameters of the program.
    """
    values = graph["values"]
    for node in graph["nodes"]:
        name, path = node["operation"], node.get("path", "")
        _zero_points(values, node)
        value, where = values[node["output"]], f"{name} in {path!r}"
        if name == "loop":
            _loop(values, node, where)
        else:
            shape, low, high = _outcome(values, node, own)
            stated = value["low"], value["high"]
            need(shape == value["shape"], f"{where} has the shape {shape}")
            if math.prod(shape) and low is not None:
                inside = stated[0] <= low <= high <= stated[1]
                need(inside, f"{path!r} reaches [{low}, {high}], beyond its interval")
                if name in SUMS:
                    bits = max(high, -1 - low).bit_length() + 1
                    need(bits <= 32, f"{path!r} reaches [{low}, {high}]")
                    yield f"  {path or name:<44} {low:>12} {high:>12} {bits:>5}"
        for inner in node.get("graphs", {}).values():
            yield from certificate(inner, own)


def _zero(value):
    return (value.get("grid") or {}).get("zero_point", 0)


def _zero_points(values, node):
    """Raises unless the zero points of a node are those of its values."""
    a, inputs = node["attributes"], [_zero(values[v]) for v in node["inputs"]]
    wanted = {
        "zero_point": _zero(values[node["output"]]),
        "zero_points": inputs,
        "input_zero_points": inputs,
        "input_zero_point": inputs[0] if inputs else 0,
    }
    if node["operation"] == "conv":
        pads = any(map(any, a["padding"])) or any(n > 1 for n in a["input_dilation"])
        wanted |= {"padding_code": inputs[0]} if pads else {}
    for name, zero in wanted.items():
        same = a.get(name, zero) == zero
        need(same, f"the {name} {a.get(name)} of a node is not {zero}, of its values")


def _loop(values, node, where):
    """Raises unless the ends of a loop are those of its body."""
    a, body = node["attributes"], node["graphs"]["body"]
    first, carries = a["consts"] + a["carries"], a["carries"]
    given, made = ([body["values"][v] for v in body[k]] for k in ("inputs", "outputs"))
    outer = [values[v] for v in node["inputs"]]
    results = [values[v] for v in (node["output"], *node.get("others", []))]
    counts = len(given) == len(outer) >= first and len(made) == len(results) >= carries
    need(counts, f"{where} has other ends than its body")
    steps = {x["shape"][0] for x in outer[first:]}
    steps |= set() if a["length"] is None else {a["length"]}
    need(len(steps) == 1, f"{where} has steps of {steps}")
    whole = zip(outer, given, [False] * first + [True] * len(outer), strict=False)
    pairs = [(x, inner, [*steps] if cut else []) for x, inner, cut in whole]
    pairs += [
        (x, inner, []) for x, inner in zip(made, given[a["consts"] :], strict=False)
    ][:carries]
    for x, inner, more in pairs:
        same = x["shape"] == [*more, *inner["shape"]] and x.get("grid") == inner.get(
            "grid"
        )
        inside = inner["low"] <= x["low"] and x["high"] <= inner["high"]
        need(same and inside, f"what enters a step of {where} does not fit its body")
    ends = [*given[a["consts"] : first], *made[carries:]]
    for k, (x, inner) in enumerate(zip(results, ends, strict=True)):
        same = x["shape"] == [*([*steps] if k >= carries else []), *inner["shape"]]
        inside = x["low"] <= inner["low"] and inner["high"] <= x["high"]
        need(same and inside, f"what leaves {where} does not fit its body")


def _outcome(values, node, own):
    """Returns shape, least and largest integer that a node gives, by its inputs.

    Both are None where nothing comes in.
    """
    name, a, xs = node["operation"], node["attributes"], node["inputs"]
    p = {role: own.params[k] for role, k in node["params"].items()}
    xs = [values[v] for v in xs]
    shapes = [x["shape"] for x in xs]
    if name == "sum":
        sizes = [shapes[0][d] for d in a["axes"]]
        need(a["sizes"] == sizes, f"a sum is said to be over {a['sizes']}, not {sizes}")
    if name == "add" and a.get("is_exact"):
        powers = all(m & (m - 1) == 0 for m in map(abs, a["multipliers"]))
        need(powers, f"multipliers {a['multipliers']} are said to be powers of two")
    if name == "softmax":
        _softmax(a, p["table"], xs)
    if name == "masked_norm":
        _masked_norm(a, p, xs)
    if name in (*_ALIKE, "tflite_softmax16", "tflite_resize"):
        if name.startswith("tflite"):
            check_tables(node, p, xs[0])
        if name == "tflite_resize":
            n, *_, channels = shapes[0]
            sizes = [len(p[role][0]) for role in ("rows", "columns")]
            return [n, *sizes, channels], xs[0]["low"], xs[0]["high"]
        ends = a if name in _ALIKE else {"low": 0, **a}
        return shapes[0], *_clipped(ends, values[node["output"]])
    if not all(map(math.prod, shapes)):
        return values[node["output"]]["shape"], None, None
    if name in SUMS:
        return _sum(name, a, p, xs, own)
    corners = [[np.full(fits(*x["shape"]), x[k]) for x in xs] for k in ("low", "high")]
    found = [getattr(own, name)(a, p, *corner) for corner in corners]
    shape = list(found[0].shape)
    ends = {
        "argmax": lambda: (0, shapes[0][a["axis"]] - 1),
        "compare": lambda: (0, 1),
        "constant": lambda: _ends(p["value"]),
        "embed": lambda: _ends(p["kernel"]),
        "select": lambda: (
            min(x["low"] for x in xs[1:]),
            max(x["high"] for x in xs[1:]),
        ),
        "table": lambda: _ends(p["table"][: xs[0]["high"] - a["low"] + 1]),
        "thresholds": lambda: (None, None),
    }
    ends["argmin"], ends["tflite_constant"] = ends["argmax"], ends["constant"]
    if name in RESCALES:
        return shape, *_clipped(a, values[node["output"]])
    if name in ends:
        return shape, *ends[name]()
    return shape, *_ends(np.stack([np.ravel(x) for x in found]))


def _softmax(a, table, xs):
    """Raises unless the table of a softmax fits its codes, and its mask is one."""
    places = math.prod(xs[0]["shape"][d] for d in a["axes"])
    least, most = int(table.min(initial=0)), int(table.max(initial=0))
    known = table.ndim == 1 and table.size and 0 <= least and most <= 1 << 30
    known = known and a["multiplier"] >= 0
    known = known and 0 < table[0] and a["most_places"] * int(table[0]) <= 1 << 45
    known = known and (len(table) > xs[0]["high"] - xs[0]["low"] or table[-1] == 0)
    need(known and places <= a["most_places"], "the table of a softmax does not fit")
    masks = all(0 <= x["low"] and x["high"] <= 1 for x in xs[1:])
    need(masks, "the mask of a softmax is not 0 or 1")


def _masked_norm(a, p, xs):
    """Raises unless the sums of a norm fit 64 bits, and its mask is one."""
    shape, (x, mask), most = xs[0]["shape"], xs, a["most_places"]
    split = dict(zip(a["axes"], a["groups"], strict=True))
    known = all(d < len(shape) and g and not shape[d] % g for d, g in split.items())
    need(known and split, "the groups of a masked norm do not split its axes")
    places = math.prod(shape[d] // g for d, g in split.items())
    wide = max(x["high"] - x["low"], *(abs(x[k] - _zero(x)) for k in ("low", "high")))
    fits = places <= most and (most * wide) ** 2 < 1 << 62
    added = max(a["epsilon"], a["floor"]) << 2 * most.bit_length()
    fits = fits and added <= 1 << 61 and -900 <= a["point"] <= 900 and a["least"] <= 1
    lines = max(int(np.abs(y).max(initial=0)) for y in p.values()) <= 1 << 30
    need(fits and lines, "the sums of a masked norm do not fit")
    need(0 <= mask["low"] and mask["high"] <= 1, "the mask of a norm is not 0 or 1")


def _ends(x):
    return (int(x.min()), int(x.max())) if x.size else (None, None)


def _clipped(a, value):
    """Returns the ends to which a node clips, which are those of its output."""
    ends, stated = (a["low"], a["high"]), (value["low"], value["high"])
    need(ends == stated, f"codes are clipped to {ends}, and said to be in {stated}")
    return ends


def _sum(name, a, p, xs, own):
    """Returns shape and ends of an accumulator, by the extremes of its inputs."""
    bias, shapes = p.get("bias", np.int64(0)), [list(x["shape"]) for x in xs]
    batch = a["dimensions"][0][0] if name == "conv" else None
    many = shapes[0][batch] if batch is not None else 1
    if batch is not None:
        shapes[0][batch] = 1  # One example is enough.
    none, run = {"bias": np.int64(0)}, getattr(own, name)
    full = lambda s, q: np.full(fits(*s), q)
    of = lambda codes, k: run(a, {"kernel": k, **none}, *map(full, shapes, codes))
    if "kernel" in p:  # The sums are least where codes have the other sign.
        sides, pair = (np.maximum, np.minimum), (xs[0]["low"], xs[0]["high"])
        up, down = (side(p["kernel"], 0) for side in sides)
        found = [of([x], up) + of([y], down) for x, y in (pair, pair[::-1])]
    else:
        corners = itertools.product(*((x["low"], x["high"]) for x in xs))
        found = [of(codes, None) for codes in corners]
    found = [x + bias for x in found]
    shape = list(found[0].shape)
    if batch is not None:
        shape[a["dimensions"][2][0]] *= many
    least, most = (
        f(x) for f, x in ((min, map(np.min, found)), (max, map(np.max, found)))
    )
    return shape, int(least), int(most)
