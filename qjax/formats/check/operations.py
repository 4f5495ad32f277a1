"""The operations of a program by their formulas, in NumPy's int64."""

# ruff: noqa: D102, as a method is the formula of the operation of its name.

import math

import numpy as np

from .container import Unknown, holds, need
from .tflite import Kernels, rescaled

MOST, BUDGET = 1 << 25, 1 << 36  # Numbers in one value; products and sums in all.


def _rounded(x, shift):  # x / 2^shift, ties to even.
    down, unit = x >> shift, np.int64(1) << shift
    twice = (x - (down << shift)) * 2
    return down + ((twice > unit) | ((twice == unit) & (down % 2 == 1)))


def _floored(x, shift):  # floor(x / 2^shift + 1/2).
    return (x + ((1 << shift) >> 1)) >> shift


def _rescaled(x, multiplier, shift, rule):  # x * multiplier / 2^shift, as TFLite does.
    need(rule.startswith("tflite"), f"the rounding {rule!r} is not here", Unknown)
    multiplier, shift = np.int64(multiplier), np.int64(shift)
    if rule == "tflite_single":
        return _floored(x * multiplier, shift)
    return rescaled(x, multiplier, shift)


def _clipped(x, a):
    return np.clip(x + a.get("zero_point", 0), a["low"], a["high"]).astype("i8")


def _about(a, xs, name="zero_points"):
    return [x - z for x, z in zip(xs, a[name], strict=True)]


def fits(*sizes):
    """Returns a shape; raises for one of too many numbers."""
    need(math.prod(sizes) <= MOST, f"a value of shape {sizes} is too large", Unknown)
    return sizes


def _padded(x, triples, fill):
    steps = [inner + 1 for _, _, inner in triples]
    spread = [max((n - 1) * s + 1, 0) for n, s in zip(x.shape, steps, strict=True)]
    more = [(max(low, 0), max(high, 0)) for low, high, _ in triples]
    fits(*(n + sum(m) for n, m in zip(spread, more, strict=True)))
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
    if not math.prod(fits(*sizes, *window)):
        return np.zeros((*sizes, *window), "i8")
    view = np.lib.stride_tricks.sliding_window_view(x, spans)
    return view[tuple(slice(None, None, s) for s in (*strides, *dilation))]


def _by_channel(a, x, rows, of):
    if a["axis"] is None:
        return of(x, *rows)
    axis, count, shape = a["axis"] % x.ndim, len(rows[0]), list(x.shape)
    shape[axis] = count
    x = np.moveaxis(np.broadcast_to(x, fits(*shape)), axis, 0)
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


def _root_of_parts(a, v, count):  # One over a root of what is said to be added to v.
    added = [a[name] * count * count for name in ("epsilon", "floor")]
    free = min(64 - v.bit_length(), 64 - max(added).bit_length() + a["point"])
    up = (free - 3) // 2 * 2
    by = lambda x, n: x << min(n, 63) if n > 0 else x >> min(-n, 63)
    epsilon, floor = (by(x, up - a["point"]) for x in added)
    root, down = _root(max(by(v, up) + epsilon, floor, 1))
    return root, down - up // 2


def _of_30_bits(x, down):  # x / 2^down as an integer of 30 bits and an exponent.
    exponent = min(max(x.bit_length() - 30 - down, 0), 62)
    down, most = min(down + exponent, 62), (1 << 30) - 1
    t = _floored(x, down) if down > 0 else x << min(-down, 63)
    return max(-most, min(most, t)), exponent


class Operations(Kernels):
    """Operations by name, of attributes, parameters by role, and inputs, in int64."""

    def __init__(self, params):
        self.params, self.left, self.seen = params, BUDGET, 0

    def spend(self, n):
        """Counts what is computed; raises beyond a budget."""
        self.left -= n
        need(self.left >= 0, "this takes too long", Unknown)

    def product(self, x, y, contract, batch):
        """Multiplies arrays, summed over pairs of axes, by BLAS where it is exact."""
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
        shape = fits(*size(x, bx), *size(x, fx), *size(y, fy))
        return (left.astype(kind) @ right.astype(kind)).astype("i8").reshape(shape)

    def dot(self, a, p, x):
        need(a["kernel_operand"] in (0, 1), "a kernel is the left or the right factor")
        x, y = [x - a["offset"], p["kernel"]][:: 1 if a["kernel_operand"] else -1]
        found = self.product(x, y, a["contract"], a["batch"])
        return (found << a["shift"]) + p["bias"]

    def conv(self, a, p, x):
        (lhs, rhs, out), groups = a["dimensions"], a["groups"]
        whole = [sorted(axes) == [*range(x.ndim)] for axes in (lhs, rhs, out)]
        need(all(whole), "axes of a convolution are no order of all")
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
        x = x - a["input_zero_point"]
        if not rule.endswith("half_even"):
            return _clipped(_rescaled(x, p["multiplier"], p["shift"], rule), a)
        once = single if rule.startswith("fp32") else np.copy
        x = once(once(x) * p["multiplier"])
        return _clipped(_rounded(x, p["shift"]), a)

    def tflite_add(self, a, p, *xs):
        rule, shifted = a["rule"], [x << a["left_shift"] for x in _about(a, xs)]
        need(rule.startswith("tflite"), f"a sum of TFLite rounds by {rule}")
        fit = all(np.abs(x).max(initial=0) < 1 << 31 for x in shifted)
        need(fit, "shifted codes are beyond int32")
        pairs = zip(shifted, a["multipliers"], a["shifts"], strict=True)
        total = sum(_rescaled(*pair, rule) for pair in pairs)
        return _clipped(_rescaled(total, a["multiplier"], a["shift"], rule), a)

    def tflite_average(self, a, p, x):
        need(p["counts"].min(initial=1) > 0, "an average of nothing")
        share = (np.abs(x) + p["counts"] // 2) // p["counts"]
        return _clipped(np.sign(x) * share, a)

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
        fits(*x.shape, *p["kernel"].shape[1:])
        return p["kernel"][x]

    def take(self, a, p, x):
        all_ = (x.size,) if a.get("crosses_examples") else (len(x), -1 if x.size else 0)
        x = x.reshape(all_)
        fits(*x.shape[:-1], *p["places"].shape)
        return x[..., p["places"]]

    def constant(self, a, p, *xs):
        value, repeats = p["value"], len(xs[0]) if xs and len(p["value"]) == 1 else 1
        return np.repeat(value, fits(repeats, value.size)[0], 0) if xs else value

    def compare(self, a, p, x, y):
        names = {"eq": "equal", "ne": "not_equal", "lt": "less", "gt": "greater"}
        names |= {"le": "less_equal", "ge": "greater_equal"}
        parts = zip(_about(a, (x, y)), a["multipliers"], a["exponents"], strict=True)
        sides = (np.ldexp((q * m).astype("f4").astype("f8"), e) for q, m, e in parts)
        return getattr(np, names[a["kind"]])(*sides)

    def reshape(self, a, p, x):
        need(min(a["sizes"], default=0) >= -1, f"sizes are {a['sizes']}")
        sizes, known = a["sizes"], math.prod(n for n in a["sizes"] if n != -1)
        rest = x.size // known if known else len(x) if -1 in sizes else 0
        return x.reshape([rest if n == -1 else n for n in sizes])

    def broadcast(self, a, p, x):
        rises = [*a["dimensions"]] == sorted(set(a["dimensions"]))
        need(rises, f"dimensions {a['dimensions']} do not rise")
        own = dict(zip(a["dimensions"], x.shape, strict=True))
        sizes = [own[d] if n is None else n for d, n in enumerate(a["sizes"])]
        x = x.reshape([own.get(d, 1) for d in range(len(sizes))])
        return np.broadcast_to(x, fits(*sizes))

    def slice(self, a, p, x):
        need(len(a["start"]) == x.ndim, "a slice has other axes than its input")
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

    def masked_norm(self, a, p, x, mask):
        self.spend(x.size << 14)  # Integers without end are slow.
        own, most = dict(zip(a["axes"], a["groups"], strict=True)), a["most_places"]
        pairs = [(own.get(d, 1), m // own.get(d, 1)) for d, m in enumerate(x.shape)]
        over, parts = tuple(2 * d + 1 for d in own), sum(pairs, ())
        q = (x - a["input_zero_points"][0]).astype(object).reshape(parts)
        m = np.broadcast_to(mask, x.shape).astype(object).reshape(parts)
        count, total, v = (
            y.sum(over, keepdims=True, initial=0) for y in (m, m * q, m * q * q)
        )
        count = np.maximum(count, a["least"])
        total = total if a["is_centred"] else 0 * total
        v = count * v - total * total
        of = np.frompyfunc(lambda v, n: _root_of_parts(a, v, n), 2, 2)
        root, down = of(v, count)
        down = down - (30 - ((most - 1).bit_length() + 1) // 2)
        t, e = np.frompyfunc(_of_30_bits, 2, 2)((count * q - total) * root, down)
        t, e = (y.reshape(x.shape).astype("i8") for y in (t, e))
        bias = (p["bias"] << a["bias_shift"]) >> np.minimum(e, a["shift"])
        steps = _floored(t * p["multiplier"] + bias, np.maximum(a["shift"] - e, 0))
        return _clipped(steps, a)

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
        """Computes a graph, each value held against its interval."""
        values, env = graph["values"], dict(zip(graph["inputs"], inputs, strict=True))
        for v in graph["inputs"]:
            self.hold(values[v], env[v], f"input %{v}")
        for node in graph["nodes"]:
            name, own, xs = node["operation"], {}, [env[v] for v in node["inputs"]]
            p = {role: self.params[k] for role, k in node.get("params", {}).items()}
            if name in ("add", "multiply", "multiply_codes", "maximum", "minimum"):
                fits(*np.broadcast_shapes(*(x.shape for x in [*xs, *p.values()])))
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
        inside = low <= ends[0] <= ends[1] <= high and holds(value["dtype"], low, high)
        need(inside, f"{where} is in {[*ends]}, beyond [{low}, {high}]")
        self.spend(x.size + 1)
        self.seen += 1

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
    tflite_constant = lambda self, a, p: p["value"]
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
