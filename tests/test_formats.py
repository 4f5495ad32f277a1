"""Saved programs: equal after loading, written whole or not at all, checked."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import qjax
from tests.models import images


@pytest.fixture(scope="module")
def program():
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(4, 3)))}
    fn = lambda params, x: {"y": [x[0] @ params["w"], (jnp.mean(x[1], 1),)]}
    x = (images(5, 4), images(5, 2))
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [(x,)])
    return qjax.lower(qmodel, params, qstate, x)


@pytest.fixture
def path(program, tmp_path):
    path = tmp_path / "model.qjax"
    program.save(path)
    return path


def test_a_loaded_program_is_equal(program, path):
    loaded = qjax.load(path)
    assert loaded.graph == program.graph
    assert loaded.input_tree == program.input_tree
    assert loaded.output_tree == program.output_tree
    assert loaded.params.keys() == program.params.keys()
    for name, param in program.params.items():
        assert loaded.params[name].shape == param.shape
        assert loaded.params[name].dtype == param.dtype
    x = (images(5, 4, seed=3), images(5, 2, seed=4))
    pairs = zip(jax.tree.leaves(loaded(x)), jax.tree.leaves(program(x)), strict=True)
    for found, wanted in pairs:
        np.testing.assert_array_equal(found, wanted)
    assert os.listdir(path.parent) == ["model.qjax"]


def test_the_parameters_are_plain_safetensors(program, path):
    arrays = safetensors.numpy.load_file(path)
    assert arrays.keys() == program.params.keys()
    assert arrays["w"].dtype == np.int8


def test_every_truncation_is_found(path):
    data = path.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated, or no safetensors file"):
            qjax.load(path)


def test_every_altered_byte_is_found(path):
    """No flipped byte loads as another program."""
    data = path.read_bytes()
    wanted = qjax.load(path)
    for i in np.random.default_rng(0).choice(len(data), 150, replace=False):
        altered = bytearray(data)
        altered[i] ^= 0x01
        path.write_bytes(altered)
        try:
            found = qjax.load(path)
        except ValueError:
            continue
        # Padding of the header is no content.
        assert found.graph == wanted.graph
        for name in wanted.params:
            np.testing.assert_array_equal(found.params[name], wanted.params[name])


def test_an_altered_tensor_is_named_so(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was altered"):
        qjax.load(path)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not an integer program"):
        qjax.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        qjax.load(path)
    with pytest.raises(FileNotFoundError):
        qjax.load(tmp_path / "missing.qjax")


def test_a_later_version(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    metadata = header["__metadata__"] | {"version": "2"}
    arrays = safetensors.numpy.load_file(path)
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(ValueError, match="format version 2"):
        qjax.load(path)


def test_a_failed_write_leaves_the_old_file(program, path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        program.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["model.qjax"]


def test_outputs_that_no_file_can_name(tmp_path):
    fn = lambda params, x: qjax.QParams(x @ params, jax.nn.relu(x))
    params, x = jnp.ones((3, 3)), images(2, 3)
    qmodel = qjax.quantize_model(fn, params, x)
    program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)
    with pytest.raises(ValueError, match="tuples, lists and dicts.*got QParams"):
        program.save(tmp_path / "model.qjax")
    assert not list(pathlib.Path(tmp_path).iterdir())
