"""An interpreter of native plans in NumPy: int64, step by step, without the library."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.backends.native.plan import NativePlan
from qjax.graph.operations import OPERATIONS
from qjax.graph.operations.arithmetic import KINDS

DTYPES = ("int8", "uint8", "int16", "uint16", "int32")
RULES = ("half_even", "tflite_double", "tflite_single", "fp32_half_even")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
TYPES = (*DTYPES, "bool")


class Words:
    """Words, read one after the other."""

    def __init__(self, words: Any) -> None:
        self.words, self.at = list(map(int, words)), 0

    def one(self) -> int:
        self.at += 1
        return self.words[self.at - 1]

    def many(self, count: int) -> list[int]:
        return [self.one() for _ in range(count)]

    @property
    def is_done(self) -> bool:
        return self.at == len(self.words)


class Machine:
    """A plan with its memory; views of one place share it."""

    def __init__(self, words: Any, constants: np.ndarray) -> None:
        self.constants, w = constants, Words(words)
        assert w.many(2) == [0x716A6178, 3]
        buffers, self.inputs, self.outputs, steps, arena = w.many(5)
        self.arena = np.full(arena, 0x5A, np.uint8)
        self.buffers = [w.many(4) for _ in range(buffers)]
        self.steps = [(w.one(), w.many(w.one())) for _ in range(steps)]
        assert w.is_done

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        self.made: list[Any] = [None] * self.outputs
        self.given = [np.ascontiguousarray(x).reshape(-1) for x in inputs]
        for dtype, n, kind, place in self.buffers:
            if kind == 2:
                self.made[place] = np.full(n, 77).astype(DTYPES[dtype])
            if kind == 1:
                own = self.given[place]
                assert (own.size, str(own.dtype)) == (n, DTYPES[dtype])
        for kind, words in self.steps:
            w = Words(words)
            STEPS[kind](self, w)
            assert w.is_done, kind
        return self.made

    def flat(self, b: int) -> np.ndarray:
        dtype, n, kind, place = self.buffers[b]
        if kind == 1:
            return self.given[place]
        if kind == 2:
            return self.made[place]
        memory = self.arena if kind == 0 else self.constants
        assert place % 64 == 0
        size = n * np.dtype(DTYPES[dtype]).itemsize
        assert place + size <= memory.size
        return memory[place : place + size].view(DTYPES[dtype])

    def read(self, b: int) -> np.ndarray:
        return self.flat(b).astype(np.int64)

    def write(self, b: int, x: Any) -> None:
        own = self.flat(b)
        x = np.asarray(x).reshape(-1)
        assert x.size == own.size
        own[:] = x.astype(own.dtype)

    def table(self, at: int, count: int, dtype: str = "int32") -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        assert at % 64 == 0 and at + size <= self.constants.size
        return self.constants[at : at + size].view(dtype).astype(np.int64)


def places(sizes: list[int], strides: list[int], offset: int) -> np.ndarray:
    found = np.full(sizes, offset, np.int64)
    for d, (n, s) in enumerate(zip(sizes, strides, strict=True)):
        shape = [1] * len(sizes)
        shape[d] = n
        found = found + (np.arange(n) * s).reshape(shape)
    return found


def wrap(x: np.ndarray) -> np.ndarray:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def fill(m: Machine, w: Words) -> None:
    out, code = w.many(2)
    assert np.array(code).astype(m.flat(out).dtype) == code
    m.flat(out)[:] = code


def copy(m: Machine, w: Words) -> None:
    x, out, rank = w.many(3)
    sizes = w.many(rank)
    source = places(sizes, *reversed([w.one(), w.many(rank)]))
    target = places(sizes, *reversed([w.one(), w.many(rank)]))
    assert source.min() >= 0 and target.min() >= 0
    assert np.unique(target).size == target.size
    own = m.flat(out)
    own[target] = m.read(x)[source].astype(own.dtype)


def requantize(m: Machine, w: Words) -> None:
    x, out, outer, channels, inner, multiplier, shift, zero = w.many(8)
    zero_point, low, high, rule, is_wide, acc_low, acc_high = w.many(7)
    acc = m.read(x).reshape(outer, channels, inner)
    assert acc_low <= acc.min() and acc.max() <= acc_high
    pair = [m.table(at, channels)[:, None] for at in (multiplier, shift)]
    m.write(out, rescaled(acc, pair, zero, zero_point, low, high, rule))


def rescaled(acc, pair, zero, zero_point, low, high, rule):
    attributes = {
        "input_zero_point": zero,
        "zero_point": zero_point,
        "low": low,
        "high": high,
        "rule": RULES[rule],
    }
    own = dict(zip(("multiplier", "shift"), pair, strict=True))
    return OPERATIONS["requantize"].meaning(attributes, own, [acc])


def add(m: Machine, w: Words) -> None:
    out, count, n = w.many(3)
    terms = [w.many(3) for _ in range(n)]
    shift, zero_point, low, high = w.many(4)
    attributes = {
        "input_zero_points": [t[1] for t in terms],
        "multipliers": [t[2] for t in terms],
        "shift": shift,
        "zero_point": zero_point,
        "low": low,
        "high": high,
    }
    xs = [m.read(t[0]) for t in terms]
    assert all(x.size == count for x in xs)
    m.write(out, OPERATIONS["add"].meaning(attributes, {}, xs))


def clip(m: Machine, w: Words) -> None:
    x, out, _, low, high = w.many(5)
    m.write(out, np.clip(m.read(x), low, high))


def product(m: Machine, w: Words) -> None:
    x, out, offset, batch, groups, channels, outputs = w.many(7)
    sizes, ins, padding, spread = w.many(3), w.many(5), w.many(6), w.many(3)
    code = w.one()
    taps, strides, dilation, out_sizes, outs = (w.many(n) for n in (3, 3, 3, 3, 5))
    kernel_dtype, kernel, bias, shift, low, high, epilogue = w.many(7)
    assert kernel_dtype in (0, 2) and m.buffers[x][0] < 4
    all_channels = groups * channels
    where = places([batch, *sizes, all_channels], ins, 0)
    codes = m.read(x)[where]
    count = int(np.prod(taps)) * all_channels * outputs
    weights = m.table(kernel, count, DTYPES[kernel_dtype])
    weights = weights.reshape(groups, *taps, channels, outputs)
    weights = np.moveaxis(weights, 0, -2).reshape(*taps, channels, groups * outputs)
    attributes = {
        "strides": strides,
        "padding": [padding[2 * d : 2 * d + 2] for d in range(3)],
        "input_dilation": spread,
        "dilation": dilation,
        "groups": groups,
        "dimensions": [[0, 4, 1, 2, 3], [4, 3, 0, 1, 2], [0, 4, 1, 2, 3]],
        "padding_code": code,
        "offset": offset,
        "shift": shift,
    }
    own = {"kernel": weights, "bias": m.table(bias, groups * outputs)}
    acc = wrap(OPERATIONS["conv"].meaning(attributes, own, [codes]))
    assert acc.shape == (batch, *out_sizes, groups * outputs)
    assert low <= acc.min() and acc.max() <= high
    if epilogue:
        multiplier, its_shift, *rest = w.many(7)
        pair = [m.table(at, groups * outputs) for at in (multiplier, its_shift)]
        acc = rescaled(acc, pair, *rest)
    target = places([batch, *out_sizes, groups * outputs], outs, 0)
    assert np.unique(target).size == m.flat(out).size
    m.flat(out)[target] = acc.astype(m.flat(out).dtype)


def matmul(m: Machine, w: Words) -> None:
    a, b, out, batch, rows, terms, columns, za, zb = w.many(9)
    assert max(m.buffers[a][0], m.buffers[b][0]) < 4
    x = m.read(a).reshape(batch, rows, terms) - za
    y = m.read(b).reshape(batch, columns, terms) - zb
    m.write(out, wrap(np.einsum("bmk,bnk->bmn", x, y)))


def pair(m: Machine, w: Words) -> None:
    kind, a, b, out, rank = w.many(5)
    sizes = w.many(rank)
    x = m.read(a)[places(sizes, *reversed([w.one(), w.many(rank)]))]
    y = m.read(b)[places(sizes, *reversed([w.one(), w.many(rank)]))]
    za, zb = w.many(2)
    if kind == 0:
        m.write(out, wrap((x - za) * (y - zb)))
    else:
        m.write(out, np.maximum(x, y) if kind == 1 else np.minimum(x, y))


def multiply(m: Machine, w: Words) -> None:
    x, out, outer, channels, inner, kernel, bias, offset, shift = w.many(9)
    q = m.read(x).reshape(outer, channels, inner) - offset
    k, b = (m.table(at, channels)[:, None] for at in (kernel, bias))
    m.write(out, wrap((q * k << shift) + b))


def table(m: Machine, w: Words) -> None:
    x, out, outer, channels, inner, at, dtype, rows, low = w.many(9)
    own = m.table(at, rows * channels, DTYPES[dtype]).reshape(rows, channels)
    place = np.clip(m.read(x).reshape(outer, channels, inner) - low, 0, rows - 1)
    m.write(out, own[place, np.arange(channels)[:, None]])


def thresholds(m: Machine, w: Words) -> None:
    x, out, outer, channels, inner, cuts, at, count = w.many(8)
    own = m.table(cuts, channels * count).reshape(channels, count)
    rows = m.table(at, channels * (count + 1)).reshape(channels, count + 1)
    q = m.read(x).reshape(outer, channels, inner)
    found = (q[..., None] >= own[:, None]).sum(-1)
    m.write(out, rows[np.arange(channels)[:, None], found])


def reduce(m: Machine, w: Words) -> None:
    kind, x, out, outer, n, inner, bias = w.many(7)
    q = m.read(x).reshape(outer, n, inner)
    of = (np.sum, np.max, np.min, np.argmax, np.argmin)[kind]
    found = of(q, axis=1)
    m.write(out, wrap(found + bias) if kind == 0 else found)


def window(m: Machine, w: Words) -> None:
    kind, x, out, rank = w.many(4)
    sizes, strides = w.many(rank), w.many(rank)
    offset, count = w.many(2)
    taps = w.many(count)
    bias = w.one()
    first = places(sizes, strides, offset)
    seen = m.read(x)[np.stack([first + t for t in taps])]
    found = (np.sum, np.max, np.min)[kind](seen, axis=0)
    m.write(out, wrap(found + bias) if kind == 0 else found)


def running_sum(m: Machine, w: Words) -> None:
    x, out, outer, n, inner, reverse, zero, bias = w.many(8)
    q = m.read(x).reshape(outer, n, inner) - zero
    turn = slice(None, None, -1 if reverse else 1)
    m.write(out, wrap(q[:, turn].cumsum(1)[:, turn] + bias))


def select(m: Machine, w: Words) -> None:
    which, out, count, n = w.many(4)
    cases, is_scalar = w.many(n), w.one()
    number = m.read(which)
    assert number.size == (1 if is_scalar else count)
    assert all(m.buffers[c][0] == m.buffers[out][0] for c in cases)
    m.write(out, np.choose(np.broadcast_to(number, count), [m.read(c) for c in cases]))


def compare(m: Machine, w: Words) -> None:
    kind, a, b, out, _, za, zb, m0, e0, m1, e1 = w.many(11)
    attributes = {
        "kind": COMPARISONS[kind],
        "zero_points": [za, zb],
        "multipliers": [m0, m1],
        "exponents": [e0, e1],
    }
    xs = [m.read(a), m.read(b)]
    m.write(out, OPERATIONS["compare"].meaning(attributes, {}, xs))


def arithmetic(m: Machine, w: Words) -> None:
    kind, dtype, rank = w.many(3)
    sizes = w.many(rank)
    x, first = w.one(), w.many(rank)
    y, second = w.one(), w.many(rank)
    out = w.one()
    xs = [m.read(x)[places(sizes, first, 0)], m.read(y)[places(sizes, second, 0)]]
    ones = ("neg", "abs", "sign", "not", "convert")
    xs = xs[:1] if KINDS[kind] in ones else xs
    attributes = {"kind": KINDS[kind], "dtype": TYPES[dtype]}
    m.write(out, OPERATIONS["arithmetic"].meaning(attributes, {}, xs))


def embed(m: Machine, w: Words) -> None:
    x, out, count, rows, width, at, dtype = w.many(7)
    kernel = m.table(at, rows * width, DTYPES[dtype]).reshape(rows, width)
    m.write(out, kernel[m.read(x)])


def take(m: Machine, w: Words) -> None:
    x, out, outer, size, count, at = w.many(6)
    m.write(out, m.read(x).reshape(outer, size)[:, m.table(at, count)])


def divide(m: Machine, w: Words) -> None:
    a, b, out, _, *zeros = w.many(6)
    names = "multiplier", "shift", "zero_point", "low", "high"
    attributes = dict(zip(names, w.many(5), strict=True)) | {"zero_points": zeros}
    xs = [m.read(a), m.read(b)]
    m.write(out, OPERATIONS["divide"].meaning(attributes, {}, xs))


def softmax(m: Machine, w: Words) -> None:
    kind, x, mask, mask_rows, out, outer, n, at, rows = w.many(9)
    names = "most_places", "empty", "plus", "zero", "input_multiplier", "input_shift"
    names = *names, "multiplier", "shift", "zero_point", "low", "high"
    a: dict[str, Any] = dict(zip(names, w.many(11), strict=True))
    a["empty"] = ("zero", "all", "uniform")[a["empty"]]
    a |= {"axes": [1], "input_zero_points": [a["zero"]], "keepdims": False}
    xs = [m.read(x).reshape(outer, n)]
    if mask >= 0:
        own = m.read(mask).reshape(mask_rows, n)
        xs.append(own[np.arange(outer) % mask_rows])
    name = ("softmax", "log_softmax", "logsumexp")[kind]
    m.write(out, OPERATIONS[name].meaning(a, {"table": m.table(at, rows)}, xs))


def norm(m: Machine, w: Words) -> None:
    x, out, outer, n, period, multiplier, bias = w.many(7)
    names = "is_centred", "count", "epsilon", "floor", "point", "more", "zero"
    names = *names, "shift", "bias_shift", "zero_point", "low", "high"
    a: dict[str, Any] = dict(zip(names, w.many(12), strict=True))
    a |= {"axes": [1], "groups": [1], "input_zero_points": [a["zero"]]}
    own = {}
    for role, at in (("multiplier", multiplier), ("bias", bias)):
        rows = m.table(at, period * n).reshape(period, n)
        own[role] = rows[np.arange(outer) % period]
    found = OPERATIONS["norm"].meaning(a, own, [m.read(x).reshape(outer, n)])
    m.write(out, found)


def masked_norm(m: Machine, w: Words) -> None:
    x, mask, mask_rows, out, outer, n, period, multiplier, bias = w.many(9)
    names = "is_centred", "most_places", "least", "epsilon", "floor", "point", "zero"
    names = *names, "shift", "bias_shift", "zero_point", "low", "high"
    a: dict[str, Any] = dict(zip(names, w.many(12), strict=True))
    a |= {"axes": [1], "groups": [1], "input_zero_points": [a["zero"], 0]}
    own = {}
    for role, at in (("multiplier", multiplier), ("bias", bias)):
        rows = m.table(at, period * n).reshape(period, n)
        own[role] = rows[np.arange(outer) % period]
    kept = m.read(mask).reshape(mask_rows, n)[np.arange(outer) % mask_rows]
    xs = [m.read(x).reshape(outer, n), kept]
    m.write(out, OPERATIONS["masked_norm"].meaning(a, own, xs))


def loop(m: Machine, w: Words) -> None:
    length, is_reversed, consts, carries, xs, ys = w.many(6)
    given = [w.many(n) for n in (consts, carries, xs)]
    made = [w.many(n) for n in (carries, ys)]
    arena, count = w.many(2)
    words = w.many(count)
    inner = Machine(words, m.constants)
    assert inner.arena.size == m.flat(arena).size
    carry = [m.flat(b).copy() for b in given[1]]
    steps = range(length)[::-1] if is_reversed else range(length)
    for t in steps:
        own = [m.flat(b).reshape(length, -1)[t] for b in given[2]]
        found = inner.run([*(m.flat(b) for b in given[0]), *carry, *own])
        carry = [x.copy() for x in found[:carries]]
        for b, x in zip(made[1], found[carries:], strict=True):
            m.flat(b).reshape(length, -1)[t] = x
    for b, x in zip(made[0], carry, strict=True):
        assert m.flat(b).dtype == x.dtype
        m.flat(b)[:] = x


def tflite_add(m: Machine, w: Words) -> None:
    a, b, out, _, left, za, zb, ma, sa, mb, sb = w.many(11)
    names = "multiplier", "shift", "zero_point", "low", "high", "rule"
    attributes: dict[str, Any] = dict(zip(names, w.many(6), strict=True))
    attributes |= {
        "rule": RULES[attributes["rule"]],
        "left_shift": left,
        "zero_points": [za, zb],
        "multipliers": [ma, mb],
        "shifts": [sa, sb],
    }
    xs = [m.read(a), m.read(b)]
    m.write(out, OPERATIONS["tflite_add"].meaning(attributes, {}, xs))


def tflite_average(m: Machine, w: Words) -> None:
    x, out, outer, channels, inner, counts, low, high = w.many(8)
    own = {"counts": m.table(counts, channels)[:, None]}
    acc = m.read(x).reshape(outer, channels, inner)
    ends = {"low": low, "high": high}
    m.write(out, OPERATIONS["tflite_average"].meaning(ends, own, [acc]))


def tflite_softmax(m: Machine, w: Words) -> None:
    x, out, outer, n, table_at, rows, low, high = w.many(8)
    own = {"exponentials": m.table(table_at, rows)}
    ends = {"low": low, "high": high}
    xs = [m.read(x).reshape(outer, n)]
    m.write(out, OPERATIONS["tflite_softmax"].meaning(ends, own, xs))


def windows(m: Machine, w: Words) -> tuple[Any, Any, Any]:
    """Places in an operand and in what has its windows, and which are inside."""
    places_at, is_clipped, rank = w.many(3)
    batch, ps, xs, outs = (w.many(rank) for _ in range(4))
    coordinates = w.one()
    steps, lasts = w.many(coordinates), w.many(coordinates)
    axes = w.one()
    sizes, own, to = (w.many(axes) for _ in range(3))
    more = [1] * axes
    at = places([*batch, *sizes], [*xs, *own], 0)
    inside = np.ones([*batch, *more], bool)
    for k, (step, last) in enumerate(zip(steps, lasts, strict=True)):
        start = m.read(places_at)[places(batch, ps, k)].reshape([*batch, *more])
        inside &= bool(is_clipped) | ((start >= 0) & (start <= last))
        at = at + np.clip(start, 0, last) * step
    return (
        at,
        places([*batch, *sizes], [*outs, *to], 0),
        inside | np.zeros_like(at, bool),
    )


def gather(m: Machine, w: Words) -> None:
    x, out, code = w.many(3)
    at, to, inside = windows(m, w)
    assert np.unique(to).size == to.size and m.buffers[x][0] == m.buffers[out][0]
    m.flat(out)[to] = np.where(inside, m.flat(x)[at], code)


def scatter(m: Machine, w: Words) -> None:
    kind, x, out, zero = w.many(4)
    to, at, inside = windows(m, w)
    new, found = m.read(x)[at][inside] - zero, m.read(out)
    for place, update in zip(to[inside], new, strict=True):
        own = found[place]
        joined = update, own + update, max(own, update), min(own, update)
        found[place] = joined[kind]
    m.write(out, wrap(found))


def sort(m: Machine, w: Words) -> None:
    kind, x, out, outer, n, inner = w.many(6)
    q = m.read(x).reshape(outer, n, inner)
    order = np.argsort(-q if kind == 2 else q, 1, kind="stable")
    m.write(out, order if kind else np.take_along_axis(q, order, 1))


def resize(m: Machine, w: Words) -> None:
    x, out, batch = w.many(3)
    (h, rows, first), (v, columns, second), channels = w.many(3), w.many(3), w.one()
    own = {
        "rows": m.table(first, 3 * rows).reshape(3, rows),
        "columns": m.table(second, 3 * columns).reshape(3, columns),
    }
    xs = [m.read(x).reshape(batch, h, v, channels)]
    m.write(out, OPERATIONS["tflite_resize"].meaning({}, own, xs))


def log_softmax(m: Machine, w: Words) -> None:
    x, out, outer, n, at, rows, steps, zero, low, high = w.many(10)
    own = {"exponentials": m.table(at, rows), "steps": m.table(steps, rows)}
    ends = {"zero_point": zero, "low": low, "high": high}
    xs = [m.read(x).reshape(outer, n)]
    m.write(out, OPERATIONS["tflite_log_softmax"].meaning(ends, own, xs))


def l2_norm(m: Machine, w: Words) -> None:
    x, out, outer, n, zero, low, high = w.many(7)
    ends = {"input_zero_points": [zero], "low": low, "high": high}
    xs = [m.read(x).reshape(outer, n)]
    m.write(out, OPERATIONS["tflite_l2_norm"].meaning(ends, {}, xs))


def softmax16(m: Machine, w: Words) -> None:
    x, out, outer, n, at, rows, reciprocals, high = w.many(8)
    own = {
        "exponentials": m.table(at, rows),
        "reciprocals": m.table(reciprocals, 1 << 16),
    }
    xs = [m.read(x).reshape(outer, n)]
    m.write(out, OPERATIONS["tflite_softmax16"].meaning({"high": high}, own, xs))


def contraction(m: Machine, w: Words) -> None:
    x, y, out, zx, zy, shift, free, summed = w.many(8)
    sizes = w.many(free + summed)
    xs, ys, outs = w.many(free + summed), w.many(free + summed), w.many(free)
    p, q = (m.read(b)[places(sizes, s, 0)] for b, s in ((x, xs), (y, ys)))
    total = ((p - zx) * (q - zy) << shift).sum(tuple(range(free, free + summed)))
    to = places(sizes[:free], outs, 0)
    assert np.unique(to).size == to.size
    m.flat(out)[to] = wrap(m.read(out)[to] + total)


_ORDER: tuple[Callable[[Machine, Words], None], ...] = (
    *(fill, copy, requantize, add, clip, product, matmul, pair, multiply, table),
    *(thresholds, reduce, window, running_sum, select, compare, arithmetic, embed),
    *(take, divide, softmax, norm, loop, tflite_add, tflite_average, tflite_softmax),
    *(gather, scatter, sort, resize, log_softmax, l2_norm, softmax16, contraction),
    masked_norm,
)
STEPS = dict(zip(itertools.count(1), _ORDER, strict=False))


def interpret(plan: NativePlan, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Computes the outputs of a plan."""
    found = Machine(plan.words, plan.constants).run(inputs)
    return [x.reshape(s) for x, (s, _) in zip(found, plan.outputs, strict=True)]
