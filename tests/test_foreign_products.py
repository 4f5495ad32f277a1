"""Products of TFLite against Python integers."""

import itertools

import chex
import numpy as np
import pytest
from absl.testing import parameterized

from tests.foreign import (
    Fraction,
    bias_of,
    check,
    convolve,
    draw_codes,
    half_away,
    map_integers,
    multiplier_of,
    program_of,
    range_of,
    reduced_to_16_bits,
    rescaled,
    round_once,
    round_twice,
    tensor,
    whole_numbers,
)

pytestmark = pytest.mark.slow  # Many compilations.


class ProductsTest(chex.TestCase):
    def _dense(
        self, dtype, zeros, *, per_channel=True, rule="tflite_double", **options
    ):
        rng = np.random.default_rng(4)
        x = draw_codes(rng, dtype, (5, 7))
        is_unsigned = dtype == "uint8"
        w = rng.integers(*((0, 256) if is_unsigned else (-127, 128)), (4, 7))
        w_zero = 97 if is_unsigned else 0
        count = 4 if per_channel else 1
        scale = np.float32(rng.uniform(1e-3, 2e-3, count))
        bias = rng.integers(-3000, 3000, 4)
        operands = [
            tensor("x", (1, 7), dtype, 0.02, zeros[0]),
            tensor("w", (4, 7), "uint8" if is_unsigned else "int8", scale, w_zero, w),
            bias_of(bias, "int64" if dtype == "int16" else "int32"),
        ]
        y = tensor("y", (1, 4), dtype, 0.03 if dtype != "int16" else 0.05, zeros[1])
        program = program_of("FULLY_CONNECTED", operands, [y], rule, **options)
        acc = (np.int64(x) - zeros[0]) @ (w - w_zero).T + bias
        return program, x, acc, np.float32(0.02), scale, np.float32(y.scale[0])

    @parameterized.product(
        zeros=[(-128, 127), (127, -128), (3, -7)], per_channel=[True, False]
    )
    def test_dense_int8(self, zeros, per_channel):
        case = self._dense("int8", zeros, per_channel=per_channel)
        program, x, acc, s, w, y = case
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        if not per_channel:  # One scale is multiplied in float32.
            ratio = np.float64(s * w) / np.float64(y)
        columns = [rescaled(acc[:, c], np.resize(ratio, 4)[c]) for c in range(4)]
        wanted = np.clip(np.stack(columns, 1) + zeros[1], -128, 127)
        check(program, [x], wanted)

    @parameterized.parameters((0, 255), (255, 0), (128, 100))
    def test_dense_uint8_with_a_zero_point_of_the_weights(self, *zeros):
        program, x, acc, s, w, y = self._dense("uint8", zeros, per_channel=False)
        ratio = float(np.float64(s * w[0]) / np.float64(y))
        check(program, [x], np.clip(rescaled(acc, ratio) + zeros[1], 0, 255))

    def test_dense_int16_has_64_bit_accumulators(self):
        program, x, acc, s, w, y = self._dense("int16", (0, 0))
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        wanted = np.zeros_like(acc)
        for c in range(4):
            multiplier, shift = multiplier_of(float(ratio[c]))
            pair = reduced_to_16_bits(multiplier), shift - 16
            wanted[:, c] = map_integers(lambda a, p=pair: round_once(a, *p), acc[:, c])
        check(program, [x], np.clip(wanted, *range_of("int16")))

    @parameterized.parameters("RELU", "RELU6", "RELU_N1_TO_1")
    def test_activations_bound_the_codes(self, kind):
        zeros = (5, -40)
        options = {"fused_activation_function": kind}
        program, x, acc, s, w, y = self._dense("int8", zeros, **options)
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        columns = [rescaled(acc[:, c], ratio[c]) for c in range(4)]
        low, high = {"RELU": (0, 99), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}[kind]
        ends = [
            min(max(-40 + half_away(Fraction(float(np.float32(v) / y))), -128), 127)
            for v in (low, high)
        ]
        check(program, [x], np.clip(np.stack(columns, 1) - 40, *ends))

    def test_dense_layers_may_have_their_own_rule(self):
        program, x, acc, s, w, y = self._dense("int8", (0, 0), rule="tflite_single")
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        columns = [rescaled(acc[:, c], ratio[c], round_once) for c in range(4)]
        check(program, [x], np.clip(np.stack(columns, 1), -128, 127))

    @parameterized.product(
        kind=["CONV_2D", "DEPTHWISE_CONV_2D"],
        padding=["SAME", "VALID"],
        strides=[(1, 1), (2, 1), (1, 3)],
        dtype=["int8", "uint8"],
    )
    def test_convolutions(self, kind, padding, strides, dtype):
        rng = np.random.default_rng(5)
        zero = 11 if dtype == "int8" else 200
        x = draw_codes(rng, dtype, (2, 6, 5, 2))
        depthwise = kind == "DEPTHWISE_CONV_2D"
        shape = (1, 3, 2, 4) if depthwise else (4, 3, 2, 2)
        w, bias = rng.integers(-127, 128, shape), rng.integers(-500, 500, 4)
        w_zero = 0
        if dtype == "uint8":
            w, w_zero = w + 128, 130
        kernel = w - w_zero
        if depthwise:  # As a full one, each output with the input it has.
            full = np.zeros((4, 3, 2, 2), np.int64)
            for c in range(4):
                full[c, ..., c // 2] = kernel[0, ..., c]
            kernel = full
        acc = convolve(np.int64(x) - zero, kernel, padding, strides) + bias
        scale = [1e-3] if dtype == "uint8" else [1e-3, 2e-3, 5e-4, 1e-3]
        operands = [
            tensor("x", (1, 6, 5, 2), dtype, 0.02, zero),
            tensor("w", shape, dtype, scale, w_zero, w, 3 if depthwise else 0),
            bias_of(bias),
        ]
        y = tensor("y", (1, *acc.shape[1:]), dtype, 0.02, zero)
        options = {"padding": padding, "stride_h": strides[0], "stride_w": strides[1]}
        program = program_of(kind, operands, [y], **options)
        s = np.float32(0.02)
        ratios = [
            float(np.float64(s) * np.float64(np.float32(v)) / np.float64(s))
            if len(scale) > 1
            else float(np.float64(s * np.float32(v)) / np.float64(s))
            for v in np.resize(scale, 4)
        ]
        channels = [rescaled(acc[..., c], ratios[c]) for c in range(4)]
        wanted = np.clip(np.stack(channels, -1) + zero, *range_of(dtype))
        check(program, [x], wanted)

    @parameterized.product(padding=["SAME", "VALID"], strides=[(1, 1), (2, 3)])
    def test_transposed_convolution_spreads_each_code(self, padding, strides):
        rng = np.random.default_rng(6)
        x, w = draw_codes(rng, "int8", (2, 3, 4, 2)), rng.integers(-9, 10, (3, 3, 4, 2))
        sizes = [
            n * s if padding == "SAME" else (n - 1) * s + k
            for n, s, k in zip((3, 4), strides, (3, 4), strict=True)
        ]
        before = [
            max((-(-n // s) - 1) * s + k - n, 0) // 2 if padding == "SAME" else 0
            for n, s, k in zip(sizes, strides, (3, 4), strict=True)
        ]
        acc = np.zeros((2, sizes[0] + 9, sizes[1] + 9, 3), np.int64)
        for i, j, p, q in itertools.product(range(3), range(4), range(3), range(4)):
            at = i * strides[0] + p - before[0], j * strides[1] + q - before[1]
            if min(at) >= 0:
                acc[:, *at] += (np.int64(x[:, i, j]) - 4) @ w[:, p, q].T
        acc = acc[:, : sizes[0], : sizes[1]]
        operands = [
            whole_numbers([1, *sizes, 3]),
            tensor("w", w.shape, "int8", [1e-2] * 3, 0, w),
            tensor("x", (1, 3, 4, 2), "int8", 0.5, 4),
        ]
        y = tensor("y", (1, *sizes, 3), "int8", 0.5, -9)
        options = {"padding": padding, "stride_h": strides[0], "stride_w": strides[1]}
        program = program_of("TRANSPOSE_CONV", operands, [y], **options)
        ratio = float(np.float64(np.float32(1e-2)))
        check(program, [x], np.clip(rescaled(acc, ratio) - 9, -128, 127))

    def test_xnnpack_multiplies_in_float32(self):
        case = self._dense("int8", (3, -7), rule="fp32_half_even")
        program, x, acc, s, w, y = case
        wanted = np.rint(np.float32(acc) * (s * w / y)).astype(np.int64) - 7
        check(program, [x], np.clip(wanted, -128, 127))

    def test_refuses_an_accumulator_that_could_overflow(self):
        n = 1 << 18
        w = np.full((1, n), 127)
        operands = [tensor("x", (1, n)), tensor("w", w.shape, data=w)]
        with pytest.raises(OverflowError, match="FULLY_CONNECTED.*'y'"):
            program_of("FULLY_CONNECTED", operands, [tensor("y", (1, 1))])


class TwoTensorsTest(chex.TestCase):
    @parameterized.product(
        kind=["ADD", "SUB"],
        grids=[
            ("int8", (0.05, -128), (0.03, 127), (0.06, 0)),
            ("int8", (0.05, 0), (0.05, 0), (0.05, 0)),
            ("uint8", (0.01, 0), (0.2, 255), (0.15, 128)),
            ("int16", (1e-4, 0), (3e-4, 0), (2e-4, 0)),
        ],
    )
    def test_sums_round_each_operand_and_the_sum(self, kind, grids):
        dtype, *grids = grids
        rng = np.random.default_rng(7)
        a, b = (draw_codes(rng, dtype, (20, 9)) for _ in range(2))
        operands = [tensor("ab"[k], (1, 9), dtype, *grids[k]) for k in (0, 1)]
        y = tensor("y", (1, 9), dtype, *grids[2])
        program = program_of(kind, operands, [y])
        scales = [float(np.float32(s)) for s, _ in grids]
        left, twice = 15 if dtype == "int16" else 20, 2 * max(scales[:2])
        parts, signs = [], (1, -1 if kind == "SUB" else 1)
        for k, x in enumerate((a, b)):
            multiplier, shift = multiplier_of(scales[k] / twice)
            pair, wide = (signs[k] * multiplier, shift), np.int64(x) - grids[k][1]
            parts.append(
                map_integers(lambda q, p=pair: round_twice(q, *p), wide << left)
            )
        total = rescaled(parts[0] + parts[1], twice / (2.0**left * scales[2]))
        wanted = np.clip(total + grids[2][1], *range_of(dtype))
        check(program, [a, b], wanted)

    def test_a_constant_and_axes_of_size_one_repeat(self):
        rng = np.random.default_rng(8)
        a, b = draw_codes(rng, "int8", (3, 2, 5, 4)), draw_codes(rng, "int8", (4,))
        operands = [
            tensor("a", (1, 2, 5, 4), scale=0.05, zero_point=3),
            tensor("b", (4,), scale=0.02, zero_point=-5, data=b),
        ]
        y = tensor("y", (1, 2, 5, 4), scale=0.1, zero_point=1)
        program = program_of("MUL", operands, [y])
        f = np.float32
        ratio = float(f(0.05) * f(0.02) / f(0.1))
        acc = (np.int64(a) - 3) * (np.int64(b) + 5)
        check(program, [a], np.clip(rescaled(acc, ratio) + 1, -128, 127))

    @parameterized.product(adj_x=[False, True], adj_y=[False, True])
    def test_products_of_two_matrices(self, adj_x, adj_y):
        rng = np.random.default_rng(9)
        shapes = [(2, 5, 3) if adj_x else (2, 3, 5), (2, 4, 5) if adj_y else (2, 5, 4)]
        a, b = (draw_codes(rng, "int8", (2, *shape)) for shape in shapes)
        operands = [
            tensor("a", (1, *shapes[0]), scale=0.05, zero_point=3),
            tensor("b", (1, *shapes[1]), scale=0.02, zero_point=-5),
        ]
        y = tensor("y", (1, 2, 3, 4), scale=0.3, zero_point=1)
        program = program_of("BATCH_MATMUL", operands, [y], adj_x=adj_x, adj_y=adj_y)
        left, right = np.int64(a) - 3, np.int64(b) + 5
        left = left.swapaxes(-1, -2) if adj_x else left
        right = right.swapaxes(-1, -2) if adj_y else right
        f = np.float32
        ratio = float(np.float64(f(0.05) * f(0.02)) / np.float64(f(0.3)))
        wanted = np.clip(rescaled(left @ right, ratio) + 1, -128, 127)
        check(program, [a, b], wanted)
