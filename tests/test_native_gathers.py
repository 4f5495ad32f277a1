"""Native gathers, scatters, sorts, rows of TFLite and 32-bit products: every kind.

Each node is the record of its operation in NumPy, the body of XLA and an interpreter of
its plan, integer for integer; a changed word of a plan is refused or is arithmetic.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from qjax.backends.native import contractions
from qjax.backends.native.library import NativeKernel, find_library
from qjax.backends.native.plan import NATIVE, make_plan
from qjax.backends.xla import run as xla
from qjax.graph import reference
from tests import test_native_operations as others
from tests.native_plans import interpret
from tests.test_native_operations import draw, node_graph

FOUND = find_library()
pytestmark = pytest.mark.skipif(FOUND.library is None, reason=FOUND.reason)
INT32 = np.iinfo(np.int32)
TYPES = ("int8", "uint8", "int16", "uint16", "int32")


def check(operation, xs, params=None, attributes=None, zeros=None, ends=None):
    """One node in all four; returns its plan and its inputs."""
    params, attributes = params or {}, attributes or {}
    graph = node_graph(operation, xs, params, attributes, zeros, ends)
    plan = make_plan(graph, params, [x.shape for x in xs])
    xs = [np.ascontiguousarray(x) for x in xs]
    (v,) = graph.outputs
    wanted = reference.run(graph, params, xs)[v]
    body = jax.jit(lambda params, xs: xla.run(graph, params, xs)[v])
    (own,) = interpret(plan, xs)
    (found,) = NativeKernel(FOUND.library, plan).run(xs, 1)
    assert str(found.dtype) == graph.values[v].dtype
    named = {"xla": body(params, xs), "plan": own, "native": found}
    for name, x in named.items():
        np.testing.assert_array_equal(x, wanted, err_msg=f"{operation} {name}")
    return plan, xs


def mutated(plan, xs, count=40):
    """Runs plans with a changed word each; says how many are refused."""
    refused = 0
    for k in np.random.default_rng(0).integers(7, len(plan.words), count):
        for number in (-(1 << 40), -1, 1 << 40, int(plan.words[k]) + 1):
            words = plan.words.copy()
            words[k] = number
            try:
                kernel = NativeKernel(FOUND.library, plan._replace(words=words))
                kernel.run(xs, 1)
            except RuntimeError:
                refused += 1
    return refused


# Axes of a gather: shape of the table, of the places, then what the axes are.
GATHERS = {
    "rows": ((7, 3), (5, 1), [1], [0], [0], [], [], [1, None]),
    "rows of windows": ((7, 3), (5, 1), [0, 1], [], [0], [], [], [4, None]),
    "windows first": ((7, 6), (3, 2, 2), [0, 2], [], [1, 0], [], [], [2, 3]),
    "single numbers": ((4, 5, 6), (9, 3), [], [0, 1, 2], [2, 0, 1], [], [], [1] * 3),
    "one place": ((4, 5), (2,), [0, 1], [], [0, 1], [], [], [2, 3]),
    "along": ((4, 5), (4, 7, 1), [], [1], [1], [0], [0], [1, 1]),
    "batches": ((3, 4, 5), (2, 5, 3, 1), [], [1], [1], [0, 2], [2, 1], [1] * 3),
    "nothing named": ((4, 5), (3, 0), [1, 2], [], [], [], [], [2, None]),
    "no places": ((4, 5), (0, 1), [1], [0], [0], [], [], [1, None]),
    "no table": ((4, 0), (3, 1), [1], [0], [0], [], [], [1, None]),
    "no window": ((4, 5), (3, 1), [0, 1], [], [0], [], [], [0, 5]),
}


def gather_case(name, mode, fill):
    shape, places, offset, collapsed, index, batch, own, sizes = GATHERS[name]
    attributes = {
        "offset_dims": offset,
        "collapsed_slice_dims": collapsed,
        "start_index_map": index,
        "operand_batching_dims": batch,
        "start_indices_batching_dims": own,
        "slice_sizes": sizes,
        "mode": mode,
        "fill": fill,
    }
    return shape, places, attributes


@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.parametrize("name", GATHERS)
def test_gathers_in_and_beyond_their_table(name, mode):
    shape, places, attributes = gather_case(name, mode, -3)
    kinds = itertools.product(TYPES, ("int8", "uint8", "int32"))
    for dtype, of in (
        kinds if name == "rows" else [("int8", "int8"), ("int32", "int16")]
    ):
        low = 0 if of.startswith("u") else -9
        at = draw(places, of, 1, low, 9)
        if of == "int32" and at.size:
            at.flat[:2] = INT32.min, INT32.max
        check("gather", [draw(shape, dtype), at], {}, attributes)


def scatter_axes(window, inserted, dims, batch=(), own=()):
    return {
        "update_window_dims": list(window),
        "inserted_window_dims": list(inserted),
        "scatter_dims": list(dims),
        "operand_batching_dims": list(batch),
        "scatter_indices_batching_dims": list(own),
    }


# Shapes of places, of the operand and of updates, then the axes.
SCATTERS = {
    "rows": ((9, 1), (4, 3), (9, 3), scatter_axes([1], [0], [0])),
    "numbers": ((20, 2), (3, 4), (20,), scatter_axes([], [0, 1], [1, 0])),
    "windows that meet": ((6, 1), (7,), (6, 3), scatter_axes([1], [], [0])),
    "windows first": ((6, 1), (7,), (3, 6), scatter_axes([0], [], [0])),
    "batches": ((3, 5, 1), (3, 4), (3, 5), scatter_axes([], [1], [1], [0], [0])),
    "between": ((2, 3, 1), (4, 5), (2, 4, 3), scatter_axes([1], [1], [1])),
    "one place": ((2,), (4, 5), (2, 2), scatter_axes([0, 1], [], [0, 1])),
    "nothing named": ((3, 0), (4, 5), (3, 4, 2), scatter_axes([1, 2], [], [])),
    "no updates": ((0, 1), (4, 3), (0, 3), scatter_axes([1], [0], [0])),
    "no operand": ((3, 1), (4, 0), (3, 0), scatter_axes([1], [0], [0])),
}


@pytest.mark.parametrize("mode", ["clip", "drop"])
@pytest.mark.parametrize("name", SCATTERS)
def test_scatters_of_updates_that_meet(name, mode):
    places, shape, given, axes = SCATTERS[name]
    attributes = {**axes, "mode": mode}
    at = draw(places, "int8", 1, -3, 7)
    types = itertools.product(TYPES, ("int8", "int32"))
    for dtype, of in types if name == "rows" else [("int8", "int8"), ("int8", "uint8")]:
        x, updates = draw(shape, dtype, 2), draw(given, of, 3)
        for operation in ("scatter", "scatter_max", "scatter_min"):
            check(operation, [at, x, updates], {}, attributes)
    most = math.prod(places[:-1])
    for dtype in TYPES[:4]:
        own = {"sizes": list(shape), "input_zero_point": 5, "most_updates": most}
        updates = draw(given, dtype, 3)
        check("scatter_add", [at, updates], {}, attributes | own, [0, 5])


@pytest.mark.parametrize("dtype", TYPES)
def test_sorts_keep_equal_codes_in_order(dtype):
    info = np.iinfo(dtype)
    shapes = ((3, 9, 4), 1), ((600,), 0), ((2, 600), 1), ((5, 1), 1), ((2, 200, 3), 1)
    for shape, axis in shapes:
        for low, high in ((0, 3), (info.min, info.max)):
            x = draw(shape, dtype, 0, low, high)
            x.flat[0], x.flat[-1] = info.max, info.min
            check("sort", [x], {}, {"axis": axis})
            for descending in (False, True):
                attributes = {"axis": axis, "descending": descending}
                check("argsort", [x], {}, attributes)
    for shape, axis in (((3, 0), 1), ((0, 3), 1)):
        check("sort", [draw(shape, dtype)], {}, {"axis": axis})
        own = {"axis": axis, "descending": True}
        check("argsort", [draw(shape, dtype)], {}, own)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_resizes_weigh_four_codes(dtype):
    def along(size, count, seed):
        before = draw(count, "int32", seed, 0, size - 1)
        after = np.minimum(before + 1, size - 1)
        rest = draw(count, "int32", seed + 1, 0, 1 << 10)
        rest[:3] = 0, 1 << 9, 1 << 10
        rest[before == after] *= -1  # Any weights of one code are its own.
        return np.stack([before, after, rest])

    for shape in ((2, 5, 4, 3), (1, 1, 1, 1), (3, 2, 7, 600), (0, 3, 3, 2)):
        x = draw(shape, dtype)
        if x.size:
            x.flat[0], x.flat[-1] = np.iinfo(dtype).min, np.iinfo(dtype).max
        params = {"rows": along(shape[1], 9, 1), "columns": along(shape[2], 5, 3)}
        check("tflite_resize", [x], params)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_softmaxes_of_rows(dtype):
    x = draw((3, 2, 9), dtype)
    info = np.iinfo(dtype)
    codes = info.max - info.min + 1
    x[0], x[1, 0], x[1, 1, 0] = info.min, info.max, info.min
    rows = [x, draw((700, 1), dtype), draw((0, 4), dtype), draw((2, 4095), dtype)]
    falling = np.exp(-np.arange(codes) / codes * 20)
    exponentials = np.int32(np.minimum(2.0**31 * falling, INT32.max))
    steps = np.int32(-np.arange(codes) * (2.0**26 / codes))
    ends = {"low": -128, "high": 127}
    for x in rows:
        own = {"exponentials": exponentials}
        check("tflite_softmax", [x], own, ends)
        own |= {"steps": steps}
        check("tflite_log_softmax", [x], own, ends | {"zero_point": 127})
        small = np.int32(np.round(32767 * falling))
        reciprocals = np.int32(np.round(32767 / (1 + np.arange(1 << 16) / (1 << 16))))
        for first in (small[0], 1):
            own = {"exponentials": np.r_[np.int32(first), small[1:]]}
            own |= {"reciprocals": reciprocals}
            check("tflite_softmax16", [x], own, {"high": 32767})


def test_norms_of_rows():
    ends = {"low": -128, "high": 127}
    for zero, dtype in ((0, "int8"), (3, "int8"), (128, "uint8")):
        attributes = {"input_zero_points": [zero], **ends}
        for shape in ((3, 5, 7), (2, 900), (4, 1), (0, 3), (3, 0)):
            x = draw(shape, dtype)
            if x.size:
                x[0] = zero
            check("tflite_l2_norm", [x], {}, attributes, [zero])
    # Sums of one and of few squares, and of the most that int32 holds.
    x = np.int16([[0, 0], [1, 0], [1, 1], [32767, 32767], [-32768, 0], [0, 23170]])
    codes = [(-32767, 32767)]
    check("tflite_l2_norm", [x[:4]], {}, {"input_zero_points": [0], **ends}, [0], codes)


def test_no_word_of_these_plans_leads_out_of_their_memory():
    plans = []
    for name in ("rows", "windows first", "batches"):
        shape, places, attributes = gather_case(name, "fill", -3)
        plans.append(
            check(
                "gather", [draw(shape), draw(places, "int8", 1, -3, 7)], {}, attributes
            )
        )
    for name in ("rows", "windows that meet", "batches"):
        places, shape, given, axes = SCATTERS[name]
        xs = [draw(places, "int8", 1, -3, 7), draw(shape), draw(given)]
        plans.append(check("scatter", xs, {}, {**axes, "mode": "drop"}))
    plans.append(check("argsort", [draw((3, 9))], {}, {"axis": 1, "descending": True}))
    at = np.int32([[0, 1, 1], [1, 1, 0], [5, 0, 1024]])
    plans.append(
        check("tflite_resize", [draw((2, 2, 2, 3))], {"rows": at, "columns": at})
    )
    plans.append(contracted("dot_codes"))
    for plan, xs in plans:
        assert mutated(plan, xs) > 20


def test_a_plan_of_other_arrays_is_refused():
    plan, _ = check("sort", [draw((3, 9), "int16")], {}, {"axis": 1})
    for k in (8, 12):  # Integers of the input, of the output.
        words = plan.words.copy()
        assert words[k] == 27
        words[k] = 1 << 20
        with pytest.raises(RuntimeError, match="larger inputs or outputs"):
            NativeKernel(FOUND.library, plan._replace(words=words))
    words = plan.words.copy()
    words[4] += 1
    with pytest.raises(RuntimeError, match="another number of inputs or outputs"):
        NativeKernel(FOUND.library, plan._replace(words=words))


def test_numbers_that_no_code_reaches_do_not_matter():
    x = draw((3, 4), "int8", 0, -8, 7)
    table = np.r_[np.int32([1 << 20]), np.arange(16, dtype=np.int32), np.int32([-999])]
    check("table", [x], {"table": table}, {"low": -9, "axis": None}, None, [(-8, 7)])
    params = {"thresholds": np.int32([-100, 0, 100])}
    params["table"] = np.int32([1 << 20, 1, 2, -(1 << 20)])
    check("thresholds", [x], params, {"axis": None}, None, [(-8, 7)])


def test_thresholds_of_no_channels_have_none():
    params = {"thresholds": draw((0, 40), "int32"), "table": draw((0, 41), "int32")}
    check("thresholds", [draw((3, 0))], params, {"axis": 1})


def test_a_norm_of_no_values_has_none():
    params = {"multiplier": draw((1, 0, 8), "int32", 1, -99, 99)}
    params["bias"] = draw((1, 1, 8), "int32", 2, -99, 99)
    attributes = {"algorithm": "newton_root", "axes": [2], "groups": [1], "count": 8}
    attributes |= {"is_centred": True, "epsilon": 5, "floor": 1, "point": 4}
    attributes |= {"input_zero_points": [0], "shift": 50, "bias_shift": 20}
    attributes |= {"zero_point": 0, "low": -128, "high": 127}
    check("norm", [draw((3, 0, 8))], params, attributes)


# Products in 32 bits.


def contracted(name):
    wide = functools.partial(draw, dtype="int32", low=-(1 << 20), high=1 << 20)
    codes = (-(1 << 20), 1 << 20)
    if name == "dot_codes":
        attributes = {
            "zero_points": [3, -4],
            "contract": [[2], [1]],
            "batch": [[0], [0]],
        }
        pair = [draw((2, 5, 33), "int8"), wide((2, 33, 6), low=-99, high=99)]
        ends = [(-128, 127), (-99, 99)]
        return check("dot_codes", pair, {}, attributes, [3, -4], ends)
    if name == "dot":
        bias = draw((1, 5, 6), "int8", 3).astype(np.int32)
        attributes = {"kernel_operand": 1, "offset": 0, "shift": 2}
        attributes |= {"contract": [[2], [0]], "batch": [[], []]}
        params = {"kernel": draw((7, 6), "int8", 1), "bias": bias}
        return check("dot", [wide((4, 5, 7))], params, attributes, None, [codes])
    return None


def test_products_of_codes_beyond_16_bits():
    assert contracted("dot_codes") and contracted("dot")
    for x, y, contract, batch in (
        ((3, 4, 6), (3, 6, 5), [[2], [1]], [[0], [0]]),
        ((4, 3, 2), (2, 3), [[1, 2], [1, 0]], [[], []]),
        ((4, 0), (0, 3), [[1], [0]], [[], []]),
        ((0, 2), (2, 3), [[1], [0]], [[], []]),
        ((2,), (2,), [[0], [0]], [[], []]),
    ):
        pair = [draw(x, "int32", 0, -(1 << 20), 1 << 20), draw(y, seed=1)]
        attributes = {"zero_points": [0, 7], "contract": contract, "batch": batch}
        ends = [(-(1 << 20), 1 << 20), (-128, 127)]
        check("dot_codes", pair, {}, attributes, [0, 7], ends)
        for side in (0, 1):
            own = {"kernel_operand": side, "offset": 0, "shift": 0, "batch": batch}
            own |= {"contract": contract[::-1] if side == 0 else contract}
            own["batch"] = batch[::-1] if side == 0 else batch
            params = {"kernel": pair[1], "bias": np.zeros((), np.int32)}
            check("dot", pair[:1], params, own, None, ends[:1])


def test_products_whose_bias_makes_them_larger():
    kernel = draw((7, 1), "int8", 1)
    bias = draw((4, 5, 6), "int16", 2).astype(np.int32)
    attributes = {"kernel_operand": 1, "offset": 0, "shift": 0}
    attributes |= {"contract": [[2], [0]], "batch": [[], []]}
    params = {"kernel": kernel, "bias": bias}
    check("dot", [draw((1, 5, 7))], params, attributes)
    conv = {
        "strides": [2, 1],
        "padding": [[1, 0], [0, 0]],
        "input_dilation": [1, 2],
        "dilation": [1, 1],
        "groups": 1,
        "dimensions": [[0, 3, 1, 2], [3, 2, 0, 1], [0, 3, 1, 2]],
        "padding_code": 0,
        "offset": 0,
        "shift": 1,
    }
    params = {"kernel": draw((3, 1, 2, 1), "int8", 1)}
    params["bias"] = draw((3, 1, 3, 4), "int16", 2).astype(np.int32)
    check("conv", [draw((1, 4, 2, 2))], params, conv)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_window_larger_than_its_input_has_no_sums(groups):
    conv = {
        "strides": [2],
        "padding": [[0, -1]],
        "input_dilation": [1],
        "dilation": [1],
        "groups": groups,
        "dimensions": [[0, 1, 2], [0, 1, 2], [0, 2, 1]],
        "padding_code": 0,
        "offset": 0,
        "shift": 0,
    }
    params = {"kernel": draw((6, 9 // groups, 3), "int8", 1), "bias": np.int32(5)}
    for dtype in ("int8", "int16"):
        check("conv", [draw((2, 9, 3), dtype)], params, conv)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_many_axes_and_of_wide_codes(groups):
    rank = 4
    conv = {
        "strides": [1, 2, 1, 1],
        "padding": [[1, 0], [0, 2], [-1, 1], [0, 0]],
        "input_dilation": [1, 2, 1, 1],
        "dilation": [1, 1, 2, 1],
        "groups": groups,
        "dimensions": [[0, 5, 1, 2, 3, 4], [5, 4, 0, 1, 2, 3], [1, 0, 2, 3, 4, 5]],
        "padding_code": 3,
        "offset": 0,
        "shift": 0,
    }
    kernel = draw((2, 2, 2, 1, 4 // groups, 6), "int8", 1)
    params = {"kernel": kernel, "bias": draw((6, *[1] * (rank + 1)), "int8", 3)}
    params["bias"] = params["bias"].astype(np.int32)
    check("conv", [draw((2, 3, 3, 4, 2, 4))], params, conv, [3])
    plain = {
        k: conv[k][:1] for k in ("strides", "padding", "input_dilation", "dilation")
    }
    order = {"dimensions": [[0, 2, 1], [2, 1, 0], [0, 2, 1]], "padding_code": 1 << 17}
    x = draw((2, 6, 4), "int32", 0, -(1 << 20), 1 << 20)
    params = {"kernel": draw((3, 4 // groups, 6), "int8", 1), "bias": np.int32(5)}
    ends = [(-(1 << 20), 1 << 20)]
    check("conv", [x], params, {**conv, **plain, **order}, [1 << 17], ends)


def test_any_product_by_the_32_bit_step(monkeypatch):
    """The step for what no kernel computes, on what kernels compute: one more check."""
    own = {"dot": contractions._dot, "conv": contractions._conv}
    own["dot_codes"] = contractions._dot_codes
    for name, emit in own.items():
        monkeypatch.setitem(NATIVE, name, emit)
    for side in (0, 1):
        others.test_dots(side, "uint8")
    for first in (False, True):
        others.test_convolutions("uint8", first)
    others.test_products_of_codes()
