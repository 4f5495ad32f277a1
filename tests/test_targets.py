"""Targets: TFLite's arithmetic in programs and in training, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import integer_tflite, presets, targets
from qjax.conformance import RUNTIMES, conform
from qjax.formats.tflite import write_tflite
from qjax.graph.tflite_tables import (
    Codes,
    exponential_table,
    wide_function_table,
    wide_sigmoid_table,
    wide_softmax_tables,
    wide_tanh_table,
)
from qjax.integer_tflite import tflite_multiplier, traced_tflite_multiplier
from qjax.lowering.accumulators import TargetGrid
from qjax.lowering.forward_functions import (
    traced_wide_exponentials,
    wide_function_codes,
)
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


class Small(nn.Module):
    """A product, a sum of two grids, an average and a function with a table."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = x + nn.Conv(4, (1, 1))(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return jnp.tanh(nn.Dense(5)(x.mean((1, 2))))


def quantized(net, *inputs, scheme=None):
    """A model with parameters, calibrated."""
    params = jax.jit(net.init)(jax.random.key(0), *inputs)
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape)
    params = jax.tree.map(move, params)
    scheme = scheme or presets.tflite_int8(same_scales=True)
    model = qjax.quantize_model(net.apply, params, *inputs, scheme=scheme)
    return model, params, qjax.calibrate(model, params, [inputs], progress=False)


@pytest.fixture(scope="module")
def small():
    x = images(3, 6, 6, 2)
    with jax.numpy_dtype_promotion("standard"):
        own = quantized(Small(), x)
        return *own, x, qjax.lower(*own, x, target=targets.tflite)


def test_a_traced_multiplier_is_that_of_numpy():
    rng = np.random.default_rng(0)
    ratios = np.concatenate(
        [np.exp(rng.uniform(-30, 20, 5000)), [0, 1, 0.5, 1 - 2e-17]]
    )
    with jax.enable_x64(True):
        found = jax.jit(traced_tflite_multiplier)(jnp.asarray(ratios))
    for got, wanted in zip(found, tflite_multiplier(ratios), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", ("conv", "dot_codes", "multiply_codes", "codes"))
def test_traced_ratios_are_those_of_numpy(kind):
    rng = np.random.default_rng(1)
    count = 1 if kind == "codes" else 2

    def traced(scales, divisor):
        with jax.enable_x64(True):
            return integer_tflite.product_ratio(kind, scales, divisor)

    for channels in (1, 7):
        scales = [np.float32(rng.uniform(1e-3, 1, channels)) for _ in range(count)]
        scales = scales[:1] + [np.float32(s[0]) for s in scales[1:]]
        divisor = np.float32(rng.uniform(1e-3, 1))
        found = jax.jit(traced)(list(map(jnp.asarray, scales)), jnp.asarray(divisor))
        wanted = integer_tflite.product_ratio(kind, scales, divisor)
        np.testing.assert_array_equal(np.asarray(found), np.ravel(wanted))


def test_traced_exponentials_are_those_of_the_reader():
    for beta in (1.0, 0.35):
        run = jax.jit(lambda s, b=beta: integer_tflite.traced_exponentials(s, b))
        for scale in np.float32([0.001, 0.03, 0.11, 1.7, 40.0]):
            np.testing.assert_array_equal(run(scale), exponential_table(scale, beta))


@pytest.mark.kept
def test_training_computes_the_codes_of_the_program(small):
    model, params, qstate, x, program = small
    run = jax.jit(lambda p, x: model.apply_integer(p, qstate, x, target=targets.tflite))
    for k in range(4):
        own = (1 + k) * images(*x.shape, seed=k)
        np.testing.assert_array_equal(run(params, own), program(own))


def test_derivatives_are_those_of_the_quantized_model(small):
    model, params, qstate, x, _ = small

    def loss(apply, params):
        return jnp.sum(apply(params, qstate, x) ** 2)

    integer = lambda *own: model.apply_integer(*own, target=targets.tflite)
    found, wanted = (
        jax.jit(jax.grad(lambda p, f=f: loss(f, p)))(params)
        for f in (integer, model.apply)
    )
    for got, own in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        cosine = np.vdot(got, own) / np.linalg.norm(got) / np.linalg.norm(own)
        assert np.all(np.isfinite(got)) and cosine > 0.95  # Other codes, at ties.


def test_a_program_has_tflites_operations_and_roundings(small):
    *_, program = small
    kinds = {node.operation for node in program.graph.nodes}
    assert {"tflite_add", "tflite_average", "table"} <= kinds and "add" not in kinds
    makers = {node.output: node.operation for node in program.graph.nodes}
    for node in program.graph.nodes:
        if node.operation == "requantize":
            is_dense = makers[node.inputs[0]] == "dot"
            wanted = "tflite_single" if is_dense else "tflite_double"
            assert node.attributes["rule"] == wanted
    (v,) = program.graph.inputs
    assert program.graph.values[v].rounding == "half_away"
    scale = program.input_grids[0].scale
    ties = np.float32(scale) * np.float32(np.arange(-4, 4) + 0.5)
    codes = np.resize(ties, program.graph.values[v].shape)
    found = program.quantize_inputs(codes)[0].reshape(-1)[:8]
    steps = found - program.input_grids[0].zero_point
    np.testing.assert_array_equal(steps, [-4, -3, -2, -1, 1, 2, 3, 4])


def test_targets_of_a_dense_layer():
    x = images(2, 4)
    model, params, qstate = own = quantized(nn.Dense(3), x)
    usual = qjax.lower(*own, x)
    assert usual.graph == qjax.lower(*own, x, target=targets.half_even).graph
    for target, rule in ((targets.tflite, "single"), (targets.tflite_micro, "double")):
        program = qjax.lower(*own, x, target=target)
        (rounded,) = (n for n in program.graph.nodes if n.operation == "requantize")
        assert rounded.attributes["rule"] == f"tflite_{rule}"
        run = lambda p, s, x, t=target: model.apply_integer(p, s, x, target=t)
        np.testing.assert_array_equal(jax.jit(run)(params, qstate, x), program(x))


class Wave(nn.Module):
    """A function that TFLite does not have."""

    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(3)(x))


class Scaled(nn.Module):
    """A product of two values times a number."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) * nn.Dense(3)(x) * 0.3


@pytest.mark.parametrize("net", (Wave(), Scaled()))
def test_what_tflite_does_not_have_is_refused_by_name(net):
    x = images(2, 4)
    model, params, qstate = quantized(net, x)
    for run in (
        lambda: qjax.lower(model, params, qstate, x, target=targets.tflite),
        lambda: model.apply_integer(params, qstate, x, target=targets.tflite),
    ):
        with pytest.raises(NotImplementedError, match="'output:0'.*half_even"):
            run()


SCALES = 2.0**-20, 2.0**-12, 1.0003 * 2.0**-12, 1.002 * 2.0**-11, 3e-4, 1.1e-3


@pytest.mark.parametrize("name", ["logistic", "tanh", "exp"])
def test_traced_functions_of_16_bits_are_those_of_the_reader(name):
    ends = -(1 << 15), (1 << 15) - 1
    codes = jnp.arange(ends[0], ends[1] + 1, dtype=jnp.int32)
    make = {
        "logistic": lambda x, y: wide_sigmoid_table(x),
        "tanh": lambda x, y: wide_tanh_table(x),
        "exp": lambda x, y: wide_function_table(np.exp, x, y),
    }[name]

    @jax.jit
    def run(scale, unit):
        grid = TargetGrid(unit, *map(jnp.int32, (0, *ends)), "int16")
        return wide_function_codes(name, codes, scale, grid)

    for scale in np.float32(SCALES):
        for unit in np.float32([2.0**-15, 7e-3]):
            x, y = Codes(scale, 0, *ends), Codes(unit, 0, *ends)
            np.testing.assert_array_equal(run(scale, unit), make(x, y))


def test_traced_exponentials_of_16_bits_are_those_of_the_reader():
    run = jax.jit(lambda s: traced_wide_exponentials(s, 0.7))
    for scale in np.float32(SCALES):
        wanted, reciprocals = wide_softmax_tables(scale, 0.7)
        np.testing.assert_array_equal(run(scale), wanted)
    assert reciprocals[0] == 32767


WIDE = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "softmax": jax.nn.softmax,
}


@pytest.mark.parametrize("name", WIDE)
def test_words_of_16_bits_compute_what_litert_does(name):
    p, x = images(5, 6), 3 * images(4, 5)
    scheme = presets.tflite_int16x8(same_scales=True)
    qmodel = qjax.quantize_model(lambda p, x: WIDE[name](x @ p), p, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, p, [x], progress=False)
    program = qjax.lower(qmodel, p, qstate, x, target=targets.tflite)
    run = jax.jit(lambda *own: qmodel.apply_integer(*own, target=targets.tflite))
    np.testing.assert_array_equal(run(p, qstate, x), program(x))
    row = conform(program, 2 * x, [RUNTIMES["litert"]]).rows[0]
    assert row.comparison.equal == row.comparison.codes > 0, row


def test_a_function_from_16_bits_to_8_is_refused_in_both():
    p, x = images(5, 6), 3 * images(4, 5)
    rules = {"output:0": qjax.QSpec(8)}
    scheme = presets.tflite_int16x8()
    own = tuple(qjax.Rule(name, word) for name, word in rules.items())
    scheme = dataclasses.replace(scheme, rules=(*own, *scheme.rules))
    qmodel = qjax.quantize_model(lambda p, x: jnp.tanh(x @ p), p, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, p, [x], progress=False)
    for run in (
        lambda: qjax.lower(qmodel, p, qstate, x, target=targets.tflite),
        lambda: qmodel.apply_integer(p, qstate, x, target=targets.tflite),
    ):
        with pytest.raises(NotImplementedError, match="tanh from int16 to int8"):
            run()


def test_loops_are_refused_in_both():
    x = images(2, 3, 3)
    model, params, qstate = own = quantized(nn.RNN(nn.SimpleCell(2)), x)
    for run in (
        lambda: qjax.lower(*own, x, target=targets.tflite),
        lambda: model.apply_integer(params, qstate, x, target=targets.tflite),
    ):
        with pytest.raises(NotImplementedError, match="'RNN' is computed by `loop`"):
            run()


def test_a_weight_may_come_before_its_bias():
    """Its least scale reads the bias, whatever the order of the parameters."""
    fn = lambda p, x: x @ p["a"] + p["b"]
    params, x = {"a": images(3, 4), "b": 1e6 * images(1, 4)}, images(2, 3)
    renamed = {"b": params["a"], "a": params["b"]}
    other = lambda p, x: x @ p["b"] + p["a"]
    scheme = presets.tflite_int8(same_scales=True)
    found = []
    for f, p in ((fn, params), (other, renamed)):
        qmodel = qjax.quantize_model(f, p, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, p, [x], progress=False)
        found.append(qmodel.apply(p, qstate, x))
    np.testing.assert_array_equal(*found)


def test_words_of_16_bits_saturate_as_the_kernels_do():
    assert targets.tflite.ends(-(2**15) + 1, 2**15 - 1) == (-(2**15), 2**15 - 1)
    assert targets.half_even.ends(-(2**15) + 1, 2**15 - 1) == (-(2**15) + 1, 2**15 - 1)
    assert targets.tflite.ends(-127, 127) == (-127, 127)


FORMS = {
    "bytes": (lambda p, x: x.astype(jnp.float32) @ p / 255, np.uint8),
    "integers": (lambda p, x: x.astype(jnp.float32) @ p, np.int32),
    "a slice": (lambda p, x: jnp.maximum(x @ p[:, :3], 0) @ p[:3, 1:], np.float32),
    "several": (lambda p, x: (x @ p, jnp.maximum(x @ p, 0) + x, x), np.float32),
    "two activations": (lambda p, x: (x @ p) @ (x @ p).T, np.float32),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_inputs_and_forms_are_what_litert_computes(name):
    fn, dtype = FORMS[name]
    p, x = images(5, 5), (20 * images(4, 5, seed=2)).clip(0, 255).astype(dtype)
    scheme = presets.tflite_int8(same_scales=True)
    qmodel = qjax.quantize_model(fn, p, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, p, [x], progress=False)
    program = qjax.lower(qmodel, p, qstate, x, target=targets.tflite)
    found = qmodel.apply_integer(p, qstate, x, target=targets.tflite)
    jax.tree.map(np.testing.assert_array_equal, found, program(x))
    row = conform(program, x, [RUNTIMES["litert"]]).rows[0]
    assert row.comparison.equal == row.comparison.codes > 0, row


@pytest.mark.parametrize("function", [jax.nn.sigmoid, jnp.tanh])
def test_functions_whose_grid_tflite_fixes_are_refused_on_others(function):
    fn = lambda p, x: function(x @ p)
    p, x = images(4, 3), images(2, 4)
    for scheme in (qjax.Scheme(), presets.tflite_int8()):
        qmodel = qjax.quantize_model(fn, p, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, p, [x], progress=False)
        lower = lambda q=qmodel, s=qstate: qjax.lower(q, p, s, x, target=targets.tflite)
        train = lambda p, x, q=qmodel, s=qstate: q.apply_integer(
            p, s, x, target=targets.tflite
        )
        if scheme == qjax.Scheme():
            runs = (functools.partial(f, p, x) for f in (train, jax.jit(train)))
            for run in (lower, *runs):
                with pytest.raises(NotImplementedError, match=r"presets\.tflite_int8"):
                    run()
        else:  # The remedy.
            assert write_tflite(lower())
    point = lambda y, scale, zero=0: qjax.fake_quant(
        y, qjax.QParams(jnp.float32(scale), jnp.int32(zero)), qjax.QSpec(8)
    )
    table = lambda scale, zero: qjax.lower(
        lambda x: point(function(point(x, 1 / 16)), scale, zero), x
    )
    with pytest.raises(ValueError, match="none of TFLite's"):
        write_tflite(table(1 / 100, 0))
