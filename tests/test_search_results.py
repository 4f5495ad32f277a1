"""Results of sweeps: arrays, tables, the best, the front and its figure."""

import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from qjax.schemes.patterns import Where
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.search import Results, draw_front, grid, pareto, sweep

SCHEMES = grid(Scheme(), {"*/kernel": [2, 4, 8], ("a/output", "b/output"): [4, 8]})


def made(**values):
    count = len(next(iter(values.values())))
    return Results(
        schemes=tuple(itertools.islice(itertools.cycle(SCHEMES), count)),
        values={name: np.asarray(own) for name, own in values.items()},
        seeds=None,
        places=np.arange(count),
    )


def front_by_definition(points):
    """The places of points that no other one beats, by all pairs."""
    beats = lambda a, b: all(a <= b) and any(a < b)
    known = [k for k, p in enumerate(points) if np.isfinite(p).all()]
    return {k for k in known if not any(beats(points[j], points[k]) for j in known)}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_that_of_the_definition(dimensions, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 6, (40, dimensions)).astype(float)  # With ties.
    points[rng.integers(0, 40, 5), 0] = [np.nan, np.inf, -np.inf, np.nan, 2]
    found = made(**{f"v{k}": points[:, k] for k in range(dimensions)})
    front = pareto(found, minimize=tuple(found.values))
    assert {*front.places.tolist()} == front_by_definition(points)
    assert np.all(np.diff(front["v0"]) >= 0)
    up = pareto(found, minimize="v0", maximize=tuple(found.values)[1:])
    signs = np.asarray([1, *[-1] * (dimensions - 1)])
    assert {*up.places.tolist()} == front_by_definition(points * signs)


def test_a_front_of_nothing_finite_is_empty():
    assert len(pareto(made(a=[np.nan, np.inf]), minimize="a")) == 0
    assert str(pareto(made(a=[np.nan]), minimize="a")) == "empty"


def test_bad_names():
    found = made(loss=[1, 2], size=[2, 1])
    for options in (
        {},
        {"minimize": ("loss", "loss")},
        {"minimize": "loss", "maximize": "loss"},
    ):
        with pytest.raises(ValueError, match="needs the names of numbers, each once"):
            pareto(found, **options)
    with pytest.raises(KeyError, match="There is no 'los' here. .*loss"):
        pareto(found, minimize="los")
    with pytest.raises(ValueError, match="Which number is it"):
        found.best()
    with pytest.raises(ValueError, match="finite loss"):
        made(loss=[np.nan], size=[1]).best("loss")


def test_axes_have_the_names_of_their_patterns():
    found = made(loss=np.arange(6))
    assert {name: own.tolist() for name, own in found.axes.items()} == {
        "*/kernel": [2, 2, 4, 4, 8, 8],
        "a/output, b/output": [4, 8] * 3,
    }
    np.testing.assert_array_equal(found["*/kernel"], [2, 2, 4, 4, 8, 8])
    schemes = [Scheme(rules=(Rule(Where(role="weight"), bits=b),)) for b in (2, 3)]
    words = [Scheme(f"quantized_bits({b},0,1)") for b in (2, 3)]
    for own, name in ((schemes, "Where(role='weight')"), (words, "weights")):
        results = Results(tuple(own), {"a": np.arange(2)}, None, np.arange(2))
        assert [*results.axes] == [name] and results.axes[name].tolist() == [2, 3]
    assert [*made(a=[1]).axes] == ["*/kernel", "a/output, b/output"]
    assert Results((Scheme(),), {"a": np.arange(1)}, None, np.arange(1)).axes == {}


def test_the_best():
    found = made(loss=[3.0, np.nan, 1.0, -np.inf], size=[1, 2, 3, 4])
    assert found.best("loss") == SCHEMES[2]
    assert found.best("loss", maximize=True) == SCHEMES[0]
    assert found.best("*/kernel", maximize=True) == SCHEMES[2]


def test_tables_show_axes_seeds_and_numbers():
    fn = lambda s, n: {
        "a": jnp.float32(s.rules[0].bits) / (jnp.float32(n) + 0.5),
        "b": s.rules[1].bits > 4,
    }
    found = sweep(fn, SCHEMES, seeds=(0, 5))
    console = rich.console.Console(record=True, width=120)
    console.print(found)
    for text in (str(found), console.export_text()):
        for word in ("12 configurations", "*/kernel", "a/output, b/output", "seed"):
            assert word in text
        assert "1.45455" in text and "False" in text
    assert found._repr_html_().count("<tr>") == 13
    assert repr(found) == "Results(12 configurations: a, b)"
    assert "... and 20 more" in str(made(a=np.arange(60)))


@pytest.mark.parametrize("up", [(), ("accuracy",), ("bytes",), ("accuracy", "bytes")])
def test_the_figure_shows_all_configurations_and_the_front(tmp_path, up):
    rng = np.random.default_rng(0)
    found = made(bytes=rng.integers(1, 999, 60), accuracy=rng.normal(size=60))
    found.values["accuracy"][7] = np.nan
    path = tmp_path / "front.png"
    figure = draw_front(found, "bytes", "accuracy", maximize=up, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    down = tuple(name for name in ("bytes", "accuracy") if name not in up)
    front = pareto(found, minimize=down, maximize=up)
    (line,) = axes.get_lines()
    assert {*line.get_xdata()} == {*front["bytes"]}
    others = axes.collections[0].get_offsets()
    assert len(others) == 60 - len(front) - 1
    texts = {text.get_text() for text in axes.texts}
    assert "1 without a number" in texts
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"


def test_a_figure_of_nothing():
    with pytest.raises(ValueError, match="No configuration has both a finite 'a'"):
        draw_front(made(a=[np.nan], b=[1.0]), "a", "b")
    with pytest.raises(ValueError, match="`maximize` must name 'a' or 'b', got 'c'"):
        draw_front(made(a=[1.0], b=[1.0]), "a", "b", maximize="c")


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="qjax\\[plot\\]"):
        draw_front(made(a=[1.0], b=[1.0]), "a", "b")
