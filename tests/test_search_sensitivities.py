"""`sensitivity`, by a loss, gradients and traces, against NumPy and exact Hessians."""

import io

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import qjax
from qjax.affine import QSpec
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from qjax.search import (
    gradient_sensitivity,
    grid,
    hessian_sensitivity,
    sensitivity,
)
from tests.sweep_in_processes import model

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
WEIGHTS = {"a": {"kernel": normal(4, 6)}, "b": {"kernel": normal(6, 3)}}
X, Y = normal(16, 4), normal(16, 3)
AXES = {"a/kernel": [8, 4, 2], "b/kernel": [8, 3], ("input:0", "a/output"): [8, 5, 4]}


def dense(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def squares(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def quantized(fn, params, x, scheme=None):
    scheme = Scheme() if scheme is None else scheme
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    return qmodel, params, qjax.calibrate(qmodel, params, [x], progress=False)


def rounded_weight(w, bits):
    """The definition: symmetric, narrow, a scale for each output channel."""
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(w).max(axis=0, keepdims=True) / top
    return np.clip(np.round(w * (np.float32(1) / scale)), -top, top) * scale


def rounded_values(v, low, high, bits):
    """The definition: codes of ``bits`` from the ends of a range with 0 inside."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / (2**bits - 1))
    start = -(2 ** (bits - 1))
    zero = np.clip(np.round(start - low / step), start, -start - 1)
    return (np.clip(np.round(v / step) + zero, start, -start - 1) - zero) * step


class Counted:
    """A function that counts how often Python runs it."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args):
        self.calls += 1
        return self.fn(*args)


def test_measured_scores_are_differences_of_losses_in_one_trace():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    loss = lambda s, x: squares(
        lambda x: qmodel.apply(params, qstate, x, scheme=s), x, Y
    )
    counted = Counted(loss)
    found = sensitivity(counted, qmodel, AXES, X, progress=False)
    assert counted.calls == 1 and dict(found.evaluations) == {"losses": 6}
    first = {axis: [bits[0]] for axis, bits in AXES.items()}
    at = lambda axis, b: grid(qmodel, {**first, axis: [b]})[0]
    start = float(jax.jit(lambda: loss(at("a/kernel", 8), X))())
    np.testing.assert_allclose(found.start, start, rtol=1e-6)
    for axis, bits in AXES.items():
        assert [*found[axis]] == bits and found[axis][bits[0]] == 0
        for b in bits[1:]:
            own = float(loss(at(axis, b), X))
            np.testing.assert_allclose(found[axis][b], own - start, rtol=1e-4)
    assert [s.to_json() for s in found.schemes[:3]] == [
        at("a/kernel", b).to_json() for b in (8, 4, 2)
    ]


def test_a_sequence_of_bits_is_for_each_site_alone():
    qmodel, _, _ = model()
    bits = lambda s: sum(jnp.float32(rule.bits) for rule in s.rules)
    found = sensitivity(lambda s: {"sum": bits(s)}, qmodel, np.array([8, 3]))
    names = "input:0", "a/kernel", "a/output", "b/kernel", "output:0"
    assert found.axes == names
    assert all(found[name] == {8: 0.0, 3: -5.0} for name in names)
    assert len(found) == 10 and found.start == 40


def test_a_loss_of_nan_is_recorded_and_one_at_the_start_refused():
    nan = lambda bits: lambda s: jnp.where(s.rules[0].bits == bits, jnp.nan, 1.0)
    found = sensitivity(nan(4), Scheme(), {"a": [8, 4, 2]})
    np.testing.assert_array_equal([*found["a"].values()], [0, np.nan, 0])
    with pytest.raises(ValueError, match="starting point, .* is nan"):
        sensitivity(nan(8), Scheme(), {"a": [8, 4, 2]})


def test_gradient_scores_are_squares_of_gradients_by_those_of_errors():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    halves = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    found = gradient_sensitivity(squares, qmodel, params, qstate, AXES, halves)
    a, b = params["a"]["kernel"], params["b"]["kernel"]
    h_all = np.tanh(X @ a)
    wanted = {axis: np.zeros(len(bits)) for axis, bits in AXES.items()}
    group = ("input:0", "a/output")
    for x, y in halves:
        h = np.tanh(x @ a)
        g = 2 * (h @ b - y) / y.size
        g_sum = g @ b.T * (1 - h**2)
        gradients = {"a/kernel": x.T @ g_sum, "b/kernel": h.T @ g}
        for name, w in (("a/kernel", a), ("b/kernel", b)):
            for k, bits in enumerate(AXES[name]):
                error = rounded_weight(w, bits) - w
                wanted[name][k] += np.sum(gradients[name] ** 2 * error**2) / 2
        for v, g_v, seen in ((x, g_sum @ a.T, X), (x @ a, g_sum, X @ a)):
            for k, bits in enumerate(AXES[group]):
                error = rounded_values(v, seen.min(), seen.max(), bits) - v
                wanted[group][k] += np.sum(g_v**2 * error**2) / 2
    for axis in AXES:
        np.testing.assert_allclose([*found[axis].values()], wanted[axis], rtol=2e-3)
    assert dict(found.evaluations) == {"gradients": 2}
    np.testing.assert_allclose(found.start, np.mean((h_all @ b - Y) ** 2), rtol=1e-5)


def test_whole_scores_are_squares_of_derivatives_along_errors():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    halves = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    found = gradient_sensitivity(
        *(squares, qmodel, params, qstate, AXES, halves), diagonal=False
    )
    a, b = params["a"]["kernel"], params["b"]["kernel"]
    wanted = {axis: np.zeros(len(bits)) for axis, bits in AXES.items()}
    for x, y in halves:
        h = np.tanh(x @ a)
        g = 2 * (h @ b - y) / y.size
        g_sum = g @ b.T * (1 - h**2)
        gradients = {"a/kernel": x.T @ g_sum, "b/kernel": h.T @ g}
        for name, w in (("a/kernel", a), ("b/kernel", b)):
            for k, bits in enumerate(AXES[name]):
                error = rounded_weight(w, bits) - w
                wanted[name][k] += np.sum(gradients[name] * error) ** 2 / 2
        group = ("input:0", "a/output")  # One sum: their errors come together.
        for k, bits in enumerate(AXES[group]):
            pairs = ((x, g_sum @ a.T, X), (x @ a, g_sum, X @ a))
            errors = [
                np.sum(g_v * (rounded_values(v, seen.min(), seen.max(), bits) - v))
                for v, g_v, seen in pairs
            ]
            wanted[group][k] += sum(errors) ** 2 / 2
    for axis in AXES:
        np.testing.assert_allclose([*found[axis].values()], wanted[axis], rtol=5e-3)
    assert found.method == "gradient" and dict(found.evaluations) == {"gradients": 2}


def test_whole_scores_of_a_loss_that_errors_move_alike_are_what_it_grows_by():
    """Errors that all point one way: n^2 in the whole, n in the diagonal."""
    qmodel, params, qstate = quantized(lambda p, x: x @ p["k"], {"k": normal(4, 1)}, X)
    w = params["k"]
    loss = lambda model, x, sign: sign * jnp.sum(model(x))
    batches, axes = [(X, 1.0), (X, -1.0)], {"k": [3]}
    own = loss, qmodel, params, qstate, axes, batches
    error, g = rounded_weight(w, 3) - w, X.sum(0)[:, None]
    whole = gradient_sensitivity(*own, diagonal=False)["k"][3]
    np.testing.assert_allclose(whole, np.sum(g * error) ** 2, rtol=1e-3)
    alone = gradient_sensitivity(*own)["k"][3]
    np.testing.assert_allclose(alone, np.sum((g * error) ** 2), rtol=1e-3)


def test_whole_scores_in_loops_sum_over_their_steps():
    params = {"shared": {"kernel": normal(4, 4)}, "own": {"kernel": normal(3, 4, 4)}}
    qmodel, params, qstate = quantized(scanned, params, X)
    inside = [
        s.name for s in qmodel.sites if s.role == "activation" and s.name[0] != "i"
    ]
    weights = [s.name for s in qmodel.sites if s.role == "weight"]
    axes, y = {name: [6] for name in (*inside, *weights)}, Y[:, :1]
    own = qmodel, params, qstate
    found = gradient_sensitivity(squares, *own, axes, [(X, y)], diagonal=False)
    # The same number by a difference of losses, of a step along all errors of an axis.
    error = {}
    for name in weights:
        kernel = params["shared" if "shared" in name else "own"]["kernel"]
        each = kernel if kernel.ndim == 3 else kernel[None]
        error[name] = np.stack([rounded_weight(w, 6) - w for w in each])
        key = "shared" if "shared" in name else "own"
        at = lambda t, key=key, e=error[name], k=kernel: squares(
            lambda x: scanned(
                {**params, key: {"kernel": k + t * e.reshape(k.shape)}}, x
            ),
            X,
            y,
        )
        wanted = float(jax.grad(at)(0.0)) ** 2
        np.testing.assert_allclose(found[name][6], wanted, rtol=1e-3)
    assert all(found[name][6] > 0 for name in inside)


def test_traces_of_a_quadratic_are_exact_where_its_hessian_is_diagonal():
    """z . H z is the trace for any z of -1 and 1 then: one draw is enough."""
    params = {"scale": {"kernel": normal(6, 6)}}
    curvature = np.abs(normal(6, 6))
    fn = lambda params, x: x @ params["scale"]["kernel"]
    qmodel, params, qstate = quantized(fn, params, np.eye(6, dtype=np.float32))
    loss = lambda model, x: jnp.sum(curvature * model(x) ** 2)
    axes, batches = {"scale/kernel": [8, 4, 2]}, [np.eye(6, dtype=np.float32)]
    key = jax.random.key(3)
    found = hessian_sensitivity(
        loss, qmodel, params, qstate, axes, batches, key=key, draws=1
    )
    w = params["scale"]["kernel"]
    wanted = [
        2 * curvature.sum() / 36 * np.sum((rounded_weight(w, b) - w) ** 2)
        for b in (8, 4, 2)
    ]
    np.testing.assert_allclose([*found["scale/kernel"].values()], wanted, rtol=1e-4)
    assert dict(found.evaluations) == {"Hessian products": 1, "gradients": 1}


def test_traces_tend_to_those_of_the_exact_hessian():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    axes = {"a/kernel": [2], "a/output": [3]}
    found = hessian_sensitivity(
        squares,
        qmodel,
        params,
        qstate,
        axes,
        [(X, Y)],
        key=jax.random.key(0),
        draws=600,
    )
    a, b = params["a"]["kernel"], params["b"]["kernel"]
    by_a = lambda w: jnp.mean((jnp.tanh(X @ w) @ b - Y) ** 2)
    trace = np.trace(np.asarray(jax.hessian(by_a)(a)).reshape(24, 24))
    wanted = trace / 24 * np.sum((rounded_weight(a, 2) - a) ** 2)
    np.testing.assert_allclose(found["a/kernel"][2], wanted, rtol=0.1)
    h = X @ a  # The site is before the function.
    by_h = lambda h: jnp.mean((jnp.tanh(h) @ b - Y) ** 2)
    trace = np.trace(np.asarray(jax.hessian(by_h)(h)).reshape(h.size, h.size))
    error = rounded_values(h, h.min(), h.max(), 3) - h
    wanted = trace / h.size * np.sum(error**2)
    np.testing.assert_allclose(found["a/output"][3], wanted, rtol=0.1)


def scanned(params, x):
    """Three steps with one shared kernel, and three with kernels of their own."""
    shared = params["shared"]["kernel"]
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ shared), None), x, length=3)
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(layer, h, params["own"]["kernel"])[0]


def test_weights_of_loops_have_the_gradient_of_all_steps_that_share_them():
    params = {"shared": {"kernel": normal(4, 4)}, "own": {"kernel": normal(3, 4, 4)}}
    qmodel, params, qstate = quantized(scanned, params, X)
    names = [site.name for site in qmodel.sites if site.role == "weight"]
    axes, y = {name: [3] for name in names}, Y[:, :1]
    found = gradient_sensitivity(squares, qmodel, params, qstate, axes, [(X, y)])
    loss = lambda params: squares(lambda x: scanned(params, x), X, y)
    g = jax.tree.map(np.asarray, jax.grad(loss)(params))
    recorded = qjax.integer_weights(qmodel, params)
    assert len(names) == len(recorded) == 2
    shared, own = params["shared"]["kernel"], params["own"]["kernel"]
    error = rounded_weight(shared, 3) - shared
    wanted = np.sum(g["shared"]["kernel"] ** 2 * error**2)
    (name,) = (n for n in names if "shared" in n)
    np.testing.assert_allclose(found[name][3], wanted, rtol=1e-3)
    error = np.stack([rounded_weight(w, 3) - w for w in own])
    wanted = np.sum(g["own"]["kernel"] ** 2 * error**2)
    (name,) = (n for n in names if "own" in n)
    np.testing.assert_allclose(found[name][3], wanted, rtol=1e-3)


def test_sensitivities_print_and_name_their_axes():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    found = gradient_sensitivity(squares, qmodel, params, qstate, AXES, [(X, Y)])
    text = str(found)
    assert "gradient, from" in text and "1 gradients" in text
    assert "input:0, a/output" in text and "8 bits" in text
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    assert "a/kernel" in console.export_text()
    assert "<table>" in found._repr_html_()
    with pytest.raises(KeyError, match="The axes are: a/kernel, b/kernel"):
        found["c/kernel"]


def test_what_is_wrong_is_named():
    qmodel, params, qstate = quantized(dense, WEIGHTS, X)
    score = lambda loss=squares, axes=AXES, batches=((X, Y),): gradient_sensitivity(
        loss, qmodel, params, qstate, axes, batches
    )
    with pytest.raises(ValueError, match="at least one batch, got none"):
        score(batches=[])
    with pytest.raises(ValueError, match="it did 2 times"):
        score(lambda model, x, y: squares(model, x, y) + squares(model, x, y))
    with pytest.raises(ValueError, match="it did 0 times"):
        score(lambda model, x, y: jnp.sum(x))
    with pytest.raises(ValueError, match="array of shape"):
        score(lambda model, x, y: model(x))
    with pytest.raises(ValueError, match="returns one, two"):
        numbers = {"one": jnp.float32(1), "two": jnp.float32(2)}
        sensitivity(lambda s: numbers, Scheme(), {"a": [8]})
    with pytest.raises(ValueError, match="'c/kernel' matches no site"):
        score(axes={"c/kernel": [8, 4]})
    with pytest.raises(TypeError, match="must be a mapping"):
        sensitivity(lambda s: 1.0, Scheme(), [8, 4])
    with pytest.raises(ValueError, match="`draws` must be a whole number"):
        hessian_sensitivity(
            squares,
            qmodel,
            params,
            qstate,
            AXES,
            [(X, Y)],
            key=jax.random.key(0),
            draws=0,
        )


def test_biases_have_no_gradient_here():
    fn = lambda params, x: x @ params["a"]["kernel"] + params["a"]["bias"][None]
    own = {"a": {"kernel": normal(4, 3), "bias": normal(3)}}
    scheme = Scheme(rules=(Rule("a/bias", QSpec(8)),))
    qmodel, params, qstate = quantized(fn, own, X, scheme)
    with pytest.raises(ValueError, match="'a/bias', which is no site"):
        gradient_sensitivity(
            squares, qmodel, params, qstate, {"a/bias": [8, 4]}, [(X, Y)]
        )


def test_a_trace_that_is_noise_counts_as_its_standard_error():
    """H of two values with 0 on its diagonal: z . H z is 2 or -2, its trace 0."""
    params = {"scale": {"kernel": normal(2, 1)}}
    fn = lambda params, x: x @ params["scale"]["kernel"]
    x = np.eye(2, dtype=np.float32)
    qmodel, params, qstate = quantized(fn, params, x)
    loss = lambda model, x, sign: sign * jnp.prod(model(x))
    axes, batches = {"scale/kernel": [4, 2]}, [(x, 1.0), (x, -1.0), (x, 1.0)]
    w = params["scale"]["kernel"]
    for key, draws in ((0, 8), (1, 3), (2, 1)):
        found = hessian_sensitivity(
            *(loss, qmodel, params, qstate, axes, batches),
            key=jax.random.key(key),
            draws=draws,
        )
        for bits in (4, 2):
            unit = 2 / 2 * np.sum((rounded_weight(w, bits) - w) ** 2)
            count = 3 * draws
            # The number of draws of each sign decides mean and error.
            allowed = []
            for more in range(count + 1):
                own = np.repeat([unit, -unit], [more, count - more])
                error = own.std(ddof=1) / np.sqrt(count)
                allowed.append(max(own.mean(), error))
            score = found["scale/kernel"][bits]
            assert score > 0 and np.isclose(score, allowed, rtol=1e-4).any()


def test_a_convolutional_net_has_the_traces_of_float64():
    """A net with ReLU, a norm's factor and a residual, against the exact Hessian."""
    params = {"c": normal(3, 3, 1, 3) / 2, "d": normal(3, 3, 3, 3) / 3}
    params["h"], scale = normal(3, 4), 1 + normal(3) / 4
    x, y = normal(4, 5, 5, 1), np.arange(4)

    def fn(params, x):
        conv = lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        a = jax.nn.relu(conv(x, params["c"]) * scale.astype(x.dtype)[None, None, None])
        return jax.nn.relu(conv(a, params["d"]) + a).mean((1, 2)) @ params["h"]

    def loss(model, x, y):
        chances = jax.nn.log_softmax(model(x))
        return -jnp.mean(jnp.take_along_axis(chances, y[:, None], axis=1))

    qmodel, params, qstate = quantized(fn, params, x)
    axes = {name: [3] for name in params}
    found = hessian_sensitivity(
        *(loss, qmodel, params, qstate, axes, [(x, y)]),
        key=jax.random.key(0),
        draws=1000,
    )
    with jax.enable_x64(True):
        wide = {name: np.float64(w) for name, w in params.items()}
        flat, unravel = jax.flatten_util.ravel_pytree(wide)
        at = lambda v: loss(lambda x: fn(unravel(v), x), np.float64(x), y)
        hessian = np.asarray(jax.jit(jax.hessian(at))(flat))
    start = 0
    for name, w in params.items():  # By name, as in the flat vector.
        own = slice(start, start := start + w.size)
        # Terms of z . H z of a pair of different places, with the own site and others.
        rows, block = hessian[own] ** 2, hessian[own, own] ** 2
        variance = rows.sum() + block.sum() - 2 * np.trace(block)
        error, trace = np.sqrt(variance / 1000), np.trace(hessian[own, own])
        kernel = np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1).T
        unit = np.sum((rounded_weight(kernel, 3) - kernel) ** 2) / w.size
        assert abs(found[name][3] / unit - trace) < 4 * error < 2 * abs(trace)
