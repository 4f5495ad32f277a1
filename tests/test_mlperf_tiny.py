"""The study of MLPerf Tiny's models, on a small model; on its data if it is there."""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import qjax
from experiments import models as shared
from experiments.mlperf_tiny import models, study
from tests.models import randomized

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


def _small(rngs):
    conv = functools.partial(shared.ConvBlock, padding=((1, 1), (1, 1)))
    shortcut = models.PaddedShortcut
    return shared.ResNet(1, rngs, widths=(2, 4), conv=conv, shortcut=shortcut)


def _made(make):
    """The model; its initializers would have to be compiled."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    nnx.update(model, shared.with_statistics(randomized(nnx.state(model))))
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights, layers and outputs of a small model, and with images."""
    model = _made(_small)
    nodes, arrays = [], {}
    for i, layer in enumerate(models.convolutions(model)):
        nodes.append({"name": f"conv{i}", "type": "conv2d", "kernel": "", "inputs": []})
        norm = {"name": f"bn{i}", "type": "batch_norm", "inputs": [f"conv{i}"]}
        nodes.append(norm)
        bias = np.full(layer.bn.mean.shape, 0.25, np.float32)
        arrays[f"conv{i}/kernel"], arrays[f"conv{i}/bias"] = layer.conv.kernel, bias
        arrays[f"bn{i}/gamma"], arrays[f"bn{i}/beta"] = layer.bn.scale, layer.bn.bias
        arrays[f"bn{i}/mean"], arrays[f"bn{i}/var"] = layer.bn.mean + bias, layer.bn.var
    nodes.append({"name": "head", "type": "dense", "kernel": "", "inputs": []})
    arrays |= {"head/kernel": model.head.kernel, "head/bias": model.head.bias}
    for name in ("mlperf_tiny", "cifar_resnet"):
        (tmp_path / name).mkdir()
    (tmp_path / "small_arch.json").write_text(json.dumps({"nodes": nodes}))
    np.savez(tmp_path / "small_weights.npz", **{k: v[...] for k, v in arrays.items()})
    rng = np.random.default_rng(0)
    for name, n in (("train10k", 40), ("test1017", 10)):
        x = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"cifar10_{name}.npz", x=x, y=np.arange(n) % 10)
    apply, state = shared.inference(model)
    logits = jax.jit(apply)(state, models.normalised(x))
    np.savez(tmp_path / "small_logits.npz", logits=logits)
    outputs = ("small_logits.npz", "logits")
    make = lambda rngs: _made(_small)
    source = models.Source(make, "small", models.normalised, outputs)
    monkeypatch.setitem(models.MODELS, "small", source)
    return tmp_path


@pytest.mark.heavy
def test_the_study_prints_its_table(folder, monkeypatch, capsys):
    monkeypatch.setattr(study, "HISTOGRAMS", {"mse": qjax.mse()})  # Others compile too.
    config = study.Config(
        data_dir=str(folder), images=16, calibration=16, left_out=8, test=10, steps=0
    )
    found, rows = study.run("small", config)
    study.show("small", found, rows, 1.0)
    out = capsys.readouterr().out
    for form in ("float", "int8 after training", "w4a8 after training"):
        assert form in out
    for row in rows[1:]:
        assert all(r.max_difference <= 1 for r in row.agreement.sites.values())
    assert rows[-1].nbytes < rows[1].nbytes < 0.5 * rows[0].nbytes


@pytest.mark.heavy
def test_training_moves_weights_towards_the_float_model(folder):
    config = study.Config(
        data_dir=str(folder), images=16, calibration=16, left_out=8, test=10
    )
    own = study.prepare(
        "small", models.load("small", models.find(str(folder))), folder, config
    )
    scheme = qjax.presets.w4a8()
    qstate = study.calibrated(own, scheme)
    state = study.fit(own, scheme, qstate, rate=1e-3, steps=3, moving=1, config=config)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(own.state), strict=True)
    changed = [np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs]
    assert all(changed) and all(np.all(np.isfinite(a)) for a in jax.tree.leaves(state))


def test_other_outputs_than_the_published_are_an_error(folder):
    with np.load(folder / "small_logits.npz") as arrays:
        logits = arrays["logits"]
    logits[0, 0] += 1e-3
    np.savez(folder / "small_logits.npz", logits=logits)
    with pytest.raises(ValueError, match="must be within 0.0001 of small_logits"):
        models.load("small", folder)


def test_data_that_is_nowhere_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir or set \$QJAX_DATA"):
        models.find(str(tmp_path))


@pytest.mark.heavy
def test_linen_and_nnx_give_the_same_program():
    model = _made(models.MODELS["resnet-8"].make)
    x = np.float32(np.random.default_rng(0).uniform(size=(4, 32, 32, 3)))
    codes = []
    for fn, state in (
        shared.inference(model),
        (models.LinenResNet8().apply, models.linen_variables(model)),
    ):
        qmodel = qjax.quantize_model(fn, state, x, scheme=qjax.presets.tflite_int8())
        program = qjax.lower(qmodel, state, qjax.calibrate(qmodel, state, [x]), x)
        codes.append(program.site_codes(x)["output:0"])
    np.testing.assert_array_equal(*codes)


def test_batches_are_crops_of_all_images_in_turn():
    x = np.arange(1, 13, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 8, 8, 3), np.uint8
    )
    stream = study.batches(x, study.Config(batch_size=4))
    seen = [next(stream) for _ in range(3)]
    assert all(b.shape == (4, 8, 8, 3) for b in seen)
    assert {int(image.max()) for b in seen for image in b} == set(range(1, 13))
    again = next(study.batches(x, study.Config(batch_size=4)))
    np.testing.assert_array_equal(seen[0], again)


def test_published_files_give_their_outputs():
    """The float model that of its outputs, the int8 file that of its kernels."""
    data = pathlib.Path(os.environ.get("QJAX_DATA", ""))
    pytest.importorskip("ai_edge_litert")
    if not (data / "mlperf_tiny").is_dir():
        pytest.skip("mlperf_tiny is not in $QJAX_DATA.")
    config = study.Config(images=8, calibration=8, left_out=8, test=128)
    found = study.prepare("resnet-8", models.load("resnet-8", data), data, config)
    content = (data / found.source.tflite).read_bytes()
    reference, _, read = study.tflite_rows(found, content, threads=1)
    np.testing.assert_array_equal(reference.guess, read.guess)
    with np.load(data / "mlperf_tiny/resnet8_ref_outputs.npz") as arrays:
        wanted = np.argmax(arrays["int8_ref_out"][:128], -1)
    np.testing.assert_array_equal(reference.guess, wanted)
