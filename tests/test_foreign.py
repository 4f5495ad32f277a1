"""TFLite graphs: how they rescale, and whole ones."""

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
from qjax.graph.operations.shifts import rescale
from qjax.integer import fixed_point, requantize, requantize_sum
from qjax.integer_tflite import tflite_multiplier
from tests.foreign import (
    INT32,
    ROUNDINGS,
    draw_codes,
    map_integers,
    multiplier_of,
    program_of,
    reduced_to_16_bits,
    round_twice,
    tensor,
    whole_numbers,
)

pytestmark = pytest.mark.slow  # Many compilations.


class RulesTest(chex.TestCase):
    def test_multiplier_is_the_ratio_to_31_bits_halves_up(self):
        rng = np.random.default_rng(0)
        ratios = [0.0, 1.0, 0.5, 2.0**-32, 2.0**-33, 1 - 2.0**-33, 2.0**30]
        ratios += list(2.0 ** rng.uniform(-34, 30, 300))
        ratios += [(2**31 + 1) * 2.0**-40, (2**32 - 1) * 2.0**-35]  # Halves.
        for ratio in ratios:
            got = tuple(int(n) for n in tflite_multiplier(ratio))
            assert got == multiplier_of(ratio), ratio

    @parameterized.parameters(-1.0, np.inf, np.nan, 2.0**31)
    def test_refuses_what_is_no_ratio(self, ratio):
        with pytest.raises(ValueError, match="ratio of scales"):
            tflite_multiplier(ratio)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*ROUNDINGS)
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
        wanted = np.clip(map_integers(ROUNDINGS[rule], acc, multiplier, shift), *INT32)
        np.testing.assert_array_equal(self.variant(f)(*args), wanted)
        wide = [np.int64(a) for a in (acc, multiplier, shift)]
        got = np.clip(rescale(*wide, rule), *INT32)
        np.testing.assert_array_equal(got, wanted)

    @parameterized.parameters(*ROUNDINGS)
    def test_ties(self, rule):
        """Quarters, halves and three quarters on either side of zero."""
        acc = np.arange(-40, 41)
        got = requantize(acc, 2**30, 32, qmin=-128, qmax=127, rule=rule)  # acc / 4
        wanted = map_integers(lambda a: ROUNDINGS[rule](a, 2**30, 32), acc)
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
        assert int(got[0]) == round_twice(2**30, 2**30, 28) == 0

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
            reduced = int(reduced_to_16_bits(multiplier))
            exponent = 31 - shift
            wanted = map_integers(
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


class ProgramTest(chex.TestCase):
    def _chain(self):
        """float32, a dense layer on codes whose shape is computed, float32."""
        rng = np.random.default_rng(18)
        w = rng.integers(-127, 128, (3, 4))
        tensors = [
            Tensor("real", (1, 6, 4), "float32"),
            tensor("x", (1, 6, 4), scale=0.02, zero_point=3),
            Tensor("sizes", (3,), "int32"),
            whole_numbers([-1, 4], "rows"),
            tensor("row", (1, 1), scale=0.02, zero_point=3),
            tensor("w", (3, 4), scale=[0.01] * 3, data=w),
            tensor("y", (1, 3), scale=0.05, zero_point=-4),
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
        x = draw_codes(np.random.default_rng(22), "int8", (5, 3, 4))
        for kind, (operands, move) in free.items():
            operands = [tensor("x", (2, 3, 4)), *map(whole_numbers, operands)]
            y = tensor("y", move(x[:2]).shape)
            program = program_of(kind, operands, [y])
            for size in (2, 5, 1):
                np.testing.assert_array_equal(program.codes(x[:size]), move(x[:size]))
        fixed = {
            "MEAN": ([[0]], (3, 4), "`sum` in 'y'"),
            "RESHAPE": ([[3, 8]], (3, 8), r"Operator 0 \(RESHAPE, output 'y'\)"),
        }
        for kind, (operands, shape, reason) in fixed.items():
            operands = [tensor("x", (2, 3, 4)), *map(whole_numbers, operands)]
            program = program_of(kind, operands, [tensor("y", shape)])
            assert program.codes(x[:2]).shape == shape
            match = f"leading size is fixed by .*{reason}"
            with pytest.raises(ValueError, match=match):
                program.codes(x)
        operands = [tensor("x", (2, 3, 4)), *map(whole_numbers, [[1, 0, 0], [1, 3, 4]])]
        program = program_of("SLICE", operands, [tensor("y", (1, 3, 4))])
        np.testing.assert_array_equal(program.codes(x), x[1:2])
        match = r"2 or more(.|\n)*Operator 0 \(SLICE, output 'y'\)"
        with pytest.raises(ValueError, match=match):
            program.codes(x[:1])

    def test_errors_name_the_operator(self):
        x, y = tensor("x", (1, 4)), tensor("y", (1, 4), scale=1e-30)
        middle = tensor("middle", (1, 4))
        operators = [Operator("RELU", (0,), (1,)), Operator("QUANTIZE", (1,), (2,))]
        match = r"Operator 1 \(QUANTIZE, output 'y'\): A ratio of scales"
        with pytest.raises(ValueError, match=match):
            build_tflite([x, middle, y], operators, [0], [2])
        tensors = [x, middle, tensor("y", (1, 4))]
        assert len(build_tflite(tensors, operators, [0], [2]).graph.nodes) == 2
        for kind in ("RNN", "UNIDIRECTIONAL_SEQUENCE_RNN"):
            match = rf"Operator 0 \({kind}, output 'y'\): .*keeps a state between calls"
            with pytest.raises(NotImplementedError, match=match):
                program_of(kind, [x], [y])

    def test_names_what_has_no_rule(self):
        x, y = tensor("x", (1, 4)), tensor("y", (1, 4))
        with pytest.raises(NotImplementedError, match="LSTM.*'y'"):
            program_of("LSTM", [x], [y])
        with pytest.raises(
            NotImplementedError, match="fused_activation_function='TANH'"
        ):
            program_of("ADD", [x, x], [y], fused_activation_function="TANH")
        with pytest.raises(NotImplementedError, match="SOFTMAX.*output scale"):
            program_of("SOFTMAX", [x], [y])
        with pytest.raises(NotImplementedError, match="MAXIMUM.*different scales"):
            program_of("MAXIMUM", [x, tensor("b", (1, 4), scale=0.3)], [y])
        with pytest.raises(NotImplementedError, match="computed at run time"):
            unknown = Tensor("n", (2,), "int32")
            build_tflite([x, unknown, y], [Operator("RESHAPE", (0, 1), (2,))], [0], [2])
        with pytest.raises(NotImplementedError, match="float32.*QUANTIZE"):
            build_tflite([Tensor("x", (1,), "float32")], [], [0], [0])
        with pytest.raises(NotImplementedError, match="'x' must be int8"):
            program_of("RELU", [Tensor("x", (1, 4), "int8")], [y])

    def test_codes_before_they_exist_are_an_error(self):
        tensors = [tensor("a", (1, 4)), tensor("b", (1, 4))]
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
