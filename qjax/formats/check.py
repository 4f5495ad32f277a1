"""Checks a `.qjax` file with NumPy alone: `python check.py FILE`, copied anywhere.

A second reader, which shares no line with qjax. It parses the container, compares each
checksum, proves from the weights what the accumulators reach, computes the graph in
int64 on the golden inputs of the file, or on codes drawn at random, holds every value
against its interval, and the outputs against the golden ones. `qjax/graph/FORMAT.md`
has what it reads. Exit code 0: all of it holds; 1: it does not; 2: it cannot be said,
as the file is of another version, too large, or has an operation that is not here.
"""

import hashlib
import itertools
import json
import math
import sys
import zlib

import numpy as np

TYPES = {"I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4"}
FORMS: dict[str, type] = {"keepdims": bool, "reverse": bool}
FORMS |= dict.fromkeys("dtype fixed_by rounding dtype_of_model path rule".split(), str)
FORMS |= dict.fromkeys("low high shift offset zero_point output count".split(), int)
MOST, BUDGET = 1 << 25, 1 << 36  # Numbers in one value; products and sums in all.


class Unknown(Exception):
    """A file that this reader cannot judge."""


def need(holds, error, kind=ValueError):
    """Raises an error unless a condition holds."""
    if not holds:
        raise kind(error)


def container(data):
    """Returns metadata, tensors and their checksums of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    need(8 < len(data) and size <= len(data) - 8, "the file is truncated")
    header, body, end = json.loads(data[8 : 8 + size]), data[8 + size :], 0
    metadata = header.pop("__metadata__", {})
    need(metadata.get("format") == "qjax.integer_program", "this is no qjax program")
    version = metadata.get("version")
    need(version == "3", f"it has version {version}, not 3", Unknown)
    tensors, sums = {}, {}
    for name, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"]):
        (first, last), shape = entry["data_offsets"], entry["shape"]
        need(entry["dtype"] in TYPES, f"{name!r} has type {entry['dtype']}")
        dtype, sized = np.dtype(TYPES[entry["dtype"]]), min(shape, default=0) >= 0
        fits = sized and last - first == math.prod(shape) * dtype.itemsize
        need(fits and first == end and last <= len(body), f"{name!r} has no place")
        tensors[name] = np.frombuffer(body[first:last], dtype).reshape(shape)
        form = f"{entry['dtype']}[{','.join(map(str, shape))}]".encode()
        sums[name], end = hashlib.sha256(form + body[first:last]).hexdigest(), last
    need(end == len(body), "bytes are left over")
    return metadata, tensors, sums


def inflated(tensor, most):
    """Decompresses a tensor to as many bytes at most."""
    stream = zlib.decompressobj()
    found = stream.decompress(tensor.tobytes(), most + 1)
    need(len(found) <= most and stream.eof and not stream.unused_data, "zlib's end")
    return found


def program(data):
    """Returns the graph of a file, its parameters, golden codes, number of tensors."""
    metadata, tensors, sums = container(data)
    own, altered = sums.pop("__manifest__", ""), "was altered: it has another checksum"
    need(own and own == metadata["sha256"], f"the tensor '__manifest__' {altered}")
    fields = json.loads(inflated(tensors.pop("__manifest__"), 1 << 26))
    for name in sorted({*sums, *fields["sha256"]}):
        same = name in sums and sums[name] == fields["sha256"].get(name)
        need(same, f"the tensor {name!r} {altered}")
    sizes = [math.prod(s) * np.dtype(t).itemsize for t, s in fields["small"]]
    need(min(sizes, default=0) >= 0 and sum(sizes) <= 1 << 26, "small arrays are large")
    whole, small = inflated(tensors.pop("__small__"), sum(sizes)), []
    need(len(whole) == sum(sizes), "small arrays are too short")
    for (dtype, shape), n in zip(fields["small"], sizes, strict=True):
        planes = np.frombuffer(whole[:n], "u1").reshape(np.dtype(dtype).itemsize, -1)
        kind = np.dtype(dtype).newbyteorder("<")
        small.append(np.ascontiguousarray(planes.T).view(kind).reshape(shape))
        whole = whole[n:]
    golden = {n: tensors.pop(n) for n in [*tensors] if n.startswith("__golden__/")}
    params = {name: x.astype("i8") for name, x in tensors.items()}
    for name, (dtype, k) in fields["places"].items():
        ends = [int(f(small[k], initial=0)) for f in (np.min, np.max)]
        need(type(k) is int and k >= 0 and _holds(dtype, *ends), f"{name!r}: {dtype}")
        params[name] = small[k].astype("i8")
    for name, (bits, shape) in fields["packed"].items():
        need(bits in (2, 4) and tensors[name].dtype == "u1", f"{name!r} is not packed")
        codes = (params[name][:, None] >> np.arange(0, 8, bits)) % (1 << bits)
        codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape)
        params[name] = codes - ((codes >> (bits - 1)) << bits)  # Two's complement.
    return fields["graph"], params, golden, len(sums) + 1


def _rounded(x, shift):  # x / 2^shift, ties to even.
    down, unit = x >> shift, np.int64(1) << shift
    twice = (x - (down << shift)) * 2
    return down + ((twice > unit) | ((twice == unit) & (down % 2 == 1)))


def _floored(x, shift):  # floor(x / 2^shift + 1/2).
    return (x + ((1 << shift) >> 1)) >> shift


def _clipped(x, a):
    return np.clip(x + a.get("zero_point", 0), a["low"], a["high"]).astype("i8")


def _about(a, xs, name="zero_points"):
    return [x - z for x, z in zip(xs, a[name], strict=True)]


def _fits(*sizes):
    need(math.prod(sizes) <= MOST, f"a value of shape {sizes} is too large", Unknown)
    return sizes


def _padded(x, triples, fill):
    steps = [inner + 1 for _, _, inner in triples]
    spread = [max((n - 1) * s + 1, 0) for n, s in zip(x.shape, steps, strict=True)]
    more = [(max(low, 0), max(high, 0)) for low, high, _ in triples]
    _fits(*(n + sum(m) for n, m in zip(spread, more, strict=True)))
    whole = np.full(spread, fill, "i8")
    whole[tuple(slice(None, None, s) for s in steps)] = x
    whole = np.pad(whole, more, constant_values=fill)
    return whole[tuple(slice(max(-a, 0), b if b < 0 else None) for a, b, _ in triples)]


def _windows(x, sizes, fill):
    """Returns for each place of a window what it sees, on as many axes more."""
    window, strides, padding, spread, dilation = sizes
    x = _padded(x, [(*p, s - 1) for p, s in zip(padding, spread, strict=True)], fill)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    ends = zip(x.shape, spans, strides, strict=True)
    sizes = [max((n - span) // s + 1, 0) for n, span, s in ends]
    if not math.prod(_fits(*sizes, *window)):
        return np.zeros((*sizes, *window), "i8")
    view = np.lib.stride_tricks.sliding_window_view(x, spans)
    return view[tuple(slice(None, None, s) for s in (*strides, *dilation))]


def _by_channel(a, x, rows, of):
    if a["axis"] is None:
        return of(x, *rows)
    axis, count, shape = a["axis"] % x.ndim, len(rows[0]), list(x.shape)
    shape[axis] = count
    x = np.moveaxis(np.broadcast_to(x, _fits(*shape)), axis, 0)
    found = [of(x[k], *(r[k] for r in rows)) for k in range(count)]
    return np.moveaxis(np.stack(found) if found else x, 0, axis)


def _pool(reduce, fill):
    def run(self, a, p, x):
        names = "window", "strides", "padding", "base_dilation", "dilation"
        seen = _windows(x, [a[k] for k in names], a.get("padding_code", fill))
        return reduce(seen, axis=tuple(range(x.ndim, 2 * x.ndim))) + a.get("bias", 0)

    return run


def _root(x):  # One over a square root: an integer of 30 bits and its shift.
    up = (62 - x.bit_length()) // 2 * 2
    a = (x << up) >> 30
    root = 2362232013 - ((1395864371 * a) >> 32)
    for _ in range(5):
        root = (root * ((3 << 30) - (((root * root >> 30) * a) >> 32))) >> 31
    return root >> 1, 60 - up // 2


class _Operations:
    """Operations by name, of attributes, parameters by role, and inputs, in int64."""

    def __init__(self, params):
        self.params, self.left, self.seen = params, BUDGET, 0

    def spend(self, n):
        self.left -= n
        need(self.left >= 0, "this takes too long", Unknown)

    def product(self, x, y, contract, batch):
        (cx, cy), (bx, by) = contract, batch
        fx = [d for d in range(x.ndim) if d not in (*cx, *bx)]
        fy = [d for d in range(y.ndim) if d not in (*cy, *by)]
        size = lambda v, axes: [v.shape[d] for d in axes]
        rows, columns = (math.prod(size(*side)) for side in ((x, fx), (y, fy)))
        many, terms = math.prod(size(x, bx)), math.prod(size(x, cx))
        self.spend(many * rows * columns * terms)
        left = x.transpose(*bx, *fx, *cx).reshape(many, rows, terms)
        right = y.transpose(*by, *cy, *fy).reshape(many, terms, columns)
        most = int(np.abs(left).max(initial=0)) * int(np.abs(right).max(initial=0))
        kind = "f8" if most * terms < 1 << 53 else "i8"  # float64 holds such sums.
        shape = _fits(*size(x, bx), *size(x, fx), *size(y, fy))
        return (left.astype(kind) @ right.astype(kind)).astype("i8").reshape(shape)

    def dot(self, a, p, x):
        x, y = [x - a["offset"], p["kernel"]][:: 1 if a["kernel_operand"] else -1]
        found = self.product(x, y, a["contract"], a["batch"])
        return (found << a["shift"]) + p["bias"]

    def conv(self, a, p, x):
        (lhs, rhs, out), groups = a["dimensions"], a["groups"]
        kernel, one, d = p["kernel"].transpose(rhs), (1, 1), x.ndim - 2
        steps, *own = ((*one, *a[k]) for k in ("strides", "input_dilation", "dilation"))
        window, pads = (*one, *kernel.shape[2:]), [(0, 0), (0, 0), *a["padding"]]
        sizes = window, steps, pads, *own
        x = _windows(x.transpose(lhs), sizes, a["padding_code"])
        n, c, *sizes = x.shape[: d + 2]
        x = x.reshape(n, groups, c // groups, *sizes, *window[2:]) - a["offset"]
        kernel = kernel.reshape(groups, len(kernel) // groups, *kernel.shape[1:])
        axes = [2, *range(3 + d, 3 + 2 * d)], [2, *range(3, 3 + d)]
        found = np.moveaxis(self.product(x, kernel, axes, ([1], [0])), -1, 1)
        found = found.reshape(groups * kernel.shape[1], n, *sizes).swapaxes(0, 1)
        found = found.transpose(np.argsort(out))
        return (found << a["shift"]) + p["bias"]

    def add(self, a, p, *xs):
        terms = zip(_about(a, xs, "input_zero_points"), a["multipliers"], strict=True)
        return _clipped(_rounded(sum(q * m for q, m in terms), np.int64(a["shift"])), a)

    def requantize(self, a, p, x):
        rule, single = a["rule"], lambda x: x.astype("f4").astype("i8")
        need(rule.endswith("half_even"), f"the rounding {rule!r} is not here", Unknown)
        once = single if rule.startswith("fp32") else np.copy
        x = once(once(x - a["input_zero_point"]) * p["multiplier"])
        return _clipped(_rounded(x, p["shift"]), a)

    def running_sum(self, a, p, x):
        turn = np.flip if a["reverse"] else lambda x, axis: x
        x = turn(x, a["axis"]) - a["input_zero_point"]
        return turn(np.cumsum(x, a["axis"]), a["axis"]) + a["bias"]

    def table(self, a, p, x):
        need(not x.size or a["low"] <= x.min(), "a code is before its table")
        return _by_channel(a, x, [p["table"].T], lambda x, t: t[x - a["low"]])

    def thresholds(self, a, p, x):
        of = lambda x, cuts, t: t[np.searchsorted(cuts, x, "right")]
        return _by_channel(a, x, [p["thresholds"], p["table"]], of)

    def embed(self, a, p, x):
        _fits(*x.shape, *p["kernel"].shape[1:])
        return p["kernel"][x]

    def take(self, a, p, x):
        all_ = (x.size,) if a.get("crosses_examples") else (len(x), -1 if x.size else 0)
        x = x.reshape(all_)
        _fits(*x.shape[:-1], *p["places"].shape)
        return x[..., p["places"]]

    def constant(self, a, p, *xs):
        value, repeats = p["value"], len(xs[0]) if xs and len(p["value"]) == 1 else 1
        return np.repeat(value, _fits(repeats, value.size)[0], 0) if xs else value

    def compare(self, a, p, x, y):
        names = {"eq": "equal", "ne": "not_equal", "lt": "less", "gt": "greater"}
        names |= {"le": "less_equal", "ge": "greater_equal"}
        parts = zip(_about(a, (x, y)), a["multipliers"], a["exponents"], strict=True)
        sides = (np.ldexp((q * m).astype("f4").astype("f8"), e) for q, m, e in parts)
        return getattr(np, names[a["kind"]])(*sides)

    def reshape(self, a, p, x):
        sizes, known = a["sizes"], math.prod(n for n in a["sizes"] if n != -1)
        rest = x.size // known if known else len(x) if -1 in sizes else 0
        return x.reshape([rest if n == -1 else n for n in sizes])

    def broadcast(self, a, p, x):
        own = dict(zip(a["dimensions"], x.shape, strict=True))
        sizes = [own[d] if n is None else n for d, n in enumerate(a["sizes"])]
        x = x.reshape([own.get(d, 1) for d in range(len(sizes))])
        return np.broadcast_to(x, _fits(*sizes))

    def slice(self, a, p, x):
        ends = zip(a["start"], a["stop"], a["steps"], strict=True)
        return x[tuple(slice(*end) for end in ends)]

    def softmax(self, a, p, x, *masks):
        axes, table, least = tuple(a["axes"]), p["table"], -(1 << 31)
        keep = np.broadcast_to(masks[0] != 0 if masks else True, x.shape)
        if a["empty"] != "zero":
            empty = ~keep.any(axes, keepdims=True)
            x = np.where(empty, 0, x) if a["empty"] == "uniform" else x
            keep = keep | empty
        top = np.where(keep, x, least).max(axes, keepdims=True, initial=least)
        e = np.where(keep, table[np.clip(top - x, 0, len(table) - 1)], 0)
        total = e.sum(axes, keepdims=True).astype(object) + a.get("plus", 0)
        total = np.maximum(total, 1)
        bits = np.frompyfunc(int.bit_length, 1, 1)(total)
        one = np.minimum(((1 << (32 + bits)) // total + 1) // 2, (1 << 32) - 1)
        share = _floored(e * one.astype("i8"), bits.astype("i8") + 1)
        return _clipped(_floored(share * a["multiplier"], a["shift"]), a)

    def norm(self, a, p, x):
        self.spend(x.size << 14)  # Integers without end are slow.
        own, n = dict(zip(a["axes"], a["groups"], strict=True)), a["count"]
        point = a["point"]
        pairs = [(own.get(d, 1), m // own.get(d, 1)) for d, m in enumerate(x.shape)]
        over, fraction = tuple(2 * d + 1 for d in own), 30 + a.get("more", 0)
        q = (x - a["input_zero_points"][0]).astype(object).reshape(sum(pairs, ()))
        total, v = (y.sum(over, keepdims=True) for y in (q, q * q))
        if a["is_centred"]:
            q, v = n * q - total, n * v - total * total
            fraction -= ((n - 1).bit_length() + 1) // 2
        v = (v << point if point >= 0 else v >> -point) + a["epsilon"]
        root, down = np.frompyfunc(_root, 1, 2)(np.maximum(v, max(a["floor"], 1)))
        down = np.clip(down - point // 2 - fraction, 0, 62)
        t = _floored(q * root, down).reshape(x.shape).astype("i8") * p["multiplier"]
        return _clipped(_floored(t + (p["bias"] << a["bias_shift"]), a["shift"]), a)

    def loop(self, a, p, *xs):
        first, keep = a["consts"] + a["carries"], a["carries"]
        consts, carry, xs = xs[: a["consts"]], xs[a["consts"] : first], xs[first:]
        length = len(xs[0]) if a["length"] is None else a["length"]
        self.spend(length)
        order = range(length)[:: -1 if a["is_reversed"] else 1]
        steps = {}
        for t in order:
            found = self.run(a["body"], [*consts, *carry, *(x[t] for x in xs)])
            carry, steps[t] = found[:keep], found[keep:]
        need(steps, "a loop has no step", Unknown)
        kept = zip(*(steps[t] for t in range(length)), strict=True)
        return (*carry, *map(np.stack, kept))

    def run(self, graph, inputs):
        values, env = graph["values"], dict(zip(graph["inputs"], inputs, strict=True))
        for v in graph["inputs"]:
            self.hold(values[v], env[v], f"input %{v}")
        for node in graph["nodes"]:
            name, own, xs = node["operation"], {}, [env[v] for v in node["inputs"]]
            need(name in OPERATIONS, f"the operation {name!r} is not here", Unknown)
            p = {role: self.params[k] for role, k in node.get("params", {}).items()}
            if name in ("add", "multiply", "multiply_codes", "maximum", "minimum"):
                _fits(*np.broadcast_shapes(*(x.shape for x in [*xs, *p.values()])))
            own = {**node.get("attributes", {}), **node.get("graphs", {})}
            found = getattr(self, name)(own, p, *xs)
            found = found if isinstance(found, tuple) else (found,)
            outputs = [node["output"], *node.get("others", [])]
            for v, x in zip(outputs, found, strict=True):
                self.hold(values[v], x, f"%{v} = {name} in {node.get('path', '')!r}")
                env[v] = x.astype("i8")
        return [env[v] for v in graph["outputs"]]

    def hold(self, value, x, where):
        """Raises unless a value is of its rank and within its interval."""
        low, high, rank = value["low"], value["high"], len(value["shape"])
        need(x.ndim == rank, f"{where} has {x.ndim} axes, not {rank}")
        ends = (int(x.min()), int(x.max())) if x.size else (low, high)
        inside = low <= ends[0] <= ends[1] <= high and _holds(value["dtype"], low, high)
        need(inside, f"{where} is in {[*ends]}, beyond [{low}, {high}]")
        self.spend(x.size + 1)
        self.seen += 1

    def ends(self, graph, node):
        """Returns the least and the largest accumulator, by the extremes of inputs."""
        a, xs = node["attributes"], [graph["values"][v] for v in node["inputs"]]
        p = {role: self.params[k] for role, k in node.get("params", {}).items()}
        bias, shapes = p.get("bias", np.int64(0)), [list(x["shape"]) for x in xs]
        if node["operation"] == "conv":
            shapes[0][a["dimensions"][0][0]] = 1  # One example is enough.
        own, run = {"bias": np.int64(0)}, getattr(self, node["operation"])
        full = lambda s, q: np.full(_fits(*s), q)
        of = lambda codes, k: run(a, {"kernel": k, **own}, *map(full, shapes, codes))
        if "kernel" in p:  # The sums are least where codes have the other sign.
            sides, pair = (np.maximum, np.minimum), (xs[0]["low"], xs[0]["high"])
            up, down = (side(p["kernel"], 0) for side in sides)
            found = [of([x], up) + of([y], down) for x, y in (pair, pair[::-1])]
        else:
            corners = itertools.product(*((x["low"], x["high"]) for x in xs))
            found = [of(codes, None) for codes in corners]
        found = [x + bias for x in found]
        return min(int(x.min()) for x in found), max(int(x.max()) for x in found)

    sum_pool = _pool(np.sum, 0)
    max_pool = _pool(np.max, np.iinfo("i8").min)
    min_pool = _pool(np.min, np.iinfo("i8").max)

    def multiply(self, a, p, x):
        return ((x - a["offset"]) * p["kernel"] << a["shift"]) + p["bias"]

    def dot_codes(self, a, p, *xs):
        x, y = _about(a, xs)
        return self.product(x, y, a["contract"], a["batch"])

    multiply_codes = lambda self, a, p, *xs: math.prod(_about(a, xs))
    sum = lambda self, a, p, x: x.sum(tuple(a["axes"])) + a["bias"]
    clip = lambda self, a, p, x: np.clip(x, a["low"], a["high"])
    maximum = lambda self, a, p, x, y: np.maximum(x, y)
    minimum = lambda self, a, p, x, y: np.minimum(x, y)
    max = lambda self, a, p, x: x.max(tuple(a["axes"]))
    min = lambda self, a, p, x: x.min(tuple(a["axes"]))
    argmax = lambda self, a, p, x: x.argmax(a["axis"])
    argmin = lambda self, a, p, x: x.argmin(a["axis"])
    concatenate = lambda self, a, p, *xs: np.concatenate(xs, a["axis"])
    transpose = lambda self, a, p, x: x.transpose(a["permutation"])
    rev = lambda self, a, p, x: np.flip(x, tuple(a["axes"]))
    pad = lambda self, a, p, x: _padded(x, a["padding"], a["padding_code"])
    select = lambda self, a, p, x, *xs: np.choose(np.broadcast_to(x, xs[0].shape), xs)


SUMS = "dot conv multiply dot_codes multiply_codes sum sum_pool running_sum".split()
OPERATIONS = {n for n in vars(_Operations) if not n.startswith("_")}
OPERATIONS -= {"spend", "product", "run", "hold", "ends"}


def _holds(dtype, low, high):
    known = dtype in ("int8", "uint8", "int16", "uint16", "int32")
    return known and np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max


def formed(graph):
    """Raises unless texts, flags, numbers, sizes and grids have their types."""
    values, nodes = graph["values"], graph["nodes"]
    grids = [value["grid"] for value in values if value.get("grid") is not None]
    parts = [*values, *nodes, *grids, *(node.get("attributes", {}) for node in nodes)]
    for name, x in (item for part in parts for item in part.items()):
        kind = bool if name.startswith("is_") else FORMS.get(name, type(x))
        need(type(x) is kind, f"{name!r} is {x!r}, no {kind.__name__}")
    for grid in grids:
        scale = grid["scale"]
        known = type(scale) is float and np.isfinite(np.float32(scale))
        need(len(grid) == 2 and (known or type(scale) is dict), f"a grid is {grid}")
    for n in (n for value in values for n in value["shape"]):
        need(type(n) is int and n >= 0, f"a size is {n!r}")
    for node in nodes:
        zero = (values[node["output"]].get("grid") or {}).get("zero_point", 0)
        same = node.get("attributes", {}).get("zero_point", zero) == zero
        need(same, f"the zero point of a node is not that of its output, {zero}")


def certificate(graph, own):
    """Yields the line of each accumulator; raises where its interval is too short."""
    formed(graph)
    for node in graph["nodes"]:
        value, path = graph["values"][node["output"]], node.get("path", "")
        if node["operation"] in SUMS and math.prod(value["shape"]):
            low, high = own.ends(graph, node)
            bits = max(high, -1 - low).bit_length() + 1
            inside = value["low"] <= low <= high <= value["high"] and bits <= 32
            need(inside, f"{path!r} reaches [{low}, {high}], beyond its interval")
            yield f"  {path or node['operation']:<44} {low:>12} {high:>12} {bits:>5}"
        for inner in node.get("graphs", {}).values():
            yield from certificate(inner, own)


def drawn(graph):
    """Returns codes at random for the inputs; free leading sizes are 2."""
    rng, found = np.random.default_rng(0), []
    for value in (graph["values"][v] for v in graph["inputs"]):
        shape = list(value["shape"])
        if shape and not value.get("fixed_by"):
            shape[0] = min(shape[0], 2)
        found.append(rng.integers(value["low"], value["high"] + 1, _fits(*shape)))
    return found


def checked(data):
    """Yields what holds of a file, line by line."""
    graph, params, golden, count = program(data)
    own, of = _Operations(params), "__golden__/"
    yield f"  {'accumulator':<44} {'least':>12} {'largest':>12} {'bits':>5}"
    yield from certificate(graph, own)
    given = [golden[f"{of}inputs/{k}"] for k in range(len(golden and graph["inputs"]))]
    outputs = own.run(graph, [x.astype("i8") for x in given] or drawn(graph))
    yield f"tensors {count}, each with its SHA-256"
    kind = "golden inputs" if golden else "codes drawn at random, as none are golden"
    yield f"values  {own.seen}, each within its interval, on {kind}"
    for k, x in enumerate(outputs if golden else ()):
        wanted = golden[f"{of}outputs/{k}"]
        need(x.shape == wanted.shape, f"output {k} has the shape {x.shape}")
        differ = int(np.sum(x != wanted))
        need(not differ, f"{differ} of {x.size} golden codes of output {k} differ")
        yield f"output  {k}: {x.size} golden codes, 0 differ"


def main(arguments):
    """Prints what holds of a file; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python check.py FILE")
        return 2
    try:
        with open(arguments[0], "rb") as file, np.errstate(all="ignore"):
            for line in checked(file.read()):
                print(line)
    except (OSError, Unknown) as error:
        print(f"UNKNOWN {arguments[0]}: {error}")
        return 2
    except Exception as error:  # Whatever a file that is none can raise.
        print(f"WRONG {arguments[0]}: {type(error).__name__}: {error}")
        return 1
    print(f"OK {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
