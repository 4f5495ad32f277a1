"""TFLite graphs against Python integers, `fractions`, and C's float32 step by step."""

import fractions
import itertools
import math
import os
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import qjax
from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.graph import reference
from qjax.graph.operations.shifts import rescale
from qjax.integer import fixed_point, requantize, requantize_sum, tflite_multiplier

pytestmark = pytest.mark.slow  # Many compilations.

Fraction = fractions.Fraction
INT32 = -(2**31), 2**31 - 1


# Definitions in Python integers.


def _half_up(x):
    """A fraction to the nearest integer, halves up."""
    return math.floor(x + Fraction(1, 2))


def _half_away(x):
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def _wrapped(x):
    return (x + 2**31) % 2**32 - 2**31


def _double(acc, multiplier, shift):
    """Twice rounded: at 2^-31, halves up, and then halves away from zero."""
    left, right = max(31 - shift, 0), max(shift - 31, 0)
    high = _half_up(Fraction(_wrapped(int(acc) << left) * int(multiplier), 2**31))
    return _half_away(Fraction(min(high, INT32[1]), 2**right))


def _single(acc, multiplier, shift):
    return _half_up(Fraction(int(acc) * int(multiplier), 2 ** int(shift)))


_RULES = {"tflite_double": _double, "tflite_single": _single}


def _map(f, *arrays):
    """A function of Python integers, number by number."""
    arrays = np.broadcast_arrays(*arrays)
    flat = [f(*map(int, row)) for row in zip(*map(np.ravel, arrays), strict=True)]
    return np.array(flat, np.int64).reshape(arrays[0].shape)


def _multiplier(ratio):
    """TFLite's multiplier and shift, from the exact value of the ratio."""
    if not ratio:
        return 0, 31
    _, exponent = math.frexp(ratio)
    multiplier = _half_up(Fraction(ratio) * Fraction(2) ** (31 - exponent))
    if multiplier == 2**31:
        multiplier, exponent = 2**30, exponent + 1
    return (multiplier, 31 - exponent) if exponent >= -31 else (0, 31)


def _rescale(acc, ratio, rule=_double):
    multiplier, shift = _multiplier(float(ratio))
    return _map(lambda a: rule(a, multiplier, shift), acc)


# Graphs of one operator.


def _range(dtype):
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _tensor(name, shape, dtype="int8", scale=0.1, zero_point=0, data=None, axis=0):
    scales = tuple(np.atleast_1d(np.float32(scale)).tolist())
    zeros = tuple(np.broadcast_to(zero_point, len(scales)).tolist())
    return Tensor(name, tuple(shape), dtype, scales, zeros, axis, data)


def _whole(values, name="shape"):
    data = np.asarray(values, np.int32)
    return Tensor(name, data.shape, "int32", data=data)


def _bias(values, dtype="int32"):
    data = np.asarray(values, dtype)
    return _tensor("bias", data.shape, dtype, np.ones(len(data)), 0, data)


def _build(name, operands, results, rule="tflite_double", **options):
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


def _check(program, inputs, wanted):
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


def _codes(rng, dtype, shape):
    low, high = _range(dtype)
    x = rng.integers(low, high + 1, shape)
    x.reshape(-1)[:2] = low, high
    return x.astype(dtype)


class RulesTest(chex.TestCase):
    def test_multiplier_is_the_ratio_to_31_bits_halves_up(self):
        rng = np.random.default_rng(0)
        ratios = [0.0, 1.0, 0.5, 2.0**-32, 2.0**-33, 1 - 2.0**-33, 2.0**30]
        ratios += list(2.0 ** rng.uniform(-34, 30, 300))
        ratios += [(2**31 + 1) * 2.0**-40, (2**32 - 1) * 2.0**-35]  # Halves.
        for ratio in ratios:
            got = tuple(int(n) for n in tflite_multiplier(ratio))
            assert got == _multiplier(ratio), ratio

    @parameterized.parameters(-1.0, np.inf, np.nan, 2.0**31)
    def test_refuses_what_is_no_ratio(self, ratio):
        with pytest.raises(ValueError, match="ratio of scales"):
            tflite_multiplier(ratio)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*_RULES)
    def test_requantize_matches_python_integers(self, rule):
        rng = np.random.default_rng(1)
        n = 4000
        acc = rng.integers(*INT32, n, endpoint=True) >> rng.integers(0, 31, n)
        acc[:6] = [*INT32, -1, 0, 1, INT32[0] + 1]
        multiplier = rng.integers(2**30, 2**31, n)
        multiplier[::7] = 2**30  # Ties.
        shift = rng.integers(20, 63, n)
        if rule == "tflite_double":
            multiplier[1::5] *= -1  # Of a difference.
        args = (jnp.int32(acc), jnp.int32(multiplier), jnp.int32(shift))
        f = lambda *args: requantize(*args, qmin=INT32[0], qmax=INT32[1], rule=rule)
        wanted = np.clip(_map(_RULES[rule], acc, multiplier, shift), *INT32)
        np.testing.assert_array_equal(self.variant(f)(*args), wanted)
        wide = [np.int64(a) for a in (acc, multiplier, shift)]
        got = np.clip(rescale(*wide, rule), *INT32)
        np.testing.assert_array_equal(got, wanted)

    @parameterized.parameters(*_RULES)
    def test_ties(self, rule):
        """Quarters, halves and three quarters on either side of zero."""
        acc = np.arange(-40, 41)
        got = requantize(acc, 2**30, 32, qmin=-128, qmax=127, rule=rule)  # acc / 4
        wanted = _map(lambda a: _RULES[rule](a, 2**30, 32), acc)
        np.testing.assert_array_equal(got, wanted)
        at_half = {a: int(q) for a, q in zip(acc, got, strict=True) if a in (-2, 2)}
        assert at_half == {-2: 0 if rule == "tflite_single" else -1, 2: 1} or (
            rule == "tflite_double" and at_half == {-2: 0, 2: 1}
        )

    def test_a_left_shift_drops_what_leaves_int32(self):
        got = requantize(
            jnp.int32([2**30]),
            2**30,
            28,
            qmin=INT32[0],
            qmax=INT32[1],
            rule="tflite_double",
        )
        assert int(got[0]) == _double(2**30, 2**30, 28) == 0

    def test_saturates_where_both_factors_are_the_least_integer(self):
        args = {"qmin": INT32[0], "qmax": INT32[1], "rule": "tflite_double"}
        got = requantize(jnp.int32([INT32[0]]), INT32[0], 31, **args)
        assert int(got[0]) == INT32[1]

    def test_short_multipliers_round_as_tflite_does_for_64_bits(self):
        """``(acc * reduced + 2^(14 - e)) >> (15 - e)``."""
        rng = np.random.default_rng(2)
        acc = rng.integers(-(2**31), 2**31, 500)
        for ratio in (1e-3, 0.7, 3e-6, 0.99999999):
            multiplier, shift = (int(n) for n in tflite_multiplier(ratio))
            reduced = int(_reduced(multiplier))
            exponent = 31 - shift
            wanted = _map(
                lambda a, r=reduced, e=exponent: (a * r + (1 << 14 - e)) >> 15 - e, acc
            )
            got = requantize(
                jnp.int32(acc),
                reduced,
                shift - 16,
                qmin=INT32[0],
                qmax=INT32[1],
                rule="tflite_single",
            )
            np.testing.assert_array_equal(got, wanted)

    @chex.variants(with_jit=True, without_jit=True)
    def test_float32_multipliers_round_as_xnnpack_does(self):
        """The product in float32, to the nearest integer, halves to even."""
        rng = np.random.default_rng(3)
        acc = rng.integers(-(2**27), 2**27, 4000)
        scale = np.float32(2.0 ** rng.uniform(-20, 2, 4000))
        scale[::3] = np.float32(2.0) ** rng.integers(-20, 2, len(scale[::3]))
        wanted = np.rint(np.float32(acc) * scale).astype(np.int64) + 3
        args = (jnp.int32(acc), *map(jnp.asarray, fixed_point(scale)), jnp.int32(3))
        f = lambda *args: requantize(*args, qmin=-128, qmax=127, rule="fp32_half_even")
        got = self.variant(f)(*args)
        np.testing.assert_array_equal(got, np.clip(wanted, -128, 127))

    def test_a_sum_is_not_rounded_twice(self):
        terms = [(jnp.int32([1]), 2**30)] * 2
        with pytest.raises(ValueError, match="one by one"):
            requantize_sum(terms, 31, qmin=0, qmax=1, rule="tflite_double")
        got = requantize_sum(terms, 31, qmin=0, qmax=9, rule="tflite_single")
        assert int(got[0]) == 1


def _reduced(multiplier):
    """15 bits of a multiplier of 31."""
    return 0x7FFF if multiplier >= 0x7FFF0000 else (multiplier + (1 << 15)) >> 16


class ProductsTest(chex.TestCase):
    def _dense(
        self, dtype, zeros, *, per_channel=True, rule="tflite_double", **options
    ):
        rng = np.random.default_rng(4)
        x = _codes(rng, dtype, (5, 7))
        is_unsigned = dtype == "uint8"
        w = rng.integers(*((0, 256) if is_unsigned else (-127, 128)), (4, 7))
        w_zero = 97 if is_unsigned else 0
        count = 4 if per_channel else 1
        scale = np.float32(rng.uniform(1e-3, 2e-3, count))
        bias = rng.integers(-3000, 3000, 4)
        operands = [
            _tensor("x", (1, 7), dtype, 0.02, zeros[0]),
            _tensor("w", (4, 7), "uint8" if is_unsigned else "int8", scale, w_zero, w),
            _bias(bias, "int64" if dtype == "int16" else "int32"),
        ]
        y = _tensor("y", (1, 4), dtype, 0.03 if dtype != "int16" else 0.05, zeros[1])
        program = _build("FULLY_CONNECTED", operands, [y], rule, **options)
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
        columns = [_rescale(acc[:, c], np.resize(ratio, 4)[c]) for c in range(4)]
        wanted = np.clip(np.stack(columns, 1) + zeros[1], -128, 127)
        _check(program, [x], wanted)

    @parameterized.parameters((0, 255), (255, 0), (128, 100))
    def test_dense_uint8_with_a_zero_point_of_the_weights(self, *zeros):
        program, x, acc, s, w, y = self._dense("uint8", zeros, per_channel=False)
        ratio = float(np.float64(s * w[0]) / np.float64(y))
        _check(program, [x], np.clip(_rescale(acc, ratio) + zeros[1], 0, 255))

    def test_dense_int16_has_64_bit_accumulators(self):
        program, x, acc, s, w, y = self._dense("int16", (0, 0))
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        wanted = np.zeros_like(acc)
        for c in range(4):
            multiplier, shift = _multiplier(float(ratio[c]))
            pair = _reduced(multiplier), shift - 16
            wanted[:, c] = _map(lambda a, p=pair: _single(a, *p), acc[:, c])
        _check(program, [x], np.clip(wanted, *_range("int16")))

    @parameterized.parameters("RELU", "RELU6", "RELU_N1_TO_1")
    def test_activations_bound_the_codes(self, kind):
        zeros = (5, -40)
        options = {"fused_activation_function": kind}
        program, x, acc, s, w, y = self._dense("int8", zeros, **options)
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        columns = [_rescale(acc[:, c], ratio[c]) for c in range(4)]
        low, high = {"RELU": (0, 99), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}[kind]
        ends = [
            min(max(-40 + _half_away(Fraction(float(np.float32(v) / y))), -128), 127)
            for v in (low, high)
        ]
        _check(program, [x], np.clip(np.stack(columns, 1) - 40, *ends))

    def test_dense_layers_may_have_their_own_rule(self):
        program, x, acc, s, w, y = self._dense("int8", (0, 0), rule="tflite_single")
        ratio = np.float64(s) * np.float64(w) / np.float64(y)
        columns = [_rescale(acc[:, c], ratio[c], _single) for c in range(4)]
        _check(program, [x], np.clip(np.stack(columns, 1), -128, 127))

    @parameterized.product(
        kind=["CONV_2D", "DEPTHWISE_CONV_2D"],
        padding=["SAME", "VALID"],
        strides=[(1, 1), (2, 1), (1, 3)],
        dtype=["int8", "uint8"],
    )
    def test_convolutions(self, kind, padding, strides, dtype):
        rng = np.random.default_rng(5)
        zero = 11 if dtype == "int8" else 200
        x = _codes(rng, dtype, (2, 6, 5, 2))
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
        acc = _convolve(np.int64(x) - zero, kernel, padding, strides) + bias
        scale = [1e-3] if dtype == "uint8" else [1e-3, 2e-3, 5e-4, 1e-3]
        operands = [
            _tensor("x", (1, 6, 5, 2), dtype, 0.02, zero),
            _tensor("w", shape, dtype, scale, w_zero, w, 3 if depthwise else 0),
            _bias(bias),
        ]
        y = _tensor("y", (1, *acc.shape[1:]), dtype, 0.02, zero)
        options = {"padding": padding, "stride_h": strides[0], "stride_w": strides[1]}
        program = _build(kind, operands, [y], **options)
        s = np.float32(0.02)
        ratios = [
            float(np.float64(s) * np.float64(np.float32(v)) / np.float64(s))
            if len(scale) > 1
            else float(np.float64(s * np.float32(v)) / np.float64(s))
            for v in np.resize(scale, 4)
        ]
        channels = [_rescale(acc[..., c], ratios[c]) for c in range(4)]
        wanted = np.clip(np.stack(channels, -1) + zero, *_range(dtype))
        _check(program, [x], wanted)

    @parameterized.product(padding=["SAME", "VALID"], strides=[(1, 1), (2, 3)])
    def test_transposed_convolution_spreads_each_code(self, padding, strides):
        rng = np.random.default_rng(6)
        x, w = _codes(rng, "int8", (2, 3, 4, 2)), rng.integers(-9, 10, (3, 3, 4, 2))
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
            _whole([1, *sizes, 3]),
            _tensor("w", w.shape, "int8", [1e-2] * 3, 0, w),
            _tensor("x", (1, 3, 4, 2), "int8", 0.5, 4),
        ]
        y = _tensor("y", (1, *sizes, 3), "int8", 0.5, -9)
        options = {"padding": padding, "stride_h": strides[0], "stride_w": strides[1]}
        program = _build("TRANSPOSE_CONV", operands, [y], **options)
        ratio = float(np.float64(np.float32(1e-2)))
        _check(program, [x], np.clip(_rescale(acc, ratio) - 9, -128, 127))

    def test_xnnpack_multiplies_in_float32(self):
        case = self._dense("int8", (3, -7), rule="fp32_half_even")
        program, x, acc, s, w, y = case
        wanted = np.rint(np.float32(acc) * (s * w / y)).astype(np.int64) - 7
        _check(program, [x], np.clip(wanted, -128, 127))

    def test_refuses_an_accumulator_that_could_overflow(self):
        n = 1 << 18
        w = np.full((1, n), 127)
        operands = [_tensor("x", (1, n)), _tensor("w", w.shape, data=w)]
        with pytest.raises(OverflowError, match="FULLY_CONNECTED.*'y'"):
            _build("FULLY_CONNECTED", operands, [_tensor("y", (1, 1))])


def _convolve(x, kernel, padding, strides):
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
        a, b = (_codes(rng, dtype, (20, 9)) for _ in range(2))
        operands = [_tensor("ab"[k], (1, 9), dtype, *grids[k]) for k in (0, 1)]
        y = _tensor("y", (1, 9), dtype, *grids[2])
        program = _build(kind, operands, [y])
        scales = [float(np.float32(s)) for s, _ in grids]
        left, twice = 15 if dtype == "int16" else 20, 2 * max(scales[:2])
        parts, signs = [], (1, -1 if kind == "SUB" else 1)
        for k, x in enumerate((a, b)):
            multiplier, shift = _multiplier(scales[k] / twice)
            pair, wide = (signs[k] * multiplier, shift), np.int64(x) - grids[k][1]
            parts.append(_map(lambda q, p=pair: _double(q, *p), wide << left))
        total = _rescale(parts[0] + parts[1], twice / (2.0**left * scales[2]))
        wanted = np.clip(total + grids[2][1], *_range(dtype))
        _check(program, [a, b], wanted)

    def test_a_constant_and_axes_of_size_one_repeat(self):
        rng = np.random.default_rng(8)
        a, b = _codes(rng, "int8", (3, 2, 5, 4)), _codes(rng, "int8", (4,))
        operands = [
            _tensor("a", (1, 2, 5, 4), scale=0.05, zero_point=3),
            _tensor("b", (4,), scale=0.02, zero_point=-5, data=b),
        ]
        y = _tensor("y", (1, 2, 5, 4), scale=0.1, zero_point=1)
        program = _build("MUL", operands, [y])
        f = np.float32
        ratio = float(f(0.05) * f(0.02) / f(0.1))
        acc = (np.int64(a) - 3) * (np.int64(b) + 5)
        _check(program, [a], np.clip(_rescale(acc, ratio) + 1, -128, 127))

    @parameterized.product(adj_x=[False, True], adj_y=[False, True])
    def test_products_of_two_matrices(self, adj_x, adj_y):
        rng = np.random.default_rng(9)
        shapes = [(2, 5, 3) if adj_x else (2, 3, 5), (2, 4, 5) if adj_y else (2, 5, 4)]
        a, b = (_codes(rng, "int8", (2, *shape)) for shape in shapes)
        operands = [
            _tensor("a", (1, *shapes[0]), scale=0.05, zero_point=3),
            _tensor("b", (1, *shapes[1]), scale=0.02, zero_point=-5),
        ]
        y = _tensor("y", (1, 2, 3, 4), scale=0.3, zero_point=1)
        program = _build("BATCH_MATMUL", operands, [y], adj_x=adj_x, adj_y=adj_y)
        left, right = np.int64(a) - 3, np.int64(b) + 5
        left = left.swapaxes(-1, -2) if adj_x else left
        right = right.swapaxes(-1, -2) if adj_y else right
        f = np.float32
        ratio = float(np.float64(f(0.05) * f(0.02)) / np.float64(f(0.3)))
        wanted = np.clip(_rescale(left @ right, ratio) + 1, -128, 127)
        _check(program, [a, b], wanted)


class MeansTest(chex.TestCase):
    @parameterized.product(
        dtype=["int8", "uint8"], padding=["SAME", "VALID"], size=[2, 3]
    )
    def test_average_pool_divides_by_what_it_sees(self, dtype, padding, size):
        rng = np.random.default_rng(10)
        x = _codes(rng, dtype, (2, 5, 7, 3))
        ones = np.ones((1, 5, 7, 1), np.int64)
        kernel = np.zeros((3, size, size, 3), np.int64)
        kernel[range(3), :, :, range(3)] = 1
        total = _convolve(np.int64(x), kernel, padding, (2, 2))
        count = _convolve(ones, np.ones((1, size, size, 1), int), padding, (2, 2))
        wanted = _map(lambda a, n: _half_away(Fraction(a, n)), total, count)
        options = {"filter_height": size, "filter_width": size, "padding": padding}
        options |= {"stride_h": 2, "stride_w": 2}
        tensors = [_tensor(n, (1, 5, 7, 3), dtype) for n in "xy"]
        program = _build("AVERAGE_POOL_2D", tensors[:1], tensors[1:], **options)
        _check(program, [x], wanted)
        most = _build("MAX_POOL_2D", tensors[:1], tensors[1:], **options)
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
        _check(most, [x], np.max([part[:, :n, :m] for part in found], 0))

    @parameterized.product(
        axes=[[1, 2], [-1], [1, 2, 3]],
        keep_dims=[True, False],
        zeros=[(-128, 127), (9, 2)],
    )
    def test_the_divisor_of_a_mean_goes_into_its_multiplier(
        self, axes, keep_dims, zeros
    ):
        rng = np.random.default_rng(11)
        x = _codes(rng, "int8", (3, 4, 5, 6))
        over = tuple(d % 4 for d in axes)
        total = (np.int64(x) - zeros[0]).sum(over, keepdims=keep_dims)
        n = math.prod(x.shape[d] for d in over)
        f = np.float32
        multiplier, shift = _multiplier(
            float(np.float64(f(0.05)) / np.float64(f(0.02)))
        )
        more = n.bit_length() - 1
        pair = (multiplier << more) // n, shift + more
        wanted = _map(lambda a: _double(a, *pair), total) + zeros[1]
        operands = [_tensor("x", (1, 4, 5, 6), scale=0.05, zero_point=zeros[0])]
        operands.append(_whole(axes))
        y = _tensor("y", (1, *total.shape[1:]), scale=0.02, zero_point=zeros[1])
        program = _build("MEAN", operands, [y], keep_dims=keep_dims)
        _check(program, [x], np.clip(wanted, -128, 127))

    @parameterized.product(dtype=["int8", "uint8"], scale=[0.01, 0.1, 0.7], n=[2, 40])
    def test_softmax_is_within_a_code_of_the_real_one(self, dtype, scale, n):
        rng = np.random.default_rng(12)
        low, _ = _range(dtype)
        x = np.concatenate([_codes(rng, dtype, (40, n)), np.full((1, n), 7, dtype)])
        x = x.astype(dtype)
        grid = {"dtype": dtype, "scale": 2.0**-8, "zero_point": low}
        y = _tensor("y", (1, n), **grid)
        program = _build("SOFTMAX", [_tensor("x", (1, n), dtype, scale)], [y], beta=1.0)
        found = reference.run(program.graph, program.params, [x])
        got = found[program.graph.outputs[0]]
        _check(program, [x], got)
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
            _tensor(name, (1, len(x)), dtype, *grid)
            for name, grid in (("x", x_grid), ("y", y_grid))
        ]
        program = _build(kind, tensors[:1], tensors[1:], **options)
        _check(program, [np.array([x], dtype)], np.array([y]))


class FunctionsTest(chex.TestCase):
    @parameterized.product(
        kind=["LOGISTIC", "TANH"], dtype=["int8", "uint8"], scale=[0.003, 0.05, 0.3]
    )
    def test_tables_are_float32_step_by_step(self, kind, dtype, scale):
        low, high = _range(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        y_scale, y_zero = (2.0**-8, low) if kind == "LOGISTIC" else (2.0**-7, low + 128)
        operand = _tensor("x", x.shape, dtype, scale, low + 100)
        y = _tensor("y", x.shape, dtype, y_scale, y_zero)
        f, wanted = np.float32, []
        for code in range(low, high + 1):
            real = f(scale) * f(code - low - 100)
            value = f(math.tanh(real))
            if kind == "LOGISTIC":
                value = f(1) / (f(1) + f(math.exp(-float(real))))
            rounded = _half_away(Fraction(float(value * (f(1) / f(y_scale)))))
            wanted.append(min(max(rounded + y_zero, low), high))
        _check(_build(kind, [operand], [y]), [x], [[wanted]])

    @parameterized.parameters("LOGISTIC", "TANH")
    def test_16_bits_stay_within_three_codes_of_the_function(self, kind):
        x = np.arange(-32768, 32768).astype(np.int16)[None]
        y = _tensor("y", x.shape, "int16", 2.0**-15)
        program = _build(kind, [_tensor("x", x.shape, "int16", 3e-4)], [y])
        got = reference.run(program.graph, program.params, [x])[-1]
        _check(program, [x], got)
        real = 3e-4 * x
        exact = np.tanh(real) if kind == "TANH" else 1 / (1 + np.exp(-real))
        assert np.abs(got - 2**15 * exact).max() < 3
        assert np.all(np.diff(got) >= 0)

    @parameterized.parameters("int8", "uint8")
    def test_leaky_relu_rescales_each_side(self, dtype):
        low, high = _range(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        zero, y_zero = low + 90, low + 30
        operand = _tensor("x", x.shape, dtype, 0.15, zero)
        y = _tensor("y", x.shape, dtype, 0.09, y_zero)
        program = _build("LEAKY_RELU", [operand], [y], alpha=0.2)
        f, code = np.float32, np.int64(x) - zero
        above = _rescale(code, float(f(0.15) / f(0.09)))
        below = _rescale(code, float(f(0.15) * f(0.2) / f(0.09)))
        wanted = np.where(code >= 0, above, below) + y_zero
        _check(program, [x], np.clip(wanted, low, high))

    def test_prelu_has_a_slope_for_each_channel(self):
        x = np.repeat(np.arange(-128, 128)[:, None], 3, 1).astype(np.int8)[None]
        alpha = np.int8([-20, 5, 127])
        operands = [
            _tensor("x", x.shape, scale=0.15, zero_point=7),
            _tensor("a", (1, 3), scale=0.01, zero_point=2, data=alpha[None]),
        ]
        y = _tensor("y", x.shape, scale=0.09, zero_point=-3)
        f, code = np.float32, np.int64(x) - 7
        above = _rescale(code, float(f(0.15) / f(0.09)))
        below = _rescale(
            code * (np.int64(alpha) - 2), float(f(0.15) * f(0.01) / f(0.09))
        )
        wanted = np.where(code >= 0, above, below) - 3
        program = _build("PRELU", operands, [y])
        _check(program, [x], np.clip(wanted, -128, 127))

    @parameterized.product(kind=["RELU", "RELU6", "QUANTIZE"], dtype=["int8", "uint8"])
    def test_from_grid_to_grid(self, kind, dtype):
        low, high = _range(dtype)
        x = np.arange(low, high + 1).astype(dtype)[None]
        operand = _tensor("x", x.shape, dtype, 0.11, low + 100)
        y = _tensor("y", x.shape, dtype, 0.04, low + 20)
        f = np.float32
        ratio = float(f(0.11) / f(0.04))
        if kind == "QUANTIZE":
            ratio = float(np.float64(f(0.11)) / np.float64(f(0.04)))
        wanted = _rescale(np.int64(x) - low - 100, ratio) + low + 20
        ends = [low if kind == "QUANTIZE" else low + 20, high]
        if kind == "RELU6":
            ends[1] = low + 20 + 150
        _check(_build(kind, [operand], [y]), [x], np.clip(wanted, *ends))

    def test_hard_swish_is_within_a_code_of_the_function(self):
        x = np.arange(-128, 128).astype(np.int8)[None]
        operand = _tensor("x", x.shape, scale=0.05, zero_point=-10)
        y = _tensor("y", x.shape, scale=0.03, zero_point=-100)
        program = _build("HARD_SWISH", [operand], [y])
        got = reference.run(program.graph, program.params, [x])[-1]
        _check(program, [x], got)
        real = 0.05 * (x + 10.0)
        exact = real * np.clip(real + 3, 0, 6) / 6 / 0.03 - 100
        assert np.abs(got - np.clip(exact, -128, 127)).max() <= 1.01


class MovesTest(chex.TestCase):
    @parameterized.named_parameters(
        ("reshape", "RESHAPE", [[-1, 96]], {}, lambda x: x.reshape(-1, 96)),
        (
            "transpose",
            "TRANSPOSE",
            [[0, 3, 1, 2]],
            {},
            lambda x: x.transpose(0, 3, 1, 2),
        ),
        ("expand", "EXPAND_DIMS", [[1]], {}, lambda x: x[:, None]),
        (
            "pad",
            "PAD",
            [[[0, 0], [1, 2], [0, 0], [3, 0]]],
            {},
            lambda x: np.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=7),
        ),
        (
            "mirror",
            "MIRROR_PAD",
            [[[0, 0], [1, 2], [0, 1], [0, 0]]],
            {"mode": "SYMMETRIC"},
            lambda x: np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), "symmetric"),
        ),
        (
            "slice",
            "SLICE",
            [[0, 1, 2, 0], [-1, 2, 3, -1]],
            {},
            lambda x: x[:, 1:3, 2:5],
        ),
        (
            "strided",
            "STRIDED_SLICE",
            [[0, -1, 4, 0], [0, 0, 0, 0], [1, 1, -2, 1]],
            {"begin_mask": 9, "end_mask": 13, "shrink_axis_mask": 2},
            lambda x: x[:, -1, 4::-2],
        ),
        ("gather", "GATHER", [[5, 0, 2]], {"axis": 2}, lambda x: x[:, :, [5, 0, 2]]),
        (
            "depth",
            "SPACE_TO_DEPTH",
            [],
            {"block_size": 2},
            lambda x: (
                x.reshape(-1, 2, 2, 3, 2, 4)
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(-1, 2, 3, 16)
            ),
        ),
        (
            "space",
            "DEPTH_TO_SPACE",
            [],
            {"block_size": 2},
            lambda x: (
                x.reshape(-1, 4, 6, 2, 2, 1)
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(-1, 8, 12, 1)
            ),
        ),
        (
            "nearest",
            "RESIZE_NEAREST_NEIGHBOR",
            [[8, 3]],
            {},
            lambda x: x.repeat(2, 1)[:, :, ::2],
        ),
        ("most", "REDUCE_MAX", [[1, 2]], {}, lambda x: x.max((1, 2))),
        ("tile", "TILE", [[1, 2, 1, 3]], {}, lambda x: np.tile(x, (1, 2, 1, 3))),
        ("again", "TILE", [[2, 1, 2, 1]], {}, lambda x: np.tile(x, (2, 1, 2, 1))),
    )
    def test_codes_move(self, kind, operands, options, move):
        x = _codes(np.random.default_rng(14), "int8", (3, 4, 6, 4))
        wanted = move(x)
        tensors = [_tensor("x", (1, 4, 6, 4), zero_point=7), *map(_whole, operands)]
        y = _tensor("y", (1, *wanted.shape[1:]), zero_point=7)
        _check(_build(kind, tensors, [y], **options), [x], wanted)

    @parameterized.product(
        kind=["ARG_MAX", "ARG_MIN"], axis=[-1, 1], dtype=["int32", "int64"]
    )
    def test_places_of_extremes_are_the_first(self, kind, axis, dtype):
        x = np.random.default_rng(21).integers(-2, 3, (3, 4, 5)).astype(np.int8)
        wanted = getattr(np, kind.lower().replace("_", ""))(x, axis)
        operands = [_tensor("x", (1, 4, 5)), _whole([axis])]
        program = _build(kind, operands, [Tensor("y", (1, *wanted.shape[1:]), dtype)])
        _check(program, [x], wanted)
        found = program.codes(x)
        assert found.dtype == jnp.int32 and program.graph.values[-1].grid is None

    def test_splits_and_joins(self):
        x = _codes(np.random.default_rng(15), "int8", (2, 4, 6))
        part = [_tensor(n, (1, 4, 3)) for n in "ab"]
        operands = [_whole(2), _tensor("x", (1, 4, 6))]
        split = _build("SPLIT", operands, part, num_splits=2)
        _check(split, [x], [x[..., :3], x[..., 3:]])
        rows = [_tensor(f"r{k}", (1, 6)) for k in range(4)]
        _check(
            _build("UNPACK", operands[1:], rows, axis=1),
            [x],
            [x[:, k] for k in range(4)],
        )
        joined = _tensor("y", (1, 4, 12))
        both = [_tensor(n, (1, 4, 6)) for n in "ab"]
        program = _build("CONCATENATION", both, [joined], axis=-1)
        _check(program, [x, x[::-1]], np.concatenate([x, x[::-1]], -1))
        stacked = _build("PACK", both, [_tensor("y", (1, 2, 4, 6))], axis=1)
        _check(stacked, [x, x], np.stack([x, x], 1))

    def test_blocks_go_to_the_batch_and_back(self):
        x = _codes(np.random.default_rng(16), "int8", (1, 4, 6, 2))
        grid, block = {"zero_point": -5}, _whole([2, 3])
        there = [
            _tensor("x", (1, 4, 6, 2), **grid),
            block,
            _whole([[1, 1], [0, 0]]),
        ]
        y = _tensor("y", (6, 3, 2, 2), **grid)
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=-5)
        blocks = [padded[:, i::2, j::3] for i in range(2) for j in range(3)]
        program = _build("SPACE_TO_BATCH_ND", there, [y])
        _check(program, [x], np.concatenate(blocks))
        back = [_tensor("x", (6, 3, 2, 2), **grid), *there[1:]]
        program = _build("BATCH_TO_SPACE_ND", back, [there[0]])
        _check(program, [np.concatenate(blocks)], x)

    @parameterized.product(
        sizes=[(3, 4, 6, 8), (5, 4, 7, 3)],
        options=[{}, {"align_corners": True}, {"half_pixel_centers": True}],
        dtype=["int8", "int16"],
    )
    def test_bilinear_places_have_ten_bits(self, sizes, options, dtype):
        h, w, rows, columns = sizes
        x = _codes(np.random.default_rng(17), dtype, (2, h, w, 2))
        wanted = np.zeros((2, rows, columns, 2), np.int64)
        axes = [_ten_bits(h, rows, options), _ten_bits(w, columns, options)]
        for (i, (i0, i1, p)), (j, (j0, j1, q)) in itertools.product(
            *map(enumerate, axes)
        ):
            total = (
                np.int64(x[:, i0, j0]) * (1024 - p) * (1024 - q)
                + np.int64(x[:, i1, j0]) * p * (1024 - q)
                + np.int64(x[:, i0, j1]) * (1024 - p) * q
                + np.int64(x[:, i1, j1]) * p * q
            )
            wanted[:, i, j] = _map(lambda t: _half_away(Fraction(t, 1 << 20)), total)
        tensors = [_tensor("x", (1, h, w, 2), dtype), _whole([rows, columns])]
        y = _tensor("y", (1, rows, columns, 2), dtype)
        _check(_build("RESIZE_BILINEAR", tensors, [y], **options), [x], wanted)


def _ten_bits(size, out, options):
    """Before, after and the distance of each output place, in C's integers."""
    corners = 1 if options.get("align_corners") and out > 1 else 0
    step = (1024 * (size - corners) + (out - corners) // 2) // (out - corners)
    found = []
    for k in range(out):
        at = k * step
        if options.get("half_pixel_centers"):
            at += step // 2 - 512
        before = max(int(at / 1024), 0)
        found.append(
            (before, min(int((at + 1023) / 1024), size - 1), at - 1024 * before)
        )
    return found


class ProgramTest(chex.TestCase):
    def _chain(self):
        """float32, a dense layer on codes whose shape is computed, float32."""
        rng = np.random.default_rng(18)
        w = rng.integers(-127, 128, (3, 4))
        tensors = [
            Tensor("real", (1, 6, 4), "float32"),
            _tensor("x", (1, 6, 4), scale=0.02, zero_point=3),
            Tensor("sizes", (3,), "int32"),
            _whole([-1, 4], "rows"),
            _tensor("row", (1, 1), scale=0.02, zero_point=3),
            _tensor("w", (3, 4), scale=[0.01] * 3, data=w),
            _tensor("y", (1, 3), scale=0.05, zero_point=-4),
            Tensor("out", (1, 3), "float32"),
        ]
        operators = [
            Operator("QUANTIZE", (0,), (1,)),
            Operator("SHAPE", (1,), (2,)),
            Operator("RESHAPE", (1, 3), (4,)),
            Operator("FULLY_CONNECTED", (4, 5, -1), (6,)),
            Operator("DEQUANTIZE", (6,), (7,)),
        ]
        return tensors, operators

    def test_real_ends_are_those_of_the_program(self):
        tensors, operators = self._chain()
        program = build_tflite(tensors, operators, [0], [7])
        x = np.random.default_rng(19).normal(size=(2, 6, 4)).astype(np.float32)
        y = program(x)
        assert y.shape == (12, 3) and y.dtype == jnp.float32
        w = np.float32(0.01) * np.asarray(tensors[5].data)
        np.testing.assert_allclose(y, x.reshape(-1, 4) @ w.T, atol=0.2)
        assert set(program.graph.sites) == {"x", "row", "y"}

    def test_programs_are_saved_and_loaded(self):
        tensors, operators = self._chain()
        program = build_tflite(tensors, operators, [0], [7])
        x = np.random.default_rng(20).normal(size=(1, 6, 4)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "program.qjax")
            program.save(path)
            np.testing.assert_array_equal(qjax.load(path)(x), program(x))

    def test_other_batches_are_those_of_the_operators_or_refused(self):
        """Beside NumPy at another leading size; a refusal names what fixes it."""
        free = {
            "TRANSPOSE": ([[1, 0, 2]], lambda x: x.transpose(1, 0, 2)),
            "RESHAPE": ([[2, 12]], lambda x: x.reshape(-1, 12)),
            "REDUCE_MAX": ([[0]], lambda x: x.max(0)),
            "TILE": ([[2, 1, 1]], lambda x: np.tile(x, (2, 1, 1))),
        }
        x = _codes(np.random.default_rng(22), "int8", (5, 3, 4))
        for kind, (operands, move) in free.items():
            operands = [_tensor("x", (2, 3, 4)), *map(_whole, operands)]
            y = _tensor("y", move(x[:2]).shape)
            program = _build(kind, operands, [y])
            for size in (2, 5, 1):
                np.testing.assert_array_equal(program.codes(x[:size]), move(x[:size]))
        fixed = {
            "MEAN": ([[0]], (3, 4), "`sum` in 'y'"),
            "SLICE": (
                [[1, 0, 0], [1, 3, 4]],
                (1, 3, 4),
                "Operator 0 .SLICE, output 'y'",
            ),
            "RESHAPE": ([[3, 8]], (3, 8), r"Operator 0 \(RESHAPE, output 'y'\)"),
        }
        for kind, (operands, shape, reason) in fixed.items():
            operands = [_tensor("x", (2, 3, 4)), *map(_whole, operands)]
            program = _build(kind, operands, [_tensor("y", shape)])
            assert program.codes(x[:2]).shape == shape
            match = f"leading size is fixed by .*{reason}"
            with pytest.raises(ValueError, match=match):
                program.codes(x)

    def test_errors_name_the_operator(self):
        x, y = _tensor("x", (1, 4)), _tensor("y", (1, 4), scale=1e-30)
        middle = _tensor("middle", (1, 4))
        operators = [Operator("RELU", (0,), (1,)), Operator("QUANTIZE", (1,), (2,))]
        match = r"Operator 1 \(QUANTIZE, output 'y'\): A ratio of scales"
        with pytest.raises(ValueError, match=match):
            build_tflite([x, middle, y], operators, [0], [2])
        tensors = [x, middle, _tensor("y", (1, 4))]
        assert len(build_tflite(tensors, operators, [0], [2]).graph.nodes) == 2
        for kind in ("SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM"):
            match = rf"Operator 0 \({kind}, output 'y'\): .*keeps a state between calls"
            with pytest.raises(NotImplementedError, match=match):
                _build(kind, [x], [y])

    def test_names_what_has_no_rule(self):
        x, y = _tensor("x", (1, 4)), _tensor("y", (1, 4))
        with pytest.raises(NotImplementedError, match="LSTM.*'y'"):
            _build("LSTM", [x], [y])
        with pytest.raises(
            NotImplementedError, match="fused_activation_function='TANH'"
        ):
            _build("ADD", [x, x], [y], fused_activation_function="TANH")
        with pytest.raises(NotImplementedError, match="SOFTMAX.*output scale"):
            _build("SOFTMAX", [x], [y])
        with pytest.raises(NotImplementedError, match="MAXIMUM.*different scales"):
            _build("MAXIMUM", [x, _tensor("b", (1, 4), scale=0.3)], [y])
        with pytest.raises(NotImplementedError, match="computed at run time"):
            unknown = Tensor("n", (2,), "int32")
            build_tflite([x, unknown, y], [Operator("RESHAPE", (0, 1), (2,))], [0], [2])
        with pytest.raises(NotImplementedError, match="float32.*QUANTIZE"):
            build_tflite([Tensor("x", (1,), "float32")], [], [0], [0])
        with pytest.raises(NotImplementedError, match="'x' must be int8"):
            _build("RELU", [Tensor("x", (1, 4), "int8")], [y])

    def test_codes_before_they_exist_are_an_error(self):
        tensors = [_tensor("a", (1, 4)), _tensor("b", (1, 4))]
        with pytest.raises(ValueError, match="'a' is used before"):
            build_tflite(tensors, [Operator("RELU", (0,), (1,))], [], [1])

    def test_nothing_is_float_under_jit(self):
        tensors, operators = self._chain()
        program = build_tflite(tensors, operators, [0], [7])
        text = str(
            jax.make_jaxpr(program.run_codes)(
                program.params, jax.ShapeDtypeStruct((1, 6, 4), jnp.int8)
            )
        )
        assert "f32" not in text and "f64" not in text
