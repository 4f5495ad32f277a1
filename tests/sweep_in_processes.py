"""A sweep in one or more processes, and one that is killed in the middle.

python tests/sweep_in_processes.py OUT MESH [PROCESS PROCESSES ADDRESS]
"""

import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import qjax
from qjax.search import grid, sweep

AXES = {"*/kernel": [2, 3, 4, 8], "*/output": [4, 8]}
SEEDS = (0, 1)
FAST = 5  # Configurations before the process is killed.


def model() -> tuple[qjax.QuantizedModel, dict[str, np.ndarray], np.ndarray]:
    """Two dense layers on eighths, whose sums are exact."""
    rng = np.random.default_rng(0)
    eighths = lambda *shape: rng.integers(-8, 9, shape).astype(np.float32) / 8
    params = {"a": {"kernel": eighths(4, 6)}, "b": {"kernel": eighths(6, 3)}}
    x = eighths(16, 4)

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    scheme = qjax.Scheme(
        qjax.QSpec(8, narrow_range=True, power_of_two=True),
        qjax.QSpec(8, power_of_two=True),
    )
    return qjax.quantize_model(fn, params, x, scheme=scheme), params, x


def schemes() -> list[qjax.Scheme]:
    qmodel, _, _ = model()
    return grid(qmodel, AXES)


def function(kill: bool = False):
    """An error by scheme and seed; it kills its process after some calls."""
    qmodel, params, x = model()
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    calls = []

    def count(_):
        calls.append(0)
        if len(calls) > FAST:
            os.kill(os.getpid(), signal.SIGKILL)

    def fn(scheme, seed, x):
        if kill:
            jax.debug.callback(count, seed)
        real, found = (
            qmodel.fn(params, x),
            qmodel.apply(params, qstate, x, scheme=scheme),
        )
        error = jnp.sum(jnp.abs(real - found)) * jnp.float32(1 + seed)
        return {"error": error, "bits": scheme.rules[0].bits}

    return fn, x


def results(mesh: str = "none", path: str | None = None, kill: bool = False):
    fn, x = function(kill)
    devices, own = np.asarray(jax.devices()), None
    if mesh == "config":
        own = Mesh(devices, ("config",))
    elif mesh == "data":
        own = Mesh(devices.reshape(-1, 2), ("config", "data"))
    options = {"execution": "loop"} if kill else {"mesh": own}
    return sweep(fn, schemes(), x, seeds=SEEDS, path=path, name="error", **options)


def _main(
    out: str, mesh: str, process: str = "0", processes: str = "1", address: str = ""
) -> None:
    if processes != "1":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process))
    path = pathlib.Path(out)
    found = results(mesh, str(path.with_suffix(".jsonl")), kill=mesh == "kill")
    numbers = {name: own.tolist() for name, own in found.values.items()}
    own = {"devices": jax.device_count(), "execution": found.execution, **numbers}
    path.with_suffix(f".{process}.json").write_text(json.dumps(own))


if __name__ == "__main__":
    _main(*sys.argv[1:])
