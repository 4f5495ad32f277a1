"""The face of the package: names, docstrings, README, no private JAX."""

import ast
import collections
import doctest
import graphlib
import importlib
import pathlib
import re
import sys

import pytest

import qjax
from qjax.lowering import rules
from qjax.model.primitives import PRIMITIVES

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


@pytest.mark.kept
@pytest.mark.slow
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


# In the order of the README's layout: a line imports only from lines above its own.
ROOMS = (
    ("tables", "leaves", "mesh_axes", "calls", "rounding", "integer", "qpoint"),
    ("targets",),
    ("integer_division", "integer_norm", "integer_softmax", "integer_tflite"),
    ("integer_masked_norm",),
    ("affine", "ranges", "estimators"),
    ("integer_calls",),
    ("graph",),
    ("backends",),
    ("ends",),
    ("costs",),
    ("mixtures", "execution", "array_ends", "compiled_program", "steps"),
    ("program",),
    ("quantizers",),
    ("calibration",),
    ("schemes", "presets"),
    ("layers",),
    ("qtools",),
    ("linen", "nnx"),
    ("model",),
    ("lowering",),
    ("quantized_model",),
    ("instrumentation", "observation", "inspection", "training"),
    ("formats",),
    ("search",),
    ("conformance",),
    ("cli",),
)


ALONE = "qjax.formats.check"  # A folder that runs wherever it is copied.


def imports():
    """Yields each module and each module that it imports, wherever it does."""
    paths = sorted((ROOT / "qjax").rglob("*.py"))
    dotted = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    names = {dotted(path).removesuffix(".__init__"): path for path in paths}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        top = set(map(id, tree.body))
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                is_alone = name.startswith(ALONE) and node.level == 1
                message = f"{name} imports by a relative name"
                assert not node.level or is_alone, message
                module = f"{ALONE}.{node.module}" if is_alone else node.module
                own = [f"{module}.{alias.name}" for alias in node.names]
                found = [x if x in names else module for x in own]
            for other in {x for x in found if x.partition(".")[0] == "qjax"}:
                yield name, other, id(node) in top


@pytest.mark.kept
@pytest.mark.slow
def test_rooms_import_only_from_rooms_above():
    order = {room: k for k, line in enumerate(ROOMS) for room in line}
    for name, other, is_at_top in imports():
        assert is_at_top, f"{name} imports {other} late"
        if name == "qjax" or other == "qjax" and name.count(".") == 0:
            continue
        ends = [x.split(".")[1] for x in (name, other)]
        assert set(ends) <= set(order), f"{name} or {other} is in no room"
        assert order[ends[1]] <= order[ends[0]], f"{name} imports {other}"


@pytest.mark.kept
@pytest.mark.slow
def test_modules_import_each_other_in_no_circle():
    edges = {}
    for name, other, _ in imports():
        if name != other and not name.startswith(f"{other}."):
            edges.setdefault(name, set()).add(other)
    assert len(edges) > 50
    graphlib.TopologicalSorter(edges).prepare()  # Raises for a circle.


def test_no_module_has_the_name_of_a_public_function():
    paths = (ROOT / "qjax").rglob("*.py")
    modules = {path.stem for path in paths} - {"__init__"}
    public = {name for name in qjax.__all__ if callable(getattr(qjax, name))}
    assert not modules & public
    for name, module in list(sys.modules.items()):
        package, _, base = name.rpartition(".")
        if package.partition(".")[0] == "qjax":
            assert getattr(sys.modules[package], base) is module, name


def classes(source):
    return [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)]


def test_no_two_classes_have_one_name():
    """But the layers of both interfaces of Flax, which share theirs."""
    found = collections.defaultdict(list)
    for path in sorted((ROOT / "qjax").rglob("*.py")):
        for name in classes(path.read_text()):
            found[name].append(path.parent.name)
    assert len(found["QSpec"]) == 1 and len(found["QConv"]) == 2
    assert {tuple(rooms) for rooms in found.values() if len(rooms) > 1} == {
        ("linen", "nnx")
    }


def test_each_primitive_has_one_record_and_each_rule_a_record():
    tables = (rules.ARITHMETIC, rules.CASTS, rules.CHOICES, rules.FUNCTIONS)
    tables += (rules.LOOKUPS, rules.MOVES, rules.POINTS, rules.PRODUCTS)
    tables += (rules.REDUCTIONS, rules.NORMALISATIONS, rules.GATHERS, rules.SORTS)
    tables += (rules.LOOPS, rules.LSTMS)
    assert sum(map(len, tables)) == len(rules.RULES)  # None is in two.
    # What calls compute in integers are no primitives.
    calls = {*rules.NORMALISATIONS, *rules.LSTMS, "begin"}
    assert set(rules.RULES) - calls <= set(PRIMITIVES)
    assert not calls & set(PRIMITIVES)
    for name, primitive in PRIMITIVES.items():
        assert primitive.name == name
        assert bool(primitive.remedy) == (primitive.kind == "call")
        if primitive.is_elementwise:
            assert name in rules.RULES, name


def test_flax_is_imported_by_the_layers_alone():
    for path in sorted((ROOT / "qjax").rglob("*.py")):
        uses = re.search(r"^(from|import) flax", path.read_text(), re.MULTILINE)
        assert not uses or path.parent.name in ("linen", "nnx"), path


def test_examples_in_docstrings_exist():
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = (
        *("affine", "rounding", "integer", "calibration.calibrators"),
        *("schemes.scheme", "instrumentation", "observation"),
    )
    for name in names:
        module = importlib.import_module(f"qjax.{name}")
        assert any(test.examples for test in finder.find(module)), name


NOT_FIRST = {"Of", "As", "What", "How", "Ditto", "Itself", "Theirs", "Those"}
MAY_BEGIN_SO: tuple[str, ...] = ()  # Docstrings, as "qjax/affine.py: quantize".


def docstrings(source):
    """Yields each name that has a docstring, and the first line of that."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), text.partition("\n")[0]


def begins_ill(line):
    return re.match(r"\W*(\w*)", line).group(1) in NOT_FIRST


@pytest.mark.kept
@pytest.mark.slow
def test_docstrings_begin_with_a_verb_or_a_noun():
    found = [
        (f"{path.relative_to(ROOT).as_posix()}: {name}", line)
        for path in sorted((ROOT / "qjax").rglob("*.py"))
        for name, line in docstrings(path.read_text())
    ]
    assert len(found) > 1000 and "qjax/affine.py: quantize" in dict(found)
    ill = [(name, line) for name, line in found if begins_ill(line)]
    assert {name for name, _ in ill} == set(MAY_BEGIN_SO), ill


def test_docstrings_that_begin_ill_are_found():
    source = '"""Words."""\nclass A:\n    def f(self):\n        """Of the node."""\n'
    found = {name: begins_ill(line) for name, line in docstrings(source)}
    assert found == {"module": False, "f": True}
    assert all(begins_ill(f"{word} a node.") for word in NOT_FIRST)
    assert not begins_ill("Offsets a node.")
