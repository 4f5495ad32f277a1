"""The command: what it prints, what it writes, how it ends."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import cli
from qjax.conformance import Session
from qjax.graph import files
from tests.models import images
from tests.test_formats_c99 import lowered
from tests.tflite_cases import _network, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        lowered(net, images(4, 5)).save(folder / "net.qjax")
    np.savez(folder / "x.npz", images(4, 5))
    (folder / "net.tflite").write_bytes(write(_network("int8")))
    return folder


def run(capsys, *words):
    code = cli.main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_shows_ends_and_operations(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder / "net.qjax")
    assert code == 0 and "input 0" in out and "layers_0/kernel" in out
    code, out, _ = run(capsys, "inspect", folder / "net.qjax", "--json")
    found = json.loads(out)
    assert found["ends"][0]["shape"] == [4, 5] and found["operations"] == 4
    assert found["nbytes"] == qjax.load(folder / "net.qjax").nbytes


def test_a_tflite_file_is_read_by_its_suffix(folder, capsys):
    assert run(capsys, "inspect", folder / "net.tflite")[0] == 0
    copy = folder / "copy.qjax"
    words = "export", folder / "net.tflite", "--to", "qjax", "--output", copy
    assert run(capsys, *words)[0] == 0
    assert str(qjax.load(copy).graph) in run(capsys, "inspect", copy)[1]


def test_verify_and_report_say_what_the_report_says(folder, capsys):
    program = qjax.load(folder / "net.qjax")
    code, out, _ = run(capsys, "verify", folder / "net.qjax", "--json")
    assert code == 0 and json.loads(out)["sites"] == 3
    code, out, _ = run(capsys, "report", folder / "net.qjax")
    assert code == 0 and out.strip() == str(program.report())
    code, out, _ = run(capsys, "report", folder / "net.qjax", "--json")
    found = json.loads(out)
    assert {o["path"] for o in found["accumulators"]} == {
        o.path for o in program.report().overflow
    }
    page = folder / "net.html"
    words = "report", folder / "net.qjax", "--html", page, "--inputs", folder / "x.npz"
    assert run(capsys, *words) == (0, "", "")
    assert "Codes of the given inputs" in page.read_text()
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0 and json.loads(out) == found


def test_report_searches_what_takes_accumulators_to_their_bounds(folder, capsys):
    program = qjax.load(folder / "net.qjax")
    words = "report", folder / "net.qjax", "--witness", "all", "--budget", "300"
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.startswith(f"{program.report()}\n")
    assert len(out.splitlines()) == len(str(program.report()).splitlines()) + 2
    code, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)["witnesses"]
    assert [own["path"] for own in found] == [o.path for o in program.report().overflow]
    first, (x,) = found[0], found[0]["codes"]
    names = ("layers_0/kernel", "layers_0/bias")
    kernel, bias = (np.asarray(program.params[k]).astype(int) for k in names)
    sums = np.int64(x) @ kernel + bias
    assert first["is_attained"] and first["value"] == sums[tuple(first["index"])]
    assert abs(first["value"]) == first["bound"] == np.abs(sums).max()
    words = "report", folder / "net.qjax", "--witness", "all", "--budget"
    assert run(capsys, *words, "0")[::2] == (
        2,
        "qjax: `budget` must be 1 input or more, got 0.\n",
    )
    code, _, text = run(capsys, "report", folder / "net.qjax", "--witness", "nothing")
    assert code == 2 and "no accumulator 'nothing'" in text


def test_verify_compares_the_golden_codes_of_a_file(folder, capsys, tmp_path):
    path, program = tmp_path / "golden.qjax", qjax.load(folder / "net.qjax")
    code, out, _ = run(capsys, "verify", folder / "net.qjax", "--json")
    assert code == 0 and json.loads(out)["golden_differences"] is None
    program.save(path, golden=images(4, 5))
    code, out, _ = run(capsys, "verify", path, "--json")
    assert code == 0 and json.loads(out)["golden_differences"] == [0]
    inputs, (codes,) = files.load_golden(path)
    codes = np.where(np.arange(12).reshape(4, 3) < 2, codes - np.sign(codes), codes)
    trees = program.input_tree, program.output_tree
    files.save(path, program.graph, program.params, *trees, (inputs, [codes]))
    code, out, _ = run(capsys, "verify", path)
    assert code == 1 and "other codes than its golden ones" in out
    code, out, _ = run(capsys, "verify", path, "--json")
    assert code == 1 and sum(json.loads(out)["golden_differences"]) > 0


@pytest.mark.parametrize("name", cli.WRITERS)
def test_every_format_is_written_by_one_command(folder, capsys, name):
    path = folder / f"out_{name.replace('-', '_')}.c"
    words = "export", folder / "net.qjax", "--to", name, "--output", path
    code, _, err = run(capsys, *words)
    if code == 2:  # Named, with what takes it.
        assert "has no form for" in err or "lower(" in err, err
        assert not path.exists()
    else:
        assert code == 0 and path.stat().st_size > 100


def test_conform_ends_by_what_it_finds(folder, capsys, monkeypatch):
    words = "conform", folder / "net.qjax", "--runtimes", "xla,numpy"
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.splitlines()[1].startswith("xla")
    given = *words, "--inputs", folder / "x.npz", "--json"
    code, out, _ = run(capsys, *given)
    assert code == 0 and json.loads(out)[0]["codes"] == 12
    numpy = cli.RUNTIMES["numpy"]

    def load(program, codes):
        own = numpy.load(program, codes)
        return Session(lambda codes: [1 - q for q in own.run(codes)], own.nbytes)

    broken = dataclasses.replace(numpy, load=load)
    monkeypatch.setattr(cli, "RUNTIMES", {"xla": broken})
    code, out, _ = run(capsys, *words[:-1], "xla", "--json")
    assert code == 1 and json.loads(out)[0]["differ"] > 0
    absent = dataclasses.replace(numpy, needs=("no_such_module",))
    monkeypatch.setattr(cli, "RUNTIMES", {"xla": absent})
    code, out, _ = run(capsys, *words[:-1], "xla", "--json")
    assert code == 2 and json.loads(out)[0]["status"] == "not installed"


@pytest.mark.parametrize(
    "words, said",
    [
        (("inspect", "gone.qjax"), "No such file"),
        (("inspect", "x.npz"), "must end in"),
        (("conform", "net.qjax", "--runtimes", "xla,other"), "are some of"),
        (("conform", "net.qjax", "--inputs", "two.npz"), "must hold 1 arrays"),
        (("report", "net.qjax", "--inputs", "bad.npz", "--html", "b.html"), "shape"),
        (("conform", "net.qjax", "--inputs", "zip.npz"), "`np.savez` writes"),
        (("conform", "net.qjax", "--inputs", "empty.npz"), "`np.savez` writes"),
        (("conform", "net.qjax", "--inputs", "one.npy"), "`np.savez` writes"),
        (("conform", "net.qjax", "--inputs", "words.npz"), "real numbers, got <U1"),
        (("conform", "net.qjax", "--count", "0"), "must be 1 or more"),
        (("inspect", "bad.qjax"), "truncated"),
        (("export", "net.qjax", "--to", "c99", "--output", "2x.c"), "a name of C"),
    ],
)
def test_what_does_not_do_is_one_sentence(folder, capsys, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    np.savez(folder / "two.npz", np.zeros(1), np.zeros(1))
    np.savez(folder / "bad.npz", np.zeros((4, 6), np.float32))
    np.savez(folder / "words.npz", np.full((4, 5), "a"))
    np.save(folder / "one.npy", np.zeros((4, 5), np.float32))
    (folder / "empty.npz").write_bytes(b"")
    (folder / "zip.npz").write_bytes(b"PK\x03\x04 no archive")
    (folder / "bad.qjax").write_bytes(b"no program")
    before = sorted(folder.iterdir())
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and err.startswith("qjax: ") and said in err
    assert sorted(folder.iterdir()) == before


def test_unknown_words_are_refused_and_help_has_examples(capsys):
    for words in ([], ["other"], ["export", "a.qjax", "--to", "x", "--output", "y"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
    for name in ("inspect", "verify", "report", "export", "conform"):
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
        assert f"example: qjax {name} model.qjax" in capsys.readouterr().out


def test_the_command_is_installed(folder):
    command = pathlib.Path(sys.executable).with_name("qjax")
    if not command.exists():
        pytest.skip("the package is not installed here")
    done = subprocess.run(
        [command, "inspect", folder / "net.qjax"], capture_output=True
    )
    assert done.returncode == 0 and b"input 0" in done.stdout
