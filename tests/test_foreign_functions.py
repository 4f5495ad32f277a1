"""Means and functions of TFLite against Python integers and C's float32."""

import itertools
import math

import chex
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.graph import reference
from tests.foreign import (
    Fraction,
    check,
    convolve,
    draw_codes,
    half_away,
    map_integers,
    multiplier_of,
    program_of,
    range_of,
    rescaled,
    round_twice,
    tensor,
    whole_numbers,
)

pytestmark = pytest.mark.slow  # Many compilations.


class MeansTest(chex.TestCase):
    @parameterized.product(
        dtype=["int8", "uint8"], padding=["SAME", "VALID"], size=[2, 3]
    )
    def test_average_pool_divides_by_what_it_sees(self, dtype, padding, size):
        rng = np.random.default_rng(10)
        x = draw_codes(rng, dtype, (2, 5, 7, 3))
        ones = np.ones((1, 5, 7, 1), np.int64)
        kernel = np.zeros((3, size, size, 3), np.int64)
        kernel[range(3), :, :, range(3)] = 1
        total = convolve(np.int64(x), kernel, padding, (2, 2))
        count = convolve(ones, np.ones((1, size, size, 1), int), padding, (2, 2))
        wanted = map_integers(lambda a, n: half_away(Fraction(a, n)), total, count)
        options = {"filter_height": size, "filter_width": size, "padding": padding}
        options |= {"stride_h": 2, "stride_w": 2}
        tensors = [tensor(n, (1, 5, 7, 3), dtype) for n in "xy"]
        program = program_of("AVERAGE_POOL_2D", tensors[:1], tensors[1:], **options)
        check(program, [x], wanted)
        most = program_of("MAX_POOL_2D", tensors[:1], tensors[1:], **options)
        padded = np.full((2, 9, 11, 3), -999)
        before = [
            max((-(-n // 2) - 1) * 2 + size - n, 0) // 2 * (padding == "SAME")
            for n in (5, 7)
        ]
        padded[:, 2 : 2 + 5, 2 : 2 + 7] = x
        found = [
            padded[:, 2 - before[0] + i :: 2, 2 - before[1] + j :: 2]
            for i, j in itertools.product(range(size), repeat=2)
        ]
        n, m = wanted.shape[1:3]
        check(most, [x], np.max([part[:, :n, :m] for part in found], 0))

    @parameterized.product(
        axes=[[1, 2], [-1], [1, 2, 3]],
        keep_dims=[True, False],
        zeros=[(-128, 127), (9, 2)],
    )
    def test_the_divisor_of_a_mean_goes_into_its_multiplier(
        self, axes, keep_dims, zeros
    ):
        rng = np.random.default_rng(11)
        x = draw_codes(rng, "int8", (3, 4, 5, 6))
        over = tuple(d % 4 for d in axes)
        total = (np.int64(x) - zeros[0]).sum(over, keepdims=keep_dims)
        n = math.prod(x.shape[d] for d in over)
        f = np.float32
        multiplier, shift = multiplier_of(
            float(np.float64(f(0.05)) / np.float64(f(0.02)))
        )
        more = n.bit_length() - 1
        pair = (multiplier << more) // n, shift + more
        wanted = map_integers(lambda a: round_twice(a, *pair), total) + zeros[1]
        operands = [tensor("x", (1, 4, 5, 6), scale=0.05, zero_point=zeros[0])]
        operands.append(whole_numbers(axes))
        y = tensor("y", (1, *total.shape[1:]), scale=0.02, zero_point=zeros[1])
        program = program_of("MEAN", operands, [y], keep_dims=keep_dims)
        check(program, [x], np.clip(wanted, -128, 127))

    @parameterized.product(dtype=["int8", "uint8"], scale=[0.01, 0.1, 0.7], n=[2, 40])
    def test_softmax_is_within_a_code_of_the_real_one(self, dtype, scale, n):
        rng = np.random.default_rng(12)
        low, _ = range_of(dtype)
        x = np.concatenate([draw_codes(rng, dtype, (40, n)), np.full((1, n), 7, dtype)])
        x = x.astype(dtype)
        grid = {"dtype": dtype, "scale": 2.0**-8, "zero_point": low}
        y = tensor("y", (1, n), **grid)
        program = program_of(
            "SOFTMAX", [tensor("x", (1, n), dtype, scale)], [y], beta=1.0
        )
        found = reference.run(program.graph, program.params, [x])
        got = found[program.graph.outputs[0]]
        check(program, [x], got)
        below = np.int64(x) - x.max(-1, keepdims=True)
        exact = np.exp(float(np.float32(scale)) * below)
        exact = 256 * exact / exact.sum(-1, keepdims=True)
        off = np.abs(got - low - np.minimum(exact, 255))
        assert off.max() <= 0.5 + 1e-3


# Of TensorFlow Lite 2.19.1's reference kernels: operator, type, input scale and zero
# point, output scale and zero point, options, codes, and what it makes of them.
_OBSERVED = (
    (
        *("SOFTMAX", "int16", (3e-4, 0), (2.0**-15, 0), {}),
        [32767, -32768, 30000, 26123, -5, 29999],
        [16316, 1, 7114, 2223, 1, 7112],
    ),
    (
        *("SOFTMAX", "int8", (0.07, 5), (2.0**-8, -128), {}),
        [127, -128, 101, 100, 33, 127],
        [-17, -128, -110, -111, -128, -17],
    ),
    (
        *("SOFTMAX", "uint8", (0.21, 9), (2.0**-8, 0), {"beta": 0.5}),
        [0, 255, 201, 254, 250, 249],
        [0, 85, 0, 76, 50, 45],
    ),
    (
        *("LOGISTIC", "int16", (3e-4, 0), (2.0**-15, 0), {}),
        [-32768, -7001, -1, 0, 1, 3000, 9999, 32767],
        [2, 3574, 16381, 16384, 16387, 23296, 31213, 32766],
    ),
    (
        *("TANH", "int16", (3e-4, 0), (2.0**-15, 0), {}),
        [-32768, -7001, -1, 0, 1, 3000, 9999, 32767],
        [-32767, -31801, -11, 0, 11, 23472, 32606, 32767],
    ),
    (
        *("EXP", "int16", (3e-5, 0), (9e-5, 0), {}),
        [-32768, -7001, -1, 0, 1, 3000, 9999, 32767],
        [4158, 9006, 11111, 11111, 11111, 12158, 14998, 29694],
    ),
    (
        *("HARD_SWISH", "int8", (0.05, -10), (0.03, -100), {}),
        [-128, -100, -60, -40, -11, -10, 0, 31, 64, 127],
        [-100, -100, -107, -113, -101, -100, -90, -42, 23, 127],
    ),
    (
        *("HARD_SWISH", "uint8", (0.02, 128), (0.011, 20), {}),
        [0, 31, 60, 99, 128, 129, 160, 200, 254, 255],
        [3, 0, 0, 0, 20, 21, 55, 117, 231, 233],
    ),
    (
        *("GELU", "int8", (0.03, -10), (0.03, -100), {"approximate": True}),
        [-128, -100, -60, -40, -11, -10, 0, 31, 64, 127],
        [-100, -100, -103, -106, -100, -100, -94, -63, -27, 37],
    ),
)


class ObservedTest(chex.TestCase):
    @parameterized.parameters(*_OBSERVED)
    def test_codes_of_tensorflow(self, kind, dtype, x_grid, y_grid, options, x, y):
        tensors = [
            tensor(name, (1, len(x)), dtype, *grid)
            for name, grid in (("x", x_grid), ("y", y_grid))
        ]
        program = program_of(kind, tensors[:1], tensors[1:], **options)
        check(program, [np.array([x], dtype)], np.array([y]))


class FunctionsTest(chex.TestCase):
    @parameterized.product(
        kind=["LOGISTIC", "TANH"], dtype=["int8", "uint8"], scale=[0.003, 0.05, 0.3]
    )
    def test_tables_are_float32_step_by_step(self, kind, dtype, scale):
        low, high = range_of(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        y_scale, y_zero = (2.0**-8, low) if kind == "LOGISTIC" else (2.0**-7, low + 128)
        operand = tensor("x", x.shape, dtype, scale, low + 100)
        y = tensor("y", x.shape, dtype, y_scale, y_zero)
        f, wanted = np.float32, []
        for code in range(low, high + 1):
            real = f(scale) * f(code - low - 100)
            value = f(math.tanh(real))
            if kind == "LOGISTIC":
                value = f(1) / (f(1) + f(math.exp(-float(real))))
            rounded = half_away(Fraction(float(value * (f(1) / f(y_scale)))))
            wanted.append(min(max(rounded + y_zero, low), high))
        check(program_of(kind, [operand], [y]), [x], [[wanted]])

    @parameterized.parameters("LOGISTIC", "TANH")
    def test_16_bits_stay_within_three_codes_of_the_function(self, kind):
        x = np.arange(-32768, 32768).astype(np.int16)[None]
        y = tensor("y", x.shape, "int16", 2.0**-15)
        program = program_of(kind, [tensor("x", x.shape, "int16", 3e-4)], [y])
        got = reference.run(program.graph, program.params, [x])[-1]
        check(program, [x], got)
        real = 3e-4 * x
        exact = np.tanh(real) if kind == "TANH" else 1 / (1 + np.exp(-real))
        assert np.abs(got - 2**15 * exact).max() < 3
        assert np.all(np.diff(got) >= 0)

    @parameterized.parameters("int8", "uint8")
    def test_leaky_relu_rescales_each_side(self, dtype):
        low, high = range_of(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        zero, y_zero = low + 90, low + 30
        operand = tensor("x", x.shape, dtype, 0.15, zero)
        y = tensor("y", x.shape, dtype, 0.09, y_zero)
        program = program_of("LEAKY_RELU", [operand], [y], alpha=0.2)
        f, code = np.float32, np.int64(x) - zero
        above = rescaled(code, float(f(0.15) / f(0.09)))
        below = rescaled(code, float(f(0.15) * f(0.2) / f(0.09)))
        wanted = np.where(code >= 0, above, below) + y_zero
        check(program, [x], np.clip(wanted, low, high))

    def test_prelu_has_a_slope_for_each_channel(self):
        x = np.repeat(np.arange(-128, 128)[:, None], 3, 1).astype(np.int8)[None]
        alpha = np.int8([-20, 5, 127])
        operands = [
            tensor("x", x.shape, scale=0.15, zero_point=7),
            tensor("a", (1, 3), scale=0.01, zero_point=2, data=alpha[None]),
        ]
        y = tensor("y", x.shape, scale=0.09, zero_point=-3)
        f, code = np.float32, np.int64(x) - 7
        above = rescaled(code, float(f(0.15) / f(0.09)))
        below = rescaled(
            code * (np.int64(alpha) - 2), float(f(0.15) * f(0.01) / f(0.09))
        )
        wanted = np.where(code >= 0, above, below) - 3
        program = program_of("PRELU", operands, [y])
        check(program, [x], np.clip(wanted, -128, 127))

    @parameterized.product(kind=["RELU", "RELU6", "QUANTIZE"], dtype=["int8", "uint8"])
    def test_from_grid_to_grid(self, kind, dtype):
        low, high = range_of(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        operand = tensor("x", x.shape, dtype, 0.11, low + 100)
        y = tensor("y", x.shape, dtype, 0.04, low + 20)
        f = np.float32
        ratio = float(f(0.11) / f(0.04))
        if kind == "QUANTIZE":
            ratio = float(np.float64(f(0.11)) / np.float64(f(0.04)))
        wanted = rescaled(np.int64(x) - low - 100, ratio) + low + 20
        ends = [low if kind == "QUANTIZE" else low + 20, high]
        if kind == "RELU6":
            ends[1] = low + 20 + 150
        check(program_of(kind, [operand], [y]), [x], np.clip(wanted, *ends))

    def test_hard_swish_is_within_a_code_of_the_function(self):
        x = np.arange(-128, 128).astype(np.int8)[None]
        operand = tensor("x", x.shape, scale=0.05, zero_point=-10)
        y = tensor("y", x.shape, scale=0.03, zero_point=-100)
        program = program_of("HARD_SWISH", [operand], [y])
        got = reference.run(program.graph, program.params, [x])[-1]
        check(program, [x], got)
        real = 0.05 * (x + 10.0)
        exact = real * np.clip(real + 3, 0, 6) / 6 / 0.03 - 100
        assert np.abs(got - np.clip(exact, -128, 127)).max() <= 1.01
