"""QONNX's transposed convolutions, pools, resizes and splits, against definitions."""

import itertools

import jax
import numpy as np
import pytest
from onnx import helper

import qjax
from qjax.formats.qonnx import read_qonnx
from tests.qonnx_cases import Net, _dyadic, check, oracle

pytestmark = pytest.mark.slow  # Many compilations.


def _equal(net, names, x, wanted):
    """The function and its integers are what is wanted, at two batches."""
    read = read_qonnx(net.model(*names).SerializeToString())
    program = qjax.lower(read, *read.inputs)
    for run in (jax.jit(read), program):
        found = run(x)
        for y, own in zip(found if len(names) > 1 else [found], wanted, strict=True):
            np.testing.assert_array_equal(y, np.float32(own))
            assert np.unique(own).size > 2
    first = program(x[:1])
    first = first if len(names) > 1 else [first]
    for y, own in zip(first, wanted, strict=True):
        np.testing.assert_array_equal(y, np.float32(own[:1]))


def _quantized(x, scale, bits):
    return np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


# Transposed convolutions.


def _scattered(x, w, b, strides, dilations, begin, sizes, groups):
    """Each input adds its kernel to the output: the definition."""
    h, v = x.shape[2:]
    each = w.shape[1]
    whole = np.zeros((len(x), groups * each, 99, 99))
    for i, o, p, q in np.ndindex(w.shape[0], *w.shape[1:]):
        channel = i // (len(w) // groups) * each + o
        rows = slice(p * dilations[0], None, strides[0])
        columns = slice(q * dilations[1], None, strides[1])
        whole[:, channel, rows, columns][..., :h, :v] += x[:, i] * w[i, o, p, q]
    (r, s), (m, n) = begin, sizes
    return whole[:, :, r : r + m, s : s + n] + b[:, None, None]


_TRANSPOSED = {
    "strides": ({"strides": [2, 2]}, (0, 0), (11, 9)),
    "pads": ({"strides": [2, 1], "pads": [1, 0, 0, 1]}, (1, 0), (10, 5)),
    "more": ({"strides": [2, 2], "output_padding": [1, 0]}, (0, 0), (12, 9)),
    "dilations": ({"strides": [3, 2], "dilations": [1, 2]}, (0, 0), (15, 11)),
    "given": ({"strides": [2, 2], "output_shape": [10, 8]}, (1, 1), (10, 8)),
    "wide": ({"strides": [2, 2], "output_shape": [12, 8]}, (0, 1), (12, 8)),
    "upper": ({"strides": [2, 2], "auto_pad": "SAME_UPPER"}, (0, 0), (10, 8)),
    "lower": ({"strides": [2, 2], "auto_pad": "SAME_LOWER"}, (1, 1), (10, 8)),
    "groups": ({"strides": [1, 2], "group": 2}, (0, 0), (7, 9)),
}


@pytest.mark.parametrize("name", _TRANSPOSED)
def test_transposed_convolutions(name):
    options, begin, sizes = _TRANSPOSED[name]
    rng, groups = np.random.default_rng(20), options.get("group", 1)
    net = Net((1, 4, 5, 4), opset=11)
    scale = np.ldexp(1.0, rng.integers(-3, 0, (1, 6 // groups, 1, 1)))
    w, b = rng.normal(size=(4, 6 // groups, 3, 3)), np.ldexp(rng.integers(-9, 9, 6), -3)
    y = net.quant("x", 0.25, 4)
    y = net.add("ConvTranspose", y, net.quant(w, scale, 3), b, **options)
    x = _dyadic(rng, (3, 4, 5, 4))
    ones = options.get("strides", [1, 1]), options.get("dilations", [1, 1])
    pair = _quantized(x, 0.25, 4), _quantized(np.float32(w), scale, 3)
    wanted = _scattered(*pair, b, *ones, begin, sizes, groups)
    names = [net.quant(y, 0.5, 5), y]
    _equal(net, names, x, [_quantized(wanted, 0.5, 5), wanted])


# Pools.


def _windows(x, k, stride, dilation, pads, count):
    """Places of each window along an axis, and whether they are inputs or padding."""
    places = np.arange(count)[:, None] * stride - pads[0] + np.arange(k) * dilation
    inside = (places >= 0) & (places < x)
    padded = (places >= -pads[0]) & (places < x + pads[1])
    return places, inside, padded


def _pooled(x, kind, includes, kernel, strides, dilations, pads, counts):
    axes = [
        _windows(*each)
        for each in zip(
            x.shape[2:], kernel, strides, dilations, pads, counts, strict=True
        )
    ]
    found = np.zeros((*x.shape[:2], *counts))
    for i, j in np.ndindex(*counts):
        (rows, r_in, r_pad), (columns, c_in, c_pad) = (
            [part[k] for part in axis] for axis, k in zip(axes, (i, j), strict=True)
        )
        part = x[:, :, rows[r_in]][:, :, :, columns[c_in]]
        counted = (r_pad.sum() * c_pad.sum()) if includes else part[0, 0].size
        mean = part.sum((2, 3)) / counted
        found[:, :, i, j] = part.max((2, 3)) if kind == "MaxPool" else mean
    return found


_POOLS = {
    "even": ([2, 2], [2, 2], [1, 1], [0, 0, 0, 0], (4, 3)),
    "pads": ([3, 3], [2, 2], [1, 1], [1, 1, 1, 1], (4, 3)),
    "sides": ([2, 2], [2, 2], [1, 1], [1, 0, 0, 1], (4, 3)),
    "dropped": ([2, 2], [3, 2], [1, 1], [0, 1, 1, 1], (3, 3)),
    "dilated": ([2, 2], [2, 2], [2, 1], [1, 0, 1, 0], (4, 3)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(_POOLS, ("MaxPool", "AveragePool")), ("pads", "included")],
)
def test_pools_with_incomplete_windows(name, kind):
    """`ceil_mode`: a window that would start behind the input is dropped."""
    kernel, strides, dilations, pads, counts = _POOLS[name]
    net, includes = Net((1, 2, 7, 5), opset=19), kind == "included"
    options = {"count_include_pad": 1} if includes else {}
    kind = "AveragePool" if includes else kind
    options |= {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
    y = net.add(kind, net.quant("x", 0.25, 4), pads=pads, ceil_mode=1, **options)
    x = _dyadic(np.random.default_rng(21), (3, 2, 7, 5))
    pairs = list(zip(pads[:2], pads[2:], strict=True))
    exact = _quantized(x, 0.25, 4)
    wanted = _pooled(exact, kind, includes, kernel, strides, dilations, pairs, counts)
    _equal(net, [net.quant(y, 0.125, 6)], x, [_quantized(wanted, 0.125, 6)])


@pytest.mark.parametrize("bits", [4, 12])
def test_averages_without_padding(bits):
    """Sums of 16 bits and more, and windows at the edge that hold less."""
    net = Net((1, 2, 6, 6))
    y = net.quant("x", 0.25, bits)
    y = net.add("AveragePool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = _dyadic(np.random.default_rng(22), (3, 2, 6, 6))
    ones, pads = [1, 1], [(1, 1), (1, 1)]
    exact = _quantized(x, 0.25, bits)
    wanted = _pooled(exact, "AveragePool", False, [3, 3], ones, ones, pads, (6, 6))
    _equal(net, [net.quant(y, 0.125, 7)], x, [_quantized(wanted, 0.125, 7)])


def test_averages_that_leave_int32_are_refused():
    net = Net((1, 2, 9, 9))
    y = net.quant("x", 0.25, 16)
    y = net.add("AveragePool", y, kernel_shape=[7, 7], pads=[3] * 4)
    with pytest.raises(OverflowError, match="AveragePool.*parts of 1 / 176400"):
        read_qonnx(net.model(net.quant(y, 0.5, 8)).SerializeToString())


# Resizes.


_RESIZES = {
    "old": (10, [1, 1, 2, 0.5], {"mode": "nearest"}),
    "floor": (
        *(11, [1, 1, 2, 3]),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "default": (13, [1, 1, 1.5, 2], {"mode": "nearest"}),
    "ceil": (13, [1, 1, 2, 0.5], {"nearest_mode": "round_prefer_ceil"}),
    "corners": (19, [1, 1, 2, 2], {"coordinate_transformation_mode": "align_corners"}),
    "axes": (19, [2, 3], {"axes": [2, 3], "nearest_mode": "ceil"}),
    "linear": (13, [1, 1, 2, 4], {"mode": "linear"}),
    "halved": (13, [1, 1, 0.5, 0.5], {"mode": "linear"}),
    "flat": (
        *(19, [1, 1, 2, 1]),
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    ),
}


@pytest.mark.parametrize("name", _RESIZES)
def test_resizes_by_scales(name):
    opset, scales, options = _RESIZES[name]
    net = Net((1, 2, 4, 6), opset)
    # Not the reference evaluator's: sets before 11 had a default, not a choice.
    options = {"mode": "nearest", **options}
    first = [] if opset == 10 else [np.float32([])]
    y = net.add(
        "Resize", net.quant("x", 0.25, 4), *first, np.float32(scales), **options
    )
    x = _dyadic(np.random.default_rng(23), (3, 2, 4, 6))
    exact = _quantized(x, 0.25, 4)
    if opset == 10:  # Down by ceil, up by floor.
        wanted = exact.repeat(2, 2)[..., ::2]
        _equal(net, [y], x, [wanted])
        return
    check(net.model(y), x)
    check(net.model(net.quant(y, 0.5, 3)), x)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_resizes_by_sizes(policy):
    net = Net((1, 2, 4, 5), 18)
    y, sizes = net.quant("x", 0.25, 4), np.int64([9, 8])
    kind = {"axes": [2, 3], "mode": "nearest", "keep_aspect_ratio_policy": policy}
    y = net.add("Resize", y, "", "", sizes, **kind)
    check(net.model(y), _dyadic(np.random.default_rng(24), (3, 2, 4, 5)))


def test_upsampling_after_a_product():
    """Known sizes with the batch of the file, between a product and its quantizer."""
    rng, net = np.random.default_rng(25), Net((1, 2, 3, 3), 9)
    w = net.quant(rng.normal(size=(3, 2, 3, 3)), 0.25, 3)
    y = net.add("Conv", net.quant("x", 0.25, 4), w, pads=[1] * 4)
    y = net.batch_norm(y, rng, 3)
    y = net.add("Upsample", y, np.float32([1, 1, 2, 3]), mode="nearest")
    y = net.quant(y, 0.5, 4)
    x = _dyadic(rng, (3, 2, 3, 3))
    before = [n for n in net.nodes if n.op_type != "Upsample"]
    before[-1].input[0] = net.nodes[-2].input[0]
    small = Net((1, 2, 3, 3), 9)
    small.nodes, small.constants = before, net.constants
    wanted = oracle(small.model(y), x).repeat(2, 2).repeat(3, 3)
    net.nodes[-1].input[0] = net.nodes[-2].output[0]
    _equal(net, [y], x, [wanted])


_NO_RESIZES = {
    "mode='cubic'": {"mode": "cubic"},
    "antialias=1": {"mode": "linear", "antialias": 1},
    "'tf_crop_and_resize'": {"coordinate_transformation_mode": "tf_crop_and_resize"},
    "multiples of 1 / 256": {
        "mode": "linear",
        "coordinate_transformation_mode": "align_corners",
    },
    "nearest_mode 'up'": {"nearest_mode": "up"},
}


@pytest.mark.parametrize("message", _NO_RESIZES)
def test_resizes_without_a_rule_are_refused(message):
    net, scales = Net((1, 2, 4, 5), 18), np.float32([1, 1, 2, 2])
    y = net.add("Resize", net.quant("x", 0.25, 4), "", scales, **_NO_RESIZES[message])
    with pytest.raises(NotImplementedError, match=rf"\(Resize\): .*{message}"):
        read_qonnx(net.model(y).SerializeToString())


# Splits.


def _split(opset, sizes, count, *, normal=False, **options):
    rng, net = np.random.default_rng(26), Net((1, 6, 4), opset)
    y = net.quant("x", 0.25, 4)
    if normal:
        w = net.quant(rng.normal(size=(6, 6, 3)), 0.25, 3)
        y = net.batch_norm(net.add("Conv", y, w, pads=[1, 1]), rng, 6)
    given = [] if sizes is None else [net.constant(np.int64(sizes))]
    parts = [f"part{k}" for k in range(count)]
    node = helper.make_node("Split", [y, *given], parts, name="n_split", **options)
    net.nodes.append(node)
    return net, [net.quant(part, 0.5, 3 + k) for k, part in enumerate(parts)], parts


@pytest.mark.parametrize(
    ("opset", "sizes", "count", "options"),
    [
        (7, None, 2, {"axis": 1}),
        (11, None, 2, {"axis": 1, "split": [2, 4]}),
        (13, [1, 2, 3], 3, {"axis": -2}),
        (13, [1, 5], 2, {"axis": 1, "normal": True}),
        (18, None, 3, {"axis": 2, "num_outputs": 3}),
    ],
)
def test_splits(opset, sizes, count, options):
    if count == 3 and sizes is None:
        options = {**options, "axis": 1}  # Parts of 2; of 4 they would be 2, 2, 0.
    net, names, _ = _split(opset, sizes, count, **options)
    x = _dyadic(np.random.default_rng(27), (3, 6, 4))
    old = opset == 7  # The reference evaluator knows sets from 11 on.
    if old:
        exact = _quantized(x, 0.25, 4)
        wanted = [
            _quantized(part, 0.5, 3 + k) for k, part in enumerate(np.split(exact, 2, 1))
        ]
    else:
        wanted = [oracle(net.model(name), x) for name in names]
    _equal(net, names, x, wanted)


def test_splits_of_constants_keep_their_codes():
    rng, net = np.random.default_rng(28), Net((1, 6), 13)
    w = net.quant(rng.normal(size=(6, 8)), 0.25, 3)
    halves = ["first", "last"]
    net.nodes.append(helper.make_node("Split", [w], halves, name="n_split", axis=1))
    y = net.quant("x", 0.25, 4)
    y = net.add("Sub", net.add("MatMul", y, "first"), net.add("MatMul", y, "last"))
    check(net.model(net.quant(y, 0.5, 5)), _dyadic(rng, (16, 6)))


_NO_SPLITS = {
    "keep the batch": (NotImplementedError, ([1], 1), {"axis": 0}),
    "no split of 6 into 2": (ValueError, ([1, 4], 2), {"axis": 1}),
    "4 equal parts": (ValueError, (None, 4), {"axis": 1}),
    "part of size 0": (NotImplementedError, ([0, 6], 2), {"axis": 1}),
    "axis of 3, got 3": (ValueError, ([1, 5], 2), {"axis": 3}),
}


@pytest.mark.parametrize("message", _NO_SPLITS)
def test_splits_that_do_not_fit_are_refused(message):
    kind, given, options = _NO_SPLITS[message]
    net, names, _ = _split(13, *given, **options)
    with pytest.raises(kind, match=rf"'n_split' \(Split\).*{message}"):
        read_qonnx(net.model(*names).SerializeToString())


def test_other_second_outputs_are_refused():
    net = Net((1, 2, 4))
    y = net.quant("x", 0.25, 4)
    options = {"name": "n_pool", "kernel_shape": [2]}
    net.nodes.append(helper.make_node("MaxPool", [y], ["y", "places"], **options))
    read_qonnx(net.model("y").SerializeToString())
    with pytest.raises(NotImplementedError, match="'places' of MaxPool 'n_pool'"):
        read_qonnx(net.model("y", "places").SerializeToString())
