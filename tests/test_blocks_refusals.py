"""Quantizers in a function, parts that stay float, and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from qjax import quantizers
from qjax.instrumentation import quantize_model
from qjax.observation import calibrate
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


def _weights(**shapes):
    rng = np.random.default_rng(3)
    return {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}


def _lsq(x, p, **options):
    return quantizers.lsq(x, p["s"], quantizers.LSQ(3, **options))


_BETWEEN = {
    "lsq": lambda y, p: _lsq(jax.nn.relu(y), p, signed=False),
    "pact": lambda y, p: quantizers.pact(y, p["s"], quantizers.PACT(3)),
    "dorefa": lambda y, p: quantizers.apply(quantizers.DoReFaActivations(3), y),
    "bits": lambda y, p: quantizers.apply(quantizers.parse("quantized_bits(4,1,1)"), y),
    "po2": lambda y, p: quantizers.apply(quantizers.parse("quantized_po2(4)"), y),
    "jit": lambda y, p: jax.jit(lambda y: _lsq(y, p))(y),
    "vmap": lambda y, p: jax.vmap(lambda y: _lsq(y, p))(y),
    "moved": lambda y, p: _lsq(jnp.flip(y, 1), p),
}


@pytest.mark.parametrize("name", _BETWEEN)
def test_a_quantizer_of_ours_is_a_quantization_point(name):
    fn = lambda p, x: _BETWEEN[name](x @ p["a"], p) @ p["b"]
    params = {**_weights(a=(4, 5), b=(5, 3)), "s": np.float32(0.3)}
    x = images(8, 4)
    qmodel = quantize_model(fn, params, x)
    assert [s.name for s in qmodel.sites] == ["input:0", "a", "b", "output:0"]
    qstate = calibrate(qmodel, params, [x])
    ends = qstate["output:0"]  # Nothing saturates there.
    wide = ends._replace(low=2 * ends.low - 1, high=2 * ends.high + 1)
    qstate = {**qstate, "output:0": wide}
    found = jax.jit(jax.grad(lambda p: qmodel.apply(p, qstate, x).sum()))(params)
    wanted = jax.jit(jax.grad(lambda p: fn(p, x).sum()))(params)
    assert np.any(found["a"]) or name == "po2"
    # A code of 8 bits and one of the quantizer's may move: nothing else differs.
    np.testing.assert_allclose(found["b"], wanted["b"], rtol=0.2, atol=1.0)


def test_a_quantizer_of_ours_on_weights_and_inputs_is_the_only_one():
    def fn(p, x):
        kernel = _lsq(p["a"], p).T
        return _lsq(x.reshape(-1, 4), p) @ kernel

    params, x = {**_weights(a=(5, 4)), "s": np.float32(0.3)}, images(2, 3, 4)
    qmodel = quantize_model(fn, params, x)
    assert [s.name for s in qmodel.sites] == ["output:0"]
    qstate = calibrate(qmodel, params, [x])
    step = qstate["output:0"].high / 100
    np.testing.assert_allclose(
        jax.jit(qmodel.apply)(params, qstate, x), jax.jit(fn)(params, x), atol=step
    )


def test_two_quantizers_of_one_value_stay_two():
    def fn(p, x):
        y = x @ p["a"]
        return _lsq(y, p) @ p["b"], _lsq(y, {"s": 2 * p["s"]}) @ p["b"]

    params = {**_weights(a=(4, 5), b=(5, 3)), "s": np.float32(0.3)}
    names = [s.name for s in quantize_model(fn, params, images(8, 4)).sites]
    assert names == ["input:0", "a", "b", "output:0", "output:1"]


def _shrunk(p, h):
    """A step after which the loop ends: no number is beyond 0.5."""
    return 0.5 * jnp.tanh(h @ p["a"])


def _while(p, x):
    step = functools.partial(_shrunk, p)
    return lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.9, step, x)


def _bounded(p, x):
    step = lambda _, h: jnp.where(jnp.max(jnp.abs(h)) > 0.9, _shrunk(p, h), h)
    return lax.fori_loop(0, 8, step, x)


@jax.custom_vjp
def _product(x, w):
    return x @ w


_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def _forward(x, w):
    return x @ w


_forward.defjvp(lambda x, dx: (x[0] @ x[1], dx[0] @ x[1] + x[0] @ dx[1]))


def _sharded(p, x):
    spec = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    product = lambda x, w: x @ w
    return jax.shard_map(product, mesh=mesh, in_specs=spec, out_specs=spec)(x, p["a"])


@pytest.mark.parametrize(
    "name, wrong, remedy, right",
    [
        ("while", _while, "lax.fori_loop", _bounded),
        (
            "custom_vjp_call",
            lambda p, x: _product(x, p["a"]),
            "without its own derivative",
            lambda p, x: x @ p["a"],
        ),
        (
            "custom_jvp_call",
            lambda p, x: _forward(x, p["a"]),
            "without its own derivative",
            lambda p, x: x @ p["a"],
        ),
        ("shard_map", _sharded, "the function itself", lambda p, x: x @ p["a"]),
    ],
)
def test_a_part_that_would_stay_float_is_refused(name, wrong, remedy, right):
    params, x = _weights(a=(4, 4), b=(4, 4)), images(8, 4)
    with pytest.raises(NotImplementedError, match=rf"`{name}` .* holds a.*{remedy}"):
        quantize_model(wrong, params, x)
    qmodel = quantize_model(right, params, x)
    assert "a" in [s.name for s in qmodel.sites]
    np.testing.assert_allclose(right(params, x), wrong(params, x), rtol=1e-5)


def test_loops_without_a_product_and_checkpoints_stay():
    def fn(p, x):
        y = jax.checkpoint(lambda x: jax.nn.relu(x @ p["a"]))(x)
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h), y) @ p["b"]

    params = _weights(a=(4, 4), b=(4, 2))
    names = [s.name for s in quantize_model(fn, params, images(8, 4)).sites]
    assert {"a/output", "output:0"} <= {*names}


def _scores(p, x):
    return jnp.einsum("bid,bjd->bij", x @ p["a"], x @ p["b"]) / 4


_CAUSAL = np.tril(np.ones((6, 6), bool))


_MASKED = {
    "where": (lambda s, m: jnp.where(m, s, -1e9), bool),
    "least": (lambda s, m: jnp.where(m, s, jnp.finfo(jnp.float32).min), bool),
    "infinity": (lambda s, m: jnp.where(~m, -jnp.inf, s), bool),
    "added": (lambda s, m: s + (1.0 - m) * -1e9, np.float32),
    "subtracted": (lambda s, m: s - 1e30 * (1.0 - m), np.float32),
    "cast": (lambda s, m: (1.0 - m.astype(jnp.float32)) * -1e9 + s, bool),
    "chosen": (lambda s, m: s + jnp.where(m, 0.0, -jnp.inf), bool),
    "under a temperature": (lambda s, m: jnp.where(m, s, -1e9) * 0.5, bool),
    "under a bias by place": (
        lambda s, m: jnp.where(m, s, -1e9) + 0.1 * jnp.arange(6.0)[None, None],
        bool,
    ),
}


@pytest.mark.parametrize("is_input", [True, False])
@pytest.mark.parametrize("name", _MASKED)
def test_a_mask_before_a_softmax_is_no_part_of_a_range(name, is_input):
    mask, dtype = _MASKED[name]
    m = np.broadcast_to(_CAUSAL, (4, 6, 6)).astype(dtype)
    x = images(4, 6, 4)
    model = lambda p, x, m: jax.nn.softmax(mask(_scores(p, x), m)) @ x
    fn, inputs = (model, (x, m)) if is_input else (lambda p, x: model(p, x, m), (x,))
    params = _weights(a=(4, 4), b=(4, 4))
    qmodel = quantize_model(fn, params, *inputs)
    names = [s.name for s in qmodel.sites if s.role == "activation"]
    assert names[:3] == ["input:0", "a/output", "b/output"] and len(names) == 6
    assert names[4:] == ["softmax_0/output", "output:0"]
    qstate = calibrate(qmodel, params, [inputs])
    found = jax.jit(qmodel.apply)(params, qstate, *inputs)
    wanted = jax.jit(fn)(params, *inputs)
    assert np.sum(wanted**2) > 10**3.5 * np.sum((found - wanted) ** 2)


def test_masks_of_flax_attention_are_no_part_of_a_range():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            return nn.MultiHeadDotProductAttention(2, name="heads")(x, mask=mask)

    x = images(3, 5, 8)
    params = jax.jit(Model().init)(jax.random.key(0), x)
    qmodel = quantize_model(Model().apply, params, x)
    qstate = calibrate(qmodel, params, [x])
    found = jax.jit(qmodel.apply)(params, qstate, x)
    wanted = jax.jit(Model().apply)(params, x)
    assert np.sum(wanted**2) > 10**3 * np.sum((found - wanted) ** 2)
    assert all(abs(s.low) < 1e3 for s in qstate.values())


def test_a_mask_that_would_make_a_range_is_refused():
    fn = lambda p, x, m: jnp.where(m, x @ p["a"], -1e9).max(1)
    with pytest.raises(ValueError, match=r"`select_n` .* constant of 1e\+09"):
        quantize_model(
            fn, _weights(a=(4, 4)), images(2, 3, 4), np.ones((2, 3, 4), bool)
        )
