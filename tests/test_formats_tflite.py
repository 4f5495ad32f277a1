"""TFLite files, written here by the schema's own classes, against Python integers."""

import math

import numpy as np
import pytest

from qjax.formats.tflite import read_tflite
from qjax.graph import reference
from tests.tflite_cases import _SCALES, _network, _parts, write

pytestmark = pytest.mark.slow  # Many compilations.


# Of LiteRT 2.3's reference kernels.
_PROBABILITIES = {
    "int8": [[-128, 99, -99], [-127, 117, -118], [-124, -108, 103], [-128, 123, -124]],
    "uint8": [[0, 227, 29], [1, 237, 17], [6, 14, 235], [0, 249, 7]],
}


def _inputs(dtype, count=4):
    rng, ends = np.random.default_rng(3), np.iinfo(dtype)
    return [
        rng.integers(ends.min, ends.max + 1, (count, n, 5, 2)).astype(dtype)
        for n in (4, 2)
    ]


def _multiplier(ratio):
    significand, exponent = math.frexp(ratio)
    return math.floor(significand * 2**31 + 0.5), 31 - exponent


def _twice(acc, ratio, left=0):
    """Rounds at 2^-31, and what is left of the shift half away from zero."""
    multiplier, shift = _multiplier(ratio)
    high = (int(acc) * multiplier * 2 ** (left + max(31 - shift, 0)) + 2**30) >> 31
    right = max(shift - 31, 0)
    half = (1 << right) >> 1
    return ((abs(high) + half) >> right) * (1 if high >= 0 else -1)


def _once(acc, ratio):
    multiplier, shift = _multiplier(ratio)
    return (int(acc) * multiplier + (1 << (shift - 1))) >> shift


def _logits(dtype, x, z):
    """The network up to the dense layer, for one example."""
    p, ends = _parts(dtype), np.iinfo(dtype)
    zeros, zero = p["zeros"], p["weights_zero"]
    scales = {name: np.float32(s) for name, s in _SCALES.items()}
    clip = lambda q, low=ends.min: int(np.clip(q, low, ends.max))
    x, z = x.astype(int) - zeros["x"], z.astype(int) - zeros["z"]
    # SAME: 4 rows in steps of 2 under 3 taps, 5 columns in steps of 1 under 2.
    x = np.pad(x, ((0, 1), (0, 1), (0, 0)))
    kernel = p["kernel"] - zero
    total = np.zeros((2, 5, 2), int)
    shared = max(scales["conv"], scales["z"])
    for i, j, c in np.ndindex(total.shape):
        acc = (x[2 * i : 2 * i + 3, j : j + 2] * kernel[c]).sum() + p["bias"][c]
        s = np.float32(p["kernel_scale"])
        if len(s) == 1:
            ratio = float(scales["x"] * s[0]) / float(scales["conv"])
        else:
            ratio = float(scales["x"]) * float(s[c]) / float(scales["conv"])
        y = clip(_twice(acc, ratio) + zeros["conv"], zeros["conv"])  # RELU.
        shifted = [
            _twice(code, float(scale) / (2 * float(shared)), left=20)
            for code, scale in (
                (y - zeros["conv"], scales["conv"]),
                (z[i, j, c], scales["z"]),
            )
        ]
        ratio = 2 * float(shared) / (2**20 * float(scales["sum"]))
        total[i, j, c] = clip(_twice(sum(shifted), ratio) + zeros["sum"])
    # Columns 1 and 2 of the pool.
    sums = np.array([total[:, j : j + 3].sum((0, 1)) for j in (1, 2)])
    pooled = np.sign(sums) * ((np.abs(sums) + 3) // 6)  # Half away from zero.
    flat = pooled.reshape(-1) - zeros["sum"]
    ratio = float(scales["sum"] * np.float32(p["weights_scale"][0]))
    ratio /= float(scales["dense"])
    acc = (p["weights"] - zero) @ flat + p["weights_bias"]
    return [clip(_once(a, ratio) + zeros["dense"]) for a in acc]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_are_those_of_the_definition(dtype):
    program = read_tflite(write(_network(dtype)))
    x, z = _inputs(dtype)
    logits, probabilities = map(np.asarray, program.codes(x, z))
    assert logits.dtype == dtype
    wanted = [_logits(dtype, *each) for each in zip(x, z, strict=True)]
    np.testing.assert_array_equal(logits, wanted)
    assert len(np.unique(wanted)) > 6
    np.testing.assert_array_equal(probabilities, _PROBABILITIES[dtype])
    found = reference.run(program.graph, program.params, [x, z])
    np.testing.assert_array_equal(found[program.graph.outputs[0]], logits)
    np.testing.assert_array_equal(found[program.graph.outputs[1]], probabilities)


def test_path_is_read_as_bytes_are(tmp_path):
    data = write(_network("int8"))
    (tmp_path / "m.tflite").write_bytes(data)
    program = read_tflite(tmp_path / "m.tflite")
    assert program.graph == read_tflite(data).graph
    grids = [(g.scale, g.zero_point) for g in program.input_grids]
    zeros = _parts("int8")["zeros"]
    assert grids == [(float(np.float32(_SCALES[k])), zeros[k]) for k in "xz"]
    with pytest.raises(FileNotFoundError):
        read_tflite(tmp_path / "none.tflite")


def test_rules_are_those_that_are_asked_for():
    data = write(_network("int8"))
    rules = lambda **how: [
        node.attributes["rule"]
        for node in read_tflite(data, **how).graph.nodes
        if node.operation == "requantize"
    ]
    assert rules() == ["tflite_double", "tflite_single"]
    assert rules(dense_rule=None) == ["tflite_double"] * 2
    assert rules(rule="tflite_single") == ["tflite_single"] * 2


def test_buffers_may_lie_behind_the_tables():
    model = _network("int8")
    moved = model["Buffers"][1]["Data"]
    outside = lambda start: [
        {},
        {"Offset": start, "Size": moved.size},
        *model["Buffers"][2:],
    ]
    model["Buffers"] = outside(2)
    start = len(write(model))
    model["Buffers"] = outside(start)
    data = write(model) + moved.tobytes()
    found, wanted = (read_tflite(d) for d in (data, write(_network("int8"))))
    for name, array in wanted.params.items():
        np.testing.assert_array_equal(found.params[name], array)
    with pytest.raises(ValueError, match="a buffer must lie within"):
        read_tflite(data[:-1])
