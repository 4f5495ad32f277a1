"""Real ends of TFLite graphs: what is moved before QUANTIZE and after DEQUANTIZE."""

import os
import tempfile

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import qjax
from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from tests.foreign import check, half_away, range_of, tensor
from tests.foreign import whole_numbers as whole

pytestmark = pytest.mark.slow  # Many compilations.


def _real(name, shape):
    return Tensor(name, shape, "float32")


class EndsTest(chex.TestCase):
    @parameterized.parameters("int8", "uint8", "int16")
    def test_moves_of_real_numbers_move_their_codes(self, dtype):
        """A reshape, a pad and a concatenation before, a gather and an argmax after."""
        grid = {"scale": 0.125, "zero_point": 3}
        tensors = [
            _real("x", (2, 2, 2)),
            whole([2, 4]),
            _real("flat", (2, 4)),
            whole([[0, 0], [1, 1]], "padding"),
            _real("padded", (2, 6)),
            _real("z", (2, 2)),
            _real("joined", (2, 8)),
            tensor("q", (2, 8), dtype, **grid),
            _real("back", (2, 8)),
            whole([7, 1, 0], "places"),
            _real("out", (2, 3)),
            whole(1, "axis"),
            Tensor("most", (2,), "int32"),
        ]
        operators = [
            Operator("RESHAPE", (0, 1), (2,)),
            Operator("PAD", (2, 3), (4,)),
            Operator("CONCATENATION", (4, 5), (6,), {"axis": 1}),
            Operator("QUANTIZE", (6,), (7,)),
            Operator("DEQUANTIZE", (7,), (8,)),
            Operator("GATHER", (8, 9), (10,), {"axis": 1}),
            Operator("ARG_MAX", (8, 11), (12,)),
        ]
        program = build_tflite(tensors, operators, [0, 5], [10, 12])
        rng = np.random.default_rng(40)
        for batch in (2, 5):
            draw = lambda *shape: rng.integers(-40, 40, shape) / 16  # With ties.
            x, z = draw(batch, 2, 2), draw(batch, 2)
            out, most = program(np.float32(x), np.float32(z))
            joined = np.concatenate([np.pad(x.reshape(-1, 4), ((0, 0), (1, 1))), z], 1)
            steps = np.reshape([half_away(n) for n in joined.ravel() * 8], joined.shape)
            codes = np.clip(steps + 3, *range_of(dtype))
            wanted = 0.125 * (codes - 3)
            np.testing.assert_array_equal(out, wanted[:, [7, 1, 0]])
            np.testing.assert_array_equal(most, codes.argmax(1))
        assert out.dtype == jnp.float32 and most.dtype == jnp.int32
        assert set(program.graph.sites) == {"q", "most"}

    @parameterized.product(
        dtype=["int8", "int16"], scale=[0.05, 0.1, 0.0625, 1 / 255, 1.0]
    )
    def test_real_inputs_round_as_the_kernels_do(self, dtype, scale):
        """Ties and their neighbours in float32; XNNPACK's go to even codes."""
        scale = np.float32(scale)
        tensors = [_real("x", (1, 9)), tensor("q", (1, 9), dtype, scale, 3)]
        operators = [Operator("QUANTIZE", (0,), (1,))]
        program = build_tflite(tensors, operators, [0], [1])
        rng = np.random.default_rng(42)
        ties = (rng.integers(-400, 400, (300, 9)) * scale / np.float32(2)).ravel()
        ends = np.float32([-np.inf, np.inf])
        x = np.stack([ties, *(np.nextafter(ties, end) for end in ends)])
        x = np.append(x, [*ends, 1e30, 1e-30, -0.0, 0, 0.5, 1, 2]).astype(np.float32)
        with np.errstate(over="ignore"):
            quotient = np.clip(np.float64(x / scale), -1e9, 1e9)
        wanted = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5) + 3
        wanted = np.clip(wanted, *range_of(dtype)).reshape(-1, 9)
        (found,) = program.quantize_inputs(x.reshape(-1, 9))
        np.testing.assert_array_equal(found, wanted)
        with tempfile.TemporaryDirectory() as folder:
            program.save(path := os.path.join(folder, "p.qjax"))
            assert qjax.load(path).graph.values[0].rounding == "half_away"
        rule = {"rule": "fp32_half_even"}
        program = build_tflite(tensors, operators, [0], [1], **rule)
        assert program.graph.values[0].rounding == "half_even"

    @parameterized.product(
        kinds=[("int8", "uint8"), ("int8", "int16"), ("int16", "int8")],
        scales=[(0.05, 0.07), (0.1, 0.05), (0.25, 0.5), (0.1, 0.1)],
    )
    def test_real_numbers_go_to_another_grid(self, kinds, scales):
        """A float32 quotient, halves away from zero."""
        (a, b), (s, t) = kinds, map(np.float32, scales)
        tensors = [
            tensor("x", (1, 500), a, s, 5),
            _real("real", (1, 500)),
            tensor("y", (1, 500), b, t, 7),
        ]
        operators = [
            Operator("DEQUANTIZE", (0,), (1,)),
            Operator("QUANTIZE", (1,), (2,)),
        ]
        x = np.random.default_rng(41).integers(*range_of(a), (1, 500), endpoint=True)
        real = s * np.float32(x - 5)
        found = np.reshape([half_away(n) for n in np.ravel(real / t)], x.shape)
        wanted = np.clip(found + 7, *range_of(b))
        check(build_tflite(tensors, operators, [0], [2]), [x.astype(a)], wanted)

    def _read(self, operators, outputs, *others):
        tensors = [
            _real("x", (1, 4)),
            tensor("a", (1, 4)),
            tensor("b", (1, 4), scale=0.2),
            whole([4, 1]),
            _real("flat", (4, 1)),
            tensor("c", (4, 1)),
            Tensor("places", (4,), "int32"),
            whole(1, "axis"),
            *others,
        ]
        return build_tflite(tensors, operators, [0], outputs)

    def test_two_quantizers_with_one_grid_are_one(self):
        first = Operator("QUANTIZE", (0,), (1,))
        flat = [Operator("RESHAPE", (0, 3), (4,)), Operator("QUANTIZE", (4,), (5,))]
        program = self._read([first, *flat], [1, 5])
        x = np.int8([[1, 2, -3, 4]])
        a, c = program.codes(x)
        np.testing.assert_array_equal(a, x)
        np.testing.assert_array_equal(c, x.reshape(4, 1))

    def test_real_numbers_that_codes_do_not_hold_are_refused(self):
        first, other = (
            Operator("QUANTIZE", (0,), (1,)),
            Operator("QUANTIZE", (0,), (2,)),
        )
        with pytest.raises(NotImplementedError, match="QUANTIZE with the real numbers"):
            self._read([first, other], [1, 2])
        move = Operator("RESHAPE", (0, 3), (4,))
        quantize = Operator("QUANTIZE", (4,), (5,))
        for outputs in ([5, 0], [5, 4]):  # The file returns them exactly.
            with pytest.raises(NotImplementedError, match="'x' must be int8"):
                self._read([move, quantize], outputs)
        most = Operator("ARG_MAX", (0, 7), (6,))
        for order in ([first, most], [most, first]):  # Of the real numbers.
            with pytest.raises(NotImplementedError, match="real numbers|'x' must be"):
                self._read(order, [1, 6])

    def test_float_operators_are_refused_by_name(self):
        real, total = _real("d", (1, 4)), _real("e", (1, 4))
        start = [Operator("QUANTIZE", (0,), (1,)), Operator("DEQUANTIZE", (1,), (8,))]
        add = [*start, Operator("ADD", (8, 8), (9,)), Operator("QUANTIZE", (9,), (2,))]
        with pytest.raises(
            NotImplementedError, match=r"Operator 2 \(ADD.*real numbers, 'd'"
        ):
            self._read(add, [2], real, total)
        soft = [*start, Operator("SOFTMAX", (8,), (9,), {"beta": 1.0})]
        with pytest.raises(NotImplementedError, match="SOFTMAX with real numbers, 'd'"):
            self._read(soft, [9], real, total)
