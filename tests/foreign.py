"""Definitions of TFLite in Python integers, and graphs of one of its operators."""

import fractions
import itertools
import math

import numpy as np

from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.graph import reference

Fraction = fractions.Fraction
INT32 = -(2**31), 2**31 - 1


# Definitions in Python integers.


def half_up(x):
    """A fraction to the nearest integer, halves up."""
    return math.floor(x + Fraction(1, 2))


def half_away(x):
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def wrapped(x):
    return (x + 2**31) % 2**32 - 2**31


def round_twice(acc, multiplier, shift):
    """Twice rounded: at 2^-31, halves up, and then halves away from zero."""
    left, right = max(31 - shift, 0), max(shift - 31, 0)
    high = half_up(Fraction(wrapped(int(acc) << left) * int(multiplier), 2**31))
    return half_away(Fraction(min(high, INT32[1]), 2**right))


def round_once(acc, multiplier, shift):
    return half_up(Fraction(int(acc) * int(multiplier), 2 ** int(shift)))


ROUNDINGS = {"tflite_double": round_twice, "tflite_single": round_once}


def map_integers(f, *arrays):
    """A function of Python integers, number by number."""
    arrays = np.broadcast_arrays(*arrays)
    flat = [f(*map(int, row)) for row in zip(*map(np.ravel, arrays), strict=True)]
    return np.array(flat, np.int64).reshape(arrays[0].shape)


def multiplier_of(ratio):
    """TFLite's multiplier and shift, from the exact value of the ratio."""
    if not ratio:
        return 0, 31
    _, exponent = math.frexp(ratio)
    multiplier = half_up(Fraction(ratio) * Fraction(2) ** (31 - exponent))
    if multiplier == 2**31:
        multiplier, exponent = 2**30, exponent + 1
    return (multiplier, 31 - exponent) if exponent >= -31 else (0, 31)


def rescaled(acc, ratio, rule=round_twice):
    multiplier, shift = multiplier_of(float(ratio))
    return map_integers(lambda a: rule(a, multiplier, shift), acc)


# Graphs of one operator.


def range_of(dtype):
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def tensor(name, shape, dtype="int8", scale=0.1, zero_point=0, data=None, axis=0):
    scales = tuple(np.atleast_1d(np.float32(scale)).tolist())
    zeros = tuple(np.broadcast_to(zero_point, len(scales)).tolist())
    return Tensor(name, tuple(shape), dtype, scales, zeros, axis, data)


def whole_numbers(values, name="shape"):
    data = np.asarray(values, np.int32)
    return Tensor(name, data.shape, "int32", data=data)


def bias_of(values, dtype="int32"):
    data = np.asarray(values, dtype)
    return tensor("bias", data.shape, dtype, np.ones(len(data)), 0, data)


def program_of(name, operands, results, rule="tflite_double", **options):
    """The program of one operator; operands without data are inputs."""
    tensors = [*operands, *results]
    places = range(len(operands))
    op = Operator(
        name, tuple(places), tuple(range(len(operands), len(tensors))), options
    )
    inputs = [k for k in places if operands[k].data is None]
    outputs = list(op.outputs)
    return build_tflite(tensors, [op], inputs, outputs, rule=rule)


UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # Of integers alone: equal.


def check(program, inputs, wanted):
    """By NumPy and compiled; the batch has any size."""
    found = reference.run(program.graph, program.params, inputs)
    outputs = [found[v] for v in program.graph.outputs]
    traced = program.run_codes.lower(program.params, *inputs)
    compiled = traced.compile(UNOPTIMIZED)(program.params, *inputs)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    for got, other, want in zip(outputs, compiled, wanted, strict=True):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(other, want)
    grids = program.output_grids
    assert len(grids) == len(wanted)


def draw_codes(rng, dtype, shape):
    low, high = range_of(dtype)
    x = rng.integers(low, high + 1, shape)
    x.reshape(-1)[:2] = low, high
    return x.astype(dtype)


def reduced_to_16_bits(multiplier):
    """15 bits of a multiplier of 31."""
    return 0x7FFF if multiplier >= 0x7FFF0000 else (multiplier + (1 << 15)) >> 16


def convolve(x, kernel, padding, strides):
    """A convolution of integers, tap by tap."""
    reach, pads = kernel.shape[1:3], []
    for n, k, s in zip(x.shape[1:3], reach, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0) if padding == "SAME" else 0
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = [
        (n - k) // s + 1 for n, k, s in zip(x.shape[1:3], reach, strides, strict=True)
    ]
    acc = np.zeros((len(x), *sizes, len(kernel)), np.int64)
    for p, q in itertools.product(*map(range, reach)):
        seen = x[:, p :: strides[0], q :: strides[1]][:, : sizes[0], : sizes[1]]
        acc += seen @ kernel[:, p, q].T
    return acc
