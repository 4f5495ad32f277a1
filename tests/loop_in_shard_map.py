"""Loops in `jax.shard_map` over parts of a batch, beside the same on all of it.

python tests/loop_in_shard_map.py, in a process with 8 devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import qjax
from qjax.mesh_axes import axes_of, vary

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (16, 5, 4)).astype(np.float32)
W = {"a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32)}
WORD = qjax.QSpec(8, power_of_two=True)
SCHEME = qjax.Scheme(qjax.QSpec(8, power_of_two=True, axis="output"), WORD)


def model(p, x):
    """A loop from zeros, which JAX wants to vary as its end does."""
    step = lambda h, t: (jnp.tanh(t @ p["a"] + h @ p["a"]),) * 2
    start = vary(jnp.zeros(x.shape[::2]), axes_of(jax.typeof(x)))
    return lax.scan(step, start, x.transpose(1, 0, 2))[0]


def _sharded(fn, out):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    own = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": out}
    return jax.jit(jax.shard_map(fn, check_vma=True, **own))


def check(rules):
    """Values, integers, derivatives and moved ranges."""
    scheme = qjax.Scheme(SCHEME.weights, WORD, rules=rules)
    qmodel = qjax.quantize_model(model, W, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, W, [X], progress=False)
    program = qjax.lower(qmodel, W, qstate, X)
    for run in (qmodel.apply, qmodel.apply_integer):
        found = _sharded(lambda p, x, f=run: f(p, qstate, x), P("data"))(W, X)
        np.testing.assert_array_equal(found, program(X))
    loss = lambda p, x: jnp.sum(qmodel.apply(p, qstate, x) ** 2)
    whole = lambda p, x: lax.psum(loss(p, x), "data")
    ours = _sharded(jax.grad(whole), P())(W, X)["a"]
    wanted = jax.jit(jax.grad(loss))(W, X)["a"]
    near = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=near)
    move = lambda p, x: qmodel.apply_and_update(p, qstate, 2 * x, axis_name="data")
    moved = _sharded(move, (P("data"), P()))(W, X)
    own = jax.jit(lambda p, x: qmodel.apply_and_update(p, qstate, 2 * x))(W, X)
    jax.tree.map(np.testing.assert_array_equal, moved, own)


if __name__ == "__main__":
    check(())
    check((qjax.Rule("scan_0/*", WORD, per_step=True),))
