"""Quantized models inside `jax.shard_map`, beside the same on whole arrays.

python tests/in_shard_map.py, in a process with several devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax import quantizers

WORD = quantizers.parse("quantized_bits(4,0,1,alpha='auto_po2')")
_PARAMS_STATE_DATA = (P(), P(), P("data"))


def fn(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Functions whole and inlined, a checkpoint, rows of a table, integers."""
    hidden = jax.nn.relu(x @ params["a"] + params["b"])
    hidden = jax.checkpoint(lambda h: jax.nn.gelu(h @ params["c"]))(hidden)
    rows = params["t"][jnp.argmax(x, -1)]
    return (hidden + rows) @ params["d"], jnp.argmax(hidden, -1)


def _sharded(function: Any, specs: Any, out: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


def _assert_equal(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def _assert_close(found: Any, wanted: Any) -> None:
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    jax.tree.map(near, found, wanted)


def _values_and_slopes(apply: Any, add: Any) -> Any:
    def run(params: Any, qstate: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            values = apply(params, qstate, x)
            return add((values[0] ** 2).sum()), values

        slopes, values = jax.grad(loss, has_aux=True)(params)
        return values, slopes

    return run


def check_models(params: Any, x: np.ndarray) -> None:
    """Values and derivatives of all that computes a quantized model."""
    scheme = qjax.Scheme(rules=(qjax.Rule("c", WORD),))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    pairs = _values_and_slopes(qmodel.apply, lambda loss: jax.lax.psum(loss, "data"))
    run = _sharded(pairs, _PARAMS_STATE_DATA, (P("data"), P()))
    whole = jax.jit(_values_and_slopes(qmodel.apply, lambda loss: loss))
    found, slopes = run(params, qstate, x)
    wanted, wanted_slopes = whole(params, qstate, x)
    _assert_equal(found, wanted)
    _assert_close(slopes, wanted_slopes)
    run = _sharded(qmodel.apply_integer, _PARAMS_STATE_DATA, P("data"))
    found = run(params, qstate, x)
    _assert_equal(found, jax.jit(qmodel.apply_integer)(params, qstate, x))

    def moved(p: Any, s: Any, x: jax.Array) -> Any:
        pair = qmodel.apply_and_update(p, s, x)[1], qmodel.observe(p, s, x)
        return jax.tree.map(lambda y: jax.lax.pmax(y, "data"), pair)

    found = _sharded(moved, _PARAMS_STATE_DATA, P())(params, qmodel.init(params, x), x)
    assert float(found[0]["input:0"].high) == x.max()
    assert float(found[1]["output:0"].high) == float(qstate["output:0"].high)


def check_quantizers(w: np.ndarray, x: np.ndarray) -> None:
    """Scales that a loop refines, grids that vary where values do not."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        grid = qjax.abs_max_params(x, qjax.QSpec(8))
        y = x @ quantizers.apply(WORD, w) + quantizers.apply(WORD, x @ w)
        return (y**2).sum() + qjax.fake_quant(w, grid, qjax.QSpec(8)).sum()

    def slope(w: jax.Array, x: jax.Array) -> jax.Array:
        kept = jax.checkpoint(loss)
        return jax.grad(lambda w: jax.lax.psum(kept(w, x), "data"))(w)

    found = _sharded(slope, (P(), P("data")), P())(w, x)
    parts = np.split(x, jax.device_count())
    _assert_close(found, sum(jax.grad(loss)(w, part) for part in parts))


if __name__ == "__main__":
    assert jax.device_count() > 1
    draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype("f")
    shapes = {"a": (6, 8), "b": (8,), "c": (8, 8), "d": (8, 4), "t": (6, 8)}
    data = draw(4, 6)
    check_models({name: draw(*shape) for name, shape in shapes.items()}, data)
    check_quantizers(draw(6, 4), data)
