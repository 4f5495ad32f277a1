"""The page of a program: whole, with what the program says, read by a browser."""

import html.parser
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax.formats.html import write_html
from tests.models import images
from tests.test_formats_c99 import lowered

pytestmark = pytest.mark.usefixtures("flax_promotion")


class Net(nn.Module):
    """A residual sum, and a loop."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.relu(nn.Dense(4, name="a<b>&c")(x))
        return nn.RNN(nn.SimpleCell(3))(x)


@pytest.fixture(scope="module")
def program():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return lowered(Net(), images(2, 3, 4))


class Reader(html.parser.HTMLParser):
    """Counts elements, and checks that each is closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_is_whole_and_says_what_the_program_says(program, tmp_path):
    x = images(2, 3, 4)
    data = write_html(program, tmp_path / "a.html", title="a <net>", inputs=x)
    assert (tmp_path / "a.html").read_bytes() == data
    page = Reader(data.decode())
    text = " ".join(page.texts)
    for name in (*program.params, *program.site_names, "a <net>"):
        assert name in text
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not re.search(rb"https?://|url\(|@import", data)
    graphs = [graph for _, graph in program.graph.walk()]
    assert sum(a.get("class") == "graph" for _, a in page.seen) == len(graphs) == 2
    rows = sum(len(g.nodes) + len(g.inputs) + len(g.outputs) for g in graphs)
    assert sum(a.get("class") == "name" for _, a in page.seen) == rows


def test_the_statistics_are_those_of_the_codes(program):
    x = 3 * images(2, 3, 4)
    data = write_html(program, inputs=(x,)).decode()
    codes = np.asarray(program.site_codes(x)["input:0"])
    v = program.graph.values[program.graph.sites["input:0"]]
    share = np.mean((codes == v.low) | (codes == v.high))
    row = re.search(r"<tr><td>input:0</td><td>-128 to 127</td>(.*?)<svg", data)[1]
    cells = re.findall(r"<td>([^<]*)</td>", row)
    wanted = codes.min(), codes.max(), len(np.unique(codes)), f"{share:.2%}"
    assert cells == [*map(str, wanted)]
    bars = data.partition(f"{row}")[2].partition("</svg>")[0]
    counts = re.findall(r"<title>[^:]*: (\d+)</title>", bars)
    assert sum(map(int, counts)) == codes.size
    assert max(map(int, counts)) < codes.size


def test_inputs_of_another_shape_write_nothing(program, tmp_path):
    with pytest.raises(ValueError, match="must have shape"):
        write_html(program, tmp_path / "a.html", inputs=images(2, 3, 5))
    assert not [*tmp_path.iterdir()]


def test_a_program_of_nothing_but_a_move_has_a_page():
    fn = lambda params, x: x.reshape(-1)
    x = jnp.zeros((0, 3))
    qmodel = qjax.quantize_model(fn, {}, jnp.ones((1, 3)))
    qstate = qjax.calibrate(qmodel, {}, [jnp.ones((1, 3))], progress=False)
    program = qjax.lower(qmodel, {}, qstate, jnp.ones((1, 3)))
    Reader(write_html(program).decode())
    Reader(write_html(program, inputs=jnp.ones((1, 3)) + 0 * x.sum()).decode())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser is here")
def test_a_browser_shows_all_of_it(program, tmp_path):
    path = tmp_path / "a.html"
    write_html(program, path, inputs=images(2, 3, 4))
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=2000".split()
    command = ["chromium", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shown = Reader(done.stdout.partition("<!DOCTYPE html>")[2])
    written = Reader(path.read_text().partition("<!doctype html>")[2])
    tags = lambda page: sorted(tag for tag, _ in page.seen if tag != "tbody")
    assert tags(shown) == tags(written)
