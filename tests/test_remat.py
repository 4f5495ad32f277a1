"""Models that hold `jax.checkpoint`: memory, derivatives, sites and programs."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax import QSpec
from tests.models import images, randomized

pytestmark = pytest.mark.usefixtures("flax_promotion")

_POLICIES = jax.checkpoint_policies
_MOST = 1.2  # Bytes saved for the backward pass, over those of the float model.
_plain = lambda fn, **_: fn


def _normal(*shape, seed=0):
    return images(*shape, seed=seed) / np.float32(np.sqrt(shape[-1]))


def saved_bytes(fn, params):
    """Bytes of what `jax.vjp` keeps between the two passes."""
    back = jax.eval_shape(lambda p: jax.vjp(fn, p)[1], params)
    kept = [x for x in jax.tree.leaves(back) if x.dtype != jax.dtypes.float0]
    return sum(x.size * x.dtype.itemsize for x in kept)


def most_saved_bytes(run, params, qstate):
    """Bytes with a state that is known, and with one that is traced."""
    back = lambda p, s: jax.vjp(lambda p: total(run(p, s)), p)[1]
    traced = jax.tree.leaves(jax.eval_shape(back, params, qstate))
    known = saved_bytes(lambda p: total(run(p, qstate)), params)
    return max(known, sum(x.size * x.dtype.itemsize for x in traced))


def total(out):
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(out))


def mlp(checkpoint, **options):
    """Six layers, a checkpoint around each two."""

    def pair(layers, x):
        for kernel, bias in layers:
            x = jax.nn.relu(checkpoint_name(x @ kernel + bias, "before"))
        return x

    pair = checkpoint(pair, **options)

    def fn(params, x):
        for k in range(0, 6, 2):
            x = pair(params[k : k + 2], x)
        return x

    params = [
        (_normal(32, 32, seed=k), jnp.linspace(-0.2, 0.3, 32)[None]) for k in range(6)
    ]
    return fn, params, 4 * _normal(128, 32)


def nested(checkpoint):
    """A checkpoint of three layers, each in a checkpoint of its own."""
    inner = checkpoint(lambda kernel, x: jax.nn.relu(x @ kernel))

    def outer(kernels, x):
        for kernel in kernels:
            x = inner(kernel, x)
        return 0.5 * x

    outer = checkpoint(outer)
    fn = lambda params, x: outer(params[3:], outer(params[:3], x))
    return fn, [_normal(32, 32, seed=k) for k in range(6)], 4 * _normal(256, 32)


def residual(checkpoint):
    """Branches in checkpoints, their sums outside."""
    branch = checkpoint(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"])

    def fn(params, x):
        for p in params:
            x = x + branch(p, x)
        return x

    params = [{"up": _normal(16, 32, seed=k), "down": _normal(32, 16)} for k in (1, 2)]
    return fn, params, _normal(512, 16)


def cnn(checkpoint):
    """Blocks with BatchNorm in training."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(8, (3, 3), use_bias=False)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=False)(y))
            y = nn.Conv(8, (3, 3), use_bias=False)(y)
            return nn.relu(x + nn.BatchNorm(use_running_average=False)(y))

    wrapped = nn.remat(Block) if checkpoint is jax.checkpoint else Block

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in range(2):
                x = wrapped(name=f"block_{k}")(x)
            return nn.Dense(3)(jnp.mean(x, (1, 2)))

    x = _normal(8, 8, 8, 8)
    params = randomized(jax.eval_shape(Net().init, jax.random.key(0), x))
    fn = lambda params, x: Net().apply(params, x, mutable=["batch_stats"])
    return fn, params, x


def looped(checkpoint):
    """A checkpoint of two layers in each step of a loop."""

    @checkpoint
    def block(p, h, t):
        for kernel, bias in p:
            h = jax.nn.relu(h @ kernel + bias)
        return jnp.tanh(h + t)

    def fn(params, x):
        step = lambda h, t: (block(params, h, t), None)
        return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]

    params = [
        (_normal(32, 32, seed=k), jnp.linspace(-0.2, 0.3, 32)[None]) for k in (1, 2)
    ]
    return fn, params, 2 * _normal(24, 64, 32)


def nnx_model(checkpoint):
    """A method of an NNX module in `nnx.remat`."""
    wrap = nnx.remat if checkpoint is jax.checkpoint else _plain

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(32, 32, rngs=rngs)
            self.second = nnx.Linear(32, 32, rngs=rngs)

        def __call__(self, x):
            return wrap(lambda m, x: nnx.relu(m.second(nnx.relu(m.first(x)))))(self, x)

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return (lambda p, x: nnx.merge(graph, p)(x)), params, 4 * _normal(256, 32)


def quantized(make, scheme=None, **options):
    """Returns the float model and the quantized one, with and without checkpoints."""
    fn, params, x = make(jax.checkpoint, **options)
    qmodel, plain = (
        qjax.quantize_model(f, params, x, scheme=scheme)
        for f in (fn, make(_plain, **options)[0])
    )
    assert qmodel.sites == plain.sites
    return fn, qmodel, plain, params, qjax.calibrate(plain, params, [x]), x


@pytest.mark.parametrize("make", [mlp, nested, residual, cnn, looped, nnx_model])
def test_saves_as_little_as_the_float_model(make):
    fn, qmodel, plain, params, qstate, x = quantized(make)
    wanted = saved_bytes(lambda p: total(fn(p, x)), params)
    before = saved_bytes(lambda p: total(plain.apply(p, qstate, x)), params)
    assert before > 2 * wanted
    runs = [lambda p, s: qmodel.apply(p, s, x)]
    runs += [lambda p, s: qmodel.apply_and_update(p, s, x)[0]]
    if make is not cnn:
        runs += [lambda p, s: qmodel.apply_integer(p, s, x)]
    found = [most_saved_bytes(run, params, qstate) for run in runs]
    assert max(found) <= _MOST * wanted


@pytest.mark.kept
def test_steps_with_grids_of_their_own_save_as_little():
    scheme = qjax.Scheme(rules=[qjax.Rule("scan_0/*", QSpec(8), per_step=True)])
    fn, params, x = looped(jax.checkpoint)
    x = x[:8]
    plain = qjax.quantize_model(looped(_plain)[0], params, x, scheme=scheme)
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    wanted = saved_bytes(lambda p: total(fn(p, x)), params)
    before = saved_bytes(lambda p: total(plain.apply(p, qstate, x)), params)
    found = most_saved_bytes(lambda p, s: qmodel.apply(p, s, x), params, qstate)
    assert found <= _MOST * wanted and before > 2 * wanted


@pytest.mark.parametrize(
    "policy",
    [
        _POLICIES.nothing_saveable,
        _POLICIES.dots_saveable,
        _POLICIES.everything_saveable,
        _POLICIES.save_only_these_names("before"),
        _POLICIES.save_only_these_names("another"),
    ],
    ids=["nothing", "dots", "everything", "name", "another name"],
)
def test_policies_save_what_they_save_of_the_float_model(policy):
    fn, qmodel, _, params, qstate, x = quantized(mlp, policy=policy)
    wanted = saved_bytes(lambda p: total(fn(p, x)), params)
    found = saved_bytes(lambda p: total(qmodel.apply(p, qstate, x)), params)
    # Less, as sites keep masks where the float model keeps values.
    assert 0.75 * wanted <= found <= _MOST * wanted


def test_prevent_cse_and_nesting_are_those_of_the_model():
    def calls(jaxpr):
        return [
            (eqn.params["prevent_cse"], calls(eqn.params["jaxpr"]))
            for eqn in jaxpr.eqns
            if "prevent_cse" in eqn.params
        ]

    for prevent in (True, False):
        checkpoint = lambda fn, p=prevent: jax.checkpoint(fn, prevent_cse=p)
        fn, params, x = nested(checkpoint)
        qmodel = qjax.quantize_model(fn, params, x)
        qstate = qjax.calibrate(qmodel, params, [x])
        run = lambda p, m=qmodel, s=qstate, x=x: m.apply(p, s, x)
        found = calls(jax.make_jaxpr(run)(params).jaxpr)
        assert found == [(prevent, [(prevent, [])] * 3)] * 2


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        nested,
        cnn,
        nnx_model,
        *(pytest.param(make, marks=pytest.mark.heavy) for make in (mlp, residual)),
    ],
)
def test_values_gradients_and_states_are_those_without_checkpoints(make):
    _, qmodel, plain, params, qstate, x = quantized(make)

    def step(model):
        def loss(p):
            out, state = model.apply_and_update(p, qstate, x)
            return total(out), (out, state, model.apply(p, qstate, x))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, found), grads = step(qmodel)
    (_, wanted), wanted_grads = step(plain)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-6 * max(1e-6, np.max(np.abs(b)))
    )
    jax.tree.map(close, grads, wanted_grads)


@pytest.mark.slow
def test_integer_arithmetic_is_that_of_the_program():
    words = (qjax.QSpec(8, **more, power_of_two=True) for more in ({"axis": -1}, {}))
    scheme = qjax.Scheme(*words)
    _, qmodel, plain, params, qstate, x = quantized(residual, scheme)
    program, before = (qjax.lower(m, params, qstate, x) for m in (qmodel, plain))
    np.testing.assert_array_equal(program(x), before(x))
    assert program.graph.nodes == before.graph.nodes
    around = qjax.lower(lambda x: qmodel.apply(params, qstate, x), x)
    np.testing.assert_array_equal(around(x), before(x))
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact
    found = jax.jit(qmodel.apply_integer)(params, qstate, x)
    np.testing.assert_array_equal(found, program(x))


@pytest.mark.slow
def test_maps_over_schemes_and_scans_over_batches():
    _, qmodel, plain, params, qstate, x = quantized(nested)
    words = [qjax.Scheme(qjax.QSpec(b, axis=-1), qjax.QSpec(b)) for b in (3, 8)]
    schemes = qjax.stack_schemes(words)

    def sweep(model):
        def loss(p, scheme):
            return total(model.apply(p, qstate, x, scheme=scheme))

        grads = jax.vmap(jax.grad(loss), (None, 0))(params, schemes)
        step = lambda s, x: (model.apply_and_update(params, s, x)[1], None)
        return grads, jax.lax.scan(step, qstate, jnp.stack([x, 2 * x]))[0]

    found, wanted = jax.jit(lambda: sweep(qmodel))(), jax.jit(lambda: sweep(plain))()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, wanted)


def _closes_over_a_parameter(checkpoint):
    return lambda p, x: checkpoint(lambda x: jax.nn.relu(x @ p["a"]) @ p["b"])(x)


def _returns_several_values(checkpoint):
    f = checkpoint(lambda p, x: (jax.nn.relu(x @ p["a"]), {"z": x @ p["b"]}, x.sum()))

    def fn(p, x):
        a, rest, total = f(p, x)
        return jax.nn.relu(a + rest["z"]) @ p["c"], a, total

    return fn


def _takes_an_integer(checkpoint):
    f = checkpoint(lambda p, x, k: jax.nn.relu(x @ p["a"]) * k)
    return lambda p, x: f(p, x, 3) @ p["b"]


def _adds_across_the_border(checkpoint):
    f = checkpoint(lambda x, y: jax.nn.relu(x + y))
    return lambda p, x: f(jax.nn.relu(x @ p["a"]), x @ p["b"]) @ p["c"]


def _has_no_site(checkpoint):
    f = checkpoint(lambda x: x.T.reshape(8, 16))
    return lambda p, x: f(jax.nn.relu(x @ p["a"])) @ p["b"]


def _adds_the_bias_in_another(checkpoint):
    product = checkpoint(lambda x, w: x @ w)
    line = checkpoint(lambda x, b: jax.nn.relu(x + b))
    return lambda p, x: line(product(x, p["a"]), p["bias"]) @ p["b"]


def _is_called_twice(checkpoint):
    f = checkpoint(lambda w, x: jax.nn.relu(x @ w))
    return lambda p, x: f(p["a"], f(p["a"], x)) + f(p["b"], x)


def _is_the_whole_model(checkpoint):
    return checkpoint(lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"])


def _is_jitted_inside_and_outside(checkpoint):
    inner = jax.jit(lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]))
    return jax.jit(lambda p, x: checkpoint(inner)(p, x) @ p["b"])


def _makes_a_weight(checkpoint):
    scaled = checkpoint(lambda w, s: w * jnp.exp(s).T)
    f = checkpoint(lambda w, x: jax.nn.relu(x @ w))

    def fn(p, x):
        w = scaled(p["a"], p["bias"])
        return f(w, x) @ w

    return fn


def _drops_at_random(checkpoint):
    def f(p, x, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, jax.nn.relu(x @ p["a"]) * 2, jnp.zeros_like(x))

    return lambda p, x: checkpoint(f)(p, x, jax.random.key(7)) @ p["b"]


def _is_in_a_loop(checkpoint):
    def fn(p, x):
        body = lambda h, _: (checkpoint(jnp.tanh)(h), None)
        return jax.lax.scan(body, x @ p["a"], None, length=2)[0] @ p["b"]

    return fn


_ODD = (
    _returns_several_values,
    _takes_an_integer,
    _adds_across_the_border,
    _has_no_site,
    _is_in_a_loop,
)
_HEAVY = (
    _closes_over_a_parameter,
    _adds_the_bias_in_another,
    _is_called_twice,
    _is_the_whole_model,
    _is_jitted_inside_and_outside,
    _makes_a_weight,
    _drops_at_random,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [*_ODD, *(pytest.param(make, marks=pytest.mark.heavy) for make in _HEAVY)],
    ids=lambda make: make.__name__[1:],
)
def test_odd_models_compute_the_same_and_leak_nothing(make):
    w = 2 * _normal(3, 16, 16)
    params = {
        "a": w[0],
        "b": w[1],
        "c": w[2],
        "bias": jnp.linspace(-1.0, 1.0, 16)[None],
    }
    options = lambda checkpoint: (make(checkpoint), params, 4 * _normal(8, 16))
    _, qmodel, plain, _, qstate, x = quantized(options)

    def step(model):
        return jax.value_and_grad(lambda p, s: total(model.apply(p, s, x)))

    gc.freeze()  # Each trace is sought in all objects that are younger.
    with jax.checking_leaks():
        jax.eval_shape(step(qmodel), params, qstate)
    gc.unfreeze()
    found, wanted = (jax.jit(step(m))(params, qstate) for m in (qmodel, plain))
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-6 * max(1e-6, np.max(np.abs(b)))
    )
    jax.tree.map(close, found, wanted)
