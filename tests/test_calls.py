"""Calls that stay computations of their own, and what they make of a training step."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from experiments.benchmarks.lowering import Residual
from qjax.calls import alone, shared
from tests.models import linen_example


def _scaled(x, spec, gain):
    return {"y": x * gain, "bits": jnp.float32(spec.bits)}


SPEC = qjax.QSpec(bits=8, axis=0)
X = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)


def _text(fn, *args):
    return jax.jit(fn).lower(*args).as_text()


def test_values_and_derivatives_are_those_of_a_plain_call():
    pairs = [
        (lambda x: shared(_scaled, x, SPEC, 3.0)["y"], lambda x: x * 3.0),
        (lambda x: alone(jnp.sin, x), jnp.sin),
    ]
    for call, plain in pairs:
        for way in (call, jax.jit(call), jax.jit(jax.vmap(call))):
            np.testing.assert_array_equal(way(X), plain(X))
        for way in (jax.grad, jax.hessian):
            found, wanted = (
                jax.jit(way(lambda x, f=f: jnp.sum(f(x) ** 2)))(X)
                for f in (call, plain)
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_a_call_calls_is_inlined_into_it():
    def chosen(x):
        return jnp.clip(jnp.where(x > 0, x, 2.0 * x), -1, 1)

    def call(x):
        return shared(_scaled, shared(chosen, x), SPEC, 3.0)["y"]

    text = jax.jit(call).lower(X).compile().as_text()
    # `jnp.where` and `jnp.clip` are calls as well, and would be loops of their own.
    assert len(re.findall(r" call\(", text)) == 2
    assert not re.search(r"to_apply=%_?(where|clip)", text)


def test_calls_with_arguments_of_one_type_are_one_function():
    def three(x, y):
        return [shared(_scaled, v, SPEC, 2.0)["y"] for v in (x, y, x + y)]

    text = _text(three, X, X)
    assert text.count("func.func private @qjax.shared._scaled") == 1
    assert text.count("call @qjax.shared._scaled") == 3
    assert text.count('inlineable = "false"') >= 3

    def others(x):
        specs = SPEC, qjax.QSpec(bits=4, axis=0), SPEC
        rows = zip((x, x, x[:2]), specs, (2.0, 2.0, 2.0), strict=True)
        return [shared(_scaled, v, spec, gain)["y"] for v, spec, gain in rows]

    # Another word, and another shape: `bits` of Python is known in each.
    assert _text(others, X).count("func.func private @qjax.shared._scaled") == 3


def test_traced_bits_are_operands():
    def run(bits):
        return shared(_scaled, jnp.asarray(X), qjax.QSpec(bits=bits), 1.0)["bits"]

    found = jax.jit(jax.vmap(run))(jnp.arange(2, 6))
    np.testing.assert_array_equal(found, [2, 3, 4, 5])


def _typed(x, constant):
    return x + (10 if isinstance(constant, bool) else math.copysign(1, constant))


def test_equal_constants_of_other_types_are_others():
    for constant, more in ((1, 1), (True, 10), (1.0, 1), (0.0, 1), (-0.0, -1)):
        np.testing.assert_array_equal(shared(_typed, X, constant), X + np.float32(more))


def test_outside_of_traces_a_function_is_compiled_once():
    traced = []

    def add_one(x):
        traced.append(jnp.shape(x))
        return x + 1

    for x in (X, 2 * X, X[:2], X):
        np.testing.assert_array_equal(shared(add_one, x), x + 1)
    assert traced == [(3, 4), (2, 4)]


@pytest.mark.slow
@pytest.mark.kept
def test_a_training_step_stays_small():
    """The bounds that `experiments/benchmarks/lowering.py --steps` shows more of."""
    model = Residual(10, 4)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    _, params, _ = linen_example(model, x)
    qmodel = qjax.quantize_model(model.apply, params, x)
    qstate = qmodel.init(params, x)
    fns = (lambda params, qstate, x: model.apply(params, x)), qmodel.apply
    lines, instructions = [], []
    for fn in fns:
        loss = lambda *args, fn=fn: jnp.sum(fn(*args) ** 2)
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params, qstate, x)
        lines.append(len(lowered.as_text().splitlines()))
        text = lowered.compile().as_text()
        instructions.append(len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.M)))
    sites = len(qmodel.sites)
    assert (lines[1] - lines[0]) / sites <= 80
    assert (instructions[1] - instructions[0]) / sites <= 230  # 471 if fused anew.
