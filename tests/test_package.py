"""The face of the package: names, docstrings, README, no private JAX."""

import doctest
import importlib
import pathlib
import re

import pytest

import qjax

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_all_is_sorted_and_complete():
    assert list(qjax.__all__) == sorted(qjax.__all__)
    for name in qjax.__all__:
        assert getattr(qjax, name).__doc__, name


def test_every_public_name_stands_in_the_readme_table():
    table = README.partition("## Names")[2].partition("## ")[0]
    for name in qjax.__all__:
        assert f"`{name}`" in table, name


def test_the_readme_starts_with_two_commands():
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1)
    assert len(block.strip().splitlines()) == 2
    assert README.splitlines().index("```python") < 45


@pytest.mark.usefixtures("flax_promotion")
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    assert "end to end: output 0" in capsys.readouterr().out
    assert (tmp_path / "model.qjax").exists()
    qmodel = qjax.quantize_model(
        scope["model"].apply, scope["params"], scope["x"], scheme=scope["scheme"]
    )
    assert qmodel.scheme.rules


def test_rooms_import_only_from_rooms_above():
    """In the order of the README's layout; only `IntegerProgram.save` reaches down."""
    order = (
        "tables leaves mesh_axes origin rounding affine estimators quantizers "
        "calibration histograms patterns scheme sharing scheme_json presets "
        "rescaling trace common_scales elementwise statistics normalisations "
        "blocks channels sites config simulate batches arguments instrument "
        "inspection layers linen nnx integer lowering formats"
    ).split()
    for path in sorted((ROOT / "qjax").rglob("*.py")):
        parts = path.relative_to(ROOT / "qjax").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        text = path.read_text()
        assert "jax._src" not in text
        for found in re.findall(r"^from qjax\.(\w+)", text, re.MULTILINE):
            assert order.index(found) <= order.index(parts[0]), (path, found)


def test_flax_is_imported_by_the_layers_alone():
    for path in sorted((ROOT / "qjax").rglob("*.py")):
        uses = re.search(r"^(from|import) flax", path.read_text(), re.MULTILINE)
        assert bool(uses) == (path.name in ("linen.py", "nnx.py")), path


def test_examples_in_docstrings_exist():
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = ("affine", "rounding", "calibration", "scheme", "instrument", "integer")
    for name in names:
        module = importlib.import_module(f"qjax.{name}")
        assert any(test.examples for test in finder.find(module)), name
