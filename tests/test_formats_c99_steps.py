"""Loops in C, and steps of sequences with a state."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.formats.c99 import write_c99
from qjax.graph import reference
from qjax.graph.streaming import streamed
from tests.c99_cases import library, pointers, random_codes, run
from tests.models import images

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc is not installed"
)
X = images(2, 6, 4)
W = {"a": images(4, 4, seed=1) / 2, "k": images(3, 4, 4, seed=2) / 2}
W["rows"] = images(6, 4, seed=3) / 2


def _turned(p, x):
    """Two carries that change places, a counter, and a loop inside, backwards."""

    def inner(g, t):
        return jnp.tanh(g + t @ p["a"]), None

    def step(carry, t):
        n, g, h = carry
        g = jnp.where(n % 2 == 0, g, lax.scan(inner, g, p["a"][:2, None])[0])
        return (n + 1, h, g), (g @ p["a"], t)

    start = jnp.int32(0), x[:, 0], jnp.zeros_like(x[:, 0])
    carry, (ys, ts) = lax.scan(step, start, x.swapaxes(0, 1), reverse=True)
    return carry, ys + ts


def _causal(p, x):
    """A causal convolution, then a recurrent layer from a constant."""
    x = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    names = "NWC", "WIO", "NWC"
    y = lax.conv_general_dilated(x, p["k"], (1,), "VALID", dimension_numbers=names)

    def step(carry, t):
        n, h = carry
        h = jnp.where(n % 3 == 2, t, jnp.tanh(t @ p["a"] + h))
        return (n + 1, h), h

    start = 0, jnp.ones((x.shape[0], 4)) * 0.5
    (_, h), ys = lax.scan(step, start, nn.relu(y).swapaxes(0, 1))
    return ys.swapaxes(0, 1) @ p["a"], h


def _placed(p, x):
    """Rows of a table, and sums and extremes of all steps until now."""
    y = jnp.cumsum(nn.relu(x @ p["a"]) + p["rows"][None], 1) * p["rows"][None]
    return lax.cummax(y, 1) @ p["a"]


def lowered(fn, **options):
    model = qjax.quantize_model(fn, W, X)
    state = qjax.calibrate(model, W, [X], progress=False)
    return qjax.lower(model, W, state, X, **options)


@pytest.mark.kept
def test_loops_have_the_codes_of_the_oracle(tmp_path):
    program = lowered(_turned)
    assert "loop" in {n.operation for n in program.graph.nodes}
    for size in (1, 2):
        folder = tmp_path / str(size)  # A library of one path is loaded once.
        folder.mkdir()
        function = library(program, folder, batch_size=size).model_run
        for seed in range(3):
            codes = [q[:size] for q in random_codes(program, seed)]
            for found, wanted in zip(*run(function, program, codes), strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.kept
@pytest.mark.parametrize("fn", [_causal, _placed])
def test_steps_have_the_codes_of_the_whole_sequence(fn, tmp_path):
    program = lowered(fn, streaming={0: 1})
    own = streamed(program.graph, program.params)
    c, found = library(program, tmp_path, batch_size=2), write_c99(program)
    state = np.full(2 * found.state_bytes + 64, 77, np.int8)
    values = program.graph.values
    for seed in range(2):
        codes = random_codes(program, seed)
        whole = run(c.model_run, program, codes)
        for a, b in zip(*whole, strict=True):
            np.testing.assert_array_equal(a, b)
        wanted = whole[1]
        c.model_reset(*pointers(state))  # Also after another sequence.
        held = program.initial_state(2)
        for t in range(X.shape[1]):
            one = np.ascontiguousarray(codes[0][:, t : t + 1], np.int8)
            given = [*map(np.asarray, held), one]
            steps = reference.run(own.step, own.params, given)
            held = [steps[v] for v in own.step.outputs[: len(held)]]
            outs = [
                np.zeros(
                    w[:, :1].shape if axis is not None else w.shape, values[v].dtype
                )
                for w, v, axis in zip(
                    wanted, program.graph.outputs, own.axes, strict=True
                )
            ]
            c.model_step(*pointers(state, one, *outs))
            ends = own.step.outputs[len(held) :]
            for out, v in zip(outs, ends, strict=True):
                np.testing.assert_array_equal(out, steps[v])
            np.testing.assert_array_equal(outs[0][:, 0], wanted[0][:, t])
        for out, w, axis in zip(outs, wanted, own.axes, strict=True):
            assert axis is not None or np.array_equal(out, w)


def test_a_header_says_what_a_step_takes():
    found = write_c99(lowered(_causal, streaming={0: 1}), name="net")
    assert "void net_step(net_state *state, const int8_t *in0, " in found.header
    assert "void net_reset(net_state *state);" in found.header
    assert "#define NET_STEP_IN0_SIZE 4" in found.header
    assert "#define NET_IN0_SIZE 24" in found.header
    assert 0 < found.state_bytes < 64 and "STEP_COUNT" not in found.header
    counted = write_c99(lowered(_placed, streaming={0: 1}), name="net")
    assert "#define NET_STEP_COUNT 6" in counted.header
    plain = write_c99(lowered(_causal), name="net")
    assert "net_step" not in plain.header and not plain.state_bytes


def test_an_input_that_is_returned_and_read(tmp_path):
    grid = qjax.QParams(jnp.float32(1), jnp.int32(0))
    point = lambda x: qjax.fake_quant(x, grid, qjax.QSpec(8))

    def fn(x, y):
        x, y = point(x), point(y)
        return x, point(x + y), x, y[:, :0]

    own = [images(2, 3, seed=k) for k in range(2)]
    program = qjax.lower(fn, *own)
    function = library(program, tmp_path, batch_size=2).model_run
    codes = random_codes(program, 0)
    for found, wanted in zip(*run(function, program, codes), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_only_sizes_that_go_together_change():
    """The second input has a size of its own, the third one that of the first."""

    def fn(x, y, z):
        grid = qjax.QParams(jnp.float32(1), jnp.int32(0))
        point = lambda x: qjax.fake_quant(x, grid, qjax.QSpec(8))
        return point(point(x) + point(z)), point(point(y) * 2.0)

    program = qjax.lower(fn, images(2, 3), images(4, 3), images(2, 3, seed=1))
    header = write_c99(program, batch_size=5).header
    sizes = [f"#define MODEL_IN{k}_SIZE {n}" for k, n in enumerate((15, 12, 15))]
    assert all(line in header for line in sizes)
