"""Single nodes in C, with codes from end to end of their ranges."""

import shutil

import numpy as np
import pytest

from qjax.graph.graph import Grid
from qjax.graph.operations.arithmetic import _ONES, _PAIRS, _SHIFTS, ends_of
from qjax.graph.tflite_tables import exponential_table, log_step_table
from tests.c99_cases import CHECKED, joined, library, random_codes, run, single

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc is not installed"
)
RNG = np.random.default_rng(0)
BIG = 2**31 - 1
WIDTHS = ("bool", "int8", "int32", "uint16")


def _arithmetic():
    for kind in (*_PAIRS, *_ONES, *_SHIFTS):
        for dtype in WIDTHS:
            low, high = ends_of(dtype)
            ends = (max(low, -2), min(high, 40)) if kind in _SHIFTS else (low, high)
            inputs = [((2, 30), low, high), ((1, 30), *ends)]
            inputs = inputs[:1] if kind in _ONES else inputs
            yield "arithmetic", inputs, {"kind": kind, "dtype": dtype}, {}


def _comparisons():
    for kind in ("eq", "ge", "gt", "le", "lt", "ne"):
        for ends in ((0, 0), (3, -5), (-40, 20), (-300, 300)):
            a = {"kind": kind, "zero_points": [5, -9], "exponents": list(ends)}
            a["multipliers"] = [1, 1] if ends == (0, 0) else [8388609, 12345677]
            x = (40,), -128, 127, Grid(1.0, 5)
            yield "compare", [x, ((40,), -300, 300, Grid(1.0, -9))], a, {}


def _quotients():
    ends = {"zero_point": 3, "low": -128, "high": 127}
    for shift in (0, 5, 40, 62, 63, 76):
        x = (3, 30), -60000, 60000, Grid(1.0, 9)
        y = (1, 30), -3, 30, Grid(1.0, 2)
        a = {"zero_points": [9, 2], "multiplier": BIG, "shift": shift, **ends}
        yield "divide", [x, y], a, {}
    for shift in (0, 31, 45, 62):
        a = {"input_zero_point": BIG, "rule": "half_even", "is_wide": True, **ends}
        own = {"multiplier": -BIG, "shift": shift}
        yield "requantize", [((90,), -BIG - 1, BIG, Grid(1.0, BIG))], a, own


_ROWS = {
    "offset_dims": [1],
    "collapsed_slice_dims": [0],
    "start_index_map": [0],
    "slice_sizes": [1, None],
}
_WINDOWS = {
    "offset_dims": [0, 2],
    "collapsed_slice_dims": [1],
    "start_index_map": [1, 0],
    "slice_sizes": [3, 1, 2],
}
_NONE = {"operand_batching_dims": [], "start_indices_batching_dims": []}
_NO_BATCH = {"operand_batching_dims": [], "scatter_indices_batching_dims": []}
_BATCH = {"operand_batching_dims": [0], "start_indices_batching_dims": [0]}


def _gathers():
    cases = (
        ((5, 4), (6, 1), {**_ROWS, **_NONE}),
        ((5, 4, 3), (2, 3, 2), {**_WINDOWS, **_NONE}),
        ((0, 4), (6, 1), {**_ROWS, **_NONE, "slice_sizes": [0, None]}
         | {"collapsed_slice_dims": [], "offset_dims": [1, 2]}),
        ((3, 5, 4), (3, 2, 1), {"offset_dims": [2], "collapsed_slice_dims": [1],
         "start_index_map": [1], "slice_sizes": [1, 1, 4], **_BATCH}),
    )  # fmt: skip
    for shape, places, own in cases:
        for mode in ("clip", "fill"):
            inputs = [(shape, -100, 100), (places, -3, 9)]
            yield "gather", inputs, {**own, "mode": mode, "fill": -77}, {}
    for axis, shape in ((0, (7, 3)), (1, (2, 33, 2)), (0, (1, 4)), (1, (4, 0))):
        yield "sort", [(shape, -20, 20)], {"axis": axis}, {}
        for descending in (True, False):
            a = {"axis": axis, "descending": descending}
            yield "argsort", [(shape, -5, 5)], a, {}


def _scatters():
    rows = {"update_window_dims": [1], "inserted_window_dims": [0]}
    windows = {"update_window_dims": [0, 2], "inserted_window_dims": [1]}
    batch = {"update_window_dims": [2], "inserted_window_dims": [1]}
    own = {"operand_batching_dims": [0], "scatter_indices_batching_dims": [0]}
    cases = (
        ((6, 1), (5, 4), (6, 4), {**rows, "scatter_dims": [0], **_NO_BATCH}),
        ((2, 3, 2), (5, 4, 3), (3, 2, 3, 2),
         {**windows, "update_window_dims": [0, 3], "scatter_dims": [1, 0]}
         | _NO_BATCH),
        ((3, 2, 1), (3, 5, 4), (3, 2, 4), {**batch, "scatter_dims": [1], **own}),
        # Windows that meet, their axis before that of the places.
        ((6, 1), (7,), (3, 6), {"update_window_dims": [0], "inserted_window_dims": []}
         | {"scatter_dims": [0], **_NO_BATCH}),
    )  # fmt: skip
    for places, shape, updates, a in cases:
        for mode in ("clip", "drop"):
            first, last = (places, -3, 9), (updates, -128, 127, Grid(1.0, 4))
            for name in ("scatter", "scatter_max", "scatter_min"):
                inputs = [first, (shape, -100, 100), last]
                yield name, inputs, {**a, "mode": mode}, {}
            more = {"sizes": list(shape), "input_zero_point": 4, "most_updates": 64}
            yield "scatter_add", [first, last], {**a, "mode": mode, **more}, {}


def _logarithms():
    table = np.int64(2**30 * np.exp(-np.arange(121) / 9))
    a = {"algorithm": "exp_table_and_log_series", "most_places": 1 << 15}
    a |= {"zero_point": 5, "low": -128, "high": 127, "input_multiplier": 1 << 30}
    for mask in (None, (3, 1, 5)):
        for empty in ("zero", "all", "uniform"):
            for axes, shift, down in (([2], 55, 30), ([0, 1], 88, 62), ([1], 60, 0)):
                inputs = [((3, 4, 5), -20, 100, Grid(1.0, 3))]
                inputs += [] if mask is None else [(mask, 0, 1)]
                own = {"axes": axes, "empty": empty, "input_shift": down, **a}
                own |= {"multiplier": BIG, "shift": shift}
                own["input_zero_points"] = [3, 0][: len(inputs)]
                yield "log_softmax", inputs, own, {"table": table}
                own = {**own, "keepdims": empty == "all"}
                yield "logsumexp", inputs, own, {"table": table}


def _masked_norms():
    """Masks that broadcast and keep nothing; values with exponents and without."""
    ends = {"algorithm": "newton_root", "low": -128, "high": 127}
    masks = (3, 4, 6), (3, 1, 6), (3, 1, 1), (1, 4, 1)
    cases = ([2], [1]), ([2], [3]), ([1, 2], [2, 1]), ([2], [6])
    points = (12, 1 << 10, 0), (0, 0, 0), (-40, 9, 1), (900, 1, 7), (-900, 1, 0)
    wide = 1 << 15
    for k, (point, epsilon, floor) in enumerate(points):
        low, high, zero = ((-128, 127, 3), (-wide, wide - 1, -5))[k % 2]
        for mask, (axes, groups) in zip(masks, cases, strict=True):
            sizes = [4 * 6 // np.prod(groups) if 1 in axes else 6 // groups[0]]
            a = {**ends, "axes": axes, "groups": groups, "most_places": int(sizes[0])}
            a |= {"least": k % 2, "is_centred": k != 1, "point": point}
            a |= {"epsilon": epsilon, "floor": floor, "shift": (50, 31, 62)[k % 3]}
            a |= {"bias_shift": 10 * (k % 3), "zero_point": (0, -7)[k % 2]}
            a["input_zero_points"] = [zero, 0]
            own = {"multiplier": RNG.integers(-BIG // 2, BIG // 2, (1, 1, 6))}
            own["bias"] = RNG.integers(-BIG // 2, BIG // 2, (1, 4, 1))
            x = (3, 4, 6), low, high, Grid(1.0, zero)
            yield "masked_norm", [x, (mask, 0, 1)], a, own
    a = {**ends, "axes": [1], "groups": [5], "count": 1, "is_centred": True}
    a |= {"epsilon": 5, "floor": 1, "point": 4, "input_zero_points": [3]}
    a |= {"shift": 50, "bias_shift": 20, "zero_point": 0}
    own = {"multiplier": BIG // 4, "bias": RNG.integers(-BIG // 2, BIG // 2, (1, 5))}
    yield "norm", [((2, 5), -128, 127, Grid(1.0, 3))], a, own


def _tflite():
    rows = [[0, 1, 2, 2, 0], [1, 2, 2, 2, 0], [0, 1024, 512, 3, -1024]]
    own = {"rows": rows, "columns": [[0, 1, 0], [0, 2, 1], [-5, 7, 1000]]}
    own["columns"][1][0] = 0  # Beyond both ends there is one place.
    yield "tflite_resize", [((2, 3, 3, 2), -128, 127)], {}, own
    for first in (32767, 1):
        parts = np.int64(first * np.exp(-np.arange(1 << 16) / 5000))
        own = {"exponentials": parts, "reciprocals": RNG.integers(0, 1 << 15, 1 << 16)}
        inputs = [((3, 7), -(1 << 15), (1 << 15) - 1)]
        yield "tflite_softmax16", inputs, {"high": 32767}, own
    ends = {"low": -128, "high": 127}
    for scale in np.float32([0.004, 0.11, 2.0]):
        own = {"exponentials": exponential_table(scale, 1.0)}
        own["steps"] = log_step_table(scale)
        a = {"zero_point": 127, **ends}
        yield "tflite_log_softmax", [((4, 9), -128, 127)], a, own
    for shape, zero in (((4, 9), 3), ((70, 1), -128), ((1, 3, 300), 127)):
        a = {"input_zero_points": [zero], **ends}
        yield "tflite_l2_norm", [(shape, -128, 127, Grid(1.0, zero))], a, {}


def _products():
    base = {"shift": 0, "offset": 0}
    for dtype, low, high in (
        ("int8", -128, 127),
        ("uint8", 0, 255),
        ("", -(1 << 20), 9),
    ):
        offset = 128 if dtype == "uint8" else 0
        for outs in (1, 3, 6, 8):
            a = {**base, "offset": offset, "kernel_operand": 1}
            a |= {"contract": [[1], [0]], "batch": [[], []]}
            own = {"kernel": RNG.integers(-127, 128, (13, outs)), "bias": [[7]]}
            yield "dot", [((2, 13), low, high)], a, own
    a = {**base, "kernel_operand": 0, "contract": [[2, 0], [1, 2]], "batch": [[3], [0]]}
    own = {
        "kernel": RNG.integers(-9, 9, (4, 5, 3, 2)),
        "bias": 1,
    }
    yield "dot", [((2, 3, 4, 6), -128, 127)], {**a, "shift": 2}, own
    for channels in (3, 70, 67):
        for order in ([0, 2, 1], [0, 1, 2]):
            size = {0: 2, order[1]: channels}
            shape = tuple(size.get(d, 6) for d in range(3))
            a = {"strides": [2], "padding": [[1, 2]], "input_dilation": [1]}
            a |= {"dilation": [2], "groups": channels, "padding_code": 5, **base}
            a["dimensions"] = [order, [2, 1, 0], order]
            own = {"kernel": RNG.integers(-127, 128, (3, 1, channels)), "bias": 3}
            x = shape, -128, 127, Grid(1.0, 5)
            yield "conv", [x], a, own


FAMILIES = (
    _arithmetic,
    _comparisons,
    _quotients,
    _gathers,
    _scatters,
    _logarithms,
    _masked_norms,
    _tflite,
    _products,
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.strip("_"))
def test_single_nodes_have_the_codes_of_the_oracle(tmp_path, family):
    cases = list(family())
    program = joined([single(*case) for case in cases])
    compilers = {"gcc": ("-O1", *CHECKED), "clang": ()}
    for compiler, flags in compilers.items():
        if shutil.which(compiler) is None:
            continue
        function = library(program, tmp_path, compiler, flags).model_run
        for seed in range(3):
            codes = random_codes(program, seed)
            rows = zip(*run(function, program, codes), cases, strict=False)
            for found, wanted, case in rows:
                np.testing.assert_array_equal(found, wanted, err_msg=str(case[0]))
