"""Softmaxes, log-softmaxes and l2-normalisations of rows, as LiteRT computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import presets, targets
from qjax.backends.xla import tflite as bodies
from qjax.formats.onnx import write_onnx
from qjax.formats.tflite import (
    Operator,
    Tensor,
    build_tflite,
    read_tflite,
    write_tflite,
)
from qjax.formats.tflite.schema import serialized
from qjax.graph import reference
from qjax.graph.operations.fractions import inverse_root, logarithm
from qjax.graph.tflite_tables import log_step_table
from qjax.integer_tflite import traced_log_steps
from tests.models import images
from tests.test_formats_tflite_writer import litert, micro

pytestmark = pytest.mark.usefixtures("flax_promotion")

ROWS = {
    "LOG_SOFTMAX": ((2.0**-4, 127), {}),
    "L2_NORMALIZATION": ((2.0**-7, 0), {"fused_activation_function": "NONE"}),
}


def tensors(name, shape, scale, zero_point, dtype="int8", grid=None):
    own, options = ROWS[name]
    unit, zero = grid or own
    y = Tensor("y", shape, dtype, (unit,), (zero,))
    x = Tensor("x", shape, dtype, (float(np.float32(scale)),), (zero_point,))
    return [x, y], [Operator(name, (0,), (1,), options)], [0], [1]


def draws(rng, shape, zero_point):
    """Codes from end to end, and others near the zero point; a row of it alone."""
    x = rng.integers(-128, 128, shape)
    near = rng.normal(zero_point, rng.choice([0.5, 4, 20]), shape)
    x[::2] = np.clip(np.rint(near[::2]), -128, 127)
    x[0] = zero_point
    return x.astype(np.int8)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", [1, 2, 10, 200, 4095])
def test_files_have_the_codes_of_litert(name, size):
    rng = np.random.default_rng(size)
    for scale in (2e-4, 0.0625, 0.11, 3.0):
        zero = int(rng.integers(-128, 128))
        x = draws(rng, (max(8000 // size, 2), size), zero)
        own = tensors(name, x.shape, scale, zero)
        data = serialized(*own)
        program = read_tflite(data)
        (v,) = program.graph.outputs
        wanted = reference.run(program.graph, program.params, [x])[v]
        for found in (litert(data, [x])[0], micro(data, [x]).get_output(0)):
            np.testing.assert_array_equal(found, wanted)
        assert write_tflite(program) == write_tflite(read_tflite(write_tflite(program)))
    np.testing.assert_array_equal(program.codes(x), wanted)


def test_the_logarithm_and_the_root_in_xla_are_those_of_numpy():
    rng = np.random.default_rng(3)
    wide = np.concatenate([rng.integers(0, 1 << 31, 1 << 16), 2**31 - 1 - np.arange(9)])
    sums = np.concatenate([(1 << 19) + np.arange(1 << 14), wide[wide >= 1 << 19]])
    squares = np.concatenate([np.arange(1 << 14), wide])
    with jax.enable_x64(True):
        found = jax.jit(bodies._logarithm)(jnp.asarray(sums, jnp.int32))
    np.testing.assert_array_equal(found, logarithm(sums))
    off = logarithm(sums) / 2**26 - np.log(sums / 2**19)
    assert np.abs(off).max() < 2**-24  # It is a logarithm.
    pair = jax.jit(bodies._inverse_root)(jnp.asarray(squares, jnp.int32))
    for got, wanted in zip(pair, inverse_root(squares), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_traced_steps_are_those_of_the_reader():
    run = jax.jit(traced_log_steps)
    for scale in np.float32([2e-5, 0.001, 0.0625, 0.11, 1.7, 40.0]):
        np.testing.assert_array_equal(run(scale), log_step_table(scale))


def rows(operation, scale, zero):
    """A program of one node over rows."""
    x = tensors("LOG_SOFTMAX", (5, 11), scale, zero)[0][0]
    kind = "LOG_SOFTMAX" if operation == "tflite_log_softmax" else "L2_NORMALIZATION"
    program = build_tflite(*tensors(kind, x.shape, scale, zero))
    return program


@pytest.mark.parametrize("operation", ["tflite_log_softmax", "tflite_l2_norm"])
def test_onnx_has_their_integers(operation):
    runtime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(8)
    for scale, zero in ((0.08, 3), (1.5, -128)):
        program = rows(operation, scale, zero)
        run = runtime.InferenceSession(write_onnx(program))
        for _ in range(4):
            x = draws(rng, (5, 11), zero)
            values = reference.run(program.graph, program.params, [x])
            (found,) = run.run(None, {run.get_inputs()[0].name: x})
            np.testing.assert_array_equal(found, values[program.graph.outputs[0]])


REFUSED = {
    "uint8": ({"dtype": "uint8"}, "codes of uint8"),
    "another grid": ({"grid": (2.0**-5, 0)}, "output scale"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("what", REFUSED)
def test_readers_refuse_what_litert_computes_otherwise(name, what):
    own, message = REFUSED[what]
    with pytest.raises(NotImplementedError, match=f"{name}.*{message}"):
        build_tflite(*tensors(name, (2, 3), 0.1, 0, **own))


def test_a_scale_at_which_the_kernels_end_the_process_is_refused():
    for scale in (3.9e-9, 2.0**-26):
        with pytest.raises(NotImplementedError, match="end the process"):
            build_tflite(*tensors("LOG_SOFTMAX", (2, 3), scale, 0))
    assert build_tflite(*tensors("LOG_SOFTMAX", (2, 3), 2.0**-25, 0))
    x, p = 1e-9 * images(4, 3), np.eye(3, dtype=np.float32)
    for fn in (jax.nn.softmax, jax.nn.log_softmax):
        own = calibrated(lambda p, x, f=fn: f(x @ p), p, x)
        with pytest.raises(NotImplementedError, match="inputs for which its values"):
            qjax.lower(*own, x, target=targets.tflite)


# Models.


def unit(x, epsilon=0.0, axis=-1):
    return x / jnp.sqrt(jnp.sum(x**2, axis, keepdims=True) + epsilon)


def bounded(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


MODELS = {
    "log_softmax": lambda p, x: jax.nn.log_softmax(x @ p),
    "log of softmax": lambda p, x: jnp.log(jax.nn.softmax(x @ p)),
    "of the input": lambda p, x: (jax.nn.log_softmax(x), unit(x)),
    "unit": lambda p, x: unit(x @ p),
    "bounded unit": lambda p, x: bounded(jax.nn.relu(x @ p)) @ p.T,
    "small epsilon": lambda p, x: unit(x @ p, 1e-9),
    "of three axes": lambda p, x: jax.nn.log_softmax(unit((x @ p).reshape(-1, 2, 3))),
}


def calibrated(fn, p, x, scheme=None):
    scheme = scheme or presets.tflite_int8(same_scales=True)
    qmodel = qjax.quantize_model(fn, p, x, scheme=scheme)
    return qmodel, p, qjax.calibrate(qmodel, p, [x], progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_litert_does(name):
    p, x = images(5, 6, seed=3), 3 * images(8, 5)
    qmodel, _, qstate = own = calibrated(MODELS[name], p, x)
    program = qjax.lower(*own, x, target=targets.tflite)
    run = jax.jit(
        lambda p, x: qmodel.apply_integer(p, qstate, x, target=targets.tflite)
    )
    data = write_tflite(program)
    for seed in range(3):
        own = (1 + seed) * images(*x.shape, seed=seed)
        jax.tree.map(np.testing.assert_array_equal, run(p, own), program(own))
        codes = program.quantize_inputs(own)
        values = reference.run(program.graph, program.params, codes)
        ends = [values[v] for v in program.graph.outputs]
        for found, wanted in zip(litert(data, codes), ends, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["log_softmax", "unit"])
def test_derivatives_are_those_of_the_quantized_model(name):
    p, x = images(5, 6, seed=3), 3 * images(8, 5)
    qmodel, _, qstate = calibrated(MODELS[name], p, x)
    integer = lambda *own: qmodel.apply_integer(*own, target=targets.tflite)
    found, wanted = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, qstate, x) ** 3)))(p)
        for f in (integer, qmodel.apply)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def mask(y):
    return jnp.where(jnp.arange(y.shape[-1]) < 4, y, -1e9)


REFUSED_MODELS = {
    "another axis": (
        lambda p, x: jax.nn.log_softmax((x @ p).reshape(-1, 2, 3), 1),
        "other axes than the last",
    ),
    "a unit of another axis": (
        lambda p, x: unit((x @ p).reshape(-1, 2, 3), axis=1),
        "other axes than the last",
    ),
    "a mask": (lambda p, x: jax.nn.log_softmax(mask(x @ p)), "behind a mask"),
    "a sum": (lambda p, x: jax.nn.logsumexp(x @ p, -1), "a sum of exponentials alone"),
    "an epsilon": (lambda p, x: unit(x @ p, 0.5), "an epsilon of 0.5.*Use one below"),
    "an end": (lambda p, x: jnp.maximum(jax.nn.softmax(x @ p), 0.25), "bounds behind"),
    "means": (
        lambda p, x: unit((y := x @ p) - y.mean(-1, keepdims=True)),
        "with means",
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_lowering_and_training_refuse_the_same(name):
    fn, message = REFUSED_MODELS[name]
    p, x = images(5, 6, seed=3), 3 * images(8, 5)
    own = qmodel, _, qstate = calibrated(fn, p, x)
    for run in (
        lambda: qjax.lower(*own, x, target=targets.tflite),
        lambda: qmodel.apply_integer(p, qstate, x, target=targets.tflite),
    ):
        with pytest.raises(NotImplementedError, match=message):
            run()


@pytest.mark.parametrize("function", [jax.nn.log_softmax, unit, jax.nn.softmax])
def test_other_grids_are_refused_in_both(function):
    p, x = images(5, 6, seed=3), 3 * images(8, 5)
    own = qmodel, _, qstate = calibrated(
        lambda p, x: function(x @ p), p, x, qjax.Scheme()
    )
    for run in (
        lambda: qjax.lower(*own, x, target=targets.tflite),
        lambda: qmodel.apply_integer(p, qstate, x, target=targets.tflite),
    ):
        with pytest.raises(NotImplementedError, match=r"presets\.tflite_int8"):
            run()


def test_programs_of_other_ends_are_not_written():
    program = rows("tflite_l2_norm", 0.1, 0)
    (node,) = program.graph.nodes
    node.attributes["high"] = 100
    with pytest.raises(ValueError, match="l2-normalisation within -128 and 100"):
        write_tflite(program)
