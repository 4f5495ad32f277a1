"""The page of the file format: its example runs, its operations are those there are.

python tests/test_graph_format.py    # Writes the table of operations anew.
"""

import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import qjax  # noqa: E402
from qjax.graph import files, manifest  # noqa: E402
from qjax.graph.graph import Graph, Node, Value, usual_fields  # noqa: E402
from qjax.graph.operations import OPERATIONS  # noqa: E402
from tests.models import images  # noqa: E402

PAGE = ROOT / "qjax/graph/FORMAT.md"
MARKS = "<!-- operations -->\n", "<!-- end of operations -->"


def table():
    """The operations, one a line."""
    lines = ["| operation | contract | parameters | attributes |", "|---|---|---|---|"]
    for name, o in sorted(OPERATIONS.items()):
        wanted = [f"`{k}`: {x.wanted}" for k, x in o.attributes.items()]
        wanted += [f"[`{k}`]: {x.wanted}" for k, x in o.optional.items()]
        roles = ", ".join(f"`{role}`" for role in (*o.roles, *o.graphs))
        contract = o.contract.replace("|", "\\|")
        lines.append(f"| `{name}` | {contract} | {roles} | {'; '.join(wanted)} |")
    return "\n".join([*lines, ""])


def test_the_table_has_all_operations():
    """Or run this file."""
    found = PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert found == table()


def test_fields_are_those_of_the_graph():
    text = PAGE.read_text()
    for kind, head in ((Value, "| field of a value |"), (Node, "| field of a node |")):
        rows = text.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
        names = [k for row in rows for k in re.findall(r"`(\w+)`", row.split("|")[1])]
        assert set(names) == {*kind.__dataclass_fields__}
        usual = {k for row in rows for k in re.findall(r"`(\w+)` \[", row)}
        assert usual == set(usual_fields(kind))
    assert all(f"`{name}`" in text for name in Graph.__dataclass_fields__)
    section = text.partition("## 3.")[2].partition("## 4.")[0]
    assert all(f"`{key}`" in section for key in files._KEYS)
    assert manifest._MOST_BYTES == 1 << 26


def test_the_example_reads_a_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    narrow = (qjax.QSpec(bits, narrow_range=True) for bits in (2, 8))
    for word in (*narrow, "quantized_po2(4)"):
        params, x = {"w": images(5, 3)}, images(4, 5)
        scheme = qjax.Scheme(word, qjax.QSpec(8))
        own = qjax.quantize_model(lambda p, x: x @ p["w"], params, x, scheme=scheme)
        qstate = qjax.calibrate(own, params, [x], progress=False)
        program = qjax.lower(own, params, qstate, x)
        program.save("model.qjax")
        scope = {}
        exec(compile(block, str(PAGE), "exec"), scope)
        np.testing.assert_array_equal(scope["kernel"], program.params["w"])
        scale = program.graph.grids["w"].scale
        assert capsys.readouterr().out == f"w (5, 3) {scale}\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    head, rest = text.split(MARKS[0])
    PAGE.write_text(f"{head}{MARKS[0]}{table()}{MARKS[1]}{rest.split(MARKS[1])[1]}")
