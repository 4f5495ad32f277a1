"""LSTMs of Flax as TFLite's operator: one set of integers in all that computes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from qjax import presets, targets
from qjax.conformance.runtimes import RUNTIMES
from qjax.formats.tflite import write_tflite
from tests.lstm_cases import Lstm, layer
from tests.models import images
from tests.test_formats_tflite_writer import litert

pytestmark = pytest.mark.usefixtures("flax_promotion")
GATES = "ifgo"
SCHEME = presets.tflite_int8(lstm=True)


def quantized(fn, params, x, scheme=SCHEME):
    model = qjax.quantize_model(fn, params, x, scheme=scheme)
    return model, params, qjax.calibrate(model, params, [x], progress=False)


def moved(params):
    move = lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape)
    return jax.tree.map(move, params)


def of_linen(net, x, scheme=SCHEME):
    params = moved(jax.jit(net.init)(jax.random.key(0), x))
    return quantized(net.apply, params, x, scheme)


def of_nnx(cell, x):
    graph, params, rest = nnx.split(
        nnx.RNN(cell(3, 4, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    fn = lambda p, x: nnx.merge(graph, p, rest)(x, rngs=nnx.Rngs(0))
    return quantized(fn, moved(params), x)


X = images(3, 6, 3)


@functools.cache
def lowered(name):
    with jax.numpy_dtype_promotion("standard"):
        own = of_linen(nn.RNN(getattr(nn, name)(4)), X)
        return own, qjax.lower(*own, X, target=targets.tflite)


def integers(own, x, target=targets.tflite):
    model, params, qstate = own
    run = lambda *args: model.apply_integer(*args, target=target)
    return jax.jit(run)(params, qstate, x)


def written_out(params, program, is_joined):
    """The LSTM of float parameters, its weights quantized in NumPy."""
    cell = params["params"]["cell"]
    sides = {"i": [], "h": []}
    for side, found in sides.items():
        kernels = [np.asarray(cell[side + g]["kernel"]) for g in GATES]
        most = [np.abs(kernel).max() for kernel in kernels]
        for kernel, own in zip(kernels, most, strict=True):
            scale = np.float32(max(most) if is_joined else own) / np.float32(127)
            codes = np.rint(kernel / np.float64(scale)).astype(np.int8)
            found.append((codes.T, float(scale)))
    graph = program.graph
    grids = [graph.values[v].grid for v in (*graph.inputs, *graph.outputs)]
    x, h = ((float(np.float32(g.scale)), g.zero_point) for g in grids)
    biases = [
        np.rint(np.asarray(cell["h" + g]["bias"]) / (np.float64(own[1]) * x[0]))
        for g, own in zip(GATES, sides["i"], strict=True)
    ]
    (loop,) = (n for n in graph.nodes if n.operation == "loop")
    (power,) = {
        int(np.log2(graph.values[v].grid.scale))
        for v in loop.outputs
        if graph.values[v].dtype == "int16"
    }
    parts = [[*zip(*sides[side], strict=True)] for side in "ih"]
    codes, scales = zip(*parts, strict=True)
    whole = tuple(b.astype(np.int32) for b in biases)
    return Lstm(*codes, whole, *scales, x, h, power)


@pytest.mark.kept
@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell"])
def test_all_have_the_codes_of_the_kernel(name):
    """Program, `apply_integer` and LiteRT's reference kernel, against int64."""
    own, program = lowered(name)
    codes = np.random.default_rng(1).integers(-128, 128, X.shape).astype(np.int8)
    wanted = layer(written_out(own[1], program, name != "LSTMCell"), codes)
    assert len(np.unique(wanted)) > 20
    np.testing.assert_array_equal(program.codes(codes), wanted)
    (found,) = litert(write_tflite(program), [codes])
    np.testing.assert_array_equal(found, wanted)
    x = 2 * X  # Saturates.
    np.testing.assert_array_equal(integers(own, x), program(x))


def test_verify_compares_what_goes_from_step_to_step():
    """The state is within a code; the cell, of 16 bits, is farther off."""
    own, program = lowered("LSTMCell")
    found = qjax.verify(program, *own, X)
    assert {*found.sites} == {"input:0", "scan_0/carry:0", "scan_0/carry:1"}
    assert found.sites["scan_0/carry:1"].max_difference <= 1
    assert 0 < found.sites["scan_0/carry:0"].max_difference < 20
    other = of_linen(nn.RNN(nn.GRUCell(4)), X, presets.tflite_int8())
    with pytest.raises(ValueError, match="lowered from another model"):
        qjax.verify(program, *other, X)


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell"])
def test_cells_of_nnx(name):
    own = of_nnx(getattr(nnx, name), X)
    program = qjax.lower(*own, X, target=targets.tflite)
    np.testing.assert_array_equal(integers(own, X), program(X))
    codes = np.asarray(program.run_sites(X)[0]["input:0"])
    (found,) = litert(write_tflite(program), [codes])
    np.testing.assert_array_equal(found, program.codes(codes))


def test_derivatives_are_those_of_the_simulation():
    model, params, qstate = lowered("LSTMCell")[0]
    x = 0.5 * X
    run = lambda fn, p: jnp.sum(fn(p, qstate, x))
    in_integers = functools.partial(model.apply_integer, target=targets.tflite)
    found, wanted = (
        jax.jit(jax.grad(functools.partial(run, fn)))(params)
        for fn in (in_integers, model.apply)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(found))


class Several(nn.Module):
    """Two LSTMs between dense layers, of which the last step is read."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(4))(nn.relu(nn.Dense(5)(x)))
        x = nn.RNN(nn.LSTMCell(3), time_major=False, reverse=True)(x)
        return nn.Dense(2)(x[:, -1])


def test_a_model_around_lstms():
    own = of_linen(Several(), X, presets.tflite_int8(lstm=True, same_scales=True))
    program = qjax.lower(*own, X, target=targets.tflite)
    np.testing.assert_array_equal(integers(own, X), program(X))
    row = qjax.conform(program, X, [RUNTIMES["litert"]]).rows[0]
    assert row.comparison.equal == row.comparison.codes > 0, row
    more = images(5, 6, 3)  # Another batch.
    np.testing.assert_array_equal(integers(own, more), program(more))


def test_steps_one_by_one_have_the_codes_of_a_sequence():
    own, program = lowered("OptimizedLSTMCell")
    stepped = qjax.lower(*own, X, target=targets.tflite, streaming={0: 1})
    state, found = stepped.initial_state(len(X)), []
    for t in range(X.shape[1]):
        state, y = stepped.step(state, X[:, t])
        found.append(y)
    np.testing.assert_array_equal(np.stack(found, 1), program(X))


# Forms of a step.


def cell_of(h, c, x, p, order="ifgo"):
    """An LSTM as one writes it oneself: transposed weights, several biases."""
    y = p["b"] + x @ p["k"] + (lax.dot(h, p["r"]) + p["b"])
    parts = dict(zip(order, jnp.split(y, 4, -1), strict=True))
    i, f, o = (jax.nn.sigmoid(parts[name]) for name in "ifo")
    c = jnp.tanh(parts["g"]) * i + c * f
    return jnp.tanh(c) * o, c


def scanned(step, p, x):
    zeros = jnp.zeros((len(x), 4))
    one = lambda carry, x: (own := step(*carry, x, p), own[0])
    return lax.scan(one, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)


P = {"k": images(3, 16), "r": images(4, 16), "b": images(1, 16)}


def test_a_step_of_ones_own():
    fn = functools.partial(scanned, functools.partial(cell_of, order="fgio"))
    own = quantized(fn, P, X)
    tensors = {site.lstm for site in own[0].sites}
    assert tensors == {"", "kernel", "gate", "share", "product", "cell", "state"}
    program = qjax.lower(*own, X, target=targets.tflite)
    np.testing.assert_array_equal(integers(own, X), program(X))
    codes = np.asarray(program.run_sites(X)[0]["input:0"])
    (found,) = litert(write_tflite(program), [codes])
    np.testing.assert_array_equal(found, program.codes(codes))


def changed(change):
    def step(h, c, x, p):
        return change(*cell_of(h, c, x, p), h, c, x, p)

    return step


OTHERS = {
    "the cell as it is": changed(
        lambda a, b, h, c, x, p: (jax.nn.sigmoid(x @ p["s"]) * b, b)
    ),
    "a state that is kept": changed(lambda a, b, h, c, x, p: (a + h, b)),
    "peepholes": lambda h, c, x, p: cell_of(h + c, c, x, p),
    "a state in the input": lambda h, c, x, p: cell_of(h, c, x + h[:, :3], p),
    "another function": changed(
        lambda a, b, h, c, x, p: (jnp.tanh(b) * jnp.tanh(x @ p["s"]), b)
    ),
    "a bounded cell": changed(lambda a, b, h, c, x, p: (a, jnp.clip(b, -1, 1))),
    "a mask": changed(lambda a, b, h, c, x, p: (jnp.where(x[:, :1] > 0, a, h), b)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_nearly_an_lstm_is_none(name):
    params = {**P, "s": images(3, 4)}
    fn = functools.partial(scanned, OTHERS[name])
    with jax.numpy_rank_promotion("allow"):
        model = qjax.quantize_model(fn, params, X, scheme=presets.tflite_int8())
    assert not any(site.lstm for site in model.sites)


def test_rules_name_the_tensors_of_an_lstm():
    assert qjax.Scheme.from_json(SCHEME.to_json()).to_json() == SCHEME.to_json()
    word = qjax.QSpec(16, symmetric=True)
    net = nn.RNN(nn.OptimizedLSTMCell(2))
    params = jax.eval_shape(net.init, jax.random.key(0), X)
    wrong = qjax.Scheme(rules=(qjax.Rule(qjax.Where(lstm="gates"), word),))
    with pytest.raises(ValueError, match="matches no tensor. The closest is 'gate'"):
        qjax.quantize_model(net.apply, params, X, scheme=wrong)
    right = qjax.Scheme(rules=(qjax.Rule(qjax.Where(lstm="gate"), word),))
    model = qjax.quantize_model(net.apply, params, X, scheme=right)
    wide = {s.name for s in model.sites if model.choices[s].word == word}
    assert wide == {s.name for s in model.sites if s.lstm == "gate"}
    assert "cell/ii/output" in wide and "scan_0/residual_3/output" in wide


# Refusals, the remedy of each tried.


def refused(own, said, x=X, target=targets.tflite):
    for run in (
        lambda: qjax.lower(*own, x, target=target),
        lambda: own[0].apply_integer(*own[1:], x, target=target),
    ):
        with pytest.raises(NotImplementedError, match=said):
            run()


def is_lowered(own, x=X, target=targets.tflite):
    program = qjax.lower(*own, x, target=target)
    np.testing.assert_array_equal(integers(own, x, target), program(x))


def with_rules(*rules):
    return dataclasses.replace(SCHEME, rules=(*rules, *SCHEME.rules))


WIDE = qjax.QSpec(16, symmetric=True, narrow_range=True)
WORDS = {
    "cell/hi/kernel": (qjax.QSpec(8, axis="output"), None, "codes of 8 bits and one"),
    "cell/ii/output": (qjax.QSpec(8), None, "is the gate of an LSTM and has the word"),
    "scan_0/residual_0/output": (WIDE, None, "the gate.* and TFLite's has 0.00024"),
    "scan_0/tanh_0/output": (WIDE, "constant(-2.0, 2.0)", "the share .* 3.05176e-05"),
    "scan_0/mul_0/output": (WIDE, None, "the product of an LSTM"),
    "scan_0/carry:0": (WIDE, None, "the cell of TFLite's LSTM has a power of two"),
    "scan_0/carry:1": (WIDE, None, "the state of TFLite's LSTM has codes from -128"),
}


@pytest.mark.parametrize("name", WORDS)
def test_other_words_are_refused(name):
    word, calibrator, said = WORDS[name]
    scheme = with_rules(qjax.Rule(name, word, calibrator))
    own = of_linen(nn.RNN(nn.OptimizedLSTMCell(2)), X, scheme)
    refused(own, f"{name}'.*{said}.*presets.tflite_int8.lstm=True")
    if name.startswith("scan_0/r"):  # Unknown in a trace: no numbers in place of wrong.
        assert np.all(np.isnan(integers(own, X)))


def test_a_small_cell_needs_a_range():
    x = 0.01 * X
    cell = nn.RNN(nn.OptimizedLSTMCell(2))
    params = jax.jit(cell.init)(jax.random.key(0), x)
    own = quantized(cell.apply, params, x)
    refused(own, r"the scale 2\^-.*from 2\^-15 to 2\^-9.*constant\(-8.0, 8.0\)", x)
    word = qjax.QSpec(16, symmetric=True, power_of_two=True)
    scheme = with_rules(qjax.Rule("scan_0/carry:0", word, "constant(-8.0, 8.0)"))
    is_lowered(quantized(cell.apply, params, x, scheme), x)


@pytest.mark.parametrize("size", [1e-7, 1e-3])
def test_biases_beyond_int32_are_refused(size):
    """Weights so small that a bias has more codes than int32: no number wraps."""
    cell = nn.RNN(nn.LSTMCell(2))
    params = jax.tree.map(lambda a: a + 0.0, jax.jit(cell.init)(jax.random.key(0), X))
    own = params["params"]["cell"]
    own["ig"]["kernel"] = own["ig"]["kernel"] * size
    own["hg"]["bias"] = own["hg"]["bias"] + 30.0
    tiny = quantized(cell.apply, params, X)
    if size == 1e-3:  # Some 2^28 codes.
        return is_lowered(tiny)
    with pytest.raises(OverflowError, match="beyond int32"):
        qjax.lower(*tiny, X, target=targets.tflite)
    said = "a gate of '.*scan_0' could reach .*beyond int32: the unit .* Scale"
    with pytest.raises(OverflowError, match=said):
        tiny[0].apply_integer(*tiny[1:], X, target=targets.tflite)
    assert np.all(np.isnan(integers(tiny, X)))  # Unknown in a trace.


def test_other_starts_and_targets_are_refused():
    cell = nn.RNN(nn.OptimizedLSTMCell(2))
    params = jax.jit(cell.init)(jax.random.key(0), X)
    start = tuple(jnp.full((len(X), 2), v) for v in (0.5, 0.0))
    fn = lambda p, x: cell.apply(p, x, initial_carry=start)
    refused(quantized(fn, params, X), "carry:0' starts from another value than zero")
    own = quantized(cell.apply, params, X)
    said = "gates `targets.tflite_micro` rounds otherwise.*target=targets.tflite`"
    refused(own, said, target=targets.tflite_micro)
    is_lowered(own)
