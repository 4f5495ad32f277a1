"""The quickstart, its data and its benchmark."""

import gzip
import hashlib
import json
import pathlib
import re
import runpy
import struct
import sys

import jax
import numpy as np
import pytest

from experiments import (
    character_transformer,
    data,
    learned_scales,
    qkeras_digits,
    quickstart,
    recurrent,
)
from experiments.agreement import agreement as agreement_script
from experiments.training import train as training_script

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.mark.heavy
def test_the_quickstart_keeps_its_accuracy(tmp_path):
    """On the mean of the seeds: each chip trains another way. Sites always agree."""
    figure = tmp_path / "ranges.png"
    results = [
        quickstart.run(quickstart.Config(seed=seed, figure=str(figure)))
        for seed in (0, 1, 2)
    ]
    for result in results:
        print(result.accuracy)
        for name, agreement in result.agreement.items():
            print(name, [row.share for row in agreement.outputs])
            assert all(row.max_difference <= 1 for row in agreement.sites.values())
        assert result.nbytes["8-bit, integers"] < 0.3 * result.nbytes["float"]
    mean = lambda name: np.mean([result.accuracy[name] for result in results])
    assert mean("float") - mean("8-bit, integers") <= 0.5
    assert mean("float") - mean("4-bit trained, integers") <= 1.0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_quickstart_prints_that_powers_of_two_agree_everywhere(monkeypatch, capsys):
    arguments = "--steps 30 --qat-steps 10 --channels 4 --power-of-two --figure"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments.split(), ""])
    runpy.run_path(str(ROOT / "experiments/quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    for name in ("float", "8-bit, integers", "4-bit trained, integers", "codes equal"):
        assert name in out
    rows = [row for row in out.splitlines() if ", integers" in row]
    # All codes are equal, and the largest difference is 0.
    exact = [re.search(r"\D100\.0000\D+0\D", row) for row in rows]
    assert len(exact) == 2 and all(exact), out


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@pytest.mark.parametrize("no_residual", (False, True))
def test_what_was_trained_is_what_litert_computes(no_residual, capsys):
    """Qwix's road is in the table where Qwix and a converter are installed."""
    pytest.importorskip("ai_edge_litert")
    own = {"steps": 60, "qat_steps": 3, "images": 32, "no_residual": no_residual}
    config = agreement_script.Config(data="digits", depths="1,4", **own)
    rows = agreement_script.run(config)
    assert [row.depth for row in rows] == [1, 4]
    assert all(row.trained == 0 < row.codes for row in rows)
    assert all(row.accuracy > 50 for row in rows)  # Of 10 classes.
    agreement_script.show(rows, 1.0)
    out = capsys.readouterr().out
    assert "fake-quantized" in out and "Qwix" in out
    assert ("not installed" in out) == (rows[0].qwix is None)


@pytest.mark.heavy
def test_learned_scales_print_their_table(monkeypatch, capsys):
    methods = {"EWGS": learned_scales.CANDIDATES["EWGS"]}
    monkeypatch.setattr(learned_scales, "CANDIDATES", methods)
    monkeypatch.setattr(learned_scales, "BITS", (3,))
    config = learned_scales.Config(features=8, epochs=4, seeds=2)
    found, (row,) = learned_scales.run(config)
    assert len(found) == 2 and row.integers[0] != row.integers[1]
    assert min(row.integers) > 40  # Of 10 classes.
    assert np.allclose(row.integers, row.simulated, atol=1)
    assert row.codes > 10_000 and row.differing < 1e-3 * row.codes
    learned_scales.show(found, [row], config, 2.0)
    out = capsys.readouterr().out
    assert all(text in out for text in ("EWGS", "float", "differ", "2 s"))


def test_the_benchmark_writes_rows(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["qat_step.py", "--rounds", "3", "--models", "mlp", "--json", str(path)],
    )
    runpy.run_path(
        str(ROOT / "experiments/benchmarks/qat_step.py"), run_name="__main__"
    )
    rows = json.loads(path.read_text())
    (row,) = rows
    assert row["model"] == "mlp" and row["float_ms"] > 0
    kinds = ("apply", "apply_and_update")
    assert all(row[kind] > 0 and row[f"{kind}_compile"] > 0 for kind in kinds)
    assert "apply" in capsys.readouterr().out


def test_digits_are_there_without_a_network():
    split = data.load("digits")
    assert split.x_train.shape == (1438, 8, 8, 1) and split.x_test.shape[0] == 359
    assert split.x_train.dtype == np.float32 and split.x_train.max() == 1
    assert set(split.y_test) == set(range(10))


def _small():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    return images, np.arange(6, dtype=np.uint8)


def test_a_data_folder_serves(tmp_path, monkeypatch):
    x, y = _small()
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    by_flag = data.load("mnist", str(tmp_path))
    monkeypatch.setenv("QJAX_DATA", str(tmp_path))
    by_environment = data.load("mnist")
    np.testing.assert_array_equal(by_flag.x_train[..., 0], x / np.float32(255))
    np.testing.assert_array_equal(by_environment.y_test, y[:2])


def test_downloads_are_checked_and_cached(tmp_path, monkeypatch):
    """Served from a folder by a file address, with the checksums of what is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QJAX_DATA", raising=False)
    x, y = _small()
    files = {}
    for name in data._IDX["mnist"][1]:
        array = x if "images" in name else y
        head = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
        (tmp_path / name).write_bytes(gzip.compress(head + array.tobytes()))
        files[name] = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setitem(data._IDX, "mnist", (tmp_path.as_uri() + "/", files))
    np.testing.assert_array_equal(data.load("mnist").y_train, y)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    np.testing.assert_array_equal(data.load("mnist").y_test, y)  # From the cache.
    cached = tmp_path / "cache/qjax/mnist/t10k-labels-idx1-ubyte.gz"
    cached.write_bytes(b"other")
    with pytest.raises(FileNotFoundError, match="checksum"):
        data.load("mnist")


def test_data_that_is_nowhere_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QJAX_DATA", raising=False)
    missing = (tmp_path / "no").as_uri() + "/"
    monkeypatch.setitem(data._IDX, "mnist", (missing, data._IDX["mnist"][1]))
    with pytest.raises(FileNotFoundError, match=r"--data-dir or set \$QJAX_DATA"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data sets are digits, mnist"):
        data.load("minst")


TUTORIAL = {
    "dw_conv": {
        "output_quantizer": {
            "bitwidth": 12,
            "axis": "per-tensor",
            "buffer_bitwidth": 24,
        },
        "weight_quantizer": {"bitwidth": 16, "axis": -2},
        "buffer_bitwidth": 24,
    },
    "pw_conv": {"weight_quantizer": {"bitwidth": 4}, "buffer_bitwidth": 24},
    "relu": {
        "output_quantizer": {
            "bitwidth": 6,
            "signed": False,
            "axis": "per-tensor",
            "buffer_bitwidth": 24,
        },
        "buffer_bitwidth": 24,
    },
    "dense": {"weight_quantizer": {"bitwidth": 4}, "buffer_bitwidth": 24},
}


def test_the_tutorial_prints_quantizemls_json(monkeypatch, capsys):
    """As version 0.12.1 printed it, in this order of keys."""
    edited = {
        "relu": {
            "output_quantizer": {
                "bitwidth": 1,
                "signed": False,
                "axis": "per-axis",
                "buffer_bitwidth": 32,
            },
            "buffer_bitwidth": 32,
        }
    }
    monkeypatch.setattr(sys, "argv", ["tutorial_calibration.py", "--samples", "8"])
    path = ROOT / "experiments/tutorial_calibration.py"
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    first, second = printed.split("## 1.2")
    assert json.dumps(TUTORIAL, indent=4) in first
    assert first.index("dw_conv/kernel (up to 28 bits, has 24)") < first.index("{")
    configs = "\n".join(json.dumps(c, indent=4) for c in (edited, TUTORIAL | edited))
    assert configs in second
    assert "beyond 24 bits" in second and "end to end: output 0" in second
    calibrated, by_hand = re.search(r"calibrated (\S+), by hand (\S+)", second).groups()
    assert calibrated == by_hand


@pytest.mark.heavy
@pytest.mark.parametrize(
    "learned", [pytest.param(False, marks=pytest.mark.heavy), True]
)
def test_ways_of_training_agree(learned):
    """Under checkpoints, and stopped and resumed: the losses are the same."""
    own = {"steps": 8, "batch_size": 32, "delay": 2, "freeze": 6, "learned": learned}
    ways = {"plain": {}, "remat": {"remat": True}, "resumed": {"stop": 5}}
    losses = {
        name: training_script.train(training_script.Config(**own, **way))
        for name, way in ways.items()
    }
    assert losses["plain"] == losses["resumed"]
    np.testing.assert_allclose(losses["remat"], losses["plain"], rtol=2e-5)
    assert losses["plain"][-1] < losses["plain"][0]


@pytest.mark.heavy
@pytest.mark.usefixtures("flax_promotion")
@pytest.mark.parametrize("layers", [False, True], ids=["scheme", "layers"])
def test_a_character_transformer_ships_what_it_simulates(tmp_path, layers):
    own = {"steps": 4, "layers": layers}
    config = character_transformer.Config(data_dir=str(tmp_path), **own)
    row = character_transformer.compare(config, character_transformer.read(config), 0)
    assert row.is_exact and row.simulated == row.integers
    assert abs(row.simulated / row.real - 1) < 0.02


@pytest.mark.heavy
def test_recurrent_networks_print_their_table(monkeypatch, capsys):
    """Waves of three frequencies, which the network tells apart by its last states."""
    words = "8 bits, powers of two"
    monkeypatch.setattr(recurrent, "SCHEMES", {words: recurrent.SCHEMES[words]})
    real, *rows = recurrent.main(recurrent.Config(quick=True, layers=True))
    assert real.scheme == "float"
    assert [row.scheme for row in rows] == [words, f"{words}, in layers"]
    for row in rows:
        assert min(*real.simulated, *row.simulated) > 45  # Of 3 classes.
        assert row.integers == row.simulated
        assert row.codes > 100_000 and row.differing == row.most == 0
    out = capsys.readouterr().out
    assert "| waves | 8 bits, powers of two |" in out and "of them CPU" in out


def test_series_are_cut_and_standardised(tmp_path, monkeypatch):
    """By the steps of the training series that are none of the padding."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 6), ("test", 3)):
        lengths = rng.integers(2, 8, n).astype(np.int16)
        x = rng.normal(3, 2, (n, 7, 2)).astype(np.float32)
        x[np.arange(7) >= lengths[:, None]] = 0
        arrays[f"JapaneseVowels_x_{part}"] = x
        arrays[f"JapaneseVowels_y_{part}"] = np.arange(n, dtype=np.uint8) % 3
        arrays[f"JapaneseVowels_len_{part}"] = lengths
    monkeypatch.delenv("QJAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"--data-dir or set \$QJAX_DATA"):
        recurrent.load("JapaneseVowels", str(tmp_path))
    np.savez(tmp_path / "timeseries.npz", **arrays)
    train, test = recurrent.load("JapaneseVowels", str(tmp_path))
    real = train.x[recurrent.is_real(train)]
    np.testing.assert_allclose(real.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(real.std(0), 1, rtol=1e-6)
    assert not test.x[~recurrent.is_real(test)].any()
    assert train.x.dtype == np.float32 and train.lengths.dtype == np.int32
    assert recurrent.cut(train, 3).x.shape == (6, 2, 6)


@pytest.mark.heavy
def test_the_network_of_qkeras_learns_digits():
    result = qkeras_digits.run(qkeras_digits.Config(steps=300))
    assert result.agreement.is_exact
    assert result.accuracy["integers"] == result.accuracy["simulated"] > 90


def test_the_network_of_qkeras_lowers_whole(capsys):
    digits = data.load("digits")
    digits = digits._replace(x_test=digits.x_test[:32], y_test=digits.y_test[:32])
    key, network = jax.random.key(0), qkeras_digits.Network()
    params = jax.jit(network.init)(key, digits.x_test[:1])["params"]
    result = qkeras_digits.evaluate(params, digits)
    assert result.agreement.is_exact
    values = result.program.params.values()
    assert all(np.issubdtype(v.dtype, np.integer) for v in values)
    console = qkeras_digits.rich.console.Console(width=100)
    console.print(qkeras_digits.table(result.program))
    out = capsys.readouterr().out
    assert re.search(r"first_conv2d/kernel\D+3x3x1x18\D+int8\D+-1\D+1", out), out
