"""Values and derivatives of the simulated model where int32 holds a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.model.simulate import Simulation
from tests.models import images

pytestmark = pytest.mark.slow

WORDS = qjax.QSpec(8, narrow_range=True, axis=-1)
POWERS = qjax.Scheme(
    qjax.QSpec(8, narrow_range=True, axis=-1, power_of_two=True),
    qjax.QSpec(8, power_of_two=True),
)
FLOATS = qjax.Scheme(WORDS, qjax.QSpec(8))
WIDE = qjax.Scheme(WORDS, qjax.QSpec(16))


def quantized(fn, params, x, scheme=FLOATS):
    """The model with a range of outputs where no code saturates."""
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    state = qstate["output:0"]
    wide = state._replace(low=1.5 * state.low - 0.1, high=1.5 * state.high + 0.1)
    return qmodel, {**qstate, "output:0": wide}


def straight(x, scale):
    """Rounds; the derivative is 1."""
    return x + lax.stop_gradient(jnp.round(x / scale) * scale - x)


def reference(fn, qmodel, params, qstate):
    """The float function of operands that are rounded straight through."""
    scales = qjax.scales(qmodel, params, qstate)

    def run(params, x):
        kernel = straight(params["k"], scales["k"].scale)
        return fn({**params, "k": kernel}, straight(x, scales["input:0"].scale))

    return run


def norm(params, x):
    slope = lax.rsqrt(params["v"] + 1e-5) * params["g"]
    return (x @ params["k"] - params["m"]) * slope + params["be"]


def norm_params(gain):
    draw = lambda *shape, seed: images(*shape, seed=seed)
    n = len(gain)
    return {
        "k": draw(64, n, seed=2) / 8,
        "m": draw(1, n, seed=3),
        "v": np.abs(draw(1, n, seed=4)) + 0.5,
        "g": np.float32([gain]),
        "be": draw(1, n, seed=5),
    }


def assert_close(found, wanted, rtol):
    """By channel: the largest difference over the largest value."""
    for name in wanted:
        a, b = np.asarray(found[name]), np.asarray(wanted[name])
        assert np.all(np.isfinite(a)), name
        off, size = np.abs(a - b).max(0), np.abs(b).max(0)
        assert np.all(off <= rtol * size + 1e-30), (name, off, size)


GAINS = [0.0, 1e-12, 1e-6, 1e-3, 1.0, -0.5, -1e-9]


@pytest.mark.parametrize("scheme", [FLOATS, WIDE, POWERS], ids=["8", "16", "powers"])
def test_gradients_of_tiny_gains_are_those_of_a_straight_through_reference(scheme):
    params, x, dy = norm_params(GAINS), images(32, 64), images(32, 7, seed=9)
    qmodel, qstate = quantized(norm, params, x, scheme)
    wanted = reference(norm, qmodel, params, qstate)
    slope = lambda f: jax.grad(lambda p: (f(p) * dy).sum())
    found = jax.jit(slope(lambda p: qmodel.apply(p, qstate, x)))
    first = jax.jit(slope(lambda p: wanted(p, x)))
    assert_close(found(params), first(params), 1e-4)
    loss = lambda f: lambda p: (f(p) ** 2).sum()
    pushed = lambda f: jax.jvp(jax.grad(loss(f)), (params,), (params,))[1]
    second = jax.jit(lambda: pushed(lambda p: qmodel.apply(p, qstate, x)))()
    assert_close(second, jax.jit(lambda: pushed(lambda p: wanted(p, x)))(), 0.05)


@pytest.mark.parametrize("scheme", [FLOATS, WIDE, POWERS], ids=["8", "16", "powers"])
def test_a_gain_of_zero_leaves_the_offset(scheme):
    params, x = norm_params([0.0, 0.0, 1e-12, 1.0]), images(32, 64)
    qmodel, qstate = quantized(norm, params, x, scheme)
    y = jax.jit(qmodel.apply)(params, qstate, x)
    grid = qjax.scales(qmodel, params, qstate)["output:0"]
    wanted = grid.scale * np.rint(params["be"] / grid.scale)
    np.testing.assert_allclose(y[:, :3], np.tile(wanted[:, :3], (32, 1)), rtol=1e-6)


@pytest.mark.parametrize("c", [1e-5, 1e-6, 1e-8, 1e-14, 0.0])
def test_gradients_of_a_small_kernel_beside_its_bias(c):
    fn = lambda p, x: x @ p["k"] + 1.0
    params, x = {"k": images(8, 3, seed=2)}, images(16, 8)
    params["k"] = params["k"] * np.float32([1, c, 1])
    qmodel, qstate = quantized(fn, params, x)
    wanted = reference(fn, qmodel, params, qstate)
    dy = images(16, 3, seed=4)
    slope = lambda f: jax.jit(jax.grad(lambda p: (f(p) * dy).sum()))(params)
    found = slope(lambda p: qmodel.apply(p, qstate, x))
    assert_close(found, slope(lambda p: wanted(p, x)), 1e-5)


def _conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
    return y + p["b"]


def _transposed(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return (
        lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=numbers)
        + (p["b"])
    )


@pytest.mark.parametrize(
    "fn, axis",
    [
        (_conv, -1),
        (_transposed, None),
        pytest.param(_conv, None, marks=pytest.mark.heavy),
        pytest.param(_transposed, -1, marks=pytest.mark.heavy),
    ],
    ids=["conv", "transposed, one scale", "conv, one scale", "transposed"],
)
def test_a_kernel_of_zeros_keeps_its_bias(fn, axis):
    bias = np.float32([0.1, 0.2, -0.3]).reshape(1, 1, 1, 3)
    x = 2.4 * images(4, 5, 5, 2)
    word = dict(narrow_range=True, axis=axis, power_of_two=True)
    scheme = qjax.Scheme(qjax.QSpec(8, **word), qjax.QSpec(16, power_of_two=True))
    float_slope = jax.jit(jax.grad(lambda p: fn(p, x).sum()))
    compiled = None  # Of the first kernel; the other differs in values alone.
    for alive in ((0, 0, 0), (0, 1, 0)):
        kernel = images(3, 3, 2, 3, seed=2) * np.float32(alive)
        params = {"k": kernel, "b": bias}
        qmodel, qstate = quantized(fn, params, x, scheme)
        compiled = compiled or _compiled(qmodel)
        slopes, y = jax.device_get(compiled[0](params, qstate, x))
        step = np.asarray(qjax.scales(qmodel, params, qstate)["output:0"].scale)
        for c in np.flatnonzero(np.equal(alive, 0)):
            wanted = np.broadcast_to(step * np.rint(bias[..., c] / step), y.shape[:3])
            np.testing.assert_array_equal(y[..., c], wanted, err_msg=str(alive))
        program = qjax.lower(qmodel, params, qstate, x)
        assert qjax.verify(program, qmodel, params, qstate, x).is_exact, alive
        np.testing.assert_array_equal(program(x), y, err_msg=str(alive))
        ours = compiled[1](params, qstate, x)
        np.testing.assert_array_equal(ours, program(x), err_msg=str(alive))
        wanted = float_slope(params)["k"]
        np.testing.assert_allclose(slopes["k"], wanted, rtol=0.05, atol=0.05)


def _compiled(qmodel):
    """The derivative of the sum of `apply`, with its values, and `apply_integer`."""

    def total(*args):
        y = qmodel.apply(*args)
        return y.sum(), y

    return jax.jit(jax.grad(total, has_aux=True)), jax.jit(qmodel.apply_integer)


def test_a_lone_normalisation_of_gain_zero():
    fn = lambda p, x: (jnp.concatenate([x, -x], -1) - p["m"]) * p["g"] + p["b"]
    gain = np.float32([[0, 1e-12, 1, -1, 1e-5, 1]])
    params = {"g": gain, "m": images(1, 6, seed=2), "b": images(1, 6, seed=3)}
    x = images(16, 3)
    qmodel, qstate = quantized(fn, params, x, POWERS)
    program = qjax.lower(qmodel, params, qstate, x)
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact
    step = np.asarray(qjax.scales(qmodel, params, qstate)["output:0"].scale)
    wanted = np.tile(step * np.rint(params["b"] / step), (16, 1))
    np.testing.assert_array_equal(np.asarray(program(x))[:, :2], wanted[:, :2])
    slope = jax.jit(jax.grad(lambda p: qmodel.apply(p, qstate, x).sum()))(params)
    exact = jax.jit(jax.grad(lambda p: fn(p, x).sum()))(params)
    for name in exact:
        np.testing.assert_allclose(slope[name], exact[name], rtol=0.1, atol=0.2)


def test_a_site_that_nothing_visits_is_refused(monkeypatch):
    """It would stay float and be listed as quantized all the same."""
    params = {"a": np.ones((3, 2), np.float32)}
    fn = lambda params, x: x @ params["a"]
    x = np.ones((4, 3), np.float32)
    qmodel = qjax.quantize_model(fn, params, x)
    visit = Simulation._visit

    def forgetful(self, v):
        if v not in self._plan.weights:
            visit(self, v)

    monkeypatch.setattr(Simulation, "_visit", forgetful)
    with pytest.raises(NotImplementedError, match="The site 'a' of this model cannot"):
        qmodel.init(params, x)
