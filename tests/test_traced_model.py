"""A model is traced once for arguments of the same types, and never out of date."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.model.traces import Traces

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
PARAMS = {"kernel": np.float32(np.eye(3) * 0.7), "bias": np.ones((1, 3), np.float32)}


def _counted():
    calls = []

    def fn(params, x):
        calls.append(jnp.shape(x))
        return jax.nn.relu(x @ params["kernel"] + params["bias"])

    return fn, calls


def test_one_trace_for_arguments_of_one_type():
    fn, calls = _counted()
    qmodel = qjax.quantize_model(fn, PARAMS, X)
    assert len(calls) == 1
    qstate = qjax.calibrate(qmodel, PARAMS, [X, X + 1])
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    tried = len(calls)
    assert tried == 3  # Two other numbers of examples, which `lower` tries.
    qjax.verify(program, qmodel, PARAMS, qstate, X)
    jax.jit(jax.grad(lambda p: qmodel.apply(p, qstate, X).sum()))(PARAMS)
    qmodel.apply_integer(jax.tree.map(lambda p: p * 2, PARAMS), qstate, X)
    assert len(calls) == tried
    qmodel.apply(PARAMS, qstate, X[:2])
    assert calls[tried:] == [(2, 3)]


def test_other_types_are_other_traces():
    fn, calls = _counted()
    qmodel = qjax.quantize_model(fn, PARAMS, X)
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    qmodel.float_values(half, (jnp.asarray(X, jnp.bfloat16),))
    with jax.enable_x64(True):
        qmodel.float_values(PARAMS, (X,))
    assert len(calls) == 3


def test_arrays_of_the_surroundings_are_read_each_time():
    weights = {"kernel": jnp.asarray(PARAMS["kernel"])}
    fn = lambda params, x: x @ weights["kernel"] + params["bias"]
    params = {"bias": PARAMS["bias"]}
    qmodel = qjax.quantize_model(fn, params, X)
    before = qmodel.float_values(params, (X,))["output:0"]
    weights["kernel"] = weights["kernel"] * 2
    after = qmodel.float_values(params, (X,))["output:0"]
    np.testing.assert_allclose(after - 1, (before - 1) * 2, rtol=1e-6)
    program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [X]), X)
    assert abs(program(X) - after).max() < 0.1


def test_a_number_of_the_surroundings_that_is_an_array_is_read_each_time():
    gain = [jnp.float32(1)]
    fn = lambda params, x: (x @ params["kernel"]) * gain[0]
    qmodel = qjax.quantize_model(fn, PARAMS, X)
    before = qmodel.float_values(PARAMS, (X,))["output:0"]
    gain[0] = jnp.float32(3)
    after = qmodel.float_values(PARAMS, (X,))["output:0"]
    np.testing.assert_allclose(after, 3 * before, rtol=1e-6)


def test_a_function_alone_is_lowered_as_it_is_now():
    spec, params = qjax.QSpec(bits=8), qjax.QParams(jnp.float32(1 / 32), jnp.int32(0))
    model = {"kernel": jnp.asarray(PARAMS["kernel"])}

    def fn(x):
        kernel = qjax.fake_quant(model["kernel"], params, spec)
        y = qjax.fake_quant(x, params, spec) @ kernel
        return qjax.fake_quant(y, params, spec)

    before = qjax.lower(fn, X)(X)
    np.testing.assert_array_equal(before, fn(X))
    model["kernel"] = model["kernel"] + 0.5
    after = qjax.lower(fn, X)(X)
    np.testing.assert_array_equal(after, fn(X))
    assert np.any(after != before)


def test_sizes_of_axes_are_read_each_time():
    def fn(params, x):
        return jax.lax.pmean(x @ params["kernel"], "i") + params["bias"]

    def values(number):
        # The same values on each device: their mean does not depend on how many.
        xs = jnp.broadcast_to(X, (number, *X.shape))
        run = jax.vmap(lambda x: qmodel.float_values(PARAMS, (x,)), axis_name="i")
        return run(xs)["output:0"][0]

    qmodel = qjax.QuantizedModel(fn, qjax.Scheme(), (), (X,), qjax.Scheme())
    np.testing.assert_allclose(values(2), values(5), rtol=1e-6)
    assert not qmodel.traces._known


def test_tracers_of_the_surroundings_are_not_kept():
    qmodels = []

    @jax.jit
    def run(kernel):
        fn = lambda params, x: x @ kernel + params["bias"]
        qmodels.append(qjax.quantize_model(fn, {"bias": PARAMS["bias"]}, X))
        return qmodels[0].float_values({"bias": PARAMS["bias"]}, (X,))["output:0"]

    run(PARAMS["kernel"])
    assert not qmodels[0].traces._known


def test_a_replaced_function_or_scheme_has_its_own_trace():
    fn, calls = _counted()
    qmodel = qjax.quantize_model(fn, PARAMS, X)
    other, others = _counted()
    twin = dataclasses.replace(qmodel, fn=lambda p, x: other(p, x) * 2)
    before = qmodel.float_values(PARAMS, (X,))["output:0"]
    assert len(others) == 0
    twin.float_values(PARAMS, (X,))
    assert len(others) == 1 and len(calls) == 1
    np.testing.assert_array_equal(qmodel.float_values(PARAMS, (X,))["output:0"], before)


def test_few_traces_are_kept():
    fn, calls = _counted()
    traces = Traces()
    for n in (*range(1, 21), 20, 13, 1):
        traces.get(fn, PARAMS, (X[:1].repeat(n, 0),))
    assert len(traces._known) == 8
    assert len(calls) == 21  # The last eight are known; that of size 1 is not.
