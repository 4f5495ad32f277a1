"""Trainings on several devices, beside the same on one: equal within 1e-6.

python tests/train_sharded.py [PROCESS PROCESSES ADDRESS], with eight devices in all.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import QSpec, Scheme
from tests.training_cases import CASES, PARAMS, X, Y, quantized, trainer

NAMES = ("per channel", "lsq plus")
STEPS = 3


def near(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """Compares trees, relative to the largest number of an array."""
    found, wanted = jax.device_get(found), jax.device_get(wanted)

    def check(a: Any, b: Any) -> None:
        most = np.abs(b).max(initial=0) + 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * most)

    jax.tree.map(check, found, wanted)


def whole(x: Any, sharding: NamedSharding) -> jax.Array:
    """Makes a global array of one that every process holds."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def trained(step: Any, run: Any, batch: Any) -> Any:
    """Runs some steps on one batch."""
    for _ in range(STEPS):
        run, loss = step(run, batch)
    return run, loss


@functools.cache
def alone(name: str) -> Any:
    """Returns a state, what starts and steps a training of it, and its result."""
    qmodel, qstate = quantized(CASES[name], qjax.ema_min_max(0.9))
    start, step = trainer(qmodel)
    return qstate, start, step, trained(jax.jit(step), start(PARAMS, qstate), (X, Y))


def check_sharded_arrays(name: str, mesh: Mesh) -> None:
    """Batches that are split; weights too, by their outputs: tensor parallel."""
    qstate, start, step, wanted = alone(name)
    copied, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    wide = jax.tree.map(lambda w: P(*[None] * (w.ndim - 1), "model"), PARAMS)
    for specs in (jax.tree.map(lambda w: P(), PARAMS), wide):
        params = jax.tree.map(
            lambda w, spec: whole(w, NamedSharding(mesh, spec)), PARAMS, specs
        )
        run = start(params, jax.tree.map(lambda v: whole(v, copied), qstate))
        batch = tuple(whole(v, split) for v in (X, Y))
        run, loss = trained(jax.jit(step), run, batch)
        gather = jax.jit(lambda tree: tree, out_shardings=copied)
        near(gather((run.params, run.qstate, loss)), (*wanted[0][:2], wanted[1]), 2e-6)


def check_local_scales(mesh: Mesh) -> None:
    """A scale per channel of a weight split by its channels needs no other device."""
    spec = QSpec(4, narrow_range=True, axis=-1)
    split = NamedSharding(mesh, P(None, "model"))
    w = whole(np.asarray(PARAMS["a"]["kernel"]), split)
    make = jax.jit(lambda w: qjax.fake_quant(w, qjax.abs_max_params(w, spec), spec))
    text = make.lower(w).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all"))


def check_shard_map(name: str, mesh: Mesh) -> None:
    """Ranges of all parts of a batch, inside of `jax.shard_map` and its check."""
    qstate, start, step, (wanted, loss) = alone(name)
    first = start(PARAMS, qstate)
    parts = jax.shard_map(
        lambda run, batch: step(run, batch, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    found, other = trained(jax.jit(parts), first, (X, Y))
    near(
        (found.params, found.qstate, other), (wanted.params, wanted.qstate, loss), 2e-6
    )


def check_pmap() -> None:
    """Ranges of all parts of a batch under `jax.pmap`."""
    qmodel, qstate = quantized(CASES["min-max"])
    run = lambda s, x: qmodel.apply_and_update(PARAMS, s, x, axis_name="data")
    n = jax.local_device_count()
    parts = (2 * X).reshape(n, -1, X.shape[-1])
    out, moved = jax.pmap(run, axis_name="data", in_axes=(None, 0))(qstate, parts)
    wanted = jax.jit(lambda: qmodel.apply_and_update(PARAMS, qstate, 2 * X))()
    near(out.reshape(wanted[0].shape), wanted[0])
    near(jax.tree.map(lambda v: v[n - 1], moved), wanted[1])


class Normed(nn.Module):
    """A network whose BatchNorm is one over all devices."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes in training."""
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
        return nn.Dense(4)(nn.relu(x))


def check_synchronised_norm(mesh: Mesh) -> None:
    """BatchNorm with the statistics of all devices, quantized."""
    variables = Normed().init(jax.random.key(0), X)
    one = lambda v, x: Normed().apply(v, x, mutable=["batch_stats"])
    all_of = lambda v, x: Normed("data").apply(v, x, mutable=["batch_stats"])
    qmodel = qjax.quantize_model(one, variables, X, scheme=Scheme())
    qstate = qjax.calibrate(qmodel, variables, [X])
    wanted = jax.jit(qmodel.apply)(variables, qstate, X)

    def inside(v: Any, s: Any, x: jax.Array) -> Any:
        own = qjax.quantize_model(all_of, v, x, scheme=Scheme())
        assert [a.name for a in own.sites] == [a.name for a in qmodel.sites]
        return own.apply(v, s, x)

    parts = jax.shard_map(
        inside, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P("data"), P())
    )
    near(jax.jit(parts)(variables, qstate, X), wanted, 2e-6)


def check_noise(mesh: Mesh) -> None:
    """Each part of a batch draws for itself, weights are drawn once for all."""
    word = qjax.quantizers.QuantizedBits(3, 1, use_stochastic_rounding=True)
    fn = lambda w, x: x * w
    qmodel = qjax.quantize_model(fn, jnp.ones(3), X[:, :3], scheme=Scheme(word, word))
    x = np.full((8, 3), 0.3, np.float32)
    qstate = qjax.calibrate(qmodel, jnp.ones(3), [x])
    run = lambda w, x: qmodel.apply(w, qstate, x, key=jax.random.key(0))
    parts = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    out = np.asarray(jax.jit(parts)(jnp.full(3, 0.4), x))
    assert len(np.unique(out, axis=0)) > 1, "All parts drew the same."
    np.testing.assert_array_equal(out, jax.jit(parts)(jnp.full(3, 0.4), x))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        process, processes, address = sys.argv[1:]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process))
    assert jax.device_count() == 8
    devices = np.array(jax.devices()).reshape(4, 2)
    # Ranges in two processes, learned scales in one.
    case = NAMES[jax.process_count() == 1]
    check_sharded_arrays(case, Mesh(devices, ("data", "model")))
    if jax.process_count() == 1:
        line = Mesh(np.array(jax.devices()), ("data",))
        for case in NAMES:
            check_shard_map(case, line)
        check_local_scales(Mesh(devices, ("data", "model")))
        check_pmap()
        check_synchronised_norm(line)
        check_noise(line)
