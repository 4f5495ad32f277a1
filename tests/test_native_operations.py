"""Every native step against the record of its operation, integer for integer."""

import math
import pathlib

import numpy as np
import pytest

from qjax.backends.native.library import NativeKernel, find_library
from qjax.backends.native.plan import NATIVE, make_plan
from qjax.graph import reference
from qjax.graph.graph import Graph, Grid, Node, Value, storage
from qjax.graph.operations import OPERATIONS, Operands
from tests.native_plans import interpret

FOUND = find_library()
pytestmark = pytest.mark.skipif(FOUND.library is None, reason=FOUND.reason)
INT32 = np.iinfo(np.int32)
RULES = ("half_even", "fp32_half_even", "tflite_double", "tflite_single")


def draw(shape, dtype="int8", seed=0, low=None, high=None):
    info = np.iinfo(dtype)
    low, high = (info.min if low is None else low), (info.max if high is None else high)
    values = np.random.default_rng(seed).integers(low, high + 1, size=shape)
    return values.astype(dtype)


def node_graph(operation, xs, params, attributes, zeros=None, ends=None):
    """One node over inputs that may hold any integer of their type, or of `ends`."""
    values = []
    for k, x in enumerate(xs):
        info = np.iinfo(x.dtype)
        low, high = (info.min, info.max) if ends is None else ends[k]
        grid = Grid(1.0, 0 if zeros is None else zeros[k])
        values.append(Value(x.shape, str(x.dtype), int(low), int(high), grid))
    record = OPERATIONS[operation]
    outcome = record.outputs(Operands(attributes, values, params))
    for shape, (low, high) in outcome:
        is_there = np.size(low) and np.size(high)
        low, high = (int(np.min(low)), int(np.max(high))) if is_there else (0, 0)
        low, high = max(low, INT32.min), min(high, INT32.max)
        values.append(Value(tuple(shape), storage(low, high), low, high))
    first, *others = range(len(xs), len(values))
    own = {role: role for role in params}
    inputs = tuple(range(len(xs)))
    node = Node(operation, inputs, first, own, attributes, others=tuple(others))
    return Graph(tuple(values), (node,), inputs, (first, *others), {})


def check(operation, xs, params=None, attributes=None, zeros=None, ends=None):
    params = params or {}
    graph = node_graph(operation, xs, params, attributes or {}, zeros, ends)
    plan = make_plan(graph, params, [x.shape for x in xs])
    values = reference.run(graph, params, xs)
    kernel = NativeKernel(FOUND.library, plan)
    xs = [np.ascontiguousarray(x) for x in xs]
    for found in (interpret(plan, xs), kernel.run(xs, 1), kernel.run(xs, 3)):
        for x, v in zip(found, graph.outputs, strict=True):
            assert str(x.dtype) == graph.values[v].dtype
            np.testing.assert_array_equal(x, values[v], err_msg=operation)


def accumulators(multiplier, shift, count=400):
    """Ends of int32, what lies about 0, and ties with their neighbours."""
    tie = np.arange(-60, 60) * 2 + 1
    power = int(shift) - 1 - (int(multiplier) & -int(multiplier)).bit_length() + 1
    ties = tie << max(power, 0) if power < 24 else tie
    near = np.concatenate([ties + d for d in (-1, 0, 1)])
    ends = [INT32.min, INT32.min + 1, -1, 0, 1, INT32.max - 1, INT32.max]
    some = draw(count, "int32")
    return np.concatenate([ends, near, some]).astype(np.int64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_channels", [False, True])
def test_requantize_at_ties_ends_and_both_signs(rule, is_channels):
    pairs = [(1 << 30, 31), (1 << 30, 40), (3 << 29, 33), (1518500250, 35)]
    pairs += [(1 << 30, 30), ((1 << 31) - 1, 37), (1 << 30, 62), (1, 0), (0, 0)]
    if rule in ("half_even", "fp32_half_even"):
        pairs += [(-m, s) for m, s in pairs]
        pairs += [(1, 3), (-3, 5), (1 << 20, 24)]
    for low, high, zero_point in ((-128, 127, 3), (0, 255, 0), (-8, 7, -1)):
        attributes = {
            "input_zero_point": 0,
            "zero_point": zero_point,
            "rule": rule,
            "low": low,
            "high": high,
        }
        columns = [accumulators(*pair) for pair in pairs]
        if is_channels:
            x = np.stack(columns, -1).astype(np.int32)
            own = np.array(pairs, np.int32).T
            params = {"multiplier": own[:1], "shift": own[1:]}
            check("requantize", [x], params, attributes)
            continue
        for x, (m, s) in zip(columns, pairs, strict=True):
            params = {"multiplier": np.int32(m), "shift": np.int32(s)}
            check("requantize", [x.astype(np.int32)], params, attributes)


@pytest.mark.parametrize("rule", RULES)
def test_forms_are_exact_over_a_whole_interval(rule):
    """Each integer of an interval, where a proof or all of its steps allow a form."""
    rng, forms = np.random.default_rng(7), set()
    x = np.arange(-20000, 20001, dtype=np.int32)
    for k in range(40):
        multiplier = 1 << 30 if k % 8 == 4 else int(rng.integers(1 << 30, INT32.max))
        shift = int(rng.integers(33, 46)) if k % 8 else [62, 61, 31, 32, 45][k // 8]
        low, high = [(-128, 127), (0, 255), (-7, 7), (-20000, 20000)][k % 4]
        attributes = {
            "input_zero_point": int(rng.integers(-9, 10)) * (k % 3 == 0),
            "zero_point": int(rng.integers(low, high + 1)),
            "rule": rule,
            "low": low,
            "high": high,
        }
        params = {"multiplier": np.int32(multiplier), "shift": np.int32(shift)}
        ends = [(-20000, 20000)]
        zeros = [attributes["input_zero_point"]]
        graph = node_graph("requantize", [x], params, attributes, zeros, ends)
        plan = make_plan(graph, params, [x.shape])
        forms |= set(NativeKernel(FOUND.library, plan).explain())
        check("requantize", [x], params, attributes, zeros, ends)
    assert {"high word", "64 bits"} <= forms or rule == "tflite_double", forms


@pytest.mark.parametrize("rule", RULES)
def test_dead_channels_and_large_accumulators_take_a_form(rule):
    """Shifts of channels that give nothing, at both sides of half a step."""
    forms = set()
    for far in ((1 << 30) + 128, (3 << 29) - 1, 3 << 29, 20000):
        ends = np.array([-far, -far + 1, -1, 0, 1, far - 1, far])
        x = np.concatenate([ends, draw(200, "int32", 3, -far, far)])
        half = (1 << 61) // far  # Of shift 62.
        at = [half + d for d in (-2, -1, 0, 1, 2) if half + d <= INT32.max]
        pairs = [(INT32.max, 62), (1876368393, 62), (1 << 30, 62), (1, 33)]
        pairs += [(m, 62) for m in at] + [(3 << 29, 40), (1518500250, 36)]
        pairs += [(0, 31)] if rule == "tflite_double" else []
        if rule in ("half_even", "fp32_half_even"):
            pairs += [(-m, s) for m, s in pairs]
        for low, high, zero_point in ((-128, 127, -5), (0, 255, 0)):
            attributes = {"input_zero_point": 0, "zero_point": zero_point, "rule": rule}
            attributes |= {"low": low, "high": high}
            columns = np.stack([x] * len(pairs), -1).astype(np.int32)
            own = np.array(pairs, np.int32).T
            params = {"multiplier": own[:1], "shift": own[1:]}
            graph = node_graph(
                "requantize", [columns], params, attributes, ends=[(-far, far)]
            )
            plan = make_plan(graph, params, [columns.shape])
            forms |= set(NativeKernel(FOUND.library, plan).explain())
            check("requantize", [columns], params, attributes, ends=[(-far, far)])
    form = {"tflite_double": "double rounding", "tflite_single": "high word"}.get(rule)
    assert form is None or {form, "64 bits"} <= forms


@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("uint8", "int8")])
def test_sums_of_two_bytes_over_all_pairs(dtypes):
    """Under TFLite's rules and qjax's own, in the fast form where one is found."""
    pairs = [
        np.arange(256).astype(d) if d == "uint8" else np.arange(-128, 128).astype(d)
        for d in dtypes
    ]
    a, b = (np.ascontiguousarray(x) for x in np.meshgrid(*pairs))
    rng, forms = np.random.default_rng(5), []
    for k in range(12):
        first, second, last = (int(m) for m in rng.integers(1 << 30, INT32.max, 3))
        shifts = [int(s) for s in rng.integers(31, 36, 2)]
        zeros = [int(z) for z in rng.integers(-128, 128, 2)]
        ends = {"zero_point": int(rng.integers(-128, 128)), "low": -128, "high": 127}
        if k % 3 == 2:
            ends = {"zero_point": 7, "low": 7, "high": 255}
        attributes = {"left_shift": 20, "zero_points": zeros, "shifts": shifts, **ends}
        attributes |= {"multipliers": [first, second], "multiplier": last}
        attributes |= {"shift": int(rng.integers(47, 52)), "rule": RULES[2 + k % 2]}
        graph = node_graph("tflite_add", [a, b], {}, attributes, zeros)
        plan = make_plan(graph, {}, [a.shape, b.shape])
        forms += NativeKernel(FOUND.library, plan).explain()
        check("tflite_add", [a, b], {}, attributes, zeros)
        own = {
            "input_zero_points": zeros,
            "multipliers": [first, -second][:: 1 - k % 2 * 2],
        }
        check("add", [a, b], {}, {**own, "shift": 31 + k, **ends}, zeros)
    assert forms.count("two parts of 16 bits") >= 9


def conv(x, kernel, *, bias=None, groups=1, first=False, **options):
    """A convolution with channels last, or first."""
    rank = x.ndim - 2
    last, space = rank + 1, list(range(1, rank + 1))
    order = [[0, last, *space], [last, rank, *range(rank)], [0, last, *space]]
    bias = draw(kernel.shape[-1], "int16", 5).astype(np.int32) if bias is None else bias
    bias = bias.reshape((1,) * last + (-1,))
    if first:
        x, bias = np.moveaxis(x, -1, 1), np.moveaxis(bias, -1, 1)
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
        order = [list(range(rank + 2))] * 3
    offset = {"uint8": 128, "uint16": 1 << 15}.get(str(x.dtype), 0)
    attributes = {
        "strides": [1] * rank,
        "padding": [[0, 0]] * rank,
        "input_dilation": [1] * rank,
        "dilation": [1] * rank,
        "groups": groups,
        "dimensions": order,
        "padding_code": offset,
        "offset": offset,
        "shift": 0,
        **options,
    }
    zeros = [attributes["padding_code"]]
    check("conv", [x], {"kernel": kernel, "bias": bias}, attributes, zeros)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("first", [False, True])
def test_convolutions(dtype, first):
    small = {"low": -3, "high": 3} if dtype.endswith("16") else {}
    kernel = lambda *shape: draw(shape, "int8", 1, **small)
    options = {"first": first}
    conv(draw((2, 6, 5, 3), dtype), kernel(3, 3, 3, 7), **options)
    pad = {"padding": [[1, 1], [0, 2]], "padding_code": 9}
    conv(
        draw((2, 6, 5, 3), dtype), kernel(3, 3, 3, 7), strides=[2, 1], **pad, **options
    )
    conv(draw((1, 6, 5, 8), dtype), kernel(3, 3, 1, 8), groups=8, **pad, **options)
    conv(draw((1, 6, 5, 8), dtype), kernel(2, 2, 4, 6), groups=2, **options)
    conv(draw((1, 6, 5, 4), dtype), kernel(3, 2, 4, 5), dilation=[1, 2], **options)
    spread = {"input_dilation": [2, 2], **pad}
    conv(draw((1, 4, 4, 4), dtype), kernel(3, 3, 4, 5), **spread, **options)
    conv(draw((2, 9, 5), dtype), kernel(3, 5, 4), padding=[[-1, 2]], **options)
    conv(draw((1, 4, 5, 3, 2), dtype), kernel(2, 2, 2, 2, 33), **options)
    conv(draw((3, 4, 4, 16), dtype), kernel(1, 1, 16, 40), shift=3, **options)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("channels", [2, 5, 8, 15, 16, 17, 32, 40])
def test_depthwise_products_of_bytes(dtype, channels):
    own = {"groups": channels, "padding_code": 9}
    one = {**own, "padding": [[1, 1], [1, 1]]}
    two = {**own, "padding": [[2, 2], [3, 2]]}

    def of(shape, taps, first=False, **options):
        x = draw((*shape, channels), dtype)
        conv(x, draw((*taps, 1, channels), "int8", 1), first=first, **options)

    of((2, 7, 9), (3, 3), **one)
    of((1, 3, 2), (3, 3), **one)
    of((2, 9, 8), (3, 3), strides=[2, 2], **one)
    of((1, 9, 8), (3, 3), strides=[1, 3], **one)
    of((1, 9, 8), (5, 5), **two)
    of((1, 9, 9), (3, 3), dilation=[2, 2], **two)
    of((1, 5, 4), (2, 3), input_dilation=[2, 2], **one)
    of((1, 5, 4), (3, 3), first=True, **one)
    of((1, 5, 9), (3, 1), **own)
    of((2, 12), (7,), **own)
    of((1, 3, 4, 6), (2, 3, 3), **own)
    of((1, 6, 5), (3, 3), **{**one, "padding": [[-1, 1], [1, -1]]})


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_dots(side, dtype):
    cases = [
        ((5, 70), (70, 33), [[1], [0]], [[], []]),
        ((2, 3, 20), (20, 4, 5), [[2], [0]], [[], []]),
        ((20, 3, 2), (20, 4), [[0], [0]], [[], []]),
        ((3, 6, 2, 5), (6, 5, 4), [[1, 3], [0, 1]], [[], []]),
        ((3, 4, 6), (3, 6, 5), [[2], [1]], [[0], [0]]),
        ((4, 3, 6), (2, 3, 6), [[2], [2]], [[1], [1]]),
        ((1, 300), (300, 9), [[1], [0]], [[], []]),
        ((0, 7), (7, 3), [[1], [0]], [[], []]),
        ((4, 0), (0, 3), [[1], [0]], [[], []]),
    ]
    offset = 128 if dtype == "uint8" else 0
    most = {"low": -9, "high": 9} if dtype == "int16" else {}
    for shape, own, contract, batch in cases:
        kernel = draw(own, "int8", 2, **most)
        pair = (contract, batch) if side else (contract[::-1], batch[::-1])
        attributes = {"kernel_operand": side, "offset": offset, "shift": 0}
        attributes |= dict(zip(("contract", "batch"), pair, strict=True))
        bias = np.zeros((), np.int32)
        check("dot", [draw(shape, dtype)], {"kernel": kernel, "bias": bias}, attributes)


@pytest.mark.parametrize("dtypes", ["int8 int8", "uint8 int8", "int8 uint8"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 33, 6), (17, 64, 130), (3, 7, 70)])
def test_matrices_of_codes_about_any_zero_point(dtypes, sizes):
    """Rows, terms and columns beside the sizes of tiles, and codes at their ends."""
    m, k, n = sizes
    a, b = dtypes.split()
    pair = [draw((2, m, k), a, k), draw((2, n, k), b, n)]
    pair[0][1], pair[1][1] = np.iinfo(a).max, np.iinfo(b).min
    attributes = {"contract": [[2], [2]], "batch": [[0], [0]]}
    for zeros in ([0, 0], [-128, 127], [255, 128], [3, 0], [0, -7]):
        own = attributes | {"zero_points": zeros}
        check("dot_codes", pair, {}, own, zeros)
    wide = [draw((2, m, k), "int16", 1, -300, 300), pair[1]]
    ends = [(-300, 300), (np.iinfo(b).min, np.iinfo(b).max)]
    check("dot_codes", wide, {}, attributes | {"zero_points": [0, 5]}, [0, 5], ends)
    wide[0][0, 0, 0] = 300
    check("dot_codes", wide, {}, attributes | {"zero_points": [9, 5]}, [9, 5], ends)


def test_products_of_codes():
    zeros = [-3, 7]
    attributes = {"zero_points": zeros, "contract": [[2], [1]], "batch": [[0], [0]]}
    pair = [draw((2, 5, 33)), draw((2, 33, 6), seed=1)]
    check("dot_codes", pair, {}, attributes, zeros)
    check(
        "multiply_codes",
        [draw((4, 1, 3)), draw((4, 5, 1), "uint8", 1)],
        {},
        {"zero_points": zeros},
        zeros,
    )
    for name in ("maximum", "minimum"):
        check(name, [draw((4, 1, 3)), draw((4, 5, 1), "int16", 1)])
    kernel, bias = draw((1, 4, 1), "int8", 1), draw((1, 1, 6), "int16", 2)
    params = {"kernel": kernel, "bias": bias.astype(np.int32)}
    check("multiply", [draw((3, 4, 6))], params, {"offset": 0, "shift": 2})


def test_rescales():
    ends = {"zero_point": 2, "low": -128, "high": 127}
    for multipliers, shift in (([1 << 29, -(3 << 28)], 31), ([1, 1], 1), ([5, 3], 0)):
        attributes = {"input_zero_points": [1, -2], "multipliers": multipliers}
        attributes |= {"shift": shift, **ends}
        pair = [draw((3, 1, 7)), draw((3, 5, 7), "int16", 1)]
        check("add", pair, {}, attributes, [1, -2])
    check("clip", [draw((5, 7), "int16")], {}, {"low": -9, "high": 100})
    attributes = {"zero_points": [1, -2], "multiplier": 1 << 20, "shift": 24, **ends}
    check("divide", [draw((5, 7)), draw((5, 1), seed=1)], {}, attributes, [1, -2])
    for rule in RULES[2:]:
        attributes = {"left_shift": 20, "zero_points": [1, -2], "shift": 40}
        attributes |= {"multipliers": [1 << 30, 3 << 29], "shifts": [31, 32]}
        attributes |= {"multiplier": 1518500250, "rule": rule, **ends}
        check(
            "tflite_add", [draw((4, 6)), draw((4, 6), seed=1)], {}, attributes, [1, -2]
        )


def test_reductions_and_windows():
    x = draw((3, 4, 5, 6))
    for axes in ([1], [3], [1, 2], [0, 3], [0, 1, 2, 3]):
        sizes = [x.shape[d] for d in axes]
        check("sum", [x], {}, {"axes": axes, "sizes": sizes, "bias": -7})
        check("max", [x], {}, {"axes": axes})
        check("min", [x], {}, {"axes": axes})
    check("sum", [draw((3, 0))], {}, {"axes": [1], "sizes": [0], "bias": 4})
    for axis in range(4):
        check("argmax", [x % 4], {}, {"axis": axis})
        check("argmin", [x % 4], {}, {"axis": axis})
        attributes = {"axis": axis, "reverse": axis > 1, "bias": 3}
        check("running_sum", [x], {}, attributes | {"input_zero_point": 2}, [2])
    plain = {"window": [1, 3, 2, 1], "strides": [1, 2, 1, 1], "dilation": [1] * 4}
    for padding, spread in (([0, 0], 1), ([1, 1], 1), ([1, 1], 2)):
        own = {"padding": [[0, 0], padding, [0, 0], [0, 0]]}
        own |= {"base_dilation": [1, spread, 1, 1], **plain}
        check("sum_pool", [x], {}, {**own, "bias": 5, "padding_code": 3})
        check("max_pool", [x], {}, own)
        check("min_pool", [x], {}, own)


def test_moves():
    x = draw((3, 4, 5))
    check("transpose", [x], {}, {"permutation": [2, 0, 1]})
    check("reshape", [x], {}, {"sizes": [-1, 10]})
    check("rev", [x], {}, {"axes": [0, 2]})
    ends = {"start": [None, 3, 4], "stop": [2, None, None], "steps": [1, -2, -1]}
    check("slice", [x], {}, ends)
    for padding in (
        [[1, 2, 0], [0, 0, 1], [-1, 3, 2]],
        [[-1, -1, 0], [2, 0, 0], [0] * 3],
    ):
        check("pad", [x], {}, {"padding": padding, "padding_code": 7})
    check(
        "broadcast",
        [x[:, :1]],
        {},
        {"sizes": [2, None, 6, None], "dimensions": [1, 2, 3]},
    )
    check("concatenate", [x, draw((3, 2, 5), "int16"), x], {}, {"axis": 1})
    check("take", [x], {"places": draw((2, 7), "int32", 1, 0, 19)}, {})
    check("take", [x], {"places": draw(9, "int32", 1, 0, 59)}, {"crosses_examples": 3})
    check("constant", [x], {"value": draw((1, 4), "int8")}, {})
    check("constant", [], {"value": draw((2, 4), "int16")}, {})
    check("tflite_constant", [], {"value": draw((2, 4), "int16")}, {})


def test_lookups():
    for dtype in ("int8", "uint8"):
        for low, high in ((np.iinfo(dtype).min, np.iinfo(dtype).max), (3, 52)):
            own, codes = {"table": draw(high - low + 1, "uint8", high)}, (low, high)
            x = draw((2, 133), dtype, 0, *codes)
            attributes = {"low": int(low), "axis": None}
            check("table", [x], own, attributes, None, [codes])
    x = draw((3, 4, 5))
    check("table", [x], {"table": draw(256, "int16", 1)}, {"low": -128, "axis": None})
    own = {"table": draw((256, 4), "int8", 1)}
    check("table", [x], own, {"low": -128, "axis": 1})
    cuts = np.sort(draw((4, 9), "int32", 1, -500, 500), -1)
    params = {"thresholds": cuts, "table": draw((4, 10), "int32", 2, -8, 7)}
    check("thresholds", [draw((3, 4, 5), "int32", 3, -600, 600)], params, {"axis": 1})
    flat = {"thresholds": cuts[0], "table": params["table"][0]}
    check("thresholds", [draw((3, 4), "int16", 3, -600, 600)], flat, {"axis": None})
    rows = draw((3, 4), "int8", 1, -6, 5)
    check("embed", [rows], {"kernel": draw((6, 2, 3))}, {}, None, [(-6, 5)])
    which = draw((3, 4), "int8", 1, 0, 2)
    cases = [draw((3, 4)), draw((3, 4), "int16", 2), draw((3, 4), seed=3)]
    ends = [(0, 2), (-128, 127), (-(1 << 15), (1 << 15) - 1), (-128, 127)]
    check("select", [which, *cases], {}, {}, None, ends)
    check("select", [which[0, 0], *cases], {}, {}, None, ends)
    for kind in ("eq", "ne", "lt", "le", "gt", "ge"):
        attributes = {"kind": kind, "zero_points": [3, -4], "exponents": [-20, -21]}
        for multipliers in ([9, 18], [16777213, 8388607]):
            own = attributes | {"multipliers": multipliers}
            check("compare", [draw(99), draw(99, seed=1)], {}, own, [3, -4])


@pytest.mark.parametrize("dtype", ["bool", "int8", "int16", "int32", "uint8", "uint16"])
def test_arithmetic_of_every_kind(dtype):
    kinds = OPERATIONS["arithmetic"].attributes["kind"].wanted
    kinds = kinds.removeprefix("one of ").split(", ")
    ones = ("neg", "abs", "sign", "not", "convert")
    ends = (0, 1) if dtype == "bool" else None
    own = "int8" if dtype == "bool" else dtype
    x, y = (
        draw((7, 1, 9), own, 0, *(ends or ())),
        draw((7, 5, 1), own, 1, *(ends or ())),
    )
    if ends is None:
        y[0], y[1], x[0] = 0, 1, np.iinfo(own).min
    for kind in kinds:
        xs = [x] if kind in ones else [x, y]
        given = None if ends is None else [ends] * len(xs)
        check("arithmetic", xs, {}, {"kind": kind, "dtype": dtype}, None, given)


def test_normalisations():
    x = draw((3, 5, 4))
    ends = {"zero_point": -128, "low": -128, "high": 127}
    table = np.int32(np.round(2.0**30 * np.exp(-np.arange(256) / 40)))
    masks = [draw((3, 5, 4), "int8", 1, 0, 1), draw((3, 1, 4), "int8", 1, 0, 1)]
    masks[0][0] = 0
    masks += [draw(s, "int8", 2, 0, 1) for s in ((1, 5, 4), (1, 1, 4), (1, 5, 1))]
    masks += [np.zeros((1, 1, 1), np.int8), np.ones((1, 1, 1), np.int8)]
    attributes = {"algorithm": "exp_table", "most_places": 20, "multiplier": 255}
    for axes in ([2], [1], [0, 2]):
        for empty in ("zero", "all", "uniform"):
            own = {**attributes, "axes": axes, "empty": empty, "shift": 30, **ends}
            check("softmax", [x], {"table": table}, own)
            for mask in masks:
                codes = [(-128, 127), (0, 1)]
                check("softmax", [x, mask], {"table": table}, own, None, codes)
    logs = np.int32(2.0**30 * np.exp(-np.arange(256) / 40))
    logs[0] = 1 << 30
    own = {"algorithm": "exp_table_and_log_series", "axes": [2], "empty": "all"}
    own |= {
        "most_places": 1 << 15,
        "input_zero_points": [0],
        "input_multiplier": 1 << 28,
    }
    own |= {"input_shift": 28, "multiplier": 1 << 28, "shift": 50, **ends}
    check("log_softmax", [x], {"table": logs}, own, [0])
    check("logsumexp", [x], {"table": logs}, own | {"keepdims": False}, [0])
    check("logsumexp", [x], {"table": logs}, own | {"keepdims": True}, [0])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("width", [1, 63, 64, 130, 300])
def test_softmaxes_of_bytes(dtype, width):
    """Few and many places beside the width of a register, and codes at both ends."""
    info = np.iinfo(dtype)
    x = draw((4, width), dtype, width)
    x[1], x[2, ::2], x[2, 1::2] = info.max, info.min, info.max
    mask = draw((4, width), "int8", 1, 0, 1)
    mask[3] = 0
    codes = [(int(info.min), int(info.max)), (0, 1)]
    distances = np.arange(256)
    tables = [np.exp(-distances / 40), np.exp(-distances / 2)[:60], distances == 0]
    for k, values in enumerate(tables):
        table = np.int32(np.round(2.0**30 * values))
        for shift, zero_point, plus in ((52, -128, 0), (30, 3, 9), (33, 1 << 30, 0)):
            own = {"algorithm": "exp_table", "axes": [1], "shift": shift, "plus": plus}
            own |= {"most_places": 1 << 15, "multiplier": (1 << 30) + 12345 * k}
            own |= {"zero_point": zero_point, "low": -128, "high": 127}
            for empty in ("zero", "all", "uniform"):
                own["empty"] = empty
                check("softmax", [x, mask], {"table": table}, own, None, codes)
            check("softmax", [x], {"table": table}, own)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("width", [1, 7, 16, 65, 1500])
def test_norms_of_many_and_few_codes(dtype, width):
    """Steps that fit 32 bits and some that do not, parameters that come again."""
    x, wide = draw((4, width), dtype, width), np.iinfo(dtype)
    x[1], x[2] = wide.max, np.where(np.arange(width) % 2, wide.min, wide.max)
    zero = 128 if dtype == "uint8" else -3
    for is_centred in (False, True):
        for shift, zero_point, rows in ((50, 2, 1), (31, 0, 2), (62, -1 << 30, 4)):
            params = {
                "multiplier": draw((rows, width), "int32", 1, -(1 << 30), 1 << 30),
                "bias": draw((rows, width), "int32", 2, -(1 << 30), 1 << 30),
            }
            if rows == 2:
                params = {k: np.tile(v, (2, 1)) for k, v in params.items()}
            attributes = {
                "algorithm": "newton_root",
                "axes": [1],
                "groups": [1],
                "count": width,
                "is_centred": is_centred,
                "epsilon": 1 << 10,
                "floor": 1,
                "point": 2,
                "input_zero_points": [zero],
                "shift": shift,
                "bias_shift": 31 if shift == 62 else 12,
                "zero_point": zero_point,
                "low": -128,
                "high": 127,
            }
            check("norm", [x], params, attributes, [zero])


@pytest.mark.parametrize("shift", [0, 1, 17, 31, 32])
@pytest.mark.parametrize("multiplier", [1 << 30, 1518500250, -1073741825])
def test_products_of_codes_are_rescaled_to_the_even_code(shift, multiplier):
    """Ratios near one, of which ties are many, and sums of codes of 16 bits."""
    x = np.arange(-(1 << 11), 1 << 11, dtype=np.int32)
    ends = {"zero_point": -3, "low": -(1 << 15), "high": (1 << 15) - 1}
    own = {"input_zero_point": 5, "rule": "half_even", **ends}
    params = {"multiplier": np.int32(multiplier), "shift": np.int32(shift)}
    check("requantize", [x], params, own, [5], [(int(x[0]), int(x[-1]))])
    rows = {k: np.full((1, 3), v) for k, v in params.items()}
    rows["shift"][0, 1] += 1
    codes = [(int(x[0]), int(x[-1]))]
    check("requantize", [x[1:].reshape(-1, 3)], rows, own, [5], codes)
    terms = [draw(600, "int16", 1), draw(600, "int8", 2), draw(600, "uint8", 3)]
    zeros = [7, -2, 9]
    attributes = {"input_zero_points": zeros, "shift": shift, **ends}
    attributes["multipliers"] = [multiplier, 3 << 14, -multiplier]
    check("add", terms, {}, attributes, zeros)


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize(
    ("axes", "groups"), [([2], [1]), ([1, 2], [1, 1]), ([1, 2], [1, 2]), ([0], [1])]
)
def test_norms(is_centred, axes, groups):
    x = draw((3, 6, 8))
    count = math.prod(x.shape[d] // g for d, g in zip(axes, groups, strict=True))
    params = {
        "multiplier": draw((1, 1, 8), "int32", 1, -(1 << 28), 1 << 28),
        "bias": draw((1, 1, 8), "int32", 2, -(1 << 20), 1 << 20),
    }
    attributes = {
        "algorithm": "newton_root",
        "axes": axes,
        "groups": groups,
        "count": count,
        "is_centred": is_centred,
        "epsilon": 5,
        "floor": 1,
        "point": 4,
        "input_zero_points": [3],
        "shift": 50,
        "bias_shift": 20,
        "zero_point": 0,
        "low": -128,
        "high": 127,
    }
    check("norm", [x], params, attributes, [3])


MASKED = {
    "algorithm": "newton_root",
    "least": 0,
    "epsilon": 1 << 10,
    "floor": 0,
    "point": 12,
    "zero_point": 0,
    "low": -128,
    "high": 127,
}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("width", [1, 7, 33, 130])
def test_masked_norms_of_many_and_few_codes(dtype, width):
    """Rows kept whole, in part, but for one code and not at all; values far away."""
    x, ends = draw((6, width), dtype, width), np.iinfo(dtype)
    x[2], x[3] = ends.max, np.where(np.arange(width) % 2, ends.min, ends.max)
    x[4:, 1:] = 3  # Little spread in what is kept: the others are far from it.
    mask = draw((6, width), "int8", 1, 0, 1)
    mask[0], mask[1], mask[2] = 1, 0, 0
    mask[2:, -1] = 1
    mask[4, 0] = mask[5, 0] = 0
    zero = 128 if dtype == "uint8" else -3
    points = (
        (12, 0, 0),
        (-40, 1 << 20, 0),
        (900, 1, 7),
        (40, 0, 0),
        (-900, 3, 1),
        (0, 0, 0),
    )
    for k, (point, epsilon, floor) in enumerate(points):
        shift, zero_point = (50, 2) if k % 2 else (31, 0)
        shift, zero_point = (62, -1 << 30) if k == 4 else (shift, zero_point)
        shift = 18 if k == 5 else shift
        params = {
            "multiplier": draw((1 + k % 2 * 5, width), "int32", 1, -(1 << 30), 1 << 30),
            "bias": draw((6, 1), "int32", 2, -(1 << 30), 1 << 30),
        }
        params["multiplier"][:, ::3] = 0
        own = {**MASKED, "axes": [1], "groups": [1], "most_places": width + k % 2}
        own |= {"point": point, "epsilon": epsilon, "floor": floor, "shift": shift}
        own |= {"bias_shift": 31 if k == 4 else 12, "zero_point": zero_point}
        for is_centred, least in ((False, 1), (True, 0), (True, 1)):
            own |= {"is_centred": is_centred, "least": least}
            own["input_zero_points"] = [zero, 0]
            codes = [(int(ends.min), int(ends.max)), (0, 1)]
            check("masked_norm", [x, mask], params, own, [zero, 0], codes)


@pytest.mark.parametrize(
    ("axes", "groups"), [([2], [1]), ([1, 2], [1, 1]), ([1, 2], [3, 2]), ([0], [1])]
)
def test_masks_of_norms_broadcast(axes, groups):
    x = draw((3, 6, 8))
    count = math.prod(x.shape[d] // g for d, g in zip(axes, groups, strict=True))
    params = {
        "multiplier": draw((1, 1, 8), "int32", 1, -(1 << 28), 1 << 28),
        "bias": draw((1, 6, 1), "int32", 2, -(1 << 20), 1 << 20),
    }
    own = {**MASKED, "axes": axes, "groups": groups, "most_places": count}
    own |= {"is_centred": True, "shift": 50, "bias_shift": 20}
    own["input_zero_points"] = [3, 0]
    shapes = (3, 6, 8), (1, 6, 8), (3, 1, 8), (3, 6, 1), (1, 1, 8), (3, 1, 1), (1, 1, 1)
    for k, shape in enumerate(shapes):
        mask = draw(shape, "uint8", k, 0, 1)
        check("masked_norm", [x, mask], params, own, [3, 0], [(-128, 127), (0, 1)])


def test_averages_and_softmax_of_tflite():
    counts = draw((1, 4, 1), "int32", 1, 1, 9)
    x = draw((3, 4, 5), "int32", 0, -2000, 2000)
    ends = {"low": -128, "high": 127}
    check("tflite_average", [x], {"counts": counts}, ends, None, [(-2000, 2000)])
    table = np.int32(np.minimum(2.0**31 * np.exp(-np.arange(256) / 30), INT32.max))
    check("tflite_softmax", [draw((3, 9))], {"exponentials": table}, ends)


def test_loops_from_both_ends():
    """A running sum in a type that wraps, and what it was at each step."""
    for length, is_reversed in ((5, False), (5, True), (0, False), (1, True)):
        x, first = draw((length, 2, 3), "int32"), draw((2, 3), "int32", 1)
        value = Value((2, 3), "int32", INT32.min, INT32.max)
        add = {"kind": "add", "dtype": "int32"}
        body = Graph(
            (value,) * 3, (Node("arithmetic", (0, 1), 2, {}, add),), (0, 1), (2, 2), {}
        )
        steps = Value((length, 2, 3), "int32", INT32.min, INT32.max)
        attributes = {"consts": 0, "carries": 1, "length": None}
        attributes |= {"is_reversed": is_reversed}
        node = Node(
            "loop", (0, 1), 2, {}, attributes, graphs={"body": body}, others=(3,)
        )
        graph = Graph((value, steps, value, steps), (node,), (0, 1), (2, 3), {})
        plan = make_plan(graph, {}, [first.shape, x.shape])
        values = reference.run(graph, {}, [first, x])
        kernel = NativeKernel(FOUND.library, plan)
        for found in (interpret(plan, [first, x]), kernel.run([first, x], 2)):
            np.testing.assert_array_equal(found[0], values[2])
            np.testing.assert_array_equal(found[1], values[3])


def test_all_operations_are_in_these_files():
    here = pathlib.Path(__file__).parent
    files = ("test_native_operations.py", "test_native_gathers.py")
    text = "".join((here / name).read_text() for name in files)
    missing = [name for name in NATIVE if f'"{name}"' not in text]
    assert not missing
