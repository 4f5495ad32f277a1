"""TFLite's LSTM of 8-bit activations and 16-bit cells: the oracle is what LiteRT does.

No layer of a model is lowered to it: `lower` and `apply_integer` refuse loops for
`targets.tflite`. What they would have to compute is here, in int64.
"""

import dataclasses

import numpy as np
import pytest

from qjax.formats.tflite import read_tflite
from tests.lstm_cases import Lstm, file, layer, logistic, tanh
from tests.test_formats_tflite_writer import litert


def draw(rng, inputs, cells):
    codes = lambda n: rng.integers(-127, 128, (cells, n)).astype(np.int8)
    scales = lambda: tuple(map(float, np.float32(rng.uniform(0.003, 0.02, 4))))
    return Lstm(
        tuple(codes(inputs) for _ in range(4)),
        tuple(codes(cells) for _ in range(4)),
        tuple(rng.integers(-3000, 3000, cells).astype(np.int32) for _ in range(4)),
        scales(),
        scales(),
        (float(np.float32(rng.uniform(0.005, 0.2))), int(rng.integers(-128, 128))),
        (float(np.float32(rng.uniform(0.002, 0.009))), int(rng.integers(-128, 128))),
        -11,
    )


@pytest.mark.parametrize("power", range(-15, -8))
def test_the_oracle_has_the_codes_of_litert(power):
    rng = np.random.default_rng(power + 99)
    for inputs, cells in ((1, 1), (7, 3), (20, 16)):
        own = dataclasses.replace(draw(rng, inputs, cells), cell_power=power)
        x = rng.integers(-128, 128, (4, 9, inputs)).astype(np.int8)
        (found,) = litert(file(own, 4, 9), [x])
        np.testing.assert_array_equal(found, layer(own, x))


def test_its_functions_are_those_they_stand_for():
    codes = np.arange(-(1 << 15), 1 << 15)
    for bits in range(7):
        off = tanh(codes, bits) / 2**15 - np.tanh(codes / 2.0 ** (15 - bits))
        assert np.abs(off).max() < 2e-3
    off = logistic(codes) / 2**15 - 1 / (1 + np.exp(-codes / 2.0**12))
    assert np.abs(off).max() < 1e-3


def test_files_of_it_are_refused_by_name():
    rng = np.random.default_rng(0)
    with pytest.raises(NotImplementedError, match="UNIDIRECTIONAL_SEQUENCE_LSTM keeps"):
        read_tflite(file(draw(rng, 3, 2), 2, 4))
