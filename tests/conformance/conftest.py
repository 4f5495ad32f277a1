"""Golden vectors: `pytest tests/conformance --golden DIR`; a line a kind at the end."""

import collections
import json
import pathlib

DEFAULT = pathlib.Path(__file__).resolve().parents[1] / "golden"


def pytest_addoption(parser):
    parser.addoption("--golden", help="a folder of golden vectors with its index.json")


def golden_folders(config):
    """The folders with an index: the one that was asked for, or those of the tests."""
    chosen = config.getoption("--golden", default=None)
    top = pathlib.Path(chosen) if chosen else DEFAULT
    found = sorted(
        path.parent for path in [*top.glob("index.json"), *top.glob("*/index.json")]
    )
    if not found:
        raise FileNotFoundError(f"{top} holds no index.json of golden vectors")
    return found


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    cases = []
    for folder in golden_folders(metafunc.config):
        index = json.loads((folder / "index.json").read_text())
        listed = index["cases"] if isinstance(index, dict) else index
        cases += [{**case, "folder": str(folder)} for case in listed]
    metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


def pytest_terminal_summary(terminalreporter):
    counts = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.getreports(outcome):
            kept = dict(getattr(report, "user_properties", ()))
            if "kind" in kept:
                counts[kept["kind"]][kept.get("outcome", outcome)] += 1
    for kind, n in sorted(counts.items()):
        terminalreporter.write_line(
            f"kind {kind}: {n['passed']} passed, {n['failed'] + n['error']} failed, "
            f"{n['not followed']} not followed, {n['skipped']} skipped"
        )
