"""TFLite and QONNX files with other bytes: a program, or what is wrong with them.

python -m pytest tests/test_formats_mutations.py -m fuzz    # 2,000 of each format
"""

import resource
import time

import jax
import numpy as np
import pytest

from qjax.formats.qonnx import read_qonnx
from qjax.formats.tflite import read_tflite
from tests import lstm_cases
from tests.qonnx_cases import _residual
from tests.test_formats_hostile import _bytes
from tests.test_formats_qonnx import _bipolar_mlp, _conv_net
from tests.test_formats_tflite_lstm import draw
from tests.tflite_cases import _network, write

MOST_SECONDS = 20
MOST_BYTES = 2**30


def _tflite_files():
    lstm = lstm_cases.file(draw(np.random.default_rng(0), 3, 4), 2, 3)
    return [write(_network("int8")), lstm]


def _qonnx_files():
    nets = _residual, _bipolar_mlp, _conv_net
    return [net()[0].SerializeToString() for net in nets]


def _read_tflite(data):
    read_tflite(data)


def _read_qonnx(data):
    model = read_qonnx(data)
    jax.eval_shape(model, *model.inputs)  # What it computes, not the integers of it.


FORMATS = {
    "tflite": (_tflite_files, _read_tflite),
    "qonnx": (_qonnx_files, _read_qonnx),
}
# What a file is refused with; anything else is an error of the reader.
REFUSALS = (ValueError, NotImplementedError, OverflowError)


def _peak():
    """Most bytes that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mutate(name, seeds):
    make, read = FORMATS[name]
    files, refused, before = make(), 0, _peak()
    for data in files:
        read(data)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        start = time.process_time()
        try:
            with np.errstate(all="ignore"):
                read(_bytes(rng, files[seed % len(files)]))
        except REFUSALS as error:
            refused += 1
            assert str(error), seed
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}")
            raise
        assert time.process_time() - start < MOST_SECONDS, seed
        assert _peak() - before < MOST_BYTES, seed
    return refused


@pytest.mark.parametrize("name", FORMATS)
def test_altered_files_are_read_or_refused(name):
    assert 2 < _mutate(name, range(10)) < 10


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("name", FORMATS)
def test_more_altered_files_are_read_or_refused(name, part):
    first = 10 + 100 * part
    assert 25 < _mutate(name, range(first, first + 100)) < 100
